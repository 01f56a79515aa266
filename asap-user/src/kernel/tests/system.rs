//! What is tried on this machine, and what stays behind.

use super::{alone, fixture::Fixture, is_root, loaded, shared};
use crate::kernel::{Ebpf, RedirectLink, RedirectTable, features};
use std::collections::HashSet;

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
        let optional = ["redirect", "names of memory", "lockdown"];
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
    let loaded = held();
    assert!(loaded > 0, "the loaded iterator is seen");
    let watch = ebpf.life_cycles().expect("the kernel takes the programs");
    assert!(held() > loaded);
    ebpf.snapshot(fixture.pid(), 64, Some(ebpf.series())).expect("a snapshot");
    drop(watch);
    assert_eq!(held(), loaded);
    assert_eq!(fixture.order("call 2"), "2");
    drop(ebpf);
    assert_eq!(held(), 0);
}

/// What is pinned holds without the agent, and can be taken up again.
fn outlives_the_agent(
    ebpf: &Ebpf,
    fixture: &mut Fixture,
    table: RedirectTable,
    other: RedirectLink,
    from: u64,
    to: u64,
) {
    let pins = std::path::Path::new("/sys/fs/bpf").join(format!("asap-test-{}", std::process::id()));
    drop(other);
    if let Err(error) = std::fs::create_dir(&pins) {
        println!("SKIPPED (no BPF file system, {error}): pins");
        return;
    }
    let at = |name: &str| pins.join(name);
    let link = ebpf.redirect(&table, fixture.pid(), &fixture.file(), &[(from, 3)]).expect("linked");
    let pinned = link.pin(&at("link")).and_then(|()| table.pin(&at("table")));
    table.turn();
    drop((link, table));
    let calls = fixture.order("call 1");
    let found = RedirectTable::open(&at("table")).map(|table| table.in_force());
    let link = RedirectLink::open(&at("link"));
    std::fs::remove_dir_all(&pins)
        .or_else(|_| {
            for name in ["link", "table"] {
                let _ = std::fs::remove_file(at(name));
            }
            std::fs::remove_dir(&pins)
        })
        .expect("pins are removed");
    pinned.expect("pinned");
    assert_eq!(calls, "2");
    assert_eq!(found.expect("opened"), [(3, to)]);
    drop(link.expect("opened"));
}

#[test]
fn redirect_works_or_says_why_not() {
    let Some(ebpf) = loaded("redirect_works_or_says_why_not") else { return };
    let mut fixture = Fixture::start();
    let (from, to) = (fixture.function("counted").0, fixture.function("doubled").0 + fixture.base());
    let exec_id = ebpf.snapshot(fixture.pid(), 0, None).expect("it runs").tasks[0].exec_id;
    let table = RedirectTable::create(exec_id).expect("a map");
    let link = ebpf.redirect(&table, fixture.pid(), &fixture.file(), &[(from, 3)]);
    match ebpf.redirect_available() {
        Err(error) => {
            println!("not available here: {error}");
            assert!(error.to_string().contains("redirect"), "{error}");
            assert!(link.is_err());
        }
        Ok(()) => {
            let link = link.expect("linked");
            assert_eq!(fixture.order("call 1"), "1", "nothing is said for its slot yet");
            let before = table.moment();
            table.prepare(&[(3, to)]);
            assert_eq!(fixture.order("call 1"), "1", "the other table is in force");
            assert!(!table.turn_if_quiet(before), "a call has come by");
            assert!(table.turn_if_quiet(table.moment()), "none since");
            assert_eq!(table.in_force(), [(3, to)]);
            assert_eq!(fixture.order("call 1"), "2");
            table.turn();
            assert_eq!(fixture.order("call 1"), "1");
            // As if the process had executed another program since.
            let other = RedirectTable::create(exec_id + 1).expect("a map");
            other.prepare(&[(3, to)]);
            other.turn();
            let pinned = ebpf.redirect(&other, fixture.pid(), &fixture.file(), &[(from, 3)]).expect("linked");
            assert_eq!(fixture.order("call 1"), "1");
            drop((link, other));
            outlives_the_agent(&ebpf, &mut fixture, table, pinned, from, to);
        }
    }
    assert_eq!(fixture.order("call 1"), "1");
}
