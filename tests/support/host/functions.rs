//! The functions of an app: `<Function>/function.json`, its trigger, its outputs, and whether a setting disables it.
//!
//! It refuses what the host would put "in error". It does not know host.json beyond the route prefix.
//! Invariant: a function has exactly one trigger and no other input.

use std::collections::HashSet;
use std::path::Path;

use serde_json::Value;

use super::files::{Environment, field, flag, folders, parse, plain, refused, text};
use super::options::StartError;

pub(super) struct Function {
    pub name: String,
    pub trigger: Trigger,
    /// Output bindings: name, and whether `dataType` is binary.
    pub outputs: Vec<(String, bool)>,
    pub disabled: bool,
}

pub(super) enum Trigger {
    Http {
        route: Vec<Segment>,
        /// Upper case; `None` admits every method.
        methods: Option<Vec<String>>,
        auth: AuthLevel,
    },
    /// Everything the host turns into `POST /<function>`.
    Event { binding: String },
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum AuthLevel {
    Anonymous,
    Function,
    /// Needs the master key, which the stand-in does not have.
    Admin,
}

pub(super) enum Segment {
    Literal(String),
    Any,
}

impl Function {
    pub fn is_http(&self) -> bool {
        matches!(self.trigger, Trigger::Http { .. })
    }
}

pub(super) fn read_functions(
    root: &Path,
    prefix: &[String],
    environment: &Environment,
    warnings: &mut Vec<String>,
) -> Result<Vec<Function>, StartError> {
    let mut functions = Vec::new();
    for name in folders(root).map_err(|error| refused(format!("{}: {error}", root.display())))? {
        let path = root.join(&name).join("function.json");
        if path.is_file() {
            functions.push(read_function(&name, &parse(&path)?, prefix, environment, warnings)?);
        }
    }
    if functions.is_empty() {
        return Err(refused("No job functions found."));
    }
    Ok(functions)
}

fn read_function(
    name: &str,
    metadata: &Value,
    prefix: &[String],
    environment: &Environment,
    warnings: &mut Vec<String>,
) -> Result<Function, StartError> {
    let wrong = |reason: String| refused(format!("The '{name}' function is in error: {reason}"));
    let valid = name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    if !valid {
        return Err(wrong("the name is not a valid function name.".into()));
    }
    let bindings = field(metadata, "bindings").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let mut names = HashSet::new();
    for binding in bindings {
        let (binding_name, kind) = (text(binding, "name"), text(binding, "type"));
        if binding_name.is_empty() || kind.is_empty() {
            return Err(wrong("a binding needs a 'name' and a 'type'.".into()));
        }
        if !names.insert(binding_name.to_ascii_lowercase()) {
            return Err(wrong(format!(
                "Multiple bindings with name '{binding_name}' discovered. Binding names must be unique."
            )));
        }
    }
    let (inputs, outputs): (Vec<_>, Vec<_>) =
        bindings.iter().partition(|binding| !text(binding, "direction").eq_ignore_ascii_case("out"));
    let triggers: Vec<_> = inputs.iter().filter(|binding| is_trigger(binding)).collect();
    let [trigger] = triggers[..] else {
        return Err(wrong(format!("exactly one trigger binding is needed, there are {}.", triggers.len())));
    };
    if inputs.len() > 1 {
        return Err(StartError::NotModelled(format!("{name}: input bindings beside the trigger")));
    }
    Ok(Function {
        name: name.into(),
        trigger: read_trigger(name, trigger, &outputs, prefix, environment, warnings)?,
        outputs: outputs
            .iter()
            .map(|binding| (text(binding, "name"), text(binding, "dataType").eq_ignore_ascii_case("binary")))
            .collect(),
        disabled: flag(metadata, "disabled") || disabled_by_setting(name, environment),
    })
}

fn read_trigger(
    name: &str,
    trigger: &Value,
    outputs: &[&Value],
    prefix: &[String],
    environment: &Environment,
    warnings: &mut Vec<String>,
) -> Result<Trigger, StartError> {
    let wrong = |reason: String| refused(format!("The '{name}' function is in error: {reason}"));
    let kind = text(trigger, "type").to_ascii_lowercase();
    if kind == "httptrigger" {
        let only_http_out = outputs.len() == 1 && text(outputs[0], "type").eq_ignore_ascii_case("http");
        if !only_http_out {
            return Err(StartError::Envelope { function: name.into() });
        }
        return read_http_trigger(name, trigger, prefix);
    }
    if kind == "sqltrigger" || kind == "mysqltrigger" {
        for property in ["tableName", "connectionStringSetting"] {
            if text(trigger, property).is_empty() {
                return Err(wrong(format!("{kind} needs '{property}'.")));
            }
        }
        let data_type = text(trigger, "dataType");
        if !(data_type.is_empty() || data_type.eq_ignore_ascii_case("string"))
            || text(trigger, "cardinality").eq_ignore_ascii_case("many")
        {
            return Err(wrong("Can't bind SqlTriggerAttribute to type other than string.".into()));
        }
        let setting = text(trigger, "connectionStringSetting");
        if !has_connection_string(&setting, environment) {
            warnings
                .push(format!("{name}: ConnectionStringSetting '{setting}' is missing; the host would not index it"));
        }
    }
    Ok(Trigger::Event { binding: text(trigger, "name") })
}

fn read_http_trigger(name: &str, trigger: &Value, prefix: &[String]) -> Result<Trigger, StartError> {
    let mut route: Vec<Segment> = prefix.iter().cloned().map(Segment::Literal).collect();
    let own = field(trigger, "route").map(plain).filter(|route| !route.is_empty()).unwrap_or_else(|| name.into());
    for part in own.split('/').filter(|part| !part.is_empty()) {
        if !part.contains(['{', '}']) {
            route.push(Segment::Literal(part.into()));
        } else if part.starts_with('{') && part.ends_with('}') && !part.contains([':', '?', '*', '=']) {
            route.push(Segment::Any);
        } else {
            return Err(StartError::NotModelled(format!("{name}: route part '{part}'")));
        }
    }
    let methods = field(trigger, "methods").and_then(Value::as_array);
    let methods = methods.map(|list| list.iter().map(|method| plain(method).to_ascii_uppercase()).collect());
    let auth = match text(trigger, "authLevel").to_ascii_lowercase().as_str() {
        "anonymous" => AuthLevel::Anonymous,
        "" | "function" => AuthLevel::Function,
        "admin" => AuthLevel::Admin,
        other => return Err(refused(format!("The '{name}' function is in error: authLevel '{other}'"))),
    };
    Ok(Trigger::Http { route, methods, auth })
}

fn is_trigger(binding: &Value) -> bool {
    text(binding, "type").to_ascii_lowercase().ends_with("trigger")
}

fn disabled_by_setting(name: &str, environment: &Environment) -> bool {
    let wanted = [format!("AzureWebJobs.{name}.Disabled"), format!("AzureWebJobs_{name}_Disabled")];
    environment.iter().any(|(key, value)| {
        let meant = wanted.iter().any(|wanted| wanted.eq_ignore_ascii_case(key));
        meant && (value == "1" || value.eq_ignore_ascii_case("true"))
    })
}

/// Connection strings first, then the plain setting; a set but empty one counts as missing.
fn has_connection_string(name: &str, environment: &Environment) -> bool {
    let prefixes =
        ["ConnectionStrings:", "ConnectionStrings__", "SQLAZURECONNSTR_", "SQLCONNSTR_", "MYSQLCONNSTR_", ""];
    prefixes.iter().any(|prefix| environment.get(&format!("{prefix}{name}")).is_some_and(|value| !value.is_empty()))
}
