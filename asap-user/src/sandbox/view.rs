//! The memory map of a process as it would be without the sandbox. Who looks for modules, or wants to map a page of one again,
//! finds them at their places. Pure.

use super::record::Record;
use crate::{
    address::TargetAddr,
    process::{
        curtain,
        maps::{Mapping, Maps},
    },
};
use std::ops::Range;

/// `maps` with the files back at the places of the curtains, and without the spares.
#[must_use]
pub fn as_native(maps: Maps, record: &Record) -> Maps {
    let is_spare = |mapping: &Mapping| mapping.is_file() && record.is_spare(mapping.range.start);
    let spares: Vec<Mapping> = maps.0.iter().filter(|mapping| is_spare(mapping)).cloned().collect();
    let shown = maps.0.into_iter().filter(|mapping| !is_spare(mapping)).map(|mapping| {
        let Some(text) = record.text_at(mapping.range.start).filter(|_| is_curtain(&mapping)) else { return mapping };
        let Some(spare) = text.spare_range() else { return mapping };
        let offset = mapping.range.start.0 - text.start.0;
        let behind = spares.iter().find(|file| file.range.contains(&spare.start.offset(offset as i64)));
        match behind {
            Some(file) => Mapping { file_offset: text.file_offset + offset, range: mapping.range, ..file.clone() },
            None => mapping,
        }
    });
    Maps(shown.collect())
}

/// Where the file's text is to be read that lies behind curtains: the ranges of the curtains, and how far on from there.
#[must_use]
pub fn elsewhere(maps: &Maps, record: &Record) -> Vec<(Range<TargetAddr>, i64)> {
    let behind = maps.0.iter().filter(|mapping| is_curtain(mapping)).filter_map(|mapping| {
        let text = record.text_at(mapping.range.start)?;
        Some((mapping.range.clone(), text.spare?.wrapping_distance(text.start)))
    });
    behind.collect()
}

/// Whether it is a curtain of ours.
#[must_use]
pub fn is_curtain(mapping: &Mapping) -> bool {
    mapping.name.starts_with(curtain::NAME)
}

#[cfg(test)]
mod tests {
    use super::{super::record::*, *};

    #[test]
    fn files_are_shown_at_their_places() {
        let maps = Maps::parse(
            "\
555555554000-555555556000 r--p 00000000 fe:00 123                        /usr/sbin/a
555555556000-555555558000 r-xp 00000000 00:01 7                          /memfd:asap-text (deleted)
555555558000-555555559000 r-xp 00004000 fe:00 123                        /usr/sbin/a
555555559000-555555560000 r-xp 00003000 00:01 7                          /memfd:asap-text (deleted)
7f0000002000-7f000000c000 r-xp 00002000 fe:00 123                        /usr/sbin/a
7f000000c000-7f000000d000 r-xp 00000000 fe:00 124                        /usr/lib/b
",
        );
        let text = Text {
            start: TargetAddr(0x5555_5555_6000),
            end: TargetAddr(0x5555_5556_0000),
            spare: Some(TargetAddr(0x7f00_0000_2000)),
            device: "fe:00".to_owned(),
            inode: 123,
            file_offset: 0x2000,
            lock: None,
            region: None,
        };
        let record = Record { state: State::Inside, since: 0, texts: vec![text], ..Record::default() };
        let native = as_native(maps.clone(), &record);
        let shown: Vec<_> = native.0.iter().map(|m| (m.range.start.0, m.file_offset, m.name.as_str())).collect();
        assert_eq!(
            shown,
            [
                (0x5555_5555_4000, 0, "/usr/sbin/a"),
                (0x5555_5555_6000, 0x2000, "/usr/sbin/a"),
                (0x5555_5555_8000, 0x4000, "/usr/sbin/a"),
                (0x5555_5555_9000, 0x5000, "/usr/sbin/a"),
                (0x7f00_0000_c000, 0, "/usr/lib/b"),
            ]
        );
        assert_eq!(native.0[1].map_file(9), "/proc/9/map_files/7f0000002000-7f000000c000");
        let range = |start: u64, end: u64| TargetAddr(start)..TargetAddr(end);
        let delta = 0x7f00_0000_2000 - 0x5555_5555_6000;
        let behind =
            [(range(0x5555_5555_6000, 0x5555_5555_8000), delta), (range(0x5555_5555_9000, 0x5555_5556_0000), delta)];
        assert_eq!(elsewhere(&maps, &record), behind);
        let nothing = Record { texts: Vec::new(), ..record };
        assert_eq!(as_native(maps.clone(), &nothing), maps);
    }
}
