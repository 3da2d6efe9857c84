//! The whole database as plain data, from either kind into either kind.

use std::time::Duration;

use control::{
    Ask, Control, Error, JobSpec, ModelKind, NodeLoad, NodeSpec, Project, Quota, Replica, Role, Tables,
    Vacant,
};

use crate::postgres::Postgres;
use crate::shell;

/// Every table gets rows, with everything that a text can be.
fn fill(control: &Control) -> String {
    let key = control.create_key("k", Role::Member).unwrap();
    control.create_key("ünïcode", Role::Use).unwrap();
    control.put_model("m", ModelKind::Chat, "bundle:models/m").unwrap();
    let env = [("QUOTES".to_owned(), "it's \"so\" \\ \n\u{1f600}".to_owned())].into();
    control.submit(&JobSpec { env, ..shell("waits", "true", 2) }).unwrap();
    let gone = control.submit(&shell("gone", "true", 0)).unwrap().job.id;
    control.cancel_job(gone).unwrap();
    control.acquire("reconciler", "a", Duration::from_secs(60)).unwrap().unwrap();
    let node = NodeSpec { name: "n1".to_owned(), machine: "x".to_owned(), cores: 4, ..NodeSpec::default() };
    control.put_node(&node, &NodeLoad::default()).unwrap();
    let quota = Quota { cores: Some(3), ..Quota::default() };
    control.put_project(&Project { name: "p".to_owned(), quota }).unwrap();
    control.deploy("m", &Ask { source: Some("m".to_owned()), ..Ask::default() }).unwrap();
    for (name, own, key) in [("m-1", true, None), ("elsewhere", false, Some("secret"))] {
        control
            .put_replica(&Replica {
                name: name.to_owned(),
                model: "m".to_owned(),
                version: "m".to_owned(),
                url: "http://127.0.0.1:1".to_owned(),
                own,
                key: key.map(str::to_owned),
                draining: false,
                seen_at: control.now(),
            })
            .unwrap();
    }
    key.expose().to_owned()
}

fn check(original: &Control, restored: &Control, key: &str) {
    assert_eq!(restored.cluster_id().unwrap(), original.cluster_id().unwrap());
    assert_eq!(restored.replica_key().unwrap(), original.replica_key().unwrap());
    assert_eq!(restored.check_key(key).unwrap().unwrap().role, Role::Member);
    assert_eq!(restored.list_keys().unwrap(), original.list_keys().unwrap());
    assert_eq!(restored.list_models().unwrap(), original.list_models().unwrap());
    assert_eq!(restored.list_projects().unwrap(), original.list_projects().unwrap());
    assert_eq!(restored.list_jobs(9).unwrap(), original.list_jobs(9).unwrap());
    assert_eq!(restored.list_deployments().unwrap(), original.list_deployments().unwrap());
    // Addresses of processes that are no more are forgotten; engines elsewhere are not ours to forget.
    let replicas = restored.list_replicas().unwrap();
    assert_eq!(replicas.iter().map(|replica| replica.name.as_str()).collect::<Vec<_>>(), ["elsewhere"]);
    // Tokens of before the restore are never given again.
    let lease = restored.acquire("reconciler", "b", Duration::from_secs(60)).unwrap().unwrap();
    assert!(lease.token > 1 << 32, "{lease:?}");
    // A machine of another id takes its name.
    let node = NodeSpec { name: "n1".to_owned(), machine: "y".to_owned(), cores: 4, ..NodeSpec::default() };
    restored.put_node(&node, &NodeLoad::default()).unwrap();
    // Numbers go on.
    let last = original.list_jobs(1).unwrap()[0].id;
    assert!(restored.submit(&shell("new", "true", 0)).unwrap().job.id.0 > last.0);
}

