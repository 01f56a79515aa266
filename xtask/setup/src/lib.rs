//! `cargo xtask setup`: checks what building, tests, demo and benchmarks need, and installs what is missing. It speaks on standard
//! error: standard output belongs to the task that called it.
//!
//! It is itself built before anything is installed: what it depends on may need Rust and a linker, nothing else.

use anyhow::{Context, Result, bail, ensure};
use std::{
    fs,
    io::{ErrorKind, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    process::{Command, Stdio},
};

/// Whether this is root.
#[must_use]
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// What is needed.
struct Need {
    /// A file that must be there.
    file: &'static str,
    /// The Debian package that brings it.
    package: &'static str,
    /// What for.
    purpose: &'static str,
    /// Only what root alone can run needs it.
    root_only: bool,
}

const fn need(file: &'static str, package: &'static str, purpose: &'static str) -> Need {
    Need { file, package, purpose, root_only: false }
}

const fn need_of_root(file: &'static str, package: &'static str, purpose: &'static str) -> Need {
    Need { file, package, purpose, root_only: true }
}

const NEEDED: [Need; 21] = [
    need("/usr/bin/gcc", "gcc", "test programs and patches"),
    need("/usr/bin/g++", "g++", "test programs and patches in C++"),
    need("/usr/bin/clang", "clang", "patches by another compiler, and libclang for the bindings of userfaultfd"),
    need("/usr/include/stdio.h", "libc6-dev", "test programs"),
    need("/usr/bin/objcopy", "binutils", "tests of debug files"),
    need("/usr/bin/xz", "xz-utils", "tests of debug files"),
    need("/usr/bin/make", "make", "tests of builds"),
    need("/usr/bin/cmake", "cmake", "tests of builds"),
    need("/usr/bin/meson", "meson", "tests of builds"),
    need("/usr/bin/libtoolize", "libtool", "tests of builds"),
    need("/usr/bin/automake", "automake", "tests of builds"),
    need("/usr/bin/dh", "debhelper", "tests of builds, and builds of Debian's packages"),
    need("/usr/bin/unshare", "util-linux", "tests of namespaces"),
    need_of_root("/usr/bin/gdb", "gdb", "tests beside a debugger"),
    need_of_root("/usr/sbin/apache2", "apache2-bin", "the server of the demo"),
    need_of_root("/usr/include/apache2/httpd.h", "apache2-dev", "the demo's patch"),
    need_of_root("/usr/include/apr-1.0/apr.h", "libapr1-dev", "the demo's patch"),
    need_of_root("/usr/bin/qemu-system-x86_64", "qemu-system-x86", "tests on other kernels"),
    need_of_root("/usr/sbin/nginx", "nginx", "a server of the soak test"),
    need_of_root("/usr/bin/redis-server", "redis-server", "a server of the soak test"),
    need_of_root("/usr/bin/wrk", "wrk", "load for the demo"),
];

fn missing() -> Vec<&'static Need> {
    NEEDED.iter().filter(|need| !Path::new(need.file).exists()).collect()
}

/// The packages of needs, each once.
fn packages(needs: &[&Need]) -> Vec<&'static str> {
    let mut packages: Vec<_> = needs.iter().map(|need| need.package).collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

/// Installs what is missing; says each thing it does.
///
/// # Errors
/// Something is missing that can't be installed.
pub fn run() -> Result<()> {
    let missing = missing();
    if missing.is_empty() {
        eprintln!("setup: nothing to do");
        return Ok(());
    }
    for Need { file, package, purpose, .. } in &missing {
        eprintln!("setup: {file} is missing ({purpose}): package {package}");
    }
    let packages = packages(&missing);
    let by_hand = format!("apt-get install --no-install-recommends {}", packages.join(" "));
    if !is_root() {
        if missing.iter().all(|need| need.root_only) {
            eprintln!("setup: what only root can run would need: {by_hand}");
            return Ok(());
        }
        bail!("something that is needed is missing, and only root can install it: {by_hand}");
    }
    ensure!(
        Path::new("/usr/bin/apt-get").exists(),
        "this is no Debian system: install by hand what brings the files named above"
    );
    install_packages(&packages)?;
    let still: Vec<_> = self::missing().iter().map(|need| need.file).collect();
    ensure!(still.is_empty(), "still missing after installation: {}", still.join(", "));
    eprintln!("setup: done");
    Ok(())
}

