//! `sidewarden-agent`: reads arguments and settings, runs, and turns the result into an exit code.

mod commands;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use sidewarden_agent::app::{self, App, Setup};
use sidewarden_agent::cis::Declared;
use sidewarden_agent::config::{Admin, Config, Permissive, TrustAll};
use sidewarden_agent::intercept::{self, InterceptError};
use sidewarden_agent::report::Format;
use sidewarden_agent::{admin, cis, init};
use sidewarden_proto::backoff;
use sidewarden_proto::config::Env;
use sidewarden_proto::event::{Mode, Severity};
use tokio::signal::unix::{SignalKind, signal};

/// Could not start, or `health` says no.
const FAILED: u8 = 1;
/// Wrong arguments or settings.
const USAGE: u8 = 2;
/// `check`, `image` or `dockerfile` found a broken rule.
const BROKEN: u8 = 3;
/// In exec mode: the agent itself could not start. 126, 127 and everything else are the command's.
const EXEC_FAILED: u8 = 125;

const USUAL_CONFIG: &str = "/etc/sidewarden/agent.toml";
/// In exec mode: for the one-shot to put the packet rules in force, before the command is started.
const RULES_WITHIN: Duration = Duration::from_secs(30);

/// Stands beside one container: mutual TLS for its traffic, runtime checks by the CIS Docker Benchmark, and an event for
/// everything that matters, kept until a collector has it.
///
/// It needs a file of settings (see deploy/agent.toml) and, on its first start, a token that
/// `sidewarden-collector token create --workload shop/orders` prints.
#[derive(Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 ended in order; 1 it failed (the reason is the last line); 2 wrong arguments or settings;\n\
    3 `check`, `image` or `dockerfile` found a broken rule.\n\
    With `exec`: the command's own code, 128 and the signal's number if one ended it, 126 if it cannot be executed, 127 if it\n\
    was not found, 125 if the agent could not start.\n\
    Every setting outside the lists also comes from the environment: admin.listen is SIDEWARDEN_ADMIN_LISTEN."
)]
struct Arguments {
    /// Settings in TOML
    #[arg(long, global = true, env = "SIDEWARDEN_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// How log lines look
    #[arg(long, global = true, env = "SIDEWARDEN_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    /// What is logged: error, warn, info, debug, or a filter like `info,sidewarden_agent::proxy=debug`
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
    /// Run in a container of its own that shares the workload's network and PID namespace
    Sidecar,
    /// Run a command in this container and stand beside it, as PID 1 if need be
    Exec {
        /// The command and its arguments, after `--`
        #[arg(required = true, last = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
    /// Run once on each host, with the container engine's socket and the host's PID namespace: judge every container
    Node,
    /// Ask the running agent whether it is ready; for probes in images without a shell. Of the settings it needs admin.listen
    /// alone, and looks for /etc/sidewarden/agent.toml if no file is named
    Health,
    /// Tell everything that is wrong with the settings
    CheckConfig,
    /// Packet rules around the workload; for a one-shot in its network namespace that has CAP_NET_ADMIN
    Intercept {
        #[command(subcommand)]
        action: Intercept,
    },
    /// List the checks, with their CIS numbers
    Checks,
    /// Tell what a check guards against and how to keep it
    Explain {
        /// As in `checks`: `docker-socket`, or 5.31
        check: String,
    },
    /// Tell what this agent can see of its workload from here, and what each further grant would add
    Vantage,
    /// Judge the containers of this host and the host itself once, with the container engine's socket; needs no collector
    Check {
        /// Only these containers, by name or id; may be given several times
        #[arg(long, value_name = "NAME")]
        container: Vec<String>,
        /// Judge the workload that this stands beside instead, as a sidecar sees it; needs no engine
        #[arg(long, conflicts_with = "container")]
        beside: bool,
        #[command(flatten)]
        shown: Shown,
    },
    /// Judge an image before it is shipped (section 4), with the container engine's socket; nothing of it is run
    Image {
        /// Its name or id; or, with --archive, what it is to be called
        image: String,
        /// Judge what `docker save` wrote, instead of asking an engine; - for the standard input
        #[arg(long, value_name = "FILE")]
        archive: Option<PathBuf>,
        #[command(flatten)]
        shown: Shown,
    },
    /// Judge the image that a Dockerfile will make (section 4); what only the built image can tell is `unknown`
    Dockerfile {
        /// The file; - for the standard input
        file: PathBuf,
        #[command(flatten)]
        shown: Shown,
    },
}

/// How a report looks, and what makes it a failure.
#[derive(Clone, Copy, clap::Args)]
struct Shown {
    /// How the report looks
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// The mildest severity of a broken rule that makes the exit code 3: info, notice, warning, critical
    #[arg(long, value_name = "SEVERITY", default_value = "warning")]
    fail_on: Severity,
}

#[derive(Clone, Copy, Subcommand)]
enum Intercept {
    /// Show the rules that the settings ask for, as nft reads them; needs nothing
    Print,
    /// Put them in force, in place of those that were
    Install,
    /// Compare those in force with the settings, and look for processes that can get past them; code 1 if anything is wrong
    Verify,
    /// Take them away
    Remove,
}

fn main() -> ExitCode {
    // Nobody without CAP_SYS_PTRACE may read our memory, where the key is.
    let dumpable = nix::sys::prctl::set_dumpable(false);
    let arguments = Arguments::parse();
    if let Err(error) = start_log(&arguments) {
        return fail(USAGE, &error);
    }
    if let Err(error) = dumpable {
        return fail(FAILED, &format!("making the process non-dumpable: {error}"));
    }
    match &arguments.command {
        Command::Checks => {
            print!("{}", cis::catalogue_table());
            return ExitCode::SUCCESS;
        }
        Command::Explain { check } => return explain(check),
        Command::Vantage => {
            print!("{}", look_around());
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let env = |name: &str| std::env::var(name).ok();
    if matches!(arguments.command, Command::Health) {
        return health(arguments.config.or_else(usual_config).as_deref(), &env);
    }
    if let Command::Check { .. } | Command::Image { .. } | Command::Dockerfile { .. } = &arguments.command {
        return match Config::load_for_checks(arguments.config.as_deref(), &env) {
            Ok(config) => commands::judge(&arguments.command, config),
            Err(error) => fail(USAGE, &error.to_string()),
        };
    }
    match Config::load(arguments.config.as_deref(), &env) {
        Ok(config) => run(arguments.command, config, arguments.config.as_deref()),
        Err(error) => fail(USAGE, &error.to_string()),
    }
}

fn fail(code: u8, error: &str) -> ExitCode {
    eprintln!("sidewarden-agent: {error}");
    ExitCode::from(code)
}

fn start_log(arguments: &Arguments) -> Result<(), String> {
    let filter = tracing_subscriber::EnvFilter::try_new(&arguments.log_level)
        .map_err(|error| format!("--log-level `{}`: {error}", arguments.log_level))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match arguments.log_format {
        LogFormat::Text => log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}

fn run(command: Command, config: Config, path: Option<&Path>) -> ExitCode {
    match command {
        Command::Sidecar => on_runtime(FAILED, until_told(Mode::Sidecar, config)),
        Command::Node => on_runtime(FAILED, until_told(Mode::Node, config)),
        Command::Exec { command } => on_runtime(EXEC_FAILED, exec(config, command)),
        Command::CheckConfig => check_config(&config, path),
        Command::Intercept { action } => intercept(action, &config),
        // Done by now: none of these needs all settings.
        Command::Health
        | Command::Checks
        | Command::Vantage
        | Command::Explain { .. }
        | Command::Check { .. }
        | Command::Image { .. }
        | Command::Dockerfile { .. } => ExitCode::SUCCESS,
    }
}

/// As a sidecar that has just come.
fn look_around() -> String {
    let (vantage, findings) = commands::beside(&Declared::default());
    cis::sight(vantage, &findings)
}

fn explain(check: &str) -> ExitCode {
    match cis::explain(check) {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => fail(USAGE, &error),
    }
}

/// One thread for all connections: measured faster than several that hand work to each other (research/performance.md).
fn on_runtime(failed: u8, work: impl Future<Output = Result<ExitCode, (u8, String)>>) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(failed, &format!("the runtime cannot be made: {error}")),
    };
    runtime.block_on(work).unwrap_or_else(|(code, error)| fail(code, &error))
}

fn setup(mode: Mode, config: Config, shares_user: bool) -> Setup {
    Setup { mode, config, root: Some("/".into()), shares_user, random: backoff::random }
}

async fn until_told(mode: Mode, config: Config) -> Result<ExitCode, (u8, String)> {
    let failed = |error: &dyn std::fmt::Display| (FAILED, error.to_string());
    let mut terminate = signal(SignalKind::terminate()).map_err(|e| failed(&e))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|e| failed(&e))?;
    let app = app::start(setup(mode, config, false)).await.map_err(|e| failed(&e))?;
    let reason = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    app.stop(reason).await;
    Ok(ExitCode::SUCCESS)
}

async fn exec(config: Config, command: Vec<OsString>) -> Result<ExitCode, (u8, String)> {
    let user = config.exec.user.map(|user| init::User { uid: user.uid, gid: user.gid });
    let shares_user = init::would_share_uid(user);
    let asked_for = config.clone();
    let app = app::start(setup(Mode::Exec, config, shares_user)).await.map_err(|e| (EXEC_FAILED, e.to_string()))?;
    if let Err(error) = intercept::await_rules(&asked_for, RULES_WITHIN).await {
        app.stop("the packet rules were not put in force").await;
        return Err((EXEC_FAILED, error.to_string()));
    }
    let mut reaper = match init::run(&command, user) {
        Ok(reaper) => reaper,
        Err(error) => return Err(not_started(app, &error).await),
    };
    let exit = reaper.wait().await;
    app.workload_exited(exit.code);
    app.stop("the workload's command ended").await;
    Ok(ExitCode::from(exit_byte(exit.code)))
}

async fn not_started(app: App, error: &init::StartError) -> (u8, String) {
    let code = error.exit_code();
    app.workload_exited(code);
    app.stop("the workload's command could not be started").await;
    (exit_byte(code), error.to_string())
}

/// The kernel keeps the lowest byte of an exit code.
fn exit_byte(code: i32) -> u8 {
    (code & 0xFF) as u8
}

/// Where the image expects its settings, if they are there: its health check names no file.
fn usual_config() -> Option<PathBuf> {
    Some(PathBuf::from(USUAL_CONFIG)).filter(|path| path.exists())
}

fn health(config: Option<&Path>, env: Env<'_>) -> ExitCode {
    let listen = match Admin::load(config, env) {
        Ok(admin) => admin.listen,
        Err(error) => return fail(USAGE, &error.to_string()),
    };
    match admin::probe(listen) {
        Ok((true, body)) => {
            print!("{body}");
            ExitCode::SUCCESS
        }
        Ok((false, body)) => fail(FAILED, &format!("the agent is not ready:\n{}", body.trim_end())),
        Err(error) => fail(FAILED, &format!("asking the agent at {listen}: {error}: is it running?")),
    }
}

fn intercept(action: Intercept, config: &Config) -> ExitCode {
    let told = match action {
        Intercept::Print => intercept::print(config),
        Intercept::Install => intercept::install(config),
        Intercept::Remove => intercept::remove(),
        Intercept::Verify => return verify(config),
    };
    match told {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(error @ InterceptError::Off) => fail(USAGE, &error.to_string()),
        Err(error) => fail(FAILED, &error.to_string()),
    }
}

fn verify(config: &Config) -> ExitCode {
    match intercept::verify(config) {
        Ok(findings) => {
            findings.good.iter().for_each(|line| println!("good: {line}"));
            findings.bad.iter().for_each(|line| println!("BAD:  {line}"));
            if findings.bad.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(FAILED) }
        }
        Err(error @ InterceptError::Off) => fail(USAGE, &error.to_string()),
        Err(error) => fail(FAILED, &error.to_string()),
    }
}

fn check_config(config: &Config, path: Option<&Path>) -> ExitCode {
    match app::check(config) {
        Ok(()) => {
            let from = path.map_or_else(|| "the environment".into(), |path| path.display().to_string());
            let (inbound, outbound, rules) =
                (config.inbound.len(), config.outbound.len(), config.egress.allow.rules.len());
            println!("{from}: good; {inbound} inbound, {outbound} outbound, egress to {rules} places");
            for inbound in &config.inbound {
                if let Some(Permissive { reason, until, .. }) = &inbound.permissive {
                    println!("{} lets plaintext in until {until}: {reason}", inbound.listen);
                }
            }
            for (direction, place, TrustAll { reason, until }) in config.trusting_all() {
                println!("{} {place} accepts EVERY certificate until {until}: {reason}", direction.word());
            }
            ExitCode::SUCCESS
        }
        Err(error) => fail(USAGE, &error.to_string()),
    }
}
