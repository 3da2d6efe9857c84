use std::fs;

use super::sqlite::{MIGRATIONS, migrate, schema_version};
use super::*;
use crate::job::{JobSpec, JobState};
use crate::models::ModelKind;

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn spec(name: &str) -> JobSpec {
    JobSpec { name: name.to_owned(), args: vec!["train".to_owned()], max_restarts: 1, ..JobSpec::default() }
}

/// Rows as a program of schema version `index + 1` left them, in its own SQL. One entry per version ever released.
const ROWS_OF_VERSION: &[&str] = &[ROWS_OF_1, ROWS_OF_1, ROWS_OF_1, ROWS_OF_4, ROWS_OF_4, ROWS_OF_4];

const ROWS_OF_1: &str = "
    INSERT INTO keys (name, hash, created_ms) VALUES ('old', {hash}, 5);
    INSERT INTO models (name, kind, source, created_ms) VALUES ('sotu', 'base', 'models/sotu', 6);
    INSERT INTO leases (name, holder, token, expires_ms) VALUES ('reconciler', 'a', 41, 7);
    INSERT INTO jobs (name, spec, desired, state, created_ms, n_starts, process)
    VALUES ('train', '{\"name\":\"train\",\"args\":[\"train\"],\"max_restarts\":1}', 'running', 'running', 8, 1,
            '{\"pid\":7,\"start_ticks\":9,\"boot_id\":\"b\",\"mark\":\"m\"}');
";

/// Version 4 has nodes; what the later ones added has a default.
const ROWS_OF_4: &str = "
    INSERT INTO keys (name, hash, created_ms) VALUES ('old', {hash}, 5);
    INSERT INTO models (name, kind, source, created_ms) VALUES ('sotu', 'base', 'models/sotu', 6);
    INSERT INTO leases (name, holder, token, expires_ms) VALUES ('reconciler', 'a', 41, 7);
    INSERT INTO nodes (name, mode, cores, memory_bytes, seen_ms) VALUES ('here', 'cordoned', 3, 9, 8);
    INSERT INTO jobs (name, spec, desired, state, created_ms, n_starts, process)
    VALUES ('train', '{\"name\":\"train\",\"args\":[\"train\"],\"max_restarts\":1}', 'running', 'running', 8, 1,
            '{\"pid\":7,\"start_ticks\":9,\"boot_id\":\"b\",\"mark\":\"m\"}');
";

#[test]
fn every_earlier_schema_is_brought_up_to_date_with_its_rows() {
    assert_eq!(ROWS_OF_VERSION.len(), MIGRATIONS.len(), "add rows for the new version");
    for version in 1..=MIGRATIONS.len() {
        let directory = directory();
        let path = directory.path().join("control.db");
        let mut connection = Connection::open(&path).unwrap();
        migrate(&path, &mut connection, &MIGRATIONS[..version]).unwrap();
        let rows = ROWS_OF_VERSION[version - 1].replace("{hash}", "zeroblob(32)");
        connection.execute_batch(&rows).unwrap();
        let tables =
            crate::tables::read(&mut Transaction::Sqlite(connection.transaction().unwrap())).unwrap();
        drop(connection);
        let restored = directory.path().join("restored.db");
        Vacant::file(&restored).unwrap().restore(&backup(&tables, version)).unwrap();
        check_restored(&Control::open(&restored).unwrap());
        check_rows(&Control::open(&path).unwrap());
    }
}

