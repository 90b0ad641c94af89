//! What `handler doctor` looks at in Redis: the way there, the rights, the distance and the limits.
//!
//! Writes nothing but two scratch keys, which it removes. Invariant: seconds, whatever Redis does.

use std::time::{Duration, Instant};

use deadpool::managed::Manager;
use redis::{Cmd, RedisResult, Value, aio::MultiplexedConnection};
use tokio::time::timeout;

use super::{Script, connection::pipeline, nodes::Nodes};
use crate::{
    config::{self, RedisLogin},
    finding::{Budget, Finding},
};

/// Bound of connecting, the way of a redirection and a token included.
const CONNECT: Duration = Duration::from_secs(8);
/// Bound of each question after that.
const ANSWER: Duration = Duration::from_secs(2);
/// Answers that are timed.
const SAMPLES: usize = 21;
/// Of this version on, streams can be trimmed by age.
const OLDEST: (u32, u32) = (6, 2);

/// Looks at everything that a deployment may get wrong. For the app with this many instances at most.
pub(crate) async fn examine(config: &config::Redis, instances: Option<u64>) -> Vec<Finding> {
    let mut config = config.clone();
    // A server that is slow to answer is to be told from one that does not.
    config.connect_timeout = config.connect_timeout.max(ANSWER);
    let response_timeout = std::mem::replace(&mut config.response_timeout, ANSWER);
    let nodes = match Nodes::new(&config) {
        Ok(nodes) => nodes,
        Err(problem) => return vec![Finding::fail(problem, "correct the setting (docs/redis.md)")],
    };
    let began = Instant::now();
    let found = timeout(CONNECT, reach(&nodes, config.server.nodes.len())).await;
    let (mut connection, node) = match found {
        Ok(Ok(reached)) => reached,
        Ok(Err(problem)) => return vec![Finding::fail(problem.clone(), cure(&config, &problem))],
        Err(_) => return vec![Finding::fail(format!("no answer within {} s", CONNECT.as_secs()), cure(&config, ""))],
    };
    let mut findings = vec![Finding::ok(format!("connected to {node} in {} ms", began.elapsed().as_millis()))];
    findings.push(distance(&mut connection, &nodes, response_timeout).await);
    findings.push(rights(&mut connection, &config).await);
    findings.extend(limits(&mut connection, Budget { each: config.connections(), instances }).await);
    if !config.server.encrypted && !config.server.is_local() {
        findings.push(Finding::warn(
            "the connection is not encrypted",
            "ask for TLS: ssl=True, and the port that speaks it (10000 with Azure Managed Redis)",
        ));
    }
    findings
}

/// Each node that was named has its turn.
async fn reach(nodes: &Nodes, turns: usize) -> Result<(MultiplexedConnection, String), String> {
    let mut problem = String::new();
    for _ in 0..turns.max(1) {
        match nodes.create().await {
            Ok(found) => return Ok((found.connection, format!("{} ({})", found.host, found.id))),
            Err(error) => problem = error.to_string(),
        }
    }
    Err(problem)
}

fn cure(config: &config::Redis, problem: &str) -> &'static str {
    let login = ["authentication", "AuthenticationFailed", "NOAUTH", "WRONGPASS"];
    match &config.server.login {
        RedisLogin::Default | RedisLogin::Password { .. } if login.iter().any(|part| problem.contains(part)) => {
            "check user and password; for an identity, set REDIS_ENTRA_ID"
        }
        RedisLogin::ManagedIdentity { .. } => {
            "check host and port, the firewall or private endpoint, and that the identity has an access policy of the cache"
        }
        _ if !config.server.encrypted => "check host and port; a server that only speaks TLS needs ssl=True",
        _ => {
            "check host, port and password, the firewall or private endpoint, and REDIS_CA_FILE if its authority is private"
        }
    }
}

async fn distance(connection: &mut MultiplexedConnection, nodes: &Nodes, deadline: Duration) -> Finding {
    let question = nodes.probe();
    let (mut took, all_began) = (Vec::new(), Instant::now());
    while took.is_empty() || (took.len() < SAMPLES && all_began.elapsed() < ANSWER) {
        let began = Instant::now();
        if let Err(error) = question.query_async::<Value>(connection).await {
            return Finding::fail(error.to_string(), "grant the rights that docs/redis.md lists");
        }
        took.push(began.elapsed());
    }
    took.sort();
    let (median, longest) = (took[took.len() / 2], took[took.len() - 1]);
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let what = format!("an answer takes {:.1} ms, at most {:.1} of {}", ms(median), ms(longest), took.len());
    match median * 4 > deadline {
        false => Finding::ok(what),
        true => Finding::warn(
            format!("{what}: too close to REDIS_RESPONSE_TIMEOUT_MS"),
            "put Redis into the app's region, or raise the timeout",
        ),
    }
}

