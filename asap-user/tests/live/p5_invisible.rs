//! P5: the target notices nothing. No EINTR that it would not have had, no SIGCHLD, no new descriptor, thread or handler; and
//! after revert and detach it is what it was before.

use crate::support::{Lab, Snapshot, Source, maps, thread_count};

#[test]
fn p5_attach_status_and_detach_leave_no_trace() {
    let Some(lab) = Lab::new("p5_attach_status_and_detach_leave_no_trace") else { return };
    for source in ["workers.c", "inside.c", "interrupted.c", "confined.c", "pages.c"] {
        let target = Source::of(&[source]).start(&[]);
        target.ask("what");
        let before = Snapshot::of(target.pid());
        lab.attach(target.pid());
        let during = Snapshot::of(target.pid());
        assert_eq!(thread_count(target.pid()), lab.status().targets[0].processes[0].threads, "{source}");
        let left = lab.detach(&[]);
        assert_eq!((left.clean, left.remaining.len()), (Some(true), 0), "{source}");
        Snapshot::of(target.pid()).assert_same(&before, source);
        // While attached there is memory of ours, and a helper that waitpid() does not see; nothing else.
        let gone: Vec<_> = before.missing_maps(&during);
        assert!(gone.is_empty(), "{source}: mappings were lost or changed by attach: {gone:#?}");
    }
}

#[test]
fn p5_a_patch_changes_nothing_but_text_and_maps() {
    let Some(lab) = Lab::new("p5_a_patch_changes_nothing_but_text_and_maps") else { return };
    let target = Source::of(&["workers.c"]).start(&["0"]);
    target.ask("call 1");
    let before = Snapshot::of(target.pid());
    lab.attach(target.pid());
    let fix = lab.object("static int calls; int victim(int x) { calls++; return x + 2; }");
    lab.patch(&["--function", "victim", &fix]);
    lab.detach(&[]);
    assert_eq!(target.number("call 1"), 3);
    Snapshot::of(target.pid()).assert_same_but_for_text_and_maps(&before, "patched, without an agent");
    lab.attach(target.pid());
    assert_eq!(lab.detach(&["--revert"]).remaining.len(), 0);
    Snapshot::of(target.pid()).assert_same(&before, "after detach --revert by another attach");
}

#[test]
fn p5_two_hundred_cycles_interrupt_no_system_call() {
    let Some(lab) = Lab::new("p5_two_hundred_cycles_interrupt_no_system_call") else { return };
    let target = Source::of(&["interrupted.c"]).start(&[]);
    assert_eq!(target.numbers("counts"), [0, 0, 0, 0]);
    assert_eq!(target.ask("wait"), "-1 ECHILD");
    let before = Snapshot::of(target.pid());
    let fix = lab.object("int victim(int x) { return x + 2; }");
    for cycle in 0..200 {
        lab.attach(target.pid());
        lab.patch(&["--function", "victim", &fix]);
        if cycle % 20 == 0 {
            assert_eq!(target.number("call 1"), 3);
            assert_eq!(target.ask("wait"), "-1 ECHILD", "helpers are no children that wait() sees");
        }
        lab.revert(&[]);
        lab.detach(&[]);
        if cycle % 20 == 0 {
            assert_eq!(target.number("call 1"), 2);
            assert_eq!(target.numbers("counts")[..3], [0, 0, 0], "cycle {cycle}: EINTR, SIGCHLD, SIGUSR1");
        }
    }
    assert_eq!(target.numbers("counts"), [0, 0, 0, 0], "EINTR, SIGCHLD, SIGUSR1, woken");
    assert_eq!(target.ask("wait"), "-1 ECHILD");
    Snapshot::of(target.pid()).assert_same(&before, "after 200 cycles");
    // The threads are still where they were, and can be woken.
    assert_eq!(target.ask("wake"), "woken");
    let handled = nix::sys::signal::kill(nix::unistd::Pid::from_raw(target.pid()), nix::sys::signal::SIGUSR1);
    assert!(handled.is_ok());
    crate::support::wait_until("its own signals arrive", || target.numbers("counts")[2] == 1);
}

#[test]
fn p5_an_agent_at_rest_uses_no_descriptor_of_the_target() {
    let Some(lab) = Lab::new("p5_an_agent_at_rest_uses_no_descriptor_of_the_target") else { return };
    let target = Source::of(&["inside.c"]).start(&[]);
    let before = maps(target.pid());
    let snapshot = Snapshot::of(target.pid());
    lab.attach(target.pid());
    Snapshot::of(target.pid()).assert_same_but_for_helpers(&snapshot, "attached");
    lab.detach(&[]);
    assert_eq!(maps(target.pid()), before);
}
