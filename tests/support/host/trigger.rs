//! Non-HTTP invocations: the envelope the host posts, and what it makes of the answer.
//!
//! It knows the encoding chain and the response table; it does not know what is in the data it carries.
//! Invariant: an invocation ends within the function timeout, and a handler that overran it is replaced.

use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use hyper::Method;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::Host;
use super::client::{Answer, Outgoing, Payload};
use super::files::field;
use super::functions::{Function, Trigger};
use super::item::newtonsoft;

/// What became of one invocation.
#[derive(Debug, Clone, PartialEq)]
pub enum Invocation {
    /// `logs` go to the function's log at Information. `outputs` and `return_value` are as the handler sent them, null
    /// if absent. `decoded` names the output bindings whose text is valid base64, which the host turns into bytes.
    Succeeded { logs: Vec<String>, return_value: Value, outputs: Value, decoded: Vec<String> },
    /// The trigger counts a failed attempt. `status` is the handler's, if there was an answer. Logs in it are lost.
    Failed { status: Option<u16>, reason: String },
    /// The function timeout passed, the handler was killed and is being started again. `answer` is the status of a
    /// successful answer without a result (empty body, 204, `null`), or `None` if no answer came in time.
    NeverCompleted { answer: Option<u16> },
}

impl Invocation {
    pub fn succeeded(&self) -> bool {
        matches!(self, Self::Succeeded { .. })
    }
}

enum Verdict {
    Succeeded(Invocation),
    Failed(String),
    NoResult,
}

impl Host {
    /// One invocation of a non-HTTP function with `data` as the binding's string value, e.g. the array of `changes`.
    ///
    /// # Panics
    /// If there is no such function, or it has an HTTP trigger.
    pub async fn trigger(&self, function: &str, data: &str) -> Invocation {
        let body = envelope(function, self.binding(function), data, &utc_now(), &new_guid());
        self.invoke(function, &body).await
    }

    /// `POST /admin/functions/<function> {"input": …}`: one more level of encoding, and the value in Metadata too.
    ///
    /// # Panics
    /// As [`Host::trigger`].
    pub async fn admin_invoke(&self, function: &str, input: &str) -> Invocation {
        let body = admin_envelope(function, self.binding(function), input, &utc_now(), &new_guid());
        self.invoke(function, &body).await
    }

    /// Posts a ready-made body to a non-HTTP function and judges the answer.
    ///
    /// # Panics
    /// As [`Host::trigger`].
    pub async fn invoke(&self, function: &str, body: &str) -> Invocation {
        let function = self.event_function(function);
        if function.disabled {
            return Invocation::Failed { status: None, reason: "the function is disabled".into() };
        }
        let worker = match self.supervisor.ready().await {
            Ok(worker) => worker,
            Err(reason) => return Invocation::Failed { status: None, reason },
        };
        let id = new_guid();
        let deadline = Instant::now() + self.supervisor.files.function_timeout;
        let outcome = match timeout_at(deadline, self.post(function, body, &id)).await {
            Err(_) => Invocation::NeverCompleted { answer: None },
            Ok(Err(reason)) => Invocation::Failed { status: None, reason },
            Ok(Ok(answer)) => match judge(&answer, function) {
                Verdict::Succeeded(outcome) => outcome,
                Verdict::Failed(reason) => Invocation::Failed { status: Some(answer.status), reason },
                Verdict::NoResult => {
                    sleep_until(deadline).await;
                    Invocation::NeverCompleted { answer: Some(answer.status) }
                }
            },
        };
        self.report(&function.name, &id, &outcome);
        if let Invocation::NeverCompleted { .. } = outcome {
            self.overran(&worker).await;
        }
        outcome
    }

    fn report(&self, function: &str, id: &str, outcome: &Invocation) {
        let name = format!("'Functions.{function}'");
        self.supervisor.note(match outcome {
            Invocation::Succeeded { .. } => format!("Executed {name} (Succeeded, Id={id})"),
            Invocation::Failed { reason, .. } => format!("Executed {name} (Failed, Id={id}): {reason}"),
            Invocation::NeverCompleted { .. } => {
                let limit = self.supervisor.files.function_timeout;
                format!("Timeout value of {limit:?} exceeded by function {name} (Id={id})")
            }
        });
    }

    async fn post(&self, function: &Function, body: &str, id: &str) -> Result<Answer, String> {
        let body = Bytes::copy_from_slice(body.as_bytes());
        let payload = if self.core_tools { Payload::Sized(body) } else { Payload::Chunked(body) };
        let mut headers = vec![("Content-Type".to_string(), "application/json; charset=utf-8".to_string())];
        headers.extend(self.added_headers(id));
        headers.push(("Host".into(), format!("127.0.0.1:{}", self.port())));
        headers.push(("User-Agent".into(), self.user_agent()));
        let mut request = Outgoing { method: Method::POST, target: format!("/{}", function.name), headers, payload };
        for _ in 0..50 {
            let answer = self.supervisor.client.send(&request).await.map_err(|lost| lost.to_string())?;
            let location = answer.headers.iter().find(|(name, _)| name == "location").map(|(_, value)| value.clone());
            match location {
                Some(location) if self.supervisor.files.follows_redirects && (300..400).contains(&answer.status) => {
                    redirect(&mut request, answer.status, &location, self.port())?;
                }
                _ => return Ok(answer),
            }
        }
        Err("too many redirects".into())
    }

    fn event_function(&self, name: &str) -> &Function {
        let found = self.supervisor.files.functions.iter().find(|function| function.name == name);
        found
            .filter(|function| !function.is_http())
            .unwrap_or_else(|| panic!("no function {name:?} with a non-HTTP trigger"))
    }

