//! Translated code of a family of processes: what lies behind their curtains, and in the caches beside. A page is translated when
//! the first thread comes to it. All of it is shared by the process that entered and those that it forks, as is the memory
//! that it is written to.

use super::{library::Known, targets};
use crate::{
    address::{ImageOffset, LoadBias, PAGE_SIZE, TargetAddr},
    dbt::{Counts, Displaced, Options, ShadowForm, TRAP_SLOT, TranslatedPage, Translator, Trap},
    process::curtain::Pages,
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    sync::Arc,
};

/// What of the code of a text is guarded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Returns.
    pub shadow: bool,
    /// Indirect calls and jumps.
    pub targets: bool,
    /// System calls.
    pub syscalls: bool,
}

impl Wanted {
    /// Nothing is: pages need no translation.
    #[must_use]
    pub fn is_nothing(self) -> bool {
        self == Self::default()
    }
}

/// The region beside a text: a page of constants, the cache, the trap slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Its length, bytes.
    pub length: u64,
    /// Offset of the cache.
    pub cache: u64,
    /// Offset of the trap slots.
    pub traps: u64,
}

impl Layout {
    /// For a text of `length` bytes.
    #[must_use]
    pub fn of(length: u64) -> Self {
        let whole = |bytes: u64| bytes.next_multiple_of(PAGE_SIZE);
        let cache = PAGE_SIZE;
        let traps = cache + whole(length * 4 + 0x10000);
        Self { cache, traps, length: traps + whole(length + PAGE_SIZE) }
    }

    /// The trap slots of a region that lies at `at`.
    #[must_use]
    pub fn traps_at(&self, at: TargetAddr) -> Range<TargetAddr> {
        at.offset(self.traps as i64)..at.offset(self.length as i64)
    }

    /// Where cache and slots lie in a region at `at`.
    #[must_use]
    pub fn code_at(&self, at: TargetAddr) -> Range<TargetAddr> {
        at.offset(self.cache as i64)..at.offset(self.length as i64)
    }
}

/// One text.
pub struct TextCode {
    /// Where it is mapped.
    pub range: Range<TargetAddr>,
    /// Where its image's addresses lie.
    pub bias: LoadBias,
    /// The region beside it.
    pub region: TargetAddr,
    /// How that is divided.
    pub layout: Layout,
    /// Its image.
    pub known: Arc<Known>,
    behind: File,
    cache: File,
    translator: Translator,
    pages: BTreeMap<u64, Option<TranslatedPage>>,
    displaced: HashMap<u64, Displaced>,
    traps: HashMap<u64, Trap>,
    counts: Counts,
    refused: Vec<String>,
    /// What can't be guarded does not run, and nothing does when the agent is gone: see [`Fail::Closed`].
    is_closed: bool,
}

/// `int3`: who comes there is ended by SIGTRAP.
const BREAKPOINT: u8 = 0xcc;

/// What is told of a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Pages that were translated.
    pub pages: u64,
    /// Bytes of fragments.
    pub fragments: u64,
    /// What became of its sites.
    pub counts: Counts,
    /// Pages that stay native, and why.
    pub refused: Vec<String>,
}

impl TextCode {
    /// For a text that is about to go behind a curtain whose memory is `behind`.
    #[must_use]
    pub fn new(
        range: Range<TargetAddr>,
        bias: LoadBias,
        known: Arc<Known>,
        wanted: Wanted,
        form: Option<ShadowForm>,
        region: TargetAddr,
        (behind, cache): (File, File),
    ) -> Self {
        let layout = Layout::of(range.end.0 - range.start.0);
        let at = |offset: u64| region.offset(offset as i64).in_image(bias);
        let options = Options {
            cache: at(layout.cache)..at(layout.traps),
            traps: at(layout.traps)..at(layout.length),
            constants: at(0),
            shadow_stack: form.filter(|_| wanted.shadow),
            targets: wanted.targets,
            syscalls: wanted.syscalls,
            untouched: known.untouched.clone(),
            ..Options::default()
        };
        let translator = Translator::new(Arc::clone(&known.analysis), options);
        Self {
            range,
            bias,
            region,
            layout,
            known,
            behind,
            cache,
            translator,
            pages: BTreeMap::new(),
            displaced: HashMap::new(),
            traps: HashMap::new(),
            counts: Counts::default(),
            refused: Vec::new(),
            is_closed: false,
        }
    }

