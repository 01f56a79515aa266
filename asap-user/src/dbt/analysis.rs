//! What the code of an image is made of, recovered once per image: instructions, the places where control may arrive, the
//! functions with their parts, and why some of them can't be understood. Not what is changed in it.

use super::{
    code::{Stretch, is_padding, never_goes_on},
    indirect::{self, Destination},
    tables,
    view::CodeView,
};
use crate::address::ImageOffset;
use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};
use std::{collections::BTreeMap, collections::HashSet, ops::Range};

/// Why a function's control flow is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, thiserror::Error)]
pub enum Unrecovered {
    /// Some of its bytes are no instructions.
    #[error("some of its bytes are no instructions")]
    Undecodable,
    /// An indirect jump whose destinations nothing tells.
    #[error("an indirect jump in it could go anywhere")]
    Indirect,
    /// A jump into the middle of an instruction.
    #[error("a jump leads into the middle of one of its instructions")]
    Overlapping,
}

/// A stretch of code that belongs to one function.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) range: Range<u64>,
    pub(super) group: usize,
    pub(super) is_named: bool,
    /// It refers to a jump table.
    has_table: bool,
    flaw: Option<Unrecovered>,
}

/// A function with its cold parts, and whatever else jumps into the middle of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Group {
    pub(super) parts: Vec<usize>,
    pub(super) flaw: Option<Unrecovered>,
    /// Where a call or a tail jump enters it.
    pub(super) function_entries: Vec<u64>,
    /// Of these, the ones that it also reaches by itself.
    pub(super) reached_inside: HashSet<u64>,
    /// It calls, or writes memory other than by `push`.
    pub(super) can_be_overwritten: bool,
    /// It may keep something below the stack pointer.
    pub(super) may_use_red_zone: bool,
}

/// The code of an image, understood as far as possible.
#[derive(Debug)]
pub struct Analysis {
    pub(super) stretches: Vec<Stretch>,
    pub(super) parts: Vec<Part>,
    pub(super) groups: Vec<Group>,
    pub(super) bare: Vec<Range<u64>>,
    pub(super) read_only: Vec<Range<u64>>,
    /// Code in which nothing may change.
    pub(super) untouched: Vec<Range<u64>>,
    /// Indirect jumps whose destinations come from a jump table that can't be written.
    pub(super) table_jumps: HashSet<u64>,
    /// Addresses of instructions that data or instructions hold, and beginnings of functions.
    destinations: Vec<u64>,
}

/// A direct jump or call.
#[derive(Clone, Copy)]
struct Branch {
    from: u64,
    to: u64,
    kind: FlowControl,
}

/// What a sweep over the code collects.
#[derive(Default)]
struct Sweep {
    branches: Vec<Branch>,
    /// Addresses that instructions compute: of code, or of tables. With the part where.
    computed: Vec<(u64, Option<usize>)>,
    indirect: Vec<(u64, usize)>,
    indirect_calls: Vec<u64>,
}

impl Analysis {
    /// Recovers what `view` shows.
    #[must_use]
    pub fn of(view: &CodeView<'_>) -> Self {
        let mut this = Self {
            stretches: view.code.iter().map(|&(at, bytes)| Stretch::new(at.0, bytes)).collect(),
            parts: Vec::new(),
            groups: Vec::new(),
            bare: disjoint(&view.bare_frames),
            read_only: disjoint(&view.read_only),
            untouched: disjoint(&view.untouched),
            table_jumps: HashSet::new(),
            destinations: Vec::new(),
        };
        this.cut_into_parts(view);
        let mut sweep = Sweep::default();
        for index in 0..this.parts.len() {
            this.sweep_part(index, view.is_position_independent, &mut sweep);
        }
        this.sweep_gaps(view.is_position_independent, &mut sweep);
        let pointers = this.mark_pointers(view, &sweep);
        this.mark_tables(view, &sweep);
        this.mark_branches(&sweep);
        let mut union = Union::new(this.parts.len());
        let named = this.named_starts(&sweep, &pointers);
        this.join_parts(view, &sweep, &named, &mut union);
        this.form_groups(&mut union, &named, &sweep, &pointers);
        this.judge_indirect(&sweep);
        this.destinations = pointers.into_iter().collect();
        // Code that no function is known for, such as what the C runtime brings along.
        let is_code = |at: &u64| this.stretch(*at).is_some();
        let told: Vec<u64> = view.pointers.iter().map(|at| at.0).filter(is_code).collect();
        this.destinations.extend(told);
        let again = this.second_returns(view, &sweep);
        this.destinations.extend(again);
        this.destinations.extend(this.groups.iter().flat_map(|group| &group.function_entries));
        this.destinations.sort_unstable();
        this.destinations.dedup();
        for group in 0..this.groups.len() {
            if this.groups[group].flaw.is_some() {
                this.distrust(group);
            }
        }
        this.mark_dead();
        this
    }

