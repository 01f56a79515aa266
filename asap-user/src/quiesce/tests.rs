//! Observation of a real process that knows where each of its threads is.

use super::{
    asleep::OpenThreads,
    observe::{How, Observer, Place, Region},
    unwind::Unwinder,
};
use crate::{
    image::{FunctionQuery, Image, ImageBytes},
    process::{info, maps::Maps, memory::Memory},
};
use std::{
    collections::HashMap,
    fs,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::Arc,
};

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

struct Fixture(Child, std::path::PathBuf);

impl Drop for Fixture {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = fs::remove_dir_all(&self.1);
    }
}

/// Compiles and starts the fixture; gives its threads and whether each is inside.
fn start(flags: &[&str]) -> (Fixture, HashMap<i32, bool>) {
    let tag = flags.concat().replace(|c: char| !c.is_alphanumeric(), "");
    let directory = std::env::temp_dir().join(format!("asap-observe-{}-{tag}", std::process::id()));
    fs::create_dir_all(&directory).expect("a temporary directory");
    fs::write(directory.join("f.c"), SOURCE).expect("written");
    let status = Command::new("gcc").current_dir(&directory).args(flags).args(["-o", "f", "f.c", "-lpthread"]).status();
    assert!(status.expect("gcc runs").success());
    let mut child = Command::new(directory.join("f")).stdout(Stdio::piped()).spawn().expect("the fixture starts");
    let output = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut truth = HashMap::new();
    for line in output.lines().take(7) {
        let line = line.expect("text");
        let (tid, place) = line.split_once(' ').expect("two words");
        truth.insert(tid.parse().expect("a number"), place == "in");
    }
    std::thread::sleep(std::time::Duration::from_millis(100));
    (Fixture(child, directory), truth)
}

fn observe(fixture: &Fixture, truth: &HashMap<i32, bool>, sleepers: usize) {
    let pid = fixture.0.id() as i32;
    let maps = Maps::of(pid).expect("alive");
    let memory = Memory::open(pid).expect("alive");
    let mut unwinder = Unwinder::new();
    let mut region = None;
    for mapping in maps.0.iter().filter(|m| m.executable && (m.is_file() || m.name == "[vdso]")) {
        let bytes = if mapping.is_file() {
            fs::read(mapping.path()).expect("a file")
        } else {
            memory.bytes(mapping.range.start, mapping.len() as usize).expect("mapped")
        };
        let image = Arc::new(Image::parse(&mapping.name, ImageBytes::from(bytes)).expect("an image"));
        let bias = image.load_bias(mapping.range.start, mapping.file_offset).expect("mapped");
        unwinder.add_image(&image, mapping.range.clone(), bias);
        if let Ok(function) = image.find_function(&FunctionQuery::parse("inside")) {
            let ranges = image.body(&function).ranges;
            let ranges = ranges.iter().map(|r| r.start.in_target(bias)..r.end.in_target(bias)).collect();
            region = Some(Region { ranges, label: "inside".into() });
        }
    }
    let regions = [region.expect("the fixture's function")];
    let mut known = HashMap::new();
    let mut open = OpenThreads::default();
    let mut asleep = 0;
    for _ in 0..3 {
        let mut observer = Observer::new(pid, &memory, &mut unwinder, &regions, &mut open);
        known = observer.observe(known).expect("alive");
        assert_eq!(known.len(), truth.len() + 1, "all threads and the main one");
        asleep = known.values().filter(|o| o.how == How::Asleep).count();
        for observation in known.values() {
            let inside = truth.get(&observation.tid).copied().unwrap_or(false);
            let expected = if inside { Place::Inside(0) } else { Place::Outside };
            assert_eq!(observation.place, expected, "thread {}: {:?}", observation.tid, observation.frames);
        }
    }
    assert!(asleep >= sleepers, "sleeping threads are left alone: {asleep} of {sleepers}");
    assert_eq!(info::threads(pid).expect("alive").len(), truth.len() + 1);
}

#[test]
fn threads_are_found_where_they_are() {
    // SAFETY: no memory is involved.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("SKIPPED (needs root): threads_are_found_where_they_are");
        return;
    }
    // Code with frame pointers needs rbp to be unwound, which only a stopped thread tells.
    for (flags, sleepers) in
        [(&["-O2"][..], 6), (&["-O0", "-fno-pie", "-no-pie"], 1), (&["-O3", "-fno-omit-frame-pointer"], 1)]
    {
        let (fixture, truth) = start(flags);
        observe(&fixture, &truth, sleepers);
    }
}
