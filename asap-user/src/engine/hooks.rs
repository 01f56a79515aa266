//! Code of a patch, or of the target's runtime, run by the puppet: hooks, and the registration of unwind tables.

use super::{ledger::Span, modules::Module, process::TargetProcess, stage::hook_failed};
use crate::{
    address::TargetAddr,
    image::SymbolKind,
    process::{pages, puppet::PuppetError},
    report::Failure,
};
use std::time::Duration;

/// Stack of a function that the puppet calls, bytes.
const STACK: u64 = 256 * 1024;
/// Time that one hook may take. Gates are closed meanwhile.
const LIMIT: Duration = Duration::from_millis(500);

/// A stack for calls by the puppet, in the target.
struct CallStack {
    start: u64,
}

impl CallStack {
    fn map(process: &mut TargetProcess) -> Result<Self, PuppetError> {
        let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let start = process.puppet.syscall("mmap", libc::SYS_mmap, [0, STACK, protection, flags, u64::MAX, 0])?;
        Ok(Self { start })
    }

    fn call(&self, process: &mut TargetProcess, function: TargetAddr, arguments: [u64; 2]) -> Result<u64, PuppetError> {
        let fs_base = process.puppet.thread_pointer();
        let top = TargetAddr(self.start + STACK - 64);
        let arguments = [arguments[0], arguments[1], 0, 0, 0, 0];
        process.puppet.call(&process.memory, function, arguments, top, fs_base, LIMIT)
    }

    fn unmap(self, process: &mut TargetProcess) {
        let _ = pages::unmap(&mut process.puppet, TargetAddr(self.start), STACK);
    }
}

/// Calls a function without arguments and gives the low half of its rax.
///
/// # Errors
/// It crashed, or did not end in time.
pub fn call(process: &mut TargetProcess, function: TargetAddr, arguments: [u64; 2]) -> Result<u64, PuppetError> {
    let stack = CallStack::map(process)?;
    let result = stack.call(process, function, arguments);
    stack.unmap(process);
    result
}

/// Runs hooks in order. One that returns something else than 0 refuses.
///
/// # Errors
/// A hook refused, crashed, or did not end in time.
pub fn run(process: &mut TargetProcess, hooks: &[TargetAddr]) -> Result<(), Failure> {
    let pid = process.pid;
    for &hook in hooks {
        let result = call(process, hook, [0; 2]).map_err(|error| hook_failed(pid, error))? as u32;
        if result != 0 {
            return Err(Failure::rolled_back(
                format!("a hook of the patch refused in process {pid}: it returned {}", result as i32),
                "the patch's author knows why; see the hooks in its source",
            ));
        }
    }
    Ok(())
}

/// Runs hooks whose result does not matter: what they follow has happened. Failures are logged.
pub fn run_after(process: &mut TargetProcess, hooks: &[TargetAddr]) {
    for &hook in hooks {
        if let Err(error) = call(process, hook, [0; 2]) {
            tracing::warn!(pid = process.pid, %error, "a hook of a patch failed");
        }
    }
}

/// Length of libgcc's `struct object`, bytes, with room to spare.
pub const UNWIND_OBJECT: u64 = 128;

fn exported(modules: &[Module], name: &str) -> Option<TargetAddr> {
    modules.iter().find_map(|module| {
        let symbol = module.image.export(name)?;
        (symbol.kind == SymbolKind::Function).then(|| symbol.address.in_target(module.bias))
    })
}

/// Tells the target's unwinder about the patch's unwind table, so that exceptions and backtraces pass through its code. Where
/// the target has no libgcc there is nothing to tell.
///
/// # Errors
/// libgcc's function crashed or hung.
pub fn register_unwind_table(
    process: &mut TargetProcess,
    modules: &[Module],
    table: Span,
    object: TargetAddr,
) -> Result<bool, PuppetError> {
    let Some(register) = exported(modules, "__register_frame_info") else { return Ok(false) };
    call(process, register, [table.start.0, object.0]).map(|_| true)
}

/// The opposite, before the patch's memory goes away.
///
/// # Errors
/// libgcc's function crashed or hung.
pub fn deregister_unwind_table(
    process: &mut TargetProcess,
    modules: &[Module],
    table: Span,
) -> Result<(), PuppetError> {
    let Some(deregister) = exported(modules, "__deregister_frame_info") else { return Ok(()) };
    call(process, deregister, [table.start.0, 0]).map(drop)
}
