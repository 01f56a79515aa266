//! What is known of images, once for all processes in the sandbox.

use super::targets;
use crate::{
    address::ImageOffset,
    dbt::{Analysis, CodeView},
    image::Image,
};
use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
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

#[derive(Default)]
struct Library {
    books: HashMap<Key, Weak<Known>>,
    /// The last that were asked for: libraries come and go, and come again.
    shelf: VecDeque<Arc<Known>>,
}

/// Most images that nobody uses at the moment.
const SHELF_MOST: usize = 16;

static LIBRARY: Mutex<Option<Library>> = Mutex::new(None);

fn library() -> MutexGuard<'static, Option<Library>> {
    LIBRARY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Forgets what nobody uses.
pub fn clear() {
    *library() = None;
}

impl Library {
    fn find(&mut self, key: &Key) -> Option<Arc<Known>> {
        self.books.retain(|_, book| book.strong_count() > 0);
        let found = self.books.get(key).and_then(Weak::upgrade)?;
        self.put_on_shelf(&found);
        Some(found)
    }

    fn put_on_shelf(&mut self, known: &Arc<Known>) {
        self.shelf.retain(|other| !Arc::ptr_eq(other, known));
        self.shelf.push_front(Arc::clone(known));
        self.shelf.truncate(SHELF_MOST);
    }
}

/// What is known of `image`, which lies in the file of that device and inode.
#[must_use]
pub fn known(device: &str, inode: u64, image: &Arc<Image>) -> Arc<Known> {
    let key = (device.to_owned(), inode, image.build_id().map(<[u8]>::to_vec));
    if let Some(found) = library().get_or_insert_default().find(&key) {
        return found;
    }
    let view = CodeView::of(image);
    let mut landing_pads: Vec<ImageOffset> = view.landing_pads.iter().map(|(_, pad)| *pad).collect();
    landing_pads.sort_unstable();
    landing_pads.dedup();
    let analysis = Arc::new(Analysis::of(&view));
    // Hand-written code has neither symbols nor unwind tables; what takes its address is seen in the code.
    let mut targets = targets::known(image);
    let is_nobodys = |at: &ImageOffset| image.function_at(*at).is_none();
    targets.extend(analysis.destinations().into_iter().filter(is_nobodys));
    targets.sort_unstable();
    targets.dedup();
    let made = Arc::new(Known { analysis, targets, landing_pads, untouched: Vec::new(), image: Arc::clone(image) });
    let mut library = library();
    let library = library.get_or_insert_default();
    library.books.insert(key, Arc::downgrade(&made));
    library.put_on_shelf(&made);
    made
}
