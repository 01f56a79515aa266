//! What became of the instructions that a guard or a patch is about: nothing is guessed, so what could not be done is counted
//! with its reason.

use super::analysis::Unrecovered;
use std::{collections::BTreeMap, fmt};

/// What a guard or a patch is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SiteKind {
    /// Beginning of a function, where the return address is copied.
    Entry,
    /// `ret`.
    Return,
    /// A jump to another function, which returns to the caller.
    TailJump,
    /// `call` through a register or memory.
    IndirectCall,
    /// `jmp` through a register or memory.
    IndirectJump,
    /// `syscall`.
    Syscall,
    /// An instruction that a patch diverts.
    Patch,
}

/// How room for the jump to the fragment was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Form {
    /// In the instruction itself.
    Own,
    /// With instructions behind it.
    Forward,
    /// With padding behind it.
    Padding,
    /// With instructions in front of it; it runs in the fragment.
    Backward,
    /// With instructions in front of it; it stays where it is.
    Before,
    /// A short jump to padding near by.
    Short,
    /// A short jump to room that other instructions were moved away for.
    Evicted,
    /// It lies in what another site has displaced.
    Shared,
}

/// Why a site needs nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Needless {
    /// The function writes no memory and calls nothing.
    Leaf,
    /// The destination is read from memory that nothing can write.
    ReadOnly,
}

/// Why a site runs natively.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// There is no room for a jump.
    NoRoom,
    /// The function is not understood.
    Unrecovered(Unrecovered),
    /// It returns to what was not the caller's return address, or from a frame that the unwind tables don't describe.
    NotAReturn,
    /// Beginnings of the function could not be guarded, so that nothing is known of its returns.
    Unpaired,
    /// Restartable sequence, or otherwise not to be touched.
    Untouched,
    /// It can't be encoded elsewhere.
    Immovable,
    /// There is no instruction there.
    NotAnInstruction,
}

/// What became of a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Outcome {
    /// It is guarded or diverted.
    Done(Form),
    /// It need not be.
    Needless(Needless),
    /// It runs natively.
    Native(Reason),
}

/// How many sites of which kind became what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts(pub BTreeMap<(SiteKind, Outcome), u64>);

impl Counts {
    pub(super) fn add(&mut self, kind: SiteKind, outcome: Outcome) {
        *self.0.entry((kind, outcome)).or_default() += 1;
    }

    /// Adds what another translation counted.
    pub fn merge(&mut self, other: &Self) {
        for (key, count) in &other.0 {
            *self.0.entry(*key).or_default() += count;
        }
    }

    /// Sites of `kind` for which `wanted` holds.
    #[must_use]
    pub fn of(&self, kind: SiteKind, wanted: impl Fn(Outcome) -> bool) -> u64 {
        self.0.iter().filter(|((k, outcome), _)| *k == kind && wanted(*outcome)).map(|(_, count)| count).sum()
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for ((kind, outcome), count) in &self.0 {
            writeln!(f, "{kind:?} {outcome:?} {count}")?;
        }
        Ok(())
    }
}
