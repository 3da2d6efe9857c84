//! A real PostgreSQL with a certificate of an authority that the test makes, and one that speaks no TLS.

use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

use super::*;
use crate::database::test_server::Postgres;
use crate::database::{Control, Stop};

#[test]
fn what_is_ours_is_taken_out_of_a_url() {
    let check = |url: &str, rest: &str, mode: Mode, authorities: Option<&str>| {
        let asked = Asked { mode, authorities: authorities.map(str::to_owned) };
        assert_eq!(Asked::of_url(url).unwrap(), (rest.to_owned(), asked));
    };
    check("postgres://u:p@h/d", "postgres://u:p@h/d", Mode::Prefer, None);
    check("postgres://h/d?sslmode=require", "postgres://h/d", Mode::Require, None);
    check(
        "postgres://h/d?application_name=x&sslmode=verify-full&options=-c%20a%3D1&sslrootcert=%2Fa%20b.pem",
        "postgres://h/d?application_name=x&options=-c%20a%3D1",
        Mode::VerifyFull,
        Some("/a b.pem"),
    );
    for (url, word) in [
        ("postgres://h/d?sslmode=sometimes", "sometimes"),
        ("postgres://h/d?sslmode=", "sslmode"),
        ("postgres://h/d?sslrootcert=%2", "sslrootcert"),
        ("postgres://h/d?sslrootcert=%ff", "sslrootcert"),
        ("postgres://h/d?sslrootcert=%zz", "sslrootcert"),
    ] {
        let error = Asked::of_url(url).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

struct Authority {
    params: CertificateParams,
    key: KeyPair,
}

impl Authority {
    fn new(name: &str) -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Authority { params, key: KeyPair::generate().unwrap() }
    }

    fn pem(&self) -> String {
        self.params.self_signed(&self.key).unwrap().pem()
    }

    /// Certificate and key of a server of this name.
    fn server(&self, name: &str) -> [String; 2] {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let signed = params.signed_by(&key, &Issuer::from_params(&self.params, &self.key)).unwrap();
        [signed.pem(), key.serialize_pem()]
    }
}

/// Whether the connection is encrypted, as the server sees it.
fn is_encrypted(url: &str) -> bool {
    let control = Control::connect(url).unwrap_or_else(|error| panic!("{}", telemetry::chain(&error)));
    let sql = "SELECT count(*) FROM pg_stat_ssl WHERE pid = pg_backend_pid() AND ssl";
    control
        .read("look at the connection", |transaction| Ok::<_, Stop>(transaction.number(sql, &[])? == 1))
        .unwrap()
}

fn refused(url: &str, words: &[&str]) {
    let error = telemetry::chain(&Control::connect(url).unwrap_err());
    assert!(words.iter().all(|word| error.contains(word)), "{error}");
    assert!(!error.contains("only-for-this-test"), "a password in an error: {error}");
}

#[test]
fn postgresql_over_tls_is_who_it_says_or_is_refused() {
    let (ours, other) = (Authority::new("ours"), Authority::new("other"));
    let Some(server) = Postgres::start_with("127.0.0.1", Some(ours.server("127.0.0.1"))) else { return };
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string().replace('/', "%2F")
    };
    let (ca, wrong_ca) = (write("ca.pem", &ours.pem()), write("wrong.pem", &other.pem()));
    let url = server.new_database();
    let with = |query: &str| format!("{url}?{query}");

    assert!(is_encrypted(&url), "preferred where nothing is said");
    assert!(!is_encrypted(&with("sslmode=disable")));
    assert!(is_encrypted(&with("sslmode=require")));
    assert!(is_encrypted(&with(&format!("sslmode=verify-full&sslrootcert={ca}"))));
    let unknown = ["certificate", "UnknownIssuer"];
    for mode in ["require", "verify-ca", "verify-full"] {
        refused(&with(&format!("sslmode={mode}&sslrootcert={wrong_ca}")), &unknown);
    }
    // Those that browsers believe have not signed it.
    refused(&with("sslmode=verify-full"), &unknown);
    refused(&with("sslmode=verify-ca&sslrootcert=system"), &unknown);

    // Another name of the same server, which its certificate does not have.
    let by_name = |query: &str| with(query).replace("127.0.0.1", "localhost");
    assert!(is_encrypted(&by_name(&format!("sslmode=verify-ca&sslrootcert={ca}"))));
    refused(&by_name(&format!("sslmode=verify-full&sslrootcert={ca}")), &["certificate", "localhost"]);

    let missing = Path::new("/nowhere/ca.pem").display().to_string();
    refused(&with(&format!("sslmode=verify-full&sslrootcert={missing}")), &["/nowhere/ca.pem"]);
    let empty = write("empty.pem", "no certificate");
    refused(&with(&format!("sslmode=verify-full&sslrootcert={empty}")), &["empty.pem", "no certificate"]);
}

#[test]
fn a_postgresql_without_tls_is_refused_where_tls_is_required() {
    let Some(server) = Postgres::start() else { return };
    let url = server.new_database();
    assert!(!is_encrypted(&url), "it can do no better");
    for mode in ["require", "verify-ca", "verify-full"] {
        refused(&format!("{url}?sslmode={mode}"), &["TLS", "does not support"]);
    }
}
