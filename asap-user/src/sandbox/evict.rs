//! Threads leave translated code before its memory goes: what they are about to do there is done in native code.

use super::{
    code::Code,
    family::Family,
    session::{Host, SandboxError},
};
use crate::{
    address::TargetAddr,
    process::{
        curtain::lock,
        memory::Memory,
        ptrace::{Registers, Stopped, TraceError},
    },
    quiesce::unwind::Unwinder,
};
use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

/// How long threads are given that can't be moved, since a signal handler is to come back there.
const PATIENCE: Duration = Duration::from_secs(2);
const NAP: Duration = Duration::from_millis(1);

/// Waits until nobody is in `regions`, and moves those who stand there to the native instruction that they stand for. Whoever
/// calls this has seen to it that nobody comes there any more.
///
/// # Errors
/// Somebody stays; or the process is gone.
pub fn from_regions(
    host: &mut Host<'_>,
    regions: &[Range<TargetAddr>],
    families: &[Arc<Family>],
) -> Result<(), SandboxError> {
    if regions.is_empty() {
        return Ok(());
    }
    let mut unwinder = Unwinder::new();
    families.iter().for_each(|family| family.teach(&mut unwinder));
    let patient_until = Instant::now() + PATIENCE;
    loop {
        let stacks = (host.frames)(&mut unwinder).map_err(SandboxError::Maps)?;
        let is_in = |at: &TargetAddr| regions.iter().any(|region| region.contains(at));
        let inside: Vec<(i32, bool)> = stacks
            .iter()
            .filter(|stack| stack.frames.iter().any(is_in))
            .map(|stack| (stack.tid, stack.frames.first().is_some_and(is_in)))
            .collect();
        if inside.is_empty() {
            return Ok(());
        }
        if Instant::now() > patient_until {
            return Err(SandboxError::Busy(inside.into_iter().map(|(tid, _)| tid).collect()));
        }
        for (tid, _) in inside.iter().filter(|(_, stands_there)| *stands_there) {
            match move_out(*tid, host.memory, families) {
                Ok(()) | Err(TraceError::Gone(_)) => {}
                Err(error) => tracing::debug!(tid, %error, "a thread could not be moved out of translated code"),
            }
        }
        std::thread::sleep(NAP);
    }
}

fn move_out(tid: i32, memory: &Memory, families: &[Arc<Family>]) -> Result<(), TraceError> {
    let thread = Stopped::stop(tid)?;
    let registers = thread.registers()?;
    let moved = families.iter().find_map(|family| native(&lock(&family.shared.code), memory, registers));
    if let Some(moved) = moved {
        thread.set_registers(&moved)?;
    }
    thread.release()
}

/// The registers with which a thread goes on in native code that stands in translated code.
fn native(code: &Code, memory: &Memory, mut registers: Registers) -> Option<Registers> {
    let at = TargetAddr(registers.rip);
    let (native, undo) = code.cache_at(at)?.native_for(at)?;
    let before = registers.rsp;
    for saved in undo.saved.iter().flatten() {
        let value = memory.word(TargetAddr(before.wrapping_add_signed(i64::from(saved.at)))).ok()?;
        match saved.register {
            0 => registers.rax = value,
            1 => registers.rcx = value,
            2 => registers.rdx = value,
            _ => return None,
        }
    }
    registers.rsp = before.wrapping_add_signed(i64::from(undo.stack));
    registers.rip = native.0;
    Some(registers)
}
