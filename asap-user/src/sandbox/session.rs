//! Into the sandbox and out of it, one process at a time.
//!
//! Each text mapping is changed by one mremap(2), which is atomic for its threads: before it they run the file's page, after it
//! the same bytes behind a curtain. An agent that dies leaves some texts as they were and others behind curtains that are
//! open: the process runs on (P1), and who finds the record settles it.

use super::{
    area::Area,
    code::{Layout, TextCode},
    evict,
    family::{self, Family},
    library,
    policy::{Fail, Guard, Learned, Policy},
    record::{Record, State, Text},
    texts::{NativeCode, divide},
    view::{elsewhere, is_curtain},
};
use crate::{
    address::{LoadBias, PAGE_SIZE, TargetAddr},
    image::Image,
    process::{
        curtain::{self, Curtain, lock},
        gate::GateError,
        info::living_thread,
        locked::{self, Lock},
        maps::{Mapping, Maps},
        memory::Memory,
        pages,
        puppet::{Puppet, PuppetError},
    },
    quiesce::unwind::Unwinder,
};
use std::{
    fs, io,
    ops::Range,
    os::unix::fs::FileExt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Reach of a 32-bit displacement, less room for what lies behind the addressed byte.
const REACH: u64 = (1 << 31) - (1 << 20);
/// Length of `syscall`, bytes.
const SYSCALL_LENGTH: i64 = 2;

/// Why a process can't go into the sandbox, or out of it.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// Threads can't be made to wait.
    #[error(transparent)]
    Gate(#[from] GateError),
    /// A call in the process failed.
    #[error(transparent)]
    Puppet(#[from] PuppetError),
    /// Its memory map can't be read.
    #[error("the memory map can't be read: {0}")]
    Maps(io::Error),
    /// What is done can't be recorded.
    #[error("{0}")]
    Record(String),
    /// None of its code can be put behind a curtain.
    #[error("none of its code can run in the sandbox: {0}")]
    NoText(String),
    /// Guards need memory at places that are taken.
    #[error("its guards have no room: {0}")]
    NoRoom(String),
    /// Threads are in translated code, and stay there.
    #[error("threads {0:?} are still in translated code")]
    Busy(Vec<i32>),
}

/// See [`Host::image`].
pub type ImageOf<'a> = &'a mut dyn FnMut(&Mapping) -> Option<(Arc<Image>, LoadBias)>;
/// See [`Host::frames`].
pub type FramesOf<'a> = &'a mut dyn FnMut(&mut Unwinder) -> io::Result<Vec<ThreadStack>>;

/// The stack of a thread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ThreadStack {
    /// The thread.
    pub tid: i32,
    /// All of it was walked.
    pub is_whole: bool,
    /// Innermost first: where the thread is, then return addresses.
    pub frames: Vec<TargetAddr>,
    /// Where the return addresses lie; 0 for what is none.
    pub slots: Vec<u64>,
}

impl ThreadStack {
    /// Return addresses: where each lies, what it is, and where its function is at.
    pub fn returns(&self) -> impl Iterator<Item = (u64, TargetAddr, TargetAddr)> {
        let pairs = self.frames.windows(2).zip(self.slots.iter().skip(1));
        pairs.filter(|(_, slot)| **slot != 0).map(|(pair, slot)| (*slot, pair[1], pair[0]))
    }
}

/// What is needed of a process.
pub struct Host<'a> {
    /// Its id.
    pub pid: i32,
    /// The helper in it.
    pub puppet: &'a mut Puppet,
    /// Its memory.
    pub memory: &'a Memory,
    /// Whether a mapping is ours for another reason.
    pub is_ours: &'a dyn Fn(&Mapping) -> bool,
    /// Writes the record into the process.
    pub write: &'a mut dyn FnMut(Option<&Record>) -> Result<(), String>,
    /// The image of a text, and where its addresses lie.
    pub image: ImageOf<'a>,
    /// Where its threads are: each with its stack, innermost first, as far as it can be walked.
    pub frames: FramesOf<'a>,
}

impl Host<'_> {
    pub(super) fn maps(&self) -> Result<Maps, SandboxError> {
        Maps::of(self.pid).map_err(SandboxError::Maps)
    }

    pub(super) fn write(&mut self, record: Option<&Record>) -> Result<(), SandboxError> {
        (self.write)(record).map_err(SandboxError::Record)
    }

    pub(super) fn unmap(&mut self, range: &Range<TargetAddr>) {
        if let Err(error) = pages::unmap(self.puppet, range.start, range.end.0 - range.start.0) {
            tracing::warn!(pid = self.pid, %error, "memory of the sandbox stays mapped");
        }
    }
}

