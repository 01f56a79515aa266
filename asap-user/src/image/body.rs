//! All the code of a function: also the cold parts that the compiler put elsewhere. A thread in a cold part is inside the
//! function (promise P3).

use super::{Function, Image};
use crate::address::ImageOffset;
use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, OpKind, Register};
use std::{collections::BTreeMap, ops::Range};

/// The ranges of a function's code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionBody {
    /// Entry to end first, then cold parts, by address.
    pub ranges: Vec<Range<ImageOffset>>,
}

/// Most bytes of one range that are decoded.
const DECODED_MOST: u64 = 4 << 20;
/// Most cold parts that are followed.
const PARTS_MOST: usize = 64;

impl Image {
    /// The code of `function`. Cold parts are found by name (`f.cold`) and, in stripped files, by decoding: a jump out of the
    /// function to what is no function of its own, and by where its exceptions land.
    #[must_use]
    pub fn body(&self, function: &Function) -> FunctionBody {
        let sized = |start: ImageOffset, size: u64| start..ImageOffset(start.0.saturating_add(size));
        let mut main = sized(function.address, function.size);
        // Assembly may state less in its symbol than its unwind table covers.
        if let Some(bounds) = self.unwind.bounds_at(self, function.address).filter(|b| b.start == function.address) {
            main.end = main.end.max(bounds.end);
        }
        let mut ranges = vec![main];
        if let Some(name) = &function.name {
            let cold_name = format!("{name}.cold");
            let cold = self.symbols().named(&cold_name);
            for symbol in cold.filter(|s| function.file.is_none() || s.file == function.file) {
                push(&mut ranges, sized(symbol.address, symbol.size));
            }
        }
        let mut next = 0;
        while let Some(range) = ranges.get(next).cloned() {
            next += 1;
            for pad in self.unwind.landing_pads(self, range.start) {
                if ranges.len() < PARTS_MOST && !ranges.iter().any(|known| known.contains(&pad)) {
                    ranges.extend(self.unwind.bounds_at(self, pad));
                }
            }
            for (target, is_conditional) in self.jumps_out_of(&range) {
                if ranges.len() >= PARTS_MOST {
                    break;
                }
                if ranges.iter().any(|known| known.contains(&target)) || self.is_linkage_stub(target) {
                    continue;
                }
                let Some(bounds) = self.unwind.bounds_at(self, target) else { continue };
                // Into the middle of a range means into code that has this function's frame; at its start it may be a
                // tail call.
                if target != bounds.start || self.is_part(&bounds, is_conditional, &ranges) {
                    push(&mut ranges, bounds);
                }
            }
        }
        ranges[1..].sort_by_key(|range| range.start);
        FunctionBody { ranges }
    }

    /// What begins at the target of a jump is a part of the function in `known`, rather than a function that is tail-called.
    fn is_part(&self, candidate: &Range<ImageOffset>, is_conditional: bool, known: &[Range<ImageOffset>]) -> bool {
        let mut symbols = self.symbols().code_at(candidate.start).peekable();
        if symbols.peek().is_some() {
            return symbols.any(|symbol| symbol.name.ends_with(".cold") || symbol.name.contains(".cold."));
        }
        // The frame of the function is set up already.
        if !self.unwind.begins_like_a_function(self, candidate.start) {
            return true;
        }
        // A function without a frame has a cold part that looks like a function. But parts go back into the middle of their
        // function, and functions don't.
        let goes_back =
            |target: ImageOffset| known.iter().any(|range| range.contains(&target) && range.start != target);
        if self.jumps_out_of(candidate).keys().any(|&target| goes_back(target)) {
            return true;
        }
        // Or they return by themselves. Compilers jump conditionally to their own parts; to other functions very rarely, and
        // those are called from elsewhere too.
        is_conditional && !self.is_called(candidate.start)
    }

    /// Targets of the direct jumps out of `range`, each with whether a conditional jump leads there.
    fn jumps_out_of(&self, range: &Range<ImageOffset>) -> BTreeMap<ImageOffset, bool> {
        let length = range.end.0.saturating_sub(range.start.0).min(DECODED_MOST);
        let mut targets = BTreeMap::new();
        let Some(bytes) = usize::try_from(length).ok().and_then(|length| self.bytes_at(range.start, length)) else {
            return targets;
        };
        let mut decoder = Decoder::with_ip(64, bytes, range.start.0, DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        while decoder.can_decode() {
            decoder.decode_out(&mut instruction);
            let is_conditional = instruction.flow_control() == FlowControl::ConditionalBranch;
            let is_jump = is_conditional || instruction.flow_control() == FlowControl::UnconditionalBranch;
            if is_jump && matches!(instruction.op0_kind(), OpKind::NearBranch64) {
                let target = ImageOffset(instruction.near_branch_target());
                if !range.contains(&target) {
                    *targets.entry(target).or_default() |= is_conditional;
                }
            }
        }
        targets
    }

    /// Code that only jumps through a slot of the linker's (PLT). One unwind-table entry covers all of them.
    fn is_linkage_stub(&self, at: ImageOffset) -> bool {
        let Some(bytes) = self.file_tail(at).map(|tail| &tail[..tail.len().min(16)]) else { return false };
        let mut decoder = Decoder::with_ip(64, bytes, at.0, DecoderOptions::NONE);
        let mut instruction = decoder.decode();
        if instruction.code() == Code::Endbr64 {
            instruction = decoder.decode();
        }
        instruction.code() == Code::Jmp_rm64 && instruction.memory_base() == Register::RIP
    }

    /// Some `call` in the image goes to `target`. Looks at every byte that could be one: data that looks like a call to
    /// exactly this address is as good as never seen.
    fn is_called(&self, target: ImageOffset) -> bool {
        let executable = self.segments.iter().filter(|segment| segment.executable);
        executable.filter_map(|segment| Some((segment.address, self.file_tail(segment.address)?))).any(
            |(start, bytes)| {
                memchr::memchr_iter(0xe8, bytes).any(|at| {
                    let Some(displacement) = bytes.get(at + 1..at + 5).and_then(|b| b.try_into().ok()) else {
                        return false;
                    };
                    let behind = start.0.wrapping_add(at as u64 + 5);
                    behind.wrapping_add_signed(i64::from(i32::from_le_bytes(displacement))) == target.0
                })
            },
        )
    }
}

fn push(ranges: &mut Vec<Range<ImageOffset>>, range: Range<ImageOffset>) {
    if range.start < range.end && !ranges.contains(&range) {
        ranges.push(range);
    }
}
