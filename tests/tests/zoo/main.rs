//! The zoo: real containers on the real engine, each breaking one rule in plain or in re-spelled ways, and sound ones. A node
//! agent watches while they come; of each container exactly the checks fail that should.
//!
//! Needs a container engine, root and a C compiler.

mod cages;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cages::{CAGES, Cage, Image, SOUND};
use sidewarden_agent::cis::{self, Case, Declared, History};
use sidewarden_agent::config::Config;
use sidewarden_agent::facts::{self, ListenerSight, Machine, Subject};
use sidewarden_agent::node::{self, NodeConfig};
use sidewarden_agent::watch::{Watch, WatchConfig};
use sidewarden_proto::event::{Body, Event, Mode};
use sidewarden_proto::finding::Finding;
use sidewarden_proto::time::Timestamp;
use sidewarden_tests::command::run;
use sidewarden_tests::docker::Docker;
use sidewarden_tests::interrupt::poll;
use sidewarden_tests::progress::Progress;
use sidewarden_tests::{suite, workspace};
use tokio_util::sync::CancellationToken;

const LIMIT: Duration = Duration::from_secs(180);

/// What depends on the host's kernel, and is nobody's fault here.
const OF_THE_KERNEL: [&str; 2] = ["apparmor", "selinux"];

/// What the agent told of each container, by name: the findings by check.
type Told = Arc<Mutex<BTreeMap<String, BTreeMap<String, Finding>>>>;

struct Zoo {
    docker: Docker,
    name: String,
    dir: PathBuf,
    told: Told,
    stop: CancellationToken,
}

impl Zoo {
    fn open() -> Result<Option<Zoo>> {
        let docker = match Docker::provide(&Progress::start()) {
            Err(why) if std::env::var_os(suite::ALLOW_SKIP).is_some() => {
                eprintln!("{} zoo: {why:#}", suite::SKIPPED);
                return Ok(None);
            }
            docker => docker?,
        };
        ensure!(nix::unistd::geteuid().is_root(), "a node agent reads the host's /proc: run this as root");
        let name = workspace::own_name("sidewarden-zoo");
        let dir = workspace::folder("zoo")?;
        let zoo = Zoo { docker, name, dir, told: Told::default(), stop: CancellationToken::new() };
        zoo.clear()?;
        zoo.furnish()?;
        Ok(Some(zoo))
    }

    fn label(&self) -> String {
        format!("sidewarden.zoo={}", self.name)
    }

    fn clear(&self) -> Result<()> {
        self.docker.remove_labelled(&self.label())
    }

