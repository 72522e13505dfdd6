//! The collector's HTTPS API, for the page, the command line and other programs.
//!
//! One table (`routes`) says what there is; here is what each route does. Everything but `/healthz` and the page itself
//! wants a bearer token. There is no CORS: a page of another origin can ask nothing, and since it has no token and we set no
//! cookie, it can do nothing either. Every change is one event with who, from where and why.

pub mod answers;
pub mod auth;
mod certificates;
mod error;
pub mod events;
mod evidence;
mod policies;
mod reports;
mod revocations;
pub mod routes;
pub mod serve;
mod waivers;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::{DefaultBodyLimit, Query, Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use sidewarden_proto::secret::Secret;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::alert::{Alert, Alerts, Status as AlertStatus, View, rule};
use crate::app::Core;
use crate::page;
use auth::{Failures, Refused};
use error::ApiError;
use events::{Asked, Events};
use routes::{Access, Operation, ROUTES};
use serve::{Door, Source};

/// Streams at a time: each is a connection and a queue.
const MAX_STREAMS: usize = 64;

/// Most bytes of what a POST carries.
const MAX_BODY: usize = 1 << 20;

/// Sent with every answer. Trusted types make it an error for the page to turn text into markup.
const SECURITY: [(HeaderName, &str); 7] = [
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
         require-trusted-types-for 'script'; trusted-types 'none'",
    ),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::STRICT_TRANSPORT_SECURITY, "max-age=31536000"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
];

/// What the handlers share.
struct Api {
    core: Core,
    alerts: Alerts,
    token: Secret,
    failures: Mutex<Failures>,
    streams: Arc<Semaphore>,
}

/// Opens the listener and serves until the shutdown; where it listens.
pub async fn start(core: &Core, alerts: Alerts) -> anyhow::Result<SocketAddr> {
    let token = auth::admin_token(&core.config.data_dir.join("admin.token"))?;
    let listen = core.config.api.listen;
    let listener = TcpListener::bind(listen).await.map_err(|error| {
        let hint = crate::ingest::bind_hint(&error);
        anyhow::anyhow!("api.listen {listen}: {error}{hint}")
    })?;
    let address = listener.local_addr()?;
    let door = Door {
        listener,
        shown: Some(core.identities.page()),
        router: router(core.clone(), alerts, token),
        shutdown: core.shutdown.clone(),
    };
    core.tasks.spawn(serve::serve(door));
    Ok(address)
}

fn router(core: Core, alerts: Alerts, token: Secret) -> Router {
    let streams = Arc::new(Semaphore::new(MAX_STREAMS));
    let api = Arc::new(Api { core, alerts, token, failures: Mutex::default(), streams });
    let mut router = page::router();
    for route in ROUTES {
        let mut handler = handler(route.operation);
        if route.access == Access::Token {
            handler = handler.layer(middleware::from_fn_with_state(api.clone(), require_token));
        }
        router = router.route(route.path, handler);
    }
    router
        .fallback(|| async { ApiError::not_found("there is nothing here", "see /api/v1/openapi.json") })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .method_not_allowed_fallback(|| async { ApiError::method() })
        .layer(middleware::map_response(secured))
        .with_state(api)
}

fn handler(operation: Operation) -> MethodRouter<Arc<Api>> {
    match operation {
        Operation::Health => get(health),
        Operation::Status => get(status),
        Operation::Workloads => get(workloads),
        Operation::Agents => get(agents),
        Operation::Posture => get(posture),
        Operation::Events => get(past),
        Operation::Stream => get(stream),
        Operation::Alerts => get(alerts),
        Operation::Rules => get(rules),
        Operation::Certificates => get(certificates::list),
        Operation::Revocations => get(revocations::list),
        Operation::Revoke => post(revocations::revoke),
        Operation::Unrevoke => post(revocations::undo),
        Operation::Quarantine => get(policies::quarantine),
        Operation::Release => post(policies::release),
        Operation::Policy => get(policies::policy),
        Operation::ApplyPolicy => post(policies::apply),
        Operation::PolicyHistory => get(policies::history),
        Operation::RollBackPolicy => post(policies::roll_back),
        Operation::ComparePolicy => post(policies::compare),
        Operation::Evidence => get(evidence::list),
        Operation::AddScan => post(evidence::add_scan),
        Operation::AddAttestation => post(evidence::add_attestation),
        Operation::RemoveAttestation => post(evidence::remove_attestation),
        Operation::Report => get(reports::report),
        Operation::History => get(reports::history),
        Operation::Waivers => get(waivers::list),
        Operation::SetWaiver => post(waivers::set),
        Operation::RemoveWaiver => post(waivers::remove),
        Operation::OpenApi => get(|| async { Json(routes::openapi()) }),
    }
}

async fn require_token(State(api): State<Arc<Api>>, request: Request, next: Next) -> Result<Response, ApiError> {
    let header = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let shown = auth::bearer(header);
    if shown.is_some_and(|token| api.token.matches(token)) {
        let mut response = next.run(request).await;
        response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        return Ok(response);
    }
    let source = request.extensions().get::<Source>().map(|source| source.0);
    Err(refuse(&api, source, request.uri().path(), shown.is_some()))
}