    /// Nothing of it runs but what was translated, also when the agent is gone: nobody has come to it yet.
    ///
    /// # Errors
    /// Memory is short.
    pub fn close(&mut self) -> io::Result<()> {
        self.is_closed = true;
        let page = [BREAKPOINT; PAGE_SIZE as usize];
        (0..self.range.end.0 - self.range.start.0)
            .step_by(page.len())
            .try_for_each(|at| self.behind.write_all_at(&page, at))
    }

    /// Puts a page back as the file has it.
    fn put_native(&self, page: TargetAddr) -> io::Result<()> {
        let at = page.in_image(self.bias);
        let bytes = (1..=PAGE_SIZE as usize).rev().find_map(|length| self.known.image.bytes_at(at, length));
        self.behind.write_all_at(bytes.unwrap_or_default(), page.wrapping_distance(self.range.start).cast_unsigned())
    }

    /// Its cache and slots.
    #[must_use]
    pub fn code(&self) -> Range<TargetAddr> {
        self.layout.code_at(self.region)
    }

    /// What a thread was about to do that stands in a trap slot.
    #[must_use]
    pub fn trap_at(&self, at: TargetAddr) -> Option<Trap> {
        let slot = at.in_image(self.bias).0;
        self.traps.get(&(slot - slot % TRAP_SLOT)).copied()
    }

    /// Where a thread goes on that is to run the native instruction at `at`.
    #[must_use]
    pub fn entry_for(&self, at: TargetAddr) -> TargetAddr {
        match self.displaced.get(&at.in_image(self.bias).0) {
            Some(displaced) if displaced.is_overwritten => displaced.fragment.in_target(self.bias),
            _ => at,
        }
    }

    /// What the instruction at `at` in the cache stands for: the native address, and what must be undone first.
    #[must_use]
    pub fn native_for(&self, at: TargetAddr) -> Option<(TargetAddr, crate::dbt::Undo)> {
        let offset = at.in_image(self.bias);
        if let Some(trap) = self.trap_at(at).filter(|_| self.layout.traps_at(self.region).contains(&at)) {
            return Some((trap.native.in_target(self.bias), crate::dbt::Undo::default()));
        }
        // Fragments lie in the order in which pages were translated.
        let pages = self.pages.values().flatten();
        let holds = |page: &&TranslatedPage| {
            (page.fragments_at.0..page.fragments_at.0 + page.fragments.len() as u64).contains(&offset.0)
        };
        let place = pages.filter(holds).find_map(|page| page.place_of(offset))?;
        Some((place.native.in_target(self.bias), place.undo))
    }

    /// Whether the page at `page` is as the file has it.
    #[must_use]
    pub fn is_native(&self, page: TargetAddr) -> bool {
        self.pages.get(&page.page().in_image(self.bias).0).is_none_or(Option::is_none)
    }

    /// What is told of it.
    #[must_use]
    pub fn figures(&self) -> Figures {
        Figures {
            pages: self.pages.values().flatten().count() as u64,
            fragments: self.translator.used().0,
            counts: self.counts.clone(),
            refused: self.refused.clone(),
        }
    }

    /// The page as it is in the file and as it is run, if it was translated.
    #[must_use]
    pub fn page(&self, page: TargetAddr) -> Option<&TranslatedPage> {
        self.pages.get(&page.page().in_image(self.bias).0)?.as_ref()
    }

    fn translate(&mut self, page: TargetAddr, keep: &[ImageOffset]) {
        let at = page.in_image(self.bias);
        if self.pages.contains_key(&at.0) {
            return;
        }
        let translated = match self.translator.translate_page(at, keep) {
            Ok(translated) if translated.must_move.is_empty() => self.put(page, &translated).map(|()| translated),
            // The beginning of a function: its page stays as it is, since nobody can be moved from here.
            Ok(_) => Err(io::Error::other("a thread stood where it would be changed")),
            // Nothing in it needs a guard.
            Err(crate::dbt::TranslateError::NoCode(_)) => {
                if self.is_closed
                    && let Err(error) = self.put_native(page)
                {
                    self.refused.push(format!("{page}: {error}"));
                }
                self.pages.insert(at.0, None);
                return;
            }
            Err(error) => Err(io::Error::other(error)),
        };
        match translated {
            Ok(translated) => {
                self.counts.merge(&translated.counts);
                self.displaced.extend(translated.displaced.iter().map(|displaced| (displaced.native.0, *displaced)));
                self.traps.extend(translated.traps.iter().map(|trap| (trap.at.0, *trap)));
                self.pages.insert(at.0, Some(translated));
            }
            Err(error) => {
                tracing::info!(%page, %error, "a page can't be guarded");
                self.refused.push(format!("{page}: {error}"));
                self.pages.insert(at.0, None);
            }
        }
    }

