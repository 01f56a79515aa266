//! The ways out of a function, found by decoding it: where a probe must sit so that every activation that was counted when it
//! began is counted again when it ends. Not for exceptions and longjmp, which leave by no instruction of the function.
//!
//! Strict: what can't be told apart is said, never guessed, for a count that is wrong would say "nobody is inside".

use super::unwind::Unwinder;
use crate::{
    address::{ImageOffset, LoadBias, TargetAddr},
    image::Image,
};
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register};
use std::{collections::HashMap, collections::HashSet, ops::Range, sync::Arc};

/// How an instruction leaves the function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitKind {
    /// `ret`.
    Return,
    /// A jump to another function, which returns to our caller.
    TailJump(ImageOffset),
    /// The same, through a register or memory.
    IndirectTailJump,
    /// A jump to the function's own entry: one activation ends, the next begins.
    ToEntry,
}

/// An instruction that leaves the function whenever it is executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The instruction.
    pub at: ImageOffset,
    /// How it leaves.
    pub kind: ExitKind,
}

/// Why the exits of a function can't be counted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Uncountable {
    /// The bytes are not there.
    #[error("its code at {0} is not in the file")]
    Missing(ImageOffset),
    /// Not an instruction.
    #[error("its bytes at {0} are no instruction")]
    Undecodable(ImageOffset),
    /// A jump into the middle of an instruction: data among the code, or code that hides.
    #[error("it jumps to {target}, into the middle of an instruction, at {at}")]
    Overlapping {
        /// The jump.
        at: ImageOffset,
        /// Where to.
        target: ImageOffset,
    },
    /// A jump that leaves only sometimes.
    #[error("its conditional jump at {0} leaves it only sometimes")]
    Conditional(ImageOffset),
    /// An indirect jump that may or may not leave.
    #[error("its indirect jump at {0} may stay inside or leave")]
    Indirect(ImageOffset),
    /// A return or a jump to elsewhere while something of the function still lies on the stack.
    #[error("it leaves at {0} with its frame still on the stack")]
    FrameLeft(ImageOffset),
    /// Its last instruction goes on in what follows.
    #[error("it runs on into what follows at {0}")]
    FallsThrough(ImageOffset),
    /// Something that is neither jump nor return.
    #[error("its instruction at {0} leaves in a way that can't be followed")]
    Strange(ImageOffset),
}

/// The exits of a function.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exits {
    /// All that were found, by address.
    pub found: Vec<Exit>,
    /// Why that is not all, or not to be counted; empty: probes on the entry and on these count every activation.
    pub doubts: Vec<Uncountable>,
}

impl Exits {
    /// Whether probes on the entry and on the exits count every activation (but for exceptions and longjmp).
    #[must_use]
    pub fn are_countable(&self) -> bool {
        self.doubts.is_empty()
    }
}

/// How far back the load of a jump's target is looked for, instructions.
const LOOK_BACK: usize = 24;

/// What is known of the file that holds the function.
pub trait Surroundings {
    /// Bytes of the image, as the file has them: code, and jump tables.
    fn bytes(&self, at: ImageOffset, length: usize) -> Option<&[u8]>;
    /// Whether only the return address lies above the stack pointer, as when a function begins; `None`: nobody knows.
    fn stack_is_as_at_entry(&self, at: ImageOffset) -> Option<bool>;
}

/// The surroundings that an image gives.
struct OfImage<'i> {
    image: &'i Image,
    unwinder: Unwinder,
}

impl Surroundings for OfImage<'_> {
    fn bytes(&self, at: ImageOffset, length: usize) -> Option<&[u8]> {
        self.image.bytes_at(at, length)
    }

    fn stack_is_as_at_entry(&self, at: ImageOffset) -> Option<bool> {
        self.unwinder.stack_is_as_at_entry(TargetAddr(at.0))
    }
}

/// The exits of the function of `image` whose code lies in `ranges`; the first begins with its entry.
#[must_use]
pub fn find_in_image(image: &Arc<Image>, ranges: &[Range<ImageOffset>]) -> Exits {
    let mut unwinder = Unwinder::new();
    unwinder.add_image(image, TargetAddr(0)..TargetAddr(u64::MAX), LoadBias(0));
    find(ranges, &OfImage { image, unwinder })
}

