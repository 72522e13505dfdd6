//! The containers of the host as they come and go, and what was told of each. No sockets and no clock: what the engine said
//! and the time are handed in.

use std::collections::BTreeMap;
use std::sync::Arc;

use sidewarden_proto::event::{Body, ContainerGone, ContainerRef, EngineBack, EngineLost, Event, Severity};
use sidewarden_proto::finding::Finding;
use sidewarden_proto::time::Timestamp;

use crate::cis::{self, Case, Declared, History};
use crate::facts::engine::{Exec, Host, Image, Inspect, Told, resolve};
use crate::facts::host::{self, Processes};
use crate::facts::{Facts, Hidden, Machine, Seen};
use crate::watch::{Origin, differ, differ_container, plain};

use super::exec;

/// Names of an image that are told.
const MAX_DIGESTS: usize = 8;

/// One container.
#[derive(Debug)]
struct Known {
    /// As the engine told it last, or why what it told cannot be read.
    inspect: Result<Arc<Inspect>, String>,
    about: ContainerRef,
    history: History,
    told: Option<Vec<Finding>>,
}

/// Everything that is known of the host.
#[derive(Debug, Default)]
pub struct Census {
    host_name: String,
    host: Option<Arc<Host>>,
    images: BTreeMap<String, Arc<Image>>,
    containers: BTreeMap<String, Known>,
    told_of_host: Option<Vec<Finding>>,
    /// Why the engine does not answer, once that was told.
    lost: Option<String>,
    /// Since when the stream of events has been there without a gap.
    watching_since: Option<Timestamp>,
}

impl Census {
    /// Of the host with this name, with nobody in it yet.
    pub fn new(host_name: String) -> Census {
        Census { host_name, ..Census::default() }
    }

    /// The stream of events begins. What happened before is not known.
    pub fn watch_begins(&mut self, at: Timestamp) {
        self.watching_since = Some(at);
    }

    /// The stream of events broke off: from now on nobody knows who has entered.
    pub fn watch_broke(&mut self) {
        self.watching_since = None;
        self.containers.values_mut().for_each(|known| known.history.unbroken = false);
    }

    /// What the engine tells of its host.
    pub fn set_host(&mut self, host: Host) {
        self.host = Some(Arc::new(host));
    }

    /// What it tells of an image.
    pub fn set_image(&mut self, image: Image) {
        self.images.insert(image.inspect.id.clone(), Arc::new(image));
    }

    /// Images of containers of which nothing is known, or whose files were not seen, with a process to look through.
    pub fn images_wanted(&self) -> BTreeMap<String, Option<i32>> {
        let mut wanted = BTreeMap::new();
        for inspect in self.containers.values().filter_map(|known| known.inspect.as_ref().ok()) {
            let pid = inspect.runs().then_some(inspect.state.pid);
            let known = self.images.get(&inspect.image);
            let unseen = known.is_some_and(|image| image.files.known().is_none()) && pid.is_some();
            if known.is_none() || unseen {
                let entry = wanted.entry(inspect.image.clone()).or_insert(None);
                *entry = entry.or(pid);
            }
        }
        wanted
    }

    /// The image as it is known, to be looked into once more.
    pub fn image(&self, id: &str) -> Option<&Arc<Image>> {
        self.images.get(id)
    }

    /// What the engine told of one container. One that does not run and will not is gone.
    pub fn set_container(&mut self, inspect: Inspect, at: Timestamp) -> Vec<Event> {
        if !inspect.is_alive() {
            return self.remove(&inspect.id, at);
        }
        let about = reference(&inspect);
        let history = History { unbroken: self.saw_it_start(&inspect), ..History::default() };
        let fresh = Known { inspect: Ok(Arc::new(inspect)), about, history, told: None };
        match self.containers.get_mut(&fresh.about.id) {
            None => drop(self.containers.insert(fresh.about.id.clone(), fresh)),
            Some(known) => {
                match started(known) {
                    // Who came in while it could not be read was not remembered, and it may be the same still.
                    None => known.history.unbroken = false,
                    before if before != started(&fresh) => known.history = fresh.history,
                    Some(_) => {}
                }
                (known.inspect, known.about) = (fresh.inspect, fresh.about);
            }
        }
        Vec::new()
    }

    /// Whether nobody can have come in before the stream of events began.
    fn saw_it_start(&self, inspect: &Inspect) -> bool {
        let Some(since) = self.watching_since else { return false };
        let started = inspect.state.started_at.parse::<Timestamp>();
        inspect.state.status == "created" || started.is_ok_and(|started| started > since)
    }

