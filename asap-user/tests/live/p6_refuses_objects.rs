//! P6: objects that are no patch, or no patch for this target.

use crate::support::{Lab, Snapshot, Source};
use std::fs;

#[test]
fn p6_objects_that_are_no_patch() {
    let Some(lab) = Lab::new("p6_objects_that_are_no_patch") else { return };
    let target = Source::of(&["workers.c"]).start(&["1"]);
    lab.attach(target.pid());
    let before = Snapshot::of(target.pid());
    let good = lab.object("int victim(int x) { return x + 2; }");
    let bytes = fs::read(&good).expect("readable");
    let refuse = |what: &str, file: &str, words: &[&str]| {
        println!("{what}");
        lab.asap(&["patch", "--function", "victim", "--timeout", "5s", file]).refusal(words);
        Snapshot::of(target.pid()).assert_same(&before, what);
        assert_eq!(target.number("call 1"), 2, "{what}");
    };
    let file = |name: &str, content: &[u8]| {
        let path = lab.path(name);
        fs::write(&path, content).expect("written");
        path.to_str().expect("ASCII").to_owned()
    };
    let with = |offset: usize, value: &[u8]| {
        let mut changed = bytes.clone();
        changed[offset..offset + value.len()].copy_from_slice(value);
        changed
    };

    refuse("another architecture", &file("arm.o", &with(18, &[183, 0])), &["arm.o"]);
    refuse("32-bit", &file("narrow.o", &with(4, &[1])), &["narrow.o"]);
    refuse("big-endian", &file("big.o", &with(5, &[2])), &["big.o"]);
    refuse("empty", &file("empty.o", b""), &["empty.o"]);
    refuse("a text", &file("text.o", b"int victim(int x) { return x + 2; }\n"), &["text.o"]);
    refuse("garbage", &file("garbage.o", &vec![0xa5; 5000]), &["garbage.o"]);
    refuse("ELF, then garbage", &file("half.o", &[&bytes[..64], &[0xff; 4000][..]].concat()), &["half.o"]);
    for part in [63, 64, bytes.len() / 2, bytes.len() - 1] {
        refuse("truncated", &file("truncated.o", &bytes[..part]), &["truncated.o"]);
    }
    let huge = lab.path("huge.o");
    fs::File::create(&huge).and_then(|file| file.set_len(1 << 30)).expect("a large hole");
    refuse("1 GiB", huge.to_str().expect("ASCII"), &["huge.o"]);
    refuse("not there", lab.path("nowhere.o").to_str().expect("ASCII"), &["nowhere.o"]);
    refuse("a directory", lab.path("").to_str().expect("ASCII"), &[]);
    let program = Source::of(&["workers.c"]).build();
    refuse("a program", program.to_str().expect("ASCII"), &[]);
    let library = lab.path("library.so");
    let made = std::process::Command::new("gcc").args(["-shared", "-o"]).arg(&library).arg(&good).status();
    assert!(made.expect("gcc runs").success());
    refuse("a library", library.to_str().expect("ASCII"), &["library.so"]);

    let object = |source: &str| lab.object(source);
    let unresolved = object("int no_such_function(int); int victim(int x) { return no_such_function(x); }");
    refuse("an unresolved symbol", &unresolved, &["no_such_function"]);
    let constructor = object(
        "static int v; __attribute__((constructor)) static void set(void) { v = 1; } int victim(int x) { return x + v; }",
    );
    refuse("a constructor", &constructor, &["constructor"]);
    let thread_local = object("static __thread int v; int victim(int x) { return x + v++; }");
    refuse("a thread-local variable of its own", &thread_local, &["thread"]);
    let copied = object("static int mark_count; int victim(int x) { return x + mark_count++; }");
    refuse("a copy of a variable of the target", &copied, &["mark_count"]);
    let absent = object("int other(int x) { return x; }");
    refuse("without the function", &absent, &["victim", "other"]);

    // A relocation type that nobody knows: that of the call.
    let calling = fs::read(object("int second(int); int victim(int x) { return second(x) + 1; }")).expect("readable");
    refuse("an unknown relocation", &file("relocation.o", &with_unknown_relocation(calling)), &["relocation"]);

    let twice = lab.object("int victim(int x) { return x + 9; }");
    println!("a duplicate definition");
    lab.asap(&["patch", "--function", "victim", &good, &twice]).refusal(&["victim"]);
    Snapshot::of(target.pid()).assert_same(&before, "a duplicate definition");

    assert!(lab.status().targets[0].patches.is_empty());
    lab.patch(&["--function", "victim", &good]);
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
}

/// Sets the type of all relocations of `.text` to one that is not assigned.
fn with_unknown_relocation(mut object: Vec<u8>) -> Vec<u8> {
    let number = |object: &[u8], at: usize, size: usize| {
        object[at..at + size].iter().rev().fold(0_usize, |sum, &byte| sum << 8 | usize::from(byte))
    };
    // Section headers (gABI): e_shoff, e_shentsize, e_shnum; SHT_RELA is 4; the first is that of .text.
    let (headers, size, count) = (number(&object, 40, 8), number(&object, 58, 2), number(&object, 60, 2));
    let mut changed = 0;
    for index in 0..count {
        let header = headers + index * size;
        if number(&object, header + 4, 4) == 4 {
            let (start, length) = (number(&object, header + 24, 8), number(&object, header + 32, 8));
            for entry in (start..start + length).step_by(24) {
                object[entry + 8..entry + 12].copy_from_slice(&250_u32.to_le_bytes());
                changed += 1;
            }
            break;
        }
    }
    assert!(changed > 0, "the object has relocations");
    object
}

#[test]
fn p6_objects_with_random_damage_never_harm() {
    let Some(lab) = Lab::new("p6_objects_with_random_damage_never_harm") else { return };
    let target = Source::of(&["workers.c"]).start(&["1"]);
    lab.attach(target.pid());
    let agent = lab.agent();
    let before = Snapshot::of(target.pid());
    let source = "static const char *words[] = {\"a\", \"b\"}; static int calls; int second(int); \
                  int victim(int x) { calls++; return second(x) + words[x & 1][0]; }";
    let bytes = fs::read(lab.object(source)).expect("readable");
    let mut random = crate::support::Random::new();
    let mut refused = 0;
    for round in 0..60 {
        let mut damaged = bytes.clone();
        for _ in 0..1 + random.below(12) {
            let at = random.below(damaged.len());
            damaged[at] = random.below(256) as u8;
        }
        let path = lab.path("damaged.o");
        fs::write(&path, damaged).expect("written");
        // Only said, not done: damaged instructions are instructions, and would do what they say.
        let answer = lab.asap(&["patch", "--dry-run", "--function", "victim", path.to_str().expect("ASCII")]);
        if answer.code != 0 {
            answer.refusal(&[]);
            refused += 1;
        }
        Snapshot::of(target.pid()).assert_same(&before, &format!("round {round}"));
    }
    println!("{refused} of 60 damaged objects were refused");
    assert_eq!(lab.agent(), agent, "the agent lives");
    assert_eq!(lab.detach(&[]).clean, Some(true));
}
