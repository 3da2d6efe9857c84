use control::{Control, Error, KeyId, Role};

use crate::Stage;

pub(crate) fn a_key_is_shown_once_and_known_afterwards(stage: &Stage) {
    let (control, _) = stage.one();
    let key = control.create_key("laptop", Role::Use).unwrap();
    let text = key.expose();
    let digits = text.strip_prefix("sk-loquat-").unwrap();
    assert!(digits.len() == 64 && digits.bytes().all(|b| b.is_ascii_hexdigit()), "{text}");
    assert_eq!(control.check_key(text).unwrap().unwrap(), key.info);
    assert!(!format!("{key:?}").contains(digits), "a key must not reach a log");
    let other = control.create_key("laptop", Role::Use).unwrap();
    assert_ne!(other.expose(), text);
    assert_ne!(other.info.id, key.info.id);

    for wrong in
        ["", "sk-loquat-", digits, &text[..text.len() - 1], &format!("{text} "), &text.to_uppercase()]
    {
        assert_eq!(control.check_key(wrong).unwrap(), None, "{wrong:?}");
    }
}

#[test]
fn only_the_hash_is_in_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.db");
    let control = Control::open(&path).unwrap();
    let key = control.create_key("name-to-find", Role::Use).unwrap();
    let digits = key.expose().strip_prefix("sk-loquat-").unwrap().as_bytes();
    let mut stored = Vec::new();
    for entry in std::fs::read_dir(directory.path()).unwrap() {
        stored.extend(std::fs::read(entry.unwrap().path()).unwrap());
    }
    let holds = |wanted: &[u8]| stored.windows(wanted.len()).any(|w| w == wanted);
    assert!(holds(b"name-to-find"));
    assert!(!holds(&digits[..16]) && !holds(&digits[48..]));
}

pub(crate) fn a_revoked_key_is_refused_at_once_here_and_within_seconds_elsewhere(stage: &Stage) {
    let ([here, elsewhere], clock) = stage.many();
    let key = here.create_key("k", Role::Use).unwrap();
    let kept = here.create_key("kept", Role::Use).unwrap();
    let valid = |control: &Control, text: &str| control.check_key(text).unwrap().is_some();
    assert!(valid(&here, key.expose()) && valid(&elsewhere, key.expose()));

    assert!(here.revoke_key(key.info.id).unwrap());
    assert!(!valid(&here, key.expose()));
    clock.advance(1_000);
    assert!(!valid(&elsewhere, key.expose()));
    assert!(valid(&here, kept.expose()) && valid(&elsewhere, kept.expose()));

    assert!(!here.revoke_key(key.info.id).unwrap(), "it is revoked already");
    assert!(!here.revoke_key(KeyId(99)).unwrap());
    let keys = here.list_keys().unwrap();
    assert_eq!(keys.len(), 2);
    assert!(keys[0].revoked_at.is_some() && keys[1].revoked_at.is_none());
}

pub(crate) fn a_clock_set_back_does_not_keep_a_revoked_key_alive(stage: &Stage) {
    let ([here, elsewhere], clock) = stage.many();
    let key = here.create_key("k", Role::Use).unwrap();
    assert!(elsewhere.check_key(key.expose()).unwrap().is_some());
    here.revoke_key(key.info.id).unwrap();
    clock.advance(-3_600_000);
    assert!(elsewhere.check_key(key.expose()).unwrap().is_none());
}

pub(crate) fn bad_names_are_refused(stage: &Stage) {
    let (control, _) = stage.one();
    for name in ["", "a\nb", &"x".repeat(129)] {
        let error = control.create_key(name, Role::Use).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
    }
}

pub(crate) fn keys_are_checked_while_they_are_created_and_revoked(stage: &Stage) {
    let (control, _) = stage.one();
    let kept = control.create_key("kept", Role::Use).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..200 {
                let key = control.create_key("short-lived", Role::Use).unwrap();
                assert!(control.check_key(key.expose()).unwrap().is_some());
                control.revoke_key(key.info.id).unwrap();
                assert!(control.check_key(key.expose()).unwrap().is_none());
            }
        });
        scope.spawn(|| {
            for _ in 0..2_000 {
                assert!(control.check_key(kept.expose()).unwrap().is_some());
            }
        });
    });
}

pub(crate) fn a_key_keeps_its_role(stage: &Stage) {
    let (control, _) = stage.one();
    for role in Role::ALL {
        let key = control.create_key(role.as_str(), role).unwrap();
        assert_eq!(control.check_key(key.expose()).unwrap().unwrap().role, role);
    }
    let roles: Vec<Role> = control.list_keys().unwrap().iter().map(|key| key.role).collect();
    assert_eq!(roles, Role::ALL);
}

pub(crate) fn keys_that_are_read_in_time_are_known_without_waiting(stage: &Stage) {
    let ([control, other], clock) = stage.many();
    let key = control.create_key("a", Role::Use).unwrap();
    assert_eq!(control.known_key(key.expose()), None, "nothing was read yet");
    control.freshen_keys().unwrap();
    assert_eq!(control.known_key(key.expose()).unwrap().unwrap().id, key.info.id);
    // What is not there may just have been made by another process: it is asked for.
    assert_eq!(control.known_key("sk-loquat-0"), None);
    let new = other.create_key("b", Role::Use).unwrap();
    assert!(control.check_key(new.expose()).unwrap().is_some());
    other.revoke_key(key.info.id).unwrap();
    // Half a second old, it is read again; a second old, it says nothing.
    clock.advance(400);
    control.freshen_keys().unwrap();
    assert!(control.known_key(key.expose()).unwrap().is_some(), "read a moment ago");
    clock.advance(100);
    control.freshen_keys().unwrap();
    // Gone, so it is asked for, in case that it was just made.
    assert_eq!(control.known_key(key.expose()), None);
    assert_eq!(control.check_key(key.expose()).unwrap(), None);
    assert!(control.known_key(new.expose()).unwrap().is_some());
    clock.advance(1_000);
    assert_eq!(control.known_key(new.expose()), None);
}

pub(crate) fn a_key_made_elsewhere_is_good_at_once_unless_wrong_ones_are_tried_by_the_dozen(stage: &Stage) {
    let ([control, other], clock) = stage.many();
    let is_known = |text: &str| control.check_key(text).unwrap().is_some();
    assert!(!is_known("sk-loquat-0"), "keys are read");
    for n in 0..5 {
        let new = other.create_key(&format!("n{n}"), Role::Use).unwrap();
        assert!(is_known(new.expose()), "the {n}th key made since keys were read");
    }
    // Whoever tries out keys costs no more than ten reads, and the one who has a key waits for a moment.
    for _ in 0..1_000 {
        assert!(!is_known("sk-loquat-0"));
    }
    let new = other.create_key("late", Role::Use).unwrap();
    assert_eq!(control.known_key(new.expose()), Some(None), "nobody is asked any more");
    assert!(!is_known(new.expose()));
    clock.advance(100);
    assert!(is_known(new.expose()));
    clock.advance(900);
    let newer = other.create_key("newer", Role::Use).unwrap();
    assert!(is_known(new.expose()) && is_known(newer.expose()), "after a second all is forgotten");
}
