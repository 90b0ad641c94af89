//! `ceiling`: actix-web, as it is usually used, answering one constant body with the handler's headers. `BODY_BYTES`: how
//! long the body is; `BODIES`: in how many places of memory it lies, to be chosen from by the id (1 if not given); `AGE`:
//! what its `Age` says (none if not given: the handler has none while a change feed vouches for its memory).
//!
//! The handler itself goes without `App` and could come out above it.

use std::{future::ready, sync::Arc};

use actix_web::{
    HttpRequest, HttpResponse,
    http::header::{self, HeaderValue},
};
use bytes::Bytes;
use product_cache_bench::reference::{everything, found, id, number, serve};

fn main() {
    serve(async {
        // A clone's: the first one makes the count of those who share the bytes, which no request is to wait for.
        let body = || Bytes::from(vec![b'x'; number("BODY_BYTES")]).clone();
        let bodies: Arc<[Bytes]> = (0..number("BODIES").max(1)).map(|_| body()).collect();
        let age = Some(number("AGE")).filter(|age| *age > 0).map(HeaderValue::from);
        let answer = move |body: &Bytes| -> HttpResponse {
            let mut response = found(body.clone());
            if let Some(age) = &age {
                response.headers_mut().insert(header::AGE, age.clone());
            }
            response
        };
        move |service: &mut actix_web::web::ServiceConfig| match &*bodies {
            [body] => {
                // Nothing of the request is looked at.
                let (body, answer) = (body.clone(), answer.clone());
                everything(service, move || ready(answer(&body)));
            }
            _ => {
                let (bodies, answer) = (bodies.clone(), answer.clone());
                let choose = move |request: HttpRequest| {
                    let index = id(request.query_string()) as usize % bodies.len();
                    ready(answer(&bodies[index]))
                };
                everything(service, choose);
            }
        }
    });
}
