//! What is checked in a process that is in the sandbox, and what is done about it: plain data, read from TOML, written as TOML.
//! Whoever writes one is told line and key of what is wrong. Not for checking anything: see [`Compiled`] for system calls.

mod calls;
mod compiled;
mod learned;
mod matches;
mod place;

pub use calls::{SystemCall, call_name, errno_name};
pub use compiled::{Compiled, Decision};
pub use learned::Learned;
pub use matches::{ArgumentMatch, Value};

use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt, str::FromStr};

/// Longest policy, bytes.
const MAX_TEXT: usize = 1 << 20;
/// Most rules.
const MAX_RULES: usize = 4096;

/// What is wrong with a policy.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// It is not TOML, or a key or value is not known; with line and column.
    #[error("{0}")]
    Text(#[from] toml::de::Error),
    /// It is too long.
    #[error("the policy has {0} bytes; more than {MAX_TEXT} are not read")]
    TooLong(usize),
    /// Its parts do not fit together.
    #[error("{}{key}: {what}", line.map(|line| format!("line {line}: ")).unwrap_or_default())]
    Unfit {
        /// The line, where it came as text.
        line: Option<usize>,
        /// The key, as in `syscalls.rules[0].when[1]`.
        key: String,
        /// What does not fit.
        what: String,
    },
}

/// What can be checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Guard {
    /// Functions return to where they were called from.
    ShadowStack,
    /// Indirect calls and jumps go to the beginnings of functions and to known destinations.
    Cfi,
    /// Nothing is executed that is writable, or was.
    Nx,
    /// System calls are those that the policy allows.
    Syscalls,
}

impl Guard {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::ShadowStack, Self::Cfi, Self::Nx, Self::Syscalls];

    /// As it is written.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::ShadowStack => "shadow-stack",
            Self::Cfi => "cfi",
            Self::Nx => "nx",
            Self::Syscalls => "syscalls",
        }
    }
}

impl fmt::Display for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is done when a guard meets something. It is reported in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// The thread goes on.
    Log,
    /// The process is ended, by SIGKILL.
    #[default]
    Kill,
    /// The thread waits where it is, for somebody to look at it.
    Stop,
}

/// What becomes of a program that the process starts by execve(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnExec {
    /// It is in the sandbox, too.
    Stay,
    /// It runs natively.
    #[default]
    Leave,
}

/// What becomes of a process whose agent has died, and of code that can't be guarded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fail {
    /// It runs on, unguarded.
    #[default]
    Open,
    /// It does not run on.
    Closed,
}

/// A policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Policy {
    /// What is checked.
    pub guards: Vec<Guard>,
    /// Programs that the process starts.
    #[serde(default)]
    pub on_exec: OnExec,
    /// When the agent is gone.
    #[serde(default)]
    pub fail: Fail,
    /// What the guards do; [`Action::Kill`] where nothing is said. That of system calls is said by their rules.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub actions: BTreeMap<Guard, Action>,
    /// System calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub syscalls: Option<SyscallPolicy>,
}

/// Which system calls may be made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SyscallPolicy {
    /// What becomes of a call that no rule fits.
    pub default: Verdict,
    /// The first rule that fits decides.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<Rule>,
}

/// What becomes of certain calls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Rule {
    /// The calls, by name.
    pub calls: Vec<SystemCall>,
    /// All of this must be so of their arguments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub when: Vec<ArgumentMatch>,
    /// Then this becomes of them.
    pub action: Verdict,
}

/// What becomes of a system call: "allow", "log" (allowed, and reported), "errno NAME" (not made, reported; the program sees that
/// error), "kill" or "stop".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Verdict {
    /// It is made.
    #[default]
    Allow,
    /// It fails with this error number (1..=4095).
    Errno(u16),
    /// A guard's action.
    Do(Action),
}

impl FromStr for Verdict {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "allow" => Ok(Self::Allow),
            "log" => Ok(Self::Do(Action::Log)),
            "kill" => Ok(Self::Do(Action::Kill)),
            "stop" => Ok(Self::Do(Action::Stop)),
            _ => match text.strip_prefix("errno ") {
                Some(name) => calls::errno_of(name.trim()).map(Self::Errno),
                None => Err(format!("`{text}` is no action; known are allow, log, kill, stop, and errno NAME")),
            },
        }
    }
}