    /// Where functions that return twice come back to.
    fn second_returns(&self, view: &CodeView<'_>, sweep: &Sweep) -> Vec<u64> {
        if view.returns_twice.is_empty() {
            return Vec::new();
        }
        let slots: HashSet<u64> = view.returns_twice.iter().map(|slot| slot.0).collect();
        let goes_there = |instruction: &Instruction| {
            instruction.is_ip_rel_memory_operand() && slots.contains(&instruction.ip_rel_memory_address())
        };
        // An entry of the procedure linkage table: `endbr64`, and a jump.
        let is_stub = |at: u64| {
            let first = self.stretch(at).and_then(|stretch| stretch.decode(at));
            let jump = first.and_then(|first| match first.mnemonic() {
                Mnemonic::Endbr64 => self.stretch(at).and_then(|stretch| stretch.decode(first.next_ip())),
                _ => Some(first),
            });
            jump.is_some_and(|jump| jump.mnemonic() == Mnemonic::Jmp && goes_there(&jump))
        };
        let calls = sweep.branches.iter().filter(|branch| branch.kind == FlowControl::Call && is_stub(branch.to));
        let direct = calls.filter_map(|call| Some(self.stretch(call.from)?.decode(call.from)?.next_ip()));
        let indirect = sweep.indirect_calls.iter().filter_map(|&at| {
            let call = self.stretch(at)?.decode(at).filter(goes_there)?;
            Some(call.next_ip())
        });
        direct.chain(indirect).collect()
    }

    pub(super) fn stretch(&self, at: u64) -> Option<&Stretch> {
        self.stretches.iter().find(|stretch| stretch.contains(at))
    }

    fn stretch_mut(&mut self, at: u64) -> Option<&mut Stretch> {
        self.stretches.iter_mut().find(|stretch| stretch.contains(at))
    }

    /// The part of a function that holds `at`.
    pub(super) fn part_at(&self, at: u64) -> Option<&Part> {
        self.part_index(at).map(|index| &self.parts[index])
    }

    fn part_index(&self, at: u64) -> Option<usize> {
        let next = self.parts.partition_point(|part| part.range.start <= at);
        next.checked_sub(1).filter(|&index| self.parts[index].range.contains(&at))
    }

    /// Only the return address lies above the stack pointer at `at`.
    pub(super) fn is_bare(&self, at: u64) -> bool {
        holds(&self.bare, at)
    }

    /// Nothing can write what is mapped at `at`.
    pub(super) fn is_read_only(&self, at: u64) -> bool {
        holds(&self.read_only, at)
    }

    fn is_instruction(&self, at: u64) -> bool {
        self.stretch(at).is_some_and(|stretch| stretch.starts.has(at))
    }

    fn add_entry(&mut self, at: u64) {
        if let Some(stretch) = self.stretch_mut(at) {
            stretch.entries.set(at);
        }
    }

    /// Pages that hold code of functions, by address.
    #[must_use]
    pub fn pages(&self) -> Vec<ImageOffset> {
        let page = |at: u64| at & !(crate::address::PAGE_SIZE - 1);
        let mut pages: Vec<u64> = Vec::new();
        for part in &self.parts {
            let mut at = page(part.range.start);
            while at < part.range.end {
                if pages.last().is_none_or(|&last| last < at) {
                    pages.push(at);
                }
                at += crate::address::PAGE_SIZE;
            }
        }
        pages.into_iter().map(ImageOffset).collect()
    }

