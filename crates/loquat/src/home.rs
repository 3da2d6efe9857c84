//! The home directory of a Loquat: everything it keeps on this machine.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::args::Offer;
use anyhow::{Context, Result, bail, ensure};
use control::{Control, NodeSpec, Vacant};

use store::{ObjectName, Put, S3Options, Store};

/// The name of a machine that shares its database with no other.
const ALONE: &str = "here";

#[derive(Clone)]
pub(crate) struct Home {
    path: PathBuf,
    store_url: Option<String>,
    database_url: Option<String>,
}

/// Where the cluster's state is.
enum Database<'a> {
    Server(&'a str),
    File(PathBuf),
}

impl Home {
    /// Opens the directory, making it where it is missing.
    pub(crate) fn open(path: &Path, store_url: Option<String>, database_url: Option<String>) -> Result<Home> {
        std::fs::create_dir_all(path)
            .with_context(|| format!("cannot make the directory {}", path.display()))?;
        let path = path.canonicalize().with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Home { path, store_url, database_url })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The object store: `--store`, or the home's own directory.
    pub(crate) fn store(&self) -> Result<Arc<dyn Store>> {
        let url = match &self.store_url {
            Some(url) => url.clone(),
            None => self.path.join("store").display().to_string(),
        };
        self.store_at(&url)
    }

    /// A store elsewhere.
    pub(crate) fn store_at(&self, url: &str) -> Result<Arc<dyn Store>> {
        store::open_with(url, &s3_options()).with_context(|| format!("cannot open the store {url}"))
    }

    /// The cluster's state: `--database`, or a file of the home's own.
    pub(crate) fn control(&self) -> Result<Control> {
        Ok(match self.database() {
            Database::Server(url) => Control::connect(url)?,
            Database::File(path) => Control::open(&path)?,
        })
    }

    /// Whether there is one to open: opening makes the file where it is missing.
    pub(crate) fn has_database(&self) -> Result<bool> {
        match self.database() {
            Database::Server(_) => Ok(true),
            Database::File(path) => {
                path.try_exists().with_context(|| format!("cannot look for {}", path.display()))
            }
        }
    }

    /// The place of the cluster's state, which must be empty.
    pub(crate) fn vacant(&self) -> Result<Vacant> {
        Ok(match self.database() {
            Database::Server(url) => Vacant::server(url)?,
            Database::File(path) => Vacant::file(&path)?,
        })
    }

    fn database(&self) -> Database<'_> {
        match &self.database_url {
            Some(url) if url.starts_with("postgres://") || url.starts_with("postgresql://") => {
                Database::Server(url)
            }
            Some(path) => Database::File(path.into()),
            None => Database::File(self.path.join("loquat.db")),
        }
    }

    /// This machine, with what it gives to jobs.
    pub(crate) fn node(&self, offer: &Offer) -> NodeSpec {
        let is_shared = self.database_url.as_ref().is_some_and(|url| url.starts_with("postgres"));
        // A home of its own may move to another host, or the host get another name.
        let name = if is_shared { crate::machine::host_name() } else { ALONE.to_owned() };
        NodeSpec {
            name: offer.node.clone().unwrap_or(name),
            machine: if is_shared { crate::machine::machine_id() } else { String::new() },
            cores: offer.node_cores.unwrap_or(crate::n_threads() as u32),
            memory_bytes: offer.node_memory_gb.or_else(crate::machine::memory_total).unwrap_or(0),
            accelerators: offer.node_accelerators.unwrap_or_else(crate::machine::accelerators),
            disk_bytes: control::disk_bytes(&self.path).unwrap_or(0),
            jobs_max: offer.node_jobs,
        }
    }

    /// Refuses a store that belongs to another cluster than the database does, and a second store beside the database's own:
    /// two clusters would publish over each other, and two stores would each hold a part. A home's own store and database
    /// were made together and cannot differ.
    pub(crate) fn check_cluster(&self, control: &Control, store: &dyn Store) -> Result<()> {
        if self.store_url.is_none() && self.database_url.is_none() {
            return Ok(());
        }
        let (name, own) = (ObjectName::parse("cluster.json")?, control.cluster_id()?);
        if store.head(&name)?.is_none() {
            if let Some(claimed) = control.store()? {
                bail!("{}", other_store(control, store, &claimed));
            }
            let marker = serde_json::json!({ "cluster": own, "store": crate::random_hex(16)? }).to_string();
            // Whoever was faster: it is read below.
            let _: Put = store.put_if_absent(&name, marker.as_bytes())?;
        }
        let found: serde_json::Value = serde_json::from_slice(&store.get(&name)?)
            .with_context(|| format!("{name} in {} is no JSON", store.url()))?;
        ensure!(
            found["cluster"] == own.as_str(),
            "the store {} belongs to another cluster ({}) than the database {} ({own}); to hand it over, remove \
             {name} from it",
            store.url(),
            found["cluster"].as_str().unwrap_or("unnamed"),
            control.name()
        );
        // Stores that were marked before they had names of their own are called as their cluster.
        let id = found["store"].as_str().unwrap_or(&own);
        let claimed = control.claim_store(&format!("{id} {}", store.url()))?;
        ensure!(claimed.split(' ').next() == Some(id), "{}", other_store(control, store, &claimed));
        Ok(())
    }

    pub(crate) fn job_logs(&self) -> PathBuf {
        self.path.join("jobs")
    }

    /// Where models that live in the store are laid out as files.
    pub(crate) fn models(&self) -> PathBuf {
        self.path.join("models")
    }

    /// Where what comes from a hub lies until it is whole.
    pub(crate) fn downloads(&self) -> PathBuf {
        self.path.join("downloads")
    }

    /// The arguments that make a child process use this home.
    pub(crate) fn as_args(&self) -> Vec<String> {
        let mut args = vec!["--home".to_owned(), self.path.display().to_string()];
        if let Some(url) = &self.store_url {
            args.extend(["--store".to_owned(), url.clone()]);
        }
        args
    }

    /// Database and bucket for jobs, wherever they run. These are no arguments of theirs: they hold passwords.
    pub(crate) fn as_env(&self) -> Vec<(&'static str, String)> {
        let database = self.database_url.clone().map(|url| ("LOQUAT_DATABASE", url));
        let bucket = S3_VARIABLES.iter().filter_map(|name| Some((*name, std::env::var(name).ok()?)));
        database.into_iter().chain(bucket).collect()
    }
}

fn other_store(control: &Control, store: &dyn Store, claimed: &str) -> String {
    let theirs = claimed.split_once(' ').map_or("another", |(_, url)| url);
    format!(
        "the database {} goes with the store {theirs} and not with {}; to move there, copy all objects, cluster.json too",
        control.name(),
        store.url()
    )
}

/// The variables that every S3 client knows.
const S3_VARIABLES: [&str; 7] = [
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
];

/// Where S3 is and with which key.
fn s3_options() -> S3Options {
    let var = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
    let endpoint = var("AWS_ENDPOINT_URL_S3").or_else(|| var("AWS_ENDPOINT_URL")).unwrap_or_default();
    let defaults = S3Options::default();
    S3Options {
        allow_http: endpoint.starts_with("http://"),
        endpoint,
        region: var("AWS_REGION").or_else(|| var("AWS_DEFAULT_REGION")).unwrap_or(defaults.region),
        access_key: var("AWS_ACCESS_KEY_ID").unwrap_or_default(),
        secret_key: var("AWS_SECRET_ACCESS_KEY").unwrap_or_default(),
        session_token: var("AWS_SESSION_TOKEN").unwrap_or_default(),
    }
}
