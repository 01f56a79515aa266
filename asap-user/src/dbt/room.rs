//! Room for jumps in a page: a five-byte jump where instructions may be displaced, or a two-byte jump to five free bytes near
//! by. No entry may lie within bytes that are overwritten; nothing crosses the border of the page, since pages are switched
//! one by one.

use super::{
    analysis::Analysis,
    bits::Bits,
    code::{Stretch, never_goes_on},
    counts::Form,
    relocate::can_move,
};
use crate::address::PAGE_SIZE;
use iced_x86::{FlowControl, Instruction, Mnemonic};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

/// Length of `jmp rel32`.
pub(super) const JUMP: u64 = 5;
/// Length of `jmp rel8`.
pub(super) const SHORT_JUMP: u64 = 2;
/// How far back, and how far on, displaced instructions reach, bytes.
const DISPLACED_MOST: u64 = 48;

/// How a window is left for its fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Jump {
    /// By a jump at its beginning.
    Near,
    /// By a short jump to a jump there.
    Short(u64),
}

/// Instructions that run in a fragment, from a jump at the first on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    pub(super) start: u64,
    /// End of the last displaced instruction.
    pub(super) end: u64,
    pub(super) jump: Jump,
    /// It ends at an instruction that is guarded and stays where it is.
    pub(super) is_sealed: bool,
}

impl Window {
    /// Bytes that the jump overwrites.
    pub(super) fn overwritten(&self) -> Range<u64> {
        match self.jump {
            Jump::Near => self.start..self.start + JUMP,
            Jump::Short(_) => self.start..self.start + SHORT_JUMP,
        }
    }
}

/// The room of one page.
pub(super) struct Room<'a> {
    analysis: &'a Analysis,
    pub(super) stretch: &'a Stretch,
    page: Range<u64>,
    keep: BTreeSet<u64>,
    /// Bytes that are overwritten, by window or slot.
    taken: Bits,
    pub(super) windows: BTreeMap<u64, Window>,
    untouched: Vec<Range<u64>>,
}

impl<'a> Room<'a> {
    pub(super) fn new(analysis: &'a Analysis, stretch: &'a Stretch, page: u64, untouched: &[Range<u64>]) -> Self {
        Self {
            analysis,
            stretch,
            page: page..page.saturating_add(PAGE_SIZE),
            keep: BTreeSet::new(),
            taken: Bits::new(page, PAGE_SIZE as usize),
            windows: BTreeMap::new(),
            untouched: untouched.to_vec(),
        }
    }

    /// Threads stand at `at`: from now on nothing there is overwritten.
    pub(super) fn keep(&mut self, at: impl IntoIterator<Item = u64>) {
        self.keep.extend(at);
    }

    pub(super) fn is_touchable(&self, at: u64) -> bool {
        !self.untouched.iter().any(|range| range.contains(&at))
    }

    fn is_entry(&self, at: u64) -> bool {
        self.stretch.entries.has(at) || self.keep.contains(&at)
    }

    /// Something overwrites the byte at `at`.
    pub(super) fn is_taken(&self, at: u64) -> bool {
        self.taken.has(at)
    }

    /// An entry in `range`.
    fn has_entry(&self, range: Range<u64>) -> bool {
        range.into_iter().any(|at| self.is_entry(at))
    }

    /// All bytes may be overwritten, as far as other windows are concerned.
    fn is_free(&self, range: Range<u64>) -> bool {
        self.page.start <= range.start
            && range.end <= self.page.end
            && range.into_iter().all(|at| !self.taken.has(at) && self.is_touchable(at))
    }

    /// Instructions of this page that run where they are.
    pub(super) fn is_native(&self, range: Range<u64>) -> bool {
        self.stretch.starts.has(range.start) && self.is_free(range.clone()) && self.window_over(range.start).is_none()
    }

    /// The window that displaces the instruction at `at`.
    pub(super) fn window_over(&self, at: u64) -> Option<&Window> {
        self.windows.range(..=at).next_back().map(|(_, window)| window).filter(|window| at < window.end)
    }

