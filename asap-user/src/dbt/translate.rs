//! A page at a time: which of its instructions a guard or a patch is about, what room there is, and the fragments that result.

use super::{
    analysis::Analysis,
    code::never_goes_on,
    counts::{Counts, Needless, Outcome, Reason, SiteKind},
    emit::{EmitError, Emitter},
    guards::{Below, Guards, TrapReason},
    operand::Operand,
    options::{Options, ShadowForm},
    places::{Displaced, Place, Undo},
    relocate,
    room::{JUMP, Jump, Room, SHORT_JUMP, Window, is_moved_call},
};
use crate::address::{ImageOffset, PAGE_SIZE};
use iced_x86::{Code, FlowControl, Instruction, Mnemonic, OpKind, Register};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ops::Range,
    sync::Arc,
};

/// Length of a trap slot, bytes.
pub const TRAP_SLOT: u64 = 8;

/// Where a thread goes that a guard stops. Its registers are those of the instruction that it was about to run. The slot's bytes
/// let it go on: as long as the page that holds the slot is a gate, it parks instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trap {
    /// The slot.
    pub at: ImageOffset,
    /// Its [`TRAP_SLOT`] bytes.
    pub bytes: [u8; TRAP_SLOT as usize],
    /// The instruction that was guarded.
    pub native: ImageOffset,
    /// What the thread was about to do.
    pub reason: TrapReason,
    /// A thread that is moved here goes on as if it had not been stopped.
    pub resume: ImageOffset,
    /// Where a [`TrapReason::Target`] reads its destination.
    pub destination: Option<Operand>,
}

/// A patch that is in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patched {
    /// The instruction.
    pub at: ImageOffset,
    /// What the patch jumps to in order to go on with it.
    pub resume: ImageOffset,
}

/// Why a page was not translated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TranslateError {
    /// Not a page of code.
    #[error("the image has no code at {0}")]
    NoCode(ImageOffset),
    /// No room for more fragments.
    #[error("the code cache of {0} bytes is full")]
    CacheFull(u64),
    /// A fragment can't be written.
    #[error("the fragment for {at} can't be written: {reason}")]
    Unwritable {
        /// The native address.
        at: ImageOffset,
        /// Why.
        reason: String,
    },
}

/// A page with what belongs to it.
#[derive(Clone, Debug)]
pub struct TranslatedPage {
    /// Its address.
    pub page: ImageOffset,
    /// Its new bytes. What the file does not hold is zero.
    pub bytes: Box<[u8; PAGE_SIZE as usize]>,
    /// Where its fragments go; write them before the page.
    pub fragments_at: ImageOffset,
    /// Their bytes.
    pub fragments: Vec<u8>,
    /// Trap slots that the fragments use; write them before the page.
    pub traps: Vec<Trap>,
    /// What fragments and slots in the page stand for, by address.
    pub places: Vec<Place>,
    /// Native instructions that have moved, by address.
    pub displaced: Vec<Displaced>,
    /// Threads that stand here must be moved, by `displaced`, before the page is used: the shadow stack of a whole function
    /// depends on it.
    pub must_move: Vec<ImageOffset>,
    /// Patches in this page that are in place.
    pub patched: Vec<Patched>,
    /// What became of its sites.
    pub counts: Counts,
}

impl TranslatedPage {
    /// Its bytes are those of the file.
    #[must_use]
    pub fn is_unchanged(&self) -> bool {
        self.fragments.is_empty()
    }

    /// What the byte at `at` in its fragments, or in a slot of the page, stands for.
    #[must_use]
    pub fn place_of(&self, at: ImageOffset) -> Option<&Place> {
        let next = self.places.partition_point(|place| place.at <= at);
        let place = self.places[..next].last()?;
        let fragments = self.fragments_at.0..self.fragments_at.0 + self.fragments.len() as u64;
        let is_inside =
            if fragments.contains(&place.at.0) { fragments.contains(&at.0) } else { at.0 < place.at.0 + JUMP };
        is_inside.then_some(place)
    }
}

