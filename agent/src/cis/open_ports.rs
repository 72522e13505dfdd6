//! 5.8: what can be reached from outside was declared, and speaks TLS unless it was declared to be plaintext.

use sidewarden_proto::event::{Protocol, Severity};
use sidewarden_proto::finding::Evidence;

use super::{Answer, Case, Check, DOCKER_API, Declared, Judgement, Unseen, api, network_owner};
use crate::facts::{Listener, Lock, Speech};

use crate::facts::Told;
use crate::facts::engine::{Host, PortBinding};

pub const CHECK: Check = Check {
    slug: "open-ports",
    v1_3_1: "5.8",
    v1_6: "5.9",
    title: "only declared ports are open, and they speak TLS",
    severity: Severity::Warning,
    docker_run: "make the service listen on 127.0.0.1, and publish only the agent's port",
    compose: "make the service listen on 127.0.0.1, and publish only the agent's port",
    kubernetes: "make the service listen on 127.0.0.1, and name only the agent's port in `ports`",
    judge,
};

const DECLARE: &str = "a list of the intended ports: `ports = [8080]` under `declared` in the agent's configuration";
const ASK: &str = "an answer of the listener to a TLS hello: it is asked again by itself";

/// How a listener stands to what the operator intends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nobody outside can reach it; why.
    Kept(&'static str),
    /// The near end of a client: UDP on a port that the kernel chose.
    Client,
    /// It speaks TLS.
    Tls,
    /// It does not, and is declared, for this reason.
    Declared(String),
    /// It does not, or cannot be asked as UDP cannot, and nobody declared it; why it is held to be so.
    Exposed(String),
    /// It has not been asked yet, or could not be.
    Open(String),
}

/// How `listener` stands, where the rules of `intercept` are as `lock` says.
pub fn standing(listener: &Listener, declared: &Declared, lock: Lock) -> Standing {
    let port = listener.address.port();
    let reason = declared.plaintext.iter().find(|p| p.port == port && p.protocol == listener.protocol);
    match (&listener.speech, reason) {
        _ if listener.is_loopback() => Standing::Kept("on loopback"),
        (_, None) if lock == Lock::InForce => Standing::Kept("kept off by the rules of `intercept`"),
        (Some(Speech::Tls), _) => Standing::Tls,
        (_, Some(declared)) => Standing::Declared(declared.reason.clone()),
        _ if listener.ephemeral => Standing::Client,
        _ if listener.protocol == Protocol::Udp => {
            Standing::Exposed("UDP carries no TLS that could be asked for".into())
        }
        (None, _) => Standing::Open("not asked yet".into()),
        (Some(Speech::Unasked(why)), _) => Standing::Open(format!("it cannot be asked: {why}")),
        (Some(Speech::Plain(said)), _) => Standing::Exposed(format!("it answered a TLS hello with {said}")),
        (Some(Speech::First(said)), _) => Standing::Exposed(format!("it spoke first, in plaintext: {said}")),
        (Some(Speech::Silent), _) => Standing::Exposed("it did not answer a TLS hello".into()),
        (Some(Speech::Closed), _) => Standing::Exposed("it hung up on a TLS hello".into()),
    }
}

fn judge(case: &Case<'_>) -> Answer {
    // From the host nobody sees into the container's own network: the engine's word stands alone.
    case.told().map_or_else(|_| seen(case), |(container, host)| told(container, host, case))
}

fn told(told: &Told, _: &Host, case: &Case<'_>) -> Answer {
    let owner = network_owner(told)?;
    if owner.host_config.network_mode == "host" {
        return Err(Unseen::new(
            "a network of the container's own: what it opens is open on the host (see host-network)",
        ));
    }
    let line =
        |port: &str, b: &PortBinding| api("NetworkSettings.Ports", format!("{port} at {}:{}", b.host_ip, b.host_port));
    let is_declared = |port: &str| {
        let (number, protocol) = port.split_once('/').unwrap_or((port, "tcp"));
        let number = number.parse::<u16>();
        let with_tls = |n: &u16| protocol == "tcp" && case.declared.ports.contains(n);
        let without = |n: &u16| case.declared.plaintext.iter().any(|p| p.port == *n && p.protocol.word() == protocol);
        number.is_ok_and(|n| with_tls(&n) || without(&n))
    };
    let (listed, others): (Vec<_>, Vec<_>) = owner.mappings().partition(|(port, _)| is_declared(port));
    let others: Vec<Evidence> = others.into_iter().map(|(port, b)| line(port, b)).collect();
    match (others.is_empty(), case.declared.ports.is_empty() && case.declared.plaintext.is_empty()) {
        (true, _) => {
            Ok(Judgement::pass(vec![api("NetworkSettings.Ports", format!("{} mapped, all declared", listed.len()))]))
        }
        (false, true) => Err(Unseen::new(DECLARE).with(others)),
        (false, false) => Ok(Judgement::fail(others)),
    }
}

