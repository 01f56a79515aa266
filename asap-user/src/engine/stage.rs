//! A patch laid into a process: linked, written, protected, and not yet reachable.

use super::{
    call_stack,
    ledger::{AppliedFunction, AppliedHooks, AppliedPatch, Span},
    modules::Module,
    plan::PlannedFunction,
    process::{TargetProcess, explain, gone},
    resolve::TargetScope,
    text::JUMP_LENGTH,
};
use crate::{
    address::{PAGE_SIZE, TargetAddr},
    patch::{Bases, LinkedPatch, PatchError, PatchObject, prologue},
    report::{Failure, Mechanism, PatchId},
};
use std::{cell::RefCell, collections::HashMap, time::Duration};

/// Names of the hooks to be run when the patch goes in, as addresses.
#[derive(Debug, Default)]
pub struct ApplyHooks {
    /// At the quiescent point, before the new code is reachable.
    pub pre_apply: Vec<TargetAddr>,
    /// Afterwards.
    pub post_apply: Vec<TargetAddr>,
}

/// A patch that lies ready in a process.
#[derive(Debug)]
pub struct Staged {
    /// As it will stand in the ledger.
    pub patch: AppliedPatch,
    /// Hooks for the way in.
    pub hooks: ApplyHooks,
}

/// Identity of the patch, the same in all processes.
#[derive(Clone, Debug)]
pub struct PatchIdentity {
    /// Number.
    pub id: PatchId,
    /// Name.
    pub name: String,
    /// Hash of the object files, hex.
    pub sha256: String,
    /// Seconds since the epoch.
    pub installed_at: u64,
    /// How calls are to reach it.
    pub mechanism: Mechanism,
}

/// Room for one relocated prologue, bytes: at most four instructions more than the jump, and the jump back.
const TRAMPOLINE_LENGTH: u64 = 64;
/// Longest function that is looked at for a prologue, bytes.
const CODE_MOST: usize = 1 << 20;
/// Time that an IFUNC resolver may take.
const RESOLVER_LIMIT: Duration = Duration::from_secs(1);

/// Links `object` for `process`, maps room for it and writes it there. On failure nothing is left.
///
/// # Errors
/// It does not fit this process, or there is no room.
pub fn stage(
    process: &mut TargetProcess,
    modules: &[Module],
    functions: &[PlannedFunction],
    object: &PatchObject,
    identity: &PatchIdentity,
) -> Result<Staged, Failure> {
    let layout = object.layout();
    let wanted = object.originals();
    let pages = |length: u64| length.next_multiple_of(PAGE_SIZE);
    let trampolines = (layout.code.size as u64).next_multiple_of(16);
    let code_length = pages(trampolines + wanted.len() as u64 * TRAMPOLINE_LENGTH);
    // Behind the patch's own variables lies the object that libgcc wants for the unwind table.
    let object_at = (layout.data.size as u64).next_multiple_of(16);
    let (rodata_length, data_length) =
        (pages(layout.rodata.size as u64), pages(object_at + super::hooks::UNWIND_OBJECT));
    let near = modules[functions[0].module].text.clone();
    let parts = [
        (code_length, libc::PROT_READ | libc::PROT_EXEC),
        (rodata_length, libc::PROT_READ),
        (data_length, libc::PROT_READ | libc::PROT_WRITE),
    ];
    let start = process.reserve(&near, code_length + rodata_length + data_length, &parts)?;
    crate::fault::point("stage.mapped");
    let span = |offset: u64, length: u64| Span {
        start: TargetAddr(start.0 + offset),
        end: TargetAddr(start.0 + offset + length),
    };
    let code = span(0, code_length);
    let rodata = span(code_length, rodata_length);
    let data = span(code_length + rodata_length, data_length);
    let staged = (|| {
        let originals = lay_trampolines(process, functions, &wanted, TargetAddr(start.0 + trampolines))?;
        let bases = Bases { code: code.start, rodata: rodata.start, data: data.start };
        let linked = link(process, modules, functions, object, &bases, &originals)?;
        write(process, &linked, &bases)?;
        crate::fault::point("stage.written");
        let mut staged = describe(modules, functions, object, &linked, identity, &originals, [code, rodata, data])?;
        staged.patch.registered = staged.patch.eh_frame.map(|_| TargetAddr(data.start.0 + object_at));
        Ok(staged)
    })();
    if staged.is_err() {
        for span in [code, rodata, data] {
            process.release(span);
        }
        let _ = super::exchange::record(process, |ledger| ledger.staging.clear());
    }
    staged
}

