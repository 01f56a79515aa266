//! Stack walks by unwind tables alone. Strict: what the tables don't say is not guessed, and a walk that can't be finished says
//! so, for then the thread counts as inside (P3). Libraries made for profilers fall back on frame pointers there, which is
//! why this one evaluates the tables (gimli) itself.

use super::signal_frame;
use crate::{
    address::{ImageOffset, LoadBias, TargetAddr},
    image::Image,
};
use gimli::{
    BaseAddresses, CfaRule, EhFrame, EhFrameOffset, EndianSlice, EvaluationResult, LittleEndian, Register,
    RegisterRule, UnwindContext, UnwindSection, Value, X86_64,
};
use std::{collections::HashMap, ops::Range, sync::Arc};

/// Number of registers that are followed: the sixteen general ones, in DWARF order (psABI, figure 3.36).
const REGISTERS: usize = 16;
const RSP: usize = 7;
/// Registers that a function gives back as it found them: rbx, rbp, r12 to r15.
const PRESERVED: [usize; 6] = [3, 6, 12, 13, 14, 15];

/// Registers at the start of a walk; what is not known is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WalkRegisters {
    /// Instruction pointer.
    pub ip: u64,
    values: [Option<u64>; REGISTERS],
}

impl WalkRegisters {
    /// Of a thread of which only instruction and stack pointer are known.
    #[must_use]
    pub fn bare(ip: u64, sp: u64) -> Self {
        let mut registers = Self { ip, values: [None; REGISTERS] };
        registers.values[RSP] = Some(sp);
        registers
    }

    /// Of a stopped thread.
    #[must_use]
    pub fn of(r: &libc::user_regs_struct) -> Self {
        let all = [
            r.rax, r.rdx, r.rcx, r.rbx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14,
            r.r15,
        ];
        Self { ip: r.rip, values: all.map(Some) }
    }

    /// Of which all is known: rip, and the general registers in DWARF order.
    pub(super) fn all(ip: u64, general: [u64; REGISTERS]) -> Self {
        Self { ip, values: general.map(Some) }
    }

    /// With what else is known of the registers that functions preserve.
    #[must_use]
    pub fn with_preserved(mut self, [rbx, rbp, r12, r13, r14, r15]: [u64; 6]) -> Self {
        for (index, value) in PRESERVED.into_iter().zip([rbx, rbp, r12, r13, r14, r15]) {
            self.values[index] = Some(value);
        }
        self
    }

    /// Stack pointer.
    #[must_use]
    pub fn sp(&self) -> u64 {
        self.values[RSP].unwrap_or(0)
    }

    fn get(&self, register: Register) -> Option<u64> {
        *self.values.get(usize::from(register.0))?
    }
}

/// How a walk ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WalkEnd {
    /// At the bottom of the stack.
    Complete,
    /// Somewhere else: the rest is not known.
    Truncated(&'static str),
}

/// A walked stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StackWalk {
    /// Innermost first: where the thread is, then return addresses.
    pub frames: Vec<TargetAddr>,
    /// Where the return address of each of `frames` lies on the stack; 0 for what is none: where the thread is, or where a signal
    /// has interrupted it.
    pub slots: Vec<u64>,
    /// How it ended.
    pub end: WalkEnd,
}

/// Most frames of a stack.
const FRAMES_MOST: usize = 8192;

/// Unwind rules at one address, where they are of the usual kind.
#[derive(Clone, Copy, Debug)]
struct Row {
    cfa: (u16, i64),
    /// What became of the preserved registers; of all others the value is lost.
    preserved: [Preserved; PRESERVED.len()],
    /// Offset of the return address from the CFA; `None` at the bottom of a stack.
    return_address: Option<i64>,
}

/// Where a function leaves a register that it has to give back.
#[derive(Clone, Copy, Debug)]
enum Preserved {
    /// In the register.
    Kept,
    /// At an offset from the CFA.
    Saved(i64),
    /// Nowhere.
    Lost,
}