/// What is put in front of an instruction, or in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    CopyReturnAddress(Below),
    CheckReturn(Below),
    CheckTarget(Below),
    CheckSyscall,
    Divert(ImageOffset),
}

type Actions = BTreeMap<u64, Vec<Action>>;

/// Translates the pages of one image for one set of options.
pub struct Translator {
    analysis: Arc<Analysis>,
    options: Options,
    cache_used: u64,
    traps_used: u64,
    untouched: Vec<Range<u64>>,
    /// Whether the returns of a group can be checked.
    paired: HashMap<usize, bool>,
    /// Functions by the page of their entry.
    entries: BTreeMap<u64, Vec<(u64, usize)>>,
    /// Entries that have room, by page.
    roomy: HashMap<u64, HashSet<u64>>,
}

impl Translator {
    /// A translator whose cache is empty.
    #[must_use]
    pub fn new(analysis: Arc<Analysis>, options: Options) -> Self {
        let mut entries: BTreeMap<u64, Vec<(u64, usize)>> = BTreeMap::new();
        for (index, group) in analysis.groups.iter().enumerate() {
            for &at in &group.function_entries {
                entries.entry(page_of(at)).or_default().push((at, index));
            }
        }
        entries.values_mut().for_each(|page| page.sort_unstable());
        let mut untouched: Vec<Range<u64>> = analysis.untouched.clone();
        untouched.extend(options.untouched.iter().map(|range| range.start.0..range.end.0));
        Self {
            analysis,
            options,
            cache_used: 0,
            traps_used: 0,
            untouched,
            paired: HashMap::new(),
            entries,
            roomy: HashMap::new(),
        }
    }

    /// What it knows of the image.
    #[must_use]
    pub fn analysis(&self) -> &Arc<Analysis> {
        &self.analysis
    }

    #[cfg(test)]
    pub(super) fn options_for_tests(&self) -> &Options {
        &self.options
    }

    /// Bytes of the cache and of the trap slots that are used.
    #[must_use]
    pub fn used(&self) -> (u64, u64) {
        (self.cache_used, self.traps_used)
    }

    /// Translates the page at `page`. Threads stand at the addresses `keep`, or will come back there: instruction pointers,
    /// those in signal frames, and system calls that may be restarted.
    ///
    /// # Errors
    /// The image has no code there, or the cache is full. A page that stays native for that reason makes the shadow stack of
    /// other pages wrong: give it a larger cache and translate all again.
    pub fn translate_page(
        &mut self,
        page: ImageOffset,
        keep: &[ImageOffset],
    ) -> Result<TranslatedPage, TranslateError> {
        let start = page_of(page.0);
        let analysis = Arc::clone(&self.analysis);
        let mut stretches = analysis.stretches.iter();
        let stretch = stretches
            .find(|stretch| stretch.start < start.saturating_add(PAGE_SIZE) && start < stretch.end())
            .ok_or(TranslateError::NoCode(ImageOffset(start)))?;
        let mut plan = Plan::new(Room::new(&analysis, stretch, start, &self.untouched));
        self.plan_entries(start, &mut plan);
        let must_move = keep.iter().copied().filter(|at| plan.is_overwritten(at.0)).collect();
        plan.room.keep(keep.iter().map(|at| at.0).filter(|&at| page_of(at) == start));
        self.plan_patches(start, &mut plan);
        self.plan_sites(start, &mut plan);
        let mut out = self.emit(start, plan)?;
        out.must_move = must_move;
        Ok(out)
    }

