//! Fragments as they are written: instructions one after the other at a known address, and the places they stand for.

use super::places::{Place, Undo};
use crate::address::ImageOffset;
use iced_x86::{Code, Encoder, Instruction, MemoryOperand, Register};

/// Why something can't be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum EmitError {
    /// It can't be done elsewhere than where it is.
    #[error("the instruction can't be moved")]
    Immovable,
    /// The cache is too far away.
    #[error("a distance exceeds 2 GiB")]
    OutOfReach,
    /// No trap slot is left.
    #[error("all trap slots are used")]
    Full,
}

/// Code at an address, growing.
pub(super) struct Emitter {
    start: u64,
    bytes: Vec<u8>,
    pub(super) places: Vec<Place>,
    /// Distances of jumps to native addresses: where the four bytes are, and the address.
    exits: Vec<(usize, u64)>,
}

/// A short jump whose distance is not known yet.
pub(super) struct Forward(usize);

impl Emitter {
    pub(super) fn new(start: u64) -> Self {
        Self { start, bytes: Vec::new(), places: Vec::new(), exits: Vec::new() }
    }

    pub(super) fn here(&self) -> u64 {
        self.start.wrapping_add(self.bytes.len() as u64)
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn finish(self) -> (Vec<u8>, Vec<Place>) {
        (self.bytes, self.places)
    }

    /// What follows stands for the native instruction at `native`.
    pub(super) fn stands_for(&mut self, native: u64, undo: Undo) {
        let at = ImageOffset(self.here());
        if self.places.last().is_some_and(|last| last.at == at) {
            self.places.pop();
        }
        self.places.push(Place { at, native: ImageOffset(native), undo });
    }

    pub(super) fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub(super) fn patch(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.bytes.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    /// Encodes an instruction; what it refers to relative to itself is referred to from here.
    pub(super) fn instruction(&mut self, instruction: &Instruction) -> Result<(), EmitError> {
        let mut encoder = Encoder::new(64);
        encoder.encode(instruction, self.here()).map_err(|_| EmitError::OutOfReach)?;
        self.bytes.extend_from_slice(&encoder.take_buffer());
        Ok(())
    }

    /// An instruction of two operands.
    pub(super) fn load(&mut self, register: Register, from: MemoryOperand) -> Result<(), EmitError> {
        self.made(Instruction::with2(Code::Mov_r64_rm64, register, from))
    }

    pub(super) fn store(&mut self, to: MemoryOperand, register: Register) -> Result<(), EmitError> {
        self.made(Instruction::with2(Code::Mov_rm64_r64, to, register))
    }

    pub(super) fn lea(&mut self, register: Register, of: MemoryOperand) -> Result<(), EmitError> {
        self.made(Instruction::with2(Code::Lea_r64_m, register, of))
    }

    pub(super) fn made(&mut self, made: Result<Instruction, iced_x86::IcedError>) -> Result<(), EmitError> {
        self.instruction(&made.map_err(|_| EmitError::Immovable)?)
    }

    /// Moves the stack pointer without touching flags.
    pub(super) fn move_stack(&mut self, by: i64) -> Result<(), EmitError> {
        self.lea(Register::RSP, MemoryOperand::with_base_displ(Register::RSP, by))
    }

    /// `lea to(%rip), register`.
    pub(super) fn address_of(&mut self, register: Register, to: u64) -> Result<(), EmitError> {
        self.lea(register, MemoryOperand::with_base_displ(Register::RIP, to.cast_signed()))
    }

    /// `jmp to`.
    pub(super) fn jump(&mut self, to: u64) -> Result<(), EmitError> {
        let distance = distance(self.here().wrapping_add(5), to)?;
        self.bytes.push(0xe9);
        self.raw(&distance.to_le_bytes());
        Ok(())
    }

    /// The distance of a jump to the native address `to`, which ends the instruction.
    pub(super) fn exit(&mut self, to: u64) -> Result<(), EmitError> {
        let distance = distance(self.here().wrapping_add(4), to)?;
        self.exits.push((self.bytes.len(), to));
        self.raw(&distance.to_le_bytes());
        Ok(())
    }

    /// Jumps to native instructions whose fragment is known go there at once.
    pub(super) fn link(&mut self, fragment_of: impl Fn(u64) -> Option<u64>) -> Result<(), EmitError> {
        for (at, to) in std::mem::take(&mut self.exits) {
            if let Some(fragment) = fragment_of(to) {
                let next = self.start.wrapping_add(at as u64 + 4);
                self.patch(at, &distance(next, fragment)?.to_le_bytes());
            }
        }
        Ok(())
    }

    /// `jrcxz` to a place that follows.
    pub(super) fn if_rcx_is_zero(&mut self) -> Forward {
        self.raw(&[0xe3, 0]);
        Forward(self.bytes.len())
    }

    /// `jmp` to a place that follows soon.
    pub(super) fn skip(&mut self) -> Forward {
        self.raw(&[0xeb, 0]);
        Forward(self.bytes.len())
    }

    /// The place that `from` leads to.
    pub(super) fn land(&mut self, from: &Forward) -> Result<(), EmitError> {
        let distance = i8::try_from(self.bytes.len() - from.0).map_err(|_| EmitError::OutOfReach)?;
        self.patch(from.0 - 1, &distance.to_le_bytes());
        Ok(())
    }
}

/// The distance from `next` to `to`, if 32 bits hold it.
pub(super) fn distance(next: u64, to: u64) -> Result<i32, EmitError> {
    i32::try_from(to.wrapping_sub(next).cast_signed()).map_err(|_| EmitError::OutOfReach)
}
