//! The SQL trigger's loop as a model: change tracking, leases, attempts and versions on a virtual clock.
//!
//! It owns the database's side (what changed, the lease table, LastSyncVersion) and decides what one poll delivers;
//! the delivery itself is `Host::trigger`. It follows the queries of `SqlTableChangeMonitor`.
//! Invariant: a row that is leased is not delivered again before its lease expires or is released.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde_json::Value;

use super::item::{Item, Operation, changes};
use super::{Host, Invocation};

const LEASE: Duration = Duration::from_secs(60);
const MAX_ATTEMPTS: u32 = 5;

/// One instance of the trigger: one table, one function, one invocation at a time.
///
/// Time stands still while an invocation runs (the real loop renews its leases meanwhile).
pub struct SqlTrigger {
    function: String,
    database: Database,
}

/// What one poll delivered, in the order of the array.
#[derive(Debug, Clone, PartialEq)]
pub struct Delivery {
    pub keys: Vec<Value>,
    pub operations: Vec<Operation>,
    /// Per row, which attempt this was: 1 to 5.
    pub attempts: Vec<u32>,
    pub outcome: Invocation,
}

struct Database {
    primary_key: String,
    now: Duration,
    version: u64,
    last_sync_version: u64,
    /// By the key's JSON text, which is unique per value.
    rows: BTreeMap<String, Tracked>,
    leases: BTreeMap<String, Lease>,
    /// Rows whose fifth attempt has begun and none has succeeded since.
    exhausted: BTreeMap<String, Value>,
}

struct Tracked {
    key: Value,
    /// The current row, or only its key once it is deleted.
    item: Item,
    version: u64,
    creation_version: u64,
    deleted: bool,
}

struct Lease {
    change_version: u64,
    attempts: u32,
    expires: Option<Duration>,
}

struct Batch {
    /// Key text and version, in order of version.
    rows: Vec<(String, u64)>,
    keys: Vec<Value>,
    operations: Vec<Operation>,
    attempts: Vec<u32>,
    data: String,
}

impl SqlTrigger {
    /// An empty table with change tracking on, and a function that has never run.
    pub fn new(function: &str, primary_key: &str) -> Self {
        let database = Database {
            primary_key: primary_key.into(),
            now: Duration::ZERO,
            version: 0,
            last_sync_version: 0,
            rows: BTreeMap::new(),
            leases: BTreeMap::new(),
            exhausted: BTreeMap::new(),
        };
        Self { function: function.into(), database }
    }

    /// One committed change of one row, given as its current `Item`; of a delete only the key is kept.
    ///
    /// # Panics
    /// If the row lacks the primary key.
    pub fn change(&mut self, operation: Operation, row: Item) {
        self.database.version += 1;
        self.database.track(operation, row);
    }

    /// Moves the virtual clock, by which leases expire.
    pub fn advance(&mut self, by: Duration) {
        self.database.now += by;
    }

    /// One turn of the loop: picks, leases and delivers a batch, then releases it if the function succeeded.
    ///
    /// `None` if there is nothing to deliver now, the host has stopped, or the function is disabled. After a failure
    /// the leases are left to expire. A cancelled poll leaves them too, as a dying instance does.
    pub async fn poll(&mut self, host: &Host) -> Option<Delivery> {
        if host.stopped() || host.is_disabled(&self.function) {
            return None;
        }
        let batch = self.database.take_batch(host.sql_max_batch_size())?;
        let outcome = host.trigger(&self.function, &batch.data).await;
        if outcome.succeeded() {
            self.database.release(&batch.rows);
        }
        let Batch { keys, operations, attempts, .. } = batch;
        Some(Delivery { keys, operations, attempts, outcome })
    }

    /// Rows that will still be delivered: now, or when their lease expires.
    pub fn pending(&self) -> usize {
        self.database.changed().filter(|(text, row)| self.database.is_pending(text, row)).count()
    }

    /// Keys whose five attempts are used up and that were not delivered since. Such a row's later changes are seen only
    /// if they come after another success has moved LastSyncVersion past the dropped one.
    pub fn dropped(&self) -> Vec<Value> {
        self.database.exhausted.values().cloned().collect()
    }
}

