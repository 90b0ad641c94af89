//! A private Redis Cluster of three primaries, each with a replica.

use super::{eventually, free_port, redis::RedisServer};

/// A name whose slot is that of all keys of the handler.
const TAG: &str = "{product-cache}";
/// After how long silence nodes take each other for dead: soon, where that is the subject.
const NODE_TIMEOUT_MS: u64 = 1000;
/// The same where the owner of the keys is to stay, however slow the machine is.
const STEADY_NODE_TIMEOUT_MS: u64 = 60_000;

pub struct RedisCluster {
    pub nodes: Vec<RedisServer>,
}

impl RedisCluster {
    /// One in which no replica is promoted.
    pub async fn start_steady() -> Self {
        let cluster = Self::start().await;
        for node in &cluster.nodes {
            node.command(&["CONFIG", "SET", "cluster-node-timeout", &STEADY_NODE_TIMEOUT_MS.to_string()]).await;
        }
        cluster.until_whole().await;
        cluster
    }

    pub async fn start() -> Self {
        let mut nodes = Vec::new();
        let mut bus_ports = Vec::new();
        for _ in 0..6 {
            let (bus, timeout) = (free_port().to_string(), NODE_TIMEOUT_MS.to_string());
            let options = ["--cluster-enabled", "yes", "--cluster-port", &bus, "--cluster-node-timeout", &timeout];
            // A replica that has not heard for long may be promoted too, and is ready at once.
            let replica = ["--cluster-replica-validity-factor", "0", "--repl-diskless-sync-delay", "0"];
            nodes.push(RedisServer::start_with(&[&options[..], &replica[..]].concat()).await);
            bus_ports.push(bus);
        }
        let cluster = Self { nodes };
        for (node, slots) in cluster.nodes.iter().zip([("0", "5460"), ("5461", "10922"), ("10923", "16383")]) {
            node.command(&["CLUSTER", "ADDSLOTSRANGE", slots.0, slots.1]).await;
        }
        for (node, bus) in cluster.nodes.iter().zip(&bus_ports).skip(1) {
            cluster.nodes[0].command(&["CLUSTER", "MEET", "127.0.0.1", &node.port.to_string(), bus]).await;
        }
        for node in &cluster.nodes {
            eventually("the nodes know each other", async || {
                (node.info_of_cluster("known_nodes").await? == "6").then_some(())
            })
            .await;
        }
        for (primary, replica) in cluster.nodes.iter().zip(&cluster.nodes[3..]) {
            let id = primary.id().await;
            eventually("a replica follows", async || replica.try_command(&["CLUSTER", "REPLICATE", &id]).await.ok())
                .await;
        }
        cluster.until_whole().await;
        cluster
    }

    /// Waits until every slot has an owner, and every owner a replica that has all it has.
    pub async fn until_whole(&self) {
        for node in &self.nodes {
            eventually("the cluster is whole", async || {
                let is_ok = node.info_of_cluster("state").await? == "ok";
                let is_followed = match &*node.info("replication", "role").await {
                    "master" => node.info("replication", "connected_slaves").await != "0",
                    _ => node.info("replication", "master_link_status").await == "up",
                };
                (is_ok && is_followed).then_some(())
            })
            .await;
        }
    }

    /// A connection string that names these nodes.
    pub fn string(&self, nodes: &[usize]) -> String {
        nodes.iter().map(|node| format!("127.0.0.1:{}", self.nodes[*node].port)).collect::<Vec<_>>().join(",")
    }

    /// The node that holds the handler's keys.
    pub async fn owner(&self) -> usize {
        eventually("a node tells who holds the keys", async || self.owner_by(0).await).await
    }

    /// The same, as `node` knows it.
    pub async fn owner_by(&self, node: usize) -> Option<usize> {
        self.nodes[node].try_command(&["EXISTS", TAG]).await.map_or_else(
            |error| {
                let (place, _) = error.redirect_node()?;
                let port: u16 = place.rsplit_once(':')?.1.parse().ok()?;
                self.nodes.iter().position(|node| node.port == port)
            },
            |_| Some(node),
        )
    }

    pub async fn slot(&self) -> u16 {
        redis::from_redis_value(self.nodes[0].command(&["CLUSTER", "KEYSLOT", TAG]).await).expect("a number")
    }
}

impl RedisServer {
    /// Its name in the cluster.
    pub async fn id(&self) -> String {
        redis::from_redis_value(self.command(&["CLUSTER", "MYID"]).await).expect("text")
    }

    /// `None` if it does not answer now.
    async fn info_of_cluster(&self, name: &str) -> Option<String> {
        let info: String = redis::from_redis_value(self.try_command(&["CLUSTER", "INFO"]).await.ok()?).expect("text");
        let value = info.lines().find_map(|line| line.strip_prefix(&format!("cluster_{name}:")));
        Some(value.unwrap_or_else(|| panic!("CLUSTER INFO does not tell {name}")).to_owned())
    }
}
