//! The executable bytes of an image with what is known of each: whether an instruction begins there, whether control may
//! arrive there by other ways than from the instruction in front, whether it is padding that nothing reaches.

use super::bits::Bits;
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};

/// Longest x86 instruction, bytes.
pub(super) const INSTRUCTION_MOST: u64 = 15;

/// One executable segment.
#[derive(Clone, Debug)]
pub(super) struct Stretch {
    pub(super) start: u64,
    pub(super) bytes: Vec<u8>,
    /// Where instructions of known functions begin.
    pub(super) starts: Bits,
    /// Where control may arrive.
    pub(super) entries: Bits,
    /// Bytes of padding that nothing reaches.
    pub(super) dead: Bits,
    /// Instructions that are no-ops or traps, as padding is.
    pub(super) pads: Bits,
}

impl Stretch {
    pub(super) fn new(start: u64, bytes: &[u8]) -> Self {
        let bits = Bits::new(start, bytes.len());
        let (starts, entries, dead, pads) = (bits.clone(), bits.clone(), bits.clone(), bits);
        Self { start, bytes: bytes.to_vec(), starts, entries, dead, pads }
    }

    pub(super) fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    pub(super) fn contains(&self, at: u64) -> bool {
        (self.start..self.end()).contains(&at)
    }

    /// Bytes from `at` on, at most `most`.
    pub(super) fn tail(&self, at: u64, most: u64) -> &[u8] {
        let Some(offset) = at.checked_sub(self.start).and_then(|offset| usize::try_from(offset).ok()) else {
            return &[];
        };
        let tail = self.bytes.get(offset..).unwrap_or_default();
        &tail[..tail.len().min(usize::try_from(most).unwrap_or(usize::MAX))]
    }

    /// The instruction at `at`.
    pub(super) fn decode(&self, at: u64) -> Option<Instruction> {
        let instruction = Decoder::with_ip(64, self.tail(at, INSTRUCTION_MOST), at, DecoderOptions::NONE).decode();
        (!instruction.is_invalid()).then_some(instruction)
    }

    /// The instruction that ends where the one at `at` begins, if control goes from there to here.
    pub(super) fn previous(&self, at: u64) -> Option<Instruction> {
        let before = self.starts.before(at, at.saturating_sub(INSTRUCTION_MOST))?;
        self.decode(before).filter(|instruction| instruction.next_ip() == at && !never_goes_on(instruction))
    }
}

/// Control does not go on behind the instruction. A call counts as going on: its return point is an entry anyway.
pub(super) fn never_goes_on(instruction: &Instruction) -> bool {
    match instruction.flow_control() {
        FlowControl::UnconditionalBranch
        | FlowControl::IndirectBranch
        | FlowControl::Return
        | FlowControl::Exception => true,
        FlowControl::Interrupt => instruction.mnemonic() == Mnemonic::Int3,
        _ => instruction.mnemonic() == Mnemonic::Hlt,
    }
}

/// What compilers and linkers fill gaps with.
pub(super) fn is_padding(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Nop | Mnemonic::Int3)
}
