//! Every route of the API, once: the router and the OpenAPI document both come from this table.

use serde_json::{Map, Value, json};

/// What a route does; `mod.rs` has a handler for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// The collector answers.
    Health,
    /// Versions, times, counts.
    Status,
    /// All workloads.
    Workloads,
    /// All agents.
    Agents,
    /// The CIS table.
    Posture,
    /// Events of the past.
    Events,
    /// Events of the present.
    Stream,
    /// Alerts.
    Alerts,
    /// What alerts mean.
    Rules,
    /// When certificates end.
    Certificates,
    /// What is revoked.
    Revocations,
    /// Revokes.
    Revoke,
    /// Undoes it.
    Unrevoke,
    /// Who is quarantined.
    Quarantine,
    /// Lets somebody in.
    Release,
    /// The policy.
    Policy,
    /// Puts one in force.
    ApplyPolicy,
    /// The ones before.
    PolicyHistory,
    /// Puts one of them in force again.
    RollBackPolicy,
    /// What another one would change.
    ComparePolicy,
    /// Scans and attestations.
    Evidence,
    /// Takes a scan in.
    AddScan,
    /// Takes an attestation in.
    AddAttestation,
    /// Takes it back.
    RemoveAttestation,
    /// The auditor's table.
    Report,
    /// The score over time.
    History,
    /// Who answers for what is broken.
    Waivers,
    /// Answers for something.
    SetWaiver,
    /// Does so no longer.
    RemoveWaiver,
    /// This table.
    OpenApi,
}

/// Who may ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Anybody.
    Open,
    /// Who shows a token.
    Token,
}

/// A query parameter: its name and what it is.
pub type Parameter = (&'static str, &'static str);

/// One route.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// What it does.
    pub operation: Operation,
    /// The path.
    pub path: &'static str,
    /// One line about it.
    pub summary: &'static str,
    /// Who may ask.
    pub access: Access,
    /// Its query parameters.
    pub parameters: &'static [Parameter],
    /// The JSON it takes; none for a GET, and a POST otherwise.
    pub takes: Option<&'static str>,
}

const FILTERS: [Parameter; 4] = [
    ("kind", "only these kinds, separated by commas"),
    ("workload", "only this SPIFFE ID"),
    ("instance", "only this instance"),
    ("min_severity", "info, notice, warning or critical, and above"),
];

