//! The packet rules that a configuration asks for, as text for `nft -f`. Pure.
//!
//! One table, `inet sidewarden`, for IPv4 and IPv6, replaced as a whole in one transaction. The agent is told by its group,
//! which the workload does not have: by the group that its sockets were made with, which no packet can pretend.
//!
//! What comes from outside is let in by the port it comes to, and answers by conntrack. A connection of the workload that
//! was there before the rules is cut: conntrack sees it as new in the middle of its life.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use sidewarden_proto::event::Protocol;

use super::mark::Mark;
use crate::config::{Bypass, Config, Inward, Outward};

/// The name of our table.
pub const TABLE: &str = "sidewarden";

/// Rules for one configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruleset {
    /// The table alone.
    pub table: String,
    /// By what the agent, which may not read rules, knows that exactly these are in force.
    pub mark: Mark,
    /// The agent's group.
    pub gid: u32,
    /// Whether they keep others off the workload.
    pub locks: bool,
    /// What they let past the agent, as declared.
    pub bypass: Vec<String>,
}

impl Ruleset {
    /// What `nft -f` reads to have these rules instead of those there are.
    pub fn script(&self) -> String {
        format!("table inet {TABLE}\ndelete table inet {TABLE}\n{}", self.table)
    }
}

/// The rules that `config` asks for; `None` where it asks for none.
pub fn ruleset(config: &Config) -> Option<Ruleset> {
    let gid = config.intercept.gid.filter(|_| config.intercept.is_on())?;
    let mark = Mark::of(&table(config, gid, None));
    let bypass = config.intercept.bypass.iter().map(Bypass::to_string).collect();
    let locks = config.intercept.inbound == Inward::Lock;
    Some(Ruleset { table: table(config, gid, Some(mark)), mark, gid, locks, bypass })
}

fn table(config: &Config, gid: u32, mark: Option<Mark>) -> String {
    let locked = config.intercept.inbound == Inward::Lock;
    let mut chains = Vec::new();
    if locked {
        chains.extend(direct(config));
        chains.push(input(config));
    }
    chains.extend(outbound(config, gid));
    chains.push(output(config, gid, mark));
    format!("table inet {TABLE} {{\n{}}}\n", chains.join("\n"))
}

fn chain(name: &str, base: &str, rules: Vec<String>) -> String {
    let rules: Vec<String> = rules.iter().map(|rule| format!("\t\t{rule}\n")).collect();
    format!("\tchain {name} {{\n\t\ttype {base};\n{}\t}}\n", rules.concat())
}

/// Whoever comes for a port of the workload is led to the agent, which refuses with an event.
fn direct(config: &Config) -> Option<String> {
    let held = held_ports(config);
    if held.is_empty() {
        return None;
    }
    let redirect = format!("tcp dport {} redirect to :{}", set(&held), config.intercept.refuse_port);
    let rules = vec!["iifname \"lo\" accept".to_owned(), redirect];
    Some(chain("direct", "nat hook prerouting priority dstnat; policy accept", rules))
}

/// What comes from outside: to the agent, to what is declared, or as an answer. Nothing else.
fn input(config: &Config) -> String {
    let mut rules = vec![
        "iifname \"lo\" accept".to_owned(),
        // With route_localnet a neighbour could send to loopback.
        "ip daddr 127.0.0.0/8 drop".into(),
        "ip6 daddr ::1 drop".into(),
        "meta l4proto { 1, 58 } accept comment \"ICMP\"".into(),
    ];
    rules.extend(open_to(&listeners(config)));
    if !held_ports(config).is_empty() {
        rules.push(format!("tcp dport {} accept", config.intercept.refuse_port));
    }
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let declared = config.declared.plaintext.iter().filter(|p| p.protocol == protocol);
        let ports: BTreeSet<u16> = declared.map(|p| p.port).collect();
        if !ports.is_empty() {
            rules.push(format!("{} dport {} accept", protocol.word(), set(&ports)));
        }
    }
    rules.push("ct state established ct direction reply accept".into());
    rules.push("ct state related accept".into());
    rules.push("meta l4proto 6 reject with tcp reset comment \"TCP\"".into());
    rules.push("meta l4proto 17 reject comment \"UDP\"".into());
    chain("input", "filter hook input priority filter; policy drop", rules)
}

