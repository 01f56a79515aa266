//! P3: new code goes in only when no thread is inside the old, however it sleeps there; unless the user wants it at once.

use crate::support::{Fixture, Lab, Snapshot, Source, lab_answer, runs};
use asap::report::{Failure, FailureKind, TargetState};

fn inside() -> Fixture {
    Source::of(&["inside.c"]).start(&[])
}

const FIX: &str = "int victim(int x, int how, int depth) { (void)how; (void)depth; return x + 2; }";

/// The thread of the fixture that visits victim().
fn visitor(pid: i32) -> i32 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it runs").flatten();
    let mut names = tasks.filter_map(|task| {
        let name = std::fs::read_to_string(task.path().join("comm")).ok()?;
        (name.trim() == "visitor").then(|| task.file_name().to_string_lossy().parse().expect("a tid"))
    });
    names.next().expect("a visitor")
}

fn assert_names_the_visitor(failure: &Failure, pid: i32, how: &str) {
    assert_eq!((failure.kind, failure.kind.exit_code()), (FailureKind::Timeout, 4), "{how}: {failure:?}");
    assert_eq!(failure.state, TargetState::Untouched, "{how}: {failure:?}");
    assert!(failure.message.contains("victim"), "{how}: {failure:?}");
    assert!(failure.way_out.contains("--consistency lazy"), "{how}: {failure:?}");
    assert_eq!(failure.busy.len(), 1, "{how}: {failure:?}");
    let busy = &failure.busy[0];
    assert_eq!((busy.pid, busy.tid, busy.name.as_str()), (pid, visitor(pid), "visitor"), "{how}");
    assert_eq!(busy.inside, "victim", "{how}");
    assert!(busy.stack.iter().any(|frame| frame.starts_with("victim+")), "{how}: {busy:?}");
    assert!(busy.stack.iter().any(|frame| frame.starts_with("below+")), "{how}: {busy:?}");
}

#[test]
fn p3_a_busy_function_times_out_and_names_who_is_inside() {
    let Some(lab) = Lab::new("p3_a_busy_function_times_out_and_names_who_is_inside") else { return };
    for how in ["pipe", "futex", "spin", "pipe 10", "futex 3000"] {
        let target = inside();
        target.ask(how);
        lab.attach(target.pid());
        let before = Snapshot::of(target.pid());
        let fix = lab.object(FIX);
        let failure = lab.asap(&["patch", "--function", "victim", "--timeout", "300ms", &fix]).failure();
        assert_names_the_visitor(&failure, target.pid(), how);
        Snapshot::of(target.pid()).assert_same(&before, how);
        assert_eq!(target.number("call 1"), 2, "{how}");
        assert!(lab.status().targets[0].patches.is_empty(), "{how}");
        assert_eq!(target.numbers("leave"), [11], "{how}");
        lab.patch(&["--function", "victim", &fix]);
        assert_eq!(target.number("call 1"), 3, "{how}");
        assert_eq!(lab.detach(&["--revert"]).clean, Some(true), "{how}");
    }
}

#[test]
fn p3_lazy_goes_in_at_once_and_old_calls_end_in_old_code() {
    let Some(lab) = Lab::new("p3_lazy_goes_in_at_once_and_old_calls_end_in_old_code") else { return };
    for how in ["pipe", "futex", "spin", "pipe 10"] {
        let target = inside();
        target.ask(how);
        lab.attach(target.pid());
        let fix = lab.object(FIX);
        lab.patch(&["--function", "victim", "--consistency", "lazy", &fix]);
        assert_eq!(target.number("call 1"), 3, "{how}");
        assert_eq!(target.numbers("leave"), [11], "{how}: the old activation ended in old code");
        assert_eq!(target.number("call 1"), 3, "{how}");
        lab.revert(&[]);
        assert_eq!(target.number("call 1"), 2, "{how}");
        assert_eq!(lab.detach(&[]).clean, Some(true), "{how}");
    }
}

#[test]
fn p3_a_thread_that_leaves_in_time_lets_the_patch_in() {
    let Some(lab) = Lab::new("p3_a_thread_that_leaves_in_time_lets_the_patch_in") else { return };
    for how in ["pipe", "futex", "spin", "pipe 200"] {
        let target = inside();
        target.ask(how);
        lab.attach(target.pid());
        let fix = lab.object(FIX);
        let patching = lab.start(&["patch", "--function", "victim", "--timeout", "60s", &fix]);
        std::thread::sleep(std::time::Duration::from_millis(400));
        assert!(runs(patching.id() as i32), "{how}: it waits");
        assert_eq!(target.number("call 1"), 2, "{how}: the function can be called meanwhile, and is the old one");
        assert_eq!(target.numbers("leave"), [11], "{how}");
        lab_answer(patching).reply();
        assert_eq!(target.number("call 1"), 3, "{how}");
        assert_eq!(lab.detach(&["--revert"]).clean, Some(true), "{how}");
    }
}

#[test]
fn p3_revert_waits_for_threads_inside_the_new_code() {
    let Some(lab) = Lab::new("p3_revert_waits_for_threads_inside_the_new_code") else { return };
    let target = inside();
    lab.attach(target.pid());
    // The new function sleeps below itself as the old one did.
    let fix = "int below(int); int victim(int x, int how, int depth) { (void)depth; return x + 2 + below(how); }";
    let patch = lab.patch(&["--function", "victim", &lab.object(fix)]).patch;
    target.ask("pipe");
    let failure = lab.asap(&["revert", "--timeout", "300ms"]).failure();
    assert_eq!(failure.kind, FailureKind::Timeout);
    assert_eq!(failure.busy.iter().map(|thread| thread.tid).collect::<Vec<_>>(), [visitor(target.pid())]);
    assert_eq!(target.number("call 1"), 3, "the patch stays");
    assert_eq!(lab.status().targets[0].patches[0].id, patch.id);
    let failure = lab.asap(&["detach", "--revert", "--timeout", "300ms"]).failure();
    assert_eq!(failure.kind, FailureKind::Timeout);
    assert_eq!(lab.status().targets.len(), 1, "still attached");
    assert_eq!(target.numbers("leave"), [12]);
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
    assert_eq!(target.number("call 1"), 2);
}

#[test]
fn p3_a_lazy_revert_keeps_the_code_that_is_still_in_use() {
    let Some(lab) = Lab::new("p3_a_lazy_revert_keeps_the_code_that_is_still_in_use") else { return };
    let target = inside();
    lab.attach(target.pid());
    let fix = "int below(int); int victim(int x, int how, int depth) { (void)depth; return x + 2 + below(how); }";
    lab.patch(&["--function", "victim", &lab.object(fix)]);
    target.ask("pipe");
    lab.revert(&["--consistency", "lazy"]);
    assert_eq!(target.number("call 1"), 2);
    assert_eq!(target.numbers("leave"), [12], "the activation of the patch ended in it");
    lab.detach(&[]);
    assert_eq!(target.number("call 1"), 2);
}
