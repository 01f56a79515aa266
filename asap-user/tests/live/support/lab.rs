//! A laboratory: a temporary directory, an agent of its own, compilers, and the lock that makes tests run one after the other.

use super::{PATIENCE, runs, wait_until};
use asap::report::{AttachReport, DetachReport, Failure, FailureKind, PatchReport, Reply, StatusReport, TargetState};
use std::{
    cell::RefCell,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Tests that attach to processes run one after the other: two cores, and nobody else's stops in between.
static SERIAL: Mutex<()> = Mutex::new(());

/// A place to work, with an agent that ends with it.
pub struct Lab {
    dir: tempfile::TempDir,
    environment: RefCell<Vec<(String, String)>>,
    agents: RefCell<Vec<i32>>,
    objects: RefCell<usize>,
    /// How patches are put in; else as asap thinks best.
    mechanism: Option<&'static str>,
    _serial: MutexGuard<'static, ()>,
}

/// What a command of asap ended with.
#[derive(Debug)]
pub struct Answer {
    /// Exit code.
    pub code: i32,
    /// Standard output.
    pub text: String,
    /// Standard error.
    pub errors: String,
}

impl Answer {
    /// The result, where there must be one.
    pub fn reply(&self) -> Reply {
        assert_eq!(self.code, 0, "{} {}", self.text, self.errors);
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The failure, where there must be one. Its exit code has to fit, and it has to say something.
    pub fn failure(&self) -> Failure {
        #[derive(serde::Deserialize)]
        struct Failed {
            failed: Failure,
        }
        assert_ne!(self.code, 0, "{self:?}");
        let Failed { failed } = serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {self:?}"));
        assert_eq!(self.code, i32::from(failed.kind.exit_code()), "{failed:?}");
        assert!(!failed.message.is_empty() && !failed.way_out.is_empty(), "{failed:?}");
        failed
    }

    /// The refusal, where nothing may have been tried: exit code 1, target untouched, and the message says why.
    pub fn refusal(&self, words: &[&str]) -> Failure {
        let failure = self.failure();
        assert_eq!((self.code, failure.kind), (1, FailureKind::Refused), "{failure:?}");
        assert_eq!(failure.state, TargetState::Untouched, "{failure:?}");
        for word in words {
            assert!(failure.message.to_lowercase().contains(&word.to_lowercase()), "no `{word}` in: {failure:?}");
        }
        failure
    }
}

/// The program under test: cargo's build, or (where tests run without cargo, in a virtual machine) what `ASAP_TEST_PROGRAM` names.
pub fn program() -> PathBuf {
    std::env::var_os("ASAP_TEST_PROGRAM").map_or_else(|| env!("CARGO_BIN_EXE_asap").into(), PathBuf::from)
}

impl Lab {
    /// A laboratory for the test `name`; none, and a word, where the test needs root and has not got it.
    pub fn new(name: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED (needs root): {name}");
            return None;
        }
        let serial = SERIAL.lock().unwrap_or_else(PoisonError::into_inner);
        Some(Self {
            dir: tempfile::tempdir().expect("a temporary directory"),
            environment: RefCell::default(),
            agents: RefCell::default(),
            objects: RefCell::default(),
            mechanism: None,
            _serial: serial,
        })
    }

    /// A laboratory whose patches go in by redirection; none, and a word, where the kernel does not let them.
    pub fn redirecting(name: &str) -> Option<Self> {
        let mut lab = Self::new(name)?;
        let features = asap::kernel::features();
        match features.iter().find(|feature| feature.name == "redirect") {
            Some(feature) if feature.available => {
                lab.mechanism = Some("redirect");
                Some(lab)
            }
            feature => {
                println!("SKIPPED (the kernel lets no uprobe program write registers): {name}: {feature:?}");
                None
            }
        }
    }

    /// A file in the laboratory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Sets a variable for agents that are started from now on; an empty value removes it.
    pub fn set_environment(&self, name: &str, value: &str) {
        let mut environment = self.environment.borrow_mut();
        environment.retain(|(known, _)| known != name);
        if !value.is_empty() {
            environment.push((name.to_owned(), value.to_owned()));
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        self.command_for(arguments, true)
    }

    fn command_for(&self, arguments: &[&str], json: bool) -> Command {
        let mut command = Command::new(program());
        command.arg("--socket").arg(self.path("run/agent.sock")).arg("--log").arg(self.path("log/audit.jsonl"));
        command.args(json.then_some("--json")).args(arguments).stdin(Stdio::null());
        // Never this system's.
        command.env("ASAP_JOURNAL", self.path("journal")).env("ASAP_KEYS", self.path("keys"));
        command.envs(self.environment.borrow().iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs asap.
    pub fn asap(&self, arguments: &[&str]) -> Answer {
        let answer = answer(self.start(arguments));
        if answer.text.contains("does not answer") {
            describe_agent(&answer.text);
        }
        answer
    }

    /// Runs asap for a person: text, not JSON.
    pub fn asap_as_text(&self, arguments: &[&str]) -> Answer {
        let mut command = self.command_for(arguments, false);
        answer(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("asap runs"))
    }

    /// Starts asap, to be waited for with [`answer`].
    pub fn start(&self, arguments: &[&str]) -> Child {
        let mut command = self.command(arguments);
        if let (Some(mechanism), Some(&"patch")) = (self.mechanism, arguments.first())
            && !arguments.contains(&"--mechanism")
        {
            command.args(["--mechanism", mechanism]);
        }
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("asap runs")
    }

    /// Attaches, and makes sure that the agent ends with the laboratory.
    pub fn attach(&self, pid: i32) -> AttachReport {
        self.attach_with(pid, &[])
    }

    /// Attaches with more options. The socket of an agent that died a moment ago may still accept connections until its last
    /// thread has ended, and then breaks them: that is tried again.
    pub fn attach_with(&self, pid: i32, options: &[&str]) -> AttachReport {
        let started = std::time::Instant::now();
        loop {
            let answer = self.asap(&[&["attach", "--pid", &pid.to_string()], options].concat());
            if answer.text.contains("connection to the agent broke") && started.elapsed() < super::PATIENCE {
                std::thread::sleep(std::time::Duration::from_millis(5));
                continue;
            }
            let Reply::Attached(report) = answer.reply() else { panic!("{answer:?}") };
            self.agent();
            return report;
        }
    }

    /// Patches with these arguments.
    pub fn patch(&self, arguments: &[&str]) -> PatchReport {
        let answer = self.asap(&[&["patch"], arguments].concat());
        let Reply::Patched(report) = answer.reply() else { panic!("{answer:?}") };
        report
    }

    /// Reverts with these arguments.
    pub fn revert(&self, arguments: &[&str]) -> PatchReport {
        let answer = self.asap(&[&["revert"], arguments].concat());
        let Reply::Reverted(report) = answer.reply() else { panic!("{answer:?}") };
        report
    }

    /// Detaches with these arguments.
    pub fn detach(&self, arguments: &[&str]) -> DetachReport {
        let answer = self.asap(&[&["detach"], arguments].concat());
        let Reply::Detached(report) = answer.reply() else { panic!("{answer:?}") };
        report
    }

    /// What the agent cares for.
    pub fn status(&self) -> StatusReport {
        let answer = self.asap(&["status"]);
        let Reply::Status(report) = answer.reply() else { panic!("{answer:?}") };
        report
    }

    /// The pid of the agent that runs now.
    pub fn agent(&self) -> i32 {
        let agent = self.status().agent;
        if agent > 1 && !self.agents.borrow().contains(&agent) {
            self.agents.borrow_mut().push(agent);
        }
        agent
    }

    /// Kills the agent that runs now.
    pub fn kill_agent(&self) {
        let agent = self.agent();
        super::kill(agent);
        self.wait_for_the_end_of(agent);
    }

    /// Waits until an agent that was killed is gone. Its first thread may end before others do that still hold its socket.
    pub fn wait_for_the_end_of(&self, agent: i32) {
        wait_until("the agent ends", || !runs(agent));
        let socket = self.path("run/agent.sock");
        wait_until("its socket closes", || std::os::unix::net::UnixStream::connect(&socket).is_err());
    }

    /// Makes an object file from C.
    pub fn object(&self, source: &str) -> String {
        self.compile("gcc", "c", &["-O2", "-fPIC"], source)
    }

    /// Makes an object file.
    pub fn compile(&self, compiler: &str, extension: &str, flags: &[&str], source: &str) -> String {
        *self.objects.borrow_mut() += 1;
        let input = self.path(&format!("fix{}.{extension}", self.objects.borrow()));
        let output = input.with_extension("o");
        fs::write(&input, source).expect("written");
        let mut command = Command::new(compiler);
        let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("include");
        if compiler == "rustc" {
            command.args(flags).args(["--emit=obj", "--crate-type=lib", "--edition=2024", "-o"]).arg(&output);
        } else {
            command.args(flags).arg("-I").arg(include).args(["-c", "-o"]).arg(&output);
        }
        let done = command.arg(&input).output().expect("the compiler runs");
        assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
        output.to_str().expect("ASCII").to_owned()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.command(&["stop"]).output();
        for &agent in self.agents.borrow().iter() {
            // It may be gone long since, and its number another's: only a child of this program's own making is meant.
            let name = fs::read(format!("/proc/{agent}/cmdline")).unwrap_or_default();
            if runs(agent) && name.windows(6).any(|part| part == b"--sock") {
                let inside = self.dir.path().as_os_str().as_encoded_bytes();
                if name.windows(inside.len()).any(|part| part == inside) {
                    super::kill(agent);
                }
            }
        }
    }
}

/// Waits for a command of asap, not for ever.
pub fn answer(child: Child) -> Answer {
    let pid = child.id() as i32;
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let _ = sender.send(child.wait_with_output());
    });
    let Ok(output) = receiver.recv_timeout(PATIENCE * 2) else {
        super::kill(pid);
        panic!("a command of asap (pid {pid}) did not end");
    };
    let output = output.expect("it ends");
    Answer {
        code: output.status.code().unwrap_or(-1),
        text: String::from_utf8_lossy(&output.stdout).into_owned(),
        errors: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// What the threads of an agent that does not answer are at.
fn describe_agent(text: &str) {
    let Some(pid) = text.split("(pid ").nth(1).and_then(|rest| rest.split(')').next()) else { return };
    for entry in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let read = |name: &str| fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        let state = read("stat").rsplit(')').next().map(|rest| rest.chars().take(3).collect::<String>());
        println!("{} {:?} {} {}", read("comm").trim(), state, read("syscall").trim(), read("wchan"));
        println!("{}", read("stack"));
    }
}
