//! What is tried on this machine, and what stays behind.

use super::{alone, fixture::Fixture, is_root, loaded, shared};
use crate::kernel::{Ebpf, ProbePlan, Redirect, features};
use std::{collections::HashSet, os::unix::fs::FileExt};

#[test]
fn each_feature_is_told_with_what_it_gives() {
    let _shared = shared();
    let found = features();
    let names: HashSet<_> = found.iter().map(|feature| feature.name).collect();
    assert_eq!(names.len(), found.len(), "no name twice");
    for feature in &found {
        println!("{feature:?}");
        assert!(!feature.detail.is_empty() && !feature.gives.is_empty() && !feature.how_to_get.is_empty());
    }
    if nix::unistd::geteuid().is_root() {
        let missing: Vec<_> = found.iter().filter(|feature| !feature.available).map(|feature| feature.name).collect();
        // What asap can do without depends on the kernel.
        let optional = ["redirect", "uprobe_multi", "names of memory", "lockdown"];
        assert!(missing.iter().all(|name| optional.contains(name)), "missing: {missing:?}");
    }
}

/// What of eBPF this process holds.
fn held() -> usize {
    let links = std::fs::read_dir("/proc/self/fd").expect("readable").flatten();
    links
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .filter(|to| to.to_string_lossy().contains("bpf"))
        .count()
}

#[test]
fn nothing_of_ebpf_stays_behind() {
    if !is_root("nothing_of_ebpf_stays_behind") {
        return;
    }
    let _alone = alone();
    let ebpf = Ebpf::load().expect("the kernel takes the programs");
    let mut fixture = Fixture::start();
    let maps = || std::fs::read_to_string(format!("/proc/{}/maps", fixture.pid())).expect("readable");
    let (loaded, mapped) = (held(), maps());
    assert!(loaded > 0, "the loaded iterator is seen");
    let (start, _) = fixture.function("counted");
    let code = std::fs::read(fixture.file()).expect("readable")[start as usize..][..16].to_vec();
    let plan = ProbePlan { pid: fixture.pid(), file: fixture.file(), entries: vec![start], ..ProbePlan::default() };
    let set = ebpf.arm(&plan).expect("armed");
    assert!(held() > loaded);
    drop(set);
    assert_eq!(held(), loaded);
    assert_eq!(maps(), mapped, "the target's memory map is as it was");
    let mut text = [0; 16];
    let memory = std::fs::File::open(format!("/proc/{}/mem", fixture.pid())).expect("readable");
    memory.read_exact_at(&mut text, fixture.base() + start).expect("readable");
    assert_eq!(text, code[..], "no breakpoint is left");
    assert_eq!(fixture.order("call 2"), "2");
    drop(ebpf);
    assert_eq!(held(), 0);
}

#[test]
fn redirect_works_or_says_why_not() {
    let Some(ebpf) = loaded("redirect_works_or_says_why_not") else { return };
    let mut fixture = Fixture::start();
    let (from, to) = (fixture.function("counted").0, fixture.function("doubled").0 + fixture.base());
    let installed = Redirect::install(fixture.pid(), &fixture.file(), &[(from, to)]);
    match ebpf.redirect_available() {
        Err(error) => {
            println!("not available here: {error}");
            assert!(error.to_string().contains("redirect"), "{error}");
            assert!(installed.is_err());
        }
        Ok(()) => {
            let redirect = installed.expect("installed");
            assert_eq!(fixture.order("call 1"), "1", "off at first");
            redirect.turn(true).expect("on");
            assert_eq!(fixture.order("call 1"), "2");
            redirect.turn(false).expect("off");
            assert_eq!(fixture.order("call 1"), "1");
        }
    }
    assert_eq!(fixture.order("call 1"), "1");
}
