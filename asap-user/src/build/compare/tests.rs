//! Small sources in two versions, built by each compiler that is there; what the comparison says of them is looked at. A
//! function that is called changed and is not, or is not called so and is, fails.

use super::*;
use std::{path::Path, process::Command};

/// A source, what is edited in it, and what should be found.
struct Case {
    name: &'static str,
    language: &'static str,
    source: &'static str,
    /// Text to be replaced, and by what.
    edits: &'static [(&'static str, &'static str)],
    changed: &'static [&'static str],
    added: &'static [&'static str],
    new_data: &'static [&'static str],
    class: Class,
}

const PLAIN: Case = Case {
    name: "",
    language: "c",
    source: "",
    edits: &[],
    changed: &[],
    added: &[],
    new_data: &[],
    class: Class::CodeOnly,
};

const SWITCH: &str = r#"
extern int use(const char *, int);
__attribute__((noinline)) int other(int x) { return use("other", x) * 3; }
int choose(int x)
{
    switch (x) {
    case 0: return use("a", 1);
    case 1: return use("b", 12) + 1;
    case 2: return use("c", 13) ^ 2;
    case 3: return use("d", 14) * 3;
    case 4: return use("e", 15) - 4;
    case 5: return use("f", 16) / 5;
    case 6: return use("g", 17) | 6;
    }
    return use("none", x);
}
"#;

const STATICS: &str = r#"
extern void out(int *);
int first(void) { static int counter; counter++; out(&counter); return counter; }
int second(void) { static int counter; counter += 2; out(&counter); return counter; }
int third(void) { static int counter = 7; counter += 3; out(&counter); return counter; }
"#;

const OPERATIONS: &str = r#"
struct operations { int (*open)(int); int (*close)(int); const char *name; };
static int do_open(int x) { return x + 1; }
static int do_close(int x) { return x - 1; }
const struct operations table = { do_open, do_close, "plain" };
struct operations writable = { do_open, do_close, "writable" };
int run(const struct operations *o, int x) { return o->open(x) + o->close(x); }
"#;

const LINES: &str = r#"
extern void failed(const char *, int);
#define CHECK(x) do { if (!(x)) failed(__FILE__, __LINE__); } while (0)
int before(int x) { CHECK(x > 0); return x; }
int repaired(int x)
{
    CHECK(x < 100);
    return x * 2;
}
int after(int x) { CHECK(x > 5); return x + 1; }
"#;

const INLINED: &str = r#"
extern int sink(int);
static inline __attribute__((always_inline)) int helper(int x) { return sink(x + 1); }
int one(int x) { return helper(x) * 2; }
int two(int x) { return helper(x) * 3; }
int three(int x) { return sink(x) * 4; }
"#;

const COLD: &str = r#"
#include <stdlib.h>
extern int sink(int);
extern void report(const char *, int) __attribute__((cold));
int risky(int x)
{
    if (__builtin_expect(x < 0, 0)) { report("negative", x); abort(); }
    return sink(x) + 2;
}
int calm(int x) { if (x == 77) { report("calm", x); abort(); } return sink(x); }
"#;

const CLASSES: &str = r#"
#include <stdexcept>
#include <string>
struct Shape { virtual ~Shape() {} virtual int area() const; virtual int sides() const { return 0; } int width = 1; };
int Shape::area() const { return width; }
struct Square : Shape { int area() const override { return width * width; } int sides() const override { return 4; } };
extern int parse(const std::string &);
int guarded(const std::string &text)
{
    try { return parse(text); }
    catch (const std::invalid_argument &) { return -1; }
}
int unguarded(const std::string &text) { return parse(text) + 1; }
Shape *make() { return new Square; }
"#;

const CONSTANT: &str = r#"
static const int limits[] = { 10, 20, 30, 40, 50, 61, 72 };
int limit(int x) { return limits[x & 3]; }
int other(int x) { return x + 4; }
"#;

