//! A connection to SQL Server: reaching it, logging in, following redirects, and what a failure means.
//!
//! Knows TLS and the ways to log in; must not know tables. Invariant: a token is sent only over TLS, and no failure
//! holds a password or a token.

use std::{fs, io, time::Duration};

use futures_util::stream::{FuturesUnordered, StreamExt};
use tiberius::{AuthMethod, Client, Config, EncryptionLevel};
use tokio::{
    net::{TcpStream, lookup_host},
    task::spawn_blocking,
    time::sleep,
};
use tokio_util::compat::{Compat, TokioAsyncWriteCompatExt};

use crate::{
    config::{self, Login, Secret, Server, Tls},
    database::pool::{Connect, Failure},
    entra::TokenSource,
};

/// What a token must be for.
const RESOURCE: &str = "https://database.windows.net/";
/// Azure's gateway redirects once, an availability group's listener once more.
const MOST_REDIRECTS: usize = 3;
/// How much later each further address of a name is tried: a replica that is gone may swallow packets for a minute.
const NEXT_ADDRESS: Duration = Duration::from_millis(250);

/// Server errors after which another connection, now or soon, may do better.
#[rustfmt::skip] // a table reads as a table
const PASSING: &[u32] = &[
    64, 233, 121, 10_053, 10_054, 10_060,   // the network, as the server saw it
    1205,                                   // chosen as the victim of a deadlock
    4060, 4221, 40_613, 40_197, 40_143, 40_540, 42_108, 42_109, // failing over, waking up, not there yet
    10_928, 10_929, 40_501, 49_918, 49_919, 49_920,     // too much asked of the tier
    615, 926, 983, 976, 3906, 6005, 18_401, // recovering, shutting down, or no longer the primary
];
/// Errors of this class end the session.
const FATAL: u8 = 20;
/// The server does not let this login in.
const LOGIN_FAILED: u32 = 18_456;

pub(super) type Connection = Client<Compat<TcpStream>>;

/// Opens connections to one server.
pub(super) struct Connector {
    server: Server,
    allow_unverified: bool,
    credentials: Credentials,
}

enum Credentials {
    Password { user: String, password: Secret },
    Identity(TokenSource),
}

impl Connector {
    pub(super) fn new(config: &config::Database, server: &Server) -> Self {
        let credentials = match server.login.clone() {
            Login::Password { user, password } => Credentials::Password { user, password },
            Login::ManagedIdentity { client_id } => {
                Credentials::Identity(TokenSource::new(config.identity.clone(), RESOURCE, client_id))
            }
        };
        Self { server: server.clone(), allow_unverified: config.allow_unverified, credentials }
    }

    fn config(&self, host: &str, port: u16, authentication: AuthMethod, authorities: Option<Vec<u8>>) -> Config {
        let mut config = Config::new();
        config.host(host);
        config.port(port);
        config.database(&self.server.database);
        config.application_name(&self.server.application_name);
        config.readonly(self.server.read_only);
        // Half a surrogate pair, which nvarchar may hold, is shown as .NET shows it: as U+FFFD.
        config.lossy_utf16_decoding(true);
        // The pool bounds the handshake, and `Database` a query.
        config.handshake_timeout(None);
        config.command_timeout(None);
        config.authentication(authentication);
        match &self.server.tls {
            // The login is encrypted nevertheless, as ADO.NET does it.
            Tls::Off => {
                config.encryption(EncryptionLevel::Off);
                config.trust_cert();
            }
            Tls::Unverified => {
                config.encryption(EncryptionLevel::Required);
                config.trust_cert();
            }
            Tls::Verified { server_name, strict, .. } => {
                config.encryption(if *strict { EncryptionLevel::Strict } else { EncryptionLevel::Required });
                if let Some(authorities) = authorities {
                    config.trust_cert_ca_bundle(authorities);
                }
                if let Some(name) = server_name {
                    config.hostname_in_certificate(name);
                }
            }
        }
        config
    }

    /// Those that vouch for the server, if a file names them. Read anew for each connection, as it may be renewed, and
    /// where others do not wait for it.
    async fn authorities(&self) -> Result<Option<Vec<u8>>, Failure> {
        let Tls::Verified { ca_file: Some(file), .. } = &self.server.tls else { return Ok(None) };
        let path = file.clone();
        let read = spawn_blocking(move || fs::read(path)).await.unwrap_or_else(|error| Err(error.into()));
        read.map(Some).map_err(|error| Failure::Refused(format!("{} cannot be read: {error}", file.display())))
    }

