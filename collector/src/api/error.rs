//! What a client of the API is told when something is wrong: one short line, and what to do. The log has the rest.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

/// An answer that is no answer.
#[derive(Debug, PartialEq, Eq)]
pub struct ApiError {
    status: StatusCode,
    error: String,
    hint: String,
    retry_after: Option<u64>,
}

#[derive(Serialize)]
struct Shown<'a> {
    error: &'a str,
    hint: &'a str,
}

impl ApiError {
    fn new(status: StatusCode, error: impl Into<String>, hint: impl Into<String>) -> ApiError {
        ApiError { status, error: error.into(), hint: hint.into(), retry_after: None }
    }

    /// The request is wrong.
    pub fn bad_request(error: impl Into<String>, hint: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, error, hint)
    }

    /// No token, or a wrong one.
    pub fn unauthorized(error: &str) -> ApiError {
        let hint = "send `Authorization: Bearer <token>`; the token is in <data_dir>/admin.token on the collector";
        ApiError::new(StatusCode::UNAUTHORIZED, error, hint)
    }

    /// Too many wrong tokens.
    pub fn wait(seconds: u64) -> ApiError {
        let mut error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, "too many wrong tokens", "wait, then try again");
        error.retry_after = Some(seconds.max(1));
        error
    }

    /// There is no such thing.
    pub fn not_found(error: impl Into<String>, hint: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::NOT_FOUND, error, hint)
    }

    /// It must be confirmed, or stands against what is already so.
    pub fn conflict(error: impl Into<String>, hint: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::CONFLICT, error, hint)
    }

    /// It is too large.
    pub fn large(error: impl Into<String>, hint: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, error, hint)
    }

    /// Whoever asks has the token, and still may not.
    pub fn forbidden(error: impl Into<String>, hint: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::FORBIDDEN, error, hint)
    }

    /// Not by this method.
    pub fn method() -> ApiError {
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "this path does not take that method", "see /api/v1/openapi.json")
    }

    /// There are too many of something.
    pub fn busy(error: &str) -> ApiError {
        let mut error = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, error, "try again in a moment");
        error.retry_after = Some(5);
        error
    }

    /// Our own fault; `cause` goes to the log, not to the client.
    pub fn internal(doing: &str, cause: &dyn std::fmt::Display) -> ApiError {
        tracing::error!(doing, error = %cause, "an API request failed");
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, format!("{doing} failed"), "the collector's log says why")
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(Shown { error: &self.error, hint: &self.hint })).into_response();
        let headers = response.headers_mut();
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"sidewarden\""));
        }
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