    /// Room for the beginnings of functions. Depends on the image and the options only, not on threads or other sites, so that
    /// another page can count on it.
    fn plan_entries(&self, page: u64, plan: &mut Plan<'_>) {
        if self.options.shadow_stack.is_none() {
            return;
        }
        let here = self.entries.get(&page).map_or(&[][..], Vec::as_slice);
        let wanted: Vec<(u64, usize)> =
            here.iter().copied().filter(|&(_, group)| self.wants_shadow(group).is_ok()).collect();
        for may_evict in [false, true] {
            for &(at, group) in &wanted {
                if plan.actions.contains_key(&at) || !plan.room.is_touchable(at) {
                    continue;
                }
                if let Some(form) = plan.room.at(at, may_evict) {
                    let is_reached = self.analysis.groups[group].reached_inside.contains(&at);
                    let below = if is_reached { Below::RedZone } else { Below::StackPointer };
                    plan.actions.entry(at).or_default().push(Action::CopyReturnAddress(below));
                    plan.counts.add(SiteKind::Entry, Outcome::Done(form));
                }
            }
        }
    }

    /// Whether returns of the group should be checked, as far as the group itself tells.
    fn wants_shadow(&self, group: usize) -> Result<(), Outcome> {
        let group = &self.analysis.groups[group];
        if let Some(flaw) = group.flaw {
            return Err(Outcome::Native(Reason::Unrecovered(flaw)));
        }
        if !group.can_be_overwritten {
            return Err(Outcome::Needless(Needless::Leaf));
        }
        let is_described =
            !group.function_entries.is_empty() && group.function_entries.iter().all(|&at| self.analysis.is_bare(at));
        if is_described { Ok(()) } else { Err(Outcome::Native(Reason::NotAReturn)) }
    }

    /// Every beginning of the group copies its return address, so that its returns can be checked.
    fn is_paired(&mut self, group: usize) -> bool {
        if let Some(&known) = self.paired.get(&group) {
            return known;
        }
        let analysis = Arc::clone(&self.analysis);
        let is_paired = self.wants_shadow(group).is_ok()
            && analysis.groups[group].function_entries.iter().all(|&at| self.has_room_at_entry(at));
        self.paired.insert(group, is_paired);
        is_paired
    }

    fn has_room_at_entry(&mut self, at: u64) -> bool {
        let page = page_of(at);
        if !self.roomy.contains_key(&page) {
            let analysis = Arc::clone(&self.analysis);
            let Some(stretch) = analysis.stretch(at) else { return false };
            let mut plan = Plan::new(Room::new(&analysis, stretch, page, &self.untouched));
            self.plan_entries(page, &mut plan);
            self.roomy.insert(page, plan.actions.keys().copied().collect());
        }
        self.roomy.get(&page).is_some_and(|entries| entries.contains(&at))
    }

    fn plan_patches(&self, page: u64, plan: &mut Plan<'_>) {
        for patch in self.options.patches.iter().filter(|patch| page_of(patch.at.0) == page) {
            let at = patch.at.0;
            let outcome = if !plan.room.stretch.starts.has(at) {
                Outcome::Native(Reason::NotAnInstruction)
            } else if !plan.room.is_touchable(at) {
                Outcome::Native(Reason::Untouched)
            } else {
                let form = plan.room.at(at, false).or_else(|| plan.room.around(at, false));
                form.or_else(|| plan.room.at(at, true)).map_or(Outcome::Native(Reason::NoRoom), Outcome::Done)
            };
            if let Outcome::Done(_) = outcome {
                plan.actions.entry(at).or_default().push(Action::Divert(patch.to));
            }
            plan.counts.add(SiteKind::Patch, outcome);
        }
    }

