//! What is known of images, once for all processes in the sandbox.

use super::targets;
use crate::{
    address::ImageOffset,
    dbt::{Analysis, CodeView},
    image::Image,
};
use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, Mutex, PoisonError, Weak},
};

/// An image that was analysed.
pub struct Known {
    /// The image.
    pub image: Arc<Image>,
    /// Its code.
    pub analysis: Arc<Analysis>,
    /// Where indirect calls and jumps may lead, sorted.
    pub targets: Vec<ImageOffset>,
    /// Where exceptions land, sorted.
    pub landing_pads: Vec<ImageOffset>,
    /// Code in which nothing may change.
    pub untouched: Vec<Range<ImageOffset>>,
}

/// By device, inode, and the file's checksum of its own (build-id): as long as somebody uses it.
type Key = (String, u64, Option<Vec<u8>>);

static LIBRARY: Mutex<Option<HashMap<Key, Weak<Known>>>> = Mutex::new(None);

/// What is known of `image`, which lies in the file of that device and inode.
#[must_use]
pub fn known(device: &str, inode: u64, image: &Arc<Image>) -> Arc<Known> {
    let key = (device.to_owned(), inode, image.build_id().map(<[u8]>::to_vec));
    let find = |library: &mut Option<HashMap<Key, Weak<Known>>>| {
        let books = library.get_or_insert_with(HashMap::new);
        books.retain(|_, book| book.strong_count() > 0);
        books.get(&key).and_then(Weak::upgrade)
    };
    if let Some(found) = find(&mut LIBRARY.lock().unwrap_or_else(PoisonError::into_inner)) {
        return found;
    }
    let view = CodeView::of(image);
    let mut landing_pads: Vec<ImageOffset> = view.landing_pads.iter().map(|(_, pad)| *pad).collect();
    landing_pads.sort_unstable();
    landing_pads.dedup();
    let made = Arc::new(Known {
        analysis: Arc::new(Analysis::of(&view)),
        targets: targets::known(image),
        landing_pads,
        untouched: Vec::new(),
        image: Arc::clone(image),
    });
    let mut library = LIBRARY.lock().unwrap_or_else(PoisonError::into_inner);
    library.get_or_insert_with(HashMap::new).insert(key, Arc::downgrade(&made));
    made
}
