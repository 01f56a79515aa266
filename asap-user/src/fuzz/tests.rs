//! The checks on stable: over the corpora that libFuzzer starts from, and over damaged copies of them. `ASAP_TEST_SEED` repeats a
//! run, `ASAP_FUZZ_ROUNDS` makes it longer.

use super::{TARGETS, run};
use crate::random::Random;
use std::{
    collections::BTreeSet,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

/// Damaged inputs for each target.
const ROUNDS: usize = 1500;
/// Values that lengths, offsets and counts like to break at.
const EXTREMES: [u64; 10] =
    [0, 1, 7, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 1 << 40, 1 << 63, u64::MAX - 0xfff, u64::MAX];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz")
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    entries.map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned()).collect()
}

/// The seeds of a target, by name.
fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = folder().join("corpus").join(target);
    let read = |name: String| fs::read(folder.join(&name)).map(|bytes| (name, bytes)).expect("readable");
    names(&folder).into_iter().map(read).collect()
}

/// The same list of targets here, as programs, and as corpora: none is forgotten in one of the places.
#[test]
fn every_target_has_a_program_and_seeds() {
    let known: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let programs = names(&folder().join("fuzz_targets"));
    assert_eq!(programs.iter().map(|name| name.trim_end_matches(".rs").to_owned()).collect::<BTreeSet<_>>(), known);
    assert_eq!(names(&folder().join("corpus")), known);
    let manifest = fs::read_to_string(folder().join("Cargo.toml")).expect("readable");
    for name in &known {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} is missing in fuzz/Cargo.toml");
        let program = fs::read_to_string(folder().join(format!("fuzz_targets/{name}.rs"))).expect("readable");
        assert!(program.contains(&format!("asap::fuzz::run(\"{name}\", bytes)")), "{name}: {program}");
        assert!(corpus(name).len() >= 2, "{name} has no seeds");
    }
}

#[test]
fn the_corpora_and_damaged_copies_of_them_do_no_harm() {
    let mut random = Random::new();
    let seed = random.seed;
    let rounds = std::env::var("ASAP_FUZZ_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(ROUNDS);
    for (target, _) in TARGETS {
        let seeds = corpus(target);
        for (name, bytes) in &seeds {
            attempt(target, bytes, name);
        }
        for round in 0..rounds {
            let mut bytes = seeds[random.below(seeds.len())].1.clone();
            for _ in 0..=random.below(5) {
                damage(&mut bytes, &seeds, &mut random);
            }
            attempt(target, &bytes, &format!("round {round} of ASAP_TEST_SEED={seed}"));
        }
    }
}

fn attempt(target: &str, bytes: &[u8], what: &str) {
    if catch_unwind(AssertUnwindSafe(|| run(target, bytes))).is_err() {
        let kept = std::env::temp_dir().join(format!("asap-fuzz-{target}"));
        let kept = fs::write(&kept, bytes).map_or_else(|error| error.to_string(), |()| kept.display().to_string());
        panic!("{target}: {what}; the input: {kept}");
    }
}

/// One change, of the kinds that parsers stumble over.
fn damage(bytes: &mut Vec<u8>, seeds: &[(String, Vec<u8>)], random: &mut Random) {
    if bytes.is_empty() {
        bytes.push(random.next() as u8);
        return;
    }
    let at = random.below(bytes.len());
    match random.below(9) {
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes[at] = random.next() as u8,
        2 | 3 => {
            let (at, value) = (at & !7, EXTREMES[random.below(EXTREMES.len())].to_le_bytes());
            let width = [1, 2, 4, 8][random.below(4)].min(bytes.len() - at);
            bytes[at..at + width].copy_from_slice(&value[..width]);
        }
        4 => bytes.truncate(at),
        5 => drop(
            bytes.splice(at..at, (0..random.below(9)).map(|_| b" \n\0/-0f\xff@"[random.below(9)]).collect::<Vec<_>>()),
        ),
        6 => {
            // A number in a text grows.
            if let Some(digit) = bytes[at..].iter().position(u8::is_ascii_digit) {
                drop(bytes.splice(at + digit..at + digit, *b"99999999"));
            }
        }
        7 => {
            let other = &seeds[random.below(seeds.len())].1;
            let from = random.below(other.len());
            let length = random.below(other.len() - from).min(256);
            drop(bytes.splice(at..at, other[from..from + length].iter().copied()));
        }
        _ => {
            let end = (at + 1 + random.below(64)).min(bytes.len());
            bytes.drain(at..end);
        }
    }
}
