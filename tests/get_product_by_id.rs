//! GetProductById over HTTP: the response contract case by case, by way of an older host (forwarding), a newer one
//! (proxying), and none (`cargo run`).

use std::{process::Command, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use tempfile::TempDir;

use crate::support::{
    eventually,
    host::{self, Dialect, Host, Options},
    http::{self, Reply},
    instance::{BINARY, Instance, hearing, start},
    redis::RedisServer,
};

const PATH: &str = "/api/GetProductById";

/// A way for a request to reach the handler.
enum Way {
    Standalone(Instance),
    Hosted(Host, #[allow(dead_code)] TempDir),
}

impl Way {
    async fn hosted(dialect: Dialect, settings: &[(&str, &str)]) -> Self {
        let root = host::stage(env!("CARGO_MANIFEST_DIR").as_ref(), BINARY.as_ref()).expect("staged");
        let mut options = Options::new(root.path()).dialect(dialect);
        for (name, value) in settings {
            options = options.env(name, *value);
        }
        Self::Hosted(hearing(options).await, root)
    }

    async fn all(settings: &[(&str, &str)]) -> [Self; 3] {
        let standalone = settings.iter().fold(start(), |start, (name, value)| start.env(name, value));
        [
            Self::Standalone(standalone.up().await),
            Self::hosted(Dialect::Forward, settings).await,
            Self::hosted(Dialect::Proxy, settings).await,
        ]
    }

    async fn send(&self, method: &str, target: &str, headers: &[(&str, &str)]) -> Reply {
        match self {
            Self::Standalone(instance) => http::send(instance.port, method, target, headers, "").await,
            Self::Hosted(host, _) => {
                let request = host::Request::new(method, target);
                let request = headers.iter().fold(request, |request, (name, value)| request.header(name, value));
                let response = host.http(request).await;
                Reply { status: response.status, headers: response.headers, body: response.body.into() }
            }
        }
    }

    async fn get(&self, query: &str) -> Reply {
        self.send("GET", &format!("{PATH}?{query}"), &[]).await
    }
}

/// What every answer of a product has.
fn assert_product(reply: &Reply, case: &str) {
    assert_eq!(reply.status, 200, "{case}: {}", reply.text());
    assert_eq!(reply.header("content-type"), "application/json; charset=utf-8", "{case}");
    assert_eq!(reply.header("cache-control"), "private, no-cache", "{case}");
    assert_eq!(reply.header("content-length"), reply.body.len().to_string(), "{case}");
    let etag = reply.header("etag");
    assert!(etag.len() == 34 && etag.starts_with('"') && etag.ends_with('"'), "{case}: {etag}");
    assert!(!reply.header("cache-status").is_empty(), "{case}");
}

fn assert_problem(reply: &Reply, status: u16, case: &str) {
    assert_eq!(reply.status, status, "{case}: {}", reply.text());
    assert_eq!(reply.header("content-type"), "application/problem+json", "{case}");
    assert_eq!(reply.json()["status"], status, "{case}");
    assert!(reply.json()["title"].is_string() && reply.json()["detail"].is_string(), "{case}: {}", reply.text());
}

#[tokio::test]
async fn every_spelling_of_a_request_that_a_host_may_pass_on_gets_the_product() {
    for way in Way::all(&[]).await {
        let product = way.get("productid=680").await;
        assert_product(&product, "plain");
        assert_eq!(product.json()["productID"], 680);
        for target in [
            "/API/getproductbyid?productid=680",
            "/api/GetProductById/?productid=680",
            "/api/GETPRODUCTBYID?ProductId=680",
            "/api/GetProductById?a=b&PRODUCTID=680&code=SECRET",
            "/api/GetProductById?%70roductid=%36%380",
        ] {
            let reply = way.send("GET", target, &[]).await;
            assert_product(&reply, target);
            assert_eq!(reply.body, product.body, "{target}");
        }
    }
}

#[tokio::test]
async fn what_is_not_an_id_is_refused_without_asking_anybody() {
    let redis = RedisServer::start().await;
    for way in Way::all(&[("Redis", &redis.url())]).await {
        let before = redis.calls("evalsha").await;
        for query in [
            "",
            "productid=",
            "productid",
            "id=680",
            "productid=abc",
            "productid=1.5",
            "productid=%2B1",
            "productid=+1",
            "productid=%20680",
            "productid=007",
            "productid=0",
            "productid=-1",
            "productid=2147483648",
            "productid=680,",
            "productid=680&productid=",
            "productid=680%2Cabc",
        ] {
            assert_problem(&way.get(query).await, 400, query);
        }
        let ids: Vec<_> = (1000..1101).map(|id| id.to_string()).collect();
        assert_problem(&way.get(&format!("productid={}", ids.join(","))).await, 400, "101 ids");
        let root = way.send("GET", "/", &[]).await;
        if let Way::Standalone(_) = way {
            let answers = &root.json()["answers"];
            assert_eq!(answers["database"].as_u64().unwrap() + answers["memory"].as_u64().unwrap(), 0);
        }
        let script_calls = redis.calls("evalsha").await - before;
        assert!(script_calls <= 1, "only the log's own first notice: {script_calls}");
    }
}

#[tokio::test]
async fn an_unknown_id_is_a_404_with_a_body_and_is_remembered() {
    for way in Way::all(&[]).await {
        for expected in ["L1; fwd=miss; stored", "L1; hit; ttl="] {
            let reply = way.get("productid=999").await;
            assert_problem(&reply, 404, "999");
            assert!(reply.header("cache-status").starts_with(expected), "{}", reply.header("cache-status"));
        }
    }
}

#[tokio::test]
async fn other_methods_are_refused_and_head_is_get_without_its_body() {
    for way in Way::all(&[]).await {
        let get = way.get("productid=680").await;
        let head = way.send("HEAD", &format!("{PATH}?productid=680"), &[]).await;
        assert_eq!((head.status, head.body.len()), (200, 0));
        for name in ["content-type", "etag", "last-modified", "cache-control", "content-length"] {
            assert_eq!(head.header(name), get.header(name), "{name}");
        }
        for (query, status) in [("productid=999", 404), ("productid=x", 400)] {
            let head = way.send("HEAD", &format!("{PATH}?{query}"), &[]).await;
            assert_eq!((head.status, head.body.len()), (status, 0), "{query}");
        }
        for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"] {
            let reply = way.send(method, &format!("{PATH}?productid=680"), &[]).await;
            match way {
                Way::Standalone(_) => {
                    assert_problem(&reply, 405, method);
                    assert_eq!(reply.header("allow"), "GET, HEAD");
                }
                Way::Hosted(..) => assert_eq!(reply.status, 404, "{method}: the host's own answer"),
            }
        }
    }
}

#[tokio::test]
async fn a_client_that_has_the_product_gets_304() {
    for way in Way::all(&[]).await {
        for query in ["productid=680", "productid=680,706,999"] {
            let target = format!("{PATH}?{query}");
            let etag = way.get(query).await.header("etag").to_owned();
            for value in [etag.clone(), format!("W/{etag}"), format!("\"x\", {etag}"), "*".to_owned()] {
                let reply = way.send("GET", &target, &[("if-none-match", &value)]).await;
                assert_eq!((reply.status, reply.body.len()), (304, 0), "{value}");
                assert_eq!(reply.header("etag"), etag);
                assert_eq!(reply.header("cache-control"), "private, no-cache");
                assert!(reply.header("cache-status").starts_with("L1; hit"), "{}", reply.header("cache-status"));
            }
            let head = way.send("HEAD", &target, &[("if-none-match", &etag)]).await;
            assert_eq!(head.status, 304);
            for (header, value, status) in [
                ("if-none-match", "\"x\"", 200),
                ("if-match", etag.as_str(), 200),
                ("if-match", "*", 200),
                ("if-match", "\"x\"", 412),
                ("if-match", &format!("W/{etag}"), 412),
            ] {
                let reply = way.send("GET", &target, &[(header, value)]).await;
                assert_eq!(reply.status, status, "{header}: {value}");
                assert!(reply.header("cache-status").starts_with("L1; hit"), "{status}: {reply:?}");
            }
        }
        let absent = way.send("GET", &format!("{PATH}?productid=999"), &[("if-none-match", "*")]).await;
        assert_eq!(absent.status, 404);
    }
}

#[tokio::test]
async fn the_date_of_a_product_is_its_last_modified_unless_it_is_still_to_come() {
    let redis = RedisServer::start().await;
    let instance = start().env("Redis", redis.url()).up().await;
    instance.sql("UPDATE product SET ModifiedDate = '9999-12-31T23:59:59' WHERE ProductID = 706");
    let other = start().env("Redis", redis.url()).folder(&instance.folder).up().await;
    for instance in [&instance, &other] {
        let dated = instance.product(680).await;
        assert_eq!((dated.status, dated.header("last-modified")), (200, "Tue, 11 Mar 2008 10:01:36 GMT"));
        let target = format!("{PATH}?productid=680");
        let again = instance.get_with(&target, &[("if-none-match", dated.header("etag"))]).await;
        assert_eq!((again.status, again.header("last-modified")), (304, dated.header("last-modified")));
        let to_come = instance.product(706).await;
        assert!(to_come.text().contains("\"modifiedDate\":\"9999-12-31T23:59:59\""), "{}", to_come.text());
        assert!(to_come.headers.iter().all(|(name, _)| name != "last-modified"), "{to_come:?}");
    }
}

#[tokio::test]
async fn what_clients_may_keep_is_the_operators_to_say() {
    let said = "public, max-age=5";
    for way in Way::all(&[("HTTP_CACHE_CONTROL", said)]).await {
        for query in ["productid=680", "productid=680,706"] {
            let whole = way.get(query).await;
            assert_eq!((whole.status, whole.header("cache-control")), (200, said), "{query}");
            let known = [("if-none-match", whole.header("etag"))];
            let again = way.send("GET", &format!("{PATH}?{query}"), &known).await;
            assert_eq!((again.status, again.header("cache-control")), (304, said), "{query}");
        }
    }
}

#[tokio::test]
async fn several_ids_are_an_array_in_the_asked_order() {
    for way in Way::all(&[]).await {
        let mut bodies = Vec::new();
        for id in [706, 680] {
            bodies.push(way.get(&format!("productid={id}")).await.text().to_owned());
        }
        let expected = format!("[{},null,{},{}]", bodies[0], bodies[1], bodies[0]);
        for query in [
            "productid=706,999,680,706",
            "productid=706%2C999%2C680%2C706",
            "productid=706&productid=999&productid=680&productid=706",
            "productid=706,999&ProductID=680,706",
        ] {
            let reply = way.get(query).await;
            assert_product(&reply, query);
            assert_eq!(reply.text(), expected, "{query}");
            assert_eq!(reply.header("last-modified"), "");
        }
        let reply = way.get("productid=999,681").await;
        assert_eq!(reply.text(), "[null,null]");
        let ids: Vec<_> = (706..806).map(|id| id.to_string()).collect();
        let reply = way.get(&format!("productid={}", ids.join(","))).await;
        assert_eq!(reply.json().as_array().map(Vec::len), Some(100));
        let status = reply.header("cache-status");
        assert!(status.contains("memory 1, redis 0, database 99"), "{status}");
    }
}

/// The seconds for which an answer says it is fresh.
fn ttl(reply: &Reply) -> i64 {
    let status = reply.header("cache-status");
    let seconds = status.split_once("ttl=").and_then(|(_, rest)| rest.split([',', ';']).next()?.parse().ok());
    seconds.unwrap_or_else(|| panic!("no ttl in {status}"))
}

/// Redis, the instance that filled it, and the one to ask.
async fn knowing_680_itself_and_706_and_707_from_redis() -> (RedisServer, Instance, Instance) {
    let redis = RedisServer::start().await;
    let settings = || start().patient().env("Redis", redis.url()).env("FEED_INTERVAL_MS", 0);
    let other = settings().up().await;
    let instance = settings().folder(&other.folder).up().await;
    instance.product(680).await;
    other.get(&format!("{PATH}?productid=706,707")).await;
    (redis, other, instance)
}

#[tokio::test]
async fn a_batch_comes_from_as_far_as_its_farthest_product_wherever_that_stands() {
    let (_redis, _other, instance) = knowing_680_itself_and_706_and_707_from_redis().await;
    for (ids, expected) in [
        ("680,708", "L2; fwd=miss, L1; fwd=miss; stored; "),
        ("709,680", "L2; fwd=miss, L1; fwd=miss; stored; "),
        ("680,706", "L2; hit; ttl="),
        ("707,680", "L2; hit; ttl="),
        ("680,706", "L1; hit; ttl="),
    ] {
        let reply = instance.get(&format!("{PATH}?productid={ids}")).await;
        let status = reply.header("cache-status");
        assert!(reply.status == 200 && status.starts_with(expected), "{ids}: {status}");
    }
}

#[tokio::test]
async fn a_batch_is_stale_if_one_of_its_products_is_wherever_that_stands() {
    let (_redis, _other, instance) = knowing_680_itself_and_706_and_707_from_redis().await;
    instance.sql("ALTER TABLE product RENAME TO gone");
    assert_eq!(instance.invalidate(&[680]).await.status, 200);
    for (ids, parts) in [
        ("680,706", "memory 1, redis 1, database 0"),
        ("707,680", "memory 1, redis 1, database 0"),
        ("680,706", "memory 2, redis 0, database 0"),
        ("707,680", "memory 2, redis 0, database 0"),
    ] {
        let reply = instance.get(&format!("{PATH}?productid={ids}")).await;
        let status = reply.header("cache-status");
        let detail = format!("detail=\"database-failed: {parts}\"");
        assert!(reply.status == 200 && status.ends_with(&detail), "{ids}: {status}");
        assert!(ttl(&reply) <= 0, "{ids}: {status}");
    }
}

#[tokio::test]
async fn a_batch_is_as_old_as_its_oldest_product_and_as_long_fresh_as_the_first_to_end() {
    let settings = [("FEED_INTERVAL_MS", 0), ("CACHE_DURATION_S", 300), ("CACHE_JITTER_PERCENT", 0)];
    let instance = settings.into_iter().fold(start(), |start, (name, value)| start.env(name, value)).up().await;
    instance.product(680).await;
    tokio::time::sleep(Duration::from_millis(2100)).await; // its age is what is tested
    instance.product(706).await;
    for ids in ["680,706", "706,680"] {
        let reply = instance.get(&format!("{PATH}?productid={ids}")).await;
        assert!(reply.header("age").parse::<u64>().unwrap() >= 2, "{ids}: {}", reply.header("age"));
        assert!((1..=297).contains(&ttl(&reply)), "{ids}: {}", reply.header("cache-status"));
    }
}

/// An array cannot say of one element that nobody can tell for now, and `null` would be a lie.
#[tokio::test]
async fn a_row_that_cannot_be_read_is_a_503_alone_and_in_a_batch_and_takes_no_other_product_along() {
    let instance = start().env("FEED_INTERVAL_MS", 0).up().await;
    let known = instance.product(707).await;
    let spoil = |id: i64| {
        let update = format!("UPDATE product SET ListPrice = 'abc' WHERE ProductID = {id}");
        instance.sql(&format!("PRAGMA ignore_check_constraints = ON; {update}"));
    };
    spoil(680);
    for ids in ["680,706", "706,680", "680"] {
        let reply = instance.get(&format!("{PATH}?productid={ids}")).await;
        assert_problem(&reply, 503, ids);
        assert_eq!(reply.header("retry-after"), "5", "{ids}");
    }
    let other = instance.product(706).await;
    assert_eq!(other.status, 200);
    assert!(other.header("cache-status").starts_with("L1; hit"), "it was loaded with the batch: {other:?}");
    spoil(707);
    assert_eq!(instance.invalidate(&[707]).await.status, 200);
    let stale = instance.get(&format!("{PATH}?productid=706,707")).await;
    assert_eq!((stale.status, stale.text()), (200, format!("[{},{}]", other.text(), known.text()).as_str()));
    assert!(stale.header("cache-status").contains("database-failed"), "{stale:?}");
}

/// The JSON of every row as SQLite itself writes it, but for the photo, which comes as hexadecimal.
const EXPECTED: &str = r#"
SELECT '{"productID":' || ProductID || ',"name":' || json_quote(Name) || ',"productNumber":' || json_quote(ProductNumber)
  || ',"color":' || json_quote(Color) || ',"standardCost":' || StandardCost || ',"listPrice":' || ListPrice
  || ',"size":' || json_quote(Size) || ',"weight":' || coalesce(Weight, 'null')
  || ',"productCategoryID":' || coalesce(ProductCategoryID, 'null') || ',"productModelID":' || coalesce(ProductModelID, 'null')
  || ',"sellStartDate":' || json_quote(d1) || ',"sellEndDate":' || json_quote(d2) || ',"discontinuedDate":' || json_quote(d3)
  || ',"thumbNailPhoto":' || char(1) || CASE WHEN ThumbNailPhoto IS NULL THEN 'null' ELSE hex(ThumbNailPhoto) END || char(1)
  || ',"thumbnailPhotoFileName":' || json_quote(ThumbnailPhotoFileName)
  || ',"rowguid":"' || lower(rowguid) || '","modifiedDate":' || json_quote(d4) || '}'
FROM (SELECT *,
  CASE WHEN SellStartDate LIKE '%.%' THEN rtrim(rtrim(SellStartDate, '0'), '.') ELSE SellStartDate END AS d1,
  CASE WHEN SellEndDate LIKE '%.%' THEN rtrim(rtrim(SellEndDate, '0'), '.') ELSE SellEndDate END AS d2,
  CASE WHEN DiscontinuedDate LIKE '%.%' THEN rtrim(rtrim(DiscontinuedDate, '0'), '.') ELSE DiscontinuedDate END AS d3,
  CASE WHEN ModifiedDate LIKE '%.%' THEN rtrim(rtrim(ModifiedDate, '0'), '.') ELSE ModifiedDate END AS d4
  FROM product) ORDER BY ProductID"#;

#[tokio::test]
async fn every_product_of_the_catalogue_is_sent_byte_for_byte_as_stored() {
    let instance = start().up().await;
    let output = Command::new("sqlite3").arg(instance.database()).arg(EXPECTED).output().expect("sqlite3");
    let expected = String::from_utf8(output.stdout).expect("UTF-8");
    let mut rows = 0;
    for line in expected.lines() {
        let [before, hex, after] = line.split('\u{1}').collect::<Vec<_>>()[..] else { panic!("{line}") };
        let photo = match hex {
            "null" => "null".to_owned(),
            hex => {
                let bytes: Vec<_> =
                    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect();
                format!("\"{}\"", STANDARD.encode(bytes))
            }
        };
        let id: i64 = before["{\"productID\":".len()..].split(',').next().unwrap().parse().unwrap();
        assert_eq!(instance.product(id).await.text(), format!("{before}{photo}{after}"), "{id}");
        rows += 1;
    }
    assert!(rows > 290, "{rows} rows");
}

#[tokio::test]
async fn numbers_dates_and_text_keep_their_form() {
    let instance = start().up().await;
    for (id, part) in [
        (680, r#""standardCost":1059.3100,"listPrice":1431.5000,"size":"58","weight":1016.04,"#),
        (680, r#""sellStartDate":"2002-06-01T00:00:00","sellEndDate":null,"discontinuedDate":null,"#),
        (680, r#""modifiedDate":"2008-03-11T10:01:36.827"}"#),
        (992, r#""standardCost":0.0000,"listPrice":922337203685477.5806,"size":null,"weight":999999.99,"#),
        (993, r#""color":null,"standardCost":1000.0000,"#),
        (994, r#""weight":1000.00,"productCategoryID":null,"#),
        (998, r#""thumbNailPhoto":"","#),
        (1003, r#".51"}"#),
        (1002, r#".007"}"#),
        (976, "🚲🎉"),
        (985, r#""name":"Cable\tTidy""#),
        (755, r#""size":"24\"""#),
    ] {
        let reply = instance.product(id).await;
        assert!(reply.text().contains(part), "{part} is not in {}", reply.text());
    }
}

#[tokio::test]
async fn an_edit_in_a_shell_is_shown_whatever_form_its_numbers_take() {
    let instance = start().up().await;
    for (assignment, part) in [
        ("ListPrice = 1499.99", "\"listPrice\":1499.9900,"),
        ("ListPrice = 1500", "\"listPrice\":1500.0000,"),
        ("ListPrice = '.5'", "\"listPrice\":0.5000,"),
        ("ListPrice = '5.'", "\"listPrice\":5.0000,"),
        ("ListPrice = '0001.00005'", "\"listPrice\":1.0001,"),
        ("ListPrice = '1650.00000000000022737'", "\"listPrice\":1650.0000,"),
        ("ListPrice = '922337203685477.58069'", "\"listPrice\":922337203685477.5807,"),
        ("Weight = '999999.999'", "\"weight\":1000000.00,"),
        ("SellEndDate = '2026-01-02'", "\"sellEndDate\":\"2026-01-02T00:00:00\""),
        ("SellEndDate = '2026-01-02 03:04:05.6700'", "\"sellEndDate\":\"2026-01-02T03:04:05.67\""),
        ("SellEndDate = '0001-01-01T00:00:00.0000001'", "\"sellEndDate\":\"0001-01-01T00:00:00.0000001\""),
        ("SellEndDate = '9999-12-31T23:59:59.9999999'", "\"sellEndDate\":\"9999-12-31T23:59:59.9999999\""),
        ("rowguid = 'ABCDEFAB-ABCD-ABCD-ABCD-ABCDEFABCDEF'", "\"rowguid\":\"abcdefab-abcd-abcd-abcd-abcdefabcdef\""),
        ("Name = 'a' || char(0x1f600) || char(7) || '\"'", "\"name\":\"a\u{1f600}\\u0007\\\"\""),
    ] {
        instance.sql(&format!("UPDATE product SET {assignment} WHERE ProductID = 680"));
        eventually(part, async || instance.product(680).await.text().contains(part).then_some(())).await;
    }
}

#[tokio::test]
async fn cache_status_tells_who_answered() {
    let redis = RedisServer::start().await;
    let first = start().patient().env("Redis", redis.url()).up().await;
    let second = start().patient().env("Redis", redis.url()).folder(&first.folder).up().await;
    assert_eq!(first.product(680).await.header("cache-status"), "L2; fwd=miss, L1; fwd=miss; stored");
    let hit = first.product(680).await;
    assert!(hit.header("cache-status").starts_with("L1; hit; ttl=2"), "{}", hit.header("cache-status"));
    let shared = second.product(680).await;
    let status = shared.header("cache-status");
    assert!(status.starts_with("L2; hit; ttl=2") && status.ends_with(", L1; fwd=miss; stored"), "{status}");
    assert_eq!(shared.header("etag"), hit.header("etag"));
    assert_eq!(shared.body, hit.body);
    let empty = first.get_with(&format!("{PATH}?productid=706"), &[("cache-control", "max-age=60")]).await;
    assert_eq!(empty.header("cache-status"), "L2; fwd=miss, L1; fwd=miss; stored", "there was nothing to refuse");
    let afresh = async |instance: &Instance, id| {
        let reply = instance.get_with(&format!("{PATH}?productid={id}"), &[("cache-control", "no-cache")]).await;
        reply.header("cache-status").to_owned()
    };
    assert_eq!(afresh(&first, 680).await, "L2; fwd=request, L1; fwd=request; stored");
    assert_eq!(afresh(&second, 706).await, "L2; fwd=request, L1; fwd=miss; stored");
    redis.command(&["DEL", "{product-cache}:product:706"]).await;
    assert_eq!(afresh(&second, 706).await, "L2; fwd=miss, L1; fwd=request; stored");
    let young = first.get_with(&format!("{PATH}?productid=680"), &[("cache-control", "max-age=3600")]).await;
    assert!(young.header("cache-status").starts_with("L1; hit"), "{}", young.header("cache-status"));
    assert_eq!(first.invalidate(&[680]).await.status, 200);
    let batch = first.get(&format!("{PATH}?productid=706,680")).await.header("cache-status").to_owned();
    assert!(batch.starts_with("L2; fwd=stale, L1; fwd=stale; stored; "), "{batch}");
    assert_eq!(first.invalidate(&[680]).await.status, 200);
    assert_eq!(first.product(680).await.header("cache-status"), "L2; fwd=stale, L1; fwd=stale; stored");
    let young = [("cache-control", "max-age=3600")];
    let batch = first.get_with(&format!("{PATH}?productid=706,708"), &young).await.header("cache-status").to_owned();
    assert!(batch.starts_with("L2; fwd=miss, L1; fwd=miss; stored; "), "nothing was refused: {batch}");
    redis.signal("STOP");
    let status = first.product(707).await.header("cache-status").to_owned();
    redis.signal("CONT");
    assert_eq!(status, "L1; fwd=miss; stored", "Redis said nothing");
}

#[tokio::test]
async fn each_level_tells_how_long_its_own_entry_is_fresh() {
    let redis = RedisServer::start().await;
    let durations = [("CACHE_L1_DURATION_S", 1), ("CACHE_L2_DURATION_S", 300), ("CACHE_JITTER_PERCENT", 0)];
    let instance = durations.into_iter().fold(start().patient(), |start, (name, value)| start.env(name, value));
    let instance = instance.env("Redis", redis.url()).env("FEED_INTERVAL_MS", 0).up().await;
    instance.product(680).await;
    let reply = eventually("memory's has ended", async || {
        let reply = instance.product(680).await;
        reply.header("cache-status").starts_with("L2; hit").then_some(reply)
    })
    .await;
    assert!((200..300).contains(&ttl(&reply)), "{}", reply.header("cache-status"));
}

#[tokio::test]
async fn age_tells_since_when_an_answer_is_not_known_to_be_right() {
    let listening = start().env("HTTP_CACHE_CONTROL", "public, max-age=2").up().await;
    let deaf = start().env("FEED_INTERVAL_MS", 0).up().await;
    let age = |reply: &Reply| reply.header("age").parse::<u64>().unwrap_or(0);
    for instance in [&listening, &deaf] {
        assert_eq!(instance.product(680).await.header("age"), "", "read from the database for this very answer");
    }
    tokio::time::sleep(Duration::from_millis(3100)).await; // its age is what is tested
    eventually("it has just looked for changes", async || {
        let hit = listening.product(680).await;
        assert!(hit.header("cache-status").starts_with("L1; hit"), "{hit:?}");
        (age(&hit) < 2).then_some(()) // so that clients may keep it
    })
    .await;
    let unheard = deaf.product(680).await;
    assert!(age(&unheard) >= 3, "nothing tells it of changes: {unheard:?}");
    listening.sql("UPDATE product SET Name = 'changed' WHERE ProductID = 680; ALTER TABLE product RENAME TO gone");
    let stale = eventually("the entry is stale", async || {
        let reply = listening.product(680).await;
        reply.header("cache-status").contains("database-failed").then_some(reply)
    })
    .await;
    assert!(age(&stale) >= 3, "as old as its load: {stale:?}");
}

#[tokio::test]
async fn a_database_that_fails_is_a_stale_200_for_what_is_known_and_a_503_for_the_rest() {
    let instance = start().up().await;
    let before = instance.product(680).await;
    instance.sql("UPDATE product SET Name = 'changed' WHERE ProductID = 680; ALTER TABLE product RENAME TO gone");
    let stale = eventually("the entry is stale", async || {
        let reply = instance.product(680).await;
        reply.header("cache-status").contains("database-failed").then_some(reply)
    })
    .await;
    assert_eq!((stale.status, &stale.body), (200, &before.body));
    assert!(stale.header("cache-status").starts_with("L1; hit; ttl="), "{}", stale.header("cache-status"));
    let unknown = instance.product(706).await;
    assert_problem(&unknown, 503, "never seen");
    assert_eq!(unknown.header("retry-after"), "5");
    assert!(!unknown.text().contains("table"), "the cause is for the log: {}", unknown.text());
    assert_problem(&instance.get(&format!("{PATH}?productid=680,706")).await, 503, "a batch with one unknown");
    instance.stderr.wait_for("no such table").await;
    instance.sql("ALTER TABLE gone RENAME TO product");
    eventually("it recovers", async || (instance.product(706).await.status == 200).then_some(())).await;
}

#[tokio::test]
async fn odd_but_legal_requests_are_answered() {
    for way in Way::all(&[]).await {
        let long = "x".repeat(400);
        let mut headers: Vec<(String, String)> = (0..40).map(|n| (format!("x-extra-{n}"), long.clone())).collect();
        headers.push(("x-azure-functions-invocationid".into(), "a".into()));
        headers.push(("x-azure-functions-invocationid".into(), "b".into()));
        headers.push(("user-agent".into(), "curl/8 Azure-Functions-Host/4.1".into()));
        let headers: Vec<_> = headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let reply = way.send("GET", &format!("{PATH}?productid=680"), &headers).await;
        assert_product(&reply, "many headers");
    }
    let instance = start().up().await;
    let reply = instance.get_with(&format!("{PATH}?productid=680"), &[("host", "shop.azurewebsites.net")]).await;
    assert_product(&reply, "a foreign host name");
    for path in
        ["/nothing", "/api", "/api/", "/api/Other", "/GetProductById", "/api//GetProductById", "/api/GetProductById/1"]
    {
        assert_problem(&instance.get(&format!("{path}?productid=680")).await, 404, path);
    }
}

#[tokio::test]
async fn the_route_prefix_is_the_hosts() {
    for (prefix, path) in [("", "/GetProductById"), ("shop/v1", "/Shop/V1/getproductbyid/")] {
        let instance = start().env("AzureFunctionsJobHost__extensions__http__routePrefix", prefix).up().await;
        assert_product(&instance.get(&format!("{path}?productid=680")).await, path);
        assert_eq!(instance.get("/api/GetProductById?productid=680").await.status, 404);
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("host.json"), r#"{"extensions":{"http":{"routePrefix":"v2"}}}"#).unwrap();
    let instance = start().folder(folder.path()).up().await;
    assert_product(&instance.get("/v2/GetProductById?productid=680").await, "from host.json");
}

#[tokio::test]
async fn the_hosts_key_is_enforced_by_the_host_and_appears_nowhere() {
    let root = host::stage(env!("CARGO_MANIFEST_DIR").as_ref(), BINARY.as_ref()).expect("staged");
    let redis = RedisServer::start().await;
    let options =
        Options::new(root.path()).function_key("S3CRETKEY").env("Redis", redis.url()).env("LOG_LEVEL", "trace");
    let host = hearing(options).await;
    assert_eq!(host.get(&format!("{PATH}?productid=680")).await.status, 401);
    let with_code = host.get(&format!("{PATH}?productid=680&code=S3CRETKEY")).await;
    let with_header =
        host.http(host::Request::get(&format!("{PATH}?productid=706,x")).header("x-functions-key", "S3CRETKEY")).await;
    assert_eq!((with_code.status, with_header.status), (200, 400));
    let keys: Vec<String> = redis::from_redis_value(redis.command(&["KEYS", "*"]).await).unwrap();
    let mut all = keys.join("\n") + &with_code.text() + &with_header.text();
    all.extend(host.console().into_iter().map(|line| line.text));
    assert!(all.contains("{product-cache}:product:680") && !all.contains("S3CRETKEY"), "{all}");
}

#[tokio::test]
async fn a_connection_that_a_host_keeps_idle_is_not_reset() {
    let Way::Hosted(host, _root) = Way::hosted(Dialect::Proxy, &[]).await else { unreachable!() };
    host.get(&format!("{PATH}?productid=680")).await;
    let opened = host.connections_opened();
    for pause_s in [0, 6] {
        tokio::time::sleep(Duration::from_secs(pause_s)).await; // actix's own default ends idle ones after 5 s
        for _ in 0..100 {
            assert_eq!(host.get(&format!("{PATH}?productid=680")).await.status, 200);
        }
    }
    assert_eq!(host.connections_opened(), opened);
}