#[derive(Clone)]
enum Tables {
    Image(Arc<Image>),
    /// A patch: its .eh_frame and where it lies.
    Bare {
        frames: Arc<[u8]>,
        at: u64,
    },
}

#[derive(Clone)]
struct Covered {
    range: Range<u64>,
    bias: u64,
    tables: Tables,
}

/// The unwind tables of a process.
#[derive(Default)]
pub struct Unwinder {
    modules: Vec<Covered>,
    steps: HashMap<u64, Step>,
    returns: HashMap<u64, Step>,
}

/// How to get from a frame to the one that called it.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// By a row of the usual kind.
    Simple(Row),
    /// By a row with expressions.
    General,
    /// It is the trampoline of a signal frame: by the frame that the kernel wrote.
    SignalFrame,
}

/// Most remembered steps of each kind; then all are forgotten.
const STEPS_MOST: usize = 1 << 16;

type Reader<'a> = EndianSlice<'a, LittleEndian>;

impl Unwinder {
    /// An unwinder that knows no code yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an image whose code is mapped at `range`.
    pub fn add_image(&mut self, image: &Arc<Image>, range: Range<TargetAddr>, bias: LoadBias) {
        self.add(range, bias.0, Tables::Image(Arc::clone(image)));
    }

    /// Adds linked code with its .eh_frame, which lies at `eh_frame_at`.
    pub fn add_code(&mut self, range: Range<TargetAddr>, eh_frame: Vec<u8>, eh_frame_at: TargetAddr) {
        self.add(range, 0, Tables::Bare { frames: eh_frame.into(), at: eh_frame_at.0 });
    }

    fn add(&mut self, range: Range<TargetAddr>, bias: u64, tables: Tables) {
        let range = range.start.0..range.end.0;
        let at = self.modules.partition_point(|module| module.range.start < range.start);
        self.modules.insert(at, Covered { range, bias, tables });
        self.forget_steps();
    }

    /// Removes the code that begins at `start`.
    pub fn remove(&mut self, start: TargetAddr) {
        self.modules.retain(|module| module.range.start != start.0);
        self.forget_steps();
    }

    fn forget_steps(&mut self) {
        self.steps.clear();
        self.returns.clear();
    }

    /// Whether only the return address lies above the stack pointer at `at`, as when a function begins; `None`: the tables
    /// don't say.
    #[must_use]
    pub fn stack_is_as_at_entry(&self, at: TargetAddr) -> Option<bool> {
        let as_at_entry = |found: &Found<'_, '_>| match found.row.cfa() {
            CfaRule::RegisterAndOffset { register, offset } => Some(*register == X86_64::RSP && *offset == 8),
            CfaRule::Expression(_) => None,
        };
        self.lookup(at.0, as_at_entry).ok().flatten()
    }

    /// Walks a stack. `read` gives the word at an address of the target.
    pub fn walk(&mut self, registers: &WalkRegisters, read: &mut dyn FnMut(u64) -> Option<u64>) -> StackWalk {
        let mut registers = *registers;
        let mut frames = vec![TargetAddr(registers.ip)];
        let mut slots = vec![0];
        let mut exact = true;
        let end = loop {
            if frames.len() >= FRAMES_MOST {
                break WalkEnd::Truncated("too many frames");
            }
            let sp = registers.values[RSP];
            let was_signal = match self.step(exact, &mut registers, read) {
                Ok(Some(signal)) => signal,
                Ok(None) => break WalkEnd::Complete,
                Err(reason) => break WalkEnd::Truncated(reason),
            };
            if registers.ip == 0 {
                break WalkEnd::Complete;
            }
            frames.push(TargetAddr(registers.ip));
            // The caller's stack pointer is the canonical frame address, above the return address (psABI, DWARF "CFA").
            slots.push(registers.values[RSP].filter(|_| !was_signal).map_or(0, |cfa| cfa.wrapping_sub(8)));
            // Frames lie one above the other; only a signal frame leads to another stack.
            if !was_signal && registers.values[RSP] <= sp {
                break WalkEnd::Truncated("the stack does not grow downwards");
            }
            exact = was_signal;
        };
        StackWalk { frames, slots, end }
    }

