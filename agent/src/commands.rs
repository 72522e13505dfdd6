//! The commands that judge once and need no collector: `check`, `image`, `dockerfile`.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::ExitCode;

use sidewarden_agent::cis::{self, Case, Declared, History};
use sidewarden_agent::config::Config;
use sidewarden_agent::facts::{self, ListenerSight, Machine, Subject};
use sidewarden_agent::image::{self, archive, dockerfile};
use sidewarden_agent::node::{self, NodeConfig};
use sidewarden_agent::report::{self, Target};
use sidewarden_proto::event::{ContainerRef, Mode};
use sidewarden_proto::finding::{Finding, Vantage};
use sidewarden_proto::time::Timestamp;

use crate::{BROKEN, Command, FAILED, Shown, on_runtime};

/// The code of a failure, and its reason.
type Failure = (u8, String);

fn failed(error: impl std::fmt::Display) -> Failure {
    (FAILED, error.to_string())
}

/// Does one of them.
pub fn judge(command: &Command, config: Config) -> ExitCode {
    on_runtime(FAILED, async {
        let (targets, shown) = match command {
            Command::Check { beside: true, shown, .. } => {
                let name = "workload".to_owned();
                let findings = beside(&config.declared).1;
                (vec![Target { name, image: String::new(), file: None, findings }], shown)
            }
            Command::Check { container, shown, .. } => (check(&config, container).await?, shown),
            Command::Image { image, archive, shown } => {
                (vec![of_image(&config, image, archive.as_deref()).await?], shown)
            }
            Command::Dockerfile { file, shown } => (vec![of_dockerfile(&config, file)?], shown),
            _ => return Err(failed("this command judges nothing")),
        };
        Ok(told(&targets, *shown))
    })
}

fn told(targets: &[Target], Shown { format, fail_on }: Shown) -> ExitCode {
    print!("{}", report::render(targets, format));
    if report::broken(targets, fail_on) == 0 { ExitCode::SUCCESS } else { ExitCode::from(BROKEN) }
}

/// The workload that this process stands beside, as a sidecar that has just come sees it.
pub fn beside(declared: &Declared) -> (Vantage, Vec<Finding>) {
    let subject = Subject { mode: Mode::Sidecar, cgroup: None };
    let facts = facts::observe(Path::new("/"), &subject, &mut ListenerSight::new(Machine::new("/")));
    let history = History::default();
    let case = Case { facts: &facts, declared, history: &history, now: Timestamp::now() };
    (facts.vantage, cis::judge_all(&case))
}

async fn check(config: &Config, only: &[String]) -> Result<Vec<Target>, Failure> {
    let survey = node::survey(&NodeConfig::new(config, "/".into())).await;
    let survey = survey.map_err(|e| failed(format!("{e}: is the engine up, and is `node.socket` its socket?")))?;
    let wanted = |c: &ContainerRef, name: &String| c.name == *name || (name.len() >= 12 && c.id.starts_with(name));
    if let Some(name) = only.iter().find(|name| !survey.containers.iter().any(|(c, _)| wanted(c, name))) {
        return Err(failed(format!("there is no running container `{name}`")));
    }
    let host = Target { name: "host".into(), image: String::new(), file: None, findings: survey.host };
    let containers =
        survey.containers.into_iter().filter(|(c, _)| only.is_empty() || only.iter().any(|n| wanted(c, n)));
    let containers = containers.map(|(c, findings)| Target { name: c.name, image: c.image, file: None, findings });
    Ok(only.is_empty().then_some(host).into_iter().chain(containers).collect())
}

async fn of_image(config: &Config, name: &str, archive: Option<&Path>) -> Result<Target, Failure> {
    let image = match archive {
        None => {
            let told = node::image(&config.node.socket, name).await;
            told.map_err(|e| failed(format!("{e}: is the image there, and is `node.socket` the engine's socket?")))?
        }
        Some(path) => archive::read(std::io::BufReader::with_capacity(1 << 20, open(path)?)).map_err(failed)?,
    };
    let findings = image::judge(image, name, &config.declared, Timestamp::now()).map_err(failed)?;
    Ok(Target { name: name.to_owned(), image: String::new(), file: None, findings })
}

fn of_dockerfile(config: &Config, path: &Path) -> Result<Target, Failure> {
    let mut text = String::new();
    let wrong = |error| failed(format!("{}: {error}", path.display()));
    open(path)?.take(dockerfile::MAX_FILE + 1).read_to_string(&mut text).map_err(|e| wrong(e.to_string()))?;
    if text.len() as u64 > dockerfile::MAX_FILE {
        return Err(wrong(format!("it has more than {} bytes", dockerfile::MAX_FILE)));
    }
    let findings = dockerfile::judge(&text, &config.declared, Timestamp::now()).map_err(wrong)?;
    let name = path.display().to_string();
    Ok(Target { file: Some(name.clone()), name, image: String::new(), findings })
}

fn open(path: &Path) -> Result<Box<dyn Read>, Failure> {
    if path == Path::new("-") {
        return Ok(Box::new(std::io::stdin()));
    }
    let opened = File::open(path).map_err(|error| failed(format!("{}: {error}", path.display())))?;
    Ok(Box::new(opened))
}
