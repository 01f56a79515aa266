//! Patch files: read, laid out, linked against a target that has everything.

use crate::{
    address::TargetAddr,
    patch::{Bases, Import, ImportKind, PatchObject, Resolution, Resolver},
};

struct Everything;

impl Resolver for Everything {
    fn resolve(&self, import: &Import) -> Option<Resolution> {
        Some(match import.kind {
            ImportKind::Any => Resolution::Address(TargetAddr(0x5000_0000)),
            ImportKind::Tls => Resolution::TlsOffset(-64),
        })
    }

    fn original(&self, _: &str) -> Option<TargetAddr> {
        Some(TargetAddr(0x5000_1000))
    }
}

pub(super) fn check(bytes: &[u8]) {
    let Ok(object) = PatchObject::read(&[("fix.o".to_owned(), bytes.to_vec())]) else { return };
    let _ = (object.functions(), object.variables(), object.imports(), object.originals());
    let _ = (object.replacements().len(), object.hooks().all().count());
    let layout = object.layout();
    let bases = Bases { code: TargetAddr(0x4000_0000), rodata: TargetAddr(0x4800_0000), data: TargetAddr(0x4c00_0000) };
    let Ok(patch) = object.link(&bases, &Everything) else { return };
    assert_eq!((patch.code.len(), patch.data.len()), (layout.code.size, layout.data.size), "as much as was asked for");
    for symbol in &patch.symbols {
        let _ = (patch.symbol(&symbol.name), patch.function_range(&symbol.name));
    }
    // The same patch twice in one link is refused or linked, like any two files.
    let _ = PatchObject::read(&[("a.o".to_owned(), bytes.to_vec()), ("b.o".to_owned(), bytes.to_vec())]);
}
