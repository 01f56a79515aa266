//! Patch files (`fix.asap`): they know which build they are for, and the names that a stripped program has lost.

use crate::support::{Fixture, Lab, Snapshot, Source};
use asap::{
    build::twin,
    image::{Image, SymbolKind},
    patch::manifest::{self, Build, Class, Manifest, Origin, Place, PlaceKind, Replaced, sha256_hex},
    report::{FailureKind, TargetState},
};
use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// A program, and the same without its symbols.
pub struct Stripped {
    full: Image,
    path: PathBuf,
}

pub fn strip(lab: &Lab, source: &Source) -> Stripped {
    let full = source.build();
    let path = lab.path(&format!("{}-stripped", full.file_name().expect("a name").to_string_lossy()));
    let done = Command::new("strip").arg("-s").arg("-o").arg(&path).arg(&full).status().expect("strip runs");
    assert!(done.success());
    let bytes = std::fs::read(&full).expect("readable");
    let full = Image::parse("full", bytes.into()).expect("an executable");
    Stripped { full, path }
}

impl Stripped {
    pub fn start(&self) -> Fixture {
        Fixture::start(&mut Command::new(&self.path))
    }

    fn place(&self, name: &str, file: Option<&str>) -> Place {
        let found = self.full.locals(name, file);
        assert_eq!(found.len(), 1, "{name}: {found:?}");
        let symbol = &found[0];
        let kind = match symbol.kind {
            SymbolKind::Tls => PlaceKind::Tls,
            SymbolKind::Data => PlaceKind::Data,
            SymbolKind::Function | SymbolKind::Ifunc => PlaceKind::Function,
        };
        let code = self.full.bytes_at(symbol.address, symbol.size as usize);
        Place {
            name: name.to_owned(),
            file: file.map(str::to_owned),
            kind,
            address: symbol.address,
            size: symbol.size,
            fingerprint: code.filter(|_| kind == PlaceKind::Function).map(sha256_hex),
        }
    }

    /// A manifest for a patch that replaces these functions.
    pub fn manifest(&self, name: &str, functions: &[(&str, Option<&str>)]) -> Manifest {
        let symbols = functions.iter().map(|&(function, file)| self.place(function, file)).collect();
        let replaced = |&(function, file): &(&str, Option<&str>)| Replaced {
            old: function.to_owned(),
            file: file.map(str::to_owned),
            new: function.to_owned(),
        };
        Manifest {
            name: name.to_owned(),
            class: Class::CodeOnly,
            target: self.path.file_name().expect("a name").to_string_lossy().into_owned(),
            builds: vec![Build { build_id: self.full.build_id_hex().expect("gcc makes build-ids"), symbols }],
            functions: functions.iter().map(replaced).collect(),
            hooks: Default::default(),
            origin: Origin::default(),
            requires: Vec::new(),
            replaces: Vec::new(),
            tool: "a test".to_owned(),
        }
    }
}

pub fn patch_file(lab: &Lab, object: &str, manifest: &Manifest) -> String {
    let bytes = manifest::write(&std::fs::read(object).expect("an object"), manifest).expect("a sound manifest");
    let path = Path::new(object).with_file_name(format!("{}.asap", manifest.name));
    std::fs::write(&path, bytes).expect("written");
    assert!(path.starts_with(lab.path("")));
    path.to_str().expect("ASCII").to_owned()
}

pub fn names() -> Source {
    Source::of(&["names_a.c", "names_b.c"])
}