#[test]
fn every_earlier_schema_of_postgresql_is_brought_up_to_date_with_its_rows() {
    let Some(server) = test_server::Postgres::start() else { return };
    assert_eq!(postgres::MIGRATIONS.len(), MIGRATIONS.len(), "the databases differ");
    for version in 1..=MIGRATIONS.len() {
        let url = server.new_database();
        drop(postgres::Server::open_at(&url, &postgres::MIGRATIONS[..version]).unwrap());
        let rows = ROWS_OF_VERSION[version - 1].replace("{hash}", "decode(repeat('00', 32), 'hex')");
        raw(&url, &rows);
        let mut old = postgres::Server::reach(&url).unwrap();
        let tables = crate::tables::read(&mut old.begin(Access::Read).unwrap()).unwrap();
        let restored = server.new_database();
        Vacant::server(&restored).unwrap().restore(&backup(&tables, version)).unwrap();
        check_restored(&Control::connect(&restored).unwrap());
        check_rows(&Control::connect(&url).unwrap());
    }
}

/// As it comes out of a backup that a program of this schema version took.
fn backup(tables: &Tables, version: usize) -> Tables {
    assert_eq!(tables.schema_version, i64::try_from(version).unwrap());
    Tables::from_json(&tables.to_json()).unwrap()
}

/// Statements past [`Control`], as another program would send them.
fn raw(url: &str, sql: &str) {
    let mut client = ::postgres::Client::connect(url, ::postgres::NoTls).unwrap();
    client.batch_execute(&format!("SET search_path = loquat; {sql}")).unwrap();
}

fn check_rows(control: &Control) {
    let job = &control.list_jobs(9).unwrap()[0];
    assert_eq!(job.state, JobState::Running);
    assert_eq!(job.process.as_ref().unwrap().start_ticks, 9);
    check_rows_but(control, 42);
}

/// What ran is over in a database that was restored, and no token of before is given again.
fn check_restored(control: &Control) {
    let job = &control.list_jobs(9).unwrap()[0];
    assert_eq!((job.state, &job.process), (JobState::Interrupted, &None));
    check_rows_but(control, (1 << 32) + 42);
}

fn check_rows_but(control: &Control, token: i64) {
    assert_eq!(control.list_keys().unwrap()[0].name, "old");
    assert_eq!(control.get_model("sotu").unwrap().unwrap().kind, ModelKind::Base);
    let job = &control.list_jobs(9).unwrap()[0];
    assert_eq!((job.n_starts, job.spec.max_restarts), (1, 1));
    assert_eq!((job.spec.project.as_str(), job.waiting_at.0, job.placed.len()), ("default", 8, 0));
    assert_eq!(control.list_keys().unwrap()[0].role, crate::keys::Role::Member);
    for node in control.list_nodes().unwrap() {
        assert_eq!(
            (node.spec.cores, node.spec.jobs_max, node.mode),
            (3, 4, crate::nodes::NodeMode::Cordoned)
        );
    }
    let lease = control.acquire("reconciler", "b", Duration::from_secs(1));
    assert_eq!(lease.unwrap().unwrap().token, token);
    assert_eq!(control.cluster_id().unwrap().len(), 32);
    assert_eq!(control.replica_key().unwrap().len(), 64);
}

#[test]
fn postgresql_that_is_not_ours_to_use_is_refused_by_name() {
    let Some(server) = test_server::Postgres::start() else { return };
    let url = server.new_database();
    let first = Control::connect(&url).unwrap();
    let refused = |url: &str, words: &[&str]| {
        let error = Control::connect(url).unwrap_err();
        let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        let text = format!("{error}: {cause}");
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
        assert!(!text.contains("only-for-this-test"), "a password in an error: {text}");
    };
    refused(&url.replace("only-for-this-test", "wrong"), &["127.0.0.1", "password"]);
    refused(&server.url("nowhere"), &["nowhere", "does not exist"]);
    refused("postgres://[", &["postgres://user"]);
    refused("postgres://app:only-for-this-test@127.0.0.1:1/x", &["127.0.0.1:1"]);
    raw(&url, "UPDATE schema_version SET version = 77");
    refused(&url, &["77", "newer"]);
    drop(first);
    let foreign = server.new_database();
    raw(&foreign, "CREATE SCHEMA loquat; CREATE TABLE loquat.cookies (id BIGINT)");
    refused(&foreign, &["another program"]);

    // A migration that fails undoes all of it.
    let url = server.new_database();
    let broken = [postgres::MIGRATIONS, &["CREATE TABLE half (id BIGINT); CREATE NONSENSE"]].concat();
    assert!(postgres::Server::open_at(&url, &broken).is_err());
    assert!(Control::connect(&url).unwrap().list_jobs(9).unwrap().is_empty());
}