    /// What the engine told of one container cannot be read.
    pub fn set_unreadable(&mut self, id: &str, why: String) {
        let about = ContainerRef { id: id.into(), name: id.chars().take(12).collect(), ..ContainerRef::default() };
        let fresh = || Known { inspect: Err(String::new()), about, history: History::default(), told: None };
        self.containers.entry(id.to_owned()).or_insert_with(fresh).inspect = Err(why);
    }

    /// The container is gone.
    pub fn remove(&mut self, id: &str, at: Timestamp) -> Vec<Event> {
        let Some(known) = self.containers.remove(id) else { return Vec::new() };
        let images: Vec<String> =
            self.containers.values().filter_map(|k| Some(k.inspect.as_ref().ok()?.image.clone())).collect();
        self.images.retain(|id, _| images.contains(id));
        if known.told.is_none() {
            return Vec::new();
        }
        let summary = format!("{}: the container is gone", known.about.name);
        vec![Event::new(at, Severity::Info, summary, &Body::from(ContainerGone { container: known.about }))]
    }

    /// Of everything known only `ids` are still there.
    pub fn keep(&mut self, ids: &[String], at: Timestamp) -> Vec<Event> {
        let gone: Vec<String> = self.containers.keys().filter(|id| !ids.contains(id)).cloned().collect();
        gone.iter().flat_map(|id| self.remove(id, at)).collect()
    }

    /// Ids of all that are known.
    pub fn ids(&self) -> Vec<String> {
        self.containers.keys().cloned().collect()
    }

    /// Ids of those that have joined another container's namespace, which change with it.
    pub fn joined(&self) -> Vec<String> {
        let joins = |inspect: &Inspect| {
            let h = &inspect.host_config;
            [&h.network_mode, &h.pid_mode, &h.ipc_mode].iter().any(|mode| mode.starts_with("container:"))
        };
        let joined = self.containers.iter().filter(|(_, known)| known.inspect.as_ref().is_ok_and(|i| joins(i)));
        joined.map(|(id, _)| id.clone()).collect()
    }

    /// Ids of programs that run in the container by `docker exec`, as told when it was looked at last.
    pub fn execs_of(&self, id: &str) -> Vec<String> {
        self.containers.get(id).and_then(|known| Some(known.inspect.as_ref().ok()?.execs.clone())).unwrap_or_default()
    }

    /// Whether nothing was told of the container yet.
    pub fn is_new(&self, id: &str) -> bool {
        self.containers.get(id).is_some_and(|known| known.told.is_none())
    }

    /// Somebody has run a program in a container; `exec` is how, if the engine still knew.
    pub fn entered(
        &mut self,
        id: &str,
        exec_id: &str,
        exec: Option<&Exec>,
        declared: &Declared,
        at: Timestamp,
    ) -> Vec<Event> {
        let Some(known) = self.containers.get_mut(id) else { return Vec::new() };
        let Ok(inspect) = &known.inspect else { return Vec::new() };
        let image = self.images.get(&inspect.image).and_then(|image| image.files.known());
        let roots = image.map_or(&[][..], |files| &files.roots);
        let place = exec::Place { inspect, roots, declared: &declared.root_execs };
        exec::remember(&mut known.history, &place, exec);
        exec::told(&place, &known.about, exec_id, exec, at).into_iter().collect()
    }

    /// The engine has not answered for a while: nothing is known any more. Told once.
    pub fn lose(&mut self, why: &str, at: Timestamp) -> Vec<Event> {
        if self.lost.is_some() {
            return Vec::new();
        }
        self.lost = Some(why.to_owned());
        let summary = format!("the container engine does not answer, and nothing is known of its containers: {why}");
        let lost = Event::new(at, Severity::Critical, summary, &Body::from(EngineLost { why: why.into() }));
        let mut events = vec![lost];
        self.watch_broke();
        events.extend(self.judge(&Machine::new("/"), &Processes::default(), &Declared::default(), None, at));
        events
    }

    /// It answers again.
    pub fn found(&mut self, version: &str, at: Timestamp) -> Vec<Event> {
        if self.lost.take().is_none() {
            return Vec::new();
        }
        let body = EngineBack { version: version.into() };
        vec![Event::new(at, Severity::Notice, "the container engine answers again", &Body::from(body))]
    }

