//! The binary as an operator meets it.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use sidewarden_proto::enrol::Token;
use tempfile::tempdir;

fn collector() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sidewarden-collector"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("SIDEWARDEN_")) {
        command.env_remove(name);
    }
    command
}

fn run(arguments: &[&str]) -> Output {
    collector().args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A running server that is ended when the test is.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Server {
    /// Starts, and waits for the line that says it is ready.
    fn start(dir: &Path) -> Server {
        Server::start_with(dir, 0)
    }

    fn start_with(dir: &Path, api_port: u16) -> Server {
        Server::ready(dir, api_port).0
    }

    /// The same on a free port, and the API's address.
    fn with_api(dir: &Path) -> (Server, String) {
        let (server, ready) = Server::ready(dir, 0);
        let api = ready.split_whitespace().find_map(|word| word.strip_prefix("api=")).unwrap();
        (server, format!("https://{api}"))
    }

    fn ready(dir: &Path, api_port: u16) -> (Server, String) {
        let mut command = serve(dir);
        command.env("SIDEWARDEN_API_LISTEN", format!("127.0.0.1:{api_port}"));
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let ready = lines.by_ref().map_while(Result::ok).find(|line| line.contains("collector ready"));
        let ready = ready.expect("it ended without being ready");
        std::thread::spawn(move || lines.for_each(drop));
        (Server(child), ready)
    }
}

fn serve(dir: &Path) -> Command {
    let mut command = collector();
    command.args(["serve", "--data-dir"]).arg(dir);
    for name in ["AGENTS", "API", "METRICS"] {
        command.env(format!("SIDEWARDEN_{name}_LISTEN"), "127.0.0.1:0");
    }
    command
}

#[test]
fn help_teaches_the_first_steps() {
    let help = text(&run(&["--help"]).stdout);
    for wanted in ["No configuration is needed", "token create --workload", "Exit codes", "check-config"] {
        assert!(help.contains(wanted), "{wanted} is not in:\n{help}");
    }
}

#[test]
fn wrong_arguments_are_exit_code_2() {
    for arguments in [&["serv"][..], &["token", "create"], &["token", "create", "--workload", "a/b", "--ttl", "soon"]] {
        assert_eq!(run(arguments).status.code(), Some(2), "{arguments:?}");
    }
}

#[test]
fn check_config_tells_every_fault_at_once() {
    let dir = tempdir().unwrap();
    let file = dir.path().join("c.toml");
    std::fs::write(&file, "data_dri = '/x'\ngrace = 'soon'\n[api]\nlisten = '0.0.0.0:7443'\n").unwrap();
    let output = collector().args(["check-config", "--config"]).arg(&file).output().unwrap();
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    for wanted in ["did you mean `data_dir`", "`grace`", "agents.listen"] {
        assert!(told.contains(wanted), "{wanted} is not in:\n{told}");
    }
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/collector.toml");
    assert!(run(&["check-config", "--config", example]).status.success());
    let missing = run(&["check-config", "--config", "/no/such/file"]);
    assert!(text(&missing.stderr).contains("/no/such/file"));
}

#[test]
fn a_token_is_made_beside_a_running_collector() {
    let dir = tempdir().unwrap();
    let data = dir.path().join("data");
    let data_text = data.to_str().unwrap();
    let early = run(&["token", "create", "--workload", "shop/web", "--data-dir", data_text]);
    assert!(text(&early.stderr).contains("start the collector once"), "{}", text(&early.stderr));
    let _server = Server::start(&data);
    let made = run(&["token", "create", "--workload", "shop/web", "--uses", "3", "--data-dir", data_text]);
    let token: Token = text(&made.stdout).parse().expect("stdout is the token and nothing else");
    assert!(!text(&made.stderr).contains(token.secret.reveal()));
    let list = || text(&run(&["token", "list", "--data-dir", data_text]).stdout);
    assert!(list().contains(&token.id) && list().contains("valid") && list().contains("0/3"), "{}", list());
    assert!(run(&["token", "revoke", &token.id, "--data-dir", data_text]).status.success());
    assert!(list().contains("revoked"), "{}", list());
    for bad in ["sidewarden/collector", "no spaces/x", "shop"] {
        let refused = run(&["token", "create", "--workload", bad, "--data-dir", data_text]);
        assert_eq!(refused.status.success(), bad == "shop", "{bad}: {}", text(&refused.stderr));
    }
}

#[test]
fn what_keeps_it_from_starting_is_said_in_one_line() {
    let dir = tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut busy = serve(&dir.path().join("a"));
    busy.env("SIDEWARDEN_AGENTS_LISTEN", taken.local_addr().unwrap().to_string());
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let mut foreign = serve(&dir.path().join("a"));
    foreign.env("SIDEWARDEN_TRUST_DOMAIN", "other.example");
    drop(Server::start(&dir.path().join("lost")));
    std::fs::remove_dir_all(dir.path().join("lost/ca")).unwrap();
    std::fs::create_dir_all(dir.path().join("half/restore.part")).unwrap();
    let rows = [
        (serve(&dir.path().join("half")), "restore the backup again"),
        (serve(&dir.path().join("lost")), "restore ca/ from a backup"),
        (busy, "another program has it"),
        (foreign, "of trust domain `sidewarden.internal`"),
        (serve(&file.join("below")), "data_dir must be a directory this user can write"),
    ];
    for (mut command, wanted) in rows {
        let output = command.output().unwrap();
        let told = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(told.lines().last().is_some_and(|line| line.starts_with("error: ") && line.contains(wanted)), "{told}");
    }
}

#[test]
fn it_stops_in_order_on_sigterm() {
    let dir = tempdir().unwrap();
    let mut server = Server::start(&dir.path().join("data"));
    let pid = nix::unistd::Pid::from_raw(server.0.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(server.0.wait().unwrap().success());
}

#[test]
fn without_a_collector_the_commands_say_so() {
    let dir = tempdir().unwrap();
    let data = dir.path().join("data");
    drop(Server::start(&data));
    for command in ["agents", "events", "health"] {
        // Port 1 of the loopback: nobody is there.
        let output =
            collector().args([command, "--url", "https://127.0.0.1:1", "--data-dir"]).arg(&data).output().unwrap();
        let told = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(told.contains("is the collector running") || told.contains("admin.token"), "{command}: {told}");
    }
}

#[test]
fn the_commands_show_what_the_collector_knows() {
    let dir = tempdir().unwrap();
    let data = dir.path().join("data");
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let _server = Server::start_with(&data, port);
    let ask = |arguments: &[&str]| {
        let mut command = collector();
        command.args(arguments).arg("--data-dir").arg(&data);
        let output = command.env("SIDEWARDEN_API_LISTEN", format!("127.0.0.1:{port}")).output().unwrap();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    assert_eq!(ask(&["health"]).0, Some(0));
    let events = ask(&["events", "--kind", "collector.started"]);
    assert!(events.1.contains("Collector") && events.1.lines().count() == 1, "{events:?}");
    let json = ask(&["events", "--json", "--limit", "1"]).1;
    assert!(serde_json::from_str::<serde_json::Value>(&json).unwrap()["kind"].is_string());
    let agents = ask(&["agents"]);
    assert!(agents.1.starts_with("WORKLOAD") && agents.2.contains("token create"), "{agents:?}");
    assert!(ask(&["posture", "shop/web"]).2.contains("no such workload"));
    // Another collector's CA, and another token.
    let other = dir.path().join("other");
    drop(Server::start(&other));
    let foreign = other.join("ca/root/cert.pem");
    let refused = ask(&["agents", "--ca", foreign.to_str().unwrap()]);
    assert!(refused.0 == Some(1) && refused.2.contains("certificate"), "{refused:?}");
    let token = other.join("admin.token");
    let refused = ask(&["agents", "--token-file", token.to_str().unwrap()]);
    assert!(refused.0 == Some(1) && refused.2.contains("the token is wrong"), "{refused:?}");
}

/// Runs a command on `data`, with a passphrase for the CA's keys if there is one.
fn on(data: &Path, passphrase: Option<&Path>, arguments: &[&str]) -> (bool, String, String) {
    let mut command = collector();
    command.args(arguments).arg("--data-dir").arg(data);
    if let Some(file) = passphrase {
        command.env("SIDEWARDEN_CA_PASSPHRASE_FILE", file);
    }
    let output = command.output().unwrap();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn the_root_is_rotated_by_commands_beside_a_running_collector() {
    let dir = tempdir().unwrap();
    let data = dir.path().join("data");
    let refused = on(&data, None, &["ca", "prepare"]);
    assert!(!refused.0 && refused.2.contains("start the collector once"), "{refused:?}");
    let server = Server::start(&data);
    let before = on(&data, None, &["ca", "status"]).1;
    assert!(before.contains("active") && before.contains("No rotation is under way"), "{before}");
    assert!(on(&data, None, &["token", "create", "--workload", "shop/web"]).0);
    let out_of_turn = on(&data, None, &["ca", "activate"]);
    assert!(!out_of_turn.0 && out_of_turn.2.contains("begin with `ca prepare`"), "{out_of_turn:?}");
    assert!(!out_of_turn.2.contains("old root's pin"), "nothing was done: {out_of_turn:?}");
    for (step, next) in [
        ("prepare", "Next: `ca activate`"),
        ("activate", "Next: `ca taint`"),
        ("taint", "Next: `ca retire`"),
        ("retire", "The rotation is complete"),
    ] {
        let done = on(&data, None, &["ca", step]);
        assert!(done.0 && done.2.contains(next), "{step}: {done:?}");
        assert_eq!(done.2.contains("old root's pin"), step == "activate", "{step}: {done:?}");
    }
    let json: serde_json::Value = serde_json::from_str(&on(&data, None, &["ca", "status", "--json"]).1).unwrap();
    assert_eq!((&json["generations"][0]["number"], &json["generations"][0]["stage"]), (&2.into(), &"active".into()));
    let unasked = on(&data, None, &["ca", "compromise"]);
    assert!(!unasked.0 && unasked.2.contains("must enrol anew") && unasked.2.contains("--yes"), "{unasked:?}");
    assert!(on(&data, None, &["ca", "compromise", "--yes"]).0);
    assert!(on(&data, None, &["ca", "status"]).1.contains("No rotation is under way"));
    drop(server);
    let alone = on(&data, None, &["ca", "prepare"]);
    assert!(!alone.0 && alone.2.contains("no collector runs on"), "{alone:?}");
}

#[test]
fn whom_a_forced_step_leaves_behind_is_said_of_that_step_also_if_another_is_next() {
    let dir = tempdir().unwrap();
    let (data, csr) = (dir.path().join("data"), dir.path().join("request.pem"));
    let key = rcgen::KeyPair::generate().unwrap();
    std::fs::write(&csr, rcgen::CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap()).unwrap();
    let _server = Server::start(&data);
    let probe = ["ca", "issue", "--csr", csr.to_str().unwrap(), "--name", "monitoring/probe"];
    for command in [&probe[..], &["ca", "prepare"], &["ca", "activate"]] {
        assert!(on(&data, None, command).0, "{command:?}");
    }
    let unasked = on(&data, None, &["ca", "retire", "--force"]);
    assert!(unasked.2.contains("1 would be left behind") && unasked.2.contains("monitoring/probe"), "{unasked:?}");
    assert!(!unasked.0 && unasked.2.contains("--yes"), "{unasked:?}");
}

#[test]
fn a_client_without_an_agent_gets_a_certificate_by_its_request() {
    let dir = tempdir().unwrap();
    let (data, csr) = (dir.path().join("data"), dir.path().join("request.pem"));
    let key = rcgen::KeyPair::generate().unwrap();
    let request = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
    std::fs::write(&csr, request.pem().unwrap()).unwrap();
    let _server = Server::start(&data);
    let issue = |name: &str, more: &[&str]| {
        let arguments = ["ca", "issue", "--csr", csr.to_str().unwrap(), "--name", name];
        on(&data, None, &[&arguments[..], more].concat())
    };
    let done = issue("monitoring/prometheus", &["--dns", "prometheus.internal", "--ttl", "2d"]);
    assert!(done.0, "{done:?}");
    let key = key.serialize_pem();
    let credential = sidewarden_proto::tls::Credential::from_pem(done.1.as_bytes(), key.as_bytes()).unwrap();
    assert_eq!(credential.peer().name.to_string(), "spiffe://sidewarden.internal/monitoring/prometheus");
    assert_eq!(credential.chain().len(), 3);
    for (name, why) in [("sidewarden/collector", "reserved"), ("spiffe://other/a/b", "trust domain")] {
        let refused = issue(name, &[]);
        assert!(!refused.0 && refused.2.contains(why) && refused.1.is_empty(), "{name}: {refused:?}");
    }
    assert!(on(&data, None, &["token", "create", "--workload", "shop/*"]).0);
    let refused = issue("shop/web", &[]);
    assert!(!refused.0 && refused.2.contains("--although-agents-bear-it"), "{refused:?}");
    assert!(issue("shop/web", &["--although-agents-bear-it"]).0);
    std::fs::write(&csr, "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n").unwrap();
    let broken = issue("monitoring/probe", &[]);
    assert!(!broken.0 && broken.2.contains("certificate request cannot be read"), "{broken:?}");
}

#[test]
fn keys_are_sealed_and_a_backup_makes_the_same_collector_again() {
    let dir = tempdir().unwrap();
    let (data, passphrase) = (dir.path().join("data"), dir.path().join("passphrase"));
    std::fs::write(&passphrase, "correct horse battery\n").unwrap();
    let server = Server::start(&data);
    assert!(on(&data, Some(&passphrase), &["ca", "seal"]).2.contains("stop the collector first"));
    drop(server);
    assert!(on(&data, None, &["ca", "seal"]).2.contains("ca.passphrase_file"));
    assert!(on(&data, Some(&passphrase), &["ca", "seal"]).2.contains("2 keys sealed"));
    assert!(!data.join("ca/root/key.pem").exists() && data.join("ca/root/key.sealed").exists());
    let refused = serve(&data).output().unwrap();
    assert!(!refused.status.success() && text(&refused.stderr).contains("there is no passphrase"));
    let pin = |data: &Path| {
        let status = on(data, Some(&passphrase), &["ca", "status", "--json"]).1;
        serde_json::from_str::<serde_json::Value>(&status).unwrap()["generations"][0]["pin"].clone()
    };
    let out = dir.path().join("backup");
    let backup = ["ca", "backup", "--out", out.to_str().unwrap()];
    assert!(on(&data, None, &backup).2.contains("--passphrase-file"));
    assert!(on(&data, Some(&passphrase), &backup).0);
    assert!(on(&data, Some(&passphrase), &backup).2.contains("nothing is overwritten"));
    let restore = ["ca", "restore", out.to_str().unwrap()];
    assert!(on(&data, Some(&passphrase), &restore).2.contains("nothing is overwritten"));
    let fresh = dir.path().join("fresh");
    let restored = on(&fresh, Some(&passphrase), &restore);
    assert!(restored.0 && restored.2.contains("restored into"), "{restored:?}");
    assert_eq!(pin(&fresh), pin(&data));
    assert!(on(&fresh, Some(&passphrase), &["ca", "unseal"]).2.contains("2 keys are plain"));
    drop(Server::start(&fresh));
}

#[test]
fn logs_can_be_json() {
    let dir = tempdir().unwrap();
    let mut child =
        serve(&dir.path().join("data")).args(["--log-format", "json"]).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let first = lines.next().unwrap().unwrap();
    let _server = Server(child);
    assert!(serde_json::from_str::<serde_json::Value>(&first).is_ok_and(|line| line["fields"].is_object()), "{first}");
}

#[test]
fn an_identity_is_revoked_listed_and_restored_beside_a_running_collector() {
    let dir = tempdir().unwrap();
    let (_server, url) = Server::with_api(dir.path());
    let data = dir.path().to_str().unwrap();
    let revoke = |arguments: &[&str]| run(&[&["revoke", "--data-dir", data, "--url", &url][..], arguments].concat());
    let refused = revoke(&["--workload", "shop/web", "--reason", "retired"]);
    let told = text(&refused.stderr);
    assert!(!refused.status.success() && told.contains("every instance of") && told.contains("--yes"), "{told}");
    let done = revoke(&["--workload", "shop/web", "--reason", "retired", "--yes"]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert!(text(&done.stderr).contains("In force at 0 of 0 connected agents"), "{}", text(&done.stderr));
    let typo = revoke(&["--serial", "4F:1A", "--reason", "copied"]);
    assert!(text(&typo.stderr).contains("check it for a slip"), "{}", text(&typo.stderr));
    let list = text(&revoke(&["--list"]).stdout);
    assert!(list.contains("shop/web") && list.contains("certificate 4f1a") && list.contains("copied"), "{list}");
    let id = list.lines().find(|line| line.contains("shop/web")).unwrap().split(' ').next().unwrap().to_owned();
    assert!(revoke(&["--undo", &id, "--reason", "back"]).status.success());
    assert!(!text(&revoke(&["--list"]).stdout).contains("shop/web"));
    for wrong in [&["--reason", "x"][..], &["--serial", "1"], &["--serial", "1", "--list"]] {
        assert_eq!(revoke(wrong).status.code(), Some(2), "{wrong:?}");
    }
}

/// A root and a leaf below it, PEM.
fn partner_chain() -> (String, String) {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};
    let (mut root, key) = (CertificateParams::default(), KeyPair::generate().unwrap());
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    root.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    root.distinguished_name.push(rcgen::DnType::CommonName, "Partner root");
    let pem = root.self_signed(&key).unwrap().pem();
    let mut leaf = CertificateParams::default();
    leaf.distinguished_name.push(rcgen::DnType::CommonName, "Partner leaf");
    let leaf = leaf.signed_by(&KeyPair::generate().unwrap(), &Issuer::new(root, key)).unwrap().pem();
    (pem, leaf)
}

#[test]
fn roots_are_imported_listed_and_removed_beside_a_running_collector() {
    let dir = tempdir().unwrap();
    let (data, file) = (dir.path().join("data"), dir.path().join("partner.pem"));
    let _server = Server::start(&data);
    let trust =
        |arguments: &[&str]| collector().args(["trust"]).args(arguments).arg("--data-dir").arg(&data).output().unwrap();
    let list = || text(&trust(&["list"]).stdout);
    assert!(list().contains("sidewarden.internal") && list().contains("our own CA"), "{}", list());
    let (root, leaf) = partner_chain();
    std::fs::write(&file, [leaf.as_str(), root.as_str()].concat()).unwrap();
    let path = file.to_str().unwrap();

    let unsaid = trust(&["import", path]);
    assert!(!unsaid.status.success() && text(&unsaid.stderr).contains("use --for <trust domain>"), "{unsaid:?}");
    let ours = trust(&["import", path, "--for", "sidewarden.internal"]);
    assert!(text(&ours.stderr).contains("our own trust domain"), "{ours:?}");
    let tried = trust(&["import", path, "--for", "partner.example", "--dry-run"]);
    let said = text(&tried.stdout);
    assert!(tried.status.success() && !list().contains("Partner"), "{tried:?}");
    for wanted in ["Partner root", "root CA", "trusted from now on", "Partner leaf", "not needed", "ECDSA P-256"] {
        assert!(said.contains(wanted), "{wanted} is not in:\n{said}");
    }
    assert!(trust(&["import", path, "--for", "partner.example", "--note", "by mail"]).status.success());
    assert!(list().contains("partner.example") && list().contains("by mail"), "{}", list());

    std::fs::write(&file, leaf).unwrap();
    let refused = trust(&["import", path, "--for", "partner.example"]);
    assert!(!refused.status.success() && text(&refused.stderr).contains("--allow-leaf"), "{refused:?}");
    assert!(trust(&["import", path, "--for-dns", "--allow-leaf"]).status.success());
    std::fs::write(&file, "nothing").unwrap();
    assert!(text(&trust(&["import", path, "--for-dns"]).stderr).contains("it holds no certificate"));

    let rows: serde_json::Value = serde_json::from_slice(&trust(&["list", "--json"]).stdout).unwrap();
    let hash =
        rows.as_array().unwrap().iter().find(|row| row["serves"] == "partner.example").unwrap()["sha256"].clone();
    assert!(trust(&["remove", &hash.as_str().unwrap()[..12]]).status.success());
    assert!(!list().contains("partner.example") && list().contains("DNS names"), "{}", list());
    assert_eq!(trust(&["remove", "ffff"]).status.code(), Some(1));
}

#[test]
fn a_policy_is_checked_applied_and_shown_and_an_instance_let_in() {
    let dir = tempdir().unwrap();
    let (good, bad) = (dir.path().join("good.toml"), dir.path().join("bad.toml"));
    std::fs::write(&good, "[[gate]]\nname = 'g'\nchecks = ['privileged']\n").unwrap();
    std::fs::write(&bad, "[[gate]]\nname = 'G'\nhold = 'soon'\n").unwrap();
    let (good, bad) = (good.to_str().unwrap(), bad.to_str().unwrap());
    let refused = run(&["policy", "check", bad]);
    let told = text(&refused.stderr);
    assert!(!refused.status.success() && told.contains("gate[0].name") && told.contains("gate[0].hold"), "{told}");
    assert!(run(&["policy", "check", good]).status.success());
    let data = dir.path().join("data");
    let (_server, url) = Server::with_api(&data);
    let at = ["--data-dir", data.to_str().unwrap(), "--url", &url];
    let ask = |arguments: &[&str]| run(&[arguments, &at[..]].concat());
    let applied = ask(&["policy", "apply", good, "--reason", "first"]);
    assert!(text(&applied.stdout).contains("Policy 1 is in force"), "{}", text(&applied.stderr));
    assert!(text(&ask(&["policy", "show"]).stdout).contains("checks = ['privileged']"));
    assert!(ask(&["quarantine", "release", "shop/web#web-1", "--reason", "needed"]).status.success());
    let list = text(&ask(&["quarantine", "list"]).stdout);
    assert!(list.starts_with("INSTANCE") && list.contains("Let in until"), "{list}");
}

/// Who may talk to whom, in two versions.
const WEB: &str = "# first\n[[allow]]\nfrom = ['shop/web']\nto = ['shop/orders']\nlisteners = [8443]\n";
const BOTH: &str = "[[allow]]\nfrom = ['shop/web', 'shop/api']\nto = ['shop/orders']\nlisteners = [8443]\n";

#[test]
fn a_policy_is_compared_tried_and_rolled_back() {
    let dir = tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (web, both) = (file("web.toml", WEB), file("both.toml", BOTH));
    let wrong =
        file("wrong.toml", "[[allow]]\nfrom = ['shop web']\nto = []\n\n[[egress]]\nfrom = ['dns:x']\nto = ['a']\n");
    let told = text(&run(&["policy", "check", &wrong]).stderr);
    for wanted in ["line 2: `allow[0].from[0]`", "line 6: `egress[0].from`", "line 7: `egress[0].to[0]`"] {
        assert!(told.contains(wanted), "{wanted} is not in:\n{told}");
    }

    // Without a collector: two documents, and a case in one of them.
    let differ = text(&run(&["policy", "diff", &both, "--with", &web]).stdout);
    assert_eq!(differ, "+ line 1: allow shop/api to shop/orders at 8443\n");
    let case = |from: &str, listener: &str| {
        run(&["policy", "test", "connection", from, "shop/orders", "--listener", listener, "--file", &web])
    };
    let allowed = case("shop/web", "8443");
    assert!(
        allowed.status.success() && text(&allowed.stdout).contains("line 2, `[[allow]]`, allows it"),
        "{allowed:?}"
    );
    for (from, listener) in [("shop/api", "8443"), ("shop/web", "9443"), ("unproven", "8443")] {
        let refused = case(from, listener);
        assert_eq!(
            (refused.status.code(), text(&refused.stdout).starts_with("refused")),
            (Some(1), true),
            "{refused:?}"
        );
    }
    let egress = run(&["policy", "test", "egress", "shop/web", "api.example.com:443", "--file", &web, "--json"]);
    let egress: serde_json::Value = serde_json::from_slice(&egress.stdout).unwrap();
    assert_eq!(egress["outcome"], "allowed", "the document leaves that to the agents");

    // With one.
    let data = dir.path().join("data");
    let (_server, url) = Server::with_api(&data);
    let at = ["--data-dir", data.to_str().unwrap(), "--url", &url];
    let ask = |arguments: &[&str]| run(&[arguments, &at[..]].concat());
    assert!(!ask(&["policy", "rollback", "--reason", "nothing to go back to"]).status.success());
    assert!(ask(&["policy", "apply", &web, "--reason", "first"]).status.success());
    assert!(ask(&["policy", "apply", &both, "--reason", "the api, too"]).status.success());
    let differ = text(&ask(&["policy", "diff", &web]).stdout);
    assert!(
        differ.starts_with("- line 1: allow shop/api") && differ.contains("Of 0 pairs that were seen, 0"),
        "{differ}"
    );
    let tried =
        |from: &str| ask(&["policy", "test", "connection", from, "shop/orders", "--listener", "8443"]).status.code();
    assert_eq!((tried("shop/api"), tried("shop/other")), (Some(0), Some(1)));
    let rolled = ask(&["policy", "rollback", "--reason", "too early"]);
    assert!(text(&rolled.stdout).contains("Policy 3, which is 1 again, is in force"), "{rolled:?}");
    assert_eq!(tried("shop/api"), Some(1));
    assert!(text(&ask(&["policy", "show"]).stdout).contains("# first"));
    assert_eq!(text(&ask(&["policy", "show", "--version", "2"]).stdout), BOTH);
    let history = text(&ask(&["policy", "history"]).stdout);
    let rows: Vec<&str> = history.lines().skip(1).collect();
    assert!(rows.len() == 3 && rows[0].contains("in force") && rows[0].contains("1 again: too early"), "{history}");
    let events = text(&ask(&["events", "--kind", "policy.applied"]).stdout);
    assert!(events.contains("policy 3, which is 1 again, was applied by"), "{events}");
}