/// A process that is in the sandbox.
#[derive(Debug)]
pub struct Session {
    /// Whose curtain lies over the texts that it entered with, or that it was forked with.
    family: Arc<Family>,
    /// Over what it has mapped since it was forked.
    own: Option<Arc<Family>>,
    /// What runs natively.
    pub native: Vec<NativeCode>,
    /// The executable mappings at the last look.
    seen: Vec<Mapping>,
}

/// How long threads are given to leave the curtains before they are opened again although somebody was not seen.
const HOLD_LIMIT: Duration = Duration::from_secs(5);

impl Session {
    /// Takes a process in, guarded by `policy`; with `learns`, its system calls are noted.
    ///
    /// # Errors
    /// It can't go in; it is as it was.
    pub fn enter(host: &mut Host<'_>, policy: &Policy, learns: bool) -> Result<(Self, Record), SandboxError> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let family = random_id()?;
        let mut record =
            Record { state: State::Entering, since, family, policy: policy.clone(), learns, ..Record::default() };
        let maps = host.maps()?;
        let wanted = family::wanted(policy, learns);
        let area = Area::plan(&maps, wanted).map_err(SandboxError::NoRoom)?;
        record.area = (!wanted.is_nothing()).then(|| area.clone());
        let made = Family::new(host.puppet, host.pid, family, policy, area, learns.then(Learned::default))?;
        let mut session = Self { family: made, own: None, native: Vec::new(), seen: Vec::new() };
        let entered = session.lay_area(host, &record).and_then(|()| {
            let (texts, native) = divide(&maps, host.is_ours);
            session.native = native;
            session.draw(host, &mut record, &texts)?;
            match record.texts.is_empty() {
                false => Ok(()),
                true => Err(SandboxError::NoText(session.reasons())),
            }
        });
        if let Err(error) = entered {
            session.leave(host, &mut record)?;
            return Err(error);
        }
        record.state = State::Inside;
        host.write(Some(&record))?;
        crate::fault::point("sandbox.entered");
        Ok((session, record))
    }

    fn lay_area(&self, host: &mut Host<'_>, record: &Record) -> Result<(), SandboxError> {
        let Some(area) = &record.area else { return Ok(()) };
        host.write(Some(record))?;
        area.map(host.puppet)?;
        crate::fault::point("sandbox.area-mapped");
        let table = self.family.shared.call_table();
        let written = match area.syscalls {
            Some(at) => host.memory.write(at, &table),
            None => Ok(()),
        };
        written.map_err(|error| SandboxError::Record(format!("the table of system calls can't be written: {error}")))
    }

    fn reasons(&self) -> String {
        let mut reasons: Vec<_> = self.native.iter().map(|code| format!("{}: {}", code.name, code.reason)).collect();
        reasons.dedup();
        reasons.join("; ")
    }

    /// Cares again for a process that is in already: a child of one that is in, or what an earlier agent has left. `None`: it was
    /// guarded by an agent that is gone; it has to leave, and may enter again.
    ///
    /// # Errors
    /// Threads can't be made to wait in it; it runs on with its pages open.
    pub fn resume(host: &mut Host<'_>, record: &Record) -> Result<Option<Self>, SandboxError> {
        let family = match Family::find(record.family) {
            Some(family) => family,
            None if record.area.is_some() => return Ok(None),
            None => {
                let policy = Policy::default();
                let family = Family::new(host.puppet, host.pid, record.family, &policy, Area::default(), None)?;
                let maps = host.maps()?;
                for piece in maps.0.iter().filter(|m| is_curtain(m) && record.text_at(m.range.start).is_some()) {
                    family.curtain.register(&piece.range)?;
                }
                family
            }
        };
        Ok(Some(Self { family, own: None, native: Vec::new(), seen: Vec::new() }))
    }

    /// The family whose curtain can be drawn in this process.
    fn family_for(&mut self, host: &mut Host<'_>, record: &Record) -> Result<Arc<Family>, SandboxError> {
        if self.family.pid == host.pid {
            return Ok(Arc::clone(&self.family));
        }
        if let Some(own) = &self.own {
            return Ok(Arc::clone(own));
        }
        let area = record.area.clone().unwrap_or_default();
        let learns = record.learns.then(Learned::default);
        let own = Family::new(host.puppet, host.pid, random_id()?, &record.policy, area, learns)?;
        self.own = Some(Arc::clone(&own));
        Ok(own)
    }

