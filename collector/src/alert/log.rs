//! Alerts in the collector's own log: one line each.

use super::config::boxed;
use super::{Alert, Delivery, Notice, Sink, Status};
use sidewarden_proto::event::Severity;

/// The sink.
pub struct Log;

impl Sink for Log {
    fn name(&self) -> &str {
        "log"
    }

    fn deliver<'a>(&'a self, notice: &'a Notice) -> Delivery<'a> {
        notice.alerts.iter().for_each(write);
        boxed(async { Ok(()) })
    }
}

fn write(alert: &Alert) {
    let (name, severity, summary) = (alert.rule, alert.severity, alert.summary());
    match (alert.status, severity) {
        (Status::Resolved, _) => tracing::info!(alert = name, %severity, summary, "alert resolved"),
        (_, Severity::Critical) => {
            tracing::error!(alert = name, %severity, summary, what_to_do = alert.what_to_do, "alert firing");
        }
        _ => tracing::warn!(alert = name, %severity, summary, what_to_do = alert.what_to_do, "alert firing"),
    }
}
