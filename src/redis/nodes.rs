//! Which node to connect to, and as whom: the manager of the one pool.
//!
//! `deadpool-redis` makes each connection; this says where to. One node holds all of ours (see [`config::Redis::key`]): the
//! server itself, the owner of our slot in a cluster, which any node names by `MOVED`, or the primary that sentinels
//! name. Invariant: what is given out leads to a node that says it owns our keys and takes writes.

use std::{
    collections::HashSet,
    fs,
    net::SocketAddr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use deadpool::managed::{Manager, Metrics, Pool, RecycleError, RecycleResult};
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ConnectionInfo, ErrorKind, IntoConnectionInfo,
    RedisConnectionInfo, RedisError, RedisFuture, RedisResult, TlsCertificates, Value,
    aio::MultiplexedConnection,
    io::{AsyncDNSResolver, tcp::TcpSettings},
};
use tokio::{net::lookup_host, sync::watch, time::sleep};

use crate::{
    config::{self, Node, RedisLogin, RedisServer, Secret},
    entra::{TokenSource, object_id},
};

/// What a token must be for. Azure Managed Redis and Azure Cache for Redis share it.
const RESOURCE: &str = "https://redis.azure.com";
/// `MOVED` is followed once, and once more if the cluster changes meanwhile.
const MOST_REDIRECTS: usize = 3;
/// Pause between two looks at a cluster's nodes.
const TOPOLOGY_REFRESH: Duration = Duration::from_secs(60);
/// Pause between two questions to the sentinels: an instance may be misled by a replaced primary for that much longer
/// than it may trust its memory.
const SENTINEL_PAUSE: Duration = Duration::from_secs(5);
/// Nodes of a cluster that are remembered, in case those that were named are gone. More than Redis recommends to have.
const MOST_NODES: usize = 1000;

/// A connection and where it leads.
pub(super) struct Found {
    pub(super) connection: MultiplexedConnection,
    /// The token it was opened with.
    pub(super) token: Option<Secret>,
    /// The node's host.
    pub(super) host: String,
    /// The name that it has for itself.
    pub(super) id: String,
    in_cluster: bool,
}

/// Finds the node that is to be talked to, and connects to it.
pub(super) struct Nodes {
    server: RedisServer,
    /// Connections to other machines may go without TLS.
    may_be_open: bool,
    authorities: Option<Vec<u8>>,
    tcp: TcpSettings,
    settings: AsyncConnectionConfig,
    /// A key of the slot that all our keys are in, which nobody writes.
    probe_key: String,
    pub(super) tokens: Option<TokenSource>,
    /// Whom to ask: those that were named, then those that a cluster named since.
    known: Mutex<Vec<Node>>,
    /// Whose turn it is; the next one's after a failure.
    turn: AtomicUsize,
    owner: watch::Sender<String>,
}

impl Nodes {
    /// Checks what can be checked without connecting.
    pub(super) fn new(config: &config::Redis) -> Result<Self, String> {
        let authorities = config.ca_file.as_ref().map(|file| {
            let unreadable = |problem: &dyn std::fmt::Display| format!("REDIS_CA_FILE {}: {problem}", file.display());
            let text = fs::read(file).map_err(|error| unreadable(&error))?;
            // A file without a certificate is read without a complaint, and then trusts nobody.
            let is_pem = text.windows(27).any(|part| part == b"-----BEGIN CERTIFICATE-----");
            if is_pem { Ok(text) } else { Err(unreadable(&"it holds no certificate (PEM)")) }
        });
        let tokens = match &config.server.login {
            RedisLogin::ManagedIdentity { client_id, .. } => {
                Some(TokenSource::new(config.identity.clone(), RESOURCE, client_id.clone()))
            }
            RedisLogin::Default | RedisLogin::Password { .. } => None,
        };
        let nodes = Self {
            server: config.server.clone(),
            may_be_open: config.allow_unencrypted && tokens.is_none(),
            authorities: authorities.transpose()?,
            // Nagle's algorithm holds small commands back; what a vanished peer does not acknowledge is given up.
            tcp: TcpSettings::default().set_nodelay(true).set_user_timeout(config.connect_timeout * 10),
            settings: AsyncConnectionConfig::new()
                .set_connection_timeout(Some(config.connect_timeout))
                .set_response_timeout(Some(config.response_timeout)),
            probe_key: config.key("probe"),
            tokens,
            known: Mutex::new(config.server.nodes.clone()),
            turn: AtomicUsize::new(0),
            owner: watch::Sender::default(),
        };
        for node in &config.server.nodes {
            nodes.address(node).map_err(|error| error.to_string())?;
        }
        Ok(nodes)
    }

