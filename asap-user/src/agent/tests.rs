//! A whole agent with an engine of straw: sockets, sessions, queue, audit log, shutdown.

use super::{AgentError, AgentOptions, audit, protocol, run, socket};
use crate::report::{
    AttachReport, AttachRequest, Consistency, DetachReport, DetachRequest, Failure, FailureKind, InstalledPatch,
    Mechanism, News, Operations, PatchFile, PatchId, PatchReport, PatchRequest, Progress, Reply, Request,
    RevertRequest, SandboxReport, SandboxRequest, ScopedReport, ScopedRequest, StatusReport, StatusRequest,
    TargetReport,
};
use std::{
    io::{BufRead, BufReader, Read, Write},
    os::{
        fd::BorrowedFd,
        unix::{fs::PermissionsExt, net::UnixStream},
    },
    path::PathBuf,
    sync::mpsc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// Attaches to nothing; a patch named "slow" takes a while, one named "bug" panics.
#[derive(Default)]
struct Straw {
    targets: Vec<i32>,
}

fn target(pid: i32) -> TargetReport {
    TargetReport {
        pid,
        executable: "/bin/straw".to_owned(),
        build_id: None,
        processes: Vec::new(),
        patches: Vec::new(),
        notes: Vec::new(),
    }
}

impl Operations for Straw {
    fn attach(&mut self, request: &AttachRequest, _: &mut dyn FnMut(Progress)) -> Result<AttachReport, Failure> {
        self.targets.push(request.pid);
        Ok(AttachReport { target: target(request.pid), adopted: false, total_us: 1, longest_stop_us: 1 })
    }
    fn patch(&mut self, request: &PatchRequest, progress: &mut dyn FnMut(Progress)) -> Result<PatchReport, Failure> {
        let name = request.name.clone().unwrap_or_default();
        match name.as_str() {
            "slow" => {
                // More steps than anybody keeps for a client that reads none.
                for step in 0..300 {
                    progress(Progress { step: format!("step {step}"), fraction: None });
                    thread::sleep(Duration::from_millis(1));
                }
            }
            "bug" => panic!("straw burns"),
            _ => {}
        }
        let bytes = request.files.iter().map(|file| file.bytes.len()).sum::<usize>();
        Ok(PatchReport {
            patch: InstalledPatch {
                id: PatchId(1),
                name,
                sha256: bytes.to_string(),
                installed_at: 0,
                mechanism: Mechanism::Page,
                functions: Vec::new(),
            },
            processes: Vec::new(),
            dry_run: request.dry_run,
            already: false,
            total_us: 0,
            notes: Vec::new(),
        })
    }
    fn revert(&mut self, _: &RevertRequest, _: &mut dyn FnMut(Progress)) -> Result<PatchReport, Failure> {
        Err(Failure::refused("nothing is patched", "patch first"))
    }
    fn detach(&mut self, _: &DetachRequest, _: &mut dyn FnMut(Progress)) -> Result<DetachReport, Failure> {
        let pid = self.targets.pop().ok_or_else(|| Failure::refused("nothing is attached", "attach first"))?;
        Ok(DetachReport { pid, reverted: Vec::new(), remaining: Vec::new(), clean: None })
    }
    fn status(&mut self, _: &StatusRequest) -> Result<StatusReport, Failure> {
        Ok(self.known())
    }
    fn known(&self) -> StatusReport {
        let targets = self.targets.iter().map(|&pid| target(pid)).collect();
        StatusReport { agent: 1, version: "straw".to_owned(), targets }
    }
    fn housekeeping(&mut self) -> Option<Duration> {
        None
    }
    fn alarms(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }
    fn news(&mut self) -> Vec<News> {
        Vec::new()
    }
    fn scoped(&mut self, _: &ScopedRequest, _: &mut dyn FnMut(Progress)) -> Result<ScopedReport, Failure> {
        Ok(ScopedReport { targets: Vec::new(), total_us: 0 })
    }
    fn sandbox(&mut self, request: &SandboxRequest, _: &mut dyn FnMut(Progress)) -> Result<SandboxReport, Failure> {
        let pid = request.pid.unwrap_or_default();
        Ok(SandboxReport {
            pid,
            processes: Vec::new(),
            families: Vec::new(),
            dump: None,
            total_us: 0,
            notes: Vec::new(),
        })
    }
}

struct Agent {
    dir: tempfile::TempDir,
    options: AgentOptions,
    thread: JoinHandle<Result<(), AgentError>>,
}

fn start(idle_exit: Option<Duration>) -> Agent {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let options = AgentOptions {
        socket: dir.path().join("run/agent.sock"),
        log: dir.path().join("log/audit.jsonl"),
        journal: None,
        keys: dir.path().join("keys"),
        require_signature: false,
        idle_exit,
    };
    let theirs = options.clone();
    let (ready, is_ready) = mpsc::channel();
    let thread = thread::spawn(move || {
        run(&theirs, Box::new(|| Box::new(Straw::default())), move || ready.send(()).expect("somebody waits"))
    });
    is_ready.recv().expect("the agent starts");
    Agent { dir, options, thread }
}

impl Agent {
    fn connect(&self) -> BufReader<UnixStream> {
        BufReader::new(UnixStream::connect(&self.options.socket).expect("the agent listens"))
    }

    fn ask(&self, request: &Request) -> Reply {
        let mut connection = self.connect();
        send(&mut connection, request);
        answer(&mut connection).expect("an answer")
    }

    /// Stops it and gives what is left.
    fn stop(self) -> tempfile::TempDir {
        assert!(matches!(self.ask(&Request::Shutdown), Reply::Bye));
        self.thread.join().expect("no panic").expect("a clean end");
        assert!(!self.options.socket.exists());
        self.dir
    }
}

fn send(connection: &mut BufReader<UnixStream>, request: &Request) {
    let mut line = serde_json::to_vec(request).expect("serialises");
    line.push(b'\n');
    connection.get_mut().write_all(&line).expect("sent");
}

/// The next reply that is no progress; none: the connection was closed.
fn answer(connection: &mut BufReader<UnixStream>) -> Option<Reply> {
    loop {
        let mut line = String::new();
        if connection.read_line(&mut line).ok()? == 0 {
            return None;
        }
        match serde_json::from_str(&line).expect("a reply") {
            Reply::Progress(_) => {}
            reply => return Some(reply),
        }
    }
}

fn patch(name: &str, size: usize) -> Request {
    Request::Patch(PatchRequest {
        pid: None,
        functions: Vec::new(),
        address: None,
        files: vec![PatchFile { name: "fix.o".to_owned(), bytes: vec![7; size], signature: None }],
        name: Some(name.to_owned()),
        dry_run: false,
        timeout_ms: 0,
        consistency: Consistency::Quiescent,
        mechanism: Mechanism::Auto,
    })
}

fn status() -> Request {
    Request::Status(StatusRequest::default())
}

fn attach(pid: i32) -> Request {
    Request::Attach(AttachRequest { pid, only: false, require_signature: false })
}

#[test]
fn requests_are_answered_one_after_the_other_on_one_connection() {
    let agent = start(None);
    let mut connection = agent.connect();
    for pid in [5, 6] {
        send(&mut connection, &attach(pid));
        let Some(Reply::Attached(report)) = answer(&mut connection) else { panic!("not attached") };
        assert_eq!(report.target.pid, pid);
    }
    send(&mut connection, &status());
    let Some(Reply::Status(report)) = answer(&mut connection) else { panic!("no status") };
    assert_eq!(report.targets.len(), 2);
    agent.stop();
}

#[test]
fn rubbish_is_refused_and_harms_nobody_else() {
    let agent = start(None);
    for rubbish in [&b"\0\xff\xfe\n"[..], b"{}\n", b"{\"request\":\"format-disk\"}\n", b"[[[[[[[[[[[[\n", b"\n"] {
        let mut connection = agent.connect();
        connection.get_mut().write_all(rubbish).expect("sent");
        let Some(Reply::Failed(failure)) = answer(&mut connection) else { panic!("accepted {rubbish:?}") };
        assert_eq!(failure.kind, FailureKind::Usage);
        assert!(answer(&mut connection).is_none(), "the connection is closed");
    }
    let mut half = agent.connect();
    half.get_mut().write_all(b"{\"request\":\"sta").expect("sent");
    half.get_mut().shutdown(std::net::Shutdown::Write).expect("closed");
    assert!(answer(&mut half).is_none());
    // A client that leaves in the middle of its request.
    drop({
        let mut connection = agent.connect();
        send(&mut connection, &patch("slow", 1));
        connection
    });
    assert!(matches!(agent.ask(&status()), Reply::Status(_)));
    agent.stop();
}

#[test]
fn a_large_request_passes_and_a_larger_one_is_refused() {
    let agent = start(None);
    let Reply::Patched(report) = agent.ask(&patch("large", 3 << 20)) else { panic!("refused") };
    assert_eq!(report.patch.sha256, (3 << 20).to_string(), "all bytes arrived");
    let Reply::Failed(failure) = agent.ask(&patch("larger", protocol::MAX_OBJECTS + 1)) else { panic!("accepted") };
    assert!(failure.message.contains("object files"), "{failure}");
    // A line without an end.
    let mut connection = agent.connect();
    let chunk = vec![b' '; 1 << 20];
    for _ in 0..=protocol::MAX_LINE >> 20 {
        if connection.get_mut().write_all(&chunk).is_err() {
            break;
        }
    }
    let Some(Reply::Failed(failure)) = answer(&mut connection) else { panic!("accepted") };
    assert!(failure.message.contains("longer than 96 MiB"), "{failure}");
    agent.stop();
}

#[test]
fn a_client_that_reads_nothing_does_not_hold_up_the_engine() {
    let agent = start(None);
    let mut deaf = agent.connect();
    send(&mut deaf, &patch("slow", 1));
    thread::sleep(Duration::from_millis(50));
    let started = Instant::now();
    let mut second = agent.connect();
    send(&mut second, &attach(5));
    let mut line = String::new();
    second.read_line(&mut line).expect("a sign of life");
    assert!(line.contains("waiting for another request: patch"), "{line}");
    assert!(matches!(answer(&mut second), Some(Reply::Attached(_))));
    assert!(started.elapsed() < Duration::from_secs(10));
    agent.stop();
}

#[test]
fn a_busy_agent_tells_at_once_what_is_attached() {
    let agent = start(None);
    agent.ask(&attach(5));
    let mut patching = agent.connect();
    send(&mut patching, &patch("slow", 1));
    let mut line = String::new();
    while !line.contains("step ") {
        line.clear();
        patching.read_line(&mut line).expect("steps");
    }
    let Reply::Status(report) = agent.ask(&status()) else { panic!("no status") };
    let notes = &report.targets[0].notes;
    assert!(notes.iter().any(|note| note.ends_with("work at: patch")), "{notes:?}");
    let Reply::Status(report) = agent.ask(&Request::List(StatusRequest { pid: Some(6) })) else { panic!("no list") };
    assert_eq!(report.targets[0].notes, [""; 0], "the engine itself answered");
    agent.stop();
}

#[test]
fn another_user_is_turned_away_even_if_it_can_reach_the_socket() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let agent = start(None);
    for path in [agent.dir.path(), &agent.dir.path().join("run"), &agent.options.socket] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).expect("chmod");
    }
    let socket = agent.options.socket.clone();
    let said = thread::spawn(move || {
        // SAFETY: the bare system call changes this thread only, which ends right after.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) }, 0);
        let mut stream = UnixStream::connect(socket).expect("reachable");
        let _ = stream.write_all(b"{\"request\":\"status\",\"pid\":null}\n");
        let mut said = String::new();
        let _ = stream.read_to_string(&mut said);
        said
    });
    assert_eq!(said.join().expect("no panic"), "");
    assert!(matches!(agent.ask(&status()), Reply::Status(_)));
    agent.stop();
}