    fn plan_sites(&mut self, page: u64, plan: &mut Plan<'_>) {
        let analysis = Arc::clone(&self.analysis);
        // Entries were planned for groups that turn out to have others without room: what they copy harms nobody.
        let entries = self.entries.get(&page).cloned().unwrap_or_default();
        if self.options.shadow_stack.is_some() {
            for &(at, group) in &entries {
                let is_planned = plan.actions.get(&at).is_some_and(|a| matches!(a[0], Action::CopyReturnAddress(_)));
                if !is_planned {
                    let outcome = self.wants_shadow(group).err();
                    plan.counts.add(SiteKind::Entry, outcome.unwrap_or(Outcome::Native(Reason::NoRoom)));
                }
            }
        }
        let starts: Vec<u64> = plan.room.stretch.starts.within(page..page.saturating_add(PAGE_SIZE)).collect();
        let mut left = Vec::new();
        for at in starts {
            let Some(instruction) = plan.room.stretch.decode(at) else { continue };
            let Some(part) = analysis.part_at(at) else { continue };
            let Some((kind, wanted)) = self.wanted(&analysis, part.group, &instruction) else { continue };
            match wanted {
                Ok(_) if !plan.room.is_touchable(at) => plan.counts.add(kind, Outcome::Native(Reason::Untouched)),
                Ok(actions) => {
                    if !plan.guard(&instruction, kind, &actions, false) {
                        left.push((instruction, kind, actions));
                    }
                }
                Err(outcome) => plan.counts.add(kind, outcome),
            }
        }
        for (instruction, kind, actions) in left {
            if !plan.guard(&instruction, kind, &actions, true) {
                let flaw = analysis.part_at(instruction.ip()).and_then(|part| analysis.groups[part.group].flaw);
                let reason = flaw.map_or(Reason::NoRoom, Reason::Unrecovered);
                plan.counts.add(kind, Outcome::Native(reason));
            }
        }
    }

    /// What guards want of an instruction.
    #[allow(clippy::type_complexity)]
    fn wanted(
        &mut self,
        analysis: &Analysis,
        group: usize,
        instruction: &Instruction,
    ) -> Option<(SiteKind, Result<Vec<Action>, Outcome>)> {
        let at = instruction.ip();
        match instruction.flow_control() {
            FlowControl::Call if instruction.mnemonic() == Mnemonic::Syscall => {
                self.options.syscalls.then_some(())?;
                Some((SiteKind::Syscall, Ok(vec![Action::CheckSyscall])))
            }
            FlowControl::Return => {
                self.options.shadow_stack?;
                Some((SiteKind::Return, self.wanted_at_return(analysis, group, instruction)))
            }
            FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch => {
                self.options.shadow_stack?;
                if instruction.op0_kind() != OpKind::NearBranch64 {
                    return None;
                }
                let to = instruction.near_branch_target();
                let stays = analysis.part_at(to).is_some_and(|part| part.group == group);
                if stays || !analysis.is_bare(at) {
                    return None;
                }
                Some((SiteKind::TailJump, self.wanted_at_return(analysis, group, instruction)))
            }
            FlowControl::IndirectBranch => {
                let is_tail = analysis.is_bare(at) && !analysis.table_jumps.contains(&at);
                let shadow = match self.options.shadow_stack {
                    Some(_) if is_tail => self.wanted_at_return(analysis, group, instruction).ok(),
                    _ => None,
                };
                let target = self.wanted_target(analysis, group, instruction);
                match (shadow, target) {
                    (None, None) => None,
                    (None, Some(Ok(action))) => Some((SiteKind::IndirectJump, Ok(vec![action]))),
                    (None, Some(Err(outcome))) => Some((SiteKind::IndirectJump, Err(outcome))),
                    (Some(mut actions), target) => {
                        actions.extend(target.and_then(Result::ok));
                        Some((SiteKind::IndirectJump, Ok(actions)))
                    }
                }
            }
            FlowControl::IndirectCall => {
                let action = self.wanted_target(analysis, group, instruction)?;
                Some((SiteKind::IndirectCall, action.map(|action| vec![action])))
            }
            _ => None,
        }
    }

