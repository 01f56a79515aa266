//! Restartable sequences (rseq(2)): code that the kernel restarts at its abort handler if the thread was interrupted in between.
//! It knows them by their addresses, so that a part of one that runs elsewhere would not be restarted. Found by their
//! descriptors (struct rseq_cs, include/uapi/linux/rseq.h) and by the signature in front of each abort handler.

use crate::{address::ImageOffset, image::Image};
use std::{collections::HashMap, ops::Range};

/// RSEQ_SIG of x86: the last four bytes of an `ud1` in front of an abort handler.
const SIGNATURE: [u8; 4] = 0x5305_3053_u32.to_le_bytes();
/// Length of a descriptor, and what it is aligned to.
const DESCRIPTOR: usize = 32;
/// No sequence is longer; they are a few instructions.
const LENGTH_MOST: u64 = 4096;

/// The sequences of `image`, with their abort handlers' signatures.
pub(super) fn critical_sections(image: &Image) -> Vec<Range<ImageOffset>> {
    let code: Vec<(u64, &[u8])> = bytes_of(image, true);
    // Whoever has no signature has no sequence: the kernel insists on it.
    let signed: Vec<u64> = code
        .iter()
        .flat_map(|&(start, bytes)| {
            memchr::memmem::find_iter(bytes, &SIGNATURE).map(move |at| start + at as u64 + SIGNATURE.len() as u64)
        })
        .collect();
    if signed.is_empty() {
        return Vec::new();
    }
    let relocated: HashMap<u64, u64> = image.relative_pointers().into_iter().map(|(at, to)| (at.0, to.0)).collect();
    let mut found = Vec::new();
    for (start, bytes) in bytes_of(image, false) {
        let misaligned = (start.wrapping_neg() % DESCRIPTOR as u64) as usize;
        let tail = bytes.get(misaligned..).unwrap_or_default();
        for (index, descriptor) in tail.as_chunks::<DESCRIPTOR>().0.iter().enumerate() {
            let at = start + (misaligned + index * DESCRIPTOR) as u64;
            let field = |offset: usize| u64::from_le_bytes(std::array::from_fn(|byte| descriptor[offset + byte]));
            let address = |offset: usize| relocated.get(&(at + offset as u64)).copied().unwrap_or(field(offset));
            let (version, begin, length, abort) = (field(0) as u32, address(8), field(16), address(24));
            if version == 0 && (1..LENGTH_MOST).contains(&length) && signed.contains(&abort) {
                found.push(ImageOffset(begin)..ImageOffset(begin.saturating_add(length)));
            }
        }
    }
    // The handler runs natively as well, if only its beginning: the kernel compares the signature at each abort.
    found.extend(signed.into_iter().map(|abort| ImageOffset(abort - 7)..ImageOffset(abort + 16)));
    found
}

fn bytes_of(image: &Image, executable: bool) -> Vec<(u64, &[u8])> {
    let segments = image.segments().iter().filter(|segment| segment.executable == executable);
    segments
        .filter_map(|segment| {
            let size = usize::try_from(segment.file_size).ok()?;
            Some((segment.address.0, image.bytes_at(segment.address, size)?))
        })
        .collect()
}