const TABLE: &str = r#"
extern int use(const char *, int);
int code(int x) { switch (x) { case 0: return 5; case 1: return 17; case 2: return 3; case 3: return 99; case 4: return 41; case 5: return 7; } return -1; }
int named(int x) { return use(__func__, x) + 1; }
int other(int x) { return use(__func__, x) + 2; }
"#;

const CLONES: &str = r#"
struct pair { int a, b; };
extern int sink(int);
static __attribute__((noinline)) int first_of(struct pair *p, int scale, int unused) { return sink(p->a * scale); }
static __attribute__((noinline)) int second_of(const struct pair *p, int scale) { return sink(p->b + scale) + sink(scale); }
int one(struct pair *p) { return first_of(p, 3, 1) + 1; }
int two(struct pair *p) { return first_of(p, 3, 2) + second_of(p, 7); }
int three(struct pair *p) { return second_of(p, 7) * 2; }
"#;

const TEMPLATES: &str = r#"
#include <vector>
extern int sink(int);
template <typename T> struct Box { T value; __attribute__((noinline)) T twice() const { return value + value; } };
static int total(const std::vector<int> &list) { int sum = 0; for (int x : list) sum += x; return sum; }
int use(int x) { Box<int> box{x}; return sink(box.twice()) + 1; }
int sum(const std::vector<int> &list) { return total(list) + 1; }
namespace { __attribute__((noinline)) int hidden(int x) { return sink(x) + 5; } }
int visible(int x) { return hidden(x) * 2; }
auto adder(int n) { return [n](int x) { return sink(x) + n; }; }
int closure(int x) { return adder(3)(x); }
"#;

const LAMBDAS: &str = r#"
extern int sink(int);
int twice(int x) { auto f = [](int y) __attribute__((noinline)) { return sink(y) + 1; }; return f(x) * 2; }
int counted(int x) { static int calls; calls += sink(x); return calls; }
"#;

