//! Where an indirect jump may lead, told from how its destination came about.

use super::code::Stretch;
use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

/// Where it may lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Destination {
    /// To an address that was loaded, passed or returned as a whole: one that the program holds somewhere.
    Pointer,
    /// To a sum of an address and something loaded, as jump tables have it.
    Table,
    /// The destination came about where it was not looked for.
    Unseen,
    /// It was computed in another way.
    Computed,
}

/// How far back the destination is followed, instructions.
const LOOK_BACK: usize = 32;

/// Judges the jump at `at`, in code that begins at `floor`.
pub(super) fn destination(stretch: &Stretch, at: u64, floor: u64) -> Destination {
    let Some(jump) = stretch.decode(at) else { return Destination::Computed };
    if jump.op0_kind() == OpKind::Memory {
        return Destination::Pointer;
    }
    let mut wanted = jump.op0_register().full_register();
    let mut factory = InstructionInfoFactory::new();
    let mut here = at;
    for _ in 0..LOOK_BACK {
        if here == floor {
            // As it was passed.
            return Destination::Pointer;
        }
        let Some(before) = stretch.previous(here).filter(|before| before.ip() >= floor) else {
            return Destination::Unseen;
        };
        here = before.ip();
        if !writes(&mut factory, &before, wanted) {
            continue;
        }
        let from_register = before.op_count() > 1 && before.op1_kind() == OpKind::Register;
        return match before.mnemonic() {
            Mnemonic::Mov if from_register => {
                wanted = before.op1_register().full_register();
                continue;
            }
            Mnemonic::Mov if before.op0_register().size() == 8 => Destination::Pointer,
            // Immediates of programs at a fixed address.
            Mnemonic::Mov if before.op1_kind() != OpKind::Memory => Destination::Pointer,
            Mnemonic::Lea if before.is_ip_rel_memory_operand() => Destination::Pointer,
            // Mangled pointers, as longjmp has them, and results of calls.
            Mnemonic::Pop | Mnemonic::Xor | Mnemonic::Ror | Mnemonic::Call => Destination::Pointer,
            Mnemonic::Cmove
            | Mnemonic::Cmovne
            | Mnemonic::Cmova
            | Mnemonic::Cmovae
            | Mnemonic::Cmovb
            | Mnemonic::Cmovbe
            | Mnemonic::Cmovg
            | Mnemonic::Cmovge
            | Mnemonic::Cmovl
            | Mnemonic::Cmovle
            | Mnemonic::Cmovs
            | Mnemonic::Cmovns => Destination::Pointer,
            Mnemonic::Add if from_register => Destination::Table,
            Mnemonic::Lea
                if before.memory_index() != Register::None
                    && before.memory_base() != Register::None
                    && before.memory_index_scale() == 1
                    && before.memory_displacement64() == 0 =>
            {
                Destination::Table
            }
            _ => Destination::Computed,
        };
    }
    Destination::Unseen
}

fn writes(factory: &mut InstructionInfoFactory, instruction: &Instruction, wanted: Register) -> bool {
    let is_call = instruction.mnemonic() == Mnemonic::Call;
    let kept = [Register::RBX, Register::RBP, Register::R12, Register::R13, Register::R14, Register::R15];
    (is_call && !kept.contains(&wanted))
        || factory.info(instruction).used_registers().iter().any(|used| {
            used.register().full_register() == wanted
                && matches!(
                    used.access(),
                    OpAccess::Write | OpAccess::ReadWrite | OpAccess::CondWrite | OpAccess::ReadCondWrite
                )
        })
}