/// Makes the old function callable for each function whose original the patch wants. Keys are as the patch writes them.
fn lay_trampolines(
    process: &TargetProcess,
    functions: &[PlannedFunction],
    wanted: &[String],
    start: TargetAddr,
) -> Result<HashMap<String, TargetAddr>, Failure> {
    let mut originals = HashMap::new();
    let mut at = start;
    for name in wanted {
        let bare = |text: &str| crate::image::FunctionQuery::parse(text).name;
        let function = functions
            .iter()
            .find(|f| f.written == *name || f.name == *name || f.new_symbol == *name || bare(&f.written) == bare(name))
            .ok_or_else(|| {
                Failure::refused(
                    format!("the patch calls the original of {name}, which it does not replace"),
                    "use ASAP_ORIGINAL only for functions that the patch replaces",
                )
            })?;
        // Of a function that is patched already, the original is what is in place now.
        let current = process.book.ledger.patches.iter().rev().flat_map(|patch| &patch.functions);
        if let Some(current) = current.into_iter().find(|applied| applied.entry == function.entry) {
            originals.insert(name.clone(), current.replacement.start);
            continue;
        }
        // All of it: a branch back into the moved instructions may come from anywhere.
        let length = usize::try_from(function.function.size).unwrap_or(CODE_MOST).clamp(JUMP_LENGTH, CODE_MOST);
        let bytes = process.memory.bytes(function.entry, length).map_err(|error| gone(process.pid, error))?;
        let moved = prologue::relocate(&bytes, function.entry, JUMP_LENGTH, at).map_err(|error| {
            Failure::refused(
                format!("the beginning of {} can't be moved to keep the original callable: {error}", function.name),
                "write the patch without ASAP_ORIGINAL: as a full replacement",
            )
        })?;
        if moved.bytes.len() as u64 > TRAMPOLINE_LENGTH {
            return Err(Failure::refused(
                format!("the beginning of {} is too long to be moved", function.name),
                "write the patch without ASAP_ORIGINAL: as a full replacement",
            ));
        }
        process.memory.write(at, &moved.bytes).map_err(|error| gone(process.pid, error))?;
        originals.insert(name.clone(), at);
        at = at.offset(TRAMPOLINE_LENGTH as i64);
    }
    Ok(originals)
}

fn link(
    process: &mut TargetProcess,
    modules: &[Module],
    functions: &[PlannedFunction],
    object: &PatchObject,
    bases: &Bases,
    originals: &HashMap<String, TargetAddr>,
) -> Result<LinkedPatch, Failure> {
    let pid = process.pid;
    let (memory, puppet, book) = (&process.memory, &mut process.puppet, &mut process.book);
    let mut call_resolver = |resolver: TargetAddr| {
        let stack = call_stack::provide(puppet, book, memory).ok()?;
        let fs_base = puppet.thread_pointer();
        let chosen = puppet.call(memory, resolver, [0; 6], call_stack::top(stack), fs_base, None, RESOLVER_LIMIT);
        chosen.ok().filter(|&at| modules.iter().any(|m| m.text.contains(&TargetAddr(at)))).map(TargetAddr)
    };
    let scope = TargetScope {
        home: &modules[functions[0].module],
        modules,
        memory,
        originals,
        call_resolver: RefCell::new(&mut call_resolver),
        complaints: RefCell::new(Vec::new()),
    };
    let linked = object.link(bases, &scope).map_err(|error| {
        let complaints = scope.complaints.borrow().join("; ");
        let more = if complaints.is_empty() { String::new() } else { format!(" ({complaints})") };
        unfit(pid, &error, &more)
    });
    call_stack::remove(puppet, book, memory).map_err(|error| explain(pid, error))?;
    linked
}

