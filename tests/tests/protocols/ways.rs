//! Ways in: a real load balancer that sends PROXY headers, and real servers that read them.

use std::net::SocketAddr;
use std::path::Path;

use sidewarden_tests::service::{Service, free_address};
use tempfile::TempDir;

use crate::pair::{client, has, server, talk};
use crate::world::{World, outbound};

/// What the load balancer's own connections come from: nobody should take it for the client.
const BALANCER: &str = "127.0.0.33";

/// nginx that answers with the address and the TLS version it was told, on a port or a Unix socket.
fn nginx(dir: &Path, listen: &str, address: SocketAddr) -> Service {
    let user = if nix::unistd::Uid::effective().is_root() { "user root;" } else { "" };
    let d = dir.display();
    let config = format!(
        "{user} daemon off; worker_processes 1; pid {d}/pid; error_log {d}/error.log;
        events {{ worker_connections 64; }}
        http {{
            access_log off; client_body_temp_path {d}/body; proxy_temp_path {d}/1;
            fastcgi_temp_path {d}/2; uwsgi_temp_path {d}/3; scgi_temp_path {d}/4;
            server {{ listen {listen} proxy_protocol; location / {{ return 200 \"$proxy_protocol_addr\\n\"; }} }}
            server {{ listen {address}; location / {{ return 200 up; }} }}
        }}"
    );
    std::fs::write(dir.join("nginx.conf"), config).unwrap();
    let mut command = server("nginx");
    command.arg("-p").arg(dir).arg("-c").arg(dir.join("nginx.conf")).arg("-e").arg(dir.join("error.log"));
    Service::start(command, dir, address).unwrap()
}

/// haproxy that knows nothing of TLS and tells `to` who connected, in this version of the PROXY protocol.
fn haproxy(dir: &Path, to: SocketAddr, version: &str) -> Service {
    let address = free_address().unwrap();
    let config = format!(
        "defaults\n mode tcp\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n\
         listen front\n bind {address}\n server agent {to} source {BALANCER} {version}\n"
    );
    let file = dir.join(format!("{version}.cfg"));
    std::fs::write(&file, config).unwrap();
    let mut command = server("haproxy");
    command.arg("-db").arg("-f").arg(file);
    Service::start(command, dir, address).unwrap()
}

fn curl(door: SocketAddr) -> String {
    talk(client("curl", &["--silent", "--show-error", "--fail", "--noproxy", "*", &format!("http://{door}/")]))
}

/// client -> web's agent -> haproxy -> orders' agent -> nginx; each of the two last believes the one before it.
#[tokio::test(flavor = "multi_thread")]
async fn a_load_balancer_in_front_and_a_server_behind_agree_on_who_connects() {
    if !has("balancer", &["haproxy", "nginx", "curl"]) {
        return;
    }
    let (world, dir) = (World::start().await, TempDir::new().unwrap());
    let (port, socket) = (free_address().unwrap(), dir.path().join("app.sock"));
    for (number, (name, to, listen, told, sent)) in [
        ("port", format!("{port}"), format!("{port}"), "v2", "send-proxy-v2"),
        ("socket", format!("unix:{}", socket.display()), format!("unix:{}", socket.display()), "v1", "send-proxy"),
    ]
    .into_iter()
    .enumerate()
    {
        let home = dir.path().join(name);
        std::fs::create_dir(&home).unwrap();
        let _nginx = tokio::task::block_in_place(|| nginx(&home, &listen, free_address().unwrap()));
        let hold = if name == "port" { "hold_service_port = false" } else { "" };
        let rules = format!(
            "[[inbound]]\nlisten = '127.0.0.1:0'\nto = '{to}'\n{hold}\nproxy_protocol = '{told}'\n\
             allow = ['spiffe://sidewarden.internal/shop/web']\naccept_proxy_protocol_from = ['{BALANCER}']\n"
        );
        let orders = world.agent(&format!("orders-{number}"), "shop/orders", &rules).await;
        orders.enrolled().await;
        let haproxy = tokio::task::block_in_place(|| haproxy(&home, orders.inbound(), sent));
        let web = world.agent(&format!("web-{number}"), "shop/web", &outbound(haproxy.address, "shop/orders")).await;
        web.enrolled().await;
        // haproxy was connected to from 127.0.0.1, and says so; its own address is another.
        assert_eq!(curl(web.app.addresses.outbound[0]), "127.0.0.1\n", "{name}");
        let who = format!("orders-{number}");
        let seen = world.event("peer.first_seen", |record| record.agent.instance.to_string() == who).await;
        assert!(seen.body.get().contains("\"address\":\"127.0.0.1:"), "{}", seen.body.get());
    }
}
