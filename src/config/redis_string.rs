//! Connection strings of Redis → [`RedisServer`].
//!
//! Knows the forms that users have: a `redis:` or `rediss:` URL, and StackExchange.Redis' `host:port,keyword=value,…`,
//! which Azure's portal hands out. Opens nothing. Invariant: no message quotes a value that may hold a secret.

use super::{
    Secret,
    keywords::{
        Field,
        Field::{Database, Encryption, Host, Password, Port, Service, User},
        Fields, REDIS_URL, STACK_EXCHANGE,
    },
    server::{host_and_port, is_host, is_local, words_of_truth},
    url,
};

/// Which Redis, and how to reach it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisServer {
    /// Nodes to ask, at least one: the server, some nodes of a cluster, or sentinels.
    pub nodes: Vec<Node>,
    /// As whom.
    pub login: RedisLogin,
    /// TLS, with a verified certificate.
    pub encrypted: bool,
    /// The name expected in certificates, if not the host's.
    pub certificate_name: Option<String>,
    /// The nodes are sentinels, and watch over a primary that they call this.
    pub sentinel_service: Option<String>,
}

/// Where a node listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Node {
    /// Name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

impl Node {
    /// Whether it is this machine, so that nobody is between.
    pub fn is_local(&self) -> bool {
        is_local(&self.host)
    }
}

impl std::fmt::Display for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// As whom to log in to Redis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RedisLogin {
    /// As nobody: the default user, without a password.
    Default,
    /// With a password.
    Password {
        /// An ACL user; `None`: the default one.
        user: Option<String>,
        /// Its password.
        password: Secret,
    },
    /// With a token of the app's managed identity.
    ManagedIdentity {
        /// Client id of a user-assigned identity; `None`: the system-assigned one.
        client_id: Option<String>,
        /// The identity's object id, by which Redis knows it; `None`: the one in the token.
        user: Option<String>,
    },
}

impl RedisServer {
    /// Whether all nodes named run on this machine.
    pub fn is_local(&self) -> bool {
        self.nodes.iter().all(Node::is_local)
    }
}

const PLAIN_PORT: u16 = 6379;
/// Azure Cache for Redis' and StackExchange.Redis' default for TLS; Azure Managed Redis' is 10000, and always written.
const ENCRYPTED_PORT: u16 = 6380;

const FORMS: &str =
    "it is none of host:port,password=...,ssl=True and redis://user:password@host:port (rediss: with TLS)";

/// What the text means, or all that is wrong with it.
pub(super) fn parse(text: &str) -> Result<RedisServer, Vec<String>> {
    match text.split_once("://") {
        Some((scheme, _)) if !scheme.contains(['=', ',']) => {
            let encrypted = match scheme.to_ascii_lowercase().as_str() {
                "redis" | "valkey" => false,
                "rediss" | "valkeys" => true,
                _ => return Err(vec![FORMS.to_owned()]),
            };
            let pairs = url::pairs(text, FORMS).map_err(|mistake| vec![mistake.to_owned()])?;
            let mut fields = Fields::read(REDIS_URL, pairs);
            let host = fields.required(Host);
            let beside = fields.text(Port).map(str::to_owned);
            let node = node(&host, beside.as_deref(), encrypted, &mut fields.mistakes);
            server(vec![node], encrypted, fields)
        }
        _ => stack_exchange(text),
    }
}

/// Parts between commas: those without a `=` are nodes.
fn stack_exchange(text: &str) -> Result<RedisServer, Vec<String>> {
    let parts = || text.split(',').map(str::trim).filter(|part| !part.is_empty());
    let is_node = |part: &&str| !part.contains('=');
    let pair = |part: &str| part.split_once('=').map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned()));
    let mut fields = Fields::read(STACK_EXCHANGE, parts().filter_map(pair).collect());
    let encrypted = fields.word(Encryption, words_of_truth()).unwrap_or(false);
    let mut nodes = Vec::new();
    for part in parts().filter(is_node) {
        let (host, port) = host_and_port(part);
        // A part behind the first pair may be the rest of a password with a comma in it: told without quoting it.
        nodes.push(node(host, port, encrypted, &mut fields.mistakes));
    }
    if nodes.is_empty() {
        return Err(vec![FORMS.to_owned()]);
    }
    server(nodes, encrypted, fields)
}

fn node(host: &str, port: Option<&str>, encrypted: bool, mistakes: &mut Vec<String>) -> Node {
    let host = host.trim().trim_start_matches('[').trim_end_matches(']');
    if !is_host(host) {
        mistakes.push("a part that is no keyword is not of the form host:port (a password cannot have a comma)".into());
    }
    let port = match port.map(|port| port.trim().parse::<u16>()) {
        None => Some(if encrypted { ENCRYPTED_PORT } else { PLAIN_PORT }),
        Some(port) => port.ok().filter(|port| *port > 0),
    };
    if port.is_none() {
        mistakes.push("a port is not a number from 1 to 65535".to_owned());
    }
    Node { host: host.to_owned(), port: port.unwrap_or(0) }
}

