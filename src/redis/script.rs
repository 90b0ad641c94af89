//! Lua scripts.

use redis::{Cmd, ErrorKind, RedisResult, ServerErrorKind, Value};

/// A Lua script that is sent by its hash.
pub(crate) struct Script {
    code: &'static str,
    hash: String,
}

impl Script {
    /// Hashes the script; nothing is sent.
    pub(crate) fn new(code: &'static str) -> Self {
        Self { code, hash: redis::Script::new(code).get_hash().to_owned() }
    }

    /// A call with one key, to which arguments are added.
    pub(crate) fn call(&self, key: &str) -> Cmd {
        let mut call = redis::cmd("EVALSHA");
        call.arg(&self.hash).arg(1).arg(key);
        call
    }

    pub(super) fn load(&self) -> Cmd {
        let mut load = redis::cmd("SCRIPT");
        load.arg("LOAD").arg(self.code);
        load
    }
}

/// Whether Redis does not know the script: it was restarted, or told to forget them.
pub(super) fn is_missing_script(reply: &RedisResult<Value>) -> bool {
    reply.as_ref().is_err_and(|error| error.kind() == ErrorKind::Server(ServerErrorKind::NoScript))
}
