//! Files of `/proc`. The kernel writes them, but names in them are the target's, and so are numbers.

use crate::{
    address::TargetAddr,
    process::{
        info::{self, ProcessInfo, Signals},
        locked::Lock,
        maps::Maps,
    },
    quiesce,
};

pub(super) fn check(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    check_maps(&text);
    let (status, stat) = text.split_once('\0').unwrap_or((&text, &text));
    let facts = ProcessInfo::parse(status, stat);
    assert!(!facts.name.contains('\n'), "a line is a line");
    let _ = info::state_of(bytes);
    let signals = Signals::parse(status);
    let _ = (signals.handler_is_due(), signals.catches(i32::MIN), signals.catches(64));
    let _ = (info::parse_innermost_number(status), info::parse_thread_group(status));
    let _ = quiesce::parse_thread_files(&text);
    for at in [0, 0x1000, !0xfff_u64] {
        let _ = Lock::parse(&text, TargetAddr(at));
    }
}

fn check_maps(text: &str) {
    let maps = Maps::parse(text);
    for mapping in &maps.0 {
        assert!(mapping.range.start <= mapping.range.end && !mapping.name.contains('\n'));
        let _ = (mapping.len(), mapping.is_file(), mapping.path(), mapping.map_file(1));
        let _ = maps.at(mapping.range.start);
        for (length, reach) in [(0, 0), (0x1000, 1 << 31), (u64::MAX, u64::MAX), (0x41000, 1 << 46)] {
            let Some(gap) = maps.gap(&mapping.range, length, reach) else { continue };
            // The kernel lists mappings in order; of others it is enough that nothing overflows.
            let is_sorted = maps.0.windows(2).all(|pair| pair[0].range.end <= pair[1].range.start);
            let overlaps = |other: &crate::process::maps::Mapping| {
                other.range.start.0 < gap.0.saturating_add(length) && gap < other.range.end
            };
            assert!(!is_sorted || !maps.0.iter().any(|other| !other.is_empty() && overlaps(other)), "{gap}");
        }
    }
}
