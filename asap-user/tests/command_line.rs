//! The program as a user meets it: exit codes, refusals, JSON, and how agents start and end.

use serde_json::Value;
use std::{
    fs,
    io::Read,
    os::unix::{
        fs::PermissionsExt,
        process::{CommandExt, ExitStatusExt},
    },
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

/// A place for one agent, which is ended when this is dropped.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a temporary directory") }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("run/agent.sock")
    }

    /// `asap` with these arguments, for the agent of this place.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_asap"));
        command.args(arguments).env("ASAP_SOCKET", self.socket()).env("ASAP_JOURNAL", "");
        command.env("ASAP_KEYS", self.dir.path().join("keys"));
        command.env("ASAP_LOG", self.dir.path().join("log/audit.jsonl")).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("asap runs")
    }

    /// Exit code, and the JSON document on standard output.
    fn json(&self, arguments: &[&str]) -> (i32, Value) {
        let output = self.run(&[arguments, &["--json"]].concat());
        let document = serde_json::from_slice(&output.stdout);
        (output.status.code().expect("no signal"), document.unwrap_or_else(|error| panic!("{error}: {output:?}")))
    }

    /// The pid of the agent, if one answers.
    fn agent(&self) -> Option<i64> {
        self.json(&["status"]).1["agent"].as_i64().filter(|&pid| pid != 0)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let stopped = self.command(&["stop"]).output();
        if !stopped.is_ok_and(|output| output.status.success())
            && let Ok(pid) = fs::read_to_string(self.dir.path().join("run/agent.lock"))
        {
            // It hangs; a test has failed.
            let _ = Command::new("kill").args(["-9", pid.trim()]).status();
        }
    }
}

/// A process to attach to, ended when this is dropped.
struct Sleeper(Child);

impl Sleeper {
    fn new() -> Self {
        Self(Command::new("sleep").arg("600").spawn().expect("sleep runs"))
    }

