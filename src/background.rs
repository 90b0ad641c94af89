//! Tasks that live as long as the process: started once, restarted if they panic, stopped when their owner goes.
//!
//! Knows nothing of what the tasks do. Invariant: a panic in one is logged and counted, and never ends it for good.

use std::{
    panic::AssertUnwindSafe,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt;
use tokio::{runtime::Handle, task::AbortHandle, time::Instant};

/// Pause before a task that panicked is started again: a panic at once after the start must not become a busy loop.
const RESTART_PAUSE: Duration = Duration::from_secs(1);

static PANICS: AtomicU64 = AtomicU64::new(0);

/// How many background tasks have panicked since the process began.
pub fn panics() -> u64 {
    PANICS.load(Ordering::Relaxed)
}

/// How many threads run them, and loads. HTTP's workers have threads of their own; on few cores more threads behind them do
/// little but wake each other.
pub fn threads() -> usize {
    (std::thread::available_parallelism().map_or(1, usize::from) / 2).max(1)
}

/// A running task; it stops when this is dropped.
pub struct Task(AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Runs what `start` makes, for ever: anew after a panic, and anew should it ever return.
pub fn keep_running<F>(runtime: &Handle, name: &'static str, mut start: impl FnMut() -> F + Send + 'static) -> Task
where
    F: Future<Output = ()> + Send,
{
    let task = async move {
        loop {
            if AssertUnwindSafe(start()).catch_unwind().await.is_err() {
                PANICS.fetch_add(1, Ordering::Relaxed);
                tracing::error!(task = name, "a background task panicked and is started again");
            }
            tokio::time::sleep(RESTART_PAUSE).await;
        }
    };
    Task(runtime.spawn(task).abort_handle())
}

/// Lets a message through once a second at most, so that an outage does not fill the log.
#[derive(Default)]
pub struct Sparsely {
    last: Mutex<Option<Instant>>,
    unsaid: AtomicU64,
}

impl Sparsely {
    /// `Some` if it is time to say it, with how often it went unsaid since the last time.
    pub fn next(&self) -> Option<u64> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|last| last.elapsed() < Duration::from_secs(1)) {
            self.unsaid.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        *last = Some(Instant::now());
        Some(self.unsaid.swap(0, Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_task_that_panics_is_started_again_and_stops_with_its_owner() {
        let (sender, mut starts) = tokio::sync::mpsc::unbounded_channel();
        let task = keep_running(&Handle::current(), "test", move || {
            let sender = sender.clone();
            async move {
                sender.send(()).expect("the test listens");
                panic!("planted");
            }
        });
        for _ in 0..3 {
            starts.recv().await.expect("another start");
        }
        drop(task);
        assert!(starts.recv().await.is_none(), "the task is gone, and its sender with it");
    }
}
