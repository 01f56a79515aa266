//! C objects over compilers and flags.

use super::harness::{Symbols, compile, compilers, load, read};
use crate::patch::ImportKind;

const LEVELS: [&str; 4] = ["-O0", "-O1", "-O2", "-O3"];

/// Uses all that a plain C function can refer to.
const PROGRAM: &str = r#"
#include <string.h>
extern long target_add(long, long);
extern long target_counter;
extern long absent_function(long) __attribute__((weak));
extern long absent_variable __attribute__((weak));
typedef long (*operation)(long, long);

static long private_count = 7;
static long zeroed[1000];
long common_variable;
static const char *const names[] = { "zero", "one", "two", "three" };
static __attribute__((noinline)) long mul(long a, long b) { return a * b + private_count - 7; }
static long minus(long a, long b) { return a - b; }
operation table[] = { target_add, mul, minus };
const double factors[] = { 1.5, 2.5, 3.5 };

__attribute__((noinline)) long recursive(long n) { return n <= 1 ? 1 : n * recursive(n - 1); }

__attribute__((noinline)) long choose(long n) {
    switch (n) {
    case 0: return private_count; case 1: return target_counter; case 2: return mul(n, 5); case 3: return 33;
    case 4: return target_add(n, 1); case 5: return recursive(5); case 6: return strlen(names[n - 3]); case 7: return 77;
    default: return -1;
    }
}

long calls(long n) { return target_add(n, 10) + target_add(n, 20); }
long pointers(long n) { return table[0](n, 1) + table[1](n, 2) + table[2](n, 3); }
long function_pointer(long n) { operation volatile f = mul; return f(n, 3); }
long data(long n) { private_count += n; zeroed[n] += n; common_variable++; return private_count + zeroed[n] + common_variable; }
long module_data(long n) { target_counter += n; return target_counter; }
long strings(long n) { return strcmp(names[n], "two") == 0 ? strlen("a long literal of the patch") : names[n][1]; }
long floats(long n) { return (long)((double)n * factors[n & 1] * 10.0 + 0.25); }
long weak(long n) { return (absent_function ? absent_function(n) : n) + (&absent_variable ? 100 : 1); }
long jump(long n) { return choose(n); }
long library(long n) { char a[64], b[64]; memset(a, (int)n, sizeof a); memcpy(b, a, sizeof b); return memcmp(a, b, sizeof a) + b[63]; }
"#;

extern "C" fn target_add(a: i64, b: i64) -> i64 {
    a + b
}

fn check(compiler: &str, flags: &[&str], low: bool, near_data: bool) {
    let object =
        read(vec![compile(compiler, flags, "c", PROGRAM)]).unwrap_or_else(|e| panic!("{compiler} {flags:?}: {e}"));
    let mut symbols = Symbols::default();
    symbols.addresses.insert("target_add".to_owned(), target_add as *const () as u64);
    let far = Box::new(0_i64);
    let module: &[&str] = if near_data { &["target_counter"] } else { &[] };
    if !near_data {
        symbols.addresses.insert("target_counter".to_owned(), &raw const *far as u64);
    }
    let patch = load(&object, low, module, symbols).unwrap_or_else(|e| panic!("{compiler} {flags:?}: {e}"));
    let case = format!("{compiler} {flags:?}");
    assert_eq!(patch.call("calls", 5), 15 + 25, "{case}");
    assert_eq!(patch.call("pointers", 9), 10 + 18 + 6, "{case}");
    assert_eq!(patch.call("function_pointer", 9), 27, "{case}");
    assert_eq!(patch.call("module_data", 4), 4, "{case}");
    assert_eq!(patch.call("module_data", 5), 9, "{case}");
    assert_eq!(patch.call("strings", 2), 27, "{case}");
    assert_eq!(patch.call("strings", 1), i64::from(b'n'), "{case}");
    assert_eq!(patch.call("floats", 3), 75, "{case}");
    assert_eq!(patch.call("floats", 2), 30, "{case}");
    assert_eq!(patch.call("weak", 5), 6, "{case}");
    assert_eq!(patch.call("library", 65), 65, "{case}");
    let expected = [7, 9, 10, 33, 5, 120, 5, 77, -1];
    for (n, expected) in expected.iter().enumerate() {
        assert_eq!(patch.call("jump", n as i64), *expected, "{case}: {n}");
    }
    assert_eq!(patch.call("data", 3), 10 + 3 + 1, "{case}");
    assert_eq!(patch.call("data", 3), 13 + 6 + 2, "{case}");
    let range = patch.patch.function_range("recursive").expect("a function");
    assert!(range.end > range.start, "{case}");
    assert!(!patch.patch.symbol("table").expect("a variable").is_function, "{case}");
}