/// Every kind of command that the cache sends, on keys of its own.
async fn rights(connection: &mut MultiplexedConnection, config: &config::Redis) -> Finding {
    let script = Script::new(
        "redis.call('HSET', KEYS[1], 't', 1) redis.call('PEXPIRE', KEYS[1], 10000) return {redis.call('HMGET', KEYS[1], 't'), redis.call('HGET', KEYS[1], 't'), redis.call('PTTL', KEYS[1]), redis.call('TIME')}",
    );
    let (entry, log) = (config.key("doctor"), config.key("doctor-log"));
    let command = |words: &[&str]| {
        let mut command = redis::cmd(words[0]);
        command.arg(&words[1..]);
        command
    };
    let commands: [Cmd; 13] = [
        script.load(),
        script.call(&entry),
        command(&["HDEL", &entry, "t"]),
        command(&["TYPE", &entry]),
        command(&["UNLINK", &entry]),
        command(&["SET", &entry, "1", "PX", "10000"]),
        command(&["GET", &entry]),
        command(&["XADD", &log, "*", "k", "v"]),
        command(&["PEXPIRE", &log, "10000"]),
        command(&["XTRIM", &log, "MINID", "~", "0"]),
        command(&["XREAD", "COUNT", "1", "STREAMS", &log, "0"]),
        command(&["XREVRANGE", &log, "+", "-", "COUNT", "1"]),
        command(&["UNLINK", &entry, &log]),
    ];
    let asked = commands.len();
    let answers = match pipeline(commands).query_async::<Vec<RedisResult<Value>>>(connection).await {
        Ok(answers) => answers,
        Err(error) => return Finding::fail(error.to_string(), "grant the rights that docs/redis.md lists"),
    };
    let refused: Vec<_> = answers.into_iter().filter_map(Result::err).map(|error| error.to_string()).collect();
    match refused.first() {
        None => Finding::ok("every command that is needed is allowed"),
        Some(first) => Finding::fail(
            format!("{} of {asked} commands failed, the first with: {first}", refused.len()),
            "grant the rights that docs/redis.md lists; the access policy is `default` on Azure Managed Redis, Data Owner or Data Contributor on Azure Cache for Redis",
        ),
    }
}

async fn limits(connection: &mut MultiplexedConnection, budget: Budget) -> Vec<Finding> {
    let Ok(info) = redis::cmd("INFO").query_async::<String>(connection).await else {
        return vec![Finding::warn(
            "INFO is not allowed, so that limits and version cannot be seen",
            "look them up in the portal, and set REDIS_MAX_CLIENTS and MAX_INSTANCES",
        )];
    };
    let text = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim));
    let number = |name: &str| text(name).and_then(|text| text.parse::<u64>().ok());
    let mut findings = Vec::new();
    if let Some(version) = text("redis_version") {
        let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
        let parsed = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
        findings.push(match parsed < OLDEST {
            true => Finding::fail(format!("Redis {version} is too old"), "6.2 or later is needed"),
            false => Finding::ok(format!("Redis {version}")),
        });
    }
    if let Some(allowed) = number("maxclients") {
        findings.push(budget.within(allowed, number("connected_clients")));
    }
    let (policy, bound) = (text("maxmemory_policy").unwrap_or_default(), number("maxmemory").unwrap_or(0));
    if bound > 0 {
        findings.push(match policy {
            "noeviction" => Finding::warn(
                "when its memory is full, Redis refuses whatever is new (noeviction): nothing that is loaded is shared until there is room",
                "set the eviction policy to volatile-lru",
            ),
            policy if policy.starts_with("allkeys") => Finding::warn(
                format!("when its memory is full, Redis may evict the invalidation log ({policy}): everything is stale then"),
                "set the eviction policy to volatile-lru: the log has no expiry, and is kept",
            ),
            policy => Finding::ok(format!("{} MiB, {policy}", bound / 1024 / 1024)),
        });
    }
    findings
}
