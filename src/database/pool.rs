//! Connections to a database: bounded in number, in age and in what a broken one can cost.
//!
//! Owns when a connection is opened, trusted and thrown away; an engine says how, by [`Connect`]. Invariants: a
//! connection whose work failed or was cancelled is never used again; no more are open than the pool's bound.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use deadpool::{
    Runtime,
    managed::{self, Metrics, Object, QueueMode, RecycleError, RecycleResult, TimeoutType},
};
use futures_util::future::BoxFuture;

use super::Error;
use crate::config;

/// A connection idle for longer is asked for a sign of life before it is used: balancers forget idle connections.
const TRUSTED_IDLE: Duration = Duration::from_secs(30);
/// Bound of that sign of life. A few dead connections in a row must still leave time for a fresh one.
const PING: Duration = Duration::from_millis(500);

/// How an engine opens and checks a connection.
pub(super) trait Connect: Send + Sync + 'static {
    /// An open connection.
    type Connection: Send;

    /// Opens one. The pool bounds the time; dropping the future gives up.
    fn connect(&self) -> impl Future<Output = Result<Self::Connection, Failure>> + Send;

    /// One round trip.
    fn ping(&self, connection: &mut Self::Connection) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Closes one that is idle, at the end.
    fn close(&self, connection: Self::Connection) -> impl Future<Output = ()> + Send {
        drop(connection);
        std::future::ready(())
    }
}

/// Why a connection could not do its work.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// It is lost, or the server sent it away: another one may work.
    #[error("{0}")]
    Lost(String),
    /// The server answered, and its answer is no.
    #[error("{0}")]
    Refused(String),
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Self::Unavailable(failure.to_string())
    }
}

pub(super) struct Pool<C: Connect> {
    pool: managed::Pool<Manager<C>>,
    connect_timeout: Duration,
}

struct Manager<C> {
    connect: C,
    max_age: Duration,
    /// When a connection was last found lost or hanging: those older must prove themselves.
    doubted: Mutex<Option<Instant>>,
}

struct Pooled<T> {
    connection: T,
    replace_at: Instant,
    /// Whether it has done work before.
    used: bool,
}

impl<C: Connect> Pool<C> {
    /// Describes the pool; nothing is opened before the first use.
    pub(super) fn new(connect: C, config: &config::Database, max_connections: u32) -> Self {
        let manager = Manager { connect, max_age: config.max_age, doubted: Mutex::new(None) };
        let pool = managed::Pool::builder(manager)
            .max_size(max_connections.max(1) as usize)
            .wait_timeout(Some(config.connect_timeout))
            .create_timeout(Some(config.connect_timeout))
            .recycle_timeout(Some(PING))
            .queue_mode(QueueMode::Lifo)
            .runtime(Runtime::Tokio1)
            .build();
        let pool = pool.unwrap_or_else(|error| unreachable!("a runtime is named: {error}"));
        Self { pool, connect_timeout: config.connect_timeout }
    }

    /// Lends a connection to `work`. If it turns out to have been lost while it was idle, the work is done once more
    /// on another: it must be a read. Dropping the future closes the connection.
    pub(super) async fn run<T>(
        &self,
        work: impl for<'c> Fn(&'c mut C::Connection) -> BoxFuture<'c, Result<T, Failure>> + Sync,
    ) -> Result<T, Error> {
        match self.attempt(&work).await? {
            Ok(done) => Ok(done),
            Err((Failure::Lost(problem), true)) => {
                tracing::debug!(problem, "an idle connection was lost; trying another");
                Ok(self.attempt(&work).await?.map_err(|(failure, _)| failure)?)
            }
            Err((failure, _)) => Err(failure.into()),
        }
    }

    /// The failure comes with whether the connection had worked before.
    async fn attempt<T>(
        &self,
        work: &(impl for<'c> Fn(&'c mut C::Connection) -> BoxFuture<'c, Result<T, Failure>> + Sync),
    ) -> Result<Result<T, (Failure, bool)>, Error> {
        let object = self.pool.get().await.map_err(|error| self.no_connection(error))?;
        let mut lent = Lent { manager: self.pool.manager(), object: Some(object) };
        let Some(pooled) = lent.object.as_mut() else { unreachable!("lent above") };
        let used = std::mem::replace(&mut pooled.used, true);
        let done = work(&mut pooled.connection).await;
        let done = done.map_err(|failure| (failure, used));
        match done {
            Ok(_) => drop(lent.object.take()), // back into the pool
            Err((Failure::Refused(_), _)) => drop(lent.object.take().map(Object::take)),
            Err((Failure::Lost(_), _)) => drop(lent),
        }
        Ok(done)
    }

    fn no_connection(&self, error: managed::PoolError<Failure>) -> Error {
        let within = self.connect_timeout.as_millis();
        match error {
            managed::PoolError::Backend(failure) => failure.into(),
            managed::PoolError::Timeout(TimeoutType::Wait) => {
                Error::Unavailable(format!("no connection was free within {within} ms"))
            }
            managed::PoolError::Timeout(_) => Error::Unavailable(format!("no connection within {within} ms")),
            error => Error::Unavailable(error.to_string()),
        }
    }

    /// Closes what is idle, and lets nobody in any more. A server or disk that does not answer is not waited for.
    pub(super) async fn close(&self) {
        let idle = self.pool.retain(|_, _| false).removed;
        self.pool.close();
        let close = async {
            for pooled in idle {
                self.pool.manager().connect.close(pooled.connection).await;
            }
        };
        let _ = tokio::time::timeout(self.connect_timeout, close).await;
    }
}

/// A connection at work. Whatever ends the work early (an error, a deadline, a panic) ends the connection.
struct Lent<'a, C: Connect> {
    manager: &'a Manager<C>,
    object: Option<Object<Manager<C>>>,
}

impl<C: Connect> Drop for Lent<'_, C> {
    fn drop(&mut self) {
        if let Some(object) = self.object.take() {
            *self.manager.doubted.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(Instant::now());
            drop(Object::take(object));
        }
    }
}

impl<C: Connect> managed::Manager for Manager<C> {
    type Type = Pooled<C::Connection>;
    type Error = Failure;

    async fn create(&self) -> Result<Self::Type, Failure> {
        let connection = self.connect.connect().await?;
        let age = self.max_age.mul_f64(rand::random_range(0.9..=1.0));
        Ok(Pooled { connection, replace_at: Instant::now() + age, used: false })
    }

    async fn recycle(&self, pooled: &mut Self::Type, metrics: &Metrics) -> RecycleResult<Failure> {
        if Instant::now() >= pooled.replace_at {
            return Err(RecycleError::message("old"));
        }
        let last_used = metrics.recycled.unwrap_or(metrics.created);
        let doubted = *self.doubted.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if doubted.is_some_and(|doubted| last_used <= doubted) || last_used.elapsed() > TRUSTED_IDLE {
            self.connect.ping(&mut pooled.connection).await?;
        }
        Ok(())
    }
}