#[test]
fn a_postgresql_that_takes_no_writes_says_so() {
    let Some(server) = test_server::Postgres::start() else { return };
    let url = server.new_database();
    drop(Control::connect(&url).unwrap());
    let read_only = format!("{url}?options=-c%20default_transaction_read_only%3Don");
    let error = Control::connect(&read_only).unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("read-only"), "{error}: {cause}");
}

#[test]
fn a_failed_migration_leaves_the_old_schema() {
    let directory = directory();
    let path = directory.path().join("control.db");
    drop(Control::open(&path).unwrap());
    let mut connection = Connection::open(&path).unwrap();
    let broken = [MIGRATIONS, &["CREATE TABLE half (id INTEGER); CREATE NONSENSE"]].concat();
    let error = migrate(&path, &mut connection, &broken).unwrap_err();
    assert!(error.to_string().contains("schema version 7"), "{error}");
    assert_eq!(schema_version(&path, &connection).unwrap(), 6);
    let half = connection.prepare("SELECT * FROM half");
    assert!(half.is_err(), "the migration's first statement must be undone");
    Control::open(&path).unwrap();
}

#[test]
fn a_database_from_a_newer_version_is_refused_by_name() {
    let directory = directory();
    let path = directory.path().join("control.db");
    drop(Control::open(&path).unwrap());
    let connection = Connection::open(&path).unwrap();
    connection.pragma_update(None, "user_version", 77).unwrap();
    drop(connection);
    let error = Control::open(&path).unwrap_err().to_string();
    assert!(error.contains("control.db") && error.contains("77") && error.contains("newer"), "{error}");
}

#[test]
fn a_file_that_is_no_database_of_ours_is_refused_by_name() {
    let check = |bytes: &[u8], expected: &str| {
        let directory = directory();
        let path = directory.path().join("control.db");
        fs::write(&path, bytes).unwrap();
        let error = Control::open(&path).unwrap_err().to_string();
        assert!(error.contains("control.db") && error.contains(expected), "{error}");
        assert_eq!(fs::read(&path).unwrap(), bytes, "a refused file must stay as it is");
    };
    check(b"", "empty");
    check(&[0x5a; 5000], "damaged");
    check(b"{\"not\": \"a database\"}", "damaged");

    let directory = directory();
    let path = directory.path().join("other.db");
    Connection::open(&path).unwrap().execute_batch("CREATE TABLE cookies (id INTEGER)").unwrap();
    let error = Control::open(&path).unwrap_err();
    assert!(matches!(error, Error::ForeignDatabase { .. }), "{error}");
}

#[test]
fn a_database_cut_short_or_overwritten_is_refused_by_name() {
    let directory = directory();
    let path = directory.path().join("control.db");
    let control = Control::open(&path).unwrap();
    for n in 0..200 {
        control.submit(&spec(&format!("job{n}"))).unwrap();
    }
    drop(control);
    let whole = fs::read(&path).unwrap();
    assert!(whole.len() > 40_000, "{}", whole.len());
    let mut overwritten = whole.clone();
    for byte in &mut overwritten[4096..20_000] {
        *byte = 0x5a;
    }
    for (what, bytes) in [
        ("half", &whole[..whole.len() / 2]),
        ("one page", &whole[..4096]),
        ("ten bytes", &whole[..10]),
        ("overwritten", &overwritten[..]),
    ] {
        fs::write(&path, bytes).unwrap();
        let error = Control::open(&path).unwrap_err();
        assert!(matches!(error, Error::DamagedDatabase { .. }), "{what}: {error}");
        assert!(error.to_string().contains("control.db"), "{what}: {error}");
    }
    fs::write(&path, &whole).unwrap();
    assert_eq!(Control::open(&path).unwrap().list_jobs(999).unwrap().len(), 200);
}

