//! What scripts/package makes of a handler: exactly what Azure runs, or a refusal; and that nothing holds a secret.
//!
//! The handler that Azure gets is static and takes minutes to build. This one is the tests' own, without its symbols,
//! which differs only in what it needs of the machine: glibc as new as this machine's, which is allowed it here.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Newer than any: what the machine's own compiler makes is then portable enough.
#[cfg(target_os = "linux")]
const ANY_GLIBC: &str = "9.0";

fn run(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("{command:?}: {error}: run scripts/test"))
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn succeed(command: &mut Command) -> String {
    let output = run(command);
    assert!(output.status.success(), "{command:?}: {}", text(&output));
    text(&output)
}

/// scripts/package of this project for a binary of this machine, into a folder.
fn package(project: &Path, binary: &Path, target: &Path) -> Command {
    let mut command = Command::new(project.join("scripts/package"));
    command.arg("--binary").arg(binary).arg("--to").arg(target).args(["--arch", std::env::consts::ARCH]);
    command
}

#[cfg(target_os = "linux")]
fn zip(folder: &Path) -> PathBuf {
    folder.join(if cfg!(target_arch = "x86_64") { "handler.zip" } else { "handler-aarch64.zip" })
}

/// Asserts that a binary is not packed, and why.
fn refused(command: &mut Command, target: &Path, reason: &str) {
    let output = run(command);
    let text = text(&output);
    let told = text.split_once(" is not packed: ").is_some_and(|(_, told)| told.contains(reason));
    assert!(!output.status.success() && told, "{reason}: {text}");
    assert_eq!(fs::read_dir(target).unwrap().count(), 0, "{reason}: nothing is written");
}

/// A folder with all that scripts/package reads, made anew: other place, other times.
fn project() -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for folder in ["scripts/packaging", "InvalidateCache", "GetProductById"] {
        fs::create_dir_all(copy.path().join(folder)).unwrap();
    }
    let scripts = ["elf", "leaks", "package", "trial"].map(|name| format!("scripts/packaging/{name}.py"));
    let others = ["InvalidateCache/function.json", "GetProductById/function.json", "host.json", "scripts/package"];
    for file in others.map(str::to_owned).iter().chain(&scripts) {
        fs::copy(Path::new(ROOT).join(file), copy.path().join(file)).unwrap();
    }
    copy
}

