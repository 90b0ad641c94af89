//! The threads that answer requests, for what runs best beside them.
//!
//! Knows nothing of what runs there. Invariant: it runs on one of them as long as there is one, and else where it was asked
//! for.

use std::time::Duration;

use tokio::{runtime::Handle, sync::watch, time::timeout};

use crate::background::Task;

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
            let _stop = Task::from(task.abort_handle());
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

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

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