    /// Returns when the keys are found on another node than this.
    ///
    /// A node that was cut off from its cluster goes on answering for a while. Which connection finds out first is
    /// chance, and entries must not be read from one node while the log is heard from another.
    pub(super) async fn left(&self, id: &str) {
        let elsewhere = |owner: &String| !owner.is_empty() && owner != id;
        let _ = self.owner.subscribe().wait_for(elsewhere).await;
    }

    /// The user name of a token's owner.
    pub(super) fn user(&self, token: &Secret) -> Option<String> {
        match &self.server.login {
            RedisLogin::ManagedIdentity { user: Some(user), .. } => Some(user.clone()),
            _ => object_id(token),
        }
    }

    /// Connects to the node that a redirection names.
    pub(super) async fn redirected(&self, place: &str, from: &str) -> RedisResult<MultiplexedConnection> {
        Ok(self.open(&node(place, from)?).await?.0)
    }

    /// A write that changes nothing.
    pub(super) fn probe(&self) -> Cmd {
        let mut probe = redis::cmd("UNLINK");
        probe.arg(&self.probe_key);
        probe
    }

    /// Asks the next sentinel, and makes known which server it names.
    pub(super) async fn look_for_owner(&self) -> RedisResult<()> {
        let Some(service) = &self.server.sentinel_service else { return Ok(()) };
        let turn = Turn::take(self);
        let named = self.primary(&turn.node, service).await?;
        turn.keep();
        self.owned_by(named.to_string());
        Ok(())
    }

    /// Learns of the cluster's nodes from time to time, as long as a connection to one lives; does not end.
    pub(super) async fn refresh_topology(&self, found: &Found) {
        if !found.in_cluster {
            return std::future::pending().await;
        }
        let mut connection = found.connection.clone();
        connection.set_response_timeout(TOPOLOGY_REFRESH); // the log's may hold a blocking read; nobody waits for this
        let mut question = redis::cmd("CLUSTER");
        question.arg("SLOTS");
        loop {
            sleep(TOPOLOGY_REFRESH.mul_f64(rand::random_range(0.8..1.2))).await;
            if let Ok(slots) = question.query_async(&mut connection).await {
                self.learn(&found.host, slots);
            }
        }
    }

    fn owned_by(&self, id: String) {
        self.owner.send_if_modified(|owner| std::mem::replace(owner, id.clone()) != id);
    }

    async fn follow(&self, start: Node) -> RedisResult<Found> {
        let mut node = match &self.server.sentinel_service {
            Some(service) => self.primary(&start, service).await?,
            None => start,
        };
        for _ in 0..=MOST_REDIRECTS {
            let (mut connection, token) = self.open(&node).await?;
            match self.look(&node, &mut connection).await? {
                Look::Here(id, in_cluster) => return Ok(Found { connection, token, host: node.host, id, in_cluster }),
                Look::At(next) => node = next,
            }
        }
        Err(failed("it redirects in circles"))
    }