/// The workload's connections to other hosts are led to the agent. A version of IP that it does not listen on is left for
/// [`output`] to stop.
fn outbound(config: &Config, gid: u32) -> Option<String> {
    if config.intercept.outbound != Outward::Redirect {
        return None;
    }
    let mut rules = vec!["oifname \"lo\" accept".to_owned(), format!("meta skgid {gid} accept")];
    rules.extend(past(config, Protocol::Tcp));
    let versions = ["ipv4", "ipv6"].into_iter().zip(config.egress.redirected_to());
    let led = |(version, port): (&str, Option<u16>)| {
        Some(format!("meta nfproto {version} meta l4proto 6 redirect to :{}", port?))
    };
    rules.extend(versions.filter_map(led));
    Some(chain("outbound", "nat hook output priority -100; policy accept", rules))
}

/// What leaves.
fn output(config: &Config, gid: u32, mark: Option<Mark>) -> String {
    let mut rules: Vec<String> = mark.iter().map(Mark::rule).collect();
    rules.push("oifname \"lo\" accept".into());
    if config.intercept.inbound == Inward::Lock {
        // Nobody answers in the agent's place while it is away. Only what has a socket has a group, and a first answer has.
        let ports = answered_ports(config);
        if !ports.is_empty() {
            rules.push(format!(
                "tcp flags & (syn | ack) == syn | ack tcp sport {} meta skgid != {gid} drop",
                set(&ports)
            ));
        }
    }
    rules.push(format!("ct state new tcp flags & syn == 0 meta skgid != {gid} reject with tcp reset"));
    if config.intercept.outbound != Outward::Off {
        rules.extend(leaving(config, gid));
    }
    chain("output", "filter hook output priority filter; policy accept", rules)
}

/// Out go the agent, answers, and what is declared. What was redirected to loopback is still seen on its way out here.
fn leaving(config: &Config, gid: u32) -> Vec<String> {
    let mut rules = vec![
        "ip daddr 127.0.0.0/8 accept".to_owned(),
        "ip6 daddr ::1 accept".into(),
        format!("meta skgid {gid} accept"),
        "ct direction reply accept".into(),
        "meta l4proto { 1, 58 } accept comment \"ICMP\"".into(),
    ];
    rules.extend(past(config, Protocol::Tcp));
    rules.extend(past(config, Protocol::Udp));
    // Only beginnings: later packets of the agent's own connections may have no socket any more, and so no group.
    rules.push("tcp flags & (fin | syn | rst | ack) == syn reject with tcp reset".into());
    rules.push("meta l4proto 6 accept comment \"TCP\"".into());
    rules.push("reject".into());
    rules
}

/// What may go past the agent.
fn past(config: &Config, protocol: Protocol) -> Vec<String> {
    let rule = |bypass: &Bypass| {
        let (version, word) = (if bypass.to.first().is_ipv4() { "ip" } else { "ip6" }, protocol.word());
        let to = match bypass.to.is_everything() {
            true if bypass.to.first().is_ipv4() => "meta nfproto ipv4".to_owned(),
            true => "meta nfproto ipv6".to_owned(),
            false => format!("{version} daddr {}", bypass.to),
        };
        let all = format!("meta l4proto {}", number(protocol));
        let port = bypass.port.map_or(all, |port| format!("{word} dport {port}"));
        format!("{to} {port} accept")
    };
    config.intercept.bypass.iter().filter(|bypass| bypass.protocol == protocol).map(rule).collect()
}

/// By number: an image FROM scratch has no list of names.
fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
    }
}

/// Where the agent takes connections from outside.
fn listeners(config: &Config) -> Vec<SocketAddr> {
    let all = config.inbound.iter().map(|inbound| inbound.listen);
    all.filter(|listen| !listen.ip().to_canonical().is_loopback()).collect()
}

/// The ports of the workload that the agent refuses in its place.
fn held_ports(config: &Config) -> BTreeSet<u16> {
    let held = config.inbound.iter().filter(|inbound| inbound.hold_service_port);
    held.filter_map(|inbound| inbound.to.address()).map(|service| service.port()).collect()
}

