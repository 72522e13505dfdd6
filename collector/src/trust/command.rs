//! `sidewarden-collector trust …`: for people, beside a running collector, on its data directory.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Subcommand;
use sidewarden_proto::directive::Directive;
use sidewarden_proto::enrol::Der;
use sidewarden_proto::identity::{Sha256, TrustDomain};
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls;

use super::judge::{Judged, Kind, judge};
use super::matrix::{Cell, Door, Matrix, Told, matrix};
use super::read::{self, MAX_FILE};
use super::store::{Imported, Serves, Store};
use crate::config::Config;
use crate::table::{clean, table};

/// What can be done about trust.
#[derive(Subcommand)]
pub enum TrustCommand {
    /// Show whom agents are told to trust: our own roots and the imported ones
    List {
        /// JSON for programs
        #[arg(long)]
        json: bool,
    },
    /// Say what is in a file (PEM, DER, PKCS#7; a chain in any order) and let agents trust its roots
    Import {
        /// The file
        file: PathBuf,
        /// The trust domain whose workloads it speaks for; not needed for a SPIFFE root, which names it
        #[arg(long = "for", value_name = "TRUST_DOMAIN", conflicts_with = "for_dns")]
        domain: Option<TrustDomain>,
        /// It speaks for peers that have DNS names and no SPIFFE ID
        #[arg(long)]
        for_dns: bool,
        /// Trust a certificate that is no CA: whoever has its key can then speak for every name there
        #[arg(long)]
        allow_leaf: bool,
        /// Only say what would be done
        #[arg(long)]
        dry_run: bool,
        /// Where it comes from, for those who read the list later
        #[arg(long, default_value = "")]
        note: String,
    },
    /// Trust an imported root no longer; live connections that depend on it end
    Remove {
        /// The begin of its SHA-256, as `trust list` shows it
        sha256: String,
    },
}

/// Does it.
pub fn run(config: &Config, command: TrustCommand, now: Timestamp) -> anyhow::Result<()> {
    let store = Store::new(&config.data_dir);
    match command {
        TrustCommand::Import { .. } | TrustCommand::Remove { .. } if config.ca.leader.is_some() => {
            anyhow::bail!("directives are made by the collector that ca.leader names: import and remove there")
        }
        TrustCommand::List { json } => list(&store, config, json, now),
        TrustCommand::Import { file, domain, for_dns, allow_leaf, dry_run, note } => {
            let wanted = Wanted { domain, for_dns, allow_leaf, note };
            let roots = choose(&file, &wanted, config, now)?;
            if dry_run {
                eprintln!("Nothing was changed.");
                return Ok(());
            }
            let new = store.add(roots)?;
            eprintln!("{new} root(s) imported. A running collector tells its agents within a few seconds.");
            Ok(())
        }
        TrustCommand::Remove { sha256 } => {
            let removed = store.remove(&sha256)?;
            eprintln!("Root {} for {} is no longer trusted.", removed.sha256(), removed.serves);
            Ok(())
        }
    }
}

/// What was asked for.
struct Wanted {
    domain: Option<TrustDomain>,
    for_dns: bool,
    allow_leaf: bool,
    note: String,
}

/// Says what is in the file, and picks what is to be trusted; all of it or nothing.
fn choose(file: &Path, wanted: &Wanted, config: &Config, now: Timestamp) -> anyhow::Result<Vec<Imported>> {
    let found = read::read(&read_file(file)?).with_context(|| file.display().to_string())?;
    if found.has_key {
        eprintln!(
            "WARNING: {} holds a private key, too. It was not read; it should not be carried around.",
            file.display()
        );
    }
    let judged = judge(&found.certificates, now);
    print!("{}", describe(&judged, wanted.allow_leaf, now));
    let (mut roots, mut refused) = (Vec::new(), Vec::new());
    for root in judged.iter().filter(|root| root.is_top) {
        let faults = root.refusals(wanted.allow_leaf);
        refused.extend(faults.iter().map(|fault| format!("{}: {fault}", clean(&root.subject))));
        if faults.is_empty() {
            let serves = serves(root, wanted, config)?;
            roots.push(Imported { serves, der: Der(root.der.to_vec()), at_us: now, note: wanted.note.clone() });
        }
    }
    anyhow::ensure!(refused.is_empty(), "nothing was imported:\n  {}", refused.join("\n  "));
    Ok(roots)
}

