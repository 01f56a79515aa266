//! The entry of an old function: the jump that leads to the new one, and the displaced instructions, re-encoded elsewhere so that
//! the original stays callable. Not for writing anything into a process.
//!
//! Instructions are moved so that nobody can tell: the same memory is addressed, the same places are branched to, and a call
//! pushes the return address that it would have pushed in place. What can't be moved so is refused.

use crate::address::TargetAddr;
use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, OpKind, Register};
use std::ops::Range;
use thiserror::Error;

/// Instructions of an entry, for another place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelocatedPrologue {
    /// The moved instructions and a jump to what follows them in the function.
    pub bytes: Vec<u8>,
    /// How many bytes of the function they stand for.
    pub consumed: usize,
}

/// Why the entry of a function can't be moved.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum PrologueError {
    /// Not enough room for the jump.
    #[error("the function at {at} has {size} bytes, and a jump needs {minimum}; replace its callers instead")]
    TooShort {
        /// Entry.
        at: TargetAddr,
        /// Its size.
        size: usize,
        /// What is needed.
        minimum: usize,
    },
    /// Not code, or not the code of this function.
    #[error("the bytes at {at} are no instruction; has someone else modified the function?")]
    NotAnInstruction {
        /// Where.
        at: TargetAddr,
    },
    /// A breakpoint, most likely of a debugger.
    #[error("there is a breakpoint at {at}; end the debugger or tracer that put it there")]
    Breakpoint {
        /// Where.
        at: TargetAddr,
    },
    /// This kind of instruction.
    #[error("the instruction at {at} ({instruction}) can't be moved: {reason}; the original can't be kept callable")]
    Immovable {
        /// Where.
        at: TargetAddr,
        /// Its text.
        instruction: String,
        /// Why.
        reason: &'static str,
    },
    /// The rest of the function comes back to its beginning.
    #[error(
        "the instruction at {at} jumps back to {to}, among the instructions to be moved; the original can't be kept callable"
    )]
    BranchIntoWindow {
        /// The jump.
        at: TargetAddr,
        /// Its target.
        to: TargetAddr,
    },
    /// Data that an instruction addresses relative to itself is out of reach.
    #[error("the instruction at {at} addresses {to}, which is not within 2 GiB of the new place {destination}")]
    OutOfReach {
        /// Where.
        at: TargetAddr,
        /// What it addresses.
        to: TargetAddr,
        /// Where it would go.
        destination: TargetAddr,
    },
}

/// Moves the first instructions of a function, at least `minimum` bytes of them, to `destination`. `code` is the whole
/// function (to where the next one begins), which is at `at`.
pub fn relocate(
    code: &[u8],
    at: TargetAddr,
    minimum: usize,
    destination: TargetAddr,
) -> Result<RelocatedPrologue, PrologueError> {
    let too_short = PrologueError::TooShort { at, size: code.len(), minimum };
    if code.len() < minimum || minimum == 0 {
        return Err(too_short);
    }
    let mut window = Vec::new();
    let mut consumed = 0;
    let mut decoder = Decoder::with_ip(64, code, at.0, DecoderOptions::NONE);
    while consumed < minimum {
        if !decoder.can_decode() {
            return Err(too_short);
        }
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            return Err(PrologueError::NotAnInstruction { at: TargetAddr(instruction.ip()) });
        }
        let bytes = &code[consumed..consumed + instruction.len()];
        consumed += instruction.len();
        window.push((instruction, bytes, decoder.get_constant_offsets(&instruction)));
    }
    let end = at.offset(consumed as i64);
    // The entry is in the window too: a loop around the whole function would run into the new one.
    if let Some((branch, to)) = branch_into(code, at, at..end, end) {
        return Err(PrologueError::BranchIntoWindow { at: branch, to });
    }

    let mut output = Output {
        bytes: Vec::with_capacity(consumed + 64),
        destination,
        starts: Vec::new(),
        ended: false,
        fixes: Vec::new(),
    };
    let starts: Vec<u64> = window.iter().map(|(i, ..)| i.ip()).collect();
    for (instruction, bytes, offsets) in &window {
        output.starts.push(output.bytes.len());
        let displacement = offsets.has_displacement().then(|| offsets.displacement_offset());
        output.mov(instruction, bytes, displacement, at..end, &starts)?;
        output.ended = match instruction.flow_control() {
            FlowControl::Return | FlowControl::UnconditionalBranch | FlowControl::IndirectBranch => true,
            // A moved call returns to the old code by itself.
            FlowControl::Call | FlowControl::IndirectCall => true,
            FlowControl::Interrupt => output.ended && instruction.code() == Code::Int3,
            _ => false,
        };
    }
    if !output.ended {
        output.jump(end.0);
    }
    output.resolve_fixes();
    Ok(RelocatedPrologue { bytes: output.bytes, consumed })
}

