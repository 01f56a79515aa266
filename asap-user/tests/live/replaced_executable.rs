//! The executable was replaced on disk since the process was started (as package managers do): symbols come from the file that is
//! mapped, not from the one that has its name now.

use crate::support::{Fixture, Lab, Snapshot, Source};
use std::{fs, process::Command};

#[test]
fn a_replaced_executable_is_patched_by_what_is_mapped() {
    let Some(lab) = Lab::new("a_replaced_executable_is_patched_by_what_is_mapped") else { return };
    let program = lab.path("server");
    fs::copy(Source::of(&["names_a.c", "names_b.c"]).build(), &program).expect("copied");
    let target = Fixture::start(&mut Command::new(&program));
    let before_map = Snapshot::of(target.pid());
    // Another program under the same name, with another victim() at another place.
    let other = lab.path("server.new");
    fs::copy(Source::of(&["workers.c"]).build(), &other).expect("copied");
    fs::rename(&other, &program).expect("replaced");
    let attached = lab.attach(target.pid());
    assert!(attached.target.notes.iter().any(|note| note.contains("replaced")), "{attached:?}");
    let fix = lab.object("int victim(int x) { return x + 50; }");
    lab.patch(&["--function", "victim", &fix]);
    assert_eq!((target.number("call 5"), target.number("pointer 5")), (55, 55));
    let ours = lab.object("int helper(int x) { return x * 2; }");
    lab.patch(&["--function", "names_b.c:helper", &ours]);
    assert_eq!(target.numbers("helpers 5"), [6, 10]);
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
    assert_eq!((target.number("call 5"), target.numbers("helpers 5")), (6, vec![6, 4]));
    // The file's name has had "(deleted)" behind it since it was replaced.
    let after = Snapshot::of(target.pid());
    assert_eq!(after.ranges(), before_map.ranges());
}

#[test]
fn a_deleted_executable_is_patched() {
    let Some(lab) = Lab::new("a_deleted_executable_is_patched") else { return };
    let program = lab.path("server");
    fs::copy(Source::of(&["workers.c"]).build(), &program).expect("copied");
    let target = Fixture::start(Command::new(&program).arg("2"));
    fs::remove_file(&program).expect("deleted");
    let before = Snapshot::of(target.pid());
    lab.attach(target.pid());
    lab.patch(&["--function", "victim", &lab.object("int victim(int x) { return x + 2; }")]);
    assert_eq!(target.number("call 5"), 7);
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
    assert_eq!(target.number("call 5"), 6);
    Snapshot::of(target.pid()).assert_same(&before, "after detach");
}
