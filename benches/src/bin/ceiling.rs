//! `ceiling`: actix-web, as it is usually used, answering one constant body with the handler's headers. `BODY_BYTES`: how
//! long the body is; `BODIES`: in how many places of memory it lies, to be chosen from by the id (1 if not given).
//!
//! The handler itself goes without `App` and could come out above it.

use std::{future::ready, sync::Arc};

use actix_web::HttpRequest;
use bytes::Bytes;
use product_cache_bench::reference::{everything, found, id, number, serve};

fn main() {
    serve(async {
        // A clone's: the first one makes the count of those who share the bytes, which no request is to wait for.
        let body = || Bytes::from(vec![b'x'; number("BODY_BYTES")]).clone();
        let bodies: Arc<[Bytes]> = (0..number("BODIES").max(1)).map(|_| body()).collect();
        move |service: &mut actix_web::web::ServiceConfig| match &*bodies {
            [body] => {
                // Nothing of the request is looked at.
                let body = body.clone();
                everything(service, move || ready(found(body.clone())));
            }
            _ => {
                let bodies = bodies.clone();
                let choose = move |request: HttpRequest| {
                    let index = id(request.query_string()) as usize % bodies.len();
                    ready(found(bodies[index].clone()))
                };
                everything(service, choose);
            }
        }
    });
}
