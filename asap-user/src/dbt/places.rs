//! The way back: what each byte of a fragment stands for in native code, and where in fragments displaced native instructions
//! are. With it a thread can be moved out of a fragment, or into one, wherever it stands.

use crate::address::ImageOffset;
use serde::{Deserialize, Serialize};

/// A general register that a guard uses for its own purposes, by its number in instructions (0 rax, 1 rcx, 2 rdx,
/// 3 rbx, 4 rsp, 5 rbp, 6 rsi, 7 rdi, 8..15).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Its number.
    pub register: u8,
    /// Where its value lies, relative to the stack pointer as it is then.
    pub at: i16,
}

/// What must be undone before native code can go on: first registers are loaded, then the stack pointer is moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undo {
    /// Registers to load.
    pub saved: [Option<Saved>; 3],
    /// What is added to the stack pointer.
    pub stack: i16,
}

impl Undo {
    pub(super) fn stack(bytes: i16) -> Self {
        Self { stack: bytes, ..Self::default() }
    }

    pub(super) fn with(mut self, register: u8, at: i16) -> Self {
        if let Some(free) = self.saved.iter_mut().find(|saved| saved.is_none()) {
            *free = Some(Saved { register, at });
        }
        self
    }
}

/// From here on, up to the next place, code stands for one native instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Where.
    pub at: ImageOffset,
    /// A thread here goes on at this native address, as soon as `undo` is done.
    pub native: ImageOffset,
    /// What to do first.
    pub undo: Undo,
}

/// A native instruction whose bytes are no longer there, or not reached any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Displaced {
    /// Its native address.
    pub native: ImageOffset,
    /// A thread that stands there goes on here.
    pub fragment: ImageOffset,
    /// The native bytes are overwritten: a thread can't stay.
    pub is_overwritten: bool,
}
