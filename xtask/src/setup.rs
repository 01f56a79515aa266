//! `cargo xtask setup`: checks what the tests, the demo and the benchmarks need, and installs what is missing.

use crate::command;
use anyhow::{Result, bail};
use std::{path::Path, process::Command};

/// A file that must be there, the Debian package that brings it, and what it is for.
const NEEDED: [(&str, &str, &str); 11] = [
    ("/usr/bin/gcc", "gcc", "test programs and patches"),
    ("/usr/bin/g++", "g++", "test programs and patches in C++"),
    ("/usr/bin/clang", "clang", "patches by another compiler"),
    ("/usr/include/stdio.h", "libc6-dev", "test programs"),
    ("/usr/bin/objcopy", "binutils", "tests of debug files"),
    ("/usr/bin/xz", "xz-utils", "tests of debug files"),
    ("/usr/bin/gdb", "gdb", "tests beside a debugger"),
    ("/usr/sbin/apache2", "apache2-bin", "the server of the demo"),
    ("/usr/include/apache2/httpd.h", "apache2-dev", "the demo's patch"),
    ("/usr/bin/wrk", "wrk", "load for the demo"),
    ("/usr/bin/unshare", "util-linux", "tests of namespaces"),
];

/// Installs what is missing; says each thing it does.
pub fn run() -> Result<()> {
    let missing: Vec<_> = NEEDED.iter().filter(|(file, ..)| !Path::new(file).exists()).collect();
    if missing.is_empty() {
        println!("setup: nothing to do");
        return Ok(());
    }
    for (file, package, purpose) in &missing {
        println!("setup: {file} is missing ({purpose}): package {package}");
    }
    let packages: Vec<&str> = missing.iter().map(|(_, package, _)| *package).collect();
    if !command::is_root() {
        bail!("not root: install them yourself: apt-get install {}", packages.join(" "));
    }
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!("this is no Debian system: install by hand what brings these files");
    }
    println!("setup: apt-get update");
    command::run(Command::new("apt-get").args(["update", "-qq"]))?;
    println!("setup: apt-get install {}", packages.join(" "));
    let mut install = Command::new("apt-get");
    install.args(["install", "-y", "-qq", "--no-install-recommends"]).args(&packages);
    // Packages must not start their services: the tests start their own, on loopback.
    install.env("DEBIAN_FRONTEND", "noninteractive").env("RUNLEVEL", "1").env("APACHE2_NOSTART", "1");
    install.stdout(std::process::Stdio::null());
    command::run(&mut install)?;
    let still: Vec<_> = NEEDED.iter().filter(|(file, ..)| !Path::new(file).exists()).map(|(file, ..)| *file).collect();
    if !still.is_empty() {
        bail!("still missing after installation: {}", still.join(", "));
    }
    println!("setup: done");
    Ok(())
}
