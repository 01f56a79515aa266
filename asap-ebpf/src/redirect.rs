//! Sends calls of a function elsewhere by writing the instruction pointer at a uprobe on its entry. Many kernels refuse to
//! load it: it is loaded apart from the others, and nothing depends on it.

use aya_ebpf::{helpers::bpf_get_attach_cookie, macros::map, maps::Array};
use core::ffi::c_void;

/// 1: calls go to the new function. One store switches all functions of a patch at once.
#[map]
static SWITCH: Array<u64> = Array::with_max_entries(1, 0);

/// Index of `ip` in `struct pt_regs`, in words.
const IP: usize = 16;

/// The attach cookie is the address of the new function.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uprobe/redirect")]
pub extern "C" fn redirect(context: *mut c_void) -> i32 {
    if SWITCH.get(0).is_some_and(|&on| on != 0) {
        // SAFETY: the context of a uprobe program is a `struct pt_regs`.
        unsafe {
            let to = bpf_get_attach_cookie(context);
            context.cast::<u64>().add(IP).write_volatile(to);
        }
    }
    0
}
