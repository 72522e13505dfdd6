//! The commands that ask a running collector: a client of the HTTPS API like any other.
//!
//! It trusts the collector's own CA and nothing else. The token comes from a file, never from the command line, where
//! every user of the machine could read it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme};
use serde_json::Value;
use sidewarden_proto::event::Severity;
use sidewarden_proto::identity::{SpiffeId, TrustDomain};
use sidewarden_proto::secret::Secret;
use sidewarden_proto::time::Timestamp;
use sidewarden_proto::tls;

use crate::table::{clean, table};

/// How long one answer may take.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How often `--follow` asks again.
const FOLLOW: Duration = Duration::from_secs(1);

/// Which events to show.
#[derive(Clone, Debug)]
pub struct EventsQuery {
    /// Only these kinds.
    pub kinds: Vec<String>,
    /// Only this workload.
    pub workload: Option<SpiffeId>,
    /// Only this severity and above.
    pub min_severity: Option<Severity>,
    /// How many.
    pub limit: u16,
    /// Whether to go on.
    pub follow: bool,
}

impl EventsQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut pairs = Vec::new();
        if !self.kinds.is_empty() {
            pairs.push(("kind", self.kinds.join(",")));
        }
        pairs.extend(self.workload.iter().map(|id| ("workload", id.to_string())));
        pairs.extend(self.min_severity.iter().map(|severity| ("min_severity", severity.to_string())));
        pairs.push(("limit", self.limit.to_string()));
        pairs
    }
}

/// The workload a person means: a SPIFFE ID, or its path in our trust domain.
pub fn workload(name: &str, domain: &TrustDomain) -> anyhow::Result<SpiffeId> {
    if name.starts_with("spiffe://") { Ok(name.parse()?) } else { Ok(domain.workload(name)?) }
}

/// The path a person means, where a pattern may stand too.
pub fn path_in(name: &str, domain: &TrustDomain) -> anyhow::Result<String> {
    let Some(rest) = name.strip_prefix("spiffe://") else { return Ok(name.to_owned()) };
    match rest.split_once('/') {
        Some((found, path)) if found == domain.as_str() => Ok(path.to_owned()),
        _ => anyhow::bail!("{name} is not of trust domain {domain}"),
    }
}

/// A client of one collector.
#[derive(Debug)]
pub struct Client {
    http: reqwest::Client,
    url: String,
    token: Option<Secret>,
    token_fault: String,
}

