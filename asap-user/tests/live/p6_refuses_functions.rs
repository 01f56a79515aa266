//! P6: functions that can't be replaced, and text that someone else has changed.

use crate::support::{Fixture, Lab, Snapshot, Source, memory_at};
use std::{fs::OpenOptions, os::unix::fs::FileExt};

fn names() -> Fixture {
    Source::of(&["names_a.c", "names_b.c"]).start(&[])
}

#[test]
fn p6_functions_that_cannot_be_replaced() {
    let Some(lab) = Lab::new("p6_functions_that_cannot_be_replaced") else { return };
    let target = names();
    lab.attach(target.pid());
    let before = Snapshot::of(target.pid());
    let fix = lab.object(
        "int nowhere(int x) { return x; } int victin(int x) { return x; } int helper(int x) { return x; } \
         int tiny(int x) { return x; } int chosen(int x) { return x; } int looping(int x) { return x; } \
         int __vdso_time(int x) { return x; } int victim(int x) { return x; }",
    );
    for (function, words) in [
        ("nowhere", &["nowhere", "no module"][..]),
        ("victin", &["victin", "victim"]),
        ("helper", &["names_a.c", "names_b.c"]),
        ("names_c.c:helper", &["names_c.c"]),
        ("tiny", &["tiny", "short"]),
        ("chosen", &["chosen", "ifunc"]),
        ("looping", &["looping"]),
        ("__vdso_time", &["__vdso_time", "kernel"]),
        ("absent_from_the_patch", &["absent_from_the_patch"]),
        ("sink", &["sink"]),
    ] {
        println!("{function}");
        lab.asap(&["patch", "--function", function, &fix]).refusal(words);
        Snapshot::of(target.pid()).assert_same(&before, function);
    }
    let failed = lab.asap(&["patch", "--function", "victim", "--address", "0x123456789", &fix]);
    failed.refusal(&["0x123456789"]);
    assert!(lab.status().targets[0].patches.is_empty());
    assert_eq!((target.ask("tiny 2"), target.number("loop 5"), target.number("chosen 4")), ("2 9".into(), 5, 5));
    assert_eq!(lab.detach(&[]).clean, Some(true));
}

#[test]
fn p6_text_that_someone_else_has_changed() {
    let Some(lab) = Lab::new("p6_text_that_someone_else_has_changed") else { return };
    let target = Source::of(&["workers.c"]).start(&["0"]);
    let entry = target.number("where") as u64;
    let memory = OpenOptions::new().write(true).open(format!("/proc/{}/mem", target.pid())).expect("it runs");
    let original = memory_at(target.pid(), entry, 1);
    lab.attach(target.pid());
    let fix = lab.object("int victim(int x) { return x + 2; }");
    // A breakpoint, as debuggers write them: at the entry, and further in.
    for offset in [0, 2] {
        let at = entry + offset;
        let original = memory_at(target.pid(), at, 1);
        memory.write_all_at(&[0xcc], at).expect("written");
        let before = Snapshot::of(target.pid());
        lab.asap(&["patch", "--function", "victim", &fix]).refusal(&["victim"]);
        Snapshot::of(target.pid()).assert_same(&before, "the breakpoint is still there");
        memory.write_all_at(&original, at).expect("written");
    }
    assert_eq!(memory_at(target.pid(), entry, 1), original);
    lab.patch(&["--function", "victim", &fix]);
    assert_eq!(target.number("call 1"), 3);
    assert_eq!(lab.detach(&["--revert"]).remaining.len(), 0);
    assert_eq!(target.number("call 1"), 2);
}

#[test]
fn p6_a_jump_that_someone_else_has_changed_is_not_guessed_about() {
    let Some(lab) = Lab::new("p6_a_jump_that_someone_else_has_changed_is_not_guessed_about") else { return };
    let target = Source::of(&["workers.c"]).start(&["0"]);
    let entry = target.number("where") as u64;
    lab.attach(target.pid());
    let fix = lab.object("int victim(int x) { return x + 2; }");
    lab.patch(&["--function", "victim", &fix]);
    let ours = memory_at(target.pid(), entry, 5);
    let memory = OpenOptions::new().write(true).open(format!("/proc/{}/mem", target.pid())).expect("it runs");
    memory.write_all_at(&[0xcc], entry).expect("written");
    // A second patch of the function must not build upon a foreign breakpoint.
    let failure = lab.asap(&["patch", "--function", "victim", &fix]).failure();
    assert_eq!(failure.kind.exit_code(), 1);
    assert_eq!(memory_at(target.pid(), entry, 1), [0xcc]);
    memory.write_all_at(&ours[..1], entry).expect("written");
    assert_eq!(target.number("call 1"), 3);
    lab.detach(&["--revert"]);
    assert_eq!(target.number("call 1"), 2);
}
