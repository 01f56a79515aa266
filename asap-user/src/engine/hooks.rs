//! Code of a patch, or of the target's runtime, run by the puppet: hooks, and the registration of unwind tables.

use super::{
    call_stack,
    exchange::record,
    ledger::{Registration, Span},
    modules::Module,
    process::{TargetProcess, explain},
    stage::hook_failed,
};
use crate::{address::TargetAddr, image::SymbolKind, process::puppet::PuppetError, report::Failure};
use std::time::Duration;

/// Time that one hook may take. Gates are closed meanwhile.
const LIMIT: Duration = Duration::from_millis(500);

/// Calls a function with two integer arguments and gives its rax. Once begun it runs to its end even if the agent dies; then
/// `mark` is written, if there is one: where, and what.
fn call(
    process: &mut TargetProcess,
    function: TargetAddr,
    arguments: [u64; 2],
    mark: Option<(TargetAddr, u64)>,
) -> Result<u64, PuppetError> {
    let TargetProcess { puppet, book, memory, .. } = process;
    let top = call_stack::top(call_stack::provide(puppet, book, memory)?);
    let fs_base = puppet.thread_pointer();
    let arguments = [arguments[0], arguments[1], 0, 0, 0, 0];
    puppet.call(memory, function, arguments, top, fs_base, mark, LIMIT)
}

fn remove_stack(process: &mut TargetProcess) -> Result<(), Failure> {
    let TargetProcess { pid, puppet, book, memory, .. } = process;
    call_stack::remove(puppet, book, memory).map_err(|error| explain(*pid, error))
}

/// Runs hooks in order. One that returns something else than 0 refuses.
///
/// # Errors
/// A hook refused, crashed, or did not end in time.
pub fn run(process: &mut TargetProcess, hooks: &[TargetAddr]) -> Result<(), Failure> {
    if hooks.is_empty() {
        return Ok(());
    }
    let pid = process.pid;
    // One that is there for the unwind table stays.
    let is_own = process.book.ledger.call_stack.is_none();
    let refused = hooks.iter().find_map(|&hook| {
        match call(process, hook, [0; 2], None) {
            // A function of C returns an int.
            Ok(result) if result as u32 == 0 => None,
            Ok(result) => Some(Failure::rolled_back(
                format!("a hook of the patch refused in process {pid}: it returned {}", result as i32),
                "the patch's author knows why; see the hooks in its source",
            )),
            Err(error) => Some(hook_failed(pid, error)),
        }
    });
    if is_own {
        remove_stack(process)?;
    }
    refused.map_or(Ok(()), Err)
}

/// Runs hooks whose result does not matter: what they follow has happened. Failures are logged.
pub fn run_after(process: &mut TargetProcess, hooks: &[TargetAddr]) {
    for &hook in hooks {
        if let Err(failure) = run(process, &[hook]) {
            tracing::warn!(pid = process.pid, %failure, "a hook of a patch failed");
        }
    }
}

/// Length of libgcc's `struct object`, bytes, with room to spare, and a word of ours at its end.
pub const UNWIND_OBJECT: u64 = 128;
/// Where that word lies in the object.
const STATE_AT: i64 = UNWIND_OBJECT as i64 - 8;
/// What it says: libgcc knows the table; libgcc has forgotten it. 0: was never told.
const KNOWN: u64 = 1;
const FORGOTTEN: u64 = 2;

fn exported(modules: &[Module], name: &str) -> Option<TargetAddr> {
    modules.iter().find_map(|module| {
        let symbol = module.image.export(name)?;
        (symbol.kind == SymbolKind::Function).then(|| symbol.address.in_target(module.bias))
    })
}

fn tell(process: &mut TargetProcess, registration: Registration, known: bool) -> Result<(), PuppetError> {
    let mark = |state| Some((registration.object.offset(STATE_AT), state));
    let table = registration.table.start.0;
    if known {
        call(process, registration.register, [table, registration.object.0], mark(KNOWN)).map(drop)
    } else {
        call(process, registration.deregister, [table, 0], mark(FORGOTTEN)).map(drop)
    }
}

/// Writes into the ledger that libgcc is about to be told of, or to forget, the unwind table of a patch; before
/// [`register_unwind_table`] or [`deregister_unwind_table`], and outside of closed gates. `false`: the target has no libgcc, and
/// there is nothing to tell.
///
/// # Errors
/// The process is gone, or the ledger is full.
pub fn announce(
    process: &mut TargetProcess,
    modules: &[Module],
    table: Span,
    object: TargetAddr,
) -> Result<bool, Failure> {
    let functions = exported(modules, "__register_frame_info").zip(exported(modules, "__deregister_frame_info"));
    let Some((register, deregister)) = functions else { return Ok(false) };
    // Now, since the call may come while gates are closed.
    let TargetProcess { puppet, book, memory, pid, .. } = process;
    call_stack::provide(puppet, book, memory).map_err(|error| explain(*pid, error))?;
    record(process, |ledger| ledger.registering = Some(Registration { table, object, register, deregister }))?;
    crate::fault::point("unwind.announced");
    Ok(true)
}

/// Tells the target's unwinder about the table that was announced, so that exceptions and backtraces pass through its code.
///
/// # Errors
/// libgcc's function crashed or hung.
pub fn register_unwind_table(process: &mut TargetProcess) -> Result<(), PuppetError> {
    let Some(registration) = process.book.ledger.registering else { return Ok(()) };
    tell(process, registration, true)?;
    crate::fault::point("unwind.registered");
    Ok(())
}

/// The opposite, before the patch's memory goes away.
///
/// # Errors
/// libgcc's function crashed or hung.
pub fn deregister_unwind_table(process: &mut TargetProcess) -> Result<(), PuppetError> {
    let Some(registration) = process.book.ledger.registering else { return Ok(()) };
    tell(process, registration, false)?;
    crate::fault::point("unwind.deregistered");
    Ok(())
}

/// After a dead agent: libgcc knows the table that was announced if its patch is applied, and does not otherwise.
///
/// # Errors
/// libgcc's function crashed or hung, or the process is gone.
pub fn settle_registration(process: &mut TargetProcess) -> Result<(), Failure> {
    let Some(registration) = process.book.ledger.registering else { return Ok(()) };
    let pid = process.pid;
    let wanted = process.book.ledger.patches.iter().any(|patch| patch.registered == Some(registration.object));
    // Where the patch's memory is gone, libgcc was told before.
    let state = process.memory.bytes(registration.object.offset(STATE_AT), 8);
    let known = state.is_ok_and(|bytes| bytes == KNOWN.to_le_bytes());
    if wanted != known {
        tell(process, registration, wanted).map_err(|error| hook_failed(pid, error))?;
    }
    end_registration(process)
}

/// libgcc and the ledger agree: the announcement has done its work.
///
/// # Errors
/// The process is gone.
pub fn end_registration(process: &mut TargetProcess) -> Result<(), Failure> {
    if process.book.ledger.registering.is_some() {
        record(process, |ledger| ledger.registering = None)?;
        crate::fault::point("unwind.settled");
        remove_stack(process)?;
    }
    Ok(())
}
