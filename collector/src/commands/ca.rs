//! The `ca` commands: what stands, the steps of a rotation, certificates for clients without an agent, sealing, backup.
//!
//! What changes the CA is asked of the running collector, through its register; what only moves files needs it stopped.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use nix::fcntl::{Flock, FlockArg};
use sidewarden_collector::app;
use sidewarden_collector::ca::generation::{self, Described};
use sidewarden_collector::ca::orders::{self, Order, Reply};
use sidewarden_collector::ca::rotate::{self, Missing, Stage, Step};
use sidewarden_collector::ca::{Register, TokenState, backup, make_dir, member, write_secret};
use sidewarden_collector::config::Config;
use sidewarden_collector::{client, table};
use sidewarden_proto::directive::Directive;
use sidewarden_proto::enrol::Der;
use sidewarden_proto::secret::Secret;
use sidewarden_proto::time::Timestamp;

/// The collector looks once a second, and a new key takes a moment.
const REPLY_WITHIN: Duration = Duration::from_secs(20);
/// How long `compromise` waits for connected agents to renew.
const RENEWED_WITHIN: Duration = Duration::from_secs(60);

#[derive(Subcommand)]
pub enum CaCommand {
    /// Which roots there are, what each is used for, who has confirmed, and what is next
    Status {
        /// JSON for programs
        #[arg(long)]
        json: bool,
    },
    /// Rotation, step 1: make a new root and put it into every bundle; it issues nothing yet
    Prepare,
    /// Rotation, step 2: issue by the new root; waits until every agent trusts it
    Activate(Anyway),
    /// Rotation, step 3: have everything that the old root issued renewed now
    Taint(Anyway),
    /// Rotation, step 4: take the old root out of every bundle and delete its keys; waits until nobody needs it
    Retire(Anyway),
    /// Take a prepared root back, before it has issued anything
    Abandon,
    /// A key of the CA may be in wrong hands: a new root at once, everything renewed, the old roots out
    Compromise(Anyway),
    /// A certificate for a client without an agent (Prometheus, a probe), by its certificate request; PEM to stdout
    Issue {
        /// The request (PKCS#10), PEM or DER; of it only the key counts
        #[arg(long, value_name = "FILE")]
        csr: PathBuf,
        /// The name it gets: monitoring/prometheus, or a SPIFFE ID
        #[arg(long)]
        name: String,
        /// A DNS name or address it gets as well; may be given more than once
        #[arg(long)]
        dns: Vec<String>,
        /// How long it lives: 12h, 30d
        #[arg(long, default_value = "30d", value_parser = crate::duration)]
        ttl: Duration,
        /// Give it also a name that agents bear: whoever has it can then pass for that service
        #[arg(long)]
        although_agents_bear_it: bool,
    },
    /// Further collectors of the same trust domain, each with an issuing CA of its own under the same root
    #[command(subcommand)]
    Member(MemberCommand),
    /// Seal the keys on disk with the passphrase of ca.passphrase_file or the systemd credential
    Seal,
    /// Write sealed keys plain again
    Unseal,
    /// Seal CA, tokens, trust, policies and what is revoked into one file, also beside a running collector; not the events, and with
    /// them neither waivers, attestations and scans nor reports of the past
    Backup {
        /// Where to; nothing is overwritten
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        #[command(flatten)]
        passphrase: Passphrase,
    },
    /// Put a backup into an empty data_dir; nothing is overwritten
    Restore {
        /// What `ca backup` wrote
        file: PathBuf,
        #[command(flatten)]
        passphrase: Passphrase,
    },
}

#[derive(Subcommand)]
pub enum MemberCommand {
    /// At the new collector, before its first start: make a key, and a request for an issuing CA; PEM to stdout
    Request,
    /// Where the root's key is: sign an issuing CA for a request; PEM to stdout
    Sign {
        /// What `ca member request` wrote
        #[arg(long, value_name = "FILE")]
        csr: PathBuf,
    },
    /// At the new collector: take in what was signed
    Install {
        /// What `ca member sign` wrote
        #[arg(long, value_name = "FILE")]
        chain: PathBuf,
    },
    /// Where the root's key is: every issuing CA that holds, also of one that is gone, its key, and what it hands out
    List,
    /// Where the root's key is: wait no more for a collector that is gone for good
    Forget {
        /// The serial number of its issuing CA, as `ca member list` shows it
        serial: String,
    },
}