    /// Everything is to be told anew.
    pub fn tell_anew(&mut self) {
        self.told_of_host = None;
        self.containers.values_mut().for_each(|known| known.told = None);
    }

    /// What is true of the host now.
    pub fn host_findings(&self) -> Vec<Finding> {
        self.told_of_host.clone().unwrap_or_default()
    }

    /// What was told last of each container.
    pub fn findings(&self) -> impl Iterator<Item = (&ContainerRef, &[Finding])> {
        self.containers.values().map(|known| (&known.about, known.told.as_deref().unwrap_or_default()))
    }

    /// Judges the containers `only` (all of them if `None`) and the host, and tells what changed.
    pub fn judge(
        &mut self,
        machine: &Machine,
        processes: &Processes,
        declared: &Declared,
        only: Option<&[String]>,
        at: Timestamp,
    ) -> Vec<Event> {
        let mut events = self.judge_host(declared, at);
        let ids = only.map_or_else(|| self.ids(), <[String]>::to_vec);
        // Containers that have found no room in one event are no loss: each has its own.
        for id in ids {
            let Some(known) = self.containers.get(&id) else { continue };
            let facts = self.facts(machine, processes, known);
            let case = Case { facts: &facts, declared, history: &known.history, now: at };
            let findings = cis::judge_container(&case);
            let about = ContainerRef { image_digests: self.digests(known), ..known.about.clone() };
            events.extend(differ_container(known.told.as_deref(), &findings, &self.host_name, &about, at));
            if let Some(known) = self.containers.get_mut(&id) {
                (known.told, known.about) = (Some(findings), about);
            }
        }
        events
    }

    fn judge_host(&mut self, declared: &Declared, at: Timestamp) -> Vec<Event> {
        let facts = match (&self.host, &self.lost) {
            (Some(host), None) => host::of_the_host(host),
            _ => host::unseen(&self.away()),
        };
        let history = History::default();
        let findings = cis::judge_host(&Case { facts: &facts, declared, history: &history, now: at });
        let origin = Origin { host: self.host_name.clone(), containers: Vec::new() };
        let events = differ(self.told_of_host.as_deref(), &findings, &origin, at);
        self.told_of_host = Some(findings);
        events
    }

    /// By what registries know its image: what a scan elsewhere goes by.
    fn digests(&self, known: &Known) -> Vec<String> {
        let image = known.inspect.as_ref().ok().and_then(|inspect| self.images.get(&inspect.image));
        image.map_or_else(Vec::new, |image| {
            image.inspect.repo_digests.iter().take(MAX_DIGESTS).map(|d| plain(d)).collect()
        })
    }

    fn away(&self) -> String {
        let why = self.lost.as_deref().unwrap_or("it was not asked yet");
        format!("an answer of the container engine: {why}")
    }

    fn facts(&self, machine: &Machine, processes: &Processes, known: &Known) -> Facts {
        match (&known.inspect, &self.host, &self.lost) {
            (Ok(inspect), Some(host), None) => host::observe(machine, host, self.told(inspect), processes),
            (Err(why), _, None) => host::unseen(&format!("an answer of the container engine that can be read: {why}")),
            _ => host::unseen(&self.away()),
        }
    }

    fn told(&self, inspect: &Arc<Inspect>) -> Told {
        let find = |name: &str| {
            let all = self.containers.values().filter_map(|known| known.inspect.as_ref().ok());
            let is = |i: &&Arc<Inspect>| {
                i.id == name || i.short_name() == name || (name.len() >= 12 && i.id.starts_with(name))
            };
            all.into_iter().find(is)
        };
        let image = match self.images.get(&inspect.image) {
            Some(image) => Seen::Known(Arc::clone(image), "Docker API: image".into()),
            None => Seen::Hidden(Hidden::unclear("Docker API: image", "it does not tell of this image")),
        };
        Told {
            image,
            network: resolve(inspect, |h| &h.network_mode, find),
            pid: resolve(inspect, |h| &h.pid_mode, find),
            ipc: resolve(inspect, |h| &h.ipc_mode, find),
            inspect: Arc::clone(inspect),
        }
    }
}

fn started(known: &Known) -> Option<&str> {
    known.inspect.as_ref().ok().map(|inspect| inspect.state.started_at.as_str())
}

