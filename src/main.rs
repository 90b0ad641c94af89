//! `handler`: settings → pools → [`App`] → serve → drain. The only place with exit codes.

use std::{
    cell::Cell,
    io::{self, Write},
    net::Ipv4Addr,
    path::Path,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use actix_web::{HttpServer, http::KeepAlive};
use product_cache::{
    background,
    config::{Config, Role},
    doctor,
    functions::{self, App},
    telemetry,
};
use tokio::{runtime::Handle, signal};

/// The port could not be bound, or the server failed.
const CANNOT_SERVE: u8 = 1;
/// `doctor` found something that does not work.
const FAILED: u8 = 1;
/// Wrong settings. The host counts any code but 0 and 200 as an error, restarts twice and then gives up (functions host,
/// `WorkerProcess.OnProcessExited`, `HttpFunctionInvocationDispatcher`).
const WRONG_SETTINGS: u8 = 2;
/// Stopped by a signal while a host may still want us: not 0, which the host takes for "done, do not restart".
const STOPPED_UNDER_HOST: u8 = 3;
/// How long a connection may be open until its first request's head is there: .NET's pool opens some long before it uses
/// them.
const FIRST_REQUEST: Duration = Duration::from_secs(150);
const USAGE: &str = "usage: handler            answers HTTP, settings from the environment
       handler doctor     looks for what a deployment usually gets wrong
       handler --version";

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    // One that is no text is none of ours.
    match arguments.iter().map(|argument| argument.to_str().unwrap_or_default()).collect::<Vec<_>>()[..] {
        [] => serve(),
        ["doctor"] => doctor(),
        ["--version" | "-V"] => {
            let _ = writeln!(io::stdout(), "{} {}", env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("{USAGE}");
            WRONG_SETTINGS.into()
        }
    }
}

fn doctor() -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("cannot start threads: {error}");
            return CANNOT_SERVE.into();
        }
    };
    let report = runtime.block_on(doctor::examine(Path::new(".")));
    runtime.shutdown_background();
    let _ = write!(io::stdout(), "{report}");
    if report.has_failed() { FAILED.into() } else { ExitCode::SUCCESS }
}

fn serve() -> ExitCode {
    let config = match Config::from_process() {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{error}");
            return WRONG_SETTINGS.into();
        }
    };
    telemetry::init(&config.log_level, config.role);
    let threads = background::threads();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "cannot start threads");
            return CANNOT_SERVE.into();
        }
    };
    let code = runtime.block_on(run(config));
    // Whatever is still under way there must not hold the process; its readers are gone.
    runtime.shutdown_background();
    code
}

async fn run(config: Config) -> ExitCode {
    let (role, http) = (config.role, config.http.clone());
    let redis = config.redis.is_some();
    let mut stop = StopSignals::listen();
    let app = match App::start(config, &Handle::current()) {
        Ok(app) => app,
        Err(error) => {
            tracing::error!(%error, "cannot use the setting Redis");
            return WRONG_SETTINGS.into();
        }
    };
    let shared = app.clone();
    let server = HttpServer::new(move || functions::service(shared.clone()))
        .workers(http.workers)
        // The one client is the host on this machine: its pool closes what it does not use, and if it dies the kernel
        // does. Closing one that it is about to use would cost a request, and a timer for each answer costs every one.
        .keep_alive(KeepAlive::Os)
        .tcp_nodelay(true) // the end of an answer must not wait until its beginning is acknowledged
        .client_request_timeout(FIRST_REQUEST)
        .shutdown_timeout(http.drain.as_secs())
        .disable_signals()
        .bind((Ipv4Addr::LOCALHOST, http.port));
    let server = match server {
        Ok(server) => server,
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            tracing::error!("address already in use: 127.0.0.1:{}", http.port);
            return CANNOT_SERVE.into();
        }
        Err(error) => {
            tracing::error!(%error, "cannot listen on 127.0.0.1:{}", http.port);
            return CANNOT_SERVE.into();
        }
    };
    let port = server.addrs().first().map_or(http.port, |address| address.port());
    let server = server.run();
    let handle = server.handle();
    let tasks = (app.follow_changes(), app.report());
    tokio::spawn(announce(app.clone(), role, port, http.route_prefix, redis));
    let stopping_since = Cell::new(None);
    let cut_short = async {
        let name = stop.next().await;
        tracing::info!("{name}: finishing requests in flight");
        stopping_since.set(Some(Instant::now()));
        let _ended = handle.stop(true);
        let name = stop.next().await;
        tracing::warn!("{name} again: requests in flight are cut off");
    };
    tokio::select! {
        ended = server => if let Err(error) = ended {
            tracing::error!(%error, "the server failed");
            return CANNOT_SERVE.into();
        },
        () = cut_short => stopping_since.set(None),
    }
    if !http.drain.is_zero() && stopping_since.get().is_some_and(|since| since.elapsed() >= http.drain) {
        tracing::warn!(seconds = http.drain.as_secs(), "requests that were still in flight, if any, are cut off");
    }
    drop(tasks);
    app.settle().await;
    app.database().close().await;
    match role {
        Role::Standalone => ExitCode::SUCCESS,
        Role::Handler => STOPPED_UNDER_HOST.into(),
    }
}

/// Opens the database, after the port is bound, and says how things are: a screen for a person, a line for a host.
async fn announce(app: Arc<App>, role: Role, port: u16, prefix: String, redis: bool) {
    let database = match app.database().open().await {
        Ok(database) => database,
        Err(error) => {
            tracing::warn!(%error, "the database cannot be opened yet; requests will try again");
            "not reachable yet".to_owned()
        }
    };
    let redis = if redis { "on" } else { "off (set Redis to share entries and expiries between instances)" };
    if role == Role::Handler {
        tracing::info!(version = env!("CARGO_PKG_VERSION"), port, database, redis, "ready");
        return;
    }
    let slash = if prefix.is_empty() { "" } else { "/" };
    // Nobody may be looking any more (`handler | head -1`).
    let _ = writeln!(
        io::stdout(),
        "\nproduct-cache {version}\n  listening  http://127.0.0.1:{port}\n  database   {database}\n  Redis      {redis}\n  \
         try        curl -i 'http://127.0.0.1:{port}{slash}{prefix}/GetProductById?productid=680'\n  stop       Ctrl-C\n",
        version = env!("CARGO_PKG_VERSION"),
    );
}

/// The signals that ask it to stop.
#[cfg(unix)]
struct StopSignals(Option<[signal::unix::Signal; 2]>);

#[cfg(unix)]
impl StopSignals {
    /// Listens for them from this call on, which comes before the port is bound: whoever has had an answer may ask.
    fn listen() -> Self {
        use signal::unix::{SignalKind, signal};
        let (terminate, interrupt) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
        Self(terminate.ok().zip(interrupt.ok()).map(<[_; 2]>::from))
    }

    async fn next(&mut self) -> &'static str {
        let Some([terminate, interrupt]) = &mut self.0 else { return std::future::pending().await };
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "Ctrl-C",
        }
    }
}

#[cfg(not(unix))]
struct StopSignals;

#[cfg(not(unix))]
impl StopSignals {
    fn listen() -> Self {
        Self
    }

    async fn next(&mut self) -> &'static str {
        let _ = signal::ctrl_c().await;
        "Ctrl-C"
    }
}