    /// The end of the instructions that are displaced when `length` bytes from `start` on are overwritten.
    fn displaced_end(&self, start: u64, length: u64) -> Option<u64> {
        let over = start..start.checked_add(length)?;
        if !self.is_free(over.clone()) || self.has_entry(start + 1..over.end) || self.window_over(start).is_some() {
            return None;
        }
        let mut at = start;
        while at < over.end {
            if !self.stretch.starts.has(at) {
                return None;
            }
            let instruction = self.stretch.decode(at).filter(can_move)?;
            at = instruction.next_ip();
            // A guard's fragment must not run over what another window has overwritten.
            if (instruction.ip()..at).any(|byte| self.taken.has(byte)) {
                return None;
            }
            if never_goes_on(&instruction) {
                let rest = at..over.end.max(at);
                return rest.into_iter().all(|byte| self.is_dead(byte)).then_some(at);
            }
        }
        Some(at)
    }

    fn is_dead(&self, at: u64) -> bool {
        self.stretch.dead.has(at) && !self.taken.has(at)
    }

    fn take(&mut self, range: Range<u64>) {
        range.for_each(|at| self.taken.set(at));
    }

    fn open(&mut self, start: u64, end: u64, jump: Jump) {
        let window = Window { start, end, jump, is_sealed: false };
        self.take(window.overwritten());
        if let Jump::Short(slot) = jump {
            self.take(slot..slot + JUMP);
        }
        self.windows.insert(start, window);
    }

    /// Five free bytes that a short jump at `start` reaches.
    fn slot_for(&self, start: u64) -> Option<u64> {
        let reach = start.saturating_sub(126)..start + SHORT_JUMP + 127;
        let window_bytes = start..start + SHORT_JUMP;
        let is_slot = |at: u64| {
            self.is_free(at..at + JUMP)
                && (at..at + JUMP).all(|byte| {
                    (self.is_dead(byte) || self.is_left_over(byte))
                        && !window_bytes.contains(&byte)
                        && !self.is_entry(byte)
                })
        };
        reach.into_iter().find(|&at| is_slot(at))
    }

    /// A byte of displaced instructions that nothing executes any more.
    fn is_left_over(&self, at: u64) -> bool {
        self.window_over(at).is_some_and(|window| {
            at >= window.overwritten().end && !self.has_entry(window.start + 1..at + 1) && !self.taken.has(at)
        })
    }

    /// A window that begins at `start` and displaces the instruction at `through`.
    fn try_at(&mut self, start: u64, through: u64, may_evict: bool) -> Option<Jump> {
        let near = self.displaced_end(start, JUMP).and_then(|end| self.extended(start, end, through));
        // A call that runs elsewhere costs much: its return is not predicted.
        let is_cheap = near.is_some_and(|end| self.call_at_end(start, end).is_none_or(|call| call == through));
        if let Some(end) = near.filter(|_| is_cheap) {
            self.open(start, end, Jump::Near);
            return Some(Jump::Near);
        }
        let short = self.displaced_end(start, SHORT_JUMP).and_then(|end| self.extended(start, end, through));
        if let Some(end) = short
            && let Some(slot) = self
                .slot_for(start)
                .or_else(|| self.grow_near(start, end))
                .or_else(|| if may_evict { self.evict_near(start, end) } else { None })
        {
            self.open(start, end, Jump::Short(slot));
            return Some(Jump::Short(slot));
        }
        let end = near.filter(|_| may_evict)?;
        self.open(start, end, Jump::Near);
        Some(Jump::Near)
    }

    /// The call that is the last of the instructions from `start` to `end`; none is among the others.
    fn call_at_end(&self, start: u64, end: u64) -> Option<u64> {
        let mut at = start;
        while let Some(instruction) = self.stretch.decode(at).filter(|_| at < end) {
            if instruction.next_ip() >= end {
                return is_moved_call(&instruction).then_some(at);
            }
            at = instruction.next_ip();
        }
        None
    }