#[test]
fn a_stripped_program_is_patched_by_names_that_the_manifest_knows() {
    let Some(lab) = Lab::new("a_stripped_program_is_patched_by_names_that_the_manifest_knows") else { return };
    let program = strip(&lab, &names());
    let target = program.start();
    let before = Snapshot::of(target.pid());
    lab.attach(target.pid());
    // A static function is replaced; static functions and data, and a hidden thread-local variable, are used.
    let object = lab.object(
        "#include <asap-patch.h>
         extern volatile int limit, table[4]; extern __thread int hidden_thread_count; int only_here(int);
         int helper_b(int); ASAP_IMPORT(helper_b, \"names_b.c:helper\");
         int helper(int x) {
             limit = 70; hidden_thread_count = 60;
             return only_here(x) * 10000 + helper_b(x) * 100 + table[3]; }",
    );
    lab.asap(&["patch", "--function", "helper", &object]).refusal(&["helper"]);
    let mut manifest = program.manifest("statics", &[("helper", Some("names_a.c"))]);
    for (name, file) in [
        ("limit", None),
        ("table", None),
        ("hidden_thread_count", None),
        ("only_here", None),
        ("helper", Some("names_b.c")),
    ] {
        manifest.builds[0].symbols.push(program.place(name, file));
    }
    let file = patch_file(&lab, &object, &manifest);
    let report = lab.patch(&[&file]);
    assert_eq!((report.patch.name.as_str(), report.patch.functions[0].name.as_str()), ("statics", "helper"));
    // only_here(3) is 3 * 8, helper of names_b.c gives 2, table[3] is 8.
    assert_eq!(target.number("call 3"), 240_208);
    assert_eq!(target.ask("state"), "70 41 6 60");
    assert_eq!(target.numbers("helpers 3"), [240_208, 2]);
    lab.revert(&[]);
    assert_eq!(target.number("call 99"), 70);
    assert_eq!(lab.detach(&[]).clean, Some(true));
    Snapshot::of(target.pid()).assert_same(&before, "detached");
}

#[test]
fn a_stripped_program_is_patched_by_names_that_only_its_twin_knows() {
    let Some(lab) = Lab::new("a_stripped_program_is_patched_by_names_that_only_its_twin_knows") else { return };
    let program = strip(&lab, &names());
    // The same source, linked in another order: all addresses differ.
    let twin = std::fs::read(Source::of(&["names_b.c", "names_a.c"]).build()).expect("readable");
    let twin = Image::parse("twin", twin.into()).expect("an executable");
    let stripped = Image::parse("stripped", std::fs::read(&program.path).expect("readable").into()).expect("one, too");
    let located = twin::locate(&twin, &stripped).expect("comparable");
    assert!(!located.identical);
    let place =
        |name: &str, file| located.place(&stripped, name, file).unwrap_or_else(|| panic!("{name}: {located:#?}"));
    assert_eq!(place("victim", None).address, program.place("victim", None).address);
    let mut manifest = program.manifest("twin", &[("victim", None)]);
    manifest.builds[0].symbols = vec![
        place("victim", None),
        place("helper", Some("names_a.c")),
        place("only_here", None),
        place("limit", Some("names_a.c")),
    ];
    let object = lab.object(
        "#include <asap-patch.h>
         extern volatile int limit; int helper(int), only_here(int);
         int victim(int x) { limit = 70; return helper(x) * 1000 + only_here(x); }",
    );
    let target = program.start();
    lab.attach(target.pid());
    lab.patch(&[&patch_file(&lab, &object, &manifest)]);
    assert_eq!((target.number("call 3"), target.number("call 99")), (4024, 70_000 + 99 * 8));
    assert_eq!(target.numbers("state")[0], 70);
    lab.detach(&["--revert"]);
    assert_eq!(target.number("call 99"), 70);
}

#[test]
fn the_target_that_a_patch_fits_is_found_by_build_id() {
    let Some(lab) = Lab::new("the_target_that_a_patch_fits_is_found_by_build_id") else { return };
    let program = strip(&lab, &names());
    let (first, second) = (program.start(), program.start());
    let other = Source::of(&["inside.c"]).start(&[]);
    lab.attach(other.pid());
    let file = patch_file(
        &lab,
        &lab.object("int victim(int x) { return x + 50; }"),
        &program.manifest("fix", &[("victim", None)]),
    );
    let refused = lab.asap(&["patch", &file]).refusal(&["build-id", &program.full.build_id_hex().expect("one")]);
    assert!(refused.way_out.contains("asap build"), "{refused:?}");
    for target in [&first, &second] {
        lab.attach(target.pid());
    }
    let plain = lab.object("int victim(int x) { return x + 60; }");
    let failure = lab.asap(&["patch", "--function", "victim", &plain]).failure();
    assert_eq!(failure.kind, FailureKind::Usage, "plain objects fit anything: {failure:?}");
    let report = lab.patch(&[&file]);
    let mut patched: Vec<i32> = report.processes.iter().map(|process| process.pid).collect();
    patched.sort_unstable();
    let mut expected = [first.pid(), second.pid()];
    expected.sort_unstable();
    assert_eq!(patched, expected);
    assert_eq!((first.number("call 1"), second.number("call 1")), (51, 51));
    for target in [&first, &second] {
        lab.revert(&["--pid", &target.pid_text()]);
        assert_eq!(target.number("call 1"), 2);
    }
}

#[test]
fn one_target_that_refuses_keeps_a_patch_out_of_the_others() {
    let Some(lab) = Lab::new("one_target_that_refuses_keeps_a_patch_out_of_the_others") else { return };
    let program = strip(&lab, &names());
    let mut targets = [program.start(), program.start()];
    targets.sort_by_key(Fixture::pid);
    for target in &targets {
        lab.attach(target.pid());
    }
    // The later one has a patch of that name already.
    let mut manifest = program.manifest("fix", &[("victim", None)]);
    let other = patch_file(&lab, &lab.object("int victim(int x) { return x + 40; }"), &manifest);
    lab.patch(&["--pid", &targets[1].pid_text(), &other]);
    let file = patch_file(&lab, &lab.object("int victim(int x) { return x + 50; }"), &manifest);
    let failure = lab.asap(&["patch", &file]).failure();
    assert_eq!(failure.state, TargetState::RolledBack, "{failure:?}");
    assert!(failure.message.contains("another patch of the name fix"), "{failure:?}");
    assert_eq!((targets[0].number("call 1"), targets[1].number("call 1")), (2, 41));
    // As one that replaces it, it goes into both.
    manifest.replaces = vec!["fix".to_owned()];
    let file = patch_file(&lab, &lab.object("int victim(int x) { return x + 50; }"), &manifest);
    lab.patch(&[&file]);
    assert_eq!((targets[0].number("call 1"), targets[1].number("call 1")), (51, 51));
    assert!(lab.status().targets.iter().all(|target| target.patches.len() == 1));
}

#[test]
fn the_same_patch_again_is_no_failure() {
    let Some(lab) = Lab::new("the_same_patch_again_is_no_failure") else { return };
    let program = strip(&lab, &names());
    let target = program.start();
    lab.attach(target.pid());
    let file = patch_file(
        &lab,
        &lab.object("int victim(int x) { return x + 50; }"),
        &program.manifest("fix", &[("victim", None)]),
    );
    assert!(!lab.patch(&[&file]).already);
    let again = lab.patch(&[&file]);
    assert!(again.already && again.processes.is_empty(), "{again:?}");
    assert_eq!(lab.status().targets[0].patches.len(), 1);
    assert_eq!(target.number("call 1"), 51);
    lab.revert(&[]);
    assert_eq!(target.number("call 1"), 2);
    assert!(!lab.patch(&[&file]).already, "it was taken out");
}

#[test]
fn cumulative_patches_take_the_place_of_older_ones() {
    let Some(lab) = Lab::new("cumulative_patches_take_the_place_of_older_ones") else { return };
    let program = strip(&lab, &names());
    let target = program.start();
    let before = Snapshot::of(target.pid());
    lab.attach(target.pid());
    let make = |name: &str, source: &str, functions: &[(&str, Option<&str>)], requires: &[&str], replaces: &[&str]| {
        let list = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let manifest =
            Manifest { requires: list(requires), replaces: list(replaces), ..program.manifest(name, functions) };
        patch_file(&lab, &lab.object(source), &manifest)
    };
    let victim = [("victim", None)];
    let first = make("first", "int victim(int x) { return x + 50; }", &victim, &[], &[]);
    let second = make("second", "int only_here(int x) { return x + 7; }", &[("only_here", None)], &["first"], &[]);
    let refused = lab.asap(&["patch", &second]).refusal(&["second builds upon first"]);
    assert!(refused.way_out.contains("apply first first"), "{refused:?}");
    lab.patch(&[&first]);
    lab.patch(&[&second]);
    assert_eq!((target.number("call 1"), target.number("only 3")), (51, 10));
    // The new one repairs victim in another way, and leaves only_here as it was before all patches.
    let third = make("third", "int victim(int x) { return x + 60; }", &victim, &[], &["first", "second"]);
    assert!(lab.patch(&["--dry-run", &third]).dry_run);
    assert_eq!((target.number("call 1"), target.number("only 3")), (51, 10));
    lab.patch(&[&third]);
    assert_eq!((target.number("call 1"), target.number("only 3")), (61, 24));
    let patches = lab.status().targets[0].patches.clone();
    assert_eq!(patches.iter().map(|patch| patch.name.as_str()).collect::<Vec<_>>(), ["third"]);
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
    assert_eq!(target.number("call 1"), 2);
    Snapshot::of(target.pid()).assert_same(&before, "nothing of the three is left");
}

#[test]
fn a_refused_cumulative_patch_leaves_the_older_ones_in() {
    let Some(lab) = Lab::new("a_refused_cumulative_patch_leaves_the_older_ones_in") else { return };
    let program = strip(&lab, &Source::of(&["relatives.c"]));
    let target = Fixture::start(Command::new(&program.path).arg("3"));
    lab.attach(target.pid());
    let source = |more: i32| {
        format!(
            "int wait_for_byte(int); int victim(int x, int wait) {{
                 return wait > 0 ? x + {more} + wait_for_byte(wait) : x + {more}; }}"
        )
    };
    let mut first = program.manifest("first", &[("victim", None)]);
    first.builds[0].symbols.push(program.place("wait_for_byte", None));
    let second = Manifest { name: "second".to_owned(), replaces: vec!["first".to_owned()], ..first.clone() };
    let [first, second] =
        [(2, first), (3, second)].map(|(more, manifest)| patch_file(&lab, &lab.object(&source(more)), &manifest));
    lab.patch(&[&first]);
    // The last of the processes waits in code of the first patch; the others have the second one by the time that it is asked.
    target.ask("busy 2");
    let failure = lab.asap(&["patch", "--timeout", "300ms", &second]).failure();
    assert_eq!((failure.kind, failure.state), (FailureKind::Timeout, TargetState::RolledBack), "{failure:?}");
    assert_eq!((target.number("call 10"), target.numbers("free 2")), (12, vec![12]));
    assert_eq!(target.numbers("children"), [12, 12, 12]);
    let names = || -> Vec<String> { lab.status().targets[0].patches.iter().map(|patch| patch.name.clone()).collect() };
    assert_eq!(names(), ["first"]);
    lab.patch(&[&second]);
    assert_eq!((target.number("call 10"), target.numbers("children")), (13, vec![13, 13, 13]));
    assert_eq!(names(), ["second"]);
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
    assert_eq!((target.number("call 10"), target.numbers("children")), (11, vec![11, 11, 11]));
}

