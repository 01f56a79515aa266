//! Serves translations to programs that run with `preload.c`: a program names its images, and gets a list of operations that put
//! their translations in place.

use asap::{
    address::{ImageOffset, PAGE_SIZE},
    dbt::{
        Analysis, Base, CodeView, Constants, Operand, Options, ShadowForm, TRAP_SLOT, TargetTable, TranslatedPage,
        Translator, TrapReason,
    },
    image::{Image, ImageBytes},
};
use std::{
    collections::HashMap,
    io::{Read, Write},
    ops::Range,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

/// What a program is translated with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Guards {
    pub shadow: Option<ShadowForm>,
    pub targets: bool,
    pub syscalls: bool,
}

impl Guards {
    pub const NONE: Self = Self { shadow: None, targets: false, syscalls: false };
    pub const fn all(form: ShadowForm) -> Self {
        Self { shadow: Some(form), targets: true, syscalls: true }
    }
}

/// Where a process finds its tables; parts of the address space that no program of ours uses.
const TARGETS_AT: u64 = 0x1000_0000_0000;
const SYSCALLS_AT: u64 = 0x0f00_0000_0000;
const TRAPS_AT: u64 = 0x0e00_0000_0000;
const TRAP_RECORD: u64 = 64;
/// From where stacks may lie to where their copies do.
const DISPLACEMENT: i64 = -0x3000_0000_0840;
const DISPLACED: Range<u64> = 0x2400_0000_0000..0x5000_0000_0000;
/// Bytes of the code that reports a trap.
const STUB: u64 = 40;

/// The images that are known, with what was made of them. Lives as long as the tests.
#[derive(Default)]
pub struct Translations {
    images: Mutex<HashMap<PathBuf, Arc<Known>>>,
    pages: Mutex<HashMap<(PathBuf, u64, Guards), Arc<Made>>>,
}

struct Known {
    image: Arc<Image>,
    bytes: Vec<u8>,
    analysis: Arc<Analysis>,
}

/// The translation of an image whose block begins at a certain distance from it.
struct Made {
    pages: Vec<TranslatedPage>,
    layout: Layout,
}

/// Cache, trap slots, constants and stubs of an image, in this order, relative to its start.
struct Layout {
    options: Options,
    stubs: u64,
    end: u64,
}

impl Layout {
    fn length(code: u64) -> u64 {
        Self::at(0, code, Guards::NONE).end
    }

