//! Policy files of the sandbox: read, compiled, and judged by.

use crate::sandbox::policy::{Compiled, Decision, Policy};

pub(super) fn check(bytes: &[u8]) {
    let Ok(policy) = Policy::read(&String::from_utf8_lossy(bytes)) else { return };
    let text = policy.write().expect("a policy can be written");
    assert_eq!(Policy::read(&text).expect("what was written can be read"), policy);
    let Some(syscalls) = &policy.syscalls else { return };
    let compiled = Compiled::of(syscalls);
    for number in (0..512).chain([1 << 16, 0x4000_0000, 0x4000_0001, u64::MAX]) {
        for arguments in [[0; 6], [u64::MAX; 6], [1, 2, 3, 4, 5, 6], [0x8000_0000; 6]] {
            let decision = compiled.judge(number, &arguments);
            // The translated code asks nobody where the table says so.
            let asks = usize::try_from(number)
                .ok()
                .and_then(|number| compiled.table().get(number))
                .is_none_or(|&asks| asks != 0);
            assert!(asks || decision == Decision::Allow, "{number}: {decision:?}");
        }
    }
}
