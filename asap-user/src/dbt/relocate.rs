//! Instructions that run elsewhere than where they were, with the same effect: what they address relative to themselves and
//! where they jump stay the same, and calls push the native return address.

use super::{
    code::{INSTRUCTION_MOST, Stretch},
    emit::{EmitError, Emitter, distance},
    places::Undo,
};
use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, MemoryOperand, OpKind, Register};

/// Whether [`relocate`] knows how.
pub(super) fn can_move(instruction: &Instruction) -> bool {
    if instruction.is_ip_rel_memory_operand() && instruction.memory_base() != Register::RIP {
        return false;
    }
    match instruction.flow_control() {
        FlowControl::Next | FlowControl::Exception | FlowControl::Interrupt => true,
        FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch => {
            instruction.op0_kind() == OpKind::NearBranch64 && branch_opcode(instruction).is_some()
        }
        FlowControl::Call => instruction.code() == Code::Call_rel32_64 || instruction.code() == Code::Syscall,
        FlowControl::IndirectCall => {
            instruction.code() == Code::Call_rm64 && instruction.op0_register() != Register::RSP
        }
        FlowControl::IndirectBranch => instruction.code() == Code::Jmp_rm64,
        FlowControl::Return => matches!(instruction.code(), Code::Retnq | Code::Retnq_imm16),
        FlowControl::XbeginXabortXend => instruction.code() != Code::Xbegin_rel16,
    }
}

/// First bytes of the form with a 32-bit distance, or, where there is none, of the short form.
enum Opcode {
    Long(Vec<u8>),
    Short(Vec<u8>),
}

fn branch_opcode(instruction: &Instruction) -> Option<Opcode> {
    if instruction.flow_control() == FlowControl::UnconditionalBranch {
        return Some(Opcode::Long(vec![0xe9]));
    }
    if instruction.is_jcc_short_or_near() {
        // iced numbers conditions from 1 in the order of their encoding.
        let condition = (instruction.condition_code() as u8).checked_sub(1).filter(|&condition| condition < 16)?;
        return Some(Opcode::Long(vec![0x0f, 0x80 | condition]));
    }
    Some(Opcode::Short(match instruction.code() {
        Code::Loopne_rel8_64_RCX => vec![0xe0],
        Code::Loope_rel8_64_RCX => vec![0xe1],
        Code::Loop_rel8_64_RCX => vec![0xe2],
        Code::Jrcxz_rel8_64 => vec![0xe3],
        Code::Loopne_rel8_64_ECX => vec![0x67, 0xe0],
        Code::Loope_rel8_64_ECX => vec![0x67, 0xe1],
        Code::Loop_rel8_64_ECX => vec![0x67, 0xe2],
        Code::Jecxz_rel8_64 => vec![0x67, 0xe3],
        _ => return None,
    }))
}

/// Writes `instruction`, which lies in `stretch`, at the emitter's place.
pub(super) fn relocate(emitter: &mut Emitter, stretch: &Stretch, instruction: &Instruction) -> Result<(), EmitError> {
    if !can_move(instruction) {
        return Err(EmitError::Immovable);
    }
    let native = instruction.ip();
    emitter.stands_for(native, Undo::default());
    match instruction.flow_control() {
        FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch => branch(emitter, instruction),
        FlowControl::Call if instruction.op0_kind() == OpKind::NearBranch64 => {
            let to = instruction.near_branch_target();
            push_return_address(emitter, instruction)?;
            // The return address lies on the stack: the thread is as good as in the callee.
            emitter.stands_for(to, Undo::default());
            jump(emitter, to)
        }
        FlowControl::IndirectCall => {
            push_return_address(emitter, instruction)?;
            emitter.stands_for(native, Undo::stack(8));
            emitter.instruction(&as_jump(instruction))
        }
        FlowControl::XbeginXabortXend if instruction.op0_kind() == OpKind::NearBranch64 => {
            let to = instruction.near_branch_target();
            let to = distance(emitter.here().wrapping_add(6), to)?;
            emitter.raw(&[0xc7, 0xf8]);
            emitter.raw(&to.to_le_bytes());
            Ok(())
        }
        _ => copy(emitter, stretch, instruction),
    }
}

/// `jmp` to a native address.
pub(super) fn jump(emitter: &mut Emitter, to: u64) -> Result<(), EmitError> {
    emitter.raw(&[0xe9]);
    emitter.exit(to)
}

