//! `asap run`: a program in the sandbox from its first instruction, as if it had been started alone.

use crate::{
    guards::run,
    support::{Lab, Source, kill, lab_answer, maps, program, runs, wait_until},
};
use std::{
    fs,
    io::{Read, Write},
    path::Path,
    process::{Command, Stdio},
};

fn sh(lab: &Lab, script: &str) -> (String, i32) {
    let answer = run(lab, &[], Path::new("/bin/sh"), &["-c", script]);
    (answer.text, answer.code)
}

#[test]
fn the_end_of_a_program_is_that_of_asap() {
    let Some(lab) = Lab::new("the_end_of_a_program_is_that_of_asap") else { return };
    assert_eq!(sh(&lab, "echo out; exit 42"), ("out\n".to_owned(), 42));
    for (signal, code) in [("KILL", 137), ("TERM", 143), ("SEGV", 139)] {
        assert_eq!(sh(&lab, &format!("kill -{signal} $$")).1, code, "{signal}");
    }
    for (program, code) in [("/nonexistent/program", 127), ("/etc/passwd", 126), ("/etc", 126)] {
        let answer = run(&lab, &[], Path::new(program), &[]);
        assert_eq!(answer.code, code, "{program}: {answer:?}");
        assert!(answer.text.contains(program), "{answer:?}");
    }
    // A 32-bit program can't be one of ours; neither can one that asap is not told.
    assert_eq!(lab.asap(&["run"]).code, 2);
    let answer = run(&lab, &["--user", "nobody-of-that-name"], Path::new("/bin/true"), &[]);
    assert_eq!(answer.code, 125, "{answer:?}");
}

#[test]
fn a_program_is_inside_before_its_first_instruction() {
    let Some(lab) = Lab::new("a_program_is_inside_before_its_first_instruction") else { return };
    // It is asked what it sees of itself: curtains over its own text, the linker's, and the library's, which came later.
    let seen = sh(&lab, "exec 3</proc/$$/maps; while read -r line <&3; do echo \"$line\"; done; sleep 1; grep -c memfd:asap /proc/$$/maps").0;
    let curtains = seen.lines().filter(|line| line.contains("/memfd:asap-text")).count();
    assert!(curtains >= 2, "its own text and the linker's: {seen}");
    let later: usize = seen.lines().last().and_then(|line| line.parse().ok()).expect("a number");
    assert!(later > 2, "libraries, too: {seen}");
}

#[test]
fn a_program_has_the_streams_environment_and_user_that_it_is_given() {
    let Some(lab) = Lab::new("a_program_has_the_streams_environment_and_user_that_it_is_given") else { return };
    let mut command = Command::new(program());
    command.arg("--socket").arg(lab.path("run/agent.sock")).arg("--log").arg(lab.path("log/audit.jsonl"));
    command.env("ASAP_JOURNAL", "").env("ASAP_KEYS", lab.path("keys")).env("WORD", "given");
    command.args([
        "run",
        "--user",
        "nobody",
        "--",
        "sh",
        "-c",
        "cat; echo $WORD; id -un; pwd; echo error >&2; cat /proc/self/status",
    ]);
    command.current_dir("/usr").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("asap runs");
    child.stdin.take().expect("piped").write_all(b"what goes in\n").expect("written");
    let output = child.wait_with_output().expect("it ends");
    lab.agent();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.starts_with("what goes in\ngiven\nnobody\n/usr\n"), "{output:?}");
    assert_eq!(&*output.stderr, b"error\n");
    let mask = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim).map(str::to_owned);
    let native = Command::new("cat").arg("/proc/self/status").output().expect("cat runs");
    let native = String::from_utf8_lossy(&native.stdout).into_owned();
    for name in ["SigBlk:", "SigIgn:", "SigPnd:", "ShdPnd:", "TracerPid:", "NoNewPrivs:", "Seccomp:"] {
        let expected = native.lines().find_map(|line| line.strip_prefix(name)).map(str::trim).map(str::to_owned);
        assert!(expected.is_some(), "{native}");
        assert_eq!(mask(name), expected, "{name} {text}");
    }
}

