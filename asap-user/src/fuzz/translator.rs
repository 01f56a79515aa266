//! The translator on images that were made to hurt: analysis, and the pages with every guard.

use crate::{
    address::{ImageOffset, PAGE_SIZE},
    dbt::{Analysis, CodeView, Options, ShadowForm, Translator},
    image::{Image, ImageBytes},
};
use std::sync::Arc;

/// Most pages of one image that are translated here.
const PAGES: usize = 16;
/// Larger images are left to the tests on real files.
const SIZE_MOST: usize = 1 << 16;

pub(super) fn check(bytes: &[u8]) {
    if bytes.len() > SIZE_MOST {
        return;
    }
    let Ok(image) = Image::parse("/usr/bin/damaged", ImageBytes::from(bytes.to_vec())) else { return };
    let analysis = Arc::new(Analysis::of(&CodeView::of(&image)));
    let ends = image.segments().iter().map(|segment| segment.address.0.saturating_add(segment.memory_size));
    let end = ends.max().unwrap_or_default() / PAGE_SIZE;
    let Some(cache) = end.checked_add(2).and_then(|page| page.checked_mul(PAGE_SIZE)) else { return };
    let Some(end) = cache.checked_add(0x40_0000) else { return };
    for shadow_stack in [None, Some(ShadowForm::Displaced), Some(ShadowForm::Segment), Some(ShadowForm::Folded)] {
        let guards = shadow_stack.is_some();
        let options = Options {
            cache: ImageOffset(cache)..ImageOffset(cache + 0x10_0000),
            traps: ImageOffset(cache + 0x10_0000)..ImageOffset(cache + 0x20_0000),
            constants: ImageOffset(end),
            shadow_stack,
            targets: guards,
            syscalls: guards,
            ..Options::default()
        };
        let mut translator = Translator::new(Arc::clone(&analysis), options);
        for page in analysis.pages().into_iter().take(PAGES) {
            let Ok(translated) = translator.translate_page(page, &[]) else { break };
            assert_eq!(translated.page, page);
            for displaced in &translated.displaced {
                assert!(translated.place_of(displaced.fragment).is_some(), "a thread there can be moved back");
            }
        }
        assert!(translator.used().0 <= 0x10_0000, "it keeps to its room");
    }
}
