//! Makes the system of a test what it is asked to be: calls that fail, folders that are empty, switches of the kernel.

use anyhow::{Context, Result, ensure};
use nix::{
    libc::{self, BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter},
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use std::{fs, io};
use vm_tests::protocol::Setting;

/// What is done in the test's process, before it becomes the test: prepared here, where memory may be allocated.
pub struct Prepared {
    filter: Vec<sock_filter>,
    emptied: Vec<String>,
}

/// Switches the kernel; the rest is done by [`Prepared::enter`].
pub fn prepare(setting: &Setting) -> Result<Prepared> {
    for (path, text) in &setting.written {
        let now = || fs::read_to_string(path).unwrap_or_default();
        if now().trim_end() == text || now().contains(&format!("[{text}]")) {
            continue;
        }
        fs::write(path, text).with_context(|| format!("{text} can't be written to {path}, which has {}", now()))?;
    }
    for path in &setting.emptied {
        ensure!(fs::metadata(path).is_ok_and(|meta| meta.is_dir()), "{path} is no folder here");
    }
    Ok(Prepared { filter: filter(&setting.forbidden_calls), emptied: setting.emptied.clone() })
}

/// A program for seccomp(2): the calls fail with EPERM.
fn filter(calls: &[u32]) -> Vec<sock_filter> {
    let statement = |code: u32, k| sock_filter { code: code as u16, jt: 0, jf: 0, k };
    if calls.is_empty() {
        return Vec::new();
    }
    let mut filter = vec![statement(BPF_LD | BPF_W | BPF_ABS, 0)];
    for &call in calls {
        filter.push(sock_filter { code: (BPF_JMP | BPF_JEQ | BPF_K) as u16, jt: 0, jf: 1, k: call });
        filter.push(statement(BPF_RET | BPF_K, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32));
    }
    filter.push(statement(BPF_RET | BPF_K, libc::SECCOMP_RET_ALLOW));
    filter
}

impl Prepared {
    /// To be called between fork and exec.
    pub fn enter(&self) -> io::Result<()> {
        if !self.emptied.is_empty() {
            unshare(CloneFlags::CLONE_NEWNS)?;
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
            for path in &self.emptied {
                mount(Some("tmpfs"), path.as_str(), Some("tmpfs"), MsFlags::empty(), Some("mode=755"))?;
            }
        }
        if !self.filter.is_empty() {
            let program = libc::sock_fprog { len: self.filter.len() as u16, filter: self.filter.as_ptr().cast_mut() };
            // SAFETY: the program outlives the call, which reads it. Root needs no NO_NEW_PRIVS.
            let done = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
            if done != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }
}