    fn at(start: u64, code: u64, guards: Guards) -> Self {
        let cache_end = start.wrapping_add((code * 4).next_multiple_of(PAGE_SIZE) + 0x10000);
        let slots = code.next_multiple_of(PAGE_SIZE) + PAGE_SIZE;
        let traps_end = cache_end.wrapping_add(slots);
        let stubs = traps_end.wrapping_add(PAGE_SIZE);
        let options = Options {
            cache: ImageOffset(start)..ImageOffset(cache_end),
            traps: ImageOffset(cache_end)..ImageOffset(traps_end),
            constants: ImageOffset(traps_end),
            shadow_stack: guards.shadow,
            targets: guards.targets,
            syscalls: guards.syscalls,
            ..Options::default()
        };
        Self { options, stubs, end: stubs.wrapping_add((slots / TRAP_SLOT * STUB).next_multiple_of(PAGE_SIZE)) }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Translations {
    fn known(&self, path: &Path) -> Option<Arc<Known>> {
        let path = path.canonicalize().ok()?;
        if let Some(known) = lock(&self.images).get(&path) {
            return Some(Arc::clone(known));
        }
        let bytes = std::fs::read(&path).ok()?;
        let image = Image::parse(&path.display().to_string(), ImageBytes::from(bytes.clone())).ok()?;
        let image = Arc::new(image);
        let analysis = Arc::new(Analysis::of(&CodeView::of(&image)));
        let known = Arc::new(Known { image, bytes, analysis });
        lock(&self.images).insert(path, Arc::clone(&known));
        Some(known)
    }

    fn made(&self, path: &Path, known: &Known, start: u64, guards: Guards) -> Arc<Made> {
        let key = (path.to_path_buf(), start, guards);
        if let Some(made) = lock(&self.pages).get(&key) {
            return Arc::clone(made);
        }
        let layout = Layout::at(start, known.analysis.code_bytes(), guards);
        let mut translator = Translator::new(Arc::clone(&known.analysis), layout.options.clone());
        let pages = known.analysis.pages();
        let pages = pages.into_iter().map(|page| translator.translate_page(page, &[]).expect("translated")).collect();
        let made = Arc::new(Made { pages, layout });
        lock(&self.pages).insert(key, Arc::clone(&made));
        made
    }

    /// Answers all programs that come to `listener`, until an empty request. Gives where the images were.
    pub fn serve(&self, listener: &UnixListener, guards: Guards) -> Vec<Range<u64>> {
        let mut images = Vec::new();
        let mut processes: HashMap<u64, u64> = HashMap::new();
        while let Ok((mut stream, _)) = listener.accept() {
            let Some(request) = Request::read(&mut stream) else { break };
            let traps = processes.entry(request.pid).or_default();
            if request.is_first {
                *traps = 0;
            }
            let mut answer = Operations::default();
            if request.is_first {
                answer.tables(guards);
            }
            let mut taken = mappings(request.pid);
            for (bias, path) in &request.images {
                let image = self.put(&mut answer, &mut taken, request.trapped, *bias, path, guards, traps);
                // What comes by dlopen(3) is initialised before it is known here.
                images.extend(image.filter(|_| request.is_first));
            }
            answer.end();
            let _ = stream.write_all(&(answer.0.len() as u64).to_le_bytes());
            let _ = stream.write_all(&answer.0);
        }
        images
    }

    /// Operations that put the translation of one image in place.
    #[allow(clippy::too_many_arguments)]
    fn put(
        &self,
        answer: &mut Operations,
        taken: &mut Vec<Range<u64>>,
        trapped: u64,
        bias: u64,
        path: &Path,
        guards: Guards,
        traps: &mut u64,
    ) -> Option<Range<u64>> {
        let known = self.known(path)?;
        let page = |at: u64| at & !(PAGE_SIZE - 1);
        let segments = known.image.segments();
        let low = bias.wrapping_add(page(segments.iter().map(|s| s.address.0).min()?));
        let high = bias.wrapping_add(segments.iter().map(|s| s.address.0 + s.memory_size).max()?);
        let length = Layout::length(known.analysis.code_bytes());
        let block = gap(taken, low, high, length)?;
        taken.push(block..block + length);
        let made = self.made(path, &known, block.wrapping_sub(bias), guards);
        let at = |offset: ImageOffset| bias.wrapping_add(offset.0);
        // The whole block, then its parts.
        answer.map(block, length);
        let (options, stubs) = (&made.layout.options, bias.wrapping_add(made.layout.stubs));
        let constants = Constants { displacement: displacement(guards), targets: TARGETS_AT, syscalls: SYSCALLS_AT };
        answer.write(at(options.constants), &constants.to_bytes());
        // What the stubs call, behind the constants.
        let pointer = at(options.constants) + 64;
        answer.write(pointer, &trapped.to_le_bytes());
        let mut fragments = Vec::new();
        let (mut slots, mut code, mut records) = (Vec::new(), Vec::new(), Vec::new());
        let first = *traps;
        for made in &made.pages {
            fragments.extend_from_slice(&made.fragments);
            for trap in &made.traps {
                let stub = stubs + code.len() as u64;
                let distance = |from: u64, to: u64| (to.wrapping_sub(from) as u32).to_le_bytes();
                slots.extend_from_slice(&[0xe9]);
                slots.extend_from_slice(&distance(at(trap.at) + 5, stub));
                slots.extend_from_slice(&[0xcc; 3]);
                let mut bytes = vec![0x48, 0x8d, 0xa4, 0x24, 0x70, 0xff, 0xff, 0xff, 0x68];
                bytes.extend_from_slice(&(*traps as u32).to_le_bytes());
                bytes.extend_from_slice(&[0xff, 0x15]);
                bytes.extend_from_slice(&distance(stub + bytes.len() as u64 + 4, pointer));
                bytes.extend_from_slice(&[0x48, 0x8d, 0xa4, 0x24, 0x98, 0x00, 0x00, 0x00, 0xe9]);
                bytes.extend_from_slice(&distance(stub + bytes.len() as u64 + 4, at(trap.resume)));
                bytes.resize(STUB as usize, 0xcc);
                code.extend_from_slice(&bytes);
                *traps += 1;
                let operand: [u64; 5] = match trap.destination {
                    None => [0; 5],
                    Some(Operand::Register(number)) => [1, u64::from(number), 0, 0, 0],
                    Some(Operand::Memory { base, index, displacement }) => {
                        let (register, start) = match base {
                            Base::Absolute(_) => (99, 0),
                            Base::Register(number, _) => (u64::from(number), 0),
                            Base::Image(_) => (99, bias),
                        };
                        let (index, scale) = index.unwrap_or((0, 0));
                        [2, register, u64::from(index), u64::from(scale), start.wrapping_add_signed(displacement)]
                    }
                };
                let reason = match trap.reason {
                    TrapReason::Return => 0,
                    TrapReason::Target => 1,
                    TrapReason::Syscall => 2,
                };
                for word in [trap.native.0, bias, reason].into_iter().chain(operand) {
                    records.extend_from_slice(&word.to_le_bytes());
                }
            }
        }
        answer.write(at(options.cache.start), &fragments);
        answer.write(at(options.traps.start), &slots);
        answer.write(stubs, &code);
        answer.write(TRAPS_AT + first * TRAP_RECORD, &records);
        answer.protect(block, length);
        if guards.targets {
            let marks = known.analysis.destinations();
            answer.mark(TARGETS_AT, marks.into_iter().map(|to| TargetTable::index(at(to)) as u32));
        }
        for segment in segments.iter().filter(|segment| segment.executable) {
            let (start, end) = (page(segment.address.0), segment.address.0 + segment.file_size);
            let offset = segment.file_offset - (segment.address.0 - start);
            let mut text = vec![0; (end.next_multiple_of(PAGE_SIZE) - start) as usize];
            let native = known.bytes.get(offset as usize..)?;
            let native = &native[..native.len().min(text.len())];
            text[..native.len()].copy_from_slice(native);
            for translated in &made.pages {
                let Some(from) = translated.page.0.checked_sub(start).map(|from| from as usize) else { continue };
                let Some(to) = text.get_mut(from..from + PAGE_SIZE as usize) else { continue };
                // Outside of the segment's own bytes it stays as it was.
                let first = segment.address.0.saturating_sub(translated.page.0).min(PAGE_SIZE) as usize;
                let last = end.saturating_sub(translated.page.0).min(PAGE_SIZE) as usize;
                to[first..last].copy_from_slice(&translated.bytes[first..last]);
            }
            let aside = gap(taken, low, high, text.len() as u64)?;
            answer.map(aside, text.len() as u64);
            answer.write(aside, &text);
            answer.protect(aside, text.len() as u64);
            answer.exchange(aside, bias.wrapping_add(start), text.len() as u64);
        }
        Some(low..high)
    }
}

fn displacement(guards: Guards) -> i64 {
    if guards.shadow == Some(ShadowForm::Folded) { 0x1_2340_0840 } else { DISPLACEMENT }
}

/// What a program asks for.
struct Request {
    pid: u64,
    is_first: bool,
    trapped: u64,
    images: Vec<(u64, PathBuf)>,
}

impl Request {
    fn read(stream: &mut UnixStream) -> Option<Self> {
        let mut word = || {
            let mut bytes = [0; 8];
            stream.read_exact(&mut bytes).ok().map(|()| u64::from_le_bytes(bytes))
        };
        let (pid, trapped, length) = (word()?, word()?, word()?);
        let mut rest = vec![0; usize::try_from(length).ok()?];
        stream.read_exact(&mut rest).ok()?;
        let mut images = Vec::new();
        let mut rest = rest.as_slice();
        let (is_first, pid) = (pid >> 63 == 1, pid & (u64::MAX >> 1));
        while let Some((head, tail)) = rest.split_at_checked(16) {
            let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
            let (name, tail) = tail.split_at_checked(word(8) as usize)?;
            let name = std::str::from_utf8(name).ok()?;
            let path = if name.is_empty() { format!("/proc/{pid}/exe") } else { name.to_owned() };
            let path = if name.is_empty() { std::fs::read_link(path).ok()? } else { PathBuf::from(path) };
            images.push((word(0), path));
            rest = tail;
        }
        Some(Self { pid, is_first, trapped, images })
    }
}

/// What is mapped in a process.
fn mappings(pid: u64) -> Vec<Range<u64>> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let range = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
    };
    maps.lines().filter_map(range).collect()
}

