//! Images that were damaged, or made to hurt: an error or less knowledge, in bounded time, and never a panic.

use super::*;
use crate::{address::TargetAddr, random::Random};
use std::time::{Duration, Instant};

/// Asks everything that can be asked.
fn interrogate(bytes: Vec<u8>) {
    let Ok(mut image) = Image::parse("/usr/bin/damaged", ImageBytes::from(bytes.clone())) else { return };
    let _ = (image.build_id_hex(), image.debug_file_candidates(), image.unwind(), image.tls_segment());
    let _ = image.add_symbols_from(ImageBytes::from(bytes.clone()));
    for name in ["victim", "twin", "main", "getenv", "a.c:twin", "ns::f(int)", "nothing"] {
        if let Ok(function) = image.find_function(&FunctionQuery::parse(name)) {
            let _ = image.body(&function);
        }
        let _ = (image.export(name), image.locals(name, Some("a.c")), image.got_slots(name));
    }
    let some: Vec<Function> = image.functions().step_by(5).take(20).collect();
    let addresses = some.iter().map(|function| function.address).chain([0, 0x1100, 1 << 63, u64::MAX].map(ImageOffset));
    for at in addresses.collect::<Vec<_>>() {
        if let Some(function) = image.function_at(at) {
            let _ = image.body(&function);
        }
        let _ = (image.symbolise(at), image.bytes_at(at, 16), image.file_offset(at));
        let _ = (image.load_bias(TargetAddr(at.0), at.0), image.bytes_at(at, usize::MAX));
    }
    for function in some {
        let _ = image.body(&function);
    }
}

#[test]
fn damaged_images_cost_nothing_but_an_error() {
    let shop = two_files(&[]);
    shop.run("strip", &["-o", "bare", "program"]);
    let files = ["program", "bare"].map(|name| fs::read(shop.path(name)).expect("built"));
    // Where the tables are that are followed: headers, the dynamic section and what it names, unwind tables, symbols.
    let tables: Vec<Vec<(usize, usize)>> = ["program", "bare"].map(|name| sections(&shop, name)).to_vec();
    let mut random = Random::new();
    let extremes: [u64; 8] = [0, 1, 0x7fff_ffff, 0xffff_ffff, 1 << 63, u64::MAX, u64::MAX - 0x1000, 0x4000_0000];
    let end = Instant::now() + Duration::from_secs(20);
    for round in 0..6000 {
        let which = round % 2;
        let mut bytes = files[which].clone();
        for _ in 0..1 + random.below(6) {
            let (start, size) = match random.below(3) {
                0 => (0, 0x400),
                _ => tables[which][random.below(tables[which].len())],
            };
            let at = (start + random.below(size)).min(bytes.len() - 8);
            match random.below(3) {
                0 => bytes[at] ^= 1 << random.below(8),
                1 => bytes[at] = random.below(256) as u8,
                _ => bytes[at & !7..(at & !7) + 8].copy_from_slice(&extremes[random.below(8)].to_le_bytes()),
            }
        }
        if round % 7 == 0 {
            bytes.truncate(random.below(files[which].len()));
        }
        interrogate(bytes);
        if Instant::now() > end {
            println!("ended after {round} rounds");
            break;
        }
    }
}

