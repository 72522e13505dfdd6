//! One request for a certificate, one answer, and the connection ends.

use std::net::SocketAddr;
use std::sync::Arc;

use sidewarden_proto::enrol::{Answer, EnrolError, Refused, Request, from_payload, message_length, to_message};
use sidewarden_proto::event::{Body, Event, Severity};
use sidewarden_proto::identity::AgentId;
use sidewarden_proto::time::Timestamp;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::{NO_DIRECTIVE, Shared};
use crate::ca::{Grant, Issuer};
use crate::fleet::{self, Directives};

/// Why there was no request to answer.
#[derive(Debug, thiserror::Error)]
enum NoRequest {
    #[error(transparent)]
    Read(#[from] std::io::Error),
    #[error(transparent)]
    Form(#[from] EnrolError),
}

/// Serves one connection to its end, within the handshake's time limit.
pub async fn serve<S: AsyncRead + AsyncWrite + Unpin>(shared: &Arc<Shared>, source: SocketAddr, mut stream: S) {
    let answer = match timeout(shared.handshake_timeout, read(&mut stream)).await {
        Ok(Ok(request)) => answer(shared, source, request).await,
        Ok(Err(error)) => refused(shared, source, error.to_string()),
        Err(_) => refused(shared, source, "the request did not come in time".to_owned()),
    };
    let _ = timeout(shared.handshake_timeout, async {
        stream.write_all(&to_message(&answer)).await?;
        stream.shutdown().await
    })
    .await;
}

fn refused(shared: &Shared, source: SocketAddr, detail: String) -> Answer {
    shared.refusals.enrolment(source, "bad_request", detail.clone(), String::new());
    Answer::Refused(Refused { reason: "bad_request".into(), detail, retry: false })
}

async fn read<S: AsyncRead + Unpin>(stream: &mut S) -> Result<Request, NoRequest> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).await?;
    let mut payload = vec![0; message_length(prefix)?];
    stream.read_exact(&mut payload).await?;
    Ok(from_payload(&payload)?)
}

async fn answer(shared: &Arc<Shared>, source: SocketAddr, request: Request) -> Answer {
    let (issuer, sessions, directives, now) =
        (shared.issuer.clone(), shared.fleet.clone(), shared.directives.clone(), (shared.clock)());
    let workload = request.workload.as_ref().map(ToString::to_string).unwrap_or_default();
    let decided = tokio::task::spawn_blocking(move || {
        check_directive(&issuer, &directives, &request, now)?;
        // A guest under this name gives way to whoever is enrolled under it.
        let enrolled = |agent: &AgentId| sessions.live(agent).filter(|live| live.begins.is_none());
        let live = |agent: &AgentId| enrolled(agent).map(|live| live.spki);
        let grant = issuer.enrol(&request, &directives.now().directive, &live, now)?;
        fleet::hand_out(&issuer, &directives, grant, now)
    })
    .await;
    match decided {
        Ok(Ok(mut grant)) => {
            tell_issued(shared, &grant).await;
            grant.issued.directive = Some(shared.directives.now().signed.clone());
            Answer::Issued(grant.issued)
        }
        Ok(Err(refusal)) => {
            shared.refusals.enrolment(source, &refusal.reason, refusal.detail.clone(), workload);
            Answer::Refused(refusal)
        }
        Err(error) => {
            tracing::error!(%error, "a request for a certificate could not be answered");
            let detail = "the collector failed: see its log".to_owned();
            Answer::Refused(Refused { reason: "internal".into(), detail, retry: true })
        }
    }
}

/// Who is revoked must be known here, and be told to whoever comes for the first time. One that was issued to before has
/// a directive of its own, and must be able to renew while the collector that makes them is away for long.
fn check_directive(issuer: &Issuer, directives: &Directives, request: &Request, now: Timestamp) -> Result<(), Refused> {
    let is_first = request.previous.is_empty();
    if directives.is_there() && (!is_first || directives.is_fresh(&issuer.authority().trust(), now)) {
        return Ok(());
    }
    Err(Refused { reason: "not_ready".into(), detail: NO_DIRECTIVE.into(), retry: true })
}

/// Tells the log of a certificate.
pub async fn tell_issued(shared: &Shared, grant: &Grant) {
    let by = &grant.event.by;
    let summary = format!("Certificate for {} issued by {by}, until {}", grant.agent, grant.event.not_after_us);
    let event = Event::new((shared.clock)(), Severity::Info, summary, &Body::from(grant.event.clone()));
    if shared.commits.own(event).await.is_err() {
        tracing::debug!("an event came after the store was closed");
    }
}
