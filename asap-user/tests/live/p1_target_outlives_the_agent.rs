//! P1: the agent can be killed at any instruction. The target runs on, every thread of it, and the next agent finds what the dead
//! one left, and can take it out.

use crate::support::{Fixture, Lab, Random, Snapshot, Source, is_stopped, kill, lab_answer, runs, wait_until};
use std::{collections::BTreeMap, path::Path, time::Duration};

fn fix(lab: &Lab) -> String {
    lab.object("int victim(int x) { return x + 2; }")
}

/// All threads of the target compute, and compute right.
fn assert_well(target: &Fixture, when: &str) {
    let before = target.numbers("counts");
    let sum = |counts: &[i64]| counts[..3].iter().sum::<i64>();
    wait_until(&format!("{when}: the workers work"), || sum(&target.numbers("counts")) > sum(&before) + 1000);
    assert_eq!(target.numbers("counts")[3], 0, "{when}: wrong results");
    let value = target.number("call 1");
    assert!(value == 2 || value == 3, "{when}: {value}");
}

/// A new agent takes over, takes everything out, and leaves the target as it was.
fn clean_up(lab: &Lab, target: &Fixture, before: &Snapshot, when: &str) {
    lab.attach(target.pid());
    let patches = lab.status().targets[0].patches.len();
    assert_eq!(target.number("call 1"), if patches == 0 { 2 } else { 3 }, "{when}: status tells what is in force");
    let left = lab.detach(&["--revert"]);
    assert_eq!((left.reverted.len(), left.remaining.len()), (patches, 0), "{when}");
    assert_eq!(target.number("call 1"), 2, "{when}");
    assert_well(target, when);
    Snapshot::of(target.pid()).assert_same(before, when);
}

#[test]
fn p1_a_patched_target_outlives_its_agent_and_is_adopted() {
    let Some(lab) = Lab::new("p1_a_patched_target_outlives_its_agent_and_is_adopted") else { return };
    outlives_its_agent(&lab);
}

pub fn outlives_its_agent(lab: &Lab) {
    let target = Source::of(&["workers.c"]).start(&["4"]);
    let before = Snapshot::of(target.pid());
    lab.attach(target.pid());
    lab.patch(&["--function", "victim", "--name", "kept", &fix(lab)]);
    lab.kill_agent();
    assert_eq!(target.number("call 1"), 3, "the patch works without an agent");
    assert_well(&target, "after the kill");

    let attached = lab.attach(target.pid());
    assert!(attached.adopted);
    assert_eq!(attached.target.patches.iter().map(|patch| patch.name.as_str()).collect::<Vec<_>>(), ["kept"]);
    lab.kill_agent();
    clean_up(lab, &target, &before, "after two agents");
}

#[test]
fn p1_agents_killed_at_random_times_harm_nothing() {
    let Some(lab) = Lab::new("p1_agents_killed_at_random_times_harm_nothing") else { return };
    let target = Source::of(&["workers.c"]).start(&["4"]);
    let before = Snapshot::of(target.pid());
    let fix = fix(&lab);
    let mut random = Random::new();
    let mut completed = 0;
    for cycle in 0..100 {
        lab.attach(target.pid());
        let agent = lab.agent();
        let patched = !lab.status().targets[0].patches.is_empty();
        let command = if patched { vec!["revert"] } else { vec!["patch", "--function", "victim", &fix] };
        let child = lab.start(&command);
        std::thread::sleep(Duration::from_micros(random.below(60_000) as u64));
        kill(agent);
        lab.wait_for_the_end_of(agent);
        completed += i32::from(lab_answer(child).code == 0);
        if cycle % 10 == 0 {
            assert_well(&target, &format!("cycle {cycle}"));
        }
    }
    println!("{completed} of 100 commands were faster than the kill");
    assert_well(&target, "after 100 kills");
    clean_up(&lab, &target, &before, "after 100 kills");
}

/// A laboratory for a test that needs fault points in the program.
fn with_fault_points(name: &str) -> Option<Lab> {
    if !cfg!(feature = "fault-points") {
        println!("SKIPPED (needs the feature fault-points): {name}");
        return None;
    }
    Lab::new(name)
}

/// The fault points that an agent has passed, and how often.
fn passed(list: &Path) -> BTreeMap<String, u32> {
    let mut points = BTreeMap::new();
    for name in std::fs::read_to_string(list).expect("points were passed").lines() {
        *points.entry(name.to_owned()).or_default() += 1;
    }
    points
}

