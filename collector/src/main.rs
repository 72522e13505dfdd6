//! `sidewarden-collector`: reads arguments and settings, runs, and turns the result into an exit code.

mod commands;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use sidewarden_collector::ca::{Authority, CaError, Pattern, Register, TokenInfo};
use sidewarden_collector::client::{self, Client, EventsQuery};
use sidewarden_collector::config::{self, Config};
use sidewarden_collector::identity;
use sidewarden_collector::trust::{self, command::TrustCommand};
use sidewarden_collector::{app, table};
use sidewarden_proto::config::FromValue;
use sidewarden_proto::time::Timestamp;

/// Takes the events of all Sidewarden agents in, keeps them, shows them and raises alerts.
///
/// No configuration is needed: `sidewarden-collector serve` makes its own CA and store on its first start. Then make a
/// token for an agent: `sidewarden-collector token create --workload shop/orders`.
#[derive(Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 done, 1 it failed (the reason is the last line), 2 wrong arguments.\n\
    Every setting outside the lists also comes from the environment: agents.listen is SIDEWARDEN_AGENTS_LISTEN."
)]
struct Arguments {
    /// Settings in TOML; without it the defaults and the environment count
    #[arg(long, global = true, env = "SIDEWARDEN_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where CA, log and tokens are (overrides data_dir)
    #[arg(long, global = true, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// How log lines look
    #[arg(long, global = true, env = "SIDEWARDEN_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    /// What is logged: error, warn, info, debug, or a filter like `info,sidewarden_collector=debug`
    #[arg(long, global = true, env = "SIDEWARDEN_LOG_LEVEL", default_value = "info")]
    log_level: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    /// One line of text each.
    Text,
    /// One JSON object each.
    Json,
}

#[derive(Subcommand)]
enum Command {
    /// Run the collector
    Serve,
    /// Make, list and take back enrolment tokens; works beside a running collector, on its data directory
    #[command(subcommand)]
    Token(TokenCommand),
    /// Revoke an identity: agents refuse it, and end its live connections, within a second
    #[command(after_help = commands::revoke::HELP)]
    Revoke {
        #[command(flatten)]
        what: commands::revoke::What,
        #[command(flatten)]
        at: At,
    },
    /// Whom agents trust besides our own: roots of other trust domains and of peers with DNS names
    #[command(subcommand)]
    Trust(Trust),
    /// Who is off the data plane by a gate of the policy, and letting them in
    #[command(subcommand)]
    Quarantine(commands::quarantine::Command),
    /// The auditor's table: reference, description, status; now or at a past moment, or what changed between two
    #[command(after_help = commands::report::HELP)]
    Report {
        #[command(flatten)]
        wanted: commands::report::Wanted,
        #[command(flatten)]
        at: At,
    },
    /// How the score went over time: of all verdicts that apply, how many percent pass
    Score {
        #[command(flatten)]
        span: commands::report::Span,
        #[command(flatten)]
        at: At,
    },
    /// What scanners found in images (CIS 4.4), and what people attest and sign
    #[command(subcommand, after_help = commands::evidence::HELP)]
    Evidence(commands::evidence::Command),
    /// Who answers for a broken rule, and until when
    #[command(subcommand, after_help = commands::waiver::HELP)]
    Waiver(commands::waiver::Command),
    /// What all agents go by: check, diff, test, apply, roll back
    #[command(subcommand, after_help = commands::policy::HELP)]
    Policy(commands::policy::Command),
    /// The CA: what stands, rotation, certificates for clients without an agent, sealing, backup
    #[command(subcommand)]
    Ca(commands::ca::CaCommand),
    /// Every certificate in use, the first to end first: the CA's, the collector's, its agents'; and which one the page shows
    Certificates {
        #[command(flatten)]
        at: At,
    },
    /// Who is there: agents with status, posture and certificate
    Agents {
        #[command(flatten)]
        at: At,
    },
    /// What happened
    Events {
        #[command(flatten)]
        at: At,
        #[command(flatten)]
        query: Wanted,
    },
    /// The verdicts of a workload, with evidence
    Posture {
        /// SPIFFE ID, or its path: shop/orders
        workload: String,
        #[command(flatten)]
        at: At,
    },
    /// Whether the collector works; for probes: exit code 0 if it does
    Health {
        #[command(flatten)]
        at: At,
    },
    /// Read the settings, and the certificates that they name, and report every fault
    CheckConfig,
}

#[derive(Subcommand)]
enum Trust {
    #[command(flatten)]
    Store(TrustCommand),
    /// Show who trusts whom, who lacks whose root and what ends first; exit code 1 if somebody lacks one
    Verify {
        #[command(flatten)]
        at: At,
    },
}

