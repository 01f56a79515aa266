//! What is no patch gets a clear word.

use super::harness::{Symbols, compile, load, read};
use crate::address::TargetAddr;
use crate::patch::{Bases, PatchError, PatchObject};

const PLAIN: &str = "extern long far_away; long f(long n) { return n + far_away; }";

fn object() -> Vec<u8> {
    compile("gcc", &["-O2", "-fPIC"], "c", PLAIN)
}

fn refuse(bytes: Vec<u8>) -> PatchError {
    read(vec![bytes]).expect_err("refused")
}

#[test]
fn files_that_are_no_objects() {
    assert_eq!(PatchObject::read(&[]).expect_err("refused"), PatchError::NoFiles);
    for (bytes, word) in [
        (Vec::new(), "empty"),
        (b"#!/bin/sh\n".to_vec(), "does not begin like an ELF file"),
        (b"!<arch>\nabc".to_vec(), "archive"),
        (b"\x7fELF".to_vec(), "class"),
        (b"BC\xc0\xde....".to_vec(), "-fno-lto"),
    ] {
        let error = refuse(bytes).to_string();
        assert!(error.contains(word) && error.contains("fix0.o"), "{error}");
    }
    let large = vec![0; (64 << 20) + 1];
    assert!(matches!(refuse(large), PatchError::TooLarge { .. }));
    let half = vec![object(), vec![0; 64 << 20]];
    assert!(matches!(read(half).expect_err("refused"), PatchError::TooLarge { .. }), "all files together");
}

#[test]
fn objects_for_other_machines_and_linked_files() {
    let with = |at: usize, value: u8| {
        let mut bytes = object();
        bytes[at] = value;
        refuse(bytes).to_string()
    };
    assert!(with(4, 1).contains("32-bit"));
    assert!(with(5, 2).contains("big-endian"));
    assert!(with(18, 183).contains("64-bit ARM"));
    assert!(with(16, 2).contains("an executable"));
    assert!(with(16, 3).contains("shared library"));
    assert!(with(16, 4).contains("core dump"));
}

#[test]
fn every_truncation_is_noticed() {
    let whole = object();
    for length in 0..whole.len() {
        // Section headers stand at the end: none of them can be missing.
        let error = refuse(whole[..length].to_vec());
        assert!(matches!(error, PatchError::NotAnObject { .. } | PatchError::Malformed { .. }), "{length}: {error}");
    }
}

#[test]
fn what_a_patch_cant_have() {
    let c = |source: &str| refuse(compile("gcc", &["-O2", "-fPIC"], "c", source));
    let constructor = c("long x; __attribute__((constructor)) void f(void) { x = 1; }");
    assert!(
        matches!(constructor, PatchError::Constructor { .. }) && constructor.to_string().contains("ASAP_PRE_APPLY")
    );
    assert!(matches!(c("long x; __attribute__((destructor)) void f(void) { x = 1; }"), PatchError::Constructor { .. }));
    let ifunc = c(
        "static long a(void) { return 1; } static void *pick(void) { return a; } long f(void) __attribute__((ifunc(\"pick\")));",
    );
    assert!(matches!(ifunc, PatchError::IndirectFunction { .. }), "{ifunc}");
    for source in
        ["__thread long x = 1; long f(void) { return x; }", "static __thread long x; long f(void) { return ++x; }"]
    {
        let error = c(source);
        assert!(matches!(error, PatchError::ThreadLocalDefinition { .. }), "{error}");
    }
    assert!(matches!(c("__attribute__((aligned(8192))) long x = 1;"), PatchError::Alignment { alignment: 8192, .. }));
    assert!(matches!(c("char huge[1ul << 31]; "), PatchError::SegmentTooLarge { segment: "data", .. }));
    let slim = refuse(compile("gcc", &["-O2", "-flto", "-fno-fat-lto-objects"], "c", PLAIN));
    assert!(matches!(slim, PatchError::LinkTimeOptimisation { .. }), "{slim}");
}

#[test]
fn unknown_relocations_are_named() {
    let mut bytes = object();
    // The type of the first relocation of type GOTPCRELX (42) in the object.
    let field =
        bytes.windows(8).position(|w| w[..4] == [42, 0, 0, 0] && w[4..8] != [0; 4]).expect("the reference to far_away");
    bytes[field] = 16;
    assert!(refuse(bytes.clone()).to_string().contains("R_X86_64_DTPMOD64"));
    bytes[field..field + 2].copy_from_slice(&[0x39, 0x30]);
    let error = refuse(bytes).to_string();
    assert!(error.contains("number 12345") && error.contains(".text"), "{error}");
}

