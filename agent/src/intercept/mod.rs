//! Packet rules around the workload: nothing gets in past the agent. Put in force by a one-shot that alone has
//! CAP_NET_ADMIN; the agent itself never needs it, and sees by their [`Mark`] whether they are there.
//!
//! `rules` writes them and `bypass` says who could get past them; both are pure. This module has them put in force,
//! compared and removed by `nft`.

mod bypass;
mod mark;
mod nft;
mod rules;

use std::fmt::Write as _;
use std::time::Duration;

use nix::unistd::getegid;
use tokio::time::{sleep, timeout};

pub use bypass::bypasses;
pub use mark::Mark;
pub use nft::NftError;
pub use rules::{Ruleset, TABLE, ruleset};

use crate::config::{Config, Inward, Outward};
use crate::facts::{self, Machine, Process};

/// Why something could not be done.
#[derive(Debug, thiserror::Error)]
pub enum InterceptError {
    /// The configuration asks for no rules.
    #[error("there is nothing to do: set `intercept.inbound` or `intercept.outbound` in the configuration")]
    Off,
    /// Our network namespace is the host's.
    #[error(
        "this is the host's own network namespace, which the rules would cut off: run in the workload's (docker run --network container:NAME)"
    )]
    HostNetwork,
    /// Whether it is the host's cannot be told.
    #[error("it cannot be told whether this is the host's network namespace: {0}")]
    UnknownNetwork(String),
    /// `nft`.
    #[error(transparent)]
    Nft(#[from] NftError),
    /// The rules were taken and are not what was asked for.
    #[error("the rules that the kernel has are not those that were installed:\n{0}")]
    Differs(String),
    /// The agent does not run with the group that the rules know it by.
    #[error(
        "`intercept.gid` is {wanted}, and this agent runs with group {actual}: its own connections would be treated as the workload's; run it with that group (docker run --user 0:{wanted}, Compose `user: \"0:{wanted}\"`, Kubernetes `runAsGroup: {wanted}`)"
    )]
    Group {
        /// The group that the rules name.
        wanted: u32,
        /// Ours.
        actual: u32,
    },
    /// Nobody put the rules in force in time.
    #[error(
        "the rules of `intercept` are not in force {0:?} after the start, and without them the command is not started: run the one-shot with `intercept install` in this network namespace"
    )]
    NotInForce(Duration),
    /// The wrapped command would have the agent's group.
    #[error("with `intercept` the wrapped command needs a group of its own: set `exec.user`")]
    SharesGroup,
}

/// What `verify` found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// What is as it should be.
    pub good: Vec<String>,
    /// What is not.
    pub bad: Vec<String>,
}

/// The rules, as `nft -f` reads them.
pub fn print(config: &Config) -> Result<String, InterceptError> {
    Ok(wanted(config)?.script())
}

/// Puts the rules in force, in place of whatever we had put there before; says what they do.
pub fn install(config: &Config) -> Result<String, InterceptError> {
    let rules = wanted(config)?;
    refuse_on_host()?;
    nft::run(&["-f", "-"], &rules.script())?;
    match differences(&rules)? {
        difference if difference.is_empty() => Ok(summary(config, &rules)),
        difference => Err(InterceptError::Differs(difference)),
    }
}

/// Removes them. Says whether there were any.
pub fn remove() -> Result<String, InterceptError> {
    match nft::list(TABLE)? {
        None => Ok(format!("there is no table inet {TABLE}: nothing to remove\n")),
        Some(_) => {
            nft::run(&["delete", "table", "inet", TABLE], "")?;
            Ok(format!("table inet {TABLE} is removed: nothing stands around the workload now\n"))
        }
    }
}

/// Compares the rules in force with those of the configuration, and looks for whoever could get past them.
pub fn verify(config: &Config) -> Result<Findings, InterceptError> {
    let rules = wanted(config)?;
    let mut findings = Findings::default();
    match nft::list(TABLE)? {
        None => findings
            .bad
            .push(format!("there is no table inet {TABLE}: run `intercept install` in this network namespace")),
        Some(_) => match differences(&rules)? {
            difference if difference.is_empty() => {
                findings.good.push("the rules are those of the configuration".into())
            }
            difference => findings.bad.push(format!("the rules differ from those of the configuration:\n{difference}")),
        },
    }
    look_at_processes(&Machine::new("/"), rules.gid, &mut findings);
    Ok(findings)
}

/// Refuses what would go wrong with rules in force: the agent treated as the workload, or the workload as the agent.
pub fn check_ourselves(config: &Config, shares_group: bool) -> Result<(), InterceptError> {
    let Some(wanted) = config.intercept.gid.filter(|_| config.intercept.is_on()) else { return Ok(()) };
    let actual = getegid().as_raw();
    for bypass in &config.intercept.bypass {
        tracing::warn!(%bypass, "the workload goes past its agent, as declared");
    }
    match () {
        () if actual != wanted => Err(InterceptError::Group { wanted, actual }),
        () if shares_group => Err(InterceptError::SharesGroup),
        () => Ok(()),
    }
}

