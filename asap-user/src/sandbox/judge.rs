//! What is made of a thread that a guard has stopped: whether it may do what it was about to. Looks at code and memory, changes
//! nothing.

use super::{
    area::Area,
    code::{Code, TextCode},
    policy::Guard,
    targets,
};
use crate::{
    address::TargetAddr,
    dbt::{Trap, TrapReason},
    process::{
        maps::{Mapping, Maps},
        memory::Memory,
        ptrace::Registers,
    },
};

/// The judgement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// It goes on.
    Pass,
    /// It goes on, and whoever wants to go there from now on.
    Accept(TargetAddr),
    /// It must not.
    Against {
        /// By which guard.
        guard: Guard,
        /// What it was about to do, for a person.
        attempted: String,
    },
}

/// What is judged, and by what.
pub struct Case<'a> {
    /// All code of the family.
    pub code: &'a Code,
    /// The text of the instruction.
    pub text: &'a TextCode,
    /// What stopped the thread.
    pub trap: Trap,
    /// The thread's registers, as at the instruction.
    pub registers: &'a Registers,
    /// The memory of its process.
    pub memory: &'a Memory,
    /// Tables and shadows of its process.
    pub area: &'a Area,
    /// What is mapped in it; read when it is needed.
    pub maps: &'a dyn Fn() -> Maps,
    /// Which guards are on.
    pub guards: &'a [Guard],
    /// Not all is known of the thread's stack.
    pub is_doubtful: bool,
    /// Whether an executable mapping is ours.
    pub is_ours: &'a dyn Fn(&Mapping) -> bool,
}

