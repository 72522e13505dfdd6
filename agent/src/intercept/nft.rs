//! The program `nft`: run with a limit, its complaints turned into what to change, its listings compared.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use super::rules::{Ruleset, TABLE};

/// It answers within milliseconds; a machine that is this slow has other troubles.
const WITHIN: Duration = Duration::from_secs(10);
/// How often is looked whether it has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Of what it prints; our own table has a few dozen lines.
const MAX_OUTPUT: u64 = 1 << 20;
/// The table that the wanted rules are put into to see how `nft` writes them. It is dormant: nothing goes through it.
const SHADOW: &str = "sidewarden_verify";

/// Why `nft` did not do it.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// It is not installed.
    #[error(
        "`nft` was not found in PATH: install it (apt-get install nftables), or run the image `sidewarden/intercept`, which has it"
    )]
    Missing,
    /// It cannot be run.
    #[error("running `nft`: {0}")]
    Run(io::Error),
    /// It does not come to an end.
    #[error("`nft` did not end within {WITHIN:?}")]
    Timeout,
    /// The kernel wants a capability.
    #[error(
        "the kernel does not allow it: this needs CAP_NET_ADMIN (docker run --cap-drop ALL --cap-add NET_ADMIN); nft says: {0}"
    )]
    NotAllowed(String),
    /// The kernel lacks something.
    #[error(
        "the kernel lacks what the rules need: CONFIG_NF_TABLES_INET, NFT_CT, NFT_REJECT, NFT_REDIR and NFT_NAT, as modules or built in, from Linux 5.2 on; nft says: {0}"
    )]
    Kernel(String),
    /// Anything else.
    #[error("nft: {0}")]
    Refused(String),
}

/// Runs `nft` with `script` on its standard input; what it printed.
pub fn run(arguments: &[&str], script: &str) -> Result<String, NftError> {
    let spawned = Command::new("nft")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .env("LC_ALL", "C")
        .spawn();
    let mut child = spawned.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => NftError::Missing,
        _ => NftError::Run(error),
    })?;
    let (stdout, stderr) = (collect(child.stdout.take()), collect(child.stderr.take()));
    if let Some(mut stdin) = child.stdin.take() {
        // It may end without reading; what it says about that is in its complaint.
        let _ = stdin.write_all(script.as_bytes());
    }
    let status = wait(&mut child)?;
    let text = |from: Receiver<String>| from.recv_timeout(WITHIN).map_err(|_| NftError::Timeout);
    let (stdout, stderr) = (text(stdout)?, text(stderr)?);
    if status { Ok(stdout) } else { Err(complaint(&stderr)) }
}

/// Reads all of it on a thread, so that neither side waits for the other.
fn collect(from: Option<impl Read + Send + 'static>) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(from) = from {
            // What came until an error is what there is to show.
            let _ = from.take(MAX_OUTPUT).read_to_end(&mut bytes);
        }
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    receiver
}

