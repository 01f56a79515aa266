//! Attacks: each succeeds natively, and in the sandbox without the guard that is against it; with that guard it does not.

use crate::{
    guards::{GUARD_SETS, has, run, run_guarded},
    support::{Lab, Source},
};
use std::{fs, process::Command};

/// As old programs were built: no compiler's or processor's protection.
const UNPROTECTED: &[&str] =
    &["-O1", "-fno-omit-frame-pointer", "-fno-stack-protector", "-fcf-protection=none", "-fpie", "-pie"];

/// What SIGKILL makes of an exit code.
const KILLED: i32 = 137;

/// The attack in `file`, which any of the guards `against` stops.
fn check(name: &str, file: &'static str, against: &[&str]) {
    let Some(lab) = Lab::new(name) else { return };
    let program = Source::of(&[file]).with(UNPROTECTED).build();
    let native = Command::new(&program).output().expect("it runs");
    assert_eq!((&*native.stdout, native.status.code()), (&b"owned\n"[..], Some(0)), "natively it succeeds: {native:?}");
    for guards in GUARD_SETS {
        let answer = run_guarded(&lab, guards, &program);
        if against.iter().any(|guard| has(guards, guard)) {
            assert!(!answer.text.contains("owned"), "{guards}: {answer:?}");
            assert_eq!(answer.code, KILLED, "{guards}: {answer:?}");
            // Who did what, where, and how it got there.
            assert!(answer.errors.contains("1 violation"), "{guards}: {answer:?}");
            assert!(against.iter().any(|guard| answer.errors.contains(&format!(" {guard} "))), "{guards}: {answer:?}");
            assert!(answer.errors.contains("#0 "), "a stack: {guards}: {answer:?}");
        } else {
            assert_eq!(
                (answer.text.as_str(), answer.code),
                ("owned\n", 0),
                "{guards}: nobody is against it: {answer:?}"
            );
        }
    }
}

macro_rules! attacks {
    ($($name:ident: $file:literal, against $guards:expr;)*) => {$(
        #[test]
        fn $name() {
            check(stringify!($name), $file, $guards);
        }
    )*};
}

attacks! {
    a_return_address_that_was_overwritten: "attacks/return_address.c", against &["shadow-stack"];
    return_oriented_programming: "attacks/rop.c", against &["shadow-stack"];
    // Not stopped yet: where nothing was copied, as on a stack that the program has just made, any return counts as right.
    a_stack_that_was_exchanged: "attacks/pivot.c", against &["shadow-stack"];
    a_function_pointer_that_was_overwritten: "attacks/function_pointer.c", against &["cfi"];
    a_virtual_table_that_was_overwritten: "attacks/vtable.cc", against &["cfi"];
    shellcode_on_the_stack: "attacks/shellcode_stack.c", against &["nx"];
    shellcode_on_the_heap: "attacks/shellcode_heap.c", against &["nx"];
    shellcode_by_a_return: "attacks/shellcode_return.c", against &["nx", "shadow-stack"];
}

#[test]
fn a_system_call_that_is_forbidden() {
    let Some(lab) = Lab::new("a_system_call_that_is_forbidden") else { return };
    let program = Source::of(&["attacks/forbidden_call.c"]).with(UNPROTECTED).build();
    let native = Command::new(&program).output().expect("it runs");
    assert_eq!(&*native.stdout, b"owned\n", "natively it succeeds");
    assert_eq!(run(&lab, &[], &program, &[]).text, "owned\n", "and without a policy");
    if !GUARD_SETS.iter().any(|guards| has(guards, "syscalls")) {
        return;
    }
    let policy = lab.path("policy.toml");
    let options = ["--policy", policy.to_str().expect("ASCII")];
    for (action, text, code) in [("kill", "", KILLED), ("errno EACCES", "survived\n", 0), ("log", "owned\n", 0)] {
        let rules = format!("[[syscalls.rules]]\ncalls = [\"execve\"]\naction = \"{action}\"\n");
        fs::write(&policy, format!("guards = [\"syscalls\"]\n[syscalls]\ndefault = \"allow\"\n{rules}"))
            .expect("written");
        let answer = run(&lab, &options, &program, &[]);
        assert_eq!((answer.text.as_str(), answer.code), (text, code), "{action}: {answer:?}");
    }
}