fn branch(emitter: &mut Emitter, instruction: &Instruction) -> Result<(), EmitError> {
    let to = instruction.near_branch_target();
    match branch_opcode(instruction).ok_or(EmitError::Immovable)? {
        Opcode::Long(opcode) => {
            emitter.raw(&opcode);
            emitter.exit(to)?;
        }
        Opcode::Short(opcode) => {
            // Taken: over a short jump, to a long one. What has happened by then must not happen again.
            emitter.raw(&opcode);
            emitter.raw(&[2]);
            emitter.stands_for(instruction.next_ip(), Undo::default());
            let not_taken = emitter.skip();
            emitter.stands_for(to, Undo::default());
            jump(emitter, to)?;
            emitter.land(&not_taken)?;
        }
    }
    Ok(())
}

/// The native return address goes onto the stack, so that whoever looks at the stack sees what it would have seen. What lies
/// below it is the callee's. By a call, over a byte of padding: the return will be predicted wrongly, but the ones after it will
/// not, since the processor's own stack of return addresses stays balanced.
fn push_return_address(emitter: &mut Emitter, instruction: &Instruction) -> Result<(), EmitError> {
    let native = instruction.ip();
    let spill = MemoryOperand::with_base_displ_size(Register::RSP, -8, 1);
    let pushed = MemoryOperand::with_base(Register::RSP);
    emitter.raw(&[0xe8, 1, 0, 0, 0, 0xcc]);
    emitter.stands_for(native, Undo::stack(8));
    emitter.store(spill, Register::RAX)?;
    emitter.stands_for(native, Undo::stack(8).with(0, -8));
    emitter.address_of(Register::RAX, instruction.next_ip())?;
    emitter.store(pushed, Register::RAX)?;
    emitter.load(Register::RAX, spill)
}

/// `call *x` as `jmp *x`, once the return address has been pushed.
fn as_jump(call: &Instruction) -> Instruction {
    let mut jump = *call;
    jump.set_code(Code::Jmp_rm64);
    if call.op0_kind() == OpKind::Memory && call.memory_base() == Register::RSP {
        jump.set_memory_displacement64(call.memory_displacement64().wrapping_add(8));
        jump.set_memory_displ_size(8);
    }
    jump
}

/// The same bytes; only a distance to data changes.
fn copy(emitter: &mut Emitter, stretch: &Stretch, instruction: &Instruction) -> Result<(), EmitError> {
    let bytes = stretch.tail(instruction.ip(), instruction.len() as u64);
    let field = emitter.len();
    emitter.raw(bytes);
    if instruction.is_ip_rel_memory_operand() {
        let mut decoder = Decoder::with_ip(
            64,
            stretch.tail(instruction.ip(), INSTRUCTION_MOST),
            instruction.ip(),
            DecoderOptions::NONE,
        );
        let again = decoder.decode();
        let offsets = decoder.get_constant_offsets(&again);
        if offsets.displacement_size() != 4 || instruction.memory_base() != Register::RIP {
            return Err(EmitError::Immovable);
        }
        let to = distance(emitter.here(), instruction.ip_rel_memory_address())?;
        emitter.patch(field + offsets.displacement_offset(), &to.to_le_bytes());
    }
    Ok(())
}

/// What a jump or call through `instruction` reads, as an operand for `mov`, once the stack pointer is `lowered` bytes lower.
pub(super) fn destination_operand(instruction: &Instruction, lowered: i64) -> Option<Result<MemoryOperand, Register>> {
    match instruction.op0_kind() {
        OpKind::Register => Some(Err(instruction.op0_register())),
        OpKind::Memory => {
            let mut displacement = instruction.memory_displacement64().cast_signed();
            let has_register =
                instruction.memory_base() != Register::None || instruction.memory_index() != Register::None;
            if instruction.memory_base() == Register::RSP {
                displacement = displacement.wrapping_add(lowered);
            }
            Some(Ok(MemoryOperand::new(
                instruction.memory_base(),
                instruction.memory_index(),
                instruction.memory_index_scale(),
                displacement,
                u32::from(displacement != 0 || instruction.memory_base() == Register::RIP || !has_register),
                false,
                instruction.segment_prefix(),
            )))
        }
        _ => None,
    }
}