/// The first instruction of the function that branches into the window but not to its start; instructions of the window
/// itself don't count. Jump tables are not looked at: no compiler points one into a function's first instructions.
#[must_use]
pub fn branches_into_window(code: &[u8], at: TargetAddr, window: Range<TargetAddr>) -> Option<TargetAddr> {
    let inside = window.start.offset(1)..window.end;
    branch_into(code, at, inside, window.end).map(|(branch, _)| branch)
}

/// `E9 rel32` at `from`, if that reaches `to`.
#[must_use]
pub fn entry_jump(from: TargetAddr, to: TargetAddr) -> Option<[u8; 5]> {
    let distance = i32::try_from(to.wrapping_distance(from.offset(5))).ok()?;
    let mut jump = [0xe9, 0, 0, 0, 0];
    jump[1..].copy_from_slice(&distance.to_le_bytes());
    Some(jump)
}

/// The first branch from outside of the window (which ends at `window_end`) to one of the `targets`. A call of the entry is
/// recursion, and meant to reach the new function.
fn branch_into(
    code: &[u8],
    at: TargetAddr,
    targets: Range<TargetAddr>,
    window_end: TargetAddr,
) -> Option<(TargetAddr, TargetAddr)> {
    let mut decoder = Decoder::with_ip(64, code, at.0, DecoderOptions::NONE);
    while decoder.can_decode() {
        let start = decoder.position();
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            // Data among the code: look on at the next byte.
            let next = start + 1;
            if decoder.set_position(next).is_err() {
                break;
            }
            decoder.set_ip(at.offset(next as i64).0);
            continue;
        }
        if instruction.ip() < window_end.0 || !is_near_branch(&instruction) {
            continue;
        }
        let target = TargetAddr(instruction.near_branch_target());
        let recursion = instruction.flow_control() == FlowControl::Call && target == at;
        if targets.contains(&target) && !recursion {
            return Some((TargetAddr(instruction.ip()), target));
        }
    }
    None
}

fn is_near_branch(instruction: &Instruction) -> bool {
    instruction.op_count() > 0
        && matches!(instruction.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64)
}

struct Output {
    bytes: Vec<u8>,
    destination: TargetAddr,
    /// Per instruction of the window: where its copy starts.
    starts: Vec<usize>,
    /// The instruction before never reaches the next one.
    ended: bool,
    /// rel32 fields to point to the copy of an instruction.
    fixes: Vec<(usize, usize)>,
}

/// Where a branch goes.
enum Target {
    /// The copy of an instruction of the window, by number.
    Copy(usize),
    Outside(u64),
}

impl Output {
    fn here(&self) -> u64 {
        self.destination.0.wrapping_add(self.bytes.len() as u64)
    }

    fn mov(
        &mut self,
        instruction: &Instruction,
        bytes: &[u8],
        displacement: Option<usize>,
        window: Range<TargetAddr>,
        starts: &[u64],
    ) -> Result<(), PrologueError> {
        let at = TargetAddr(instruction.ip());
        let immovable = |reason| PrologueError::Immovable { at, instruction: instruction.to_string(), reason };
        match instruction.code() {
            // Behind a return or jump it is padding.
            Code::Int3 if !self.ended => return Err(PrologueError::Breakpoint { at }),
            Code::Xbegin_rel16 | Code::Xbegin_rel32 => return Err(immovable("it starts a transaction")),
            _ => {}
        }
        if instruction.is_jmp_far()
            || instruction.is_call_far()
            || instruction.is_jmp_far_indirect()
            || instruction.is_call_far_indirect()
        {
            return Err(immovable("it changes the code segment"));
        }
        if instruction.memory_base() == Register::EIP {
            return Err(immovable("it addresses memory by a 32-bit instruction pointer"));
        }
        if is_near_branch(instruction) {
            if instruction.op0_kind() != OpKind::NearBranch64 {
                return Err(immovable("it is a 16- or 32-bit branch"));
            }
            let to = instruction.near_branch_target();
            let is_call = instruction.flow_control() == FlowControl::Call;
            // A call of the entry is recursion: it goes where all calls go.
            let target = match starts.iter().position(|&s| s == to) {
                Some(0) if is_call => Target::Outside(to),
                Some(_) if is_call => return Err(immovable("it calls into the instructions to be moved")),
                Some(number) => Target::Copy(number),
                None if window.contains(&TargetAddr(to)) => {
                    return Err(immovable("it branches into the middle of an instruction"));
                }
                None => Target::Outside(to),
            };
            return self.branch(instruction, target, window.end, immovable);
        }
        if instruction.flow_control() == FlowControl::IndirectCall {
            return self.indirect_call(instruction, bytes, displacement, window.end, immovable);
        }
        self.copy(instruction, bytes, displacement)
    }

