//! Agents whose certificates somebody else's CA has issued, and a collector that has its own from there as well: who comes in, as
//! whom, and who does not.

mod agent;
#[path = "../../tests/tests/hostile/mint.rs"]
#[allow(dead_code, reason = "made for another test")]
mod mint;

use std::path::Path;
use std::time::Duration;

use agent::{Agent, Connection, domain, enrol, settings, token, until};
use mint::{Authority, Shown};
use rcgen::KeyPair;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use sidewarden_collector::app::{self, App};
use sidewarden_collector::config::Config;
use sidewarden_collector::fleet::{self, Asked};
use sidewarden_collector::index::{Order, Query};
use sidewarden_collector::trust::store::{Imported, Serves, Store};
use sidewarden_proto::batch::{Cursor, Epoch};
use sidewarden_proto::directive::{Signed, Target};
use sidewarden_proto::enrol::Der;
use sidewarden_proto::given::Elsewhere;
use sidewarden_proto::given::files::Files;
use sidewarden_proto::identity::AgentId;
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls::{self, Credential, Expect, Floor, Trust};
use sidewarden_proto::wire::{ALPN, ALPN_COLLECTOR, Frame};
use tempfile::tempdir;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

const COLLECTOR: &str = "spiffe://sidewarden.internal/sidewarden/collector";
const WEB: &str = "spiffe://sidewarden.internal/shop/web";

/// Puts a collector's certificate of `ca` where its settings look for it.
fn give(dir: &Path, ca: &Authority, name: &str) -> Files {
    let shown = ca.leaf(&mint::leaf(name), &[]);
    put(dir, ca, &shown)
}

fn put(dir: &Path, ca: &Authority, shown: &Shown) -> Files {
    shown.write(dir);
    let root = Shown { chain: vec![ca.cert.clone()], key: shown.key.clone() };
    let roots = dir.join("roots");
    std::fs::create_dir_all(&roots).unwrap();
    root.write(&roots);
    Files { cert: dir.join("chain.pem"), key: dir.join("key.pem"), roots: roots.join("chain.pem") }
}

fn with_identity(dir: &Path, ca: &Authority) -> Config {
    Config { identity: Some(Elsewhere::Files(give(dir, ca, COLLECTOR))), ..settings(dir) }
}

async fn start(config: Config) -> App {
    app::start(config, Timestamp::now).await.unwrap()
}

/// An agent with a certificate of `ca`, which trusts `roots` for the collector's domain.
fn guest(ca: &Authority, id: &str, instance: &str, roots: &[&Authority]) -> Agent {
    guest_of(ca.leaf(&mint::leaf(id), &[]), id, instance, roots)
}

fn guest_of(shown: Shown, id: &str, instance: &str, roots: &[&Authority]) -> Agent {
    let key = PrivateKeyDer::Pkcs8(shown.key.into());
    let mut epoch = Epoch([0; 16]);
    sidewarden_collector::random(&mut epoch.0);
    Agent {
        id: AgentId { workload: id.parse().unwrap(), instance: instance.parse().unwrap() },
        credential: Credential::from_der(shown.chain, key).unwrap(),
        trust: Trust::single(domain(), roots.iter().map(|ca| ca.cert.clone()).collect()),
        epoch,
        links: Vec::new(),
    }
}

/// The first frame that counts after a hello: a welcome, or the reason of a refusal.
async fn hello(agent: &Agent, app: &App) -> Result<Connection, String> {
    let mut connection = agent.quic(app.agents).await;
    connection.send(&Frame::Hello(agent.hello())).await;
    match connection.next().await {
        Some(Frame::Welcome(_)) => Ok(connection),
        Some(Frame::Refuse(refuse)) => Err(refuse.reason),
        other => Err(format!("{other:?}")),
    }
}

fn found(app: &App, kind: &str) -> Vec<String> {
    let query = Query { kinds: vec![kind.to_owned()], order: Order::Oldest(None), limit: 1000, ..Query::default() };
    app.core.index.query_now(&query).unwrap().events.into_iter().map(|e| e.body.get().to_owned()).collect()
}

async fn told(app: &App, kind: &str, word: &str) {
    until(&format!("{kind} with {word}"), || found(app, kind).iter().any(|body| body.contains(word))).await;
}

