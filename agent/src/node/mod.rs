//! One agent for each host: asks the container engine and the host's /proc, and judges every container as it comes and goes.
//! A process of its own, never beside a proxy: whoever has the engine's socket has the host.
//!
//! `client` talks to the engine, `census` knows and decides, this file says when to look. Containers are looked at when
//! the engine tells of a change, and all of them every now and then. While the engine does not answer, nothing passes.

mod census;
mod client;
mod exec;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::Builder;
use std::time::Duration;

use hyper::body::Bytes;
use serde::Deserialize;
use sidewarden_proto::backoff::{self, Backoff, Random};
use sidewarden_proto::event::{ContainerRef, Event};
use sidewarden_proto::finding::{Finding, Vantage};
use sidewarden_proto::time::Timestamp;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::cis::Declared;
use crate::config::Config;
use crate::facts::engine::{Exec, Image, ImageInspect, Info, Inspect, Layer, Network};
use crate::facts::host::{self, Processes};
use crate::facts::{Hidden, Machine, Seen, image as files_of_image};
use crate::image::archive;
use crate::watch::{Posture, View, Watch};

pub use census::Census;
pub use client::EngineError;
use client::{Client, EngineEvent, Events};

/// Changes that come within this time are looked at together.
const GATHER: Duration = Duration::from_millis(200);
/// An engine that is being restarted is away for a few seconds; one that is away for longer is told.
const LOST_AFTER: Duration = Duration::from_secs(5);
/// Waits between attempts to reach it.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));
/// Changes that wait to be looked at; beyond, everything is looked at anew.
const MAX_CHANGED: usize = 4096;

/// What to watch, and how.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Where /proc and /sys are: `/`.
    pub root: PathBuf,
    /// The engine's socket.
    pub socket: PathBuf,
    /// How often everything is looked at anew.
    pub interval: Duration,
    /// What the operator intends.
    pub declared: Declared,
    /// Randomness.
    pub random: Random,
}

impl NodeConfig {
    /// As `config` says, on the machine below `root`.
    pub fn new(config: &Config, root: PathBuf) -> NodeConfig {
        NodeConfig {
            root,
            socket: config.node.socket.clone(),
            interval: config.watch.posture_interval,
            declared: config.declared.clone(),
            random: backoff::random,
        }
    }
}

/// Everything that one look at the host gave.
#[derive(Clone, Debug)]
pub struct Survey {
    /// Findings about the host.
    pub host: Vec<Finding>,
    /// Findings about each container, running or about to.
    pub containers: Vec<(ContainerRef, Vec<Finding>)>,
}

/// Looks at the host once.
pub async fn survey(config: &NodeConfig) -> Result<Survey, EngineError> {
    let mut node = Node::new(config.clone(), Arc::new(View::new()), Box::new(|_| ()));
    let client = Client::connect(&config.socket).await?;
    node.refresh(&client, &Changed::Everything).await?;
    let containers = node.census.findings().map(|(about, findings)| (about.clone(), findings.to_vec())).collect();
    Ok(Survey { host: node.census.host_findings(), containers })
}

/// What the engine behind `socket` tells of an image, its files included; nothing of it is run.
pub async fn image(socket: &std::path::Path, name: &str) -> Result<Image, ImageError> {
    let path = named(name).ok_or_else(|| ImageError::Name(crate::watch::plain(name)))?;
    let client = Client::connect(socket).await?;
    let inspect: ImageInspect = client.get(&format!("/images/{path}/json")).await?;
    let history: Vec<Layer> = client.get(&format!("/images/{path}/history")).await?;
    let (pieces, archive) = tokio::sync::mpsc::channel(8);
    let read = tokio::task::spawn_blocking(move || archive::read(Pieces { archive, piece: Bytes::new() }));
    client.stream(&format!("/images/{}/get", safe(&inspect.id)), pieces).await?;
    let saved = read.await.map_err(|error| ImageError::Reading(error.to_string()))?;
    // What the engine keeps may be written in a way that is not read here; all else is known.
    let files = match saved {
        Ok(saved) => saved.files,
        Err(error) => Seen::Hidden(Hidden::unclear("docker save", error.to_string())),
    };
    Ok(Image { inspect, history, files })
}

