//! `ceiling`: actix-web, as it is usually used, answering one constant body with the handler's headers. `BODY_BYTES`: how
//! long the body is.
//!
//! The handler itself goes without `App` and could come out above it.

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