    /// Puts `texts` behind curtains. What can't be is counted as native.
    fn draw(&mut self, host: &mut Host<'_>, record: &mut Record, texts: &[Mapping]) -> Result<(), SandboxError> {
        let family = self.family_for(host, record)?;
        let mut drawn = Vec::new();
        for mapping in texts {
            match content(host, mapping) {
                Ok(content) => drawn.push((mapping, content)),
                Err(reason) => self.native.push(NativeCode::of(mapping, reason)),
            }
        }
        let known = record.texts.len();
        let tid = living_thread(host.pid);
        record.texts.extend(drawn.iter().map(|(mapping, _)| Text {
            start: mapping.range.start,
            end: mapping.range.end,
            spare: None,
            device: mapping.device.clone(),
            inode: mapping.inode,
            file_offset: mapping.file_offset,
            lock: tid.and_then(|tid| Lock::of(tid, mapping.range.start)),
            region: None,
        }));
        host.write(Some(record))?;
        crate::fault::point("sandbox.recorded");
        for text in &mut record.texts[known..] {
            // See `process::locked`: else it would be counted twice.
            if text.lock.is_some() {
                locked::unlock_range(host.puppet, &text.range())?;
            }
            match curtain::second_mapping(host.puppet, &text.range()) {
                Ok(spare) => text.spare = Some(spare),
                // Too much memory is locked, or the target has changed the mapping meanwhile: it stays as it is.
                Err(PuppetError::Call { error, .. }) => {
                    tracing::info!(pid = host.pid, at = %text.start, %error, "a text stays native");
                    if let Some(lock) = text.lock {
                        lock.lock_range(host.puppet, &text.range())?;
                    }
                }
                Err(error) => return Err(error.into()),
            }
            crate::fault::point("sandbox.spare-made");
        }
        host.write(Some(record))?;
        let mut laid = Vec::new();
        let mut codes = Vec::new();
        for index in known..record.texts.len() {
            let (mapping, content) = &drawn[index - known];
            let at = match record.texts[index].spare {
                Some(_) => {
                    let scratch = host.puppet.scratch();
                    let (at, behind) = family.curtain.prepare(host.puppet, host.memory, scratch, content)?;
                    if family.is_guarded() {
                        match self.lay_code(host, &family, record, index, mapping, behind)? {
                            Some(code) => codes.push(code),
                            None => self.native.push(NativeCode::of(mapping, "it is no image that is understood")),
                        }
                    }
                    Some(at)
                }
                None => None,
            };
            laid.push((*mapping, at));
        }
        crate::fault::point("sandbox.prepared");
        family.note_ours(&host.maps()?, host.is_ours);
        let _held = family.is_guarded().then(|| Held::begin(&family.curtain));
        lock(&family.shared.code).texts.extend(codes);
        // The target may have unmapped some of it meanwhile.
        let now = host.maps()?;
        let mut kept = record.texts[..known].to_vec();
        for (text, (mapping, at)) in record.texts[known..].iter().cloned().zip(laid) {
            let is_there = now.at(text.start).is_some_and(|found| found == mapping);
            let moved = match at {
                Some(at) if is_there => curtain::move_over(host.puppet, at, &text.range()).map_err(|error| (at, error)),
                Some(at) => {
                    host.unmap(&(at..at.offset(text.len() as i64)));
                    for left in text.spare_range().into_iter().chain(text.region_range()) {
                        host.unmap(&left);
                    }
                    lock(&family.shared.code).retain(|range| *range != text.range());
                    continue;
                }
                None => {
                    self.native.push(NativeCode::of(mapping, "the kernel refuses a second mapping of it"));
                    continue;
                }
            };
            crate::fault::point("sandbox.moved");
            if let Err((at, error)) = moved {
                host.unmap(&(at..at.offset(text.len() as i64)));
                return Err(error.into());
            }
            kept.push(text);
        }
        record.texts = kept;
        if family.is_guarded() {
            host.memory.read_elsewhere(elsewhere(&host.maps()?, record));
            let ranges: Vec<_> = record.texts[known.min(record.texts.len())..].iter().map(Text::range).collect();
            let mut unwinder = Unwinder::new();
            self.families().for_each(|family| family.teach(&mut unwinder));
            keep_places(host, &family, &mut unwinder, &ranges)?;
            crate::fault::point("sandbox.kept");
        }
        Ok(())
    }