    async fn open(&self, node: &Node) -> RedisResult<(MultiplexedConnection, Option<Secret>)> {
        let token = match &self.tokens {
            Some(tokens) => Some(tokens.token().await.map_err(|problem| failed(&problem))?),
            None => None,
        };
        let mut login = RedisConnectionInfo::default().set_lib_name(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"));
        match (&self.server.login, &token) {
            (RedisLogin::Default, _) => {}
            (RedisLogin::Password { user, password }, _) => {
                login = login.set_password(password.reveal());
                if let Some(user) = user {
                    login = login.set_username(user);
                }
            }
            (RedisLogin::ManagedIdentity { .. }, Some(token)) => {
                let user = self.user(token).ok_or_else(|| failed("the identity's token names no object id (oid)"))?;
                login = login.set_username(user).set_password(token.reveal());
            }
            (RedisLogin::ManagedIdentity { .. }, None) => {}
        }
        let info = self.address(node)?.set_tcp_settings(self.tcp.clone()).set_redis_settings(login);
        let settings = self.settings.clone().set_dns_resolver(At(node.clone()));
        let connection = deadpool_redis::Manager::new_with_config(info, settings)?.create().await;
        if let (Some(tokens), Some(token), Err(error)) = (&self.tokens, &token, &connection)
            && error.kind() == ErrorKind::AuthenticationFailed
        {
            tokens.refused(token);
        }
        Ok((connection?, token))
    }

    fn address(&self, node: &Node) -> RedisResult<ConnectionInfo> {
        if !self.server.encrypted {
            // Those that were named were checked at the start; others are named by them.
            if !self.may_be_open && !node.is_local() {
                return Err(failed(&format!(
                    "{node} is not this machine, and the connection would not be encrypted; ask for TLS (ssl=True), or \
                     without a token set REDIS_ALLOW_UNENCRYPTED=on"
                )));
            }
            return ConnectionAddr::Tcp(node.host.clone(), node.port).into_connection_info();
        }
        // By this name the certificate is checked; `At` says where to connect.
        let host = self.certificate_name(node);
        let address = ConnectionAddr::TcpTls { host, port: node.port, insecure: false, tls_params: None };
        match &self.authorities {
            None => address.into_connection_info(),
            Some(authorities) => {
                let trusted = TlsCertificates { client_tls: None, root_cert: Some(authorities.clone()) };
                Ok(Client::build_with_tls(address, trusted)?.get_connection_info().clone())
            }
        }
    }

    /// Nodes that redirect by address show certificates for the name that the cluster is known by (Azure does so).
    fn certificate_name(&self, node: &Node) -> String {
        let is_address = |host: &str| host.parse::<std::net::IpAddr>().is_ok();
        let named = &self.server.nodes[0].host;
        match &self.server.certificate_name {
            Some(name) => name.clone(),
            None if is_address(&node.host) && !is_address(named) => named.clone(),
            None => node.host.clone(),
        }
    }

    /// Is it the right node? A stalled one accepts connections too, and one that was demoted answers everything but
    /// writes, so it is asked to delete what is not there.
    async fn look(&self, node: &Node, connection: &mut MultiplexedConnection) -> RedisResult<Look> {
        let mut questions = redis::pipe();
        questions.ignore_errors().add_command(self.probe()).cmd("CLUSTER").arg("MYID").cmd("CLUSTER").arg("SLOTS");
        let answers: [RedisResult<Value>; 3] = questions
            .query_async::<Vec<RedisResult<Value>>>(connection)
            .await?
            .try_into()
            .map_err(|_| failed("it answers something else than was asked"))?;
        let [deleted, id, slots] = answers;
        let in_cluster = slots.is_ok_and(|slots| self.learn(&node.host, slots));
        match deleted {
            Err(error) if error.code() == Some("MOVED") => {
                let (place, _) = error.redirect_node().ok_or_else(|| failed("it redirects to nowhere"))?;
                return Ok(Look::At(self::node(place, &node.host)?));
            }
            Err(error) if error.code() == Some("READONLY") => return Err(failed("it is a replica")),
            // The slot is on its way to another node, and still this one's. What is forbidden shows where it is used.
            Err(error) if !matches!(error.code(), Some("ASK" | "NOPERM")) => return Err(error),
            _ => {}
        }
        let id = id.ok().filter(|_| in_cluster).and_then(|id| redis::from_redis_value::<String>(id).ok());
        Ok(Look::Here(id.unwrap_or_else(|| node.to_string()), in_cluster))
    }

    async fn primary(&self, sentinel: &Node, service: &str) -> RedisResult<Node> {
        // Sentinels have users of their own; those of the servers mean nothing to them.
        let settings = self.settings.clone().set_dns_resolver(At(sentinel.clone()));
        let info = self.address(sentinel)?.set_tcp_settings(self.tcp.clone());
        let mut connection = deadpool_redis::Manager::new_with_config(info, settings)?.create().await?;
        let mut question = redis::cmd("SENTINEL");
        question.arg("GET-MASTER-ADDR-BY-NAME").arg(service);
        match question.query_async::<Option<(String, u16)>>(&mut connection).await? {
            Some((host, port)) => Ok(Node { host, port }),
            None => Err(failed(&format!("the sentinel {sentinel} knows no {service:?}"))),
        }
    }

    /// Takes note of a cluster's nodes, `[first, last, [host, port, …]…]…`; `false` if it is none.
    fn learn(&self, from: &str, slots: Value) -> bool {
        let mut known = self.server.nodes.clone();
        let mut seen: HashSet<_> = known.iter().cloned().collect();
        let Value::Array(ranges) = slots else { return false };
        let is_cluster = !ranges.is_empty();
        let described = ranges.into_iter().filter_map(|range| match range {
            Value::Array(parts) => Some(parts.into_iter().skip(2)),
            _ => None,
        });
        for part in described.flatten() {
            let Value::Array(mut part) = part else { continue };
            part.truncate(2);
            let Ok((host, port)) = redis::from_redis_value::<(Option<String>, u16)>(Value::Array(part)) else {
                continue;
            };
            let Ok(node) = node(&format!("{}:{port}", host.unwrap_or_default()), from) else { continue };
            if known.len() < MOST_NODES && seen.insert(node.clone()) {
                known.push(node);
            }
        }
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = known;
        is_cluster
    }
}

/// Asks sentinels again and again which server is the primary. One that was cut off from them goes on answering, and its
/// clients would never know.
pub(super) async fn ask_sentinels(pool: Pool<Nodes>) {
    loop {
        tokio::time::sleep(SENTINEL_PAUSE.mul_f64(rand::random_range(0.8..1.2))).await;
        if let Err(error) = pool.manager().look_for_owner().await {
            tracing::debug!(%error, "redis: a sentinel does not answer");
        }
    }
}

/// Somebody's attempt by way of one node. Unless it is kept, the next attempt is by way of the next node: whether it
/// failed or was cancelled for being late. Who succeeds leaves it to the others, so that all come to the same node.
struct Turn<'a> {
    nodes: &'a Nodes,
    number: usize,
    node: Node,
    succeeded: bool,
}

