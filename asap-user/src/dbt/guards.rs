//! The code of the guards. None changes a flag, a register, memory that the program may use, or MXCSR: at a `ret` nothing is
//! assumed to be dead, since hand-written code returns values in all registers, and compilers know what their static functions
//! leave alone (gcc's -fipa-ra). What each sequence costs, and what else was tried, is in docs/translator.md.

use super::{
    emit::{EmitError, Emitter},
    options::{Constants, ShadowForm},
    places::Undo,
    relocate::destination_operand,
};
use crate::address::ImageOffset;
use iced_x86::{Code, Instruction, MemoryOperand, Register};
use serde::{Deserialize, Serialize};

/// What a thread that is parked in a trap slot was about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TrapReason {
    /// To return to another address than it was called from.
    Return,
    /// To call or jump to an address that the table does not hold: new, or wrong.
    Target,
    /// To make a system call that the table stops.
    Syscall,
}

/// Where spilled registers may lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Below {
    /// Right below the stack pointer: at the beginning of a function, when it returns and when it calls, nothing of it is there.
    /// The kernel leaves these bytes alone when it delivers a signal (psABI, "red zone").
    StackPointer,
    /// Below the red zone.
    RedZone,
}

impl Below {
    /// How far the stack pointer is lowered for spills, bytes.
    fn lowered(self) -> i64 {
        match self {
            Self::StackPointer => 0,
            Self::RedZone => 0x90,
        }
    }
}

/// The first is what `jrcxz` looks at. The second is one that hardly any code waits for: a value that was spilled and loaded
/// again arrives five cycles late.
const FIRST: (Register, u8) = (Register::RCX, 1);
const SECOND: (Register, u8) = (Register::R11, 11);
const THIRD: (Register, u8) = (Register::R10, 10);

fn memory(base: Register, displacement: i64) -> MemoryOperand {
    MemoryOperand::with_base_displ_size(base, displacement, u32::from(displacement != 0))
}

fn sum(base: Register, index: Register, displacement: i64) -> MemoryOperand {
    let size = u32::from(displacement != 0);
    MemoryOperand::with_base_index_scale_displ_size(base, index, 1, displacement, size)
}

fn at_stack(displacement: i64) -> MemoryOperand {
    memory(Register::RSP, displacement)
}

/// How guards are made in one image.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guards {
    pub(super) constants: ImageOffset,
    pub(super) shadow: ShadowForm,
}

/// Registers that are in use for a guard, with the stack pointer perhaps lowered.
struct Spill<'a> {
    native: u64,
    lowered: i64,
    registers: &'a [((Register, u8), i64)],
}

impl Spill<'_> {
    fn undo(&self) -> Undo {
        self.registers
            .iter()
            .fold(Undo::stack(self.lowered as i16), |undo, &((_, number), at)| undo.with(number, at as i16))
    }

    fn save(&self, emitter: &mut Emitter) -> Result<(), EmitError> {
        emitter.stands_for(self.native, Undo::default());
        if self.lowered != 0 {
            emitter.move_stack(-self.lowered)?;
            emitter.stands_for(self.native, Undo::stack(self.lowered as i16));
        }
        for &((register, _), at) in self.registers {
            emitter.store(at_stack(at), register)?;
        }
        emitter.stands_for(self.native, self.undo());
        Ok(())
    }

    /// Loads what was spilled. Loading again does no harm, so that one undo describes all of it but the last step.
    fn restore(&self, emitter: &mut Emitter) -> Result<(), EmitError> {
        for &((register, _), at) in self.registers {
            emitter.load(register, at_stack(at))?;
        }
        if self.lowered != 0 {
            emitter.stands_for(self.native, Undo::stack(self.lowered as i16));
            emitter.move_stack(self.lowered)?;
        }
        emitter.stands_for(self.native, Undo::default());
        Ok(())
    }

    /// Restores, and goes to `trap`.
    fn leave_for(&self, emitter: &mut Emitter, trap: u64) -> Result<(), EmitError> {
        self.restore(emitter)?;
        emitter.jump(trap)?;
        emitter.stands_for(self.native, self.undo());
        Ok(())
    }
}

impl Guards {
    fn constant(self, at: u64) -> MemoryOperand {
        MemoryOperand::with_base_displ(Register::RIP, self.constants.0.wrapping_add(at).cast_signed())
    }

    /// The slot of the return address at `lowered` above the stack pointer; `scratch` is used for it unless there is no need.
    fn slot(self, emitter: &mut Emitter, scratch: Register, lowered: i64) -> Result<MemoryOperand, EmitError> {
        match self.shadow {
            ShadowForm::Segment => {
                let mut slot = at_stack(lowered);
                slot.segment_prefix = Register::GS;
                Ok(slot)
            }
            ShadowForm::Displaced => {
                emitter.load(scratch, self.constant(Constants::DISPLACEMENT))?;
                Ok(sum(Register::RSP, scratch, lowered))
            }
            ShadowForm::Folded => {
                let low = match scratch {
                    Register::RCX => Register::CL,
                    Register::R11 => Register::R11L,
                    _ => return Err(EmitError::Immovable),
                };
                let turn = |by: u32| Instruction::with3(Code::VEX_Rorx_r64_rm64_imm8, scratch, scratch, by);
                emitter.load(scratch, self.constant(Constants::DISPLACEMENT))?;
                emitter.lea(scratch, sum(Register::RSP, scratch, lowered))?;
                // Bits 45 and up come to lie at 0 and up, become 1, and go back.
                emitter.made(turn(45))?;
                emitter.made(Instruction::with2(Code::Mov_r8_imm8, low, 1))?;
                emitter.made(turn(19))?;
                Ok(memory(scratch, 0))
            }
        }
    }