    /// A plain instruction: only an address relative to it changes.
    fn copy(
        &mut self,
        instruction: &Instruction,
        bytes: &[u8],
        displacement: Option<usize>,
    ) -> Result<(), PrologueError> {
        let start = self.bytes.len();
        let place = self.here();
        self.bytes.extend_from_slice(bytes);
        if instruction.is_ip_rel_memory_operand() {
            let next = place.wrapping_add(bytes.len() as u64);
            self.point(instruction, start + displacement.unwrap_or(0), next)?;
        }
        Ok(())
    }

    /// Lets the disp32 at `field` address what `instruction` addresses, seen from `next`.
    fn point(&mut self, instruction: &Instruction, field: usize, next: u64) -> Result<(), PrologueError> {
        let to = instruction.ip_rel_memory_address();
        let out_of_reach = || PrologueError::OutOfReach {
            at: TargetAddr(instruction.ip()),
            to: TargetAddr(to),
            destination: self.destination,
        };
        let distance = i32::try_from(to.wrapping_sub(next) as i64).map_err(|_| out_of_reach())?;
        let place = self.bytes.get_mut(field..field + 4);
        let Some(place) = place else {
            return Err(PrologueError::NotAnInstruction { at: TargetAddr(instruction.ip()) });
        };
        place.copy_from_slice(&distance.to_le_bytes());
        Ok(())
    }