impl<'a> Turn<'a> {
    fn take(nodes: &'a Nodes) -> Self {
        let number = nodes.turn.load(Ordering::Acquire);
        let known = nodes.known.lock().unwrap_or_else(PoisonError::into_inner);
        Self { nodes, number, node: known[number % known.len()].clone(), succeeded: false }
    }

    fn keep(mut self) {
        self.succeeded = true;
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if !self.succeeded {
            // Once for all who fail together.
            let (from, to) = (self.number, self.number.wrapping_add(1));
            let _ = self.nodes.turn.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire);
        }
    }
}

impl Manager for Nodes {
    type Type = Found;
    type Error = RedisError;

    async fn create(&self) -> RedisResult<Found> {
        let turn = Turn::take(self);
        let found = self.follow(turn.node.clone()).await?;
        turn.keep();
        self.owned_by(found.id.clone());
        Ok(found)
    }

    async fn recycle(&self, _: &mut Found, _: &Metrics) -> RecycleResult<RedisError> {
        Err(RecycleError::message("a connection that was given up is not used again"))
    }
}

/// What a node says about our keys.
enum Look {
    /// They are its own. By the name that it has for itself, and whether it is one of a cluster.
    Here(String, bool),
    /// They are another's.
    At(Node),
}

/// Resolves every name to one node, so that the name can be the one that its certificate has.
struct At(Node);

