//! Parents and children: a patch is in all processes of a target or in none, and no child runs without it.

use crate::support::{Fixture, Lab, Snapshot, Source, runs, wait_until};

fn workers() -> Fixture {
    Source::of(&["workers.c"]).start(&["1"])
}

fn adds(lab: &Lab, more: i32) -> String {
    lab.object(&format!("int victim(int x) {{ return x + {more}; }}"))
}

/// Pid, value, beats of each child; fails where one computed wrong.
fn children(target: &Fixture) -> Vec<(i32, i64, i64)> {
    let answer = target.ask("children");
    let numbers = |word: &str| word.split(':').map(|n| n.parse().expect("a number")).collect::<Vec<i64>>();
    let found = answer.split_whitespace().map(|word| {
        let child = numbers(word);
        assert_eq!(child[3], 0, "{answer}");
        (child[0] as i32, child[1], child[2])
    });
    found.collect()
}

/// Waits until every child has called the function again from now on, and gives what they got.
fn fresh_values(target: &Fixture) -> Vec<i64> {
    let before = children(target);
    let mut now = Vec::new();
    wait_until("every child called the function again", || {
        now = children(target);
        now.iter().zip(&before).all(|(now, before)| now.2 >= before.2 + 2)
    });
    // A child that was born a moment ago has not called yet: it has no value.
    now.into_iter().filter(|&(_, _, beats)| beats > 0).map(|(_, value, _)| value).collect()
}

#[test]
fn children_forked_before_and_after_the_patch_carry_it() {
    let Some(lab) = Lab::new("children_forked_before_and_after_the_patch_carry_it") else { return };
    before_and_after(&lab);
}

pub fn before_and_after(lab: &Lab) {
    let target = workers();
    target.ask("fork 4");
    assert_eq!(fresh_values(&target), [11; 4]);
    let first = children(&target)[0].0;
    let (before, before_child) = (Snapshot::of(target.pid()), Snapshot::of(first));
    let attached = lab.attach(target.pid());
    assert_eq!(attached.target.processes.len(), 5);
    target.ask("fork 2");
    let report = lab.patch(&["--function", "victim", &adds(lab, 2)]);
    assert_eq!(report.processes.len(), 7, "{report:?}");
    assert_eq!(fresh_values(&target), [12; 6]);
    assert_eq!(target.numbers("storm 20"), [12; 20], "children are born patched");
    target.ask("fork 3");
    assert_eq!(fresh_values(&target), [12; 9]);
    wait_until("the new children are in care", || lab.status().targets[0].processes.len() == 10);

    lab.patch(&["--function", "victim", &adds(lab, 3)]);
    assert_eq!(fresh_values(&target), [13; 9]);
    lab.revert(&[]);
    assert_eq!(fresh_values(&target), [12; 9]);
    let left = lab.detach(&["--revert"]);
    assert_eq!((left.reverted.len(), left.remaining.len()), (1, 0));
    assert_eq!(fresh_values(&target), [11; 9]);
    assert_eq!(target.numbers("storm 5"), [11; 5]);
    let mut now = Snapshot::of(target.pid());
    now.forget_children(&before);
    now.assert_same(&before, "the parent");
    Snapshot::of(first).assert_same(&before_child, "a child");
}

#[test]
fn children_of_a_patched_process_without_an_agent_are_found_later() {
    let Some(lab) = Lab::new("children_of_a_patched_process_without_an_agent_are_found_later") else { return };
    without_an_agent(&lab);
}

pub fn without_an_agent(lab: &Lab) {
    let target = workers();
    lab.attach(target.pid());
    lab.patch(&["--function", "victim", &adds(lab, 2)]);
    lab.kill_agent();
    target.ask("fork 3");
    assert_eq!(fresh_values(&target), [12; 3]);
    let attached = lab.attach(target.pid());
    assert_eq!((attached.adopted, attached.target.processes.len()), (true, 4));
    assert!(attached.target.processes.iter().all(|process| process.patches.len() == 1), "{attached:?}");
    lab.detach(&["--revert"]);
    assert_eq!(fresh_values(&target), [11; 3]);
}

#[test]
fn a_parent_that_forks_all_the_time_has_no_unpatched_child() {
    let Some(lab) = Lab::new("a_parent_that_forks_all_the_time_has_no_unpatched_child") else { return };
    forks_all_the_time(&lab);
}