    /// Makes the region beside a text, in which its translated code comes to lie. `None`: its image is not understood.
    fn lay_code(
        &self,
        host: &mut Host<'_>,
        family: &Family,
        record: &mut Record,
        index: usize,
        mapping: &Mapping,
        behind: fs::File,
    ) -> Result<Option<TextCode>, SandboxError> {
        let Some((image, bias)) = (host.image)(mapping) else { return Ok(None) };
        let known = library::known(&mapping.device, mapping.inode, &image);
        let range = mapping.range.clone();
        let layout = Layout::of(mapping.len());
        let Some(place) = host.maps()?.gap(&range, layout.length, REACH) else {
            return Err(SandboxError::NoRoom(format!("no room for translated code within 2 GiB of {}", mapping.name)));
        };
        record.texts[index].region = Some(place);
        host.write(Some(record))?;
        let cache = family.curtain.prepare_at(host.puppet, host.memory, place, layout.length)?;
        crate::fault::point("sandbox.region-mapped");
        let told = cache.write_all_at(&family.shared.area.constants().to_bytes(), 0);
        told.map_err(|error| SandboxError::Record(format!("translated code can't be written: {error}")))?;
        family.curtain.hide(host.puppet, &(place..place.offset(layout.length as i64)))?;
        family.curtain.register(&layout.traps_at(place))?;
        if family.shared.policy.has(Guard::Cfi) {
            let targets: Vec<TargetAddr> = known.targets.iter().map(|at| at.in_target(bias)).collect();
            let told = family.shared.area.accept_all(host.memory, &targets);
            told.map_err(|error| SandboxError::Record(format!("destinations can't be noted: {error}")))?;
        }
        let wanted = family::wanted(&family.shared.policy, record.learns);
        let form = family.shared.area.form;
        let mut code = TextCode::new(range, bias, known, wanted, form, place, (behind, cache));
        if family.shared.policy.fail == Fail::Closed {
            code.close().map_err(|error| SandboxError::Record(format!("code can't be closed: {error}")))?;
        }
        Ok(Some(code))
    }

    /// Looks whether the target has mapped new code or unmapped some, and follows it. True if anything has changed.
    ///
    /// # Errors
    /// The process is gone, or the kernel refuses.
    pub fn follow(&mut self, host: &mut Host<'_>, record: &mut Record) -> Result<bool, SandboxError> {
        let maps = host.maps()?;
        let executable: Vec<Mapping> = maps.0.iter().filter(|mapping| mapping.executable).cloned().collect();
        if executable == self.seen {
            return Ok(false);
        }
        // Something else may lie now where a curtain was.
        host.memory.read_elsewhere(elsewhere(&maps, record));
        let lost: Vec<Text> = record.texts.iter().filter(|text| pieces(&maps, text).is_empty()).cloned().collect();
        if !lost.is_empty() {
            record.texts.retain(|text| !lost.contains(text));
            // Nobody runs what belongs to code that is not there any more.
            let left = lost.iter().filter_map(|text| spare_pieces(&maps, text)).flatten();
            for range in left.chain(lost.iter().filter_map(Text::region_range)) {
                host.unmap(&range);
            }
            for family in self.own.iter().chain([&self.family]).filter(|family| family.pid == host.pid) {
                lock(&family.shared.code).retain(|range| !lost.iter().any(|text| text.range() == *range));
            }
            host.write(Some(record))?;
        }
        let is_known = |mapping: &Mapping| {
            (host.is_ours)(mapping)
                || is_curtain(mapping)
                || record.is_region(mapping.range.start)
                || record.is_spare(mapping.range.start)
                || record.text_at(mapping.range.start).is_some()
        };
        let (texts, native) = divide(&maps, &is_known);
        self.native = native;
        self.family.note_ours(&maps, host.is_ours);
        if !texts.is_empty() {
            self.draw(host, record, &texts)?;
            host.write(Some(record))?;
        }
        // What has changed since, by us or by the target, is looked at next time.
        self.seen = executable;
        Ok(true)
    }

    /// How often a thread had to wait for a page.
    #[must_use]
    pub fn traps(&self) -> u64 {
        self.families().map(|family| family.curtain.traps()).sum()
    }