    /// At the beginning of a function: copies the return address.
    pub(super) fn copy_return_address(self, emitter: &mut Emitter, native: u64, below: Below) -> Result<(), EmitError> {
        let lowered = below.lowered();
        // Not by `push` and `pop`: they take more time than two registers that are spilled.
        let (at, at_second) = if lowered == 0 { (-8, -16) } else { (0, 8) };
        let registers = [(SECOND, at), (THIRD, at_second)];
        let count = if self.shadow == ShadowForm::Segment { 1 } else { 2 };
        let spill = Spill { native, lowered, registers: &registers[..count] };
        spill.save(emitter)?;
        let value = registers[count - 1].0.0;
        let slot = self.slot(emitter, SECOND.0, lowered)?;
        emitter.load(value, at_stack(lowered))?;
        emitter.store(slot, value)?;
        spill.restore(emitter)
    }

    /// In front of a return: goes to `trap` if the return address is not the one that was copied. Gives where the trap resumes.
    pub(super) fn check_return_address(
        self,
        emitter: &mut Emitter,
        native: u64,
        below: Below,
        trap: u64,
    ) -> Result<u64, EmitError> {
        let lowered = below.lowered();
        let registers = match below {
            Below::StackPointer => [(FIRST, -8), (SECOND, -16)],
            Below::RedZone => [(FIRST, 0), (SECOND, 8)],
        };
        let spill = Spill { native, lowered, registers: &registers };
        spill.save(emitter)?;
        let slot = self.slot(emitter, SECOND.0, lowered)?;
        emitter.load(SECOND.0, slot)?;
        emitter.load(FIRST.0, at_stack(lowered))?;
        // copy - address, by what touches no flag.
        emitter.made(Instruction::with1(Code::Not_rm64, FIRST.0))?;
        emitter.lea(FIRST.0, sum(FIRST.0, SECOND.0, 1))?;
        let equal = emitter.if_rcx_is_zero();
        spill.leave_for(emitter, trap)?;
        emitter.land(&equal)?;
        spill.restore(emitter)?;
        Ok(emitter.here())
    }

    /// In front of an indirect call or jump: goes to `trap` if the table does not hold its destination. Gives where the trap
    /// resumes.
    pub(super) fn check_target(
        self,
        emitter: &mut Emitter,
        instruction: &Instruction,
        below: Below,
        trap: u64,
    ) -> Result<u64, EmitError> {
        let lowered = below.lowered();
        let operand = destination_operand(instruction, lowered).ok_or(EmitError::Immovable)?;
        let registers = match below {
            Below::StackPointer => [(FIRST, -16), (SECOND, -24)],
            Below::RedZone => [(FIRST, 0), (SECOND, 8)],
        };
        let spill = Spill { native: instruction.ip(), lowered, registers: &registers };
        spill.save(emitter)?;
        // The lower half is enough for the table.
        match operand {
            Ok(memory) => emitter.made(Instruction::with2(Code::Mov_r32_rm32, Register::ECX, memory))?,
            Err(Register::RSP) => return Err(EmitError::Immovable),
            Err(register) => {
                emitter.made(Instruction::with2(Code::Mov_r32_rm32, Register::ECX, register.full_register32()))?;
            }
        }
        emitter.load(SECOND.0, self.constant(Constants::TARGETS))?;
        emitter.made(Instruction::with2(Code::Movzx_r32_rm8, Register::ECX, sum(SECOND.0, Register::RCX, 0)))?;
        let wrong = emitter.if_rcx_is_zero();
        spill.restore(emitter)?;
        let over = emitter.skip();
        emitter.land(&wrong)?;
        emitter.stands_for(instruction.ip(), spill.undo());
        spill.leave_for(emitter, trap)?;
        emitter.land(&over)?;
        emitter.stands_for(instruction.ip(), Undo::default());
        Ok(emitter.here())
    }

    /// In front of `syscall`: goes to `trap` if the table stops it. rcx and r11 are free: `syscall` itself overwrites them. Gives
    /// where the trap resumes.
    pub(super) fn check_syscall(self, emitter: &mut Emitter, native: u64, trap: u64) -> Result<u64, EmitError> {
        emitter.stands_for(native, Undo::default());
        emitter.made(Instruction::with2(Code::Movzx_r32_rm16, Register::ECX, Register::AX))?;
        emitter.load(Register::R11, self.constant(Constants::SYSCALLS))?;
        let byte = sum(Register::R11, Register::RCX, 0);
        emitter.made(Instruction::with2(Code::Movzx_r32_rm8, Register::ECX, byte))?;
        let allowed = emitter.if_rcx_is_zero();
        emitter.jump(trap)?;
        emitter.land(&allowed)?;
        Ok(emitter.here())
    }
}
