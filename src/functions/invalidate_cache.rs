//! `POST /InvalidateCache`: the SQL trigger's batch of changed products, made stale everywhere.
//!
//! Owns the order of things: read the batch, expire what can be read, and only then say so. Invariant (C4, C7): a 2xx
//! means that Redis and the log have it; anything else makes the host deliver the batch again.

use actix_web::{
    HttpResponse,
    dev::{Payload, RequestHead},
};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use tokio::time::Instant;

use super::{
    App, Counter,
    error::Error,
    invocation::{self, Changes, Reply},
};
use crate::{cache::Key, product};

/// Name of the binding in function.json.
const BINDING: &str = "changes";
/// Bodies above this are decoded away from the request threads: 64 KiB take about 0.3 ms.
const SMALL_BODY: usize = 64 * 1024;

/// Answers POST. The host tells nobody what it was refused for, so the log does.
pub(super) async fn handle(app: &App, head: &RequestHead, payload: Payload) -> Result<HttpResponse, Error> {
    let answer = invalidate(app, head, payload).await;
    answer.inspect_err(|error| tracing::error!(%error, "InvalidateCache: failed"))
}

async fn invalidate(app: &App, head: &RequestHead, payload: Payload) -> Result<HttpResponse, Error> {
    let deadline = Instant::now() + app.config.invalidate.budget;
    let body = read_body(head, payload, app.config.invalidate.max_body_bytes);
    let body = tokio::time::timeout_at(deadline, body).await.unwrap_or(Err(Error::TooSlow))?;
    let changes = decode(app, body).await?;
    let keys: Vec<_> = changes.keys.iter().map(|id| Key::new(product::KIND, *id)).collect();
    app.cache.expire(&keys, deadline.saturating_duration_since(Instant::now())).await?;
    app.counts.add(Counter::ExpiredKeys, keys.len() as u64);
    if changes.unreadable > 0 {
        return Err(Error::BadRequest(format!("{} rows have no readable {}", changes.unreadable, product::TABLE.key)));
    }
    tracing::info!("expired {} products", keys.len());
    Ok(HttpResponse::Ok().json(Reply::new(vec![format!("expired {} products", keys.len())])))
}

async fn decode(app: &App, body: Bytes) -> Result<Changes, Error> {
    let small = body.len() <= SMALL_BODY;
    let read = move || invocation::changes(&body, BINDING, product::TABLE.key).map_err(Error::BadRequest);
    if small {
        return read();
    }
    let decoded = app.background.spawn_blocking(read).await;
    decoded.unwrap_or_else(|_| Err(Error::Broken("the decoder panicked".to_owned())))
}

async fn read_body(head: &RequestHead, mut payload: Payload, limit: usize) -> Result<Bytes, Error> {
    let declared = head.headers.get("content-length").and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if declared.is_some_and(|length| length > limit) {
        return Err(Error::TooLarge(limit));
    }
    let mut body = BytesMut::with_capacity(declared.unwrap_or(0));
    while let Some(chunk) = payload.next().await {
        let chunk = chunk.map_err(|_| Error::BadRequest("the body was cut off".to_owned()))?;
        if body.len() + chunk.len() > limit {
            return Err(Error::TooLarge(limit));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body.freeze())
}
