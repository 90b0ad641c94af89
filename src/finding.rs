//! What `handler doctor` finds: one line, and what to do about it.
//!
//! Used by whoever can be looked at; knows none of them.

use std::fmt;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Severity {
    /// As it should be.
    Ok,
    /// It works, but not as well as it should, or will stop working.
    Warn,
    /// It does not work.
    Fail,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        })
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    /// How bad it is.
    pub(crate) severity: Severity,
    /// What was found, without secrets.
    pub(crate) what: String,
    /// What to do about it; empty where there is nothing to do.
    pub(crate) remedy: String,
}

impl Finding {
    /// As it should be.
    pub(crate) fn ok(what: impl Into<String>) -> Self {
        Self { severity: Severity::Ok, what: what.into(), remedy: String::new() }
    }

    /// To look at.
    pub(crate) fn warn(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { severity: Severity::Warn, what: what.into(), remedy: remedy.into() }
    }

    /// Does not work.
    pub(crate) fn fail(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { severity: Severity::Fail, what: what.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Servers' own words may have several lines.
        let what: Vec<_> = self.what.split_whitespace().collect();
        f.write_str(&what.join(" "))?;
        match self.remedy.is_empty() {
            true => Ok(()),
            false => write!(f, " → {}", self.remedy),
        }
    }
}

/// The connections that the app may come to hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    /// Of one instance.
    pub(crate) each: u64,
    /// How many instances may run, if anybody says.
    pub(crate) instances: Option<u64>,
}

impl Budget {
    /// Against what a server allows; `used` are there now.
    pub(crate) fn within(self, allowed: u64, used: Option<u64>) -> Finding {
        let fits = allowed / self.each.max(1);
        let used = used.map_or_else(String::new, |used| format!(" ({used} in use now)"));
        let what =
            format!("{allowed} connections are allowed{used}, {} for each instance: enough for {fits}", self.each);
        match self.instances {
            Some(instances) if instances > fits => Finding::fail(
                format!("{what}, and {instances} may run"),
                "allow fewer instances or connections (docs/operations.md has the arithmetic), or take a larger tier",
            ),
            Some(instances) => Finding::ok(format!("{what}; {instances} may run")),
            None => Finding::warn(what, "set MAX_INSTANCES to what the plan may start, so that this is checked"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_one_line_whatever_a_server_said() {
        let finding = Finding::fail("it\nsaid:\r\n  no", "ask again");
        assert_eq!(finding.to_string(), "it said: no → ask again");
    }

    #[test]
    fn connections_of_all_instances_are_held_against_the_limit() {
        for (instances, severity) in [(Some(83), Severity::Ok), (Some(84), Severity::Fail), (None, Severity::Warn)] {
            assert_eq!(Budget { each: 3, instances }.within(250, None).severity, severity);
        }
    }
}
