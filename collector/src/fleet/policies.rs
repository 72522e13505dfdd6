//! The policy in force: checked before it is signed, its version only growing, an old text included; and the ones before.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use sidewarden_proto::config::Faults;
use sidewarden_proto::directive::{Directive, Signed};
use sidewarden_proto::policy::connections::Rule;
use sidewarden_proto::policy::party::Party;
use sidewarden_proto::policy::{Applied, Policy};
use sidewarden_proto::time::Timestamp;

use super::{Directives, DirectivesError, Fleet, RevokeError};
use crate::ca::{CaError, Issuer, make_dir, write_secret};

/// What an agent must understand not to go on without any policy.
const FIRST_WITH_POLICY: u32 = 3;
/// Most versions that are kept.
const MAX_KEPT: usize = 100;
/// Most agents that are named before something must be confirmed.
const MAX_NAMES: usize = 20;

/// Somebody wants a policy in force.
#[derive(Clone, Debug)]
pub struct Application {
    /// The document.
    pub text: String,
    /// The reason.
    pub why: String,
    /// Who, by their own account.
    pub by: String,
    /// The version that comes back, if it is an old one.
    pub restores: Option<u64>,
    /// The consequences were told and are wanted.
    pub confirmed: bool,
}

/// A policy that is or was in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Its version.
    pub version: u64,
    /// When it was put in force.
    pub at_us: Timestamp,
    /// The reason given.
    pub why: String,
    /// By whom.
    pub by: String,
    /// The older version whose text it has, if somebody went back to one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restores: Option<u64>,
    /// The document.
    pub text: String,
}

/// The policies so far, one file each.
#[derive(Clone, Debug)]
pub struct History {
    dir: PathBuf,
}

impl History {
    /// In `dir`, which is made when there is something to keep.
    pub fn new(dir: &Path) -> History {
        History { dir: dir.to_owned() }
    }

    /// Every version that is kept, the oldest first.
    pub fn all(&self) -> Result<Vec<Kept>, CaError> {
        self.versions()?.into_iter().map(|version| self.read(version)).collect()
    }

    /// One of them, if it is kept.
    pub fn version(&self, version: u64) -> Result<Option<Kept>, CaError> {
        if self.versions()?.contains(&version) { self.read(version).map(Some) } else { Ok(None) }
    }

    fn path(&self, version: u64) -> PathBuf {
        self.dir.join(format!("{version}.json"))
    }

    fn versions(&self) -> Result<Vec<u64>, CaError> {
        let access = |error| CaError::Access { path: self.dir.clone(), error };
        let entries = match std::fs::read_dir(&self.dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(access)?,
        };
        let mut versions = Vec::new();
        for entry in entries {
            let name = entry.map_err(access)?.file_name();
            versions.extend(name.to_str().and_then(|name| name.strip_suffix(".json")?.parse::<u64>().ok()));
        }
        versions.sort_unstable();
        Ok(versions)
    }

    fn read(&self, version: u64) -> Result<Kept, CaError> {
        let path = self.path(version);
        let access = |error| CaError::Access { path: path.clone(), error };
        let bytes = std::fs::read(&path).map_err(access)?;
        serde_json::from_slice(&bytes).map_err(|error| access(error.into()))
    }

    /// Keeps one, and lets the oldest go.
    fn keep(&self, kept: &Kept) -> Result<(), CaError> {
        make_dir(&self.dir)?;
        let path = self.path(kept.version);
        let bytes =
            serde_json::to_vec(kept).map_err(|error| CaError::Access { path: path.clone(), error: error.into() })?;
        write_secret(&path, &bytes)?;
        let versions = self.versions()?;
        for version in &versions[..versions.len().saturating_sub(MAX_KEPT)] {
            // One that stays a while longer does no harm.
            let _ = std::fs::remove_file(self.path(*version));
        }
        Ok(())
    }
}

