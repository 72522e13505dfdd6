//! Alerts pushed to one member of an Alertmanager cluster, by its API v2.
//!
//! Alertmanager keeps an alert alive as long as it is told again, so everything that stands is sent every minute with an
//! end four intervals ahead: if the collector dies, its alerts end by themselves, and what watches the collector fires.
//! What has ended goes on being sent as ended, since a member that restarts may have missed it.

use std::collections::BTreeMap;
use std::time::Duration;

use reqwest::{Client, Url};
use serde::Serialize;
use sidewarden_proto::time::Timestamp;

use super::config::{boxed, link, name_of, post, runbook};
use super::{Alert, Delivery, Labels, Notice, Sink, Status, rule};

/// Alerts of one request.
const CHUNK: usize = 500;
/// Intervals without news after which Alertmanager may take an alert for ended.
const LIVES_FOR: u32 = 4;

/// The sink.
pub struct Alertmanager {
    name: String,
    client: Client,
    url: Url,
    resend: Duration,
}

#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Posted {
    labels: Labels,
    annotations: BTreeMap<&'static str, String>,
    starts_at: String,
    ends_at: String,
    #[serde(rename = "generatorURL", skip_serializing_if = "String::is_empty")]
    generator_url: String,
}

impl Alertmanager {
    /// The member at `base`, for example `http://alertmanager:9093`.
    pub fn new(client: Client, base: Url, resend: Duration) -> Alertmanager {
        let mut url = base.clone();
        url.set_path(&format!("{}/api/v2/alerts", base.path().trim_end_matches('/')));
        Alertmanager { name: name_of("alertmanager", &base), client, url, resend }
    }

    fn posted(&self, notice: &Notice, alert: &Alert) -> Posted {
        let ends = alert.ended.unwrap_or_else(|| notice.at.plus(self.resend * LIVES_FOR));
        Posted {
            labels: alert.labels(),
            annotations: annotations(notice, alert),
            // Zero length would be refused.
            starts_at: rfc3339(alert.since),
            ends_at: rfc3339(ends.max(alert.since.plus(Duration::from_millis(1)))),
            generator_url: link(notice, alert),
        }
    }
}

impl Sink for Alertmanager {
    fn name(&self) -> &str {
        &self.name
    }

    fn wants_repeats(&self) -> bool {
        true
    }

    fn deliver<'a>(&'a self, notice: &'a Notice) -> Delivery<'a> {
        boxed(async move {
            for chunk in notice.alerts.chunks(CHUNK) {
                let told = chunk.iter().filter(|alert| alert.status != Status::Pending);
                let posted: Vec<Posted> = told.map(|alert| self.posted(notice, alert)).collect();
                post(self.client.post(self.url.clone()).json(&posted)).await?;
            }
            Ok(())
        })
    }
}

fn annotations(notice: &Notice, alert: &Alert) -> BTreeMap<&'static str, String> {
    let all = [
        ("summary", alert.summary()),
        ("description", rule::by_name(alert.rule).map_or("", |rule| rule.meaning).to_owned()),
        ("what_to_do", alert.what_to_do.clone()),
        ("evidence", alert.evidence.join("\n")),
        ("source", alert.sources.join(", ")),
        ("count", alert.count.to_string()),
        ("last_seen", alert.last.to_string()),
        ("runbook_url", runbook(notice, alert)),
    ];
    all.into_iter().filter(|(_, text)| !text.is_empty()).collect()
}

fn rfc3339(at: Timestamp) -> String {
    at.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alert::engine::{Engine, Settings};
    use crate::alert::rule::{Case, Subject, by_name};

    fn alert(ended: bool) -> Alert {
        let mut engine = Engine::new(Settings::default());
        let case = Case {
            subject: Some(Subject { workload: "spiffe://x.test/shop/orders".into(), instance: "orders-1".into() }),
            apart: Some(("reason", "plaintext".into())),
            severity: None,
            due: None,
            what: "plaintext was refused at 0.0.0.0:8443".into(),
            source: "172.18.0.1".into(),
            evidence: vec!["detail: GET /".into()],
            what_to_do: "find the client".into(),
            count: 1,
        };
        engine.raise(by_name("PlaintextRefused").unwrap(), case, Timestamp::from_secs(100));
        engine.settle(Timestamp::from_secs(if ended { 1000 } else { 101 }), |_| true);
        engine.alerts().next().unwrap().clone()
    }

    fn posted(alert: &Alert) -> serde_json::Value {
        let url = "http://am:9093/prefix/".parse().unwrap();
        let sink = Alertmanager::new(
            Client::builder().no_proxy().tls_backend_preconfigured(tls()).build().unwrap(),
            url,
            Duration::from_secs(60),
        );
        assert_eq!(sink.url.as_str(), "http://am:9093/prefix/api/v2/alerts");
        let notice = Notice { at: Timestamp::from_secs(1000), alerts: vec![], page: "https://c:7444/".into() };
        serde_json::to_value(sink.posted(&notice, alert)).unwrap()
    }

    fn tls() -> rustls::ClientConfig {
        rustls::ClientConfig::builder_with_provider(sidewarden_proto::tls::provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth()
    }

    #[test]
    fn a_firing_alert_lives_for_four_intervals() {
        let json = posted(&alert(false));
        assert_eq!(json["startsAt"], "1970-01-01T00:01:40.000Z");
        assert_eq!(json["endsAt"], "1970-01-01T00:20:40.000Z");
        assert_eq!(json["labels"]["alertname"], "PlaintextRefused");
        assert_eq!(json["labels"]["workload"], "spiffe://x.test/shop/orders");
        assert!(json["generatorURL"].as_str().unwrap().starts_with("https://c:7444/#/alerts/"));
    }

    #[test]
    fn a_resolved_alert_has_ended_when_it_ended() {
        assert_eq!(posted(&alert(true))["endsAt"], "1970-01-01T00:16:40.000Z");
    }

    #[test]
    fn what_changes_is_told_in_annotations_and_never_in_labels() {
        let json = posted(&alert(false));
        let labels = json["labels"].as_object().unwrap();
        assert_eq!(labels.keys().collect::<Vec<_>>(), ["alertname", "instance", "reason", "severity", "workload"]);
        for name in ["summary", "description", "what_to_do", "evidence", "source", "runbook_url"] {
            assert!(!json["annotations"][name].as_str().unwrap_or_default().is_empty(), "{name}");
        }
    }
}
