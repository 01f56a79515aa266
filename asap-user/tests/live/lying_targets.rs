//! Targets that lie, or are absurd: what looking at them costs is bounded, the agent survives, and it either repairs them or says
//! clearly why it can't. No figure of time is asked for here; every command has to end, and the agent's memory is looked at.

use crate::support::{Fixture, Lab, Source, runs, wait_until};
use asap::report::FailureKind;
use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
};

/// Most memory that an agent may have had, kB. What it maps of files counts as far as it was looked at.
const MEMORY_MOST: u64 = 300_000;

fn source() -> Source {
    Source::of(&["lying.c"])
}

fn fix(lab: &Lab) -> String {
    lab.object("int victim(int x) { return x + 2; }")
}

/// Patches, calls, reverts and leaves as if nothing was; and looks at what the agent took for it.
fn repair(lab: &Lab, target: &Fixture, fix: &str) {
    lab.attach(target.pid());
    lab.patch(&["--function", "victim", fix]);
    assert_eq!(target.number("call 1"), 3);
    assert_modest(lab);
    let left = lab.detach(&["--revert"]);
    assert_eq!((left.remaining.len(), left.clean), (0, Some(true)));
    assert_eq!(target.number("call 1"), 2);
}

/// The agent lives, and has never had more memory than it may.
fn assert_modest(lab: &Lab) {
    let agent = lab.agent();
    assert!(runs(agent));
    let status = fs::read_to_string(format!("/proc/{agent}/status")).expect("it runs");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
    let peak: u64 = peak.expect("the kernel tells");
    println!("the agent's memory was {peak} kB at most");
    assert!(peak < MEMORY_MOST, "{peak} kB");
}

#[test]
fn a_program_with_spoilt_headers_in_memory_is_repaired_by_its_file() {
    let Some(lab) = Lab::new("a_program_with_spoilt_headers_in_memory_is_repaired_by_its_file") else { return };
    let target = source().start(&[]);
    assert_eq!(target.number("spoil"), 0);
    repair(&lab, &target, &fix(&lab));
}

/// A shared library of some functions.
fn library(lab: &Lab, name: &str) -> PathBuf {
    let path = lab.path(name);
    let text = lab.path("library.c");
    fs::write(&text, "int other(int x) { return x * 2; }\nint another(int x) { return other(x) + 1; }\n")
        .expect("written");
    let mut command = Command::new("gcc");
    command.args(["-O2", "-shared", "-fPIC", "-o"]).arg(&path).arg(&text);
    assert!(command.status().expect("gcc runs").success());
    path
}

/// Field of a section header (gABI, Elf64_Shdr) of the sections of this type.
fn spoil_sections(path: &Path, kind: u32, field: u64, value: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).expect("there");
    let word = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).expect("an ELF file");
        u64::from_le_bytes(bytes)
    };
    let (table, count) = (word(40), (word(56) >> 32) & 0xffff);
    for index in 0..count {
        let section = table + index * 64;
        if word(section) >> 32 == u64::from(kind) {
            file.write_all_at(&value.to_le_bytes(), section + field).expect("written");
        }
    }
}

#[test]
fn modules_with_absurd_tables_cost_nothing_but_their_names() {
    let Some(lab) = Lab::new("modules_with_absurd_tables_cost_nothing_but_their_names") else { return };
    let target = source().start(&[]);
    const SYMBOLS: (u32, u32) = (2, 11);
    const STRINGS: u32 = 3;
    const NOTES: u32 = 7;
    // Sizes, places and entry sizes that lead out of the file, around the address space, or to a division by zero.
    for (index, (kind, field, value)) in [
        (SYMBOLS.0, 32, 1 << 44),
        (SYMBOLS.0, 56, 0),
        (SYMBOLS.1, 32, u64::MAX),
        (SYMBOLS.1, 24, u64::MAX - 8),
        (STRINGS, 24, 1 << 40),
        (STRINGS, 32, u64::MAX),
        (NOTES, 32, 1 << 50),
    ]
    .into_iter()
    .enumerate()
    {
        let path = library(&lab, &format!("absurd{index}.so"));
        spoil_sections(&path, kind, field, value);
        assert_eq!(target.number(&format!("map {}", path.display())), 0);
    }
    // Not an ELF file at all, one that is only a header, and one that ends within its tables.
    let whole = fs::read(library(&lab, "whole.so")).expect("built");
    for (name, bytes) in
        [("text", &b"\x7fELF is what it says"[..]), ("short", &whole[..64]), ("half", &whole[..whole.len() / 2])]
    {
        let path = lab.path(name);
        let mut bytes = bytes.to_vec();
        bytes.resize(bytes.len().max(4096), 0);
        fs::write(&path, bytes).expect("written");
        assert_eq!(target.number(&format!("map {}", path.display())), 0);
    }
    repair(&lab, &target, &fix(&lab));
}

