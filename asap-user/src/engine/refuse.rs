//! What can't be a target, said before anything is touched (P6).

use crate::{
    process::info::{self, ProcessInfo},
    report::Failure,
};
use std::{fs, io, io::Read};

/// Checks that `pid` can be a target at all.
///
/// # Errors
/// A refusal that says why, and what to do.
pub fn check(pid: i32) -> Result<ProcessInfo, Failure> {
    let info = ProcessInfo::of(pid).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            Failure::refused(format!("there is no process {pid}"), "look the process up again: ps -e | grep NAME")
        }
        _ => Failure::refused(format!("process {pid} can't be looked at: {error}"), "run asap as root"),
    })?;
    let name = &info.name;
    if let Some(process) = info::thread_group(pid)
        && process != pid
    {
        return Err(Failure::refused(
            format!("{pid} is a thread of process {process} ({name})"),
            format!("attach to the process: asap attach --pid {process}"),
        ));
    }
    if pid == std::process::id() as i32 {
        return Err(Failure::refused(format!("process {pid} is the asap agent itself"), "name another process"));
    }
    if info.parent == std::process::id() as i32 && info.name == "asap-watchdog" {
        return Err(Failure::refused(
            format!("process {pid} is the watchdog of the asap agent"),
            "name another process",
        ));
    }
    let Some(tid) = info::living_thread(pid) else {
        return Err(Failure::refused(
            format!(
                "process {pid} ({name}) has ended: it is a zombie, kept until its parent {} asks for it",
                info.parent
            ),
            "name a process that runs",
        ));
    };
    if info.kernel_thread {
        return Err(Failure::refused(
            format!("process {pid} ({name}) is a thread of the kernel"),
            "for the kernel use its own live patches (kpatch)",
        ));
    }
    if pid == 1 {
        return Err(Failure::refused(
            format!("process 1 ({name}) is the system's first process: if it ended, all would"),
            "restart the machine with the repaired package, or patch other processes",
        ));
    }
    if info.tracer != 0 {
        let tracer = ProcessInfo::of(info.tracer).map(|tracer| tracer.name).unwrap_or_default();
        return Err(Failure::refused(
            format!("process {pid} ({name}) is being traced by process {} ({tracer})", info.tracer),
            format!("end the debugger or tracer {} first, then try again", info.tracer),
        ));
    }
    let mut header = [0_u8; 20];
    fs::File::open(format!("/proc/{tid}/exe")).and_then(|mut file| file.read_exact(&mut header)).map_err(|error| {
        Failure::refused(format!("the executable of process {pid} ({name}) can't be read: {error}"), "run asap as root")
    })?;
    // EI_CLASS and e_machine (gABI, ELF header).
    let (class, machine) = (header[4], u16::from_le_bytes([header[18], header[19]]));
    if class != 2 || machine != 62 {
        let what = if class == 1 { "a 32-bit program" } else { "not an x86-64 program" };
        return Err(Failure::refused(
            format!(
                "process {pid} ({name}) is {what} (ELF class {class}, machine {machine}); asap repairs x86-64 processes"
            ),
            "restart this process with a repaired binary",
        ));
    }
    Ok(info)
}
