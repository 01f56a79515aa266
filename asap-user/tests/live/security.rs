//! What `docs/security.md` claims of the agent, seen from outside.

use crate::support::{Fixture, Lab, Source, maps};
use std::{
    fs,
    io::{Read, Write},
    os::unix::{
        fs::{PermissionsExt, chown, symlink},
        net::UnixStream,
        process::CommandExt,
    },
    process::{Command, Stdio},
};

/// Numbers of capabilities that an agent has no use for (linux/capability.h).
const UNNEEDED: [(u32, &str); 10] = [
    (0, "chown"),
    (6, "setgid"),
    (7, "setuid"),
    (8, "setpcap"),
    (12, "net_admin"),
    (13, "net_raw"),
    (16, "sys_module"),
    (17, "sys_rawio"),
    (22, "sys_boot"),
    (27, "mknod"),
];

fn field(pid: i32, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).expect("the kernel tells");
    value.trim().to_owned()
}

/// Threads of the agent, and its watchdog.
fn all_of(agent: i32) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{agent}/task")).expect("it runs").flatten();
    let mut all: Vec<i32> = tasks.filter_map(|task| task.file_name().to_str()?.parse().ok()).collect();
    for tid in all.clone() {
        let children = fs::read_to_string(format!("/proc/{agent}/task/{tid}/children")).unwrap_or_default();
        all.extend(children.split_whitespace().filter_map(|word| word.parse::<i32>().ok()));
    }
    all
}

#[test]
fn the_agent_has_given_up_what_it_does_not_need() {
    let Some(lab) = Lab::new("the_agent_has_given_up_what_it_does_not_need") else { return };
    let target = Source::of(&["workers.c"]).start(&["1"]);
    lab.attach(target.pid());
    let all = all_of(lab.agent());
    assert!(all.len() >= 3, "threads and watchdog: {all:?}");
    for pid in all {
        assert_eq!(field(pid, "NoNewPrivs"), "1", "{pid}");
        for set in ["CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb"] {
            let capabilities = u64::from_str_radix(&field(pid, set), 16).expect("a number");
            for (number, name) in UNNEEDED {
                assert!(capabilities >> number & 1 == 0, "{set} of {pid} has {name}");
            }
        }
    }
    let limits = fs::read_to_string(format!("/proc/{}/limits", lab.agent())).expect("it runs");
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).expect("told");
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
    let both = |line: &&String| line.split_whitespace().nth(1).is_some_and(|access| access.contains("wx"));
    assert_eq!(maps(lab.agent()).iter().find(both), None);
    // And it can do its work.
    lab.patch(&["--function", "victim", &lab.object("int victim(int x) { return x + 2; }")]);
    assert_eq!(target.number("call 1"), 3);
}

/// Says something to the agent as this user; gives what came back.
fn say_as(lab: &Lab, user: u32, what: &str) -> std::io::Result<String> {
    let socket = lab.path("run/agent.sock");
    let mut child = Command::new("python3");
    let script = format!(
        "import socket,sys\ns=socket.socket(socket.AF_UNIX)\ns.settimeout(20)\ns.connect({:?})\ns.sendall(sys.stdin.buffer.read())\n\
         data=b''\nwhile b'status' not in data:\n more=s.recv(65536)\n if not more: break\n data+=more\n\
         sys.stdout.buffer.write(data)",
        socket.to_str().expect("ASCII")
    );
    child.args(["-c", &script]).uid(user).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = child.spawn()?;
    child.stdin.take().expect("piped").write_all(what.as_bytes())?;
    let output = child.wait_with_output()?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(std::io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned()))
    }
}

#[test]
fn nobody_but_root_can_talk_to_the_agent_even_through_an_open_door() {
    let Some(lab) = Lab::new("nobody_but_root_can_talk_to_the_agent_even_through_an_open_door") else { return };
    let target = Source::of(&["workers.c"]).start(&["1"]);
    lab.attach(target.pid());
    let status = "{\"request\":\"status\",\"pid\":null}\n";
    assert!(say_as(&lab, 0, status).expect("root may").contains("\"status\""));
    let error = say_as(&lab, 65534, status).expect_err("the folder is closed").to_string();
    assert!(error.contains("PermissionError"), "{error}");
    // Somebody opens the door by mistake: the agent still looks who it is.
    let folder = lab.path("run");
    for path in [lab.path(""), folder.clone(), folder.join("agent.sock")] {
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).expect("chmod");
    }
    // The connection is closed without a word, with or before what was sent.
    match say_as(&lab, 65534, status) {
        Ok(said) => assert_eq!(said, ""),
        Err(error) => {
            let error = error.to_string();
            assert!(error.contains("ConnectionResetError") || error.contains("BrokenPipeError"), "{error}");
        }
    }
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).expect("chmod");
    assert_eq!(lab.status().targets.len(), 1);
}