    /// From a frame to its caller; `None` at the bottom of the stack. Says whether the frame left was a signal frame.
    fn step(
        &mut self,
        exact: bool,
        registers: &mut WalkRegisters,
        read: &mut dyn FnMut(u64) -> Option<u64>,
    ) -> Result<Option<bool>, &'static str> {
        // A return address may lie behind its function's last instruction, the call: look one byte before it.
        let at = if exact { registers.ip } else { registers.ip.wrapping_sub(1) };
        let known = if exact { &self.steps } else { &self.returns };
        let step = match known.get(&registers.ip) {
            Some(step) => *step,
            None => {
                let step = self.find_step(at, registers.ip, read)?;
                let known = if exact { &mut self.steps } else { &mut self.returns };
                if known.len() >= STEPS_MOST {
                    known.clear();
                }
                known.insert(registers.ip, step);
                step
            }
        };
        match step {
            Step::Simple(row) => step_simple(&row, registers, read),
            Step::General => self.step_general(at, registers, read),
            Step::SignalFrame => {
                let interrupted = signal_frame::interrupted(registers.sp(), read);
                *registers = interrupted.ok_or("the signal frame can't be read")?;
                Ok(Some(true))
            }
        }
    }

    fn find_step(&self, at: u64, ip: u64, read: &mut dyn FnMut(u64) -> Option<u64>) -> Result<Step, &'static str> {
        // First by its bytes: unwind tables of trampolines are rare, and some of the function before cover them wrongly.
        if self.is_signal_trampoline(ip, read) {
            return Ok(Step::SignalFrame);
        }
        Ok(self.lookup(at, simple)?.map_or(Step::General, Step::Simple))
    }

    fn is_signal_trampoline(&self, ip: u64, read: &mut dyn FnMut(u64) -> Option<u64>) -> bool {
        if let Some(module) = self.module_at(ip)
            && let Tables::Image(image) = &module.tables
        {
            // From the file: the target's text may hold a gate.
            let (text_at, text) = image.unwind().text.unwrap_or_default();
            let offset = ip.wrapping_sub(module.bias).wrapping_sub(text_at.0);
            let code = usize::try_from(offset).ok().and_then(|offset| text.get(offset..));
            return code.is_some_and(signal_frame::is_trampoline);
        }
        let mut code = [0; 16];
        for (index, word) in code.chunks_exact_mut(8).enumerate() {
            match read(ip.wrapping_add(8 * index as u64)) {
                Some(value) => word.copy_from_slice(&value.to_le_bytes()),
                None => break,
            }
        }
        signal_frame::is_trampoline(&code)
    }

    fn module_at(&self, at: u64) -> Option<&Covered> {
        let index = self.modules.partition_point(|module| module.range.start <= at);
        self.modules[..index].last().filter(|module| module.range.contains(&at))
    }

    /// Finds the row for `at` and hands it to `then`, with what is needed to evaluate its expressions.
    fn lookup<T>(&self, at: u64, then: impl FnOnce(&Found<'_, '_>) -> T) -> Result<T, &'static str> {
        let module = self.module_at(at).ok_or("it leads outside all known code")?;
        let local = at.wrapping_sub(module.bias);
        let (frames, frames_at, entry) = match &module.tables {
            Tables::Image(image) => {
                let (frames_at, frames) = image.unwind().eh_frame.ok_or("a module without unwind tables")?;
                let entry = image.unwind_entry(ImageOffset(local)).ok_or("code without an unwind table")?;
                (frames, frames_at.0, Some(EhFrameOffset(entry)))
            }
            Tables::Bare { frames, at } => (&frames[..], *at, None),
        };
        let bases = BaseAddresses::default().set_eh_frame(frames_at);
        let section: EhFrame<Reader<'_>> = EhFrame::new(frames, LittleEndian);
        let fde = match entry {
            Some(entry) => section.fde_from_offset(&bases, entry, EhFrame::cie_from_offset),
            None => section.fde_for_address(&bases, local, EhFrame::cie_from_offset),
        };
        let fde = fde.map_err(|_| "code without an unwind table")?;
        let mut context = UnwindContext::new();
        let row = fde
            .unwind_info_for_address(&section, &bases, &mut context, local)
            .map_err(|_| "code without an unwind rule")?;
        let return_register = fde.cie().return_address_register();
        let found = Found {
            row,
            section: &section,
            signal: fde.is_signal_trampoline(),
            return_register,
            encoding: fde.cie().encoding(),
        };
        Ok(then(&found))
    }

    /// Rows with expressions: signal frames, hand-written assembly, realigned stacks.
    fn step_general(
        &self,
        at: u64,
        registers: &mut WalkRegisters,
        read: &mut dyn FnMut(u64) -> Option<u64>,
    ) -> Result<Option<bool>, &'static str> {
        let old = *registers;
        self.lookup(at, |found| {
            let cfa = match found.row.cfa() {
                CfaRule::RegisterAndOffset { register, offset } => {
                    old.get(*register).ok_or("a register that is not known")?.wrapping_add_signed(*offset)
                }
                CfaRule::Expression(expression) => found.evaluate(expression, None, &old, read)?,
            };
            let mut value = |register: Register, preserved: bool| -> Result<Option<u64>, &'static str> {
                let Some(rule) = found.row.register(register) else {
                    return Ok(if preserved { old.get(register) } else { None });
                };
                Ok(match rule {
                    RegisterRule::Undefined => None,
                    RegisterRule::SameValue => old.get(register),
                    RegisterRule::Offset(offset) => {
                        Some(read(cfa.wrapping_add_signed(offset)).ok_or("the stack can't be read")?)
                    }
                    RegisterRule::ValOffset(offset) => Some(cfa.wrapping_add_signed(offset)),
                    RegisterRule::Register(other) => old.get(other),
                    RegisterRule::Expression(expression) => {
                        let at = found.evaluate(&expression, Some(cfa), &old, read)?;
                        Some(read(at).ok_or("the stack can't be read")?)
                    }
                    RegisterRule::ValExpression(expression) => {
                        Some(found.evaluate(&expression, Some(cfa), &old, read)?)
                    }
                    _ => return Err("an unknown kind of unwind rule"),
                })
            };
            let bottom = matches!(found.row.register(found.return_register), Some(RegisterRule::Undefined));
            if bottom {
                return Ok(None);
            }
            let ip = value(found.return_register, false)?.ok_or("a return address that is not known")?;
            let mut new = WalkRegisters { ip, values: [None; REGISTERS] };
            for index in 0..REGISTERS {
                let preserved = PRESERVED.contains(&index) || found.signal;
                new.values[index] = value(Register(index as u16), preserved)?;
            }
            // A signal frame gives the interrupted stack pointer itself.
            if found.row.register(X86_64::RSP).is_none() {
                new.values[RSP] = Some(cfa);
            }
            *registers = new;
            Ok(Some(found.signal))
        })?
    }
}

