//! docs/operations.md, which is read when something is wrong: what it quotes is what the program says.

use std::{collections::BTreeSet, fs, path::Path};

use serde_json::Value;

use crate::support::{eventually, instance::start, redis::RedisServer};

const PAGE: &str = include_str!("../docs/operations.md");

/// Every name in it, with the kind of its value.
fn names(prefix: &str, value: &Value) -> BTreeSet<String> {
    let kind = match value {
        Value::Object(members) => {
            return members.iter().flat_map(|(name, value)| names(&format!("{prefix}.{name}"), value)).collect();
        }
        Value::Number(number) if number.is_f64() => "number with decimals",
        Value::Number(_) => "whole number",
        Value::String(_) => "text",
        Value::Bool(_) => "true or false",
        Value::Array(_) => "list",
        Value::Null => "null",
    };
    BTreeSet::from([format!("{prefix}: {kind}")])
}

#[tokio::test]
async fn the_status_of_an_instance_has_the_names_that_the_page_shows() {
    let (_, section) = PAGE.split_once("\n## GET /").expect("its section");
    let shown = section.split("```json\n").nth(1).and_then(|rest| rest.split("```").next()).expect("an example");
    let redis = RedisServer::start().await;
    let instance = start().patient().env("Redis", redis.url()).up().await;
    assert_eq!(instance.invalidate(&[680]).await.status, 200);
    let status = eventually("its notice is heard", async || {
        let status = instance.status().await;
        status["redis"]["logPosition"].is_string().then_some(status)
    })
    .await;
    assert_eq!(names("", &status), names("", &serde_json::from_str(shown).expect("JSON")));
}

/// All string literals of the program, and whatever is between them.
fn sources(folder: &Path) -> String {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let texts = paths.map(|path| match path.is_dir() {
        true => sources(&path),
        false => {
            let text = fs::read_to_string(&path).unwrap();
            let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
            text.lines().map(str::trim).filter(|line| !line.starts_with("//")).collect::<Vec<_>>().join("\n")
        }
    });
    // A literal may go on in the next line.
    texts.collect::<Vec<_>>().join("\n").replace("\\\n", "")
}

/// What a row of a table has in code style in its first cell.
fn quoted(row: &str) -> Vec<&str> {
    let cell = row.trim_start_matches('|').split('|').next().unwrap_or_default();
    cell.split('`').skip(1).step_by(2).collect()
}

#[test]
fn every_line_of_the_log_that_the_page_explains_is_one_that_the_program_writes() {
    // Of an answer or the host; or made of parts, and seen in startup.rs.
    const OTHERS: [&str; 5] = [
        "Cache-Status: …; detail=database-failed",
        "Retry-After",
        "failure=",
        "Port is already in use. Process cannot start.",
        "N wrong settings: …",
    ];
    let sources = sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    let mut looked_for = 0;
    let tables = PAGE.split("\n\n").filter(|part| part.starts_with("| Said |") || part.starts_with("| Seen |"));
    for row in tables.flat_map(|table| table.lines().skip(2)).filter(|row| !row.contains("| the host |")) {
        for line in quoted(row).into_iter().filter(|line| !OTHERS.contains(line)) {
            for part in line.split('…').map(str::trim).filter(|part| part.len() > 1) {
                assert!(sources.contains(part), "`{line}` is in docs/operations.md and not in src: {part:?}");
                looked_for += 1;
            }
        }
    }
    assert!(looked_for > 20, "the tables are there: {looked_for}");
}
