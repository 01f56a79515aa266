//! The ledger that lies in a target's memory, where the target could write anything: the record of patches and sandbox, and a
//! memory map, with a NUL between them.

use crate::{engine::ledger::Ledger, process::maps::Maps, sandbox};

pub(super) fn check(bytes: &[u8]) {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    let Ok(ledger) = serde_json::from_slice::<Ledger>(&bytes[..end]) else { return };
    let maps = Maps::parse(&String::from_utf8_lossy(bytes.get(end + 1..).unwrap_or_default()));
    for patch in ledger.patches.iter().chain(&ledger.replaced) {
        let _ = patch.report();
        let _ = (patch.code.len(), patch.rodata.is_empty(), patch.data.contains(patch.code.start));
    }
    for page in &ledger.pages {
        let _ = page.spare_span().len();
    }
    if let Some(record) = &ledger.sandbox {
        let lines = maps.0.len();
        let elsewhere = sandbox::elsewhere(&maps, record);
        assert!(elsewhere.len() <= lines && sandbox::as_native(maps, record).0.len() <= lines);
    }
    // What was read is what would be written.
    let text = serde_json::to_vec(&ledger).expect("a ledger can be written");
    let again: Ledger = serde_json::from_slice(&text).expect("what was written can be read");
    assert_eq!(again, ledger);
}
