//! Tasks that live as long as the process: started once, restarted if they panic, stopped when their owner goes.
//!
//! Knows nothing of what the tasks do. Invariant: a panic in one is logged and counted, and never ends it for good.

use std::{
    panic::AssertUnwindSafe,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use futures_util::FutureExt;
use tokio::{runtime::Handle, task::AbortHandle};

/// Pause before a task that panicked is started again: a panic at once after the start must not become a busy loop.
const RESTART_PAUSE: Duration = Duration::from_secs(1);

static PANICS: AtomicU64 = AtomicU64::new(0);

/// How many background tasks have panicked since the process began.
pub(crate) fn panics() -> u64 {
    PANICS.load(Ordering::Relaxed)
}

/// How many threads run them. What requests ask for runs on HTTP's workers; on few cores more threads behind those do
/// little but wake each other.
pub fn threads() -> usize {
    (std::thread::available_parallelism().map_or(1, usize::from) / 2).max(1)
}

/// A running task; it stops when this is dropped.
pub struct Task(AbortHandle);

impl From<AbortHandle> for Task {
    fn from(handle: AbortHandle) -> Self {
        Self(handle)
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Runs what `start` makes, for ever: anew after a panic, and anew should it ever return.
pub(crate) fn keep_running<F>(
    runtime: &Handle,
    name: &'static str,
    mut start: impl FnMut() -> F + Send + 'static,
) -> Task
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
    runtime.spawn(task).abort_handle().into()
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