    fn wanted_at_return(
        &mut self,
        analysis: &Analysis,
        group: usize,
        instruction: &Instruction,
    ) -> Result<Vec<Action>, Outcome> {
        let at = instruction.ip();
        self.wants_shadow(group)?;
        let stretch = analysis.stretch(at).ok_or(Outcome::Native(Reason::NotAnInstruction))?;
        // What it has pushed itself: vfork keeps its return address in a register while the child uses the stack; retpolines
        // return to where they want to go.
        let pushes = stretch.previous(at).is_some_and(|before| before.mnemonic() == Mnemonic::Push);
        if !analysis.is_bare(at) || pushes || !relocate::can_move(instruction) {
            return Err(Outcome::Native(Reason::NotAReturn));
        }
        if !self.is_paired(group) {
            return Err(Outcome::Native(Reason::Unpaired));
        }
        // What goes on in the function, or reads below the stack pointer, may have something there.
        let may_stay =
            instruction.flow_control() == FlowControl::IndirectBranch && analysis.groups[group].may_use_red_zone;
        let uses_below = instruction.flow_control() == FlowControl::ConditionalBranch
            || may_stay
            || (instruction.op_count() > 0
                && instruction.op0_kind() == OpKind::Memory
                && instruction.memory_base() == Register::RSP);
        Ok(vec![Action::CheckReturn(if uses_below { Below::RedZone } else { Below::StackPointer })])
    }

    fn wanted_target(
        &self,
        analysis: &Analysis,
        group: usize,
        instruction: &Instruction,
    ) -> Option<Result<Action, Outcome>> {
        self.options.targets.then_some(())?;
        if !matches!(instruction.code(), Code::Call_rm64 | Code::Jmp_rm64) {
            return Some(Err(Outcome::Native(Reason::Immovable)));
        }
        let reads_read_only = instruction.is_ip_rel_memory_operand()
            && analysis.is_read_only(instruction.ip_rel_memory_address())
            || analysis.table_jumps.contains(&instruction.ip());
        if reads_read_only {
            return Some(Err(Outcome::Needless(Needless::ReadOnly)));
        }
        // What the guard changes first would be read by the instruction's own operand.
        if Operand::of(instruction).is_none_or(|operand| operand == Operand::Register(4)) {
            return Some(Err(Outcome::Native(Reason::Immovable)));
        }
        let has_red_zone = match instruction.flow_control() {
            FlowControl::IndirectCall => instruction.memory_base() == Register::RSP,
            _ => analysis.groups[group].may_use_red_zone,
        };
        let below = if has_red_zone { Below::RedZone } else { Below::StackPointer };
        Some(Ok(Action::CheckTarget(below)))
    }

    fn emit(&mut self, page: u64, plan: Plan<'_>) -> Result<TranslatedPage, TranslateError> {
        let fragments_at = self.options.cache.start.0.wrapping_add(self.cache_used);
        let mut bytes = Box::new([0; PAGE_SIZE as usize]);
        let stretch = plan.room.stretch;
        let first = stretch.start.max(page);
        let native = stretch.tail(first, page + PAGE_SIZE - first);
        let offset = (first - page) as usize;
        bytes[offset..offset + native.len()].copy_from_slice(native);
        let mut out = TranslatedPage {
            page: ImageOffset(page),
            bytes,
            fragments_at: ImageOffset(fragments_at),
            fragments: Vec::new(),
            traps: Vec::new(),
            places: Vec::new(),
            displaced: Vec::new(),
            must_move: Vec::new(),
            patched: Vec::new(),
            counts: Counts::default(),
        };
        let mut emitter = Emitter::new(fragments_at);
        let mut slots = Vec::new();
        let cache_length = self.options.cache.end.0.wrapping_sub(self.options.cache.start.0);
        let mut fragment_of = HashMap::new();
        for window in plan.room.windows.values() {
            let fragment = emitter.here();
            fragment_of.insert(window.start, fragment);
            let done = self.emit_window(&mut emitter, &plan, window, &mut out);
            let done = done.and_then(|()| write_jump(&mut out.bytes, page, window, fragment, &mut slots));
            if let Err(error) = done {
                return Err(TranslateError::Unwritable { at: ImageOffset(window.start), reason: error.to_string() });
            }
            if self.cache_used + emitter.len() as u64 > cache_length {
                return Err(TranslateError::CacheFull(cache_length));
            }
        }
        emitter
            .link(|native| fragment_of.get(&native).copied())
            .map_err(|error| TranslateError::Unwritable { at: ImageOffset(page), reason: error.to_string() })?;
        let (fragments, places) = emitter.finish();
        self.cache_used += fragments.len() as u64;
        self.traps_used += out.traps.len() as u64 * TRAP_SLOT;
        (out.fragments, out.places, out.counts) = (fragments, places, plan.counts);
        out.places.extend(slots);
        out.places.sort_by_key(|place| place.at);
        Ok(out)
    }