/// Fault points that the walk from attach to detach does not pass, and what walks those instead.
const ELSEWHERE: [(&str, &str); 4] = [
    ("call.", "p1_exceptions_pass_after_agents_died_while_they_told_the_unwinder"),
    ("unwind.", "p1_exceptions_pass_after_agents_died_while_they_told_the_unwinder"),
    ("sandbox.", "agents_killed_at_every_fault_point_of_the_sandbox_harm_nobody"),
    ("redirect.", "p1_agents_killed_while_they_redirect_harm_nothing"),
];

/// The names of all fault points, from the source; none where there is no source.
fn all_points(folder: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            all_points(&path, found);
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            let text = std::fs::read_to_string(&path).expect("source");
            let names = text.split("fault::point(\"").skip(1).filter_map(|rest| rest.split('"').next());
            found.extend(names.map(str::to_owned));
        }
    }
}

/// Points that are passed more often or less, as threads happen to run.
const VARYING: [&str; 2] = ["check.begin", "stop.interrupted"];

/// The first time, the last, and some between: attach, patch, revert, detach pass the same points by turns.
fn passes_of(name: &str, times: u32) -> Vec<u32> {
    if VARYING.contains(&name) {
        return vec![1];
    }
    let mut passes = vec![1, times / 3, times * 2 / 3, times];
    passes.retain(|&pass| pass > 0);
    passes.dedup();
    passes
}

/// What a user does, from attach to detach; ends at the first step that fails, and says which.
fn walk(lab: &Lab, target: &Fixture, fix: &str) -> Result<(), &'static str> {
    let pid = target.pid_text();
    let steps: [(&'static str, Vec<&str>); 8] = [
        ("attach", vec!["attach", "--pid", &pid]),
        ("patch", vec!["patch", "--function", "victim", fix]),
        ("second patch", vec!["patch", "--function", "second", fix]),
        ("revert", vec!["revert"]),
        ("revert of the last", vec!["revert"]),
        ("patch again", vec!["patch", "--function", "victim", fix]),
        ("detach --revert", vec!["detach", "--revert"]),
        ("status", vec!["status"]),
    ];
    for (name, step) in steps {
        if lab.asap(&step).code != 0 {
            return Err(name);
        }
    }
    Ok(())
}

#[test]
fn p1_agents_killed_at_every_fault_point_harm_nothing() {
    let Some(lab) = with_fault_points("p1_agents_killed_at_every_fault_point_harm_nothing") else { return };
    killed_at_fault_points(&lab, |_| true);
}

/// Kills agents at all fault points that are wanted.
pub fn killed_at_fault_points(lab: &Lab, is_wanted: fn(&str) -> bool) {
    let source = Source::of(&["workers.c"]);
    let fix = lab.object("int victim(int x) { return x + 2; } int second(int x) { return x * 5; }");
    let list = lab.path("points");
    let target = source.start(&["2"]);
    lab.set_environment("ASAP_FAULT_LIST", list.to_str().expect("ASCII"));
    assert_eq!(walk(lab, &target, &fix), Ok(()));
    assert_eq!(lab.asap(&["stop"]).code, 0);
    lab.set_environment("ASAP_FAULT_LIST", "");
    let points = passed(&list);
    assert!(points.len() >= 15, "{points:?}");
    println!("{points:?}");
    let mut all = Vec::new();
    all_points(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut all);
    all.retain(|name| !points.contains_key(name) && !ELSEWHERE.iter().any(|(kind, _)| name.starts_with(kind)));
    // The adopting agent's are walked by a test of their own; some are passed as threads happen to run.
    all.retain(|name| name != "attach.adopted" && !VARYING.contains(&name.as_str()));
    assert!(all.is_empty(), "no test walks {all:?}");

    let before = Snapshot::of(target.pid());
    for (name, &times) in points.iter().filter(|(name, _)| is_wanted(name)) {
        for pass in passes_of(name, times) {
            let fault = format!("{name}:{pass}");
            lab.set_environment("ASAP_FAULT", &fault);
            let died_in = walk(lab, &target, &fix).err();
            lab.set_environment("ASAP_FAULT", "");
            println!("{fault}: the agent died in {died_in:?}");
            assert!(runs(target.pid()), "{fault}");
            assert_well(&target, &fault);
            assert!(died_in.is_some(), "{fault}: the agent was not killed");
            // The second function is checked through the patches' own list.
            lab.attach(target.pid());
            let patches = lab.status().targets[0].patches.clone();
            let carries = |name: &str| patches.iter().flat_map(|patch| &patch.functions).any(|f| f.name == name);
            assert_eq!(target.number("call 1"), if carries("victim") { 3 } else { 2 }, "{fault}: {patches:?}");
            assert_eq!(target.number("second 2"), if carries("second") { 10 } else { 6 }, "{fault}: {patches:?}");
            assert_eq!(lab.detach(&["--revert"]).remaining.len(), 0, "{fault}");
            assert_eq!((target.number("call 1"), target.number("second 2")), (2, 6), "{fault}");
            assert_well(&target, &fault);
            Snapshot::of(target.pid()).assert_same(&before, &fault);
            assert_eq!(lab.asap(&["stop"]).code, 0, "{fault}");
        }
    }
}

