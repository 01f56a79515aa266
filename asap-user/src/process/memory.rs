//! A process's memory through `/proc/PID/mem`. Writes reach read-only private mappings too (FOLL_FORCE, mm/gup.c), which is
//! what keeps promise P4: nothing in the target ever becomes writable for us. Kernels may grant that to the tracer alone, for the
//! thread it traces (CONFIG_PROC_MEM_FORCE_PTRACE, proc_mem.force_override=ptrace; Debian from Linux 7 on).

use super::info::living_thread;
use crate::address::TargetAddr;
use std::{
    fs, io,
    ops::Range,
    os::unix::fs::FileExt,
    sync::{Mutex, PoisonError},
};

/// An open `/proc/PID/mem`. Refers to the address space the process had when it was opened, also after execve(2).
#[derive(Debug)]
pub struct Memory {
    file: fs::File,
    pid: i32,
    /// The same memory by way of a thread that we trace.
    traced: Mutex<Option<fs::File>>,
    /// What is read elsewhere, by address, and how far from there.
    elsewhere: Mutex<Vec<(Range<TargetAddr>, i64)>>,
}

fn open(tid: i32) -> io::Result<fs::File> {
    fs::OpenOptions::new().read(true).write(true).open(format!("/proc/{tid}/mem"))
}

impl Memory {
    /// Opens the memory of `pid` for reading and writing.
    ///
    /// # Errors
    /// The process is gone or may not be traced.
    pub fn open(pid: i32) -> io::Result<Self> {
        Ok(Self {
            file: open(living_thread(pid).unwrap_or(pid))?,
            pid,
            traced: Mutex::default(),
            elsewhere: Mutex::default(),
        })
    }

    /// From now on writes that the kernel grants to tracers only are made by way of `tid`, which the calling thread traces and
    /// which has the same address space. Nothing changes if it is gone.
    pub fn write_as_tracer_of(&self, tid: i32) {
        if let Ok(file) = open(tid) {
            *self.traced.lock().unwrap_or_else(PoisonError::into_inner) = Some(file);
        }
    }

    /// The process it was opened for.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// From now on reads in these ranges (sorted, disjoint) are made so many bytes further on: where the text of a file lies while
    /// something else has its place. Reading that would fail, or give other code.
    pub fn read_elsewhere(&self, ranges: Vec<(Range<TargetAddr>, i64)>) {
        *self.elsewhere.lock().unwrap_or_else(PoisonError::into_inner) = ranges;
    }

    /// Fills `buffer` from `address`.
    ///
    /// # Errors
    /// Part of it is not mapped (EIO), or the address space is gone (unexpected end of file).
    pub fn read(&self, address: TargetAddr, buffer: &mut [u8]) -> io::Result<()> {
        crate::fault::touch("touch.read")?;
        let elsewhere = self.elsewhere.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut at, mut rest) = (address, buffer);
        while !rest.is_empty() {
            let next = elsewhere.partition_point(|(range, _)| range.end <= at);
            let end = TargetAddr(at.0.saturating_add(rest.len() as u64));
            let (length, delta) = match elsewhere.get(next) {
                Some((range, delta)) if range.start <= at => (range.end.min(end).0 - at.0, *delta),
                Some((range, _)) => (range.start.min(end).0 - at.0, 0),
                None => (rest.len() as u64, 0),
            };
            let (part, tail) = rest.split_at_mut((length as usize).clamp(1, rest.len()));
            self.file.read_exact_at(part, at.offset(delta).0)?;
            at = at.offset(part.len() as i64);
            rest = tail;
        }
        Ok(())
    }

    /// As [`Self::read`], and really from there.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_in_place(&self, address: TargetAddr, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, address.0)
    }

    /// `length` bytes from `address`.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn bytes(&self, address: TargetAddr, length: usize) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; length];
        self.read(address, &mut buffer)?;
        Ok(buffer)
    }

    /// The little-endian word at `address`.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn word(&self, address: TargetAddr) -> io::Result<u64> {
        let mut buffer = [0; 8];
        self.read(address, &mut buffer)?;
        Ok(u64::from_le_bytes(buffer))
    }

    /// Writes `bytes` at `address`. Never called on bytes that a thread may be executing.
    ///
    /// # Errors
    /// As [`Self::read`]; EIO also for shared mappings that are not writable.
    pub fn write(&self, address: TargetAddr, bytes: &[u8]) -> io::Result<()> {
        crate::fault::touch("touch.write")?;
        let written = self.file.write_all_at(bytes, address.0);
        match (&written, &*self.traced.lock().unwrap_or_else(PoisonError::into_inner)) {
            (Err(error), Some(traced)) if error.raw_os_error() == Some(libc::EIO) => {
                traced.write_all_at(bytes, address.0)
            }
            _ => written,
        }
    }

    /// A NUL-terminated string of at most `limit` bytes, lossily as UTF-8.
    #[must_use]
    pub fn string(&self, address: TargetAddr, limit: usize) -> Option<String> {
        let mut text = Vec::new();
        let mut at = address;
        while text.len() < limit {
            // Up to the end of a page: the next one may not be mapped.
            let length = (4096 - at.page_offset()).min(limit - text.len());
            let chunk = self.bytes(at, length).ok()?;
            if let Some(end) = chunk.iter().position(|&byte| byte == 0) {
                text.extend_from_slice(&chunk[..end]);
                return Some(String::from_utf8_lossy(&text).into_owned());
            }
            text.extend_from_slice(&chunk);
            at = at.offset(length as i64);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_elsewhere_is_read_there() {
        let memory = Memory::open(std::process::id() as i32).expect("own memory");
        let bytes: Vec<u8> = (0..200).collect();
        let at = |index: i64| TargetAddr(bytes.as_ptr() as u64).offset(index);
        memory.read_elsewhere(vec![(at(10)..at(20), 100), (at(20)..at(22), -20), (at(50)..at(60), 1)]);
        let read = |index: i64, length: usize| memory.bytes(at(index), length).expect("mapped");
        assert_eq!(read(8, 4), [8, 9, 110, 111]);
        assert_eq!(read(19, 5), [119, 0, 1, 22, 23]);
        assert_eq!(read(12, 2), [112, 113]);
        assert_eq!(read(60, 2), [60, 61]);
        let mut two = [0; 2];
        memory.read_in_place(at(12), &mut two).expect("mapped");
        assert_eq!(two, [12, 13]);
        memory.read_elsewhere(Vec::new());
        assert_eq!(read(12, 2), [12, 13]);
    }

    #[test]
    fn own_memory_reads_and_writes() {
        let pid = i32::try_from(std::process::id()).expect("pids fit i32");
        let memory = Memory::open(pid).expect("own memory");
        let mut value = Box::new(0x1122_3344_5566_7788_u64);
        let at = TargetAddr(&raw mut *value as u64);
        assert_eq!(memory.word(at).expect("mapped"), 0x1122_3344_5566_7788);
        memory.write(at, &7_u64.to_le_bytes()).expect("mapped");
        assert_eq!(std::hint::black_box(*value), 7);
        assert!(memory.word(TargetAddr(8)).is_err());
        let text = c"hello";
        assert_eq!(memory.string(TargetAddr(text.as_ptr() as u64), 64).as_deref(), Some("hello"));
    }
}