    fn pid(&self) -> String {
        self.0.id().to_string()
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("SKIPPED (needs root)");
    }
    root
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < Duration::from_secs(20), "still not: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn runs(pid: i64) -> bool {
    let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // A zombie has ended; who reaps it is not asap's business.
    state.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

#[test]
fn a_senseless_command_line_exits_with_2() {
    let place = Place::new();
    for arguments in [
        &["no-such-command"][..],
        &["attach"],
        &["attach", "--pid", "0"],
        &["attach", "--pid", "-5"],
        &["attach", "--pid", "apache2"],
        &["patch"],
        &["patch", "--timeout", "soon", "fix.o"],
        &["patch", "--address", "xyz", "fix.o"],
        &["patch", "--consistency", "hopeful", "fix.o"],
        &["status", "--frobnicate"],
    ] {
        let output = place.run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
        assert!(!output.stderr.is_empty() && output.stdout.is_empty(), "{arguments:?}: {output:?}");
        let (code, document) = place.json(arguments);
        assert_eq!((code, document["failed"]["kind"].as_str()), (2, Some("usage")), "{arguments:?}: {document}");
    }
    let (_, document) = place.json(&["patch"]);
    assert!(document["failed"]["message"].as_str().is_some_and(|words| words.contains("<FILE>")), "{document}");
}

#[test]
fn help_tells_exit_codes_and_goes_to_standard_output() {
    let output = Place::new().run(&["--help"]);
    assert_eq!(output.status.code(), Some(0));
    let help = String::from_utf8_lossy(&output.stdout);
    assert!(help.contains("Exit codes:\n  0  done\n"), "{help}");
}

#[test]
fn without_an_agent_nothing_is_attached() {
    let place = Place::new();
    let (code, document) = place.json(&["status"]);
    assert_eq!((code, document["targets"].as_array().map(Vec::len)), (0, Some(0)), "{document}");
    let output = place.run(&["status"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "no agent is running; nothing is attached\n");
    if is_root() {
        for arguments in [&["revert"][..], &["detach"]] {
            let output = place.run(arguments);
            assert_eq!(output.status.code(), Some(1));
            assert_eq!(
                String::from_utf8_lossy(&output.stderr),
                "asap: refused: no agent is running, so nothing is attached\n  state: nothing was changed\n  \
                 next:  attach first: asap attach --pid N\n"
            );
        }
        assert_eq!(place.run(&["stop"]).status.code(), Some(0));
    }
}

#[test]
fn other_users_are_refused() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    // Where the other user can reach it.
    let program = place.dir.path().join("asap");
    fs::copy(env!("CARGO_BIN_EXE_asap"), &program).expect("copied");
    fs::set_permissions(place.dir.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
    let sleeper = Sleeper::new();
    assert!(place.run(&["attach", "--pid", &sleeper.pid()]).status.success());
    let pid = sleeper.pid();
    for arguments in [&["attach", "--pid", &pid][..], &["status"], &["detach"], &["stop"], &["log"], &["agent"]] {
        let mut command = Command::new(&program);
        command.args(arguments).uid(65534).gid(65534).env("ASAP_SOCKET", place.socket());
        let output = command.env("ASAP_LOG", place.dir.path().join("log/audit.jsonl")).output().expect("runs");
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("root"), "{arguments:?}: {said}");
    }
    assert_eq!(place.json(&["status"]).1["targets"].as_array().map(Vec::len), Some(1));
}

#[test]
fn clients_that_start_an_agent_at_the_same_time_share_one() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let sleepers: Vec<_> = (0..6).map(|_| Sleeper::new()).collect();
    let clients: Vec<_> = sleepers
        .iter()
        .map(|sleeper| {
            let mut command = place.command(&["attach", "--json", "--pid", &sleeper.pid()]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("asap runs")
        })
        .collect();
    for client in clients {
        let output = client.wait_with_output().expect("it ends");
        assert!(output.status.success(), "{output:?}");
    }
    let (_, status) = place.json(&["status"]);
    assert_eq!(status["targets"].as_array().map(Vec::len), Some(6), "{status}");
    assert!(sleepers.iter().all(|sleeper| runs(sleeper.0.id().into())));
}

#[test]
fn a_background_agent_leaves_nothing_open_and_ends_when_idle() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let sleeper = Sleeper::new();
    let attached = place.run(&["attach", "--idle-exit", "200ms", "--pid", &sleeper.pid()]);
    assert!(attached.status.success(), "{attached:?}");
    let agent = place.agent().expect("an agent runs");
    let stat = fs::read_to_string(format!("/proc/{agent}/stat")).expect("it runs");
    let session = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(3)?.parse::<i64>().ok());
    assert_ne!(session, Some(agent), "it leads no session");
    assert_ne!(session, nix::unistd::getsid(None).ok().map(|pid| pid.as_raw().into()), "it left ours");
    for descriptor in 0..2 {
        let target = fs::read_link(format!("/proc/{agent}/fd/{descriptor}")).expect("it is open");
        assert_eq!(target.to_str(), Some("/dev/null"));
    }
    thread::sleep(Duration::from_millis(700));
    assert_eq!(place.agent(), Some(agent), "it stays while something is attached");
    assert!(place.run(&["detach"]).status.success());
    wait_until("the idle agent ends", || !runs(agent));
    assert!(!place.socket().exists());
    let (_, log) = place.json(&["log"]);
    let records = log["records"].as_array().expect("records");
    let told: Vec<_> = records.iter().filter_map(|r| Some((r["command"].as_str()?, r["result"].as_str()?))).collect();
    assert_eq!(told, [("attach", "done"), ("detach", "done")]);
}

#[test]
fn a_terminated_agent_leaves_its_targets_running_and_a_new_one_takes_its_place() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let sleeper = Sleeper::new();
    for signal in ["-TERM", "-KILL"] {
        let attached = place.run(&["attach", "--pid", &sleeper.pid()]);
        assert!(attached.status.success(), "{attached:?}");
        let agent = place.agent().expect("an agent runs");
        assert!(Command::new("kill").args([signal, &agent.to_string()]).status().expect("kill runs").success());
        wait_until("the agent ends", || !runs(agent));
        assert!(runs(sleeper.0.id().into()), "P1");
        assert_eq!(place.agent(), None);
    }
}

#[test]
fn an_agent_in_the_foreground_stays_until_it_is_stopped() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let mut agent = place.command(&["agent"]).spawn().expect("asap runs");
    wait_until("the agent answers", || place.agent() == Some(agent.id().into()));
    let (code, refusal) = place.json(&["agent"]);
    assert_eq!(code, 1, "{refusal}");
    let words = refusal["failed"]["message"].as_str().unwrap_or_default();
    assert!(words.contains(&format!("running already (pid {}", agent.id())), "{words}");
    let (code, refusal) = place.json(&["agent", "--background"]);
    assert_eq!((code, refusal["failed"]["message"].as_str()), (1, Some(words)));
    assert!(place.run(&["stop"]).status.success());
    assert!(agent.wait().expect("it ends").success());
}