/// To go on where somebody would be left behind.
#[derive(Args)]
pub struct Anyway {
    /// Take the step even if agents have not followed: they will need a new token
    #[arg(long)]
    force: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

#[derive(Args)]
pub struct Passphrase {
    /// A file with the backup's passphrase; by default the one that seals the CA's keys
    #[arg(long, value_name = "FILE")]
    passphrase_file: Option<PathBuf>,
}

/// Carries a command out.
pub fn run(config: &Config, command: CaCommand) -> anyhow::Result<()> {
    match command {
        CaCommand::Status { json } => status(&Standing::read(config)?, json),
        CaCommand::Prepare => step(config, Step::Prepare, &Anyway { force: false, yes: true }),
        CaCommand::Activate(anyway) => step(config, Step::Activate, &anyway),
        CaCommand::Taint(anyway) => step(config, Step::Taint, &anyway),
        CaCommand::Retire(anyway) => step(config, Step::Retire, &anyway),
        CaCommand::Abandon => step(config, Step::Abandon, &Anyway { force: false, yes: true }),
        CaCommand::Compromise(anyway) => compromise(config, &anyway),
        CaCommand::Issue { csr, name, dns, ttl, although_agents_bear_it } => {
            let id = client::workload(&name, &config.trust_domain)?;
            let life_secs = ttl.as_secs();
            let csr = Der(read_csr(&csr)?);
            issue(
                config,
                &Order::Issue { csr, name: id, names: dns, life_secs, although_agents: although_agents_bear_it },
            )
        }
        CaCommand::Member(command) => member_command(config, command),
        CaCommand::Seal => seal(config),
        CaCommand::Unseal => unseal(config),
        CaCommand::Backup { out, passphrase } => make_backup(config, &out, &passphrase),
        CaCommand::Restore { file, passphrase } => restore(config, &file, &passphrase),
    }
}

/// What stands, as the files tell it.
struct Standing {
    generations: Vec<Described>,
    directive: Directive,
    holders: Vec<rotate::Holder>,
    /// Agents with certificates of another CA.
    guests: Vec<rotate::Holder>,
    next: Option<(Step, Vec<Missing>)>,
    pin: sidewarden_proto::identity::Sha256,
    now: Timestamp,
}

impl Standing {
    fn read(config: &Config) -> anyhow::Result<Standing> {
        let generations = generation::describe(&config.data_dir.join("ca"))?;
        let active = generations.iter().find(|one| one.entry.stage == Stage::Active);
        let Some(pin) = active.map(|active| active.pin) else {
            bail!(
                "there is no CA in {}: start the collector once, or say where it is with --data-dir",
                config.data_dir.display()
            );
        };
        let path = config.data_dir.join("directive.json");
        let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
        let directive: Directive = serde_json::from_slice(&bytes).with_context(|| path.display().to_string())?;
        let (register, now) = (Register::open(&config.data_dir.join("ca.db"))?, Timestamp::now());
        let entries: Vec<_> = generations.iter().map(|one| one.entry.clone()).collect();
        let missing =
            |step| orders::missing(&register, &directive, pin, step, config.grace, now).map(|list| (step, list));
        let next = rotate::next(&entries).map(missing).transpose()?;
        let holders = register.holders(config.grace, now)?;
        let guests = register.guest_holders(pin, now)?.into_iter().map(|(holder, _)| holder).collect();
        Ok(Standing { generations, directive, holders, guests, next, pin, now })
    }