    /// Whether system calls that read text work as ever.
    #[must_use]
    pub fn covers_kernel_faults(&self) -> bool {
        self.families().all(|family| family.curtain.covers_kernel_faults)
    }

    /// Those that it belongs to.
    pub fn families(&self) -> impl Iterator<Item = &Arc<Family>> {
        [&self.family].into_iter().chain(&self.own)
    }

    /// Takes the process out. What somebody else has written into stays behind its curtain, which is open, and in the record.
    ///
    /// # Errors
    /// The process is gone, or the kernel refuses; what was done is recorded, and can be continued.
    pub fn leave(self, host: &mut Host<'_>, record: &mut Record) -> Result<(), SandboxError> {
        // Of another process's curtain the same addresses would be meant there.
        for family in self.families().filter(|family| family.pid == host.pid) {
            for piece in host.maps()?.0.iter().filter(|mapping| is_curtain(mapping)) {
                family.curtain.unregister(&piece.range);
            }
        }
        let families: Vec<Arc<Family>> = self.families().cloned().collect();
        leave(host, record, &families)
    }
}

fn random_id() -> Result<u64, SandboxError> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| SandboxError::Record(format!("no random number: {error}")))?;
    Ok(u64::from_le_bytes(bytes))
}

/// As long as it lives, no page is opened.
struct Held<'a> {
    curtain: &'a Curtain,
    _section: Option<crate::watchdog::Guard>,
}

impl<'a> Held<'a> {
    fn begin(curtain: &'a Curtain) -> Self {
        let section = crate::watchdog::section("holding the curtains of a process that enters the sandbox", HOLD_LIMIT);
        curtain.hold();
        Self { curtain, _section: section }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.curtain.release();
    }
}

/// Notes where threads stand, while the code of `texts` is closed: whoever comes to a page from now on comes to a place that its
/// translation keeps. Functions of these texts that are active have begun before they copied their return addresses: that is done
/// for them.
fn keep_places(
    host: &mut Host<'_>,
    family: &Family,
    unwinder: &mut Unwinder,
    texts: &[Range<TargetAddr>],
) -> Result<(), SandboxError> {
    let stacks = (host.frames)(unwinder).map_err(SandboxError::Maps)?;
    let has_shadow = family.shared.policy.has(Guard::ShadowStack);
    let mut doubtful = Vec::new();
    for stack in &stacks {
        if !stack.is_whole {
            doubtful.push(stack.tid);
        }
        for (slot, to, from) in stack.returns().filter(|_| has_shadow) {
            if texts.iter().any(|text| text.contains(&from)) {
                let copied = host.memory.write(family.shared.area.shadow_of(slot), &to.0.to_le_bytes());
                copied.map_err(|error| SandboxError::Record(format!("a shadow can't be written: {error}")))?;
            }
        }
    }
    lock(&family.shared.doubtful).extend(doubtful);
    let mut code = lock(&family.shared.code);
    for stack in stacks {
        // A system call that is interrupted is made again.
        let restarted = stack.frames.first().map(|at| at.offset(-SYSCALL_LENGTH));
        code.keep(stack.frames.into_iter().chain(restarted));
    }
    Ok(())
}

/// The bytes of a text that go behind its curtain: those of its file.
fn content(host: &Host<'_>, mapping: &Mapping) -> Result<Vec<u8>, String> {
    let length = usize::try_from(mapping.len()).map_err(|error| error.to_string())?;
    let now = host.memory.bytes(mapping.range.start, length).map_err(|error| format!("it can't be read: {error}"))?;
    let tid = living_thread(host.pid).unwrap_or(host.pid);
    let file = fs::File::open(mapping.map_file(tid)).map_err(|error| format!("its file can't be opened: {error}"))?;
    let mut bytes = vec![0; length];
    let mut filled = 0;
    while filled < length {
        match file.read_at(&mut bytes[filled..], mapping.file_offset + filled as u64) {
            // The rest of its last page is zero.
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(format!("its file can't be read: {error}")),
        }
    }
    match now.iter().zip(&bytes).position(|(a, b)| a != b) {
        None => Ok(now),
        Some(at) => Err(format!(
            "at {} it is not what its file says: a patch, a breakpoint, a probe, a relocation",
            mapping.range.start.offset(at as i64)
        )),
    }
}

