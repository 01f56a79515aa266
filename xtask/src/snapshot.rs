//! What a process looks like from outside: what must be the same again once asap has left it (promise P5).

use anyhow::{Context, Result, ensure};
use std::{collections::BTreeMap, fs, os::unix::fs::FileExt, path::Path};

/// A process at one moment.
#[derive(Debug)]
pub struct Snapshot {
    /// The process.
    pub pid: i32,
    mappings: Vec<Mapping>,
    descriptors: BTreeMap<i32, String>,
    /// Lines of `/proc/PID/status` that tell of threads, signals and tracers.
    status: Vec<String>,
}

/// One line of `/proc/PID/maps`, with the bytes if it is code of a file.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    line: String,
    code: Option<Vec<u8>>,
}

/// How much of two snapshots is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Code bytes, everything executable, everything of a file. The rest is the process's own memory, which comes and goes
    /// while it works.
    Code,
    /// Every line of the memory map, code bytes, descriptors, signal handling, number of threads.
    Everything,
}

const STATUS: [&str; 9] =
    ["Name:", "Threads:", "TracerPid:", "SigPnd:", "ShdPnd:", "SigBlk:", "SigIgn:", "SigCgt:", "Seccomp:"];

impl Mapping {
    fn word(&self, n: usize) -> &str {
        self.line.split_ascii_whitespace().nth(n).unwrap_or_default()
    }

    fn is_executable(&self) -> bool {
        self.word(1).contains('x')
    }

    /// Of a file that is there (not memory with a name, and not what a server maps to send it).
    fn is_of_program(&self) -> bool {
        self.word(5).starts_with('/') && !self.word(5).contains("/htdocs/")
    }

    fn range(&self) -> Option<(u64, u64)> {
        let (start, end) = self.word(0).split_once('-')?;
        Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
    }
}

impl Snapshot {
    /// Takes it.
    pub fn of(pid: i32) -> Result<Self> {
        Self::take(pid).with_context(|| format!("process {pid} can't be looked at"))
    }