/// Reads a policy that somebody wants in force.
///
/// What nobody would enforce is a fault here, and not in the reader that agents share: under a policy that they cannot
/// read they let nothing through, and one with such a line may be in force.
pub fn read(text: &str) -> Result<Policy, Faults> {
    let policy = Policy::parse(text)?;
    let rules = [("allow", &policy.allow), ("deny", &policy.deny)];
    let faults: Vec<String> = rules.iter().flat_map(|(kind, rules)| unenforced(kind, rules)).collect();
    if faults.is_empty() { Ok(policy) } else { Err(Faults(faults)) }
}

/// Listeners are looked at by the agent of who is called.
fn unenforced(kind: &str, rules: &[Rule]) -> Vec<String> {
    let agentless = |rule: &Rule| rule.to.iter().find(|party| matches!(party, Party::Dns(_))).cloned();
    let limited = rules.iter().filter(|rule| !rule.listeners.is_empty());
    let found = limited.filter_map(|rule| Some((rule.line, agentless(rule)?)));
    found
        .map(|(line, party)| {
            format!(
                "line {line}: [[{kind}]] has `listeners`, which the agent of who is called looks at, and {party} has none: write it in a line of its own without `listeners`"
            )
        })
        .collect()
}

/// Puts a policy in force; it, and the version of the directive that carries it.
///
/// What agents would do that are too old for it must be `confirmed`.
pub fn apply(
    issuer: &Issuer,
    directives: &Directives,
    fleet: &Fleet,
    asked: Application,
    now: Timestamp,
) -> Result<(Applied, u64), RevokeError> {
    // What was in force once may always come back.
    let parse = if asked.restores.is_some() { Policy::parse } else { read };
    let policy = parse(&asked.text).map_err(|faults| RevokeError::Wrong(faults.to_string()))?;
    let told = too_old(fleet, policy.needs());
    if !asked.confirmed && !told.is_empty() {
        return Err(RevokeError::Unconfirmed(told));
    }
    let own = issuer.authority().own().borrow().clone();
    let history = directives.policies();
    let mut applied = Applied { version: 1, text: asked.text.clone(), needs: policy.needs() };
    let directive = directives.change(&own, now, |directive| {
        let before = directive.policy.as_ref();
        if let Some(same) = before.filter(|before| before.text == applied.text) {
            applied = same.clone();
            return Ok::<_, RevokeError>(directive);
        }
        if let Some(before) = before {
            applied.version = before.version + 1;
            keep_before_history(&history, before, &directive)?;
        }
        let next =
            Directive { version: directive.version + 1, issued_us: now, policy: Some(applied.clone()), ..directive };
        // The history keeps no policy that can never be in force.
        Signed::sign(&next, &own).map_err(DirectivesError::from)?;
        let Application { why, by, restores, text, .. } = asked;
        history.keep(&Kept { version: applied.version, at_us: now, why, by, restores, text })?;
        Ok(next)
    })?;
    Ok((applied, directive))
}

/// A policy from before there was a history is kept, too: somebody may want it back.
fn keep_before_history(history: &History, before: &Applied, directive: &Directive) -> Result<(), CaError> {
    if history.version(before.version)?.is_some() {
        return Ok(());
    }
    let (why, by) = ("put in force before a history was kept".into(), String::new());
    let (version, text, at_us) = (before.version, before.text.clone(), directive.issued_us);
    history.keep(&Kept { version, at_us, why, by, restores: None, text })
}

/// The text to go back to: of `version`, or of the one before the one in force.
pub fn earlier(directives: &Directives, version: Option<u64>) -> Result<Kept, RevokeError> {
    let in_force = directives.now().directive.policy.as_ref().map_or(0, |policy| policy.version);
    let history = directives.policies();
    let wanted = match version {
        Some(version) => history.version(version)?,
        None => history.all()?.into_iter().rfind(|kept| kept.version < in_force),
    };
    wanted.ok_or_else(|| {
        let which =
            version.map_or_else(|| "policy before the one in force".to_owned(), |version| format!("policy {version}"));
        RevokeError::Wrong(format!("there is no {which}: see `policy history`"))
    })
}

