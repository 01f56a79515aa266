//! Fork, exec and exit, of watched processes only.

use super::{fixture::Fixture, loaded};
use crate::kernel::{LifeCycle, LifeCycles};
use std::{
    thread::sleep,
    time::{Duration, Instant},
};

/// Waits until the last expected event is there.
fn events_until(watch: &mut LifeCycles, last: LifeCycle) -> Vec<LifeCycle> {
    let begin = Instant::now();
    let mut events = Vec::new();
    while !events.contains(&last) {
        assert!(begin.elapsed() < Duration::from_secs(10), "no {last:?} in {events:?}");
        events.extend(watch.events().expect("events"));
        sleep(Duration::from_millis(2));
    }
    events
}

#[test]
fn children_are_told_and_watched_from_their_birth() {
    let Some(ebpf) = loaded("children_are_told_and_watched_from_their_birth") else { return };
    let mut fixture = Fixture::start();
    let pid = fixture.pid();
    let mut watch = ebpf.life_cycles().expect("tracepoints");
    watch.watch(pid).expect("watched");
    fixture.order("block 1");
    let child: i32 = fixture.order("fork 1").parse().expect("a process id");
    fixture.end();
    let events = events_until(&mut watch, LifeCycle::Exit { pid });
    let expected = [
        LifeCycle::Fork { parent: pid, child },
        LifeCycle::Exec { pid: child },
        LifeCycle::Exit { pid: child },
        LifeCycle::Exit { pid },
    ];
    assert_eq!(events, expected, "threads are no children, and each thing is told once");
}

#[test]
fn grandchildren_are_watched_too() {
    let Some(ebpf) = loaded("grandchildren_are_watched_too") else { return };
    let mut fixture = Fixture::start();
    let pid = fixture.pid();
    let mut watch = ebpf.life_cycles().expect("tracepoints");
    watch.watch(pid).expect("watched");
    let child: i32 = fixture.order("grandchild").parse().expect("a process id");
    let events = events_until(&mut watch, LifeCycle::Exit { pid: child });
    let [LifeCycle::Fork { parent, child: first }, LifeCycle::Fork { parent: second, child: grandchild }, rest @ ..] =
        &events[..]
    else {
        panic!("{events:?}");
    };
    assert_eq!((*parent, *first, *second), (pid, child, child));
    assert_eq!(rest, [LifeCycle::Exit { pid: *grandchild }, LifeCycle::Exit { pid: child }]);
}

#[test]
fn who_is_not_watched_is_not_told() {
    let Some(ebpf) = loaded("who_is_not_watched_is_not_told") else { return };
    let (mut fixture, mut other) = (Fixture::start(), Fixture::start());
    let mut watch = ebpf.life_cycles().expect("tracepoints");
    watch.watch(fixture.pid()).expect("watched");
    other.order("fork");
    watch.unwatch(fixture.pid()).expect("no longer watched");
    watch.unwatch(fixture.pid()).expect("twice does no harm");
    fixture.order("fork");
    assert_eq!(watch.events().expect("events"), []);
    // It does tell when asked.
    watch.watch(fixture.pid()).expect("watched");
    let child = fixture.order("fork").parse().expect("a process id");
    events_until(&mut watch, LifeCycle::Exit { pid: child });
}
