//! Sends calls of functions elsewhere by writing the instruction pointer at uprobes on their entries. Many kernels refuse to
//! load it: it is loaded apart from the others, and nothing depends on it.

use crate::{
    atomic::Counter,
    task::{LAYOUT, Task},
};
use asap_common::{REDIRECTS, Redirects};
use aya_ebpf::{bindings::BPF_F_MMAPABLE, helpers::bpf_get_attach_cookie, macros::map, maps::Array};
use core::ffi::c_void;

/// Where calls go; written by the agent through a mapping of its own.
#[map]
static TARGETS: Array<Redirects> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Index of `ip` in `struct pt_regs`, in words.
const IP: usize = 16;

/// The attach cookie is the function's slot.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uprobe/redirect")]
pub extern "C" fn redirect(context: *mut c_void) -> i32 {
    let (Some(layout), Some(targets)) = (LAYOUT.get(0), TARGETS.get_ptr_mut(0)) else { return 0 };
    // SAFETY: the context of a uprobe program is a `struct pt_regs`; fields of a map value are valid as long as the program
    // runs, and the slot is below the number of slots.
    unsafe {
        // Counted before the table is chosen, in one step: whoever changes the table on the condition that nobody was counted
        // meanwhile knows that nobody is on the way into what the old table says.
        let word = Counter::at((&raw mut (*targets).word).cast()).add(1);
        if (*targets).exec_id != Task::current().field::<u64>(layout.exec_id) {
            return 0;
        }
        let table = (word as u64 >> 63) as usize * REDIRECTS;
        let slot = bpf_get_attach_cookie(context) as usize & (REDIRECTS - 1);
        let to = (&raw const (*targets).tables).cast::<u64>().add(table + slot).read_volatile();
        if to != 0 {
            context.cast::<u64>().add(IP).write_volatile(to);
        }
    }
    0
}