/// Why an image cannot be judged.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The engine does not tell.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// It is no name.
    #[error("`{0}` is no name of an image")]
    Name(String),
    /// The reader broke off.
    #[error("reading the image: {0}")]
    Reading(String),
}

/// A name of an image as part of a path.
fn named(name: &str) -> Option<String> {
    let is_safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, ':' | '_' | '-' | '.' | '/' | '@');
    let is_name = !name.is_empty()
        && name.len() <= 512
        && name.chars().all(is_safe)
        && name.split('/').all(|part| !part.is_empty() && !part.starts_with('.'));
    is_name.then(|| name.to_owned())
}

/// Pieces of an archive as they come, for a thread that may block.
struct Pieces {
    archive: tokio::sync::mpsc::Receiver<std::io::Result<Bytes>>,
    piece: Bytes,
}

impl std::io::Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.piece.is_empty() {
            match self.archive.blocking_recv() {
                Some(piece) => self.piece = piece?,
                None => return Ok(0),
            }
        }
        let piece = self.piece.split_to(buffer.len().min(self.piece.len()));
        buffer[..piece.len()].copy_from_slice(&piece);
        Ok(piece.len())
    }
}

/// Starts the watch on a thread of its own. `emit` is called there and must not wait.
pub fn start(
    config: NodeConfig,
    emit: impl Fn(Event) + Send + 'static,
    shutdown: CancellationToken,
) -> std::io::Result<Watch> {
    let view = Arc::new(View::new());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut node = Node::new(config, Arc::clone(&view), Box::new(emit));
    let work = move || {
        runtime.block_on(async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = node.run() => {}
            }
        });
    };
    let thread = Builder::new().name("node".into()).spawn(work)?;
    Ok(Watch { view, thread })
}

/// What has to be looked at.
#[derive(Debug, PartialEq)]
enum Changed {
    Everything,
    These(Vec<String>),
}

impl Changed {
    fn add(&mut self, id: String) {
        match self {
            Changed::These(ids) if ids.len() >= MAX_CHANGED => *self = Changed::Everything,
            Changed::These(ids) if !ids.contains(&id) => ids.push(id),
            _ => {}
        }
    }
}

struct Node {
    config: NodeConfig,
    machine: Machine,
    view: Arc<View>,
    emit: Box<dyn Fn(Event) + Send>,
    census: Census,
    /// Since when the engine has not answered.
    away_since: Option<Instant>,
}

impl Node {
    fn new(config: NodeConfig, view: Arc<View>, emit: Box<dyn Fn(Event) + Send>) -> Node {
        let machine = Machine::new(&config.root);
        let census = Census::new(host::name_of_host(&machine));
        Node { machine, view, emit, census, away_since: None, config }
    }

