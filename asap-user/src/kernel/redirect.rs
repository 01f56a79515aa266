//! Sends calls of functions elsewhere without a write to the target's text: a uprobe program writes the instruction
//! pointer. Many kernels refuse such a program (6.1 and 6.18 do, 7.2 does not): ask first.

use super::{
    Ebpf, KernelError,
    attach::{Attached, Places, attach},
    object,
    syscall::{PROGRAM_UPROBE, ProgramType},
};
use aya::maps::MapData;
use std::{os::fd::AsFd, path::Path};

const PROGRAM: &str = "redirect";

/// Redirected functions of one process. Off at first; dropping it, or the end of the agent, sends calls to the old code again.
#[derive(Debug)]
pub struct Redirect {
    switch: MapData,
    _attached: Attached,
}

impl Ebpf {
    /// Whether the kernel takes the program.
    ///
    /// # Errors
    /// It does not, with the verifier's reason.
    pub fn redirect_available(&self) -> Result<(), KernelError> {
        available()
    }
}

/// As [`Ebpf::redirect_available`], for those who have nothing loaded.
pub fn available() -> Result<(), KernelError> {
    let switch = object::create_map("SWITCH")?;
    let what = ProgramType { kind: PROGRAM_UPROBE, ..ProgramType::default() };
    object::load_program(PROGRAM, &[("SWITCH", &switch)], what).map(drop)
}

impl Redirect {
    /// Puts probes on function entries, each given as offset in the file, with the address in the target of its new code.
    /// Calls still go to the old code: see [`Redirect::turn`].
    ///
    /// # Errors
    /// The kernel refuses the program; process or file are gone. Nothing is left behind.
    pub fn install(pid: i32, file: &Path, functions: &[(u64, u64)]) -> Result<Self, KernelError> {
        let switch = object::create_map("SWITCH")?;
        let (offsets, cookies): (Vec<u64>, Vec<u64>) = functions.iter().copied().unzip();
        let places = Places { pid, file, offsets: &offsets, cookies: &cookies };
        let attached = attach(PROGRAM, &[("SWITCH", &switch)], &places)?;
        Ok(Self { switch, _attached: attached })
    }

    /// Turns all of them at once to the new code, or back.
    ///
    /// # Errors
    /// The map can't be written; nothing has changed then.
    pub fn turn(&self, on: bool) -> Result<(), KernelError> {
        object::store(self.switch.fd().as_fd(), "SWITCH", 0, &u64::from(on))
    }
}
