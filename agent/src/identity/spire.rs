//! The keeper with a Workload API, against a server that others have written.

#[path = "../../../tests/tests/world/spire.rs"]
mod server;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sidewarden_proto::directive::Deny;
use sidewarden_proto::event::{Body, Event};
use sidewarden_proto::given::Elsewhere;
use sidewarden_proto::time::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use self::server::{Spire, X509Svid, X509SvidResponse};
use super::foreign::ForeignFiles;
use super::keeper::{Keeper, Parts, Source};
use super::made_up::{Ca, validity};
use super::{Current, Identity, Issued, Store, Terms};
use crate::dial::Resolver;

fn svid(ca: &Ca, path: &str, issued: &Issued) -> X509Svid {
    let chain = issued.chain()[0].0.clone();
    let (spiffe_id, x509_svid_key) = (format!("spiffe://td/{path}"), issued.key().unwrap());
    X509Svid { spiffe_id, x509_svid: chain, x509_svid_key, bundle: ca.root.to_vec(), hint: String::new() }
}

fn answer(ca: &Ca, federated: &[(&str, &Ca)]) -> X509SvidResponse {
    let svids = vec![svid(ca, "shop/web", &ca.issue("shop/web"))];
    let federated = federated.iter().map(|(name, ca)| ((*name).to_owned(), ca.root.to_vec()));
    X509SvidResponse { svids, crl: vec![], federated_bundles: federated.collect() }
}

/// A keeper that runs.
struct World {
    dir: tempfile::TempDir,
    current: Current,
    trouble: tokio::sync::watch::Receiver<Option<String>>,
    events: Arc<Mutex<Vec<Event>>>,
    directives: watch::Sender<Vec<u8>>,
    stop: CancellationToken,
    running: JoinHandle<()>,
}

impl World {
    fn new(socket: &Path) -> World {
        World::in_dir(tempfile::tempdir().unwrap(), socket)
    }

    fn in_dir(dir: tempfile::TempDir, socket: &Path) -> World {
        let store = Store::open(dir.path()).unwrap();
        let events: Arc<Mutex<Vec<Event>>> = Arc::default();
        let told = events.clone();
        let endpoint = format!("unix://{}", socket.display()).parse().unwrap();
        let source = Source {
            collectors: vec![],
            token_file: None,
            workload: None,
            instance: "c1".parse().unwrap(),
            elsewhere: Some(Elsewhere::WorkloadApi(endpoint)),
            foreign: ForeignFiles::default(),
        };
        let parts = Parts {
            source,
            resolver: Resolver::from_system(),
            terms: Terms::default(),
            emit: Arc::new(move |event| told.lock().unwrap().push(event)),
            random: |bytes| bytes.fill(0),
            renewals: mpsc::channel(1).0,
        };
        let (keeper, current) = Keeper::load(store, parts).unwrap();
        let (trouble, stop) = (keeper.trouble(), CancellationToken::new());
        let (directives, incoming) = watch::channel(Vec::new());
        let running = tokio::spawn(keeper.run(incoming, stop.clone()));
        World { dir, current, trouble, events, directives, stop, running }
    }

    async fn identity(&mut self, what: &str, holds: impl Fn(&Identity) -> bool) -> Arc<Identity> {
        let found = self.current.wait_for(|now| now.as_ref().is_some_and(|identity| holds(identity)));
        let found = timeout(Duration::from_secs(60), found).await;
        found.unwrap_or_else(|_| panic!("never: {what}")).unwrap().clone().unwrap()
    }

    async fn trouble(&mut self, says: &str) {
        let found = self.trouble.wait_for(|now| now.as_ref().is_some_and(|trouble| trouble.contains(says)));
        drop(timeout(Duration::from_secs(60), found).await.unwrap_or_else(|_| panic!("never: {says}")).unwrap());
    }

    /// Ends it; its folder, for the next one.
    async fn stop(self) -> tempfile::TempDir {
        self.stop.cancel();
        self.running.await.unwrap();
        self.dir
    }
}

fn domains(identity: &Identity) -> Vec<&str> {
    identity.trust.domains.keys().map(|domain| domain.as_str()).collect()
}

fn refused_events(events: &Mutex<Vec<Event>>) -> usize {
    let events = events.lock().unwrap();
    events.iter().filter(|event| matches!(event.body(), Ok(Some(Body::IdentityRenewalFailed(_))))).count()
}

