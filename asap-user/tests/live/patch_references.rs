//! What a patch may refer to: the target's functions and variables, static ones by their file, thread-local ones; and
//! functions of its libraries that it did not use before.

use crate::support::{Lab, Snapshot, Source};

#[test]
fn static_functions_and_data_of_the_target() {
    let Some(lab) = Lab::new("static_functions_and_data_of_the_target") else { return };
    let target = Source::of(&["names_a.c", "names_b.c"]).start(&[]);
    lab.attach(target.pid());
    let fix = lab.object(
        "#include <asap-patch.h>
         int victim(int); ASAP_REPLACE(victim);
         extern volatile int limit; ASAP_IMPORT(limit, \"names_a.c:limit\");
         extern volatile int table[4]; ASAP_IMPORT(table, \"names_a.c:table\");
         int helper_a(int); ASAP_IMPORT(helper_a, \"names_a.c:helper\");
         int helper_b(int); ASAP_IMPORT(helper_b, \"names_b.c:helper\");
         int victim(int x) { limit = 70; return helper_a(x) * 1000 + helper_b(x) * 10 + table[3]; }",
    );
    lab.patch(&[&fix]);
    assert_eq!(target.number("call 5"), 6000 + 40 + 8);
    assert_eq!(target.number("call 99"), 70_000 + 980 + 8, "the limit is the target's own");
    assert_eq!(target.ask("state"), "70 40 5 6");
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
    assert_eq!(target.number("call 99"), 70);
}

#[test]
fn static_functions_of_one_name_are_told_apart() {
    let Some(lab) = Lab::new("static_functions_of_one_name_are_told_apart") else { return };
    let target = Source::of(&["names_a.c", "names_b.c"]).start(&[]);
    lab.attach(target.pid());
    let fix = lab.object("int helper(int x) { return x + 1000; }");
    let refusal = lab.asap(&["patch", "--function", "helper", &fix]).refusal(&["helper", "names_a.c", "names_b.c"]);
    assert!(refusal.way_out.contains("--address"), "{refusal:?}");
    assert_eq!(target.numbers("helpers 5"), [6, 4]);
    let by_file = lab.patch(&["--function", "names_b.c:helper", &fix]).patch;
    assert_eq!(target.numbers("helpers 5"), [6, 1005]);
    lab.revert(&[]);
    let by_file_a = lab.patch(&["--function", "names_a.c:helper", &fix]).patch;
    assert_eq!(target.numbers("helpers 5"), [1005, 4]);
    lab.revert(&[]);
    // By address, as the refusal lists it.
    let addresses: Vec<&str> = refusal
        .message
        .split(|c: char| c.is_whitespace() || ",;()".contains(c))
        .filter(|word| word.starts_with("0x"))
        .collect();
    assert_eq!(addresses.len(), 2, "{refusal:?}");
    for address in addresses {
        let report = lab.patch(&["--function", "helper", "--address", address, &fix]).patch;
        let entry = report.functions[0].old;
        assert!(entry == by_file.functions[0].old || entry == by_file_a.functions[0].old, "{report:?}");
        let answers = target.numbers("helpers 5");
        let expected = if entry == by_file.functions[0].old { [6, 1005] } else { [1005, 4] };
        assert_eq!(answers, expected);
        lab.revert(&[]);
    }
    assert_eq!(lab.detach(&[]).clean, Some(true));
}

#[test]
fn thread_local_variables_of_the_target() {
    let Some(lab) = Lab::new("thread_local_variables_of_the_target") else { return };
    for flags in [&["-O2", "-fpie", "-pie"][..], &["-O2", "-no-pie", "-fno-pie"]] {
        let target = Source::of(&["names_a.c", "names_b.c"]).with(flags).start(&[]);
        lab.attach(target.pid());
        for model in ["initial-exec", "local-exec", "global-dynamic", "local-dynamic"] {
            let flags = ["-O2", "-fPIC", &format!("-ftls-model={model}")];
            let source =
                "extern __thread int thread_count; int victim(int x) { thread_count += 100; return x + thread_count; }";
            let before: i64 = target.numbers("state")[2];
            let fix = lab.compile("gcc", "c", &flags, source);
            lab.patch(&["--function", "victim", &fix]);
            assert_eq!(target.number("call 1"), 1 + before + 100, "{model}");
            assert_eq!(target.number("thread 1"), 1 + 5 + 100, "{model}: a new thread has its own");
            assert_eq!(target.numbers("state")[2], before + 100, "{model}");
            lab.revert(&[]);
        }
        assert_eq!(lab.detach(&[]).clean, Some(true));
    }
}

#[test]
fn functions_of_libraries_that_the_target_did_not_use() {
    let Some(lab) = Lab::new("functions_of_libraries_that_the_target_did_not_use") else { return };
    let target = Source::of(&["names_a.c", "names_b.c"]).start(&[]);
    lab.attach(target.pid());
    for flags in [&["-O2", "-fPIC"][..], &["-O2", "-fPIC", "-fno-plt"], &["-O0", "-fPIC", "-fno-builtin"]] {
        // strcasestr is new to it; memcpy, strlen and strchr are IFUNCs of the C library; errno is thread-local there.
        let fix = lab.compile(
            "gcc",
            "c",
            flags,
            "#define _GNU_SOURCE\n#include <string.h>\n#include <stdlib.h>\n#include <errno.h>\n#include <unistd.h>
             static char text[64];
             int victim(int x)
             {
                 size_t (*length)(const char *) = strlen;
                 memcpy(text, \"needle in HAYSTACK\", 19);
                 errno = 0;
                 if (x == 0) return strcasestr(text, \"haystack\") - text;
                 if (x == 1) return (int)length(text);
                 if (x == 2) return close(-1) == -1 && errno == EBADF;
                 return (int)labs(-x) + (strchr(text, 'i') != 0);
             }",
        );
        lab.patch(&["--function", "victim", &fix]);
        let answers: Vec<_> = (0..4).map(|x| target.number(&format!("call {x}"))).collect();
        assert_eq!(answers, [10, 18, 1, 4], "{flags:?}");
        lab.revert(&[]);
    }
    assert_eq!(lab.detach(&[]).clean, Some(true));
}

#[test]
fn the_original_stays_callable() {
    let Some(lab) = Lab::new("the_original_stays_callable") else { return };
    let target = Source::of(&["names_a.c", "names_b.c"]).start(&[]);
    let before = Snapshot::of(target.pid());
    lab.attach(target.pid());
    let fix = lab.object(
        "#include <asap-patch.h>
         int victim(int); ASAP_REPLACE(victim);
         int victim(int x) { return x < 0 ? -1 : ASAP_ORIGINAL(victim)(x) * 10; }
         int old_helper(int); ASAP_ORIGINAL_NAMED(old_helper, \"names_b.c:helper\");
         ASAP_REPLACES(\"names_b.c:helper\")
         int new_helper(int x) { return old_helper(x) + 500; }",
    );
    let report = lab.patch(&[&fix]);
    assert_eq!(report.patch.functions.len(), 2);
    assert_eq!((target.number("call 5"), target.number("call -5")), (60, -1));
    assert_eq!(target.numbers("helpers 5"), [6, 504]);
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
    assert_eq!((target.number("call 5"), target.numbers("helpers 5")), (6, vec![6, 4]));
    Snapshot::of(target.pid()).assert_same(&before, "after detach");
}

#[test]
fn a_function_of_a_library_is_replaced() {
    let Some(lab) = Lab::new("a_function_of_a_library_is_replaced") else { return };
    let target = Source::of(&["confined.c"]).start(&[]);
    let before = Snapshot::of(target.pid());
    lab.attach(target.pid());
    let fix = lab
        .object("int atoi(const char *text) { (void)text; return 4; } int vdprintf(int fd, const char *f, void *l);");
    let report = lab.patch(&["--function", "libc.so.6:atoi", &fix]);
    assert!(report.patch.functions[0].module.contains("libc.so.6"), "{report:?}");
    assert_eq!(target.number("call 1"), 2);
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
    Snapshot::of(target.pid()).assert_same(&before, "after detach");
}