/// The ports that nobody but the agent may answer at.
fn answered_ports(config: &Config) -> BTreeSet<u16> {
    let mut ports: BTreeSet<u16> = listeners(config).iter().map(SocketAddr::port).collect();
    if !held_ports(config).is_empty() {
        ports.insert(config.intercept.refuse_port);
    }
    ports
}

/// One rule for each kind of address, in a fixed order.
fn open_to(listeners: &[SocketAddr]) -> Vec<String> {
    let kinds: BTreeSet<String> = listeners.iter().map(|listen| kind(listen.ip())).collect();
    let ports = |of: &str| listeners.iter().filter(|l| kind(l.ip()) == of).map(SocketAddr::port).collect();
    kinds.iter().map(|of| format!("{of}tcp dport {} accept", set(&ports(of)))).collect()
}

/// Where a packet for a listener on `ip` must go. A socket on `[::]` takes both versions.
fn kind(ip: IpAddr) -> String {
    match ip.to_canonical() {
        IpAddr::V4(ip) if ip.is_unspecified() => "meta nfproto ipv4 ".into(),
        IpAddr::V6(ip) if ip.is_unspecified() => String::new(),
        IpAddr::V4(ip) => format!("ip daddr {ip} "),
        IpAddr::V6(ip) => format!("ip6 daddr {ip} "),
    }
}

