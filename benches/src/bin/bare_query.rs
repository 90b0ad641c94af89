//! `bare_query`: actix-web and the handler's own query and JSON for every request, without any cache. What a miss costs
//! at least. Settings as the handler's.

use actix_web::{HttpRequest, HttpResponse, web};
use product_cache::{database::Database, product};
use product_cache_bench::reference::{config, everything, found, id, serve};

async fn answer(database: web::Data<Database>, request: HttpRequest) -> HttpResponse {
    match product::load(&database, &[id(request.query_string())]).await.as_deref_mut() {
        Ok([Ok(product)]) => found(std::mem::take(&mut product.json)),
        Ok(_) => HttpResponse::NotFound().finish(),
        Err(_) => HttpResponse::ServiceUnavailable().finish(),
    }
}

fn main() {
    serve(async {
        let database = web::Data::new(Database::new(&config().database));
        move |service: &mut web::ServiceConfig| {
            service.app_data(database.clone());
            everything(service, answer);
        }
    });
}
