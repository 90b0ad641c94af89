//! The bytes of a TDS 7.4 connection, from the server's side: packets, TLS inside and outside of them, and the three
//! messages that a client sends (PRELOGIN, LOGIN7, requests), after the public specification MS-TDS.

use std::{
    io::{self, Read, Write},
    sync::Arc,
};

use rustls::{ServerConfig, ServerConnection};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// Types of messages.
pub const SQL_BATCH: u8 = 1;
pub const RPC: u8 = 3;
pub const REPLY: u8 = 4;
pub const ATTENTION: u8 = 6;
pub const LOGIN7: u8 = 16;
pub const PRELOGIN: u8 = 18;

const HEADER: usize = 8;
const LARGEST_PACKET: usize = 4096;
const END_OF_MESSAGE: u8 = 1;

/// A connection, encrypted or not.
pub struct Wire {
    tcp: TcpStream,
    tls: Option<ServerConnection>,
    /// Received, decrypted, not used yet.
    received: Vec<u8>,
}

impl Wire {
    pub fn new(tcp: TcpStream) -> Self {
        Self { tcp, tls: None, received: Vec::new() }
    }

    /// Whether the client begins with TLS itself (TDS 8) and not with a packet.
    pub async fn begins_with_tls(&self) -> io::Result<bool> {
        let mut first = [0];
        Ok(self.tcp.peek(&mut first).await? == 1 && first[0] == 22)
    }

    /// TLS from here on. Up to TDS 7.4 its handshake travels inside PRELOGIN packets.
    pub async fn encrypt(&mut self, config: Arc<ServerConfig>, in_packets: bool) -> io::Result<()> {
        let mut tls = ServerConnection::new(config).map_err(io::Error::other)?;
        while tls.is_handshaking() || tls.wants_write() {
            if tls.wants_write() {
                let mut flight = Vec::new();
                while tls.wants_write() {
                    tls.write_tls(&mut flight)?;
                }
                match in_packets {
                    true => self.send(PRELOGIN, &flight).await?,
                    false => self.tcp.write_all(&flight).await?,
                }
                continue;
            }
            let piece = match in_packets {
                true => self.receive().await?.1,
                false => {
                    self.fill().await?;
                    std::mem::take(&mut self.received)
                }
            };
            let mut piece = &piece[..];
            while !piece.is_empty() {
                tls.read_tls(&mut piece)?;
                let processed = tls.process_new_packets();
                if let Err(error) = processed {
                    let mut alert = Vec::new();
                    tls.write_tls(&mut alert)?;
                    self.tcp.write_all(&alert).await?;
                    return Err(io::Error::other(error));
                }
            }
        }
        // The client's first words may have come with the end of its handshake.
        match tls.reader().read_to_end(&mut self.received) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            _ => {}
        }
        self.tls = Some(tls);
        Ok(())
    }

    /// Plain from here on, as after a login for which alone there was TLS.
    pub fn decrypt(&mut self) {
        self.tls = None;
    }

    /// A whole message: its type and its bytes.
    pub async fn receive(&mut self) -> io::Result<(u8, Vec<u8>)> {
        let mut message = Vec::new();
        loop {
            let header = self.take(HEADER).await?;
            let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
            message.extend(self.take(length.saturating_sub(HEADER)).await?);
            if header[1] & END_OF_MESSAGE != 0 {
                return Ok((header[0], message));
            }
        }
    }

    /// Sends a message in as many packets as it takes, which end wherever they are full.
    pub async fn send(&mut self, kind: u8, message: &[u8]) -> io::Result<()> {
        self.write(&packets(kind, message)).await
    }

    /// Sends bytes as they are.
    pub async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(tls) = &mut self.tls else { return self.tcp.write_all(bytes).await };
        let mut sealed = Vec::new();
        for piece in bytes.chunks(LARGEST_PACKET) {
            tls.writer().write_all(piece)?;
            while tls.wants_write() {
                tls.write_tls(&mut sealed)?;
            }
        }
        self.tcp.write_all(&sealed).await
    }

    /// Waits until the client goes away.
    pub async fn closed(&mut self) {
        while self.fill().await.is_ok() {}
    }

    async fn take(&mut self, length: usize) -> io::Result<Vec<u8>> {
        while self.received.len() < length {
            self.fill().await?;
        }
        Ok(self.received.drain(..length).collect())
    }

    async fn fill(&mut self) -> io::Result<()> {
        let mut piece = [0; 16 * 1024];
        let length = self.tcp.read(&mut piece).await?;
        let mut piece = &piece[..length];
        if piece.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let Some(tls) = &mut self.tls else {
            self.received.extend_from_slice(piece);
            return Ok(());
        };
        while !piece.is_empty() {
            tls.read_tls(&mut piece)?;
            tls.process_new_packets().map_err(io::Error::other)?;
            match tls.reader().read_to_end(&mut self.received) {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

/// A message, cut into packets.
pub fn packets(kind: u8, message: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let count = message.chunks(LARGEST_PACKET - HEADER).len();
    for (index, piece) in message.chunks(LARGEST_PACKET - HEADER).enumerate() {
        let last = if index + 1 == count { END_OF_MESSAGE } else { 0 };
        let length = u16::try_from(HEADER + piece.len()).expect("a packet");
        bytes.extend([kind, last]);
        bytes.extend(length.to_be_bytes());
        bytes.extend([0, 0, index as u8, 0]);
        bytes.extend(piece);
    }
    bytes
}

/// Reads little-endian fields in order.
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    pub fn bytes(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        taken
    }

    pub fn number(&mut self, length: usize) -> u64 {
        self.bytes(length).iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }
}

pub fn utf16(bytes: &[u8]) -> String {
    let units: Vec<_> = bytes.chunks(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]])).collect();
    String::from_utf16(&units).expect("UTF-16")
}