fn reference(inspect: &Inspect) -> ContainerRef {
    ContainerRef {
        id: inspect.id.clone(),
        name: plain(inspect.short_name()),
        image: plain(&inspect.config.image),
        state: plain(&inspect.state.status),
        image_id: inspect.image.clone(),
        image_digests: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::engine::tests::{INFO, INSPECT};

    const AT: Timestamp = crate::cis::sample::NOW;
    /// Before the sample's container was started.
    const BEGIN: Timestamp = Timestamp::from_secs(1_000_000_000);

    fn inspect(id: &str, change: fn(&mut Inspect)) -> Inspect {
        let mut one: Inspect = serde_json::from_str(INSPECT).unwrap();
        (one.id, one.name) = (id.repeat(64), format!("/{id}"));
        change(&mut one);
        one
    }

    struct Rig(Census, tempfile::TempDir);

    impl Rig {
        fn new() -> Rig {
            let root = tempfile::tempdir().unwrap();
            let machine = Machine::new(root.path());
            let (networks, secrets) = (Seen::Hidden(Hidden::missing("n")), Seen::Hidden(Hidden::missing("s")));
            let host = host::host(&machine, serde_json::from_str(INFO).unwrap(), networks, secrets);
            let mut census = Census::new("h".into());
            census.watch_begins(BEGIN);
            census.set_host(host);
            Rig(census, root)
        }

        fn judge(&mut self) -> Vec<String> {
            let machine = Machine::new(self.1.path());
            kinds(self.0.judge(&machine, &Processes::default(), &Declared::default(), None, AT))
        }

        fn verdict(&self, name: &str, check: &str) -> &'static str {
            let (_, findings) = self.0.findings().find(|(about, _)| about.name == name).unwrap();
            findings.iter().find(|f| f.check == check).unwrap().verdict.word()
        }
    }

    fn kinds(events: Vec<Event>) -> Vec<String> {
        events.into_iter().map(|e| e.kind.into_owned()).collect()
    }

    #[test]
    fn each_container_is_told_once_and_then_only_what_changed() {
        let mut rig = Rig::new();
        rig.0.set_container(inspect("a", |_| ()), AT);
        assert_eq!(rig.judge(), ["posture.baseline", "container.posture"]);
        assert!(rig.judge().is_empty());
        rig.0.set_container(inspect("a", |i| i.host_config.privileged = true), AT);
        let changed = rig.judge();
        assert!(changed.len() >= 3 && changed.iter().all(|k| k == "container.verdict_changed"), "{changed:?}");
        assert_eq!(rig.verdict("a", "privileged"), "fail");
        assert_eq!(
            kinds(rig.0.set_container(inspect("a", |i| i.state.status = "exited".into()), AT)),
            ["container.gone"]
        );
        assert!(kinds(rig.0.keep(&[], AT)).is_empty());
    }

    #[test]
    fn an_engine_that_is_away_makes_everything_unknown_and_nothing_pass() {
        let mut rig = Rig::new();
        rig.0.set_container(inspect("a", |_| ()), AT);
        rig.judge();
        let told = kinds(rig.0.lose("connection refused", AT));
        assert_eq!(told[0], "engine.lost");
        assert!(rig.0.lose("again", AT).is_empty());
        for (_, findings) in rig.0.findings() {
            assert!(findings.iter().all(|f| f.verdict.word() == "unknown"));
        }
        assert!(rig.0.host_findings().iter().all(|f| f.verdict.word() == "unknown"));
        assert_eq!(kinds(rig.0.found("20", AT)), ["engine.back"]);
        rig.judge();
        assert_eq!(rig.verdict("a", "privileged"), "pass");
    }

    #[test]
    fn an_answer_that_cannot_be_read_is_unknown_for_that_container_alone() {
        let mut rig = Rig::new();
        rig.0.set_container(inspect("a", |_| ()), AT);
        rig.0.set_unreadable(&"b".repeat(64), "missing field".into());
        rig.judge();
        assert_eq!(rig.verdict("a", "privileged"), "pass");
        assert_eq!(rig.verdict(&"b".repeat(12), "privileged"), "unknown");
    }

    #[test]
    fn a_namespace_is_judged_through_every_container_it_was_joined_by() {
        let mut rig = Rig::new();
        rig.0.set_container(inspect("a", |i| i.host_config.network_mode = format!("container:{}", "b".repeat(64))), AT);
        rig.0.set_container(inspect("b", |i| i.host_config.network_mode = "container:c".into()), AT);
        rig.0.set_container(inspect("c", |i| i.host_config.network_mode = "host".into()), AT);
        rig.judge();
        assert_eq!([rig.verdict("a", "host-network"), rig.verdict("b", "host-network")], ["fail", "fail"]);
        assert_eq!(rig.0.joined().len(), 2);
        rig.0.remove(&"c".repeat(64), AT);
        rig.judge();
        assert_eq!(rig.verdict("a", "host-network"), "unknown");
    }

    #[test]
    fn who_enters_is_remembered_until_the_container_starts_anew_and_a_gap_is_unknown() {
        let mut rig = Rig::new();
        rig.0.set_container(inspect("a", |_| ()), AT);
        rig.judge();
        assert_eq!(rig.verdict("a", "exec-privileged"), "pass");
        let exec: Exec = serde_json::from_str(
            r#"{"ContainerID":"a","ProcessConfig":{"privileged":true,"user":"","entrypoint":"sh","arguments":null}}"#,
        )
        .unwrap();
        assert_eq!(
            kinds(rig.0.entered(&"a".repeat(64), "e", Some(&exec), &Declared::default(), AT)),
            ["container.exec"]
        );
        rig.judge();
        assert_eq!(rig.verdict("a", "exec-privileged"), "fail");
        rig.0.set_container(inspect("a", |i| i.state.started_at = "2027-01-01T00:00:00.123456789Z".into()), AT);
        rig.judge();
        assert_eq!(rig.verdict("a", "exec-privileged"), "pass");
        rig.0.watch_broke();
        rig.judge();
        assert_eq!(rig.verdict("a", "exec-privileged"), "unknown");
    }

    #[test]
    fn only_a_container_that_was_seen_to_start_is_known_to_be_untouched() {
        let later: Timestamp = "2026-11-22T09:00:00Z".parse().unwrap();
        let after_a_gap = |rig: &mut Rig| {
            rig.0.watch_broke();
            rig.0.watch_begins(later);
        };
        let check = |what: &str, gap: bool, change: fn(&mut Inspect), expected: &str| {
            let mut rig = Rig::new();
            rig.0.set_container(inspect("a", |_| ()), AT);
            if gap {
                after_a_gap(&mut rig);
            }
            rig.0.set_container(inspect("a", change), AT);
            rig.0.set_container(inspect("b", change), AT);
            rig.judge();
            for (name, check) in [("a", "exec-root"), ("b", "exec-privileged")] {
                assert_eq!(rig.verdict(name, check), expected, "{what}: {name}");
            }
        };
        check("as before", false, |_| (), "pass");
        check("it goes on after a gap", true, |_| (), "unknown");
        check("started in the gap", true, |i| i.state.started_at = "2026-11-22T08:59:59Z".into(), "unknown");
        check("started after the gap", true, |i| i.state.started_at = "2026-11-22T09:00:01Z".into(), "pass");
        check("no time that can be read", false, |i| i.state.started_at = "soon".into(), "unknown");
    }

    #[test]
    fn a_container_that_never_ran_was_entered_by_nobody() {
        let mut rig = Rig::new();
        let made =
            |i: &mut Inspect| (i.state.status, i.state.started_at) = ("created".into(), "0001-01-01T00:00:00Z".into());
        rig.0.set_container(inspect("a", made), AT);
        rig.judge();
        assert_eq!(rig.verdict("a", "exec-privileged"), "pass");
    }

    #[test]
    fn what_was_seen_of_a_container_outlives_an_answer_that_cannot_be_read() {
        let mut rig = Rig::new();
        let exec: Exec = serde_json::from_str(
            r#"{"ContainerID":"a","ProcessConfig":{"privileged":true,"user":"","entrypoint":"sh","arguments":null}}"#,
        )
        .unwrap();
        for name in ["a", "b"] {
            rig.0.set_container(inspect(name, |_| ()), AT);
        }
        rig.0.entered(&"a".repeat(64), "e", Some(&exec), &Declared::default(), AT);
        for name in ["a", "b"] {
            rig.0.set_unreadable(&name.repeat(64), "half an answer".into());
            rig.0.set_container(inspect(name, |_| ()), AT);
        }
        rig.judge();
        assert_eq!([rig.verdict("a", "exec-privileged"), rig.verdict("b", "exec-privileged")], ["fail", "unknown"]);
    }

    #[test]
    fn an_exec_of_a_container_that_is_gone_is_nothing() {
        assert!(Rig::new().0.entered("x", "e", None, &Declared::default(), AT).is_empty());
    }
}
