//! What `/proc` tells of a thread that sleeps in the kernel: its stack and instruction pointer, and a number that changes
//! whenever it runs. Not for threads that run: their registers are known to nobody.

use crate::process::info::state_of;
use nix::{
    fcntl::{OFlag, openat},
    sys::stat::Mode,
};
use std::{
    borrow::Cow,
    collections::{HashMap, hash_map::Entry},
    fmt::Write,
    fs::File,
    io,
    os::unix::{fs::FileExt, fs::OpenOptionsExt},
};

/// The folder `/proc/PID/task`, held open: the files of its threads are found without walking the whole path each time.
pub(super) struct TaskFolder {
    folder: File,
    path: String,
    buffer: [u8; 2048],
}

/// As long as a thread's epoch is the same, it has not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Epoch {
    /// From `schedstat`: nanoseconds on a processor, and how many times it got one. The second grows when a thread is given a
    /// processor (kernel/sched/stats.h, sched_info_arrive), so this holds by itself.
    Ran([u64; 2]),
    /// From `status`, on kernels without schedule statistics: context switches. They grow when a thread is taken off its
    /// processor, so this holds only for a thread that is seen asleep both times.
    Switched([u64; 2]),
}

impl TaskFolder {
    pub(super) fn open(pid: i32) -> io::Result<Self> {
        let folder = File::options()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC)
            .open(format!("/proc/{pid}/task"))?;
        Ok(Self { folder, path: String::with_capacity(32), buffer: [0; 2048] })
    }

    /// `name` of thread `tid`; `None` if the thread has ended.
    pub(super) fn file(&mut self, tid: i32, name: &str) -> Option<File> {
        self.path.clear();
        write!(self.path, "{tid}/{name}").ok()?;
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        Some(File::from(openat(&self.folder, self.path.as_str(), flags, Mode::empty()).ok()?))
    }

    /// What a file of `/proc` says now; it may be read again and again.
    fn bytes(&mut self, file: &File) -> Option<&[u8]> {
        let length = file.read_at(&mut self.buffer, 0).ok()?;
        self.buffer.get(..length)
    }

    /// The same as text. Names of threads may hold any byte.
    fn text(&mut self, file: &File) -> Option<Cow<'_, str>> {
        self.bytes(file).map(String::from_utf8_lossy)
    }

    /// Whether the thread has ended and is only kept for its parent.
    pub(super) fn is_dead(&mut self, tid: i32) -> bool {
        let Some(file) = self.file(tid, "stat") else { return true };
        // One that vanished can't be read any more; of a text that makes no sense nothing is concluded.
        self.bytes(&file).is_none_or(|stat| matches!(state_of(stat), Some(b'Z' | b'X')))
    }

    /// Opens what tells whether `tid` has run.
    pub(super) fn clock(&mut self, tid: i32) -> Option<Clock> {
        if let Some(schedstat) = self.file(tid, "schedstat") {
            let clock = Clock { file: schedstat, kind: ClockKind::Ran };
            if self.epoch(&clock).is_some() {
                return Some(clock);
            }
        }
        Some(Clock { file: self.file(tid, "status")?, kind: ClockKind::Switched })
    }

    /// What `clock` says now.
    pub(super) fn epoch(&mut self, clock: &Clock) -> Option<Epoch> {
        let kind = clock.kind;
        let text = self.text(&clock.file)?;
        match kind {
            ClockKind::Ran => parse_schedstat(&text),
            ClockKind::Switched => parse_status(&text),
        }
    }

    /// Instruction and stack pointer of a thread that sleeps, from its file `syscall`.
    pub(super) fn sleeping_at(&mut self, syscall: &File) -> Option<(u64, u64)> {
        parse_syscall(&self.text(syscall)?)
    }
}

/// Files of threads that are looked at, open from one look to the next: reading them again is what happens while gates are
/// closed. Two descriptors per thread.
#[derive(Default)]
pub struct OpenThreads(HashMap<i32, OpenThread>);

/// The open files of one thread.
pub(super) struct OpenThread {
    pub(super) clock: Clock,
    pub(super) syscall: File,
}

impl OpenThreads {
    /// The files of `tid`; `None` if it has ended.
    pub(super) fn get(&mut self, tid: i32, folder: &mut TaskFolder) -> Option<&OpenThread> {
        Some(match self.0.entry(tid) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let clock = folder.clock(tid)?;
                entry.insert(OpenThread { clock, syscall: folder.file(tid, "syscall")? })
            }
        })
    }

    /// Closes the files of `tid`: they say nothing any more, and its number may be given to another thread.
    pub(super) fn close(&mut self, tid: i32) {
        self.0.remove(&tid);
    }

    /// Closes the files of threads that `keep` does not name.
    pub(super) fn retain(&mut self, keep: impl Fn(i32) -> bool) {
        self.0.retain(|&tid, _| keep(tid));
    }
}

/// An open file that tells whether a thread has run.
pub(super) struct Clock {
    file: File,
    kind: ClockKind,
}

#[derive(Clone, Copy)]
enum ClockKind {
    Ran,
    Switched,
}

