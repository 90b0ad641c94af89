//! Certificates for the tests' servers, made once per run.

use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use rcgen::{BasicConstraints, Certificate, CertificateParams, DnType, IsCa, Issuer, KeyPair};

/// The name in the servers' certificate, besides 127.0.0.1.
pub const NAME: &str = "database.test";

/// What the tests' servers show.
pub static CERTIFICATES: LazyLock<Certificates> = LazyLock::new(Certificates::new);

/// An authority, and a server's certificate from it: an authority's own is not accepted as a server's.
pub struct Certificates {
    /// PEM.
    pub authority: String,
    pub certificate: Certificate,
    pub key: KeyPair,
}

impl Certificates {
    pub fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.distinguished_name.push(DnType::CommonName, "authority of a test");
        let signed = authority.self_signed(&key).expect("signed by itself");
        let issuer = Issuer::new(authority, key);

        let key = KeyPair::generate().expect("a key");
        let names = vec![NAME.to_owned(), Ipv4Addr::LOCALHOST.to_string()];
        let certificate = CertificateParams::new(names).expect("names").signed_by(&key, &issuer).expect("signed");
        Self { authority: signed.pem(), certificate, key }
    }

    /// The server's certificate and its key in files of their own.
    pub fn server_files(&self, folder: &Path) -> (PathBuf, PathBuf) {
        let (certificate, key) = (folder.join("certificate.pem"), folder.join("key.pem"));
        std::fs::write(&certificate, self.certificate.pem()).expect("written");
        std::fs::write(&key, self.key.serialize_pem()).expect("written");
        (certificate, key)
    }

    /// The authority in a file of its own.
    pub fn authority_file(&self, folder: &Path) -> PathBuf {
        let file = folder.join("authority.pem");
        std::fs::write(&file, &self.authority).expect("written");
        file
    }
}
