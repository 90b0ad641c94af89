//! The app's files as the Functions host will read them: host.json and each function.json, against what the handler does.
//!
//! Reads files only. Property names are matched without regard to case, as the host does it.

use std::{fs, path::Path};

use serde_json::Value;

use crate::{
    config::{Config, Source, read_json},
    finding::Finding,
    functions::{ROUTES, Route, Trigger},
    product,
};

/// The setting that the handler reads the database's connection string from.
const SQL: &str = "Sql";
/// As many rows with photos stay below the default of INVALIDATE_MAX_BODY_BYTES.
const MAX_BATCH: u64 = 1000;
/// The host's own limit where host.json names none, on the plans that have one.
const SHORTEST_TIMEOUT_S: u64 = 300;

pub(super) fn examine(root: &Path, config: &Config) -> Vec<Finding> {
    let path = root.join("host.json");
    let host = match read_json(&path) {
        Ok(Some(host)) => host,
        Ok(None) => {
            return vec![Finding::warn(
                format!("there is no {}", path.display()),
                "run it in the app's folder, to have its files looked at too",
            )];
        }
        Err(mistake) => return vec![Finding::fail(mistake, "the host would not start; correct the file")],
    };
    let mut findings = Vec::new();
    findings.extend(custom_handler(root, &host));
    findings.push(bundle(&host));
    findings.extend(limits(&host, config));
    for route in ROUTES {
        findings.extend(function(root, route));
    }
    findings.extend(strangers(root));
    findings.push(who_tells_of_changes(config));
    findings
}

fn custom_handler(root: &Path, host: &Value) -> Vec<Finding> {
    let mut findings = Vec::new();
    let name = at(host, &["customHandler", "description", "defaultExecutablePath"]).and_then(Value::as_str);
    let file = name.map(|name| root.join(name));
    findings.push(match (name, file.as_deref().map(fs::metadata)) {
        (None | Some(""), _) => Finding::fail(
            "host.json names no customHandler.description.defaultExecutablePath",
            "name the handler's file there",
        ),
        (Some(name), Some(Ok(file))) if is_executable(&file) => {
            Finding::ok(format!("host.json starts {name}, {} bytes", file.len()))
        }
        (Some(name), Some(Ok(_))) => {
            Finding::fail(format!("{name} is not executable"), "chmod +x, or package it with scripts/package")
        }
        (Some(name), _) => Finding::warn(
            format!("host.json starts {name}, which is not here"),
            "scripts/local-handler puts it in place for func start; scripts/package into the package",
        ),
    });
    let is_on = |flag: &str| at(host, &["customHandler", flag]).and_then(Value::as_bool) == Some(true);
    if !is_on("enableForwardingHttpRequest") && !is_on("enableProxyingHttpRequest") {
        findings.push(Finding::fail(
            "host.json forwards no HTTP requests, so that the host would wrap them in JSON",
            "set customHandler.enableForwardingHttpRequest to true",
        ));
    }
    findings
}

/// The SQL trigger is in the bundle's versions 4.13.2 and later (extensions.json of the bundle).
fn bundle(host: &Value) -> Finding {
    match at(host, &["extensionBundle", "version"]).and_then(Value::as_str) {
        None => Finding::fail(
            "host.json has no extensionBundle, so there is no SQL trigger",
            "add extensionBundle with version [4.*, 5.0.0)",
        ),
        Some(range) if range.trim_start_matches(['[', '(', ' ']).starts_with("4.") => {
            Finding::ok(format!("extension bundle {range}"))
        }
        Some(range) => Finding::warn(
            format!("extension bundle {range} is not one that InvalidateCache is known to work with"),
            "use [4.*, 5.0.0)",
        ),
    }
}

fn limits(host: &Value, config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    let budget = config.invalidate.budget.as_secs();
    let timeout = at(host, &["functionTimeout"]).and_then(Value::as_str).map(seconds);
    if timeout == Some(None) {
        findings.push(Finding::fail("host.json's functionTimeout is not hh:mm:ss", "write 00:05:00"));
    }
    let timeout = timeout.flatten().unwrap_or(SHORTEST_TIMEOUT_S);
    if timeout <= budget {
        findings.push(Finding::fail(
            format!("functionTimeout is {timeout} s, and one call of InvalidateCache may take {budget} s"),
            "lengthen functionTimeout, or lower INVALIDATE_BUDGET_MS",
        ));
    }
    let batch = at(host, &["extensions", "sql", "MaxBatchSize"]).and_then(Value::as_u64).unwrap_or(100);
    if batch > MAX_BATCH {
        findings.push(Finding::warn(
            format!(
                "extensions.sql.MaxBatchSize is {batch}: with photos, a batch may exceed INVALIDATE_MAX_BODY_BYTES"
            ),
            format!("lower it to {MAX_BATCH}, or raise INVALIDATE_MAX_BODY_BYTES"),
        ));
    }
    findings
}

fn function(root: &Path, route: &Route) -> Vec<Finding> {
    let (name, path) = (route.function, root.join(route.function).join("function.json"));
    let json = match read_json(&path) {
        Ok(Some(json)) => json,
        Ok(None) => {
            return vec![Finding::fail(
                format!("there is no {name}/function.json, so nobody calls {name}"),
                "take it from the repository",
            )];
        }
        Err(mistake) => return vec![Finding::fail(mistake, "the host would not load this function; correct the file")],
    };
    let bindings = at(&json, &["bindings"]).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let kind = |binding: &Value| at(binding, &["type"]).and_then(Value::as_str).unwrap_or("").to_ascii_lowercase();
    let wanted: &[&str] = match route.trigger {
        Trigger::Http => &["httptrigger"],
        Trigger::Host => &["sqltrigger", "mysqltrigger"],
    };
    let Some(trigger) = bindings.iter().find(|binding| wanted.contains(&&*kind(binding))) else {
        return vec![Finding::fail(
            format!("{name}/function.json has no binding of type {}", wanted.join(" or ")),
            "take it from the repository",
        )];
    };
    match route.trigger {
        Trigger::Http => http_trigger(route, trigger),
        Trigger::Host => row_trigger(name, trigger),
    }
}