    /// The end of what is displaced from `start` on so that the instruction at `through` is among it; `end` without it.
    fn extended(&self, start: u64, end: u64, through: u64) -> Option<u64> {
        let mut at = end;
        if through < at {
            return Some(at);
        }
        if through - start > DISPLACED_MOST || self.has_entry(start + 1..through + 1) {
            return None;
        }
        while at <= through {
            let instruction = self.stretch.decode(at).filter(can_move)?;
            let is_plain = (at..instruction.next_ip()).all(|byte| !self.taken.has(byte) && self.is_touchable(byte));
            if !is_plain || !self.stretch.starts.has(at) {
                return None;
            }
            at = instruction.next_ip();
            if never_goes_on(&instruction) && at <= through {
                return None;
            }
        }
        Some(at)
    }

    /// Displaces more by a window near by, so that a short jump at `start` finds room in what is no longer used there. What is
    /// displaced runs on in the same fragment: that costs nothing.
    fn grow_near(&mut self, start: u64, end: u64) -> Option<u64> {
        let reach = start.saturating_sub(126)..start + SHORT_JUMP + 127;
        let near: Vec<Window> = self
            .windows
            .range(reach.start.saturating_sub(JUMP)..reach.end)
            .map(|(_, window)| *window)
            .filter(|window| !window.is_sealed)
            .collect();
        for window in near {
            let slot = window.overwritten().end;
            let last = slot + JUMP - 1;
            let is_apart = last < start || end <= window.start;
            if !reach.contains(&slot) || !is_apart || !self.is_free(slot..slot + JUMP) {
                continue;
            }
            let Some(grown) = self.extended(window.start, window.end, last) else { continue };
            let hits = window.start < end && start < grown;
            let meets_other = self.windows.range(window.start + 1..grown).next().is_some();
            if hits || meets_other || self.call_at_end(window.start, grown).is_some() {
                continue;
            }
            if let Some(window) = self.windows.get_mut(&window.start) {
                window.end = grown;
                return Some(slot);
            }
        }
        None
    }

    /// Moves other instructions away, so that a short jump at `start` has somewhere to go.
    fn evict_near(&mut self, start: u64, end: u64) -> Option<u64> {
        let reach = start.saturating_sub(126)..start + SHORT_JUMP + 127;
        let candidates: Vec<u64> =
            self.stretch.starts.within(reach.start.saturating_sub(JUMP)..reach.end - JUMP).collect();
        for other in candidates {
            if (start..end).contains(&other) || self.has_entry(other + 1..other + 2 * JUMP) {
                continue;
            }
            let slot = other + JUMP;
            let Some(other_end) = self.displaced_end(other, 2 * JUMP) else { continue };
            let hits_window = other < end && start < other_end;
            let part = |at: u64| self.analysis.part_at(at).map(|part| part.range.start);
            // A call that moves loses the processor's return prediction.
            let mut at = other;
            let mut is_cheap = true;
            while at < other_end
                && let Some(instruction) = self.stretch.decode(at)
            {
                is_cheap &= instruction.flow_control() == iced_x86::FlowControl::Next;
                at = instruction.next_ip();
            }
            if hits_window || !is_cheap || !reach.contains(&slot) || part(other).is_none() {
                continue;
            }
            self.open(other, other_end, Jump::Near);
            return Some(slot);
        }
        None
    }

    /// Where control may come from in a straight line to the instruction at `at`, nearest first; `at` itself first of all.
    fn straight_line_to(&self, at: u64) -> Vec<u64> {
        let mut line = vec![at];
        let mut here = at;
        while !self.is_entry(here)
            && let Some(before) = self.stretch.previous(here)
            && before.ip() >= self.page.start
            && at - before.ip() <= DISPLACED_MOST
        {
            here = before.ip();
            line.push(here);
        }
        line
    }

