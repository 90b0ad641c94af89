//! A stand-in for the App Service identity endpoint: says what a test's closure says, and keeps what it was asked.

use std::sync::{Arc, Mutex};

use product_cache::config::IdentityEndpoint;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::AbortHandle,
};

/// What the endpoint wants in its header.
pub const HEADER: &str = "853b9a84-5bfa-4b22-a3f3-0b9a43d9ad8a";

pub struct Identity {
    port: u16,
    asked: Arc<Mutex<Vec<String>>>,
    task: AbortHandle,
}

impl Drop for Identity {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Identity {
    /// `answers` gets the number of the request, from 1, and gives a status and a body; no status: no answer at all.
    pub async fn start(answers: impl Fn(usize) -> (u16, String) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let heard = asked.clone();
        let answers = Arc::new(answers);
        let task = tokio::spawn(async move {
            loop {
                let Ok((mut client, _)) = listener.accept().await else { continue };
                let (heard, answers) = (heard.clone(), answers.clone());
                tokio::spawn(async move {
                    let mut request = Vec::new();
                    while !request.ends_with(b"\r\n\r\n") {
                        let Ok(byte) = client.read_u8().await else { return };
                        request.push(byte);
                    }
                    let number = {
                        let mut heard = heard.lock().unwrap();
                        heard.push(String::from_utf8(request).expect("text"));
                        heard.len()
                    };
                    let (status, body) = answers(number);
                    if status == 0 {
                        return std::future::pending().await;
                    }
                    let length = body.len();
                    let reply = format!("HTTP/1.1 {status} X\r\nContent-Length: {length}\r\n\r\n{body}");
                    let _ = client.write_all(reply.as_bytes()).await;
                });
            }
        });
        Self { port, asked, task: task.abort_handle() }
    }

    pub fn endpoint(&self) -> IdentityEndpoint {
        IdentityEndpoint { url: format!("http://127.0.0.1:{}/msi/token", self.port), header: HEADER.into() }
    }

    /// Requests so far: line and headers.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}
