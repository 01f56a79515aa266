//! What `/proc` says about a process before anybody touches it: kind, tracer, seccomp, threads, parents.

use std::{fs, io, os::unix::fs::MetadataExt};

/// The facts that decide whether a process can be a target.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessInfo {
    /// Process id.
    pub pid: i32,
    /// `comm`.
    pub name: String,
    /// One letter: R, S, D, T, t, Z, X, I.
    pub state: char,
    /// Parent.
    pub parent: i32,
    /// Who traces it; 0: nobody.
    pub tracer: i32,
    /// Seccomp mode: 0 none, 1 strict, 2 filter.
    pub seccomp: u32,
    /// Has no address space of its own.
    pub kernel_thread: bool,
    /// Signal that its parent gets when it ends; 0 for a helper of ours, 17 (SIGCHLD) for what fork(2) made.
    pub exit_signal: i32,
    /// Start time, clock ticks since boot: with the pid it names the process for ever.
    pub start_time: u64,
}

impl ProcessInfo {
    /// Reads the facts about `pid` (a process or a thread).
    ///
    /// # Errors
    /// There is no such process.
    pub fn of(pid: i32) -> io::Result<Self> {
        let status = String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/status"))?).into_owned();
        let stat = String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/stat"))?).into_owned();
        let mut info = Self::parse(&status, &stat);
        info.pid = pid;
        Ok(info)
    }

    /// From the texts of `status` and `stat`.
    pub(crate) fn parse(status: &str, stat: &str) -> Self {
        let field = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .map(str::trim)
                .unwrap_or_default()
        };
        let state = field("State").chars().next().unwrap_or('?');
        // The name in parentheses may hold anything: count from the last one (proc_pid_stat(5)).
        let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let number = |index: usize| after_name.split_ascii_whitespace().nth(index);
        let start_time = number(19).and_then(|text| text.parse().ok()).unwrap_or(0);
        let exit_signal = number(35).and_then(|text| text.parse().ok()).unwrap_or(-1);
        Self {
            pid: 0,
            name: field("Name").to_owned(),
            state,
            parent: field("PPid").parse().unwrap_or(0),
            tracer: field("TracerPid").parse().unwrap_or(0),
            seccomp: field("Seccomp").parse().unwrap_or(0),
            kernel_thread: field("Kthread") == "1" || (field("VmSize").is_empty() && !matches!(state, 'Z' | 'X')),
            start_time,
            exit_signal,
        }
    }
}

/// The process that thread `tid` belongs to; `None`: it has ended.
#[must_use]
pub fn process_of(tid: i32) -> Option<i32> {
    let status = fs::read(format!("/proc/{tid}/status")).ok()?;
    let status = String::from_utf8_lossy(&status);
    status.lines().find_map(|line| line.strip_prefix("Tgid:"))?.trim().parse().ok()
}

/// The ids of all threads of `pid`, as they are at the moment of reading.
///
/// # Errors
/// The process is gone.
pub fn threads(pid: i32) -> io::Result<Vec<i32>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        if let Some(tid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) {
            threads.push(tid);
        }
    }
    threads.sort_unstable();
    Ok(threads)
}

/// A thread of process `pid` that has not ended: its first one, as a rule. What all threads share (memory, executable, root) is
/// shown by `/proc` for such a thread only, and a first thread may end before the others (pthread_exit(3) in `main`).
#[must_use]
pub fn living_thread(pid: i32) -> Option<i32> {
    let lives = |tid: &i32| {
        let stat = fs::read(format!("/proc/{tid}/stat")).unwrap_or_default();
        state_of(&stat).is_some_and(|state| !matches!(state, b'Z' | b'X'))
    };
    if lives(&pid) { Some(pid) } else { threads(pid).ok()?.into_iter().find(lives) }
}

/// The letter that a file `stat` gives for the state: behind the last parenthesis, as the name may hold any.
pub(crate) fn state_of(stat: &[u8]) -> Option<u8> {
    let name_end = stat.iter().rposition(|&byte| byte == b')')?;
    stat.get(name_end + 2).copied()
}

/// How many threads `pid` has, at a fraction of the cost of a list: the links of the folder of threads (fs/proc/base.c,
/// proc_task_getattr).
///
/// # Errors
/// The process is gone.
pub fn thread_count(pid: i32) -> io::Result<usize> {
    let links = fs::metadata(format!("/proc/{pid}/task"))?.nlink();
    // Those of the folder itself and of its parent come first.
    Ok(usize::try_from(links).unwrap_or(usize::MAX).saturating_sub(2))
}

/// Whether two processes have one address space; `None`: the kernel can't compare them (kcmp(2)).
#[must_use]
pub fn share_memory(one: i32, other: i32) -> Option<bool> {
    /// `KCMP_VM`.
    const MEMORY: i32 = 1;
    // SAFETY: no pointers are passed.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, one, other, MEMORY, 0, 0) };
    (order >= 0).then_some(order == 0)
}

/// Children of all threads of `pid` (proc_pid_task_tid_children(5)), or by a scan of `/proc` where that file is missing.
/// Processes that end meanwhile are left out.
#[must_use]
pub fn children(pid: i32) -> Vec<i32> {
    children_of(pid, &threads(pid).unwrap_or_default())
}

