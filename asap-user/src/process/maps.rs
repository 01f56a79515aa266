//! `/proc/PID/maps` as data (proc_pid_maps(5)).

use super::info::living_thread;
use crate::address::TargetAddr;
use std::{io, ops::Range};

/// One line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Addresses, page-aligned.
    pub range: Range<TargetAddr>,
    /// May be read.
    pub readable: bool,
    /// May be written.
    pub writable: bool,
    /// May be executed.
    pub executable: bool,
    /// `MAP_SHARED` rather than private.
    pub shared: bool,
    /// Offset in the file, bytes.
    pub file_offset: u64,
    /// Device, `major:minor` in hex, as printed.
    pub device: String,
    /// Inode number; 0 for anonymous memory.
    pub inode: u64,
    /// Path or pseudo name (`[heap]`, `[vdso]`, `/memfd:x (deleted)`); empty for anonymous memory. As the kernel prints it:
    /// in the target's mount namespace, newlines as `\012`.
    pub name: String,
    /// Where the kernel lists the file that stands behind it: `range`, but for a text whose file is mapped elsewhere while the
    /// process is in the sandbox.
    pub listed: Range<TargetAddr>,
}

impl Mapping {
    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.range.end.0 - self.range.start.0
    }

    /// Never true for a line of the kernel's.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.range.start == self.range.end
    }

    /// A file (rather than anonymous memory or a kernel pseudo mapping) stands behind it.
    #[must_use]
    pub fn is_file(&self) -> bool {
        self.inode != 0 && self.name.starts_with('/')
    }

    /// The file's name no longer leads to this file.
    #[must_use]
    pub fn is_deleted(&self) -> bool {
        self.name.ends_with(" (deleted)")
    }

    /// The path without the kernel's mark for deleted files.
    #[must_use]
    pub fn path(&self) -> &str {
        self.name.strip_suffix(" (deleted)").unwrap_or(&self.name)
    }

    /// Where the agent can open exactly the mapped file, whatever its name means today (proc_pid_map_files(5)); `tid` is a thread
    /// that lives.
    #[must_use]
    pub fn map_file(&self, tid: i32) -> String {
        format!("/proc/{tid}/map_files/{:x}-{:x}", self.listed.start.0, self.listed.end.0)
    }

    fn parse(line: &str) -> Option<Self> {
        let mut rest = line;
        let mut field = || {
            let trimmed = rest.trim_start_matches(' ');
            let end = trimmed.find(' ').unwrap_or(trimmed.len());
            let (word, tail) = trimmed.split_at(end);
            rest = tail;
            word
        };
        let (start, end) = field().split_once('-')?;
        let flags = field().as_bytes();
        let file_offset = u64::from_str_radix(field(), 16).ok()?;
        let device = field().to_owned();
        let inode = field().parse().ok()?;
        let &[r, w, x, s] = flags else { return None };
        let range = TargetAddr(u64::from_str_radix(start, 16).ok()?)..TargetAddr(u64::from_str_radix(end, 16).ok()?);
        (range.start <= range.end).then(|| Self {
            listed: range.clone(),
            range,
            readable: r == b'r',
            writable: w == b'w',
            executable: x == b'x',
            shared: s == b's',
            file_offset,
            device,
            inode,
            name: rest.trim_start_matches(' ').to_owned(),
        })
    }
}

/// All mappings of a process, in order of address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Maps(pub Vec<Mapping>);

/// Lowest address that is given out (well above `vm.mmap_min_addr`).
const LOWEST: u64 = 0x1_0000;
/// End of user space with four page-table levels, bytes (Documentation/arch/x86/x86_64/mm.rst).
const HIGHEST: u64 = 0x7fff_ffff_f000;

impl Maps {
    /// Reads the mappings of `pid`.
    ///
    /// # Errors
    /// The process is gone, or may not be looked at.
    pub fn of(pid: i32) -> io::Result<Self> {
        crate::fault::touch("touch.maps")?;
        let tid = living_thread(pid).unwrap_or(pid);
        // A name may hold any byte but newline and NUL: not always UTF-8.
        Ok(Self::parse(&String::from_utf8_lossy(&std::fs::read(format!("/proc/{tid}/maps"))?)))
    }

