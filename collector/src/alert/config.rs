//! The `[alerts]` section: whom to tell, how often, and for how long.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use reqwest::{Client, Url};
use rustls::RootCertStore;
use sidewarden_proto::config::Reader;
use sidewarden_proto::secret::Secret;
use sidewarden_proto::tls;

use super::alertmanager::Alertmanager;
use super::engine::Settings;
use super::log::Log;
use super::webhook::Webhook;
use super::{Delivery, Notice, Sink, SinkError};

/// Where Debian, Alpine and most images keep the CAs of the public web.
const SYSTEM_CAS: &str = "/etc/ssl/certs/ca-certificates.crt";
/// One attempt of one delivery.
const ATTEMPT: Duration = Duration::from_secs(10);
/// Bytes of a refusal's body that are kept for the log.
const MAX_REFUSAL: usize = 300;

/// Whom to tell.
#[derive(Clone, Debug)]
pub struct Config {
    /// Every member of the Alertmanager cluster: duplicates are merged there, gaps are not filled.
    pub alertmanagers: Vec<Url>,
    /// Other receivers.
    pub webhooks: Vec<WebhookConfig>,
    /// CAs for https receivers; those of the system when not set.
    pub ca_file: Option<PathBuf>,
    /// Write alerts to the collector's log, too.
    pub log: bool,
    /// How often Alertmanagers are told again what still fires.
    pub resend: Duration,
    /// How long an alert about something momentary goes on after the last occurrence.
    pub hold: Duration,
}

/// One webhook.
#[derive(Clone, Debug)]
pub struct WebhookConfig {
    /// Where to post.
    pub url: Url,
    /// Sent as bearer token.
    pub token: Option<Secret>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            alertmanagers: Vec::new(),
            webhooks: Vec::new(),
            ca_file: None,
            log: true,
            resend: Duration::from_secs(60),
            hold: Settings::default().hold,
        }
    }
}

impl Config {
    /// Reads the section.
    pub fn read(reader: &mut Reader<'_>) -> Config {
        let default = Config::default();
        let members: Vec<String> = reader.value("alertmanagers", Vec::new());
        let alertmanagers = members.iter().filter_map(|text| url(reader, "alertmanagers", text)).collect();
        let config = Config {
            alertmanagers,
            webhooks: reader.list("webhooks", webhook).into_iter().flatten().collect(),
            ca_file: reader.optional("ca_file"),
            log: reader.value("log", default.log),
            resend: reader.value("resend", default.resend),
            hold: reader.value("hold", default.hold),
        };
        if !(Duration::from_secs(5)..=Duration::from_secs(3600)).contains(&config.resend) {
            reader.fault("resend", "must be between 5s and 1h");
        }
        if config.hold < Duration::from_secs(60) {
            reader.fault("hold", "must be at least 1m: shorter ones make one attack many alerts");
        }
        config
    }

    /// The engine's part.
    pub fn settings(&self) -> Settings {
        Settings { hold: self.hold, ..Settings::default() }
    }

    /// One sink for each receiver.
    pub fn sinks(&self) -> Result<Vec<Arc<dyn Sink>>, SinkError> {
        let mut sinks: Vec<Arc<dyn Sink>> = Vec::new();
        if self.log {
            sinks.push(Arc::new(Log));
        }
        if self.alertmanagers.is_empty() && self.webhooks.is_empty() {
            return Ok(sinks);
        }
        let client = self.client()?;
        for url in &self.alertmanagers {
            sinks.push(Arc::new(Alertmanager::new(client.clone(), url.clone(), self.resend)));
        }
        for hook in &self.webhooks {
            sinks.push(Arc::new(Webhook::new(client.clone(), hook.url.clone(), hook.token.clone())));
        }
        Ok(sinks)
    }