#[test]
fn signals_that_are_sent_to_asap_go_to_the_program() {
    let Some(lab) = Lab::new("signals_that_are_sent_to_asap_go_to_the_program") else { return };
    let ready = lab.path("ready");
    let script = format!(
        "trap 'echo usr1' USR1; trap 'echo hup' HUP; trap 'echo term; exit 7' TERM; echo $$ > {0}.new; mv {0}.new {0}; \
         while :; do sleep 0.01; done",
        ready.display()
    );
    let child = lab.start(&["run", "--", "bash", "-c", &script]);
    wait_until("it is ready", || ready.exists());
    lab.agent();
    let pid: i32 = fs::read_to_string(&ready).expect("written").trim().parse().expect("a pid");
    let send = |signal| {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), signal).expect("it runs");
        std::thread::sleep(std::time::Duration::from_millis(300));
    };
    send(nix::sys::signal::Signal::SIGUSR1);
    send(nix::sys::signal::Signal::SIGHUP);
    // Stopped with the program, as a job; and continued with it.
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGSTOP).expect("it runs");
    wait_until("asap stops", || crate::support::is_stopped(child.id() as i32));
    send(nix::sys::signal::Signal::SIGCONT);
    wait_until("both go on", || !crate::support::is_stopped(pid));
    send(nix::sys::signal::Signal::SIGTERM);
    let answer = lab_answer(child);
    assert_eq!((answer.text.as_str(), answer.code), ("usr1\nhup\nterm\n", 7), "{answer:?}");
    assert!(!runs(pid));
}

#[test]
fn a_program_outlives_asap_and_the_agent() {
    let Some(lab) = Lab::new("a_program_outlives_asap_and_the_agent") else { return };
    let target = Source::of(&["workers.c"]).build();
    let mut command = Command::new(program());
    command.arg("--socket").arg(lab.path("run/agent.sock")).arg("--log").arg(lab.path("log/audit.jsonl"));
    command.env("ASAP_JOURNAL", "").env("ASAP_KEYS", lab.path("keys"));
    command.args(["run", "--"]).arg(target).arg("2").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("asap runs");
    let (mut input, mut output) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
    let mut answer = |words: &[u8]| {
        input.write_all(words).expect("it reads");
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            assert_eq!(output.read(&mut byte).expect("it writes"), 1, "it has ended");
            line.push(byte[0]);
        }
        String::from_utf8_lossy(&line).into_owned()
    };
    assert_eq!(answer(b""), "ready\n");
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).expect("it runs");
    let pid: i32 = children.split_whitespace().next().expect("a child").parse().expect("a pid");
    assert!(maps(pid).iter().any(|line| line.contains("/memfd:asap-text")), "{:#?}", maps(pid));
    kill(child.id() as i32);
    child.wait().expect("it was killed");
    assert!(answer(b"counts\n").split_whitespace().count() >= 3);
    lab.kill_agent();
    assert!(answer(b"counts\n").split_whitespace().count() >= 3);
    kill(pid);
}

/// Which scripts of real programs are fast enough to be run each time; all of them: `cargo xtask programs`.
const FAST: [&str; 8] = ["bash", "coreutils", "compressors", "lua", "perl", "python", "sqlite", "nginx"];

#[test]
fn real_programs_do_the_same_in_the_sandbox() {
    let Some(lab) = Lab::new("real_programs_do_the_same_in_the_sandbox") else { return };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs");
    for name in FAST {
        let script = folder.join(name).with_extension("sh");
        let text = fs::read_to_string(&script).expect("a script");
        let needs = text.lines().find_map(|line| line.strip_prefix("# needs: ")).unwrap_or_default();
        if let Some(missing) =
            needs.split(' ').filter(|word| word.starts_with('/')).find(|file| !Path::new(file).exists())
        {
            println!("SKIPPED: {missing} is not installed: {name}");
            continue;
        }
        let native = script_output(&lab, &script, name, "");
        assert!(!native.0.is_empty() && native.1 == Some(0), "{name}, natively: {native:?}");
        let (socket, log) = (lab.path("run/agent.sock"), lab.path("log/audit.jsonl"));
        let (socket, log) = (socket.display(), log.display());
        let asap = format!("{} --socket {socket} --log {log} run --", program().display());
        let inside = script_output(&lab, &script, name, &asap);
        lab.agent();
        assert_eq!(inside, native, "{name}");
    }
}

/// Output and exit status of a script in a folder of its own, with its programs started by `run`.
fn script_output(lab: &Lab, script: &Path, name: &str, run: &str) -> (String, Option<i32>) {
    use std::os::unix::process::CommandExt;
    let folder = lab.path(&format!("{name}-{}", if run.is_empty() { "native" } else { "inside" }));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir(&folder).expect("a folder");
    for open in [folder.parent().expect("the laboratory"), &folder] {
        fs::set_permissions(open, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("it is ours");
    }
    let port =
        std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port();
    let mut command = Command::new("sh");
    command.arg("-eu").arg(script).current_dir(&folder).env("RUN", run).env("PORT", port.to_string());
    command.env("ASAP_JOURNAL", lab.path("journal")).env("ASAP_KEYS", lab.path("keys")).process_group(0);
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().expect("a shell");
    (String::from_utf8_lossy(&output.stdout).into_owned(), output.status.code())
}
