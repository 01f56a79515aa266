//! Tells when watched processes fork, execute a program, or end. Children of a watched process are watched from before
//! their first instruction, so that none is missed.

use super::{
    Ebpf, KernelError,
    object::{self, map_error},
    syscall::{self, PROGRAM_RAW_TRACEPOINT, ProgramType},
};
use asap_common::{LifeRecord, life};
use aya::maps::{Array, HashMap as BpfHashMap, Map, MapData, MapError, RingBuf};
use std::{
    ffi::CStr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// What happened to a watched process; ids are of the agent's pid namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LifeCycle {
    /// A child was made, and is watched; it may share its parent's memory (vfork, or a puppet of asap's own). It has not run yet when this is written.
    Fork {
        /// The process that forked.
        parent: i32,
        /// Its child.
        child: i32,
    },
    /// It runs another program.
    Exec {
        /// The process.
        pid: i32,
    },
    /// Its last thread has ended; it is no longer watched.
    Exit {
        /// The process.
        pid: i32,
    },
    /// Events or children found no room: look at the processes themselves.
    Lost {
        /// How many, since the start.
        total: u64,
    },
}

const PROGRAMS: [(&str, &CStr); 3] =
    [("on_fork", c"sched_process_fork"), ("on_exec", c"sched_process_exec"), ("on_exit", c"sched_process_exit")];

/// Watches processes. Dropping it ends the watch.
pub struct LifeCycles {
    watched: BpfHashMap<MapData, i32, i32>,
    events: RingBuf<MapData>,
    lost: Array<MapData, i64>,
    lost_told: i64,
    _links: Vec<OwnedFd>,
}

impl std::fmt::Debug for LifeCycles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LifeCycles").finish_non_exhaustive()
    }
}

impl Ebpf {
    /// Begins to watch: no process yet.
    ///
    /// # Errors
    /// The kernel refuses the programs, or lacks the tracepoints.
    pub fn life_cycles(&self) -> Result<LifeCycles, KernelError> {
        let watched = object::create_map("WATCHED")?;
        let events = object::create_map("LIVES")?;
        let lost = object::create_map("LIVES_LOST")?;
        let mut links = Vec::new();
        for (program, tracepoint) in PROGRAMS {
            let maps = [("LAYOUT", &self.layout), ("WATCHED", &watched), ("LIVES", &events), ("LIVES_LOST", &lost)];
            let what = ProgramType { kind: PROGRAM_RAW_TRACEPOINT, ..ProgramType::default() };
            let loaded = object::load_program(program, &maps, what)?;
            let link = syscall::open_raw_tracepoint(loaded.as_fd(), tracepoint).map_err(|source| {
                KernelError::Attach { program, place: tracepoint.to_string_lossy().into_owned(), source }
            })?;
            links.push(link);
        }
        Ok(LifeCycles {
            watched: BpfHashMap::try_from(Map::HashMap(watched)).map_err(|error| map_error("WATCHED", error))?,
            events: RingBuf::try_from(Map::RingBuf(events)).map_err(|error| map_error("LIVES", error))?,
            lost: Array::try_from(Map::Array(lost)).map_err(|error| map_error("LIVES_LOST", error))?,
            lost_told: 0,
            _links: links,
        })
    }
}

impl LifeCycles {
    /// Watches a process. Children that it has already are not watched: watch it first, then list and watch them.
    ///
    /// # Errors
    /// The map is full (16384 processes).
    pub fn watch(&mut self, pid: i32) -> Result<(), KernelError> {
        self.watched.insert(pid, 0, 0).map_err(|error| map_error("WATCHED", error))
    }

    /// No longer watches a process; its children stay watched.
    ///
    /// # Errors
    /// The map can't be written.
    pub fn unwatch(&mut self, pid: i32) -> Result<(), KernelError> {
        match self.watched.remove(&pid) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            Err(error) => Err(map_error("WATCHED", error)),
        }
    }

    /// Takes what has happened since the last call, in order.
    ///
    /// # Errors
    /// A map can't be read.
    pub fn events(&mut self) -> Result<Vec<LifeCycle>, KernelError> {
        let mut events = Vec::new();
        while let Some(item) = self.events.next() {
            let Some(record) = object::plain::<LifeRecord>(&item) else { continue };
            events.push(match record.kind {
                life::FORK => LifeCycle::Fork { parent: record.pid, child: record.other },
                life::EXEC => LifeCycle::Exec { pid: record.pid },
                _ => LifeCycle::Exit { pid: record.pid },
            });
        }
        let lost = self.lost.get(&0, 0).map_err(|error| map_error("LIVES_LOST", error))?;
        if lost != self.lost_told {
            self.lost_told = lost;
            events.push(LifeCycle::Lost { total: lost.unsigned_abs() });
        }
        Ok(events)
    }
}

/// Readable while events wait.
impl AsFd for LifeCycles {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}