/// Waits until the rules that `config` asks for are in force, at most for `within`; at once where it asks for none.
pub async fn await_rules(config: &Config, within: Duration) -> Result<(), InterceptError> {
    const LOOK_AGAIN: Duration = Duration::from_millis(50);
    let Some(rules) = ruleset(config) else { return Ok(()) };
    let in_force = async {
        // Where it cannot be told they are not in force.
        while !rules.mark.is_in_force().unwrap_or(false) {
            sleep(LOOK_AGAIN).await;
        }
    };
    timeout(within, in_force).await.map_err(|_| InterceptError::NotInForce(within))
}

fn wanted(config: &Config) -> Result<Ruleset, InterceptError> {
    ruleset(config).ok_or(InterceptError::Off)
}

fn refuse_on_host() -> Result<(), InterceptError> {
    match facts::host_net(&Machine::new("/")) {
        facts::Seen::Known(false, _) => Ok(()),
        facts::Seen::Known(true, _) => Err(InterceptError::HostNetwork),
        facts::Seen::Hidden(hidden) => {
            Err(InterceptError::UnknownNetwork(format!("{}: {}", hidden.source, hidden.why)))
        }
    }
}

/// How the rules in force differ from `rules`, line by line; empty if they do not.
fn differences(rules: &Ruleset) -> Result<String, NftError> {
    let actual = nft::list(TABLE)?.unwrap_or_default();
    let expected = nft::as_listed(rules)?;
    Ok(nft::difference(&expected, &actual))
}

fn summary(config: &Config, rules: &Ruleset) -> String {
    let mut told = format!("table inet {TABLE} is in force; it knows the agent by group {}\n", rules.gid);
    let mut line = |text: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(told, "  {text}");
    };
    if config.intercept.inbound == Inward::Lock {
        for inbound in &config.inbound {
            line(format!("{} leads to the agent", inbound.listen));
            if let (true, Some(service)) = (inbound.hold_service_port, inbound.to.address()) {
                line(format!("port {} is refused by the agent, with an event", service.port()));
            }
        }
        for plain in &config.declared.plaintext {
            line(format!("{}/{} is open in plaintext: {}", plain.port, plain.protocol.word(), plain.reason));
        }
        line("nothing else can be reached from outside".into());
    }
    let led = config.egress.redirected_to();
    match config.intercept.outbound {
        Outward::Off => {}
        Outward::Block => line("nothing but the agent gets out".into()),
        Outward::Redirect => {
            for (version, port) in ["IPv4", "IPv6"].into_iter().zip(led) {
                line(port.map_or_else(
                    || format!("{version} does not get out: no `egress.transparent_listen` takes it"),
                    |port| format!("TCP to other hosts over {version} is led to the agent's port {port}"),
                ));
            }
            line("everything else, UDP and QUIC included, does not get out".into());
        }
    }
    config.intercept.bypass.iter().for_each(|bypass| line(format!("past the agent goes {bypass}")));
    told
}

/// Who in this network namespace is the agent, and who could pass as it or get past the rules.
fn look_at_processes(machine: &Machine, gid: u32, findings: &mut Findings) {
    let others = match others_here(machine) {
        Ok(others) => others,
        Err(why) => return findings.bad.push(format!("the processes cannot be seen: {why}")),
    };
    let (agents, workload): (Vec<&Process>, Vec<&Process>) = others.iter().partition(|p| p.program() == AGENT);
    match agents.iter().partition::<Vec<&Process>, _>(|p| p.gids[1] == gid) {
        (with, without) if with.is_empty() && without.is_empty() => findings.bad.push(
            "no agent is seen in this network namespace: is it running, and is its PID namespace shared with this one (docker run --pid container:NAME)?".into(),
        ),
        (with, without) => {
            findings.good.extend(with.iter().map(|p| format!("the agent (pid {}) has group {gid}", p.id.pid)));
            let stray = |p: &&Process| format!("the agent (pid {}) has group {}, not {gid}: its own connections are treated as the workload's", p.id.pid, p.gids[1]);
            findings.bad.extend(without.iter().map(stray));
        }
    }
    match bypasses(&workload, gid) {
        past if past.is_empty() => {
            findings.good.push(format!("none of the {} other processes here can get past the rules", workload.len()));
        }
        past => findings.bad.extend(past),
    }
}

/// The program by which an agent is known to another.
const AGENT: &str = "sidewarden-agent";

/// Every process that shares our network namespace, without ourselves.
fn others_here(machine: &Machine) -> Result<Vec<Process>, String> {
    let told = |hidden: facts::Hidden| format!("{}: {}", hidden.source, hidden.why);
    let (own_net, own_pid) = (facts::own_net(machine), machine.own_pid().map_err(told)?);
    let pids = machine.pids().map_err(told)?;
    let read =
        pids.into_iter().filter(|pid| *pid != own_pid).filter_map(|pid| Process::read(machine, pid, own_net).ok());
    Ok(read.filter(|p| p.same_net && !p.zombie).collect())
}
