//! Programs that are built, shuffled, changed and stripped; what is found is compared with what the stripped one's own symbols
//! said before. A single symbol at a wrong place fails.

use super::*;
use crate::random::Random;
use std::{collections::BTreeMap, fmt::Write, path::Path, process::Command};

// Functions are `noipa`: else their code depends on which others the compiler has seen before.
/// A program of many static functions: some alike but for what they refer to, some alike in all, some called only by way
/// of a table. `changed` are other than in the first version, `gone` are not there.
fn source(count: usize, order: &[usize], changed: &[usize], gone: &[usize]) -> String {
    let mut text = "#include <stdio.h>\n#include <string.h>\n#define N static __attribute__((noipa)) int\n\
                    volatile int sink;\nint table_size;\n"
        .to_owned();
    let there = |n: &&usize| !gone.contains(n);
    for n in order.iter().filter(there) {
        writeln!(
            text,
            "static volatile int count_{n}; static volatile int list_{n}[{}]; N f{n}(int); N tiny{n}(int);",
            n % 7 + 1
        )
        .expect("memory");
    }
    for &n in order.iter().filter(there) {
        let more = usize::from(changed.contains(&n));
        // A callee that is there in all versions.
        let callee = (0..n).rev().find(|callee| !gone.contains(callee) && callee % 3 == n % 3);
        let call = callee.map_or_else(|| "x".to_owned(), |callee| format!("f{callee}(x) + tiny{callee}(x)"));
        let body = match n % 3 {
            // Alike but for the string.
            0 => {
                format!("count_{n}++; if (x > {}) printf(\"function {n} %d\\n\", x); return {call} + {more};", 5 + more)
            }
            // Alike but for the variable and the callee.
            1 => format!(
                "count_{n} += x + {more}; for (int i = 0; i < {}; i++) sink += list_{n}[i]; return {call};",
                n % 7 + 1
            ),
            // Long.
            _ => {
                (0..20).fold(String::new(), |body, step| {
                    format!(
                        "{body} if (x & {}) {{ sink ^= x * {}; list_{n}[{}] = count_{n}; }}\n",
                        1 << (step % 16),
                        n * 31 + step + more,
                        step % (n % 7 + 1)
                    )
                }) + &format!("return {call} + count_{n};")
            }
        };
        writeln!(text, "N f{n}(int x) {{ {body} }}\nN tiny{n}(int x) {{ sink = x; return count_{n}; }}")
            .expect("memory");
    }
    text.push_str("static int (*const table[])(int) = {");
    for n in (0..count).filter(|n| there(&n)) {
        write!(text, "f{n},").expect("memory");
    }
    text.push_str("};\nint main(int argc, char **argv)\n{\n    (void)argv;\n    int sum = 0;\n    for (unsigned i = 0; i < sizeof table / sizeof *table; i++) sum += table[i](argc);\n");
    for n in (0..count).filter(|n| there(&n)) {
        writeln!(text, "    sum += tiny{n}(argc);").expect("memory");
    }
    text.push_str("    printf(\"%d\\n\", sum);\n    return table_size;\n}\n");
    text
}

fn build(dir: &Path, name: &str, source: &str, flags: &[&str]) -> (Image, Image) {
    let (input, output, stripped) =
        (dir.join(format!("{name}.c")), dir.join(name), dir.join(format!("{name}-stripped")));
    std::fs::write(&input, source).expect("written");
    let mut compiler = Command::new("gcc");
    compiler.args(["-O2", "-fno-toplevel-reorder", "-w"]).args(flags);
    let compiled = compiler.arg("-o").arg(&output).arg(&input).status();
    assert!(compiled.expect("gcc runs").success());
    let done = Command::new("strip").arg("-s").arg("-o").arg(&stripped).arg(&output).status();
    assert!(done.expect("strip runs").success());
    let read = |path: &Path| {
        let bytes = std::fs::read(path).expect("readable");
        Image::parse(&path.to_string_lossy(), bytes.into()).expect("an executable")
    };
    (read(&output), read(&stripped))
}

