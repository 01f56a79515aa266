//! Counts of calls, returns, and ways out that are no returns.

use super::{fixture::Fixture, loaded};
use crate::kernel::{Ebpf, ProbeEvent, ProbePlan, attach::Method};
use std::{
    thread::sleep,
    time::{Duration, Instant},
};

/// Offsets of the `ret`s of a function; in this program file offset and address are the same for code.
fn returns(fixture: &Fixture, name: &str) -> Vec<u64> {
    use iced_x86::{Decoder, DecoderOptions, FlowControl};
    let (start, size) = fixture.function(name);
    let data = std::fs::read(fixture.file()).expect("readable");
    let code = &data[start as usize..(start + size) as usize];
    Decoder::with_ip(64, code, start, DecoderOptions::NONE)
        .into_iter()
        .filter(|instruction| instruction.flow_control() == FlowControl::Return)
        .map(|instruction| instruction.ip())
        .collect()
}

fn plan(fixture: &Fixture, names: &[&str]) -> ProbePlan {
    ProbePlan {
        pid: fixture.pid(),
        file: fixture.file(),
        entries: names.iter().map(|name| fixture.function(name).0).collect(),
        exits: names.iter().flat_map(|name| returns(fixture, name)).collect(),
        returns: Vec::new(),
    }
}

fn readable(fd: i32) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one structure, which outlives the call.
    unsafe { libc::poll(&raw mut poll, 1, 1000) == 1 }
}

/// Where the thread waits in the function; its stack is at rest then.
fn rests(ebpf: &Ebpf, pid: i32, tid: i32) {
    let begin = Instant::now();
    let series = ebpf.series();
    loop {
        let now = ebpf.snapshot(pid, 0, Some(series)).expect("a snapshot");
        if now.same.iter().any(|&(same, _)| same == tid) {
            return;
        }
        sleep(Duration::from_millis(2));
        assert!(begin.elapsed() < Duration::from_secs(10), "thread {tid} does not come to rest");
    }
}

fn calls_and_returns(method: Method) {
    let Some(ebpf) = loaded("calls and returns are counted") else { return };
    let mut fixture = Fixture::start();
    let set = ebpf.arm_with(&plan(&fixture, &["counted", "waits_inside"]), Some(method)).expect("armed");
    assert_eq!(fixture.order("call 200"), "200");
    assert_eq!(set.sum().expect("a sum"), 0, "200 calls, 200 returns");
    assert_eq!(set.counts().expect("counts").get(&fixture.pid()), Some(&0));
    assert!(readable(set.event_fd()));
    assert_eq!(set.events().expect("events"), [ProbeEvent::Quiet]);
    // Two threads inside.
    let first: i32 = fixture.order("wait 1").parse().expect("a thread id");
    let second: i32 = fixture.order("wait 1").parse().expect("a thread id");
    rests(&ebpf, fixture.pid(), first);
    rests(&ebpf, fixture.pid(), second);
    assert_eq!(set.sum().expect("a sum"), 2);
    let counts = set.counts().expect("counts");
    assert_eq!((counts.get(&first), counts.get(&second)), (Some(&1), Some(&1)));
    assert!(!set.is_quiet().expect("counts"));
    assert_eq!(set.events().expect("events"), []);
    fixture.order("go");
    fixture.order("go");
    assert!(readable(set.event_fd()), "the last one out is told");
    assert_eq!(set.events().expect("events"), [ProbeEvent::Quiet]);
    assert!(set.is_quiet().expect("counts"));
    drop(set);
    assert_eq!(fixture.order("call 5"), "5", "the target runs on");
}

#[test]
fn calls_and_returns_are_counted_by_one_link() {
    calls_and_returns(Method::Multi);
}

#[test]
fn calls_and_returns_are_counted_by_perf_events() {
    calls_and_returns(Method::Single);
}

#[test]
fn a_longjmp_leaves_the_count_up_until_a_look_settles_it() {
    let Some(ebpf) = loaded("a_longjmp_leaves_the_count_up_until_a_look_settles_it") else { return };
    let mut fixture = Fixture::start();
    let pid = fixture.pid();
    let set = ebpf.arm(&plan(&fixture, &["jumps_out"])).expect("armed");
    assert_eq!(fixture.order("jump 1"), "jumped");
    assert_eq!(fixture.order("jump 1"), "jumped");
    assert_eq!(fixture.order("jump 0"), "jumped");
    assert_eq!(set.sum().expect("a sum"), 2, "two left by longjmp, one by return");
    rests(&ebpf, pid, pid);
    set.set_baseline(pid, 0, set.counted(pid).expect("counted")).expect("settled");
    assert!(set.is_quiet().expect("counts"));
}

