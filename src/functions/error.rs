//! Errors → HTTP: the only place that maps, in the form of RFC 9457 (`application/problem+json`).
//!
//! Must not be given secrets or payloads. Invariant: 400 means "not a request this function understands", 404 "there is
//! no such thing", 503 "nobody could tell", 500 "a bug".

use actix_web::{
    HttpResponse, HttpResponseBuilder,
    http::{StatusCode, header},
};
use serde::Serialize;

use crate::cache::{Failure, Undelivered};

/// Seconds after which a caller may try again. Long enough for a failover's first steps, short enough to be useful.
const RETRY_AFTER_S: u64 = 5;

/// Why a request is not answered as asked, by what the caller can do about it.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// Correct the request.
    #[error("{0}")]
    BadRequest(String),
    /// Ask for something else.
    #[error("{0}")]
    NotFound(String),
    /// Use one of these methods.
    #[error("use {}", .0.join(", "))]
    MethodNotAllowed(&'static [&'static str]),
    /// Fetch the current version first.
    #[error("the product is another version than If-Match names")]
    PreconditionFailed,
    /// Send less.
    #[error("the body is larger than INVALIDATE_MAX_BODY_BYTES, {0} bytes")]
    TooLarge(usize),
    /// Send it faster.
    #[error("the body did not come within INVALIDATE_BUDGET_MS")]
    TooSlow,
    /// Try again later.
    #[error("{0}")]
    Unavailable(&'static str),
    /// Report a bug.
    #[error("{0}")]
    Broken(String),
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        // The cache has logged the cause, which may name things a client need not know.
        match failure {
            Failure::Unavailable(_) => Self::Unavailable("the product could not be looked up; try again later"),
            Failure::Broken(message) => Self::Broken(message),
        }
    }
}

impl From<Undelivered> for Error {
    fn from(_: Undelivered) -> Self {
        Self::Unavailable("redis could not be told of the change; it stays queued, and a redelivery is welcome")
    }
}

impl Error {
    fn status(&self) -> StatusCode {
        match self {
            Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed(_) => StatusCode::METHOD_NOT_ALLOWED,
            Self::PreconditionFailed => StatusCode::PRECONDITION_FAILED,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::TooSlow => StatusCode::REQUEST_TIMEOUT,
            Self::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Broken(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The response; `invocation` is the host's id of the request.
    pub(super) fn response(&self, invocation: Option<&str>) -> HttpResponse {
        #[derive(Serialize)]
        struct Problem<'a> {
            #[serde(rename = "type")]
            kind: &'static str,
            title: &'static str,
            status: u16,
            #[serde(skip_serializing_if = "Option::is_none")]
            detail: Option<String>,
            #[serde(skip_serializing_if = "Option::is_none", rename = "invocationId")]
            invocation: Option<&'a str>,
        }
        let status = self.status();
        let problem = Problem {
            kind: "about:blank", // the status says all there is to say (RFC 9457, section 4.2.1)
            title: status.canonical_reason().unwrap_or("Error"),
            status: status.as_u16(),
            detail: Some(self.to_string()).filter(|_| !matches!(self, Self::Broken(_))),
            invocation,
        };
        let mut response = HttpResponseBuilder::new(status);
        response.insert_header((header::CONTENT_TYPE, "application/problem+json"));
        response.insert_header((header::CACHE_CONTROL, "no-store"));
        match self {
            Self::MethodNotAllowed(methods) => drop(response.insert_header((header::ALLOW, methods.join(", ")))),
            Self::Unavailable(_) => drop(response.insert_header((header::RETRY_AFTER, RETRY_AFTER_S))),
            _ => {}
        }
        response.body(serde_json::to_string(&problem).unwrap_or_else(|error| unreachable!("plain fields: {error}")))
    }
}
