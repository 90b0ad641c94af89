//! Generated products: the rows in a database, and the exact bytes a client must get for them.
//!
//! Ids have seven digits, so that all bodies of a size are equally long. Must not know who serves them.

use std::{fs, path::Path};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, SqliteConnection, sqlite::SqliteConnectOptions};

use crate::Result;

/// The first product's id.
pub const FIRST: i64 = 1_000_001;

/// How large the bodies are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// 3.4 kB: a product with a photo.
    Large,
    /// 0.6 kB: one with hardly any.
    Small,
}

impl Size {
    /// Both, the larger first.
    pub const BOTH: [Self; 2] = [Self::Large, Self::Small];

    /// As scenarios are named.
    pub fn name(self) -> &'static str {
        match self {
            Self::Large => "3.4kB",
            Self::Small => "0.6kB",
        }
    }

    fn photo(self) -> Vec<u8> {
        let length = match self {
            Self::Large => 2220,
            Self::Small => 120,
        };
        // Incompressible enough (a Weyl sequence's high bits), and the same in every run.
        (0..length as u32).map(|n| (n.wrapping_mul(0x9E37_79B9) >> 24) as u8).collect()
    }
}

/// The bodies of a size.
pub struct Bodies {
    photo: String,
}

impl Bodies {
    /// Of this size.
    pub fn new(size: Size) -> Self {
        Self { photo: STANDARD.encode(size.photo()) }
    }

    /// What a client must get for the product.
    pub fn json(&self, id: i64) -> String {
        format!(
            "{{\"productID\":{id},\"name\":\"Product {id}, black\",\"productNumber\":\"BP-{id}\",\"color\":\"Black\",\
             \"standardCost\":1059.3100,\"listPrice\":1431.5000,\"size\":\"58\",\"weight\":1016.04,\
             \"productCategoryID\":18,\"productModelID\":6,\"sellStartDate\":\"2002-06-01T00:00:00\",\
             \"sellEndDate\":null,\"discontinuedDate\":null,\"thumbNailPhoto\":\"{}\",\
             \"thumbnailPhotoFileName\":\"frame_black_small.gif\",\
             \"rowguid\":\"43dd68d6-14a4-461f-9069-55309d90ea7e\",\"modifiedDate\":\"2008-03-11T10:01:36.827\"}}",
            self.photo
        )
    }

    /// Bytes of every body.
    pub fn len(&self) -> usize {
        self.json(FIRST).len()
    }

    /// Never.
    pub fn is_empty(&self) -> bool {
        false
    }
}

/// How the rows are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// Each in full, as a catalogue has them.
    Stored,
    /// Ids alone, the rest by a view: a million is made in seconds. For what never measures the database.
    Computed,
}

const COLUMNS: &str = "ProductID, Name, ProductNumber, Color, StandardCost, ListPrice, Size, Weight, ProductCategoryID, \
    ProductModelID, SellStartDate, SellEndDate, DiscontinuedDate, ThumbNailPhoto, ThumbnailPhotoFileName, rowguid, ModifiedDate";

/// The columns of a product, in the SQL of all engines; `photo` stands for the photo.
fn values(id: &str, photo: &str) -> String {
    format!(
        "{id} AS ProductID, 'Product ' || {id} || ', black' AS Name, 'BP-' || {id} AS ProductNumber, 'Black' AS Color, \
         '1059.3100' AS StandardCost, '1431.5000' AS ListPrice, '58' AS Size, '1016.04' AS Weight, \
         18 AS ProductCategoryID, 6 AS ProductModelID, '2002-06-01T00:00:00' AS SellStartDate, NULL AS SellEndDate, \
         NULL AS DiscontinuedDate, {photo} AS ThumbNailPhoto, 'frame_black_small.gif' AS ThumbnailPhotoFileName, \
         '43dd68d6-14a4-461f-9069-55309d90ea7e' AS rowguid, '2008-03-11T10:01:36.827' AS ModifiedDate"
    )
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn script(name: &str) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../sql").join(name);
    fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))
}

/// Makes a SQLite file with this many products.
pub async fn fill_sqlite(file: &Path, count: i64, size: Size, rows: Rows) -> Result<()> {
    let options = SqliteConnectOptions::new().filename(file).create_if_missing(true).pragma("journal_mode", "WAL");
    let mut connection = SqliteConnection::connect_with(&options).await.map_err(|error| error.to_string())?;
    let (last, photo) = (FIRST + count - 1, hex(&size.photo()));
    let ids = format!("WITH RECURSIVE ids(id) AS (SELECT {FIRST} UNION ALL SELECT id + 1 FROM ids WHERE id < {last})");
    let fill = match rows {
        Rows::Stored => format!(
            "INSERT INTO product ({COLUMNS}) {ids} SELECT {} FROM ids; DELETE FROM product_change;",
            values("id", &format!("X'{photo}'"))
        ),
        Rows::Computed => format!(
            "ALTER TABLE product RENAME TO product_rows; CREATE TABLE product_ids (id INTEGER PRIMARY KEY);
             INSERT INTO product_ids {ids} SELECT id FROM ids;
             CREATE VIEW product AS SELECT {} FROM product_ids;",
            values("id", &format!("X'{photo}'"))
        ),
    };
    for sql in ["BEGIN", &script("sqlite.sql")?, "DELETE FROM product; DELETE FROM product_change;", &fill, "COMMIT"] {
        connection.execute(sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))).await.map_err(|error| error.to_string())?;
    }
    connection.close().await.map_err(|error| error.to_string())
}

/// Runs SQL on a SQLite file.
pub async fn sqlite(file: &Path, sql: &str) -> Result<()> {
    let options = SqliteConnectOptions::new().filename(file);
    let mut connection = SqliteConnection::connect_with(&options).await.map_err(|error| error.to_string())?;
    let sql = sqlx::raw_sql(AssertSqlSafe(sql.to_owned()));
    connection.execute(sql).await.map_err(|error| error.to_string())?;
    connection.close().await.map_err(|error| error.to_string())
}

/// Fills an empty PostgreSQL database with this many products.
pub async fn fill_postgres(owner: &mut PgConnection, count: i64, size: Size) -> Result<()> {
    let (last, photo) = (FIRST + count - 1, hex(&size.photo()));
    let values = values("id", &format!("'\\x{photo}'::bytea"))
        .replace("'1059.3100' AS", "1059.3100 AS")
        .replace("'1431.5000' AS", "1431.5000 AS")
        .replace("'1016.04' AS", "1016.04 AS")
        .replace("'2002-06-01T00:00:00' AS", "timestamp '2002-06-01T00:00:00' AS")
        .replace("'2008-03-11T10:01:36.827' AS", "timestamp '2008-03-11T10:01:36.827' AS")
        .replace("NULL AS", "NULL::timestamp AS")
        .replace("'43dd68d6-14a4-461f-9069-55309d90ea7e' AS", "'43dd68d6-14a4-461f-9069-55309d90ea7e'::uuid AS");
    let fill =
        format!("INSERT INTO product ({COLUMNS}) SELECT {values} FROM generate_series({FIRST}, {last}) AS ids(id)");
    let grant = "GRANT SELECT ON product, product_change, product_change_pruned TO handler";
    for sql in [&script("postgresql.sql")?, "DELETE FROM product", &fill, grant, "ANALYZE product"] {
        let sql = sqlx::raw_sql(AssertSqlSafe((*sql).to_owned()));
        owner.execute(sql).await.map_err(|error| error.to_string())?;
    }
    Ok(())
}
