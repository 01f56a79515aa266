//! .gnu_debugdata ("MiniDebugInfo", gdb manual): an ELF file with a .symtab, packed with xz, inside a stripped one.

/// Largest unpacked size, bytes.
const UNPACKED_MOST: u64 = 256 << 20;

/// Unpacks .gnu_debugdata; `None` if it is damaged, or grows beyond reason.
pub(super) fn unpack(packed: &[u8]) -> Option<Vec<u8>> {
    // The decoder keeps all it unpacks in memory before it hands anything out, so the size must be known beforehand.
    let size = unpacked_size(packed).filter(|&size| size <= UNPACKED_MOST)?;
    let mut unpacked = Vec::with_capacity(usize::try_from(size).ok()?);
    lzma_rs::xz_decompress(&mut std::io::BufReader::new(packed), &mut unpacked).ok()?;
    Some(unpacked)
}

/// A place in the packed bytes.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn skip(&mut self, count: usize) -> Option<()> {
        self.at = self.at.checked_add(count).filter(|&at| at <= self.bytes.len())?;
        Some(())
    }

    fn byte(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    /// A big-endian u16 that states a size minus one.
    fn size16(&mut self) -> Option<u64> {
        Some((u64::from(self.byte()?) << 8 | u64::from(self.byte()?)) + 1)
    }
}

/// What the chunks say that they unpack to (The .xz File Format 1.2.1; LZMA2 chunk headers). Chunks can't unpack to more
/// than they say.
fn unpacked_size(packed: &[u8]) -> Option<u64> {
    const STREAM_HEADER: usize = 12;
    let checks = [0, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64];
    let check_size = checks[usize::from(packed.get(7)? & 0xf)];
    // The footer's "backward size"; its largest value overflows in the decoder.
    if packed.len().checked_sub(8).and_then(|at| packed.get(at..at + 4)) == Some(&[0xff; 4]) {
        return None;
    }
    let mut cursor = Cursor { bytes: packed, at: STREAM_HEADER };
    let mut total = 0u64;
    loop {
        let block = cursor.at;
        let header = cursor.byte()?;
        if header == 0 {
            return Some(total);
        }
        // One filter, LZMA2: a chain of them would unpack what the first has unpacked.
        if cursor.byte()? & 0x3 != 0 {
            return None;
        }
        cursor.at = block;
        cursor.skip((usize::from(header) + 1) * 4)?;
        loop {
            let control = cursor.byte()?;
            let (unpacked, behind) = match control {
                0 => break,
                1 | 2 => {
                    let size = cursor.size16()?;
                    (size, size)
                }
                0x80.. => {
                    let unpacked = (u64::from(control & 0x1f) << 16) + cursor.size16()?;
                    let properties = u64::from(control >= 0xc0);
                    (unpacked, cursor.size16()? + properties)
                }
                _ => return None,
            };
            total = total.checked_add(unpacked)?;
            cursor.skip(usize::try_from(behind).ok()?)?;
        }
        cursor.skip((block.wrapping_sub(cursor.at)) % 4 + check_size)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::Write,
        process::{Command, Stdio},
    };

    fn xz(arguments: &[&str], plain: &[u8]) -> Vec<u8> {
        let mut child =
            Command::new("xz").args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("xz runs");
        let mut input = child.stdin.take().expect("piped");
        let plain = plain.to_vec();
        let writer = std::thread::spawn(move || input.write_all(&plain).expect("written"));
        let output = child.wait_with_output().expect("it ends");
        writer.join().expect("it ends");
        output.stdout
    }

    #[test]
    fn the_size_is_known_before_anything_is_unpacked() {
        let plain: Vec<u8> = (0..3_000_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        for arguments in [&["-c"][..], &["-c", "--check=crc32"], &["-c", "--block-size=1000000"], &["-c", "-0"]] {
            let packed = xz(arguments, &plain);
            assert_eq!(unpacked_size(&packed), Some(plain.len() as u64), "{arguments:?}");
        }
        let packed = xz(&["-c", "--block-size=100000"], &plain[..250_000]);
        assert_eq!(unpack(&packed).as_deref(), Some(&plain[..250_000]));
        // What does not shrink is stored.
        let noise: Vec<u8> =
            plain.iter().enumerate().map(|(n, b)| b ^ (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let packed = xz(&["-c"], &noise[..100_000]);
        assert_eq!(unpack(&packed).as_deref(), Some(&noise[..100_000]));
    }

    #[test]
    fn damage_and_bombs_unpack_to_nothing() {
        let packed = xz(&["-c"], &[0; 300 << 20]);
        assert!(packed.len() < 100_000, "{}", packed.len());
        assert_eq!(unpacked_size(&packed), Some(300 << 20));
        assert_eq!(unpack(&packed), None);
        let packed = xz(&["-c"], b"a text of no great length, with some repetition: text, text");
        assert!(unpack(&packed).is_some());
        for length in 0..packed.len() {
            assert_eq!(unpack(&packed[..length]), None, "cut at {length}");
            let mut damaged = packed.clone();
            damaged[length] ^= 0xff;
            // Must end without a panic; some bytes are padding in name only, so a result is allowed.
            let _ = unpack(&damaged);
        }
    }
}
