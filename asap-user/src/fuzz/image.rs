//! ELF images of targets and their debug files: everything that can be asked of one.

use crate::{
    address::{ImageOffset, TargetAddr},
    image::{Function, FunctionQuery, Image, ImageBytes, demangle},
};

pub(super) fn check(bytes: &[u8]) {
    let Ok(image) = Image::parse("/usr/bin/damaged", ImageBytes::from(bytes.to_vec())) else { return };
    ask(&image);
    if let Ok(with_itself) = image.with_symbols_from(ImageBytes::from(bytes.to_vec())) {
        ask(&with_itself);
    }
}

fn ask(image: &Image) {
    let _ = (image.build_id_hex(), image.debug_file_candidates(), image.tls_segment(), image.relro());
    let _ = (image.soname(), image.needed(), image.dynamic_address(), image.code_pointers(), image.bare_frames());
    let functions: Vec<Function> = image.functions().take(64).collect();
    for function in &functions {
        let _ = image.body(function);
        if let Some(name) = &function.name {
            let _ = (demangle(name), image.export(name), image.locals(name, None), image.got_slots(name));
            let _ = image.find_function(&FunctionQuery::parse(name));
        }
    }
    for name in ["victim", "a.c:victim", "ns::victim(int)", "_ZN2ns6victimEi", ""] {
        let _ = (image.find_function(&FunctionQuery::parse(name)), image.locals(name, Some("a.c")));
    }
    let places =
        functions.iter().map(|function| function.address).chain([0, 0x1100, 1 << 63, u64::MAX].map(ImageOffset));
    for at in places {
        let _ = (image.function_at(at), image.symbolise(at), image.file_offset(at), image.unwind_entry(at));
        let _ = (image.bytes_at(at, 16), image.bytes_at(at, usize::MAX), image.load_bias(TargetAddr(at.0), at.0));
        let _ = image.landing_pads(at).len();
    }
    for range in image.unwind_bounds() {
        assert!(range.start <= range.end);
    }
}
