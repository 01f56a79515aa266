//! Hears at once when processes in care fork or run another program (eBPF), so that an agent at rest need not look. That
//! processes end is told by their pidfds. Where the kernel takes no eBPF programs the agent looks from time to time.

use super::{check::Observers, target::Target};
use crate::kernel::{KernelError, LifeCycle, LifeCycles};
use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::{AsFd, BorrowedFd},
    time::{Duration, Instant},
};

/// A new child is left alone until so long after the last of them was made: most of those that are to run another program do
/// it at once, and have no use for a helper.
const QUIET: Duration = Duration::from_millis(100);
/// And at most so long after the first.
const LONGEST: Duration = Duration::from_secs(1);
/// Loading the programs takes some 20 ms, in which no request is worked at: that is left until nobody has asked for so long.
const REST: Duration = Duration::from_millis(300);
/// Without events: how often to look for what has changed, and how often for new children.
const LOOK: Duration = Duration::from_millis(200);
const DISCOVER: Duration = Duration::from_secs(2);

/// Watches the processes of all targets.
#[derive(Debug, Default)]
pub struct LifeWatch {
    cycles: Option<LifeCycles>,
    /// The kernel does not tell.
    is_deaf: bool,
    /// Since when there has been something to watch, and no request.
    rests_since: Option<Instant>,
    watched: BTreeSet<i32>,
    /// Heard of, and not known yet whether they belong to a target.
    strangers: BTreeSet<i32>,
    /// When to look for children.
    due: Option<Due>,
    discovered: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Due {
    first: Instant,
    last: Instant,
}

impl Due {
    fn at(self) -> Instant {
        (self.last + QUIET).min(self.first + LONGEST)
    }
}

impl LifeWatch {
    /// Readable when there is something to [`Self::hear`].
    #[must_use]
    pub fn alarm(&self) -> Option<BorrowedFd<'_>> {
        self.cycles.as_ref().map(AsFd::as_fd)
    }

    /// Takes what has happened.
    pub fn hear(&mut self, targets: &BTreeMap<i32, Target>) {
        let Some(cycles) = &mut self.cycles else { return };
        let heard = match cycles.events() {
            Ok(events) => events.into_iter().try_for_each(|event| self.take(event, targets)),
            Err(error) => Err(error),
        };
        if let Err(error) = heard {
            self.give_up(&error);
        }
    }

    fn take(&mut self, event: LifeCycle, targets: &BTreeMap<i32, Target>) -> Result<(), KernelError> {
        match event {
            LifeCycle::Fork { parent, child } => {
                let of_interest = |target: &Target| target.wants_children_of(parent) && !target.has_helper(child);
                let in_care = targets.values().any(|target| target.processes.contains_key(&parent));
                if in_care && !targets.values().any(of_interest) {
                    return self.unwatch(child);
                }
                self.strangers.insert(child);
                self.is_due();
            }
            LifeCycle::Exec { pid } => {
                self.strangers.insert(pid);
                self.is_due();
            }
            LifeCycle::Exit { pid } => {
                self.watched.remove(&pid);
                self.strangers.remove(&pid);
            }
            LifeCycle::Lost { .. } => self.is_due(),
        }
        Ok(())
    }

    fn is_due(&mut self) {
        let now = Instant::now();
        self.due.get_or_insert(Due { first: now, last: now }).last = now;
    }

    fn unwatch(&mut self, pid: i32) -> Result<(), KernelError> {
        self.watched.remove(&pid);
        self.cycles.as_mut().map_or(Ok(()), |cycles| cycles.unwatch(pid))
    }

    fn give_up(&mut self, error: &KernelError) {
        tracing::info!(%error, "forks and execs of targets are not told: the agent looks for them from time to time");
        *self = Self { is_deaf: true, ..Self::default() };
    }

    /// A request was worked at.
    pub fn was_disturbed(&mut self) {
        self.rests_since = None;
    }

    /// Watches just the processes in care; whoever is new is to be looked at for children once more.
    pub fn follow(&mut self, targets: &BTreeMap<i32, Target>, observers: &Observers) {
        if targets.is_empty() && self.cycles.is_none() {
            self.rests_since = None;
            return;
        }
        if self.cycles.is_none() && !self.is_deaf {
            if self.rests_since.get_or_insert_with(Instant::now).elapsed() < REST {
                return;
            }
            match observers.life_cycles() {
                Some(Ok(cycles)) => self.cycles = Some(cycles),
                Some(Err(error)) => self.give_up(&error),
                None => self.is_deaf = true,
            }
        }
        if self.cycles.is_some()
            && let Err(error) = self.follow_in_kernel(targets)
        {
            self.give_up(&error);
        }
    }

    fn follow_in_kernel(&mut self, targets: &BTreeMap<i32, Target>) -> Result<(), KernelError> {
        let in_care: BTreeSet<i32> = targets.values().flat_map(|target| target.processes.keys().copied()).collect();
        for &pid in in_care.difference(&self.watched.clone()) {
            if let Some(cycles) = &mut self.cycles {
                cycles.watch(pid)?;
            }
            self.watched.insert(pid);
            if targets.values().any(|target| target.wants_children_of(pid)) {
                self.is_due();
            }
        }
        for &pid in self.watched.clone().difference(&in_care) {
            self.unwatch(pid)?;
        }
        Ok(())
    }

    /// Whether it is time to look for children.
    #[must_use]
    pub fn wants_discovery(&self) -> bool {
        if self.cycles.is_some() {
            self.due.is_some_and(|due| due.at() <= Instant::now())
        } else if !self.is_deaf {
            false
        } else {
            self.discovered.is_none_or(|last| last.elapsed() >= DISCOVER)
        }
    }

    /// Children were looked for: who was not taken into care is none of ours.
    pub fn discovered(&mut self, targets: &BTreeMap<i32, Target>) {
        (self.due, self.discovered) = (None, Some(Instant::now()));
        for pid in std::mem::take(&mut self.strangers) {
            let in_care = targets.values().any(|target| target.processes.contains_key(&pid));
            if !in_care && let Err(error) = self.unwatch(pid) {
                return self.give_up(&error);
            }
        }
    }

    /// After how long there is something to do although nothing was heard.
    #[must_use]
    pub fn next_look(&self, targets: &BTreeMap<i32, Target>) -> Option<Duration> {
        if targets.is_empty() {
            None
        } else if self.cycles.is_some() {
            self.due.map(|due| due.at().saturating_duration_since(Instant::now()))
        } else if let Some(since) = self.rests_since.filter(|_| !self.is_deaf) {
            Some(REST.saturating_sub(since.elapsed()))
        } else {
            Some(LOOK)
        }
    }
}
