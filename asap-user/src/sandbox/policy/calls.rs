//! Names and numbers of system calls and errors, x86-64. A number is written where a kernel is newer than the table of names.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};
use syscalls::x86_64::Sysno;

/// A system call's number, below 65536.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SystemCall(pub u16);

impl SystemCall {
    /// Its name, where it is known.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        Sysno::new(self.0.into()).map(|known| known.name())
    }
}

impl fmt::Display for SystemCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "{}", self.0),
        }
    }
}

impl FromStr for SystemCall {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(number) = text.parse() {
            return Ok(Self(number));
        }
        let known = text.parse::<Sysno>().ok().and_then(|known| u16::try_from(known.id()).ok());
        known.map(Self).ok_or_else(|| {
            format!("`{text}` is no system call of x86-64 that is known here; write the number of one that is newer")
        })
    }
}

impl TryFrom<String> for SystemCall {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<SystemCall> for String {
    fn from(call: SystemCall) -> Self {
        call.to_string()
    }
}

/// The name of what rax says, or its number.
#[must_use]
pub fn call_name(number: u64) -> String {
    u16::try_from(number).map_or_else(|_| number.to_string(), |number| SystemCall(number).to_string())
}

/// The largest error number that the kernel returns (include/linux/err.h).
const MAX_ERRNO: u16 = 4095;

/// The name of an error number, or the number.
#[must_use]
pub fn errno_name(number: u16) -> String {
    syscalls::Errno::new(number.into()).name().map_or_else(|| number.to_string(), str::to_owned)
}

/// The number of an error, by name or number.
pub(super) fn errno_of(text: &str) -> Result<u16, String> {
    let named = || (1..MAX_ERRNO).find(|&number| syscalls::Errno::new(number.into()).name() == Some(text));
    match text.parse::<u16>() {
        Ok(number) if (1..=MAX_ERRNO).contains(&number) => Ok(number),
        Ok(number) => Err(format!("{number} is no error number; they are from 1 to {MAX_ERRNO}")),
        Err(_) => named().ok_or_else(|| format!("`{text}` is no error that is known here; try EPERM, or a number")),
    }
}