fn unfit(pid: i32, error: &PatchError, more: &str) -> Failure {
    Failure::refused(
        format!("the patch does not fit process {pid}: {error}{more}"),
        "build the patch against the sources of exactly this executable (compare build-ids)",
    )
}

fn write(process: &TargetProcess, linked: &LinkedPatch, bases: &Bases) -> Result<(), Failure> {
    let parts = [(bases.code, &linked.code), (bases.rodata, &linked.rodata), (bases.data, &linked.data)];
    for (at, bytes) in parts {
        if bytes.is_empty() {
            continue;
        }
        process.memory.write(at, bytes).map_err(|error| {
            Failure::refused(
                format!("the patch can't be written into process {}: {error}", process.pid),
                "see `asap doctor`; a security module may forbid it",
            )
        })?;
    }
    Ok(())
}

#[allow(clippy::too_many_arguments)]
fn describe(
    modules: &[Module],
    functions: &[PlannedFunction],
    object: &PatchObject,
    linked: &LinkedPatch,
    identity: &PatchIdentity,
    originals: &HashMap<String, TargetAddr>,
    [code, rodata, data]: [Span; 3],
) -> Result<Staged, Failure> {
    let mut applied = Vec::new();
    for planned in functions {
        let module = &modules[planned.module];
        let replacement = linked.function_range(&planned.new_symbol).ok_or_else(|| {
            Failure::refused(format!("the patch has no code for {}", planned.new_symbol), "report this")
        })?;
        if prologue::entry_jump(planned.entry, replacement.start).is_none() {
            return Err(Failure::refused(
                format!("{} lies too far from the patch's other functions", planned.name),
                "make one patch per module",
            ));
        }
        let body = module.image.body(&planned.function);
        let spans = body
            .ranges
            .iter()
            .map(|r| Span { start: r.start.in_target(module.bias), end: r.end.in_target(module.bias) });
        let original = originals
            .iter()
            .find(|(name, _)| **name == planned.written || **name == planned.name)
            .map(|(_, &address)| address);
        applied.push(AppliedFunction {
            name: planned.name.clone(),
            module: module.path.clone(),
            entry: planned.entry,
            body: spans.collect(),
            replacement: replacement.into(),
            original,
        });
    }
    let addresses = |names: &[String]| -> Result<Vec<TargetAddr>, Failure> {
        let found = names.iter().map(|name| linked.symbol(name).map(|symbol| symbol.address));
        found.collect::<Option<_>>().ok_or_else(|| Failure::refused("a hook of the patch has no code", "report this"))
    };
    let hooks = object.hooks();
    let staged = Staged {
        hooks: ApplyHooks { pre_apply: addresses(&hooks.pre_apply)?, post_apply: addresses(&hooks.post_apply)? },
        patch: AppliedPatch {
            id: identity.id,
            name: identity.name.clone(),
            sha256: identity.sha256.clone(),
            installed_at: identity.installed_at,
            code,
            rodata,
            data,
            eh_frame: linked.eh_frame.clone().map(Span::from),
            // A place for it, until it is registered.
            registered: None,
            functions: applied,
            mechanism: identity.mechanism,
            hooks: AppliedHooks {
                pre_revert: addresses(&hooks.pre_revert)?,
                post_revert: addresses(&hooks.post_revert)?,
            },
        },
    };
    Ok(staged)
}

/// Takes a staged patch out again that never became reachable.
pub fn unstage(process: &mut TargetProcess, patch: &AppliedPatch) {
    for span in [patch.code, patch.rodata, patch.data] {
        process.release(span);
    }
    let _ = super::exchange::record(process, |ledger| ledger.staging.clear());
}

/// Words for a failure of the puppet while it ran code of the patch.
#[must_use]
pub fn hook_failed(pid: i32, error: crate::process::puppet::PuppetError) -> Failure {
    let failure = explain(pid, error);
    Failure::rolled_back(format!("a hook of the patch failed: {}", failure.message), "mend the hook; see asap-patch.h")
}
