//! What the host reads from the script root: `host.json`, and the settings that override it.
//!
//! It turns text into meaning once, at start, and refuses what the host would refuse. It does not touch the process
//! or the network. Keys are matched without regard to case, as .NET configuration does; JSON comments are not accepted.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value};
use tempfile::TempDir;

use super::functions::{Function, read_functions};
use super::options::{Dialect, StartError};

pub(super) type Environment = BTreeMap<String, String>;

/// Prefix of app settings that override host.json, e.g. `AzureFunctionsJobHost__customHandler__…`.
const OVERRIDE_PREFIX: &str = "azurefunctionsjobhost__";
const DEFAULT_INITIALIZATION_TIMEOUT: Duration = Duration::from_secs(30);
const DEFAULT_FUNCTION_TIMEOUT: Duration = Duration::from_secs(30 * 60);
/// `functionTimeout: -1` means none; a day is longer than any test.
const UNLIMITED: Duration = Duration::from_secs(24 * 60 * 60);

pub(super) struct Files {
    pub executable: PathBuf,
    pub arguments: Vec<String>,
    pub working_directory: PathBuf,
    /// False: only stderr lines that speak of an error are errors.
    pub stderr_is_for_errors: bool,
    /// How HTTP functions reach the handler, after host.json's flags and the age of the host.
    pub dialect: Dialect,
    /// The client follows redirects unless `enableForwardingHttpRequest` is set.
    pub follows_redirects: bool,
    pub initialization_timeout: Duration,
    pub function_timeout: Duration,
    pub functions: Vec<Function>,
    pub sql_max_batch_size: usize,
    pub warnings: Vec<String>,
}

impl Files {
    pub fn read(root: &Path, environment: &Environment, host: Dialect) -> Result<Files, StartError> {
        let mut config = parse(&root.join("host.json"))?;
        apply_overrides(&mut config, environment);
        let mut warnings = Vec::new();
        if field(&config, "version").and_then(Value::as_str) != Some("2.0") {
            return Err(refused("host.json: the 'version' property must be exactly \"2.0\""));
        }
        let handler = custom_handler(&config, &mut warnings)?;
        let description = field(handler, "description").ok_or_else(|| refused("Missing worker Description."))?;

        let functions = read_functions(root, &route_prefix(&config), environment, &mut warnings)?;
        let forwarding = flag(handler, "enableForwardingHttpRequest");
        let proxying = flag(handler, "enableProxyingHttpRequest") && host == Dialect::Proxy;
        if let Some(function) = functions.iter().find(|f| f.is_http()).filter(|_| !forwarding && !proxying) {
            return Err(StartError::Envelope { function: function.name.clone() });
        }

        let batch = ["Sql_Trigger_MaxBatchSize", "Sql_Trigger_BatchSize"].iter().find_map(|key| environment.get(*key));
        let batch = batch.cloned().or_else(|| at(&config, &["extensions", "sql", "MaxBatchSize"]).map(plain));
        Ok(Files {
            executable: executable(root, description, environment)?,
            arguments: arguments(description, environment),
            working_directory: working_directory(root, description, environment),
            stderr_is_for_errors: field(description, "useStdErrorStreamForErrorsOnly").is_none_or(truthy),
            dialect: if proxying { Dialect::Proxy } else { Dialect::Forward },
            follows_redirects: !forwarding,
            initialization_timeout: time_span(field(handler, "initializationTimeout"), DEFAULT_INITIALIZATION_TIMEOUT)?,
            function_timeout: time_span(field(&config, "functionTimeout"), DEFAULT_FUNCTION_TIMEOUT)?,
            functions,
            sql_max_batch_size: positive(batch.as_deref(), 100)?,
            warnings,
        })
    }
}

