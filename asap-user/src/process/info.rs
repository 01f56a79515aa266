//! What `/proc` says about a process before anybody touches it: kind, tracer, seccomp, threads, parents.

use std::{fs, io};

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

    fn parse(status: &str, stat: &str) -> Self {
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
        let start_time = after_name.split_ascii_whitespace().nth(19).and_then(|text| text.parse().ok()).unwrap_or(0);
        Self {
            pid: 0,
            name: field("Name").to_owned(),
            state,
            parent: field("PPid").parse().unwrap_or(0),
            tracer: field("TracerPid").parse().unwrap_or(0),
            seccomp: field("Seccomp").parse().unwrap_or(0),
            kernel_thread: field("Kthread") == "1" || (field("VmSize").is_empty() && !matches!(state, 'Z' | 'X')),
            start_time,
        }
    }
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

/// Children of all threads of `pid` (proc_pid_task_tid_children(5)), or by a scan of `/proc` where that file is missing.
/// Processes that end meanwhile are left out.
#[must_use]
pub fn children(pid: i32) -> Vec<i32> {
    let mut children = Vec::new();
    let mut told = false;
    for tid in threads(pid).unwrap_or_default() {
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

/// Signals that are pending for the thread and not blocked by it, as a mask (bit n-1 is signal n).
#[must_use]
pub fn deliverable_signals(tid: i32) -> u64 {
    let Ok(status) = fs::read(format!("/proc/{tid}/status")) else { return 0 };
    let status = String::from_utf8_lossy(&status);
    let mask = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .and_then(|text| u64::from_str_radix(text.trim(), 16).ok())
            .unwrap_or(0)
    };
    (mask("SigPnd:") | mask("ShdPnd:")) & !mask("SigBlk:")
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
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 987 1 1";
        let info = ProcessInfo::parse("Name:\ta) b\nState:\tS (sleeping)\nPPid:\t1\nVmSize: 4 kB\nSeccomp:\t2\n", stat);
        assert_eq!((info.start_time, info.state, info.seccomp, info.kernel_thread), (987, 'S', 2, false));
    }
}
