//! What the task iterator says of threads whose place is known.

use super::{fixture::Fixture, loaded};
use crate::kernel::{Ebpf, TaskSnapshot};
use std::{
    collections::HashSet,
    thread::sleep,
    time::{Duration, Instant},
};

fn thread(snapshot: &[TaskSnapshot], tid: i32) -> &TaskSnapshot {
    snapshot.iter().find(|thread| thread.tid == tid).expect("the thread is in the snapshot")
}

/// Waits for a snapshot in which the thread sleeps.
fn asleep(ebpf: &Ebpf, pid: i32, tid: i32, stack: usize) -> TaskSnapshot {
    let begin = Instant::now();
    loop {
        let now = ebpf.snapshot(pid, stack, None).expect("a snapshot");
        let now = thread(&now.tasks, tid);
        if now.state != 0 && now.settled {
            return now.clone();
        }
        assert!(begin.elapsed() < Duration::from_secs(10), "thread {tid} does not come to rest: {now:?}");
        sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_blocked_thread_shows_its_registers_and_stack() {
    let Some(ebpf) = loaded("a_blocked_thread_shows_its_registers_and_stack") else { return };
    let mut fixture = Fixture::start();
    let tid: i32 = fixture.order("block 0x77778888").parse().expect("a thread id");
    let seen = asleep(&ebpf, fixture.pid(), tid, 2048);
    assert_eq!(seen.regs.bx, 0x5eed_b0b0, "rbx survives the system call");
    assert_eq!(seen.regs.orig_ax, libc::SYS_read as u64, "it is in read(2)");
    assert_eq!(seen.stack.len(), 2048);
    let words: Vec<u64> =
        seen.stack.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes"))).collect();
    assert!(words.windows(3).any(|w| w == [0x5eed_0001, 0x7777_8888, 0x5eed_0002]), "its local variables are there");
    let (start, size) = fixture.function("blocked");
    let inside = fixture.base() + start..fixture.base() + start + size;
    assert!(words.iter().any(|word| inside.contains(word)), "the return address into its function is there");
    // The kernel's own word for it.
    let line = std::fs::read_to_string(format!("/proc/{}/task/{tid}/syscall", fixture.pid())).expect("readable");
    let told: Vec<_> = line.split_whitespace().rev().take(2).map(str::to_owned).collect();
    assert_eq!(told, [format!("{:#x}", seen.regs.ip), format!("{:#x}", seen.regs.sp)]);
}

#[test]
fn a_thread_is_told_of_again_when_it_has_run_and_not_before() {
    let Some(ebpf) = loaded("a_thread_is_told_of_again_when_it_has_run_and_not_before") else { return };
    let mut fixture = Fixture::start();
    let pid = fixture.pid();
    let sleeper: i32 = fixture.order("block 1").parse().expect("a thread id");
    // The main thread waits for orders: it runs for each, and rests at the same place again.
    let before = [asleep(&ebpf, pid, pid, 64), asleep(&ebpf, pid, sleeper, 64)];
    let (series, other) = (ebpf.series(), ebpf.series());
    let told = |series| {
        let now = ebpf.snapshot(pid, 64, Some(series)).expect("a snapshot");
        let mut told: Vec<i32> = now.tasks.iter().map(|task| task.tid).collect();
        let mut same: Vec<i32> = now.same.iter().map(|&(tid, _)| tid).collect();
        told.sort_unstable();
        same.sort_unstable();
        (told, same, now)
    };
    let mut both = vec![pid, sleeper];
    both.sort_unstable();
    assert_eq!((told(series).0, told(series).1), (both.clone(), both.clone()), "told once, and then only named");
    assert_eq!(told(other).0, both, "another series does not know them");
    for _ in 0..100 {
        fixture.order("call 1");
    }
    let after = asleep(&ebpf, pid, pid, 64);
    assert_eq!(before[0].regs.ip, after.regs.ip);
    assert_ne!(before[0].epoch, after.epoch);
    let (tids, same, now) = told(other);
    assert_eq!((tids, same), (vec![pid], vec![sleeper]), "one ran, one slept on");
    assert_eq!((now.same[0].1, now.visited), (before[1].epoch, 2));
}

#[test]
fn a_running_thread_is_never_believed() {
    let Some(ebpf) = loaded("a_running_thread_is_never_believed") else { return };
    let mut fixture = Fixture::start();
    let pid = fixture.pid();
    // One more than can run beside this test: some always run, and some always wait.
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let spinning: Vec<i32> = (0..=cpus).map(|_| fixture.order("spin").parse().expect("a thread id")).collect();
    sleep(Duration::from_millis(50));
    let (mut on, mut believed) = (0, 0);
    let begin = std::time::Instant::now();
    // Where other programs keep the processors busy, it takes long until both are seen.
    for round in 0.. {
        let both = believed > 0 && (on > 0 || cpus == 1);
        if (round >= 200 && both) || begin.elapsed() > Duration::from_secs(30) {
            break;
        }
        let now = ebpf.snapshot(pid, 256, None).expect("a snapshot");
        for &tid in &spinning {
            let now = thread(&now.tasks, tid);
            assert!(now.on_cpu == now.stack.is_empty(), "a stack is told of those off the CPU only");
            if now.on_cpu {
                on += 1;
                assert!(!now.settled);
            } else if now.settled {
                believed += 1;
                let (start, size) = fixture.function("spin");
                let inside = fixture.base() + start..fixture.base() + start + size;
                assert!(inside.contains(&now.regs.ip), "preempted where it spins: {:#x}", now.regs.ip);
            }
        }
        sleep(Duration::from_millis(1));
    }
    assert!(believed > 0, "preempted threads can be believed");
    assert!(on > 0 || cpus == 1, "spinning threads are seen on a CPU");
    assert_eq!(fixture.order("rest"), "rested");
}

#[test]
fn every_thread_is_told_once_and_none_of_others() {
    let Some(ebpf) = loaded("every_thread_is_told_once_and_none_of_others") else { return };
    let mut fixture = Fixture::start();
    let mut expected = HashSet::from([fixture.pid()]);
    for _ in 0..70 {
        expected.insert(fixture.order("block 1").parse::<i32>().expect("a thread id"));
    }
    sleep(Duration::from_millis(100));
    // More than fits into the kernel's buffer at once.
    let seen = ebpf.snapshot(fixture.pid(), 16 * 1024, None).expect("a snapshot");
    let tids: HashSet<i32> = seen.tasks.iter().map(|thread| thread.tid).collect();
    assert_eq!(tids, expected);
    assert_eq!((seen.tasks.len(), seen.visited), (expected.len(), expected.len()), "no thread twice");
}

#[test]
fn a_process_that_is_gone_has_no_threads() {
    let Some(ebpf) = loaded("a_process_that_is_gone_has_no_threads") else { return };
    let fixture = Fixture::start();
    let pid = fixture.pid();
    fixture.end();
    assert_eq!(ebpf.snapshot(pid, 64, None).expect("no error").tasks, []);
    assert!(ebpf.snapshot(-1, 64, None).is_err());
}

#[test]
fn threads_of_an_inner_pid_namespace_have_the_agents_ids() {
    let Some(ebpf) = loaded("threads_of_an_inner_pid_namespace_have_the_agents_ids") else { return };
    let fixture = Fixture::start_under("unshare", &["--fork", "--pid", "--kill-child"]);
    // unshare's child: pid 1 inside, another one here.
    let children = format!("/proc/{0}/task/{0}/children", fixture.pid());
    let inner: i32 = std::fs::read_to_string(children).expect("readable").trim().parse().expect("one child");
    let seen = ebpf.snapshot(inner, 0, None).expect("a snapshot").tasks;
    assert_eq!(seen.iter().map(|thread| thread.tid).collect::<Vec<_>>(), [inner]);
}
