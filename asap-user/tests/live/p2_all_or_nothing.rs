//! P2: several functions, several processes: one transaction. What does not fit in one place goes in nowhere.

use crate::support::{Lab, Snapshot, Source};
use asap::report::{FailureKind, TargetState};

#[test]
fn p2_one_function_that_does_not_fit_keeps_the_others_out() {
    let Some(lab) = Lab::new("p2_one_function_that_does_not_fit_keeps_the_others_out") else { return };
    let target = Source::of(&["names_a.c", "names_b.c"]).start(&[]);
    lab.attach(target.pid());
    let before = Snapshot::of(target.pid());
    let fix = lab.object(
        "int victim(int x) { return x + 50; } int only_here(int x) { return x; } \
         int tiny(int x) { return x; } int nowhere(int x) { return x; }",
    );
    for bad in ["nowhere", "tiny"] {
        let refused = lab.asap(&["patch", "--function", "victim", "--function", bad, "--function", "only_here", &fix]);
        refused.refusal(&[bad]);
        assert_eq!((target.number("call 5"), target.number("only 3")), (6, 24), "{bad}");
        Snapshot::of(target.pid()).assert_same(&before, bad);
        assert!(lab.status().targets[0].patches.is_empty(), "{bad}");
    }
    lab.asap(&["patch", "--function", "victim", "--function", "victim", &fix]).refusal(&["twice"]);
    lab.patch(&["--function", "victim", "--function", "only_here", &fix]);
    assert_eq!((target.number("call 5"), target.number("only 3")), (55, 3));
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
}

#[test]
fn p2_one_busy_function_keeps_the_others_out() {
    let Some(lab) = Lab::new("p2_one_busy_function_keeps_the_others_out") else { return };
    let target = Source::of(&["inside.c"]).start(&[]);
    target.ask("pipe");
    lab.attach(target.pid());
    let before = Snapshot::of(target.pid());
    let fix = lab.object(
        "int victim(int x, int how, int depth) { (void)how; (void)depth; return x + 2; } \
         int next_line(char *line, unsigned long room) { (void)line; (void)room; return 0; } \
         int below(int how) { return how; }",
    );
    let both = ["patch", "--function", "victim", "--function", "below", "--timeout", "300ms", &fix];
    let failure = lab.asap(&both).failure();
    assert_eq!((failure.kind, failure.state), (FailureKind::Timeout, TargetState::Untouched), "{failure:?}");
    Snapshot::of(target.pid()).assert_same(&before, "timed out");
    assert_eq!(target.numbers("leave"), [11]);
}

#[test]
fn p2_one_busy_process_keeps_the_patch_out_of_all() {
    let Some(lab) = Lab::new("p2_one_busy_process_keeps_the_patch_out_of_all") else { return };
    // The child's first caller is a thread of its own that can't be reached from outside: the child waits in victim().
    let target = Source::of(&["relatives.c"]).start(&["3"]);
    lab.attach(target.pid());
    assert_eq!(lab.status().targets[0].processes.len(), 4);
    let fix = lab.object("int victim(int x, int wait) { (void)wait; return x + 2; }");
    assert_eq!(target.numbers("children"), [11, 11, 11]);
    target.ask("busy 2");
    let failure = lab.asap(&["patch", "--function", "victim", "--timeout", "500ms", &fix]).failure();
    assert_eq!(failure.kind, FailureKind::Timeout, "{failure:?}");
    assert!(matches!(failure.state, TargetState::RolledBack | TargetState::Untouched), "{failure:?}");
    let busy = target.number("pid 2");
    assert_eq!(failure.busy.iter().map(|thread| i64::from(thread.pid)).collect::<Vec<_>>(), [busy]);
    assert_eq!(target.number("call 10"), 11);
    assert_eq!(target.numbers("free 2"), [11]);
    assert_eq!(target.numbers("children"), [11, 11, 11]);
    for process in &lab.status().targets[0].processes {
        assert!(process.patches.is_empty(), "{process:?}");
    }
    let report = lab.patch(&["--function", "victim", &fix]);
    assert_eq!(report.processes.len(), 4);
    assert_eq!((target.number("call 10"), target.numbers("children")), (12, vec![12, 12, 12]));
    let reverted = lab.detach(&["--revert"]);
    assert_eq!((reverted.reverted.len(), reverted.clean), (1, Some(true)));
    assert_eq!((target.number("call 10"), target.numbers("children")), (11, vec![11, 11, 11]));
}
