//! Targets that are hard to come near to: other users, no dumps, seccomp, locked memory, other namespaces.

use crate::support::{Fixture, Lab, Snapshot, Source, is_stopped, runs, wait_until};
use std::process::Command;

fn confined(arguments: &[&str]) -> Fixture {
    Source::of(&["confined.c"]).start(arguments)
}

/// Attaches, patches, reverts, leaves; nothing remains.
fn assert_can_be_patched(lab: &Lab, target: &Fixture, pid: i32, what: &str) {
    let before = Snapshot::of(pid);
    lab.attach(pid);
    let fix = lab.object("static int calls; int victim(int x) { calls++; return x + 2; }");
    lab.patch(&["--function", "victim", &fix]);
    assert_eq!(target.number("call 1"), 3, "{what}");
    lab.revert(&[]);
    assert_eq!(target.number("call 1"), 2, "{what}");
    lab.patch(&["--function", "victim", &fix]);
    lab.detach(&[]);
    assert_eq!(target.number("call 1"), 3, "{what}");
    lab.attach(pid);
    assert_eq!(lab.detach(&["--revert"]).remaining.len(), 0, "{what}");
    assert_eq!(target.number("call 1"), 2, "{what}");
    Snapshot::of(pid).assert_same(&before, what);
}

#[test]
fn a_process_of_another_user() {
    let Some(lab) = Lab::new("a_process_of_another_user") else { return };
    let target = confined(&["uid=65534"]);
    assert_can_be_patched(&lab, &target, target.pid(), "another user's");
}

#[test]
fn a_process_that_is_not_dumpable() {
    let Some(lab) = Lab::new("a_process_that_is_not_dumpable") else { return };
    let target = confined(&["uid=65534", "dumpable"]);
    assert_can_be_patched(&lab, &target, target.pid(), "not dumpable");
}

#[test]
fn a_process_that_seccomp_kills_for_what_a_helper_does() {
    let Some(lab) = Lab::new("a_process_that_seccomp_kills_for_what_a_helper_does") else { return };
    let target = confined(&["seccomp"]);
    assert_can_be_patched(&lab, &target, target.pid(), "seccomp");
    let target = confined(&["uid=65534", "dumpable", "seccomp"]);
    assert_can_be_patched(&lab, &target, target.pid(), "all of it");
}

#[test]
fn a_process_with_locked_memory() {
    let Some(lab) = Lab::new("a_process_with_locked_memory") else { return };
    let target = confined(&["locked"]);
    let locked = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", target.pid())).expect("it runs");
        status.lines().find(|line| line.starts_with("VmLck:")).expect("a line").to_owned()
    };
    // Mappings of code that are locked.
    let code = || {
        let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", target.pid())).expect("it runs");
        let flags = smaps.lines().filter(|line| line.starts_with("VmFlags:") && line.contains(" ex "));
        flags.filter(|line| line.contains(" lo")).count()
    };
    let (before, locked_code) = (locked(), code());
    assert!(!before.contains(" 0 kB") && locked_code > 0, "{before}");
    assert_can_be_patched(&lab, &target, target.pid(), "locked");
    assert_eq!((locked(), code()), (before, locked_code), "it is locked as it was");
}

#[test]
fn a_stopped_process_stays_stopped() {
    use nix::{sys::signal, unistd::Pid};
    let Some(lab) = Lab::new("a_stopped_process_stays_stopped") else { return };
    let target = Source::of(&["workers.c"]).start(&["2"]);
    let pid = Pid::from_raw(target.pid());
    signal::kill(pid, signal::SIGSTOP).expect("it runs");
    wait_until("it is stopped", || is_stopped(target.pid()));
    let before = Snapshot::of(target.pid());
    lab.attach(target.pid());
    let fix = lab.object("int victim(int x) { return x + 2; }");
    let patch = lab.asap(&["patch", "--function", "victim", "--timeout", "2s", &fix]);
    assert!(is_stopped(target.pid()), "attach and patch left it stopped");
    // Its workers may have been stopped inside; then it is told so, and nothing has changed.
    if patch.code != 0 {
        assert_eq!(patch.failure().kind, asap::report::FailureKind::Timeout);
        lab.patch(&["--function", "victim", "--consistency", "lazy", &fix]);
    }
    assert!(is_stopped(target.pid()));
    signal::kill(pid, signal::SIGCONT).expect("it is there");
    assert_eq!(target.number("call 1"), 3);
    assert_eq!(lab.detach(&["--revert"]).remaining.len(), 0);
    assert_eq!((target.number("call 1"), target.numbers("counts")[3]), (2, 0));
    Snapshot::of(target.pid()).assert_same(&before, "after detach");
}

#[test]
fn a_process_without_room_near_its_code() {
    let Some(lab) = Lab::new("a_process_without_room_near_its_code") else { return };
    let target = confined(&["crowded"]);
    let before = Snapshot::of(target.pid());
    lab.attach(target.pid());
    let attached = Snapshot::of(target.pid());
    let fix = lab.object("int victim(int x) { return x + 2; }");
    lab.asap(&["patch", "--function", "victim", &fix]).refusal(&["address space", "2 GiB"]);
    Snapshot::of(target.pid()).assert_same(&attached, "refused");
    assert_eq!(target.number("call 1"), 2);
    assert_eq!(lab.detach(&[]).clean, Some(true));
    Snapshot::of(target.pid()).assert_same(&before, "after detach");
}

#[test]
fn a_process_in_other_namespaces() {
    let Some(lab) = Lab::new("a_process_in_other_namespaces") else { return };
    // Its own pids, its own view of /tmp: the executable's path means nothing here.
    let program = lab.path("inside");
    std::fs::create_dir(&program).expect("made");
    let program = program.join("confined");
    std::fs::copy(Source::of(&["confined.c"]).build(), &program).expect("copied");
    let script = format!("mount -t tmpfs none {0} && exec \"$0\"", lab.path("hidden").display());
    std::fs::create_dir(lab.path("hidden")).expect("made");
    let inner = lab.path("hidden").join("confined");
    let script = script.replace("exec \"$0\"", &format!("cp {0} {1} && exec {1}", program.display(), inner.display()));
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", &script]);
    let target = Fixture::start(&mut command);
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", target.pid())).expect("it runs");
    let pid: i32 = children.trim().parse().expect("one child");
    assert!(!inner.exists(), "the executable is visible in its own namespace only");
    // Process 1 of its namespace, not of this system.
    assert_can_be_patched(&lab, &target, pid, "namespaces");
    drop(target);
    wait_until("it ends", || !runs(pid));
}
