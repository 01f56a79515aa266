//! Which code of a process goes into the sandbox, and which runs natively, with the reason. Pure.

use crate::{
    address::TargetAddr,
    process::maps::{Mapping, Maps},
};
use serde::{Deserialize, Serialize};

/// Code that runs natively.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NativeCode {
    /// First address.
    pub start: TargetAddr,
    /// Length, bytes.
    pub length: u64,
    /// What the kernel calls it; empty for anonymous memory.
    pub name: String,
    /// Why.
    pub reason: String,
}

impl NativeCode {
    pub(super) fn of(mapping: &Mapping, reason: impl Into<String>) -> Self {
        let name = mapping.name.clone();
        Self { start: mapping.range.start, length: mapping.len(), name, reason: reason.into() }
    }
}

/// Divides the executable mappings, less those that are ours.
pub(super) fn divide(maps: &Maps, is_ours: &dyn Fn(&Mapping) -> bool) -> (Vec<Mapping>, Vec<NativeCode>) {
    let (mut texts, mut native) = (Vec::new(), Vec::new());
    for mapping in maps.0.iter().filter(|mapping| mapping.executable && !is_ours(mapping)) {
        match reason(mapping) {
            None => texts.push(mapping.clone()),
            Some(reason) => native.push(NativeCode::of(mapping, reason)),
        }
    }
    (texts, native)
}

fn reason(mapping: &Mapping) -> Option<&'static str> {
    if ["[vdso]", "[vsyscall]", "[uprobes]", "[uprobes-trampoline]"].contains(&mapping.name.as_str()) {
        Some("it belongs to the kernel")
    } else if mapping.writable {
        Some("it is writable")
    } else if !mapping.is_file() {
        Some("it comes from no file: it may be rewritten at any time")
    } else if mapping.shared || mapping.name.starts_with("/memfd:") || mapping.name.starts_with("/dev/shm/") {
        Some("it is shared memory: it may be rewritten at any time")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_private_text_of_files_goes_in() {
        let maps = Maps::parse(
            "\
555555556000-555555560000 r-xp 00002000 fe:00 123                        /usr/sbin/a
555555560000-555555561000 r--p 0000c000 fe:00 123                        /usr/sbin/a
7f0000000000-7f0000001000 rwxp 00000000 00:00 0 
7f0000002000-7f0000003000 r-xp 00000000 00:00 0 
7f0000004000-7f0000005000 r-xs 00000000 00:01 55                         /memfd:jit (deleted)
7f0000006000-7f0000007000 r-xp 00000000 fe:00 124                        /lib/ours
7f0000008000-7f0000009000 rwxp 00000000 fe:00 125                        /lib/textrel
7ffff7fc1000-7ffff7fc3000 r-xp 00000000 00:00 0                          [vdso]
",
        );
        let (texts, native) = divide(&maps, &|mapping| mapping.name == "/lib/ours");
        assert_eq!(texts, maps.0[..1]);
        let reasons: Vec<_> = native.iter().map(|code| code.reason.split(':').next().unwrap_or_default()).collect();
        assert_eq!(
            reasons,
            [
                "it is writable",
                "it comes from no file",
                "it is shared memory",
                "it is writable",
                "it belongs to the kernel"
            ]
        );
    }
}
