//! What asap-patch.h declares arrives, whatever the compiler does to it.

use super::harness::{Symbols, compile, compilers, load, read};
use crate::patch::{Hooks, PatchError, PatchObject, Replacement};

const DECLARATIONS: &str = r#"
#include <asap-patch.h>
#ifdef __cplusplus
namespace guard {
#endif
extern long limit;
ASAP_IMPORT(limit, "parser.c:limit");
long next_token(long);
ASAP_IMPORT(next_token, "lib/parser.c:next_token");
long old_parse(long);
ASAP_ORIGINAL_NAMED(old_parse, "parser.c:parse");

ASAP_REPLACES("parser.c:parse") long new_parse(long n) { return next_token(n) > limit ? -1 : old_parse(n); }

long plain(long);
ASAP_REPLACE(plain);
long plain(long n) { return n < 0 ? 0 : ASAP_ORIGINAL(plain)(n) + ASAP_ORIGINAL(plain)(n + 1); }

static long quiet(long n) { return n * 3; }
ASAP_REPLACE_NAMED(quiet, "other.c:loud");
ASAP_REPLACES("other.c:softly") static long softly(long n) { return n * 4; }

static int before(void) { return limit == 100 ? 0 : 1; }
void after(void) { limit = 5; }
static int before_revert(void) { return 0; }
static void after_revert(void) { limit = 6; }
ASAP_PRE_APPLY(before);
ASAP_POST_APPLY(after);
ASAP_PRE_REVERT(before_revert);
ASAP_POST_REVERT(after_revert);
#ifdef __cplusplus
}
#endif
"#;

extern "C" fn next_token(n: i64) -> i64 {
    n * 2
}
extern "C" fn old_parse(n: i64) -> i64 {
    n + 1000
}
extern "C" fn old_plain(n: i64) -> i64 {
    n * n
}

fn check(object: &PatchObject, case: &str, mangle: impl Fn(&str) -> String) {
    let plain = mangle("plain");
    let replaces = |replaces: &str, symbol: &str| Replacement {
        replaces: if replaces == "plain" { plain.clone() } else { replaces.to_owned() },
        new_symbol: mangle(symbol),
    };
    for expected in [
        replaces("parser.c:parse", "new_parse"),
        replaces("plain", "plain"),
        replaces("other.c:loud", "static quiet"),
        replaces("other.c:softly", "static softly"),
    ] {
        assert!(object.replacements().contains(&expected), "{case}: {expected:?} not in {:?}", object.replacements());
    }
    assert_eq!(object.replacements().len(), 4, "{case}");
    let hooks = Hooks {
        pre_apply: vec![mangle("static before")],
        post_apply: vec![if case.contains("++") { "_ZN5guard5afterEv".to_owned() } else { "after".to_owned() }],
        pre_revert: vec![mangle("static before_revert")],
        post_revert: vec![mangle("static after_revert")],
    };
    assert_eq!(object.hooks(), &hooks, "{case}");
    let mut originals = object.originals();
    originals.sort();
    let mut expected = [plain.clone(), "parser.c:parse".to_owned()];
    expected.sort();
    assert_eq!(originals, expected, "{case}");
    let mut imports: Vec<_> = object.imports().into_iter().map(|i| (i.file.unwrap_or_default(), i.name)).collect();
    imports.sort();
    assert_eq!(
        imports,
        [("lib/parser.c".to_owned(), "next_token".to_owned()), ("parser.c".to_owned(), "limit".to_owned())],
        "{case}"
    );

    let mut symbols = Symbols::default();
    let limit = Box::new(100_i64);
    symbols.addresses.insert("lib/parser.c:next_token".to_owned(), next_token as *const () as u64);
    symbols.addresses.insert("parser.c:limit".to_owned(), &raw const *limit as u64);
    symbols.originals.insert("parser.c:parse".to_owned(), old_parse as *const () as u64);
    symbols.originals.insert(plain.clone(), old_plain as *const () as u64);
    let patch = load(object, true, &[], symbols).unwrap_or_else(|e| panic!("{case}: {e}"));
    assert_eq!(patch.call(&mangle("new_parse"), 50), 1050, "{case}");
    assert_eq!(patch.call(&mangle("new_parse"), 51), -1, "{case}");
    assert_eq!(patch.call(&plain, 3), 9 + 16, "{case}");
    assert_eq!(patch.call(&mangle("static softly"), 3), 12, "{case}");
    assert_eq!(patch.call(&hooks.pre_apply[0], 0) as i32, 0, "{case}");
}

