//! `--mechanism redirect`: the kernel's own probes lead calls to the new code. What holds for other patches holds for these; on
//! kernels that let no uprobe program write registers they are refused.

use crate::{
    forked_children, p1_target_outlives_the_agent,
    support::{Fixture, Lab, Snapshot, Source, runs, wait_until},
};
use asap::report::Mechanism;
use std::path::Path;

const PINS: &str = "/sys/fs/bpf/asap";

fn workers(threads: &str) -> Fixture {
    Source::of(&["workers.c"]).start(&[threads])
}

/// How many pages with probes the target maps.
fn probed_pages(target: &Fixture) -> usize {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", target.pid())).expect("it runs");
    assert!(!maps.contains("[uprobes"), "nothing is ever single-stepped: {maps}");
    maps.matches("/memfd:asap-redirect-").count()
}

fn assert_nothing_is_pinned() {
    wait_until("no pin is left", || !Path::new(PINS).exists());
}

#[test]
fn redirection_is_refused_where_the_kernel_does_not_let_it() {
    let Some(lab) = Lab::new("redirection_is_refused_where_the_kernel_does_not_let_it") else { return };
    let target = workers("1");
    let before = Snapshot::of(target.pid());
    lab.attach(target.pid());
    let fix = lab.object("int victim(int x) { return x + 2; }");
    let answer = lab.asap(&["patch", "--function", "victim", "--mechanism", "redirect", &fix]);
    if asap::kernel::features().iter().any(|feature| feature.name == "redirect" && feature.available) {
        answer.reply();
    } else {
        let refused = answer.refusal(&["redirected by a uprobe program"]);
        assert!(refused.way_out.contains("--mechanism auto"), "{refused:?}");
        assert_eq!(target.number("call 5"), 6);
    }
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
    Snapshot::of(target.pid()).assert_same(&before, "after detach");
}

#[test]
fn a_redirected_function_is_replaced_and_comes_back() {
    let Some(lab) = Lab::redirecting("a_redirected_function_is_replaced_and_comes_back") else { return };
    let target = workers("2");
    let before = Snapshot::of(target.pid());
    lab.attach(target.pid());
    let fix = lab.object("int victim(int x) { return x + 2; }");
    let patched = lab.patch(&["--function", "victim", &fix]);
    assert_eq!(patched.patch.mechanism, Mechanism::Redirect);
    assert_eq!(lab.status().targets[0].patches[0].mechanism, Mechanism::Redirect);
    assert_eq!(target.number("call 5"), 7);
    wait_until("a worker has called the new code", || target.numbers("counts")[1] > 0);
    assert_eq!(probed_pages(&target), 1);
    lab.revert(&[]);
    assert_eq!(target.number("call 5"), 6);
    assert_eq!(probed_pages(&target), 0);
    assert_nothing_is_pinned();
    assert_eq!(lab.detach(&[]).clean, Some(true));
    Snapshot::of(target.pid()).assert_same(&before, "after detach");
    assert_eq!(target.numbers("counts")[3], 0);
}

#[test]
fn probes_and_jumps_share_pages_and_functions() {
    let Some(lab) = Lab::redirecting("probes_and_jumps_share_pages_and_functions") else { return };
    let target = workers("2");
    let before = Snapshot::of(target.pid());
    lab.attach(target.pid());
    let adds = |more: i32| lab.object(&format!("int victim(int x) {{ return x + {more}; }}"));
    let second = lab.object("int second(int x) { return x * 5; }");
    let in_plain = |arguments: &[&str]| {
        let answer = lab.asap(&[&["patch", "--mechanism", "page"], arguments].concat());
        answer.reply();
    };
    lab.patch(&["--function", "victim", "--name", "probe", &adds(2)]);
    in_plain(&["--function", "second", "--name", "jump beside it", &second]);
    assert_eq!((target.number("call 5"), target.number("second 2")), (7, 10));
    in_plain(&["--function", "victim", "--name", "jump over it", &adds(3)]);
    assert_eq!((target.number("call 5"), target.number("second 2")), (8, 10));
    // The fixture's workers know three results.
    lab.patch(&["--function", "victim", "--name", "probe over both", &adds(1)]);
    assert_eq!((target.number("call 5"), target.number("second 2")), (6, 10));
    lab.revert(&["jump over it"]);
    assert_eq!((target.number("call 5"), target.number("second 2")), (6, 10));
    lab.revert(&["probe over both"]);
    assert_eq!((target.number("call 5"), target.number("second 2")), (7, 10));
    lab.revert(&["probe"]);
    assert_eq!((target.number("call 5"), target.number("second 2")), (6, 10));
    assert_eq!(probed_pages(&target), 0);
    assert_nothing_is_pinned();
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
    Snapshot::of(target.pid()).assert_same(&before, "after detach");
    assert_eq!(target.numbers("counts")[3], 0);
}

#[test]
fn children_of_a_redirected_process_are_born_redirected() {
    let Some(lab) = Lab::redirecting("children_of_a_redirected_process_are_born_redirected") else { return };
    forked_children::before_and_after(&lab);
    assert_eq!(lab.asap(&["stop"]).code, 0);
    assert_nothing_is_pinned();
}

#[test]
fn a_redirected_parent_that_forks_all_the_time_has_no_unpatched_child() {
    let Some(lab) = Lab::redirecting("a_redirected_parent_that_forks_all_the_time_has_no_unpatched_child") else {
        return;
    };
    forked_children::forks_all_the_time(&lab);
}

#[test]
fn p1_redirection_outlives_the_agent_and_is_adopted() {
    let Some(lab) = Lab::redirecting("p1_redirection_outlives_the_agent_and_is_adopted") else { return };
    p1_target_outlives_the_agent::outlives_its_agent(&lab);
    assert_nothing_is_pinned();
    forked_children::without_an_agent(&lab);
    assert_nothing_is_pinned();
}

#[test]
fn p1_redirection_goes_with_its_target() {
    let Some(lab) = Lab::redirecting("p1_redirection_goes_with_its_target") else { return };
    let target = workers("1");
    lab.attach(target.pid());
    let fix = lab.object("int victim(int x) { return x + 2; }");
    lab.patch(&["--function", "victim", &fix]);
    assert!(Path::new(PINS).exists());
    let pid = target.pid();
    drop(target);
    wait_until("the target ends", || !runs(pid));
    assert_nothing_is_pinned();
}

#[test]
fn p1_agents_killed_while_they_redirect_harm_nothing() {
    if !cfg!(feature = "fault-points") {
        println!("SKIPPED (needs the feature fault-points): p1_agents_killed_while_they_redirect_harm_nothing");
        return;
    }
    let Some(lab) = Lab::redirecting("p1_agents_killed_while_they_redirect_harm_nothing") else { return };
    // The others are walked with the other mechanism, by the same code; in a virtual machine each takes half a minute.
    p1_target_outlives_the_agent::killed_at_fault_points(&lab, |name| name.starts_with("redirect."));
    assert_nothing_is_pinned();
}
