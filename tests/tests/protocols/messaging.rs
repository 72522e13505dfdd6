//! Messages: ActiveMQ by OpenWire and STOMP, AMQP 1.0, NATS.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use sidewarden_tests::command::run;
use sidewarden_tests::packages::PROTON;
use sidewarden_tests::service::{Service, free_address};
use tempfile::TempDir;

use crate::pair::{CANARY, PYTHON, Pair, has, script, script_server, server, talk};

/// What ActiveMQ's own program needs, as a broker and as a client.
fn activemq(dir: &Path) -> Vec<String> {
    let d = dir.display();
    let opened = ["java.base/java.lang", "java.base/java.util", "java.base/java.net"];
    let opened = opened.iter().flat_map(|part| ["--add-opens".to_owned(), format!("{part}=ALL-UNNAMED")]);
    let mut args = vec!["-Xmx256m".to_owned()];
    args.extend(opened);
    args.extend(["home=/usr/share/activemq", "base=", "conf=", "data="].map(
        |property| match property.split_once('=') {
            Some((name, "")) => format!("-Dactivemq.{name}={d}"),
            _ => format!("-Dactivemq.{property}"),
        },
    ));
    args.push(format!("-Dlog4j.configuration=file:{d}/log4j.properties"));
    args.extend(["-jar", "/usr/share/activemq/bin/activemq.jar"].map(str::to_owned));
    args
}

/// A broker, and where it speaks OpenWire and STOMP.
fn broker(dir: &Path) -> (Service, SocketAddr, SocketAddr) {
    let (openwire, stomp) = (free_address().unwrap(), free_address().unwrap());
    let log = "log4j.rootLogger=INFO, out\nlog4j.appender.out=org.apache.log4j.ConsoleAppender\n\
        log4j.appender.out.layout=org.apache.log4j.SimpleLayout\n";
    std::fs::write(dir.join("log4j.properties"), log).unwrap();
    let config = format!(
        r#"<beans xmlns="http://www.springframework.org/schema/beans" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"
        xsi:schemaLocation="http://www.springframework.org/schema/beans http://www.springframework.org/schema/beans/spring-beans-2.0.xsd
            http://activemq.apache.org/schema/core http://activemq.apache.org/schema/core/activemq-core.xsd">
        <broker xmlns="http://activemq.apache.org/schema/core" useJmx="false" persistent="false" brokerName="test">
            <transportConnectors>
                <transportConnector name="openwire" uri="tcp://{openwire}"/>
                <transportConnector name="stomp" uri="stomp://{stomp}"/>
            </transportConnectors>
        </broker></beans>"#
    );
    std::fs::write(dir.join("broker.xml"), config).unwrap();
    let mut command = Command::new("java");
    command.args(activemq(dir)).arg("start").arg(format!("xbean:file:{}", dir.join("broker.xml").display()));
    // STOMP is the second that it starts.
    (Service::start(command, dir, stomp).unwrap(), openwire, stomp)
}

/// Debian's ActiveMQ comes without its AMQP transport; AMQP has a test of its own below.
#[tokio::test(flavor = "multi_thread")]
async fn activemq_by_openwire_and_stomp() {
    if !has("activemq", &["activemq", PYTHON]) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (_service, openwire, stomp) = tokio::task::block_in_place(|| broker(dir.path()));
    let pair = Pair::before(openwire, &["ActiveMQ", "WireFormatInfo", "TextMessage"]).await;
    let url = format!("tcp://{}", pair.door());
    let tool = |act: &str, more: &[&str]| {
        let at = [act, "--brokerUrl", &url, "--destination", "queue://orders", "--messageCount", "200"];
        talk(run("java", activemq(dir.path())).args(at).args(more))
    };
    let said = tool("producer", &["--message", CANARY]);
    assert!(said.contains("Produced: 200 messages"), "{said}");
    let said = tool("consumer", &[]);
    assert_eq!(said.matches(&format!("Received {CANARY}")).count(), 200, "{said}");
    pair.settle(2..=4).await;

    let pair = Pair::before(stomp, &["SUBSCRIBE", "destination:", "content-length"]).await;
    let [host, port] = pair.host_port();
    assert_eq!(talk(script("stomp_talk.py", &[&host, &port, CANARY, "200"])), "took back 200\n");
    pair.settle(1..=1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn amqp_1() {
    if !has("amqp", &[PROTON, PYTHON]) {
        return;
    }
    let (dir, address) = (TempDir::new().unwrap(), free_address().unwrap());
    let (host, port) = (address.ip().to_string(), address.port().to_string());
    // Debian's Qpid Proton belongs to Debian's Python.
    let python = Path::new("/usr/bin/python3");
    let command = script_server(python, "amqp_talk.py", &["serve", &host, &port]);
    let service = tokio::task::block_in_place(|| Service::start(command, dir.path(), address)).unwrap();
    let pair = Pair::before(service.address, &["replies"]).await;
    let [host, port] = pair.host_port();
    let script = sidewarden_tests::python::scripts().join("amqp_talk.py");
    let said = talk(run(python, [script]).args(["call", &host, &port, CANARY, "200"]));
    assert_eq!(said, "took back 200\n");
    pair.settle(1..=1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nats_whose_server_speaks_first() {
    if !has("nats", &["nats-server", PYTHON]) {
        return;
    }
    let (dir, address) = (TempDir::new().unwrap(), free_address().unwrap());
    let mut command = server("nats-server");
    command.args(["-a", &address.ip().to_string(), "-p", &address.port().to_string()]);
    let service = tokio::task::block_in_place(|| Service::start(command, dir.path(), address)).unwrap();
    let pair = Pair::before(service.address, &["server_id", "CONNECT {", "_INBOX"]).await;
    let [host, port] = pair.host_port();
    assert_eq!(talk(script("nats_talk.py", &[&host, &port, CANARY, "200"])), "took back 400\n");
    pair.settle(2..=2).await;
}