#[test]
fn a_module_of_two_gigabytes_is_not_read() {
    let Some(lab) = Lab::new("a_module_of_two_gigabytes_is_not_read") else { return };
    let target = source().start(&[]);
    let path = library(&lab, "huge.so");
    // A hole: it takes no room on the disk.
    fs::OpenOptions::new().write(true).open(&path).expect("there").set_len(2 << 30).expect("sparse files");
    assert_eq!(target.number(&format!("map {}", path.display())), 0);
    assert_eq!(target.ask(&format!("load {}", path.display())), "loaded");
    repair(&lab, &target, &fix(&lab));
}

#[test]
fn a_stack_without_an_end_counts_as_inside_and_is_named() {
    let Some(lab) = Lab::new("a_stack_without_an_end_counts_as_inside_and_is_named") else { return };
    let target = source().start(&[]);
    assert_eq!(target.number("endless"), 0);
    wait_until("the thread is there", || crate::support::thread_count(target.pid()) == 2);
    lab.attach(target.pid());
    let answer = lab.asap(&["patch", "--timeout", "1s", "--function", "victim", &fix(&lab)]);
    let failure = answer.failure();
    assert_eq!((answer.code, failure.kind), (4, FailureKind::Timeout), "{failure:?}");
    let busy = failure.busy.iter().find(|thread| thread.tid != target.pid()).expect("the thread is named");
    assert!(busy.stack.len() < 10_000 && answer.text.len() < 4 << 20, "{} frames", busy.stack.len());
    assert!(busy.stack.iter().any(|frame| frame.contains("endless")), "{:?}", busy.stack.first());
    assert_eq!(target.number("call 1"), 2);
    assert_modest(&lab);
    // The administrator's choice.
    lab.patch(&["--consistency", "lazy", "--function", "victim", &fix(&lab)]);
    assert_eq!(target.number("call 1"), 3);
}

#[test]
fn names_with_line_ends_and_escapes_are_shown_harmlessly() {
    let Some(lab) = Lab::new("names_with_line_ends_and_escapes_are_shown_harmlessly") else { return };
    let program = lab.path("an\nodd \u{1b}[2J\\012name (deleted)");
    fs::copy(source().build(), &program).expect("copied");
    let target = Fixture::start(&mut Command::new(&program));
    assert_eq!(target.number("call-itself"), 0);
    let report = lab.attach(target.pid());
    assert!(report.target.executable.ends_with("(deleted)") && report.target.executable.contains('\n'), "{report:?}");
    lab.patch(&["--function", "victim", "--name", "a\nb\u{1b}[1m", &fix(&lab)]);
    assert_eq!(target.number("call 1"), 3);
    for command in ["status", "list", "log"] {
        let shown = lab.asap_as_text(&[command]);
        assert_eq!(shown.code, 0, "{shown:?}");
        assert!(!shown.text.contains('\u{1b}'), "{command}: {}", shown.text);
        assert!(shown.text.contains("\\u{1b}[1m") || command == "status", "{command}: {}", shown.text);
        let is_forged = |line: &str| line.starts_with("odd") || line.starts_with("b\\");
        assert!(!shown.text.lines().any(is_forged), "{command}: {}", shown.text);
    }
    let log = fs::read_to_string(lab.path("log/audit.jsonl")).expect("a log");
    assert!(log.lines().all(|line| line.starts_with("{\"time\":") && line.ends_with('}')), "{log}");
    assert!(!log.contains('\u{1b}'));
    let left = lab.detach(&["--revert"]);
    assert_eq!((left.remaining.len(), left.clean), (0, Some(true)));
}

#[test]
fn ten_thousand_threads_are_looked_at_one_by_one() {
    let Some(lab) = Lab::new("ten_thousand_threads_are_looked_at_one_by_one") else { return };
    let target = source().start(&[]);
    let made = target.number("threads 10000");
    println!("{made} threads: as many as this machine allows");
    assert!(made >= 1000, "{made}");
    wait_until("they are there", || crate::support::thread_count(target.pid()) as i64 == made + 1);
    lab.attach(target.pid());
    let report = lab.patch(&["--timeout", "60s", "--function", "victim", &fix(&lab)]);
    assert_eq!(report.processes[0].threads as i64, made + 1);
    println!("{:?}", report.processes[0]);
    assert_eq!(target.number("call 1"), 3);
    assert_modest(&lab);
    let left = lab.detach(&["--revert", "--timeout", "60s"]);
    assert_eq!((left.remaining.len(), left.clean), (0, Some(true)));
}

#[test]
fn a_thousand_modules_are_searched() {
    let Some(lab) = Lab::new("a_thousand_modules_are_searched") else { return };
    let target = source().start(&[]);
    let first = library(&lab, "module.so");
    let folder = lab.path("modules");
    fs::create_dir(&folder).expect("made");
    for number in 0..1000 {
        let copy = folder.join(format!("module{number}.so"));
        fs::copy(&first, &copy).expect("copied");
        assert_eq!(target.ask(&format!("load {}", copy.display())), "loaded");
    }
    repair(&lab, &target, &fix(&lab));
    // Which of a thousand definitions is meant: the one that the target's linker finds first.
    lab.attach(target.pid());
    let report = lab.patch(&["--function", "other", &lab.object("int other(int x) { return x * 3; }")]);
    assert!(report.patch.functions[0].module.ends_with("/module0.so"), "{:?}", report.patch.functions);
    assert_modest(&lab);
}
