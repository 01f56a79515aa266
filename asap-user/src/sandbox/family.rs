//! A process whose code is translated, with those that it has forked since: they have the same code at the same places, and one
//! reader answers at all their curtains. A thread of the agent, the watchman, looks after those whom a guard stops.

use super::{
    area::Area,
    code::{Code, Figures, Wanted},
    policy::{Compiled, Guard, Learned, Policy},
    violation::Violation,
    watchman::{self, Watchman},
};
use crate::{
    address::TargetAddr,
    dbt::SyscallTable,
    process::{
        curtain::{Curtain, lock},
        gate::GateError,
        maps::{Mapping, Maps},
        puppet::Puppet,
    },
    quiesce::unwind::Unwinder,
};
use std::{
    collections::{BTreeMap, VecDeque},
    io,
    sync::{Arc, Mutex, PoisonError, Weak},
};

/// Most violations that are kept; older ones are counted only.
const VIOLATIONS_MOST: usize = 1000;

/// What happened so far.
#[derive(Debug, Default)]
pub struct Record {
    /// The last violations.
    pub violations: VecDeque<Violation>,
    /// All of them.
    pub violation_count: u64,
    /// How often a guard has stopped a thread, by what it was about to do.
    pub stops: BTreeMap<&'static str, u64>,
    /// System calls that were seen.
    pub learned: Option<Learned>,
}

impl Record {
    /// Notes a violation.
    pub fn add(&mut self, violation: Violation) {
        self.violation_count += 1;
        if self.violations.len() == VIOLATIONS_MOST {
            self.violations.pop_front();
        }
        self.violations.push_back(violation);
    }
}

/// What the threads that work for a family share.
pub struct Shared {
    /// Its translated code.
    pub code: Arc<Mutex<Code>>,
    /// Tables and shadows.
    pub area: Area,
    /// What is allowed.
    pub policy: Policy,
    /// The same of system calls.
    pub calls: Option<Compiled>,
    /// What happened.
    pub record: Mutex<Record>,
    /// Where executable mappings begin that are ours: the helper's home, and patches.
    pub ours: Mutex<Vec<TargetAddr>>,
}

impl Shared {
    /// The table of system calls: zero where the guard need not ask.
    #[must_use]
    pub fn call_table(&self) -> Vec<u8> {
        let mut table = match &self.calls {
            Some(compiled) => compiled.table().to_vec(),
            None => vec![0; SyscallTable::SIZE as usize],
        };
        table.resize(SyscallTable::SIZE as usize, 1);
        if lock(&self.record).learned.is_some() {
            table.fill(1);
        }
        if self.policy.has(Guard::Nx) {
            super::judge::MAKES_CODE.iter().for_each(|&number| table[number as usize] = 1);
        }
        table
    }
}

/// See the module.
pub struct Family {
    /// Names it among all families.
    pub id: u64,
    /// The process that entered.
    pub pid: i32,
    /// Its curtain.
    pub curtain: Curtain,
    /// What is shared.
    pub shared: Arc<Shared>,
    watchman: Option<Watchman>,
}

impl std::fmt::Debug for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Family").field("id", &self.id).field("pid", &self.pid).finish_non_exhaustive()
    }
}

static FAMILIES: Mutex<Vec<Weak<Family>>> = Mutex::new(Vec::new());

/// What the guards of `policy` need.
#[must_use]
pub fn wanted(policy: &Policy, learns: bool) -> Wanted {
    Wanted {
        shadow: policy.has(Guard::ShadowStack),
        targets: policy.has(Guard::Cfi) || policy.has(Guard::Nx),
        syscalls: policy.has(Guard::Syscalls) || policy.has(Guard::Nx) || learns,
    }
}

impl Family {
    /// Of one process, by its puppet. Without guards nothing is translated.
    ///
    /// # Errors
    /// Threads can't be made to wait.
    pub fn new(
        puppet: &mut Puppet,
        pid: i32,
        id: u64,
        policy: &Policy,
        area: Area,
        learned: Option<Learned>,
    ) -> Result<Arc<Self>, GateError> {
        let code = Arc::new(Mutex::new(Code::default()));
        let is_guarded = !wanted(policy, learned.is_some()).is_nothing();
        let pages = is_guarded.then(|| Arc::clone(&code) as Arc<Mutex<dyn crate::process::curtain::Pages>>);
        let curtain = Curtain::new(puppet, pid, pages)?;
        let calls = policy.syscalls.as_ref().filter(|_| policy.has(Guard::Syscalls)).map(Compiled::of);
        let record = Mutex::new(Record { learned, ..Record::default() });
        let shared = Arc::new(Shared { code, area, policy: policy.clone(), calls, record, ours: Mutex::default() });
        let watchman = match is_guarded {
            true => {
                let bell = curtain.caught();
                Some(watchman::start(pid, bell, Arc::clone(&shared)).map_err(|error| watchman_failed(pid, error))?)
            }
            false => None,
        };
        let family = Arc::new(Self { id, pid, curtain, shared, watchman });
        let mut families = FAMILIES.lock().unwrap_or_else(PoisonError::into_inner);
        families.retain(|family| family.strong_count() > 0);
        families.push(Arc::downgrade(&family));
        Ok(family)
    }

    /// The family of that name, if this agent has it.
    #[must_use]
    pub fn find(id: u64) -> Option<Arc<Self>> {
        let families = FAMILIES.lock().unwrap_or_else(PoisonError::into_inner);
        families.iter().filter_map(Weak::upgrade).find(|family| family.id == id && !family.curtain.is_dead())
    }

    /// Notes which executable mappings are ours.
    pub fn note_ours(&self, maps: &Maps, is_ours: &dyn Fn(&Mapping) -> bool) {
        let ours = maps.0.iter().filter(|mapping| mapping.executable && is_ours(mapping));
        *lock(&self.shared.ours) = ours.map(|mapping| mapping.range.start).collect();
    }

    /// What knows the frames of its code.
    #[must_use]
    pub fn unwinder(&self) -> Unwinder {
        let mut unwinder = Unwinder::new();
        for text in &lock(&self.shared.code).texts {
            unwinder.add_image(&text.known.image, text.range.clone(), text.bias);
        }
        unwinder
    }

    /// Something is guarded.
    #[must_use]
    pub fn is_guarded(&self) -> bool {
        self.watchman.is_some()
    }

    /// Figures of all its texts.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let mut all = Figures::default();
        for text in &lock(&self.shared.code).texts {
            let figures = text.figures();
            all.pages += figures.pages;
            all.fragments += figures.fragments;
            all.counts.merge(&figures.counts);
            all.refused.extend(figures.refused);
        }
        all
    }
}

fn watchman_failed(pid: i32, error: io::Error) -> GateError {
    GateError::Userfaultfd { pid, step: "starting the watchman", error }
}