    /// Adds the instruction at `at` to a window in front of it, whose fragment then runs it.
    fn share(&mut self, at: u64) -> Option<Form> {
        let window = *self.windows.range(..=at).next_back()?.1;
        if window.is_sealed || self.has_entry(window.start + 1..at + 1) {
            return None;
        }
        let end = self.extended(window.start, window.end, at)?;
        self.windows.get_mut(&window.start)?.end = end;
        Some(Form::Shared)
    }

    /// Room at the instruction itself: what it does is preceded by something.
    pub(super) fn at(&mut self, at: u64, may_evict: bool) -> Option<Form> {
        if self.window_over(at).is_some() {
            return self.share(at);
        }
        let is_own = self.stretch.decode(at).is_some_and(|found| found.len() as u64 >= JUMP);
        let jump = self.try_at(at, at, may_evict)?;
        Some(form(jump, if is_own { Form::Own } else { Form::Forward }, may_evict))
    }

    /// Room for an instruction that runs in the fragment.
    pub(super) fn around(&mut self, at: u64, may_evict: bool) -> Option<Form> {
        if self.window_over(at).is_some() {
            return self.share(at);
        }
        let length = self.stretch.decode(at)?.len() as u64;
        for start in self.straight_line_to(at) {
            if let Some(jump) = self.try_at(start, at, false) {
                let own = match () {
                    () if start < at => Form::Backward,
                    () if length >= JUMP => Form::Own,
                    () if self.windows.get(&start).is_some_and(|window| window.end == at + length) => Form::Padding,
                    () => Form::Forward,
                };
                return Some(form(jump, own, false));
            }
        }
        if let Some(shared) = self.share(at) {
            return Some(shared);
        }
        if may_evict {
            for start in self.straight_line_to(at) {
                if let Some(jump) = self.try_at(start, at, true) {
                    return Some(form(jump, Form::Backward, true));
                }
            }
        }
        None
    }

    /// Room in front of an instruction that stays where it is.
    pub(super) fn before(&mut self, at: u64, may_evict: bool) -> Option<Form> {
        if self.is_entry(at) || self.window_over(at).is_some() || !self.is_touchable(at) {
            return None;
        }
        for start in self.straight_line_to(at).into_iter().skip(1) {
            let Some(last) = self.stretch.previous(at) else { break };
            let covers = |window: &Window| window.overwritten().end <= at;
            let fits_near = start + JUMP <= at;
            let jump = if fits_near || start + SHORT_JUMP <= at && self.displaced_end(start, JUMP).is_none() {
                self.try_at(start, last.ip(), may_evict)
            } else {
                None
            };
            if let Some(jump) = jump {
                let window = self.windows.get_mut(&start)?;
                debug_assert!(covers(window) && window.end == at, "{window:x?} {at:#x}");
                window.is_sealed = true;
                return Some(form(jump, Form::Before, may_evict));
            }
        }
        let window = *self.windows.range(..at).next_back()?.1;
        if !window.is_sealed && window.end <= at && !self.has_entry(window.start + 1..at + 1) {
            let end = match window.end == at {
                true => at,
                false => {
                    let last = self.stretch.previous(at)?;
                    self.extended(window.start, window.end, last.ip())?
                }
            };
            let falls_through = self.stretch.previous(at).is_some();
            if end == at && falls_through {
                let window = self.windows.get_mut(&window.start)?;
                (window.end, window.is_sealed) = (end, true);
                return Some(Form::Before);
            }
        }
        None
    }
}

/// A call that becomes a push and a jump when it moves: control comes back to the native return address.
pub(super) fn is_moved_call(instruction: &Instruction) -> bool {
    matches!(instruction.flow_control(), FlowControl::Call | FlowControl::IndirectCall)
        && instruction.mnemonic() != Mnemonic::Syscall
}

fn form(jump: Jump, near: Form, may_evict: bool) -> Form {
    match jump {
        Jump::Near => near,
        Jump::Short(_) if may_evict => Form::Evicted,
        Jump::Short(_) => Form::Short,
    }
}
