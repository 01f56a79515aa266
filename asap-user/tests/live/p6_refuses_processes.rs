//! P6: processes that can't be targets are refused with the reason, and nothing happens to them.

use crate::support::{Fixture, Lab, Snapshot, Source, program, runs};
use nix::{sys::ptrace, unistd::Pid};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    process::{Command, Stdio},
};

fn sleeper() -> Fixture {
    Source::of(&["confined.c"]).start(&[])
}

fn attach(lab: &Lab, pid: i32) -> crate::support::Answer {
    lab.asap(&["attach", "--pid", &pid.to_string()])
}

#[test]
fn p6_a_pid_that_is_nobodys() {
    let Some(lab) = Lab::new("p6_a_pid_that_is_nobodys") else { return };
    // Above the highest pid that this kernel gives out.
    let limit: i32 =
        fs::read_to_string("/proc/sys/kernel/pid_max").expect("readable").trim().parse().expect("a number");
    attach(&lab, limit + 1).refusal(&["no process"]);
}

#[test]
fn p6_a_zombie() {
    let Some(lab) = Lab::new("p6_a_zombie") else { return };
    let target = sleeper();
    target.make_zombie();
    attach(&lab, target.pid()).refusal(&["zombie"]);
}

#[test]
fn p6_a_thread_of_the_kernel() {
    let Some(lab) = Lab::new("p6_a_thread_of_the_kernel") else { return };
    if fs::read_to_string("/proc/2/comm").is_ok_and(|name| name == "kthreadd\n") {
        attach(&lab, 2).refusal(&["kernel"]);
    } else {
        println!("SKIPPED: no thread of the kernel is visible here");
    }
}

#[test]
fn p6_a_thread_that_is_no_process() {
    let Some(lab) = Lab::new("p6_a_thread_that_is_no_process") else { return };
    let target = Source::of(&["workers.c"]).start(&["1"]);
    let tasks = fs::read_dir(format!("/proc/{}/task", target.pid())).expect("it runs").flatten();
    let tids = tasks.filter_map(|task| task.file_name().to_string_lossy().parse::<i32>().ok());
    let thread = tids.into_iter().find(|&tid| tid != target.pid()).expect("a thread");
    let refusal = attach(&lab, thread).refusal(&["thread", &target.pid_text()]);
    assert!(refusal.way_out.contains(&target.pid_text()), "{refusal:?}");
}