impl TryFrom<String> for Verdict {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Verdict> for String {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Allow => "allow".to_owned(),
            Verdict::Errno(number) => format!("errno {}", errno_name(number)),
            Verdict::Do(Action::Log) => "log".to_owned(),
            Verdict::Do(Action::Kill) => "kill".to_owned(),
            Verdict::Do(Action::Stop) => "stop".to_owned(),
        }
    }
}

impl Policy {
    /// These guards, which do `action`; all system calls are allowed.
    #[must_use]
    pub fn of(guards: &[Guard], action: Action) -> Self {
        let mut sorted = guards.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        let actions = sorted.iter().filter(|guard| **guard != Guard::Syscalls).map(|&guard| (guard, action)).collect();
        let syscalls = sorted.contains(&Guard::Syscalls).then(SyscallPolicy::default);
        Self { guards: sorted, actions, syscalls, ..Self::default() }
    }

    /// Reads a policy.
    ///
    /// # Errors
    /// With line and key of what is wrong.
    pub fn read(text: &str) -> Result<Self, PolicyError> {
        if text.len() > MAX_TEXT {
            return Err(PolicyError::TooLong(text.len()));
        }
        let policy: Self = toml::from_str(text)?;
        match policy.check() {
            Err(PolicyError::Unfit { key, what, .. }) => {
                Err(PolicyError::Unfit { line: place::line_of(text, &key), key, what })
            }
            checked => checked.map(|()| policy),
        }
    }

    /// Whether its parts fit together; for one that did not come as text.
    ///
    /// # Errors
    /// What does not fit.
    pub fn check(&self) -> Result<(), PolicyError> {
        let unfit = |key: &str, what: String| Err(PolicyError::Unfit { line: None, key: key.to_owned(), what });
        for (index, guard) in self.guards.iter().enumerate() {
            if self.guards[..index].contains(guard) {
                return unfit("guards", format!("`{guard}` is there twice"));
            }
        }
        for guard in self.actions.keys() {
            if *guard == Guard::Syscalls {
                return unfit(
                    "actions.syscalls",
                    "what system calls do is said by [syscalls] and its rules".to_owned(),
                );
            }
            if !self.guards.contains(guard) {
                return unfit(&format!("actions.{guard}"), format!("`{guard}` is not among the guards"));
            }
        }
        let Some(syscalls) = &self.syscalls else {
            return match self.guards.contains(&Guard::Syscalls) {
                true => unfit("guards", "`syscalls` needs a table [syscalls] with a `default`".to_owned()),
                false => Ok(()),
            };
        };
        if !self.guards.contains(&Guard::Syscalls) {
            return unfit("syscalls", "`syscalls` is not among the guards".to_owned());
        }
        if syscalls.rules.len() > MAX_RULES {
            return unfit("syscalls.rules", format!("{} rules; at most {MAX_RULES}", syscalls.rules.len()));
        }
        for (number, rule) in syscalls.rules.iter().enumerate() {
            let key = format!("syscalls.rules[{number}]");
            if rule.calls.is_empty() {
                return unfit(&format!("{key}.calls"), "it names no call".to_owned());
            }
            for (index, condition) in rule.when.iter().enumerate() {
                if let Err(what) = condition.check() {
                    return unfit(&format!("{key}.when[{index}]"), what);
                }
            }
        }
        Ok(())
    }

    /// What a guard other than that of system calls does.
    #[must_use]
    pub fn action(&self, guard: Guard) -> Action {
        self.actions.get(&guard).copied().unwrap_or_default()
    }

    /// Whether it is checked.
    #[must_use]
    pub fn has(&self, guard: Guard) -> bool {
        self.guards.contains(&guard)
    }

    /// As text.
    ///
    /// # Errors
    /// None is known.
    pub fn write(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }
}

#[cfg(test)]
mod tests;
