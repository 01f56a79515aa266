//! A library of the target goes away (dlclose) while a patch of it is in, or waits to go in.

use crate::support::{Fixture, Lab, Source, lab_answer, maps, runs};
use asap::report::{FailureKind, Reply, TargetState};
use nix::{sys::signal, unistd::Pid};

const FIX: &str = "int plugged(int x, int descriptor) { (void)descriptor; return x + 2; }";

fn host() -> Fixture {
    host_with(&["-O2"])
}

fn host_with(flags: &[&'static str]) -> Fixture {
    let library = Source::of(&["plugin.c"]).with(&["-O2", "-fPIC", "-shared"]).build();
    let host = Source::of(&["host.c"]).with(flags);
    Fixture::start(std::process::Command::new(host.build()).arg(library))
}

/// Address and access of what is mapped, but for heaps and stacks, which are the target's own affair.
fn executable(pid: i32) -> Vec<String> {
    maps(pid)
        .into_iter()
        .filter(|line| line.split_whitespace().nth(1).is_some_and(|access| access.contains('x')))
        .collect()
}

#[test]
fn a_patched_library_is_unloaded() {
    let Some(lab) = Lab::new("a_patched_library_is_unloaded") else { return };
    let target = host();
    lab.attach(target.pid());
    let fix = lab.object(FIX);
    lab.patch(&["--function", "plugged", "--name", "the-fix", &fix]);
    assert_eq!(target.number("call 1"), 3);
    target.ask("unload");
    let status = lab.status();
    assert!(
        status.targets[0].notes.iter().any(|note| note.contains("plugin") && note.contains("the-fix")),
        "{status:?}"
    );
    assert_eq!(status.targets[0].patches[0].functions.len(), 0, "it replaces nothing any more");
    // Nothing of the library is held: neither its pages nor our copies of them.
    assert_eq!(maps(target.pid()).iter().filter(|line| line.contains("plugin")).count(), 0);
    // When it comes back it is as its file says, and can be patched again.
    assert_eq!(target.number("load"), 1);
    assert_eq!(target.number("call 1"), 2);
    lab.patch(&["--function", "plugged", "--name", "again", &fix]);
    assert_eq!(target.number("call 1"), 3);
    let left = lab.detach(&["--revert"]);
    assert_eq!((left.reverted.len(), left.remaining.len(), left.clean), (2, 0, Some(true)));
    assert_eq!(target.number("call 1"), 2);
}

#[test]
fn an_unloaded_library_takes_its_patch_along() {
    let Some(lab) = Lab::new("an_unloaded_library_takes_its_patch_along") else { return };
    // What is there after the library went, without asap.
    let target = host();
    target.ask("unload");
    let unloaded = executable(target.pid()).len();
    let target = host();
    lab.attach(target.pid());
    lab.patch(&["--function", "plugged", &lab.object(FIX)]);
    target.ask("unload");
    assert_eq!(lab.revert(&[]).processes.len(), 1);
    assert_eq!(lab.status().targets[0].patches.len(), 0);
    assert_eq!(lab.detach(&[]).clean, Some(true));
    assert_eq!(executable(target.pid()).len(), unloaded, "nothing of the patch is left");
}

#[test]
fn what_took_the_place_of_a_library_is_left_alone() {
    let Some(lab) = Lab::new("what_took_the_place_of_a_library_is_left_alone") else { return };
    let target = host();
    lab.attach(target.pid());
    lab.patch(&["--function", "plugged", &lab.object(FIX)]);
    let other = target.ask("occupy");
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
    assert!(maps(target.pid()).iter().any(|line| line.starts_with(&other)), "{other}: {:#?}", maps(target.pid()));
    assert_eq!(target.ask("what"), "what?", "it lives");
    assert_eq!(target.number("load"), 1);
    assert_eq!(target.number("call 1"), 2);
}

#[test]
fn a_library_is_unloaded_and_loaded_at_the_same_place() {
    let Some(lab) = Lab::new("a_library_is_unloaded_and_loaded_at_the_same_place") else { return };
    let target = host();
    lab.attach(target.pid());
    let fix = lab.object(FIX);
    lab.patch(&["--function", "plugged", &fix]);
    target.ask("unload");
    assert_eq!(target.number("load"), 1);
    assert_eq!(target.number("call 1"), 2, "a fresh library");
    assert_eq!(lab.status().targets[0].patches[0].functions.len(), 0);
    lab.patch(&["--function", "plugged", "--name", "second", &fix]);
    assert_eq!(target.number("call 1"), 3);
    // A later agent finds the same.
    target.ask("unload");
    lab.kill_agent();
    lab.attach(target.pid());
    assert_eq!(lab.detach(&["--revert"]).remaining.len(), 0);
    assert_eq!(target.number("load"), 1);
    assert_eq!(target.number("call 1"), 2);
    assert_eq!(maps(target.pid()).iter().filter(|line| line.contains("asap")).count(), 0);
}

#[test]
fn a_library_is_unloaded_while_its_patch_waits() {
    let Some(lab) = Lab::new("a_library_is_unloaded_while_its_patch_waits") else { return };
    let target = host();
    lab.attach(target.pid());
    let agent = Pid::from_raw(lab.agent());
    target.ask("enter");
    let patching = lab.start(&["patch", "--function", "plugged", "--timeout", "60s", &lab.object(FIX)]);
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(runs(patching.id() as i32), "it waits");
    // So that the agent does not get in between.
    signal::kill(agent, signal::SIGSTOP).expect("it runs");
    target.ask("leave");
    let other = target.ask("occupy");
    signal::kill(agent, signal::SIGCONT).expect("it is there");
    let failure = lab_answer(patching).failure();
    assert_eq!((failure.kind, failure.state), (FailureKind::Refused, TargetState::Untouched), "{failure:?}");
    assert!(failure.message.contains("unloaded"), "{failure:?}");
    let status = lab.status();
    assert_eq!((status.targets.len(), status.targets[0].patches.len()), (1, 0), "it is still in care");
    assert_eq!(lab.detach(&[]).clean, Some(true));
    assert!(maps(target.pid()).iter().any(|line| line.starts_with(&other)), "nothing came into its place");
    assert_eq!(target.number("load"), 1);
    assert_eq!(target.number("call 1"), 2);
}

#[test]
fn a_library_is_unloaded_while_its_revert_waits() {
    let Some(lab) = Lab::new("a_library_is_unloaded_while_its_revert_waits") else { return };
    let target = host();
    lab.attach(target.pid());
    let fix = "long read(int, void *, unsigned long);
        int plugged(int x, int descriptor) { char byte; return descriptor >= 0 && read(descriptor, &byte, 1) < 0 ? -1 : x + 2; }";
    lab.patch(&["--function", "plugged", &lab.object(fix)]);
    let agent = Pid::from_raw(lab.agent());
    target.ask("enter");
    let reverting = lab.start(&["revert", "--timeout", "60s"]);
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(runs(reverting.id() as i32), "it waits");
    signal::kill(agent, signal::SIGSTOP).expect("it runs");
    target.ask("leave");
    let other = target.ask("occupy");
    signal::kill(agent, signal::SIGCONT).expect("it is there");
    // There is nothing left to be changed back.
    let reply = lab_answer(reverting).reply();
    assert!(matches!(&reply, Reply::Reverted(report) if report.processes.len() == 1), "{reply:?}");
    assert_eq!(lab.status().targets[0].patches.len(), 0);
    assert_eq!(lab.detach(&[]).clean, Some(true));
    assert!(maps(target.pid()).iter().any(|line| line.starts_with(&other)), "nothing came into its place");
    assert_eq!(target.number("load"), 1);
    assert_eq!(target.number("call 1"), 2);
}

#[test]
fn a_variable_of_the_program_hides_no_function_of_a_library() {
    let Some(lab) = Lab::new("a_variable_of_the_program_hides_no_function_of_a_library") else { return };
    let target = host_with(&["-O2", "-Dlibrary=plugged"]);
    lab.attach(target.pid());
    let fix = lab.object(FIX);
    let report = lab.patch(&["--function", "plugged", &fix]);
    assert!(report.patch.functions[0].module.contains("plugin"), "{report:?}");
    assert_eq!(target.number("call 1"), 3);
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
    // Where there is only the variable, that is what is said.
    target.ask("unload");
    lab.attach(target.pid());
    lab.asap(&["patch", "--function", "plugged", &fix]).refusal(&["plugged is not a function"]);
}