    /// Files, images, network and volumes.
    fn furnish(&self) -> Result<()> {
        std::fs::create_dir_all(self.dir.join("data"))?;
        for (link, to) in [("link", "/etc"), ("sock", "/run/docker.sock")] {
            let link = self.dir.join(link);
            let _ = std::fs::remove_file(&link);
            std::os::unix::fs::symlink(to, link)?;
        }
        let strict = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["acct","add_key","bpf","delete_module","finit_module",
            "fsmount","fsopen","init_module","kexec_file_load","kexec_load","keyctl","lookup_dcookie","mount","move_mount",
            "open_by_handle_at","perf_event_open","pivot_root","reboot","request_key","setns","swapon","umount2","unshare",
            "userfaultfd"],"action":"SCMP_ACT_ERRNO"}]}"#;
        std::fs::write(self.dir.join("strict.json"), strict)?;
        std::fs::write(self.dir.join("open.json"), r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#)?;
        std::fs::write(self.dir.join("log.json"), r#"{"defaultAction":"SCMP_ACT_LOG"}"#)?;
        self.build_images()?;
        self.docker.run(["network", "create", "--label", &self.label(), &self.name]).output()?;
        let volume = |name: &str, options: &[&str]| {
            let made = self.docker.run(["volume", "create", "--label", &self.label()]).args(options).args([name]);
            made.output()
        };
        volume(&self.name, &[])?;
        volume(&format!("{}-etc", self.name), &["--opt", "type=none", "--opt", "o=bind", "--opt", "device=/etc"])?;
        Ok(())
    }

    fn build_images(&self) -> Result<()> {
        let context = self.dir.join("context");
        std::fs::create_dir_all(&context)?;
        let source = workspace::root().join("tests/tests/zoo/animal.c");
        run("cc", ["-static", "-O1", "-o"]).args([&context.join("animal"), &source]).output()?;
        set_mode(&context.join("animal"), 0o755)?;
        // A COPY loses the bit, an archive keeps it.
        std::fs::create_dir_all(context.join("tree/bin"))?;
        std::fs::copy(context.join("animal"), context.join("tree/bin/su"))?;
        set_mode(&context.join("tree/bin/su"), 0o4755)?;
        run("tar", ["--create", "--file"])
            .args([&context.join("su.tar")])
            .args(["-C"])
            .args([&context.join("tree")])
            .args(["bin/su"])
            .output()?;
        std::fs::write(context.join("passwd"), "root:x:0:0::/:\ntoor:x:0:0::/:\nanimal:x:10001:10001::/:\n")?;
        std::fs::write(context.join("new"), "ID=debian\nVERSION_ID=\"13\"\n")?;
        std::fs::write(context.join("old"), "ID=debian\nVERSION_ID=\"9\"\n")?;
        for image in Image::ALL {
            let file = self.dir.join(format!("{image:?}.Dockerfile"));
            std::fs::write(&file, dockerfile(image))?;
            let build = self.docker.run(["build", "--quiet", "--tag", &self.tag(image), "--file"]);
            build.env("DOCKER_BUILDKIT", "0").args([&file, &context]).limit(LIMIT).output()?;
        }
        Ok(())
    }

    fn tag(&self, image: Image) -> String {
        format!("{}:{}", self.name, format!("{image:?}").to_lowercase())
    }

    /// The image as it cannot become another one.
    fn id(&self, image: Image) -> Result<String> {
        let id = self.docker.run(["image", "inspect", "--format", "{{.Id}}", &self.tag(image)]).output()?;
        Ok(id.trim().to_owned())
    }

    fn watch(&self) -> Result<Watch> {
        let config = Config::default();
        let node = NodeConfig { interval: Duration::from_secs(5), ..NodeConfig::new(&config, "/".into()) };
        let (told, prefix) = (Arc::clone(&self.told), format!("{}-", self.name));
        Ok(node::start(node, move |event| keep(&told, &prefix, &event), self.stop.clone())?)
    }

    fn fill(&self, cage: &Cage, image: &str) -> Result<()> {
        let spelt = |word: &&str| word.replace("{zoo}", &self.name).replace("{dir}", &self.dir.to_string_lossy());
        let name = format!("{}-{}", self.name, cage.name);
        let sound = SOUND.iter().filter(|(word, _)| !cage.without.contains(word)).flat_map(|(_, options)| *options);
        let options: Vec<String> = sound.chain(cage.with).map(spelt).collect();
        let verb: &[&str] = if cage.only_made { &["create"] } else { &["run", "--detach"] };
        let made = self.docker.run(verb.iter().copied()).args(["--name", &name, "--label", &self.label()]);
        let made = made.args(["--stop-timeout", "1"]).args(options).args([image]).args(cage.command).limit(LIMIT);
        made.output().with_context(|| format!("making {}", cage.name))?;
        Ok(())
    }

    /// What is wrong with what was told of a container.
    fn wrong(&self, cage: &Cage) -> Option<String> {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(findings) = told.get(cage.name) else { return Some(format!("{}: nothing was told of it", cage.name)) };
        let failing = findings.values().filter(|f| f.verdict.word() == "fail" && !OF_THE_KERNEL.contains(&&*f.check));
        let failing: BTreeSet<&str> = failing.map(|f| f.check.as_str()).collect();
        let expected: BTreeSet<&str> = cage.fails.iter().copied().collect();
        let unsettled = !cage.only_made && findings.get("health").is_none_or(|f| f.verdict.word() == "unknown");
        let proof: Vec<_> = failing.symmetric_difference(&expected).map(|check| &findings[*check]).collect();
        (failing != expected || unsettled)
            .then(|| format!("{}: fails {failing:?}, should fail {expected:?}: {proof:#?}", cage.name))
    }
}

impl Drop for Zoo {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Err(error) = self.clear() {
            eprintln!("the zoo could not be cleared, its containers have the label {}: {error:#}", self.label());
        }
    }
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    Ok(std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?)
}

