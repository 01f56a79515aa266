//! P4: nothing in the target is ever writable and executable at once: seen by a watch on its memory map through everything that
//! asap does.

use crate::support::{Lab, Source, WatchedMaps};

#[test]
fn p4_nothing_is_writable_and_executable_at_once() {
    let Some(lab) = Lab::new("p4_nothing_is_writable_and_executable_at_once") else { return };
    let target = Source::of(&["workers.c"]).start(&["1"]);
    let watch = WatchedMaps::begin(target.pid());
    let fix = lab.object(
        "#include <asap-patch.h>\nstatic int calls; static const char words[] = \"abc\"; extern int mark_count;\n\
         int victim(int); ASAP_REPLACE(victim);\n\
         static int before(void) { return mark_count < 0; } ASAP_PRE_APPLY(before);\n\
         int victim(int x) { calls++; return ASAP_ORIGINAL(victim)(x) + (words[calls & 1] != 0); }",
    );
    for _ in 0..15 {
        lab.attach(target.pid());
        lab.patch(&["--dry-run", &fix]);
        lab.patch(&["--name", "first", &fix]);
        lab.patch(&["--name", "second", "--consistency", "lazy", &fix]);
        assert_eq!(target.number("call 1"), 4);
        lab.revert(&[]);
        lab.detach(&[]);
        lab.attach(target.pid());
        lab.detach(&["--revert"]);
        assert_eq!(target.number("call 1"), 2);
    }
    let (looks, bad) = watch.end();
    assert!(looks > 100, "the watch looked {looks} times only");
    assert!(bad.is_empty(), "{bad:#?}");
    assert_eq!(target.numbers("counts")[3], 0);
}