impl Database {
    fn track(&mut self, operation: Operation, mut row: Item) {
        let key = row.get(&self.primary_key).unwrap_or_else(|| panic!("the row lacks {:?}", self.primary_key)).clone();
        if operation == Operation::Delete {
            row.retain(|name, _| *name == self.primary_key);
        }
        let creation_version = match (operation, self.rows.get(&key.to_string())) {
            (Operation::Insert, _) => self.version,
            (_, Some(tracked)) => tracked.creation_version,
            // Existed before tracking began.
            (_, None) => 0,
        };
        let deleted = operation == Operation::Delete;
        self.rows.insert(key.to_string(), Tracked { key, item: row, version: self.version, creation_version, deleted });
    }

    /// `CHANGETABLE(CHANGES …, LastSyncVersion)`: one net change per row.
    fn changed(&self) -> impl Iterator<Item = (&String, &Tracked)> {
        self.rows.iter().filter(|(_, row)| row.version > self.last_sync_version)
    }

    fn operation(&self, row: &Tracked) -> Operation {
        match row.deleted {
            true => Operation::Delete,
            false if row.creation_version > self.last_sync_version => Operation::Insert,
            false => Operation::Update,
        }
    }

    fn take_batch(&mut self, size: usize) -> Option<Batch> {
        let mut picked: Vec<_> = self.changed().filter(|(text, row)| self.is_eligible(text, row)).collect();
        picked.sort_by_key(|(_, row)| row.version);
        picked.truncate(size);
        if picked.is_empty() {
            return None;
        }
        let sent: Vec<_> = picked.iter().map(|(_, row)| (self.operation(row), row.item.clone())).collect();
        let mut batch = Batch {
            rows: picked.iter().map(|(text, row)| ((*text).clone(), row.version)).collect(),
            keys: picked.iter().map(|(_, row)| row.key.clone()).collect(),
            operations: sent.iter().map(|(operation, _)| *operation).collect(),
            attempts: Vec::new(),
            data: changes(&sent),
        };
        batch.attempts = batch.rows.iter().map(|(text, version)| self.lease(text, *version)).collect();
        Some(batch)
    }

    fn is_eligible(&self, text: &str, row: &Tracked) -> bool {
        let Some(lease) = self.leases.get(text) else { return true };
        let free = match lease.expires {
            None => lease.change_version < row.version,
            Some(expires) => expires < self.now,
        };
        free && lease.attempts < MAX_ATTEMPTS
    }

    fn is_pending(&self, text: &str, row: &Tracked) -> bool {
        self.leases.get(text).is_none_or(|lease| {
            let open = lease.expires.is_some() || lease.change_version < row.version;
            open && lease.attempts < MAX_ATTEMPTS
        })
    }

    fn lease(&mut self, text: &str, version: u64) -> u32 {
        let lease =
            self.leases.entry(text.into()).or_insert(Lease { change_version: version, attempts: 0, expires: None });
        lease.change_version = version;
        lease.attempts += 1;
        lease.expires = Some(self.now + LEASE);
        if lease.attempts == MAX_ATTEMPTS {
            let key = self.rows.get(text).map(|row| row.key.clone()).unwrap_or_default();
            self.exhausted.insert(text.into(), key);
        }
        lease.attempts
    }

    fn release(&mut self, rows: &[(String, u64)]) {
        for (text, version) in rows {
            self.exhausted.remove(text);
            let lease = self.leases.get_mut(text).filter(|lease| lease.change_version <= *version);
            if let Some(lease) = lease {
                *lease = Lease { change_version: *version, attempts: 0, expires: None };
            }
        }
        // Rows of the highest version may be missing from the batch, so only the one below it is certainly complete.
        let versions: BTreeSet<u64> = rows.iter().map(|(_, version)| *version).collect();
        let Some(next) = versions.iter().rev().nth(1).or_else(|| versions.first()).copied() else { return };
        let unprocessed = self.changed().any(|(text, row)| row.version <= next && self.is_unprocessed(text, row));
        if !unprocessed && self.last_sync_version < next {
            self.last_sync_version = next;
            self.leases.retain(|_, lease| lease.change_version > next);
        }
    }

    fn is_unprocessed(&self, text: &str, row: &Tracked) -> bool {
        self.leases.get(text).is_none_or(|lease| {
            let open = lease.change_version != row.version || lease.expires.is_some();
            open && lease.attempts < MAX_ATTEMPTS
        })
    }
}
