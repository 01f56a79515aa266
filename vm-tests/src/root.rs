//! The guest's file system: the tests' programs, what they call, and the libraries of both, all from this machine.

use crate::{
    archive::Archive,
    protocol::{GUEST, HOSTED},
};
use anyhow::{Context, Result, ensure};
use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

/// What tests call. Those marked with a question mark may be missing: such tests skip themselves.
const TOOLS: &str = "sh unshare nsenter mount umount sleep kill cat cp mv rm ln ls mkdir rmdir chmod chown touch true false \
                     env id ps? xz? head tail grep sed tr wc sort uniq printf echo readlink stat setpriv? prlimit? taskset? \
                     timeout dd seq date uname";

/// Libraries that programs compiled by tests need, and those that are loaded by name at run time.
const LIBRARIES: [&str; 5] = ["libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", "libpthread.so.0"];
const LIBRARY_FOLDERS: [&str; 2] = ["/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu"];

const LINKS: [(&str, &str); 5] =
    [("/bin", "usr/bin"), ("/sbin", "usr/sbin"), ("/lib", "usr/lib"), ("/lib64", "usr/lib64"), ("/var/run", "../run")];

const TEXTS: [(&str, &str); 5] = [
    ("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n"),
    ("/etc/group", "root:x:0:\nnogroup:x:65534:\n"),
    ("/etc/hosts", "127.0.0.1 localhost\n"),
    ("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n"),
    ("/etc/hostname", "guest\n"),
];

/// Programs of a run.
#[derive(Clone, Copy, Debug)]
pub struct Programs<'a> {
    /// Process 1 of the guest.
    pub guest: &'a Path,
    /// The program under test, which tests find where cargo built it.
    pub asap: &'a Path,
    /// Test programs.
    pub tests: &'a [PathBuf],
}

/// Where a test program is in the guest.
#[must_use]
pub fn place(test: &Path) -> String {
    format!("{GUEST}/bin/{}", test.file_name().unwrap_or_default().to_string_lossy())
}

/// Puts the file system together, but for a kernel's modules. Uses `scratch` for files in between.
pub fn build(programs: &Programs<'_>, scratch: &Path) -> Result<Archive> {
    let mut root = Root { archive: Archive::default(), libraries: BTreeSet::new() };
    for (path, to) in LINKS {
        root.archive.link(path, to)?;
    }
    for folder in ["/usr/bin", "/usr/sbin", "/usr/lib64", "/proc", "/sys", "/dev", "/run", "/mnt", "/root", "/etc"] {
        root.archive.folder(folder, 0o755)?;
    }
    for folder in ["/tmp", &format!("{GUEST}/tmp"), "/var/tmp"] {
        root.archive.folder(folder, 0o1777)?;
    }
    root.archive.device("/dev/console", 5, 1)?;
    root.archive.device("/dev/null", 1, 3)?;
    for (path, text) in TEXTS {
        root.archive.file(path, 0o644, text.into())?;
    }
    for (number, program) in programs.tests.iter().chain([&programs.asap.to_owned()]).enumerate() {
        // Without debug information: half the memory, and nothing of what runs.
        let lean = scratch.join(format!("program-{number}"));
        let mut strip = Command::new("strip");
        let stripped = strip.args(["--strip-debug", "-o"]).arg(&lean).arg(program).output();
        ensure!(stripped.is_ok_and(|output| output.status.success()), "{} can't be stripped", program.display());
        root.add(&lean, &place(program), 0o755)?;
    }
    let asap = programs.asap.to_str().context("the program has a strange name")?;
    root.archive.link(asap, &place(programs.asap))?;
    root.add(programs.guest, "/init", 0o755)?;
    for name in HOSTED {
        root.archive.link(&format!("/usr/bin/{name}"), "/init")?;
    }
    for tool in TOOLS.split_ascii_whitespace() {
        root.tool(tool)?;
    }
    for name in LIBRARIES {
        let found =
            LIBRARY_FOLDERS.iter().map(|folder| format!("{folder}/{name}")).find(|path| Path::new(path).exists());
        root.library(&found.with_context(|| format!("the library {name} is not installed"))?)?;
    }
    Ok(root.archive)
}

struct Root {
    archive: Archive,
    libraries: BTreeSet<String>,
}

impl Root {
    /// Adds a file, and the libraries it needs.
    fn add(&mut self, file: &Path, path: &str, mode: u32) -> Result<()> {
        let bytes = fs::read(file).with_context(|| format!("{} can't be read", file.display()))?;
        if bytes.starts_with(b"\x7fELF") {
            for library in libraries_of(file)? {
                self.library(&library)?;
            }
        }
        self.archive.file(path, mode, bytes)
    }

    fn library(&mut self, path: &str) -> Result<()> {
        if !self.libraries.insert(path.to_owned()) {
            return Ok(());
        }
        // What a distribution keeps in /lib is in /usr/lib, by a link.
        let place = if path.starts_with("/lib") { format!("/usr{path}") } else { path.to_owned() };
        self.add(Path::new(path), &place, 0o755)
    }

    fn tool(&mut self, tool: &str) -> Result<()> {
        let name = tool.trim_end_matches('?');
        let folders = ["/usr/bin", "/bin", "/usr/sbin", "/sbin"].map(|folder| Path::new(folder).join(name));
        match folders.iter().find(|path| path.exists()) {
            Some(path) => {
                let mode = fs::metadata(path)?.permissions().mode() & 0o755;
                self.add(path, &format!("/usr/bin/{name}"), mode)
            }
            None => {
                ensure!(tool.ends_with('?'), "{name} is not installed");
                Ok(())
            }
        }
    }
}

/// The libraries that the dynamic linker would load for a program.
fn libraries_of(file: &Path) -> Result<Vec<String>> {
    let output = Command::new("ldd").arg(file).output().context("ldd can't be started")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let words = text.lines().filter_map(|line| line.split_ascii_whitespace().find(|word| word.starts_with('/')));
    // "name => not found" would be found out in the guest, where it is harder to see.
    ensure!(!text.contains("not found"), "{} needs a library that is not here:\n{text}", file.display());
    Ok(words.map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_come_with_what_they_need() {
        let scratch = tempfile::tempdir().expect("a folder");
        let own = std::env::current_exe().expect("this test");
        let programs = Programs { guest: &own, asap: Path::new("/bin/true"), tests: std::slice::from_ref(&own) };
        let archive = build(&programs, scratch.path()).expect("built");
        for path in ["/init", "/usr/bin/gcc", "/usr/bin/unshare", "/usr/lib64/ld-linux-x86-64.so.2", &place(&own)] {
            assert!(archive.has(path), "{path}");
        }
        assert!(archive.has("/usr/lib/x86_64-linux-gnu/libc.so.6"));
    }
}