fn read_file(path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).with_context(|| path.display().to_string())?;
    file.take(MAX_FILE as u64 + 1).read_to_end(&mut bytes).with_context(|| path.display().to_string())?;
    Ok(bytes)
}

/// For whom a root is to speak: never for our own trust domain, whose roots are our CA's.
fn serves(root: &Judged, wanted: &Wanted, config: &Config) -> anyhow::Result<Serves> {
    if wanted.for_dns {
        return Ok(Serves::Dns);
    }
    let domain = wanted.domain.clone().or_else(|| root.trust_domain.clone());
    let domain = domain.with_context(|| {
        format!("{} does not say for whom it speaks: use --for <trust domain>, or --for-dns", clean(&root.subject))
    })?;
    if root.trust_domain.as_ref().is_some_and(|own| *own != domain) {
        anyhow::bail!("{} is a SPIFFE root that names another trust domain than {domain}", clean(&root.subject));
    }
    anyhow::ensure!(
        domain != config.trust_domain,
        "{domain} is our own trust domain: its roots are those of our CA, and of the one that `[identity]` of the settings names"
    );
    Ok(Serves::Domain(domain))
}

fn describe(judged: &[Judged], allow_leaf: bool, now: Timestamp) -> String {
    let rows = judged.iter().map(|one| {
        let does = match (one.is_top, one.refusals(allow_leaf).is_empty()) {
            (true, true) => "trusted from now on",
            (true, false) => "REFUSED",
            (false, _) => "not needed: peers show it",
        };
        let soon = if one.ends_soon(now) && one.not_after > now { " (soon)" } else { "" };
        let until = format!("{}{soon}", one.not_after);
        let serves = if one.serves.is_empty() { "-".to_owned() } else { one.serves.join(", ") };
        let signed_by = if one.kind == Kind::Root { "itself".to_owned() } else { clean(&one.issuer) };
        let hash = one.sha256.to_string()[..16].to_owned();
        vec![
            clean(&one.subject),
            one.kind.word().into(),
            signed_by,
            one.key.clone(),
            clean(&serves),
            until,
            hash,
            does.into(),
        ]
    });
    table(&["CERTIFICATE", "IS", "SIGNED BY", "KEY", "NAMES", "UNTIL", "SHA-256", "WILL BE"], rows)
}

fn list(store: &Store, config: &Config, json: bool, now: Timestamp) -> anyhow::Result<()> {
    let own = own_roots(config)?;
    let own = own.into_iter().map(|der| (config.trust_domain.to_string(), der, "our own CA".to_owned()));
    // Before the first start there is no directive, and nobody was told of any.
    let further = directive(config).ok().and_then(|told| told.foreign.domains.get(&config.trust_domain).cloned());
    let further = further.into_iter().flatten();
    let further = further.map(|der| (config.trust_domain.to_string(), der, "another CA, by `[identity]`".to_owned()));
    let imported = store.roots()?.into_iter().map(|root| (root.serves.to_string(), root.der, root.note));
    let all: Vec<_> = own.chain(further).chain(imported).collect();
    if json {
        let rows = all.iter().map(|(serves, der, note)| row_json(serves, der, note));
        println!("{}", serde_json::Value::Array(rows.collect()));
        return Ok(());
    }
    let rows = all.iter().map(|(serves, der, note)| row(serves, der, note, now));
    print!("{}", table(&["SPEAKS FOR", "ROOT", "KEY", "UNTIL", "SHA-256", "NOTE"], rows));
    Ok(())
}

fn judged(der: &Der) -> Option<Judged> {
    judge(&[der.0.clone().into()], Timestamp::now()).into_iter().next()
}

fn row(serves: &str, der: &Der, note: &str, now: Timestamp) -> Vec<String> {
    let hash = Sha256::of(&[&der.0]).to_string();
    let Some(root) = judged(der) else {
        return vec![serves.into(), "cannot be read".into(), String::new(), String::new(), hash, clean(note)];
    };
    let state = match root.not_after {
        end if end <= now => format!("ENDED {end}"),
        end if root.ends_soon(now) => format!("{end} (soon)"),
        end => end.to_string(),
    };
    vec![serves.into(), clean(&root.subject), root.key, state, hash[..16].into(), clean(note)]
}