    /// Where indirect calls and jumps may lead, by address: whatever of the code has its address in data or taken by an
    /// instruction, and the beginnings of functions. Destinations of tables that can't be written are not among them.
    #[must_use]
    pub fn destinations(&self) -> Vec<ImageOffset> {
        self.destinations.iter().copied().map(ImageOffset).collect()
    }

    /// Functions by why they were not understood; `None`: they were.
    #[must_use]
    pub fn functions(&self) -> BTreeMap<Option<Unrecovered>, usize> {
        let mut counts = BTreeMap::new();
        for group in &self.groups {
            *counts.entry(group.flaw).or_default() += 1;
        }
        counts
    }

    /// Bytes of code in functions.
    #[must_use]
    pub fn code_bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.range.end - part.range.start).sum()
    }

    /// Bounds that overlap are cut where another begins, so that each byte belongs to one part.
    fn cut_into_parts(&mut self, view: &CodeView<'_>) {
        let mut bounds: Vec<(u64, u64, bool)> = Vec::new();
        for function in &view.functions {
            let (start, end) = (function.range.start.0, function.range.end.0);
            let Some(stretch) = self.stretches.iter().find(|stretch| stretch.contains(start)) else { continue };
            if start < end.min(stretch.end()) {
                bounds.push((start, end.min(stretch.end()), function.is_named));
            }
        }
        bounds.sort_unstable();
        let mut index = 0;
        // Ends of what is still open, so that the rest of an outer function goes on behind an inner one.
        let mut open: Vec<u64> = Vec::new();
        while index < bounds.len() {
            let start = bounds[index].0;
            let mut is_named = false;
            while index < bounds.len() && bounds[index].0 == start {
                is_named |= bounds[index].2;
                open.push(bounds[index].1);
                index += 1;
            }
            open.retain(|&end| end > start);
            let next = bounds.get(index).map_or(u64::MAX, |bound| bound.0);
            let end = open.iter().copied().max().unwrap_or(start).min(next);
            if start < end {
                self.parts.push(Part { range: start..end, group: 0, is_named, has_table: false, flaw: None });
            }
        }
    }

    fn sweep_part(&mut self, index: usize, is_pic: bool, sweep: &mut Sweep) {
        let range = self.parts[index].range.clone();
        let Some(stretch) = self.stretches.iter_mut().find(|stretch| stretch.contains(range.start)) else { return };
        let bytes = stretch.tail(range.start, range.end - range.start).to_vec();
        stretch.entries.set(range.start);
        let mut decoder = Decoder::with_ip(64, &bytes, range.start, DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        while decoder.can_decode() {
            decoder.decode_out(&mut instruction);
            if instruction.is_invalid() {
                self.parts[index].flaw = Some(Unrecovered::Undecodable);
                continue;
            }
            let at = instruction.ip();
            stretch.starts.set(at);
            if is_padding(&instruction) {
                stretch.pads.set(at);
            }
            if matches!(instruction.flow_control(), FlowControl::Call | FlowControl::IndirectCall)
                || instruction.mnemonic() == Mnemonic::Syscall
            {
                stretch.entries.set(instruction.next_ip());
            }
            if instruction.flow_control() == FlowControl::IndirectCall {
                sweep.indirect_calls.push(at);
            }
            if instruction.flow_control() == FlowControl::IndirectBranch {
                sweep.indirect.push((at, index));
            }
            sweep.look_at(&instruction, Some(index), is_pic);
        }
    }

    /// Code that no function is known for may jump into functions too. Bytes there that are data make entries that are none,
    /// which costs room, not safety.
    fn sweep_gaps(&mut self, is_pic: bool, sweep: &mut Sweep) {
        for stretch in &self.stretches {
            let mut at = stretch.start;
            let inside = self.parts.iter().filter(|part| stretch.contains(part.range.start));
            for gap_end in inside.clone().map(|part| part.range.start).chain([stretch.end()]) {
                if at < gap_end {
                    let bytes = stretch.tail(at, gap_end - at);
                    let mut decoder = Decoder::with_ip(64, bytes, at, DecoderOptions::NONE);
                    while decoder.can_decode() {
                        let instruction = decoder.decode();
                        if !instruction.is_invalid() {
                            sweep.look_at(&instruction, None, is_pic);
                        }
                    }
                }
                let next = self.parts.partition_point(|part| part.range.start < gap_end);
                at = self.parts.get(next).map_or(stretch.end(), |part| part.range.end);
            }
        }
    }

    /// Addresses of code that data or instructions hold.
    fn mark_pointers(&mut self, view: &CodeView<'_>, sweep: &Sweep) -> HashSet<u64> {
        let mut pointers: HashSet<u64> = view.pointers.iter().map(|at| at.0).collect();
        pointers.extend(sweep.computed.iter().map(|&(at, _)| at));
        pointers.retain(|&at| self.is_instruction(at));
        for &(_, pad) in &view.landing_pads {
            self.add_entry(pad.0);
        }
        for &at in &pointers {
            self.add_entry(at);
        }
        pointers
    }

    /// Destinations in jump tables. Every address that an instruction computes is tried as a table of distances from itself.
    fn mark_tables(&mut self, view: &CodeView<'_>, sweep: &Sweep) {
        let mut found = HashSet::new();
        let mut tried = BTreeMap::new();
        let mut budget = tables::ENTRIES_MOST;
        for &(base, part) in &sweep.computed {
            let is_table = *tried.entry(base).or_insert_with(|| {
                let entries = tables::relative(base, view, |at| self.is_instruction(at), &mut budget);
                let is_table = !entries.is_empty() && !self.is_instruction(base);
                found.extend(entries);
                is_table
            });
            if let Some(part) = part.filter(|_| is_table) {
                self.parts[part].has_table = true;
            }
        }
        for at in found {
            self.add_entry(at);
        }
    }

    fn mark_branches(&mut self, sweep: &Sweep) {
        for branch in &sweep.branches {
            self.add_entry(branch.to);
            let Some(stretch) = self.stretch(branch.to) else { continue };
            if stretch.starts.has(branch.to) {
                continue;
            }
            // A jump over a `lock` prefix lands one byte into its instruction, on purpose (glibc does so): the entry in the
            // middle keeps it where it is.
            let skips_lock = stretch.decode(branch.to.wrapping_sub(1)).is_some_and(|found| found.has_lock_prefix())
                && stretch.starts.has(branch.to.wrapping_sub(1));
            if !skips_lock
                && let Some(part) = self.part_index(branch.to).filter(|_| self.part_index(branch.from).is_some())
            {
                self.parts[part].flaw.get_or_insert(Unrecovered::Overlapping);
            }
        }
    }

    /// Beginnings of parts that something may call, rather than a cold part that only its function jumps to.
    fn named_starts(&self, sweep: &Sweep, pointers: &HashSet<u64>) -> HashSet<u64> {
        let mut named: HashSet<u64> =
            self.parts.iter().filter(|part| part.is_named).map(|part| part.range.start).collect();
        named.extend(pointers);
        named.extend(sweep.branches.iter().filter(|branch| branch.kind == FlowControl::Call).map(|branch| branch.to));
        named
    }

    fn join_parts(&self, view: &CodeView<'_>, sweep: &Sweep, named: &HashSet<u64>, union: &mut Union) {
        for branch in sweep.branches.iter().filter(|branch| branch.kind != FlowControl::Call) {
            let (Some(from), Some(to)) = (self.part_index(branch.from), self.part_index(branch.to)) else { continue };
            // To a beginning that others use too it is a tail jump.
            if from != to && (self.parts[to].range.start != branch.to || !named.contains(&branch.to)) {
                union.join(from, to);
            }
        }
        for &(function, pad) in &view.landing_pads {
            if let (Some(from), Some(to)) = (self.part_index(function.0), self.part_index(pad.0)) {
                union.join(from, to);
            }
        }
        for index in 1..self.parts.len() {
            let start = self.parts[index].range.start;
            if self.parts[index - 1].range.end == start
                && self.stretch(start).is_some_and(|stretch| {
                    stretch
                        .previous(start)
                        .is_some_and(|before| before.flow_control() == FlowControl::Next && !is_padding(&before))
                })
            {
                union.join(index - 1, index);
            }
        }
    }

    fn form_groups(&mut self, union: &mut Union, named: &HashSet<u64>, sweep: &Sweep, pointers: &HashSet<u64>) {
        let mut number: BTreeMap<usize, usize> = BTreeMap::new();
        for index in 0..self.parts.len() {
            let next = number.len();
            let group = *number.entry(union.root(index)).or_insert(next);
            if group == self.groups.len() {
                self.groups.push(Group::default());
            }
            let part = &mut self.parts[index];
            part.group = group;
            let this = &mut self.groups[group];
            this.parts.push(index);
            this.flaw = this.flaw.or(part.flaw);
        }
        // A beginning that only jumps of its own group lead to is a cold part; one that nothing leads to may be called in
        // ways that are not seen here.
        let mut entries: HashSet<u64> = named.iter().copied().filter(|&at| self.is_instruction(at)).collect();
        let jumped: HashSet<u64> =
            sweep.branches.iter().filter(|b| b.kind != FlowControl::Call).map(|b| b.to).collect();
        // Where more than the return address lies on the stack nothing is called.
        let is_unseen = |start: &u64| !jumped.contains(start) && self.is_bare(*start);
        entries.extend(self.parts.iter().map(|part| part.range.start).filter(is_unseen));
        let starts: HashSet<u64> = self.parts.iter().map(|part| part.range.start).collect();
        let jumping: HashSet<usize> = sweep.indirect.iter().map(|&(_, part)| self.parts[part].group).collect();
        for &at in &entries {
            let Some(part) = self.part_at(at) else { continue };
            // The address of a label inside a function is no function: least of all where jumps through tables are.
            let is_label = pointers.contains(&at) && (!self.is_bare(at) || jumping.contains(&part.group));
            let is_called = starts.contains(&at) || !is_label;
            if is_called {
                let group = part.group;
                self.groups[group].function_entries.push(at);
            }
        }
        for group in &mut self.groups {
            group.function_entries.sort_unstable();
        }
        for branch in sweep.branches.iter().filter(|branch| branch.kind != FlowControl::Call) {
            let (Some(from), Some(to)) = (self.part_at(branch.from), self.part_at(branch.to)) else { continue };
            if from.group == to.group && entries.contains(&branch.to) {
                let group = to.group;
                self.groups[group].reached_inside.insert(branch.to);
            }
        }
        for &at in &entries {
            // In the middle of something it may have left words below the stack pointer.
            let is_inside = !starts.contains(&at);
            let falls_in = is_inside || self.stretch(at).and_then(|stretch| stretch.previous(at)).is_some();
            if falls_in && let Some(group) = self.part_at(at).map(|part| part.group) {
                self.groups[group].reached_inside.insert(at);
            }
        }
        for index in 0..self.groups.len() {
            let (mut can_be_overwritten, mut may_use_red_zone) = (false, false);
            for instruction in self.instructions_of(index) {
                can_be_overwritten |= may_overwrite_stack(&instruction);
                may_use_red_zone |= reaches_below_stack(&instruction);
            }
            let group = &mut self.groups[index];
            (group.can_be_overwritten, group.may_use_red_zone) = (can_be_overwritten, may_use_red_zone);
        }
    }

    /// All instructions of a group, by part.
    pub(super) fn instructions_of(&self, group: usize) -> impl Iterator<Item = Instruction> + '_ {
        self.groups[group].parts.iter().flat_map(move |&part| {
            let range = self.parts[part].range.clone();
            let stretch = self.stretch(range.start);
            stretch
                .into_iter()
                .flat_map(move |stretch| stretch.starts.within(range.clone()).filter_map(move |at| stretch.decode(at)))
        })
    }

    fn judge_indirect(&mut self, sweep: &Sweep) {
        for &(at, part) in &sweep.indirect {
            let Some(stretch) = self.stretch(at) else { continue };
            let group = self.parts[part].group;
            let has_table = self.groups[group].parts.iter().any(|&part| self.parts[part].has_table);
            let floor = self.parts[part].range.start;
            match indirect::destination(stretch, at, floor) {
                Destination::Pointer => {}
                Destination::Table if has_table => {
                    self.table_jumps.insert(at);
                }
                // Without arithmetic in sight it is a pointer that was loaded earlier, or one of the group's tables.
                Destination::Unseen => {}
                Destination::Table | Destination::Computed => {
                    self.groups[group].flaw.get_or_insert(Unrecovered::Indirect);
                }
            }
        }
    }

    /// Where control flow is not known, control may arrive at every instruction.
    fn distrust(&mut self, group: usize) {
        for index in self.groups[group].parts.clone() {
            let range = self.parts[index].range.clone();
            let Some(stretch) = self.stretch_mut(range.start) else { continue };
            let starts: Vec<u64> = stretch.starts.within(range).collect();
            for at in starts {
                stretch.entries.set(at);
            }
        }
    }

    /// Padding behind what never goes on, and between functions.
    fn mark_dead(&mut self) {
        for part in &self.parts {
            let Some(stretch) = self.stretches.iter_mut().find(|stretch| stretch.contains(part.range.start)) else {
                continue;
            };
            let starts: Vec<u64> = stretch.starts.within(part.range.clone()).collect();
            let mut is_dead = false;
            for (index, &at) in starts.iter().enumerate() {
                let end = starts.get(index + 1).copied().unwrap_or(part.range.end);
                let Some(instruction) = stretch.decode(at).filter(|found| found.next_ip() <= end) else {
                    is_dead = false;
                    continue;
                };
                is_dead = is_dead && stretch.pads.has(at) && !stretch.entries.has(at);
                if is_dead {
                    (at..instruction.next_ip()).for_each(|byte| stretch.dead.set(byte));
                } else {
                    is_dead = never_goes_on(&instruction);
                }
            }
        }
        self.mark_dead_gaps();
    }

    fn mark_dead_gaps(&mut self) {
        let ends: Vec<(u64, u64)> = self
            .parts
            .iter()
            .enumerate()
            .map(|(index, part)| (part.range.end, self.parts.get(index + 1).map_or(u64::MAX, |next| next.range.start)))
            .collect();
        for (start, end) in ends {
            let Some(stretch) = self.stretches.iter_mut().find(|stretch| stretch.contains(start)) else { continue };
            let end = end.min(stretch.end()).min(start + PADDING_MOST);
            // What the last function ends with may run on into the gap: then it is code.
            if stretch
                .previous(start)
                .is_some_and(|last| last.flow_control() == FlowControl::Next && !is_padding(&last))
            {
                continue;
            }
            let mut at = start;
            while at < end && !stretch.entries.has(at) {
                let length = match stretch.tail(at, 1) {
                    [0 | 0xcc] => 1,
                    _ => match stretch.decode(at).filter(is_padding) {
                        Some(instruction) => instruction.len() as u64,
                        None => break,
                    },
                };
                if at + length > end || (at..at + length).any(|byte| stretch.entries.has(byte)) {
                    break;
                }
                (at..at + length).for_each(|byte| stretch.dead.set(byte));
                at += length;
            }
        }
    }
}