/// How long each thread of the target has run, nanoseconds.
fn run_times(pid: i32) -> BTreeMap<String, u64> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it runs").flatten();
    let time = |task: &std::fs::DirEntry| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).expect("its threads do not end");
        text.split(' ').next().and_then(|word| word.parse().ok()).expect("a number")
    };
    tasks.map(|task| (task.file_name().to_string_lossy().into_owned(), time(&task))).collect()
}

/// Points at which threads of the target are held, or may be.
const MUST_END: [&str; 5] =
    ["check.begin", "gate.closed", "inject.in-call", "inject.registers-taken", "stop.interrupted"];

#[test]
fn p1_agents_that_hang_at_any_fault_point_hold_nobody_up() {
    let Some(lab) = with_fault_points("p1_agents_that_hang_at_any_fault_point_hold_nobody_up") else { return };
    let target = Source::of(&["workers.c"]).start(&["2"]);
    let before = Snapshot::of(target.pid());
    let fix = fix(&lab);
    let (pid, list) = (target.pid_text(), lab.path("points"));
    let steps = [
        vec!["attach", "--pid", &pid],
        vec!["patch", "--function", "victim", &fix],
        vec!["revert"],
        vec!["detach", "--revert"],
    ];
    lab.set_environment("ASAP_FAULT_LIST", list.to_str().expect("ASCII"));
    assert!(steps.iter().all(|step| lab.asap(step).code == 0));
    assert_eq!(lab.asap(&["stop"]).code, 0);
    lab.set_environment("ASAP_FAULT_LIST", "");
    lab.set_environment("ASAP_FAULT_STOP", "1");
    lab.set_environment("ASAP_FAULT_PATIENCE", "1000");
    let points = passed(&list);
    for name in MUST_END {
        assert!(points.contains_key(name), "{name}: {points:?}");
    }
    for name in points.into_keys() {
        lab.set_environment("ASAP_FAULT", &name);
        assert_eq!(lab.asap(&["agent", "--background", "--idle-exit", "0"]).code, 0, "{name}");
        let agent = lab.agent();
        for step in &steps {
            let mut client = lab.start(step);
            wait_until(&format!("{name}: {step:?} is done, or the agent hangs"), || {
                is_stopped(agent) || client.try_wait().is_ok_and(|status| status.is_some())
            });
            if is_stopped(agent) || !runs(agent) {
                kill(client.id() as i32);
            }
            let _ = client.wait();
            if is_stopped(agent) || !runs(agent) {
                break;
            }
        }
        lab.set_environment("ASAP_FAULT", "");
        assert!(is_stopped(agent) || !runs(agent), "{name}: the agent did not hang");
        // Nobody waits at a gate, nobody is stopped: not one thread.
        let times = run_times(target.pid());
        wait_until(&format!("{name}: every thread goes on"), || {
            target.numbers("counts");
            run_times(target.pid()).iter().all(|(tid, time)| *time > times[tid])
        });
        if MUST_END.contains(&name.as_str()) {
            wait_until(&format!("{name}: the watchdog ends the agent"), || !runs(agent));
        } else if runs(agent) {
            kill(agent);
        }
        lab.wait_for_the_end_of(agent);
        clean_up(&lab, &target, &before, &name);
        assert_eq!(lab.asap(&["stop"]).code, 0, "{name}");
    }
}

