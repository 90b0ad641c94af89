//! What every engine must do alike, on real servers: one suite, run for each.

mod deaf;
mod feed;
mod handler;
mod outages;
mod rows;

use product_cache::{config::Config, database::Database, product};

use crate::support::{
    database::{DatabaseServer, Engine},
    proxy::Proxy,
};

/// Makes a test of each function for each engine.
macro_rules! for_every_engine {
    ($($name:ident),* $(,)?) => {
        crate::databases::tests_on!(sqlite Sqlite $($name)*);
        crate::databases::tests_on!(postgres Postgres $($name)*);
        crate::databases::tests_on!(mariadb MariaDb $($name)*);
        crate::databases::tests_on!(sql_server SqlServer $($name)*);
    };
}
use for_every_engine;

/// Makes a test of each function for each engine that is a server of its own.
macro_rules! for_every_server {
    ($($name:ident),* $(,)?) => {
        crate::databases::tests_on!(postgres_server Postgres $($name)*);
        crate::databases::tests_on!(mariadb_server MariaDb $($name)*);
    };
}
use for_every_server;

macro_rules! tests_on {
    ($module:ident $engine:ident $($name:ident)*) => {
        mod $module {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    let engine = crate::support::database::Engine::$engine;
                    if crate::support::database::is_there(engine, stringify!($name)) {
                        super::$name(engine).await;
                    }
                }
            )*
        }
    };
}
use tests_on;

/// The pool as the handler has it, with these settings besides.
fn database(url: &str, settings: &[(&str, &str)]) -> Database {
    let settings = settings.iter().copied().chain([("Sql", url), ("DATABASE_ALLOW_UNVERIFIED", "on")]);
    let variables = settings.map(|(name, value)| (name.to_string(), value.to_string())).collect();
    Database::new(&Config::from_variables(&variables).expect("valid settings").database)
}

/// A server, a proxy in front of it (but for SQLite), and the pool behind the proxy.
async fn behind_a_proxy(engine: Engine, settings: &[(&str, &str)]) -> (DatabaseServer, Proxy, Database) {
    let server = DatabaseServer::start(engine).await;
    let proxy = Proxy::start(server.port).await;
    let database = database(&server.url_by(proxy.port), settings);
    (server, proxy, database)
}

/// The products with these ids, as the JSON that clients get, in the order of their ids.
async fn products(database: &Database, ids: &[i64]) -> Result<Vec<(i64, String)>, String> {
    let products = product::load(database, ids).await.map_err(|error| error.to_string())?;
    let mut texts = Vec::new();
    for product in products {
        let product = product.map_err(|row| row.to_string())?;
        texts.push((product.id, String::from_utf8(product.json.to_vec()).expect("UTF-8")));
    }
    texts.sort();
    Ok(texts)
}

async fn name_of(database: &Database, id: i64) -> Result<String, String> {
    let products = products(database, &[id]).await?;
    let (_, json) = products.first().ok_or("no such product")?;
    let json: serde_json::Value = serde_json::from_str(json).expect("JSON");
    Ok(json["name"].as_str().expect("text").to_owned())
}
