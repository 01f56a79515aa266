//! Random functions, natively and under all guards: they must leave the same behind.

use crate::{generate, launch::Program, random::Random, translations::Guards};
use asap::dbt::ShadowForm;
use std::{path::Path, process::Command};

/// How many programs, and functions in each.
const PROGRAMS: usize = 12;
const FUNCTIONS: usize = 150;

pub fn build(directory: &Path, random: &mut Random, functions: usize, flags: &[&str]) -> std::path::PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/translated/driver.c");
    let source = if source.exists() { source } else { Path::new(file!()).with_file_name("driver.c") };
    let (assembly, program) = (directory.join("functions.s"), directory.join("program"));
    std::fs::write(&assembly, generate::functions(random, functions)).expect("assembly");
    let mut gcc = Command::new("gcc");
    gcc.args(flags).args(["-O1", "-w", "-o"]).arg(&program).arg(source).arg(&assembly);
    assert!(gcc.status().expect("gcc").success(), "ASAP_TEST_SEED={}", random.seed);
    program
}

#[test]
fn random_functions_leave_the_same_behind_under_all_guards() {
    let mut random = Random::new();
    for round in 0..PROGRAMS {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let flags: &[&str] = if round % 3 == 2 { &["-no-pie"] } else { &["-fpie", "-pie"] };
        let path = build(directory.path(), &mut random, FUNCTIONS, flags);
        let seed = random.next().to_string();
        let program = Program::of(&[&path.display().to_string(), &seed, "6"]);
        let native = program.natively();
        assert!(native.status.success(), "{} {native:?}", random.seed);
        let form = [ShadowForm::Displaced, ShadowForm::Segment, ShadowForm::Folded][round % 3];
        let (translated, stopped) = program.translated(Guards::all(form));
        let what = format!("ASAP_TEST_SEED={} round {round} {form:?}", random.seed);
        let lines = |bytes: &[u8]| String::from_utf8_lossy(bytes).lines().map(str::to_owned).collect::<Vec<_>>();
        let (expected, found) = (lines(&native.stdout), lines(&translated.stdout));
        for (expected, found) in expected.iter().zip(&found) {
            if expected != found {
                let kept = std::env::temp_dir().join("asap-random-code");
                let _ = std::fs::create_dir_all(&kept);
                let _ = std::fs::copy(&path, kept.join("program"));
                let _ = std::fs::copy(directory.path().join("functions.s"), kept.join("functions.s"));
            }
            assert_eq!(expected, found, "{what}, kept in asap-random-code of the temporary directory; seed {seed}");
        }
        assert_eq!(
            expected.len(),
            found.len(),
            "{what}: {:?} {:?}",
            translated.status,
            String::from_utf8_lossy(&translated.stderr)
        );
        assert!(stopped.keys().all(|stopped| stopped.reason != 0), "{what}: {stopped:#?}");
    }
}
