//! Runs a program natively and translated, and says what the guards stopped.

use crate::translations::{Guards, Translations};
use std::{
    collections::BTreeMap,
    io::Write,
    os::unix::{net::UnixListener, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{LazyLock, OnceLock},
};

/// How long a program may run, seconds.
const PATIENCE: u32 = 300;

static TRANSLATIONS: LazyLock<Translations> = LazyLock::new(Translations::default);

pub fn translations() -> &'static Translations {
    &TRANSLATIONS
}

/// A program with its arguments and what it reads.
#[derive(Clone, Debug, Default)]
pub struct Program {
    pub command: Vec<String>,
    pub input: Vec<u8>,
    pub directory: Option<PathBuf>,
}

impl Program {
    pub fn of(command: &[&str]) -> Self {
        Self { command: command.iter().map(|word| (*word).to_owned()).collect(), ..Self::default() }
    }

    pub fn reading(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = input.into();
        self
    }

    fn start(&self, settings: &[(&str, &Path)]) -> Output {
        let mut command = Command::new("timeout");
        command.arg("--signal=KILL").arg(PATIENCE.to_string()).args(["env", "LC_ALL=C"]);
        let debugger = std::env::var("ASAP_TEST_DEBUGGER").unwrap_or_default();
        for (name, value) in settings {
            let setting = format!("{name}={}", value.display());
            if *name == "LD_PRELOAD" && !debugger.is_empty() {
                // Not into the debugger itself.
                command.args(["gdb", "-nx", "-batch", "-ex", &format!("set exec-wrapper env {setting}"), "-ex", "run"]);
                debugger.split(';').for_each(|line| {
                    command.args(["-ex", line]);
                });
                command.arg("--args");
            } else {
                command.arg(setting);
            }
        }
        command.args(&self.command);
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        // SAFETY: between fork and exec only personality(2) is called, which changes the child alone.
        unsafe {
            command.pre_exec(|| {
                // Addresses that do not change from run to run let translations be used again.
                let persona = libc::personality(0xffff_ffff);
                libc::personality((persona | libc::ADDR_NO_RANDOMIZE) as libc::c_ulong);
                Ok(())
            });
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut input = child.stdin.take().expect("a pipe");
        let bytes = self.input.clone();
        let feed = std::thread::spawn(move || drop(input.write_all(&bytes)));
        let output = child.wait_with_output().expect("the program ends");
        let _ = feed.join();
        output
    }

    /// As it is.
    pub fn natively(&self) -> Output {
        self.start(&[])
    }

    /// Translated, with what the guards stopped: reason, image and instruction, destination, and how often.
    pub fn translated(&self, guards: Guards) -> (Output, BTreeMap<Stopped, u64>) {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (socket, log) = (directory.path().join("socket"), directory.path().join("log"));
        std::fs::write(&log, "").expect("a log");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let (output, images) = std::thread::scope(|scope| {
            let service = scope.spawn(|| translations().serve(&listener, guards));
            let output =
                self.start(&[("ASAP_TEST_SOCKET", &socket), ("ASAP_TEST_LOG", &log), ("LD_PRELOAD", preload())]);
            // An empty request ends the service.
            drop(std::os::unix::net::UnixStream::connect(&socket));
            (output, service.join().expect("translations"))
        });
        let mut stopped = BTreeMap::new();
        for line in std::fs::read_to_string(&log).expect("a log").lines() {
            let mut words = line.split(' ').map(|word| u64::from_str_radix(word, 16).unwrap_or(u64::MAX));
            let mut next = || words.next().unwrap_or(u64::MAX);
            let (reason, image, native, about) = (next(), next(), next(), next());
            // The kernel's code and ours are not among the destinations.
            if reason == 1 && !images.iter().any(|image| image.contains(&about)) {
                continue;
            }
            *stopped.entry(Stopped { reason, image, native, about }).or_default() += 1;
        }
        (output, stopped)
    }
}

/// What a guard stopped.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stopped {
    /// 0 a return, 1 a target, 2 a system call.
    pub reason: u64,
    /// Load bias.
    pub image: u64,
    /// Instruction in the image.
    pub native: u64,
    /// Destination, or number of the system call.
    pub about: u64,
}

impl std::fmt::Debug for Stopped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let reason = ["return", "target", "syscall"].get(self.reason as usize).unwrap_or(&"?");
        write!(f, "{reason} in {:#x}+{:#x} to {:#x}", self.image, self.native, self.about)
    }
}

/// The library that `preload.c` becomes.
fn preload() -> &'static Path {
    static BUILT: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    extern "C" fn remove() {
        if let Some((directory, _)) = BUILT.get() {
            let _ = std::fs::remove_dir_all(directory.path());
        }
    }
    &BUILT
        .get_or_init(|| {
            let directory = tempfile::tempdir().expect("a temporary directory");
            let library = directory.path().join("preload.so");
            let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/translated/preload.c");
            let source = if source.exists() { source } else { Path::new(file!()).with_file_name("preload.c") };
            let mut gcc = Command::new("gcc");
            gcc.args(["-O1", "-mgeneral-regs-only", "-fno-stack-protector", "-fno-tree-loop-distribute-patterns"]);
            let status = gcc.args(["-fPIC", "-shared", "-o"]).arg(&library).arg(&source).status().expect("gcc");
            assert!(status.success(), "preload.c");
            // SAFETY: `remove` is there for the life of the program, and takes nothing.
            unsafe { libc::atexit(remove) };
            (directory, library)
        })
        .1
}