#[test]
fn position_independent_code_runs_far_from_the_target() {
    for compiler in compilers(&["gcc", "clang"]) {
        for level in LEVELS {
            check(compiler, &[level, "-fPIC", "-fcommon"], true, false);
            check(compiler, &[level, "-fPIC", "-fno-plt", "-ffunction-sections", "-fdata-sections"], true, false);
        }
    }
}

#[test]
fn code_for_executables_runs_near_their_data() {
    for compiler in compilers(&["gcc", "clang"]) {
        for level in LEVELS {
            check(compiler, &[level, "-fPIE", "-g"], false, true);
        }
    }
}

#[test]
fn code_for_fixed_addresses_runs_below_two_gigabytes() {
    for compiler in compilers(&["gcc", "clang"]) {
        for level in ["-O0", "-O2"] {
            check_low(compiler, &[level, "-fno-pic", "-fno-pie", "-fcommon"]);
        }
    }
}

/// Functions of other modules have no address below 2 GiB that such code could hold: the module's are used.
fn check_low(compiler: &str, flags: &[&str]) {
    let source = PROGRAM.replace("{ target_add, mul, minus }", "{ minus, mul, target_add }");
    let object = read(vec![compile(compiler, flags, "c", &source)]).expect("an object");
    let mut symbols = Symbols::default();
    symbols.addresses.insert("target_add".to_owned(), target_add as *const () as u64);
    let patch =
        load(&object, true, &["target_counter"], symbols).unwrap_or_else(|e| panic!("{compiler} {flags:?}: {e}"));
    assert_eq!(patch.call("calls", 5), 40);
    assert_eq!(patch.call("pointers", 9), 8 + 18 + 12);
    assert_eq!(patch.call("module_data", 5), 5);
    assert_eq!(patch.call("strings", 2), 27);
    assert_eq!(patch.call("weak", 5), 6);
    assert_eq!(patch.call("jump", 5), 120);
    assert_eq!(patch.call("library", 65), 65);
    assert_eq!(patch.call("data", 3), 14);
}

#[test]
fn large_and_medium_models_run() {
    for compiler in compilers(&["gcc", "clang"]) {
        for level in ["-O0", "-O2"] {
            check(compiler, &[level, "-fPIC", "-mcmodel=large"], false, false);
            check(compiler, &[level, "-fno-pic", "-fno-pie", "-mcmodel=large"], false, false);
            check(compiler, &[level, "-fPIC", "-mcmodel=medium"], false, false);
        }
    }
}

#[test]
fn imports_are_what_the_code_uses_and_no_more() {
    let source = format!("{PROGRAM}\nextern long never_used(void);\nextern long unused_variable;");
    let object = read(vec![compile("gcc", &["-O2", "-fPIC"], "c", &source)]).expect("an object");
    let mut imports: Vec<_> = object.imports().into_iter().map(|i| (i.name, i.kind, i.weak)).collect();
    imports.sort_by(|a, b| a.0.cmp(&b.0));
    assert!(imports.contains(&("target_add".to_owned(), ImportKind::Any, false)), "{imports:?}");
    assert!(imports.contains(&("absent_function".to_owned(), ImportKind::Any, true)), "{imports:?}");
    assert!(!imports.iter().any(|i| i.0.contains("used") || i.0.contains("GLOBAL_OFFSET")), "{imports:?}");
    let functions = object.functions();
    assert!(functions.iter().any(|f| f.name == "choose" && f.global && f.size > 0), "{functions:?}");
    let variables = object.variables();
    assert!(variables.iter().any(|v| v.name == "private_count" && !v.global && v.writable), "{variables:?}");
    assert!(variables.iter().any(|v| v.name == "factors" && v.global && !v.writable), "{variables:?}");
}
