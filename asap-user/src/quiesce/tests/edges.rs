//! Processes at their edges: a first thread that has ended, threads that come and go, deep stacks, and what a source of
//! snapshots may say.

use super::{Fixture, Survey, expected, is_root};
use crate::{
    process::{info, memory::Memory, ptrace::Stopped},
    quiesce::{
        observe::{How, Place},
        snapshot::{Snapshot, SnapshotSource, TaskSnapshot},
        unwind::WalkRegisters,
    },
};
use std::{
    collections::HashMap,
    fs, io,
    time::{Duration, Instant},
};

const SOURCE: &str = r#"
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
static volatile int sink;
__attribute__((noinline)) int below(int depth) {
    if (depth) { int r = below(depth - 1); sink += r; return r + 1; }
    pause();
    return sink;
}
__attribute__((noinline)) int inside(int depth) { int r = below(depth); sink += r; return r; }
static void *run(void *p) {
    long depth = (long)p;
    printf("%ld %s\n", syscall(SYS_gettid), depth % 2 ? "in" : "out"); fflush(stdout);
    sink += depth % 2 ? inside(depth) : below(depth);
    sink++;
    return 0;
}
static void *nothing(void *p) { sink++; return p; }
static void *churn(void *p) {
    pthread_t t;
    printf("%ld out\n", syscall(SYS_gettid)); fflush(stdout);
    for (;;) { pthread_create(&t, 0, nothing, p); pthread_join(t, 0); }
}
int main(int c, char **v) {
    pthread_t t;
    (void)c;
    if (!strcmp(v[1], "churn")) {
        pthread_create(&t, 0, run, (void *)1);
        pthread_create(&t, 0, churn, 0);
        pause();
    }
    int leave = !strcmp(v[1], "leave");
    for (int i = 1 + leave; i < c; i++) pthread_create(&t, 0, run, (void *)atol(v[i]));
    if (leave) pthread_exit(0);
    pause();
}
"#;

#[test]
fn a_process_whose_first_thread_has_ended_can_be_observed() {
    if !is_root("a_process_whose_first_thread_has_ended_can_be_observed") {
        return;
    }
    let mut fixture = Fixture::start(SOURCE, &["-O2"], &["leave", "1", "2"]);
    let truth = fixture.threads(2);
    std::thread::sleep(Duration::from_millis(50));
    assert!(info::threads(fixture.pid()).expect("alive").contains(&fixture.pid()), "it stays in the list");
    let begin = Instant::now();
    let other = truth.keys().next().copied().expect("two");
    let seen = Survey::through(fixture.pid(), other).look(HashMap::new());
    assert!(begin.elapsed() < Duration::from_secs(2));
    assert_eq!(seen.len(), 2, "the ended one is nowhere");
    for observation in seen.values() {
        assert_eq!(observation.place, expected(truth.get(&observation.tid)));
    }
}

#[test]
fn deep_stacks_are_walked_to_their_end_or_count_as_inside() {
    if !is_root("deep_stacks_are_walked_to_their_end_or_count_as_inside") {
        return;
    }
    let mut fixture =
        Fixture::start(SOURCE, &["-O1", "-fno-optimize-sibling-calls"], &["3001", "3000", "30000", "30001"]);
    let truth = fixture.threads(4);
    std::thread::sleep(Duration::from_millis(50));
    let mut survey = Survey::of(fixture.pid());
    let seen = survey.look(HashMap::new());
    let mut places: Vec<_> =
        seen.values().filter_map(|o| Some((o.place.clone(), truth.get(&o.tid)?.as_str(), o.frames.len()))).collect();
    places.sort_by_key(|place| place.2);
    assert!(matches!(&places[0], (Place::Outside, "out", 3000..3010)), "{places:?}");
    assert!(matches!(&places[1], (Place::Inside(0), "in", 3000..3010)), "{places:?}");
    assert!(places[2..].iter().all(|place| matches!(place.0, Place::Unknown(_))), "{places:?}");
    let inside = seen.values().find(|o| o.place == Place::Inside(0)).expect("one");
    let frame = inside.frame_inside(&survey.regions).expect("it is inside");
    assert!((3001..3005).contains(&frame), "below 3001 others: {frame}");
}

#[test]
fn threads_that_come_and_go_do_not_disturb() {
    if !is_root("threads_that_come_and_go_do_not_disturb") {
        return;
    }
    let mut fixture = Fixture::start(SOURCE, &["-O2"], &["churn"]);
    let truth = fixture.threads(2);
    let mut survey = Survey::of(fixture.pid());
    let begin = Instant::now();
    let mut known = HashMap::new();
    for _ in 0..50 {
        known = survey.look(known);
        for (tid, word) in truth.iter().filter(|(_, word)| *word == "in") {
            assert_eq!(known[tid].place, expected(Some(word)), "the one who stays is found each time");
        }
        // A thread at its very beginning or end may be somewhere without tables; nobody but the one is inside.
        let inside = known.values().filter(|o| matches!(o.place, Place::Inside(_))).count();
        assert_eq!(inside, 1);
    }
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
}

