//! An HTTP client that shows everything: status, headers in order, body bytes.

use std::{sync::LazyLock, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::time::timeout;

/// A whole response; header names are in lower case.
#[derive(Clone, Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
}

impl Reply {
    /// The value of a header; empty if it is missing.
    pub fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(header, _)| header == name).map_or("", |(_, value)| value)
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("a UTF-8 body")
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }
}

/// Sends one request to a port of this machine; fails the test if no whole response comes.
pub async fn send(port: u16, method: &str, target: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Reply {
    try_send(port, method, target, headers, body).await.unwrap_or_else(|error| panic!("{method} {target}: {error}"))
}

/// Sends one request to a port of this machine.
pub async fn try_send(
    port: u16,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
    body: impl Into<Bytes>,
) -> Result<Reply, String> {
    // Connections belong to a runtime, and each test has its own, so none is kept for the next request.
    static CLIENT: LazyLock<Client<hyper_util::client::legacy::connect::HttpConnector, Full<Bytes>>> =
        LazyLock::new(|| Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build_http());
    let mut request = Request::builder().method(method.parse::<Method>().map_err(|error| error.to_string())?);
    request = request.uri(format!("http://127.0.0.1:{port}{target}"));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Full::new(body.into())).map_err(|error| error.to_string())?;
    let exchange = async {
        let response = CLIENT.request(request).await.map_err(|error| error.to_string())?;
        let (head, body) = response.into_parts();
        let body = body.collect().await.map_err(|error| error.to_string())?.to_bytes();
        let headers = head.headers.iter();
        let headers = headers.map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into()));
        Ok(Reply { status: head.status.as_u16(), headers: headers.collect(), body })
    };
    timeout(Duration::from_secs(60), exchange).await.unwrap_or_else(|_| Err("no response in 60 s".to_owned()))
}