    /// Agents whose certificate holds: all, those that run the newest directive, those with one of the active root.
    fn counts(&self) -> (usize, usize, usize) {
        let live: Vec<_> = self.holders.iter().filter(|holder| self.now < holder.not_after).collect();
        let confirmed = live.iter().filter(|holder| holder.confirmed == self.directive.version).count();
        (live.len(), confirmed, live.iter().filter(|holder| holder.root == self.pin).count())
    }
}

impl Standing {
    /// Agents with certificates of another CA: all, and those that run the newest directive.
    fn guest_counts(&self) -> (usize, usize) {
        let confirmed = self.guests.iter().filter(|holder| holder.confirmed == self.directive.version).count();
        (self.guests.len(), confirmed)
    }
}

fn status(standing: &Standing, json: bool) -> anyhow::Result<()> {
    if json {
        println!("{}", status_json(standing));
        return Ok(());
    }
    let rows = standing.generations.iter().map(|one| {
        let keys = format!("{}, {}", one.keys.0.word(), one.keys.1.word());
        let (root, issuing) = (one.root_until.to_string(), one.issuing_until.to_string());
        vec![one.entry.number.to_string(), one.entry.stage.word().into(), one.pin.to_string(), root, issuing, keys]
    });
    let heads = ["NUMBER", "STAGE", "PIN", "ROOT UNTIL", "ISSUING UNTIL", "KEYS (ROOT, ISSUING)"];
    print!("{}", table::table(&heads, rows));
    let (all, confirmed, renewed) = standing.counts();
    println!(
        "{all} agents have a certificate that holds: {confirmed} run directive {}, the newest; {renewed} use a certificate of the active root.",
        standing.directive.version
    );
    if !standing.guests.is_empty() {
        let (all, confirmed) = standing.guest_counts();
        println!("{all} more have one of another CA, which renews it: {confirmed} of them run that directive.");
    }
    match &standing.next {
        None => println!("No rotation is under way. `ca prepare` begins one."),
        Some((step, missing)) => {
            println!("Next: `ca {}`.{}", step.word(), if missing.is_empty() { " Nobody is missing." } else { "" });
            list(missing, &mut std::io::stdout())?;
        }
    }
    Ok(())
}

fn status_json(standing: &Standing) -> serde_json::Value {
    let (agents, confirmed, renewed) = standing.counts();
    let generations: Vec<_> = standing.generations.iter().map(|one| {
        serde_json::json!({
            "number": one.entry.number, "stage": one.entry.stage, "since_us": one.entry.since_us, "pin": one.pin.to_string(),
            "root_until_us": one.root_until, "issuing_until_us": one.issuing_until,
            "root_key": one.keys.0.word(), "issuing_key": one.keys.1.word(),
        })
    }).collect();
    serde_json::json!({
        "generations": generations, "directive": standing.directive.version, "agents": agents, "confirmed": confirmed,
        "renewed": renewed, "of_another_ca": standing.guest_counts().0, "next": standing.next.as_ref().map(|(step, _)| step),
        "missing": standing.next.as_ref().map(|(_, missing)| missing),
    })
}

fn list(missing: &[Missing], to: &mut dyn Write) -> std::io::Result<()> {
    for one in missing {
        let away = if one.away { " (its certificate has ended; it could still renew)" } else { "" };
        writeln!(to, "  {}: {}{away}", one.who, one.lacks)?;
    }
    Ok(())
}

fn step(config: &Config, step: Step, anyway: &Anyway) -> anyhow::Result<()> {
    let standing = Standing::read(config)?;
    if anyway.force {
        // Another step may be next.
        let register = Register::open(&config.data_dir.join("ca.db"))?;
        let left = orders::missing(&register, &standing.directive, standing.pin, step, config.grace, standing.now)?;
        eprintln!("{} would be left behind by `ca {}` and need a new token:", left.len(), step.word());
        list(&left, &mut std::io::stderr())?;
        confirm(anyway)?;
    }
    take(config, step, anyway.force)?;
    if step == Step::Activate {
        warn_of_tokens(config)?;
    }
    let next =
        rotate::next(&Standing::read(config)?.generations.iter().map(|one| one.entry.clone()).collect::<Vec<_>>());
    match next {
        Some(next) => eprintln!("Next: `ca {}`; `ca status` shows who is missing.", next.word()),
        None if step == Step::Abandon => eprintln!("No rotation is under way any more."),
        None => eprintln!("The rotation is complete."),
    }
    Ok(())
}

fn take(config: &Config, step: Step, force: bool) -> anyhow::Result<Vec<Missing>> {
    match ask(config, &Order::Rotate { step, force })? {
        Reply::Rotated { left } => {
            eprintln!("Done: `ca {}`. {} left behind.", step.word(), left.len());
            list(&left, &mut std::io::stderr())?;
            Ok(left)
        }
        Reply::Waits { missing } => {
            list(&missing, &mut std::io::stderr())?;
            bail!(
                "`ca {}` waits for {} that have not followed (above); --force goes on without them",
                step.word(),
                missing.len()
            )
        }
        Reply::Refused { why } => bail!(why),
        Reply::Issued { .. } | Reply::Done => bail!("the collector answered something else"),
    }
}

/// Tokens carry the pin of the root that issued when they were made.
fn warn_of_tokens(config: &Config) -> anyhow::Result<()> {
    let (register, now) = (Register::open(&config.data_dir.join("ca.db"))?, Timestamp::now());
    let good = register.tokens()?.iter().filter(|token| token.state(now) == TokenState::Valid).count();
    if good > 0 {
        eprintln!(
            "{good} enrolment tokens that are out carry the old root's pin: agents refuse the collector with them from now on. Make new ones."
        );
    }
    Ok(())
}

fn compromise(config: &Config, anyway: &Anyway) -> anyhow::Result<()> {
    let standing = Standing::read(config)?;
    let (all, ..) = standing.counts();
    eprintln!("This replaces the root of {} at once:", config.trust_domain);
    eprintln!(
        "  - a new root issues from this moment on; the {} in use now are distrusted",
        standing.generations.len()
    );
    eprintln!("  - agents that are connected ({all} have a certificate that holds) renew within moments and go on");
    eprintln!("  - agents that are not connected now must enrol anew, with a new token");
    eprintln!("  - tokens that are out and certificates made by `ca issue` end with the old roots");
    eprintln!(
        "  - once the old roots are out, connections that were proven by them end; what is busy on them breaks once"
    );
    eprintln!("  - until the old roots are out, whoever has the key can still pass for any service");
    confirm(anyway)?;
    take(config, Step::Compromise, true)?;
    eprintln!("Waiting up to {} s for connected agents to renew.", RENEWED_WITHIN.as_secs());
    let end = std::time::Instant::now() + RENEWED_WITHIN;
    while std::time::Instant::now() < end {
        std::thread::sleep(Duration::from_secs(1));
        let missing = Standing::read(config)?.next.map(|(_, missing)| missing).unwrap_or_default();
        if missing.iter().all(|one| one.away) {
            break;
        }
    }
    take(config, Step::Retire, true)?;
    eprintln!("The old roots are out.");
    Ok(())
}

fn confirm(anyway: &Anyway) -> anyhow::Result<()> {
    if anyway.yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        bail!("nobody is there to ask: say --yes to go on");
    }
    eprint!("Go on? Type yes: ");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    if answer.trim() == "yes" { Ok(()) } else { bail!("nothing was done") }
}