#[derive(Subcommand)]
enum TokenCommand {
    /// Make one; the token alone goes to stdout
    Create {
        /// Who may enrol with it: shop/orders, or shop/* for every service of shop
        #[arg(long)]
        workload: String,
        /// How often it can be used
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        uses: u32,
        /// How long it can be used: 30m, 1h, 7d
        #[arg(long, default_value = "1h", value_parser = duration)]
        ttl: Duration,
    },
    /// List them, without their secrets
    List {
        /// JSON for programs
        #[arg(long)]
        json: bool,
    },
    /// Take one back; agents that enrolled with it keep their certificates
    Revoke {
        /// Its id, as `token list` shows it
        id: String,
    },
}

/// Where the API is, and how to be let in.
#[derive(Args)]
struct At {
    /// The API; by default this machine's collector
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// A file with the API token; by default <data_dir>/admin.token
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// The CA that the API's certificate must come from; by default <data_dir>/ca/bundle.pem
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// JSON for programs
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Wanted {
    /// Only this kind; may be given more than once
    #[arg(long)]
    kind: Vec<String>,
    /// Only this workload: SPIFFE ID, or its path
    #[arg(long)]
    workload: Option<String>,
    /// Only this severity and above: info, notice, warning, critical
    #[arg(long)]
    min_severity: Option<sidewarden_proto::event::Severity>,
    /// How many
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..=1000))]
    limit: u16,
    /// Go on showing what comes
    #[arg(long)]
    follow: bool,
}

fn duration(text: &str) -> Result<Duration, String> {
    let life = Duration::from_text(text)?;
    if life.is_zero() || life > Duration::from_secs(365 * 24 * 3600) {
        return Err("must be more than 0 and at most 365d".into());
    }
    Ok(life)
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let config = read_config(&arguments)?;
    // What is written is ours alone, whatever the shell's mask: logs of what happened inside are not for everybody.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    match arguments.command {
        Command::Serve => {
            start_log(arguments.log_format, &arguments.log_level)?;
            runtime(true)?.block_on(serve(config))
        }
        Command::Token(command) => token(&config, command),
        Command::Revoke { what, at } => {
            let client = client(&config, &at)?;
            runtime(false)?.block_on(commands::revoke::run(&client, what, &config.trust_domain, at.json))
        }
        Command::Trust(Trust::Store(command)) => trust::command::run(&config, command, Timestamp::now()),
        Command::Trust(Trust::Verify { at }) => {
            let client = client(&config, &at)?;
            let asked =
                async { anyhow::Ok((client.agent_list().await?, client.ask("/api/v1/certificates", &[]).await?)) };
            let (agents, certificates) = runtime(false)?.block_on(asked)?;
            trust::command::verify(&config, &agents, &certificates, at.json)
        }
        Command::Quarantine(command) => {
            let client = client(&config, command.at())?;
            runtime(false)?.block_on(commands::quarantine::run(&client, command, &config.trust_domain))
        }
        Command::Policy(command) => {
            let client = command.at().map(|at| client(&config, at)).transpose()?;
            runtime(false)?.block_on(commands::policy::run(client.as_ref(), command, &config.trust_domain))
        }
        Command::Report { wanted, at } => {
            let client = client(&config, &at)?;
            runtime(false)?.block_on(commands::report::run(&client, wanted, &at, &config.trust_domain))
        }
        Command::Score { span, at } => {
            let client = client(&config, &at)?;
            runtime(false)?.block_on(commands::report::score(&client, span, at.json, &config.trust_domain))
        }
        Command::Evidence(command) => {
            let client = command.at().map(|at| client(&config, at)).transpose()?;
            runtime(false)?.block_on(commands::evidence::run(client.as_ref(), command, &config.trust_domain))
        }
        Command::Waiver(command) => {
            let client = client(&config, command.at())?;
            runtime(false)?.block_on(commands::waiver::run(&client, command, &config.trust_domain))
        }
        Command::Ca(command) => commands::ca::run(&config, command),
        Command::Certificates { at } => runtime(false)?.block_on(client(&config, &at)?.certificates(at.json)),
        Command::Agents { at } => runtime(false)?.block_on(client(&config, &at)?.agents(at.json)),
        Command::Events { at, query } => {
            let query = events_query(&config, query)?;
            runtime(false)?.block_on(client(&config, &at)?.events(query, at.json))
        }
        Command::Posture { workload, at } => {
            let workload = client::workload(&workload, &config.trust_domain)?;
            runtime(false)?.block_on(client(&config, &at)?.posture(&workload, at.json))
        }
        Command::Health { at } => runtime(false)?.block_on(client(&config, &at)?.health(at.json)),
        Command::CheckConfig => {
            identity::check(&config, Timestamp::now())?;
            println!("The configuration has no faults.");
            Ok(())
        }
    }
}

