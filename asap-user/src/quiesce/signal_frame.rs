//! Signal frames. The trampoline that a handler returns to is known by its bytes, and the interrupted registers lie at a place
//! that is kernel ABI: so frames of C libraries and runtimes whose trampoline has no unwind table can be walked too.

use super::unwind::WalkRegisters;

/// `mov $15, %rax; syscall` (glibc, musl, Go) and `mov $15, %eax; syscall`: rt_sigreturn(2).
const TRAMPOLINES: [&[u8]; 2] = [&[0x48, 0xc7, 0xc0, 15, 0, 0, 0, 0x0f, 0x05], &[0xb8, 15, 0, 0, 0, 0x0f, 0x05]];

/// Whether code begins with a return from a signal handler.
pub(super) fn is_trampoline(code: &[u8]) -> bool {
    TRAMPOLINES.iter().any(|trampoline| code.starts_with(trampoline))
}

/// Registers in DWARF order (psABI, figure 3.36), then rip: their words in `gregs` (sys/ucontext.h).
const GREGS: [u64; 17] = [13, 12, 14, 11, 9, 8, 10, 15, 0, 1, 2, 3, 4, 5, 6, 7, 16];

/// Registers of what a signal interrupted; `sp` is the stack pointer when the trampoline is reached: the frame's return
/// address is popped, and the ucontext lies there (arch/x86/include/asm/sigframe.h, struct rt_sigframe).
pub(super) fn interrupted(sp: u64, read: &mut dyn FnMut(u64) -> Option<u64>) -> Option<WalkRegisters> {
    // uc_flags, uc_link, uc_stack (24 bytes) come before the registers.
    let gregs = sp.checked_add(40)?;
    let mut values = [0; 17];
    for (value, greg) in values.iter_mut().zip(GREGS) {
        *value = read(gregs.checked_add(greg * 8)?)?;
    }
    let [general @ .., ip] = values;
    Some(WalkRegisters::all(ip, general))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_offsets_are_those_of_the_c_library() {
        let base = std::mem::offset_of!(libc::ucontext_t, uc_mcontext) + std::mem::offset_of!(libc::mcontext_t, gregs);
        assert_eq!(base, 40);
        let order = [
            libc::REG_RAX,
            libc::REG_RDX,
            libc::REG_RCX,
            libc::REG_RBX,
            libc::REG_RSI,
            libc::REG_RDI,
            libc::REG_RBP,
            libc::REG_RSP,
            libc::REG_R8,
            libc::REG_R9,
            libc::REG_R10,
            libc::REG_R11,
            libc::REG_R12,
            libc::REG_R13,
            libc::REG_R14,
            libc::REG_R15,
            libc::REG_RIP,
        ];
        assert_eq!(order.map(|register| register as u64), GREGS);
    }

    #[test]
    fn only_a_return_from_a_handler_is_one() {
        assert!(is_trampoline(&[0x48, 0xc7, 0xc0, 15, 0, 0, 0, 0x0f, 0x05, 0x90]));
        assert!(is_trampoline(&[0xb8, 15, 0, 0, 0, 0x0f, 0x05]));
        assert!(!is_trampoline(&[0xb8, 14, 0, 0, 0, 0x0f, 0x05]));
        assert!(!is_trampoline(&[0xb8, 15, 0, 0]));
    }
}
