//! The target exits, runs another program, or forks while a patch waits to go in.

use crate::support::{Fixture, Lab, Source, lab_answer, runs, wait_until};
use asap::report::TargetState;
use std::{process::Child, time::Duration};

/// A target with a thread inside the function, and a patch that waits for it.
fn waiting(lab: &Lab) -> (Fixture, Child) {
    let target = Source::of(&["inside.c"]).start(&[]);
    target.ask("pipe");
    lab.attach(target.pid());
    let fix = lab.object("int victim(int x, int how, int depth) { (void)how; (void)depth; return x + 2; }");
    let patching = lab.start(&["patch", "--function", "victim", "--timeout", "60s", &fix]);
    std::thread::sleep(Duration::from_millis(300));
    assert!(runs(patching.id() as i32), "it waits");
    (target, patching)
}

/// The agent lives, and cares for nobody.
fn assert_agent_is_free(lab: &Lab, agent: i32) {
    wait_until("the agent has let go", || lab.status().targets.is_empty());
    assert_eq!(lab.agent(), agent);
    let other = Source::of(&["inside.c"]).start(&[]);
    lab.attach(other.pid());
    assert_eq!(lab.detach(&[]).clean, Some(true), "and can be used");
}

#[test]
fn the_target_exits_while_a_patch_waits() {
    let Some(lab) = Lab::new("the_target_exits_while_a_patch_waits") else { return };
    let (target, patching) = waiting(&lab);
    let agent = lab.agent();
    target.tell("exit 0");
    let failure = lab_answer(patching).failure();
    assert_eq!((failure.kind.exit_code(), failure.state), (1, TargetState::Gone), "{failure:?}");
    assert_agent_is_free(&lab, agent);
    wait_until("it has ended", || !runs(target.pid()));
}

#[test]
fn the_target_is_killed_while_a_patch_waits() {
    let Some(lab) = Lab::new("the_target_is_killed_while_a_patch_waits") else { return };
    let (target, patching) = waiting(&lab);
    let agent = lab.agent();
    target.kill();
    let failure = lab_answer(patching).failure();
    assert_eq!((failure.kind.exit_code(), failure.state), (1, TargetState::Gone), "{failure:?}");
    assert_agent_is_free(&lab, agent);
}

#[test]
fn the_target_runs_another_program_while_a_patch_waits() {
    let Some(lab) = Lab::new("the_target_runs_another_program_while_a_patch_waits") else { return };
    let (target, patching) = waiting(&lab);
    let agent = lab.agent();
    target.tell("exec");
    assert_eq!(target.line(), "ready", "the new program runs");
    let failure = lab_answer(patching).failure();
    assert_eq!(failure.kind.exit_code(), 1, "{failure:?}");
    assert_eq!(target.number("call 1"), 2);
    assert_eq!(lab.agent(), agent);
    // What has the pid now is a fresh process, which can be attached.
    wait_until("the agent has let go of what was", || lab.status().targets.is_empty());
    lab.attach(target.pid());
    let fix = lab.object("int victim(int x, int how, int depth) { (void)how; (void)depth; return x + 2; }");
    lab.patch(&["--function", "victim", &fix]);
    assert_eq!(target.number("call 1"), 3);
    lab.detach(&["--revert"]);
    assert_eq!(target.number("call 1"), 2);
}

#[test]
fn a_patched_target_runs_another_program() {
    let Some(lab) = Lab::new("a_patched_target_runs_another_program") else { return };
    let target = Source::of(&["inside.c"]).start(&[]);
    lab.attach(target.pid());
    let agent = lab.agent();
    let fix = lab.object("int victim(int x, int how, int depth) { (void)how; (void)depth; return x + 2; }");
    lab.patch(&["--function", "victim", &fix]);
    assert_eq!(target.number("call 1"), 3);
    target.tell("exec");
    assert_eq!(target.line(), "ready");
    assert_eq!(target.number("call 1"), 2, "a new program starts unpatched");
    wait_until("the agent has let go of what was", || lab.status().targets.is_empty());
    assert_eq!(lab.agent(), agent);
}

#[test]
fn the_target_forks_while_a_patch_waits() {
    let Some(lab) = Lab::new("the_target_forks_while_a_patch_waits") else { return };
    let (target, patching) = waiting(&lab);
    let child: i32 = target.ask("fork").parse().expect("a pid");
    wait_until("the child runs", || runs(child));
    // Its only thread is outside; the parent's visitor is still inside.
    let waits = runs(patching.id() as i32);
    assert!(waits);
    // The next line is the child's, which then ends; it was not patched yet.
    assert_eq!(target.number("call 1"), 2);
    wait_until("the child ends", || !runs(child));
    assert_eq!(target.numbers("leave"), [11]);
    lab_answer(patching).reply();
    let child: i32 = target.ask("fork").parse().expect("a pid");
    assert_eq!(target.number("call 1"), 3, "the child {child} was born patched");
    assert_eq!(target.number("call 1"), 3);
    lab.detach(&["--revert"]);
    assert_eq!(target.number("call 1"), 2);
}