/// As [`children`], where it is known that only these threads of `pid` have any.
#[must_use]
pub fn children_of(pid: i32, parents: &[i32]) -> Vec<i32> {
    let mut children = Vec::new();
    let mut told = parents.is_empty();
    for tid in parents {
        if let Ok(text) = fs::read_to_string(format!("/proc/{pid}/task/{tid}/children")) {
            told = true;
            children.extend(text.split_ascii_whitespace().filter_map(|word| word.parse::<i32>().ok()));
        }
    }
    if !told {
        let all = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        children.extend(pids.filter(|&child| ProcessInfo::of(child).is_ok_and(|info| info.parent == pid)));
    }
    children.sort_unstable();
    children.dedup();
    children
}

/// Signals of a thread, as masks (bit n-1 is signal n).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Signals {
    /// Waiting to be delivered.
    pub pending: u64,
    /// Held back by the thread.
    pub blocked: u64,
    /// The process has a handler.
    pub caught: u64,
}

impl Signals {
    /// Of thread `tid`; nothing if it has ended.
    #[must_use]
    pub fn of(tid: i32) -> Self {
        let Ok(status) = fs::read(format!("/proc/{tid}/status")) else { return Self::default() };
        Self::parse(&String::from_utf8_lossy(&status))
    }

    /// From the text of `status`.
    pub(crate) fn parse(status: &str) -> Self {
        let mask = |name: &str| {
            let text = status.lines().find_map(|line| line.strip_prefix(name));
            text.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).unwrap_or(0)
        };
        Self { pending: mask("SigPnd:") | mask("ShdPnd:"), blocked: mask("SigBlk:"), caught: mask("SigCgt:") }
    }

    /// Whether a handler is about to run: then a system call ends with EINTR as the program expects. Signals that are ignored
    /// don't count: the kernel keeps them only because the thread is traced, and drops them when it is not.
    #[must_use]
    pub fn handler_is_due(self) -> bool {
        self.pending & !self.blocked & self.caught != 0
    }

    /// Whether there is a handler for `signal`.
    #[must_use]
    pub fn catches(self, signal: i32) -> bool {
        let bit = signal.checked_sub(1).and_then(|bit| u32::try_from(bit).ok());
        bit.is_some_and(|bit| bit < 64 && self.caught >> bit & 1 == 1)
    }
}

/// The number of a process in its innermost pid namespace (proc_pid_status(5), NSpid).
#[must_use]
pub fn number_in_its_namespace(pid: i32) -> Option<i32> {
    parse_innermost_number(&String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/status")).ok()?))
}

/// The same, from the text of `status`.
pub(crate) fn parse_innermost_number(status: &str) -> Option<i32> {
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    numbers.split_ascii_whitespace().last()?.parse().ok()
}

/// The process that `tid` is a thread of.
#[must_use]
pub fn thread_group(tid: i32) -> Option<i32> {
    // A name need not be UTF-8.
    parse_thread_group(&String::from_utf8_lossy(&fs::read(format!("/proc/{tid}/status")).ok()?))
}

/// The same, from the text of `status`.
pub(crate) fn parse_thread_group(status: &str) -> Option<i32> {
    status.lines().find_map(|line| line.strip_prefix("Tgid:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_ordinary() {
        let pid = i32::try_from(std::process::id()).expect("pids fit i32");
        let info = ProcessInfo::of(pid).expect("this process");
        assert!(!info.kernel_thread && info.start_time > 0 && info.parent > 0);
        assert!(threads(pid).expect("this process").contains(&pid));
    }

    #[test]
    fn the_first_of_living_threads_is_found() {
        let pid = i32::try_from(std::process::id()).expect("pids fit i32");
        assert_eq!(living_thread(pid), Some(pid));
        let mut child = std::process::Command::new("true").spawn().expect("it runs");
        let ended = i32::try_from(child.id()).expect("pids fit i32");
        while living_thread(ended).is_some() {
            std::thread::yield_now();
        }
        assert_eq!(ProcessInfo::of(ended).expect("a zombie").state, 'Z');
        child.wait().expect("own child");
        assert_eq!(living_thread(ended), None);
    }

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 987 1 1";
        let info = ProcessInfo::parse("Name:\ta) b\nState:\tS (sleeping)\nPPid:\t1\nVmSize: 4 kB\nSeccomp:\t2\n", stat);
        assert_eq!((info.start_time, info.state, info.seccomp, info.kernel_thread), (987, 'S', 2, false));
    }

    #[test]
    fn only_a_signal_with_a_handler_is_due() {
        let status = "SigPnd:\t0000000000000000\nShdPnd:\t0000000000410000\nSigBlk:\t0000000000000000\nSigCgt:\t0000000000010000\n";
        let signals = Signals::parse(status);
        assert!(signals.handler_is_due() && signals.catches(17) && !signals.catches(23));
        assert!(!Signals { caught: 1, ..signals }.handler_is_due());
        assert!(!Signals { blocked: 0x1_0000, ..signals }.handler_is_due());
        assert!(!signals.catches(0) && !signals.catches(65));
    }
}
