//! How QEMU is called. One emulated machine: two CPUs, no network, no disk; a serial console for the kernel's words and a virtio
//! port for ours.

use crate::protocol::PORT;
use anyhow::{Context, Result};
use std::{path::Path, process::Command};

/// The emulator.
pub const QEMU: &str = "qemu-system-x86_64";

/// Who runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// QEMU itself. Slow, and works everywhere. One thread for all CPUs: with several, userfaultfd and ptrace were 30 to 100
    /// times slower.
    Emulation,
    /// The host's CPU. Only where the user says so: a /dev/kvm that opens need not work.
    Kvm,
}

/// The files of a machine.
#[derive(Clone, Copy, Debug)]
pub struct Files<'a> {
    /// The kernel.
    pub kernel: &'a Path,
    /// The first file system.
    pub root: &'a Path,
    /// Where the console is written to.
    pub console: &'a Path,
    /// The socket, which must be listened on already.
    pub socket: &'a Path,
}

/// QEMU's major version.
pub fn version() -> Result<u32> {
    let output = Command::new(QEMU).arg("--version").output();
    let output = output.with_context(|| format!("{QEMU} can't be started (Debian's package qemu-system-x86)"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let number = text.split("version ").nth(1).and_then(|rest| rest.split('.').next()?.parse().ok());
    number.with_context(|| format!("{QEMU} does not tell its version: {text}"))
}

/// The command that boots a guest and ends with it.
#[must_use]
pub fn command(files: &Files<'_>, accelerator: Accelerator, version: u32) -> Command {
    let mut qemu = Command::new(QEMU);
    let cpu = match accelerator {
        // Before version 8, cmpxchg16b leaves wrong flags behind under emulation: guests panicked at random.
        Accelerator::Emulation if version < 8 => "max,-cx16,la57=off",
        Accelerator::Emulation => "max,la57=off",
        Accelerator::Kvm => "host",
    };
    qemu.args(["-accel", if accelerator == Accelerator::Kvm { "kvm" } else { "tcg,thread=single" }]);
    qemu.args(["-cpu", cpu, "-smp", "2", "-m", "2G", "-machine", "q35", "-nodefaults", "-no-user-config"]);
    qemu.args(["-display", "none", "-no-reboot", "-nic", "none", "-kernel"]).arg(files.kernel);
    qemu.arg("-initrd").arg(files.root);
    // A panic ends the machine, and so does an oops: what comes after one proves nothing.
    qemu.args(["-append", "console=ttyS0 loglevel=5 panic=-1 oops=panic rdinit=/init"]);
    qemu.arg("-chardev").arg(format!("file,id=console,path={}", files.console.display()));
    qemu.args(["-serial", "chardev:console", "-device", "virtio-serial-pci"]);
    qemu.arg("-chardev").arg(format!("socket,id=port,path={}", files.socket.display()));
    qemu.arg("-device").arg(format!("virtserialport,chardev=port,name={PORT}"));
    qemu
}
