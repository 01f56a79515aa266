//! What a translation carries: guards, patches, and where its pieces lie. All addresses are those of the image, also where they
//! lie outside of it: one translation serves every process, wherever the image is mapped.

use crate::address::ImageOffset;
use std::ops::Range;

/// What to translate for.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Room for fragments, within 2 GiB of the code. Filled from the beginning, never rewritten.
    pub cache: Range<ImageOffset>,
    /// Room for trap slots, within 2 GiB of the cache. See [`super::Trap`].
    pub traps: Range<ImageOffset>,
    /// Check returns.
    pub shadow_stack: Option<ShadowStack>,
    /// Check indirect calls and jumps.
    pub targets: Option<TargetTable>,
    /// Check system calls.
    pub syscalls: Option<SyscallTable>,
    /// Instructions to divert.
    pub patches: Vec<PatchPoint>,
    /// Code in which nothing may change, not even for a guard: restartable sequences.
    pub untouched: Vec<Range<ImageOffset>>,
}

/// A parallel shadow stack: the copy of the return address at `rsp` lies at `rsp + displacement`. Slots that hold zero count as
/// right: they belong to calls from before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShadowStack {
    /// From a return address to its copy. One that 32 bits hold is cheaper.
    pub displacement: i64,
}

/// A table of the destinations that indirect calls and jumps may have, per process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TargetTable {
    /// Where it lies: [`TargetTable::SIZE`] bytes, zero at first.
    pub at: ImageOffset,
}

impl TargetTable {
    /// Length, bytes; only some of its pages are used.
    pub const SIZE: u64 = 2 << 19;

    /// A destination is accepted if one of the two 8-byte words at these offsets holds [`Self::word`].
    #[must_use]
    pub const fn slots(destination: u64) -> [u64; 2] {
        [(destination & 0xffff) * 8, (1 << 19) + ((destination >> 8) & 0xffff) * 8]
    }

    /// What the table holds for a destination.
    #[must_use]
    pub const fn word(destination: u64) -> u64 {
        destination.wrapping_neg()
    }
}

/// A table of one byte per system call: zero lets it pass, everything else traps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyscallTable {
    /// Where it lies: [`SyscallTable::SIZE`] bytes. The lower 16 bits of the number select the byte.
    pub at: ImageOffset,
}

impl SyscallTable {
    /// Length, bytes.
    pub const SIZE: u64 = 1 << 16;
}

/// An instruction in front of which control goes elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PatchPoint {
    /// The instruction.
    pub at: ImageOffset,
    /// Where control goes, within 2 GiB of the cache. All registers and flags are as at the instruction. To go on with it the
    /// code there jumps to [`super::Patched::resume`].
    pub to: ImageOffset,
}
