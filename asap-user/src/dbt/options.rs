//! What a translation carries: guards, patches, and where its pieces lie. All addresses are those of the image, also where they
//! lie outside of it, and what differs between processes is read from a page of constants: one translation serves every
//! process, wherever the image is mapped.

use crate::address::ImageOffset;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// What to translate for.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Room for fragments, within 2 GiB of the code. Filled from the beginning, never rewritten.
    pub cache: Range<ImageOffset>,
    /// Room for trap slots, within 2 GiB of the cache. See [`super::Trap`].
    pub traps: Range<ImageOffset>,
    /// Where the [`Constants`] of the process lie, read-only, within 2 GiB of the cache.
    pub constants: ImageOffset,
    /// Check returns.
    pub shadow_stack: Option<ShadowForm>,
    /// Check indirect calls and jumps, by a [`TargetTable`].
    pub targets: bool,
    /// Check system calls, by a [`SyscallTable`].
    pub syscalls: bool,
    /// Instructions to divert.
    pub patches: Vec<PatchPoint>,
    /// Code in which nothing may change, not even for a guard: restartable sequences.
    pub untouched: Vec<Range<ImageOffset>>,
}

/// What a process tells its translated code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Constants {
    /// Of the shadow stack. See [`ShadowForm`].
    pub displacement: i64,
    /// Absolute address of the [`TargetTable`].
    pub targets: u64,
    /// Absolute address of the [`SyscallTable`].
    pub syscalls: u64,
}

impl Constants {
    /// Length, bytes.
    pub const SIZE: u64 = 24;
    pub(super) const DISPLACEMENT: u64 = 0;
    pub(super) const TARGETS: u64 = 8;
    pub(super) const SYSCALLS: u64 = 16;

    /// As they lie in memory, from [`Options::constants`] on.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::SIZE as usize] {
        let mut bytes = [0; Self::SIZE as usize];
        bytes[..8].copy_from_slice(&self.displacement.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.targets.to_le_bytes());
        bytes[16..].copy_from_slice(&self.syscalls.to_le_bytes());
        bytes
    }
}

/// Where a parallel shadow stack keeps the copy of the return address that lies at a stack address: in a slot of 8 bytes. A slot
/// that nothing was copied to holds zero: whoever judges the trap knows whether the call was made before there were copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ShadowForm {
    /// Away by [`Constants::displacement`]. With a displacement of zero everything passes.
    Displaced,
    /// Away by the thread's GS base. A thread whose GS base is zero passes everything. Stacks lie so high that the base has to be
    /// negative: `wrgsbase` sets such a one, arch_prctl(2) and ptrace(2) refuse it.
    Segment,
    /// In 2^45..2^46, which no program uses: at 2^45 + (address + [`Constants::displacement`]) mod 2^45, with a displacement in
    /// 0..2^45. For programs whose stacks may lie both in low and in high memory. Needs BMI2.
    Folded,
}

impl ShadowForm {
    /// Where slots of [`ShadowForm::Folded`] lie. The last may reach over the end by up to 7 bytes.
    pub const FOLDED: Range<u64> = 1 << 45..1 << 46;

    /// The slot for the return address at `at`, in a process or thread with this displacement.
    #[must_use]
    pub const fn slot(self, at: u64, displacement: i64) -> u64 {
        let moved = at.wrapping_add_signed(displacement);
        match self {
            Self::Displaced | Self::Segment => moved,
            Self::Folded => Self::FOLDED.start | (moved & (Self::FOLDED.start - 1)),
        }
    }
}

/// The destinations that indirect calls and jumps may have in a process: a byte for each value of their lower 32 bits, zero for
/// those that trap. Mostly address space that is never touched; no destination, however wild, makes a check fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TargetTable;

impl TargetTable {
    /// Length, bytes.
    pub const SIZE: u64 = 1 << 32;

    /// Where in the table the byte of `destination` is.
    #[must_use]
    pub const fn index(destination: u64) -> u64 {
        destination & (Self::SIZE - 1)
    }
}

/// A table of one byte per system call: zero lets it pass, everything else traps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyscallTable;

impl SyscallTable {
    /// Length, bytes.
    pub const SIZE: u64 = 1 << 16;

    /// Where in the table the byte of the call with this number is: the lower 16 bits select it.
    #[must_use]
    pub const fn index(number: u64) -> u64 {
        number & (Self::SIZE - 1)
    }
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
