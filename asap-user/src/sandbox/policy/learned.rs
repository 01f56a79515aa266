//! What a program was seen to do, as a policy that allows just that.

use super::{ArgumentMatch, Guard, Policy, Rule, SyscallPolicy, SystemCall, Value, Verdict};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Arguments that choose what a call does, and take few values; the others are sizes, addresses, descriptors. None of a call that
/// a program makes often: a call whose arguments are looked at costs a trap each time.
const CHOICES: [(&str, &[u8]); 12] = [
    ("socket", &[0, 1, 2]),
    ("socketpair", &[0, 1, 2]),
    ("prctl", &[0]),
    ("arch_prctl", &[0]),
    ("personality", &[0]),
    ("ptrace", &[0]),
    ("unshare", &[0]),
    ("setns", &[1]),
    ("keyctl", &[0]),
    ("bpf", &[0]),
    ("seccomp", &[0]),
    ("quotactl", &[0]),
];

/// Most values that are kept of one argument; with more it is not asked for.
const MAX_VALUES: usize = 8;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Learned {
    calls: BTreeMap<SystemCall, Seen>,
}

/// What was seen of one call: per argument that chooses, its values; none: too many.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    choices: BTreeMap<u8, Option<BTreeSet<u32>>>,
}

impl Learned {
    /// Takes a call; `number` is what rax holds. Gives whether there is more to be learned of calls of this number: where not,
    /// they need not be looked at any more.
    pub fn observe(&mut self, number: u64, arguments: &[u64; 6]) -> bool {
        let Ok(number) = u16::try_from(number & u64::from(u32::MAX)) else { return true };
        let call = SystemCall(number);
        let seen = self.calls.entry(call).or_insert_with(|| {
            let choices = choices_of(call).iter().map(|&argument| (argument, Some(BTreeSet::new())));
            Seen { choices: choices.collect() }
        });
        for (&argument, values) in &mut seen.choices {
            let Some(known) = values else { continue };
            let value = arguments.get(usize::from(argument)).copied().unwrap_or(0) as u32;
            known.insert(value);
            if known.len() > MAX_VALUES {
                *values = None;
            }
        }
        seen.choices.values().any(Option::is_some)
    }

    /// Adds what another process was seen to do.
    pub fn merge(&mut self, other: &Self) {
        for (&call, theirs) in &other.calls {
            let Some(ours) = self.calls.get_mut(&call) else {
                self.calls.insert(call, theirs.clone());
                continue;
            };
            for (argument, values) in &mut ours.choices {
                match (values.as_mut(), theirs.choices.get(argument).and_then(Option::as_ref)) {
                    (Some(own), Some(more)) if own.union(more).count() <= MAX_VALUES => own.extend(more),
                    _ => *values = None,
                }
            }
        }
    }

    /// The calls that were seen.
    pub fn calls(&self) -> impl Iterator<Item = SystemCall> + '_ {
        self.calls.keys().copied()
    }

    /// The policy that allows what was seen, and whose `default` is for everything else.
    #[must_use]
    pub fn policy(&self, default: Verdict) -> Policy {
        let asks = |seen: &Seen| seen.choices.values().any(Option::is_some);
        let plain: Vec<SystemCall> = self.calls.iter().filter(|(_, seen)| !asks(seen)).map(|(call, _)| *call).collect();
        let mut rules = Vec::new();
        if !plain.is_empty() {
            rules.push(Rule { calls: plain, when: Vec::new(), action: Verdict::Allow });
        }
        for (&call, seen) in self.calls.iter().filter(|(_, seen)| asks(seen)) {
            let conditions = seen.choices.iter().filter_map(|(&argument, values)| {
                let equals = values.as_ref()?.iter().map(|&value| Value(value.into())).collect();
                Some(ArgumentMatch { equals: Some(equals), ..ArgumentMatch::of(argument, 32) })
            });
            rules.push(Rule { calls: vec![call], when: conditions.collect(), action: Verdict::Allow });
        }
        let syscalls = Some(SyscallPolicy { default, rules });
        Policy { guards: vec![Guard::Syscalls], syscalls, ..Policy::default() }
    }
}

fn choices_of(call: SystemCall) -> &'static [u8] {
    let known = call.name().and_then(|name| CHOICES.iter().find(|(of, _)| *of == name));
    known.map_or(&[], |(_, arguments)| arguments)
}
