//! Executables of all layouts, and what is none.

use super::*;
use crate::address::{LoadBias, TargetAddr};

#[test]
fn the_load_bias_follows_from_any_piece_of_the_text() {
    let shop = two_files(&[]);
    let image = shop.read("program");
    assert!(image.is_position_independent() && image.build_id().is_some_and(|id| id.len() == 20));
    let text = image.segments().iter().find(|segment| segment.executable).expect("text");
    assert!(text.readable && !text.writable);
    let bias = LoadBias(0x5555_5555_4000);
    let start = text.address.in_target(bias);
    assert_eq!(image.load_bias(start.page(), text.file_offset & !0xfff), Some(bias));
    // A text whose first page was moved elsewhere is two mappings.
    if text.file_size > 4096 {
        assert_eq!(image.load_bias(start.page().offset(4096), (text.file_offset & !0xfff) + 4096), Some(bias));
    }
    assert_eq!(image.load_bias(start.page(), 1 << 40), None);
    assert_eq!(image.file_offset(text.address), Some(text.file_offset));
    assert_eq!(image.file_offset(ImageOffset(u64::MAX)), None);
}

#[test]
fn position_dependent_and_static_executables_are_read() {
    for flags in [&["-no-pie"][..], &["-static"], &["-static-pie"], &["-no-pie", "-fuse-ld=gold"]] {
        let shop = Workshop::with(TWO_FILES);
        let flags = [&["-O2", "-o", "program", "a.c", "b.c"], flags].concat();
        shop.run("gcc", &flags);
        let image = shop.read("program");
        assert_eq!(image.is_position_independent(), flags.contains(&"-static-pie"), "{flags:?}");
        let victim = find(&image, "victim");
        assert_eq!(image.symbolise(victim.address).map(|(_, offset)| offset), Some(0));
        let bare = shop.stripped("program").function_at(victim.address).expect("from the unwind table");
        assert_eq!((bare.address, bare.size), (victim.address, victim.size), "{flags:?}");
        if !image.is_position_independent() {
            let text = image.segments().iter().find(|segment| segment.executable).expect("text");
            let page = TargetAddr(text.address.0).page();
            assert_eq!(image.load_bias(page, text.file_offset & !0xfff), Some(LoadBias(0)));
        }
        if flags.contains(&"-static") {
            assert!(image.needed().is_empty() && image.dynamic_address().is_none());
            assert!(matches!(why_not(&image, "strlen"), LookupError::Ifunc(_)));
        }
    }
}

#[test]
fn an_ifunc_is_refused_by_name() {
    let source = r#"
static int one(void) { return 1; }
static int (*choose(void))(void) { return one; }
int chosen(void) __attribute__((ifunc("choose")));
int main(void) { return chosen(); }
"#;
    let shop = Workshop::with(&[("i.c", source)]);
    shop.run("gcc", &["-O2", "-rdynamic", "-o", "i", "i.c"]);
    for image in [shop.read("i"), shop.stripped("i")] {
        assert!(matches!(why_not(&image, "chosen"), LookupError::Ifunc(_)));
        assert_eq!(image.export("chosen").map(|symbol| symbol.kind), Some(SymbolKind::Ifunc));
    }
}

#[test]
fn unwind_tables_without_an_index_tell_the_same() {
    let shop = two_files(&[]);
    let source = shop.read("program");
    let victim = find(&source, "victim");
    // As if the linker had not written one: the program header that leads to it becomes PT_NULL.
    let mut bytes = fs::read(shop.path("program.stripped")).unwrap_or_default();
    if bytes.is_empty() {
        let _ = shop.stripped("program");
        bytes = fs::read(shop.path("program.stripped")).expect("made");
    }
    let programs = u64::from_le_bytes(bytes[32..40].try_into().expect("eight")) as usize;
    let count = usize::from(u16::from_le_bytes([bytes[56], bytes[57]]));
    let header = (0..count).map(|index| programs + index * 56);
    let at =
        header.into_iter().find(|&at| bytes[at..at + 4] == 0x6474_e550_u32.to_le_bytes()).expect("PT_GNU_EH_FRAME");
    bytes[at..at + 4].fill(0);
    let without = Image::parse("program", ImageBytes::from(bytes)).expect("an image");
    assert!(without.unwind().eh_frame_hdr.is_none() && without.unwind().eh_frame.is_some());
    let with = read(&shop.path("program.stripped"));
    assert_eq!(without.function_at(ImageOffset(victim.address.0 + 5)), with.function_at(victim.address));
    assert_eq!(without.function_at(victim.address).map(|function| function.size), Some(victim.size));
    assert!(without.functions().eq(with.functions()) && with.functions().count() > 5);
}

#[test]
fn other_kinds_of_files_are_refused_by_name() {
    let parse = |bytes: Vec<u8>| Image::parse("x", ImageBytes::from(bytes));
    assert!(matches!(parse(Vec::new()), Err(ImageError::Damaged { .. })));
    assert!(matches!(parse(vec![7; 4096]), Err(ImageError::Damaged { .. })));
    let mut arm = vec![0; 64];
    arm[..6].copy_from_slice(b"\x7fELF\x02\x01");
    arm[16] = 3;
    arm[18] = 183;
    assert!(matches!(parse(arm.clone()), Err(ImageError::Foreign { machine: 183, .. })));
    arm[4] = 1;
    assert!(matches!(parse(arm), Err(ImageError::Foreign { class: 1, .. })));
    let shop = Workshop::with(&[("o.c", "int f(void) { return 1; }")]);
    shop.run("gcc", &["-c", "o.c"]);
    let object = parse(fs::read(shop.path("o.o")).expect("built")).expect_err("an object file");
    assert!(object.to_string().ends_with("it is a 64-bit x86-64 object file"), "{object}");
}
