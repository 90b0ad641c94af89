//! Tasks that live as long as the process: started once, restarted if they panic, stopped when their owner goes; and
//! which thread they run on.
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
use tokio::{
    runtime::Handle,
    sync::watch,
    task::AbortHandle,
    time::{Instant, timeout},
};

/// Pause before a task that panicked is started again: a panic at once after the start must not become a busy loop.
const RESTART_PAUSE: Duration = Duration::from_secs(1);

static PANICS: AtomicU64 = AtomicU64::new(0);

/// How many background tasks have panicked since the process began.
pub fn panics() -> u64 {
    PANICS.load(Ordering::Relaxed)
}

/// How many threads run them. What requests ask for runs on HTTP's workers; on few cores more threads behind those do
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

/// How long what belongs in the foreground waits for it to exist; a server starts its threads in milliseconds.
const FOREGROUND_COMES: Duration = Duration::from_secs(1);

/// The runtimes of the threads that answer requests, once there are any. What runs on the first one and the requests
/// there reach each other without waking another thread.
#[derive(Clone, Default)]
pub struct Foreground(watch::Sender<Option<Vec<Handle>>>);

impl Foreground {
    /// This runtime, where nothing answers requests.
    pub fn of(runtime: &Handle) -> Self {
        Self(watch::Sender::new(Some(vec![runtime.clone()])))
    }

    /// Called on each thread that answers requests, inside its runtime.
    pub fn is_here(&self) {
        self.0.send_modify(|runtimes| runtimes.get_or_insert_default().push(Handle::current()));
    }

    /// Runs what `start` makes on the first of them; anew on the next one should it end meanwhile; here if none is left.
    pub async fn run<F>(&self, mut start: impl FnMut() -> F) -> F::Output
    where
        F: Future<Output: Send> + Send + 'static,
    {
        let _ = timeout(FOREGROUND_COMES, self.0.subscribe().wait_for(Option::is_some)).await;
        loop {
            let first = self.0.borrow().as_ref().and_then(|runtimes| runtimes.first().cloned());
            let Some(runtime) = first else { return start().await };
            let task = runtime.spawn(start());
            let _stop = Task(task.abort_handle());
            match task.await {
                Ok(output) => return output,
                Err(error) => {
                    if let Ok(panic) = error.try_into_panic() {
                        std::panic::resume_unwind(panic);
                    }
                }
            }
            let left = |other: &Handle| other.id() != runtime.id();
            self.0.send_modify(|runtimes| runtimes.iter_mut().for_each(|runtimes| runtimes.retain(left)));
        }
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
    use std::sync::Arc;

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

    /// Another thread's runtime, and what ends it.
    fn elsewhere() -> (Handle, tokio::sync::oneshot::Sender<()>, std::thread::JoinHandle<()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let (handle, (end, ended)) = (runtime.handle().clone(), tokio::sync::oneshot::channel());
        let thread = std::thread::spawn(move || {
            let _ = runtime.block_on(ended);
        });
        (handle, end, thread)
    }

    #[tokio::test]
    async fn what_belongs_in_the_foreground_goes_on_in_the_next_thread_of_it_and_then_here() {
        let foreground = Foreground::default();
        let (mut ends, mut threads) = (Vec::new(), Vec::new());
        for (runtime, end, thread) in [elsewhere(), elsewhere()] {
            let told = foreground.clone();
            runtime.spawn(async move { told.is_here() }).await.expect("no panic");
            ends.push(end);
            threads.push(thread);
        }
        ends.reverse();
        let begun = Arc::new(Mutex::new(Vec::new()));
        let noted = begun.clone();
        let here = std::thread::current().id();
        let ends_here = foreground.run(move || {
            drop(ends.pop()); // the end of the thread it is meant for
            let noted = noted.clone();
            async move {
                noted.lock().expect("no panic").push(std::thread::current().id());
                if std::thread::current().id() != here {
                    std::future::pending::<()>().await;
                }
            }
        });
        timeout(Duration::from_secs(10), ends_here).await.expect("an end that is noticed");
        assert_eq!(begun.lock().expect("no panic").last(), Some(&here));
        threads.into_iter().for_each(|thread| thread.join().expect("no panic"));

        let (runtime, _end, thread) = elsewhere();
        let told = foreground.clone();
        runtime.spawn(async move { told.is_here() }).await.expect("no panic");
        let found = foreground.run(|| async { std::thread::current().id() }).await;
        assert_eq!(found, thread.thread().id(), "a thread that replaces one that ended");
    }
}
