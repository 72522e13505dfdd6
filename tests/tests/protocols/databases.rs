//! Databases: MariaDB, where the server speaks first; PostgreSQL, which asks for TLS of its own and gets a no; Redis.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use sidewarden_tests::service::{Service, free_address, not_as_root};
use tempfile::TempDir;

use crate::pair::{CANARY, Pair, client, has, number_after, server, talk};

/// The agent dials from there, and the server believes nobody else.
const FROM_AGENT: &str = "127.0.0.6";

fn mariadb(dir: &Path) -> Service {
    let data = dir.join("data");
    let user = if nix::unistd::Uid::effective().is_root() { "--user=root" } else { "--skip-symbolic-links" };
    let install = client("mariadb-install-db", &["--no-defaults", "--skip-test-db", user]);
    talk(install.args([format!("--datadir={}", data.display())]));
    let init = dir.join("init.sql");
    let sql = format!(
        "CREATE DATABASE shop;\nCREATE USER app@'{FROM_AGENT}' IDENTIFIED BY 'pw';\nGRANT ALL ON *.* TO app@'{FROM_AGENT}';\n"
    );
    std::fs::write(&init, sql).unwrap();
    let address = free_address().unwrap();
    let mut command = server("mariadbd");
    command.args(["--no-defaults", "--skip-name-resolve", "--innodb-buffer-pool-size=32M", user]);
    command.arg("--innodb-flush-log-at-trx-commit=0").arg(format!("--init-file={}", init.display()));
    command.args([format!("--datadir={}", data.display()), format!("--socket={}", dir.join("s").display())]);
    command.args([format!("--bind-address={}", address.ip()), format!("--port={}", address.port())]);
    command.arg(format!("--pid-file={}", dir.join("pid").display()));
    Service::start(command, dir, address).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn mariadb_whose_server_speaks_first() {
    if !has("mariadb", &["mariadbd", "mariadb-install-db", "mariadb", "mariadb-slap", "sysbench"]) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let service = tokio::task::block_in_place(|| mariadb(dir.path()));
    let pair = Pair::before(service.address, &["SELECT", "mysql_native_password", "MariaDB"]).await;
    let greeting = tokio::task::block_in_place(|| first_bytes(pair.door()));
    assert!(greeting.windows(7).any(|part| part == b"MariaDB"), "not a byte from us, and {greeting:?} from the server");
    let [host, port] = pair.host_port();
    let login = ["-h", &host, "-P", &port, "-uapp", "-ppw"];
    let sql = format!(
        "CREATE TABLE t (id INT PRIMARY KEY, text LONGTEXT); INSERT INTO t VALUES (1, '{CANARY}'), (2, REPEAT('x', 3000000));
         SELECT text FROM t WHERE id = 1; SELECT LENGTH(text), MD5(text) FROM t WHERE id = 2; SELECT USER();"
    );
    let said = talk(
        client("mariadb", &["--no-defaults", "--batch", "--skip-column-names"]).args(login).args(["shop", "-e", &sql]),
    );
    let lines: Vec<&str> = said.lines().collect();
    // MD5 of three million x.
    let long = "3000000\t8e32e22642bddc89698e25a4e9bf528b";
    assert_eq!(lines, [CANARY, long, &format!("app@{FROM_AGENT}")]);

    let slap = client("mariadb-slap", &["--no-defaults", "--concurrency=8", "--number-of-queries=800", "--csv"]);
    let said = talk(slap.args(login).args(["--auto-generate-sql", "--auto-generate-sql-load-type=mixed"]));
    assert!(said.trim_end().split(',').nth(5) == Some("8"), "eight clients ran: {said}");

    let base = ["oltp_read_write", "--db-driver=mysql", "--mysql-db=shop", "--mysql-user=app", "--mysql-password=pw"];
    let at = [format!("--mysql-host={host}"), format!("--mysql-port={port}")];
    let sysbench =
        |last: &[&str]| talk(client("sysbench", &base).args(&at).args(["--tables=2", "--table-size=300"]).args(last));
    sysbench(&["prepare"]);
    let said = sysbench(&["--threads=8", "--time=2", "--db-ps-mode=auto", "run"]);
    assert!(said.contains("reconnects:                          0"), "{said}");
    assert!(number_after(&said, "transactions:") > 20, "{said}");
    let counted = pair.settle(18..=60).await;
    assert!(counted.up > 3000 && counted.down > 3000, "{counted:?}");
}

/// What comes before a byte was sent.
fn first_bytes(door: SocketAddr) -> Vec<u8> {
    let mut socket = TcpStream::connect(door).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut bytes = vec![0; 64];
    let count = socket.read(&mut bytes).unwrap();
    bytes.truncate(count);
    bytes
}

fn postgres(dir: &Path) -> Service {
    let (data, address) = (dir.join("data"), free_address().unwrap());
    std::fs::write(dir.join("password"), "pw").unwrap();
    let mut initdb = server("initdb");
    initdb.args(["--no-sync", "--username=app", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"]);
    initdb.arg(format!("--pwfile={}", dir.join("password").display())).arg("-D").arg(&data).current_dir(dir);
    not_as_root(&mut initdb, dir).unwrap();
    let made = initdb.output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    // Nobody but the agent may log in.
    std::fs::write(data.join("pg_hba.conf"), format!("host all all {FROM_AGENT}/32 scram-sha-256\n")).unwrap();
    let mut command = server("postgres");
    command.arg("-D").arg(&data).args(["-c", "fsync=off", "-c", "shared_buffers=16MB"]).current_dir(dir);
    command.arg("-c").arg(format!("listen_addresses={}", address.ip())).arg("-p").arg(address.port().to_string());
    command.arg("-c").arg(format!("unix_socket_directories={}", dir.display()));
    not_as_root(&mut command, dir).unwrap();
    Service::start(command, dir, address).unwrap()
}

/// A client may ask for TLS first (`sslmode=prefer`, its default): the server's no comes through, and it goes on in
/// plaintext, to its agent. One that insists (`require`) is told by the server itself that there is none.
#[tokio::test(flavor = "multi_thread")]
async fn postgresql_that_asks_for_tls_of_its_own_first() {
    if !has("postgresql", &["initdb", "postgres", "psql", "pgbench"]) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let service = tokio::task::block_in_place(|| postgres(dir.path()));
    let pair = Pair::before(service.address, &["SELECT", "pgbench_accounts", "server_version"]).await;
    let [host, port] = pair.host_port();
    let conninfo = |mode: &str| format!("host={host} port={port} user=app password=pw dbname=postgres sslmode={mode}");
    let psql = |mode: &str, sql: &str| client("psql", &["-XAtq", "-c", sql, &conninfo(mode)]);
    let sql = format!("SELECT '{CANARY}', length(repeat('x', 3000000)), inet_client_addr()");
    for mode in ["prefer", "disable"] {
        assert_eq!(talk(psql(mode, &sql)), format!("{CANARY}|3000000|{FROM_AGENT}\n"), "{mode}");
    }
    let refused = tokio::task::block_in_place(|| psql("require", &sql).finish()).unwrap();
    assert!(refused.stderr.contains("server does not support SSL"), "{refused:?}");

    let bench = |args: &[&str]| {
        talk(
            client("pgbench", args)
                .args(["-h", &host, "-p", &port, "-U", "app"])
                .env("PGPASSWORD", "pw")
                .args(["postgres"]),
        )
    };
    bench(&["-i", "-q", "-s", "1"]);
    let said = bench(&["-c", "8", "-j", "2", "-t", "40", "-n"]);
    assert!(said.contains("actually processed: 320/320") && said.contains("failed transactions: 0"), "{said}");
    let said = bench(&["-c", "4", "-t", "25", "-n", "-S", "-C"]);
    assert!(said.contains("actually processed: 100/100"), "a connection for each transaction: {said}");
    pair.settle(112..=140).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_with_pipelines_and_its_own_benchmark() {
    if !has("redis", &["redis-server", "redis-cli", "redis-benchmark"]) {
        return;
    }
    let (dir, address) = (TempDir::new().unwrap(), free_address().unwrap());
    let mut command = server("redis-server");
    command.args(["--bind", &address.ip().to_string(), "--port", &address.port().to_string(), "--save", ""]);
    command.args(["--requirepass", "pw"]).arg("--dir").arg(dir.path());
    let service = tokio::task::block_in_place(|| Service::start(command, dir.path(), address)).unwrap();
    let pair = Pair::before(service.address, &["redis_version", "LRANGE", "PING_INLINE"]).await;
    let [host, port] = pair.host_port();
    let login = ["-h", &host, "-p", &port, "-a", "pw", "--no-auth-warning"];
    let cli = |args: &[&str]| talk(client("redis-cli", &login).args(args));
    assert_eq!(cli(&["SET", "key", CANARY]), "OK\n");
    assert_eq!(cli(&["GET", "key"]), format!("{CANARY}\n"));
    assert!(cli(&["CLIENT", "LIST"]).contains(&format!("addr={FROM_AGENT}:")));
    let commands: String = (0..5_000).map(|n| format!("SET bulk:{n} {CANARY}-{n}\r\n")).collect();
    let said = talk(client("redis-cli", &login).args(["--pipe"]).input(commands));
    assert!(said.contains("errors: 0, replies: 5000"), "{said}");
    let bench = client(
        "redis-benchmark",
        &["-h", &host, "-p", &port, "-a", "pw", "-n", "4000", "-c", "20", "-P", "4", "--csv"],
    );
    let said = talk(bench.args(["-t", "ping,set,get,lrange_300"]));
    for test in ["PING_INLINE", "SET", "GET", "LRANGE_300 (first 300 elements)"] {
        assert!(said.contains(&format!("\"{test}\",\"")), "{said}");
    }
    pair.settle(104..=150).await;
}
