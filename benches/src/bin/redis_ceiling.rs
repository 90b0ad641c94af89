//! `redis_ceiling`: actix-web and one GET per request over one shared connection, with the handler's headers. The
//! connection is made before the server starts, as samples do, so a thread of its own serves it. `REDIS_URL`: where it
//! is; bodies are under `bench:<id>`.

use actix_web::{HttpRequest, HttpResponse, web};
use bytes::Bytes;
use product_cache_bench::reference::{everything, found, id, serve, text};
use redis::{AsyncCommands, aio::MultiplexedConnection};

async fn answer(redis: web::Data<MultiplexedConnection>, request: HttpRequest) -> HttpResponse {
    let mut redis = redis.get_ref().clone();
    match redis.get::<_, Option<Bytes>>(format!("bench:{}", id(request.query_string()))).await {
        Ok(Some(body)) => found(body),
        Ok(None) => HttpResponse::NotFound().finish(),
        Err(_) => HttpResponse::ServiceUnavailable().finish(),
    }
}

#[allow(clippy::expect_used)]
fn main() {
    serve(async {
        let client = redis::Client::open(text("REDIS_URL")).expect("REDIS_URL");
        let connection = web::Data::new(client.get_multiplexed_async_connection().await.expect("Redis"));
        move |service: &mut web::ServiceConfig| {
            service.app_data(connection.clone());
            everything(service, answer);
        }
    });
}
