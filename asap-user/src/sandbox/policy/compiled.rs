//! The policy of system calls in the form in which it is asked: a byte per number for the guard in the process, which lets most
//! calls pass without asking, and a judge for the others.

use super::{Action, Rule, SyscallPolicy, SystemCall, Verdict};
use std::collections::BTreeMap;

/// Numbers that the table knows apart: it is indexed by the lower 16 bits.
pub const NUMBERS: usize = 1 << 16;

/// Marks calls by the rules of another pointer size (arch/x86/include/uapi/asm/unistd.h, `__X32_SYSCALL_BIT`).
const X32: u64 = 0x4000_0000;
/// Numbers that are such calls even where they are not marked (arch/x86/entry/syscalls/syscall_64.tbl: "by a historical design
/// error").
const X32_ONLY: std::ops::RangeInclusive<u64> = 512..=547;

/// Without these a program can neither return from a signal handler nor end nor go on after a stop, so that a policy has to name
/// them in order to forbid them.
const ESSENTIAL: [&str; 4] = ["rt_sigreturn", "exit", "exit_group", "restart_syscall"];

/// What becomes of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It is made.
    Allow,
    /// It is not made; the program sees this error number. To be reported.
    Errno(u16),
    /// To be reported. With [`Action::Log`] it is made, else not.
    Do(Action),
}

impl From<Verdict> for Decision {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Allow => Self::Allow,
            Verdict::Errno(number) => Self::Errno(number),
            Verdict::Do(action) => Self::Do(action),
        }
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Compiled {
    table: Vec<u8>,
    default: Decision,
    rules: BTreeMap<SystemCall, Vec<Rule>>,
}

impl Compiled {
    /// Of a policy that has been checked.
    #[must_use]
    pub fn of(policy: &SyscallPolicy) -> Self {
        let default = Decision::from(policy.default);
        let mut rules: BTreeMap<SystemCall, Vec<Rule>> = BTreeMap::new();
        for rule in &policy.rules {
            let mut calls = rule.calls.clone();
            calls.sort_unstable();
            calls.dedup();
            for call in calls {
                rules.entry(call).or_default().push(Rule { calls: Vec::new(), ..rule.clone() });
            }
        }
        for call in ESSENTIAL.iter().filter_map(|name| name.parse().ok()) {
            let allow = Rule { calls: Vec::new(), when: Vec::new(), action: Verdict::Allow };
            rules.entry(call).or_insert_with(|| vec![allow]);
        }
        let mut table = vec![u8::from(default != Decision::Allow); NUMBERS];
        for (call, rules) in &rules {
            let mut decided = false;
            let before = rules.iter().take_while(|rule| !std::mem::replace(&mut decided, rule.when.is_empty()));
            let always = before.map(|rule| rule.action).all(|action| action == Verdict::Allow);
            let falls_through = rules.iter().all(|rule| !rule.when.is_empty());
            let asks = !always || (falls_through && default != Decision::Allow);
            table[usize::from(call.0)] = u8::from(asks);
        }
        for number in X32_ONLY {
            table[number as usize] = 1;
        }
        Self { table, default, rules }
    }

    /// By the lower 16 bits of the number: 0 for a call that is always allowed, 1 for one to be judged.
    #[must_use]
    pub fn table(&self) -> &[u8] {
        &self.table
    }

    /// What becomes of a call: `number` is what rax holds.
    #[must_use]
    pub fn judge(&self, number: u64, arguments: &[u64; 6]) -> Decision {
        // The kernel looks at 32 bits of the number (arch/x86/entry/common.c, `do_syscall_64`).
        let number = number & u64::from(u32::MAX);
        if number & X32 != 0 || X32_ONLY.contains(&number) {
            // Names and arguments of those are others; hardly a kernel has them, and then this is what it says.
            return Decision::Errno(libc::ENOSYS as u16);
        }
        let Ok(number) = u16::try_from(number) else { return self.default };
        let rules = self.rules.get(&SystemCall(number)).map_or(&[][..], Vec::as_slice);
        let fits = |rule: &&Rule| rule.when.iter().all(|condition| condition.fits(arguments));
        rules.iter().find(fits).map_or(self.default, |rule| rule.action.into())
    }
}