#[test]
fn declarations_arrive_from_c() {
    for compiler in compilers(&["gcc", "clang"]) {
        for flags in [["-O0", "-fPIC"], ["-O3", "-fPIC"], ["-O2", "-ffunction-sections"], ["-Os", "-fdata-sections"]] {
            let flags: Vec<_> =
                flags.into_iter().chain(["-Wall", "-Werror", "-Wno-unused-function", "-fPIC"]).collect();
            let object = read(vec![compile(compiler, &flags, "c", DECLARATIONS)]).expect("an object");
            check(&object, &format!("{compiler} {flags:?}"), |name| name.trim_start_matches("static ").to_owned());
        }
    }
}

#[test]
fn declarations_arrive_from_cxx_with_mangled_names() {
    let mangle = |name: &str| {
        let parameter = if name.contains("before") || name.contains("after") { 'v' } else { 'l' };
        match name.strip_prefix("static ") {
            Some(name) => format!("_ZN5guardL{}{name}E{parameter}", name.len()),
            None => format!("_ZN5guard{}{name}E{parameter}", name.len()),
        }
    };
    for compiler in compilers(&["g++", "clang++"]) {
        for level in ["-O0", "-O3"] {
            let flags = [level, "-fPIC", "-Wall", "-Werror"];
            let object = read(vec![compile(compiler, &flags, "cc", DECLARATIONS)]).expect("an object");
            check(&object, &format!("C++ {compiler} {flags:?}"), mangle);
        }
    }
}

fn refusal(source: &str) -> PatchError {
    let source = format!("#include <asap-patch.h>\n{source}");
    read(vec![compile("gcc", &["-O2", "-fPIC"], "c", &source)]).expect_err("refused")
}

#[test]
fn declarations_without_sense_are_refused() {
    let twice = refusal(
        "int a(void){return 1;} int b(void){return 2;} ASAP_REPLACE_NAMED(a, \"f\"); ASAP_REPLACE_NAMED(b, \"f\");",
    );
    assert!(twice.to_string().contains("replace `f`") && twice.to_string().contains("both"), "{twice}");
    let defined = refusal("int counter; ASAP_IMPORT(counter, \"a.c:counter\");");
    assert!(defined.to_string().contains("declare it extern only"), "{defined}");
    let variable = refusal("int v = 1; ASAP_REPLACE(v);");
    assert!(variable.to_string().contains("names no function"), "{variable}");
    let unknown = refusal("ASAP_RECORD_(asap_declaration_, \"wish\", \"x\", 0);");
    assert!(unknown.to_string().contains("unknown to this version"), "{unknown}");
}

#[test]
fn a_static_name_that_two_files_share_cant_be_a_replacement() {
    let file = |n: u8| {
        let source =
            format!("#include <asap-patch.h>\nASAP_REPLACES(\"f{n}\") static long fix(long n) {{ return n + {n}; }}");
        compile("gcc", &["-O2", "-fPIC"], "c", &source)
    };
    let error = read(vec![file(1), file(2)]).expect_err("refused");
    assert_eq!(error, PatchError::AmbiguousSymbol { symbol: "fix".to_owned() });
}

#[test]
fn the_original_of_a_renamed_replacement_goes_by_the_replaced_name() {
    let source = r#"
        #include <asap-patch.h>
        long fixed(long);
        ASAP_REPLACES("parser.c:broken") long fixed(long n) { return ASAP_ORIGINAL(fixed)(n) + 1; }
    "#;
    for (compiler, extension) in [("gcc", "c"), ("g++", "cc")] {
        let object = read(vec![compile(compiler, &["-O2", "-fPIC"], extension, source)]).expect("an object");
        assert_eq!(object.originals(), ["parser.c:broken"], "{compiler}");
        assert_eq!(object.imports(), [], "{compiler}");
    }
}