#[test]
fn either_kind_of_database_comes_back_as_either_kind() {
    let server = Postgres::start();
    let directory = tempfile::tempdir().unwrap();
    let mut originals = vec![Control::open(&directory.path().join("from.db")).unwrap()];
    originals.extend(server.as_ref().map(|server| Control::connect(&server.new_database()).unwrap()));
    for (i, original) in originals.iter().enumerate() {
        let key = fill(original);
        let last = original.submit(&shell("last", "true", 0)).unwrap().job.id;
        original.cancel_job(last).unwrap();
        let tables = original.tables().unwrap();
        let json = tables.to_json();
        assert!(!String::from_utf8_lossy(&json).contains(&key), "keys are kept as hashes");
        let tables = Tables::from_json(&json).unwrap();
        assert_eq!(tables.to_json(), json);
        let models = tables.texts("models", ["name", "source"]);
        assert_eq!(models, [["m", "bundle:models/m"]]);

        let path = directory.path().join(format!("to{i}.db"));
        Vacant::file(&path).unwrap().restore(&tables).unwrap();
        check(original, &Control::open(&path).unwrap(), &key);
        let error = Vacant::file(&path).err().expect("it is there").to_string();
        assert!(error.contains(&format!("to{i}.db")) && error.contains("already"), "{error}");

        let Some(server) = &server else { continue };
        let url = server.new_database();
        // One that was only opened is as good as none.
        drop(Control::connect(&url).unwrap());
        Vacant::server(&url).unwrap().restore(&tables).unwrap();
        check(original, &Control::connect(&url).unwrap(), &key);
        let error = Vacant::server(&url).err().expect("it is full").to_string();
        assert!(error.contains("127.0.0.1") && error.contains("already"), "{error}");
        // Somebody was faster: found out again in the transaction that writes.
        let url = server.new_database();
        let vacant = Vacant::server(&url).unwrap();
        Control::connect(&url).unwrap().put_model("theirs", ModelKind::Base, "models/x").unwrap();
        assert!(matches!(vacant.restore(&tables), Err(Error::NotVacant { .. })));
        assert_eq!(Control::connect(&url).unwrap().list_models().unwrap()[0].name, "theirs");
    }
}

#[test]
fn jobs_go_on_where_the_home_and_the_store_are_now() {
    let directory = tempfile::tempdir().unwrap();
    let original = Control::open(&directory.path().join("from.db")).unwrap();
    let words = |text: &str| -> Vec<String> { text.split_whitespace().map(str::to_owned).collect() };
    let all = [
        ("both", "--home /old --store s3://old/x train --run r", "train --run r"),
        ("home", "--home /old serve m --home-like x", "serve m --home-like x"),
        ("none", "train --store mine", "train --store mine"),
        // A third pair is the job's own.
        ("more", "--home /old --store a --home b", "--home b"),
        ("odd", "--home", "--home"),
    ];
    for (name, args, _) in all {
        original.submit(&JobSpec { args: words(args), ..shell(name, "", 0) }).unwrap();
    }
    let mut tables = original.tables().unwrap();
    tables.move_jobs(&words("--home /new --store s3://new")).unwrap();
    let path = directory.path().join("to.db");
    Vacant::file(&path).unwrap().restore(&tables).unwrap();
    let restored = Control::open(&path).unwrap();
    for (name, _, rest) in all {
        let args = restored.find_job(name).unwrap().unwrap().spec.args;
        assert_eq!(args, words(&format!("--home /new --store s3://new {rest}")), "{name}");
    }
}

#[test]
fn tables_that_cannot_be_are_refused_and_leave_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let original = Control::open(&directory.path().join("from.db")).unwrap();
    fill(&original);
    let json = String::from_utf8(original.tables().unwrap().to_json()).unwrap();
    let refused = |text: &str, words: &[&str]| {
        let error = Tables::from_json(text.as_bytes()).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    refused("", &["cannot be read"]);
    refused(&json[..json.len() - 2], &["cannot be read"]);
    refused(&json.replacen("\"schema_version\":6", "\"schema_version\":77,\"more\":1", 1), &["77", "newer"]);
    refused(&json.replacen("\"schema_version\":6", "\"schema_version\":0", 1), &["version 0"]);
    refused(&json.replacen("\"name\":\"jobs\"", "\"name\":\"jobs; DROP TABLE keys\"", 1), &["DROP TABLE"]);
    refused(&json.replacen("\"columns\":[\"id\",", "\"columns\":[", 1), &["its columns"]);
    // Well-formed, and no table of ours: the database says so, and there is none afterwards.
    let strange =
        Tables::from_json(json.replacen("\"name\":\"jobs\"", "\"name\":\"cookies\"", 1).as_bytes()).unwrap();
    let path = directory.path().join("to.db");
    let error = telemetry::chain(&Vacant::file(&path).unwrap().restore(&strange).unwrap_err());
    assert!(error.contains("restore a backup") && error.contains("cookies"), "{error}");
    assert!(!path.exists());
    if let Some(server) = Postgres::start() {
        let url = server.new_database();
        let error = telemetry::chain(&Vacant::server(&url).unwrap().restore(&strange).unwrap_err());
        assert!(error.contains("cookies"), "{error}");
        Vacant::server(&url).unwrap();
    }
    assert_eq!(original.tables().unwrap().to_json(), json.as_bytes(), "reading changes nothing");
}
