//! `--dry-run`: says what would happen and whether it could, and changes nothing.

use crate::support::{Lab, Snapshot, Source};

#[test]
fn a_dry_run_changes_nothing() {
    let Some(lab) = Lab::new("a_dry_run_changes_nothing") else { return };
    let target = Source::of(&["workers.c"]).start(&["2"]);
    lab.attach(target.pid());
    let before = Snapshot::of(target.pid());
    let fix =
        lab.object("static int calls; int victim(int x) { calls++; return x + 2; } int tiny(int x) { return x; }");
    let report = lab.patch(&["--dry-run", "--function", "victim", &fix]);
    assert!(report.dry_run);
    assert_eq!(report.patch.functions[0].old.0 as i64, target.number("where"));
    Snapshot::of(target.pid()).assert_same(&before, "after a dry run");
    assert_eq!(target.number("call 1"), 2);
    assert!(lab.status().targets[0].patches.is_empty());
    lab.asap(&["patch", "--dry-run", "--function", "nowhere", &fix]).refusal(&["nowhere"]);
    lab.asap(&["check", "--pid", &target.pid_text(), "--function", "nowhere", &fix]).refusal(&["nowhere"]);
    assert_eq!(lab.asap(&["check", "--function", "victim", &fix]).code, 0);
    Snapshot::of(target.pid()).assert_same(&before, "after checks");
    assert_eq!(target.numbers("counts")[1..], [0, 0, 0]);
    assert_eq!(lab.detach(&[]).clean, Some(true));
}

#[test]
fn a_dry_run_tells_of_threads_inside() {
    let Some(lab) = Lab::new("a_dry_run_tells_of_threads_inside") else { return };
    let target = Source::of(&["inside.c"]).start(&[]);
    target.ask("futex");
    lab.attach(target.pid());
    let before = Snapshot::of(target.pid());
    let fix = lab.object("int victim(int x, int how, int depth) { (void)how; (void)depth; return x + 2; }");
    let report = lab.patch(&["--dry-run", "--function", "victim", &fix]);
    assert!(report.processes[0].quiescence.contains("1 thread"), "{report:?}");
    Snapshot::of(target.pid()).assert_same(&before, "after a dry run");
    assert_eq!(target.numbers("leave"), [11]);
}
