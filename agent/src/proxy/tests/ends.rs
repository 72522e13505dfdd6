//! How connections end: each half by itself, a cut as a cut, and everything with the certificate it was made with.

use super::*;

/// A workload that serves one connection as it is told.
async fn workload<F: Future<Output = ()> + Send + 'static>(
    serve: impl FnOnce(TcpStream) -> F + Send + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind(ANY).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { serve(listener.accept().await.unwrap().0).await });
    address
}

/// `web` in front of `orders` in front of `service`.
async fn before(service: SocketAddr) -> (Agent, Agent) {
    let ca = Ca::new("td");
    let orders = Agent::start(Some(ca.identity("shop/orders")), inbound_config(service, WEB)).await;
    let web = Agent::start(Some(ca.identity("shop/web")), outbound_config(orders.inbound[0], ORDERS)).await;
    (web, orders)
}

const LONG: usize = 8 << 20;

#[tokio::test]
async fn who_ends_after_the_question_still_gets_the_whole_answer() {
    let service = workload(|mut tcp| async move {
        let mut question = Vec::new();
        tcp.read_to_end(&mut question).await.unwrap();
        assert_eq!(question, b"question");
        tcp.write_all(&vec![7; LONG]).await.unwrap();
    });
    let (web, _orders) = before(service.await).await;
    let mut client = call(&web).await;
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.unwrap();
    assert!(answer.len() == LONG && answer.iter().all(|byte| *byte == 7), "{} bytes", answer.len());
}

#[tokio::test]
async fn a_server_that_ends_first_is_still_told_the_rest() {
    let (tell, told) = tokio::sync::oneshot::channel();
    let service = workload(|mut tcp| async move {
        tcp.write_all(b"goodbye").await.unwrap();
        tcp.shutdown().await.unwrap();
        let mut rest = Vec::new();
        tcp.read_to_end(&mut rest).await.unwrap();
        tell.send(rest.len()).unwrap();
    });
    let (web, _orders) = before(service.await).await;
    let mut client = call(&web).await;
    let mut goodbye = Vec::new();
    client.read_to_end(&mut goodbye).await.unwrap();
    assert_eq!(goodbye, b"goodbye");
    client.write_all(&vec![1; LONG]).await.unwrap();
    drop(client);
    assert_eq!(told.await.unwrap(), LONG);
}

#[tokio::test]
async fn an_answer_that_is_cut_is_a_reset_and_never_an_end() {
    let service = workload(|mut tcp| async move {
        tcp.write_all(&vec![7; 100_000]).await.unwrap();
        // A reset discards what is not sent yet: the client has some of it before.
        tcp.read_exact(&mut [0; 1]).await.unwrap();
        tcp.set_zero_linger().unwrap();
    });
    let (web, _orders) = before(service.await).await;
    let mut client = call(&web).await;
    client.read_exact(&mut [0; 50_000]).await.unwrap();
    client.write_all(b"x").await.unwrap();
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).await.unwrap_err();
    assert!(rest.len() <= 50_000);
}

#[tokio::test]
async fn a_client_that_is_cut_is_a_reset_to_its_server() {
    let (tell, told) = tokio::sync::oneshot::channel();
    let service = workload(|mut tcp| async move {
        let mut got = [0; 8];
        tcp.read_exact(&mut got).await.unwrap();
        tcp.write_all(b"go on").await.unwrap();
        tell.send(tcp.read(&mut got).await.is_err()).unwrap();
    });
    let (web, _orders) = before(service.await).await;
    let mut client = call(&web).await;
    client.write_all(b"question").await.unwrap();
    client.read_exact(&mut [0; 5]).await.unwrap();
    client.set_zero_linger().unwrap();
    drop(client);
    assert!(told.await.unwrap(), "what was cut looked whole");
}

#[tokio::test]
async fn our_own_certificate_ends_what_was_made_with_it_too() {
    let ca = Ca::new("td");
    let (orders, _web, mut client) = in_time(async |until| {
        let mut short = ca.params("shop/orders");
        validity(&mut short, until.minus(Duration::from_secs(600)), until);
        let orders = Agent::start(Some(ca.identity_of(&short)), inbound_config(echo().await, WEB)).await;
        let web = Agent::start(Some(ca.identity("shop/web")), outbound_config(orders.inbound[0], ORDERS)).await;
        let mut client = call(&web).await;
        echoes(&mut client).await.then_some((orders, web, client))
    })
    .await;
    assert!(client.read(&mut [0; 1]).await.is_err(), "cut, not ended");
    let ended = |body: &Body| if let Body::ConnectionEnded(ended) = body { Some(ended.reason.clone()) } else { None };
    assert_eq!(orders.event(ended).await, "expired");
}
