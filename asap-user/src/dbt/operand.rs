//! What an indirect call or jump reads its destination from, for whoever judges a thread that a guard has stopped in front of it.

use super::relocate::destination_operand;
use crate::address::{ImageOffset, LoadBias};
use iced_x86::{Instruction, MemoryOperand, Register};
use serde::{Deserialize, Serialize};

/// A register or a memory operand. Registers are named by their numbers in instructions: 0 rax, 1 rcx, 2 rdx, 3 rbx, 4 rsp, 5 rbp,
/// 6 rsi, 7 rdi, 8..15.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operand {
    /// The register holds it.
    Register(u8),
    /// The 8 bytes hold it at the sum of all these, modulo 2^64.
    Memory {
        /// What it is relative to.
        base: Base,
        /// A register and what it is multiplied by (1, 2, 4, 8).
        index: Option<(u8, u8)>,
        /// What is added.
        displacement: i64,
    },
}

/// What a memory operand is relative to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Base {
    /// Nothing, in the segment.
    Absolute(Segment),
    /// A register, in the segment.
    Register(u8, Segment),
    /// The load bias of the image: the displacement is an [`ImageOffset`].
    Image(Segment),
}

/// Which segment's base is added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Segment {
    /// None.
    Flat,
    /// FS.
    Fs,
    /// GS.
    Gs,
}

/// What of a stopped thread tells the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers {
    /// General registers by number.
    pub general: [u64; 16],
    /// FS base.
    pub fs_base: u64,
    /// GS base.
    pub gs_base: u64,
}

/// Where a destination is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// This is it.
    Value(u64),
    /// The 8 bytes at this address.
    At(u64),
}

impl Operand {
    /// The operand of an indirect call or jump; `None`: it can't be told.
    pub(super) fn of(instruction: &Instruction) -> Option<Self> {
        match destination_operand(instruction, 0)? {
            Err(register) => Some(Self::Register(number(register)?)),
            Ok(memory) => Self::of_memory(&memory),
        }
    }

    fn of_memory(memory: &MemoryOperand) -> Option<Self> {
        let segment = match memory.segment_prefix {
            Register::FS => Segment::Fs,
            Register::GS => Segment::Gs,
            _ => Segment::Flat,
        };
        let base = match memory.base {
            Register::None => Base::Absolute(segment),
            Register::RIP => Base::Image(segment),
            register => Base::Register(number(register)?, segment),
        };
        let index = match memory.index {
            Register::None => None,
            register => Some((number(register)?, u8::try_from(memory.scale).ok()?)),
        };
        Some(Self::Memory { base, index, displacement: memory.displacement })
    }

    /// Where the destination is, for a thread with these registers that stands at the instruction, in an image with this bias.
    #[must_use]
    pub fn find(&self, registers: &Registers, bias: LoadBias) -> Found {
        let general = |number: u8| registers.general[usize::from(number & 15)];
        match *self {
            Self::Register(number) => Found::Value(general(number)),
            Self::Memory { base, index, displacement } => {
                let (start, segment) = match base {
                    Base::Absolute(segment) => (0, segment),
                    Base::Register(number, segment) => (general(number), segment),
                    Base::Image(segment) => (ImageOffset(0).in_target(bias).0, segment),
                };
                let segment = match segment {
                    Segment::Flat => 0,
                    Segment::Fs => registers.fs_base,
                    Segment::Gs => registers.gs_base,
                };
                let scaled = index.map_or(0, |(number, scale)| general(number).wrapping_mul(u64::from(scale)));
                Found::At(start.wrapping_add(scaled).wrapping_add_signed(displacement).wrapping_add(segment))
            }
        }
    }
}

/// The number of a 64-bit general register.
fn number(register: Register) -> Option<u8> {
    register.is_gpr64().then(|| register.number() as u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn found(bytes: &[u8]) -> Option<Found> {
        let instruction = Decoder::with_ip(64, bytes, 0x1000, DecoderOptions::NONE).decode();
        let mut general = [0; 16];
        for (index, register) in general.iter_mut().enumerate() {
            *register = 0x10_0000 * (index as u64 + 1);
        }
        let registers = Registers { general, fs_base: 0x7_0000_0000, gs_base: 0 };
        Operand::of(&instruction).map(|operand| operand.find(&registers, LoadBias(0x5555_0000_0000)))
    }

    #[test]
    fn destinations_are_found_from_the_registers_of_a_thread() {
        assert_eq!(found(&[0xff, 0xd0]), Some(Found::Value(0x10_0000)), "call *%rax");
        assert_eq!(found(&[0x41, 0xff, 0xe3]), Some(Found::Value(0xc0_0000)), "jmp *%r11");
        assert_eq!(found(&[0xff, 0x50, 0xf8]), Some(Found::At(0x0f_fff8)), "call *-8(%rax)");
        assert_eq!(
            found(&[0xff, 0x64, 0xcc, 0x10]),
            Some(Found::At(0x50_0010 + 8 * 0x20_0000)),
            "jmp *16(%rsp,%rcx,8)"
        );
        let relative = [0xff, 0x25, 0x00, 0x01, 0x00, 0x00];
        assert_eq!(found(&relative), Some(Found::At(0x5555_0000_1106)), "jmp *0x100(%rip)");
        let thread_local = [0x64, 0xff, 0x14, 0x25, 0x10, 0x00, 0x00, 0x00];
        assert_eq!(found(&thread_local), Some(Found::At(0x7_0000_0010)), "call *%fs:16");
        assert_eq!(found(&[0x67, 0xff, 0x10]), None, "call *(%eax): not by 32-bit addresses");
    }
}
