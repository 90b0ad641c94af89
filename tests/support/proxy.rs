//! A TCP proxy between a handler and one of its servers, which can be told to misbehave.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::AbortHandle,
    time::sleep,
};

/// What the proxy does with what comes back from the server, and once with what goes there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Passes everything on.
    None,
    /// Closes connections, and new ones at once.
    Refuse,
    /// Holds every byte back.
    Stall,
    /// Holds every byte of requests back, and carries them out late, even if nobody waits for the answer any more.
    StallRequests,
    /// Passes each piece on this much later.
    Slow(Duration),
    /// Passes on half of the next reply, and closes.
    CutMidReply,
    /// Replaces replies with noise.
    Garbage,
}

/// Which connections a fault is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// All of them.
    Every,
    /// The one that reads the invalidation log; a new connection counts as one as soon as it does.
    Log,
    /// All but that.
    NotLog,
}

pub struct Proxy {
    pub port: u16,
    orders: Arc<watch::Sender<(Link, Fault)>>,
    requests: Arc<AtomicUsize>,
    server_port: Arc<AtomicU16>,
    task: AbortHandle,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
        self.set(Fault::Refuse);
    }
}

impl Proxy {
    pub async fn start(server_port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let orders = Arc::new(watch::Sender::new((Link::Every, Fault::None)));
        let new_orders = orders.clone();
        let requests = Arc::new(AtomicUsize::new(0));
        let counted = requests.clone();
        let server_port = Arc::new(AtomicU16::new(server_port));
        let server = server_port.clone();
        let task = tokio::spawn(async move {
            loop {
                let Ok((client, _)) = listener.accept().await else { continue };
                let orders = new_orders.subscribe();
                if *orders.borrow() != (Link::Every, Fault::Refuse) {
                    tokio::spawn(carry(
                        client,
                        SocketAddr::from(([127, 0, 0, 1], server.load(Ordering::SeqCst))),
                        orders,
                        counted.clone(),
                    ));
                }
            }
        });
        Self { port, orders, requests, server_port, task: task.abort_handle() }
    }

    pub fn set(&self, fault: Fault) {
        self.set_on(Link::Every, fault);
    }

    pub fn set_on(&self, link: Link, fault: Fault) {
        self.orders.send_replace((link, fault));
    }

    /// Where connections that are made from now on lead.
    pub fn lead_to(&self, server_port: u16) {
        self.server_port.store(server_port, Ordering::SeqCst);
    }

    /// How many pieces clients have sent so far; each of them waits for an answer before the next.
    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    pub fn redis_url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }
}

/// A connection's own view of the orders.
struct Orders {
    orders: watch::Receiver<(Link, Fault)>,
    reads_log: Arc<AtomicBool>,
}

impl Orders {
    fn applies(link: Link, reads_log: bool) -> bool {
        match link {
            Link::Every => true,
            Link::Log => reads_log,
            Link::NotLog => !reads_log,
        }
    }

    fn fault(&mut self) -> Fault {
        let (link, fault) = *self.orders.borrow_and_update();
        if Self::applies(link, self.reads_log.load(Ordering::SeqCst)) { fault } else { Fault::None }
    }

    async fn until(&mut self, wanted: impl Fn(Fault) -> bool) {
        while !wanted(self.fault()) {
            // What a connection is for may show later than the order.
            let _ = tokio::time::timeout(Duration::from_millis(20), self.orders.changed()).await;
        }
    }
}

async fn carry(
    client: TcpStream,
    server: SocketAddr,
    orders: watch::Receiver<(Link, Fault)>,
    requests: Arc<AtomicUsize>,
) {
    let Ok(server) = TcpStream::connect(server).await else { return };
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let reads_log = Arc::new(AtomicBool::new(false));
    let mut orders = Orders { orders, reads_log: reads_log.clone() };
    let mut refusals = Orders { orders: orders.orders.clone(), reads_log: reads_log.clone() };
    let mut holds = Orders { orders: orders.orders.clone(), reads_log: reads_log.clone() };
    let up = async {
        let mut piece = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = from_client.read(&mut piece).await {
            requests.fetch_add(1, Ordering::SeqCst);
            // XREAD, and the XREVRANGE it starts with, as commands: scripts name them too.
            let about_log = |part: &[u8]| part == b"\r\nXREAD" || part == b"\r\nXREVR";
            if piece[..length].windows(7).any(about_log) {
                reads_log.store(true, Ordering::SeqCst);
            }
            holds.until(|fault| fault != Fault::StallRequests).await;
            if to_server.write_all(&piece[..length]).await.is_err() {
                return;
            }
        }
    };
    let down = async {
        let mut piece = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = from_server.read(&mut piece).await {
            match orders.fault() {
                Fault::Stall => orders.until(|fault| fault != Fault::Stall).await,
                Fault::Slow(delay) => sleep(delay).await,
                Fault::CutMidReply => {
                    let _ = to_client.write_all(&piece[..length / 2]).await;
                    return;
                }
                Fault::Garbage => piece[..length].fill(b'?'),
                Fault::None | Fault::StallRequests | Fault::Refuse => {}
            }
            if to_client.write_all(&piece[..length]).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = up => {}
        () = down => {}
        () = refusals.until(|fault| fault == Fault::Refuse) => {}
    }
}