    fn branch(
        &mut self,
        instruction: &Instruction,
        target: Target,
        window_end: TargetAddr,
        immovable: impl Fn(&'static str) -> PrologueError,
    ) -> Result<(), PrologueError> {
        match instruction.flow_control() {
            FlowControl::UnconditionalBranch => self.jump_to(target),
            FlowControl::Call => {
                self.push_return_address(instruction, window_end, immovable)?;
                self.jump_to(target);
            }
            FlowControl::ConditionalBranch if instruction.is_jcc_short_or_near() => {
                let condition = instruction.condition_code() as u8;
                // iced numbers conditions from 1 in the order of their encoding.
                let Some(condition) = condition.checked_sub(1).filter(|&c| c < 16) else {
                    return Err(immovable("its condition is unknown"));
                };
                let near = match target {
                    Target::Copy(_) => true,
                    Target::Outside(to) => self.reach(to, 6).is_some(),
                };
                if near {
                    self.bytes.extend_from_slice(&[0x0f, 0x80 | condition]);
                    let field = self.bytes.len();
                    self.bytes.extend_from_slice(&[0; 4]);
                    self.aim(field, target);
                } else {
                    // The opposite condition skips a far jump.
                    self.bytes.extend_from_slice(&[0x70 | (condition ^ 1), 0]);
                    let skip = self.bytes.len();
                    self.jump_to(target);
                    self.bytes[skip - 1] = (self.bytes.len() - skip) as u8;
                }
            }
            // loop, loope, loopne, jrcxz, jecxz: these have a short form only. Taken: over a short jump, to a long one.
            FlowControl::ConditionalBranch => {
                let opcode = match instruction.code() {
                    Code::Loopne_rel8_64_RCX | Code::Loopne_rel8_64_ECX => 0xe0,
                    Code::Loope_rel8_64_RCX | Code::Loope_rel8_64_ECX => 0xe1,
                    Code::Loop_rel8_64_RCX | Code::Loop_rel8_64_ECX => 0xe2,
                    Code::Jrcxz_rel8_64 | Code::Jecxz_rel8_64 => 0xe3,
                    _ => return Err(immovable("this branch is unknown")),
                };
                let narrow = matches!(
                    instruction.code(),
                    Code::Loopne_rel8_64_ECX | Code::Loope_rel8_64_ECX | Code::Loop_rel8_64_ECX | Code::Jecxz_rel8_64
                );
                if narrow {
                    self.bytes.push(0x67);
                }
                self.bytes.extend_from_slice(&[opcode, 2, 0xeb, 0]);
                let skip = self.bytes.len();
                self.jump_to(target);
                self.bytes[skip - 1] = (self.bytes.len() - skip) as u8;
            }
            _ => return Err(immovable("this branch is unknown")),
        }
        Ok(())
    }

    /// The old return address goes onto the stack, and the callee returns into the old code, as it would have done.
    fn push_return_address(
        &mut self,
        instruction: &Instruction,
        window_end: TargetAddr,
        immovable: impl Fn(&'static str) -> PrologueError,
    ) -> Result<(), PrologueError> {
        let return_address = instruction.next_ip();
        if return_address != window_end.0 {
            return Err(immovable("it would return to an instruction that the entry jump overwrites"));
        }
        let low = return_address as u32;
        self.bytes.push(0x68);
        self.bytes.extend_from_slice(&low.to_le_bytes());
        // push extends the sign; the upper half follows. No flags change.
        self.bytes.extend_from_slice(&[0xc7, 0x44, 0x24, 0x04]);
        self.bytes.extend_from_slice(&((return_address >> 32) as u32).to_le_bytes());
        Ok(())
    }

    /// `call *x` as push and `jmp *x`.
    fn indirect_call(
        &mut self,
        instruction: &Instruction,
        bytes: &[u8],
        displacement: Option<usize>,
        window_end: TargetAddr,
        immovable: impl Fn(&'static str) -> PrologueError,
    ) -> Result<(), PrologueError> {
        if instruction.code() != Code::Call_rm64 {
            return Err(immovable("it is a 16- or 32-bit call"));
        }
        let uses_stack_pointer = (0..instruction.op_count())
            .any(|n| instruction.op_kind(n) == OpKind::Register && instruction.op_register(n) == Register::RSP)
            || (instruction.op0_kind() == OpKind::Memory
                && (instruction.memory_base() == Register::RSP || instruction.memory_index() == Register::RSP));
        if uses_stack_pointer {
            return Err(immovable("it calls through the stack, which moves by the return address"));
        }
        self.push_return_address(instruction, window_end, &immovable)?;
        // FF /2 is call, FF /4 is jmp; the opcode follows prefixes, of which none has the value FF.
        let opcode = bytes.iter().position(|&b| b == 0xff).filter(|&o| o + 1 < bytes.len());
        let Some(opcode) = opcode.filter(|&o| bytes[o + 1] >> 3 & 7 == 2) else {
            return Err(immovable("its encoding is unknown"));
        };
        let start = self.bytes.len();
        self.copy(instruction, bytes, displacement)?;
        self.bytes[start + opcode + 1] ^= 0x30;
        Ok(())
    }

    fn reach(&self, to: u64, length: u64) -> Option<i32> {
        i32::try_from(to.wrapping_sub(self.here().wrapping_add(length)) as i64).ok()
    }

    fn jump_to(&mut self, target: Target) {
        match target {
            Target::Outside(to) => self.jump(to),
            Target::Copy(_) => {
                self.bytes.extend_from_slice(&[0xe9, 0, 0, 0, 0]);
                let field = self.bytes.len() - 4;
                self.aim(field, target);
            }
        }
    }

    /// `jmp rel32`, or `jmp *0(%rip)` and the address.
    fn jump(&mut self, to: u64) {
        match self.reach(to, 5) {
            Some(distance) => {
                self.bytes.push(0xe9);
                self.bytes.extend_from_slice(&distance.to_le_bytes());
            }
            None => {
                self.bytes.extend_from_slice(&[0xff, 0x25, 0, 0, 0, 0]);
                self.bytes.extend_from_slice(&to.to_le_bytes());
            }
        }
    }

    fn aim(&mut self, field: usize, target: Target) {
        match target {
            Target::Copy(number) => self.fixes.push((field, number)),
            Target::Outside(to) => {
                let next = self.destination.0.wrapping_add(field as u64 + 4);
                let distance = to.wrapping_sub(next) as u32;
                self.bytes[field..field + 4].copy_from_slice(&distance.to_le_bytes());
            }
        }
    }

    fn resolve_fixes(&mut self) {
        for (field, number) in std::mem::take(&mut self.fixes) {
            let distance = self.starts[number].wrapping_sub(field + 4) as u32;
            self.bytes[field..field + 4].copy_from_slice(&distance.to_le_bytes());
        }
    }
}
