//! The stack of a thread, read from the target in pieces of a page: a walk touches few of them. Not for memory that changes
//! meanwhile; whoever reads checks that its thread has not run.

use crate::{
    address::{PAGE_SIZE, TargetAddr},
    process::memory::Memory,
};

/// Reads words of stacks; keeps its buffer from one thread to the next.
pub(super) struct StackReader<'a> {
    memory: &'a Memory,
    start: u64,
    bytes: Vec<u8>,
    /// More was read than had been copied.
    beyond: bool,
}

impl<'a> StackReader<'a> {
    pub(super) fn new(memory: &'a Memory) -> Self {
        Self { memory, start: 0, bytes: Vec::with_capacity(PAGE_SIZE as usize), beyond: false }
    }

    /// Forgets what was read: the stack pointer of the next thread is `sp`, and `copied` is what lies there if it is known.
    pub(super) fn start_at(&mut self, sp: u64, copied: &[u8]) {
        self.start = sp;
        self.bytes.clear();
        self.bytes.extend_from_slice(copied);
        self.beyond = false;
    }

    /// Whether anything was read from memory since then, as opposed to what had been copied.
    pub(super) fn went_beyond(&self) -> bool {
        self.beyond
    }

    fn fill(&mut self, at: u64) {
        // To the end of a page: the next one may not be mapped.
        let start = at & !7;
        let length = PAGE_SIZE - (start & (PAGE_SIZE - 1));
        self.bytes.resize(length as usize, 0);
        self.start = start;
        if self.memory.read(TargetAddr(start), &mut self.bytes).is_err() {
            self.bytes.clear();
        }
    }

    fn buffered(&self, at: u64) -> Option<u64> {
        let offset = usize::try_from(at.wrapping_sub(self.start)).ok()?;
        let bytes = self.bytes.get(offset..offset.checked_add(8)?)?;
        bytes.try_into().ok().map(u64::from_le_bytes)
    }

    /// The word at `at`.
    pub(super) fn word(&mut self, at: u64) -> Option<u64> {
        if let Some(word) = self.buffered(at) {
            return Some(word);
        }
        self.beyond = true;
        self.fill(at);
        // A word that is not aligned may cross the end of the page.
        self.buffered(at).or_else(|| self.memory.word(TargetAddr(at)).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_from_the_copy_then_from_memory() {
        let pid = i32::try_from(std::process::id()).expect("pids fit i32");
        let memory = Memory::open(pid).expect("own memory");
        let words: Vec<u64> = (0..2048).collect();
        let at = words.as_ptr() as u64;
        let mut reader = StackReader::new(&memory);
        reader.start_at(at, &[7; 16]);
        assert_eq!(reader.word(at + 8), Some(0x0707_0707_0707_0707), "what was copied wins");
        assert!(!reader.went_beyond());
        assert_eq!(reader.word(at + 16), Some(2));
        assert!(reader.went_beyond());
        assert_eq!(reader.word(at + 8 * 2047), Some(2047));
        assert_eq!(reader.word(at + 8), Some(1), "back down, after the copy was given up");
        let page_end = (at + PAGE_SIZE) & !(PAGE_SIZE - 1);
        let crossing = (page_end - at) / 8 - 1;
        assert_eq!(reader.word(page_end - 4), Some((crossing >> 32) | ((crossing + 1) << 32)));
        assert_eq!(reader.word(8), None);
        assert_eq!(reader.word(u64::MAX - 3), None);
    }
}
