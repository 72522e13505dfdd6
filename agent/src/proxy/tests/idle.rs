//! Connections on which nothing happens for long, in simulated time.

use super::*;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// `web` calls `orders` with certificates that outlast the test; both have the timeouts that `change` sets.
async fn quiet_pair(change: impl Fn(&mut Config)) -> (Agent, Agent) {
    let ca = Ca::new("td");
    let lasting = |path: &str| {
        let mut params = ca.params(path);
        validity(&mut params, Timestamp::now().minus(DAY), Timestamp::now().plus(400 * DAY));
        Some(ca.identity_of(&params))
    };
    let mut inner = inbound_config(echo().await, WEB);
    change(&mut inner);
    let orders = Agent::start(lasting("shop/orders"), inner).await;
    let mut outer = outbound_config(orders.inbound[0], ORDERS);
    change(&mut outer);
    let web = Agent::start(lasting("shop/web"), outer).await;
    (web, orders)
}

async fn says(client: &mut TcpStream, word: &[u8]) {
    client.write_all(word).await.unwrap();
    let mut answer = vec![0; word.len()];
    client.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, word);
}

/// As pools of database connections are: quiet over the weekend, and expected to be there on Monday.
#[tokio::test]
async fn a_connection_that_is_quiet_for_a_week_is_still_there() {
    let (web, _orders) = quiet_pair(|_| {}).await;
    let mut client = call(&web).await;
    says(&mut client, b"before").await;
    // Paused only now: handshakes are real, and must not meet their deadline while a socket is waited for.
    tokio::time::pause();
    tokio::time::advance(7 * DAY).await;
    tokio::time::resume();
    says(&mut client, b"after").await;
}

#[tokio::test]
async fn an_idle_timeout_ends_what_is_quiet_and_says_so() {
    // Of one of them: if both had it, either could be the first, and the other would see a connection that was cut.
    let web_only = |config: &mut Config| {
        if !config.outbound.is_empty() {
            config.timeouts.idle = Duration::from_secs(600);
        }
    };
    let (web, orders) = quiet_pair(web_only).await;
    let mut client = call(&web).await;
    says(&mut client, b"before").await;
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(500)).await;
    tokio::time::resume();
    says(&mut client, b"in time").await;
    tokio::time::pause();
    let ended = |body: &Body| if let Body::ConnectionEnded(ended) = body { Some(ended.reason.clone()) } else { None };
    assert!(client.read(&mut [0; 1]).await.is_err(), "a reset, for nobody said that it was done");
    // Both agents wait as long; the one whose timer comes first says it, and the other sees a cut.
    let told = tokio::select! { reason = web.event(ended) => reason, reason = orders.event(ended) => reason };
    assert_eq!(told, "idle");
}