fn seen(case: &Case<'_>) -> Answer {
    let (listeners, source) = case.facts.listeners.needs(DOCKER_API)?;
    let line = |l: &Listener, how: &str| Evidence::new(source, format!("{l}: {how}"));
    let (mut broken, mut unsure, mut undeclared, mut fine) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut kept = 0;
    for l in listeners {
        let listed = case.declared.ports.contains(&l.address.port());
        match standing(l, case.declared, case.facts.lock) {
            Standing::Kept(_) => kept += 1,
            Standing::Exposed(how) => broken.push(line(l, &how)),
            Standing::Open(how) => unsure.push(line(l, &how)),
            Standing::Tls if listed => fine.push(line(l, "TLS, declared")),
            Standing::Tls => undeclared.push(line(l, "TLS, not declared")),
            Standing::Declared(reason) => fine.push(line(l, &format!("declared plaintext: {reason}"))),
            Standing::Client => fine.push(line(l, "held to be the near end of a client")),
        }
    }
    if !case.declared.ports.is_empty() {
        broken.append(&mut undeclared);
    }
    fine.push(Evidence::new(source, format!("{kept} more, {}", how_kept(case.facts.lock))));
    match () {
        () if !broken.is_empty() => Ok(Judgement::fail(broken)),
        () if !unsure.is_empty() => Err(Unseen::new(ASK).with(unsure)),
        () if !undeclared.is_empty() => Err(Unseen::new(DECLARE).with(undeclared)),
        () => Ok(Judgement::pass(fine)),
    }
}

fn how_kept(lock: Lock) -> &'static str {
    match lock {
        Lock::InForce => "on loopback or kept off by the rules of `intercept`",
        Lock::Off | Lock::Broken => "all on loopback",
    }
}

#[cfg(test)]
mod tests {
    use super::super::Plaintext;
    use super::super::sample::{Row, Sample, check_rows, hidden};
    use super::*;

    fn plaintext(s: &mut Sample, port: u16, protocol: Protocol) {
        s.declared.plaintext.push(Plaintext { port, protocol, reason: "the old client needs it".into() });
    }

    fn udp(s: &mut Sample, port: u16) {
        let listener = s.listen(&format!("0.0.0.0:{port}"));
        (listener.protocol, listener.speech) = (Protocol::Udp, None);
    }

