//! The everyday case: functions are replaced and come back, one or several, patches upon patches.

use crate::support::{Fixture, Lab, Snapshot, Source, wait_until};

fn workers(threads: &str) -> Fixture {
    Source::of(&["workers.c"]).start(&[threads])
}

/// An object whose victim() gives x + `more`.
fn adds(lab: &Lab, more: i32) -> String {
    lab.object(&format!("int victim(int x) {{ return x + {more}; }}"))
}

#[test]
fn a_function_is_replaced_and_comes_back() {
    let Some(lab) = Lab::new("a_function_is_replaced_and_comes_back") else { return };
    let target = workers("2");
    assert_eq!(target.number("call 5"), 6);
    let before = Snapshot::of(target.pid());
    let attached = lab.attach(target.pid());
    assert_eq!((attached.target.pid, attached.target.processes.len(), attached.adopted), (target.pid(), 1, false));
    assert_eq!(attached.target.processes[0].threads, 3);

    let patched = lab.patch(&["--function", "victim", &adds(&lab, 2)]);
    assert_eq!(target.number("call 5"), 7);
    assert_eq!(patched.patch.functions.len(), 1);
    let function = &patched.patch.functions[0];
    assert_eq!((function.name.as_str(), function.old.0 as i64), ("victim", target.number("where")));
    let listed = lab.status().targets;
    assert_eq!(listed[0].patches.iter().map(|patch| patch.id).collect::<Vec<_>>(), [patched.patch.id]);

    wait_until("a worker has called the new code", || target.numbers("counts")[1] > 0);
    let reverted = lab.revert(&[]);
    assert_eq!(reverted.patch.id, patched.patch.id);
    assert_eq!(target.number("call 5"), 6);
    assert!(lab.status().targets[0].patches.is_empty());
    assert_eq!(lab.detach(&[]).clean, Some(true));
    Snapshot::of(target.pid()).assert_same(&before, "after detach");
    let counts = target.numbers("counts");
    assert!(counts[0] > 0 && counts[1] > 0 && counts[3] == 0, "{counts:?}");
}

#[test]
fn stacked_patches_come_out_newest_first() {
    let Some(lab) = Lab::new("stacked_patches_come_out_newest_first") else { return };
    let target = workers("2");
    let before = Snapshot::of(target.pid());
    lab.attach(target.pid());
    lab.patch(&["--function", "victim", "--name", "first", &adds(&lab, 2)]);
    lab.patch(&["--function", "victim", "--name", "second", &adds(&lab, 3)]);
    assert_eq!(target.number("call 5"), 8);
    assert_eq!(lab.revert(&[]).patch.name, "second");
    assert_eq!(target.number("call 5"), 7);
    assert_eq!(lab.revert(&[]).patch.name, "first");
    assert_eq!(target.number("call 5"), 6);
    lab.asap(&["revert"]).refusal(&["no patch"]);
    assert_eq!(lab.detach(&[]).clean, Some(true));
    Snapshot::of(target.pid()).assert_same(&before, "after detach");
}

#[test]
fn the_older_of_two_patches_can_leave_first() {
    let Some(lab) = Lab::new("the_older_of_two_patches_can_leave_first") else { return };
    let target = workers("2");
    let before = Snapshot::of(target.pid());
    lab.attach(target.pid());
    let first = lab.patch(&["--function", "victim", "--name", "first", &adds(&lab, 2)]).patch.id;
    lab.patch(&["--function", "victim", "--name", "second", &adds(&lab, 3)]);
    assert_eq!(lab.revert(&[&first.0.to_string()]).patch.name, "first");
    assert_eq!(target.number("call 5"), 8, "the newer one stays in force");
    assert_eq!(lab.revert(&["second"]).patch.name, "second");
    assert_eq!(target.number("call 5"), 6, "and gives way to the function as it was, not to the older patch");
    assert_eq!(lab.detach(&[]).clean, Some(true));
    Snapshot::of(target.pid()).assert_same(&before, "after detach");
}

#[test]
fn a_patch_that_calls_the_one_below_keeps_it_in() {
    let Some(lab) = Lab::new("a_patch_that_calls_the_one_below_keeps_it_in") else { return };
    let target = workers("0");
    lab.attach(target.pid());
    let guard = "#include <asap-patch.h>\nint victim(int);\nASAP_REPLACE(victim);\n\
                 int victim(int x) { return x < 0 ? -1000 : ASAP_ORIGINAL(victim)(x) + 1; }";
    lab.patch(&["--name", "first", &lab.object(guard)]);
    assert_eq!((target.number("call 5"), target.number("call -5")), (7, -1000));
    lab.patch(&["--name", "second", &lab.object(guard)]);
    assert_eq!((target.number("call 5"), target.number("call -5")), (8, -1000));
    lab.asap(&["revert", "first"]).refusal(&["second"]);
    assert_eq!(target.number("call 5"), 8);
    lab.revert(&[]);
    assert_eq!(target.number("call 5"), 7);
    lab.revert(&[]);
    assert_eq!((target.number("call 5"), target.number("call -5")), (6, -4));
    assert_eq!(lab.detach(&[]).clean, Some(true));
}

