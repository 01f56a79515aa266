//! Whoever asked for a patch and no longer wants it gets rid of it while it waits: by an interrupt, by going away, by ending
//! the agent. It is then in no process, the audit log says so, and the agent goes on.

use crate::support::{Fixture, Lab, Snapshot, Source, kill, lab_answer, runs, wait_until};
use asap::report::{Failure, FailureKind, TargetState};
use nix::{
    sys::signal::{Signal, kill as send},
    unistd::Pid,
};
use std::process::Child;

const FIX: &str = "int victim(int x, int how, int depth) { (void)how; (void)depth; return x + 2; }";

/// Waits until the agent is at work for somebody.
fn wait_until_busy(lab: &Lab) {
    wait_until("the agent works at the request", || {
        lab.status().targets.iter().any(|target| target.notes.iter().any(|note| note.contains("work at")))
    });
}

/// What the log says of the last request.
fn last_result(lab: &Lab) -> (String, String) {
    let text = std::fs::read_to_string(lab.path("log/audit.jsonl")).expect("a log");
    let record: serde_json::Value = serde_json::from_str(text.lines().last().expect("a record")).expect("JSON");
    let field = |name: &str| record[name].as_str().unwrap_or_default().to_owned();
    (field("result"), field("message"))
}

fn terminate(client: &Child) {
    send(Pid::from_raw(client.id() as i32), Signal::SIGTERM).expect("it runs");
}

fn assert_cancelled(failure: &Failure, state: TargetState) {
    assert_eq!((failure.kind, failure.state), (FailureKind::Cancelled, state), "{failure:?}");
    assert_eq!(failure.kind.exit_code(), 1);
}

/// A target with a thread inside the function, attached.
fn busy_target(lab: &Lab) -> Fixture {
    let target = Source::of(&["inside.c"]).start(&[]);
    target.ask("pipe");
    lab.attach(target.pid());
    target
}

#[test]
fn an_interrupted_patch_that_waits_is_given_up() {
    let Some(lab) = Lab::new("an_interrupted_patch_that_waits_is_given_up") else { return };
    let target = busy_target(&lab);
    let (agent, before) = (lab.agent(), Snapshot::of(target.pid()));
    let fix = lab.object(FIX);
    let client = lab.start(&["patch", "--function", "victim", "--timeout", "1h", &fix]);
    wait_until_busy(&lab);
    terminate(&client);
    let answer = lab_answer(client);
    assert_cancelled(&answer.failure(), TargetState::Untouched);
    assert!(answer.errors.contains("interrupted"), "{answer:?}");
    let (result, message) = last_result(&lab);
    assert_eq!(result, "cancelled");
    assert!(message.contains("client"), "{message}");
    Snapshot::of(target.pid()).assert_same(&before, "cancelled");
    assert_eq!((target.number("call 1"), target.numbers("leave")), (2, vec![11]));
    lab.patch(&["--function", "victim", &fix]);
    assert_eq!(target.number("call 1"), 3, "the next request is another");
    assert_eq!(lab.agent(), agent);
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
}

#[test]
fn a_client_that_dies_takes_its_waiting_patch_with_it() {
    let Some(lab) = Lab::new("a_client_that_dies_takes_its_waiting_patch_with_it") else { return };
    let target = busy_target(&lab);
    let before = Snapshot::of(target.pid());
    let mut client = lab.start(&["patch", "--function", "victim", "--timeout", "1h", &lab.object(FIX)]);
    wait_until_busy(&lab);
    kill(client.id() as i32);
    client.wait().expect("a child of this program");
    wait_until("the log says so", || last_result(&lab).0 == "cancelled");
    Snapshot::of(target.pid()).assert_same(&before, "cancelled");
    assert_eq!((target.number("call 1"), target.numbers("leave")), (2, vec![11]));
    assert_eq!(lab.detach(&[]).clean, Some(true));
}

#[test]
fn a_cancelled_patch_is_taken_out_of_the_processes_that_have_it() {
    let Some(lab) = Lab::new("a_cancelled_patch_is_taken_out_of_the_processes_that_have_it") else { return };
    let target = Source::of(&["relatives.c"]).start(&["2"]);
    lab.attach(target.pid());
    let fix = lab.object("int victim(int x, int wait) { (void)wait; return x + 2; }");
    target.ask("busy 1");
    let client = lab.start(&["patch", "--function", "victim", "--timeout", "1h", &fix]);
    wait_until("the parent is patched, and waits for its child to be", || target.number("call 10") == 12);
    terminate(&client);
    assert_cancelled(&lab_answer(client).failure(), TargetState::RolledBack);
    assert_eq!(target.number("call 10"), 11, "all or nothing");
    assert!(lab.status().targets[0].patches.is_empty());
    assert_eq!(target.numbers("free 1"), [11]);
    assert_eq!(target.numbers("children"), [11, 11]);
    assert_eq!(lab.detach(&[]).clean, Some(true));
}

#[test]
fn a_cancelled_revert_leaves_the_patch_in() {
    let Some(lab) = Lab::new("a_cancelled_revert_leaves_the_patch_in") else { return };
    let target = Source::of(&["inside.c"]).start(&[]);
    lab.attach(target.pid());
    let fix = "int below(int); int victim(int x, int how, int depth) { (void)depth; return x + 2 + below(how); }";
    lab.patch(&["--function", "victim", &lab.object(fix)]);
    target.ask("pipe");
    for command in [&["revert", "--timeout", "1h"][..], &["detach", "--revert", "--timeout", "1h"]] {
        let client = lab.start(command);
        wait_until_busy(&lab);
        terminate(&client);
        assert_cancelled(&lab_answer(client).failure(), TargetState::Untouched);
        assert_eq!(target.number("call 1"), 3, "{command:?}");
        assert_eq!(lab.status().targets[0].patches.len(), 1, "{command:?}");
    }
    assert_eq!(target.numbers("leave"), [12]);
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
    assert_eq!(target.number("call 1"), 2);
}

#[test]
fn an_agent_that_is_told_to_end_gives_up_what_waits() {
    let Some(lab) = Lab::new("an_agent_that_is_told_to_end_gives_up_what_waits") else { return };
    let target = busy_target(&lab);
    let agent = lab.agent();
    let client = lab.start(&["patch", "--function", "victim", "--timeout", "1h", &lab.object(FIX)]);
    wait_until_busy(&lab);
    send(Pid::from_raw(agent), Signal::SIGTERM).expect("it runs");
    let failure = lab_answer(client).failure();
    assert_cancelled(&failure, TargetState::Untouched);
    assert!(failure.message.contains("told to end"), "{failure:?}");
    wait_until("the agent ends", || !runs(agent));
    assert_eq!((target.number("call 1"), target.numbers("leave")), (2, vec![11]));
}