    #[test]
    fn open_ports_are_those_declared_and_speak_tls() {
        let rows: [Row; 20] = [
            ("loopback only", |_| (), "pass"),
            ("TLS, nothing declared", |s| s.listen("0.0.0.0:8080").inode = 9, "unknown"),
            (
                "TLS and declared",
                |s| {
                    s.listen("0.0.0.0:8080");
                    s.declared.ports = vec![8080];
                },
                "pass",
            ),
            (
                "another one, on IPv6",
                |s| {
                    s.listen("0.0.0.0:8080");
                    s.listen("[::]:4444");
                    s.declared.ports = vec![8080];
                },
                "fail",
            ),
            ("loopback spelt as IPv6", |s| s.listen("[::ffff:127.0.0.1]:99").inode = 9, "pass"),
            ("sockets hidden", |s| s.facts.listeners = hidden(), "unknown"),
            ("plaintext", |s| s.listen("0.0.0.0:80").speech = Some(Speech::Plain("`HTTP/1.1 400`".into())), "fail"),
            ("a banner", |s| s.listen("0.0.0.0:25").speech = Some(Speech::First("`220 mail`".into())), "fail"),
            ("silence", |s| s.listen("0.0.0.0:80").speech = Some(Speech::Silent), "fail"),
            ("a hang-up", |s| s.listen("0.0.0.0:80").speech = Some(Speech::Closed), "fail"),
            ("not asked yet", |s| s.listen("0.0.0.0:80").speech = None, "unknown"),
            ("not reached", |s| s.listen("0.0.0.0:80").speech = Some(Speech::Unasked("refused".into())), "unknown"),
            (
                "plaintext on a port that may be reached is plaintext all the same",
                |s| {
                    s.listen("0.0.0.0:80").speech = Some(Speech::Silent);
                    s.declared.ports = vec![80];
                },
                "fail",
            ),
            (
                "declared plaintext",
                |s| {
                    s.listen("0.0.0.0:80").speech = Some(Speech::Silent);
                    plaintext(s, 80, Protocol::Tcp);
                },
                "pass",
            ),
            (
                "declared for UDP alone",
                |s| {
                    s.listen("0.0.0.0:80").speech = Some(Speech::Silent);
                    plaintext(s, 80, Protocol::Udp);
                },
                "fail",
            ),
            ("UDP", |s| udp(s, 53), "fail"),
            (
                "UDP, declared",
                |s| {
                    udp(s, 53);
                    plaintext(s, 53, Protocol::Udp);
                },
                "pass",
            ),
            (
                "UDP of a client",
                |s| {
                    let l = s.listen("0.0.0.0:40000");
                    (l.protocol, l.ephemeral, l.speech) = (Protocol::Udp, true, None);
                },
                "pass",
            ),
            (
                "plaintext that the rules keep off",
                |s| {
                    s.listen("0.0.0.0:80").speech = Some(Speech::Silent);
                    s.facts.lock = Lock::InForce;
                },
                "pass",
            ),
            (
                "plaintext where the rules should be and are not",
                |s| {
                    s.listen("0.0.0.0:80").speech = Some(Speech::Silent);
                    s.facts.lock = Lock::Broken;
                },
                "fail",
            ),
        ];
        check_rows(&CHECK, &rows);
    }

    #[test]
    fn a_declared_port_that_speaks_tls_is_no_plaintext_and_one_that_the_rules_let_through_is() {
        let mut sample = Sample::sound();
        plaintext(&mut sample, 80, Protocol::Tcp);
        let mut listener = sample.listen("0.0.0.0:80").clone();
        assert_eq!(standing(&listener, &sample.declared, Lock::InForce), Standing::Tls);
        listener.speech = Some(Speech::Closed);
        let declared = Standing::Declared("the old client needs it".into());
        assert_eq!(standing(&listener, &sample.declared, Lock::InForce), declared);
    }

    #[test]
    fn the_evidence_names_the_listener_its_owner_and_its_answer() {
        let mut sample = Sample::sound();
        let listener = sample.listen("0.0.0.0:80");
        listener.speech = Some(Speech::Plain("`HTTP/1.1 400`".into()));
        listener.owner = crate::facts::Owner::Process { pid: 7, name: "nginx".into() };
        let case = sample.case();
        let told = CHECK.judge(&case).evidence[0].line.clone();
        assert_eq!(told, "0.0.0.0:80/tcp of nginx (pid 7), uid 10001: it answered a TLS hello with `HTTP/1.1 400`");
    }

    #[test]
    fn the_engine_tells_the_mappings() {
        check_rows(
            &CHECK,
            &[
                ("mapped, nothing declared", |s| s.asked(), "unknown"),
                (
                    "declared",
                    |s| {
                        s.told();
                        s.declared.ports = vec![8443];
                    },
                    "pass",
                ),
                (
                    "another one declared",
                    |s| {
                        s.told();
                        s.declared.ports = vec![1];
                    },
                    "fail",
                ),
                (
                    "declared for TCP, mapped for UDP",
                    |s| {
                        let ports = &mut s.told().network_settings.ports;
                        let bound = ports.remove("8443/tcp").unwrap();
                        ports.insert("8443/udp".into(), bound);
                        s.declared.ports = vec![8443];
                        plaintext(s, 8443, Protocol::Tcp);
                    },
                    "fail",
                ),
                (
                    "declared for UDP",
                    |s| {
                        let ports = &mut s.told().network_settings.ports;
                        let bound = ports.remove("8443/tcp").unwrap();
                        ports.insert("8443/udp".into(), bound);
                        plaintext(s, 8443, Protocol::Udp);
                    },
                    "pass",
                ),
                ("none mapped", |s| s.told().network_settings.ports.clear(), "pass"),
            ],
        );
    }
}