#[test]
fn functions_in_one_page_and_in_several_patches() {
    let Some(lab) = Lab::new("functions_in_one_page_and_in_several_patches") else { return };
    let target = workers("2");
    let before = Snapshot::of(target.pid());
    lab.attach(target.pid());
    let both = lab.object("int victim(int x) { return x + 2; } int second(int x) { return x * 5; }");
    let report = lab.patch(&["--function", "victim", "--function", "second", "--name", "both", &both]);
    assert_eq!(report.patch.functions.len(), 2);
    assert_eq!((target.number("call 5"), target.number("second 5")), (7, 25));
    lab.revert(&[]);
    assert_eq!((target.number("call 5"), target.number("second 5")), (6, 15));

    lab.patch(&["--function", "victim", "--name", "one", &adds(&lab, 2)]);
    lab.patch(&["--function", "second", "--name", "other", &lab.object("int second(int x) { return x * 7; }")]);
    assert_eq!((target.number("call 5"), target.number("second 5")), (7, 35));
    lab.revert(&["one"]);
    assert_eq!((target.number("call 5"), target.number("second 5")), (6, 35));
    lab.revert(&["other"]);
    assert_eq!(target.number("second 5"), 15);
    assert_eq!(lab.detach(&[]).clean, Some(true));
    Snapshot::of(target.pid()).assert_same(&before, "after detach");
}

#[test]
fn functions_larger_than_a_page_and_astride_of_two() {
    let Some(lab) = Lab::new("functions_larger_than_a_page_and_astride_of_two") else { return };
    let target = Source::of(&["pages.c"]).start(&[]);
    let before = Snapshot::of(target.pid());
    lab.attach(target.pid());
    let fix = lab.object(
        "int large(int x) { return -x; } int astride(int x) { return x + 100; } \
                          int remote(int x) { return x + 200; }",
    );
    lab.patch(&["--function", "large", "--function", "astride", "--function", "remote", &fix]);
    let all = || ["large 5", "astride 5", "remote 5"].map(|command| target.number(command));
    assert_eq!(all(), [-5, 105, 205]);
    lab.revert(&[]);
    assert_eq!(all(), [3077, 6, 7]);
    // One after the other, out in another order.
    let mut patches = Vec::new();
    for function in ["remote", "large", "astride"] {
        patches.push(lab.patch(&["--function", function, &fix]).patch.id.0.to_string());
    }
    assert_eq!(all(), [-5, 105, 205]);
    for (index, expected) in [(1, [3077, 105, 205]), (0, [3077, 105, 7]), (2, [3077, 6, 7])] {
        lab.revert(&[&patches[index]]);
        assert_eq!(all(), expected);
    }
    // A patch that is larger than a page itself.
    let large = "int large(int x) { __asm__ volatile(\".rept 3072\\n\\tlea 2(%0), %0\\n\\tnop\\n\\t.endr\" : \"+r\"(x)); return x; }";
    lab.patch(&["--function", "large", &lab.object(large)]);
    assert_eq!(target.number("large 0"), 6144);
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
    Snapshot::of(target.pid()).assert_same(&before, "after detach");
}

#[test]
fn a_patch_stays_after_detach_and_is_adopted() {
    let Some(lab) = Lab::new("a_patch_stays_after_detach_and_is_adopted") else { return };
    let target = workers("2");
    let before = Snapshot::of(target.pid());
    lab.attach(target.pid());
    let patch = lab.patch(&["--function", "victim", "--name", "stays", &adds(&lab, 2)]).patch;
    let left = lab.detach(&[]);
    assert_eq!(left.remaining.iter().map(|patch| patch.id).collect::<Vec<_>>(), [patch.id]);
    assert_eq!((left.reverted.len(), left.clean), (0, None));
    assert!(lab.asap(&["stop"]).code == 0);
    assert_eq!(target.number("call 5"), 7, "without an agent");

    let attached = lab.attach(target.pid());
    assert!(attached.adopted);
    assert_eq!(attached.target.patches.len(), 1);
    let found = &attached.target.patches[0];
    assert_eq!((found.id, &found.name, &found.sha256), (patch.id, &patch.name, &patch.sha256));
    lab.patch(&["--function", "victim", &adds(&lab, 3)]);
    assert_eq!(target.number("call 5"), 8);
    let gone = lab.detach(&["--revert"]);
    assert_eq!((gone.reverted.len(), gone.remaining.len()), (2, 0));
    assert_eq!(target.number("call 5"), 6);
    Snapshot::of(target.pid()).assert_same(&before, "after detach --revert");
}

#[test]
fn a_pointer_to_the_function_leads_to_the_new_code() {
    let Some(lab) = Lab::new("a_pointer_to_the_function_leads_to_the_new_code") else { return };
    let target = Source::of(&["names_a.c", "names_b.c"]).start(&[]);
    lab.attach(target.pid());
    lab.patch(&["--function", "victim", &adds(&lab, 50)]);
    assert_eq!((target.number("call 5"), target.number("pointer 5"), target.number("thread 5")), (55, 55, 55));
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
    assert_eq!((target.number("call 5"), target.number("pointer 5"), target.number("thread 5")), (6, 6, 6));
}

#[test]
fn programs_at_fixed_addresses_and_static_ones() {
    let Some(lab) = Lab::new("programs_at_fixed_addresses_and_static_ones") else { return };
    for flags in [&["-O2", "-no-pie", "-fno-pie"][..], &["-O2", "-static"], &["-O2", "-static-pie"], &["-O0", "-pie"]] {
        println!("{flags:?}");
        let target = Source::of(&["workers.c"]).with(flags).start(&["2"]);
        let before = Snapshot::of(target.pid());
        lab.attach(target.pid());
        lab.patch(&["--function", "victim", &adds(&lab, 2)]);
        assert_eq!(target.number("call 5"), 7, "{flags:?}");
        assert_eq!(lab.detach(&["--revert"]).clean, Some(true), "{flags:?}");
        assert_eq!(target.number("call 5"), 6, "{flags:?}");
        assert_eq!(target.numbers("counts")[3], 0, "{flags:?}");
        Snapshot::of(target.pid()).assert_same(&before, &format!("{flags:?}"));
    }
}