fn read_config(arguments: &Arguments) -> anyhow::Result<Config> {
    let mut config = config::read_file(arguments.config.as_deref(), &|name| std::env::var(name).ok())?;
    if let Some(dir) = &arguments.data_dir {
        config.data_dir = dir.clone();
    }
    Ok(config)
}

fn runtime(serves: bool) -> anyhow::Result<tokio::runtime::Runtime> {
    let mut builder = if serves {
        tokio::runtime::Builder::new_multi_thread()
    } else {
        tokio::runtime::Builder::new_current_thread()
    };
    Ok(builder.enable_all().build()?)
}

fn start_log(format: LogFormat, level: &str) -> anyhow::Result<()> {
    use std::io::IsTerminal;
    let filter = tracing_subscriber::EnvFilter::try_new(level)
        .map_err(|error| anyhow::anyhow!("--log-level `{level}`: {error}"))?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => lines.json().init(),
    }
    Ok(())
}

async fn serve(config: Config) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let app = app::start(config, Timestamp::now).await?;
    let data_dir = app.core.config.data_dir.display();
    tracing::info!(agents = %app.agents, api = %app.api, metrics = %app.metrics, %data_dir, "collector ready");
    tracing::info!(page = format!("https://{}/", app.api), token_file = %app.core.config.data_dir.join("admin.token").display(), "the page");
    let mut watch = tokio::time::interval(Duration::from_secs(1));
    let broken = loop {
        tokio::select! {
            _ = term.recv() => break false,
            _ = int.recv() => break false,
            _ = watch.tick() => if app.is_broken() { break true },
        }
    };
    tracing::info!("collector stopping");
    app.stop().await;
    if broken { anyhow::bail!("the committing thread ended: see the log above") } else { Ok(()) }
}

fn token(config: &Config, command: TokenCommand) -> anyhow::Result<()> {
    let pin = Authority::read_pin(&config.data_dir.join("ca")).map_err(|error| match error {
        CaError::Access { error: e, .. } if e.kind() == std::io::ErrorKind::NotFound => anyhow::anyhow!(
            "there is no CA in {}: start the collector once, or say where it is with --data-dir",
            config.data_dir.display()
        ),
        error => error.into(),
    })?;
    let register = Register::open(&config.data_dir.join("ca.db"))?;
    match command {
        TokenCommand::Create { workload, uses, ttl } => {
            let pattern: Pattern = client::path_in(&workload, &config.trust_domain)?.parse()?;
            let (token, info) = register.create(&pattern, uses, ttl, pin, Timestamp::now())?;
            eprintln!("Token {} for {pattern}: {uses} use(s), until {}.", token.id, info.expires);
            println!("{}", token.text().reveal());
        }
        TokenCommand::List { json } => list_tokens(&register.tokens()?, json),
        TokenCommand::Revoke { id } => {
            register.revoke(&id)?;
            eprintln!("Token {id} can no longer be used.");
        }
    }
    Ok(())
}

fn list_tokens(tokens: &[TokenInfo], json: bool) {
    let now = Timestamp::now();
    if json {
        let rows: Vec<_> = tokens.iter().map(|t| token_json(t, now)).collect();
        return println!("{}", serde_json::Value::Array(rows));
    }
    let rows = tokens.iter().map(|t| {
        let used = format!("{}/{}", t.used, t.uses);
        vec![t.id.clone(), t.pattern.clone(), t.state(now).word().to_owned(), used, t.expires.to_string()]
    });
    print!("{}", table::table(&["TOKEN", "WORKLOAD", "STATE", "USED", "UNTIL"], rows));
}

fn token_json(token: &TokenInfo, now: Timestamp) -> serde_json::Value {
    serde_json::json!({
        "id": token.id, "workload": token.pattern, "uses": token.uses, "used": token.used,
        "created_us": token.created.0, "expires_us": token.expires.0, "state": token.state(now).word(),
    })
}

fn events_query(config: &Config, wanted: Wanted) -> anyhow::Result<EventsQuery> {
    let workload = wanted.workload.map(|name| client::workload(&name, &config.trust_domain)).transpose()?;
    Ok(EventsQuery {
        kinds: wanted.kind,
        workload,
        min_severity: wanted.min_severity,
        limit: wanted.limit,
        follow: wanted.follow,
    })
}

fn client(config: &Config, at: &At) -> anyhow::Result<Client> {
    let port = config.api.listen.port();
    let url = at.url.clone().unwrap_or_else(|| format!("https://127.0.0.1:{port}"));
    let token = at.token_file.clone().unwrap_or_else(|| config.data_dir.join("admin.token"));
    let ca = at.ca.clone().unwrap_or_else(|| config.data_dir.join("ca/bundle.pem"));
    Client::new(&url, &token, &ca)
}
