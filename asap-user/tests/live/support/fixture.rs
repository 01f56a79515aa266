//! Programs that are patched: built from `tests/fixtures`, started, and asked by lines over their standard streams.

use super::{PATIENCE, runs};
use std::{
    cell::RefCell,
    collections::HashMap,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Mutex, OnceLock, PoisonError,
        mpsc::{Receiver, channel},
    },
};

/// Where fixtures are, once they are built.
static BUILT: OnceLock<Mutex<(tempfile::TempDir, HashMap<Source, PathBuf>)>> = OnceLock::new();

/// Statics are not dropped: removes the directory when the tests end.
extern "C" fn remove_built() {
    if let Some(built) = BUILT.get() {
        let _ = std::fs::remove_dir_all(built.lock().unwrap_or_else(PoisonError::into_inner).0.path());
    }
}

/// How a fixture is built.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    files: Vec<&'static str>,
    flags: Vec<&'static str>,
}

impl Source {
    /// From these files of `tests/fixtures`, the way distributions build: optimised, position independent.
    pub fn of(files: &[&'static str]) -> Self {
        Self { files: files.to_vec(), flags: vec!["-O2", "-g0", "-fpie", "-pie"] }
    }

    /// With other compiler flags.
    pub fn with(mut self, flags: &[&'static str]) -> Self {
        self.flags = flags.to_vec();
        self
    }

    /// Builds it, once per test run.
    pub fn build(&self) -> PathBuf {
        let built = BUILT.get_or_init(|| {
            // SAFETY: `remove_built` is there for the life of the program, and takes nothing.
            unsafe { nix::libc::atexit(remove_built) };
            Mutex::new((tempfile::tempdir().expect("a temporary directory"), HashMap::new()))
        });
        let mut built = built.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(path) = built.1.get(self) {
            return path.clone();
        }
        // Other users and namespaces run it, too.
        std::fs::set_permissions(built.0.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("chmod");
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let stem = Path::new(self.files[0]).file_stem().expect("a file name").to_string_lossy().into_owned();
        let output = built.0.path().join(format!("{stem}-{}", built.1.len()));
        let compiler = if self.files.iter().any(|file| file.ends_with(".cc")) { "g++" } else { "gcc" };
        let mut command = Command::new(compiler);
        command.args(&self.flags).arg("-pthread").arg("-o").arg(&output);
        command.args(self.files.iter().map(|file| sources.join(file)));
        let done = command.output().expect("the compiler runs");
        assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
        built.1.insert(self.clone(), output.clone());
        output
    }

    /// Builds and starts it.
    pub fn start(&self, arguments: &[&str]) -> Fixture {
        Fixture::start(Command::new(self.build()).args(arguments))
    }
}

/// A running fixture; it and what it forked ends when this is dropped.
#[derive(Debug)]
pub struct Fixture {
    child: RefCell<Child>,
    stdin: RefCell<Option<ChildStdin>>,
    lines: Receiver<String>,
    pid: i32,
}

impl Fixture {
    /// Starts it and waits until it is ready.
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it runs");
        let (sender, lines) = channel();
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let pid = i32::try_from(child.id()).expect("pids fit i32");
        let stdin = RefCell::new(child.stdin.take());
        let fixture = Self { child: RefCell::new(child), stdin, lines, pid };
        assert_eq!(fixture.line(), "ready");
        fixture
    }

    /// Its pid.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Its pid, as an argument.
    pub fn pid_text(&self) -> String {
        self.pid.to_string()
    }

    /// The next line it says; fails the test if there is none within a minute: the process is dead, or a thread is stuck.
    pub fn line(&self) -> String {
        self.lines.recv_timeout(PATIENCE).unwrap_or_else(|_| {
            let state = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
            panic!("the fixture {} does not answer; it runs: {}; its state:\n{state}", self.pid, runs(self.pid))
        })
    }

    /// Sends a command, without waiting for an answer.
    pub fn tell(&self, command: &str) {
        let mut stdin = self.stdin.borrow_mut();
        let sent = stdin.as_mut().expect("open").write_all(format!("{command}\n").as_bytes());
        assert!(sent.is_ok(), "the fixture {} has ended: {:?}", self.pid, self.child.borrow_mut().try_wait());
    }

    /// Asks, and gives the answer.
    pub fn ask(&self, command: &str) -> String {
        self.tell(command);
        self.line()
    }

    /// Asks for a number.
    pub fn number(&self, command: &str) -> i64 {
        let answer = self.ask(command);
        answer.parse().unwrap_or_else(|_| panic!("`{command}` was answered with `{answer}`"))
    }

    /// Asks for several numbers.
    pub fn numbers(&self, command: &str) -> Vec<i64> {
        self.ask(command).split_whitespace().map(|word| word.parse().expect("a number")).collect()
    }

    /// Kills it, and waits for its end.
    pub fn kill(&self) {
        let mut child = self.child.borrow_mut();
        let _ = child.kill();
        let _ = child.wait();
    }

    /// Kills it, and leaves it unreaped.
    pub fn make_zombie(&self) {
        let _ = self.child.borrow_mut().kill();
        super::wait_until("it is a zombie", || !runs(self.pid));
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.kill();
    }
}