const CASES: &[Case] = &[
    Case {
        name: "a lambda before another",
        language: "c++",
        source: LAMBDAS,
        edits: &[
            ("auto f =", "auto g = [](int y) __attribute__((noinline)) { return sink(y) - 9; }; auto f ="),
            ("f(x) * 2", "f(x) * 2 + g(x)"),
        ],
        changed: &["_Z5twicei"],
        added: &["_ZZ5twiceiENKUliE_clEi"],
        ..PLAIN
    },
    Case {
        name: "a lambda's body",
        language: "c++",
        source: LAMBDAS,
        edits: &[("sink(y) + 1", "sink(y) + 11")],
        changed: &["_ZZ5twiceiENKUliE_clEi"],
        ..PLAIN
    },
    Case {
        name: "a static variable of a name that the function has already",
        language: "c++",
        source: LAMBDAS,
        edits: &[("{ static int calls;", "{ { static int calls; calls += sink(1); } static int calls;")],
        class: Class::DataLayout,
        ..PLAIN
    },
    Case {
        name: "a table that the compiler makes of a switch",
        source: TABLE,
        edits: &[("return 17", "return 18")],
        changed: &["code"],
        ..PLAIN
    },
    Case {
        name: "one more case of such a table",
        source: TABLE,
        edits: &[("case 5: return 7;", "case 5: return 7; case 6: return 70; case 7: return 11;")],
        changed: &["code"],
        ..PLAIN
    },
    Case {
        name: "a function that names itself",
        source: TABLE,
        edits: &[("x) + 1; }", "x) + 11; }")],
        changed: &["named"],
        ..PLAIN
    },
    Case {
        name: "a function of which the compiler makes another for its arguments",
        source: CLONES,
        edits: &[("p->a * scale", "p->a * scale + 1")],
        changed: &["first_of"],
        ..PLAIN
    },
    Case {
        name: "the other of them",
        source: CLONES,
        edits: &[("sink(p->b + scale)", "sink(p->b - scale)")],
        changed: &["second_of"],
        ..PLAIN
    },
    Case {
        name: "who calls such a function",
        source: CLONES,
        edits: &[("return second_of(p, 7) * 2", "return second_of(p, 7) * 4")],
        changed: &["three"],
        ..PLAIN
    },
    Case {
        name: "a function becomes part of its callers",
        source: INLINED,
        edits: &[
            (
                "static inline __attribute__((always_inline)) int helper(int x) { return sink(x + 1); }",
                "static inline __attribute__((always_inline)) int helper(int x) { return sink(x + 1); }\nstatic inline __attribute__((always_inline)) int more(int x) { return sink(x) - 1; }",
            ),
            ("helper(x) * 3", "helper(x) * 3 + more(x)"),
        ],
        changed: &["two"],
        ..PLAIN
    },
    Case {
        name: "a static variable is not used any more",
        source: STATICS,
        edits: &[("static int counter; counter += 2; out(&counter); return counter;", "return 2;")],
        changed: &["second"],
        ..PLAIN
    },
    Case {
        name: "two static variables of one name in one function",
        source: STATICS,
        edits: &[(
            "{ static int counter; counter++;",
            "{ { static int counter; out(&counter); } static int counter; counter++;",
        )],
        class: Class::DataLayout,
        ..PLAIN
    },
    Case {
        name: "a method of a template",
        language: "c++",
        source: TEMPLATES,
        edits: &[("value + value", "value * 3")],
        changed: &["_ZNK3BoxIiE5twiceEv"],
        ..PLAIN
    },
    Case {
        name: "a function without a name for others",
        language: "c++",
        source: TEMPLATES,
        edits: &[("sink(x) + 5", "sink(x) + 6")],
        changed: &["_ZN12_GLOBAL__N_16hiddenEi"],
        ..PLAIN
    },
    Case { name: "nothing changes", source: SWITCH, edits: &[], class: Class::NotApplicable, ..PLAIN },
    Case {
        name: "a comment changes",
        source: SWITCH,
        edits: &[("int choose", "/* better */ int choose")],
        class: Class::NotApplicable,
        ..PLAIN
    },
    Case { name: "an immediate", source: SWITCH, edits: &[("x) * 3", "x) * 5")], changed: &["other"], ..PLAIN },
    Case { name: "a string", source: SWITCH, edits: &[("\"c\"", "\"better\"")], changed: &["choose"], ..PLAIN },
    Case {
        name: "a case of a jump table",
        source: SWITCH,
        edits: &[("13) ^ 2", "13) ^ 9")],
        changed: &["choose"],
        ..PLAIN
    },
    Case {
        name: "two cases change places",
        source: SWITCH,
        edits: &[
            ("case 0: return", "case 8: return"),
            ("case 1: return", "case 0: return"),
            ("case 8: return", "case 1: return"),
        ],
        changed: &["choose"],
        ..PLAIN
    },
    Case {
        name: "a static variable before others",
        source: STATICS,
        edits: &[("{ static int counter; counter++", "{ static int calls; out(&calls); static int counter; counter++")],
        changed: &["first"],
        new_data: &["calls.*"],
        class: Class::NewData,
        ..PLAIN
    },
    Case {
        name: "one of equal names",
        source: STATICS,
        edits: &[("counter += 2", "counter += 4")],
        changed: &["second"],
        ..PLAIN
    },
    Case {
        name: "the initial value of a static variable",
        source: STATICS,
        edits: &[("counter = 7", "counter = 8")],
        class: Class::DataLayout,
        ..PLAIN
    },
    Case {
        name: "a function that a table names",
        source: OPERATIONS,
        edits: &[("x + 1", "x + 2")],
        changed: &["do_open"],
        ..PLAIN
    },
    Case {
        name: "an entry of a writable table",
        source: OPERATIONS,
        edits: &[("{ do_open, do_close, \"writable\" }", "{ do_open, do_open, \"writable\" }")],
        class: Class::DataLayout,
        ..PLAIN
    },
    Case {
        name: "an entry of a constant table that all see",
        source: OPERATIONS,
        edits: &[("{ do_open, do_close, \"plain\" }", "{ do_open, do_open, \"plain\" }")],
        class: Class::DataLayout,
        ..PLAIN
    },
    Case {
        name: "lines move, and their numbers are kept",
        source: LINES,
        edits: &[("    CHECK(x < 100);\n", "    if (x == 13)\n        return 0;\n    CHECK(x < 100);\n#line 8\n")],
        changed: &["repaired"],
        ..PLAIN
    },
    Case {
        name: "an inlined helper",
        source: INLINED,
        edits: &[("x + 1", "x + 7")],
        changed: &["one", "two"],
        ..PLAIN
    },
    Case {
        name: "a helper becomes a function",
        source: INLINED,
        edits: &[(
            "static inline __attribute__((always_inline)) int helper",
            "static __attribute__((noinline)) int helper",
        )],
        changed: &["one", "two"],
        added: &["helper"],
        ..PLAIN
    },
    Case {
        name: "a new function",
        source: INLINED,
        edits: &[(
            "int three(int x) { return sink(x)",
            "__attribute__((noinline)) static int fresh(int x) { return sink(x) / 3; }\nint three(int x) { return fresh(x)",
        )],
        changed: &["three"],
        added: &["fresh"],
        ..PLAIN
    },
    Case { name: "the hot part", source: COLD, edits: &[("sink(x) + 2", "sink(x) + 3")], changed: &["risky"], ..PLAIN },
    Case {
        name: "the unlikely part",
        source: COLD,
        edits: &[("\"negative\"", "\"below zero\"")],
        changed: &["risky"],
        ..PLAIN
    },
    Case {
        name: "a constant of its own",
        source: CONSTANT,
        edits: &[("20, 30", "25, 30")],
        changed: &["limit"],
        ..PLAIN
    },
    Case {
        name: "a new constant",
        source: CONSTANT,
        edits: &[(
            "int other(int x) { return x + 4",
            "static const int extra[] = { 5, 1, 4, 0, 9, 3, 8, 2, 6, 7, 1 };\nint other(int x) { return extra[x % 11u]",
        )],
        changed: &["other"],
        new_data: &["extra"],
        class: Class::NewData,
        ..PLAIN
    },
    Case {
        name: "a constructor",
        source: "static volatile int state;\n__attribute__((constructor)) static void setup(void) { state = 5; }\nint get(void) { return state; }\n",
        edits: &[("state = 5", "state = 6")],
        changed: &["setup"],
        class: Class::StartUpOnly,
        ..PLAIN
    },
    Case {
        name: "main",
        source: "extern int step(void);\nint main(void) { while (step()) ; return 0; }\n",
        edits: &[("return 0", "return 3")],
        changed: &["main"],
        class: Class::NeverQuiescent,
        ..PLAIN
    },
    Case {
        name: "a new thread-local variable",
        source: "int get(int x) { return x + 1; }\n",
        edits: &[(
            "int get(int x) { return x",
            "extern void out(int *);\nstatic __thread int last;\nint get(int x) { out(&last); return x",
        )],
        changed: &["get"],
        new_data: &["last"],
        class: Class::DataLayout,
        ..PLAIN
    },
    Case {
        name: "a function is removed",
        source: INLINED,
        edits: &[("int three(int x) { return sink(x) * 4; }", "")],
        class: Class::NotApplicable,
        ..PLAIN
    },
    Case {
        name: "a method",
        language: "c++",
        source: CLASSES,
        edits: &[("return width; }", "return width + 1; }")],
        changed: &["_ZNK5Shape4areaEv"],
        ..PLAIN
    },
    Case {
        name: "a handler of exceptions",
        language: "c++",
        source: CLASSES,
        edits: &[("return -1", "return -2")],
        changed: &["_Z7guardedRKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"],
        ..PLAIN
    },
    Case {
        name: "a virtual inline method",
        language: "c++",
        source: CLASSES,
        edits: &[("return 4;", "return 5;")],
        changed: &["_ZNK6Square5sidesEv"],
        ..PLAIN
    },
    Case {
        name: "one method more in the table",
        language: "c++",
        source: CLASSES,
        edits: &[("int width = 1;", "virtual int more() const { return 9; } int width = 1;")],
        class: Class::DataLayout,
        ..PLAIN
    },
];

