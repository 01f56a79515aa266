//! What observation costs: a bound that holds on slow machines too, and figures for people.

use super::{Fixture, Survey, is_root};
use crate::{
    process::info,
    quiesce::observe::{How, Place},
};
use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

const SOURCE: &str = r#"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
static volatile int sink;
__attribute__((noinline)) int inside(int x) { sink += x; return sink; }
__attribute__((noinline)) int wait_here(int depth) {
    if (depth) { int r = wait_here(depth - 1); sink += r; return r + 1; }
    pause();
    return sink;
}
static void *run(void *p) { sink += wait_here(10); sink++; return p; }
int main(int c, char **v) {
    pthread_t t; pthread_attr_t a;
    pthread_attr_init(&a); pthread_attr_setstacksize(&a, 65536);
    for (int n = c > 1 ? atoi(v[1]) : 0; n > 0; n--) if (pthread_create(&t, &a, run, 0)) return 1;
    sink += inside(1);
    printf("ready\n"); fflush(stdout);
    pause();
    return 0;
}
"#;

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn measure(threads: u32, flags: &[&str], how: &str) -> [Duration; 2] {
    let mut fixture = Fixture::start(SOURCE, flags, &[&threads.to_string()]);
    assert_eq!(fixture.line(), "ready");
    std::thread::sleep(Duration::from_millis(200));
    let mut survey = Survey::of(fixture.pid());
    let (mut first, mut again) = (Vec::new(), Vec::new());
    for _ in 0..7 {
        let begin = Instant::now();
        let seen = survey.look(HashMap::new());
        first.push(begin.elapsed());
        assert!(seen.values().all(|o| o.place == Place::Outside), "nobody is inside");
        assert_eq!(seen.len(), threads as usize + 1);
        let asleep = seen.values().filter(|o| o.how == How::Asleep).count();
        assert_eq!(asleep > 0, how == "asleep", "{asleep} asleep");
        let begin = Instant::now();
        let seen = survey.look(seen);
        again.push(begin.elapsed());
        assert_eq!(seen.len(), threads as usize + 1);
    }
    let begin = Instant::now();
    let listed = info::threads(fixture.pid()).expect("alive").len();
    eprintln!("{listed} threads are listed in {:?}", begin.elapsed());
    let each = |times| median(times) / (threads + 1);
    let [first, again] = [each(first), each(again)];
    eprintln!("{threads} threads, {how}: {first:?} a thread, {again:?} when looked at again");
    [first, again]
}

#[test]
fn sleeping_threads_cost_microseconds_however_many_they_are() {
    if !is_root("sleeping_threads_cost_microseconds_however_many_they_are") {
        return;
    }
    let [few, _] = measure(250, &["-O2"], "asleep");
    let [many, again] = measure(1000, &["-O2"], "asleep");
    // What grows with the square would cost each of them four times as much.
    assert!(many < few * 3 + Duration::from_micros(30), "a thread costs {few:?} among 250, {many:?} among 1000");
    assert!(again < many, "who has not run is not walked again: {again:?} of {many:?}");
}

#[test]
#[ignore = "figures for people"]
fn figures() {
    for threads in [256, 2000] {
        measure(threads, &["-O2"], "asleep");
        measure(threads, &["-O2", "-fno-omit-frame-pointer"], "stopped");
    }
}
