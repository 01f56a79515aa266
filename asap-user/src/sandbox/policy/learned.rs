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

/// What was seen of one call: its arguments that choose. (No map: numbers are no keys in JSON.)
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    choices: Vec<Choice>,
}

/// An argument, and the values that it had; none: too many.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Choice {
    argument: u8,
    values: Option<BTreeSet<u32>>,
}

impl Seen {
    /// Whether calls with other arguments would be others.
    fn asks(&self) -> bool {
        self.choices.iter().any(|choice| choice.values.is_some())
    }
}

impl Learned {
    /// Takes a call; `number` is what rax holds. Gives whether there is more to be learned of calls of this number: where not,
    /// they need not be looked at any more.
    pub fn observe(&mut self, number: u64, arguments: &[u64; 6]) -> bool {
        let Ok(number) = u16::try_from(number & u64::from(u32::MAX)) else { return true };
        let call = SystemCall(number);
        let seen = self.calls.entry(call).or_insert_with(|| {
            let choices = choices_of(call).iter();
            Seen { choices: choices.map(|&argument| Choice { argument, values: Some(BTreeSet::new()) }).collect() }
        });
        for choice in &mut seen.choices {
            let Some(known) = &mut choice.values else { continue };
            let value = arguments.get(usize::from(choice.argument)).copied().unwrap_or(0) as u32;
            known.insert(value);
            if known.len() > MAX_VALUES {
                choice.values = None;
            }
        }
        seen.asks()
    }

    /// Adds what another process was seen to do.
    pub fn merge(&mut self, other: &Self) {
        for (&call, theirs) in &other.calls {
            let Some(ours) = self.calls.get_mut(&call) else {
                self.calls.insert(call, theirs.clone());
                continue;
            };
            for choice in &mut ours.choices {
                let other = theirs.choices.iter().find(|other| other.argument == choice.argument);
                match (choice.values.as_mut(), other.and_then(|other| other.values.as_ref())) {
                    (Some(own), Some(more)) if own.union(more).count() <= MAX_VALUES => own.extend(more),
                    _ => choice.values = None,
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
        let plain: Vec<SystemCall> =
            self.calls.iter().filter(|(_, seen)| !seen.asks()).map(|(call, _)| *call).collect();
        let mut rules = Vec::new();
        if !plain.is_empty() {
            rules.push(Rule { calls: plain, when: Vec::new(), action: Verdict::Allow });
        }
        for (&call, seen) in self.calls.iter().filter(|(_, seen)| seen.asks()) {
            let conditions = seen.choices.iter().filter_map(|choice| {
                let equals = choice.values.as_ref()?.iter().map(|&value| Value(value.into())).collect();
                Some(ArgumentMatch { equals: Some(equals), ..ArgumentMatch::of(choice.argument, 32) })
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