    fn emit_window(
        &self,
        emitter: &mut Emitter,
        plan: &Plan<'_>,
        window: &Window,
        out: &mut TranslatedPage,
    ) -> Result<(), EmitError> {
        let (stretch, actions) = (plan.room.stretch, &plan.actions);
        let mut at = window.start;
        let mut goes_on = true;
        while at < window.end {
            let instruction = stretch.decode(at).ok_or(EmitError::Immovable)?;
            out.displaced.push(Displaced {
                native: ImageOffset(at),
                fragment: ImageOffset(emitter.here()),
                is_overwritten: window.overwritten().contains(&at) && at != window.start,
            });
            self.emit_actions(emitter, actions, &instruction, out)?;
            relocate::relocate(emitter, stretch, &instruction)?;
            goes_on = !never_goes_on(&instruction) && !is_moved_call(&instruction);
            at = instruction.next_ip();
        }
        if window.is_sealed {
            let instruction = stretch.decode(at).ok_or(EmitError::Immovable)?;
            self.emit_actions(emitter, actions, &instruction, out)?;
            emitter.stands_for(at, Undo::default());
            // To the instruction itself, whatever else begins there.
            return emitter.jump(at);
        }
        if !goes_on {
            return Ok(());
        }
        // Not back if another fragment is near: what lies between is copied.
        let between = plan.up_to_a_window(at).unwrap_or_default();
        for instruction in &between {
            relocate::relocate(emitter, stretch, instruction)?;
            at = instruction.next_ip();
        }
        let next = plan.room.windows.range(window.start + 1..).next();
        if next.is_none_or(|(&start, _)| start != at) {
            emitter.stands_for(at, Undo::default());
            relocate::jump(emitter, at)?;
        }
        Ok(())
    }

    fn emit_actions(
        &self,
        emitter: &mut Emitter,
        actions: &Actions,
        instruction: &Instruction,
        out: &mut TranslatedPage,
    ) -> Result<(), EmitError> {
        let native = instruction.ip();
        let shadow = self.options.shadow_stack.unwrap_or(ShadowForm::Displaced);
        let guards = Guards { constants: self.options.constants, shadow };
        for &action in actions.get(&native).map_or(&[][..], Vec::as_slice) {
            let (reason, resume, trap) = match action {
                Action::CopyReturnAddress(below) => {
                    guards.copy_return_address(emitter, native, below)?;
                    continue;
                }
                Action::Divert(to) => {
                    emitter.stands_for(native, Undo::default());
                    emitter.jump(to.0)?;
                    out.patched.push(Patched { at: ImageOffset(native), resume: ImageOffset(emitter.here()) });
                    continue;
                }
                Action::CheckReturn(below) => {
                    let trap = self.next_trap(out)?;
                    (TrapReason::Return, guards.check_return_address(emitter, native, below, trap)?, trap)
                }
                Action::CheckTarget(below) => {
                    let trap = self.next_trap(out)?;
                    (TrapReason::Target, guards.check_target(emitter, instruction, below, trap)?, trap)
                }
                Action::CheckSyscall => {
                    let trap = self.next_trap(out)?;
                    (TrapReason::Syscall, guards.check_syscall(emitter, native, trap)?, trap)
                }
            };
            let destination = (reason == TrapReason::Target).then(|| Operand::of(instruction)).flatten();
            let mut bytes = [0xcc; TRAP_SLOT as usize];
            bytes[0] = 0xe9;
            bytes[1..5].copy_from_slice(&super::emit::distance(trap.wrapping_add(5), resume)?.to_le_bytes());
            out.traps.push(Trap {
                at: ImageOffset(trap),
                bytes,
                native: ImageOffset(native),
                reason,
                resume: ImageOffset(resume),
                destination,
            });
        }
        Ok(())
    }

