//! Into the sandbox and out of it, one process at a time.
//!
//! Each text mapping is changed by one mremap(2), which is atomic for its threads: before it they run the file's page, after it
//! the same bytes behind a curtain. An agent that dies leaves some texts as they were and others behind curtains that are
//! open: the process runs on (P1), and who finds the record settles it.

use super::{
    record::{Record, State, Text},
    texts::{NativeCode, divide},
    view::{elsewhere, is_curtain},
};
use crate::{
    address::{PAGE_SIZE, TargetAddr},
    process::{
        curtain::{self, Curtain},
        gate::GateError,
        info::living_thread,
        locked::{self, Lock},
        maps::{Mapping, Maps},
        memory::Memory,
        pages,
        puppet::{Puppet, PuppetError},
    },
};
use std::{
    fs, io,
    ops::Range,
    os::unix::fs::FileExt,
    time::{SystemTime, UNIX_EPOCH},
};

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
}

impl Host<'_> {
    fn maps(&self) -> Result<Maps, SandboxError> {
        Maps::of(self.pid).map_err(SandboxError::Maps)
    }

    fn write(&mut self, record: Option<&Record>) -> Result<(), SandboxError> {
        (self.write)(record).map_err(SandboxError::Record)
    }

    fn unmap(&mut self, range: &Range<TargetAddr>) {
        if let Err(error) = pages::unmap(self.puppet, range.start, range.end.0 - range.start.0) {
            tracing::warn!(pid = self.pid, %error, "memory of the sandbox stays mapped");
        }
    }
}

/// A process that is in the sandbox.
#[derive(Debug)]
pub struct Session {
    curtain: Curtain,
    /// What runs natively.
    pub native: Vec<NativeCode>,
    /// The executable mappings at the last look.
    seen: Vec<Mapping>,
}

impl Session {
    /// Takes a process in.
    ///
    /// # Errors
    /// It can't go in; it is as it was.
    pub fn enter(host: &mut Host<'_>) -> Result<(Self, Record), SandboxError> {
        let curtain = Curtain::new(host.puppet, host.pid, None)?;
        let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let mut record = Record { state: State::Entering, since, texts: Vec::new() };
        let mut session = Self { curtain, native: Vec::new(), seen: Vec::new() };
        let maps = host.maps()?;
        let (texts, native) = divide(&maps, host.is_ours);
        session.native = native;
        let drawn = session.draw(host, &mut record, &texts).and_then(|()| match record.texts.is_empty() {
            false => Ok(()),
            true => Err(SandboxError::NoText(session.reasons())),
        });
        if let Err(error) = drawn {
            session.leave(host, &mut record)?;
            return Err(error);
        }
        record.state = State::Inside;
        host.write(Some(&record))?;
        crate::fault::point("sandbox.entered");
        Ok((session, record))
    }

    fn reasons(&self) -> String {
        let mut reasons: Vec<_> = self.native.iter().map(|code| format!("{}: {}", code.name, code.reason)).collect();
        reasons.dedup();
        reasons.join("; ")
    }

    /// Cares again for a process that is in already: an earlier agent's, or a child of one that is in.
    ///
    /// # Errors
    /// Threads can't be made to wait in it; it runs on with its pages open.
    pub fn resume(host: &mut Host<'_>, record: &Record) -> Result<Self, SandboxError> {
        let curtain = Curtain::new(host.puppet, host.pid, None)?;
        for piece in host.maps()?.0.iter().filter(|m| is_curtain(m) && record.text_at(m.range.start).is_some()) {
            curtain.register(&piece.range)?;
        }
        Ok(Self { curtain, native: Vec::new(), seen: Vec::new() })
    }

    /// Puts `texts` behind curtains. What can't be is counted as native.
    fn draw(&mut self, host: &mut Host<'_>, record: &mut Record, texts: &[Mapping]) -> Result<(), SandboxError> {
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
        for (text, (mapping, content)) in record.texts[known..].iter().zip(&drawn) {
            let at = match text.spare {
                Some(_) => Some(self.curtain.prepare(host.puppet, host.memory, host.puppet.scratch(), content)?.0),
                None => None,
            };
            laid.push((*mapping, at));
        }
        crate::fault::point("sandbox.prepared");
        // The target may have unmapped some of it meanwhile.
        let now = host.maps()?;
        let mut kept = record.texts[..known].to_vec();
        for (text, (mapping, at)) in record.texts[known..].iter().cloned().zip(laid) {
            let is_there = now.at(text.start).is_some_and(|found| found == mapping);
            let moved = match at {
                Some(at) if is_there => curtain::move_over(host.puppet, at, &text.range()).map_err(|error| (at, error)),
                Some(at) => {
                    host.unmap(&(at..at.offset(text.len() as i64)));
                    if let Some(spare) = text.spare_range() {
                        host.unmap(&spare);
                    }
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
        Ok(())
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
            for spare in lost.iter().filter_map(|text| spare_pieces(&maps, text)).flatten() {
                host.unmap(&spare);
            }
            host.write(Some(record))?;
        }
        let is_known = |mapping: &Mapping| {
            (host.is_ours)(mapping)
                || is_curtain(mapping)
                || record.is_spare(mapping.range.start)
                || record.text_at(mapping.range.start).is_some()
        };
        let (texts, native) = divide(&maps, &is_known);
        self.native = native;
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
        self.curtain.traps()
    }

    /// Whether system calls that read text work as ever.
    #[must_use]
    pub fn covers_kernel_faults(&self) -> bool {
        self.curtain.covers_kernel_faults
    }

    /// Takes the process out. What somebody else has written into stays behind its curtain, which is open, and in the record.
    ///
    /// # Errors
    /// The process is gone, or the kernel refuses; what was done is recorded, and can be continued.
    pub fn leave(self, host: &mut Host<'_>, record: &mut Record) -> Result<(), SandboxError> {
        for piece in host.maps()?.0.iter().filter(|mapping| is_curtain(mapping)) {
            self.curtain.unregister(&piece.range);
        }
        leave(host, record)
    }
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
pub fn leave(host: &mut Host<'_>, record: &mut Record) -> Result<(), SandboxError> {
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
    record.texts = kept;
    if record.texts.is_empty() {
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
    leave(host, &mut record)?;
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
