//! The process's environment, `local.settings.json` and `host.json` → variables.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use super::{
    Config, ConfigError,
    settings::{HOST_NAMES, ROUTE_PREFIX, SECTION_COLON, is_known},
};

impl Config {
    /// Reads the process's environment; a standalone start also reads `Values` of `local.settings.json` in the working
    /// directory, which the environment overrides (as `func start` does).
    pub fn from_process() -> Result<Self, ConfigError> {
        let (variables, mistakes) = Self::variables_of_process();
        Self::parse(&variables, mistakes)
    }

    /// The same, but as a Functions host on this machine would start the handler, and with what would stop that start
    /// on this machine alone: an identity that is not here.
    pub fn from_process_as_under_a_host() -> Result<(Self, Vec<String>), ConfigError> {
        let (mut variables, mistakes) = Self::variables_of_process();
        variables.entry(HOST_NAMES[0].to_owned()).or_insert_with(|| "7071".to_owned());
        let (config, mut mistakes, lacking) = Self::read(&variables, mistakes);
        if mistakes.is_empty() {
            return Ok((config, lacking));
        }
        mistakes.extend(lacking);
        Err(ConfigError { mistakes })
    }

    fn variables_of_process() -> (BTreeMap<String, String>, Vec<String>) {
        let mut mistakes = Vec::new();
        let mut variables = BTreeMap::new();
        for (name, value) in std::env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            match value.into_string() {
                Ok(value) => drop(variables.insert(name, value)),
                Err(_) if is_known(&name) => mistakes.push(format!("{name} is not valid UTF-8")),
                Err(_) => {}
            }
        }
        let root = variables.get("FUNCTIONS_APP_ROOT_PATH").map_or_else(|| PathBuf::from("."), PathBuf::from);
        if port_name(&variables).is_none() {
            match local_settings(Path::new("local.settings.json")) {
                Ok(values) => {
                    for (name, value) in values {
                        variables.entry(name).or_insert(value);
                    }
                }
                Err(mistake) => mistakes.push(mistake),
            }
        }
        match host_json_route_prefix(&root.join("host.json")) {
            Ok(Some(prefix)) => drop(variables.entry(ROUTE_PREFIX.to_owned()).or_insert(prefix)),
            Ok(None) => {}
            Err(mistake) => mistakes.push(mistake),
        }
        (variables, mistakes)
    }
}

/// The variable by which a Functions host gives the port, if one does; the newer name wins.
pub(super) fn port_name(variables: &BTreeMap<String, String>) -> Option<&'static str> {
    HOST_NAMES[..2].iter().find(|name| variables.contains_key(**name)).copied()
}

/// The `Values` of a `local.settings.json` and its connection strings, as the variables that Core Tools makes of them;
/// empty if there is no such file.
fn local_settings(path: &Path) -> Result<BTreeMap<String, String>, String> {
    let Some(mut json) = read_json(path)? else { return Ok(BTreeMap::new()) };
    if json.get("IsEncrypted") != Some(&serde_json::Value::Bool(false)) {
        return Err(format!("{}: \"IsEncrypted\" must be false (a missing one means true)", path.display()));
    }
    let connection_strings = json.get_mut("ConnectionStrings").map(serde_json::Value::take);
    let mut values: BTreeMap<String, String> = match json.get_mut("Values").map(serde_json::Value::take) {
        None => BTreeMap::new(),
        Some(values) => serde_json::from_value(values)
            .map_err(|_| format!("{}: \"Values\" must be an object of strings", path.display()))?,
    };
    let Some(connection_strings) = connection_strings else { return Ok(values) };
    let strings: BTreeMap<String, ConnectionString> = serde_json::from_value(connection_strings).map_err(|_| {
        format!(
            "{}: \"ConnectionStrings\" must be an object of strings, or of objects with \"ConnectionString\"",
            path.display()
        )
    })?;
    for (name, ConnectionString::Plain(text) | ConnectionString::WithProvider { text }) in strings {
        values.insert(format!("{SECTION_COLON}{name}"), text);
    }
    Ok(values)
}

/// An entry of `ConnectionStrings` in a `local.settings.json`.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum ConnectionString {
    Plain(String),
    WithProvider {
        #[serde(rename = "ConnectionString")]
        text: String,
    },
}

/// `extensions.http.routePrefix` of a host.json, so that the prefix is written down once.
fn host_json_route_prefix(path: &Path) -> Result<Option<String>, String> {
    let Some(json) = read_json(path)? else { return Ok(None) };
    match json.pointer("/extensions/http/routePrefix") {
        None => Ok(None),
        Some(serde_json::Value::String(prefix)) => Ok(Some(prefix.clone())),
        Some(_) => Err(format!("{}: extensions.http.routePrefix must be a string", path.display())),
    }
}

pub(crate) fn read_json(path: &Path) -> Result<Option<serde_json::Value>, String> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("{} cannot be read: {error}", path.display())),
    };
    // What the host accepts: a byte order mark (editors on Windows), comments, trailing commas.
    json5::from_str(text.trim_start_matches('\u{feff}')).map(Some).map_err(|error| {
        let json5::Error::Message { location, .. } = error;
        let place = location.map_or_else(String::new, |at| format!(": line {}, column {}", at.line, at.column));
        format!("{} is not JSON{place}", path.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_settings_are_read_as_core_tools_reads_them() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("local.settings.json");
        let read = |text: &str| {
            std::fs::write(&path, text).expect("written");
            local_settings(&path)
        };
        let values = read("\u{feff}{\"IsEncrypted\": false, \"Values\": {\"Sql\": \"sqlite:a\"}}").expect("valid");
        assert_eq!(values["Sql"], "sqlite:a");
        assert!(read("{\"Values\": {}}").expect_err("encrypted").contains("IsEncrypted"));
        assert!(read("{\"IsEncrypted\": false, \"Values\": {\"A\": 1}}").expect_err("number").contains("strings"));
        let values = read(
            "{\"IsEncrypted\": false, \"ConnectionStrings\": {\"Sql\": \"sqlite:a\", \
             \"Redis\": {\"ConnectionString\": \"redis://h\", \"ProviderName\": \"x\"}}}",
        );
        let values = values.expect("valid");
        assert_eq!((&*values["ConnectionStrings:Sql"], &*values["ConnectionStrings:Redis"]), ("sqlite:a", "redis://h"));
        let wrong = read("{\"IsEncrypted\": false, \"ConnectionStrings\": {\"Sql\": 1}}");
        assert!(wrong.expect_err("number").contains("ConnectionStrings"));
        assert!(read("{").expect_err("cut").contains("not JSON: line 1"));
        std::fs::remove_file(&path).expect("removed");
        assert!(local_settings(&path).expect("no file is fine").is_empty());
    }
}