fn row_json(serves: &str, der: &Der, note: &str) -> serde_json::Value {
    let root = judged(der);
    serde_json::json!({
        "serves": serves,
        "sha256": Sha256::of(&[&der.0]),
        "subject": root.as_ref().map(|root| root.subject.clone()),
        "key": root.as_ref().map(|root| root.key.clone()),
        "not_after_us": root.as_ref().map(|root| root.not_after.0),
        "note": note,
    })
}

/// What the collector tells its agents, as it lies on disk.
fn directive(config: &Config) -> anyhow::Result<Directive> {
    let path = config.data_dir.join("directive.json");
    let hint = || format!("{}: start the collector once, or say where it is with --data-dir", path.display());
    let bytes = std::fs::read(&path).with_context(hint)?;
    serde_json::from_slice(&bytes).with_context(|| path.display().to_string())
}

fn own_roots(config: &Config) -> anyhow::Result<Vec<Der>> {
    Ok(directive(config)?.bundle)
}

/// Prints who trusts whom; an error where somebody lacks something, for the exit code.
pub fn verify(
    config: &Config,
    agents: &serde_json::Value,
    certificates: &serde_json::Value,
    json: bool,
) -> anyhow::Result<()> {
    let (told, directive) = (told(agents)?, directive(config)?);
    let (name, admitted) = (tls::collector_id(&config.trust_domain).to_string(), &config.agents.trust_domains[..]);
    let door = Door { name, admitted, first_to_end: first_of_collector(certificates) };
    let found = matrix(&told, &directive, &door);
    if json {
        println!("{}", serde_json::to_string(&found)?);
    } else {
        print!("{}", in_words(&found));
    }
    anyhow::ensure!(found.is_whole(), "somebody lacks a root, or has not told which ones it holds");
    Ok(())
}

fn told(agents: &serde_json::Value) -> anyhow::Result<Vec<Told>> {
    let list = agents["agents"].as_array().context("the answer has no agents")?;
    let one = |agent: &serde_json::Value| {
        let id = format!("{}#{}", agent["workload"].as_str()?, agent["instance"].as_str()?).parse().ok()?;
        let holds = serde_json::from_value(agent["trust"].clone()).ok();
        let certificate_ends = agent["certificate"]["not_after"].as_i64().map(Timestamp);
        let elsewhere = agent["certificate"]["elsewhere"] == true;
        Some(Told { agent: id, holds, certificate_ends, elsewhere })
    };
    Ok(list.iter().filter_map(one).collect())
}

/// The API names the first one to end first.
fn first_of_collector(certificates: &serde_json::Value) -> Option<(Timestamp, String)> {
    let all = certificates["certificates"].as_array()?;
    let first = all.iter().find(|one| one["what"] != "agent")?;
    let (what, name) = (first["what"].as_str()?, first["name"].as_str()?);
    Some((Timestamp(first["not_after_us"].as_i64()?), format!("{} {name}", what.replace('_', " ")).trim().to_owned()))
}

fn in_words(found: &Matrix) -> String {
    let heads: Vec<&str> =
        ["WHO"].into_iter().chain(found.columns.iter().map(String::as_str)).chain(["FIRST TO END"]).collect();
    let rows = found.rows.iter().map(|row| {
        let cells = row.cells.iter().map(|cell| match cell {
            Cell::Trusts => "trusts".to_owned(),
            Cell::OtherCa => "trusts (its other CA)".to_owned(),
            Cell::Lacks { roots } => format!("LACKS {}", roots.len()),
            Cell::ByItself => "trusts (by its own files)".to_owned(),
            Cell::No => "-".to_owned(),
            Cell::NotTold => "not told".to_owned(),
        });
        let end =
            row.first_to_end.as_ref().map_or_else(|| "-".to_owned(), |(at, what)| format!("{at} {}", clean(what)));
        [row.agent.clone()].into_iter().chain(cells).chain([end]).collect()
    });
    let mut text = table(&heads, rows);
    for row in &found.rows {
        for (column, cell) in found.columns.iter().zip(&row.cells) {
            let Cell::Lacks { roots } = cell else { continue };
            roots.iter().for_each(|root| text += &format!("{} lacks a root of {column}: {}\n", row.agent, clean(root)));
        }
    }
    text
}