impl AsyncDNSResolver for At {
    fn resolve<'a, 'b: 'a>(
        &'a self,
        _: &'b str,
        _: u16,
    ) -> RedisFuture<'a, Box<dyn Iterator<Item = SocketAddr> + Send + 'a>> {
        Box::pin(async {
            let addresses: Vec<_> = lookup_host((&*self.0.host, self.0.port)).await?.collect();
            Ok(Box::new(addresses.into_iter()) as Box<dyn Iterator<Item = SocketAddr> + Send>)
        })
    }
}

/// `host:port` as nodes write it, IPv6 without brackets; no host: the one that was asked.
fn node(place: &str, from: &str) -> RedisResult<Node> {
    let (host, port) = place.rsplit_once(':').ok_or_else(|| failed("it names a node without a port"))?;
    let port = port.parse().map_err(|_| failed("it names a node without a port"))?;
    let host = if matches!(host, "" | "?") { from } else { host.trim_start_matches('[').trim_end_matches(']') };
    Ok(Node { host: host.to_owned(), port })
}

fn failed(problem: &str) -> RedisError {
    RedisError::from((ErrorKind::Client, "cannot connect", problem.to_owned()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn an_address_that_a_node_redirects_to_must_have_the_clusters_certificate() {
        for (text, place, name) in [
            ("shop.example:10000,ssl=True", "10.0.0.1:8501", "shop.example"),
            ("shop.example:10000,ssl=True", "node.shop.example:8501", "node.shop.example"),
            ("shop.example:10000,ssl=True,sslHost=n.example", "10.0.0.1:8501", "n.example"),
            ("10.0.0.9:10000,ssl=True", "10.0.0.1:8501", "10.0.0.1"),
        ] {
            let variables = BTreeMap::from([("Redis".to_owned(), text.to_owned())]);
            let config = config::Config::from_variables(&variables).expect(text).redis.expect("one");
            let nodes = Nodes::new(&config).expect(text);
            assert_eq!(nodes.certificate_name(&node(place, "from").expect(place)), name, "{text} {place}");
        }
    }

    #[test]
    fn without_tls_no_node_of_another_machine_is_connected_to_whoever_names_it() {
        let (near, open) = (("Redis", "localhost:7000,password=hunter2"), ("REDIS_ALLOW_UNENCRYPTED", "on"));
        let token = [
            ("Redis", "127.0.0.1:26379,serviceName=shop"),
            ("REDIS_ENTRA_ID", "system"),
            ("IDENTITY_ENDPOINT", "http://127.0.0.1:1/msi"),
            ("IDENTITY_HEADER", "h"),
            open,
        ];
        let secure = ("Redis", "localhost:7000,password=hunter2,ssl=True");
        for (variables, may) in [(&[near][..], false), (&[near, open], true), (&token, false), (&[secure], true)] {
            let set = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            let config = config::Config::from_variables(&set).expect("valid").redis.expect("one");
            let nodes = Nodes::new(&config).expect("valid");
            for (place, may) in [("10.1.2.3:6379", may), ("shop.example:6379", may), ("127.0.0.2:6379", true)] {
                let address = nodes.address(&node(place, "from").expect(place));
                assert_eq!(address.is_ok(), may, "{variables:?} {place}");
                assert!(!address.err().is_some_and(|error| error.to_string().contains("hunter2")));
            }
        }
    }

    #[test]
    fn nodes_are_named_in_each_form_that_servers_have() {
        for (place, host, port) in [
            ("10.0.0.1:7000", "10.0.0.1", 7000),
            ("shop.example:7000", "shop.example", 7000),
            ("::1:7000", "::1", 7000),
            ("[2001:db8::1]:7000", "2001:db8::1", 7000),
            (":7000", "from", 7000),
            ("?:7000", "from", 7000),
        ] {
            assert_eq!(node(place, "from").expect(place), Node { host: host.to_owned(), port }, "{place}");
        }
        assert!(node("7000", "from").is_err() && node("h:", "from").is_err() && node("h:99999", "from").is_err());
    }
}