impl Case<'_> {
    fn has(&self, guard: Guard) -> bool {
        self.guards.contains(&guard)
    }

    /// Names an address.
    #[must_use]
    pub fn name(&self, at: TargetAddr) -> String {
        self.code.name(at)
    }

    /// A return to another address than the copy says.
    #[must_use]
    pub fn of_return(&self) -> Judgement {
        let sp = self.registers.rsp;
        let words = (self.memory.word(TargetAddr(sp)), self.memory.word(self.area.shadow_of(sp)));
        // What can't be read is met by the return itself.
        let (Ok(to), Ok(copied)) = words else { return Judgement::Pass };
        let to_address = TargetAddr(to);
        let is_known = self.is_landing_pad(to_address) || self.entry_is_native() || self.begins_a_context(to_address);
        if copied == to || is_known {
            return Judgement::Pass;
        }
        // It began before there were copies: on the stack of a coroutine that waits, or where a stack could not be walked.
        if (copied == 0 || self.is_doubtful) && self.is_return_point(TargetAddr(to)) {
            return Judgement::Pass;
        }
        let attempted = format!(
            "a return to {}, where it was called from {}",
            self.name(TargetAddr(to)),
            self.name(TargetAddr(copied))
        );
        Judgement::Against { guard: Guard::ShadowStack, attempted }
    }

    /// The C library's switch between contexts begins a new one by a return to its function (makecontext(3)).
    fn begins_a_context(&self, to: TargetAddr) -> bool {
        let is_switch = |name: &str| ["swapcontext", "setcontext", "__start_context"].contains(&name);
        self.text.known.image.symbolise(self.trap.native).is_some_and(|(name, _)| is_switch(&name))
            && self.code.is_target(to)
    }

    fn is_return_point(&self, at: TargetAddr) -> bool {
        // Code that is not in the sandbox calls, too.
        let Some(text) = self.code.text_at(at) else {
            return (self.maps)().at(at).is_some_and(|mapping| mapping.executable && !mapping.writable);
        };
        targets::is_return_point(&text.known.image, at.in_image(text.bias))
    }

    /// Exceptions return into the functions that catch them, or clean up.
    fn is_landing_pad(&self, at: TargetAddr) -> bool {
        let Some(text) = self.code.text_at(at) else { return false };
        text.known.landing_pads.binary_search(&at.in_image(text.bias)).is_ok()
    }

    /// The function began in a page that is as the file has it, so that nothing was copied.
    fn entry_is_native(&self) -> bool {
        let function = self.text.known.image.function_at(self.trap.native);
        let entry = function.map_or(self.trap.native, |function| function.address);
        self.text.is_native(entry.in_target(self.text.bias))
    }

    /// An indirect call or jump to `to`, which the table does not hold.
    #[must_use]
    pub fn of_target(&self, to: TargetAddr, is_jump: bool) -> Judgement {
        if self.code.is_target(to) {
            return Judgement::Accept(to);
        }
        if let Some(text) = self.code.text_at(to) {
            let offset = to.in_image(text.bias);
            // longjmp(3), coroutines, exceptions: they go back into functions that wait.
            let comes_back = is_jump
                && (targets::is_return_point(&text.known.image, offset)
                    || text.known.landing_pads.binary_search(&offset).is_ok());
            return match comes_back || !self.has(Guard::Cfi) {
                true => Judgement::Accept(to),
                false => self.against(Guard::Cfi, to, "no function begins there"),
            };
        }
        let maps = (self.maps)();
        match maps.at(to) {
            Some(mapping) if mapping.executable => self.of_other_code(to, mapping),
            Some(_) => self.against(Guard::Cfi, to, "that is data"),
            None => self.against(Guard::Cfi, to, "nothing is mapped there"),
        }
    }

    /// Code that is not in the sandbox.
    fn of_other_code(&self, to: TargetAddr, mapping: &Mapping) -> Judgement {
        if mapping.name.starts_with("[v") || (self.is_ours)(mapping) {
            return Judgement::Accept(to);
        }
        let is_file = mapping.is_file() && !mapping.writable && !mapping.shared;
        match is_file || !self.has(Guard::Nx) {
            // A library that was loaded a moment ago; code that is made while the program runs.
            true => Judgement::Pass,
            false if mapping.writable => self.against(Guard::Nx, to, "that is writable"),
            false => self.against(Guard::Nx, to, "that code comes from no file"),
        }
    }

    fn against(&self, guard: Guard, to: TargetAddr, why: &str) -> Judgement {
        Judgement::Against { guard, attempted: format!("a call or jump to {}: {why}", self.name(to)) }
    }

    /// A system call makes memory executable.
    #[must_use]
    pub fn makes_code(&self) -> bool {
        let [_, _, protection, ..] = arguments(self.registers);
        MAKES_CODE.contains(&(self.registers.rax as i64)) && protection & libc::PROT_EXEC as u64 != 0
    }

    /// It does so with memory that is, or was, writable.
    #[must_use]
    pub fn of_new_code(&self) -> Judgement {
        let (number, arguments) = (self.registers.rax as i64, arguments(self.registers));
        let [address, length, protection, flags, ..] = arguments;
        let is_written = protection & libc::PROT_WRITE as u64 != 0;
        let why = match number {
            _ if is_written => Some("writable and executable at once"),
            libc::SYS_mmap if flags & libc::MAP_ANONYMOUS as u64 != 0 => Some("executable, and from no file"),
            libc::SYS_mprotect | libc::SYS_pkey_mprotect => {
                let end = address.saturating_add(length);
                let maps = (self.maps)();
                let touched = |m: &&Mapping| m.range.start.0 < end && address < m.range.end.0;
                let mut pieces = maps.0.iter().filter(touched);
                pieces.any(|m| m.writable || !m.is_file()).then_some("executable that was writable")
            }
            _ => None,
        };
        match why {
            Some(why) => Judgement::Against {
                guard: Guard::Nx,
                attempted: format!("to make {length} bytes of memory {why} (at {address:#x})"),
            },
            None => Judgement::Pass,
        }
    }
}

/// Arguments of a system call.
#[must_use]
pub fn arguments(registers: &Registers) -> [u64; 6] {
    [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9]
}

/// System calls that [`Case::of_new_code`] is about.
pub const MAKES_CODE: [i64; 3] = [libc::SYS_mmap, libc::SYS_mprotect, libc::SYS_pkey_mprotect];

/// Whether a guard stops what `reason` says.
#[must_use]
pub fn is_jump(trap: &Trap, text: &TextCode) -> bool {
    trap.reason == TrapReason::Target
        && text.known.image.bytes_at(trap.native, 8).is_some_and(|bytes| {
            let decoded = iced_x86::Decoder::with_ip(64, bytes, trap.native.0, iced_x86::DecoderOptions::NONE).decode();
            decoded.flow_control() == iced_x86::FlowControl::IndirectBranch
        })
}