    /// How to log in, and the token that this takes, if it is the app's identity that does.
    async fn authentication(&self) -> Result<(AuthMethod, Option<Secret>), Failure> {
        match &self.credentials {
            Credentials::Password { user, password } => Ok((AuthMethod::sql_server(user, password.reveal()), None)),
            Credentials::Identity(_) if self.server.tls == Tls::Off => {
                Err(Failure::Refused("a managed identity's token is only sent encrypted: set Encrypt=True".to_owned()))
            }
            Credentials::Identity(tokens) => {
                let token = tokens.token().await.map_err(|problem| Failure::Refused(format!("no token: {problem}")))?;
                Ok((AuthMethod::aad_token(token.reveal()), Some(token)))
            }
        }
    }

    fn login_failure(&self, error: tiberius::error::Error, token: Option<&Secret>) -> Failure {
        let refused = error.code() == Some(LOGIN_FAILED);
        match (failure(error), &self.credentials, token) {
            (Failure::Refused(problem), Credentials::Identity(tokens), Some(token)) if refused => {
                tokens.refused(token);
                Failure::Refused(format!(
                    "{problem} (sql/sqlserver-access.sql says how a managed identity becomes a user of the database)"
                ))
            }
            (failure, ..) => failure,
        }
    }
}

impl Connect for Connector {
    type Connection = Connection;

    async fn connect(&self) -> Result<Connection, Failure> {
        let (authentication, token) = self.authentication().await?;
        let authorities = self.authorities().await?;
        let (mut host, mut port) = (self.server.host.clone(), self.server.port);
        for _ in 0..=MOST_REDIRECTS {
            let config = self.config(&host, port, authentication.clone(), authorities.clone());
            let stream = reach(&host, port).await;
            let stream = stream.map_err(|error| Failure::Lost(format!("{host}:{port} cannot be reached: {error}")))?;
            match Client::connect(config, stream.compat_write()).await {
                Ok(client) => return Ok(client),
                Err(tiberius::error::Error::Routing { host: next, port: next_port }) => {
                    tracing::debug!(host = next, port = next_port, "redirected");
                    // The name of an instance may follow; the port makes it superfluous.
                    host = next.split('\\').next().unwrap_or_default().to_owned();
                    port = next_port;
                    // What was named was checked at the start; this it has named itself.
                    let is_verified = matches!(self.server.tls, Tls::Verified { .. });
                    if !is_verified && !self.allow_unverified && !config::is_local(&host) {
                        return Err(Failure::Refused(format!(
                            "redirected to {host}, another machine, whose certificate would not be checked; ask for encryption and verification \
                             in Sql, or set DATABASE_ALLOW_UNVERIFIED=on"
                        )));
                    }
                }
                Err(error) => return Err(self.login_failure(error, token.as_ref())),
            }
        }
        Err(Failure::Lost(format!("redirected more than {MOST_REDIRECTS} times, last to {host}:{port}")))
    }

    async fn ping(&self, connection: &mut Connection) -> Result<(), Failure> {
        let answer = connection.simple_query("SELECT 1").await.map_err(failure)?;
        answer.into_results().await.map_err(failure)?;
        Ok(())
    }
}

/// The first of a name's addresses that answers.
async fn reach(host: &str, port: u16) -> io::Result<TcpStream> {
    let addresses = lookup_host((host, port)).await?;
    let mut attempts: FuturesUnordered<_> = (0..)
        .zip(addresses)
        .map(|(index, address)| async move {
            sleep(NEXT_ADDRESS * index).await;
            TcpStream::connect(address).await
        })
        .collect();
    let mut problem = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    while let Some(attempt) = attempts.next().await {
        match attempt {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => problem = error,
        }
    }
    Err(problem)
}

/// What the driver's error means for the connection, in words.
pub(super) fn failure(error: tiberius::error::Error) -> Failure {
    use tiberius::error::Error;
    match error {
        Error::Server(error) => {
            let problem = format!("error {}: {}", error.code(), error.message());
            match error.class() >= FATAL || PASSING.contains(&error.code()) {
                true => Failure::Lost(problem),
                false => Failure::Refused(problem),
            }
        }
        Error::Io { message, .. } => Failure::Lost(format!("the connection failed: {message}")),
        // What follows advises users of the driver.
        Error::Tls(message) => {
            let message = message.split(" To connect anyway").next().unwrap_or_default();
            Failure::Lost(format!("no TLS: {message}"))
        }
        Error::Protocol(message) => Failure::Lost(format!("not understood: {message}")),
        error @ Error::Routing { .. } => Failure::Lost(error.to_string()),
        error => Failure::Refused(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_name_without_a_listener_is_told_and_one_with_it_is_reached() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        assert!(reach("localhost", port).await.is_ok(), "whichever of localhost's addresses is tried first");
        drop(listener);
        assert!(reach("localhost", port).await.is_err());
    }
}
