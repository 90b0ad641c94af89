//! `ceiling`: actix-web answering one constant body with the handler's headers. Nothing that serves over actix-web can be
//! faster. `BODY_BYTES`: how long the body is.

use product_cache_bench::reference::{everything, found, number, serve};

fn main() {
    serve(async {
        let body = bytes::Bytes::from(vec![b'x'; number("BODY_BYTES")]);
        move |service: &mut actix_web::web::ServiceConfig| {
            let body = body.clone();
            everything(service, move || std::future::ready(found(body.clone())));
        }
    });
}