    fn binding(&self, function: &str) -> &str {
        match &self.event_function(function).trigger {
            Trigger::Event { binding } => binding,
            Trigger::Http { .. } => unreachable!("event_function admits no HTTP trigger"),
        }
    }
}

/// The body the host posts: `data` quoted and escaped, inside JSON that escapes it again. Compact, UTF-8, no BOM.
pub fn envelope(function: &str, binding: &str, data: &str, utc_now: &str, rand_guid: &str) -> String {
    let quoted = newtonsoft(&Value::from(data));
    newtonsoft(&json!({
        "Data": { binding: quoted },
        "Metadata": { "sys": { "MethodName": function, "UtcNow": utc_now, "RandGuid": rand_guid } },
    }))
}

/// The body of an admin invocation: the value is serialised once more, and repeated in Metadata.
pub fn admin_envelope(function: &str, binding: &str, input: &str, utc_now: &str, rand_guid: &str) -> String {
    let quoted_twice = newtonsoft(&Value::from(newtonsoft(&Value::from(input))));
    newtonsoft(&json!({
        "Data": { binding: quoted_twice },
        "Metadata": {
            binding: quoted_twice,
            "sys": { "MethodName": function, "UtcNow": utc_now, "RandGuid": rand_guid },
        },
    }))
}

/// 301–303 turn the POST into a GET without a body; the others repeat it.
fn redirect(request: &mut Outgoing, status: u16, location: &str, port: u16) -> Result<(), String> {
    let own = format!("http://127.0.0.1:{port}");
    let target = location.strip_prefix(&own).unwrap_or(location);
    if !target.starts_with('/') {
        return Err(format!("redirected away from the handler, to {location}"));
    }
    request.target = target.into();
    if status <= 303 {
        request.method = Method::GET;
        request.payload = Payload::Empty;
        request.headers.retain(|(name, _)| name != "Content-Type");
    }
    Ok(())
}

fn judge(answer: &Answer, function: &Function) -> Verdict {
    if !(200..300).contains(&answer.status) {
        let status = answer.status;
        return Verdict::Failed(format!("Response status code does not indicate success: {status}"));
    }
    if answer.status == 204 || answer.body.is_empty() {
        return Verdict::NoResult;
    }
    let invalid = |reason: &str| Verdict::Failed(format!("Invalid HttpResponseMessage: {reason}"));
    let content_type = answer.headers.iter().find(|(name, _)| name == "content-type").map(|(_, value)| value.as_str());
    let media_type = content_type.and_then(|value| value.split(';').next()).unwrap_or_default().trim();
    if !["application/json", "text/json"].iter().any(|json| json.eq_ignore_ascii_case(media_type)) {
        return invalid(&format!("no media type formatter reads '{media_type}'"));
    }
    // What follows the first value is not read.
    match serde_json::Deserializer::from_slice(&answer.body).into_iter::<Value>().next() {
        None | Some(Ok(Value::Null)) => Verdict::NoResult,
        Some(Ok(result @ Value::Object(_))) => match read_result(&result, function) {
            Ok(outcome) => Verdict::Succeeded(outcome),
            Err(reason) => invalid(reason),
        },
        Some(Ok(_)) => invalid("the body is not a JSON object"),
        Some(Err(error)) => invalid(&error.to_string()),
    }
}

fn read_result(result: &Value, function: &Function) -> Result<Invocation, &'static str> {
    let logs = match field(result, "Logs") {
        None => Vec::new(),
        Some(Value::Array(lines)) => lines.iter().map(log_line).collect::<Result<_, _>>()?,
        Some(_) => return Err("Logs is not an array of strings"),
    };
    let outputs = match field(result, "Outputs") {
        None => Value::Null,
        Some(outputs @ Value::Object(_)) => outputs.clone(),
        Some(_) => return Err("Outputs is not an object"),
    };
    let return_value = field(result, "ReturnValue").cloned().unwrap_or(Value::Null);
    let decoded = function.outputs.iter().filter(|(_, binary)| !binary).filter(|(name, _)| {
        let value = if name == "$return" { Some(&return_value) } else { outputs.get(name) };
        value.and_then(Value::as_str).is_some_and(is_base64)
    });
    let decoded = decoded.map(|(name, _)| name.clone()).collect();
    Ok(Invocation::Succeeded { logs, return_value, outputs, decoded })
}

/// A list of strings takes numbers and booleans too.
fn log_line(line: &Value) -> Result<String, &'static str> {
    match line {
        Value::String(text) => Ok(text.clone()),
        Value::Number(_) | Value::Bool(_) => Ok(line.to_string()),
        Value::Null => Ok(String::new()),
        Value::Array(_) | Value::Object(_) => Err("Logs is not an array of strings"),
    }
}

/// Standard alphabet, padded, white space ignored; the empty text is valid.
fn is_base64(text: &str) -> bool {
    let symbols: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let body = symbols.strip_suffix(b"==").or_else(|| symbols.strip_suffix(b"=")).unwrap_or(&symbols);
    symbols.len().is_multiple_of(4) && body.iter().all(|byte| byte.is_ascii_alphanumeric() || b"+/".contains(byte))
}

/// A random (version 4) GUID in lower-case `D` format.
pub fn new_guid() -> String {
    // Every `RandomState` has its own random keys.
    let random = || u128::from(RandomState::new().hash_one(Instant::now()));
    let bits = (random() << 64 | random()) & !(0xf << 76) & !(0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    let hex = format!("{bits:032x}");
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// The present time as .NET writes it: seven decimals, `Z`.
pub fn utc_now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let ticks = since.subsec_nanos() / 100;
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ticks:07}Z")
}

/// Days since 1970-01-01 to year, month, day, in 400-year eras that begin on 1 March.
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}
