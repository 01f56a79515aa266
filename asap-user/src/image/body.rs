//! All the code of a function: also the cold parts that the compiler put elsewhere. A thread in a cold part is inside the
//! function.

use super::{Function, Image};
use crate::address::ImageOffset;
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction};
use std::ops::Range;

/// The ranges of a function's code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionBody {
    /// Entry to end first, then cold parts, by address.
    pub ranges: Vec<Range<ImageOffset>>,
}

/// Longest function that is decoded, bytes.
const DECODED_MOST: u64 = 4 << 20;
/// Most cold parts that are followed.
const PARTS_MOST: usize = 64;

impl Image {
    /// The code of `function`. Cold parts are found by name (`f.cold`) and, in stripped files, by decoding: a jump out of the
    /// function to where an unwind-table row does not begin like a function.
    #[must_use]
    pub fn body(&self, function: &Function) -> FunctionBody {
        let end = |start: ImageOffset, size: u64| start..ImageOffset(start.0.saturating_add(size));
        let mut ranges = vec![end(function.address, function.size)];
        if let Some(name) = &function.name {
            let cold_name = format!("{name}.cold");
            let cold = self.symbols().named(&cold_name);
            let same_file = cold.filter(|symbol| function.file.is_none() || symbol.file == function.file);
            for symbol in same_file.filter(|symbol| symbol.size > 0) {
                push(&mut ranges, end(symbol.address, symbol.size));
            }
        }
        let mut next = 0;
        while next < ranges.len() && ranges.len() < PARTS_MOST {
            for target in self.jumps_out_of(&ranges[next].clone()) {
                if ranges.iter().any(|range| range.contains(&target)) {
                    continue;
                }
                let Some(entry) = self.unwind.entry_at(self, target) else { continue };
                // A jump to where a function begins is a tail call.
                if target == entry.start && entry.begins_like_a_function {
                    continue;
                }
                push(&mut ranges, entry.start..entry.end);
            }
            next += 1;
        }
        ranges[1..].sort_by_key(|range| range.start);
        FunctionBody { ranges }
    }

    fn jumps_out_of(&self, range: &Range<ImageOffset>) -> Vec<ImageOffset> {
        let length = (range.end.0 - range.start.0).min(DECODED_MOST);
        let Some(bytes) = usize::try_from(length).ok().and_then(|length| self.bytes_at(range.start, length)) else {
            return Vec::new();
        };
        let mut decoder = Decoder::with_ip(64, bytes, range.start.0, DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        let mut targets = Vec::new();
        while decoder.can_decode() {
            decoder.decode_out(&mut instruction);
            if matches!(instruction.flow_control(), FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch) {
                let target = ImageOffset(instruction.near_branch_target());
                if !range.contains(&target) {
                    targets.push(target);
                }
            }
        }
        targets.sort_unstable();
        targets.dedup();
        targets
    }
}

fn push(ranges: &mut Vec<Range<ImageOffset>>, range: Range<ImageOffset>) {
    if !ranges.contains(&range) {
        ranges.push(range);
    }
}
