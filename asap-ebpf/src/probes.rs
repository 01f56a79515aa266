//! Who is inside a set of functions: entries less exits, per thread and in all. Plain uprobes only; the attach cookie says
//! what a probe stands for.

use crate::{
    atomic::Counter,
    task::{LAYOUT, current_tid},
};
use asap_common::{ProbeRecord, probe_kind, total};
use aya_ebpf::{
    bindings::BPF_NOEXIST,
    helpers::bpf_get_attach_cookie,
    macros::map,
    maps::{Array, HashMap, RingBuf},
};
use core::ffi::c_void;

/// Activations per thread. Only the thread itself writes its slot.
#[map]
static COUNTS: HashMap<i32, i64> = HashMap::with_max_entries(32768, 0);
#[map]
static TOTALS: Array<i64> = Array::with_max_entries(total::SLOTS, 0);
#[map]
static HITS: RingBuf = RingBuf::with_byte_size(64 * 1024, 0);

/// Index of `ip` in `struct pt_regs`, in words.
const IP: usize = 16;

#[inline(always)]
fn slot(index: u32) -> Option<Counter> {
    TOTALS.get_ptr_mut(index).map(Counter::at)
}

#[inline(always)]
fn tell(kind: u32, tid: i32, ip: u64) {
    // A full buffer loses the event: events are hints, the counts are what is believed.
    if let Some(mut entry) = HITS.reserve::<ProbeRecord>(0) {
        entry.write(ProbeRecord { kind, tid, ip });
        entry.submit(0);
    }
}

/// Counts one hit.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uprobe/count")]
pub extern "C" fn count(context: *mut c_void) -> i32 {
    let Some(layout) = LAYOUT.get(0) else { return 0 };
    // SAFETY: the context of a uprobe program is a `struct pt_regs`.
    let (kind, ip) = unsafe { (bpf_get_attach_cookie(context), *context.cast::<u64>().add(IP)) };
    let tid = current_tid(layout);
    if kind & probe_kind::RETURN != 0 {
        tell(probe_kind::RETURN as u32, tid, ip);
    }
    let mut change = 0;
    if kind & probe_kind::ENTRY != 0 {
        change += 1;
    }
    if kind & probe_kind::EXIT != 0 {
        change -= 1;
    }
    if change == 0 {
        return 0;
    }
    if let Some(count) = COUNTS.get_ptr_mut(&tid) {
        // SAFETY: the slot belongs to this thread, which is here.
        unsafe { *count += change };
    } else if COUNTS.insert(&tid, &change, u64::from(BPF_NOEXIST)).is_err() {
        if let Some(lost) = slot(total::LOST) {
            lost.add(1);
        }
    }
    let (Some(sum), Some(base), Some(wanted)) = (slot(total::SUM), slot(total::BASE), slot(total::WANTED)) else {
        return 0;
    };
    let now = sum.add(change) + change;
    if change < 0 && now + base.get() == 0 && wanted.swap(0) != 0 {
        tell(0, tid, ip);
    }
    0
}