    /// Writes what was translated: what it leads to first, the page last.
    fn put(&self, page: TargetAddr, translated: &TranslatedPage) -> io::Result<()> {
        let offset = |at: ImageOffset| at.in_target(self.bias).wrapping_distance(self.region).cast_unsigned();
        for slots in translated.traps.chunk_by(|a, b| a.at.0 + TRAP_SLOT == b.at.0) {
            let slot = |trap: &Trap| if self.is_closed { [BREAKPOINT; TRAP_SLOT as usize] } else { trap.bytes };
            let bytes: Vec<u8> = slots.iter().flat_map(slot).collect();
            self.cache.write_all_at(&bytes, offset(slots[0].at))?;
        }
        self.cache.write_all_at(&translated.fragments, offset(translated.fragments_at))?;
        // What the file does not hold of its last page is zero behind the curtain, too.
        self.behind.write_all_at(&translated.bytes[..], page.wrapping_distance(self.range.start).cast_unsigned())
    }
}

/// All texts of a family.
#[derive(Default)]
pub struct Code {
    /// By address.
    pub texts: Vec<TextCode>,
    /// Where threads stood when their text went behind the curtain, and may come back to.
    keep: BTreeSet<TargetAddr>,
}

impl Code {
    /// Threads stand at these addresses: pages that are translated from now on keep what is there.
    pub fn keep(&mut self, at: impl IntoIterator<Item = TargetAddr>) {
        self.keep.extend(at);
    }

    /// The text that holds `at`.
    #[must_use]
    pub fn text_at(&self, at: TargetAddr) -> Option<&TextCode> {
        self.texts.iter().find(|text| text.range.contains(&at))
    }

    /// The text whose cache holds `at`.
    #[must_use]
    pub fn cache_at(&self, at: TargetAddr) -> Option<&TextCode> {
        self.texts.iter().find(|text| text.code().contains(&at))
    }

    /// An address for a person.
    #[must_use]
    pub fn name(&self, at: TargetAddr) -> String {
        let Some(text) = self.text_at(at) else { return at.to_string() };
        let offset = at.in_image(text.bias);
        let file = text.known.image.name().rsplit('/').next().unwrap_or_default();
        match text.known.image.symbolise(offset) {
            Some((name, distance)) => format!("{at} ({name}+{distance:#x} in {file})"),
            None => format!("{at} ({file}+{:#x})", offset.0),
        }
    }

    /// Forgets texts that are mapped no more.
    pub fn retain(&mut self, is_there: impl Fn(&Range<TargetAddr>) -> bool) {
        self.texts.retain(|text| is_there(&text.range));
    }

    /// Whether the code that its image has at `at` is known to be a destination.
    #[must_use]
    pub fn is_target(&self, at: TargetAddr) -> bool {
        self.text_at(at).is_some_and(|text| {
            let offset = at.in_image(text.bias);
            text.known.targets.binary_search(&offset).is_ok() || targets::is_linkage(&text.known.image, offset)
        })
    }
}

impl Pages for Code {
    fn prepare(&mut self, page: TargetAddr, at: TargetAddr) {
        let Some(text) = self.texts.iter_mut().find(|text| text.range.contains(&page)) else { return };
        let end = page.offset(PAGE_SIZE as i64);
        let keep: Vec<ImageOffset> =
            self.keep.range(page..end).copied().chain([at]).map(|at| at.in_image(text.bias)).collect();
        text.translate(page, &keep);
    }

    fn catches(&self, page: TargetAddr) -> bool {
        self.texts.iter().any(|text| text.layout.traps_at(text.region).contains(&page))
    }
}
