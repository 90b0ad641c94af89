//! The repository's own rules: what the host's files, the README and the layout promise of each other.

use std::{fs, path::Path};

use product_cache::config::{Kind, SETTINGS};
use serde_json::Value;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn json(path: &str) -> Value {
    serde_json::from_str(&read(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// What is in the repository.
fn tracked_files() -> Vec<String> {
    let listed = std::process::Command::new("git").args(["ls-files"]).current_dir(env!("CARGO_MANIFEST_DIR")).output();
    let listed = listed.expect("git");
    assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
    let files: Vec<_> = String::from_utf8(listed.stdout).expect("UTF-8").lines().map(str::to_owned).collect();
    assert!(files.iter().any(|file| file == "host.json"), "git lists the repository: {files:?}");
    files
}

#[test]
fn host_json_is_what_the_host_needs() {
    let host = json("host.json");
    assert_eq!(host["version"], "2.0");
    assert_eq!(host["extensionBundle"]["version"], "[4.*, 5.0.0)");
    assert_eq!(host["customHandler"]["description"]["defaultExecutablePath"], "handler");
    assert_eq!(host["customHandler"]["enableForwardingHttpRequest"], true, "older hosts");
    assert_eq!(host["customHandler"]["enableProxyingHttpRequest"], true, "newer hosts");
    // A line that is said once must be found, so traces are not sampled; the host's own two for each request are none.
    let logging = &host["logging"];
    assert_eq!(logging["applicationInsights"]["samplingSettings"]["excludedTypes"], "Request;Exception;Trace");
    assert_eq!(logging["logLevel"]["Function.GetProductById"], "Warning");
}

#[test]
fn each_function_folder_has_one_trigger_and_a_source_file_of_its_name() {
    let product = json("GetProductById/function.json");
    let kinds: Vec<_> = product["bindings"].as_array().unwrap().iter().map(|binding| binding["type"].clone()).collect();
    assert_eq!(kinds, ["httpTrigger", "http"], "anything else makes the host send envelopes");
    assert_eq!(product["bindings"][0]["methods"], serde_json::json!(["get", "head"]));
    assert_eq!(product["bindings"][0]["authLevel"], "function");

    let invalidate = json("InvalidateCache/function.json");
    let [binding] = &invalidate["bindings"].as_array().unwrap()[..] else { panic!("one binding") };
    assert_eq!(binding["type"], "sqlTrigger");
    assert_eq!(
        (&binding["tableName"], &binding["connectionStringSetting"]),
        (&"[SalesLT].[Product]".into(), &"Sql".into())
    );
    let source = read("src/functions/invalidate_cache.rs");
    assert!(source.contains(&format!("const BINDING: &str = {};", binding["name"])), "the binding's name");

    for (folder, file) in [("GetProductById", "get_product_by_id"), ("InvalidateCache", "invalidate_cache")] {
        assert!(read("src/functions/mod.rs").contains(&format!("function: \"{folder}\"")), "{folder} has a route");
        read(&format!("src/functions/{file}.rs"));
    }
}

#[test]
fn local_settings_hold_no_secret_and_no_unknown_setting() {
    let settings = json("local.settings.json");
    assert_eq!(settings["IsEncrypted"], false);
    let hosts = ["FUNCTIONS_WORKER_RUNTIME", "AzureWebJobsStorage", "AzureWebJobs.InvalidateCache.Disabled"];
    for (name, value) in settings["Values"].as_object().unwrap() {
        let setting = SETTINGS.iter().find(|setting| setting.name == name);
        assert!(setting.is_some() || hosts.contains(&name.as_str()), "{name}");
        if setting.is_some_and(|setting| matches!(setting.kind, Kind::Secret)) {
            assert_eq!(value, "", "{name}");
        }
    }
    assert_eq!(settings["Values"]["AzureWebJobs.InvalidateCache.Disabled"], "true", "until Sql is set");
}

/// The README's table of settings, made from the one in config.rs.
fn settings_table() -> String {
    let mut table = "| Setting | Default | Meaning |\n|---|---|---|\n".to_owned();
    for setting in SETTINGS {
        let default = if setting.default.is_empty() { "–".to_owned() } else { format!("`{}`", setting.default) };
        table += &format!("| `{}` | {default} | {} |\n", setting.name, setting.meaning);
    }
    table
}

#[test]
fn the_readmes_settings_are_the_programs() {
    assert!(read("README.md").contains(&settings_table()), "README.md should have this table:\n{}", settings_table());
}

#[test]
fn every_file_the_package_must_not_hold_is_ignored_by_core_tools() {
    let ignored = read(".funcignore");
    // What is in the repository, and what a build leaves beside it; a person's own files are theirs.
    let tracked = tracked_files();
    let tracked = tracked.iter().map(|path| path.split('/').next().unwrap_or(path).to_owned());
    let names: std::collections::BTreeSet<_> =
        tracked.chain(["target", "product-cache.db", "product-cache.db-wal"].map(str::to_owned)).collect();
    for name in names {
        if [".git", ".funcignore", ".gitignore", ".vscode", "local.settings.json"].contains(&name.as_str()) {
            continue; // never packed, whatever .funcignore says
        }
        let packed = ["host.json", "GetProductById", "InvalidateCache", "handler"].contains(&name.as_str());
        let matches = |pattern: &str| match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
            (Some(end), _) => name.ends_with(end),
            (_, Some(start)) => name.starts_with(start),
            _ => pattern.trim_end_matches('/') == name,
        };
        assert_eq!(ignored.lines().any(matches), !packed, "{name}");
    }
}

#[test]
fn tls_is_rustls_alone() {
    // OpenSSL would be another library to find on the machine, or to build for it.
    let lock = read("Cargo.lock");
    for name in ["openssl-sys", "openssl", "native-tls"] {
        assert!(!lock.contains(&format!("name = \"{name}\"\n")), "{name}");
    }
}

#[test]
fn every_source_file_says_what_it_owns() {
    fn check(folder: &Path) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                check(&path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                assert!(text.starts_with("//! "), "{} does not say what it owns", path.display());
            }
        }
    }
    for folder in ["src", "tests", "benches/src"] {
        check(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder));
    }
}

#[test]
fn no_merge_was_left_half_done_and_every_script_can_be_read() {
    let marks = ["<<<<<<< ", ">>>>>>> "];
    for file in tracked_files() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(&file);
        let Ok(text) = fs::read_to_string(&path) else { continue };
        assert!(!text.lines().any(|line| marks.iter().any(|mark| line.starts_with(mark))), "{file}");
        if text.starts_with("#!/usr/bin/env bash") {
            let checked = std::process::Command::new("bash").arg("-n").arg(&path).output().expect("bash");
            assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
        }
    }
}