/// How far behind a function padding is looked for, bytes.
const PADDING_MOST: u64 = 4096;

impl Sweep {
    fn look_at(&mut self, instruction: &Instruction, part: Option<usize>, is_pic: bool) {
        let at = instruction.ip();
        if matches!(instruction.op0_kind(), OpKind::NearBranch64) {
            let branch = Branch { from: at, to: instruction.near_branch_target(), kind: instruction.flow_control() };
            self.branches.push(branch);
            return;
        }
        if instruction.mnemonic() == Mnemonic::Lea && instruction.is_ip_rel_memory_operand() {
            self.computed.push((instruction.ip_rel_memory_address(), part));
        }
        if !is_pic {
            for operand in 0..instruction.op_count() {
                match instruction.op_kind(operand) {
                    OpKind::Immediate32 | OpKind::Immediate32to64 | OpKind::Immediate64 => {
                        self.computed.push((instruction.immediate(operand), part));
                    }
                    OpKind::Memory if instruction.memory_displ_size() >= 4 => {
                        self.computed.push((instruction.memory_displacement64(), part));
                    }
                    _ => {}
                }
            }
        }
    }
}

/// The instruction can change what lies on the stack, or lets other code run.
fn may_overwrite_stack(instruction: &Instruction) -> bool {
    match instruction.flow_control() {
        FlowControl::Call | FlowControl::IndirectCall => return true,
        FlowControl::Next => {}
        _ => return false,
    }
    if matches!(instruction.mnemonic(), Mnemonic::Syscall | Mnemonic::Sysenter) {
        return true;
    }
    if matches!(instruction.code(), Code::Nop_rm16 | Code::Nop_rm32 | Code::Nop_rm64) {
        return false;
    }
    let reads_only = matches!(
        instruction.mnemonic(),
        Mnemonic::Cmp | Mnemonic::Test | Mnemonic::Lea | Mnemonic::Push | Mnemonic::Pop | Mnemonic::Nop
    );
    let memory_is_first = instruction.op_count() > 0
        && matches!(
            instruction.op0_kind(),
            OpKind::Memory | OpKind::MemoryESRDI | OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemorySegRDI
        );
    let is_exchange = matches!(instruction.mnemonic(), Mnemonic::Xchg | Mnemonic::Xadd)
        && (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::Memory);
    let pops_to_memory = instruction.mnemonic() == Mnemonic::Pop && instruction.op0_kind() == OpKind::Memory;
    pops_to_memory
        || is_exchange
        || (memory_is_first && !reads_only)
        || instruction.op0_register() == Register::RSP && {
            // The stack pointer itself goes elsewhere.
            !matches!(
                instruction.mnemonic(),
                Mnemonic::Add | Mnemonic::Sub | Mnemonic::Cmp | Mnemonic::Test | Mnemonic::Push
            )
        }
}