#[test]
fn a_place_that_cannot_be_trusted_is_told_to_the_one_who_attaches() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let directory = place.dir.path().join("run");
    fs::create_dir(&directory).expect("made");
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).expect("chmod");
    let sleeper = Sleeper::new();
    let (code, refusal) = place.json(&["attach", "--pid", &sleeper.pid()]);
    let failed = &refusal["failed"];
    assert_eq!((code, failed["kind"].as_str()), (1, Some("refused")));
    assert!(failed["message"].as_str().is_some_and(|words| words.contains("mode 0777")), "{failed}");
    assert!(failed["way_out"].as_str().is_some_and(|words| words.contains("chmod 0700")), "{failed}");
}

#[test]
fn files_that_are_no_patch_are_refused_without_an_agent() {
    let place = Place::new();
    let path = place.dir.path().join("fix.o");
    fs::write(&path, "not ELF").expect("written");
    let file = path.to_str().expect("ASCII");
    let (code, refusal) = place.json(&["inspect", file]);
    assert_eq!((code, refusal["failed"]["kind"].as_str()), (1, Some("refused")), "{refusal}");
    fs::File::create(&path).and_then(|file| file.set_len(1 << 30)).expect("a large hole");
    let (code, refusal) = place.json(&["inspect", file]);
    let words = refusal["failed"]["message"].as_str().unwrap_or_default();
    assert!(code == 1 && words.contains("1024 MiB"), "{refusal}");
}

#[test]
fn completions_and_man_pages_are_made_for_every_command() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish"] {
        let output = place.run(&["completions", shell]);
        assert!(output.status.success());
        assert!(String::from_utf8_lossy(&output.stdout).contains("detach"), "{shell}");
        let (code, told) = place.json(&["completions", shell]);
        assert_eq!((code, told["script"].as_str()), (0, Some(&*String::from_utf8_lossy(&output.stdout))), "{shell}");
    }
    let directory = place.dir.path().join("man");
    fs::create_dir(&directory).expect("made");
    assert!(place.run(&["man", directory.to_str().expect("ASCII")]).status.success());
    let page = fs::read_to_string(directory.join("asap.1")).expect("a page");
    assert!(page.contains("timed out"), "exit codes are in it");
    assert!(directory.join("asap-patch.1").exists());
    assert_eq!(place.run(&["man", "/nonexistent"]).status.code(), Some(1));
}

#[test]
fn an_interrupted_client_cancels_its_request_and_a_second_interrupt_ends_it_at_once() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    // An agent that takes requests and never answers.
    fs::create_dir(place.dir.path().join("run")).expect("made");
    let listener = std::os::unix::net::UnixListener::bind(place.socket()).expect("bound");
    let mut client = place.command(&["detach"]);
    // Shells start what runs in their background with SIGINT ignored, and the client keeps it so.
    let hear_interrupts = || {
        let default = nix::sys::signal::SigHandler::SigDfl;
        // SAFETY: no handler is installed or replaced, and the call is safe between fork and exec (signal-safety(7)).
        unsafe { nix::sys::signal::signal(nix::sys::signal::Signal::SIGINT, default) }.map(drop)?;
        // Who runs the tests may hold it back for itself.
        nix::sys::signal::SigSet::from(nix::sys::signal::Signal::SIGINT).thread_unblock()?;
        Ok(())
    };
    // SAFETY: the closure makes one system call and allocates nothing.
    unsafe { std::os::unix::process::CommandExt::pre_exec(&mut client, hear_interrupts) };
    let mut client = client.stderr(Stdio::piped()).spawn().expect("asap runs");
    let (mut stream, _) = listener.accept().expect("it connects");
    let mut first = [0];
    stream.read_exact(&mut first).expect("it asks");
    thread::sleep(Duration::from_millis(100));
    let pid = nix::unistd::Pid::from_raw(client.id().try_into().expect("a pid"));
    let interrupt = || nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).expect("it runs");
    interrupt();
    let mut request = String::new();
    stream.read_to_string(&mut request).expect("it asks for nothing more");
    assert!(request.ends_with('\n'), "{request}");
    assert!(client.try_wait().expect("a child").is_none(), "it waits for the agent's word");
    interrupt();
    let output = client.wait_with_output().expect("it ends");
    assert_eq!(output.status.signal(), Some(2), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("gives the request up"), "{output:?}");
    drop((stream, listener));
    fs::remove_file(place.socket()).expect("removed");
}

