//! Writes of all kinds beside the faults: what was acknowledged must be there at the end.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use control::{Control, Role};
use store::{ObjectName, Store};

const PAUSE: Duration = Duration::from_secs(2);

pub(super) struct Writes {
    stop: Arc<AtomicBool>,
    rows: JoinHandle<Vec<String>>,
    objects: JoinHandle<Vec<String>>,
}

impl Writes {
    /// Rows of the database and objects of the store, one after the other, whether or not they are there.
    pub(super) fn start(database: &str, store: Arc<dyn Store>) -> Writes {
        let (stop, control) = (Arc::new(AtomicBool::new(false)), Control::connect(database).unwrap());
        let rows = repeat(&stop, move |n| {
            let name = format!("acknowledged-{n}");
            control.create_key(&name, Role::Use).is_ok().then_some(name)
        });
        let objects = repeat(&stop, move |n| {
            let name = format!("acknowledged/{n}");
            store.put(&ObjectName::parse(&name).unwrap(), name.as_bytes()).is_ok().then_some(name)
        });
        Writes { stop, rows, objects }
    }

    /// Ends them and looks for every one that was acknowledged.
    pub(super) fn check(self, database: &str, store: &Arc<dyn Store>) {
        self.stop.store(true, Ordering::Relaxed);
        let (rows, objects) = (self.rows.join().unwrap(), self.objects.join().unwrap());
        assert!(!rows.is_empty() && !objects.is_empty());
        let keys = Control::connect(database).unwrap().list_keys().unwrap();
        let found: BTreeSet<&str> = keys.iter().map(|key| key.name.as_str()).collect();
        for row in &rows {
            assert!(found.contains(row.as_str()), "{row} was acknowledged and is not in the database");
        }
        for object in &objects {
            let bytes = store.get(&ObjectName::parse(object).unwrap());
            assert!(
                bytes.is_ok_and(|bytes| bytes == object.as_bytes()),
                "{object} was acknowledged and is lost"
            );
        }
        println!("{} rows and {} objects were acknowledged; all are there", rows.len(), objects.len());
    }
}

/// What was acknowledged of one write after another.
fn repeat(
    stop: &Arc<AtomicBool>,
    write: impl Fn(usize) -> Option<String> + Send + 'static,
) -> JoinHandle<Vec<String>> {
    let stop = stop.clone();
    std::thread::spawn(move || {
        let mut acknowledged = Vec::new();
        for n in 0.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            acknowledged.extend(write(n));
            std::thread::sleep(PAUSE);
        }
        acknowledged
    })
}