/// Whether it ended well.
fn wait(child: &mut Child) -> Result<bool, NftError> {
    let end = Instant::now() + WITHIN;
    loop {
        if let Some(status) = child.try_wait().map_err(NftError::Run)? {
            return Ok(status.success());
        }
        if Instant::now() >= end {
            let _ = child.kill();
            let _ = child.wait();
            return Err(NftError::Timeout);
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// What `nft` says, by what has to be changed.
fn complaint(stderr: &str) -> NftError {
    let first = stderr.lines().find(|line| line.contains("Error") || line.contains("error"));
    let said = first.or(stderr.lines().next()).unwrap_or("nothing").trim().to_owned();
    match () {
        () if stderr.contains("Operation not permitted") => NftError::NotAllowed(said),
        () if ["not supported", "cache initialization failed", "No such file or directory", "No such device"]
            .iter()
            .any(|lack| stderr.contains(lack)) =>
        {
            NftError::Kernel(said)
        }
        () => NftError::Refused(said),
    }
}

/// The table `name` as `nft` lists it, without counts; `None` if there is none.
pub fn list(name: &str) -> Result<Option<String>, NftError> {
    let tables = run(&["list", "tables", "inet"], "")?;
    if !tables.lines().any(|line| line.trim() == format!("table inet {name}")) {
        return Ok(None);
    }
    run(&["-s", "list", "table", "inet", name], "").map(Some)
}

/// How this machine's `nft` and kernel list `rules`: versions write the same rule differently, so they are asked.
pub fn as_listed(rules: &Ruleset) -> Result<String, NftError> {
    run(&["-f", "-"], &shadow(&rules.table))?;
    let listed = list(SHADOW);
    run(&["delete", "table", "inet", SHADOW], "")?;
    let listed = listed?.unwrap_or_default();
    let is_flag = |line: &&str| line.trim() == "flags dormant";
    let lines: Vec<&str> = listed.lines().filter(|line| !is_flag(line)).collect();
    Ok(lines.join("\n").replacen(&format!("table inet {SHADOW} "), &format!("table inet {TABLE} "), 1))
}

fn shadow(table: &str) -> String {
    let head = format!("table inet {TABLE} {{\n");
    let dormant = format!("table inet {SHADOW} {{\n\tflags dormant;\n");
    format!("table inet {SHADOW}\ndelete table inet {SHADOW}\n{}", table.replacen(&head, &dormant, 1))
}

/// The lines of two listings that are not in both, each where it belongs: `-` is missing, `+` is too much. Empty if the
/// two say the same in the same order.
pub fn difference(expected: &str, actual: &str) -> String {
    let (expected, actual) = (lines(expected), lines(actual));
    if expected == actual {
        return String::new();
    }
    let mut balance: BTreeMap<&(String, String), i64> = BTreeMap::new();
    expected.iter().for_each(|line| *balance.entry(line).or_default() -= 1);
    actual.iter().for_each(|line| *balance.entry(line).or_default() += 1);
    let told = |((place, line), count): (&&(String, String), &i64)| match count {
        0 => None,
        less if *less < 0 => Some(format!("  - {place}: {line}")),
        _ => Some(format!("  + {place}: {line}")),
    };
    let told: Vec<String> = balance.iter().filter_map(told).collect();
    if told.is_empty() { "  the same rules in another order".into() } else { told.join("\n") }
}

/// Every line with the chain that it stands in.
fn lines(listing: &str) -> Vec<(String, String)> {
    let mut place = String::from("table");
    let mut found = Vec::new();
    for line in listing.lines().map(str::trim).filter(|line| !line.is_empty() && *line != "}") {
        if let Some(name) = line.strip_suffix(" {").filter(|name| name.starts_with("chain ")) {
            name.clone_into(&mut place);
        }
        found.push((place.clone(), line.to_owned()));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTED: &str = "table inet sidewarden {\n\tchain input {\n\t\ttype filter hook input priority filter; policy drop;\n\
        \t\tiifname \"lo\" accept\n\t\ttcp dport { 443, 8443 } accept\n\t}\n\n\tchain output {\n\t\toifname \"lo\" accept\n\t}\n}\n";

    #[test]
    fn a_listing_differs_by_whatever_line_was_changed_added_removed_or_moved() {
        assert_eq!(difference(LISTED, LISTED), "");
        assert_eq!(difference(LISTED, &LISTED.replace('\t', "  ")), "", "blanks are no rules");
        for (from, to, expected) in [
            (
                "{ 443, 8443 }",
                "{ 22, 443, 8443 }",
                "  + chain input: tcp dport { 22, 443, 8443 } accept\n  - chain input: tcp dport { 443, 8443 } accept",
            ),
            ("policy drop", "policy accept", "policy accept"),
            ("\t\toifname \"lo\" accept\n", "", "  - chain output: oifname \"lo\" accept"),
            ("\t\toifname \"lo\" accept\n", "\t\toifname \"lo\" accept\n\t\taccept\n", "  + chain output: accept"),
        ] {
            let told = difference(LISTED, &LISTED.replacen(from, to, 1));
            let mut sorted: Vec<&str> = told.lines().collect();
            sorted.sort_unstable();
            assert!(sorted.join("\n").contains(expected), "{expected}\n{told}");
        }
        let moved = "a\nb";
        assert_eq!(difference(moved, "b\na"), "  the same rules in another order");
        assert!(difference(LISTED, "").contains("- chain input"));
    }

    #[test]
    fn the_shadow_is_dormant_and_has_every_rule() {
        let shadow = shadow(LISTED);
        assert!(shadow.contains("table inet sidewarden_verify {\n\tflags dormant;\n\tchain input"), "{shadow}");
        assert!(!shadow.contains("table inet sidewarden {"));
    }

    #[test]
    fn a_complaint_says_what_to_change() {
        let rows = [
            ("Error: Could not process rule: Operation not permitted\nlist tables\n", "CAP_NET_ADMIN"),
            ("netlink: Error: cache initialization failed: Protocol not supported\n", "CONFIG_NF_TABLES_INET"),
            ("/dev/stdin:3:1-9: Error: Could not process rule: No such file or directory\n", "NFT_REDIR"),
            (
                "/dev/stdin:3:1-9: Error: syntax error, unexpected newline\n",
                "nft: /dev/stdin:3:1-9: Error: syntax error",
            ),
            ("", "nft: nothing"),
        ];
        for (stderr, part) in rows {
            let told = complaint(stderr).to_string();
            assert!(told.contains(part), "{told}");
        }
    }
}