impl Client {
    /// A client of the API at `url`, whose certificate must come from the CA in the file `ca`.
    pub fn new(url: &str, token_file: &Path, ca: &Path) -> anyhow::Result<Client> {
        anyhow::ensure!(url.starts_with("https://"), "--url must begin with https://");
        let pem = std::fs::read(ca).with_context(|| {
            format!("CA {}: the collector makes it on its first start; elsewhere, copy it and use --ca", ca.display())
        })?;
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls_config(&pem)?)
            .no_proxy()
            .timeout(TIMEOUT)
            .build()
            .context("HTTP client")?;
        let read = std::fs::read_to_string(token_file);
        let token_fault = read.as_ref().err().map_or_else(String::new, |e| format!("{}: {e}", token_file.display()));
        let token = read.ok().map(|text| Secret::new(text.trim()));
        Ok(Client { http, url: url.trim_end_matches('/').to_owned(), token, token_fault })
    }

    /// What the API answers at `path`.
    pub async fn ask(&self, path: &str, query: &[(&'static str, String)]) -> anyhow::Result<Value> {
        let url = url_with(&format!("{}{path}", self.url), query)?;
        self.answer(self.http.get(url)).await
    }

    /// Has the API do something.
    pub async fn tell(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let request = self.http.post(format!("{}{path}", self.url));
        self.answer(request.header("content-type", "application/json").body(body.to_string())).await
    }

    /// The same, with a body that is sent as it is.
    pub async fn tell_bytes(
        &self,
        path: &str,
        query: &[(&'static str, String)],
        body: Vec<u8>,
    ) -> anyhow::Result<Value> {
        let request = self.http.post(url_with(&format!("{}{path}", self.url), query)?);
        self.answer(request.header("content-type", "application/json").body(body)).await
    }

    /// What the API answers at `path`, as it is sent.
    pub async fn ask_text(&self, path: &str, query: &[(&'static str, String)]) -> anyhow::Result<String> {
        let url = url_with(&format!("{}{path}", self.url), query)?;
        self.send(self.http.get(url)).await
    }

    async fn answer(&self, request: reqwest::RequestBuilder) -> anyhow::Result<Value> {
        serde_json::from_str(&self.send(request).await?).context("the answer is no JSON")
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> anyhow::Result<String> {
        let token = self.token.as_ref().with_context(|| format!("API token {}", self.token_fault))?;
        let request = request.bearer_auth(token.reveal());
        let answer = request.send().await.map_err(|error| self.unreachable(error))?;
        let status = answer.status();
        let text = answer.text().await.context("the answer was cut")?;
        if status.is_success() {
            return Ok(text);
        }
        let body: Value = serde_json::from_str(&text).unwrap_or_default();
        let word = |key: &str| clean(body[key].as_str().unwrap_or_default());
        anyhow::bail!("the collector answers {status}: {}: {}", word("error"), word("hint"))
    }

    /// Every cause in one line: what failed is at the end of the chain.
    fn unreachable(&self, error: reqwest::Error) -> anyhow::Error {
        let error = anyhow::Error::new(error.without_url());
        anyhow::anyhow!("{}: {error:#}: is the collector running, and is this its address?", self.url)
    }

    /// Whether it works.
    pub async fn health(&self, json: bool) -> anyhow::Result<()> {
        let answer = self.http.get(format!("{}/healthz", self.url)).send().await.map_err(|e| self.unreachable(e))?;
        let (status, text) = (answer.status(), answer.text().await.unwrap_or_default());
        println!("{}", if json { text.trim().to_owned() } else { clean(text.trim()) });
        anyhow::ensure!(status.is_success(), "the collector answers {status}");
        Ok(())
    }

    /// Every agent, as the API tells.
    pub async fn agent_list(&self) -> anyhow::Result<Value> {
        self.ask("/api/v1/agents", &[]).await
    }

    /// Every agent.
    pub async fn agents(&self, json: bool) -> anyhow::Result<()> {
        let answer = self.ask("/api/v1/agents", &[]).await?;
        if json {
            return print_json(&answer);
        }
        let rows: Vec<_> = list(&answer, "agents").iter().map(agent_row).collect();
        if rows.is_empty() {
            eprintln!("No agents yet: make a token with `sidewarden-collector token create --workload shop/orders`.");
        }
        let heads = ["WORKLOAD", "INSTANCE", "STATUS", "MODE", "VANTAGE", "VERSION", "FAIL", "UNKNOWN", "PASS"];
        print!("{}", table(&heads, rows));
        Ok(())
    }

    /// Every certificate in use, the first to end first.
    pub async fn certificates(&self, json: bool) -> anyhow::Result<()> {
        let answer = self.ask("/api/v1/certificates", &[]).await?;
        if json {
            return print_json(&answer);
        }
        let rows = list(&answer, "certificates").iter().map(certificate_row);
        print!("{}", table(&["CERTIFICATE", "OF", "ENDS", "LEFT", "RENEWED BY"], rows));
        let page = &answer["page"];
        let from = match page["file"].as_str() {
            Some(file) => format!("of {} from {file}", text(&page["names"])),
            None => "of the collector's own CA".to_owned(),
        };
        println!("{}", clean(&format!("The page shows a certificate {from}, until {}.", time(&page["not_after_us"]))));
        Ok(())
    }

    /// Events, newest last; then what comes, if that is wanted.
    pub async fn events(&self, query: EventsQuery, json: bool) -> anyhow::Result<()> {
        let answer = self.ask("/api/v1/events", &query.pairs()).await?;
        let mut newest = list(&answer, "events").first().map(|event| text(&event["cursor"]));
        list(&answer, "events").iter().rev().for_each(|event| print_event(event, json));
        if !query.follow {
            return Ok(());
        }
        loop {
            tokio::time::sleep(FOLLOW).await;
            let mut pairs = query.pairs();
            pairs.push(("after", newest.clone().unwrap_or_else(|| "0.0".to_owned())));
            let answer = self.ask("/api/v1/events", &pairs).await?;
            for event in list(&answer, "events") {
                print_event(event, json);
                newest = Some(text(&event["cursor"]));
            }
        }
    }

    /// The verdicts of every instance of a workload.
    pub async fn posture(&self, workload: &SpiffeId, json: bool) -> anyhow::Result<()> {
        let answer = self.ask("/api/v1/posture", &[("workload", workload.to_string())]).await?;
        if json {
            return print_json(&answer);
        }
        let instances = list(&answer, "instances");
        anyhow::ensure!(!instances.is_empty(), "no instance of {workload} is known: see `sidewarden-collector agents`");
        for instance in instances {
            println!("{} ({})", first_text(instance, &["/agent/instance", "/instance"]), text(&instance["status"]));
            let rows = list(instance, "findings").iter().map(finding_row).collect::<Vec<_>>();
            println!("{}", table(&["CIS", "VERDICT", "CHECK", "TITLE", "EVIDENCE"], rows));
        }
        Ok(())
    }
}

fn tls_config(pem: &[u8]) -> anyhow::Result<rustls::ClientConfig> {
    let mut roots = RootCertStore::empty();
    for cert in tls::certificates(pem)? {
        roots.add(cert).context("the CA cannot be used")?;
    }
    let names = roots.subjects();
    let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), tls::provider()).build()?;
    let config = rustls::ClientConfig::builder_with_provider(tls::provider()).with_safe_default_protocol_versions()?;
    let config = config.dangerous().with_custom_certificate_verifier(Arc::new(Naming { inner, names }));
    Ok(config.with_no_client_auth())
}

/// rustls' own verifier; the collector is told whose certificates it takes, because the page may have one of another CA.
#[derive(Debug)]
struct Naming {
    inner: Arc<WebPkiServerVerifier>,
    names: Vec<DistinguishedName>,
}

impl ServerCertVerifier for Naming {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.inner.verify_server_cert(leaf, rest, name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        Some(&self.names)
    }
}

fn url_with(url: &str, query: &[(&'static str, String)]) -> anyhow::Result<reqwest::Url> {
    let mut url = reqwest::Url::parse(url).context("--url")?;
    if !query.is_empty() {
        url.query_pairs_mut().extend_pairs(query);
    }
    Ok(url)
}

/// Prints an answer for programs.
pub fn print_json(answer: &Value) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(answer)?);
    Ok(())
}

/// The list `name` of an answer, or the answer itself where it is one.
pub fn list<'a>(answer: &'a Value, name: &str) -> &'a [Value] {
    answer.get(name).unwrap_or(answer).as_array().map_or(&[], Vec::as_slice)
}

/// A value as a person reads it.
pub fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn first_text(value: &Value, pointers: &[&str]) -> String {
    pointers.iter().find_map(|p| value.pointer(p)).map(text).unwrap_or_default()
}

fn time(micros: &Value) -> String {
    Timestamp(micros.as_i64().unwrap_or(0)).to_string()
}

fn certificate_row(one: &Value) -> Vec<String> {
    let (begins, ends) = (one["not_before_us"].as_i64().unwrap_or(0), one["not_after_us"].as_i64().unwrap_or(0));
    let left = match begins {
        0 => "not known".to_owned(),
        _ => format!("{} %", (100 * (ends - Timestamp::now().0)).checked_div(ends - begins).unwrap_or(0).clamp(0, 100)),
    };
    let by = if one["elsewhere"] == true { "somebody else" } else { "Sidewarden" };
    vec![text(&one["what"]).replace('_', " "), text(&one["name"]), time(&one["not_after_us"]), left, by.to_owned()]
}

fn agent_row(agent: &Value) -> Vec<String> {
    let count = |word: &str| first_text(agent, &[&format!("/posture/{word}"), &format!("/counts/{word}")]);
    vec![
        first_text(agent, &["/agent/workload", "/workload"]),
        first_text(agent, &["/agent/instance", "/instance"]),
        text(&agent["status"]),
        text(&agent["mode"]),
        text(&agent["vantage"]),
        text(&agent["version"]),
        count("fail"),
        count("unknown"),
        count("pass"),
    ]
}

fn finding_row(standing: &Value) -> Vec<String> {
    let finding = standing.get("finding").unwrap_or(standing);
    let evidence = finding.pointer("/evidence/0/line").map(text).or_else(|| finding.get("grant").map(text));
    vec![
        first_text(finding, &["/ids/v1_3_1"]),
        verdict(finding),
        text(&finding["check"]),
        text(&finding["title"]),
        evidence.unwrap_or_default().chars().take(100).collect(),
    ]
}

/// The verdict as a person reads it: what is waived is broken, and by whose word it may be.
fn verdict(finding: &Value) -> String {
    match finding["verdict"].as_str() {
        Some("waived") => {
            let until = finding["until"].as_i64().map(|us| Timestamp(us).to_string()).unwrap_or_default();
            format!("FAIL (waived by {} until {until})", text(&finding["by"]))
        }
        _ => text(&finding["verdict"]).to_uppercase(),
    }
}

fn print_event(event: &Value, json: bool) {
    if json {
        return println!("{event}");
    }
    let at = event["at_us"].as_i64().map(|us| Timestamp(us).to_string()).unwrap_or_default();
    let workload = first_text(event, &["/agent/workload"]);
    let path = workload.strip_prefix("spiffe://").and_then(|rest| rest.split_once('/')).map_or("", |(_, path)| path);
    let (severity, kind) = (text(&event["severity"]), text(&event["kind"]));
    let line = format!("{at}  {severity:<8}  {kind:<22}  {path}  {}", text(&event["summary"]));
    println!("{}", clean(&line));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_may_be_written_short() {
        let domain: TrustDomain = "x.example".parse().unwrap();
        assert_eq!(workload("shop/web", &domain).unwrap().as_str(), "spiffe://x.example/shop/web");
        assert_eq!(workload("spiffe://x.example/shop/web", &domain).unwrap().path(), "shop/web");
        assert!(workload("shop//web", &domain).is_err());
        assert_eq!(path_in("spiffe://x.example/shop/*", &domain).unwrap(), "shop/*");
        assert!(path_in("spiffe://other/shop/*", &domain).is_err());
    }

    #[test]
    fn queries_are_escaped() {
        let url = url_with("https://c:1/api", &[("kind", "a&b=c".into())]).unwrap();
        assert_eq!(url.as_str(), "https://c:1/api?kind=a%26b%3Dc");
    }
}
