//! Many cycles under load: nothing wrong, nothing lost, nothing left over.

use crate::support::{Lab, Snapshot, Source, maps};
use std::fs;

/// Resident memory of a process, KiB.
fn resident(pid: i32) -> i64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("it has memory");
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("a number")
}

fn descriptors(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").count()
}

/// Applies and reverts so many times under four hot threads.
fn cycles(name: &str, count: u32) {
    let Some(lab) = Lab::new(name) else { return };
    let target = Source::of(&["workers.c"]).start(&["4"]);
    let before = Snapshot::of(target.pid());
    lab.attach(target.pid());
    let agent = lab.agent();
    let fix = lab.object("static int calls; int victim(int x) { calls++; return x + 2; }");
    let cycle = || {
        lab.patch(&["--function", "victim", &fix]);
        lab.revert(&[]);
    };
    // Caches fill and allocators settle first.
    (0..count / 10).for_each(|_| cycle());
    let (memory, files) = (resident(agent), descriptors(agent));
    let (mappings, target_memory) = (maps(target.pid()).len(), resident(target.pid()));
    (0..count).for_each(|_| cycle());
    let counts = target.numbers("counts");
    assert_eq!((counts[2], counts[3]), (0, 0), "{counts:?}");
    assert!(counts[0] > 0 && counts[1] > 0, "{counts:?}");
    assert_eq!(maps(target.pid()).len(), mappings, "mappings of the target");
    // A client that has just gone may still be counted in one of the two.
    let now = descriptors(agent);
    assert!(now <= files + 1, "descriptors of the agent: {files} before, {now} now");
    let grown = resident(agent) - memory;
    assert!(grown < 4096, "the agent grew by {grown} KiB");
    let grown = resident(target.pid()) - target_memory;
    assert!(grown < 1024, "the target grew by {grown} KiB");
    assert_eq!(lab.detach(&[]).clean, Some(true));
    Snapshot::of(target.pid()).assert_same(&before, "after detach");
}

#[test]
fn three_hundred_cycles_leave_nothing_behind() {
    cycles("three_hundred_cycles_leave_nothing_behind", 300);
}

#[test]
#[ignore = "takes some minutes"]
fn ten_thousand_cycles_leave_nothing_behind() {
    cycles("ten_thousand_cycles_leave_nothing_behind", 10_000);
}

#[test]
fn many_targets_and_long_lists_of_patches() {
    let Some(lab) = Lab::new("many_targets_and_long_lists_of_patches") else { return };
    let targets: Vec<_> = (0..6).map(|_| Source::of(&["workers.c"]).start(&["1"])).collect();
    let before: Vec<_> = targets.iter().map(|target| Snapshot::of(target.pid())).collect();
    for target in &targets {
        lab.attach(target.pid());
    }
    let fixes: Vec<_> =
        (0..12).map(|i| lab.object(&format!("int victim(int x) {{ return x + {}; }}", i % 2 + 2))).collect();
    let first = &targets[0];
    for fix in &fixes {
        lab.patch(&["--pid", &first.pid_text(), "--function", "victim", fix]);
    }
    for target in &targets[1..] {
        lab.patch(&["--pid", &target.pid_text(), "--function", "victim", &fixes[0]]);
        assert_eq!(target.number("call 1"), 3);
    }
    assert_eq!(lab.status().targets.iter().map(|target| target.patches.len()).sum::<usize>(), 17);
    assert_eq!(first.number("call 1"), 4);
    for (target, before) in targets.iter().zip(&before) {
        assert_eq!(lab.detach(&["--revert", "--pid", &target.pid_text()]).clean, Some(true));
        assert_eq!(target.number("call 1"), 2);
        assert_eq!(target.numbers("counts")[3], 0);
        Snapshot::of(target.pid()).assert_same(before, "after detach");
    }
}