    /// Parses the text of a maps file; lines that make no sense are left out.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(Mapping::parse).collect())
    }

    /// The mapping that holds `address`.
    #[must_use]
    pub fn at(&self, address: TargetAddr) -> Option<&Mapping> {
        let next = self.0.partition_point(|mapping| mapping.range.start <= address);
        self.0[..next].last().filter(|mapping| address < mapping.range.end)
    }

    /// Start of a free range of `length` bytes (rounded up to pages), all of it within `reach` bytes of all of `near`;
    /// one below `near` if there is any, for above an executable its heap grows. Always the top of a hole, where it is in
    /// nobody's way. A page is left free on either side.
    #[must_use]
    pub fn gap(&self, near: &Range<TargetAddr>, length: u64, reach: u64) -> Option<TargetAddr> {
        let page = crate::address::PAGE_SIZE;
        let length = length.checked_next_multiple_of(page)?;
        let lowest = near.end.0.saturating_sub(reach).next_multiple_of(page).max(LOWEST);
        let highest = near.start.0.saturating_add(reach).min(HIGHEST);
        let mut best: Option<(u64, u64)> = None;
        let mut previous_end = 0;
        let ends = self.0.iter().map(|m| (m.range.start.0, m.range.end.0)).chain([(HIGHEST, HIGHEST)]);
        for (start, end) in ends {
            let low = (previous_end + page).max(lowest);
            let high = start.saturating_sub(page).min(highest);
            previous_end = end.max(previous_end);
            if high.saturating_sub(low) < length || high < low {
                continue;
            }
            let place = (high - length) & !(page - 1);
            if place < low {
                continue;
            }
            let above = if place > near.start.0 { HIGHEST } else { 0 };
            let distance = place.abs_diff(near.start.0) + above;
            if best.is_none_or(|(nearest, _)| distance < nearest) {
                best = Some((distance, place));
            }
        }
        best.map(|(_, place)| TargetAddr(place))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
555555554000-555555556000 r--p 00000000 fe:00 123                        /usr/sbin/a b (deleted)
555555556000-555555560000 r-xp 00002000 fe:00 123                        /usr/sbin/a b (deleted)
7ffff7fc1000-7ffff7fc3000 r-xp 00000000 00:00 0                          [vdso]
7ffffffde000-7ffffffff000 rw-p 00000000 00:00 0 
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";

    #[test]
    fn lines_become_mappings() {
        let maps = Maps::parse(TEXT);
        assert_eq!(maps.0.len(), 5);
        let text = maps.at(TargetAddr(0x5555_5555_6abc)).expect("the text mapping");
        assert!(text.executable && !text.writable && !text.shared && text.is_file() && text.is_deleted());
        assert_eq!((text.path(), text.file_offset, text.inode), ("/usr/sbin/a b", 0x2000, 123));
        assert!(maps.at(TargetAddr(0x5555_5556_0000)).is_none());
        assert_eq!(maps.0[3].name, "");
    }

    #[test]
    fn garbage_is_left_out() {
        assert_eq!(Maps::parse("\n-\nxx-yy r-xp 0 0 0\n2000-1000 r-xp 0 00:00 0\n1000 r\n").0, []);
    }

    #[test]
    fn a_gap_is_near_free_and_in_reach() {
        let maps = Maps::parse(TEXT);
        let module = TargetAddr(0x5555_5555_4000)..TargetAddr(0x5555_5556_0000);
        let gap = maps.gap(&module, 0x2345, 1 << 30).expect("room near the module");
        assert!(maps.0.iter().all(|m| gap.0 + 0x3000 <= m.range.start.0 || gap.0 >= m.range.end.0));
        assert!(gap.0.abs_diff(module.start.0) < 0x10_0000);
        let full = Maps::parse("10000-7ffffffff000 rw-p 00000000 00:00 0 \n");
        assert_eq!(full.gap(&module, 0x1000, 1 << 30), None);
    }
}
