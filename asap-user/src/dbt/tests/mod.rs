//! The translator on real files, on random code, and on programs that run translated.

mod whole_files;

use super::*;
use crate::{
    address::ImageOffset,
    image::{Image, ImageBytes},
};
use std::{path::Path, sync::Arc};

/// What guards a test asks for.
#[derive(Clone, Copy, Debug)]
struct Guards {
    shadow_stack: Option<ShadowForm>,
    targets: bool,
    syscalls: bool,
}

const NONE: Guards = Guards { shadow_stack: None, targets: false, syscalls: false };
const SHADOW: Guards = Guards { shadow_stack: Some(ShadowForm::Displaced), ..NONE };
const ALL: Guards = Guards { shadow_stack: Some(ShadowForm::Segment), targets: true, syscalls: true };
const FOLDED: Guards = Guards { shadow_stack: Some(ShadowForm::Folded), ..ALL };

fn read(path: &Path) -> Option<Arc<Image>> {
    let bytes = std::fs::read(path).ok()?;
    Some(Arc::new(Image::parse(&path.display().to_string(), ImageBytes::from(bytes)).expect("an image")))
}

/// First page behind the image.
fn image_end(image: &Image) -> u64 {
    let ends = image.segments().iter().map(|segment| segment.address.0 + segment.memory_size);
    ends.max().unwrap_or_default().next_multiple_of(4096)
}

/// Cache, trap slots and constants behind the image, in this order.
fn options(image: &Image, analysis: &Analysis, guards: Guards) -> Options {
    let cache = image_end(image) + 0x1000;
    let cache_end = cache + (analysis.code_bytes() * 4).next_multiple_of(4096) + 0x10000;
    let traps_end = cache_end + analysis.code_bytes().next_multiple_of(4096) + 0x1000;
    Options {
        cache: ImageOffset(cache)..ImageOffset(cache_end),
        traps: ImageOffset(cache_end)..ImageOffset(traps_end),
        constants: ImageOffset(traps_end),
        shadow_stack: guards.shadow_stack,
        targets: guards.targets,
        syscalls: guards.syscalls,
        ..Options::default()
    }
}

/// Translates all pages.
fn translate_all(translator: &mut Translator) -> Vec<TranslatedPage> {
    let pages = translator.analysis().pages();
    pages.into_iter().map(|page| translator.translate_page(page, &[]).expect("translated")).collect()
}
