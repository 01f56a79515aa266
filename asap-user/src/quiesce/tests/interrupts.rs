//! A stop leaves no trace in the system calls it interrupts (P5): no EINTR that the target would not have had.
//!
//! Timeouts: calls that the kernel itself can go on with (nanosleep, poll, futex) end when they would have. Calls that it
//! can't go on with (epoll_wait, sigtimedwait, semtimedop, receiving with SO_RCVTIMEO) begin anew: each stop lengthens their
//! timeout by what had passed of it.

use super::{Fixture, is_root};
use crate::process::ptrace::Stopped;
use std::{
    io::Write,
    time::{Duration, Instant},
};

const SOURCE: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#define SECONDS 2
static int event, semaphores, pipes[2], sockets[2];
static sem_t posix;
static int timed(void (*f)(int *), const char *name) {
    struct timespec a, b; int error = 0;
    clock_gettime(CLOCK_MONOTONIC, &a);
    f(&error);
    clock_gettime(CLOCK_MONOTONIC, &b);
    long ms = (b.tv_sec - a.tv_sec) * 1000 + (b.tv_nsec - a.tv_nsec) / 1000000;
    printf("%s %s %ld\n", name, error ? strerrorname_np(error) : "ok", ms); fflush(stdout);
    return 0;
}
#define CALL(e) do { errno = 0; if ((e) == -1) *error = errno; } while (0)
static void by_epoll(int *error) {
    struct epoll_event ev = { .events = EPOLLIN }, out; int e = epoll_create1(0);
    epoll_ctl(e, EPOLL_CTL_ADD, event, &ev); CALL(epoll_wait(e, &out, 1, 100000));
}
static void by_sigtimedwait(int *error) {
    sigset_t s; struct timespec t = { 100, 0 };
    sigemptyset(&s); sigaddset(&s, SIGUSR2); CALL(sigtimedwait(&s, 0, &t));
}
static void by_semop(int *error) {
    struct sembuf b = { 0, -1, 0 }; struct timespec t = { 100, 0 }; CALL(semtimedop(semaphores, &b, 1, &t));
}
static void by_recv(int *error) {
    char c; struct timeval t = { 100, 0 };
    setsockopt(sockets[0], SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t); CALL(recv(sockets[0], &c, 1, 0));
}
static void by_read(int *error) { char c; CALL(read(pipes[0], &c, 1)); }
static void by_nanosleep(int *error) { struct timespec t = { SECONDS, 0 }; CALL(nanosleep(&t, 0)); }
static void by_poll(int *error) { struct pollfd p = { .fd = pipes[1], .events = 0 }; CALL(poll(&p, 1, SECONDS * 1000)); }
static void by_futex(int *error) {
    struct timespec t; clock_gettime(CLOCK_REALTIME, &t); t.tv_sec += SECONDS; CALL(sem_timedwait(&posix, &t));
    if (*error == ETIMEDOUT) *error = 0;
}
static struct { const char *name; void (*f)(int *); } calls[] = {
    { "epoll_wait", by_epoll }, { "sigtimedwait", by_sigtimedwait }, { "semtimedop", by_semop }, { "recv", by_recv },
    { "read", by_read }, { "nanosleep", by_nanosleep }, { "poll", by_poll }, { "futex", by_futex },
};
#define CALLS (sizeof calls / sizeof *calls)
static pthread_t threads[CALLS];
static void *run(void *p) {
    long n = (long)p;
    printf("%ld %s\n", syscall(SYS_gettid), calls[n].name); fflush(stdout);
    timed(calls[n].f, calls[n].name);
    return 0;
}
int main(void) {
    sigset_t s; sigemptyset(&s); sigaddset(&s, SIGUSR2); sigprocmask(SIG_BLOCK, &s, 0);
    event = eventfd(0, 0); semaphores = semget(IPC_PRIVATE, 1, 0600); sem_init(&posix, 0, 0);
    if (pipe(pipes) || socketpair(AF_UNIX, SOCK_STREAM, 0, sockets)) return 1;
    for (long n = 0; n < (long)CALLS; n++) pthread_create(&threads[n], 0, run, (void *)n);
    char c = 1; if (read(0, &c, 1) != 1) c = 1;
    eventfd_write(event, 1); pthread_kill(threads[1], SIGUSR2);
    struct sembuf b = { 0, 1, 0 }; semop(semaphores, &b, 1);
    if (write(sockets[1], &c, 1) != 1 || write(pipes[1], &c, 1) != 1) return 1;
    for (unsigned n = 0; n < CALLS; n++) pthread_join(threads[n], 0);
    semctl(semaphores, 0, IPC_RMID);
    return 0;
}
"#;

/// Stops of each thread.
const STOPS: usize = 1000;

fn stop_again_and_again(signal: Option<i32>, test: &str) {
    if !is_root(test) {
        return;
    }
    let mut fixture = Fixture::start(SOURCE, &["-O2"], &[]);
    let threads = fixture.threads(8);
    std::thread::sleep(Duration::from_millis(50));
    let begin = Instant::now();
    let mut stops = 0;
    for _ in 0..STOPS {
        for &tid in threads.keys() {
            if let Ok(thread) = Stopped::stop(tid) {
                if let Some(signal) = signal {
                    // SAFETY: a plain system call; the thread is one of our own child.
                    unsafe { libc::syscall(libc::SYS_tgkill, fixture.pid(), tid, signal) };
                }
                stops += usize::from(thread.release().is_ok());
            }
        }
    }
    assert!(stops >= STOPS * 5, "five of them can't end before: {stops}");
    eprintln!("{stops} stops in {:?}", begin.elapsed());
    fixture.child.stdin.take().expect("a pipe").write_all(b"x").expect("it listens");
    for _ in 0..threads.len() {
        let line = fixture.line();
        let words: Vec<_> = line.split(' ').collect();
        let [name, error, time] = words[..] else { panic!("three words: {line:?}") };
        assert_eq!(error, "ok", "{name}");
        let time: u64 = time.parse().expect("a number");
        if ["nanosleep", "poll", "futex"].contains(&name) {
            assert!((1900..3500).contains(&time), "{name} of 2 s took {time} ms");
        }
    }
    assert!(fixture.child.wait().expect("it ends").success());
}

#[test]
fn a_thousand_stops_interrupt_no_system_call() {
    stop_again_and_again(None, "a_thousand_stops_interrupt_no_system_call");
}

#[test]
fn a_signal_that_the_target_ignores_interrupts_no_system_call_either() {
    // The kernel drops ignored signals at once, but not for a thread that is traced.
    stop_again_and_again(Some(libc::SIGURG), "a_signal_that_the_target_ignores_interrupts_no_system_call_either");
}
