//! Servers under measurement: processes on free ports of this machine, their processor time and their memory.
//!
//! Must not know what they serve. Invariant: each ends with its owner, by its own id.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use tokio::task::{AbortHandle, yield_now};

use crate::Result;

/// How long a server may take to listen on a small, busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running server; it is killed with its owner.
pub struct Server {
    child: Child,
    /// Where it listens, on 127.0.0.1.
    pub port: u16,
    _folder: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Settings in the environment of a process.
pub type Settings = Vec<(&'static str, String)>;

/// A program that was built beside this one.
pub fn built(name: &str) -> PathBuf {
    std::env::current_exe().unwrap_or_default().with_file_name(name)
}

/// A command that has these settings and nothing else, in a folder of its own.
pub fn command(program: &[PathBuf], settings: &Settings, folder: &tempfile::TempDir) -> Command {
    let mut command = Command::new(&program[0]);
    command.args(&program[1..]).current_dir(folder.path()).env_clear();
    command.envs(settings.iter().map(|(name, value)| (name, value)));
    command.stdin(Stdio::null());
    command
}

/// A folder that goes with its owner.
pub fn folder() -> Result<tempfile::TempDir> {
    tempfile::tempdir().map_err(|error| format!("no folder: {error}"))
}

impl Server {
    /// Starts a program that was built beside this one and waits until it says where it listens.
    pub fn start(name: &str, settings: Settings) -> Result<Self> {
        Self::start_program(&[built(name)], settings)
    }

    /// Starts any program that says where it listens as the handler does.
    pub fn start_program(program: &[PathBuf], mut settings: Settings) -> Result<Self> {
        settings.push(("HTTP_PORT", "0".to_owned()));
        let folder = folder()?;
        let name = program[0].display();
        let mut child = command(program, &settings, &folder)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("{name}: {error}"))?;
        let lines = BufReader::new(child.stdout.take().ok_or("no output")?);
        let (announce, announced) = mpsc::channel();
        thread::spawn(move || {
            // Reads to the end, so that the process never waits for a reader.
            for line in lines.lines().map_while(std::result::Result::ok) {
                let port = line.split_once("listening  http://127.0.0.1:");
                if let Some(port) = port.and_then(|(_, port)| port.trim().parse::<u16>().ok()) {
                    let _ = announce.send(port);
                }
            }
        });
        let mut server = Self { child, port: 0, _folder: folder };
        server.port = announced.recv_timeout(PATIENCE).map_err(|_| format!("{name} does not listen"))?;
        Ok(server)
    }

    /// Asks it to end, and waits until it has.
    pub fn stop(mut self) -> Result<()> {
        let _ = Command::new("kill").args(["-TERM", &self.pid().to_string()]).status();
        self.child.wait().map(drop).map_err(|error| error.to_string())
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Processor time it has used so far.
    pub fn cpu(&self) -> Duration {
        cpu(self.pid())
    }

    /// Bytes it holds in memory.
    pub fn resident(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap_or_default();
        let kib =
            status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix("kB")?.trim().parse().ok());
        kib.unwrap_or(0_u64) * 1024
    }
}

/// Which cores generator and servers have while this lives. Without effect where there is no `taskset`, or one core.
pub struct Cores {
    awake: AbortHandle,
}

impl Cores {
    /// The servers, of one worker each, have the last core (the first often has the interrupts) for themselves. The
    /// generator has the one before it and never sleeps, so no answer has to wake it. For servers that ask no other
    /// process: what limits is then the server alone. On a core that both share, the kernel interrupts the server when
    /// an answer wakes the generator, the more often the more the server works, and each interruption costs both.
    pub fn apart(servers: &[&Server]) -> Self {
        let last = cores() - 1;
        servers.iter().for_each(|server| pin(server.pid(), last, last));
        pin(std::process::id(), 0, last.saturating_sub(1));
        let stay_awake = async move {
            if last > 0 {
                loop {
                    yield_now().await;
                }
            }
        };
        Self { awake: tokio::spawn(stay_awake).abort_handle() }
    }
}

impl Drop for Cores {
    fn drop(&mut self) {
        self.awake.abort();
        pin(std::process::id(), 0, cores() - 1);
    }
}

fn cores() -> usize {
    fs::read_to_string("/proc/cpuinfo").unwrap_or_default().matches("processor\t").count().max(1)
}

fn pin(pid: u32, first: usize, last: usize) {
    let mut taskset = Command::new("taskset");
    taskset.args(["-a", "-c", "-p", &format!("{first}-{last}"), &pid.to_string()]);
    let _ = taskset.stdout(Stdio::null()).stderr(Stdio::null()).status();
}

/// Processor time that the living threads of a process have used, to the nanosecond: its `stat` counts in hundredths of
/// a second, too coarse for short rounds.
pub fn cpu(pid: u32) -> Duration {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let times = threads.filter_map(|thread| {
        let times = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        times.split(' ').next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(times.sum())
}
