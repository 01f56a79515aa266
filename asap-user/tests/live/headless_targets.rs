//! The first thread of the target has ended before the others (pthread_exit in `main`): the process is still there, although
//! `/proc/PID` shows neither its memory nor its executable any more.

use crate::support::{Fixture, Lab, Snapshot, Source, lab_answer, runs, wait_until};
use asap::report::FailureKind;

const FIX: &str = "int victim(int x, int how, int depth) { (void)how; (void)depth; return x + 2; }";

/// Has the first thread end; gives a thread that lives.
fn end_first_thread(target: &Fixture) -> i32 {
    target.tell("headless");
    let thread = target.number("thread");
    let state = || std::fs::read_to_string(format!("/proc/{}/stat", target.pid())).unwrap_or_default();
    wait_until("the first thread ends", || state().contains(") Z "));
    i32::try_from(thread).expect("a thread id")
}

#[test]
fn a_process_whose_first_thread_has_ended() {
    let Some(lab) = Lab::new("a_process_whose_first_thread_has_ended") else { return };
    let target = Source::of(&["inside.c"]).start(&[]);
    let thread = end_first_thread(&target);
    assert_eq!(target.number("call 1"), 2);
    let before = Snapshot::of(thread);
    let attached = lab.attach(target.pid());
    assert!(attached.target.executable.contains("inside"), "{attached:?}");
    let fix = lab.object(FIX);
    lab.patch(&["--function", "victim", &fix]);
    assert_eq!(target.number("call 1"), 3);
    let targets = lab.status().targets;
    assert_eq!((targets.len(), targets[0].processes.len(), targets[0].patches.len()), (1, 1, 1), "{targets:?}");
    // Who is inside is seen, and named.
    lab.revert(&[]);
    assert_eq!(target.ask("pipe"), "entered");
    let failure = lab.asap(&["patch", "--function", "victim", "--timeout", "500ms", &fix]).failure();
    assert_eq!((failure.kind, failure.busy.len()), (FailureKind::Timeout, 1), "{failure:?}");
    assert_eq!(failure.busy[0].name, "visitor");
    assert_eq!(target.numbers("leave"), [11]);
    // An agent that comes later takes over what a dead one left.
    lab.patch(&["--function", "victim", &fix]);
    lab.kill_agent();
    assert_eq!(target.number("call 1"), 3);
    assert!(lab.attach(target.pid()).adopted);
    let left = lab.detach(&["--revert"]);
    assert_eq!((left.reverted.len(), left.remaining.len()), (1, 0));
    assert_eq!(target.number("call 1"), 2);
    let after = Snapshot::of(thread);
    // A thread came and went: the C library keeps its stack.
    assert_eq!(before.missing_text(&after), Vec::<String>::new());
    after.assert_same_but_for_text_and_maps(&before, "after detach");
    target.tell("exit 0");
    wait_until("it ends", || !runs(target.pid()));
}

#[test]
fn the_first_thread_ends_while_a_patch_waits() {
    let Some(lab) = Lab::new("the_first_thread_ends_while_a_patch_waits") else { return };
    let target = Source::of(&["inside.c"]).start(&[]);
    assert_eq!(target.ask("pipe"), "entered");
    lab.attach(target.pid());
    let patching = lab.start(&["patch", "--function", "victim", "--timeout", "60s", &lab.object(FIX)]);
    std::thread::sleep(std::time::Duration::from_millis(300));
    end_first_thread(&target);
    assert_eq!(target.numbers("leave"), [11]);
    lab_answer(patching).reply();
    assert_eq!(target.number("call 1"), 3);
    // Its children are found and taken into care.
    let child: i32 = target.ask("fork").parse().expect("a pid");
    wait_until("the child is in care", || lab.status().targets[0].processes.iter().any(|p| p.pid == child));
    assert_eq!(target.number("call 1"), 3, "the child's answer");
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
    assert_eq!(target.number("call 1"), 2);
}

#[test]
fn a_process_without_its_first_thread_runs_another_program() {
    let Some(lab) = Lab::new("a_process_without_its_first_thread_runs_another_program") else { return };
    let target = Source::of(&["inside.c"]).start(&[]);
    end_first_thread(&target);
    lab.attach(target.pid());
    lab.patch(&["--function", "victim", &lab.object(FIX)]);
    assert_eq!(target.number("call 1"), 3);
    target.tell("exec");
    assert_eq!(target.line(), "ready");
    assert_eq!(target.number("call 1"), 2, "a new program starts unpatched");
    wait_until("the agent has let go of what was", || lab.status().targets.is_empty());
}