/// What those connected agents would do that do not understand as much as is needed.
fn too_old(fleet: &Fleet, needs: u32) -> Vec<String> {
    let live = fleet.all();
    let names = |wanted: &dyn Fn(u32) -> bool| {
        let is_wanted = |live: &super::Live| wanted(live.understands.load(Ordering::Relaxed));
        let found: Vec<String> = live.iter().filter(|(_, l)| is_wanted(l)).map(|(id, _)| id.to_string()).collect();
        let more = found.len().saturating_sub(MAX_NAMES);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        (!found.is_empty()).then(|| format!("{}{more}", found[..found.len().min(MAX_NAMES)].join(", ")))
    };
    let without = names(&|understands| understands < FIRST_WITH_POLICY)
        .map(|who| format!("these agents are too old for policies and go on without: {who}"));
    let stopped = names(&|understands| (FIRST_WITH_POLICY..needs).contains(&understands)).map(|who| {
        format!("these agents are too old for what it says, and let nothing through until they are updated: {who}")
    });
    without.into_iter().chain(stopped).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use sidewarden_proto::identity::Sha256;

    use super::*;
    use crate::ca::{Authority, Register, Terms, Vault};
    use crate::fleet::{Coming, Roots};

    struct Scene {
        _dir: tempfile::TempDir,
        issuer: Issuer,
        directives: Directives,
        fleet: Arc<Fleet>,
    }

    impl Scene {
        fn new() -> Scene {
            let dir = tempfile::tempdir().unwrap();
            let (domain, now, day) = ("x.example".parse().unwrap(), Timestamp::now(), Duration::from_secs(86_400));
            let terms = Terms { domain, names: Vec::new(), own_life: day, vault: Vault::default() };
            let (authority, _) = Authority::open(&dir.path().join("ca"), terms, now).unwrap();
            let authority = Arc::new(authority);
            let own = authority.own().borrow().clone();
            let path = dir.path().join("directive.json");
            let roots = Roots { bundle: authority.bundle(), ..Roots::default() };
            let directives = Directives::open(&path, authority.domain(), roots, &own, now).unwrap();
            let register = Register::open(&dir.path().join("ca.db")).unwrap();
            Scene { _dir: dir, issuer: Issuer::new(authority, register, day, day), directives, fleet: Arc::default() }
        }

        fn apply(&self, text: &str, confirmed: bool) -> Result<u64, RevokeError> {
            self.apply_as(None, text, confirmed)
        }

        fn apply_as(&self, restores: Option<u64>, text: &str, confirmed: bool) -> Result<u64, RevokeError> {
            let (why, by) = ("test".to_owned(), "me".to_owned());
            let asked = Application { text: text.into(), why, by, restores, confirmed };
            apply(&self.issuer, &self.directives, &self.fleet, asked, Timestamp::now())
                .map(|(applied, _)| applied.version)
        }
    }

    const DENY: &str = "[[deny]]\nfrom = ['shop/a']\nto = ['shop/b']\n";
    const GATE: &str = "[[gate]]\nname = 'g'\nchecks = ['privileged']\n";

    #[test]
    fn every_policy_is_kept_and_an_old_one_comes_back_as_a_new_version() {
        let scene = Scene::new();
        assert!(earlier(&scene.directives, None).is_err(), "there is none");
        assert_eq!((scene.apply(DENY, false).unwrap(), scene.apply(GATE, false).unwrap()), (1, 2));
        assert_eq!(scene.apply(GATE, false).unwrap(), 2, "the same text is the same version");
        let before = earlier(&scene.directives, None).unwrap();
        assert_eq!((before.version, before.text.as_str()), (1, DENY));
        assert_eq!(scene.apply(&before.text, false).unwrap(), 3);
        let kept: Vec<(u64, String)> =
            scene.directives.policies().all().unwrap().into_iter().map(|kept| (kept.version, kept.text)).collect();
        assert_eq!(kept, [(1, DENY.into()), (2, GATE.into()), (3, DENY.into())]);
        assert_eq!(earlier(&scene.directives, Some(2)).unwrap().text, GATE);
        assert!(earlier(&scene.directives, Some(9)).is_err());
    }

    #[test]
    fn listeners_of_who_has_no_agent_are_a_fault_for_whoever_applies_them_and_for_nobody_else() {
        let policy = |to: &str, listeners: &str| {
            format!("[[allow]]\nfrom = ['*']\nto = ['*']\n[[deny]]\nfrom = ['shop/a']\nto = [{to}]\n{listeners}\n")
        };
        let (ports, names) = ("listeners = [5432]", "listeners = ['db.example.com']");
        for (to, listeners, good) in [
            ("'shop/b'", ports, true),
            ("'anybody'", ports, true),
            ("'spiffe://partner/pay/card'", ports, true),
            ("'dns:db.example.com'", "", true),
            ("'dns:db.example.com'", "listeners = []", true),
            ("'dns:db.example.com'", ports, false),
            ("'shop/b', 'dns:db.example.com'", names, false),
        ] {
            let (scene, text) = (Scene::new(), policy(to, listeners));
            assert!(Policy::parse(&text).is_ok(), "agents read it: {text}");
            let told = scene.apply(&text, false).err().map(|error| error.to_string()).unwrap_or_default();
            assert_eq!(told.is_empty(), good, "{text}: {told}");
            assert!(
                good || told.contains("line 4: [[deny]]") && told.contains("dns:db.example.com has none"),
                "{told}"
            );
            assert!(scene.apply_as(Some(1), &text, false).is_ok(), "what was in force may come back");
        }
        let both =
            policy("'dns:x.example'", ports) + "[[allow]]\nfrom = ['*']\nto = ['dns:y.example']\nlisteners = [1]\n";
        assert_eq!(read(&both).unwrap_err().0.len(), 2, "all faults at once");
    }

    #[test]
    fn a_policy_from_before_the_history_can_be_gone_back_to() {
        let scene = Scene::new();
        scene.apply(DENY, false).unwrap();
        std::fs::remove_dir_all(&scene.directives.policies().dir).unwrap();
        scene.apply(GATE, false).unwrap();
        assert_eq!(earlier(&scene.directives, None).unwrap().text, DENY);
    }

    #[test]
    fn the_oldest_go_once_there_are_too_many() {
        let scene = Scene::new();
        for i in 0..=MAX_KEPT {
            scene.apply(&format!("# {i}\n"), false).unwrap();
        }
        let versions = scene.directives.policies().versions().unwrap();
        assert_eq!((versions.len(), versions[0]), (MAX_KEPT, 2));
    }

    #[test]
    fn what_agents_would_do_that_are_too_old_must_be_confirmed() {
        for (understands, text, expected) in [
            (2, GATE, Some("go on without")),
            (2, DENY, Some("go on without")),
            (3, GATE, None),
            (3, DENY, Some("let nothing through")),
            (4, DENY, None),
        ] {
            let scene = Scene::new();
            let agent = Arc::new("spiffe://x.example/shop/web#c1".parse().unwrap());
            let coming = Coming { understands, ..Coming::default() };
            let _place = scene.fleet.enter(&agent, Sha256([1; 32]), false, coming, Timestamp(1)).unwrap();
            let told = scene.apply(text, false).err().map(|error| error.to_string());
            match expected {
                None => assert_eq!(told, None, "{understands} {text}"),
                Some(words) => assert!(told.as_ref().is_some_and(|told| told.contains(words)), "{told:?}"),
            }
            assert!(scene.apply(text, true).is_ok());
        }
    }
}