    fn next_trap(&self, out: &TranslatedPage) -> Result<u64, EmitError> {
        let (start, end) = (self.options.traps.start.0, self.options.traps.end.0);
        let used = self.traps_used + out.traps.len() as u64 * TRAP_SLOT;
        let is_free = used + TRAP_SLOT <= end.wrapping_sub(start);
        if is_free { Ok(start.wrapping_add(used)) } else { Err(EmitError::Full) }
    }
}

/// What is to happen in a page.
struct Plan<'a> {
    room: Room<'a>,
    actions: Actions,
    counts: Counts,
}

impl<'a> Plan<'a> {
    fn new(room: Room<'a>) -> Self {
        Self { room, actions: BTreeMap::new(), counts: Counts::default() }
    }

    /// A thread can't stand at `at` any more.
    fn is_overwritten(&self, at: u64) -> bool {
        self.room.is_taken(at) && !self.room.windows.contains_key(&at)
    }

    /// The instructions from `at` on up to where a window begins, if they are few, and nothing is to be done about them.
    fn up_to_a_window(&self, at: u64) -> Option<Vec<Instruction>> {
        const BYTES_MOST: u64 = 32;
        let mut between = Vec::new();
        let mut here = at;
        while !self.room.windows.contains_key(&here) {
            let instruction = self.room.stretch.decode(here).filter(relocate::can_move)?;
            let is_plain = matches!(instruction.flow_control(), FlowControl::Next | FlowControl::ConditionalBranch);
            let is_native = self.room.is_native(here..instruction.next_ip());
            let is_near = instruction.next_ip() - at <= BYTES_MOST;
            if !(is_plain && is_native && is_near) || self.actions.contains_key(&here) {
                return None;
            }
            between.push(instruction);
            here = instruction.next_ip();
        }
        Some(between)
    }

    /// Makes room for a guard; `false`: there is none.
    fn guard(&mut self, instruction: &Instruction, kind: SiteKind, actions: &[Action], may_evict: bool) -> bool {
        let at = instruction.ip();
        let stays_if_possible = matches!(kind, SiteKind::Syscall | SiteKind::IndirectCall);
        let mut form = None;
        if stays_if_possible {
            form = self.room.before(at, may_evict);
        }
        let Some(form) = form.or_else(|| self.room.around(at, may_evict)) else { return false };
        self.actions.entry(at).or_default().extend_from_slice(actions);
        self.counts.add(kind, Outcome::Done(form));
        true
    }
}

fn page_of(at: u64) -> u64 {
    at & !(PAGE_SIZE - 1)
}

/// Writes the jump of `window` to its fragment.
fn write_jump(
    bytes: &mut [u8; PAGE_SIZE as usize],
    page: u64,
    window: &Window,
    fragment: u64,
    slots: &mut Vec<Place>,
) -> Result<(), EmitError> {
    let mut near = |at: u64| {
        let distance = super::emit::distance(at.wrapping_add(JUMP), fragment)?;
        let place = (at - page) as usize;
        bytes[place] = 0xe9;
        bytes[place + 1..place + 5].copy_from_slice(&distance.to_le_bytes());
        Ok(())
    };
    match window.jump {
        Jump::Near => near(window.start),
        Jump::Short(slot) => {
            near(slot)?;
            slots.push(Place { at: ImageOffset(slot), native: ImageOffset(window.start), undo: Undo::default() });
            let distance = slot.wrapping_sub(window.start + SHORT_JUMP).cast_signed();
            let distance = i8::try_from(distance).map_err(|_| EmitError::OutOfReach)?;
            let place = (window.start - page) as usize;
            bytes[place..place + 2].copy_from_slice(&[0xeb, distance.cast_unsigned()]);
            Ok(())
        }
    }
}
