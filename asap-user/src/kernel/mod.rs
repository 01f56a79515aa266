//! What the kernel offers beyond system calls on the target: eBPF programs (who is inside a function, where threads are,
//! what processes come and go), and the test of which mechanisms work here.
//!
//! Not for the target's memory or threads (`process`), and without any notion of patches. The programs only look and
//! count; all of them end when the agent's file descriptors close, so a killed agent leaves nothing behind (P1, P5).

mod attach;
mod btf;
mod features;
mod layout;
mod lifecycle;
mod object;
mod redirect;
mod snapshot;
mod syscall;
#[cfg(test)]
mod tests;
pub mod uffd;

pub use features::{Feature, features};
pub use lifecycle::{LifeCycle, LifeCycles};
pub use redirect::{Moment, RedirectLink, RedirectTable};
pub use snapshot::{Series, Snapshot, TaskSnapshot, UserRegs};

use aya::maps::MapData;
use snapshot::Snapshots;
use std::{io, os::fd::AsFd, path::PathBuf};

/// Why something of the kernel can't be had.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The kernel describes none of its types.
    #[error(
        "the kernel's type information ({path}) can't be read: {source}; eBPF needs a kernel with CONFIG_DEBUG_INFO_BTF"
    )]
    NoTypes {
        /// The file.
        path: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The kernel's types are not as expected.
    #[error("the kernel's type information does not tell {what}; asap works without eBPF here")]
    UnknownType {
        /// What was looked for.
        what: String,
    },
    /// The embedded object is not as expected: a fault of the build.
    #[error("the embedded eBPF object is unusable: {0}; rebuild it with `cargo xtask ebpf`")]
    Object(String),
    /// A program was refused.
    #[error("the kernel refuses the eBPF program `{program}`: {source}{}{}", if verdict.is_empty() { "" } else { ": " }, verdict)]
    Program {
        /// Its name.
        program: String,
        /// Why.
        source: io::Error,
        /// The verifier's last line.
        verdict: String,
    },
    /// A map could not be made or used.
    #[error("eBPF map `{map}`: {message}")]
    Map {
        /// Its name.
        map: String,
        /// Why.
        message: String,
    },
    /// A program could not be attached.
    #[error("can't attach the eBPF program `{program}` to {place}: {source}")]
    Attach {
        /// Its name.
        program: &'static str,
        /// Where to.
        place: String,
        /// Why.
        source: io::Error,
    },
    /// The file to be probed has no usable name.
    #[error("{} can't be probed: {reason}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// Why.
        reason: String,
    },
    /// A name in the BPF file system can't be given or opened.
    #[error("{} in the BPF file system can't be used: {source}", path.display())]
    Pin {
        /// The name.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An iterator over threads failed.
    #[error("can't list the threads of process {pid}: {source}")]
    Iterator {
        /// The process.
        pid: i32,
        /// Why.
        source: io::Error,
    },
}

/// The loaded eBPF programs. Load it once: finding the kernel's layout costs some milliseconds. Can be shared by threads.
#[derive(Debug)]
pub struct Ebpf {
    /// Where the running kernel keeps what the programs read.
    layout: MapData,
    snapshots: Snapshots,
}

impl Ebpf {
    /// Finds the kernel's layout and loads the task iterator; the other programs are loaded when they are wanted.
    ///
    /// # Errors
    /// The kernel has no BTF, or refuses eBPF (rights, lockdown, policy).
    pub fn load() -> Result<Self, KernelError> {
        syscall::raise_memlock();
        let types = layout::find()?;
        let layout_map = object::create_map("LAYOUT")?;
        object::store(layout_map.fd().as_fd(), "LAYOUT", 0, &types.layout)?;
        let snapshots = Snapshots::load(&layout_map, types.iterator)?;
        // Ids are told as the agent's pid namespace knows them; how deep that is, is asked of a thread of the agent.
        let own = snapshots.own_level()?;
        object::store(layout_map.fd().as_fd(), "LAYOUT", 0, &asap_common::Layout { agent_level: own, ..types.layout })?;
        Ok(Self { layout: layout_map, snapshots })
    }

    /// Registers and stacks of the threads of process `pid`, with up to `stack_bytes` (at most 16 KiB) of each stack. Nobody
    /// is stopped: what is told of a thread counts if it is [`TaskSnapshot::settled`]. Within a `series`, threads that have
    /// not run since are only named.
    ///
    /// Threads that are started meanwhile may be missing, and the iterator ends early where a thread vanishes under it:
    /// whoever needs all of them compares [`Snapshot::visited`] with how many there were before. A process that does not exist
    /// has no threads.
    ///
    /// # Errors
    /// The iterator can't be read.
    pub fn snapshot(&self, pid: i32, stack_bytes: usize, series: Option<Series>) -> Result<Snapshot, KernelError> {
        self.snapshots.read(pid, stack_bytes, series)
    }

    /// Those threads of process `pid` that have children, and how many threads were looked at; see [`Ebpf::snapshot`] for when
    /// that is all of them.
    ///
    /// # Errors
    /// The iterator can't be read.
    pub fn parents(&self, pid: i32) -> Result<(Vec<i32>, usize), KernelError> {
        self.snapshots.parents(pid)
    }

    /// Begins a series of snapshots.
    #[must_use]
    pub fn series(&self) -> Series {
        self.snapshots.series()
    }
}
