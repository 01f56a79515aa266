//! What a process looks like from outside, for "as it was before" (P5), and a watch on its memory map (P4).

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
};

/// Everything that asap must leave as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    maps: Vec<String>,
    text: BTreeMap<String, Vec<u8>>,
    descriptors: BTreeMap<String, String>,
    threads: Vec<String>,
    status: Vec<String>,
    children: Vec<String>,
}

/// Lines of /proc/PID/status that must not change.
const STATUS: [&str; 13] = [
    "Name",
    "Umask",
    "Uid",
    "Gid",
    "FDSize",
    "NoNewPrivs",
    "Seccomp",
    "Threads",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "TracerPid",
    "CapEff",
];

impl Snapshot {
    /// Of this process, now.
    pub fn of(pid: i32) -> Self {
        let maps = maps(pid);
        let mut text = BTreeMap::new();
        for line in maps.iter().filter(|line| is_executable(line) && line.contains('/')) {
            let (start, end) = range_of(line);
            text.insert(line.clone(), memory_at(pid, start, (end - start) as usize));
        }
        let mut descriptors = BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let leads_to = fs::read_link(entry.path()).unwrap_or_default().to_string_lossy().into_owned();
            descriptors.insert(name, leads_to);
        }
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
        let lines = status.lines().filter(|line| STATUS.contains(&line.split(':').next().unwrap_or_default()));
        let tasks = names_in(&format!("/proc/{pid}/task"));
        let mut children: Vec<String> = Vec::new();
        for task in &tasks {
            let text = fs::read_to_string(format!("/proc/{pid}/task/{task}/children")).unwrap_or_default();
            children.extend(text.split_whitespace().map(str::to_owned));
        }
        let status = lines.map(str::to_owned).collect();
        Self { maps, text, descriptors, threads: tasks, status, children }
    }

    /// Fails the test and says what differs, if anything does.
    pub fn assert_same(&self, before: &Self, when: &str) {
        for (name, now, then) in [
            ("memory map", &self.maps, &before.maps),
            ("threads", &self.threads, &before.threads),
            ("status", &self.status, &before.status),
            ("children", &self.children, &before.children),
        ] {
            let new: Vec<_> = now.iter().filter(|line| !then.contains(line)).collect();
            let lost: Vec<_> = then.iter().filter(|line| !now.contains(line)).collect();
            assert!(now == then, "{when}: the {name} changed\n  new:  {new:#?}\n  lost: {lost:#?}");
        }
        assert_eq!(self.descriptors, before.descriptors, "{when}: descriptors");
        for (mapping, bytes) in &before.text {
            let now = self.text.get(mapping);
            let differs = now.and_then(|now| now.iter().zip(bytes).position(|(a, b)| a != b));
            assert!(now == Some(bytes), "{when}: the text of {mapping} differs, first at {differs:?}");
        }
    }

    /// The same but for text and memory map: what a patched process may show that no agent cares for.
    pub fn assert_same_but_for_text_and_maps(&self, before: &Self, when: &str) {
        let (maps, text) = (before.maps.clone(), before.text.clone());
        Self { maps, text, ..self.clone() }.assert_same(before, when);
    }

    /// Mappings of code in files that the other has not got, or not with these bytes.
    pub fn missing_text(&self, other: &Self) -> Vec<String> {
        let same = |(mapping, bytes): &(&String, &Vec<u8>)| other.text.get(*mapping) == Some(*bytes);
        self.text.iter().filter(|entry| !same(entry)).map(|(mapping, _)| mapping.clone()).collect()
    }

    /// The same but for what being attached takes: memory, and a helper that is no child to wait for.
    pub fn assert_same_but_for_helpers(&self, before: &Self, when: &str) {
        let (maps, children) = (before.maps.clone(), before.children.clone());
        Self { maps, children, ..self.clone() }.assert_same(before, when);
    }

    /// Leaves children of the target's own making out of the comparison.
    pub fn forget_children(&mut self, before: &Self) {
        self.children.clone_from(&before.children);
    }

    /// Address, access and offset of each mapping, without file names.
    pub fn ranges(&self) -> Vec<String> {
        let first = |line: &String| line.split_whitespace().take(5).collect::<Vec<_>>().join(" ");
        self.maps.iter().map(first).collect()
    }

    /// Mappings of this snapshot that the other has not got.
    pub fn missing_maps(&self, other: &Self) -> Vec<String> {
        self.maps.iter().filter(|line| !other.maps.contains(line)).cloned().collect()
    }
}

fn names_in(directory: &str) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Threads that the process itself can see.
pub fn thread_count(pid: i32) -> usize {
    names_in(&format!("/proc/{pid}/task")).len()
}

/// The lines of its memory map.
pub fn maps(pid: i32) -> Vec<String> {
    fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default().lines().map(str::to_owned).collect()
}

fn is_executable(line: &str) -> bool {
    line.split_whitespace().nth(1).is_some_and(|access| access.contains('x'))
}

fn range_of(line: &str) -> (u64, u64) {
    let parse = |text: &str| u64::from_str_radix(text, 16).expect("an address");
    let (start, end) = line.split_whitespace().next().and_then(|range| range.split_once('-')).expect("a range");
    (parse(start), parse(end))
}

/// Bytes of its memory.
pub fn memory_at(pid: i32, address: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let memory = fs::File::open(format!("/proc/{pid}/mem")).expect("it runs");
    memory.read_exact_at(&mut bytes, address).unwrap_or_else(|error| panic!("{address:#x}: {error}"));
    bytes
}

/// A watch on the memory map of a process: whether anything was ever writable and executable at once.
pub struct WatchedMaps {
    stop: Arc<AtomicBool>,
    looks: Arc<AtomicU64>,
    watch: Option<JoinHandle<Vec<String>>>,
}

impl WatchedMaps {
    /// Begins to watch.
    pub fn begin(pid: i32) -> Self {
        let (stop, looks) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&looks));
        let watch = std::thread::spawn(move || {
            let mut bad = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                bad.extend(writable_and_executable(&maps(pid)));
                counted.fetch_add(1, Ordering::Relaxed);
                std::thread::yield_now();
            }
            bad
        });
        Self { stop, looks, watch: Some(watch) }
    }

    /// Ends the watch: how often it looked, and what it should not have seen.
    pub fn end(mut self) -> (u64, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        let bad = self.watch.take().and_then(|watch| watch.join().ok()).expect("the watch ends");
        (self.looks.load(Ordering::Relaxed), bad)
    }
}

impl Drop for WatchedMaps {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// The mappings that are both.
fn writable_and_executable(maps: &[String]) -> Vec<String> {
    let both = |line: &&String| {
        let access = line.split_whitespace().nth(1).unwrap_or_default();
        access.contains('w') && access.contains('x')
    };
    maps.iter().filter(both).cloned().collect()
}
