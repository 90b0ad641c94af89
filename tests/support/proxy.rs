//! A TCP proxy between a handler and one of its servers, which can be told to misbehave.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
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

/// What the proxy does with what comes back from the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Passes everything on.
    None,
    /// Closes connections, and new ones at once.
    Refuse,
    /// Holds every byte back.
    Stall,
    /// Holds back what comes over the connection that reads the invalidation log.
    StallLog,
    /// Passes each piece on this much later.
    Slow(Duration),
    /// Passes on half of the next reply, and closes.
    CutMidReply,
    /// Replaces replies with noise.
    Garbage,
}

pub struct Proxy {
    pub port: u16,
    fault: Arc<watch::Sender<Fault>>,
    task: AbortHandle,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
        self.fault.send_replace(Fault::Refuse);
    }
}

impl Proxy {
    pub async fn start(server_port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let fault = Arc::new(watch::Sender::new(Fault::None));
        let faults = fault.clone();
        let task = tokio::spawn(async move {
            loop {
                let Ok((client, _)) = listener.accept().await else { continue };
                let faults = faults.subscribe();
                if *faults.borrow() != Fault::Refuse {
                    tokio::spawn(carry(client, SocketAddr::from(([127, 0, 0, 1], server_port)), faults));
                }
            }
        });
        Self { port, fault, task: task.abort_handle() }
    }

    pub fn set(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }

    pub fn redis_url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }
}

async fn carry(client: TcpStream, server: SocketAddr, mut faults: watch::Receiver<Fault>) {
    let Ok(server) = TcpStream::connect(server).await else { return };
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let mut refusals = faults.clone();
    let reads_log = AtomicBool::new(false);
    let up = async {
        let mut piece = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = from_client.read(&mut piece).await {
            if piece[..length].windows(5).any(|part| part == b"XREAD") {
                reads_log.store(true, Ordering::SeqCst);
            }
            if to_server.write_all(&piece[..length]).await.is_err() {
                return;
            }
        }
    };
    let down = async {
        let mut piece = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = from_server.read(&mut piece).await {
            let fault = *faults.borrow_and_update();
            match fault {
                Fault::Stall => drop(faults.wait_for(|fault| *fault != Fault::Stall).await),
                Fault::StallLog if reads_log.load(Ordering::SeqCst) => {
                    drop(faults.wait_for(|fault| *fault != Fault::StallLog).await);
                }
                Fault::Slow(delay) => sleep(delay).await,
                Fault::CutMidReply => {
                    let _ = to_client.write_all(&piece[..length / 2]).await;
                    return;
                }
                Fault::Garbage => piece[..length].fill(b'?'),
                Fault::None | Fault::StallLog | Fault::Refuse => {}
            }
            if to_client.write_all(&piece[..length]).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = up => {}
        () = down => {}
        _ = refusals.wait_for(|fault| *fault == Fault::Refuse) => {}
    }
}