/// Compiles a source, as the build does.
pub(in crate::build) fn compile(
    directory: &Path,
    compiler: &str,
    language: &str,
    source: &str,
    flags: &[&str],
) -> Vec<u8> {
    let (input, output) =
        (directory.join(if language == "c" { "unit.c" } else { "unit.cc" }), directory.join("unit.o"));
    std::fs::write(&input, source).expect("the source is written");
    let done = Command::new(compiler)
        .args(["-O2", "-g", "-c", "-ffunction-sections", "-fdata-sections", "-fno-common", "-fmerge-constants", "-w"])
        .args(flags)
        .arg("-o")
        .arg(&output)
        .arg(input.file_name().expect("a name"))
        .current_dir(directory)
        .output()
        .expect("the compiler runs");
    assert!(done.status.success(), "{compiler}: {}\n{source}", String::from_utf8_lossy(&done.stderr));
    std::fs::read(&output).expect("an object")
}

/// The compilers of this machine for a language.
pub(in crate::build) fn compilers(language: &str) -> Vec<&'static str> {
    let wanted: [&'static str; 2] = if language == "c" { ["gcc", "clang"] } else { ["g++", "clang++"] };
    let there =
        |compiler: &&str| Command::new(compiler).arg("--version").output().is_ok_and(|done| done.status.success());
    let found: Vec<_> = wanted.into_iter().filter(there).collect();
    assert!(!found.is_empty(), "no compiler for {language}");
    found
}