#[test]
fn every_changing_request_is_logged_before_and_after() {
    let agent = start(None);
    let log = agent.options.log.clone();
    agent.ask(&attach(5));
    agent.ask(&status());
    agent.ask(&Request::Revert(RevertRequest {
        pid: None,
        patch: Some("x".to_owned()),
        timeout_ms: 0,
        consistency: Consistency::Lazy,
    }));
    let dir = agent.stop();
    let (records, damaged) = audit::last_records(&log, 100).expect("readable");
    let told: Vec<_> = records.iter().map(|record| (record.command.as_str(), record.result.as_deref())).collect();
    assert_eq!(
        told,
        [
            ("attach", None),
            ("attach", Some("done")),
            ("revert", None),
            ("revert", Some("refused")),
            ("stop", None),
            ("stop", Some("done"))
        ]
    );
    assert_eq!(damaged, 0);
    assert_eq!(records[0].uid, nix::unistd::geteuid().as_raw());
    assert_eq!(records[0].pid, nix::unistd::getpid().as_raw());
    drop(dir);
}

#[test]
fn a_client_that_leaves_before_its_turn_is_not_served() {
    let agent = start(None);
    let mut first = agent.connect();
    send(&mut first, &patch("slow", 1));
    let mut line = String::new();
    while !line.contains("step ") {
        line.clear();
        first.read_line(&mut line).expect("steps");
    }
    let mut second = agent.connect();
    send(&mut second, &attach(5));
    let mut line = String::new();
    second.read_line(&mut line).expect("a sign of life");
    assert!(line.contains("waiting for another request"), "{line}");
    second.get_mut().shutdown(std::net::Shutdown::Write).expect("closed");
    let Some(Reply::Failed(failure)) = answer(&mut second) else { panic!("attached") };
    assert_eq!(failure.kind, FailureKind::Cancelled);
    assert!(matches!(answer(&mut first), Some(Reply::Patched(_))), "the others are served");
    let Reply::Status(report) = agent.ask(&status()) else { panic!("no status") };
    assert!(report.targets.is_empty());
    let (records, _) = audit::last_records(&agent.options.log, 100).expect("readable");
    assert_eq!(records.last().and_then(|record| record.result.as_deref()), Some("cancelled"));
    agent.stop();
}