    fn client(&self) -> Result<Client, SinkError> {
        let failed = |what: String| SinkError { what, retry: false };
        let config = rustls::ClientConfig::builder_with_provider(tls::provider())
            .with_safe_default_protocol_versions()
            .map_err(|e| failed(format!("tls: {e}")))?
            .with_root_certificates(self.roots()?)
            .with_no_client_auth();
        Client::builder()
            .tls_backend_preconfigured(config)
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(ATTEMPT)
            .pool_max_idle_per_host(1)
            .user_agent(concat!("sidewarden-collector/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|e| failed(format!("http client: {e}")))
    }

    /// Without any CA, https receivers are refused as unknown; plain ones on loopback work.
    fn roots(&self) -> Result<RootCertStore, SinkError> {
        let mut roots = RootCertStore::empty();
        let path = self.ca_file.clone().unwrap_or_else(|| SYSTEM_CAS.into());
        let pem = match std::fs::read(&path) {
            Ok(pem) => pem,
            Err(_) if self.ca_file.is_none() => return Ok(roots),
            Err(error) => {
                let what = format!("reading alerts.ca_file {}: {error}", path.display());
                return Err(SinkError { what, retry: false });
            }
        };
        let fault = |e| SinkError { what: format!("alerts.ca_file {}: {e}", path.display()), retry: false };
        roots.add_parsable_certificates(tls::certificates(&pem).map_err(fault)?);
        Ok(roots)
    }
}

fn webhook(reader: &mut Reader<'_>) -> Option<WebhookConfig> {
    let text: Option<String> = reader.required("url");
    let token: Option<Secret> = reader.optional("token");
    let file: Option<PathBuf> = reader.optional("token_file");
    if token.is_some() && file.is_some() {
        reader.fault("token", "must not be set together with token_file");
    }
    let token = token.or_else(|| file.and_then(|path| token_from(reader, &path)));
    Some(WebhookConfig { url: url(reader, "url", &text?)?, token })
}

fn token_from(reader: &mut Reader<'_>, path: &std::path::Path) -> Option<Secret> {
    match std::fs::read_to_string(path) {
        Ok(text) => Some(Secret::new(text.trim())),
        Err(error) => {
            reader.fault("token_file", format!("reading {}: {error}", path.display()));
            None
        }
    }
}

fn url(reader: &mut Reader<'_>, key: &str, text: &str) -> Option<Url> {
    let url = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    match url {
        None => reader.fault(key, "must be a URL like http://alertmanager:9093"),
        Some(ref url) if !url.username().is_empty() || url.password().is_some() => {
            reader.fault(key, "must not hold a password: it would show in logs");
            return None;
        }
        Some(_) => {}
    }
    url
}

/// `scheme/host:port` of a receiver: enough to find it, and without a path that may hold a secret.
pub(super) fn name_of(kind: &str, url: &Url) -> String {
    let port = url.port_or_known_default().unwrap_or_default();
    format!("{kind}/{}:{port}", url.host_str().unwrap_or_default())
}

/// Sends a request once, and says whether it may help to send it again.
pub(super) async fn post(request: reqwest::RequestBuilder) -> Result<(), SinkError> {
    let answer = request.send().await.map_err(|error| SinkError {
        // The URL may hold a secret in its path.
        what: chain(&error.without_url()),
        retry: true,
    })?;
    let status = answer.status();
    if status.is_success() {
        return Ok(());
    }
    let retry = status.is_server_error() || matches!(status.as_u16(), 408 | 425 | 429);
    let mut body = answer;
    let said = match body.chunk().await {
        Ok(Some(bytes)) => String::from_utf8_lossy(&bytes).chars().take(MAX_REFUSAL).collect(),
        _ => String::new(),
    };
    Err(SinkError { what: format!("answered {status}: {}", said.trim()), retry })
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Boxes what an `async` block does, for [`Sink::deliver`].
pub(super) fn boxed<'a>(work: impl Future<Output = Result<(), SinkError>> + Send + 'a) -> Delivery<'a> {
    Box::pin(work)
}

/// The link to an alert on the page.
pub(super) fn link(notice: &Notice, alert: &super::Alert) -> String {
    if notice.page.is_empty() { String::new() } else { format!("{}#/alerts/{}", notice.page, alert.id()) }
}

/// The link to what a rule means, on the page.
pub(super) fn runbook(notice: &Notice, alert: &super::Alert) -> String {
    if notice.page.is_empty() { String::new() } else { format!("{}#/rules/{}", notice.page, alert.rule) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sidewarden_proto::config::load;

    fn read(text: &str) -> Result<Config, String> {
        load(text, &|_| None, |reader| reader.section("alerts", Config::read)).map_err(|faults| faults.to_string())
    }

    #[test]
    fn nothing_needs_to_be_set() {
        let config = read("").unwrap();
        assert!(config.alertmanagers.is_empty() && config.log);
        assert_eq!(config.sinks().unwrap().len(), 1);
    }

    #[test]
    fn every_member_and_every_webhook_is_a_sink() {
        let config = read(
            "[alerts]\nalertmanagers = ['http://a:9093', 'https://b/am/']\nlog = false\n\
             [[alerts.webhooks]]\nurl = 'http://h/x'\ntoken = 'hunter2'",
        )
        .unwrap();
        let sinks = config.sinks().unwrap();
        let names: Vec<&str> = sinks.iter().map(|sink| sink.name()).collect();
        assert_eq!(names, ["alertmanager/a:9093", "alertmanager/b:443", "webhook/h:80"]);
        assert!(!format!("{config:?}").contains("hunter2"));
    }

    #[test]
    fn faults_say_what_to_change() {
        let rows = [
            ("alertmanagers = ['alertmanager:9093']", "must be a URL"),
            ("alertmanagers = ['http://u:p@h/']", "password"),
            ("resend = '1s'", "between 5s and 1h"),
            ("hold = '1s'", "at least 1m"),
            ("alertmanager = ['http://a']", "alertmanagers"),
            ("webhooks = [{ url = 'ftp://x' }]", "must be a URL"),
            ("webhooks = [{ token = 'x' }]", "url"),
            ("webhooks = [{ url = 'http://x', token = 'x', token_file = '/y' }]", "together"),
            ("webhooks = [{ url = 'http://x', token_file = '/no/such/file' }]", "/no/such/file"),
        ];
        for (line, expected) in rows {
            let said = read(&format!("[alerts]\n{line}")).unwrap_err();
            assert!(said.contains(expected), "{line}: {said}");
        }
    }

    #[test]
    fn a_missing_ca_file_is_told_before_anything_starts() {
        let config = read("[alerts]\nca_file = '/no/such.pem'\nalertmanagers = ['https://a']").unwrap();
        let error = config.sinks().err().unwrap();
        assert!(error.what.contains("/no/such.pem"), "{error}");
    }
}
