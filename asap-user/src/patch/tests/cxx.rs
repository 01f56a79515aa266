//! C++ and Rust objects: exceptions through linked code, vague linkage over several files, static data.

use super::harness::{Loaded, Symbols, compile, compilers, load, read};
use crate::patch::PatchError;

/// The C++ runtime, which the test binary itself does not use.
fn load_runtime() {
    // SAFETY: loads a system library whose initialisers are meant to run anywhere.
    let handle = unsafe { libc::dlopen(c"libstdc++.so.6".as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    assert!(!handle.is_null(), "libstdc++.so.6 is missing");
}

const SHARED: &str = r#"
#include <stdexcept>
#include <string>
struct problem { long value; };
template <class T> __attribute__((noinline)) T checked(T n) { if (n > 100) throw problem{n}; return n + 1; }
inline __attribute__((noinline)) long counted(long n) { static long count = 1000; count += n; return count; }
struct shape { virtual long area() const = 0; virtual ~shape() {} };
"#;

const FIRST: &str = r#"
struct square : shape { long side; square(long s) : side(s) {} long area() const override { return side * side; } };
extern "C" long throws(long n);
extern "C" long other_count(long n);
struct guard { long &place; ~guard() { place += 7; } };
extern "C" long catches(long n) {
    long cleaned = 0;
    try { guard g{cleaned}; return throws(n); }
    catch (const problem &p) { return p.value + cleaned; }
    catch (const std::exception &e) { return -(long)std::string(e.what()).size(); }
}
extern "C" long templates(long n) { try { return checked(n); } catch (problem &p) { return -p.value; } }
extern "C" long counts(long n) { return counted(n) * 10000 + other_count(n); }
extern "C" long virtual_call(long n) { shape *volatile s = new square(n); long a = s->area(); delete s; return a; }
"#;

const SECOND: &str = r#"
extern "C" long throws(long n) {
    if (n == 1) throw std::runtime_error("too much");
    if (n == 2) throw 17;
    return checked(n);
}
extern "C" long other_count(long n) { return counted(n); }
"#;

fn check(patch: &Loaded, case: &str) {
    assert_eq!(patch.call("catches", 5), 6, "{case}");
    assert_eq!(patch.call("catches", 101), 101 + 7, "{case}");
    assert_eq!(patch.call("catches", 1), -8, "{case}");
    assert_eq!(patch.call("templates", 7), 8, "{case}");
    assert_eq!(patch.call("templates", 700), -700, "{case}");
    // One variable, though both objects bring it.
    assert_eq!(patch.call("counts", 1), 1001 * 10000 + 1002, "{case}");
    assert_eq!(patch.call("virtual_call", 12), 144, "{case}");
}

#[test]
fn exceptions_and_inline_functions_work_over_several_objects() {
    load_runtime();
    for compiler in compilers(&["g++", "clang++"]) {
        for flags in [
            &["-O0", "-fPIC"][..],
            &["-O2", "-fPIC"],
            &["-O3", "-fPIC", "-ffunction-sections"],
            &["-O2", "-fPIC", "-fno-plt", "-g"],
            &["-O2", "-fPIC", "-mcmodel=large"],
        ] {
            let case = format!("{compiler} {flags:?}");
            let objects = [FIRST, SECOND].map(|s| compile(compiler, flags, "cc", &format!("{SHARED}{s}")));
            let object = read(objects.to_vec()).unwrap_or_else(|e| panic!("{case}: {e}"));
            let patch = load(&object, true, &[], Symbols::default()).unwrap_or_else(|e| panic!("{case}: {e}"));
            check(&patch.register_frames(), &case);
        }
    }
}

#[test]
fn an_exception_leaves_the_patch_for_its_caller() {
    load_runtime();
    for compiler in compilers(&["g++", "clang++"]) {
        let build = |source: &str| {
            read(vec![compile(compiler, &["-O2", "-fPIC"], "cc", &format!("{SHARED}{source}"))]).expect("an object")
        };
        let thrower = load(&build(SECOND), false, &[], Symbols::default()).expect("links").register_frames();
        let mut symbols = Symbols::default();
        for name in ["throws", "other_count"] {
            symbols.addresses.insert(name.to_owned(), thrower.address(name));
        }
        // Far from each other: the call goes through a stub.
        let catcher = load(&build(FIRST), true, &[], symbols).expect("links").register_frames();
        assert_eq!(catcher.call("catches", 102), 109, "{compiler}");
        assert_eq!(catcher.call("catches", 1), -8, "{compiler}");
    }
}

#[test]
fn a_variable_of_an_inline_function_is_the_targets_where_it_has_one() {
    let source = format!("{SHARED} extern \"C\" long count(long n) {{ return counted(n); }}");
    let object = read(vec![compile("g++", &["-O1", "-fPIC"], "cc", &source)]).expect("an object");
    let import = object.imports().into_iter().find(|i| i.name.contains("count")).expect("may be the target's");
    assert!(import.weak);
    let own = load(&object, true, &[], Symbols::default()).expect("links");
    assert_eq!(own.call("count", 1), 1001);
    let variable = Box::new(5_i64);
    let mut symbols = Symbols::default();
    symbols.addresses.insert(import.name, &raw const *variable as u64);
    // The compiler keeps it within reach of the code where it is local to the object only.
    let shared = load(&object, true, &[], symbols).expect("links");
    assert_eq!(shared.call("count", 1), 6);
}

#[test]
fn exceptions_pass_through_code_for_fixed_addresses() {
    load_runtime();
    let source = r#"
        struct problem { long value; };
        extern "C" __attribute__((noinline)) long throws(long n) { if (n > 5) throw problem{n}; return n; }
        extern "C" long catches(long n) { try { return throws(n); } catch (const problem &p) { return -p.value; } }
    "#;
    for compiler in compilers(&["g++", "clang++"]) {
        let flags = ["-O1", "-fno-pic", "-fno-pie"];
        let object = read(vec![compile(compiler, &flags, "cc", source)]).expect("an object");
        let patch = load(&object, true, &[], Symbols::default()).unwrap_or_else(|e| panic!("{compiler}: {e}"));
        let patch = patch.register_frames();
        assert_eq!(patch.call("catches", 5), 5, "{compiler}");
        assert_eq!(patch.call("catches", 6), -6, "{compiler}");
    }
}

#[test]
fn commons_and_weak_definitions_merge() {
    let first = "long shared; __attribute__((weak)) long who(long n) { return 1; } long call(long n) { shared += n; return who(n); }";
    let second = "long shared; long big[20]; long who(long n) { return 2 + shared; }";
    let third = "long big[5]; long peek(long n) { big[n] = n; return big[n] + sizeof big; }";
    let objects = [first, second, third].map(|s| compile("gcc", &["-O1", "-fPIC", "-fcommon"], "c", s));
    let object = read(objects.to_vec()).expect("an object");
    let patch = load(&object, true, &[], Symbols::default()).expect("links");
    assert_eq!(patch.call("call", 10), 12);
    assert_eq!(patch.call("call", 10), 22);
    assert_eq!(patch.call("peek", 4), 44);
    assert_eq!(patch.patch.symbol("big").expect("a COMMON variable").size, 160);
    assert_eq!(object.functions().iter().filter(|f| f.name == "who").count(), 1);

    let duplicate = "long who(long n) { return 3; }";
    let objects = [second, duplicate].map(|s| compile("gcc", &["-O1", "-fPIC"], "c", s));
    let error = read(objects.to_vec()).expect_err("refused");
    let (first, second) = ("fix0.o".to_owned(), "fix1.o".to_owned());
    assert_eq!(error, PatchError::DuplicateDefinition { symbol: "who".to_owned(), first, second });
}

#[test]
fn rust_objects_run() {
    let source = r#"
        #![no_std]
        use core::sync::atomic::{AtomicI64, Ordering::SeqCst};
        unsafe extern "C" { fn labs(n: i64) -> i64; }
        static COUNT: AtomicI64 = AtomicI64::new(3);
        static NAMES: [&str; 3] = ["zero", "one", "three"];
        #[unsafe(link_section = ".text.asap.replaces:core.c:f")]
        #[unsafe(no_mangle)] pub extern "C" fn count(n: i64) -> i64 { COUNT.fetch_add(n, SeqCst) + n }
        #[unsafe(no_mangle)] pub extern "C" fn length(n: i64) -> i64 { NAMES.get(n as usize).map_or(-1, |s| s.len() as i64) }
        #[unsafe(no_mangle)] pub extern "C" fn absolute(n: i64) -> i64 { unsafe { labs(n) } }
    "#;
    for level in ["-Copt-level=0", "-Copt-level=2"] {
        let flags = [level, "-Cpanic=abort", "-Coverflow-checks=off", "-Cdebug-assertions=off", "-Ccodegen-units=1"];
        let flags: Vec<_> = flags.into_iter().chain(["--edition=2024"]).collect();
        let rustc = compilers(&["rustc"])[0];
        let object = read(vec![compile(rustc, &flags, "rs", source)]).expect("an object");
        let replacements = object.replacements();
        assert_eq!((&*replacements[0].replaces, &*replacements[0].new_symbol), ("core.c:f", "count"));
        let patch = match load(&object, true, &[], Symbols::default()) {
            Ok(patch) => patch,
            // Unoptimised code drags in pieces of core, which this process keeps to itself.
            Err(PatchError::Unresolved { names }) if level.ends_with('0') => {
                assert!(names.iter().all(|n| n.contains("core")), "{names:?}");
                continue;
            }
            Err(e) => panic!("{level}: {e}"),
        };
        assert_eq!(patch.call("count", 4), 7);
        assert_eq!(patch.call("length", 2), 5);
        assert_eq!(patch.call("length", 9), -1);
        assert_eq!(patch.call("absolute", -9), 9);
    }
}

#[test]
fn unwind_records_of_repeated_functions_are_dropped() {
    // As some assemblers write it: the record names the weak function itself, not its section.
    let object = |number: usize| {
        // The sections of each object have other numbers.
        let before: String = (0..number).map(|n| format!(".section .rodata.{n},\"a\"\n.byte 1\n")).collect();
        let source = r#"
            .section .text.f,"axG",@progbits,f,comdat
            .weak f
            .type f,@function
            f: ret
            .size f, .-f
            .section .eh_frame,"a",@progbits
            1: .long 3f-2f
            2: .long 0
            .byte 1
            .asciz "zR"
            .byte 1, 0x78, 16, 1, 0x1b, 0x0c, 7, 8, 0x90, 1, 0, 0
            3: .long 5f-4f
            4: .long 4b-1b
            .long f-.
            .long 1
            .byte 0, 0, 0, 0
            5:
        "#;
        compile("gcc", &[], "s", &format!("{before}{source}"))
    };
    let length = |count: usize| {
        let object = read((0..count).map(object).collect()).expect("an object");
        let patch = load(&object, true, &[], Symbols::default()).expect("links").patch.eh_frame.clone();
        patch.map(|t| t.end.wrapping_distance(t.start)).expect("an unwind table")
    };
    assert_eq!(length(1), 24 + 20 + 4);
    assert_eq!(length(2), length(1), "the second one's records are gone");
}