/// Decodes the code in `ranges` (the first begins with the entry) and lists its exits.
#[must_use]
pub fn find(ranges: &[Range<ImageOffset>], around: &dyn Surroundings) -> Exits {
    let mut exits = Exits::default();
    let mut body = Body { ranges, around, code: Vec::new(), at: HashMap::new(), targets: HashSet::new() };
    for range in ranges {
        if let Err(doubt) = body.decode(range) {
            exits.doubts.push(doubt);
        }
    }
    let all_is_reached = body.all_is_reached();
    for index in 0..body.code.len() {
        let at = ImageOffset(body.code[index].ip());
        match body.judge(index) {
            // A jump through a pointer might also go to a label whose address was taken. Labels that only such a jump
            // can reach give that away.
            Ok(Some(ExitKind::IndirectTailJump)) if !all_is_reached => exits.doubts.push(Uncountable::Indirect(at)),
            Ok(Some(kind)) => exits.found.push(Exit { at, kind }),
            Ok(None) => {}
            Err(doubt) => exits.doubts.push(doubt),
        }
    }
    exits.found.sort_by_key(|exit| exit.at);
    exits
}

struct Body<'a> {
    ranges: &'a [Range<ImageOffset>],
    around: &'a dyn Surroundings,
    code: Vec<Instruction>,
    /// Index of the instruction at an address.
    at: HashMap<u64, usize>,
    /// Where direct jumps of the body lead.
    targets: HashSet<u64>,
}

/// Where an indirect jump goes.
enum Indirect {
    /// By a jump table: to these places in the body.
    Table(Vec<u64>),
    /// To another function.
    Leaves,
}