fn dockerfile(image: Image) -> String {
    let base =
        "FROM scratch\nCOPY animal /animal\nCOPY animal /usr/sbin/sshd\nCOPY passwd /etc/passwd\nCMD [\"/animal\"]\n";
    let release = if image == Image::Old { "old" } else { "new" };
    let more = match image {
        Image::Sound | Image::Bare => "",
        Image::Added => "ADD su.tar /\n",
        Image::Old => "ENV DB_PASSWORD=hunter2\n",
    };
    let checked = "USER 10001\nHEALTHCHECK --interval=10s --start-period=1ms CMD [\"/animal\", \"health\"]\n";
    let checked = if image == Image::Bare { "" } else { checked };
    format!("{base}COPY {release} /etc/os-release\n{more}{checked}")
}

/// Folds an event into what is known, as a collector would.
fn keep(told: &Told, prefix: &str, event: &Event) {
    let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
    match event.body() {
        Ok(Some(Body::ContainerPosture(body))) => {
            if let Some(name) = body.container.name.strip_prefix(prefix) {
                let findings = body.findings.into_iter().map(|f| (f.check.clone(), f)).collect();
                told.insert(name.to_owned(), findings);
            }
        }
        Ok(Some(Body::ContainerVerdictChanged(body))) => {
            if let Some(name) = body.container.name.strip_prefix(prefix) {
                told.entry(name.to_owned()).or_default().insert(body.finding.check.clone(), body.finding);
            }
        }
        Ok(Some(Body::ContainerGone(body))) => {
            if let Some(name) = body.container.name.strip_prefix(prefix) {
                told.remove(name);
            }
        }
        _ => {}
    }
}

#[test]
fn every_container_fails_exactly_the_checks_that_it_breaks() -> Result<()> {
    let Some(zoo) = Zoo::open()? else { return Ok(()) };
    let _watch = zoo.watch()?;
    let images: BTreeMap<String, String> =
        Image::ALL.into_iter().map(|image| Ok((format!("{image:?}"), zoo.id(image)?))).collect::<Result<_>>()?;
    let begun = Instant::now();
    // Those that others join come first; the rest four at a time.
    let (first, rest): (Vec<&Cage>, Vec<&Cage>) =
        CAGES.iter().partition(|cage| cage.name.ends_with("-host") || cage.name == "net-bridge");
    for group in [first, rest] {
        let queue = Mutex::new(group.into_iter());
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work = || -> Result<()> {
            while let Some(cage) = next() {
                zoo.fill(cage, &images[&format!("{:?}", cage.image)])?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4).map(|_| scope.spawn(work)).collect();
            workers.into_iter().try_for_each(|worker| worker.join().expect("a worker panicked"))
        })?;
    }
    let entered = format!("{}-entered", zoo.name);
    zoo.docker.run(["exec", "--user", "root", &entered, "/animal", "health"]).output()?;
    eprintln!("{} containers stand after {:.1?}", CAGES.len(), begun.elapsed());
    let wrong = || CAGES.iter().filter_map(|cage| zoo.wrong(cage)).collect::<Vec<_>>();
    poll(LIMIT, Duration::from_millis(250), || wrong().is_empty().then_some(()))?;
    ensure!(wrong().is_empty(), "{}", wrong().join("\n"));
    eprintln!("all of them are judged right after {:.1?}", begun.elapsed());
    Ok(())
}

/// Containers of the benchmark.
const MANY: usize = 100;