fn edited(source: &str, edits: &[(&str, &str)]) -> String {
    edits.iter().fold(source.to_owned(), |text, (before, after)| {
        assert!(text.contains(before), "{before} is not in\n{text}");
        text.replacen(before, after, 1)
    })
}

fn check(case: &Case, compiler: &str, flags: &[&str]) -> Result<(), String> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let build = |source: &str| compile(directory.path(), compiler, case.language, source, flags);
    let old = Object::read("old.o", &build(case.source)).expect("an object");
    let new = Object::read("new.o", &build(&edited(case.source, case.edits))).expect("an object");
    let found = compare(&old, &new);
    // Compilers make `f.isra.0`, `f.constprop.0` of `f`, and number lambdas in ways of their own.
    let root = |name: &str| {
        let base = correlate::base_name(name.split('.').next().unwrap_or(name));
        base.replace("$_", "UliE_")
    };
    let changed: Vec<String> = found.changed.iter().map(|changed| root(&changed.old)).collect();
    let added: Vec<String> = found.added.iter().map(|name| root(name)).collect();
    let as_wanted = found.new_data.len() == case.new_data.len()
        && found.new_data.iter().zip(case.new_data).all(|(name, wanted)| match wanted.strip_suffix(".*") {
            // Compilers name static variables in different ways: calls.0, first.calls.
            Some(wanted) => name.contains(wanted),
            None => name == wanted,
        });
    // Which of the functions around a table's change go with it, is not what such a case is about.
    let functions = case.class == Class::DataLayout || (changed == case.changed && added == case.added && as_wanted);
    if functions && found.class() == case.class {
        return Ok(());
    }
    Err(format!(
        "{} ({compiler} {flags:?}): {} changed {changed:?}, added {:?}, new {:?}, removed {:?}\n{:#?}\n{:?}",
        case.name,
        found.class(),
        found.added,
        found.new_data,
        found.removed,
        found.findings,
        found.changed
    ))
}