#[test]
fn an_agent_that_is_terminated_while_it_waits_gives_up_and_harms_nobody() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let file = |name: &str| place.dir.path().join(name).to_str().expect("ASCII").to_owned();
    fs::write(
        file("busy.c"),
        "#include <unistd.h>\n\
         __attribute__((noinline)) int busy(int x) { for (;;) usleep(1000); return x; }\n\
         int main(void) { return busy(3); }\n",
    )
    .expect("written");
    fs::write(file("fix.c"), "int busy(int x) { return x + 1; }\n").expect("written");
    let compile =
        |arguments: &[&str]| assert!(Command::new("gcc").args(arguments).status().expect("gcc runs").success());
    compile(&["-O2", "-o", &file("busy"), &file("busy.c")]);
    compile(&["-O2", "-c", "-o", &file("fix.o"), &file("fix.c")]);
    let busy = Sleeper(Command::new(file("busy")).spawn().expect("it runs"));
    let attached = place.run(&["attach", "--pid", &busy.pid()]);
    assert!(attached.status.success(), "{attached:?}");
    let agent = place.agent().expect("an agent runs");
    let mut patch = place.command(&["patch", "--json", "--function", "busy", "--timeout", "60s", &file("fix.o")]);
    let client = patch.stdout(Stdio::piped()).spawn().expect("asap runs");
    thread::sleep(Duration::from_millis(500));
    let begin = Instant::now();
    assert!(Command::new("kill").arg(agent.to_string()).status().expect("kill runs").success());
    let output = client.wait_with_output().expect("it ends");
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    wait_until("the agent ends", || !runs(agent));
    let again = place.run(&["attach", "--pid", &busy.pid()]);
    assert!(again.status.success() && runs(busy.0.id().into()), "P1: {again:?}");
    assert!(place.run(&["detach", "--revert"]).status.success());
}

/// An agent that hangs while gates are closed would hold up threads of the target: the watchdog must end it (P1).
#[cfg(feature = "fault-points")]
#[test]
fn an_agent_that_hangs_with_closed_gates_is_ended() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let file = |name: &str| place.dir.path().join(name).to_str().expect("ASCII").to_owned();
    fs::write(
        file("hot.c"),
        "#include <unistd.h>\n\
         __attribute__((noinline)) int hot(int x) { __asm__ volatile(\"\"); return x * 1000003; }\n\
         int main(void) { for (int i = 0;; i++) usleep(1000 + (hot(i) & 1)); }\n",
    )
    .expect("written");
    fs::write(file("fix.c"), "int hot(int x) { return x + 1000; }\n").expect("written");
    let compile =
        |arguments: &[&str]| assert!(Command::new("gcc").args(arguments).status().expect("gcc runs").success());
    compile(&["-O2", "-w", "-o", &file("hot"), &file("hot.c")]);
    compile(&["-O2", "-c", "-o", &file("fix.o"), &file("fix.c")]);
    let hot = Sleeper(Command::new(file("hot")).spawn().expect("it runs"));
    let attached = place
        .command(&["attach", "--pid", &hot.pid()])
        .env("ASAP_FAULT", "gate.closed")
        .env("ASAP_FAULT_STOP", "1")
        .output();
    assert!(attached.expect("asap runs").status.success());
    let agent = place.agent().expect("an agent runs");
    let begin = Instant::now();
    let mut patch = place.command(&["patch", "--function", "hot", &file("fix.o")]).spawn().expect("asap runs");
    wait_until("the client learns of the agent's end", || patch.try_wait().is_ok_and(|status| status.is_some()));
    let patched = patch.wait().expect("it has ended");
    assert_eq!(patched.code(), Some(1), "{patched:?}");
    assert!(begin.elapsed() > Duration::from_secs(5), "it hung: {patched:?}");
    wait_until("the agent is ended", || !runs(agent));
    let rounds = || {
        let status = fs::read_to_string(format!("/proc/{}/status", hot.pid())).expect("the target lives");
        let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        count.and_then(|count| count.trim().parse::<u64>().ok()).expect("a number")
    };
    let before = rounds();
    wait_until("the target goes on", || rounds() > before + 20);
    let messages = fs::read_to_string(file("log/agent.log")).expect("a message");
    assert!(messages.contains("too long in its section \"closed gates\""), "{messages}");
}