/// What `cc` makes of a program that ends at once, and the folder it lies in.
#[cfg(target_os = "linux")]
fn compiled(arguments: &[&str]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("program");
    fs::write(folder.path().join("program.c"), "int main(void) { return 3; }\n").unwrap();
    succeed(Command::new("cc").current_dir(folder.path()).args(["program.c", "-o", "program"]).args(arguments));
    (folder, program)
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn the_package_alone_runs_under_the_host() {
    use crate::support::{host, instance::BINARY};

    let folder = tempfile::tempdir().unwrap();
    let [stripped, first, second, app] = ["stripped", "first", "second", "app"].map(|name| folder.path().join(name));
    succeed(Command::new("strip").arg("--strip-all").arg("-o").arg(&stripped).arg(BINARY));
    let told = succeed(package(ROOT.as_ref(), &stripped, &first).args(["--glibc", ANY_GLIBC]));
    assert!(told.contains("it runs in an empty "), "{told}");

    // By somebody else, somewhere else, at another time.
    let elsewhere = project();
    let mut again = package(elsewhere.path(), &stripped, &second);
    again.args(["--glibc", ANY_GLIBC]).env("TZ", "Asia/Kolkata").current_dir("/");
    let umask = format!("umask 077; exec {:?} \"$@\"", again.get_program());
    succeed(Command::new("bash").args(["-c", &umask, "bash"]).args(again.get_args()).env("TZ", "Asia/Kolkata"));
    assert!(fs::read(zip(&first)).unwrap() == fs::read(zip(&second)).unwrap(), "the same input, other bytes");

    // As another program reads it.
    let listing = succeed(Command::new("unzip").args(["-Z", "-s"]).arg(zip(&first)));
    let entries: Vec<_> = listing
        .lines()
        .filter(|line| line.starts_with('-'))
        .map(|line| (&line[..10], line.rsplit_once(' ').unwrap().1))
        .collect();
    let expected = [
        ("-rw-r--r--", "host.json"),
        ("-rw-r--r--", "GetProductById/function.json"),
        ("-rw-r--r--", "InvalidateCache/function.json"),
        ("-rwxr-xr-x", "handler"),
    ];
    assert_eq!(entries, expected, "{listing}");

    succeed(Command::new("unzip").arg("-q").arg(zip(&first)).arg("-d").arg(&app));
    for dialect in [host::Dialect::Forward, host::Dialect::Proxy] {
        let host = host::Host::start(host::Options::new(&app).dialect(dialect)).await;
        let host = host.unwrap_or_else(|error| panic!("{error}"));
        let response = host.get("/api/GetProductById?productid=680").await;
        assert_eq!((response.status, response.json()["productID"].as_i64()), (200, Some(680)), "{}", response.text());
    }
}

#[cfg(target_os = "linux")]
#[test]
fn what_azure_could_not_run_is_refused() {
    let (_program, program) = compiled(&[]);
    let good = fs::read(&program).unwrap();
    let changed = |place: usize, bytes: &[u8]| {
        let mut data = good.clone();
        data[place..place + bytes.len()].copy_from_slice(bytes);
        data
    };
    let replaced = |old: &[u8], new: &[u8]| {
        assert_eq!(old.len(), new.len());
        let places = good.windows(old.len()).enumerate().filter(|(_, window)| *window == old).map(|(place, _)| place);
        let mut data = good.clone();
        places.for_each(|place| data[place..place + new.len()].copy_from_slice(new));
        assert!(data != good, "{}", String::from_utf8_lossy(old));
        data
    };
    let (_library, library) = compiled(&["-shared", "-fPIC"]);
    let (_object, object) = compiled(&["-c"]);
    let (_rpath, rpath) = compiled(&["-Wl,-rpath,/opt/lib"]);
    let linker = if cfg!(target_arch = "x86_64") { "/ld-linux-x86-64" } else { "/ld-linux-aarch64" };
    let other = if cfg!(target_arch = "x86_64") { "/ld-musl-x86-64-" } else { "/ld-musl-aarch64-" };
    let cases: [(Vec<u8>, &str); 18] = [
        (good.clone(), "needs glibc 2."), // nothing is wrong with what the others are made of
        (Vec::new(), "it is no program"),
        (b"#!/bin/sh\nexec sleep 9\n".to_vec(), "it is a script"),
        ([b"MZ", &good[2..]].concat(), "it is a Windows program"),
        ([b"\xcf\xfa\xed\xfe", &good[4..]].concat(), "it is a macOS program"),
        (good[..good.len() / 2].to_vec(), "it is cut off or damaged"),
        (good[..40].to_vec(), "it is cut off or damaged"),
        (changed(4, &[1]), "it is not a 64-bit little-endian program"),
        (changed(5, &[2]), "it is not a 64-bit little-endian program"),
        (changed(18, &[40, 0]), "it is made for ELF machine 40, not for "),
        (changed(18, if cfg!(target_arch = "x86_64") { &[183, 0] } else { &[62, 0] }), "it is made for "),
        (changed(16, &[4, 0]), "it is a library or an object file"), // a core dump, rather
        (fs::read(library).unwrap(), "it is a library or an object file"),
        (fs::read(object).unwrap(), "it is a library or an object file"),
        (fs::read(rpath).unwrap(), "it looks for libraries in folders of its own"),
        (replaced(b"libc.so.6", b"libz.so.1"), "it needs libraries that the images may not have: libz.so.1"),
        (replaced(b"\0GLIBC_2.", b"\0GLIBC_9."), "it needs GLIBC_9."),
        (replaced(linker.as_bytes(), &other.as_bytes()[..linker.len()]), "its loader is '"),
    ];
    let folder = tempfile::tempdir().unwrap();
    for (number, (data, _)) in cases.iter().enumerate() {
        fs::write(folder.path().join(number.to_string()), data).unwrap();
    }
    let output = run(Command::new("python3")
        .arg("-B")
        .arg(Path::new(ROOT).join("scripts/packaging/elf.py"))
        .args([std::env::consts::ARCH, ANY_GLIBC])
        .args((0..cases.len()).map(|number| number.to_string()))
        .current_dir(folder.path()));
    let text = text(&output);
    assert_eq!((output.status.success(), text.lines().count()), (false, cases.len()), "{text}");
    for (number, (line, (_, reason))) in text.lines().zip(&cases).enumerate() {
        assert!(line.starts_with(&format!("{number}: {reason}")), "{reason}: {line}");
    }

    // And so is it not packed; nor is what does not answer.
    let (binary, target) = (folder.path().join("handler"), folder.path().join("target"));
    fs::create_dir(&target).unwrap();
    fs::write(&binary, &good).unwrap();
    let any_glibc = &mut package(ROOT.as_ref(), &binary, &target);
    refused(any_glibc.args(["--glibc", ANY_GLIBC]), &target, "it ended before it listened");
    // Where nobody says which glibc, it is the oldest image's.
    fs::write(&binary, replaced(b"\0GLIBC_2.", b"\0GLIBC_3.")).unwrap();
    refused(&mut package(ROOT.as_ref(), &binary, &target), &target, "and may need no newer glibc than 2.28");
}

#[test]
fn the_handlers_name_is_the_one_that_core_tools_and_the_host_compare() {
    let target = tempfile::tempdir().unwrap();
    for name in ["./handler", "/handler", "bin\\\\handler", "%HANDLER%"] {
        let project = project();
        let host = fs::read_to_string(project.path().join("host.json")).unwrap();
        let renamed = host.replace(r#"Path": "handler""#, &format!(r#"Path": "{name}""#));
        assert_ne!(host, renamed);
        fs::write(project.path().join("host.json"), renamed).unwrap();
        let binary = project.path().join("host.json"); // the name is looked at first
        refused(
            &mut package(project.path(), &binary, target.path()),
            target.path(),
            "host.json's defaultExecutablePath '",
        );
    }
}

/// Each with something that the scan must find, put together here so that it does not find this file.
fn secrets() -> Vec<(&'static str, String)> {
    let (word, sure) = ("Sw0rdfish", "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789");
    vec![
        ("private key", format!("-----BEGIN {}KEY-----\nMIIEvQIBADANBgkqhkiG9w0B\n", "PRIVATE ")),
        ("private key", format!(r#"key = "-----BEGIN RSA {}KEY-----\nMIIEvQIBADANBgkqhkiG9w0B\n""#, "PRIVATE ")),
        ("password in a URL", format!("postgres:{}me:{word}@db.example/shop", "//")),
        ("password in a URL", format!("redis:{}:{word}@cache.example:6379", "//")),
        ("password in a URL", format!("redis:{}:{word}#@cache.example:6379", "//")),
        ("password in a connection string", format!("Server=db;User ID=me;{}={word};Database=shop", "Password")),
        ("password in a connection string", format!("Server=db;UID=me;{}={word}", "PWD")),
        ("password in a connection string", format!("Server=db;UID=me;{}=hunter22", "Pwd")), // not quite a known fake
        ("key in a connection string", format!("AccountName=me;Account{}={}==", "Key", &sure[..62])),
        ("key in a connection string", format!("Endpoint=sb;SharedAccess{}={}=", "Key", &sure[..43])),
        ("key of an Azure service", format!("code={}AzFu{}==", &sure[..44], &sure[..6])),
        ("key of an Azure service", format!("\"{}AzCa{}=\"", &sure[..33], &sure[..6])),
        ("secret of an Entra application", format!("abc8{}{}", "Q~", &sure[..34])),
        ("token", format!("{}_{}", "ghp", &sure[..36])),
        ("token", format!("{}{}", "AKIA", "IOSFODNN7EXAMPLE")),
        ("signed token (JWT)", format!("{}.{}.{}", "eyJhbGciOiJIUzI1NiJ9", "eyJzdWIiOiIxMjM0In0", &sure[..43])),
    ]
}

fn scan(folder: &Path, files: &[&str]) -> Output {
    let scanner = Path::new(ROOT).join("scripts/packaging/leaks.py");
    run(Command::new("python3").arg("-B").arg(scanner).args(files).current_dir(folder))
}

#[test]
fn no_file_of_the_repository_holds_a_secret() {
    let listed = succeed(Command::new("git").args(["ls-files"]).current_dir(ROOT));
    let files: Vec<_> = listed.lines().filter(|file| Path::new(ROOT).join(file).is_file()).collect();
    let output = scan(ROOT.as_ref(), &files);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(text(&output), format!("no secrets in {} files\n", files.len()));
}

#[test]
fn the_scan_finds_every_kind_of_secret_in_texts_and_programs_and_does_not_tell_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut expected = Vec::new();
    for (number, (kind, secret)) in secrets().into_iter().enumerate() {
        fs::write(folder.path().join(format!("text-{number}")), format!("{{\n\n\"a\": \"{secret}\"\n}}\n")).unwrap();
        fs::write(folder.path().join(format!("program-{number}")), format!("\u{1}\0{secret}\0\u{3}")).unwrap();
        expected.extend([format!("text-{number}:3: {kind}"), format!("program-{number}:1: {kind}")]);
    }
    let files: Vec<_> = expected.iter().map(|line| line.split(':').next().unwrap()).collect();
    let output = scan(folder.path(), &files);
    assert!(!output.status.success());
    assert_eq!(text(&output).lines().collect::<Vec<_>>(), expected);
}

#[test]
fn a_package_with_a_secret_is_not_made() {
    let (target, project) = (tempfile::tempdir().unwrap(), project());
    let (binary, host) = (project.path().join("handler"), project.path().join("host.json"));
    let (kind, secret) = &secrets()[2];
    fs::write(&binary, format!("\u{1}\0{secret}\0")).unwrap();
    let reason = format!("handler has a secret in line 1: {kind}");
    refused(&mut package(project.path(), &binary, target.path()), target.path(), &reason);

    fs::write(&binary, "harmless").unwrap();
    let noted = fs::read_to_string(&host).unwrap().replacen('{', &format!("{{\n  \"note\": \"{secret}\","), 1);
    fs::write(&host, noted).unwrap();
    let reason = format!("host.json has a secret in line 2: {kind}");
    refused(&mut package(project.path(), &binary, target.path()), target.path(), &reason);
}
