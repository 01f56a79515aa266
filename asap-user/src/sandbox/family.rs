//! A process whose code is translated, with those that it has forked since: they have the same code at the same places, and one
//! reader answers at all their curtains. A thread of the agent, the watchman, looks after those whom a guard stops.

use super::{
    area::Area,
    code::{Code, Figures, Wanted},
    library,
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
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, Condvar, Mutex, PoisonError, Weak},
    time::Duration,
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
    /// Threads whose stacks could not be walked to their ends when code came into the sandbox: of some of their functions it is not
    /// known where they return to.
    pub doubtful: Mutex<HashSet<i32>>,
    /// New code is being mapped.
    pub news: News,
}

/// Code that a thread has just mapped: the thread waits until it is in the sandbox.
pub struct News {
    bell: EventFd,
    turns: Mutex<Turns>,
    looked: Condvar,
}

/// Numbers of requests to look.
#[derive(Debug, Default)]
struct Turns {
    /// The last that was made.
    asked: u64,
    /// The last that was made before the look that is under way.
    heard: u64,
    /// The last that was answered.
    answered: u64,
}

impl News {
    fn new() -> io::Result<Self> {
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { bell, turns: Mutex::default(), looked: Condvar::new() })
    }

    /// Readable when somebody waits for a look.
    #[must_use]
    pub fn alarm(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Somebody looks from now on.
    pub fn hear(&self) {
        let _ = self.bell.read();
        let mut turns = lock(&self.turns);
        turns.heard = turns.asked;
    }

    /// Somebody has looked.
    pub fn was_looked_at(&self) {
        let mut turns = lock(&self.turns);
        turns.answered = turns.heard;
        self.looked.notify_all();
    }

    /// Has the engine look, and waits for that; false: it had no time.
    #[must_use]
    pub fn wait(&self, limit: Duration) -> bool {
        let mut turns = lock(&self.turns);
        turns.asked += 1;
        let ours = turns.asked;
        let _ = self.bell.write(1);
        let waited = self.looked.wait_timeout_while(turns, limit, |turns| turns.answered < ours);
        waited.is_ok_and(|(_, timeout)| !timeout.timed_out())
    }
}

impl Shared {
    /// Whether a system call needs no asking, once nothing more is to be learned of it.
    #[must_use]
    pub fn lets_pass(&self, number: u64) -> bool {
        let by_policy =
            self.calls.as_ref().and_then(|calls| calls.table().get(number as usize)).is_none_or(|&byte| byte == 0);
        by_policy && !super::judge::MAKES_CODE.contains(&(number as i64))
    }

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
        // Who maps code waits until it is in the sandbox.
        super::judge::MAKES_CODE.iter().for_each(|&number| table[number as usize] = 1);
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

impl Drop for Family {
    fn drop(&mut self) {
        let mut families = FAMILIES.lock().unwrap_or_else(PoisonError::into_inner);
        families.retain(|family| family.strong_count() > 0);
        if families.is_empty() {
            library::clear();
        }
    }
}

/// What the guards of `policy` need.
#[must_use]
pub fn wanted(policy: &Policy, learns: bool) -> Wanted {
    Wanted {
        shadow: policy.has(Guard::ShadowStack),
        targets: policy.has(Guard::Cfi) || policy.has(Guard::Nx),
        syscalls: !policy.guards.is_empty() || learns,
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
        let shared = Arc::new(Shared {
            code,
            area,
            policy: policy.clone(),
            calls,
            record,
            ours: Mutex::default(),
            doubtful: Mutex::default(),
            news: News::new().map_err(|error| watchman_failed(pid, error))?,
        });
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

    /// Tells `unwinder` of the frames of its code.
    pub fn teach(&self, unwinder: &mut Unwinder) {
        for text in &lock(&self.shared.code).texts {
            unwinder.add_image(&text.known.image, text.range.clone(), text.bias);
        }
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