    /// Never ends by itself.
    async fn run(&mut self) {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1, self.config.random);
        loop {
            let begun = Instant::now();
            let Err(error) = self.follow().await;
            // Also where the stream had begun and nothing could be asked yet.
            self.census.watch_broke();
            if self.away_since.is_none() {
                tracing::warn!(%error, "the container engine is lost");
            }
            if begun.elapsed() > RETRY.1 {
                backoff.reset();
            }
            let since = *self.away_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= LOST_AFTER {
                let events = self.census.lose(&crate::watch::plain(&error.to_string()), Timestamp::now());
                self.tell(events);
            }
            sleep(backoff.after_failure()).await;
        }
    }

    /// Follows the engine until it is lost.
    async fn follow(&mut self) -> Result<std::convert::Infallible, EngineError> {
        let client = Client::connect(&self.config.socket).await?;
        // Asked for before the containers are, so that no change falls between.
        let mut events = client.events().await?;
        self.census.watch_begins(Timestamp::now());
        self.refresh(&client, &Changed::Everything).await?;
        let mut due = Instant::now() + self.config.interval;
        loop {
            let changed = self.gather(&client, &mut events, due).await?;
            if changed == Changed::Everything {
                due = Instant::now() + self.config.interval;
            }
            self.refresh(&client, &changed).await?;
        }
    }

    /// Waits for changes, a moment longer for those that come with them, and no longer than to the next look at everything.
    async fn gather(&mut self, client: &Client, events: &mut Events, due: Instant) -> Result<Changed, EngineError> {
        let mut changed = Changed::These(Vec::new());
        let mut until = due;
        loop {
            tokio::select! {
                event = events.next() => {
                    if self.take(client, event?, &mut changed).await? && until == due {
                        until = due.min(Instant::now() + GATHER);
                    }
                }
                () = sleep_until(until) => {
                    let changed = if until == due { Changed::Everything } else { changed };
                    return Ok(if self.tells_anew() { Changed::Everything } else { changed });
                }
            }
            if self.tells_anew() {
                return Ok(Changed::Everything);
            }
        }
    }

    /// Whether everything is to be told anew, which is wanted once a day.
    fn tells_anew(&mut self) -> bool {
        let wanted = self.view.take_baseline_wanted();
        if wanted {
            self.census.tell_anew();
        }
        wanted
    }

    /// Takes one event in; whether there is something to look at.
    async fn take(&mut self, client: &Client, event: EngineEvent, changed: &mut Changed) -> Result<bool, EngineError> {
        let attribute = |name: &str| event.actor.attributes.get(name).cloned().unwrap_or_default();
        match (event.kind.as_str(), event.action.split(':').next().unwrap_or_default()) {
            ("container", "exec_create") => {
                // Health checks come all the time, and change nothing.
                if !self.entered(client, &event.actor.id, &attribute("execID")).await? {
                    return Ok(false);
                }
                changed.add(event.actor.id);
            }
            // What nothing is judged by: much of it comes with every health check.
            ("container", "exec_start" | "exec_die" | "exec_detach" | "top" | "attach" | "resize" | "archive-path") => {
                return Ok(false);
            }
            ("container", _) => changed.add(event.actor.id),
            ("network", "connect" | "disconnect") => changed.add(attribute("container")),
            ("network" | "daemon", _) => *changed = Changed::Everything,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Somebody has run a program in a container; whether that is worth telling.
    async fn entered(&mut self, client: &Client, container: &str, id: &str) -> Result<bool, EngineError> {
        let exec = match client.get::<Exec>(&format!("/exec/{}/json", safe(id))).await {
            Ok(exec) => Some(exec),
            Err(error) if error.is_about_one_answer() => None,
            Err(error) => return Err(error),
        };
        // Run before the container was looked at for the first time.
        if !self.census.ids().iter().any(|known| known == container) {
            self.look_at(client, container).await?;
        }
        let events = self.census.entered(container, id, exec.as_ref(), &self.config.declared, Timestamp::now());
        let told = !events.is_empty();
        self.tell(events);
        Ok(told)
    }

    async fn refresh(&mut self, client: &Client, changed: &Changed) -> Result<(), EngineError> {
        let only = match changed {
            Changed::Everything => {
                self.list(client).await?;
                None
            }
            Changed::These(ids) if ids.is_empty() => return Ok(()),
            Changed::These(ids) => {
                let mut ids = ids.clone();
                for id in &ids {
                    self.look_at(client, id).await?;
                }
                ids.extend(self.census.joined());
                Some(ids)
            }
        };
        self.look_at_images(client).await?;
        if self.away_since.take().is_some() {
            tracing::info!(version = %client.version, "the container engine answers");
        }
        let found = self.census.found(&client.version, Timestamp::now());
        self.tell(found);
        self.judge(only.as_deref());
        Ok(())
    }

    fn judge(&mut self, only: Option<&[String]>) {
        let at = Timestamp::now();
        let processes = Processes::read(&self.machine).unwrap_or_else(|hidden| {
            tracing::warn!(source = %hidden.source, why = %hidden.why, "the host's processes cannot be read");
            Processes::default()
        });
        let events = self.census.judge(&self.machine, &processes, &self.config.declared, only, at);
        self.tell(events);
        self.view.stats.judgements.fetch_add(1, Relaxed);
        self.view.set_posture(Posture { at, vantage: Vantage::Node, findings: self.census.host_findings() });
    }

    /// Looks at the host and at every container.
    async fn list(&mut self, client: &Client) -> Result<(), EngineError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Listed {
            id: String,
        }
        let info: Info = client.get("/info").await?;
        let manager = info.swarm.control_available;
        let networks = seen("networks", client.get::<Vec<Network>>("/networks").await)?;
        let secrets = match manager {
            true => seen("secrets", client.get::<Vec<serde::de::IgnoredAny>>("/secrets").await)?,
            false => Seen::Hidden(Hidden::unclear("Docker API: secrets", "only a manager of a swarm tells")),
        };
        let secrets = match secrets {
            Seen::Known(all, source) => Seen::Known(all.len(), source),
            Seen::Hidden(hidden) => Seen::Hidden(hidden),
        };
        self.census.set_host(host::host(&self.machine, info, networks, secrets));
        let listed: Vec<Listed> = client.get("/containers/json?all=1").await?;
        let ids: Vec<String> = listed.into_iter().map(|l| l.id).collect();
        let gone = self.census.keep(&ids, Timestamp::now());
        self.tell(gone);
        for id in &ids {
            self.look_at(client, id).await?;
        }
        Ok(())
    }

    async fn look_at(&mut self, client: &Client, id: &str) -> Result<(), EngineError> {
        let new = !self.census.ids().iter().any(|known| known == id);
        let at = Timestamp::now();
        let events = match client.get::<Inspect>(&format!("/containers/{}/json", safe(id))).await {
            Ok(inspect) if inspect.id == id => self.census.set_container(inspect, at),
            Ok(_) => {
                self.census.set_unreadable(id, "it tells of another container".into());
                Vec::new()
            }
            Err(error) if error.is_missing() => self.census.remove(id, at),
            Err(error) if error.is_about_one_answer() => {
                self.census.set_unreadable(id, error.to_string());
                Vec::new()
            }
            Err(error) => return Err(error),
        };
        self.tell(events);
        // Who has entered before is not told by events; who is still inside is.
        if new {
            for exec in self.census.execs_of(id) {
                Box::pin(self.entered(client, id, &exec)).await?;
            }
        }
        Ok(())
    }

    async fn look_at_images(&mut self, client: &Client) -> Result<(), EngineError> {
        for (id, pid) in self.census.images_wanted() {
            let files = pid.map_or_else(files_of_image::nothing_runs, |pid| files_of_image::files(&self.machine, pid));
            if let Some(known) = self.census.image(&id) {
                let image = Image { files, ..Image::clone(known) };
                self.census.set_image(image);
                continue;
            }
            let inspect = client.get::<ImageInspect>(&format!("/images/{}/json", safe(&id))).await;
            let history = client.get::<Vec<Layer>>(&format!("/images/{}/history", safe(&id))).await;
            match (inspect, history) {
                (Ok(inspect), Ok(history)) => {
                    self.census.set_image(Image { inspect: ImageInspect { id, ..inspect }, history, files })
                }
                (Err(error), _) | (_, Err(error)) if error.is_about_one_answer() => {
                    tracing::debug!(%error, image = %id, "an image is not told of");
                }
                (Err(error), _) | (_, Err(error)) => return Err(error),
            }
        }
        Ok(())
    }

    fn tell(&self, events: Vec<Event>) {
        events.into_iter().for_each(|event| (self.emit)(event));
    }
}

