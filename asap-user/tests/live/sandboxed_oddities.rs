//! What is legal and odd must work in the sandbox as it does natively, under all guards: each program runs natively first, and must
//! say the same there, from its first instruction on, with every set of guards.

use crate::{
    guards::{LEGAL_SETS, has, run_guarded},
    support::{Lab, Source},
};
use std::process::Command;

const ORDINARY: &[&str] = &["-std=gnu17", "-O2", "-g0", "-fpie", "-pie"];

/// Natively, then in the sandbox. Guards that `not_under` names do not allow what it does.
fn check(name: &str, source: &Source, not_under: &[&str]) {
    let Some(lab) = Lab::new(name) else { return };
    let program = source.build();
    let native = Command::new(&program).output().expect("it runs");
    let said = String::from_utf8_lossy(&native.stdout);
    assert!(native.status.code().is_some() && !said.is_empty(), "natively: {native:?}");
    for guards in LEGAL_SETS.iter().filter(|guards| !not_under.iter().any(|guard| has(guards, guard))) {
        let answer = run_guarded(&lab, guards, &program);
        assert_eq!((answer.text.as_str(), Some(answer.code)), (&*said, native.status.code()), "{guards}: {answer:?}");
    }
}

macro_rules! oddities {
    ($($name:ident: $file:literal, $flags:expr, not under $guards:expr;)*) => {$(
        #[test]
        fn $name() {
            check(stringify!($name), &Source::of(&[$file]).with($flags), $guards);
        }
    )*};
}

oddities! {
    exceptions_through_many_frames: "oddities/exceptions.cc", &["-O2"], not under &[];
    longjmp_also_out_of_signal_handlers: "oddities/longjmp.c", ORDINARY, not under &[];
    coroutines_by_swapcontext: "oddities/swapcontext.c", ORDINARY, not under &[];
    coroutines_by_hand: "oddities/stack_switch.c", ORDINARY, not under &[];
    signal_handlers_that_change_registers: "oddities/signals.c", ORDINARY, not under &[];
    segv_handlers_that_repair: "oddities/repair.c", ORDINARY, not under &[];
    threads_that_are_cancelled: "oddities/cancel.c", ORDINARY, not under &[];
    other_programs_by_vfork_and_spawn: "oddities/spawn.c", ORDINARY, not under &[];
    clone_with_own_stacks: "oddities/clone_stack.c", ORDINARY, not under &[];
    nested_functions: "oddities/nested.c", ORDINARY, not under &["nx"];
    libraries_that_come_and_go: "oddities/dlopen.c", ORDINARY, not under &[];
    ifuncs: "oddities/ifunc.c", ORDINARY, not under &[];
    lazy_binding: "oddities/ifunc.c", &["-O2", "-fpie", "-pie", "-Wl,-z,lazy"], not under &[];
    a_static_program: "oddities/callbacks.c", &["-O2", "-static"], not under &[];
    a_program_at_a_fixed_address: "oddities/interpreters.c", &["-O2", "-fno-pie", "-no-pie"], not under &[];
    registers_that_outlive_calls: "oddities/ipa_ra.c", &["-O3", "-fipa-ra", "-fpie", "-pie"], not under &[];
    interpreters: "oddities/interpreters.c", ORDINARY, not under &[];
    alloca_and_deep_recursion: "oddities/alloca.c", ORDINARY, not under &[];
    profiling_signals_every_millisecond: "oddities/profiling.c", ORDINARY, not under &[];
    a_storm_of_forks: "oddities/forks.c", ORDINARY, not under &[];
    a_storm_of_threads: "oddities/threads.c", ORDINARY, not under &[];
    callbacks_of_the_library: "oddities/callbacks.c", ORDINARY, not under &[];
    a_program_that_becomes_itself: "oddities/reexec.c", ORDINARY, not under &[];
    backtraces: "oddities/backtrace.c", &["-O2", "-fpie", "-pie", "-rdynamic"], not under &[];
    direct_system_calls: "oddities/direct_calls.c", ORDINARY, not under &[];
    code_that_is_made: "oddities/made_code.c", ORDINARY, not under &["nx"];
}
