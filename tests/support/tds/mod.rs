//! A server that speaks as much TDS 7.4 as the product cache's queries need, and misbehaves on demand.
//!
//! It has no SQL: a test's closure answers each query. It counts connections, and keeps logins and queries.

pub mod products;
mod tokens;
mod wire;

use std::{
    io,
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use tokio::{
    net::{TcpListener, TcpStream},
    task::AbortHandle,
};

use self::wire::{Prelogin, Wire};
pub use self::{
    tokens::{Cell, Column, Table, Tokens, Type},
    wire::{Login, Query},
};
use super::certificates::CERTIFICATES;

/// An answer to a query.
pub enum Answer {
    Tables(Vec<Table>),
    /// Number, class, message.
    Error(u32, u8, &'static str),
    /// None, until the client goes away.
    Stall,
    /// All but the last byte of the last row of these, then the end of the connection.
    CutMidRow(Vec<Table>),
    /// Bytes that are no TDS.
    Garbage,
    /// The end of the connection.
    Close,
}

/// An answer to a login.
#[derive(Clone, Debug)]
pub enum Welcome {
    In,
    Refused(u32, &'static str),
    Route(String, u16),
    Stall,
}

type Answers = dyn Fn(&Query) -> Answer + Send + Sync;

pub struct Server {
    pub port: u16,
    shared: Arc<Shared>,
    task: AbortHandle,
}

struct Shared {
    answers: Box<Answers>,
    welcome: Mutex<Welcome>,
    logins: Mutex<Vec<Login>>,
    queries: Mutex<Vec<Query>>,
    connections: AtomicUsize,
    open: AtomicUsize,
    most_open: AtomicUsize,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    pub async fn start(answers: impl Fn(&Query) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let shared = Arc::new(Shared {
            answers: Box::new(answers),
            welcome: Mutex::new(Welcome::In),
            logins: Mutex::default(),
            queries: Mutex::default(),
            connections: AtomicUsize::default(),
            open: AtomicUsize::default(),
            most_open: AtomicUsize::default(),
        });
        let task = tokio::spawn(accept(listener, shared.clone())).abort_handle();
        Self { port, shared, task }
    }

    /// What logins are told from now on.
    pub fn welcome(&self, welcome: Welcome) {
        *self.shared.welcome.lock().unwrap() = welcome;
    }

    /// Logins so far, refused and redirected ones, too.
    pub fn logins(&self) -> Vec<Login> {
        self.shared.logins.lock().unwrap().clone()
    }

    /// Queries so far, without the pool's `SELECT 1`.
    pub fn queries(&self) -> Vec<Query> {
        self.shared.queries.lock().unwrap().clone()
    }

    /// Connections so far.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// Connections now.
    pub fn open(&self) -> usize {
        self.shared.open.load(Ordering::SeqCst)
    }

    /// The most connections that there were at once.
    pub fn most_open(&self) -> usize {
        self.shared.most_open.load(Ordering::SeqCst)
    }
}

/// Counts a connection as open while it lives.
struct Open(Arc<Shared>);

impl Open {
    fn new(shared: Arc<Shared>) -> Self {
        shared.connections.fetch_add(1, Ordering::SeqCst);
        let open = shared.open.fetch_add(1, Ordering::SeqCst) + 1;
        shared.most_open.fetch_max(open, Ordering::SeqCst);
        Self(shared)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    // Connections end with the server.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let Ok((tcp, _)) = listener.accept().await else { continue };
        let open = Open::new(shared.clone());
        connections.spawn(async move { drop(serve(tcp, &open.0).await) });
        while connections.try_join_next().is_some() {}
    }
}

async fn serve(tcp: TcpStream, shared: &Shared) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    let mut wire = Wire::new(tcp);
    let Some(()) = log_in(&mut wire, shared).await? else { return Ok(()) };
    loop {
        let (kind, message) = wire.receive().await?;
        let query = match kind {
            wire::SQL_BATCH => Query::of_batch(&message),
            wire::RPC => Query::of_call(&message),
            wire::ATTENTION => {
                let mut tokens = Tokens::default();
                tokens.cancelled();
                wire.send(wire::REPLY, &tokens.0).await?;
                continue;
            }
            other => return Err(io::Error::other(format!("a message of type {other}"))),
        };
        if query.sql == "SELECT 1" {
            let columns = vec![Column { name: String::new(), kind: Type::Int(4), nullable: false }];
            let one = Table { columns, rows: vec![vec![Cell::Int(1)]] };
            answer(&mut wire, Answer::Tables(vec![one])).await?;
            continue;
        }
        let told = (shared.answers)(&query);
        shared.queries.lock().unwrap().push(query);
        answer(&mut wire, told).await?;
    }
}

/// The beginning of a connection, up to an answer that lets the client in.
async fn log_in(wire: &mut Wire, shared: &Shared) -> io::Result<Option<()>> {
    let strict = wire.begins_with_tls().await?;
    if strict {
        wire.encrypt(OFFERS.strict.clone(), false).await?;
    }
    let asked = Prelogin::parse(&wire.receive().await?.1);
    wire.send(wire::REPLY, &asked.answer()).await?;
    if !strict {
        wire.encrypt(OFFERS.in_packets.clone(), true).await?;
    }
    let (kind, message) = wire.receive().await?;
    assert_eq!(kind, wire::LOGIN7, "a login");
    let encrypted = strict || asked.encryption != wire::LOGIN_ONLY;
    if !encrypted {
        wire.decrypt();
    }
    let login = Login { encrypted, ..Login::parse(&message) };
    let mut tokens = Tokens::default();
    let welcome = shared.welcome.lock().unwrap().clone();
    match &welcome {
        Welcome::In => tokens.welcome(&login.database, login.token.is_some()),
        Welcome::Refused(number, message) => tokens.error(*number, 14, message),
        Welcome::Route(host, port) => {
            tokens.welcome(&login.database, login.token.is_some());
            tokens.route(host, *port);
        }
        Welcome::Stall => {}
    }
    shared.logins.lock().unwrap().push(login);
    if matches!(welcome, Welcome::Stall) {
        wire.closed().await;
        return Ok(None);
    }
    tokens.done(matches!(welcome, Welcome::Refused(..)));
    wire.send(wire::REPLY, &tokens.0).await?;
    Ok(matches!(welcome, Welcome::In).then_some(()))
}

async fn answer(wire: &mut Wire, told: Answer) -> io::Result<()> {
    let mut tokens = Tokens::default();
    match told {
        Answer::Tables(tables) => {
            tables.iter().for_each(|table| tokens.table(table));
            tokens.returned();
        }
        Answer::Error(number, class, message) => {
            tokens.error(number, class, message);
            tokens.done(true);
        }
        Answer::Stall => {
            wire.closed().await;
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Answer::CutMidRow(tables) => {
            tables.iter().for_each(|table| tokens.table(table));
            let bytes = wire::packets(wire::REPLY, &tokens.0);
            let done = 13; // the token that ends the table
            wire.write(&bytes[..bytes.len() - done - 1]).await?;
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        Answer::Garbage => {
            wire.send(wire::REPLY, &[0x55; 300]).await?;
            wire.closed().await;
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Answer::Close => return Err(io::ErrorKind::ConnectionAborted.into()),
    }
    wire.send(wire::REPLY, &tokens.0).await
}

/// TLS as SQL Server offers it.
struct Offers {
    in_packets: Arc<ServerConfig>,
    strict: Arc<ServerConfig>,
}

static OFFERS: LazyLock<Offers> = LazyLock::new(|| {
    let config = |versions: &[&'static rustls::SupportedProtocolVersion]| {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider).with_protocol_versions(versions);
        let config = config.expect("versions").with_no_client_auth();
        let (certificate, key) = (CERTIFICATES.certificate.der().clone(), CERTIFICATES.key.serialize_der());
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
        config.with_single_cert(vec![certificate], key).expect("a certificate and its key")
    };
    let mut strict = config(rustls::ALL_VERSIONS);
    strict.alpn_protocols = vec![b"tds/8.0".to_vec()];
    // As SQL Server: TLS 1.3 sends tickets after the handshake, when packets no longer wrap it.
    let in_packets = config(&[&rustls::version::TLS12]);
    Offers { in_packets: Arc::new(in_packets), strict: Arc::new(strict) }
});