/// Copies what the host reads of a project into a fresh folder: `host.json`, every `<Function>/function.json`, and the
/// handler under the exact name of `defaultExecutablePath`.
///
/// The handler is hard-linked where the file system allows, else copied. Fails if host.json names no plain relative path.
pub fn stage(project_root: &Path, handler_binary: &Path) -> io::Result<TempDir> {
    let staged = TempDir::new()?;
    fs::copy(project_root.join("host.json"), staged.path().join("host.json"))?;
    for directory in folders(project_root)? {
        let source = project_root.join(&directory).join("function.json");
        if source.is_file() {
            fs::create_dir(staged.path().join(&directory))?;
            fs::copy(source, staged.path().join(&directory).join("function.json"))?;
        }
    }
    let config = parse(&project_root.join("host.json")).map_err(|error| io::Error::other(error.to_string()))?;
    let name = at(&config, &["customHandler", "description", "defaultExecutablePath"]).map(plain).unwrap_or_default();
    let plain_path = !name.is_empty() && Path::new(&name).components().all(|part| matches!(part, Component::Normal(_)));
    if !plain_path {
        return Err(io::Error::other(format!("defaultExecutablePath {name:?} is no plain relative path")));
    }
    let target = staged.path().join(name);
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    if fs::hard_link(handler_binary, &target).is_err() {
        fs::copy(handler_binary, &target)?;
    }
    Ok(staged)
}

fn custom_handler<'a>(config: &'a Value, warnings: &mut Vec<String>) -> Result<&'a Value, StartError> {
    let legacy = field(config, "httpWorker").is_some();
    let Some(handler) = field(config, "customHandler") else {
        if legacy {
            return Err(StartError::NotModelled("host.json: the legacy 'httpWorker' section".into()));
        }
        return Err(refused("host.json has no 'customHandler' section: the host would look for a language worker"));
    };
    if legacy {
        warnings.push(
            "Both httpWorker and customHandler sections are spefified in host.json file. customHandler takes precedence."
                .into(),
        );
    }
    if field(handler, "type").map(plain).is_some_and(|kind| kind.eq_ignore_ascii_case("none")) {
        warnings.push("CustomHandlerType None is not supported. Defaulting to Http.".into());
    }
    Ok(handler)
}

/// Relative: under the script root if that file exists, else as it stands, which leaves it to PATH.
fn executable(root: &Path, description: &Value, environment: &Environment) -> Result<PathBuf, StartError> {
    let named = expand(&field(description, "defaultExecutablePath").map(plain).unwrap_or_default(), environment);
    if named.is_empty() {
        return Err(refused("WorkerDescription DefaultExecutablePath cannot be empty"));
    }
    let under_root = root.join(&named);
    if Path::new(&named).is_relative() && under_root.is_file() {
        return Ok(under_root);
    }
    Ok(named.into())
}

/// The host concatenates its arguments unquoted, and the runtime splits the line again.
fn arguments(description: &Value, environment: &Environment) -> Vec<String> {
    let list = |key| field(description, key).and_then(Value::as_array).into_iter().flatten().map(plain);
    let worker_path = field(description, "defaultWorkerPath").map(plain).filter(|path| !path.is_empty());
    let line = list("arguments")
        .chain(worker_path.map(|path| format!("\"{path}\"")))
        .chain(list("workerArguments"))
        .collect::<Vec<_>>()
        .join(" ");
    split_arguments(&expand(&line, environment))
}

fn split_arguments(line: &str) -> Vec<String> {
    let (mut arguments, mut current, mut started, mut quoted) = (Vec::new(), String::new(), false, false);
    for character in line.chars() {
        match character {
            '"' => (quoted, started) = (!quoted, true),
            ' ' | '\t' if !quoted => {
                if std::mem::take(&mut started) {
                    arguments.push(std::mem::take(&mut current));
                }
            }
            other => {
                started = true;
                current.push(other);
            }
        }
    }
    if started {
        arguments.push(current);
    }
    arguments
}

fn working_directory(root: &Path, description: &Value, environment: &Environment) -> PathBuf {
    let named = field(description, "workingDirectory").map(plain).unwrap_or_default();
    root.join(expand(&named, environment))
}

fn route_prefix(config: &Value) -> Vec<String> {
    let prefix = at(config, &["extensions", "http", "routePrefix"]).map_or_else(|| "api".into(), plain);
    prefix.split('/').filter(|part| !part.is_empty()).map(String::from).collect()
}

