//! `cache_aside`: the handler that most samples show: GET from Redis; on a miss the query, then SET with a duration. No
//! memory, no protection against stampedes or stale sets. `REDIS_URL`, the handler's `Sql`, and `REDIS_CLIENT`:
//! `per-request` opens a connection for each request, `singleton` shares one.

use std::sync::Arc;

use actix_web::{HttpRequest, HttpResponse, web};
use bytes::Bytes;
use product_cache::{database::Database, product};
use product_cache_bench::reference::{config, everything, found, id, serve, text};
use redis::{AsyncCommands, Client, RedisResult, aio::MultiplexedConnection};

struct App {
    client: Client,
    shared: Option<MultiplexedConnection>,
    database: Database,
}

const DURATION_S: u64 = 3600;

async fn answer(app: web::Data<Arc<App>>, request: HttpRequest) -> HttpResponse {
    match product(&app, id(request.query_string())).await {
        Ok(Some(body)) => found(body),
        Ok(None) => HttpResponse::NotFound().finish(),
        Err(_) => HttpResponse::ServiceUnavailable().finish(),
    }
}

async fn product(app: &App, id: i64) -> RedisResult<Option<Bytes>> {
    let mut redis = match &app.shared {
        Some(shared) => shared.clone(),
        None => app.client.get_multiplexed_async_connection().await?,
    };
    let key = format!("aside:{id}");
    if let Some(body) = redis.get(&key).await? {
        return Ok(Some(body));
    }
    let loaded = product::load(&app.database, &[id]).await.unwrap_or_default();
    let Some(Ok(product)) = loaded.into_iter().next() else { return Ok(None) };
    let _: () = redis.set_ex(&key, &product.json[..], DURATION_S).await?;
    Ok(Some(product.json))
}

#[allow(clippy::expect_used)]
fn main() {
    serve(async {
        let client = Client::open(text("REDIS_URL")).expect("REDIS_URL");
        let shared = match text("REDIS_CLIENT").as_str() {
            "singleton" => Some(client.get_multiplexed_async_connection().await.expect("Redis")),
            _ => None,
        };
        let app = Arc::new(App { client, shared, database: Database::new(&config().database) });
        move |service: &mut web::ServiceConfig| {
            service.app_data(web::Data::new(app.clone()));
            everything(service, answer);
        }
    });
}