fn issue(config: &Config, order: &Order) -> anyhow::Result<()> {
    match ask(config, order)? {
        Reply::Issued { pem } => {
            print!("{pem}");
            Ok(())
        }
        Reply::Refused { why } => bail!(why),
        _ => bail!("the collector answered something else"),
    }
}

fn member_command(config: &Config, command: MemberCommand) -> anyhow::Result<()> {
    let dir = config.data_dir.join("ca");
    match command {
        MemberCommand::Sign { csr } => issue(config, &Order::SignMember { csr: Der(read_csr(&csr)?) }),
        MemberCommand::Request => {
            make_dir(&dir)?;
            let _lock = stopped(config)?;
            print!("{}", member::request(&dir, &app::vault(config)?)?);
            eprintln!(
                "Have it signed where the root's key is: `ca member sign --csr FILE`; then `ca member install` here."
            );
            Ok(())
        }
        MemberCommand::Install { chain } => {
            let _lock = stopped(config)?;
            let pem = std::fs::read(&chain).with_context(|| chain.display().to_string())?;
            let chain = sidewarden_proto::tls::certificates(&pem).with_context(|| chain.display().to_string())?;
            member::install(&dir, &chain, &config.trust_domain, &app::vault(config)?, Timestamp::now())?;
            eprintln!(
                "This collector issues under the same root now. Set ca.leader to where the root's key is, and start it."
            );
            Ok(())
        }
        MemberCommand::List => {
            let members = Register::open(&config.data_dir.join("ca.db"))?.issuing_cas(Timestamp::now())?;
            let is_none = members.is_empty();
            let rows = members.into_iter().map(|member| {
                let state = if member.gone { "gone" } else { "follows" }.to_owned();
                let (key, root, until) =
                    (member.spki.to_string(), member.root.to_string(), member.not_after.to_string());
                vec![member.serial, state, key, root, until, member.confirmed.to_string()]
            });
            print!("{}", table::table(&["SERIAL", "STATE", "KEY", "ROOT", "UNTIL", "DIRECTIVE"], rows));
            if is_none {
                eprintln!("No other collector has an issuing CA of this one: `ca member request` there begins it.");
            }
            Ok(())
        }
        MemberCommand::Forget { serial } => match ask(config, &Order::ForgetMember { serial })? {
            Reply::Done => {
                eprintln!(
                    "Nothing waits for it any more. Its issuing CA holds all the same: to end that, `revoke --issuing-key`."
                );
                Ok(())
            }
            Reply::Refused { why } => bail!(why),
            _ => bail!("the collector answered something else"),
        },
    }
}

