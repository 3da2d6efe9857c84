//! One suite for every store, and what each promises beyond it.

mod backup;
mod bundle;
mod child;
mod local;
mod open;
mod s3;
mod suite;
mod weed;

use std::sync::Arc;

use store::{Ram, Store};

#[test]
fn ram_keeps_the_contract() {
    let ram: Arc<dyn Store> = Arc::new(Ram::new());
    suite::store_suite(&ram);
    suite::names_do_not_nest(&ram);
}