    fn take(pid: i32) -> Result<Self> {
        let memory = fs::File::open(format!("/proc/{pid}/mem"))?;
        let mut mappings = Vec::new();
        for line in fs::read_to_string(format!("/proc/{pid}/maps"))?.lines() {
            let mut mapping = Mapping { line: line.to_owned(), code: None };
            if mapping.is_executable() && mapping.word(5).starts_with('/') {
                let (start, end) = mapping.range().with_context(|| format!("no range in {line}"))?;
                let mut bytes = vec![0; usize::try_from(end - start)?];
                memory.read_exact_at(&mut bytes, start)?;
                mapping.code = Some(bytes);
            }
            mappings.push(mapping);
        }
        let mut descriptors = BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            let entry = entry?;
            let number = entry.file_name().to_string_lossy().parse()?;
            // A descriptor may be closed between being listed and being read.
            if let Ok(target) = fs::read_link(entry.path()) {
                descriptors.insert(number, target.to_string_lossy().into_owned());
            }
        }
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let status = status.lines().filter(|line| STATUS.iter().any(|name| line.starts_with(name)));
        Ok(Self { pid, mappings, descriptors, status: status.map(str::to_owned).collect() })
    }

    /// Bytes of code in it.
    pub fn code_length(&self) -> usize {
        self.mappings.iter().filter_map(|mapping| mapping.code.as_ref()).map(Vec::len).sum()
    }

    /// Whether a memory-mapped file's name contains `part`.
    pub fn maps_file(&self, part: &str) -> bool {
        self.mappings.iter().any(|mapping| mapping.word(5).contains(part))
    }

    /// Whether all its code of files is what the files say.
    pub fn ensure_code_is_of_files(&self) -> Result<()> {
        let pid = self.pid;
        let mut compared = 0;
        for mapping in &self.mappings {
            let Some(code) = &mapping.code else { continue };
            let name = mapping.word(5);
            let offset = u64::from_str_radix(mapping.word(2), 16)?;
            let file = fs::File::open(Path::new(&format!("/proc/{pid}/root")).join(name.trim_start_matches('/')))
                .with_context(|| format!("{name} can't be opened"))?;
            // Behind the end of the file, the last page is filled with zeroes.
            let mut bytes = vec![0; code.len()];
            let mut length = 0;
            while length < bytes.len() {
                match file.read_at(&mut bytes[length..], offset + length as u64)? {
                    0 => break,
                    more => length += more,
                }
            }
            ensure!(bytes == *code, "code of {name} in process {pid} is not what the file says");
            compared += 1;
        }
        ensure!(compared > 0, "process {pid} has no code of files");
        Ok(())
    }

    /// Whether `later` is the same; the error names the first difference.
    pub fn ensure_same(&self, later: &Self, extent: Extent) -> Result<()> {
        let pid = later.pid;
        let chosen = |snapshot: &'_ Self| -> Vec<usize> {
            let all = snapshot.mappings.iter().enumerate();
            let wanted =
                |mapping: &Mapping| extent == Extent::Everything || mapping.is_executable() || mapping.is_of_program();
            all.filter(|(_, mapping)| wanted(mapping)).map(|(n, _)| n).collect()
        };
        let (before, after) = (chosen(self), chosen(later));
        for n in 0..before.len().max(after.len()) {
            let before = before.get(n).map(|&n| &self.mappings[n]);
            let after = after.get(n).map(|&n| &later.mappings[n]);
            let line = |mapping: Option<&Mapping>| mapping.map_or("nothing", |m| m.line.as_str()).to_owned();
            let (was, is) = (line(before), line(after));
            ensure!(was == is, "the memory map of process {pid} differs:\n  before: {was}\n  after:  {is}");
            ensure!(before == after, "code of process {pid} differs in {is}");
        }
        if extent == Extent::Everything {
            let (was, is) = (&self.descriptors, &later.descriptors);
            ensure!(was == is, "descriptors of process {pid} differ:\n  before: {was:?}\n  after:  {is:?}");
            let (was, is) = (&self.status, &later.status);
            ensure!(was == is, "the status of process {pid} differs:\n  before: {was:?}\n  after:  {is:?}");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::owned::Owned;
    use std::process::{Command, Stdio};

    /// A process that maps what it is told to map, between two snapshots.
    fn differs(action: &str, extent: Extent) -> Option<String> {
        let script = format!("read a; {action}; echo; read a");
        let mut shell = Command::new("bash");
        shell.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut shell = Owned::spawn(&mut shell).expect("a shell");
        let mut input = shell.stdin().expect("a pipe");
        let mut output = shell.stdout().expect("a pipe");
        // Past its start-up: it waits for its first line, when nothing moves in it any more.
        std::thread::sleep(std::time::Duration::from_millis(200));
        let before = Snapshot::of(shell.pid()).expect("a snapshot");
        before.ensure_code_is_of_files().expect("untouched code");
        std::io::Write::write_all(&mut input, b"\n").expect("a line");
        std::io::Read::read_exact(&mut output, &mut [0]).expect("an answer");
        let after = Snapshot::of(shell.pid()).expect("a snapshot");
        before.ensure_same(&after, extent).err().map(|error| error.to_string())
    }

    #[test]
    fn a_process_that_does_nothing_stays_the_same() {
        assert_eq!(differs("true", Extent::Code), None);
    }

    #[test]
    fn a_new_descriptor_and_a_new_handler_are_differences() {
        let said = differs("exec 9</dev/null", Extent::Everything).expect("a difference");
        assert!(said.contains("descriptors of process") || said.contains("memory map"), "{said}");
        assert!(differs("trap : USR1", Extent::Everything).is_some());
    }

    #[test]
    fn a_changed_byte_of_code_is_a_difference() {
        let child = Owned::spawn(Command::new("sleep").arg("100")).expect("sleep");
        std::thread::sleep(std::time::Duration::from_millis(100));
        let before = Snapshot::of(child.pid()).expect("a snapshot");
        let at = before.mappings.iter().find(|mapping| mapping.code.is_some()).expect("code");
        let (start, _) = at.range().expect("a range");
        let memory = fs::File::options().write(true).open(format!("/proc/{}/mem", child.pid())).expect("its memory");
        let old = at.code.as_ref().expect("code")[0];
        memory.write_all_at(&[!old], start).expect("a write");
        let after = Snapshot::of(child.pid()).expect("a snapshot");
        let said = before.ensure_same(&after, Extent::Code).expect_err("a difference").to_string();
        assert!(said.contains("code of process"), "{said}");
        assert!(after.ensure_code_is_of_files().is_err());
    }
}
