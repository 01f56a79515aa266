//! What the translator is told of an image: code, bounds of functions, addresses that something may jump to. Plain data, so
//! that tests make it by hand.

use super::rseq;
use crate::{address::ImageOffset, image::Image};
use std::ops::Range;

/// What longjmp(3) goes back to (gcc knows the same ones, special_function_p).
const RETURNS_TWICE: [&str; 5] = ["setjmp", "_setjmp", "sigsetjmp", "__sigsetjmp", "savectx"];

/// An image as the translator sees it.
#[derive(Clone, Debug, Default)]
pub struct CodeView<'a> {
    /// Executable segments: address and bytes.
    pub code: Vec<(ImageOffset, &'a [u8])>,
    /// Segments with data: address and bytes. Jump tables are looked for here, and in the code.
    pub data: Vec<(ImageOffset, &'a [u8])>,
    /// Bounds of functions and of their parts; they may overlap.
    pub functions: Vec<FunctionBounds>,
    /// Addresses of code that data holds.
    pub pointers: Vec<ImageOffset>,
    /// Where exceptions land: the range whose exceptions do so, and the place.
    pub landing_pads: Vec<(ImageOffset, ImageOffset)>,
    /// Where only the return address lies above the stack pointer.
    pub bare_frames: Vec<Range<ImageOffset>>,
    /// What can't be written while the program runs.
    pub read_only: Vec<Range<ImageOffset>>,
    /// Slots of functions that return twice, the second time by an indirect jump (setjmp and its like).
    pub returns_twice: Vec<ImageOffset>,
    /// Code whose bytes must stay as they are: debuggers know signal trampolines by them, the kernel restartable sequences by
    /// their place.
    pub untouched: Vec<Range<ImageOffset>>,
    /// The image may be mapped anywhere (ET_DYN): numbers in its code are no addresses.
    pub is_position_independent: bool,
}

/// Where a function, or a part of one, lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionBounds {
    /// First address, and the one behind the last.
    pub range: Range<ImageOffset>,
    /// Something outside may call it: a symbol names its beginning, and not as a cold part.
    pub is_named: bool,
}

impl<'a> CodeView<'a> {
    /// What `image` tells.
    #[must_use]
    pub fn of(image: &'a Image) -> Self {
        let mut view = Self { is_position_independent: image.is_position_independent(), ..Self::default() };
        for segment in image.segments() {
            let bytes = usize::try_from(segment.file_size).ok().and_then(|size| image.bytes_at(segment.address, size));
            let Some(bytes) = bytes else { continue };
            if segment.executable {
                view.code.push((segment.address, bytes));
            } else {
                view.data.push((segment.address, bytes));
            }
            if !segment.writable {
                let end = ImageOffset(segment.address.0.saturating_add(segment.memory_size));
                view.read_only.push(segment.address..end);
            }
        }
        view.read_only.extend(image.relro());
        let bounds = |start: ImageOffset, size: u64| start..ImageOffset(start.0.saturating_add(size));
        view.functions = image
            .functions()
            .map(|function| FunctionBounds {
                range: bounds(function.address, function.size),
                is_named: function.name.is_some_and(|name| !name.ends_with(".cold") && !name.contains(".cold.")),
            })
            .collect();
        for range in image.unwind_bounds() {
            for pad in image.landing_pads(range.start) {
                view.landing_pads.push((range.start, pad));
            }
            view.functions.push(FunctionBounds { range, is_named: false });
        }
        view.pointers = image.code_pointers();
        view.bare_frames = image.bare_frames();
        let slots = image.named_slots().into_iter().filter(|(_, name)| RETURNS_TWICE.contains(&name.as_str()));
        view.returns_twice = slots.map(|(slot, _)| slot).collect();
        view.untouched = image.signal_trampolines();
        view.untouched.extend(rseq::critical_sections(image));
        view
    }
}