#[test]
fn what_cannot_be_logged_is_not_done() {
    let agent = start(None);
    let log = agent.options.log.clone();
    std::fs::remove_file(&log).expect("removed");
    std::fs::create_dir(&log).expect("something else in its place");
    let Reply::Failed(failure) = agent.ask(&attach(5)) else { panic!("attached") };
    assert!(failure.message.contains("can't be logged"), "{failure}");
    let Reply::Status(report) = agent.ask(&status()) else { panic!("no status") };
    assert!(report.targets.is_empty());
    std::fs::remove_dir(&log).expect("removed");
    agent.stop();
}

#[test]
fn an_idle_agent_ends_and_one_with_a_target_stays() {
    let agent = start(Some(Duration::from_millis(300)));
    agent.ask(&attach(5));
    thread::sleep(Duration::from_millis(900));
    assert!(!agent.thread.is_finished(), "a target is attached");
    agent.ask(&Request::Detach(DetachRequest { pid: None, revert: false, timeout_ms: 0 }));
    agent.thread.join().expect("no panic").expect("a clean end");
    let left: Vec<PathBuf> =
        std::fs::read_dir(agent.dir.path().join("run")).expect("there").flatten().map(|entry| entry.path()).collect();
    assert_eq!(left, [socket::lock_path(&agent.options.socket)]);
}

#[test]
fn a_second_agent_does_not_displace_the_first() {
    let agent = start(None);
    let refusal = run(&agent.options, Box::new(|| Box::new(Straw::default())), || panic!("it must not start"));
    assert!(matches!(refusal, Err(AgentError::AlreadyRunning { .. })), "{refusal:?}");
    assert!(matches!(agent.ask(&status()), Reply::Status(_)));
    agent.stop();
}

#[test]
fn a_bug_in_the_engine_is_reported_and_ends_the_agent() {
    let agent = start(None);
    let Reply::Failed(failure) = agent.ask(&patch("bug", 1)) else { panic!("no failure") };
    assert!(failure.message.contains("straw burns"), "{failure}");
    let outcome = agent.thread.join().expect("the agent itself does not panic");
    assert!(matches!(outcome, Err(AgentError::EngineEnded(why)) if why == "straw burns"));
    let (records, _) = audit::last_records(&agent.options.log, 100).expect("readable");
    assert_eq!(records.last().and_then(|record| record.result.as_deref()), Some("failed"));
}