/// `80`, or `{ 80, 443 }`
fn set(ports: &BTreeSet<u16>) -> String {
    let words: Vec<String> = ports.iter().map(u16::to_string).collect();
    if words.len() == 1 { words.concat() } else { format!("{{ {} }}", words.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(more: &str) -> Config {
        let text = format!("[collector]\naddresses = [\"collector:7443\"]\n[intercept]\ngid = 13100\n{more}");
        Config::parse(&text, &|_| None).unwrap()
    }

    /// The table for `more`, without its mark.
    fn written(more: &str) -> String {
        table(&config(more), 13100, None)
    }

    const INBOUND: &str = "inbound = \"lock\"\n[[inbound]]\nlisten = \"0.0.0.0:8443\"\nto = \"127.0.0.1:8080\"\nallow = [\"spiffe://td/a/b\"]\n";

    #[test]
    fn nothing_is_asked_for_by_default() {
        assert_eq!(ruleset(&Config::default()), None);
        assert_eq!(ruleset(&config("")), None);
    }

    #[test]
    fn a_lock_lets_nothing_in_but_what_is_named() {
        let more = "[[inbound]]\nlisten = \"10.0.0.5:9443\"\nto = \"127.0.0.1:9090\"\nallow = [\"spiffe://td/a/b\"]\n\
            [[inbound]]\nlisten = \"[fd00::5]:9443\"\nto = \"127.0.0.1:9091\"\nallow = [\"spiffe://td/a/b\"]\nhold_service_port = false\n\
            [[inbound]]\nlisten = \"[::]:7443\"\nto = \"127.0.0.1:7070\"\nallow = [\"spiffe://td/a/b\"]\n\
            [[inbound]]\nlisten = \"127.0.0.1:6443\"\nto = \"127.0.0.1:6060\"\nallow = [\"spiffe://td/a/b\"]\n\
            [[declared.plaintext]]\nport = 5222\nreason = \"old client\"\n\
            [[declared.plaintext]]\nport = 53\nprotocol = \"udp\"\nreason = \"DNS\"\n";
        let expected = r#"table inet sidewarden {
	chain direct {
		type nat hook prerouting priority dstnat; policy accept;
		iifname "lo" accept
		tcp dport { 6060, 7070, 8080, 9090 } redirect to :15006
	}

	chain input {
		type filter hook input priority filter; policy drop;
		iifname "lo" accept
		ip daddr 127.0.0.0/8 drop
		ip6 daddr ::1 drop
		meta l4proto { 1, 58 } accept comment "ICMP"
		tcp dport 7443 accept
		ip daddr 10.0.0.5 tcp dport 9443 accept
		ip6 daddr fd00::5 tcp dport 9443 accept
		meta nfproto ipv4 tcp dport 8443 accept
		tcp dport 15006 accept
		tcp dport 5222 accept
		udp dport 53 accept
		ct state established ct direction reply accept
		ct state related accept
		meta l4proto 6 reject with tcp reset comment "TCP"
		meta l4proto 17 reject comment "UDP"
	}

	chain output {
		type filter hook output priority filter; policy accept;
		oifname "lo" accept
		tcp flags & (syn | ack) == syn | ack tcp sport { 7443, 8443, 9443, 15006 } meta skgid != 13100 drop
		ct state new tcp flags & syn == 0 meta skgid != 13100 reject with tcp reset
	}
}
"#;
        assert_eq!(written(&format!("{INBOUND}{more}")), expected);
    }

    #[test]
    fn a_workload_without_a_way_in_is_shut() {
        let table = written("inbound = \"lock\"\n");
        assert!(!table.contains("chain direct") && !table.contains("dport 15006"), "{table}");
        assert!(table.contains("policy drop") && !table.contains("sport"), "{table}");
    }

    #[test]
    fn what_goes_out_is_led_to_the_agent_or_stopped() {
        let bypass = "[[intercept.bypass]]\nto = \"10.96.0.10\"\nprotocol = \"udp\"\nport = 53\nreason = \"DNS\"\n\
            [[intercept.bypass]]\nto = \"fd00::/8\"\nreason = \"storage\"\n\
            [[intercept.bypass]]\nto = \"0.0.0.0/0\"\nport = 22\nreason = \"git\"\n";
        let listen = "[egress]\ntransparent_listen = [\"127.0.0.1:15001\", \"[::1]:15002\"]\n";
        let expected = r#"table inet sidewarden {
	chain outbound {
		type nat hook output priority -100; policy accept;
		oifname "lo" accept
		meta skgid 13100 accept
		ip6 daddr fd00::/8 meta l4proto 6 accept
		meta nfproto ipv4 tcp dport 22 accept
		meta nfproto ipv4 meta l4proto 6 redirect to :15001
		meta nfproto ipv6 meta l4proto 6 redirect to :15002
	}

	chain output {
		type filter hook output priority filter; policy accept;
		oifname "lo" accept
		ct state new tcp flags & syn == 0 meta skgid != 13100 reject with tcp reset
		ip daddr 127.0.0.0/8 accept
		ip6 daddr ::1 accept
		meta skgid 13100 accept
		ct direction reply accept
		meta l4proto { 1, 58 } accept comment "ICMP"
		ip6 daddr fd00::/8 meta l4proto 6 accept
		meta nfproto ipv4 tcp dport 22 accept
		ip daddr 10.96.0.10 udp dport 53 accept
		tcp flags & (fin | syn | rst | ack) == syn reject with tcp reset
		meta l4proto 6 accept comment "TCP"
		reject
	}
}
"#;
        assert_eq!(written(&format!("outbound = \"redirect\"\n{bypass}{listen}")), expected);
    }

    #[test]
    fn what_is_blocked_is_led_nowhere_and_ipv6_that_nobody_takes_is_stopped() {
        let blocked = written("outbound = \"block\"\n");
        assert!(!blocked.contains("redirect") && blocked.ends_with("\t\treject\n\t}\n}\n"), "{blocked}");
        let v4 = written("outbound = \"redirect\"\n[egress]\ntransparent_listen = [\"127.0.0.1:15001\"]\n");
        assert!(v4.contains("ipv4 meta l4proto 6 redirect to :15001") && !v4.contains("nfproto ipv6"), "{v4}");
        let both = written(&format!("outbound = \"block\"\n{INBOUND}"));
        assert!(
            both.contains("chain input") && both.contains("chain direct") && both.ends_with("\t\treject\n\t}\n}\n")
        );
    }

    #[test]
    fn the_mark_stands_first_in_the_output_and_changes_with_every_rule() {
        let (one, other) = (ruleset(&config(INBOUND)).unwrap(), INBOUND.replace("8443", "8444"));
        let output = one.table.split("chain output {").nth(1).unwrap();
        assert_eq!(output.lines().nth(2).unwrap().trim(), one.mark.rule());
        assert_ne!(one.mark, ruleset(&config(&other)).unwrap().mark);
        assert_eq!(one, ruleset(&config(INBOUND)).unwrap());
    }

    #[test]
    fn a_script_replaces_the_table_in_one_go() {
        let script = ruleset(&config(INBOUND)).unwrap().script();
        assert!(script.starts_with("table inet sidewarden\ndelete table inet sidewarden\ntable inet sidewarden {\n"));
    }
}