/// A 32-bit program: sleeps for ever. Written by hand, since not every system has a compiler for it.
fn elf32() -> Vec<u8> {
    // mov eax, 29 (pause); int 0x80; jmp back
    let code = [0xb8, 29, 0, 0, 0, 0xcd, 0x80, 0xeb, 0xf7];
    let base: u32 = 0x0804_8000;
    let length = 52 + 32 + code.len() as u32;
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend([2_u16, 3].iter().flat_map(|half| half.to_le_bytes())); // ET_EXEC, EM_386
    file.extend([1, base + 52 + 32, 52, 0, 0].iter().flat_map(|word: &u32| word.to_le_bytes()));
    file.extend([52_u16, 32, 1, 0, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    // PT_LOAD, readable and executable
    file.extend([1, 0, base, base, length, length, 5, 0x1000].iter().flat_map(|word: &u32| word.to_le_bytes()));
    file.extend(code);
    file
}

#[test]
fn p6_a_32_bit_program() {
    let Some(lab) = Lab::new("p6_a_32_bit_program") else { return };
    let program = lab.path("program32");
    fs::write(&program, elf32()).expect("written");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("chmod");
    let Ok(mut child) = Command::new(&program).spawn() else {
        println!("SKIPPED: this kernel runs no 32-bit programs");
        return;
    };
    let refused = attach(&lab, child.id() as i32);
    let lives = runs(child.id() as i32);
    let _ = child.kill();
    let _ = child.wait();
    assert!(lives);
    refused.refusal(&["32-bit"]);
}

#[test]
fn p6_the_agent_itself() {
    let Some(lab) = Lab::new("p6_the_agent_itself") else { return };
    let target = sleeper();
    lab.attach(target.pid());
    let agent = lab.agent();
    attach(&lab, agent).refusal(&["agent itself"]);
    let children = fs::read_to_string(format!("/proc/{agent}/task/{agent}/children")).expect("it runs");
    let watchdog = children.trim().parse().expect("one child");
    attach(&lab, watchdog).refusal(&["watchdog"]);
    assert!(runs(watchdog));
    // Nor the helper in a target.
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", target.pid())).expect("it runs");
    attach(&lab, children.trim().parse().expect("one child")).refusal(&["traced"]);
    assert_eq!(lab.agent(), agent, "it lives");
}

#[test]
fn p6_process_1_of_its_namespace() {
    let Some(lab) = Lab::new("p6_process_1_of_its_namespace") else { return };
    // Never this system's: in there, the shell is process 1, and all ends with it.
    let asap = format!(
        "{} --json --socket {} --log {} attach --pid 1; echo $?",
        program().display(),
        lab.path("inner/agent.sock").display(),
        lab.path("inner-log/audit.jsonl").display()
    );
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", &asap]).env("ASAP_JOURNAL", "");
    let output = command.stdin(Stdio::null()).output().expect("unshare runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let (json, code) = text.trim().rsplit_once('\n').unwrap_or_else(|| panic!("{output:?}"));
    let document: serde_json::Value = serde_json::from_str(json).unwrap_or_else(|error| panic!("{error}: {text}"));
    let failed = &document["failed"];
    assert_eq!((code, failed["kind"].as_str(), failed["state"].as_str()), ("1", Some("refused"), Some("untouched")));
    assert!(failed["message"].as_str().is_some_and(|words| words.contains("process 1")), "{failed}");
}

#[test]
fn p6_a_process_that_is_being_traced() {
    let Some(lab) = Lab::new("p6_a_process_that_is_being_traced") else { return };
    let target = sleeper();
    let pid = Pid::from_raw(target.pid());
    ptrace::seize(pid, ptrace::Options::empty()).expect("traced by this test");
    let refusal = attach(&lab, target.pid()).refusal(&["traced", &nix::unistd::gettid().to_string()]);
    assert!(refusal.way_out.contains("debugger"), "{refusal:?}");
    // It is detached from as it is: a seized process that runs has to stop for that.
    ptrace::interrupt(pid).expect("stops");
    nix::sys::wait::waitpid(pid, None).expect("stopped");
    ptrace::detach(pid, None).expect("free");
    assert_eq!(target.number("call 1"), 2);
    lab.attach(target.pid());
    assert_eq!(lab.detach(&[]).clean, Some(true));
}

#[test]
fn p6_a_process_under_gdb() {
    let Some(lab) = Lab::new("p6_a_process_under_gdb") else { return };
    let target = sleeper();
    let mut command = Command::new("gdb");
    command.args(["-q", "-nx", "-p", &target.pid_text()]).stdin(Stdio::piped());
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let Ok(mut gdb) = command.spawn() else {
        println!("SKIPPED: no gdb here");
        return;
    };
    crate::support::wait_until("gdb traces it", || {
        let status = fs::read_to_string(format!("/proc/{}/status", target.pid())).unwrap_or_default();
        status.lines().any(|line| line == format!("TracerPid:\t{}", gdb.id()))
    });
    let refused = attach(&lab, target.pid());
    drop(gdb.stdin.take());
    let _ = gdb.wait();
    refused.refusal(&["traced", "gdb"]);
    assert_eq!(target.number("call 1"), 2);
}

#[test]
fn p6_attached_twice_and_not_at_all() {
    let Some(lab) = Lab::new("p6_attached_twice_and_not_at_all") else { return };
    let (target, other) = (sleeper(), sleeper());
    lab.attach(target.pid());
    let before = Snapshot::of(target.pid());
    attach(&lab, target.pid()).refusal(&["attached already"]);
    let fix = lab.object("int victim(int x) { return x; }");
    for command in [&["patch", "--function", "victim", &fix][..], &["revert"], &["detach"]] {
        let mut arguments = command.to_vec();
        let pid = other.pid_text();
        arguments.extend(["--pid", &pid]);
        lab.asap(&arguments).refusal(&["not attached"]);
    }
    Snapshot::of(target.pid()).assert_same(&before, "refusals");
    // With two targets, one has to be named: a question of the command line.
    lab.attach(other.pid());
    let failure = lab.asap(&["patch", "--function", "victim", &fix]).failure();
    assert_eq!((failure.kind.exit_code(), failure.message.contains(&other.pid_text())), (2, true), "{failure:?}");
    lab.patch(&["--pid", &other.pid_text(), "--function", "victim", &fix]);
    assert_eq!((target.number("call 1"), other.number("call 1")), (2, 1));
    lab.detach(&["--pid", &other.pid_text(), "--revert"]);
    assert_eq!(other.number("call 1"), 2);
}

#[test]
fn p6_another_agents_target() {
    let Some(lab) = Lab::new("p6_another_agents_target") else { return };
    let target = sleeper();
    lab.attach(target.pid());
    let fix = lab.object("int victim(int x) { return x + 2; }");
    lab.patch(&["--function", "victim", &fix]);
    // A second agent, at another socket.
    let mut command = Command::new(program());
    let socket = lab.path("second/agent.sock");
    let log = lab.path("second-log/audit.jsonl");
    command.env("ASAP_JOURNAL", "").arg("--json").arg("--socket").arg(&socket).arg("--log").arg(&log);
    let output = command.args(["attach", "--pid", &target.pid_text()]).output().expect("asap runs");
    let mut stop = Command::new(program());
    let stopped = stop.arg("--socket").arg(&socket).arg("--log").arg(&log).arg("stop").output().expect("asap runs");
    assert!(stopped.status.success());
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("another agent"), "{output:?}");
    assert_eq!(target.number("call 1"), 3, "the first agent's patch works");
    assert_eq!(lab.status().targets[0].patches.len(), 1);
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true), "the first agent still has the target in hand");
    assert_eq!(target.number("call 1"), 2);
}