/// What a client asks for in PRELOGIN.
pub struct Prelogin {
    pub encryption: u8,
    pub token: bool,
}

/// Encryption of the login alone, as a client asks for it.
pub const LOGIN_ONLY: u8 = 0;

impl Prelogin {
    pub fn parse(message: &[u8]) -> Self {
        let mut asked = Self { encryption: 2, token: false };
        for option in message.chunks(5).take_while(|option| option[0] != 0xff) {
            let value = message[usize::from(u16::from_be_bytes([option[1], option[2]]))];
            match option[0] {
                1 => asked.encryption = value,
                6 => asked.token = value == 1,
                _ => {}
            }
        }
        asked
    }

    /// The answer: what was asked for, "on" if that was more than the login alone.
    pub fn answer(&self) -> Vec<u8> {
        let encryption = if self.encryption == LOGIN_ONLY { 0 } else { 1 };
        let mut options: Vec<(u8, Vec<u8>)> =
            vec![(0, vec![16, 0, 16, 0, 0, 0]), (1, vec![encryption]), (2, vec![0]), (3, vec![]), (4, vec![0])];
        if self.token {
            options.push((6, vec![1]));
        }
        let mut offset = options.len() as u16 * 5 + 1;
        let (mut table, mut values) = (Vec::new(), Vec::new());
        for (option, value) in options {
            table.push(option);
            table.extend(offset.to_be_bytes());
            table.extend((value.len() as u16).to_be_bytes());
            offset += value.len() as u16;
            values.extend(value);
        }
        table.push(0xff);
        table.extend(values);
        table
    }
}

/// Who logs in, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Login {
    pub user: String,
    pub password: String,
    /// The access token, if one came instead of a password.
    pub token: Option<String>,
    pub application: String,
    /// The name by which the client knows the server.
    pub server: String,
    pub database: String,
    pub read_only: bool,
    /// Whether what follows the login is encrypted, too.
    pub encrypted: bool,
}

impl Login {
    pub fn parse(message: &[u8]) -> Self {
        let place = |offset: usize| {
            let mut fields = Fields(&message[offset..]);
            (fields.number(2) as usize, fields.number(2) as usize)
        };
        let text = |offset| {
            let (start, length) = place(offset);
            utf16(&message[start..start + length * 2])
        };
        let (start, length) = place(44);
        let password: Vec<_> =
            message[start..start + length * 2].iter().map(|byte| (byte ^ 0xa5).rotate_left(4)).collect();
        let extended = message[27] & 0x10 != 0;
        let token = extended.then(|| {
            let start = Fields(&message[place(56).0..]).number(4) as usize;
            fed_auth(Fields(&message[start..]))
        });
        Self {
            user: text(40),
            password: utf16(&password),
            token: token.flatten(),
            application: text(48),
            server: text(52),
            database: text(68),
            read_only: message[26] & 0x20 != 0,
            encrypted: false,
        }
    }
}

/// The access token among the extended features of a login.
fn fed_auth(mut features: Fields<'_>) -> Option<String> {
    loop {
        let feature = features.number(1);
        if feature == 0xff {
            return None;
        }
        let length = features.number(4) as usize;
        let mut value = Fields(features.bytes(length));
        if feature == 2 {
            assert_eq!(value.number(1) >> 1, 1, "the client holds the token itself");
            let length = value.number(4) as usize;
            return Some(utf16(value.bytes(length)));
        }
    }
}

/// What a client asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Query {
    pub sql: String,
    /// Declarations of the parameters, such as `@P1 int`; empty if there are none.
    pub declared: String,
    pub parameters: Vec<i64>,
}

impl Query {
    /// A batch of plain SQL.
    pub fn of_batch(message: &[u8]) -> Self {
        Self { sql: utf16(after_headers(message).0), ..Self::default() }
    }

    /// A call of sp_executesql with integers.
    pub fn of_call(message: &[u8]) -> Self {
        let mut fields = after_headers(message);
        assert_eq!((fields.number(2), fields.number(2)), (0xffff, 10), "sp_executesql");
        fields.number(2);
        let mut query = Self::default();
        let mut texts = Vec::new();
        while !fields.0.is_empty() {
            let name = fields.number(1) as usize;
            fields.bytes(name * 2 + 1);
            match fields.number(1) {
                0x26 => {
                    fields.number(1);
                    let length = fields.number(1) as usize;
                    let shift = 64 - 8 * length as u32;
                    query.parameters.push((fields.number(length) << shift) as i64 >> shift);
                }
                0xe7 => texts.push(nvarchar(&mut fields)),
                other => panic!("a parameter of type {other:#x}"),
            }
        }
        let mut texts = texts.into_iter();
        query.sql = texts.next().expect("a statement");
        query.declared = texts.next().unwrap_or_default();
        query
    }
}

fn after_headers(message: &[u8]) -> Fields<'_> {
    let length = Fields(message).number(4) as usize;
    Fields(&message[length..])
}

fn nvarchar(fields: &mut Fields<'_>) -> String {
    let most = fields.number(2);
    fields.bytes(5);
    if most < 0xffff {
        let length = fields.number(2) as usize;
        return utf16(fields.bytes(length));
    }
    fields.number(8);
    let mut text = Vec::new();
    loop {
        match fields.number(4) as usize {
            0 => return utf16(&text),
            length => text.extend(fields.bytes(length)),
        }
    }
}
