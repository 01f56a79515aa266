//! The code of the guards. None changes a flag, a register, memory that the program may use, or MXCSR: at a `ret` nothing is
//! assumed to be dead, since hand-written code returns values in all of them, and compilers know what their static functions
//! leave alone (gcc's -fipa-ra).

use super::{
    emit::{EmitError, Emitter},
    options::{ShadowStack, SyscallTable, TargetTable},
    places::Undo,
    relocate::destination_operand,
};
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
    /// Right below the stack pointer: at the beginning of a function and when it returns, nothing of it is there. The kernel
    /// leaves these bytes alone when it delivers a signal (psABI, "red zone").
    StackPointer,
    /// Below the red zone.
    RedZone,
}

/// How far the stack pointer is lowered for spills below the red zone, bytes.
const LOWERED: i64 = 0x90;
/// Numbers of rax, rcx, rdx in instructions.
const RAX: u8 = 0;
const RCX: u8 = 1;
const RDX: u8 = 2;

fn at_stack(displacement: i64) -> MemoryOperand {
    MemoryOperand::with_base_displ_size(Register::RSP, displacement, 8)
}

/// `push x(%rsp)` or `pop x(%rsp)`, x counted from the stack pointer before `push` and after `pop`.
fn transfer(emitter: &mut Emitter, code: Code, operand: MemoryOperand) -> Result<(), EmitError> {
    emitter.made(Instruction::with1(code, operand))
}

/// At the beginning of a function: copies the return address.
pub(super) fn copy_return_address(
    emitter: &mut Emitter,
    native: u64,
    shadow: ShadowStack,
    below: Below,
) -> Result<(), EmitError> {
    emitter.stands_for(native, Undo::default());
    let lowered = if below == Below::RedZone { LOWERED } else { 0 };
    if lowered != 0 {
        emitter.move_stack(-lowered)?;
    }
    let displacement = shadow.displacement.checked_add(lowered).ok_or(EmitError::OutOfReach)?;
    let undo = Undo::stack(lowered as i16);
    if i32::try_from(displacement).is_ok() {
        emitter.stands_for(native, undo);
        transfer(emitter, Code::Push_rm64, at_stack(lowered))?;
        emitter.stands_for(native, Undo::stack(lowered as i16 + 8));
        transfer(emitter, Code::Pop_rm64, at_stack(displacement))?;
    } else {
        // The word that `push` writes lies between the spilled register and the stack pointer.
        let spill = if lowered == 0 { -16 } else { 0 };
        emitter.stands_for(native, undo);
        emitter.store(at_stack(spill), Register::RCX)?;
        emitter.stands_for(native, undo.with(RCX, spill as i16));
        emitter.made(Instruction::with2(Code::Mov_r64_imm64, Register::RCX, displacement))?;
        transfer(emitter, Code::Push_rm64, at_stack(lowered))?;
        emitter.stands_for(native, Undo::stack(lowered as i16 + 8).with(RCX, spill as i16 + 8));
        let slot = MemoryOperand::with_base_index(Register::RSP, Register::RCX);
        transfer(emitter, Code::Pop_rm64, slot)?;
        emitter.stands_for(native, undo.with(RCX, spill as i16));
        emitter.load(Register::RCX, at_stack(spill))?;
    }
    emitter.stands_for(native, undo);
    if lowered != 0 {
        emitter.move_stack(lowered)?;
    }
    Ok(())
}

/// In front of a return: goes to `trap` if the return address is not the one that was copied. Gives where the trap resumes.
pub(super) fn check_return_address(
    emitter: &mut Emitter,
    native: u64,
    shadow: ShadowStack,
    below: Below,
    trap: u64,
) -> Result<u64, EmitError> {
    emitter.stands_for(native, Undo::default());
    let lowered = if below == Below::RedZone { LOWERED } else { 0 };
    let (rcx, rax) = if lowered == 0 { (-8, -16) } else { (0, 8) };
    let undo = Undo::stack(lowered as i16);
    let saved = undo.with(RCX, rcx as i16).with(RAX, rax as i16);
    if lowered != 0 {
        emitter.move_stack(-lowered)?;
        emitter.stands_for(native, undo);
    }
    emitter.store(at_stack(rcx), Register::RCX)?;
    emitter.store(at_stack(rax), Register::RAX)?;
    emitter.stands_for(native, saved);
    let displacement = shadow.displacement.checked_add(lowered).ok_or(EmitError::OutOfReach)?;
    if i32::try_from(displacement).is_ok() {
        emitter.load(Register::RAX, at_stack(displacement))?;
    } else {
        emitter.made(Instruction::with2(Code::Mov_r64_imm64, Register::RAX, displacement))?;
        emitter.load(Register::RAX, MemoryOperand::with_base_index(Register::RSP, Register::RAX))?;
    }
    emitter.load(Register::RCX, at_stack(lowered))?;
    // copy - address, by what touches no flag.
    emitter.made(Instruction::with1(Code::Not_rm64, Register::RCX))?;
    emitter
        .lea(Register::RCX, MemoryOperand::with_base_index_scale_displ_size(Register::RCX, Register::RAX, 1, 1, 1))?;
    let equal = emitter.if_rcx_is_zero();
    // A copy of zero: the call was made before there were copies.
    emitter.made(Instruction::with2(Code::Mov_rm64_r64, Register::RCX, Register::RAX))?;
    let unknown = emitter.if_rcx_is_zero();
    restore(emitter, native, lowered, &[(Register::RCX, rcx), (Register::RAX, rax)])?;
    emitter.stands_for(native, Undo::default());
    emitter.jump(trap)?;
    emitter.land(&equal)?;
    emitter.land(&unknown)?;
    emitter.stands_for(native, saved);
    restore(emitter, native, lowered, &[(Register::RCX, rcx), (Register::RAX, rax)])?;
    Ok(emitter.here())
}