/// File ranges of the sections whose contents are followed.
fn sections(shop: &Workshop, name: &str) -> Vec<(usize, usize)> {
    let followed = [
        ".dynamic",
        ".dynsym",
        ".dynstr",
        ".gnu.hash",
        ".rela.dyn",
        ".rela.plt",
        ".eh_frame",
        ".eh_frame_hdr",
        ".symtab",
    ];
    let listing = shop.run("readelf", &["-SW", name]);
    let mut found = Vec::new();
    for line in listing.lines() {
        let words: Vec<&str> = line.split(']').nth(1).unwrap_or_default().split_whitespace().collect();
        if let [section, _, _, offset, size, ..] = words[..]
            && (followed.contains(&section) || section.starts_with(".note"))
        {
            let hex = |text| usize::from_str_radix(text, 16).expect("hex");
            found.push((hex(offset), hex(size)));
        }
    }
    assert!(found.len() >= 8, "{listing}");
    found
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 200, failure_persistence: None, ..Default::default() })]

    #[test]
    fn random_bytes_behind_a_header_never_panic(
        rest in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..2000),
        programs in 0u16..6, sections in 0u16..6, kind in 2u8..4,
    ) {
        let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
        bytes.resize(64, 0);
        (bytes[16], bytes[18], bytes[20]) = (kind, 62, 1);
        // Both tables follow the header; their entries are random.
        (bytes[32], bytes[40], bytes[52]) = (64, 64, 64);
        bytes[54..56].copy_from_slice(&56u16.to_le_bytes());
        bytes[56..58].copy_from_slice(&programs.to_le_bytes());
        bytes[58..60].copy_from_slice(&64u16.to_le_bytes());
        bytes[60..62].copy_from_slice(&sections.to_le_bytes());
        bytes.extend(rest);
        // Segment types that mean something.
        for (index, kind) in [1u32, 2, 4, 0x6474_e550, 7].into_iter().enumerate() {
            if let Some(place) = bytes.get_mut(64 + index * 56..68 + index * 56) {
                place.copy_from_slice(&kind.to_le_bytes());
            }
        }
        interrogate(bytes);
    }

    #[test]
    fn random_names_never_panic(name in "(_Z|_R|_ZN|_RNv)?[A-Za-z0-9_.$:<>() ]{0,60}") {
        let _ = demangle(&name);
        let wanted = names::Wanted::new(&name);
        let _ = (wanted.can_be(name.as_bytes()), wanted.is(&name), names::bare_identifier(&name));
        let _ = FunctionQuery::parse(&name);
    }
}

#[test]
fn names_that_overlap_again_and_again_cost_bounded_time() {
    // A .symtab of 200,000 functions whose names are the tails of one name of a megabyte.
    let shop = Workshop::with(&[("m.c", "int main(void) { return 0; }")]);
    shop.run("gcc", &["-o", "m", "m.c"]);
    let mut bytes = fs::read(shop.path("m")).expect("built");
    let (symbols, strings) = (200_000usize, 1usize << 20);
    let sections = bytes.len();
    bytes.resize(sections + 4 * 64, 0);
    let symtab_at = bytes.len();
    bytes.extend(std::iter::repeat_n([0u8; 24], 1).flatten());
    for index in 1..symbols {
        bytes.extend(((strings - 1 - index) as u32).to_le_bytes());
        bytes.extend([0x12, 0, 1, 0]);
        bytes.extend((0x1000 + index as u64).to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
    }
    let strtab_at = bytes.len();
    bytes.extend(std::iter::repeat_n(b'x', strings - 1).chain([0]));
    let mut section = |index: usize, kind: u32, at: usize, size: usize, link: u32, entry: u64| {
        let header = &mut bytes[sections + index * 64..][..64];
        header[4..8].copy_from_slice(&kind.to_le_bytes());
        header[24..32].copy_from_slice(&(at as u64).to_le_bytes());
        header[32..40].copy_from_slice(&(size as u64).to_le_bytes());
        header[40..44].copy_from_slice(&link.to_le_bytes());
        header[56..64].copy_from_slice(&entry.to_le_bytes());
    };
    section(1, elf_type::SYMTAB, symtab_at, symbols * 24, 2, 24);
    section(2, elf_type::STRTAB, strtab_at, strings, 0, 0);
    section(3, elf_type::STRTAB, strtab_at, strings, 0, 0);
    bytes[40..48].copy_from_slice(&(sections as u64).to_le_bytes());
    bytes[60..62].copy_from_slice(&4u16.to_le_bytes());
    bytes[62..64].copy_from_slice(&3u16.to_le_bytes());
    let start = Instant::now();
    let image = Image::parse("tails", ImageBytes::from(bytes)).expect("an image");
    let read = image.functions().count();
    assert!(read > 1000 && read < symbols / 2, "{read}");
    assert!(image.find_function(&FunctionQuery::parse("yyy")).is_err());
    // Unbounded, it would read 20 GB of names.
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

mod elf_type {
    pub const SYMTAB: u32 = 2;
    pub const STRTAB: u32 = 3;
}