/// The parts of a text that are behind its curtain.
fn pieces(maps: &Maps, text: &Text) -> Vec<Mapping> {
    let range = text.range();
    let inside = |m: &&Mapping| is_curtain(m) && range.start <= m.range.start && m.range.end <= range.end;
    maps.0.iter().filter(inside).cloned().collect()
}

/// The parts of a spare that are there.
fn spare_pieces(maps: &Maps, text: &Text) -> Option<Vec<Range<TargetAddr>>> {
    let spare = text.spare_range()?;
    let is_part = |m: &&Mapping| {
        let offset = m.range.start.0.wrapping_sub(spare.start.0).wrapping_add(text.file_offset);
        let same_file = m.device == text.device && m.inode == text.inode && m.file_offset == offset;
        same_file && spare.start <= m.range.start && m.range.end <= spare.end
    };
    Some(maps.0.iter().filter(is_part).map(|mapping| mapping.range.clone()).collect())
}

/// Moves the file's own mappings back. See [`Session::leave`].
///
/// # Errors
/// As there.
pub fn leave(host: &mut Host<'_>, record: &mut Record, families: &[Arc<Family>]) -> Result<(), SandboxError> {
    record.state = State::Leaving;
    host.write(Some(record))?;
    crate::fault::point("sandbox.leaving");
    let maps = host.maps()?;
    // Made, and never moved into place.
    for mapping in maps.0.iter().filter(|m| is_curtain(m) && record.text_at(m.range.start).is_none()) {
        host.unmap(&mapping.range);
    }
    let mut kept = Vec::new();
    for text in record.texts.clone() {
        let Some(spares) = spare_pieces(&maps, &text) else { continue };
        let delta = text.spare.map_or(0, |spare| spare.wrapping_distance(text.start));
        let mut moved: Vec<Range<TargetAddr>> = Vec::new();
        let mut stays = false;
        for piece in pieces(&maps, &text) {
            let from = piece.range.start.offset(delta)..piece.range.end.offset(delta);
            let has_spare = spares.iter().any(|spare| spare.start <= from.start && from.end <= spare.end);
            if !has_spare || !is_untouched(host, &piece) {
                tracing::warn!(pid = host.pid, at = %piece.range.start, "text that somebody has changed stays as it is");
                stays = true;
                continue;
            }
            curtain::move_over(host.puppet, from.start, &piece.range)?;
            crate::fault::point("sandbox.left-text");
            moved.push(from);
        }
        if let Some(lock) = text.lock {
            lock.lock_range(host.puppet, &text.range())?;
        }
        if stays {
            kept.push(text);
            continue;
        }
        for spare in spares {
            for rest in less(&spare, &moved) {
                host.unmap(&rest);
            }
        }
    }
    let gone = record.texts.iter().filter(|text| !kept.contains(text)).filter_map(Text::region_range);
    record.regions.extend(gone);
    record.texts = kept;
    host.write(Some(record))?;
    for family in families {
        // Of this process and of others: those look again.
        record.regions.iter().for_each(|region| family.curtain.wake(region));
    }
    host.memory.read_elsewhere(elsewhere(&host.maps()?, record));
    evict::from_regions(host, &record.regions, families)?;
    crate::fault::point("sandbox.evicted");
    for region in std::mem::take(&mut record.regions) {
        host.unmap(&region);
    }
    if record.texts.is_empty() {
        if let Some(area) = record.area.take() {
            area.unmap(host.puppet)?;
        }
        host.write(None)
    } else {
        record.state = State::Inside;
        host.write(Some(record))
    }
}

/// What of `range` is in none of `taken`.
fn less(range: &Range<TargetAddr>, taken: &[Range<TargetAddr>]) -> Vec<Range<TargetAddr>> {
    let mut taken: Vec<_> = taken.iter().filter(|t| t.start < range.end && range.start < t.end).cloned().collect();
    taken.sort_by_key(|t| t.start);
    let mut rest = Vec::new();
    let mut at = range.start;
    for part in taken {
        if at < part.start {
            rest.push(at..part.start);
        }
        at = at.max(part.end);
    }
    if at < range.end {
        rest.push(at..range.end);
    }
    rest
}