/// `cargo test --release -p sidewarden-tests --test zoo -- --ignored --nocapture`
#[test]
#[ignore = "not a test: a measurement of what judging and watching a hundred containers cost"]
fn a_hundred_containers_are_judged_within_a_second_of_cpu() -> Result<()> {
    let Some(zoo) = Zoo::open()? else { return Ok(()) };
    let image = zoo.id(Image::Sound)?;
    let sound = CAGES.first().context("the zoo is empty")?;
    let names: Vec<&'static str> = (0..MANY).map(|n| &*Box::leak(format!("many-{n}").into_boxed_str())).collect();
    for name in names {
        zoo.fill(&Cage { name, ..*sound }, &image)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let node = NodeConfig::new(&Config::default(), "/".into());
    let mut spent = Vec::new();
    for _ in 0..5 {
        let before = cpu()?;
        let survey = runtime.block_on(node::survey(&node))?;
        spent.push((cpu()? - before, survey.containers.len()));
    }
    spent.sort();
    let (median, containers) = spent[spent.len() / 2];
    eprintln!(
        "{containers} containers and their host, the full table: {median:.3?} of CPU; each: {:.3?}",
        median / u32::try_from(containers)?
    );
    ensure!(median < Duration::from_secs(1), "{spent:?}");
    steady("node, all containers", |stop| Ok(node::start(node, |_| (), stop)?))
}

/// Set where this program runs beside a container, in its namespaces, as an agent does.
const BESIDE: &str = "SIDEWARDEN_MEASURE_BESIDE";

/// `cargo test --release -p sidewarden-tests --test zoo -- --ignored --nocapture`
#[test]
#[ignore = "not a test: a measurement of what judging and watching one container costs from beside it"]
fn one_container_is_judged_and_watched_from_beside_it_at_this_cost() -> Result<()> {
    if std::env::var_os(BESIDE).is_some() {
        return measure_beside();
    }
    let Some(zoo) = Zoo::open()? else { return Ok(()) };
    let sound = CAGES.first().context("the zoo is empty")?;
    zoo.fill(&Cage { name: "watched", ..*sound }, &zoo.id(Image::Sound)?)?;
    let workload = format!("container:{}-watched", zoo.name);
    let program = format!("{}:/measure:ro", std::env::current_exe()?.display());
    let beside = ["--rm", "--pid", &workload, "--network", &workload, "--user", "10001", "--cap-drop", "ALL"];
    let libraries = ["/usr:/usr:ro", "/lib:/lib:ro", "/lib64:/lib64:ro", &program].map(|mount| ["--volume", mount]);
    let measure =
        ["--ignored", "--exact", "--nocapture", "one_container_is_judged_and_watched_from_beside_it_at_this_cost"];
    let label = zoo.label();
    let made = zoo.docker.run(["run", "--label", &label, "--env", &format!("{BESIDE}=1"), "--entrypoint", "/measure"]);
    let made = made.args(beside).args(libraries.concat()).args([zoo.id(Image::Sound)?]).args(measure).limit(LIMIT);
    for line in made.output()?.lines().filter(|line| line.contains("container")) {
        eprintln!("{line}");
    }
    Ok(())
}

fn measure_beside() -> Result<()> {
    let subject = || Subject { mode: Mode::Sidecar, cgroup: None };
    one_judgement(&subject())?;
    steady("sidecar, one container", |stop| Ok(Watch::start(WatchConfig::new(subject()), |_| (), stop)?))
}

/// Judgements that one is the mean of.
const JUDGEMENTS: u32 = 200;
/// How long a watch is measured, once it has settled.
const SPAN: Duration = Duration::from_secs(30);

/// What one full look at a container and its judgement cost.
fn one_judgement(subject: &Subject) -> Result<()> {
    let (mut listeners, history) = (ListenerSight::new(Machine::new("/")), History::default());
    let (declared, before) = (Declared::default(), cpu()?);
    for _ in 0..JUDGEMENTS {
        let facts = facts::observe(Path::new("/"), subject, &mut listeners);
        let case = Case { facts: &facts, declared: &declared, history: &history, now: Timestamp::now() };
        ensure!(cis::judge_all(&case).len() == cis::CHECKS.len(), "not every check was judged");
    }
    println!("one container, the full table from beside it: {:.3?} of CPU", (cpu()? - before) / JUDGEMENTS);
    Ok(())
}

/// What a watch costs while nothing happens.
fn steady(what: &str, start: impl FnOnce(CancellationToken) -> Result<Watch>) -> Result<()> {
    let stop = CancellationToken::new();
    let watch = start(stop.clone())?;
    std::thread::sleep(Duration::from_secs(5));
    let before = cpu()?;
    std::thread::sleep(SPAN);
    let spent = cpu()? - before;
    let memory = std::fs::read_to_string("/proc/self/status")?;
    let memory = memory.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default().trim();
    println!("watching, {what}: {:.2} % of a core; this process has {memory}", 100.0 * spent.div_duration_f64(SPAN));
    stop.cancel();
    watch.thread.join().map_err(|_| anyhow::anyhow!("the watch of {what} panicked"))
}

/// CPU time of this process, in user space and in the kernel.
fn cpu() -> Result<Duration> {
    use nix::sys::resource::{UsageWho, getrusage};
    use nix::sys::time::TimeValLike;
    let used = getrusage(UsageWho::RUSAGE_SELF)?;
    let micros = (used.user_time() + used.system_time()).num_microseconds();
    Ok(Duration::from_micros(u64::try_from(micros)?))
}