/// `%NAME%` becomes the variable's value, or nothing if it is unset.
fn expand(text: &str, environment: &Environment) -> String {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('%') {
        expanded.push_str(before);
        let Some((name, tail)) = after.split_once('%').filter(|(name, _)| !name.is_empty()) else {
            expanded.push('%');
            rest = after;
            continue;
        };
        expanded.push_str(environment.get(name).map(String::as_str).unwrap_or_default());
        rest = tail;
    }
    expanded + rest
}

fn apply_overrides(config: &mut Value, environment: &Environment) {
    for (key, value) in environment {
        if let Some(path) = key.to_ascii_lowercase().strip_prefix(OVERRIDE_PREFIX) {
            let path: Vec<&str> = key[key.len() - path.len()..].split("__").collect();
            set(config, &path, value);
        }
    }
}

fn set(node: &mut Value, path: &[&str], value: &str) {
    let Some((first, rest)) = path.split_first() else {
        *node = Value::String(value.into());
        return;
    };
    if let (Value::Array(list), Ok(index)) = (&mut *node, first.parse::<usize>()) {
        if list.len() <= index {
            list.resize(index + 1, Value::Null);
        }
        return set(&mut list[index], rest, value);
    }
    if !node.is_object() {
        *node = Value::Object(Map::new());
    }
    if let Value::Object(map) = node {
        let key = map.keys().find(|key| key.eq_ignore_ascii_case(first)).cloned().unwrap_or_else(|| (*first).into());
        set(map.entry(key).or_insert(Value::Null), rest, value);
    }
}

pub(super) fn parse(path: &Path) -> Result<Value, StartError> {
    let wrong = |error: &dyn std::fmt::Display| refused(format!("{}: {error}", path.display()));
    let text = fs::read_to_string(path).map_err(|error| wrong(&error))?;
    let value: Value = serde_json::from_str(text.trim_start_matches('\u{feff}')).map_err(|error| wrong(&error))?;
    if value.is_object() { Ok(value) } else { Err(wrong(&"is not a JSON object")) }
}

pub(super) fn folders(root: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        if entry.path().is_dir() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

pub(super) fn field<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    let (_, value) = value.as_object()?.iter().find(|(key, _)| key.eq_ignore_ascii_case(name))?;
    Some(value).filter(|value| !value.is_null())
}

fn at<'a>(value: &'a Value, path: &[&str]) -> Option<&'a Value> {
    path.iter().try_fold(value, |value, name| field(value, name))
}

pub(super) fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), String::from)
}

pub(super) fn text(value: &Value, name: &str) -> String {
    field(value, name).map(plain).unwrap_or_default()
}

fn truthy(value: &Value) -> bool {
    plain(value).eq_ignore_ascii_case("true")
}

pub(super) fn flag(value: &Value, name: &str) -> bool {
    field(value, name).is_some_and(truthy)
}

fn positive(text: Option<&str>, default: usize) -> Result<usize, StartError> {
    let Some(text) = text else { return Ok(default) };
    text.parse().ok().filter(|number| *number > 0).ok_or_else(|| refused(format!("'{text}' is not a positive number")))
}

/// `[d.]hh:mm:ss[.fff]`, or -1 for no limit.
fn time_span(value: Option<&Value>, default: Duration) -> Result<Duration, StartError> {
    let Some(text) = value.map(plain) else { return Ok(default) };
    if text == "-1" {
        return Ok(UNLIMITED);
    }
    let parts: Vec<&str> = text.split(':').collect();
    let parsed = match parts[..] {
        [hours, minutes, seconds] => {
            let (days, hours) = hours.split_once('.').unwrap_or(("0", hours));
            let whole = |text: &str| text.parse::<u64>().ok();
            let seconds = seconds.parse::<f64>().ok().filter(|seconds| (0.0..60.0).contains(seconds));
            whole(days).zip(whole(hours)).zip(whole(minutes)).zip(seconds)
        }
        _ => None,
    };
    let (((days, hours), minutes), seconds) = parsed.ok_or_else(|| refused(format!("'{text}' is not a time span")))?;
    Ok(Duration::from_secs(((days * 24 + hours) * 60 + minutes) * 60) + Duration::from_secs_f64(seconds))
}

pub(super) fn refused(reason: impl Into<String>) -> StartError {
    StartError::Refused(reason.into())
}