/// What was answered, or why what was answered is of no use. An engine that does not answer at all is another matter.
fn seen<T>(what: &str, answer: Result<T, EngineError>) -> Result<Seen<T>, EngineError> {
    let source = format!("Docker API: {what}");
    match answer {
        Ok(value) => Ok(Seen::Known(value, source)),
        Err(error) if error.is_about_one_answer() => Ok(Seen::Hidden(Hidden::unclear(source, error.to_string()))),
        Err(error) => Err(error),
    }
}

/// An id as part of a path: an engine that answers garbage must not choose what is asked for next.
fn safe(id: &str) -> String {
    id.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, ':' | '_' | '-')).take(128).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_of_an_image_leads_nowhere_else() {
        for good in ["nginx", "registry.example:5000/shop/orders:1.2", "x@sha256:ab", "sha256:ab12"] {
            assert_eq!(named(good).as_deref(), Some(good));
        }
        for bad in ["", "../secrets", "a/../b", "a//b", "a?x=1", "a#b", "a b", "a\r\nHost: x", "%2e%2e/x"] {
            assert_eq!(named(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_id_is_never_a_path() {
        assert_eq!(safe("sha256:ab12"), "sha256:ab12");
        assert_eq!(safe("../secrets?x=1#y"), "secretsx1y");
        assert_eq!(safe(&"a".repeat(9000)).len(), 128);
    }

    /// A node agent that knows one container, which it saw start, and the engine behind its socket.
    fn node() -> (Node, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let config = NodeConfig {
            root: dir.path().into(),
            socket: dir.path().join("engine.sock"),
            interval: Duration::from_secs(60),
            declared: Declared::default(),
            random: backoff::random,
        };
        let mut node = Node::new(config, Arc::new(View::new()), Box::new(|_| ()));
        let inspect: Inspect = serde_json::from_str(crate::facts::engine::tests::INSPECT).unwrap();
        let info: Info = serde_json::from_str(crate::facts::engine::tests::INFO).unwrap();
        let none = || Hidden::missing("x");
        node.census.set_host(host::host(&node.machine, info, Seen::Hidden(none()), Seen::Hidden(none())));
        node.census.watch_begins(Timestamp(0));
        node.census.set_container(inspect, Timestamp::now());
        (node, dir)
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_begins_and_breaks_while_the_engine_is_away_is_a_gap_too() {
        let (mut node, _dir) = node();
        node.away_since = Some(Instant::now());
        let _ = tokio::time::timeout(Duration::from_secs(1), node.run()).await;
        node.census.found("20", Timestamp::now());
        node.judge(None);
        let (_, findings) = node.census.findings().next().unwrap();
        let of = |check: &str| findings.iter().find(|f| f.check == check).unwrap().verdict.word();
        assert_eq!([of("exec-root"), of("exec-privileged")], ["unknown"; 2]);
    }

    #[tokio::test]
    async fn on_a_quiet_host_everything_is_told_anew_when_it_is_wanted() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (mut node, _dir) = node();
        node.judge(None);
        let id = node.census.ids().remove(0);
        assert!(!node.census.is_new(&id));
        let listener = tokio::net::UnixListener::bind(&node.config.socket).unwrap();
        let engine = tokio::spawn(async move {
            let version = r#"{"ApiVersion":"1.41"}"#;
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{version}", version.len());
            let quiet = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned();
            let mut open = Vec::new();
            for answer in [head, quiet] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = stream.read(&mut [0; 4096]).await.unwrap();
                stream.write_all(answer.as_bytes()).await.unwrap();
                open.push(stream);
            }
            std::future::pending::<()>().await;
        });
        let client = Client::connect(&node.config.socket).await.unwrap();
        let mut events = client.events().await.unwrap();
        node.view.want_baseline();
        assert_eq!(node.gather(&client, &mut events, Instant::now()).await.unwrap(), Changed::Everything);
        assert!(node.census.is_new(&id), "it is to be told anew");
        assert_eq!(node.gather(&client, &mut events, Instant::now()).await.unwrap(), Changed::Everything);
        engine.abort();
    }

    #[test]
    fn too_many_changes_are_a_look_at_everything() {
        let mut changed = Changed::These(Vec::new());
        (0..MAX_CHANGED).for_each(|n| changed.add(n.to_string()));
        changed.add("0".into());
        changed.add("one more".into());
        assert_eq!(changed, Changed::Everything);
    }
}