/// All of them.
pub const ROUTES: &[Route] = &[
    Route {
        operation: Operation::Health,
        path: "/healthz",
        summary: "Whether the collector takes events; 503 when its store refuses them.",
        access: Access::Open,
        parameters: &[],
        takes: None,
    },
    Route {
        operation: Operation::Status,
        path: "/api/v1/status",
        summary: "Version, trust domain, counts of agents and alerts, the log's size.",
        access: Access::Token,
        parameters: &[],
        takes: None,
    },
    Route {
        operation: Operation::Workloads,
        path: "/api/v1/workloads",
        summary: "Every workload with its instances, posture counts and firing alerts, the troubled first.",
        access: Access::Token,
        parameters: &[],
        takes: None,
    },
    Route {
        operation: Operation::Agents,
        path: "/api/v1/agents",
        summary: "Every agent: version, presence, session, certificate, peers, refusals, losses.",
        access: Access::Token,
        parameters: &[],
        takes: None,
    },
    Route {
        operation: Operation::Posture,
        path: "/api/v1/posture",
        summary: "The CIS table of a workload's instances: every check with verdict, evidence and remedy, and what each guards against.",
        access: Access::Token,
        parameters: &[("workload", "its SPIFFE ID; required"), ("instance", "only this instance")],
        takes: None,
    },
    Route {
        operation: Operation::Events,
        path: "/api/v1/events",
        summary: "Events, newest first; oldest first after a cursor.",
        access: Access::Token,
        parameters: &[
            FILTERS[0],
            FILTERS[1],
            FILTERS[2],
            FILTERS[3],
            ("since", "not before this time, RFC 3339 or microseconds since 1970"),
            ("until", "before this time"),
            ("before", "go on here, newest first: `next` of the answer before"),
            ("after", "only what was taken after this cursor, oldest first"),
            ("limit", "at most this many, 1 to 1000; 100 if not given"),
        ],
        takes: None,
    },
    Route {
        operation: Operation::Stream,
        path: "/api/v1/events/stream",
        summary: "Events as they are committed (text/event-stream); `skipped` tells what a slow client lost.",
        access: Access::Token,
        parameters: &FILTERS,
        takes: None,
    },
    Route {
        operation: Operation::Alerts,
        path: "/api/v1/alerts",
        summary: "Alerts that fire, are pending, or ended a few minutes ago; worst first.",
        access: Access::Token,
        parameters: &[],
        takes: None,
    },
    Route {
        operation: Operation::Rules,
        path: "/api/v1/rules",
        summary: "Every alert rule: what it means and what to do.",
        access: Access::Token,
        parameters: &[],
        takes: None,
    },
    Route {
        operation: Operation::Certificates,
        path: "/api/v1/certificates",
        summary: "Every certificate in use and when it ends, the first one first; and which one the page shows.",
        access: Access::Token,
        parameters: &[],
        takes: None,
    },
    Route {
        operation: Operation::Revocations,
        path: "/api/v1/revocations",
        summary: "What is revoked, and which agents know of it.",
        access: Access::Token,
        parameters: &[],
        takes: None,
    },
    Route {
        operation: Operation::Revoke,
        path: "/api/v1/revocations/revoke",
        summary: "Revokes; 409 with the consequences when they must be confirmed.",
        access: Access::Token,
        parameters: &[],
        takes: Some(
            "{what, why, by, confirmed}; what: {by: serial, serial}, {by: workload, id}, {by: instance, workload, instance}, {by: key, spki} or {by: issuing_key, spki}",
        ),
    },
    Route {
        operation: Operation::Unrevoke,
        path: "/api/v1/revocations/undo",
        summary: "Undoes a revocation.",
        access: Access::Token,
        parameters: &[],
        takes: Some("{id, why, by}"),
    },
    Route {
        operation: Operation::Quarantine,
        path: "/api/v1/quarantine",
        summary: "Who is quarantined by a gate of the policy, who would be, and who was let in by an operator.",
        access: Access::Token,
        parameters: &[],
        takes: None,
    },
    Route {
        operation: Operation::Release,
        path: "/api/v1/quarantine/release",
        summary: "Lets an instance in for a while, whatever gates say.",
        access: Access::Token,
        parameters: &[],
        takes: Some("{workload, instance, seconds, why, by}"),
    },
    Route {
        operation: Operation::Policy,
        path: "/api/v1/policy",
        summary: "The policy in force, or an earlier one, and which agents run the newest directive.",
        access: Access::Token,
        parameters: &[("version", "an earlier version rather than the one in force")],
        takes: None,
    },
    Route {
        operation: Operation::ApplyPolicy,
        path: "/api/v1/policy/apply",
        summary: "Puts a policy in force; 400 with everything that is wrong with it.",
        access: Access::Token,
        parameters: &[],
        takes: Some("{text, why, by, confirmed}; text: the document, TOML"),
    },
    Route {
        operation: Operation::PolicyHistory,
        path: "/api/v1/policy/history",
        summary: "Every policy so far: when, by whom, and why.",
        access: Access::Token,
        parameters: &[],
        takes: None,
    },
    Route {
        operation: Operation::RollBackPolicy,
        path: "/api/v1/policy/rollback",
        summary: "Puts an earlier policy in force again, as a new version.",
        access: Access::Token,
        parameters: &[],
        takes: Some("{version, why, by, confirmed}; version: the one before the one in force, if left out"),
    },
    Route {
        operation: Operation::ComparePolicy,
        path: "/api/v1/policy/compare",
        summary: "What a policy would change: by its lines, and for whoever was seen talking to whom. Changes nothing.",
        access: Access::Token,
        parameters: &[],
        takes: Some("{text}"),
    },
    Route {
        operation: Operation::Evidence,
        path: "/api/v1/evidence",
        summary: "What scanners found in images, and what people attest.",
        access: Access::Token,
        parameters: &[],
        takes: None,
    },
    Route {
        operation: Operation::AddScan,
        path: "/api/v1/evidence/trivy",
        summary: "Takes in a report of Trivy about an image; 413 beyond 64 MiB, 409 for one older than what is there.",
        access: Access::Token,
        parameters: &[("by", "who brings it")],
        takes: Some("what `trivy image --format json` writes"),
    },
    Route {
        operation: Operation::AddAttestation,
        path: "/api/v1/evidence/attestation",
        summary: "Takes in a signed attestation; 403 unless a key of `evidence.attestor` signed it.",
        access: Access::Token,
        parameters: &[],
        takes: Some("a DSSE envelope with a payload of application/vnd.sidewarden.attestation+json"),
    },
    Route {
        operation: Operation::RemoveAttestation,
        path: "/api/v1/evidence/attestation/remove",
        summary: "Takes an attestation back: what it was about is unknown again.",
        access: Access::Token,
        parameters: &[],
        takes: Some("{check, workload, container, why, by}"),
    },
    Route {
        operation: Operation::Report,
        path: "/api/v1/report",
        summary: "The auditor's table (reference, description, status) now or at a past moment, and what changed since another.",
        access: Access::Token,
        parameters: &[
            ("workload", "shop/orders, shop/*, or a SPIFFE ID; the whole fleet if not given"),
            ("instance", "only this instance"),
            ("at", "the moment to show, RFC 3339 or microseconds since 1970; now if not given"),
            ("since", "a moment before: tells what changed between the two"),
            ("numbering", "1.3.1 or 1.6; 1.3.1 if not given"),
            ("format", "json, text, csv or html (one file, prints well); json if not given"),
            ("detail", "table: as JSON, the table without each subject"),
        ],
        takes: None,
    },
    Route {
        operation: Operation::History,
        path: "/api/v1/report/history",
        summary: "The score over time: of all verdicts that apply, how many percent pass.",
        access: Access::Token,
        parameters: &[
            ("workload", "shop/orders, shop/*, or a SPIFFE ID; the whole fleet if not given"),
            ("since", "the first moment, RFC 3339 or microseconds since 1970; a week ago if not given"),
            ("until", "the last moment; now if not given"),
            ("points", "how many moments, 2 to 60; 15 if not given"),
        ],
        takes: None,
    },
    Route {
        operation: Operation::Waivers,
        path: "/api/v1/waivers",
        summary: "Who answers for broken rules, until when, and how many failures each waiver covers now.",
        access: Access::Token,
        parameters: &[],
        takes: None,
    },
    Route {
        operation: Operation::SetWaiver,
        path: "/api/v1/waivers/set",
        summary: "Waives a check of some workloads until a moment; takes the place of a waiver of the same.",
        access: Access::Token,
        parameters: &[],
        takes: Some("{check, workload, container, why, by, until_us}; workload: shop/orders, shop/* or *"),
    },
    Route {
        operation: Operation::RemoveWaiver,
        path: "/api/v1/waivers/remove",
        summary: "Removes a waiver: what it covered is a failure again.",
        access: Access::Token,
        parameters: &[],
        takes: Some("{check, workload, container, why, by}"),
    },
    Route {
        operation: Operation::OpenApi,
        path: "/api/v1/openapi.json",
        summary: "This document.",
        access: Access::Token,
        parameters: &[],
        takes: None,
    },
];