#[test]
fn exceptions_pass_through_probed_functions() {
    let Some(ebpf) = loaded("exceptions_pass_through_probed_functions") else { return };
    let mut fixture = Fixture::start_throwing();
    let pid = fixture.pid();
    let set = ebpf.arm(&plan(&fixture, &["thrower", "between", "catcher"])).expect("armed");
    assert_eq!(fixture.order("call 0"), "1");
    assert_eq!(set.sum().expect("a sum"), 0);
    assert_eq!(fixture.order("throw 7"), "-7", "the exception is caught as ever");
    assert_eq!(fixture.order("throw 8"), "-8");
    assert_eq!(
        set.sum().expect("a sum"),
        4,
        "two functions were left by an exception, twice; the one that caught it returned"
    );
    rests(&ebpf, pid, pid);
    set.set_baseline(pid, 0, set.counted(pid).expect("counted")).expect("settled");
    assert!(set.is_quiet().expect("counts"));
    assert_eq!(fixture.order("call 0"), "1");
    assert!(set.is_quiet().expect("counts"), "later counts are right again");
}

#[test]
fn a_thread_that_ends_inside_is_settled_by_its_end() {
    let Some(ebpf) = loaded("a_thread_that_ends_inside_is_settled_by_its_end") else { return };
    let mut fixture = Fixture::start();
    let set = ebpf.arm(&plan(&fixture, &["ends_inside"])).expect("armed");
    let tid: i32 = fixture.order("finish").parse().expect("a thread id");
    let begin = Instant::now();
    while std::fs::exists(format!("/proc/{}/task/{tid}", fixture.pid())).expect("readable") {
        assert!(begin.elapsed() < Duration::from_secs(10), "thread {tid} does not end");
        sleep(Duration::from_millis(2));
    }
    assert_eq!(set.counts().expect("counts").get(&tid), Some(&1));
    set.set_baseline(tid, 0, set.counted(tid).expect("counted")).expect("settled");
    assert!(set.is_quiet().expect("counts"));
}

#[test]
fn activations_from_before_the_probes_are_told_by_a_baseline() {
    let Some(ebpf) = loaded("activations_from_before_the_probes_are_told_by_a_baseline") else { return };
    let mut fixture = Fixture::start();
    let tid: i32 = fixture.order("wait 1").parse().expect("a thread id");
    rests(&ebpf, fixture.pid(), tid);
    let set = ebpf.arm(&plan(&fixture, &["waits_inside"])).expect("armed");
    assert_eq!(set.sum().expect("a sum"), 0, "the probes do not know it yet");
    set.set_baseline(tid, 1, set.counted(tid).expect("counted")).expect("told");
    assert_eq!(set.sum().expect("a sum"), 1);
    set.events().expect("armed for news");
    fixture.order("go");
    assert!(readable(set.event_fd()));
    assert_eq!(set.events().expect("events"), [ProbeEvent::Quiet]);
    assert!(set.is_quiet().expect("counts"));
}

#[test]
fn two_errors_do_not_make_it_quiet() {
    let Some(ebpf) = loaded("two_errors_do_not_make_it_quiet") else { return };
    let fixture = Fixture::start();
    let set = ebpf.arm(&plan(&fixture, &["waits_inside"])).expect("armed");
    set.set_baseline(1, 1, 0).expect("told");
    set.set_baseline(2, -1, 0).expect("told");
    assert_eq!(set.sum().expect("a sum"), 0);
    assert!(!set.is_quiet().expect("counts"));
}

#[test]
fn a_return_address_tells_who_came_by() {
    let Some(ebpf) = loaded("a_return_address_tells_who_came_by") else { return };
    let mut fixture = Fixture::start();
    let (start, _) = fixture.function("counted");
    let place = returns(&fixture, "counted")[0];
    let set = ebpf
        .arm(&ProbePlan { pid: fixture.pid(), file: fixture.file(), returns: vec![place], ..ProbePlan::default() })
        .expect("armed");
    fixture.order("call 1");
    assert!(place > start && readable(set.event_fd()));
    let expected = ProbeEvent::Returned { tid: fixture.pid(), ip: fixture.base() + place };
    assert_eq!(set.events().expect("events"), [expected]);
}

#[test]
fn other_processes_of_the_same_file_are_not_counted() {
    let Some(ebpf) = loaded("other_processes_of_the_same_file_are_not_counted") else { return };
    let (fixture, mut other) = (Fixture::start(), Fixture::start());
    let set = ebpf.arm(&plan(&fixture, &["counted"])).expect("armed");
    other.order("call 3");
    assert_eq!(set.counts().expect("counts").len(), 0);
}

#[test]
fn what_can_not_be_probed_is_an_error() {
    let Some(ebpf) = loaded("what_can_not_be_probed_is_an_error") else { return };
    let fixture = Fixture::start();
    let good = plan(&fixture, &["counted"]);
    assert!(ebpf.arm(&ProbePlan { file: "/nowhere".into(), ..good.clone() }).is_err());
    assert!(ebpf.arm(&ProbePlan { pid: -1, ..good.clone() }).is_err());
    assert!(ebpf.arm(&ProbePlan { pid: 0, ..good.clone() }).is_err(), "0 would mean everybody");
    assert!(ebpf.arm(&ProbePlan { entries: vec![], exits: vec![], ..good.clone() }).is_err());
    let other = Fixture::start();
    let pid = fixture.pid();
    fixture.end();
    assert!(ebpf.arm(&ProbePlan { pid, file: other.file(), ..good }).is_err(), "the process is gone");
}
