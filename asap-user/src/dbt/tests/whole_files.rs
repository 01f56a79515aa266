//! Whole files of the system, translated for every set of guards: what must hold for each page of each.

use super::*;
use crate::address::PAGE_SIZE;
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, OpKind};
use std::collections::{BTreeMap, BTreeSet};

const FILES: [&str; 8] = [
    "/usr/lib/x86_64-linux-gnu/libc.so.6",
    "/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
    "/usr/lib/x86_64-linux-gnu/libstdc++.so.6",
    "/usr/sbin/nginx",
    "/usr/sbin/apache2",
    "/usr/bin/redis-server",
    "/usr/bin/bash",
    "/usr/bin/python3.11",
];

/// What of the translated pages must hold together.
struct Translated {
    bytes: BTreeMap<u64, [u8; PAGE_SIZE as usize]>,
    cache: Vec<u8>,
    cache_at: u64,
}

impl Translated {
    fn fetch(&self, at: u64) -> Option<u8> {
        if let Some(offset) = at.checked_sub(self.cache_at).filter(|&offset| offset < self.cache.len() as u64) {
            return Some(self.cache[offset as usize]);
        }
        self.bytes.get(&(at & !(PAGE_SIZE - 1))).map(|page| page[(at % PAGE_SIZE) as usize])
    }

    fn decode(&self, at: u64) -> Instruction {
        let bytes: Vec<u8> = (at..at + 15).map_while(|at| self.fetch(at)).collect();
        Decoder::with_ip(64, &bytes, at, DecoderOptions::NONE).decode()
    }
}

/// Every jump leads to a fragment or to an instruction that is still there, every fragment decodes, and nothing that control
/// may arrive at has been overwritten.
fn check(path: &Path, guards: Guards) -> Option<(u64, u64, Counts)> {
    let image = read(path)?;
    let analysis = Arc::new(Analysis::of(&CodeView::of(&image)));
    let mut translator = Translator::new(Arc::clone(&analysis), options(&image, &analysis, guards));
    let pages = translate_all(&mut translator);
    let cache_at = translator.options_for_tests().cache.start.0;
    let mut all = Translated { bytes: BTreeMap::new(), cache: Vec::new(), cache_at };
    let mut counts = Counts::default();
    for page in &pages {
        assert_eq!(page.fragments_at.0, cache_at + all.cache.len() as u64, "fragments follow each other");
        all.cache.extend(&page.fragments);
        all.bytes.insert(page.page.0, *page.bytes);
        counts.merge(&page.counts);
    }
    let name = path.display();
    let traps: BTreeSet<u64> = pages.iter().flat_map(|page| page.traps.iter().map(|trap| trap.at.0)).collect();
    for page in &pages {
        let overwritten: BTreeSet<u64> = (page.page.0..page.page.0 + PAGE_SIZE)
            .filter(|&at| {
                analysis
                    .stretch(at)
                    .and_then(|s| s.tail(at, 1).first().copied())
                    .is_some_and(|b| all.fetch(at) != Some(b))
            })
            .collect();
        // Where control may arrive there is an instruction: the native one, or a jump to what stands for it.
        let stretch =
            analysis.stretch(page.page.0).or_else(|| analysis.stretch(page.page.0 + PAGE_SIZE - 1)).expect("code");
        for at in stretch.entries.within(page.page.0..page.page.0 + PAGE_SIZE) {
            let Some(native) = stretch.decode(at) else { continue };
            if !(at..native.next_ip()).any(|byte| overwritten.contains(&byte)) {
                continue;
            }
            let found = all.decode(at);
            assert_eq!(found.flow_control(), FlowControl::UnconditionalBranch, "{name}: {at:#x} {guards:?}");
            let mut to = found.near_branch_target();
            if found.len() == 2 {
                to = all.decode(to).near_branch_target();
            }
            let place = page.place_of(ImageOffset(to)).expect("a fragment");
            assert_eq!((place.native.0, place.undo), (at, Undo::default()), "{name}: {at:#x}");
        }
        // Fragments decode from end to end, and what they jump to is there.
        let (start, end) = (page.fragments_at.0, page.fragments_at.0 + page.fragments.len() as u64);
        let mut at = start;
        let mut starts = BTreeSet::new();
        let mut jumps = Vec::new();
        while at < end {
            let instruction = all.decode(at);
            assert!(!instruction.is_invalid(), "{name}: {at:#x}");
            starts.insert(at);
            if instruction.op0_kind() == OpKind::NearBranch64 {
                jumps.push((at, instruction.near_branch_target()));
            }
            at = instruction.next_ip();
        }
        assert_eq!(at, end, "{name}");
        for (from, to) in jumps {
            let is_native = analysis.part_at(to).is_none()
                || analysis.stretch(to).is_some_and(|s| s.starts.has(to) || s.entries.has(to));
            let is_there =
                if (start..end).contains(&to) { starts.contains(&to) } else { traps.contains(&to) || is_native };
            assert!(is_there, "{name}: {from:#x} jumps to {to:#x}");
            // Not into the middle of what a jump has overwritten.
            if let Some(native) = analysis.stretch(to).and_then(|stretch| stretch.decode(to))
                && let Some(on_page) = pages.iter().find(|p| p.page.0 == to & !(PAGE_SIZE - 1))
            {
                let stays = on_page.displaced.iter().find(|d| d.native.0 == to).is_none_or(|d| !d.is_overwritten);
                assert!(stays, "{name}: {from:#x} jumps to {to:#x}, {:?}", native.code());
            }
        }
        for place in &page.places {
            assert!(
                starts.contains(&place.at.0) || (page.page.0..page.page.0 + PAGE_SIZE).contains(&place.at.0),
                "{name}: a place within an instruction at {}",
                place.at
            );
        }
        for displaced in &page.displaced {
            assert!(starts.contains(&displaced.fragment.0), "{name}: {}", displaced.native);
            let back = page.place_of(displaced.fragment).expect("a place");
            assert_eq!(back.native, displaced.native, "{name}");
        }
    }
    Some((analysis.code_bytes(), translator.used().0, counts))
}

#[test]
fn what_comes_out_of_the_files_of_the_system_holds_together() {
    let mut found = 0;
    for file in FILES {
        for guards in [NONE, SHADOW, ALL, FOLDED] {
            let Some((code, cache, counts)) = check(Path::new(file), guards) else { continue };
            found += 1;
            println!("{file} {guards:?}: {code} bytes of code, {cache} of cache\n{counts}");
            if guards.shadow_stack.is_none() && !guards.targets {
                assert_eq!(cache, 0, "{file}: nothing is displaced where nothing is guarded");
                continue;
            }
            // A translator that finds room for less than this has lost something.
            let done = counts.of(SiteKind::Return, |outcome| matches!(outcome, Outcome::Done(_)));
            let all = counts.of(SiteKind::Return, |_| true);
            assert!(done * 10 > all * 6, "{file}: {done} of {all} returns");
        }
    }
    assert!(found > 0, "none of the files is installed");
}