fn refuse(api: &Api, source: Option<SocketAddr>, path: &str, shown: bool) -> ApiError {
    let missing = ApiError::unauthorized("a token is needed");
    let (Some(source), true) = (source, shown) else { return missing };
    let now = (api.core.clock)();
    let refused = api.failures.lock().unwrap_or_else(PoisonError::into_inner).failed(source.ip(), now);
    match refused {
        Refused::Wrong => {
            tracing::warn!(%source, path, "a wrong API token was shown");
            ApiError::unauthorized("the token is wrong")
        }
        Refused::Wait(time, tell) => {
            if tell {
                tracing::warn!(%source, path, "many wrong API tokens: further ones of this minute are not logged");
            }
            ApiError::wait(time.as_secs())
        }
    }
}

async fn secured(mut response: Response) -> Response {
    for (name, value) in SECURITY {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

async fn health(State(api): State<Arc<Api>>) -> Response {
    if api.core.commits.stats().store_up.get() == 1 {
        return Json(json!({"status": "ok"})).into_response();
    }
    let answer = json!({"status": "the store refuses events", "hint": "the collector's log says why"});
    (StatusCode::SERVICE_UNAVAILABLE, Json(answer)).into_response()
}

async fn status(State(api): State<Arc<Api>>) -> Json<Value> {
    let core = &api.core;
    let now = (core.clock)();
    let own = core.issuer.authority().own();
    let not_after = own.borrow().peer().not_after;
    let stats = core.commits.stats();
    let shown = api.alerts.shown();
    let state = core.commits.state();
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "trust_domain": core.config.trust_domain,
        "names": core.config.api.names,
        "now_us": now,
        "started_us": state.started,
        "agents": answers::presence(&state, now),
        "alerts": {"firing": shown.iter().filter(|alert| alert.status == AlertStatus::Firing).count()},
        "log": {"position": state.position, "bytes": stats.log_bytes.get()},
        "store_up": stats.store_up.get() == 1,
        "events": state.totals.events.values().flatten().sum::<u64>(),
        "certificate": {"not_after_us": not_after},
        "policy": policies::in_force(core),
    }))
}

async fn workloads(State(api): State<Arc<Api>>) -> Json<Value> {
    let (now, shown) = ((api.core.clock)(), api.alerts.shown());
    let views = answers::workloads(&api.core.commits.state(), &api.core.config.evidence, &shown, now);
    Json(json!({"workloads": views}))
}

async fn agents(State(api): State<Arc<Api>>) -> Json<Value> {
    let views = answers::agents(&api.core.commits.state(), &api.core.config.evidence, (api.core.clock)());
    Json(json!({"agents": views}))
}

type Pairs = Query<Vec<(String, String)>>;

fn asked(operation: Operation, Query(pairs): Pairs) -> Result<Asked, ApiError> {
    let route = ROUTES.iter().find(|route| route.operation == operation);
    Asked::new(pairs, route.map_or(&[], |route| route.parameters))
}

async fn posture(State(api): State<Arc<Api>>, pairs: Pairs) -> Result<Json<Value>, ApiError> {
    let asked = asked(Operation::Posture, pairs)?;
    let hint = "workload must be a SPIFFE ID, as /api/v1/workloads shows it";
    let workload = asked.value("workload").ok_or_else(|| ApiError::bad_request("workload is missing", hint))?;
    let now = (api.core.clock)();
    let (state, evidence) = (api.core.commits.state(), &api.core.config.evidence);
    let instances = answers::posture(&state, evidence, workload, asked.value("instance"), now);
    if instances.is_empty() {
        return Err(ApiError::not_found("no such workload or instance is known", hint));
    }
    let guards = answers::guards_against(&instances);
    Ok(Json(json!({"instances": instances, "guards_against": guards})))
}

async fn past(State(api): State<Arc<Api>>, pairs: Pairs) -> Result<Json<Events>, ApiError> {
    let query = asked(Operation::Events, pairs)?.query()?;
    let failed = |error| ApiError::internal("reading events", &error);
    let answer = api.core.index.query(query).await.map_err(failed)?;
    Ok(Json(Events { events: answer.events, next: answer.next }))
}

async fn stream(State(api): State<Arc<Api>>, pairs: Pairs) -> Result<Response, ApiError> {
    let query = asked(Operation::Stream, pairs)?.query()?;
    let permit = api.streams.clone().try_acquire_owned();
    let permit = permit.map_err(|_| ApiError::busy("too many streams are open"))?;
    let shutdown = api.core.shutdown.clone().cancelled_owned();
    Ok(events::stream(query, api.core.commits.subscribe(), permit, shutdown))
}

async fn alerts(State(api): State<Arc<Api>>) -> Json<Value> {
    let shown = api.alerts.shown();
    let mut sorted: Vec<&Alert> = shown.iter().collect();
    sorted.sort_by_key(|alert| (place(alert.status), std::cmp::Reverse((alert.severity, alert.last))));
    Json(json!({"alerts": sorted.into_iter().map(View::from).collect::<Vec<_>>()}))
}

fn place(status: AlertStatus) -> u8 {
    match status {
        AlertStatus::Firing => 0,
        AlertStatus::Pending => 1,
        AlertStatus::Resolved => 2,
    }
}

async fn rules() -> Json<Value> {
    let rules = rule::RULES.iter().map(|rule| {
        json!({
            "alert": rule.name,
            "severity": rule.severity,
            "meaning": rule.meaning,
            "what_to_do": rule.what_to_do,
            "kinds": rule.kinds,
            "wait_seconds": rule.wait.as_secs(),
            "ends": match rule.lasts {
                rule::Lasts::InState | rule::Lasts::UntilCleared => "when the condition ends",
                rule::Lasts::Moment => "some minutes after the last occurrence",
            },
        })
    });
    Json(json!({"rules": rules.collect::<Vec<_>>()}))
}