/// Whether the pages of a curtain are as they were made. Nobody has written into pages that were never opened, and they can't
/// be read.
fn is_untouched(host: &Host<'_>, piece: &Mapping) -> bool {
    let tid = living_thread(host.pid).unwrap_or(host.pid);
    let Ok(behind) = fs::File::open(piece.map_file(tid)) else { return false };
    let (mut now, mut made) = (vec![0; PAGE_SIZE as usize], vec![0; PAGE_SIZE as usize]);
    (piece.range.start.0..piece.range.end.0).step_by(PAGE_SIZE as usize).map(TargetAddr).all(|page| {
        let offset = piece.file_offset + (page.0 - piece.range.start.0);
        match host.memory.read_in_place(page, &mut now) {
            Ok(()) => behind.read_exact_at(&mut made, offset).is_ok() && now == made,
            Err(_) => true,
        }
    })
}

/// Makes true what a record says that was found in a process: an earlier agent's, or that of the process it was forked from.
/// Gives the record that holds then; none: it is out.
///
/// # Errors
/// The process is gone, or the kernel refuses.
pub fn settle(host: &mut Host<'_>, mut record: Record) -> Result<Option<Record>, SandboxError> {
    let maps = host.maps()?;
    let mut texts = Vec::new();
    for text in std::mem::take(&mut record.texts) {
        if !pieces(&maps, &text).is_empty() {
            texts.push(text);
        } else if let Some(spares) = spare_pieces(&maps, &text) {
            spares.iter().for_each(|spare| host.unmap(spare));
        } else if let Some(orphan) = orphan(&maps, &text) {
            host.unmap(&orphan);
        }
    }
    record.texts = texts;
    if record.state == State::Inside && !record.texts.is_empty() {
        // Made, and not moved into place.
        for mapping in maps.0.iter().filter(|m| is_curtain(m) && record.text_at(m.range.start).is_none()) {
            host.unmap(&mapping.range);
        }
        host.write(Some(&record))?;
        return Ok(Some(record));
    }
    leave(host, &mut record, &[])?;
    Ok((!record.texts.is_empty()).then_some(record))
}

/// The second mapping of a text, made and not recorded: it lies alone, where a module's own text lies beside other parts of its
/// file.
fn orphan(maps: &Maps, text: &Text) -> Option<Range<TargetAddr>> {
    let is_text = |m: &Mapping| {
        m.executable && (&m.device, m.inode, m.file_offset) == (&text.device, text.inode, text.file_offset)
    };
    let touches = |one: &Mapping, other: &Mapping| {
        (one.range.end == other.range.start || other.range.end == one.range.start)
            && (&one.device, one.inode) == (&other.device, other.inode)
    };
    let mut found = maps.0.iter().filter(|m| is_text(m) && m.range.start != text.start && m.len() == text.len());
    found.find(|mapping| !maps.0.iter().any(|other| touches(mapping, other))).map(|mapping| mapping.range.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> Range<TargetAddr> {
        TargetAddr(start)..TargetAddr(end)
    }

    #[test]
    fn what_was_not_moved_is_left_over() {
        assert_eq!(less(&range(10, 20), &[]), [range(10, 20)]);
        assert_eq!(less(&range(10, 20), &[range(14, 16), range(10, 12)]), [range(12, 14), range(16, 20)]);
        assert_eq!(less(&range(10, 20), &[range(0, 30)]), []);
    }

    #[test]
    fn a_second_mapping_that_nobody_recorded_is_found_by_its_loneliness() {
        let maps = Maps::parse(
            "\
1000-2000 r--p 00000000 fe:00 123 /lib/a
2000-4000 r-xp 00001000 fe:00 123 /lib/a
9000-b000 r-xp 00001000 fe:00 123 /lib/a
c000-d000 r-xp 00001000 fe:00 124 /lib/b
",
        );
        let text = |start: u64| Text {
            start: TargetAddr(start),
            end: TargetAddr(start + 0x2000),
            spare: None,
            device: "fe:00".to_owned(),
            inode: 123,
            file_offset: 0x1000,
            lock: None,
            region: None,
        };
        assert_eq!(orphan(&maps, &text(0x2000)), Some(range(0x9000, 0xb000)));
        assert_eq!(orphan(&Maps(maps.0[..2].to_vec()), &text(0x2000)), None);
        // Loaded twice by the target itself: both have their other parts beside them.
        let twice = Maps::parse(
            "\
1000-2000 r--p 00000000 fe:00 123 /lib/a
2000-4000 r-xp 00001000 fe:00 123 /lib/a
8000-9000 r--p 00000000 fe:00 123 /lib/a
9000-b000 r-xp 00001000 fe:00 123 /lib/a
",
        );
        assert_eq!(orphan(&twice, &text(0x2000)), None);
    }
}