/// A source that stops the threads: slow, but it knows what an eBPF iterator knows.
#[derive(Default)]
struct ByStopping {
    copied: usize,
    taken: usize,
    told: HashMap<i32, u64>,
}

fn runs(tid: i32) -> io::Result<bool> {
    let stat = fs::read_to_string(format!("/proc/{tid}/stat"))?;
    Ok(stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('R')))
}

impl SnapshotSource for ByStopping {
    fn snapshot(&mut self, pid: i32, stack_bytes: usize) -> io::Result<Snapshot> {
        self.taken += 1;
        let memory = Memory::open(pid)?;
        let mut now = Snapshot::default();
        for tid in info::threads(pid)? {
            // Just let go of by the look before, it may not sleep again yet.
            let deadline = Instant::now() + Duration::from_secs(2);
            while runs(tid)? && Instant::now() < deadline {
                std::thread::sleep(Duration::from_micros(100));
            }
            let settled = !runs(tid)?;
            // The stop itself makes the thread run: the stack pointer stands for what an epoch would say of these sleepers.
            let Ok(thread) = Stopped::stop(tid) else { continue };
            let registers = thread.registers().map_err(io::Error::other)?;
            let length = stack_bytes.min(self.copied);
            let stack = memory.bytes(crate::address::TargetAddr(registers.rsp), length).unwrap_or_default();
            let epoch = registers.rsp;
            now.visited += 1;
            if settled && self.told.insert(tid, epoch) == Some(epoch) {
                now.same.push((tid, epoch));
                continue;
            }
            let registers = WalkRegisters::of(&registers);
            now.tasks.push(TaskSnapshot { tid, registers, settled, runnable: false, epoch, stack });
        }
        Ok(now)
    }
}

#[test]
fn snapshots_tell_where_code_with_frame_pointers_sleeps() {
    if !is_root("snapshots_tell_where_code_with_frame_pointers_sleeps") {
        return;
    }
    let mut fixture = Fixture::start(SOURCE, &["-O2", "-fno-omit-frame-pointer"], &["5", "6", "7", "600"]);
    let truth = fixture.threads(4);
    std::thread::sleep(Duration::from_millis(50));
    let mut survey = Survey::of(fixture.pid());
    // Stacks that were copied in full, in part and not at all.
    for copied in [4096, 64, 0] {
        let mut source = ByStopping { copied, ..ByStopping::default() };
        let mut known = HashMap::new();
        // What is read after the snapshot, of deep stacks, counts only when another one finds that nobody has run since.
        for taken in [2, 3] {
            known = survey.look_with(&mut source, known);
            assert_eq!(known.len(), truth.len() + 1);
            for observation in known.values() {
                assert_eq!(observation.how, How::Snapshot, "nobody else had to look");
                assert_eq!(observation.place, expected(truth.get(&observation.tid)));
            }
            assert_eq!(source.taken, taken, "what is known costs one look");
        }
    }
}

/// A source that always fails, and one that lies about everything.
struct Refuses;
struct Lies;

impl SnapshotSource for Refuses {
    fn snapshot(&mut self, _pid: i32, _stack_bytes: usize) -> io::Result<Snapshot> {
        Err(io::ErrorKind::PermissionDenied.into())
    }
}

impl SnapshotSource for Lies {
    fn snapshot(&mut self, pid: i32, _stack_bytes: usize) -> io::Result<Snapshot> {
        let (registers, stack) = (WalkRegisters::bare(u64::MAX, u64::MAX - 7), vec![0xff; 3]);
        let lie = |tid| TaskSnapshot { tid, registers, settled: true, runnable: false, epoch: 1, stack: stack.clone() };
        let tasks: Vec<_> = info::threads(pid)?.into_iter().chain([1, -1, i32::MAX]).map(lie).collect();
        Ok(Snapshot { visited: tasks.len(), same: vec![(7, 7)], tasks })
    }
}

#[test]
fn a_source_that_fails_or_makes_no_sense_is_done_without() {
    if !is_root("a_source_that_fails_or_makes_no_sense_is_done_without") {
        return;
    }
    let mut fixture = Fixture::start(SOURCE, &["-O2"], &["1", "2"]);
    let truth = fixture.threads(2);
    std::thread::sleep(Duration::from_millis(50));
    let mut survey = Survey::of(fixture.pid());
    for source in [&mut Refuses as &mut dyn SnapshotSource, &mut Lies] {
        let seen = survey.look_with(source, HashMap::new());
        assert_eq!(seen.len(), 3);
        for observation in seen.values() {
            assert_eq!((&observation.place, observation.how), (&expected(truth.get(&observation.tid)), How::Asleep));
        }
    }
}
