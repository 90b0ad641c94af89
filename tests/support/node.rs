//! Nodes and a source of truth: the cache as instances use it, over a database that can be held back, fail and hang.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use product_cache::{
    cache::{Answer, Cache, Entry, Failure, Feed, Key, Load, entry::Body},
    config::Config,
    foreground::Foreground,
    redis::Redis,
};
use tokio::{
    runtime::Handle,
    sync::watch,
    task::JoinHandle,
    time::{Instant, timeout},
};

use super::{PATIENCE, PATIENT, eventually};

pub const KIND: &str = "thing";
pub const BUDGET: Duration = Duration::from_secs(10);

pub fn key(id: i64) -> Key {
    Key::new(KIND, id)
}

/// The source of truth that the nodes of a test share: a number per id.
#[derive(Clone)]
pub struct Truth(pub Arc<Inner>);

pub struct Inner {
    pub values: Mutex<HashMap<i64, u64>>,
    pub loads: Mutex<Vec<Vec<i64>>>,
    pub begun: AtomicUsize,
    /// Loads that may end: those up to the first number, and the second one.
    pub gate: watch::Sender<(usize, usize)>,
    pub failing: AtomicBool,
    pub panicking: AtomicBool,
}

impl Truth {
    pub fn new(values: &[(i64, u64)]) -> Self {
        Self(Arc::new(Inner {
            values: Mutex::new(values.iter().copied().collect()),
            loads: Mutex::default(),
            begun: AtomicUsize::new(0),
            gate: watch::Sender::new((usize::MAX, 0)),
            failing: AtomicBool::new(false),
            panicking: AtomicBool::new(false),
        }))
    }

    pub fn set(&self, id: i64, value: u64) {
        self.0.values.lock().unwrap().insert(id, value);
    }

    /// From now on loads read their values and then wait.
    pub fn hold(&self) {
        self.0.gate.send_replace((0, 0));
    }

    pub fn release(&self) {
        self.0.gate.send_replace((usize::MAX, 0));
    }

    /// Lets the `number`th load of all, counted from 1, end before the others.
    pub fn release_only(&self, number: usize) {
        self.0.gate.send_replace((0, number));
    }

    pub fn fail(&self, failing: bool) {
        self.0.failing.store(failing, Ordering::SeqCst);
    }

    pub fn loads(&self) -> usize {
        self.0.loads.lock().unwrap().len()
    }

    pub async fn begun(&self, loads: usize) {
        eventually("a load begins", async || (self.0.begun.load(Ordering::SeqCst) >= loads).then_some(())).await;
    }

    pub fn load(&self) -> Load {
        let truth = self.clone();
        Arc::new(move |keys| {
            let truth = truth.clone();
            Box::pin(async move {
                let inner = &truth.0;
                let ids: Vec<_> = keys.iter().map(Key::id).collect();
                inner.loads.lock().unwrap().push(ids);
                // As a database does: what is read is what is there when the query begins.
                let values = inner.values.lock().unwrap().clone();
                let number = inner.begun.fetch_add(1, Ordering::SeqCst) + 1;
                let _ = inner.gate.subscribe().wait_for(|(up_to, one)| number <= *up_to || number == *one).await;
                if inner.panicking.swap(false, Ordering::SeqCst) {
                    panic!("planted");
                }
                if inner.failing.load(Ordering::SeqCst) {
                    return Err(Failure::Unavailable("planted".to_owned()));
                }
                let found = keys.into_iter().filter_map(|key| Some((key, Ok(entry(*values.get(&key.id())?)))));
                Ok(found.collect())
            })
        })
    }
}

pub fn entry(value: u64) -> Entry {
    Entry::Found(Body::new(value.to_string().as_bytes(), None))
}

/// One instance's cache.
pub struct Node {
    pub cache: Arc<Cache>,
    pub load: Load,
}

impl Node {
    /// One that waits for Redis as [`PATIENT`] says, unless the settings say otherwise.
    pub fn new(truth: &Truth, redis_url: Option<&str>, settings: &[(&str, &str)]) -> Self {
        let mut variables: BTreeMap<String, String> = BTreeMap::new();
        variables.insert("CACHE_JITTER_PERCENT".into(), "0".into());
        variables.extend(redis_url.map(|url| ("Redis".to_owned(), url.to_owned())));
        variables.extend(PATIENT.map(|(name, value)| (name.to_owned(), value.to_owned())));
        variables.extend(settings.iter().map(|(name, value)| (name.to_string(), value.to_string())));
        let config = Config::from_variables(&variables).expect("valid settings");
        let (runtime, foreground) = (Handle::current(), Foreground::of(&Handle::current()));
        let redis = config.redis.as_ref().map(|redis| (Redis::start(redis, &runtime, &foreground).unwrap(), redis));
        let cache = Cache::start(&config.cache, redis, Feed::None, &[KIND], &runtime, &foreground);
        Self { cache: Arc::new(cache), load: truth.load() }
    }

    /// A node that hears the log already.
    pub async fn hearing(truth: &Truth, redis_url: &str, settings: &[(&str, &str)]) -> Self {
        let began = Instant::now();
        let node = Self::new(truth, Some(redis_url), settings);
        node.until_it_has_heard_since(began).await;
        node
    }

    /// Waits until the log was heard after this call.
    pub async fn until_it_hears(&self) {
        self.until_it_has_heard_since(Instant::now()).await;
    }

    pub async fn until_it_has_heard_since(&self, moment: Instant) {
        eventually("the log is heard", async || {
            let since = moment.elapsed();
            let status = self.cache.status();
            let has_heard = status.log_unheard_for.is_some_and(|unheard| unheard <= since);
            (has_heard && status.redis_connected == Some(true)).then_some(())
        })
        .await;
    }

    pub async fn try_read(&self, id: i64) -> Result<Answer, Failure> {
        if let Some(answer) = self.cache.get(&key(id), None, &self.load) {
            return Ok(answer);
        }
        self.cache.get_or_load(&[key(id)], None, &self.load).await.remove(0)
    }

    pub async fn read(&self, id: i64) -> Answer {
        self.try_read(id).await.unwrap_or_else(|failure| panic!("{id}: {failure}"))
    }

    pub async fn value(&self, id: i64) -> Option<u64> {
        value(&self.read(id).await)
    }

    /// Reads as a task, and waits until it is on its way.
    pub fn begin(&self, id: i64) -> JoinHandle<Result<Answer, Failure>> {
        let (cache, load) = (self.cache.clone(), self.load.clone());
        tokio::spawn(async move { cache.get_or_load(&[key(id)], None, &load).await.remove(0) })
    }
}

pub fn value(answer: &Answer) -> Option<u64> {
    match answer.entry() {
        Entry::Found(body) => Some(std::str::from_utf8(body.bytes()).unwrap().parse().unwrap()),
        Entry::Absent => None,
    }
}

pub async fn ended(task: JoinHandle<Result<Answer, Failure>>) -> Result<Answer, Failure> {
    timeout(PATIENCE, task).await.expect("the read ends").expect("the read does not panic")
}
