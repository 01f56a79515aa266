//! A full `rt_sigframe` (arch/x86/include/asm/sigframe.h) that gives a thread all its registers back through rt_sigreturn(2):
//! the net under every injection. If the agent dies while a thread's registers are ours, the thread restores itself (P1).

use super::ptrace::{Registers, restarted};
use crate::address::TargetAddr;

/// Bytes below the stack pointer that belong to the running function (psABI 3.2.2).
const RED_ZONE: u64 = 128;
const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
const FP_XSTATE_MAGIC2: u32 = 0x4650_5845;
/// Offset of `sw_reserved` in the legacy area; the kernel puts XCR0 at its start for ptrace.
const SW_RESERVED: usize = 464;
/// UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS.
const UC_FLAGS: u64 = 7;
/// No valid `ss_flags`: sigaltstack(2) inside rt_sigreturn fails with EINVAL, which the kernel ignores there, so the
/// thread keeps the alternate stack that we can't read.
const KEEP_ALTERNATE_STACK: u64 = 0x7777;
/// `struct ucontext` up to and with `uc_sigmask`.
const UCONTEXT_LENGTH: u64 = 304;

/// A frame ready to be written.
#[derive(Debug)]
pub struct SignalFrame {
    /// Where the bytes go: below the red zone.
    pub address: TargetAddr,
    /// Extended state, ucontext and the return address, in one piece.
    pub bytes: Vec<u8>,
    /// The stack pointer with which a `ret` starts the restoration.
    pub stack_pointer: TargetAddr,
}

/// Everything of a thread that rt_sigreturn restores.
#[derive(Debug)]
pub struct ThreadState {
    /// General registers, as ptrace gave them.
    pub registers: Registers,
    /// XSAVE area, as ptrace gave it.
    pub extended: Vec<u8>,
    /// Blocked signals.
    pub signal_mask: u64,
    /// A signal waits to be delivered.
    pub signal_is_due: bool,
}

/// Builds the frame for `state`, to be placed below `top`. `restorer` is the target's own `mov $15, %eax; syscall`.
#[must_use]
pub fn build(state: &ThreadState, top: TargetAddr, restorer: TargetAddr) -> Option<SignalFrame> {
    let mut extended = state.extended.clone();
    let size = u32::try_from(extended.len()).ok()?;
    if extended.len() < 576 {
        return None;
    }
    let features: [u8; 8] = extended[SW_RESERVED..SW_RESERVED + 8].try_into().ok()?;
    extended[SW_RESERVED..512].fill(0);
    extended[SW_RESERVED..SW_RESERVED + 4].copy_from_slice(&FP_XSTATE_MAGIC1.to_le_bytes());
    extended[SW_RESERVED + 4..SW_RESERVED + 8].copy_from_slice(&(size + 4).to_le_bytes());
    extended[SW_RESERVED + 8..SW_RESERVED + 16].copy_from_slice(&features);
    extended[SW_RESERVED + 16..SW_RESERVED + 20].copy_from_slice(&size.to_le_bytes());
    extended.extend_from_slice(&FP_XSTATE_MAGIC2.to_le_bytes());

    let extended_at = top.0.checked_sub(extended.len() as u64)? & !63;
    // `pretcode` first; the ucontext behind it is 16-aligned as after a call.
    let frame_at = (extended_at.checked_sub(UCONTEXT_LENGTH + 8 + 128)? & !15) + 8;

    // A system call that was under way is started again: rt_sigreturn forgets how to resume it half-way.
    let mut r = restarted(state.registers, state.signal_is_due);
    if r.rax == libc::SYS_restart_syscall as u64 && r.orig_rax == u64::MAX && state.registers.orig_rax != u64::MAX {
        r.rax = state.registers.orig_rax;
    }
    let segments = (r.cs & 0xffff) | (r.gs & 0xffff) << 16 | (r.fs & 0xffff) << 32 | (r.ss & 0xffff) << 48;
    let words = [
        restorer.0,
        // struct ucontext: flags, link, stack (sp, flags, size)
        UC_FLAGS,
        0,
        0,
        KEEP_ALTERNATE_STACK,
        0,
        // struct sigcontext
        r.r8,
        r.r9,
        r.r10,
        r.r11,
        r.r12,
        r.r13,
        r.r14,
        r.r15,
        r.rdi,
        r.rsi,
        r.rbp,
        r.rbx,
        r.rdx,
        r.rax,
        r.rcx,
        r.rsp,
        r.rip,
        r.eflags,
        segments,
        0, // err
        0, // trapno
        0, // oldmask
        0, // cr2
        extended_at,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        state.signal_mask,
    ];
    debug_assert_eq!(words.len() as u64 * 8, UCONTEXT_LENGTH + 8);
    let mut bytes = Vec::with_capacity((top.0 - frame_at) as usize);
    for word in words {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.resize((extended_at - frame_at) as usize, 0);
    bytes.extend_from_slice(&extended);
    Some(SignalFrame { address: TargetAddr(frame_at), bytes, stack_pointer: TargetAddr(frame_at) })
}

/// Where a frame may start on the stack of a thread with these registers.
#[must_use]
pub fn below_red_zone(registers: &Registers) -> TargetAddr {
    TargetAddr(registers.rsp.wrapping_sub(RED_ZONE))
}

/// A frame that makes a fresh helper end itself with exit(2) instead of running the target's code, should nobody take it in
/// hand: it begins life with the registers of the thread that made it. It needs no extended state.
#[must_use]
pub fn build_exit(registers: &Registers, top: TargetAddr, restorer: TargetAddr, syscall: TargetAddr) -> SignalFrame {
    let frame_at = ((top.0 - UCONTEXT_LENGTH - 8) & !15) - 8;
    let segments = (registers.cs & 0xffff) | (registers.ss & 0xffff) << 48;
    let mut words = [0_u64; 39];
    words[0] = restorer.0;
    words[1] = UC_FLAGS & !1;
    words[4] = KEEP_ALTERNATE_STACK;
    words[6 + 13] = libc::SYS_exit as u64; // rax
    words[6 + 15] = top.0; // rsp
    words[6 + 16] = syscall.0; // rip
    words[6 + 17] = 0x202; // eflags: interrupts on
    words[6 + 18] = segments;
    words[38] = u64::MAX; // every signal stays blocked
    let bytes = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    SignalFrame { address: TargetAddr(frame_at), bytes, stack_pointer: TargetAddr(frame_at) }
}
