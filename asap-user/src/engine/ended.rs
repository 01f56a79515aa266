//! What guards met, and what was learned, in processes that are no more: for those who ask afterwards. Knows no process.

use crate::report::{SandboxFamily, SandboxReport};
use std::collections::VecDeque;

/// Most targets that are remembered.
const TARGETS_MOST: usize = 32;
/// Most of the last violations, of process ids, and of reasons that are remembered of one policy in one target.
const VIOLATIONS_MOST: usize = 1000;
const PIDS_MOST: usize = 64;
const REASONS_MOST: usize = 1000;

/// Targets that have ended, oldest first.
#[derive(Debug, Default)]
pub struct Ended(VecDeque<SandboxReport>);

impl Ended {
    /// Remembers a target: what its processes had to tell.
    pub fn note(&mut self, pid: i32, families: Vec<SandboxFamily>) {
        // Its number may have been another's.
        self.0.retain(|known| known.pid != pid);
        if families.is_empty() {
            return;
        }
        if self.0.len() == TARGETS_MOST {
            self.0.pop_front();
        }
        let notes = vec!["the target has ended; this is what was known of it".to_owned()];
        self.0.push_back(SandboxReport { pid, processes: Vec::new(), families, dump: None, total_us: 0, notes });
    }

    /// What is remembered of a target.
    #[must_use]
    pub fn of(&self, pid: i32) -> Option<&SandboxReport> {
        self.0.iter().find(|known| known.pid == pid)
    }
}

/// Adds what a family of processes had to tell to that of others that are no more.
pub fn add(past: &mut Vec<SandboxFamily>, family: SandboxFamily) {
    if family.policy.guards.is_empty() && family.learned.is_none() {
        return;
    }
    let is_same = |known: &&mut SandboxFamily| {
        known.policy == family.policy && known.learned.is_some() == family.learned.is_some()
    };
    let Some(known) = past.iter_mut().find(is_same) else {
        past.push(family);
        return;
    };
    known.pids.extend(&family.pids);
    known.pids.truncate(PIDS_MOST);
    known.pages += family.pages;
    known.fragments += family.fragments;
    for site in family.sites {
        let is_it = |other: &&mut crate::report::SiteCount| {
            (&other.kind, other.is_guarded, &other.reason) == (&site.kind, site.is_guarded, &site.reason)
        };
        match known.sites.iter_mut().find(is_it) {
            Some(other) => other.count += site.count,
            None => known.sites.push(site),
        }
    }
    for (what, times) in family.stops {
        *known.stops.entry(what).or_default() += times;
    }
    known.violations.extend(family.violations);
    let over = known.violations.len().saturating_sub(VIOLATIONS_MOST);
    known.violations.drain(..over);
    known.violation_count += family.violation_count;
    known.refused.extend(family.refused);
    known.refused.truncate(REASONS_MOST);
    if let (Some(known), Some(more)) = (&mut known.learned, &family.learned) {
        known.merge(more);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::{
        Violation,
        policy::{Action, Guard, Learned, Policy},
    };

    fn family(pid: i32, guards: &[Guard], violations: usize) -> SandboxFamily {
        let violation = Violation {
            time_ms: 0,
            pid,
            tid: pid,
            guard: Guard::Cfi,
            at: String::new(),
            attempted: String::new(),
            action: String::new(),
            stack: Vec::new(),
        };
        SandboxFamily {
            pids: vec![pid],
            policy: Policy::of(guards, Action::Kill),
            violations: vec![violation; violations],
            violation_count: violations as u64,
            stops: [("return".to_owned(), 2)].into(),
            ..SandboxFamily::default()
        }
    }

    #[test]
    fn processes_with_the_same_policy_are_told_together() {
        let mut past = Vec::new();
        add(&mut past, family(1, &[], 0));
        assert_eq!(past, [], "there is nothing to tell of a process without guards");
        add(&mut past, family(1, &[Guard::Cfi], 1));
        add(&mut past, family(2, &[Guard::Nx], 1));
        add(&mut past, family(3, &[Guard::Cfi], 2));
        assert_eq!(past.iter().map(|known| known.pids.clone()).collect::<Vec<_>>(), [vec![1, 3], vec![2]]);
        assert_eq!((past[0].violation_count, past[0].violations.len(), past[0].stops["return"]), (3, 3, 4));
        for pid in 0..2000 {
            add(&mut past, family(pid, &[Guard::Cfi], 2));
        }
        assert_eq!((past[0].violation_count, past[0].violations.len()), (4003, VIOLATIONS_MOST));
        assert!(past[0].violations.last().is_some_and(|last| last.pid == 1999), "the last ones are kept");
    }

    #[test]
    fn what_was_learned_is_learned_together() {
        let learned = |number: u64| {
            let mut learned = Learned::default();
            learned.observe(number, &[0; 6]);
            SandboxFamily { learned: Some(learned), ..SandboxFamily::default() }
        };
        let mut past = Vec::new();
        [0, 1, 3].into_iter().for_each(|number| add(&mut past, learned(number)));
        assert_eq!(past.len(), 1);
        assert_eq!(past[0].learned.as_ref().map(|learned| learned.calls().count()), Some(3));
    }

    #[test]
    fn the_last_targets_are_remembered() {
        let mut ended = Ended::default();
        for pid in 1..100 {
            ended.note(pid, vec![family(pid, &[Guard::Cfi], 1)]);
        }
        assert!(ended.of(50).is_none() && ended.of(99).is_some_and(|known| known.families.len() == 1));
        ended.note(99, Vec::new());
        assert!(ended.of(99).is_none(), "another process with that number had nothing to tell");
    }
}
