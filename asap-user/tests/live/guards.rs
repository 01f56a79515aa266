//! Under which guards the tests of the sandbox run programs: one place to add to.

use super::support::{Answer, Lab, lab_answer};
use std::path::Path;

/// Each is what follows `--guards`; "" is the sandbox without any.
pub const GUARD_SETS: &[&str] = &["", "shadow-stack", "cfi", "nx", "syscalls", "shadow-stack,cfi,nx,syscalls"];

/// Those under which what is legal must work: none, and all.
pub const LEGAL_SETS: &[&str] = &["", "shadow-stack,cfi,nx,syscalls"];

/// Runs a program under `asap run`. The agent that this starts ends with the laboratory.
pub fn run(lab: &Lab, options: &[&str], program: &Path, arguments: &[&str]) -> Answer {
    let program = program.to_str().expect("UTF-8");
    let answer = lab_answer(lab.start(&[&["run"], options, &["--", program], arguments].concat()));
    lab.agent();
    answer
}

/// As `run`, under one of [`GUARD_SETS`].
pub fn run_guarded(lab: &Lab, guards: &str, program: &Path) -> Answer {
    let options: &[&str] = if guards.is_empty() { &[] } else { &["--guards", guards] };
    run(lab, options, program, &[])
}

/// Whether `guard` is among `guards`.
pub fn has(guards: &str, guard: &str) -> bool {
    guards.split(',').any(|name| name == guard)
}
