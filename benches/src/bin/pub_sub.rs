//! `pub_sub`: an invalidation function over a plain channel. What is POSTed is published and acknowledged once Redis has
//! it; a GET is answered with what was heard last. Keeps and checks nothing, so what an instance misses stays missed.
//! `REDIS_URL`: where the channel is.

use std::sync::{Arc, Mutex, PoisonError};

use actix_web::{HttpRequest, HttpResponse, http::Method, web};
use bytes::Bytes;
use futures_util::StreamExt;
use product_cache_bench::reference::{everything, found, serve, text};
use redis::{AsyncCommands, aio::MultiplexedConnection};

const CHANNEL: &str = "bench:function";

#[derive(Clone)]
struct App {
    redis: MultiplexedConnection,
    heard: Arc<Mutex<Bytes>>,
}

async fn answer(app: web::Data<App>, request: HttpRequest, body: Bytes) -> HttpResponse {
    if request.method() != Method::POST {
        return found(app.heard.lock().unwrap_or_else(PoisonError::into_inner).clone());
    }
    match app.redis.clone().publish::<_, _, i64>(CHANNEL, &body[..]).await {
        Ok(_) => HttpResponse::Ok().finish(),
        Err(_) => HttpResponse::ServiceUnavailable().finish(),
    }
}

#[allow(clippy::expect_used)]
fn main() {
    serve(async {
        let client = redis::Client::open(text("REDIS_URL")).expect("REDIS_URL");
        let redis = client.get_multiplexed_async_connection().await.expect("Redis");
        let mut channel = client.get_async_pubsub().await.expect("Redis");
        channel.subscribe(CHANNEL).await.expect("a subscription");
        let app = App { redis, heard: Arc::default() };
        let heard = app.heard.clone();
        tokio::spawn(async move {
            let mut messages = channel.into_on_message();
            while let Some(message) = messages.next().await {
                *heard.lock().unwrap_or_else(PoisonError::into_inner) =
                    Bytes::copy_from_slice(message.get_payload_bytes());
            }
        });
        let app = web::Data::new(app);
        move |service: &mut web::ServiceConfig| {
            service.app_data(app.clone());
            everything(service, answer);
        }
    });
}