/// What of the found symbols is where the module's own symbols say; panics if one is elsewhere.
fn judge(located: &Located, truth: &Image) -> (usize, usize) {
    let mut own: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for symbol in truth.all_symbols() {
        own.entry(symbol.name).or_default().push(symbol.address.0);
    }
    let (mut functions, mut objects) = (0, 0);
    for found in &located.found {
        let name = &found.symbol.name;
        // Start-up code of the C library has names that the linker makes.
        let Some(places) = own.get(name) else { panic!("{name} is not in the module, but was found: {found:?}") };
        assert!(places.contains(&found.address.0), "{name} is at {places:x?}: {found:?}");
        match found.symbol.kind {
            SymbolKind::Function => {
                let number = name.strip_prefix("tiny").or_else(|| name.strip_prefix('f'));
                functions += usize::from(number.is_some_and(|number| number.parse::<usize>().is_ok()));
            }
            SymbolKind::Data => objects += usize::from(name.starts_with("count_") || name.starts_with("list_")),
            _ => {}
        }
    }
    (functions, objects)
}

const MODELS: [&[&str]; 3] = [&["-fpie", "-pie"], &["-fno-pie", "-no-pie"], &["-ffunction-sections", "-fpie", "-pie"]];

#[test]
fn the_same_build_gives_all_symbols() {
    let dir = tempfile::tempdir().expect("a directory");
    let order: Vec<usize> = (0..30).collect();
    for flags in MODELS {
        let (full, stripped) = build(dir.path(), "same", &source(30, &order, &[], &[]), flags);
        let located = locate(&full, &stripped).expect("comparable");
        assert!(located.identical && located.missing.is_empty());
        assert_eq!(judge(&located, &full), (60, 60));
        let place = located.place(&stripped, "f3", None).expect("certain");
        assert!(place.fingerprint.is_some() && place.size > 0, "{place:?}");
    }
    let (_, stripped) = build(dir.path(), "bare", &source(3, &[0, 1, 2], &[], &[]), MODELS[0]);
    assert!(matches!(locate(&stripped, &stripped), Err(TwinError::Stripped(_))));
}

#[test]
fn shuffled_functions_are_found_and_none_is_taken_for_another() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut random = Random::new();
    let count = 60;
    let order: Vec<usize> = (0..count).collect();
    for flags in MODELS {
        let mut other = order.clone();
        for last in (1..count).rev() {
            other.swap(last, random.below(last + 1));
        }
        let (twin, _) = build(dir.path(), "twin", &source(count, &order, &[], &[]), flags);
        let (truth, stripped) = build(dir.path(), "module", &source(count, &other, &[], &[]), flags);
        let located = locate(&twin, &stripped).expect("comparable");
        assert!(!located.identical);
        let (functions, objects) = judge(&located, &truth);
        println!("{flags:?}: {functions} of {} functions, {objects} of {} objects", 2 * count, 2 * count);
        // All are reached from main, by calls and by the table. At a fixed address the ends of loops are numbers in the code,
        // not all of which are told from others.
        let least = if flags.contains(&"-no-pie") { count } else { 2 * count };
        assert!(functions >= least, "{flags:?}: missing {:?}", located.missing);
        assert!(objects >= count, "{flags:?}: {objects}");
    }
}

#[test]
fn another_version_gives_no_wrong_symbol() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut random = Random::new();
    let count = 60;
    let order: Vec<usize> = (0..count).collect();
    for flags in MODELS {
        let mut pick = |few: usize| -> Vec<usize> { (0..few).map(|_| random.below(count)).collect() };
        let (changed, gone) = (pick(8), pick(6));
        println!("changed {changed:?}, gone {gone:?}");
        let (twin, _) = build(dir.path(), "old", &source(count, &order, &[], &[]), flags);
        let (truth, stripped) = build(dir.path(), "new", &source(count, &order, &changed, &gone), flags);
        let located = locate(&twin, &stripped).expect("comparable");
        let (functions, objects) = judge(&located, &truth);
        println!("{flags:?}: {functions} functions and {objects} objects of {} each", 2 * count);
        for symbol in changed.iter().filter(|n| !gone.contains(n)).map(|n| format!("f{n}")) {
            assert!(!located.found.iter().any(|found| found.symbol.name == symbol), "{symbol} has changed");
        }
        // What looks like others is not told apart between versions.
        assert!(functions >= count / 6, "{flags:?}: {functions}");
    }
}

#[test]
fn damaged_modules_are_compared_without_harm() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut random = Random::new();
    let order: Vec<usize> = (0..20).collect();
    let (twin, _) = build(dir.path(), "whole", &source(20, &order, &[], &[]), MODELS[0]);
    let bytes = std::fs::read(dir.path().join("whole-stripped")).expect("readable");
    for _ in 0..60 {
        let mut damaged = bytes.clone();
        for _ in 0..40 {
            let at = random.below(damaged.len());
            damaged[at] = random.below(256) as u8;
        }
        if let Ok(module) = Image::parse("damaged", damaged.into()) {
            let _ = locate(&twin, &module);
        }
    }
}
