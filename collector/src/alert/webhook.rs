//! Alerts posted as JSON to any HTTP receiver: what changed, when it changed.
//!
//! ```json
//! {"version": 1, "at_us": 1700000000000000, "page": "https://…/", "alerts": [{"alert": "RootExec", "status": "firing", …}]}
//! ```
//! Each alert has the form that `GET /api/v1/alerts` shows. A bearer token, if configured, tells the receiver who posts.

use reqwest::{Client, Url};
use serde::Serialize;
use sidewarden_proto::secret::Secret;
use sidewarden_proto::time::Timestamp;

use super::config::{boxed, name_of, post};
use super::{Delivery, Notice, Sink, View};

/// The sink.
pub struct Webhook {
    name: String,
    client: Client,
    url: Url,
    token: Option<Secret>,
}

#[derive(Serialize)]
struct Message<'a> {
    version: u32,
    at_us: Timestamp,
    page: &'a str,
    alerts: Vec<View>,
}

impl Webhook {
    /// A webhook at `url`.
    pub fn new(client: Client, url: Url, token: Option<Secret>) -> Webhook {
        Webhook { name: name_of("webhook", &url), client, url, token }
    }
}

impl Sink for Webhook {
    fn name(&self) -> &str {
        &self.name
    }

    fn deliver<'a>(&'a self, notice: &'a Notice) -> Delivery<'a> {
        let alerts = notice.alerts.iter().map(View::from).collect();
        let request = self.client.post(self.url.clone()).json(&Message {
            version: 1,
            at_us: notice.at,
            page: &notice.page,
            alerts,
        });
        boxed(post(match &self.token {
            Some(token) => request.bearer_auth(token.reveal()),
            None => request,
        }))
    }
}
