//! Ways to replace a function in a running process.

use crate::{agent::Agent, apache::Apache, command, http, owned::Owned};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ChildStdin, ChildStdout, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// What is to be replaced, and by what.
pub struct Job {
    pub function: String,
    /// For asap.
    pub object: PathBuf,
    /// The same source as a shared library, for the others.
    pub library: PathBuf,
}

/// Replaces functions, and takes that back.
pub trait Way {
    /// For the table.
    fn name(&self) -> String;
    /// From nothing to replaced: whatever has to be attached is.
    fn replace(&mut self, pid: i32, job: &Job) -> Result<()>;
    /// Back to nothing.
    fn undo(&mut self, pid: i32, job: &Job) -> Result<()>;
    /// Whom it must be told about, to repair a whole server.
    fn processes(&self, server: &Apache) -> Vec<i32> {
        server.processes()
    }
}

/// Beside an agent that is running.
pub struct Asap(Agent);

impl Asap {
    pub fn start(asap: &Path, folder: &Path) -> Result<Self> {
        Agent::start(asap, folder).map(Self)
    }
}

impl Way for Asap {
    fn name(&self) -> String {
        "asap".into()
    }

    fn replace(&mut self, pid: i32, job: &Job) -> Result<()> {
        let object = job.object.to_str().context("a path in UTF-8")?;
        self.0.ask(&["attach", "--pid", &pid.to_string()])?;
        self.0.ask(&["patch", "--function", &job.function, object]).map(drop)
    }

    fn undo(&mut self, _: i32, _: &Job) -> Result<()> {
        self.0.ask(&["detach", "--revert"]).map(drop)
    }

    fn processes(&self, server: &Apache) -> Vec<i32> {
        vec![server.pid()]
    }
}

/// From PyPI, in a Python environment of its own below the target folder.
pub struct Frida {
    _driver: Owned,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    version: String,
}

impl Frida {
    /// Installs it if need be, and starts it.
    pub fn start() -> Result<Self> {
        let home = command::top().join("target/peers/python");
        if !home.join("bin/python").exists() {
            println!("peers: installing Frida from PyPI into {}", home.display());
            command::run(Command::new("python3").args(["-m", "venv"]).arg(&home)).context("Debian's python3-venv")?;
        }
        let python = home.join("bin/python");
        if !Command::new(&python).args(["-c", "import frida"]).stderr(Stdio::null()).status()?.success() {
            command::run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "frida"]))?;
        }
        let script = command::top().join("xtask/fixtures/peers/with_frida.py");
        let mut driver = Owned::spawn(Command::new(python).arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()))?;
        let input = driver.stdin().context("a pipe")?;
        let output = BufReader::new(driver.stdout().context("a pipe")?);
        let mut frida = Self { _driver: driver, input, output, version: String::new() };
        frida.version = frida.answer()?["version"].as_str().context("a version")?.to_owned();
        Ok(frida)
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        ensure!(self.output.read_line(&mut line)? > 0, "Frida's driver ended");
        serde_json::from_str(&line).with_context(|| format!("Frida's driver said {line}"))
    }

    fn ask(&mut self, line: &str) -> Result<()> {
        writeln!(self.input, "{line}")?;
        let answer = self.answer()?;
        if answer["ok"] != true {
            bail!("{}", answer["error"].as_str().unwrap_or_default().lines().next().unwrap_or_default());
        }
        Ok(())
    }
}

impl Way for Frida {
    fn name(&self) -> String {
        format!("Frida {}", self.version)
    }

    fn replace(&mut self, pid: i32, job: &Job) -> Result<()> {
        self.ask(&format!("replace {pid} {} {}", job.library.display(), job.function))
    }

    fn undo(&mut self, pid: i32, _: &Job) -> Result<()> {
        self.ask(&format!("undo {pid}"))
    }
}

/// By hand: load a library, write a jump. All threads are stopped meanwhile; where they are, nobody asks.
pub struct Gdb {
    folder: PathBuf,
    version: String,
    saved: PathBuf,
}

/// Bytes of the jump: `jmp *0(%rip)` and the address.
const JUMP: usize = 14;

impl Gdb {
    pub fn find(folder: &Path) -> Result<Self> {
        let output = Command::new("gdb").arg("--version").output().context("gdb, from Debian's package")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.lines().next().and_then(|line| line.split_ascii_whitespace().last()).unwrap_or("?");
        Ok(Self { folder: folder.into(), version: version.into(), saved: folder.join("gdb-saved") })
    }

    fn run(&self, pid: i32, commands: &str) -> Result<()> {
        let script = self.folder.join("gdb-commands");
        fs::write(&script, commands)?;
        let mut gdb = Command::new("gdb");
        gdb.args(["-q", "-nx", "-batch", "-p", &pid.to_string(), "-x"]).arg(&script).stdin(Stdio::null());
        let output = gdb.output()?;
        let words = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && !words.contains("Error in sourced"), "gdb: {}", words.trim());
        Ok(())
    }
}

impl Way for Gdb {
    fn name(&self) -> String {
        format!("gdb {} by hand", self.version)
    }

    fn replace(&mut self, pid: i32, job: &Job) -> Result<()> {
        let (function, library, saved) = (&job.function, job.library.display(), self.saved.display());
        self.run(
            pid,
            &format!(
                "set $at = (unsigned long) &{function}\n\
                 dump binary memory {saved} $at ($at + {JUMP})\n\
                 set $library = ((void *(*)(const char *, int)) dlopen)(\"{library}\", 2)\n\
                 set $new = ((void *(*)(void *, const char *)) dlsym)($library, \"{function}\")\n\
                 set {{unsigned short}} $at = 0x25ff\n\
                 set {{unsigned int}} ($at + 2) = 0\n\
                 set {{unsigned long}} ($at + 6) = (unsigned long) $new\n"
            ),
        )
    }

    fn undo(&mut self, pid: i32, job: &Job) -> Result<()> {
        let at = format!("(unsigned long) &'{}'", job.function);
        // The library stays: somebody may be inside.
        self.run(pid, &format!("set $at = {at}\nrestore {} binary $at\n", self.saved.display()))
    }
}

/// For a patch that becomes a library: the original is behind a variable, which the way sets.
pub fn original_header(folder: &Path) -> Result<String> {
    let header = folder.join("original.h");
    fs::write(
        &header,
        "void *original;\n#include \"asap-patch.h\"\n#undef ASAP_ORIGINAL\n#define ASAP_ORIGINAL(f) ((__typeof__(f) *)original)\n",
    )?;
    Ok(header.to_str().context("a path in UTF-8")?.to_owned())
}

/// Asks a server for a small answer all the time, on a new connection each, and notes the longest time without one.
pub struct Watch {
    end: Arc<AtomicBool>,
    thread: JoinHandle<Duration>,
}

impl Watch {
    pub fn start(server: SocketAddr) -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&end);
        let thread = std::thread::spawn(move || {
            let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
            while !ended.load(Ordering::Relaxed) {
                if http::get(server, "/none", &[]).is_ok() {
                    longest = longest.max(last.elapsed());
                    last = Instant::now();
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            longest
        });
        Self { end, thread }
    }

    pub fn finish(self) -> Duration {
        self.end.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_default()
    }
}