#[test]
fn all_unresolved_names_are_listed() {
    let source = "extern long no_such_a, no_such_b; long f(long n) { return no_such_a + no_such_b + strlen(0); }";
    let object = read(vec![compile("gcc", &["-O2", "-fPIC", "-w"], "c", source)]).expect("an object");
    let error = load(&object, true, &[], Symbols::default()).err().expect("refused");
    let PatchError::Unresolved { mut names } = error else { panic!("{error}") };
    names.sort();
    assert_eq!(names, ["`no_such_a`", "`no_such_b`"]);
}

#[test]
fn what_does_not_reach_says_how_to_compile() {
    let mut symbols = Symbols::default();
    symbols.addresses.insert("far_away".to_owned(), 0x7000_0000_0000);
    let near = read(vec![compile("gcc", &["-O2", "-fPIE"], "c", PLAIN)]).expect("an object");
    let error = load(&near, true, &[], symbols).err().expect("refused");
    assert!(matches!(&error, PatchError::Overflow { symbol, .. } if symbol == "far_away"), "{error}");
    assert!(error.to_string().contains("-fPIC"), "{error}");

    let fixed = "static long x[9] = {1, 2}; long f(long n) { return x[n]++; }";
    let fixed = read(vec![compile("gcc", &["-O2", "-fno-pic", "-fno-pie"], "c", fixed)]).expect("an object");
    let error = load(&fixed, false, &[], Symbols::default()).err().expect("refused");
    assert!(error.to_string().contains("R_X86_64_32S") && error.to_string().contains("-fPIC"), "{error}");
}

#[test]
fn bases_must_fit_the_layout() {
    let object = read(vec![object()]).expect("an object");
    let mut symbols = Symbols::default();
    symbols.addresses.insert("far_away".to_owned(), 0x1000);
    let base = |code, rodata| Bases { code: TargetAddr(code), rodata: TargetAddr(rodata), data: TargetAddr(0x3000) };
    assert!(object.link(&base(0x1000, 0x2000), &symbols).is_ok());
    assert!(matches!(object.link(&base(0x1001, 0x2000), &symbols), Err(PatchError::Base { segment: "code", .. })));
    let end = u64::MAX - 7;
    assert!(matches!(object.link(&base(0x1000, end), &symbols), Err(PatchError::Base { segment: "rodata", .. })));
}

/// The system's static libraries are thousands of objects that nobody wrote for this linker.
#[test]
fn objects_of_static_libraries_link_or_say_why_not() {
    let library = |name: &str| {
        let output = std::process::Command::new("gcc").arg(format!("-print-file-name={name}")).output().expect("gcc");
        std::path::PathBuf::from(String::from_utf8(output.stdout).expect("a path").trim())
    };
    let (mut linked, mut surprises) = (0, Vec::new());
    for name in ["libc.a", "libstdc++.a", "libgcc.a", "libgcc_eh.a"] {
        let Ok(bytes) = std::fs::read(library(name)) else {
            eprintln!("SKIPPED: {name} is not installed; its objects are not tested");
            continue;
        };
        for (member, object) in archive_members(&bytes) {
            let base =
                Bases { code: TargetAddr(0x4000_0000), rodata: TargetAddr(0x4800_0000), data: TargetAddr(0x4c00_0000) };
            let patch = PatchObject::read(&[(member, object)])
                .and_then(|object| object.link(&base, &super::mutations::Everything));
            match patch {
                Ok(_) => linked += 1,
                Err(
                    PatchError::Constructor { .. }
                    | PatchError::IndirectFunction { .. }
                    | PatchError::ThreadLocalDefinition { .. },
                ) => {}
                Err(e) => surprises.push(format!("{name}: {e}")),
            }
        }
    }
    assert!(surprises.is_empty(), "{surprises:#?}");
    assert!(linked > 50, "only {linked} objects were linked");
}

/// Members of a GNU archive, by name.
fn archive_members(archive: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut members = Vec::new();
    let mut rest = archive.strip_prefix(b"!<arch>\n").unwrap_or(&[]);
    while rest.len() > 60 {
        let (header, data) = rest.split_at(60);
        let field = |range: std::ops::Range<usize>| String::from_utf8_lossy(&header[range]).trim().to_owned();
        let size: usize = field(48..58).parse().expect("a size");
        let name = field(0..16);
        if !matches!(&*name, "/" | "//" | "/SYM64/") {
            members.push((name, data[..size].to_vec()));
        }
        rest = data.get(size.next_multiple_of(2)..).unwrap_or(&[]);
    }
    members
}
