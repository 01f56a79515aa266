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