#[test]
fn the_log_of_a_removed_database_is_not_replayed_into_a_new_one() {
    let directory = directory();
    let path = directory.path().join("control.db");
    let control = Control::open(&path).unwrap();
    control.submit(&spec("train")).unwrap();
    let wal = directory.path().join("control.db-wal");
    let log = fs::read(&wal).unwrap();
    assert!(!log.is_empty());
    drop(control);
    fs::remove_file(&path).unwrap();
    fs::write(&wal, log).unwrap();
    let error = Control::open(&path).unwrap_err();
    assert!(matches!(error, Error::MissingDatabase { .. }), "{error}");
    assert!(!path.exists());
    fs::remove_file(&wal).unwrap();
    assert!(Control::open(&path).unwrap().list_jobs(9).unwrap().is_empty());
}

#[test]
fn a_place_that_cannot_hold_a_database_is_named() {
    let directory = directory();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    // /proc takes no files, whoever asks.
    for path in [
        Path::new("/proc/control.db"),
        &directory.path().join("missing/control.db"),
        &file.join("control.db"),
        Path::new("/"),
    ] {
        let error = Control::open(path).unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing is left behind");
}

#[test]
fn a_full_disk_refuses_the_write_and_keeps_what_was_acknowledged() {
    let directory = directory();
    let path = directory.path().join("control.db");
    let control = Control::open(&path).unwrap();
    let mut link = control.lock();
    let Link::Sqlite(connection) = &mut *link else { panic!("a file is SQLite's") };
    let n_pages: i64 = connection.query_row("PRAGMA page_count", [], |row| row.get(0)).unwrap();
    // SQLite answers as it does when the device has no room.
    connection.pragma_update_and_check(None, "max_page_count", n_pages + 2, |_| Ok(())).unwrap();
    drop(link);
    let mut acknowledged = Vec::new();
    let error = loop {
        match control.submit(&spec(&format!("job{}", acknowledged.len()))) {
            Ok(submitted) => acknowledged.push(submitted.job),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::DiskFull { .. }), "{error}");
    assert!(error.to_string().contains("control.db"), "{error}");
    assert!(!acknowledged.is_empty());
    acknowledged.reverse();
    assert_eq!(control.list_jobs(999).unwrap(), acknowledged);
    drop(control);
    assert_eq!(Control::open(&path).unwrap().list_jobs(999).unwrap(), acknowledged);
}

#[test]
fn many_open_one_new_database_at_once() {
    let directory = directory();
    let path = directory.path().join("control.db");
    std::thread::scope(|scope| {
        for n in 0..8 {
            let path = &path;
            scope.spawn(move || {
                let control = Control::open(path).unwrap();
                control.submit(&spec(&format!("job{n}"))).unwrap();
            });
        }
    });
    let control = Control::open(&path).unwrap();
    assert_eq!(control.list_jobs(99).unwrap().len(), 8, "an opener wrote to a file that was replaced");
    let names = fs::read_dir(directory.path()).unwrap();
    let names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
    assert!(
        names.iter().all(|name| name.to_str().unwrap().starts_with("control.db")),
        "drafts are left: {names:?}"
    );
}

#[test]
fn an_unknown_word_in_a_row_is_an_error_and_not_a_guess() {
    let control = Control::in_memory(Clock::system()).unwrap();
    control.put_model("m", ModelKind::Base, "models/m").unwrap();
    let spoil = |t: &mut Transaction| Ok(t.execute("UPDATE models SET kind = 'oracle'", &[])?);
    control.write("spoil a row", spoil).unwrap();
    let error = control.list_models().unwrap_err();
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("oracle"));
}