/// Leaves an order for the running collector and waits for what comes of it.
fn ask(config: &Config, order: &Order) -> anyhow::Result<Reply> {
    if take_lock(&config.data_dir).is_ok() {
        bail!("no collector runs on {}: start it, it holds the keys that this needs", config.data_dir.display());
    }
    let register = Register::open(&config.data_dir.join("ca.db"))?;
    let id = register.order(order, Timestamp::now())?;
    let end = std::time::Instant::now() + REPLY_WITHIN;
    while std::time::Instant::now() < end {
        if let Some(reply) = register.reply(id)? {
            return Ok(reply);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    if register.withdraw(id)? {
        bail!("the collector did not answer within {} s: nothing was done; see its log", REPLY_WITHIN.as_secs());
    }
    register.reply(id)?.with_context(|| {
        format!(
            "the collector has taken the order and not answered within {} s: it may be done or not; see `ca status` and its log before you give it again",
            REPLY_WITHIN.as_secs()
        )
    })
}

fn take_lock(data_dir: &Path) -> anyhow::Result<Flock<File>> {
    let path = data_dir.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| path.display().to_string())?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|_| anyhow::anyhow!("a collector runs on {}", data_dir.display()))
}

fn stopped(config: &Config) -> anyhow::Result<Flock<File>> {
    take_lock(&config.data_dir).context("stop the collector first: this changes the files it has open")
}

fn read_csr(path: &Path) -> anyhow::Result<Vec<u8>> {
    use rustls::pki_types::CertificateSigningRequestDer;
    use rustls::pki_types::pem::PemObject;
    const MOST: u64 = 64 << 10;
    let size = std::fs::metadata(path).with_context(|| path.display().to_string())?.len();
    if size > MOST {
        bail!("{} has {size} bytes, which is no certificate request", path.display());
    }
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    if !bytes.starts_with(b"-----") {
        return Ok(bytes);
    }
    let csr = CertificateSigningRequestDer::from_pem_slice(&bytes);
    Ok(csr.map_err(|e| anyhow::anyhow!("{}: no certificate request: {e}", path.display()))?.to_vec())
}

fn seal(config: &Config) -> anyhow::Result<()> {
    let _lock = stopped(config)?;
    let vault = app::vault(config)?;
    let mut count = 0;
    for dir in generation::key_dirs(&config.data_dir.join("ca"))? {
        count += usize::from(vault.seal(&dir)?);
    }
    eprintln!(
        "{count} keys sealed. They were deleted in plain, not wiped: if somebody may have a copy of the disk, rotate."
    );
    Ok(())
}

fn unseal(config: &Config) -> anyhow::Result<()> {
    let _lock = stopped(config)?;
    let vault = app::vault(config)?;
    let mut count = 0;
    for dir in generation::key_dirs(&config.data_dir.join("ca"))? {
        count += usize::from(vault.unseal(&dir)?);
    }
    eprintln!(
        "{count} keys are plain now. Take ca.passphrase_file and the systemd credential away, or new keys are sealed."
    );
    Ok(())
}

fn passphrase_of(config: &Config, passphrase: &Passphrase) -> anyhow::Result<Secret> {
    let vault = match &passphrase.passphrase_file {
        Some(file) => sidewarden_collector::ca::Vault::from_files(Some(file), None)?,
        None => app::vault(config)?,
    };
    vault.passphrase().cloned().context("a backup is sealed: give --passphrase-file")
}

fn make_backup(config: &Config, out: &Path, passphrase: &Passphrase) -> anyhow::Result<()> {
    if out.exists() {
        bail!("{} is there already: nothing is overwritten", out.display());
    }
    let passphrase = passphrase_of(config, passphrase)?;
    let sealed = backup::make(&config.data_dir, &passphrase, Default::default(), Timestamp::now())?;
    write_secret(out, &sealed)?;
    eprintln!("{} bytes in {}. Without the passphrase nobody can use it, you neither.", sealed.len(), out.display());
    Ok(())
}

fn restore(config: &Config, file: &Path, passphrase: &Passphrase) -> anyhow::Result<()> {
    make_dir(&config.data_dir)?;
    let _lock = stopped(config)?;
    let sealed = std::fs::read(file).with_context(|| file.display().to_string())?;
    let restored = backup::restore(&config.data_dir, &sealed, &passphrase_of(config, passphrase)?, Timestamp::now())?;
    eprintln!("{} files of {} restored into {}.", restored.files, restored.made, config.data_dir.display());
    eprintln!(
        "Tokens, certificates and revocations of after that moment are not known here: look through what was revoked since."
    );
    eprintln!("Never run this beside the collector that the backup is of.");
    Ok(())
}