/// Room of `length` bytes near `low..high`: below if there is, since the heap grows above.
fn gap(taken: &[Range<u64>], low: u64, high: u64, length: u64) -> Option<u64> {
    let length = length.next_multiple_of(PAGE_SIZE);
    let is_free =
        |at: u64| !taken.iter().any(|range| range.start < at + length + PAGE_SIZE && at < range.end + PAGE_SIZE);
    let step = 0x10000;
    let floor = high.saturating_sub(0x7000_0000).max(0x10_0000);
    let mut at = (low & !(step - 1)).checked_sub(length.next_multiple_of(step));
    while let Some(here) = at.filter(|&here| here >= floor) {
        if is_free(here) {
            return Some(here);
        }
        at = here.checked_sub(step);
    }
    let mut at = high.next_multiple_of(step) + 0x1000_0000;
    while at + length < low + 0x7000_0000 {
        if is_free(at) {
            return Some(at);
        }
        at += step;
    }
    None
}

/// The list of operations that `preload.c` performs.
#[derive(Default)]
struct Operations(Vec<u8>);

impl Operations {
    fn words(&mut self, words: &[u64]) {
        words.iter().for_each(|word| self.0.extend_from_slice(&word.to_le_bytes()));
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(8), 0);
    }

    fn map(&mut self, at: u64, length: u64) {
        self.words(&[1, at, length.next_multiple_of(PAGE_SIZE), 3]);
    }

    fn write(&mut self, at: u64, bytes: &[u8]) {
        self.words(&[2, at, bytes.len() as u64]);
        self.0.extend_from_slice(bytes);
        self.pad();
    }

    fn protect(&mut self, at: u64, length: u64) {
        self.words(&[3, at, length.next_multiple_of(PAGE_SIZE), 5]);
    }

    fn exchange(&mut self, from: u64, to: u64, length: u64) {
        self.words(&[4, from, to, length.next_multiple_of(PAGE_SIZE)]);
    }

    fn mark(&mut self, table: u64, indexes: impl Iterator<Item = u32>) {
        let indexes: Vec<u32> = indexes.collect();
        self.words(&[7, table, indexes.len() as u64]);
        indexes.iter().for_each(|index| self.0.extend_from_slice(&index.to_le_bytes()));
        self.pad();
    }

    /// What is there once for a process.
    fn tables(&mut self, guards: Guards) {
        self.map(TRAPS_AT, 1 << 30);
        let is_folded = guards.shadow == Some(ShadowForm::Folded);
        self.words(&[6, TRAPS_AT, displacement(guards).cast_unsigned(), u64::from(is_folded)]);
        self.map(TARGETS_AT, TargetTable::SIZE);
        self.map(SYSCALLS_AT, 1 << 16);
        match guards.shadow {
            None => {}
            Some(ShadowForm::Folded) => {
                let area = ShadowForm::FOLDED;
                self.map(area.start, area.end - area.start + PAGE_SIZE);
            }
            Some(form) => {
                self.map(DISPLACED.start, DISPLACED.end - DISPLACED.start);
                if form == ShadowForm::Segment {
                    self.words(&[5, DISPLACEMENT.cast_unsigned()]);
                }
            }
        }
    }

    fn end(&mut self) {
        self.words(&[0]);
    }
}
