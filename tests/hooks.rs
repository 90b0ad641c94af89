//! infra/hooks, run: what the hook asks of `az` and `sqlcmd`, and what it leaves behind, whatever ends it.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

/// The hook under `sh`, with an `az`, a `sqlcmd` and a `sleep` that write down what they are asked for; `az` takes its
/// time to open the firewall.
struct Hook {
    folder: tempfile::TempDir,
    command: Command,
}

impl Hook {
    /// With a `sqlcmd` that says this and ends so.
    fn new(sqlcmd: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let az = "case \"$*\" in *create*) exec /bin/sleep 0.3 ;; esac";
        for (name, then) in [("az", az), ("sqlcmd", sqlcmd), ("sleep", "exec /bin/sleep 0.1")] {
            let file = folder.path().join(name);
            let log = folder.path().join("log");
            fs::write(&file, format!("#!/bin/sh\necho {name} \"$@\" >>{}\n{then}\n", log.display())).unwrap();
            fs::set_permissions(file, fs::Permissions::from_mode(0o755)).unwrap();
        }
        // Whoever runs tests in the background has them ignore SIGINT, and an sh that began so cannot trap it.
        let (program, first) =
            if cfg!(target_os = "linux") { ("env", Some("--default-signal=INT")) } else { ("sh", None) };
        let mut command = Command::new(program);
        command.args(first.into_iter().flat_map(|first| [first, "sh"]));
        let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap());
        command
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/infra/hooks/postprovision.sh"))
            .env("PATH", path)
            .env("SQL_PRIVATE", "false");
        for name in ["SQL_SERVER", "SQL_DATABASE", "SQL_SERVER_NAME", "AZURE_RESOURCE_GROUP", "AZURE_SUBSCRIPTION_ID"] {
            command.env(name, "x");
        }
        command.env("APP_IDENTITY_NAME", "x").env("APP_IDENTITY_CLIENT_ID", "x").env_remove("SAMPLE_CATALOGUE");
        command.stdout(Stdio::null()).stderr(Stdio::null());
        Self { folder, command }
    }

    /// What was asked of the three, a line each.
    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

#[test]
fn the_hook_closes_the_firewall_whatever_ends_it() {
    for (signal, code) in [("HUP", 129), ("INT", 130), ("TERM", 143), ("", 1)] {
        let mut hook = Hook::new("echo \"Client with IP address '192.0.2.7' is not allowed\"; exit 1");
        let mut process = hook.command.spawn().unwrap();
        let began = Instant::now();
        // As early as there may be a rule.
        while !signal.is_empty() && !hook.log().contains("rule create") {
            assert!(began.elapsed() < Duration::from_secs(20), "{}", hook.log());
            sleep(Duration::from_millis(5));
        }
        if !signal.is_empty() {
            let pid = process.id().to_string();
            assert!(Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
        }
        assert_eq!(process.wait().unwrap().code(), Some(code), "{signal}: {}", hook.log());
        let log = hook.log();
        let rules: Vec<_> = log.lines().filter(|line| line.starts_with("az sql server firewall-rule")).collect();
        let [opened, closed] = rules[..] else { panic!("{signal}: {log}") };
        assert!(opened.contains("rule create ") && opened.contains("--start-ip-address 192.0.2.7"), "{opened}");
        assert!(rules.iter().all(|rule| rule.contains("--subscription x ")), "az's own may be another: {log}");
        let name = opened.split("--name ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
        assert!(closed.contains("rule delete ") && closed.ends_with(&format!("--name {name}")), "{closed}");
    }
}

#[test]
fn the_hook_makes_the_sample_products_unless_it_is_told_not_to() {
    for (said, made) in [(None, true), (Some("true"), true), (Some("false"), false)] {
        let mut hook = Hook::new("exit 0");
        hook.command.envs(said.map(|said| ("SAMPLE_CATALOGUE", said)));
        assert!(hook.command.status().unwrap().success());
        let log = hook.log();
        let files: Vec<_> = log.lines().map(|line| line.split(" -i sql/").nth(1).unwrap()).collect();
        let given = ["sqlserver-access.sql", "sqlserver-identity.sql -v Name=x ClientId=x"];
        let expected: Vec<_> = made.then_some("sqlserver.sql").into_iter().chain(given).collect();
        assert_eq!(files, expected, "{said:?}");
    }
}
