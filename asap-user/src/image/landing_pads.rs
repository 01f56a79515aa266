//! Where exceptions land: the handlers of a function may lie in its cold part, and only the exception tables lead there
//! (Itanium C++ ABI, "Exception Handling Tables", the language-specific data area of gcc and clang).

use super::{Image, unwind::Tables};
use crate::address::ImageOffset;
use gimli::{EndianSlice, LittleEndian, Pointer, Reader};

/// Most call sites that are read of one table.
const CALL_SITES_MOST: usize = 1 << 16;
/// DW_EH_PE_omit.
const OMITTED: u8 = 0xff;

type Bytes<'a> = EndianSlice<'a, LittleEndian>;

impl Tables {
    /// The landing pads of the code that the table entry at `start` describes.
    pub(super) fn landing_pads(&self, image: &Image, start: ImageOffset) -> Vec<ImageOffset> {
        let Some(Pointer::Direct(table)) = self.lsda(image, start) else { return Vec::new() };
        let Some(bytes) = image.file_tail(ImageOffset(table)) else { return Vec::new() };
        read(bytes, table, start.0).unwrap_or_default()
    }
}

/// Reads the table at address `at`, of the function that begins at `function`.
fn read(bytes: &[u8], at: u64, function: u64) -> Option<Vec<ImageOffset>> {
    let mut input = EndianSlice::new(bytes, LittleEndian);
    let base = match input.read_u8().ok()? {
        OMITTED => function,
        encoding => {
            let place = at.wrapping_add((bytes.len() - input.len()) as u64);
            encoded(&mut input, encoding, place)?
        }
    };
    if input.read_u8().ok()? != OMITTED {
        input.read_uleb128().ok()?;
    }
    let encoding = input.read_u8().ok()?;
    let length = usize::try_from(input.read_uleb128().ok()?).ok()?;
    let mut sites = input.split(length).ok()?;
    let mut pads = Vec::new();
    while !sites.is_empty() && pads.len() < CALL_SITES_MOST {
        let (_start, _length) = (encoded(&mut sites, encoding, 0)?, encoded(&mut sites, encoding, 0)?);
        let pad = encoded(&mut sites, encoding, 0)?;
        let _action = sites.read_uleb128().ok()?;
        if pad != 0 {
            pads.push(ImageOffset(base.wrapping_add(pad)));
        }
    }
    pads.sort_unstable();
    pads.dedup();
    Some(pads)
}

/// A value in one of the encodings that compilers use here (LSB, "DWARF Exception Header Encoding"); `place` is its address.
fn encoded(input: &mut Bytes<'_>, encoding: u8, place: u64) -> Option<u64> {
    let value = match encoding & 0x0f {
        0x00 | 0x04 | 0x0c => input.read_u64().ok()?,
        0x01 => input.read_uleb128().ok()?,
        0x02 => u64::from(input.read_u16().ok()?),
        0x03 => u64::from(input.read_u32().ok()?),
        0x09 => input.read_sleb128().ok()?.cast_unsigned(),
        0x0a => i64::from(input.read_i16().ok()?).cast_unsigned(),
        0x0b => i64::from(input.read_i32().ok()?).cast_unsigned(),
        _ => return None,
    };
    match encoding & 0xf0 {
        0x00 => Some(value),
        0x10 => Some(value.wrapping_add(place)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn landing_pads_count_from_the_function_or_from_where_the_table_says() {
        // No LPStart, no types, call sites in ULEB128: one without a pad, one with.
        let plain = [0xff, 0xff, 0x01, 8, 0, 5, 0, 0, 5, 3, 0x20, 1];
        assert_eq!(read(&plain, 0x9000, 0x1000), Some(vec![ImageOffset(0x1020)]));
        // LPStart relative to its place (0x9001), sdata4; call sites of four bytes.
        let mut moved = vec![0x1b];
        moved.extend((0x500i32 - 0x9001).to_le_bytes());
        moved.extend([0xff, 0x03, 13]);
        moved.extend([0u32, 9, 0x10].into_iter().flat_map(u32::to_le_bytes));
        moved.push(0);
        assert_eq!(read(&moved, 0x9000, 0x1000), Some(vec![ImageOffset(0x510)]));
        for length in 0..moved.len() {
            assert_eq!(read(&moved[..length], 0x9000, 0x1000), None, "cut at {length}");
        }
        assert_eq!(read(&[0xff, 0xff, 0x07, 1, 1], 0, 0), None, "an encoding that does not exist");
    }
}
