//! Threads that sleep, run, recurse and handle signals, inside a function and outside.

use super::{Fixture, Survey, expected, is_root};
use crate::{process::info, quiesce::observe::How};
use std::{collections::HashMap, time::Duration};

const SOURCE: &str = r#"
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static int fds[2];
static volatile int sink;
__attribute__((noinline)) int inside(int kind, int depth) {
    char buffer[64];
    if (depth) { int r = inside(kind, depth - 1); sink += r; return r + 1; }
    if (kind == 0) sink += read(fds[0], buffer, sizeof buffer);
    if (kind == 1) { struct timespec t = { 1000, 0 }; nanosleep(&t, 0); }
    if (kind == 2) for (;;) sink++;
    if (kind == 3) raise(SIGUSR1);
    return sink;
}
__attribute__((noinline)) int outside(int kind) {
    struct epoll_event event;
    if (kind == 0) { int e = epoll_create1(0); sink += epoll_wait(e, &event, 1, 1000000); }
    if (kind == 1) pause();
    if (kind == 2) for (;;) sink++;
    return sink;
}
static void on_signal(int s) { (void)s; pause(); }
static void *run(void *p) {
    long n = (long)p;
    stack_t st = { .ss_sp = malloc(65536), .ss_size = 65536 };
    sigaltstack(&st, 0);
    printf("%ld %s\n", syscall(SYS_gettid), n < 10 ? "in" : "out"); fflush(stdout);
    if (n < 10) sink += inside(n, n * 3); else sink += outside(n - 10);
    sink++;
    return 0;
}
int main(void) {
    pthread_t t;
    struct sigaction sa = { .sa_handler = on_signal, .sa_flags = SA_ONSTACK };
    sigaction(SIGUSR1, &sa, 0);
    if (pipe(fds)) return 1;
    for (long n = 0; n < 4; n++) pthread_create(&t, 0, run, (void *)n);
    for (long n = 10; n < 13; n++) pthread_create(&t, 0, run, (void *)n);
    pause();
    return 0;
}
"#;

fn observe(flags: &[&str], sleepers: usize) {
    let mut fixture = Fixture::start(SOURCE, flags, &[]);
    let truth = fixture.threads(7);
    std::thread::sleep(Duration::from_millis(100));
    let mut survey = Survey::of(fixture.pid());
    let mut known = HashMap::new();
    let mut asleep = 0;
    for _ in 0..3 {
        known = survey.look(known);
        assert_eq!(known.len(), truth.len() + 1, "all threads and the main one");
        asleep = known.values().filter(|o| o.how == How::Asleep).count();
        for observation in known.values() {
            let place = expected(truth.get(&observation.tid));
            assert_eq!(observation.place, place, "thread {}: {:?}", observation.tid, observation.frames);
        }
    }
    assert!(asleep >= sleepers, "sleeping threads are left alone: {asleep} of {sleepers}");
    assert_eq!(info::threads(fixture.pid()).expect("alive").len(), truth.len() + 1);
}

#[test]
fn threads_are_found_where_they_are() {
    if !is_root("threads_are_found_where_they_are") {
        return;
    }
    // Code with frame pointers needs rbp to be unwound, which only a stopped thread tells.
    for (flags, sleepers) in
        [(&["-O2"][..], 6), (&["-O0", "-fno-pie", "-no-pie"], 1), (&["-O3", "-fno-omit-frame-pointer"], 1)]
    {
        observe(flags, sleepers);
    }
}
