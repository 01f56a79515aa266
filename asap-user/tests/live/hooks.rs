//! Hooks of a patch: code that runs in the target around apply and revert.

use crate::support::{Lab, Snapshot, Source};

/// A patch whose hooks leave marks: 1 before apply, 2 after, 3 before revert, 4 after.
fn with_hooks(lab: &Lab, pre_apply: i32, pre_revert: &str) -> String {
    lab.object(&format!(
        "#include <asap-patch.h>
         void mark(int); int victim(int); extern int mark_count;
         ASAP_REPLACE(victim);
         int victim(int x) {{ return x + 2; }}
         static int first(void) {{ mark(1); return {pre_apply}; }}
         static void second(void) {{ mark(2); }}
         static int third(void) {{ mark(3); return {pre_revert}; }}
         static void fourth(void) {{ mark(4); }}
         ASAP_PRE_APPLY(first);
         ASAP_POST_APPLY(second);
         ASAP_PRE_REVERT(third);
         ASAP_POST_REVERT(fourth);"
    ))
}

#[test]
fn hooks_run_once_each_and_in_order() {
    let Some(lab) = Lab::new("hooks_run_once_each_and_in_order") else { return };
    let target = Source::of(&["workers.c"]).start(&["2"]);
    let before = Snapshot::of(target.pid());
    lab.attach(target.pid());
    let fix = with_hooks(&lab, 0, "0");
    lab.patch(&["--dry-run", &fix]);
    assert!(target.numbers("marks").is_empty(), "a dry run runs no hooks");
    lab.patch(&[&fix]);
    assert_eq!(target.numbers("marks"), [1, 2]);
    assert_eq!(target.number("call 1"), 3);
    lab.revert(&[]);
    assert_eq!(target.numbers("marks"), [1, 2, 3, 4]);
    assert_eq!(target.number("call 1"), 2);
    lab.patch(&[&fix]);
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
    assert_eq!(target.numbers("marks"), [1, 2, 3, 4, 1, 2, 3, 4]);
    assert_eq!(target.numbers("counts")[3], 0);
    Snapshot::of(target.pid()).assert_same(&before, "after detach");
}

#[test]
fn a_hook_can_refuse_the_patch() {
    let Some(lab) = Lab::new("a_hook_can_refuse_the_patch") else { return };
    let target = Source::of(&["workers.c"]).start(&["2"]);
    lab.attach(target.pid());
    let before = Snapshot::of(target.pid());
    let failure = lab.asap(&["patch", &with_hooks(&lab, 7, "0")]).failure();
    assert_eq!(failure.kind.exit_code(), 1);
    assert!(failure.message.contains('7'), "{failure:?}");
    assert_eq!(target.number("call 1"), 2);
    assert_eq!(target.numbers("marks"), [1], "and no other hook ran");
    Snapshot::of(target.pid()).assert_same(&before, "refused by a hook");
    assert!(lab.status().targets[0].patches.is_empty());
    assert_eq!(lab.detach(&[]).clean, Some(true));
}

#[test]
fn a_hook_can_refuse_the_revert() {
    let Some(lab) = Lab::new("a_hook_can_refuse_the_revert") else { return };
    let target = Source::of(&["workers.c"]).start(&["2"]);
    lab.attach(target.pid());
    // Refuses the first time only.
    lab.patch(&[&with_hooks(&lab, 0, "mark_count < 4 ? 9 : 0")]);
    let failure = lab.asap(&["revert"]).failure();
    assert_eq!(failure.kind.exit_code(), 1);
    assert!(failure.message.contains('9'), "{failure:?}");
    assert_eq!(target.number("call 1"), 3, "the patch stays");
    assert_eq!(lab.status().targets[0].patches.len(), 1);
    assert_eq!(target.numbers("marks"), [1, 2, 3]);
    lab.revert(&[]);
    assert_eq!(target.number("call 1"), 2);
    assert_eq!(target.numbers("marks"), [1, 2, 3, 3, 4]);
    assert_eq!(lab.detach(&[]).clean, Some(true));
}

#[test]
fn hooks_run_in_every_process() {
    let Some(lab) = Lab::new("hooks_run_in_every_process") else { return };
    let target = Source::of(&["relatives.c"]).start(&["2"]);
    lab.attach(target.pid());
    let fix = lab.object(
        "#include <asap-patch.h>
         int victim(int, int); ASAP_REPLACE(victim);
         static int applied;
         static void count(void) { applied++; } ASAP_POST_APPLY(count);
         int victim(int x, int wait) { (void)wait; return x + 100 * applied; }",
    );
    lab.patch(&[&fix]);
    assert_eq!((target.number("call 10"), target.numbers("children")), (110, vec![110, 110]));
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
    assert_eq!((target.number("call 10"), target.numbers("children")), (11, vec![11, 11]));
}
