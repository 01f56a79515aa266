//! Where indirect calls and jumps may lead in an image: where functions begin, by symbols, unwind tables and pointers in data,
//! and the entries of its linkage table. Pure.

use crate::{address::ImageOffset, image::Image};
use iced_x86::{Decoder, DecoderOptions, FlowControl, Mnemonic};

/// All that is known beforehand, sorted.
#[must_use]
pub fn known(image: &Image) -> Vec<ImageOffset> {
    let functions = image.functions().map(|function| function.address);
    let frames = image.unwind_bounds().into_iter().map(|range| range.start);
    let mut all: Vec<ImageOffset> = functions.chain(frames).chain(image.code_pointers()).collect();
    all.sort_unstable();
    all.dedup();
    all.retain(|&at| is_code(image, at));
    all
}

/// Whether the image has code at `at`.
#[must_use]
pub fn is_code(image: &Image, at: ImageOffset) -> bool {
    let holds = |s: &crate::image::Segment| s.executable && (s.address.0..s.address.0 + s.file_size).contains(&at.0);
    image.segments().iter().any(holds)
}

/// Whether an entry of a linkage table (PLT) begins at `at`: an indirect jump through memory, behind an `endbr64` or not.
#[must_use]
pub fn is_linkage(image: &Image, at: ImageOffset) -> bool {
    let Some(bytes) = (1..=16).rev().find_map(|length| image.bytes_at(at, length)) else { return false };
    let mut decoder = Decoder::with_ip(64, bytes, at.0, DecoderOptions::NONE);
    let mut instruction = decoder.decode();
    if instruction.mnemonic() == Mnemonic::Endbr64 {
        instruction = decoder.decode();
    }
    instruction.flow_control() == FlowControl::IndirectBranch && instruction.is_ip_rel_memory_operand()
}

/// Whether `at` is where a call comes back to.
#[must_use]
pub fn is_return_point(image: &Image, at: ImageOffset) -> bool {
    (2..=7).any(|length| {
        let Some(from) = at.0.checked_sub(length) else { return false };
        let Some(bytes) = image.bytes_at(ImageOffset(from), length as usize) else { return false };
        let call = Decoder::with_ip(64, bytes, from, DecoderOptions::NONE).decode();
        call.next_ip() == at.0 && matches!(call.flow_control(), FlowControl::Call | FlowControl::IndirectCall)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ImageBytes;

    #[test]
    fn functions_of_this_very_program_are_targets() {
        let bytes = std::fs::read("/proc/self/exe").expect("this program");
        let image = Image::parse("self", ImageBytes::from(bytes)).expect("an image");
        let known = known(&image);
        assert!(known.len() > 1000);
        let function = image.functions().find(|f| f.size > 64).expect("functions");
        assert!(known.binary_search(&function.address).is_ok());
        assert!(known.binary_search(&ImageOffset(function.address.0 + 1)).is_err());
        // Somewhere in its code calls come back.
        let segment = image.segments().iter().find(|segment| segment.executable).expect("code");
        let points = (0..20_000).filter(|i| is_return_point(&image, ImageOffset(segment.address.0 + i))).count();
        assert!((10..10_000).contains(&points), "{points}");
        assert!(!is_code(&image, ImageOffset(segment.address.0 + segment.file_size)));
    }
}