fn http_trigger(route: &Route, trigger: &Value) -> Vec<Finding> {
    let mut findings = Vec::new();
    let methods = at(trigger, &["methods"]).and_then(Value::as_array);
    let missing = route.methods.iter().copied().filter(|method| {
        let has = |methods: &Vec<Value>| {
            methods.iter().any(|has| has.as_str().is_some_and(|has| has.eq_ignore_ascii_case(method)))
        };
        !methods.is_none_or(has)
    });
    let missing: Vec<_> = missing.collect();
    if !missing.is_empty() {
        findings.push(Finding::warn(
            format!("{}/function.json lets no {} through", route.function, missing.join(", ")),
            format!("methods should be {}", route.methods.join(", ")),
        ));
    }
    if let Some(route_text) = at(trigger, &["route"]).and_then(Value::as_str)
        && !route_text.trim_matches('/').eq_ignore_ascii_case(route.function)
    {
        findings.push(Finding::fail(
            format!("{}/function.json has the route {route_text:?}, which the handler does not serve", route.function),
            "remove it: the function's name is its path",
        ));
    }
    if at(trigger, &["authLevel"]).and_then(Value::as_str).is_some_and(|level| level.eq_ignore_ascii_case("anonymous"))
    {
        findings.push(Finding::warn(
            format!("{} can be called by anybody", route.function),
            "set authLevel to function, unless something in front of the app decides who may",
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::ok(format!("{}/function.json fits the handler", route.function)));
    }
    findings
}

fn row_trigger(name: &str, trigger: &Value) -> Vec<Finding> {
    let mut findings = Vec::new();
    let text = |field: &str| at(trigger, &[field]).and_then(Value::as_str).unwrap_or_default();
    let table: String = text("tableName").chars().filter(|c| !"[]`\"".contains(*c)).collect();
    if ![product::TABLE.sql_server_name, product::TABLE.name].iter().any(|known| known.eq_ignore_ascii_case(&table)) {
        findings.push(Finding::fail(
            format!(
                "{name}/function.json watches the table {table:?}, and the handler reads {}",
                product::TABLE.sql_server_name
            ),
            "tableName should be [SalesLT].[Product]",
        ));
    }
    let setting = text("connectionStringSetting");
    if setting != SQL {
        findings.push(Finding::warn(
            format!("{name}/function.json watches the database of the setting {setting:?}, and the handler reads that of {SQL:?}"),
            "name the same setting, unless both are the same database",
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::ok(format!("{name}/function.json fits the handler")));
    }
    findings
}

/// Folders that the host takes for functions and the handler does not know.
fn strangers(root: &Path) -> Vec<Finding> {
    let Ok(entries) = fs::read_dir(root) else { return Vec::new() };
    let names = entries.flatten().filter(|entry| entry.path().join("function.json").is_file());
    let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let unknown = names.filter(|name| !ROUTES.iter().any(|route| route.function == name));
    let finding = |name| {
        Finding::fail(
            format!("the folder {name} has a function.json, and the handler has no function of that name"),
            "remove the folder, or give it the exact name of its function",
        )
    };
    unknown.map(finding).collect()
}

fn who_tells_of_changes(config: &Config) -> Finding {
    let by_trigger = matches!(config.database.source, Source::SqlServer(_));
    let disabled = config.invalidate.trigger_disabled;
    match config.database.feed_interval {
        _ if !by_trigger && !disabled => Finding::fail(
            "InvalidateCache has a SQL trigger, and Sql is no SQL Server: the host cannot start it",
            "set AzureWebJobs.InvalidateCache.Disabled to true; the change feed does its job",
        ),
        Some(interval) => {
            Finding::ok(format!("changes are told by the change feed, every {} ms", interval.as_millis()))
        }
        None if by_trigger && !disabled => Finding::ok("changes are told by the SQL trigger"),
        None => Finding::fail(
            "nothing tells of changes: the change feed is off, and so is the trigger",
            "leave FEED_INTERVAL_MS empty",
        ),
    }
}

/// `[d.]hh:mm:ss`, in seconds; -1 is no limit.
fn seconds(text: &str) -> Option<u64> {
    if text == "-1" {
        return Some(u64::MAX);
    }
    let (days, rest) = match text.split_once('.') {
        Some((days, rest)) if rest.contains(':') => (days, rest),
        _ => ("0", text),
    };
    let number = |text: &str| text.parse::<u32>().ok().map(u64::from);
    let parts: Vec<u64> = rest.split(':').map(number).collect::<Option<_>>()?;
    let [hours, minutes, seconds] = parts[..] else { return None };
    Some(((number(days)? * 24 + hours) * 60 + minutes) * 60 + seconds)
}

fn at<'a>(json: &'a Value, path: &[&str]) -> Option<&'a Value> {
    path.iter().try_fold(json, |json, name| {
        json.as_object()?.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    })
}

#[cfg(unix)]
fn is_executable(file: &fs::Metadata) -> bool {
    std::os::unix::fs::PermissionsExt::mode(&file.permissions()) & 0o111 != 0
}

#[cfg(not(unix))]
fn is_executable(_: &fs::Metadata) -> bool {
    true
}