struct Found<'r, 'i> {
    row: &'r gimli::UnwindTableRow<usize>,
    section: &'r EhFrame<Reader<'i>>,
    signal: bool,
    return_register: Register,
    encoding: gimli::Encoding,
}

impl Found<'_, '_> {
    fn evaluate(
        &self,
        expression: &gimli::UnwindExpression<usize>,
        initial: Option<u64>,
        registers: &WalkRegisters,
        read: &mut dyn FnMut(u64) -> Option<u64>,
    ) -> Result<u64, &'static str> {
        const DAMAGED: &str = "an unwind expression that makes no sense";
        let expression = expression.get(self.section).map_err(|_| DAMAGED)?;
        let mut evaluation = expression.evaluation(self.encoding);
        evaluation.set_max_iterations(256);
        if let Some(initial) = initial {
            evaluation.set_initial_value(initial);
        }
        let mut result = evaluation.evaluate().map_err(|_| DAMAGED)?;
        loop {
            result = match result {
                EvaluationResult::Complete => break,
                EvaluationResult::RequiresRegister { register, .. } => {
                    let value = registers.get(register).ok_or("a register that is not known")?;
                    evaluation.resume_with_register(Value::Generic(value)).map_err(|_| DAMAGED)?
                }
                EvaluationResult::RequiresMemory { address, size, .. } => {
                    let value = read(address).ok_or("the stack can't be read")?;
                    let value = if size >= 8 { value } else { value & ((1 << (u32::from(size) * 8)) - 1) };
                    evaluation.resume_with_memory(Value::Generic(value)).map_err(|_| DAMAGED)?
                }
                _ => return Err(DAMAGED),
            };
        }
        match evaluation.as_result() {
            [piece] => match piece.location {
                gimli::Location::Address { address } => Ok(address),
                gimli::Location::Value { value } => value.to_u64(u64::MAX).map_err(|_| DAMAGED),
                _ => Err(DAMAGED),
            },
            _ => Err(DAMAGED),
        }
    }
}