#[test]
fn of_every_change_in_c_the_right_thing_is_said() {
    check_all("c");
}

#[test]
fn of_every_change_in_cxx_the_right_thing_is_said() {
    check_all("c++");
}

const FLAGS: [&[&str]; 6] = [
    &["-fno-pic"],
    &["-fPIE"],
    &["-fPIC", "-fcf-protection"],
    &["-O0", "-fPIE"],
    &["-O3", "-fPIE", "-fstack-protector-strong"],
    &["-Os", "-fno-pic"],
];

fn check_all(language: &str) {
    let mut wrong = Vec::new();
    for case in CASES.iter().filter(|case| case.language == language) {
        for compiler in compilers(case.language) {
            for flags in FLAGS {
                wrong.extend(check(case, compiler, flags).err());
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn line_numbers_that_move_mark_functions_unless_they_are_kept() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    for compiler in compilers("c") {
        let build = |edits: &[(&str, &str)]| {
            let bytes = compile(directory.path(), compiler, "c", &edited(LINES, edits), &[]);
            Object::read("unit.o", &bytes).expect("an object")
        };
        let names = |found: Comparison| found.changed.into_iter().map(|changed| changed.old).collect::<Vec<_>>();
        let old = build(&[]);
        let moved = build(&[("    CHECK(x < 100);\n", "    if (x == 13)\n        return 0;\n    CHECK(x < 100);\n")]);
        assert_eq!(names(compare(&old, &moved)), ["after", "repaired"], "{compiler}");
        let kept = build(CASES.iter().find(|case| case.name.starts_with("lines move")).expect("that case").edits);
        assert_eq!(names(compare(&old, &kept)), ["repaired"], "{compiler}");
    }
}

#[test]
fn numbers_of_compilers_are_no_part_of_a_name() {
    for (name, base) in [
        ("counter.12", "counter"),
        ("f.isra.0", "f.isra"),
        ("f.part.0.cold", "f.part.cold"),
        ("f.constprop.3.isra.1", "f.constprop.isra"),
        ("C.1.2", "C"),
        ("plain", "plain"),
        ("_ZZ1fvE1n_0", "_ZZ1fvE1n"),
        ("_ZZ5twiceiENKUliE0_clEi", "_ZZ5twiceiENKUliE_clEi"),
        ("_ZZ5twiceiENKUliE_clEi.isra.0", "_ZZ5twiceiENKUliE_clEi.isra"),
        ("_ZZ5twiceiENK4$_10clEi", "_ZZ5twiceiENK$_clEi"),
        ("_ZN3Box4nameEv", "_ZN3Box4nameEv"),
        (".hidden", ".hidden"),
        ("", ""),
    ] {
        assert_eq!(correlate::base_name(name), base);
    }
    assert!(correlate::is_cold("f.cold") && correlate::is_cold("f.cold.1") && !correlate::is_cold("cold"));
}

#[test]
fn damaged_objects_are_refused_or_compared_but_never_crash() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let bytes = compile(directory.path(), "gcc", "c", SWITCH, &[]);
    let sound = Object::read("sound.o", &bytes).expect("an object");
    let mut random = crate::random::Random::new();
    for _ in 0..400 {
        let mut damaged = bytes.clone();
        for _ in 0..=random.below(4) {
            let at = random.below(damaged.len());
            damaged[at] = random.next() as u8;
        }
        damaged.truncate(damaged.len() - random.below(64));
        if let Ok(object) = Object::read("damaged.o", &damaged) {
            let _ = compare(&sound, &object);
            let _ = compare(&object, &sound);
        }
    }
    assert!(Object::read("text.o", b"#!/bin/sh\n").is_err());
    let lto = compile(directory.path(), "gcc", "c", SWITCH, &["-flto"]);
    assert!(matches!(Object::read("lto.o", &lto), Err(CompareError::LinkTimeOptimisation { .. })));
}