fn revoke(app: &App, what: Target) -> Result<fleet::Done, fleet::RevokeError> {
    let core = &app.core;
    let asked = Asked { what, why: "stolen".into(), confirmed: true };
    fleet::revoke(&core.issuer, &core.directives, &core.fleet, asked, Timestamp::now())
}

fn instance(agent: &Agent) -> Target {
    Target::Instance { workload: agent.id.workload.clone(), instance: agent.id.instance.clone() }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_of_another_ca_reports_is_given_no_certificate_and_can_be_revoked_by_its_instance() {
    let (dir, ca) = (tempdir().unwrap(), Authority::root("somebody else"));
    let app = start(with_identity(dir.path(), &ca)).await;
    let mut web = guest(&ca, WEB, "c1", &[&ca]);
    let (mut session, cursor) = web.session(app.agents).await;
    assert_eq!(cursor, Cursor::START);
    session.deliver(web.some_events(5)).await;

    let csr = agent::csr(&KeyPair::generate().unwrap());
    session.send(&Frame::Renew(csr)).await;
    let Some(Frame::Renewed(answer)) = session.next().await else { panic!("no answer") };
    let answer = String::from_utf8_lossy(&answer).into_owned();
    assert!(answer.contains("issues none for it"), "{answer}");

    // One that was enrolled here stands beside it, with the collector's own certificate.
    let mut orders = Agent::enrolled(&app, "shop/orders", "c1").await;
    let (mut other, _) = orders.session(app.agents).await;
    other.deliver(orders.some_events(2)).await;

    let done = revoke(&app, instance(&web)).unwrap();
    assert_eq!(done.revocation.keys, [web.credential.peer().spki], "its peers know it by its key");
    assert_eq!(session.refusal().await, "revoked");
    assert_eq!(hello(&web, &app).await.err().as_deref(), Some("revoked"));
    let next = guest(&ca, WEB, "c1", &[&ca]);
    assert_eq!(hello(&next, &app).await.err().as_deref(), Some("revoked"), "with another key as well");
    let denied = |agent: &Agent| app.core.directives.now().directive.denies(agent.credential.peer()).is_some();
    assert!(denied(&web) && denied(&next), "peers are told of that key, too");
    assert!(hello(&guest(&ca, WEB, "c2", &[&ca]), &app).await.is_ok());
    other.deliver(orders.some_events(1)).await;
    let unknown =
        Target::Instance { workload: "spiffe://other.example/a".parse().unwrap(), instance: "1".parse().unwrap() };
    assert!(revoke(&app, unknown).unwrap_err().to_string().contains("was not seen here"));
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_agents_are_told_is_signed_for_those_who_go_by_either_ca_and_stays_so() {
    let (dir, ca) = (tempdir().unwrap(), Authority::root("somebody else"));
    let app = start(with_identity(dir.path(), &ca)).await;
    let both = |app: &App| {
        let (now, signed) = (Timestamp::now(), app.core.directives.now().signed.clone());
        let elsewhere = Trust::single(domain(), vec![ca.cert.clone()]);
        let trusts = [&app.core.issuer.authority().trust(), &elsewhere];
        trusts.map(|trust| signed.open(trust, now).map(|directive| directive.version))
    };
    let version = app.core.directives.now().directive.version;
    assert_eq!(both(&app).map(Result::unwrap), [version; 2]);
    revoke(&app, Target::Workload { id: "spiffe://sidewarden.internal/shop/old".parse().unwrap() }).unwrap();
    assert!(both(&app).iter().all(|opened| opened.as_ref().unwrap() > &version));
    let roots = || app.core.directives.now().directive.foreign.domains.get(&domain()).cloned();
    until("agents are told of its roots", || roots() == Some(vec![Der(ca.cert.to_vec())])).await;
    app.stop().await;

    // Without the setting nobody hears of that CA any more.
    let app = start(settings(dir.path())).await;
    until("it is forgotten", || app.core.directives.now().directive.foreign.domains.is_empty()).await;
    assert!(both(&app)[1].is_err());
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whom_nobody_vouches_for_does_not_come_in_and_no_guest_is_more_than_an_agent() {
    let (dir, ca, stranger) = (tempdir().unwrap(), Authority::root("somebody else"), Authority::root("a stranger"));
    let app = start(with_identity(dir.path(), &ca)).await;
    for (shown, id) in [(&stranger, WEB), (&ca, "spiffe://partner.example/shop/web")] {
        let agent = guest(shown, id, "c1", &[&ca]);
        let mut connection = agent.tcp(app.agents).await;
        connection.send(&Frame::Hello(agent.hello())).await;
        assert_eq!(connection.next().await, None, "{id}");
    }
    told(&app, "ingest.refused", "unknown_ca").await;

    for id in [COLLECTOR, "spiffe://sidewarden.internal/sidewarden/collector/second"] {
        assert_eq!(hello(&guest(&ca, id, "c1", &[&ca]), &app).await.err().as_deref(), Some("not_allowed"), "{id}");
    }

    // A collector's name by that CA, with our own CAs' certificates beside it, follows nobody and is signed no CA.
    let authority = app.core.issuer.authority();
    let own = authority.own().borrow().chain().to_vec();
    let mut shown = ca.leaf(&mint::leaf(COLLECTOR), &[]);
    shown.chain.extend(own[1..].iter().cloned());
    let key = PrivateKeyDer::Pkcs8(shown.key.into());
    let impostor = Credential::from_der(shown.chain, key).unwrap();
    let trust = Trust::single(domain(), vec![ca.cert.clone()]);
    let config =
        tls::client_config(&impostor, &trust, Expect::Collector(domain()), Floor::Tls13, &[ALPN_COLLECTOR]).unwrap();
    let tcp = TcpStream::connect(app.agents).await.unwrap();
    let name = ServerName::try_from("collector").unwrap();
    let stream = TlsConnector::from(config).connect(name, tcp).await.unwrap();
    let (reader, writer) = tokio::io::split(stream);
    let mut connection = Connection::new(reader, writer, None);
    connection.send(&Frame::Renew(agent::csr(&KeyPair::generate().unwrap()))).await;
    assert_eq!(connection.next().await, None);
    told(&app, "ingest.refused", "no collector of this trust domain has issued").await;

    // Nor does an old certificate of that CA lead to one of ours.
    let key = KeyPair::generate().unwrap();
    let leaf = mint::leaf(WEB).signed_by(&key, &ca.issuer).unwrap().der().to_vec();
    let token = token(&app, "shop/web", 1);
    let mut request = agent::request(&token, "shop/web", "c1", &key);
    request.previous = vec![Der(leaf), Der(ca.cert.to_vec())];
    let refused = enrol(app.agents, token.pin, &request).await.unwrap_err();
    assert!(refused.detail.contains("does not verify"), "{refused:?}");
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotated_certificate_takes_over_and_a_second_one_beside_it_is_refused_and_told() {
    let (dir, ca) = (tempdir().unwrap(), Authority::root("somebody else"));
    let app = start(with_identity(dir.path(), &ca)).await;
    let of_age = |secs: i64| {
        let mut params = mint::leaf(WEB);
        mint::valid(&mut params, -secs, 3600);
        guest_of(ca.leaf(&params, &[]), WEB, "c1", &[&ca])
    };
    let (older, newer) = (of_age(600), of_age(60));
    let mut first = hello(&older, &app).await.unwrap();
    let mut second = hello(&newer, &app).await.unwrap();
    assert_eq!(first.refusal().await, "second_instance", "replaced");
    assert_eq!(hello(&older, &app).await.err().as_deref(), Some("second_instance"));
    told(&app, "ingest.refused", "second_instance").await;
    let csr = agent::csr(&KeyPair::generate().unwrap());
    second.send(&Frame::Renew(csr)).await;
    assert!(matches!(second.next().await, Some(Frame::Renewed(_))), "the newer one goes on");

    // Nobody takes the place of one that was enrolled here, or keeps it from coming.
    let orders = Agent::enrolled(&app, "shop/orders", "c1").await;
    let session = orders.session(app.agents).await;
    let copy = guest(&ca, orders.id.workload.as_str(), "c1", &[&ca]);
    assert_eq!(hello(&copy, &app).await.err().as_deref(), Some("second_instance"));
    assert!(app.core.issuer.register().sharers(&copy.id, Timestamp::now()).unwrap().is_empty());
    drop(session);
    let live = |key| app.core.fleet.live(&orders.id).map(|live| live.spki) == key;
    until("the enrolled one has left", || live(None)).await;
    let mut copied = hello(&copy, &app).await.unwrap();
    let _session = orders.session(app.agents).await;
    assert_eq!(copied.refusal().await, "second_instance");
    assert!(live(Some(orders.credential.peer().spki)));
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_of_another_trust_domain_come_in_where_the_settings_name_it_for_as_long_as_its_root_is_there() {
    let (dir, partner) = (tempdir().unwrap(), Authority::root("the partner"));
    const THEIRS: &str = "spiffe://partner.example/shop/web";
    let config = settings(dir.path());
    let admitted = vec!["partner.example".parse().unwrap()];
    let imported = Imported {
        serves: Serves::Domain("partner.example".parse().unwrap()),
        der: Der(partner.cert.to_vec()),
        at_us: Timestamp::now(),
        note: String::new(),
    };
    std::fs::create_dir_all(&config.data_dir).unwrap();
    let store = Store::new(&config.data_dir);
    store.add(vec![imported.clone()]).unwrap();

    // Imported is not admitted.
    let app = start(config.clone()).await;
    let knows_ours = |app: &App| {
        let mut agent = guest(&partner, THEIRS, "c1", &[&partner]);
        agent.trust = app.core.issuer.authority().trust();
        agent
    };
    until("the root is known", || !app.core.directives.now().directive.foreign.is_empty()).await;
    let mut connection = knows_ours(&app).tcp(app.agents).await;
    assert_eq!(connection.next().await, None);
    app.stop().await;

    let agents = sidewarden_collector::config::Agents {
        trust_domains: admitted,
        handshake_timeout: Duration::from_secs(20),
        ..config.agents.clone()
    };
    let app = start(Config { agents, ..config }).await;
    let mut agent = knows_ours(&app);
    let mut session = hello(&agent, &app).await.unwrap();
    session.deliver(agent.some_events(3)).await;
    // One has shaken hands while the root was there, and says hello when it is not.
    let late = Agent { id: "spiffe://partner.example/shop/web#c2".parse().unwrap(), ..knows_ours(&app) };
    let mut waiting = late.tcp(app.agents).await;
    store.remove(&imported.sha256().to_string()).unwrap();
    until("the root is gone", || app.core.directives.now().directive.foreign.is_empty()).await;
    waiting.send(&Frame::Hello(late.hello())).await;
    assert_eq!(waiting.refusal().await, "unknown_ca", "the handshake was long ago");
    assert_eq!(session.refusal().await, "unknown_ca", "whose root is taken away is out at once");
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_the_key_of_that_ca_is_revoked_with_it_and_that_it_is_ours_as_well_is_said_before() {
    let (dir, ca) = (tempdir().unwrap(), Authority::root("somebody else"));
    let app = start(with_identity(dir.path(), &ca)).await;
    let web = guest(&ca, WEB, "c1", &[&ca]);
    let mut session = hello(&web, &app).await.unwrap();
    let mut orders = Agent::enrolled(&app, "shop/orders", "c1").await;
    let (mut other, _) = orders.session(app.agents).await;
    until("its roots are told", || !app.core.directives.now().directive.foreign.is_empty()).await;
    let what = Target::IssuingKey { spki: tls::spki_of(&ca.cert).unwrap() };
    let core = &app.core;
    let asked = Asked { what: what.clone(), why: "stolen".into(), confirmed: false };
    let unconfirmed = fleet::revoke(&core.issuer, &core.directives, &core.fleet, asked, Timestamp::now()).unwrap_err();
    assert!(unconfirmed.to_string().contains("has signed the collector's own certificate"), "{unconfirmed}");
    revoke(&app, what).unwrap();
    assert_eq!(session.refusal().await, "revoked", "it has shown its leaf alone");
    assert_eq!(hello(&web, &app).await.err().as_deref(), Some("revoked"));
    other.deliver(orders.some_events(1)).await;
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn roots_that_hold_one_of_our_own_are_not_taken() {
    let (dir, ca) = (tempdir().unwrap(), Authority::root("somebody else"));
    let app = start(settings(dir.path())).await;
    let ours = app.core.issuer.authority().root();
    app.stop().await;
    let config = with_identity(dir.path(), &ca);
    let both = Shown { chain: vec![ca.cert.clone(), ours], key: Vec::new() };
    both.write(&dir.path().join("roots"));
    let app = start(config).await;
    told(&app, "collector.identity_refused", "would stay trusted when that is retired").await;
    assert!(app.core.identities.given().is_none());
    app.stop().await;
}

/// The certificate that a client of that CA is shown.
async fn shown(app: &App, ca: &Authority) -> Result<CertificateDer<'static>, String> {
    let agent = guest(ca, WEB, "look", &[ca]);
    let config =
        tls::client_config(&agent.credential, &agent.trust, Expect::Collector(domain()), Floor::Tls13, &[ALPN]);
    let tcp = TcpStream::connect(app.agents).await.unwrap();
    let name = ServerName::try_from("collector").unwrap();
    let stream = TlsConnector::from(config.unwrap()).connect(name, tcp).await.map_err(|e| e.to_string())?;
    Ok(stream.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn replaced_files_are_taken_while_it_runs_and_a_bad_one_leaves_the_last_good_one_and_is_told() {
    let (dir, ca) = (tempdir().unwrap(), Authority::root("somebody else"));
    let config = with_identity(dir.path(), &ca);
    let app = start(config.clone()).await;
    let mut web = guest(&ca, WEB, "c1", &[&ca]);
    let mut session = hello(&web, &app).await.unwrap();
    let first = shown(&app, &ca).await.unwrap();
    told(&app, "collector.identity_taken", COLLECTOR).await;

    let (expired, wrong_name) = {
        let (mut expired, wrong) = (mint::leaf(COLLECTOR), mint::leaf("spiffe://sidewarden.internal/shop/orders"));
        mint::valid(&mut expired, -7200, -3600);
        (ca.leaf(&expired, &[]), ca.leaf(&wrong, &[]))
    };
    put(dir.path(), &ca, &expired);
    told(&app, "collector.identity_refused", "does not verify").await;
    put(dir.path(), &ca, &wrong_name);
    told(&app, "collector.identity_refused", "is called spiffe://sidewarden.internal/sidewarden/collector").await;
    std::fs::write(dir.path().join("chain.pem"), "nothing").unwrap();
    told(&app, "collector.identity_refused", "chain.pem").await;
    assert_eq!(shown(&app, &ca).await.unwrap(), first);
    assert!(found(&app, "collector.identity_refused").len() <= 4, "each fault once, not once a second");

    give(dir.path(), &ca, COLLECTOR);
    until("the mended one is taken", || found(&app, "collector.identity_taken").len() == 2).await;
    assert_ne!(shown(&app, &ca).await.unwrap(), first);
    session.deliver(web.some_events(1)).await;

    // Another CA takes over: its agents come in, those of the old one go.
    let next = Authority::root("the next");
    give(dir.path(), &next, COLLECTOR);
    assert_eq!(session.refusal().await, "unknown_ca");
    until("the next is taken", || found(&app, "collector.identity_taken").len() == 3).await;
    shown(&app, &next).await.unwrap();
    assert!(shown(&app, &ca).await.is_err());
    hello(&guest(&next, WEB, "c1", &[&next]), &app).await.unwrap();
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_starts_without_the_files_says_so_and_takes_them_when_they_come() {
    let (dir, ca) = (tempdir().unwrap(), Authority::root("somebody else"));
    let missing = dir.path().join("later");
    let files =
        Files { cert: missing.join("chain.pem"), key: missing.join("key.pem"), roots: missing.join("roots/chain.pem") };
    let app = start(Config { identity: Some(Elsewhere::Files(files)), ..settings(dir.path()) }).await;
    told(&app, "collector.identity_refused", "later/chain.pem").await;
    let orders = Agent::enrolled(&app, "shop/orders", "c1").await;
    orders.session(app.agents).await;
    std::fs::create_dir(&missing).unwrap();
    give(&missing, &ca, COLLECTOR);
    told(&app, "collector.identity_taken", COLLECTOR).await;
    hello(&guest(&ca, WEB, "c1", &[&ca]), &app).await.unwrap();
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_knows_no_directive_must_be_able_to_take_ours() {
    let (dir, ca) = (tempdir().unwrap(), Authority::root("somebody else"));
    let app = start(with_identity(dir.path(), &ca)).await;
    let web = guest(&ca, WEB, "c1", &[&ca]);
    let mut connection = web.quic(app.agents).await;
    connection.send(&Frame::Hello(web.hello())).await;
    let mut raw = connection.directive().await;
    let opened = Signed::from_bytes(&raw).unwrap().open(&web.trust, Timestamp::now()).unwrap();
    assert_eq!(opened.version, app.core.directives.now().directive.version);
    raw.truncate(raw.len() / 2);
    assert!(Signed::from_bytes(&raw).is_err());
    tokio::time::timeout(Duration::from_secs(20), app.stop()).await.unwrap();
}
