//! A function's code as its file has it, and as it runs in the sandbox. Looks only.

use super::{
    modules::{ImageCache, Module},
    plan,
    process::{TargetProcess, gone},
    target::Target,
};
use crate::{
    address::{PAGE_SIZE, TargetAddr},
    image::{Function, FunctionQuery, demangle},
    report::{CodeBytes, CodeDump, CodeFragment, Failure},
};
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction};
use std::ops::Range;

/// Largest function that is shown, bytes.
const FUNCTION_MOST: u64 = 1 << 20;
/// Longest fragment that is shown, bytes, and most of them.
const FRAGMENT_MOST: usize = 1024;
const FRAGMENTS_MOST: usize = 4096;

/// The code of a function in the first process that is inside the sandbox.
///
/// # Errors
/// There is no such function, or no process.
pub fn function(target: &Target, images: &mut ImageCache, wanted: &str) -> Result<CodeDump, Failure> {
    let inside = target.processes.values().find(|process| process.book.ledger.sandbox.is_some());
    let process = inside.or_else(|| target.processes.get(&target.root)).or_else(|| target.processes.values().next());
    let Some(process) = process else { return Err(gone(target.root, "it is not there")) };
    let modules = images.modules(process.pid, &process.maps()?, &process.memory, |at| process.is_ours(at));
    let (module, function) = find(&modules, wanted)?;
    let range = function.address.in_target(module.bias);
    let length = function.size.min(FUNCTION_MOST);
    let range = range..range.offset(length as i64);
    let native = module.image.bytes_at(function.address, length as usize).ok_or_else(|| {
        Failure::refused(format!("the code of {wanted} lies outside its file {}", module.path), "name another function")
    })?;
    let translated = process.book.ledger.sandbox.as_ref().and_then(|_| in_place(process, &range));
    let fragments = match &translated {
        Some(now) => fragments(process, module, range.start, native, now),
        None => Vec::new(),
    };
    Ok(CodeDump {
        pid: process.pid,
        function: function.name.as_deref().map_or_else(|| wanted.to_owned(), demangle),
        module: module.path.clone(),
        native: CodeBytes { at: range.start, bytes: native.to_vec() },
        translated: translated.map(|bytes| CodeBytes { at: range.start, bytes }),
        fragments,
    })
}

/// By name, or by any address of the process that lies inside of it.
fn find<'a>(modules: &'a [Module], wanted: &str) -> Result<(&'a Module, Function), Failure> {
    let address = wanted.strip_prefix("0x").and_then(|digits| u64::from_str_radix(digits, 16).ok()).map(TargetAddr);
    let Some(address) = address else {
        let (index, function) = plan::locate(modules, None, wanted, FunctionQuery::parse(wanted))?;
        return Ok((&modules[index], function));
    };
    let holds = modules.iter().filter(|module| module.is_file).find_map(|module| {
        let function = module.image.function_at(address.in_image(module.bias))?;
        module.text.contains(&address).then_some((module, function))
    });
    holds.ok_or_else(|| {
        Failure::refused(
            format!("no function of the process is known at {address}"),
            "name an address in code of the process, as `asap sandbox status` and /proc/PID/maps show it",
        )
    })
}

/// What lies at the place of the function; none: one of its pages has not been looked at by a thread, so that nothing is there yet.
fn in_place(process: &TargetProcess, range: &Range<TargetAddr>) -> Option<Vec<u8>> {
    let mut bytes = vec![0; (range.end.0 - range.start.0) as usize];
    let mut at = range.start;
    while at < range.end {
        let end = TargetAddr(at.page().0 + PAGE_SIZE).min(range.end);
        let part = (at.0 - range.start.0) as usize..(end.0 - range.start.0) as usize;
        process.memory.read_in_place(at, &mut bytes[part]).ok()?;
        at = end;
    }
    Some(bytes)
}

/// The code to which changed instructions jump.
fn fragments(
    process: &TargetProcess,
    module: &Module,
    start: TargetAddr,
    native: &[u8],
    now: &[u8],
) -> Vec<CodeFragment> {
    let mut found: Vec<CodeFragment> = Vec::new();
    let mut decoder = Decoder::with_ip(64, native, start.0, DecoderOptions::NONE);
    while decoder.can_decode() && found.len() < FRAGMENTS_MOST {
        let instruction = decoder.decode();
        let at = instruction.ip().wrapping_sub(start.0) as usize;
        let (Some(was), Some(is)) = (native.get(at..at + instruction.len()), now.get(at..)) else { break };
        if is.starts_with(was) {
            continue;
        }
        let jump = Decoder::with_ip(64, is, instruction.ip(), DecoderOptions::NONE).decode();
        let Some(to) = leads_to(&jump).filter(|to| !module.text.contains(to)) else { continue };
        if found.iter().any(|known| known.code.at == to) {
            continue;
        }
        if let Some(bytes) = fragment(process, module, to) {
            let kind = format!("{:?}", instruction.mnemonic()).to_lowercase();
            let code = CodeBytes { at: to, bytes };
            found.push(CodeFragment { of: TargetAddr(instruction.ip()), kind, code });
        }
    }
    found
}

fn leads_to(instruction: &Instruction) -> Option<TargetAddr> {
    let is_jump = matches!(instruction.flow_control(), FlowControl::UnconditionalBranch | FlowControl::Call);
    (is_jump && !instruction.is_invalid()).then(|| TargetAddr(instruction.near_branch_target()))
}

/// From `at` to the instruction after which it goes on in the module.
fn fragment(process: &TargetProcess, module: &Module, at: TargetAddr) -> Option<Vec<u8>> {
    let room = (PAGE_SIZE as usize - at.page_offset()).min(FRAGMENT_MOST);
    let mut bytes = vec![0; FRAGMENT_MOST];
    let readable = match process.memory.read_in_place(at, &mut bytes) {
        Ok(()) => FRAGMENT_MOST,
        Err(_) => process.memory.read_in_place(at, &mut bytes[..room]).ok().map(|()| room)?,
    };
    bytes.truncate(readable);
    let end = end_of(&bytes, at, &module.text)?;
    bytes.truncate(end);
    Some(bytes)
}

/// Where a fragment ends: behind the first instruction that leaves it for good.
fn end_of(bytes: &[u8], at: TargetAddr, text: &Range<TargetAddr>) -> Option<usize> {
    let mut decoder = Decoder::with_ip(64, bytes, at.0, DecoderOptions::NONE);
    while decoder.can_decode() {
        let instruction = decoder.decode();
        let leaves = match instruction.flow_control() {
            FlowControl::Return | FlowControl::IndirectBranch => true,
            FlowControl::UnconditionalBranch => text.contains(&TargetAddr(instruction.near_branch_target())),
            _ => instruction.is_invalid(),
        };
        if leaves {
            return Some(decoder.position());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fragment_ends_where_control_goes_back() {
        let text = TargetAddr(0x1000)..TargetAddr(0x2000);
        let at = TargetAddr(0x3000);
        // jrcxz +5; jmp 0x9000 (a trap); nop; jmp 0x1004; anything.
        let code = [0xe3, 0x05, 0xe9, 0xf9, 0x5f, 0, 0, 0x90, 0xe9, 0xf7, 0xdf, 0xff, 0xff, 0x90];
        assert_eq!(end_of(&code, at, &text), Some(13));
        assert_eq!(end_of(&[0x90, 0xc3, 0x90], at, &text), Some(2));
        assert_eq!(end_of(&[0x90, 0x90], at, &text), None);
        assert_eq!(end_of(&[], at, &text), None);
    }
}