#[tokio::test]
async fn an_identity_comes_late_is_rotated_and_outlives_the_api() {
    let (dir, ca, partner) = (tempfile::tempdir().unwrap(), Ca::new("td"), Ca::new("partner.example"));
    let socket = dir.path().join("agent.sock");
    let mut world = World::new(&socket);
    world.trouble("agent.sock").await;
    assert!(world.current.borrow().is_none(), "nothing gets through until there is an identity");

    let spire = Spire::new(Err(Status::permission_denied("no identity issued")));
    let serving = spire.serve(&socket);
    world.trouble("permission denied: no identity issued").await;
    spire.say(Ok(answer(&ca, &[])));
    let first = world.identity("the first identity", |_| true).await;
    assert_eq!((first.workload.as_str(), domains(&first)), ("spiffe://td/shop/web", vec!["td"]));
    assert_eq!(*world.trouble.borrow(), None);

    spire.say(Ok(answer(&ca, &[("spiffe://partner.example", &partner)])));
    let second =
        world.identity("the second", |now| now.credential.peer().serial != first.credential.peer().serial).await;
    assert_eq!(domains(&second), ["partner.example", "td"]);

    for (broken, says) in [
        (X509SvidResponse::default(), "no identity in it"),
        (X509SvidResponse { svids: vec![X509Svid::default()], ..answer(&ca, &[]) }, "an identity has no name"),
        (
            answer(&Ca::new("td"), &[("spiffe://partner.example", &partner), ("spiffe://..bad name", &ca)]),
            "no trust domain",
        ),
    ] {
        spire.say(Ok(broken));
        world.trouble(says).await;
        assert!(Arc::ptr_eq(world.current.borrow().as_ref().unwrap(), &second), "the last good one is kept");
    }
    assert_eq!(refused_events(&world.events), 1, "told once while it lasts");
    serving.abort();
    let _ = serving.await;
    world.trouble("Workload API").await;
    assert!(world.current.borrow().is_some());
    spire.say(Ok(answer(&ca, &[])));
    let again = spire.serve(&socket);
    world.identity("the third", |now| domains(now) == ["td"]).await;
    assert!(spire.asked() > 3);
    world.stop().await;
    again.abort();
}

#[tokio::test]
async fn the_same_answer_again_changes_nothing() {
    let (dir, ca) = (tempfile::tempdir().unwrap(), Ca::new("td"));
    let socket = dir.path().join("agent.sock");
    let same = answer(&ca, &[]);
    let spire = Spire::new(Ok(same.clone()));
    let serving = spire.serve(&socket);
    let mut world = World::new(&socket);
    let first = world.identity("the first", |_| true).await;
    spire.say(Ok(same.clone()));
    spire.say(Err(Status::unavailable("a restart")));
    world.trouble("unavailable: a restart").await;
    spire.say(Ok(same));
    let over = world.trouble.wait_for(Option::is_none);
    drop(timeout(Duration::from_secs(60), over).await.expect("it is back").unwrap());
    assert!(Arc::ptr_eq(world.current.borrow().as_ref().unwrap(), &first), "warm connections stay");
    let kinds: Vec<_> = world.events.lock().unwrap().iter().map(|event| event.kind.to_string()).collect();
    let expected = ["identity.renewed", "trust.changed", "identity.renewal_failed", "identity.renewed"];
    assert_eq!(kinds, expected, "the alert ends");
    world.stop().await;
    serving.abort();
}

#[tokio::test]
async fn an_identity_that_does_not_hold_now_is_not_taken() {
    let (dir, ca) = (tempfile::tempdir().unwrap(), Ca::new("td"));
    let socket = dir.path().join("agent.sock");
    let mut params = ca.params("shop/web");
    let (now, hour) = (Timestamp::now(), Duration::from_secs(3600));
    validity(&mut params, now.minus(hour * 2), now.minus(hour));
    let ended = X509SvidResponse { svids: vec![svid(&ca, "shop/web", &ca.issue_with(&params))], ..answer(&ca, &[]) };
    let serving = Spire::new(Ok(ended)).serve(&socket);
    let mut world = World::new(&socket);
    world.trouble("does not verify").await;
    assert!(world.current.borrow().is_none());
    world.stop().await;
    serving.abort();
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_we_cannot_use_yet_is_tried_again_and_why_is_said_meanwhile() {
    let (dir, ca) = (tempfile::tempdir().unwrap(), Ca::new("td"));
    let socket = dir.path().join("agent.sock");
    let spire = Spire::new(Ok(answer(&ca, &[])));
    let serving = spire.serve(&socket);
    let kept = tempfile::tempdir().unwrap();
    let directive = kept.path().join("directive.json");
    std::fs::write(&directive, "garbage").unwrap();
    let mut world = World::in_dir(kept, &socket);
    world.trouble("directive.json is damaged").await;
    tokio::time::sleep(Duration::from_secs(61)).await;
    assert!(world.trouble.borrow().is_some());
    std::fs::remove_file(&directive).unwrap();
    world.identity("the identity", |_| true).await;
    world.stop().await;
    serving.abort();
}

/// The deny list must be there before the first connection, also when who we are comes later than the agent, and also
/// when the roots that it was signed under have gone meanwhile.
#[tokio::test]
async fn the_directive_on_disk_is_in_force_with_the_first_identity() {
    let (dir, ca, newer) = (tempfile::tempdir().unwrap(), Ca::new("td"), Ca::new("td"));
    let socket = dir.path().join("agent.sock");
    let spire = Spire::new(Ok(answer(&ca, &[])));
    let serving = spire.serve(&socket);
    let mut world = World::new(&socket);
    world.identity("the first", |_| true).await;
    let deny = vec![Deny::Workload { id: "spiffe://td/shop/db".parse().unwrap(), why: "test".into() }];
    world.directives.send_replace(ca.directive(7, deny, Timestamp::now()).to_bytes());
    world.identity("the directive", |now| now.directive_version() == 7).await;
    let kept = world.stop().await;
    spire.say(Ok(answer(&newer, &[])));
    let mut world = World::in_dir(kept, &socket);
    let now = world.identity("an identity under the new root", |_| true).await;
    assert_eq!(now.directive_version(), 7);
    let roots = &now.trust.domains[&"td".parse().unwrap()];
    assert_eq!(roots, std::slice::from_ref(&newer.root), "its roots are SPIRE's to say, not the directive's");
    world.stop().await;
    serving.abort();
}
