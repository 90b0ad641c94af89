//! What the handler is compared with: how these small servers listen, and the headers they all send.
//!
//! Server, threads, allocator and headers are the handler's own. Idle connections end after a time, as they do with
//! actix-web's defaults; the handler goes without the timer that each answer then starts.
//! Settings: `HTTP_PORT`, `HTTP_WORKERS`, and each server's own in its file.

use std::{io::Write, net::Ipv4Addr, time::Duration};

use actix_web::{
    App, HttpResponse, HttpServer,
    http::{
        KeepAlive,
        header::{self, HeaderName, HeaderValue},
    },
    web::{self, ServiceConfig},
};
use bytes::Bytes;
use product_cache::{background, config::Config};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Longer than any pause of the generator's, so that none has to connect anew.
const KEEP_ALIVE: Duration = Duration::from_secs(150);

/// A number among the settings.
pub fn number(name: &str) -> usize {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(0)
}

/// A text among the settings.
pub fn text(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

/// The handler's own reading of the settings, for servers that ask the same database.
#[allow(clippy::expect_used)]
pub fn config() -> Config {
    Config::from_process().expect("settings")
}

/// The id that a request asks for.
pub fn id(query: &str) -> i64 {
    query.strip_prefix("productid=").and_then(|id| id.parse().ok()).unwrap_or(0)
}

/// A product, with the headers that the handler sends for a hit.
pub fn found(body: Bytes) -> HttpResponse {
    HttpResponse::Ok()
        .insert_header((header::CONTENT_TYPE, HeaderValue::from_static("application/json; charset=utf-8")))
        .insert_header((header::ETAG, HeaderValue::from_static("\"9be5298e1ab87d78c17fd6d885b117b9\"")))
        .insert_header((header::LAST_MODIFIED, HeaderValue::from_static("Tue, 11 Mar 2008 10:01:36 GMT")))
        .insert_header((header::CACHE_CONTROL, HeaderValue::from_static("private, no-cache")))
        .insert_header((HeaderName::from_static("cache-status"), HeaderValue::from_static("L1; hit; ttl=3500")))
        .body(body)
}

/// Listens until it is killed. `prepare` runs first and gives the routes.
pub fn serve<C: Fn(&mut ServiceConfig) + Clone + Send + 'static>(prepare: impl Future<Output = C>) {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(background::threads()).enable_all().build();
    let run = async {
        let configure = prepare.await;
        let server = HttpServer::new(move || App::new().configure(configure.clone()))
            .workers(number("HTTP_WORKERS").max(1))
            .keep_alive(KeepAlive::Timeout(KEEP_ALIVE))
            .tcp_nodelay(true)
            .client_request_timeout(KEEP_ALIVE)
            .disable_signals()
            .bind((Ipv4Addr::LOCALHOST, number("HTTP_PORT") as u16))?;
        let port = server.addrs().first().map_or(0, |address| address.port());
        writeln!(std::io::stdout(), "listening  http://127.0.0.1:{port}")?;
        server.run().await
    };
    if let Err(error) = runtime.and_then(|runtime| runtime.block_on(run)) {
        eprintln!("{error}");
        std::process::exit(1);
    }
}

/// Every path and method leads to this.
pub fn everything<F, Args>(service: &mut ServiceConfig, handler: F)
where
    F: actix_web::Handler<Args>,
    Args: actix_web::FromRequest + 'static,
    F::Output: actix_web::Responder + 'static,
{
    service.default_service(web::to(handler));
}