impl Body<'_> {
    fn decode(&mut self, range: &Range<ImageOffset>) -> Result<(), Uncountable> {
        let length = range.end.0.checked_sub(range.start.0).and_then(|length| usize::try_from(length).ok());
        let bytes = length.and_then(|length| self.around.bytes(range.start, length));
        let bytes = bytes.ok_or(Uncountable::Missing(range.start))?;
        let mut decoder = Decoder::with_ip(64, bytes, range.start.0, DecoderOptions::NONE);
        while decoder.can_decode() {
            let instruction = decoder.decode();
            if instruction.is_invalid() {
                return Err(Uncountable::Undecodable(ImageOffset(instruction.ip())));
            }
            if is_direct_jump(&instruction) {
                self.targets.insert(instruction.near_branch_target());
            }
            self.at.insert(instruction.ip(), self.code.len());
            self.code.push(instruction);
        }
        Ok(())
    }

    fn holds(&self, at: u64) -> bool {
        self.ranges.iter().any(|range| range.contains(&ImageOffset(at)))
    }

    fn judge(&self, index: usize) -> Result<Option<ExitKind>, Uncountable> {
        let instruction = &self.code[index];
        let at = ImageOffset(instruction.ip());
        let clean = || match self.around.stack_is_as_at_entry(at) {
            Some(false) => Err(Uncountable::FrameLeft(at)),
            _ => Ok(()),
        };
        match instruction.flow_control() {
            FlowControl::Return if instruction.mnemonic() == Mnemonic::Ret => {
                clean()?;
                Ok(Some(ExitKind::Return))
            }
            FlowControl::Return | FlowControl::XbeginXabortXend => Err(Uncountable::Strange(at)),
            FlowControl::UnconditionalBranch => {
                let kind = self.judge_jump(instruction)?;
                if matches!(kind, Some(ExitKind::TailJump(_))) {
                    clean()?;
                }
                Ok(kind)
            }
            FlowControl::ConditionalBranch => match self.judge_jump(instruction)? {
                Some(_) => Err(Uncountable::Conditional(at)),
                None => self.judge_end(index),
            },
            FlowControl::IndirectBranch => match self.judge_indirect(index) {
                Some(Indirect::Table(_)) => Ok(None),
                Some(Indirect::Leaves) => {
                    clean()?;
                    Ok(Some(ExitKind::IndirectTailJump))
                }
                None => Err(Uncountable::Indirect(at)),
            },
            // What traps has not left.
            FlowControl::Exception | FlowControl::Interrupt => Ok(None),
            FlowControl::Next | FlowControl::Call | FlowControl::IndirectCall => self.judge_end(index),
        }
    }

    /// Whether the code goes on behind this instruction in what is not the function.
    fn judge_end(&self, index: usize) -> Result<Option<ExitKind>, Uncountable> {
        let instruction = &self.code[index];
        let is_last = !self.at.contains_key(&instruction.next_ip());
        // A function may end with a call that does not return, or with padding.
        let may_be_last = matches!(instruction.flow_control(), FlowControl::Call | FlowControl::IndirectCall)
            || instruction.mnemonic() == Mnemonic::Hlt
            || self.is_padding(index);
        if is_last && !may_be_last {
            return Err(Uncountable::FallsThrough(ImageOffset(instruction.ip())));
        }
        Ok(None)
    }

    /// Whether it is a no-op that follows, perhaps through others, an instruction that does not go on.
    fn is_padding(&self, index: usize) -> bool {
        let before = self.code[..=index].iter().rev().find(|instruction| instruction.mnemonic() != Mnemonic::Nop);
        before.is_some_and(|instruction| {
            !matches!(instruction.flow_control(), FlowControl::Next | FlowControl::ConditionalBranch)
        }) && self.code[index].mnemonic() == Mnemonic::Nop
    }

    /// How a direct jump leaves; `None`: it stays.
    fn judge_jump(&self, jump: &Instruction) -> Result<Option<ExitKind>, Uncountable> {
        let target = jump.near_branch_target();
        if self.ranges.first().is_some_and(|range| range.start.0 == target) {
            return Ok(Some(ExitKind::ToEntry));
        }
        if !self.holds(target) {
            return Ok(Some(ExitKind::TailJump(ImageOffset(target))));
        }
        // A jump over a `lock` prefix lands one byte into its instruction, on purpose (glibc does so).
        let skips_lock =
            || self.at.get(&target.wrapping_sub(1)).is_some_and(|&index| self.code[index].has_lock_prefix());
        if self.at.contains_key(&target) || skips_lock() {
            return Ok(None);
        }
        Err(Uncountable::Overlapping { at: ImageOffset(jump.ip()), target: ImageOffset(target) })
    }

    /// What an indirect jump does, as far as it can be told.
    fn judge_indirect(&self, index: usize) -> Option<Indirect> {
        let jump = &self.code[index];
        if jump.op0_kind() == OpKind::Memory {
            return self.judge_load(index);
        }
        let loads = self.definition(index, jump.op0_register())?;
        let load = &self.code[loads];
        match load.mnemonic() {
            Mnemonic::Mov if load.op1_kind() == OpKind::Memory => self.judge_load(loads),
            // A table of distances from itself: to one of them its address is added.
            Mnemonic::Add if load.op1_kind() == OpKind::Register => {
                let [a, b] = [load.op0_register(), load.op1_register()];
                let base = self.constant(loads, a).or_else(|| self.constant(loads, b))?;
                let entry = |n: u64| {
                    let bytes = self.around.bytes(ImageOffset(base.checked_add(n * 4)?), 4)?;
                    Some(base.wrapping_add_signed(i64::from(i32::from_le_bytes(bytes.try_into().ok()?))))
                };
                self.table(entry).map(Indirect::Table)
            }
            _ => None,
        }
    }

    /// A jump to what an instruction loads from memory.
    fn judge_load(&self, index: usize) -> Option<Indirect> {
        let load = &self.code[index];
        if load.memory_index() == Register::None {
            // A slot of the linker, or a function pointer in a structure; tables are indexed.
            return Some(Indirect::Leaves);
        }
        let base = match load.memory_base() {
            Register::None => 0,
            base => self.constant(index, base)?,
        };
        let base = base.wrapping_add(load.memory_displacement64());
        let entry = |n: u64| {
            let bytes = self.around.bytes(ImageOffset(base.checked_add(n * 8)?), 8)?;
            Some(u64::from_le_bytes(bytes.try_into().ok()?))
        };
        if load.memory_index_scale() != 8 {
            return None;
        }
        match self.table(entry) {
            Some(targets) => Some(Indirect::Table(targets)),
            // Pointers to functions. What is zero will be filled in by the linker, nobody knows with what.
            None => entry(0).filter(|&first| first != 0 && !self.holds(first)).map(|_| Indirect::Leaves),
        }
    }

    /// The entries of a jump table: as many as lead to instructions of the body.
    fn table(&self, entry: impl Fn(u64) -> Option<u64>) -> Option<Vec<u64>> {
        let entries = (0..).map_while(|n| entry(n).filter(|target| self.at.contains_key(target)));
        let targets: Vec<u64> = entries.take(self.code.len() * 16).collect();
        (!targets.is_empty()).then_some(targets)
    }

    /// The instruction before `index` that gives `register` its value, if all ways lead through it.
    fn definition(&self, index: usize, register: Register) -> Option<usize> {
        let mut factory = InstructionInfoFactory::new();
        for before in (index.saturating_sub(LOOK_BACK)..index).rev() {
            let (instruction, next) = (&self.code[before], &self.code[before + 1]);
            let goes_on = instruction.flow_control() == FlowControl::Next
                || instruction.flow_control() == FlowControl::ConditionalBranch;
            if !goes_on || instruction.next_ip() != next.ip() || self.targets.contains(&next.ip()) {
                return None;
            }
            let writes = factory.info(instruction).used_registers().iter().any(|used| {
                used.register().full_register() == register.full_register()
                    && !matches!(used.access(), iced_x86::OpAccess::Read | iced_x86::OpAccess::CondRead)
            });
            if writes {
                return Some(before);
            }
        }
        None
    }

    /// The address that `register` holds before `index`, if it is loaded as a constant.
    fn constant(&self, index: usize, register: Register) -> Option<u64> {
        let load = &self.code[self.definition(index, register)?];
        match load.mnemonic() {
            Mnemonic::Lea if load.is_ip_rel_memory_operand() => Some(load.ip_rel_memory_address()),
            Mnemonic::Mov if matches!(load.op1_kind(), OpKind::Immediate32 | OpKind::Immediate64) => {
                Some(load.immediate(1))
            }
            _ => None,
        }
    }

    /// Whether all instructions are reached from the entry by direct jumps and jump tables, and no label's address is taken.
    fn all_is_reached(&self) -> bool {
        let mut reached = vec![false; self.code.len()];
        let mut next: Vec<usize> =
            self.ranges.first().and_then(|range| self.at.get(&range.start.0)).copied().into_iter().collect();
        while let Some(index) = next.pop() {
            if std::mem::replace(&mut reached[index], true) {
                continue;
            }
            let instruction = &self.code[index];
            let mut go = |at: u64| next.extend(self.at.get(&at));
            if is_direct_jump(instruction) {
                go(instruction.near_branch_target());
            }
            match instruction.flow_control() {
                FlowControl::UnconditionalBranch | FlowControl::Return | FlowControl::Exception => {}
                FlowControl::IndirectBranch => {
                    if let Some(Indirect::Table(targets)) = self.judge_indirect(index) {
                        targets.into_iter().for_each(go);
                    }
                }
                _ => go(instruction.next_ip()),
            }
        }
        let takes_label = |instruction: &Instruction| {
            instruction.mnemonic() == Mnemonic::Lea
                && instruction.is_ip_rel_memory_operand()
                && self.holds(instruction.ip_rel_memory_address())
        };
        let known = |(instruction, reached): (&Instruction, &bool)| {
            (*reached || instruction.mnemonic() == Mnemonic::Nop) && !takes_label(instruction)
        };
        self.code.iter().zip(&reached).all(known)
    }
}

fn is_direct_jump(instruction: &Instruction) -> bool {
    matches!(instruction.flow_control(), FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch)
}

#[cfg(test)]
mod tests;
