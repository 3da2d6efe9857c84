use control::{Error, ModelKind};

use crate::Stage;

pub(crate) fn a_model_is_put_replaced_listed_and_deleted(stage: &Stage) {
    let (control, clock) = stage.one();
    let first = control.put_model("sotu", ModelKind::Base, "models/a").unwrap();
    clock.advance(1_000);
    let second = control.put_model("sotu", ModelKind::Chat, "models/b").unwrap();
    let other = control.put_model("ft:sotu:me:x-1", ModelKind::Chat, "/m.gguf").unwrap();
    assert_eq!(second.created_at.0, first.created_at.0 + 1_000);
    assert_eq!(control.get_model("sotu").unwrap(), Some(second.clone()));
    assert_eq!(control.list_models().unwrap(), [other, second]);
    assert!(control.delete_model("sotu").unwrap());
    assert!(!control.delete_model("sotu").unwrap());
    assert_eq!(control.get_model("sotu").unwrap(), None);
}

pub(crate) fn names_and_sources_that_cannot_be_are_refused(stage: &Stage) {
    let (control, _) = stage.one();
    let long = "x".repeat(129);
    for name in ["", "a b", "a\n", "ü", "a\0", "'; DROP TABLE models; --", &long] {
        let error = control.put_model(name, ModelKind::Base, "models/a").unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{name:?}: {error}");
        assert!(error.to_string().len() < 200);
    }
    for source in ["", "a\0b"] {
        control.put_model("m", ModelKind::Base, source).unwrap_err();
    }
    assert!(control.list_models().unwrap().is_empty());
}