/// The instruction addresses something below the stack pointer, or makes another register from which that can be done.
fn reaches_below_stack(instruction: &Instruction) -> bool {
    let is_addressed = instruction.memory_base() == Register::RSP || instruction.memory_index() == Register::RSP;
    let is_below = is_addressed && instruction.memory_displacement64().cast_signed() < 0;
    let is_indexed = is_addressed && instruction.memory_index() != Register::None;
    let is_copied = instruction.op_count() == 2
        && instruction.op1_kind() == OpKind::Register
        && instruction.op1_register() == Register::RSP;
    is_below || is_indexed || is_copied
}

fn disjoint(ranges: &[Range<ImageOffset>]) -> Vec<Range<u64>> {
    let mut sorted: Vec<Range<u64>> =
        ranges.iter().map(|range| range.start.0..range.end.0).filter(|range| range.start < range.end).collect();
    sorted.sort_unstable_by_key(|range| (range.start, range.end));
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(sorted.len());
    for range in sorted {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

fn holds(ranges: &[Range<u64>], at: u64) -> bool {
    let next = ranges.partition_point(|range| range.start <= at);
    ranges[..next].last().is_some_and(|range| range.contains(&at))
}

/// Which parts belong together (union-find).
struct Union(Vec<usize>);

impl Union {
    fn new(count: usize) -> Self {
        Self((0..count).collect())
    }

    fn root(&mut self, mut index: usize) -> usize {
        while self.0[index] != index {
            self.0[index] = self.0[self.0[index]];
            index = self.0[index];
        }
        index
    }

    fn join(&mut self, a: usize, b: usize) {
        let (a, b) = (self.root(a), self.root(b));
        self.0[a.max(b)] = a.min(b);
    }
}