/// Installs Debian packages, without starting the services that come with them.
///
/// # Errors
/// apt-get says so.
pub fn install_packages(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    let policy = NoServices::declare()?;
    let installed = install(packages);
    drop(policy);
    installed
}

/// Installs the packages among these that are missing.
pub fn packages_for(purpose: &str, packages: &[&str]) -> Result<()> {
    let is_installed = |package: &&str| {
        let status = Command::new("dpkg-query").args(["-W", "-f", "${db:Status-Status}", package]).output();
        status.is_ok_and(|output| output.stdout == b"installed")
    };
    let mut missing: Vec<&str> = packages.iter().copied().filter(|package| !is_installed(package)).collect();
    missing.sort_unstable();
    missing.dedup();
    if !missing.is_empty() {
        eprintln!("setup: missing for {purpose}: {}", missing.join(" "));
    }
    install_packages(&missing)
}

/// apt-get with words of its own only where it fails.
fn apt_get(arguments: &[&str]) -> Result<()> {
    eprintln!("setup: apt-get {}", arguments.join(" "));
    let mut apt = Command::new("apt-get");
    // Another apt may be at work (a machine that has just booted): wait for it.
    apt.args(["-qq", "-o", "DPkg::Lock::Timeout=300"]).args(arguments);
    apt.env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
    let output = apt.output().context("apt-get can't be started")?;
    if !output.status.success() {
        eprint!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        bail!("apt-get {} ended with {}", arguments.join(" "), output.status);
    }
    Ok(())
}

fn install(packages: &[&str]) -> Result<()> {
    apt_get(&["update"])?;
    apt_get(&[&["install", "--yes", "--no-install-recommends"], packages].concat())
}

/// While this lives, packages that are installed do not start services (invoke-rc.d(8)): the demo starts its own server, on
/// loopback, and nobody asked for another.
struct NoServices {
    ours: bool,
}

const POLICY: &str = "/usr/sbin/policy-rc.d";
/// What makes a left-over of ours known.
const SIGNATURE: &str = "# of `cargo xtask setup`: exists only while it installs packages";

impl NoServices {
    fn declare() -> Result<Self> {
        let mut options = fs::File::options();
        match options.write(true).create_new(true).mode(0o755).open(POLICY) {
            Ok(mut file) => {
                let policy = Self { ours: true };
                write!(file, "#!/bin/sh\n{SIGNATURE}\nexit 101\n")
                    .with_context(|| format!("{POLICY} can't be written"))?;
                Ok(policy)
            }
            // The administrator's, which stays; or one of a run that was killed, which is put right.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                Ok(Self { ours: fs::read_to_string(POLICY).is_ok_and(|text| text.contains(SIGNATURE)) })
            }
            Err(error) => Err(error).with_context(|| format!("{POLICY} can't be made")),
        }
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = fs::remove_file(POLICY)
        {
            eprintln!("setup: {POLICY} can't be removed ({error}): please do, services won't start otherwise");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_named_once_each_and_sorted() {
        let needs = [need("/b", "b", ""), need("/a", "a", ""), need_of_root("/c", "a", "")];
        assert_eq!(packages(&needs.iter().collect::<Vec<_>>()), ["a", "b"]);
    }

    /// On a fresh machine this program is built before it has installed a compiler for C, libclang or the like.
    #[test]
    fn what_set_up_is_built_from_needs_nothing_that_it_would_install() {
        let mut tree = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        // With programs that build scripts use.
        tree.args([
            "tree",
            "--package",
            "xtask-setup",
            "--edges",
            "normal,build",
            "--prefix",
            "none",
            "--format",
            "{p}",
        ]);
        let output = tree.output().expect("cargo tree");
        let tree = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let names: std::collections::BTreeSet<&str> =
            tree.lines().filter_map(|line| line.split_ascii_whitespace().next()).collect();
        assert!(names.contains("xtask-setup") && names.contains("libc"), "{tree}");
        for helper in ["autotools", "bindgen", "cc", "clang-sys", "cmake", "pkg-config", "vcpkg"] {
            assert!(!names.contains(helper), "a build script uses {helper}: cargo tree --invert {helper}");
        }
    }
}