fn server(nodes: Vec<Node>, encrypted: bool, mut fields: Fields) -> Result<RedisServer, Vec<String>> {
    if fields.text(Database).is_some_and(|number| number.trim() != "0") {
        fields.mistakes.push("it names a database other than 0, which clusters do not have".to_owned());
    }
    let owned = |fields: &Fields, field: Field| fields.text(field).map(str::to_owned);
    let user = owned(&fields, User);
    let login = match fields.text(Password) {
        Some(password) => RedisLogin::Password { user, password: Secret::from(password) },
        None if user.is_none() => RedisLogin::Default,
        // Whose password is missing: an empty one, or a token's (see `Reader::redis`).
        None => RedisLogin::Password { user, password: Secret::from("") },
    };
    let certificate_name = owned(&fields, Field::CertificateName);
    if certificate_name.is_some() && !encrypted {
        fields.mistakes.push(format!("{} without ssl=True has no effect", fields.keyword(Field::CertificateName)));
    }
    let server = RedisServer { nodes, login, encrypted, certificate_name, sentinel_service: owned(&fields, Service) };
    match fields.mistakes.is_empty() {
        true => Ok(server),
        false => Err(fields.mistakes),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(nodes: &[(&str, u16)]) -> RedisServer {
        RedisServer {
            nodes: nodes.iter().map(|(host, port)| Node { host: (*host).to_owned(), port: *port }).collect(),
            login: RedisLogin::Default,
            encrypted: false,
            certificate_name: None,
            sentinel_service: None,
        }
    }

    fn password(user: Option<&str>, password: &str) -> RedisLogin {
        RedisLogin::Password { user: user.map(str::to_owned), password: password.into() }
    }

    #[test]
    fn each_form_that_users_have_is_read() {
        let secure = |server: RedisServer| RedisServer { encrypted: true, ..server };
        let with = |server: RedisServer, login| RedisServer { login, ..server };
        for (text, expected) in [
            ("redis://h", at(&[("h", 6379)])),
            ("redis://h:7000/", at(&[("h", 7000)])),
            ("redis://h:7000/0?protocol=resp2", at(&[("h", 7000)])),
            ("redis://[::1]:7000", at(&[("::1", 7000)])),
            ("rediss://h", secure(at(&[("h", 6380)]))),
            ("REDISS://h:10000", secure(at(&[("h", 10000)]))),
            ("redis://:%40@h", with(at(&[("h", 6379)]), password(None, "@"))),
            ("redis://me:pw@h", with(at(&[("h", 6379)]), password(Some("me"), "pw"))),
            ("h", at(&[("h", 6379)])),
            ("h:7000", at(&[("h", 7000)])),
            ("[::1]:7000", at(&[("::1", 7000)])),
            ("a:1, b:2 ,c", at(&[("a", 1), ("b", 2), ("c", 6379)])),
            ("h,ssl=true", secure(at(&[("h", 6380)]))),
            (
                "shop.westeurope.redis.azure.net:10000,password=pw=,ssl=True,abortConnect=False",
                with(secure(at(&[("shop.westeurope.redis.azure.net", 10000)])), password(None, "pw=")),
            ),
            (
                "h:10000,USER=me,password=pw,ssl=True,defaultDatabase=0,channelPrefix=shop,name=app,syncTimeout=5000,\
                 connectTimeout=15000,connectRetry=3,keepAlive=60,allowAdmin=true,sslProtocols=tls12|tls13,protocol=resp3",
                with(secure(at(&[("h", 10000)])), password(Some("me"), "pw")),
            ),
            (
                "h:10000,ssl=True,sslHost=n",
                RedisServer { certificate_name: Some("n".into()), ..secure(at(&[("h", 10000)])) },
            ),
            (
                "s1:26379,s2:26379,serviceName=shop",
                RedisServer { sentinel_service: Some("shop".into()), ..at(&[("s1", 26379), ("s2", 26379)]) },
            ),
        ] {
            assert_eq!(parse(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn each_mistake_is_told_without_the_secret() {
        for (text, mistake) in [
            ("http://hunter2@h", "none of"),
            ("redis://h/1", "a database other than 0"),
            ("redis://h:0", "a port is not"),
            ("redis://:hun/ter2@h", "reserved characters"),
            ("redis://h?colour=hunter2", "colour is not a known keyword"),
            ("h:7000,defaultDatabase=2", "a database other than 0"),
            ("h:99999", "a port is not a number"),
            ("password=hunter2", "none of"),
            ("h,password=a,hunter2!", "a password cannot have a comma"),
            ("h,password=a,hunter2=b", "keyword 2, not shown"),
            ("h,pasword=hunter2", "did you mean password?"),
            ("h,ssl=maybe", "ssl is \"maybe\", not one of True, Yes"),
            ("h,proxy=Twemproxy", "proxy: "),
            ("h,$CLIENT=", "keyword 1, not shown"),
            ("h,sslHost=n", "sslHost without ssl=True"),
            ("h,password=a,password=hunter2", "password is there twice"),
        ] {
            let found = parse(text).expect_err(text).join("; ");
            assert!(found.contains(mistake) && !found.contains("hunter2"), "{text}: {found}");
        }
    }

    proptest! {
        #[test]
        fn no_mistake_tells_a_secret(
            before in "[a-z0-9:,=. ]{0,20}", after in "[a-zA-Z0-9:,=/@.!; ]{0,20}", url in any::<bool>(),
        ) {
            // Marked by letters that nothing else here has.
            let text = match url {
                true => format!("redis://{before}:XYZZY{after}@h"),
                false => format!("h:1,{before},password={after}XYZZY"),
            };
            if let Err(mistakes) = parse(&text) {
                prop_assert!(!mistakes.join(" ").contains("XYZZY"), "{text}: {mistakes:?}");
            }
        }
    }
}