#[test]
fn p1_agents_killed_while_they_adopt_harm_nothing() {
    let Some(lab) = with_fault_points("p1_agents_killed_while_they_adopt_harm_nothing") else { return };
    let target = Source::of(&["workers.c"]).start(&["2"]);
    let before = Snapshot::of(target.pid());
    let fix = fix(&lab);
    let (pid, list) = (target.pid_text(), lab.path("points"));
    // A patch that a dead agent left, with the dead agent's helper.
    let leave_patched = || {
        lab.attach(target.pid());
        if lab.status().targets[0].patches.is_empty() {
            lab.patch(&["--function", "victim", &fix]);
        }
        lab.kill_agent();
    };
    let adopt =
        || [&["attach", "--pid", &pid][..], &["detach", "--revert"]].iter().all(|step| lab.asap(step).code == 0);
    leave_patched();
    lab.set_environment("ASAP_FAULT_LIST", list.to_str().expect("ASCII"));
    assert!(adopt());
    assert_eq!(lab.asap(&["stop"]).code, 0);
    lab.set_environment("ASAP_FAULT_LIST", "");
    let points = passed(&list);
    assert!(points.contains_key("attach.adopted"), "{points:?}");
    for (name, &times) in &points {
        for pass in passes_of(name, times) {
            let fault = format!("{name}:{pass}");
            leave_patched();
            lab.set_environment("ASAP_FAULT", &fault);
            let survived = adopt();
            lab.set_environment("ASAP_FAULT", "");
            assert!(!survived, "{fault}: the agent was not killed");
            assert_well(&target, &fault);
        }
    }
    clean_up(&lab, &target, &before, "after all of them");
}

#[test]
fn p1_exceptions_pass_after_agents_died_while_they_told_the_unwinder() {
    let Some(lab) = with_fault_points("p1_exceptions_pass_after_agents_died_while_they_told_the_unwinder") else {
        return;
    };
    let target = Source::of(&["throwing.cc"]).start(&[]);
    let passes = "namespace shop { extern int unwound; struct Guard { ~Guard() { ++unwound; } }; \
        __attribute__((noinline)) int middle(int x); } extern \"C\" int thrower(int); \
        int shop::middle(int x) { Guard guard; return thrower(x) * 100; }";
    let fix = lab.compile("g++", "cc", &["-O2", "-fPIC"], passes);
    let (pid, list) = (target.pid_text(), lab.path("points"));
    let first = |command: &str| target.ask(command).rsplit_once(' ').expect("two words").0.to_owned();
    assert_eq!(first("call -4"), "caught negative");
    let before = Snapshot::of(target.pid());
    // A second patch stays while the first comes and goes: libgcc's list must hold together.
    let steps = [
        &["attach", "--pid", &pid][..],
        &["patch", "--function", "shop::middle", "--name", "below", &fix],
        &["patch", "--function", "shop::middle", "--name", "above", &fix],
        &["revert", "above"],
        &["patch", "--function", "shop::middle", "--name", "above", &fix],
        &["detach", "--revert"],
    ];
    let walk = || steps.iter().position(|step| lab.asap(step).code != 0);
    lab.set_environment("ASAP_FAULT_LIST", list.to_str().expect("ASCII"));
    assert_eq!(walk(), None);
    assert_eq!(lab.asap(&["stop"]).code, 0);
    lab.set_environment("ASAP_FAULT_LIST", "");
    let points = passed(&list);
    let told = points.iter().filter(|(name, _)| {
        ["unwind.", "call."].iter().any(|prefix| name.starts_with(prefix)) || *name == "commit.recorded"
    });
    let mut walked = 0;
    for (name, &times) in told {
        for pass in 1..=times {
            let fault = format!("{name}:{pass}");
            walked += 1;
            lab.set_environment("ASAP_FAULT", &fault);
            assert!(walk().is_some(), "{fault}: the agent was not killed");
            lab.set_environment("ASAP_FAULT", "");
            assert_eq!(first("call -4"), "caught negative", "{fault}: without an agent");
            lab.attach(target.pid());
            assert_eq!(first("call -4"), "caught negative", "{fault}: adopted");
            // libgcc walks its whole list when it is told to forget a table.
            lab.patch(&["--function", "shop::middle", "--name", "again", &fix]);
            assert_eq!((first("call -4").as_str(), first("call 4").as_str()), ("caught negative", "500"), "{fault}");
            assert_eq!(lab.detach(&["--revert"]).remaining.len(), 0, "{fault}");
            assert_eq!((first("call -4").as_str(), first("call 4").as_str()), ("caught negative", "10"), "{fault}");
            Snapshot::of(target.pid()).assert_same(&before, &fault);
            assert_eq!(lab.asap(&["stop"]).code, 0, "{fault}");
        }
    }
    assert!(walked > 20, "{points:?}");
}