fn parse_schedstat(text: &str) -> Option<Epoch> {
    let mut numbers = text.split_ascii_whitespace().map(|word| word.parse::<u64>().ok());
    let (ran, _waited, times) = (numbers.next()??, numbers.next()??, numbers.next()??);
    // Without schedule statistics the kernel writes zeros; no thread that can be seen has never had a processor.
    (times > 0).then_some(Epoch::Ran([ran, times]))
}

fn parse_status(text: &str) -> Option<Epoch> {
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
    Some(Epoch::Switched([field("voluntary_ctxt_switches:")?, field("nonvoluntary_ctxt_switches:")?]))
}

/// "running"; or a call's number and arguments, stack pointer, instruction pointer (proc_pid_syscall(5)).
fn parse_syscall(text: &str) -> Option<(u64, u64)> {
    let mut words = text.split_ascii_whitespace().rev();
    let hex = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    let ip = hex(words.next()?)?;
    let sp = hex(words.next()?)?;
    // A thread that is about to vanish has no registers any more, and says 0.
    (ip != 0 && sp != 0).then_some((ip, sp))
}

/// Tries everything that is parsed here on one text.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn parse_thread_files(text: &str) -> (Option<Epoch>, Option<Epoch>, Option<(u64, u64)>) {
    (parse_schedstat(text), parse_status(text), parse_syscall(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sleeping_thread_tells_its_pointers() {
        let call = "232 0x4 0x7ffd00000000 0x20 0xffffffff 0x0 0x0 0x7ffd3a0d8b10 0x7f52d51139e6\n";
        assert_eq!(parse_syscall(call), Some((0x7f52_d511_39e6, 0x7ffd_3a0d_8b10)));
        assert_eq!(parse_syscall("-1 0x7ffd3a0d8b10 0x401136\n"), Some((0x40_1136, 0x7ffd_3a0d_8b10)));
        for nothing in ["running\n", "", "-1 0x0 0x0\n", "0x1\n", "7 zz yy\n"] {
            assert_eq!(parse_syscall(nothing), None, "{nothing:?}");
        }
    }

    #[test]
    fn a_kernel_without_statistics_is_not_believed() {
        assert_eq!(parse_schedstat("1200 7 3\n"), Some(Epoch::Ran([1200, 3])));
        assert_eq!(parse_schedstat("0 0 0\n"), None);
        assert_eq!(parse_schedstat("1 2\n"), None);
        let status = "Name:\tx\nvoluntary_ctxt_switches:\t12\nnonvoluntary_ctxt_switches:\t3\n";
        assert_eq!(parse_status(status), Some(Epoch::Switched([12, 3])));
    }

    #[test]
    fn a_thread_whose_name_is_no_text_is_not_taken_for_dead() {
        let (tell, told) = std::sync::mpsc::channel();
        let (wake, woken) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            // Cut in the middle of a character, as long names are.
            // SAFETY: the name ends with NUL.
            unsafe { libc::prctl(libc::PR_SET_NAME, c"f\xc3\xbcr ) Z \xc3".as_ptr()) };
            // SAFETY: no memory is involved.
            tell.send(unsafe { libc::gettid() }).expect("the test listens");
            let _ = woken.recv();
        });
        let tid = told.recv().expect("the thread tells");
        let mut folder =
            TaskFolder::open(i32::try_from(std::process::id()).expect("pids fit i32")).expect("own threads");
        assert!(!folder.is_dead(tid));
        let status = Clock { file: folder.file(tid, "status").expect("alive"), kind: ClockKind::Switched };
        assert!(folder.epoch(&status).is_some());
        drop(wake);
        thread.join().expect("it ends");
    }

    #[test]
    fn an_epoch_changes_when_its_thread_runs_and_not_before() {
        let (tell, told) = std::sync::mpsc::channel();
        let (wake, woken) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            // SAFETY: no memory is involved.
            tell.send(unsafe { libc::gettid() }).expect("the test listens");
            while woken.recv().is_ok() {}
        });
        let tid = told.recv().expect("the thread tells");
        let pid = i32::try_from(std::process::id()).expect("pids fit i32");
        let mut folder = TaskFolder::open(pid).expect("own threads");
        let clock = folder.clock(tid).expect("alive");
        let status = Clock { file: folder.file(tid, "status").expect("alive"), kind: ClockKind::Switched };
        let syscall = folder.file(tid, "syscall").expect("alive");
        while folder.sleeping_at(&syscall).is_none() {
            std::thread::yield_now();
        }
        let (before, switches) = (folder.epoch(&clock), folder.epoch(&status));
        assert!(before.is_some() && switches.is_some());
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert_eq!((folder.epoch(&clock), folder.epoch(&status)), (before, switches), "it slept on");
        wake.send(()).expect("the thread listens");
        std::thread::sleep(std::time::Duration::from_millis(5));
        while folder.sleeping_at(&syscall).is_none() {
            std::thread::yield_now();
        }
        assert_ne!(folder.epoch(&clock), before);
        assert_ne!(folder.epoch(&status), switches);
        assert!(!folder.is_dead(tid));
        drop(wake);
        thread.join().expect("it ends");
        assert!(folder.is_dead(tid));
    }
}