#[test]
fn files_that_are_not_as_they_were_made_are_refused() {
    let Some(lab) = Lab::new("files_that_are_not_as_they_were_made_are_refused") else { return };
    let program = strip(&lab, &names());
    let target = program.start();
    lab.attach(target.pid());
    let before = Snapshot::of(target.pid());
    let object = lab.object("int victim(int x) { return x + 50; }");
    let sound = program.manifest("fix", &[("victim", None)]);
    let file = patch_file(&lab, &object, &sound);

    let bytes = std::fs::read(&file).expect("readable");
    let mut changed = bytes.clone();
    let at = bytes.windows(4).position(|part| part == [0x8d, 0x47, 0x32, 0xc3]).expect("lea 50(%rdi),%eax; ret");
    changed[at + 2] = 51;
    let path = lab.path("changed.asap");
    std::fs::write(&path, &changed).expect("written");
    lab.asap(&["patch", path.to_str().expect("ASCII")]).refusal(&["changed.asap", "was changed after it was made"]);

    let newer = String::from_utf8_lossy(&bytes).into_owned();
    assert!(newer.contains("asap-patch 1 "));
    let at = bytes.windows(13).position(|part| part == b"asap-patch 1 ").expect("a manifest");
    let mut newer = bytes.clone();
    newer[at + 11] = b'9';
    std::fs::write(&path, &newer).expect("written");
    lab.asap(&["patch", path.to_str().expect("ASCII")]).refusal(&["version 9"]);

    std::fs::copy(&object, &path).expect("copied");
    lab.asap(&["patch", path.to_str().expect("ASCII")]).refusal(&["has a manifest, and this one has none"]);

    for class in [Class::DataLayout, Class::StartUpOnly, Class::NotApplicable] {
        let manifest = Manifest { name: class.name().to_owned(), class, ..sound.clone() };
        lab.asap(&["patch", &patch_file(&lab, &object, &manifest)]).refusal(&[class.name()]);
    }
    let mut other = sound.clone();
    other.name = "other-code".to_owned();
    other.builds[0].symbols[0].fingerprint = Some(sha256_hex(b"something else"));
    lab.asap(&["patch", &patch_file(&lab, &object, &other)]).refusal(&["not the code that the patch was made for"]);

    let usage = lab.asap(&["patch", "--function", "victim", &file]).failure();
    assert_eq!(usage.kind, FailureKind::Usage, "{usage:?}");
    let usage = lab.asap(&["patch", &file, &object]).failure();
    assert_eq!(usage.kind, FailureKind::Usage, "{usage:?}");
    Snapshot::of(target.pid()).assert_same(&before, "refused");
    assert_eq!(target.number("call 1"), 2);
}
