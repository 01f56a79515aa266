//! Observation of real processes that know where each of their threads is.

mod edges;
mod interrupts;
mod places;
mod speed;

use super::{
    OpenThreads,
    observe::{Observation, Observer, Place, Region},
    snapshot::SnapshotSource,
    unwind::Unwinder,
};
use crate::{
    image::{FunctionQuery, Image, ImageBytes},
    process::{maps::Maps, memory::Memory},
};
use std::{
    collections::HashMap,
    fs,
    io::{BufRead, BufReader},
    process::{Child, ChildStdout, Command, Stdio},
    sync::Arc,
};

/// Says so when a test needs root and does not have it.
fn is_root(test: &str) -> bool {
    // SAFETY: no memory is involved.
    let root = unsafe { libc::geteuid() } == 0;
    if !root {
        eprintln!("SKIPPED (needs root): {test}");
    }
    root
}

/// A program of ours that runs; it ends with this value.
struct Fixture {
    child: Child,
    output: BufReader<ChildStdout>,
    _directory: tempfile::TempDir,
}

impl Fixture {
    fn start(source: &str, flags: &[&str], arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        fs::write(directory.path().join("f.c"), source).expect("written");
        let mut compiler = Command::new("gcc");
        compiler.current_dir(&directory).args(flags).args(["-o", "f", "f.c", "-lpthread"]);
        assert!(compiler.status().expect("gcc runs").success());
        let mut child = Command::new(directory.path().join("f"))
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the fixture starts");
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        Self { child, output, _directory: directory }
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("pids fit i32")
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("text");
        line.trim_end().to_owned()
    }

    /// Lines of "TID WORDS".
    fn threads(&mut self, count: usize) -> HashMap<i32, String> {
        let mut threads = HashMap::new();
        for _ in 0..count {
            let line = self.line();
            let (tid, words) = line.split_once(' ').expect("two words");
            threads.insert(tid.parse().expect("a number"), words.to_owned());
        }
        threads
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is needed to observe a fixture: nobody may be inside its function `inside`.
struct Survey {
    pid: i32,
    memory: Memory,
    unwinder: Unwinder,
    regions: [Region; 1],
    open: OpenThreads,
}

impl Survey {
    fn of(pid: i32) -> Self {
        Self::through(pid, pid)
    }

    /// By way of thread `tid`: when the first thread of a process has ended, the others still have its memory.
    fn through(pid: i32, tid: i32) -> Self {
        let maps = Maps::of(tid).expect("alive");
        let memory = Memory::open(tid).expect("alive");
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
        Self { pid, memory, unwinder, regions, open: OpenThreads::default() }
    }

    fn observer(&mut self) -> Observer<'_> {
        Observer::new(self.pid, &self.memory, &mut self.unwinder, &self.regions, &mut self.open)
    }

    fn look(&mut self, known: HashMap<i32, Observation>) -> HashMap<i32, Observation> {
        self.observer().observe(known).expect("alive")
    }

    fn look_with(
        &mut self,
        source: &mut dyn SnapshotSource,
        known: HashMap<i32, Observation>,
    ) -> HashMap<i32, Observation> {
        self.observer().with_snapshots(source).observe(known).expect("alive")
    }
}

/// Where a thread is that says "in" or "out".
fn expected(word: Option<&String>) -> Place {
    if word.is_some_and(|word| word == "in") { Place::Inside(0) } else { Place::Outside }
}