pub fn forks_all_the_time(lab: &Lab) {
    let target = workers();
    target.ask("fork 5");
    lab.attach(target.pid());
    target.ask("often");
    for (more, result) in [(2, 12), (3, 13)] {
        lab.patch(&["--function", "victim", &adds(lab, more)]);
        let values = fresh_values(&target);
        assert!(values.iter().all(|&value| value == result), "{values:?}");
    }
    lab.revert(&[]);
    let values = fresh_values(&target);
    assert!(values.iter().all(|&value| value == 12), "{values:?}");
    println!("{} children", target.number("enough"));
    lab.detach(&["--revert"]);
    let values = fresh_values(&target);
    assert!(values.iter().all(|&value| value == 11), "{values:?}");
    assert_eq!(target.numbers("counts")[3], 0);
}

#[test]
fn only_leaves_children_alone() {
    let Some(lab) = Lab::new("only_leaves_children_alone") else { return };
    let target = workers();
    target.ask("fork 3");
    fresh_values(&target);
    let attached = lab.attach_with(target.pid(), &["--only"]);
    assert_eq!(attached.target.processes.len(), 1);
    let child = Snapshot::of(children(&target)[0].0);
    let report = lab.patch(&["--function", "victim", &adds(&lab, 2)]);
    assert_eq!(report.processes.len(), 1);
    assert_eq!(target.number("call 10"), 12);
    assert_eq!(fresh_values(&target), [11; 3]);
    Snapshot::of(children(&target)[0].0).assert_same(&child, "a child that was not meant");
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
}

#[test]
fn p2_an_agent_that_dies_between_two_processes_leaves_none_half_done() {
    const NAME: &str = "p2_an_agent_that_dies_between_two_processes_leaves_none_half_done";
    if !cfg!(feature = "fault-points") {
        println!("SKIPPED (needs the feature fault-points): {NAME}");
        return;
    }
    let Some(lab) = Lab::new(NAME) else { return };
    let target = workers();
    target.ask("fork 3");
    let before = Snapshot::of(target.pid());
    let fix = adds(&lab, 2);
    let list = lab.path("points");
    // How often each point is passed by a whole patch and a whole revert.
    lab.set_environment("ASAP_FAULT_LIST", list.to_str().expect("ASCII"));
    lab.attach(target.pid());
    let passed = |name: &str| {
        let text = std::fs::read_to_string(&list).expect("points were passed");
        text.lines().filter(|line| *line == name).count()
    };
    let attached = passed("exchange.recorded");
    lab.patch(&["--function", "victim", &fix]);
    let patched = passed("exchange.recorded");
    lab.revert(&[]);
    let reverted = passed("exchange.recorded");
    assert_eq!((patched - attached, reverted - patched), (4, 4), "once per process");
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
    assert_eq!(lab.asap(&["stop"]).code, 0);
    lab.set_environment("ASAP_FAULT_LIST", "");

    let faults = (1..=8).map(|pass| format!("exchange.recorded:{pass}"));
    let others = ["patch.in-all-processes:1", "revert.announced:1"].map(str::to_owned);
    for fault in faults.chain(others) {
        lab.set_environment("ASAP_FAULT", &fault);
        let pid = target.pid_text();
        let steps = [&["attach", "--pid", &pid][..], &["patch", "--function", "victim", &fix], &["revert"]];
        let died_in = steps.iter().position(|step| lab.asap(step).code != 0);
        lab.set_environment("ASAP_FAULT", "");
        assert!(died_in.is_some(), "{fault}: the agent was not killed");
        assert!(runs(target.pid()), "{fault}");

        let adopted = lab.attach(target.pid());
        let expected = if adopted.target.patches.is_empty() { 11 } else { 12 };
        assert_eq!(fresh_values(&target), [expected; 3], "{fault}: all processes or none: {adopted:?}");
        assert_eq!(target.number("call 10"), expected, "{fault}");
        let counts: Vec<usize> = lab.status().targets[0].processes.iter().map(|p| p.patches.len()).collect();
        assert_eq!(counts, [adopted.target.patches.len(); 4], "{fault}");
        if fault.ends_with(":2") {
            assert!(adopted.target.notes.iter().any(|note| note.contains("taken out of all")), "{adopted:?}");
        }
        // It can be patched as if nothing had happened.
        if expected == 11 {
            lab.patch(&["--function", "victim", &fix]);
        }
        assert_eq!(fresh_values(&target), [12; 3], "{fault}");
        lab.detach(&["--revert"]);
        assert_eq!(fresh_values(&target), [11; 3], "{fault}");
        assert_eq!(lab.asap(&["stop"]).code, 0, "{fault}");
    }
    Snapshot::of(target.pid()).assert_same(&before, "after all of them");
}