/// The row in its usual form; `None` if it has expressions or anything unusual.
fn simple(found: &Found<'_, '_>) -> Option<Row> {
    let CfaRule::RegisterAndOffset { register, offset } = *found.row.cfa() else { return None };
    let mut row =
        Row { cfa: (register.0, offset), preserved: [Preserved::Kept; PRESERVED.len()], return_address: None };
    if found.signal || usize::from(register.0) >= REGISTERS {
        return None;
    }
    match found.row.register(found.return_register) {
        Some(RegisterRule::Undefined) => {}
        Some(RegisterRule::Offset(offset)) => row.return_address = Some(offset),
        _ => return None,
    }
    for (preserved, index) in row.preserved.iter_mut().zip(PRESERVED) {
        *preserved = match found.row.register(Register(index as u16)) {
            None | Some(RegisterRule::SameValue) => Preserved::Kept,
            Some(RegisterRule::Offset(offset)) => Preserved::Saved(offset),
            Some(RegisterRule::Undefined) => Preserved::Lost,
            _ => return None,
        };
    }
    let others = (0..REGISTERS).filter(|index| *index != RSP && !PRESERVED.contains(index));
    for index in others {
        if !matches!(found.row.register(Register(index as u16)), None | Some(RegisterRule::Undefined)) {
            return None;
        }
    }
    found.row.register(X86_64::RSP).is_none().then_some(row)
}

fn step_simple(
    row: &Row,
    registers: &mut WalkRegisters,
    read: &mut dyn FnMut(u64) -> Option<u64>,
) -> Result<Option<bool>, &'static str> {
    let Some(return_address) = row.return_address else { return Ok(None) };
    let base = registers.values[usize::from(row.cfa.0)].ok_or("a register that is not known")?;
    let cfa = base.wrapping_add_signed(row.cfa.1);
    let mut word = |offset: i64| read(cfa.wrapping_add_signed(offset)).ok_or("the stack can't be read");
    let ip = word(return_address)?;
    let mut new = [None; REGISTERS];
    for (preserved, index) in row.preserved.iter().zip(PRESERVED) {
        new[index] = match *preserved {
            Preserved::Kept => registers.values[index],
            Preserved::Saved(offset) => Some(word(offset)?),
            Preserved::Lost => None,
        };
    }
    new[RSP] = Some(cfa);
    *registers = WalkRegisters { ip, values: new };
    Ok(Some(false))
}

#[cfg(test)]
mod tests;