/// The table as an OpenAPI document.
pub fn openapi() -> Value {
    let paths: Map<String, Value> = ROUTES.iter().map(|route| (route.path.to_owned(), path_item(route))).collect();
    json!({
        "openapi": "3.1.0",
        "info": {"title": "Sidewarden collector", "version": env!("CARGO_PKG_VERSION")},
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": {
                "type": "object",
                "required": ["error", "hint"],
                "properties": {"error": {"type": "string"}, "hint": {"type": "string"}},
            }},
        },
        "paths": paths,
    })
}

fn path_item(route: &Route) -> Value {
    let parameters: Vec<Value> = route
        .parameters
        .iter()
        .map(|(name, what)| {
            let required = what.ends_with("required");
            json!({"name": name, "in": "query", "required": required, "description": what, "schema": {"type": "string"}})
        })
        .collect();
    let form = if route.operation == Operation::Stream { "text/event-stream" } else { "application/json" };
    let error = json!({"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}});
    let security = match route.access {
        Access::Open => json!([]),
        Access::Token => json!([{"token": []}]),
    };
    let mut item = json!({
        "summary": route.summary,
        "parameters": parameters,
        "security": security,
        "responses": {
            "200": {"description": "the answer", "content": {form: {}}},
            "default": {"description": "what is wrong, and what to do", "content": error},
        },
    });
    if let Some(takes) = route.takes {
        item["requestBody"] = json!({"required": true, "description": takes, "content": {"application/json": {}}});
    }
    json!({route.method(): item})
}

impl Route {
    /// The method, as OpenAPI writes it.
    pub const fn method(&self) -> &'static str {
        if self.takes.is_some() { "post" } else { "get" }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_stands_in_the_document_once() {
        let document = openapi();
        assert_eq!(document["paths"].as_object().unwrap().len(), ROUTES.len());
        for route in ROUTES {
            assert_eq!(document["paths"][route.path][route.method()]["summary"], route.summary);
        }
    }

    #[test]
    fn only_health_is_open() {
        let open: Vec<&str> = ROUTES.iter().filter(|r| r.access == Access::Open).map(|r| r.path).collect();
        assert_eq!(open, ["/healthz"]);
    }
}
