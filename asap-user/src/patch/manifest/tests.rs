//! Manifests written into real object files, read again, and damaged in all ways.

use super::*;
use crate::patch::PatchObject;
use std::process::Command;

fn object() -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let source = dir.path().join("fix.c");
    std::fs::write(&source, "extern int old(int); int counter; int fixed(int x) { counter++; return old(x) + 1; }\n")
        .expect("written");
    let output = dir.path().join("fix.o");
    let compiled = Command::new("cc").args(["-O2", "-fPIC", "-c", "-o"]).arg(&output).arg(&source).status();
    assert!(compiled.expect("cc runs").success());
    std::fs::read(output).expect("an object file")
}

pub(crate) fn manifest() -> Manifest {
    Manifest {
        name: "CVE-2026-1".to_owned(),
        class: Class::NewData,
        target: "server".to_owned(),
        builds: vec![Build {
            build_id: "c0ffee".to_owned(),
            symbols: vec![Place {
                name: "old".to_owned(),
                file: Some("old.c".to_owned()),
                kind: PlaceKind::Function,
                address: ImageOffset(0x1234),
                size: 17,
                fingerprint: Some(sha256_hex(b"code")),
            }],
        }],
        functions: vec![Replaced { old: "broken".to_owned(), file: None, new: "fixed".to_owned() }],
        hooks: Hooks::default(),
        origin: Origin { package: Some("server".to_owned()), ..Origin::default() },
        requires: vec!["CVE-2025-9".to_owned()],
        replaces: Vec::new(),
        tool: "asap 0.1.0".to_owned(),
    }
}

#[test]
fn what_is_written_is_read_again_and_the_object_stays_what_it_was() {
    let object = object();
    assert_eq!(read(&object), Ok(None), "no manifest yet");
    let file = write(&object, &manifest()).expect("room for a manifest");
    assert_eq!(file, write(&object, &manifest()).expect("again"), "the same input gives the same bytes");
    assert_eq!(read(&file), Ok(Some(manifest())));
    assert_eq!(write(&file, &manifest()), Err(ManifestError::Present));

    let defined = |bytes: &[u8]| {
        let object = PatchObject::read(&[("fix.o".to_owned(), bytes.to_vec())]).expect("a patch");
        (object.functions(), object.variables(), object.imports(), object.relocations())
    };
    assert_eq!(defined(&file), defined(&object));
}

#[test]
fn other_tools_read_the_file_too() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("fix.asap");
    std::fs::write(&path, write(&object(), &manifest()).expect("room")).expect("written");
    let dump = Command::new("readelf").args(["-W", "-S", "-p", ".asap"]).arg(&path).output().expect("readelf runs");
    let text = String::from_utf8_lossy(&dump.stdout);
    assert!(dump.status.success() && dump.stderr.is_empty(), "{}", String::from_utf8_lossy(&dump.stderr));
    assert!(text.contains("CVE-2026-1") && text.contains(".text"), "{text}");
    let linked = Command::new("ld").arg("-r").arg("-o").arg(dir.path().join("linked.o")).arg(&path).status();
    assert!(linked.expect("ld runs").success());
}

#[test]
fn any_changed_byte_is_noticed() {
    let file = write(&object(), &manifest()).expect("room");
    for at in 0..file.len() {
        let mut changed = file.clone();
        changed[at] ^= 0x20;
        match read(&changed) {
            Err(_) => {}
            // A name of a section in the header decides whether there is a manifest at all.
            Ok(None) => assert!(elf::find(&changed, SECTION).expect("an object").is_none(), "byte {at}"),
            Ok(Some(_)) => panic!("byte {at} was changed, and nobody noticed"),
        }
    }
    let section = elf::find(&file, SECTION).expect("an object").expect("a manifest");
    let mut changed = file.clone();
    changed[section.end - 20] ^= 1;
    assert_eq!(read(&changed), Err(ManifestError::Tampered));
}

#[test]
fn cut_off_files_are_refused() {
    let file = write(&object(), &manifest()).expect("room");
    for length in 0..file.len() {
        assert!(read(&file[..length]).is_err(), "{length} of {} bytes", file.len());
    }
}

#[test]
fn a_newer_version_is_refused_by_name() {
    let object = object();
    for (text, wanted) in [
        (format!("asap-patch 2 sha256:{}\nwhatever", "0".repeat(64)), ManifestError::Version { found: 2 }),
        (
            format!("asap-patch 0 sha256:{}\n{{}}", "0".repeat(64)),
            ManifestError::Damaged("its first line is not as it should be".to_owned()),
        ),
        (format!("asap-patch 1 sha256:{}\n{{}}", "0".repeat(64)), ManifestError::Tampered),
        ("something else".to_owned(), ManifestError::Damaged("it does not begin like one".to_owned())),
        (String::new(), ManifestError::Damaged("it does not begin like one".to_owned())),
    ] {
        let file = elf::append(&object, SECTION, text.as_bytes()).expect("room");
        assert_eq!(read(&file), Err(wanted), "{text}");
    }
}

#[test]
fn manifests_that_make_no_sense_are_not_written() {
    let object = object();
    let sound = manifest();
    let mut wrong = vec![
        Manifest { builds: Vec::new(), ..sound.clone() },
        Manifest { functions: Vec::new(), ..sound.clone() },
        Manifest { name: String::new(), ..sound.clone() },
        Manifest { functions: [sound.functions.clone(), sound.functions.clone()].concat(), ..sound.clone() },
        Manifest { target: "x".repeat(NAME_MOST + 1), ..sound.clone() },
    ];
    for id in ["", "C0FFEE", "c0f", "xy"] {
        wrong.push(Manifest { builds: vec![Build { build_id: id.to_owned(), symbols: Vec::new() }], ..sound.clone() });
    }
    for manifest in wrong {
        assert!(matches!(write(&object, &manifest), Err(ManifestError::Damaged(_))), "{manifest:?}");
    }
    assert!(matches!(write(b"#!/bin/sh\n", &sound), Err(ManifestError::NotAnObject(_))));
}

#[test]
fn classes_are_called_what_reports_call_them() {
    for class in Class::ALL {
        assert_eq!(serde_json::to_string(&class).expect("a word"), format!("\"{class}\""));
    }
}
