//! Several processes that are one cluster: over a PostgreSQL, with replicas that die.

use std::path::Path;
use std::process::Command;

use crate::postgres::Postgres;
use crate::support::{Running, loquat, succeed};

/// `loquat` of a home of its own, over a database that others may share.
fn over(home: &Path, database: &str) -> Command {
    let mut command = loquat(home);
    command.args(["--database", database]);
    command
}

#[test]
fn two_gateways_over_one_postgresql_share_keys_and_a_foreign_store_is_refused() {
    let Some(mut server) = Postgres::start() else { return };
    let database = server.new_database();
    let homes = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let store = tempfile::tempdir().unwrap();
    let store_url = store.path().to_str().unwrap().to_owned();
    let up = |home: &Path| {
        let mut command = over(home, &database);
        command.args(["--store", &store_url, "up", "--port", "0", "--kv-mib", "8"]);
        command
    };
    let mut gateways = homes.each_ref().map(|home| Running::start(&mut up(home.path())));
    let clients = gateways.each_mut().map(Running::client);
    let key = String::from_utf8(
        over(homes[0].path(), &database).args(["key", "create", "k"]).output().unwrap().stdout,
    );
    let key = key.unwrap().trim().to_owned();
    for client in &clients {
        let client = client.with_key(&key);
        assert_eq!(client.get("/v1/models").0, 200, "a key made anywhere is good everywhere");
    }

    // Another cluster's database beside this store.
    let other = server.new_database();
    let mut foreign = over(homes[1].path(), &other);
    let refused = foreign.args(["--store", &store_url, "up", "--port", "0"]).output().unwrap();
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && text.contains("belongs to another cluster"), "{text}");
    assert!(!text.contains("only-for-this-test"), "a password in an error: {text}");

    // Without the database serving goes on and changes are refused, by name.
    server.kill_9();
    for client in &clients {
        assert_eq!(client.with_key(&key).get("/v1/models").0, 200);
    }
    let refused = over(homes[0].path(), &database).args(["key", "create", "k"]).output().unwrap();
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && text.contains("postgres://app@127.0.0.1"), "{text}");
    server.resume();
    let again = over(homes[0].path(), &database).args(["key", "list"]).output().unwrap();
    assert!(String::from_utf8_lossy(&again.stdout).contains("k"), "what was acknowledged is there");
    for gateway in gateways {
        assert_eq!(gateway.stop(), Some(0));
    }
    drop(succeed(homes[0].path(), &["key", "list"]));
}
