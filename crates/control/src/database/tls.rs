//! TLS towards PostgreSQL, asked for as its own clients are: by `sslmode` and `sslrootcert` in the URL.

use std::sync::Arc;

use postgres::config::SslMode;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::error::{Error, Result};

/// How sure we want to be of the server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    Disable,
    /// Encrypted where the server can.
    #[default]
    Prefer,
    /// Encrypted, whoever it is; with authorities that are named, as `VerifyCa`.
    Require,
    /// Signed by an authority.
    VerifyCa,
    /// Signed by an authority as what the URL calls it.
    VerifyFull,
}

/// What a URL asks for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Asked {
    mode: Mode,
    /// A file of authorities' certificates, in PEM; `system` are those that browsers believe.
    authorities: Option<String>,
}

impl Asked {
    /// Takes what is ours out of a URL, whose reader does not know all of it.
    pub(super) fn of_url(url: &str) -> Result<(String, Asked)> {
        let Some((base, query)) = url.split_once('?') else {
            return Ok((url.to_owned(), Asked::default()));
        };
        let (mut asked, mut kept) = (Asked::default(), Vec::new());
        for pair in query.split('&') {
            match pair.split_once('=') {
                Some(("sslmode", word)) => asked.mode = mode(word)?,
                Some(("sslrootcert", path)) => asked.authorities = Some(unescaped(path)?),
                _ => kept.push(pair),
            }
        }
        let url = if kept.is_empty() { base.to_owned() } else { format!("{base}?{}", kept.join("&")) };
        Ok((url, asked))
    }

    pub(super) fn mode(&self) -> SslMode {
        match self.mode {
            Mode::Disable => SslMode::Disable,
            Mode::Prefer => SslMode::Prefer,
            Mode::Require | Mode::VerifyCa | Mode::VerifyFull => SslMode::Require,
        }
    }

    /// What makes connections to it.
    pub(super) fn connector(&self) -> Result<MakeRustlsConnect> {
        let provider = Arc::new(ring::default_provider());
        let mode = match self.mode {
            Mode::Require if self.authorities.is_some() => Mode::VerifyCa,
            mode => mode,
        };
        let trusted = match mode {
            Mode::VerifyCa | Mode::VerifyFull => Some(self.trusted(&provider)?),
            Mode::Disable | Mode::Prefer | Mode::Require => None,
        };
        let verifier = Verifier { trusted, any_name: mode != Mode::VerifyFull, provider: provider.clone() };
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.map_err(|error| refused(error.to_string()))?;
        let config = config.dangerous().with_custom_certificate_verifier(Arc::new(verifier));
        Ok(MakeRustlsConnect::new(config.with_no_client_auth()))
    }

    fn trusted(&self, provider: &Arc<CryptoProvider>) -> Result<Arc<WebPkiServerVerifier>> {
        let mut roots = RootCertStore::empty();
        match self.authorities.as_deref() {
            None | Some("system") => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
            Some(path) => {
                let bad = |why: &dyn std::fmt::Display| refused(format!("sslrootcert {path}: {why}"));
                let pem = std::fs::read(path).map_err(|error| bad(&error))?;
                for certificate in CertificateDer::pem_slice_iter(&pem) {
                    roots.add(certificate.map_err(|error| bad(&error))?).map_err(|error| bad(&error))?;
                }
                if roots.is_empty() {
                    return Err(bad(&"there is no certificate in it"));
                }
            }
        }
        let built = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build();
        built.map_err(|error| refused(error.to_string()))
    }
}

fn refused(why: String) -> Error {
    Error::DatabaseUrl { why }
}

fn mode(word: &str) -> Result<Mode> {
    Ok(match word {
        "disable" => Mode::Disable,
        "allow" | "prefer" => Mode::Prefer,
        "require" => Mode::Require,
        "verify-ca" => Mode::VerifyCa,
        "verify-full" => Mode::VerifyFull,
        _ => {
            let word: String = word.chars().take(30).collect();
            return Err(refused(format!(
                "sslmode {word:?} is none of disable, prefer, require, verify-ca and verify-full"
            )));
        }
    })
}

/// A value of a URL's query.
fn unescaped(text: &str) -> Result<String> {
    let bad =
        || refused("sslrootcert is no value of a URL: % and two digits stand for other characters".into());
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let [first, after @ ..] = rest {
        rest = after;
        if *first == b'%' {
            let digits = after.get(..2).and_then(|digits| hex::decode(digits).ok()).ok_or_else(bad)?;
            bytes.extend(digits);
            rest = &after[2..];
        } else {
            bytes.push(*first);
        }
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

/// Checks a server's certificate as far as was asked for, and always that it has the key.
#[derive(Debug)]
struct Verifier {
    /// `None`: whoever it is.
    trusted: Option<Arc<WebPkiServerVerifier>>,
    any_name: bool,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        own: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(trusted) = &self.trusted else { return Ok(ServerCertVerified::assertion()) };
        match trusted.verify_server_cert(own, between, name, ocsp, now) {
            // Names are compared last: all else is right.
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if self.any_name => Ok(ServerCertVerified::assertion()),
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, own, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, own, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests;