/// Loads what was spilled. Loading again does no harm, so that one undo describes all of it but the last step.
fn restore(emitter: &mut Emitter, native: u64, lowered: i64, registers: &[(Register, i64)]) -> Result<(), EmitError> {
    for &(register, at) in registers {
        emitter.load(register, at_stack(at))?;
    }
    if lowered != 0 {
        emitter.stands_for(native, Undo::stack(lowered as i16));
        emitter.move_stack(lowered)?;
    }
    Ok(())
}

/// In front of an indirect call or jump: goes to `trap` if the table does not hold its destination. Gives where the trap resumes.
pub(super) fn check_target(
    emitter: &mut Emitter,
    instruction: &Instruction,
    table: TargetTable,
    trap: u64,
) -> Result<u64, EmitError> {
    let native = instruction.ip();
    let lowered = LOWERED + 8;
    let (rcx, rdx, rax, spare) = (0, 8, 16, 24);
    let operand = destination_operand(instruction, lowered).ok_or(EmitError::Immovable)?;
    if operand == Err(Register::RSP) {
        return Err(EmitError::Immovable);
    }
    let registers = [(Register::RCX, rcx), (Register::RDX, rdx), (Register::RAX, rax)];
    let undo = Undo::stack(lowered as i16);
    let saved = undo.with(RCX, rcx as i16).with(RDX, rdx as i16).with(RAX, rax as i16);
    emitter.stands_for(native, Undo::default());
    emitter.move_stack(-lowered)?;
    emitter.stands_for(native, undo);
    for (register, at) in registers {
        emitter.store(at_stack(at), register)?;
    }
    emitter.stands_for(native, saved);
    match operand {
        Ok(memory) => emitter.load(Register::RCX, memory)?,
        Err(register) => emitter.made(Instruction::with2(Code::Mov_r64_rm64, Register::RCX, register))?,
    }
    let entry = |displacement: i64| {
        MemoryOperand::with_base_index_scale_displ_size(Register::RAX, Register::RDX, 8, displacement, 8)
    };
    let word = MemoryOperand::with_base_index(Register::RCX, Register::RDX);
    emitter.made(Instruction::with2(Code::Movzx_r32_rm16, Register::EDX, Register::CX))?;
    emitter.address_of(Register::RAX, table.at.0)?;
    emitter.load(Register::RDX, entry(0))?;
    emitter.lea(Register::RCX, word)?;
    let first = emitter.if_rcx_is_zero();
    // The destination again: the sum less the word, by what touches no flag.
    emitter.made(Instruction::with1(Code::Not_rm64, Register::RDX))?;
    let less = MemoryOperand::with_base_index_scale_displ_size(Register::RCX, Register::RDX, 1, 1, 1);
    emitter.lea(Register::RCX, less)?;
    emitter.store(at_stack(spare), Register::RCX)?;
    emitter.made(Instruction::with2(Code::Movzx_r32_rm16, Register::EDX, at_stack(spare + 1)))?;
    emitter.load(Register::RDX, entry(1 << 19))?;
    emitter.lea(Register::RCX, word)?;
    let second = emitter.if_rcx_is_zero();
    restore(emitter, native, lowered, &registers)?;
    emitter.stands_for(native, Undo::default());
    emitter.jump(trap)?;
    emitter.land(&first)?;
    emitter.land(&second)?;
    emitter.stands_for(native, saved);
    restore(emitter, native, lowered, &registers)?;
    Ok(emitter.here())
}

/// In front of `syscall`: goes to `trap` if the table stops it. rcx and r11 are free: `syscall` itself overwrites them. Gives
/// where the trap resumes.
pub(super) fn check_syscall(
    emitter: &mut Emitter,
    native: u64,
    table: SyscallTable,
    trap: u64,
) -> Result<u64, EmitError> {
    emitter.stands_for(native, Undo::default());
    emitter.made(Instruction::with2(Code::Movzx_r32_rm16, Register::ECX, Register::AX))?;
    emitter.address_of(Register::R11, table.at.0)?;
    let byte = MemoryOperand::with_base_index(Register::R11, Register::RCX);
    emitter.made(Instruction::with2(Code::Movzx_r32_rm8, Register::ECX, byte))?;
    let allowed = emitter.if_rcx_is_zero();
    emitter.jump(trap)?;
    emitter.land(&allowed)?;
    Ok(emitter.here())
}