#[test]
fn state_that_others_could_change_is_not_used() {
    let Some(lab) = Lab::new("state_that_others_could_change_is_not_used") else { return };
    let refused = |word: &str| {
        let answer = lab.asap(&["agent", "--background"]);
        let failure = answer.failure();
        assert!(failure.message.contains(word), "no `{word}` in {failure:?}");
    };
    // The log's folder.
    fs::create_dir(lab.path("log")).expect("made");
    fs::set_permissions(lab.path("log"), fs::Permissions::from_mode(0o777)).expect("chmod");
    refused("others can write it");
    fs::set_permissions(lab.path("log"), fs::Permissions::from_mode(0o755)).expect("chmod");
    chown(lab.path("log"), Some(65534), None).expect("chown");
    refused("belongs to user 65534");
    chown(lab.path("log"), Some(0), None).expect("chown");
    // The log itself.
    let elsewhere = lab.path("elsewhere");
    fs::write(&elsewhere, "precious").expect("written");
    symlink(&elsewhere, lab.path("log/audit.jsonl")).expect("linked");
    refused("audit.jsonl");
    assert_eq!(fs::read_to_string(&elsewhere).expect("there"), "precious");
    fs::remove_file(lab.path("log/audit.jsonl")).expect("removed");
    nix::unistd::mkfifo(&lab.path("log/audit.jsonl"), nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    refused("audit.jsonl");
    fs::remove_file(lab.path("log/audit.jsonl")).expect("removed");
    // The socket's folder.
    fs::create_dir(lab.path("run")).expect("made");
    fs::set_permissions(lab.path("run"), fs::Permissions::from_mode(0o711)).expect("chmod");
    refused("mode 0711");
    fs::set_permissions(lab.path("run"), fs::Permissions::from_mode(0o700)).expect("chmod");
    assert_eq!(lab.asap(&["agent", "--background", "--idle-exit", "0"]).code, 0);
    lab.agent();
}

#[test]
fn rubbish_on_the_socket_ends_the_connection_and_nothing_else() {
    let Some(lab) = Lab::new("rubbish_on_the_socket_ends_the_connection_and_nothing_else") else { return };
    assert_eq!(lab.asap(&["agent", "--background", "--idle-exit", "0"]).code, 0);
    let agent = lab.agent();
    for rubbish in
        [&b"\n"[..], b"{}\n", b"[[[[[[[[[[\n", b"\xff\xfe\0\0\n", b"{\"request\":\"patch\"}\n", &[b'['; 200_000]]
    {
        let mut stream = UnixStream::connect(lab.path("run/agent.sock")).expect("it listens");
        stream.set_read_timeout(Some(std::time::Duration::from_secs(30))).expect("set");
        let _ = stream.write_all(rubbish);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        assert!(answer.is_empty() || answer.contains("\"failed\""), "{answer}");
    }
    assert_eq!(lab.agent(), agent);
}

#[test]
fn a_container_s_debug_files_and_devices_lead_nobody_astray() {
    let Some(lab) = Lab::new("a_container_s_debug_files_and_devices_lead_nobody_astray") else { return };
    // A target in a root of its own, where the place of its debug file is a pipe that would block, and the folder above a link
    // that leads out of the root.
    let root = lab.path("root");
    fs::create_dir_all(root.join("usr/lib")).expect("made");
    let program =
        Source::of(&["workers.c"]).with(&["-O2", "-static", "-s", "-Wl,--build-id=0xabcdef0123456789"]).build();
    fs::copy(&program, root.join("program")).expect("copied");
    let outside = lab.path("outside/.build-id/ab");
    fs::create_dir_all(&outside).expect("made");
    nix::unistd::mkfifo(&outside.join("cdef0123456789.debug"), nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    symlink(lab.path("outside"), root.join("usr/lib/debug")).expect("linked");
    let mut command = Command::new("chroot");
    let target = Fixture::start(command.arg(&root).arg("/program").arg("1"));
    lab.attach(target.pid());
    // The function is not exported and the file is stripped: its debug file is looked for, and nothing is found.
    let answer = lab.asap(&["patch", "--function", "victim", &lab.object("int victim(int x) { return x + 2; }")]);
    answer.refusal(&["victim"]);
    // Within the root, a pipe.
    fs::remove_file(root.join("usr/lib/debug")).expect("removed");
    fs::create_dir_all(root.join("usr/lib/debug/.build-id/ab")).expect("made");
    let place = root.join("usr/lib/debug/.build-id/ab/cdef0123456789.debug");
    nix::unistd::mkfifo(&place, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    let answer = lab.asap(&["patch", "--function", "victim", &lab.object("int victim(int x) { return x + 2; }")]);
    answer.refusal(&["victim"]);
    // And what belongs there is used.
    fs::remove_file(&place).expect("removed");
    let unstripped = Source::of(&["workers.c"]).with(&["-O2", "-static", "-Wl,--build-id=0xabcdef0123456789"]).build();
    fs::copy(unstripped, &place).expect("copied");
    lab.patch(&["--function", "victim", &lab.object("int victim(int x) { return x + 2; }")]);
    assert_eq!(target.number("call 1"), 3);
}
