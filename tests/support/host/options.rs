//! How a test starts a host, and why that may fail.
//!
//! It owns the choices a test has and the environment they make; what host.json says is for `files`.
//! Invariant: nothing of the test's own environment reaches the handler but what `INHERITED` names.

use std::path::PathBuf;

use super::console::ConsoleLine;
use super::files::Environment;

/// What the handler inherits from the test's own environment.
const INHERITED: [&str; 4] = ["PATH", "HOME", "TMPDIR", "LLVM_PROFILE_FILE"];

/// Which host: what `enableProxyingHttpRequest` means to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// An older host, which does not know the flag.
    Forward,
    /// A newer one, which prefers proxying to forwarding.
    Proxy,
}

/// How to start a host. `Options::new(root)` is `func start` on an old host without keys.
#[derive(Debug, Clone)]
pub struct Options {
    pub script_root: PathBuf,
    pub env: Vec<(String, String)>,
    pub dialect: Dialect,
    pub function_key: Option<String>,
    pub core_tools: bool,
}

impl Options {
    /// `script_root` holds host.json, `<Function>/function.json`, and the executable named in host.json; see [`super::stage`].
    pub fn new(script_root: impl Into<PathBuf>) -> Self {
        Self {
            script_root: script_root.into(),
            env: Vec::new(),
            dialect: Dialect::Forward,
            function_key: None,
            core_tools: false,
        }
    }

    /// An app setting: an environment variable of host and handler.
    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    pub fn dialect(mut self, dialect: Dialect) -> Self {
        self.dialect = dialect;
        self
    }

    /// Enforces `authLevel`; without it everyone is let in.
    pub fn function_key(mut self, key: &str) -> Self {
        self.function_key = Some(key.into());
        self
    }

    /// Trigger bodies with `Content-Length`, as under Core Tools, instead of chunked, as in Azure.
    pub fn core_tools(mut self) -> Self {
        self.core_tools = true;
        self
    }
}

/// Why a host did not start.
#[derive(Debug)]
pub enum StartError {
    /// The host would refuse these files or settings.
    Refused(String),
    /// The host would speak the JSON envelope for this HTTP function, which the stand-in does not.
    Envelope { function: String },
    /// The host allows it; the stand-in does not model it.
    NotModelled(String),
    /// The process could not be started.
    Spawn(String),
    /// The handler never became ready. The host's log and the handler's lines tell why.
    GaveUp { log: Vec<String>, console: Vec<ConsoleLine> },
}

impl std::fmt::Display for StartError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Refused(reason) => write!(f, "the host refuses: {reason}"),
            Self::Envelope { function } => write!(
                f,
                "{function}: this stand-in does not speak envelope mode for HTTP; it needs one httpTrigger, one http \
                 output and enableForwardingHttpRequest or enableProxyingHttpRequest"
            ),
            Self::NotModelled(what) => write!(f, "not modelled: {what}"),
            Self::Spawn(reason) => f.write_str(reason),
            Self::GaveUp { log, console } => write!(f, "the handler never became ready: {log:?} {console:?}"),
        }
    }
}

impl std::error::Error for StartError {}

/// The host's environment, which the handler gets whole. The last setting of a name wins.
pub(super) fn environment(options: &Options) -> Environment {
    let inherited = INHERITED.iter().filter_map(|name| Some(((*name).to_string(), std::env::var(name).ok()?)));
    let own = [("FUNCTIONS_WORKER_RUNTIME", "custom"), ("ASPNETCORE_URLS", "http://127.0.0.1:7071")];
    let own = own.map(|(name, value)| (name.to_string(), value.to_string()));
    inherited.chain(own).chain(options.env.iter().cloned()).collect()
}
