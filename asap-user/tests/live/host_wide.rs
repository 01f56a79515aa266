//! Selectors mean processes of the whole machine. Here the machine is a pid namespace of the test's own, with its own `/proc`: the
//! test runs itself again inside of it, as its process 1.

use crate::support::{Fixture, Lab, Source, runs};
use asap::report::{FailureKind, Reply, ScopedOutcome, ScopedReport, TargetState};
use std::{fs, os::unix::fs::MetadataExt, path::Path, process::Command};

/// Runs the test `name` again as process 1 of a pid namespace; says whether this is that process.
fn is_inside(name: &str) -> bool {
    if std::process::id() == 1 {
        return true;
    }
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED (needs root): {name}");
        return false;
    }
    let mut again = Command::new("unshare");
    again.args(["--pid", "--mount", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]);
    again.arg(std::env::current_exe().expect("this program"));
    again.args(["--exact", &format!("host_wide::{name}"), "--nocapture", "--test-threads=1"]);
    let output = again.output().expect("unshare runs");
    let said = String::from_utf8_lossy(&output.stdout);
    print!("{said}");
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("1 passed"), "{}", output.status);
    false
}

fn scoped(lab: &Lab, arguments: &[&str], code: i32) -> ScopedReport {
    let answer = lab.asap(arguments);
    assert_eq!(answer.code, code, "{answer:?}");
    match serde_json::from_str(&answer.text) {
        Ok(Reply::Scoped(report)) => report,
        other => panic!("{other:?}: {answer:?}"),
    }
}

fn pids(report: &ScopedReport) -> Vec<i32> {
    let mut pids: Vec<i32> = report.targets.iter().map(|target| target.pid).collect();
    pids.sort_unstable();
    pids
}

fn sorted(targets: &[&Fixture]) -> Vec<i32> {
    let mut pids: Vec<i32> = targets.iter().map(|target| target.pid()).collect();
    pids.sort_unstable();
    pids
}

#[test]
fn all_processes_of_an_executable_are_patched_and_those_left_out_are_named() {
    if !is_inside("all_processes_of_an_executable_are_patched_and_those_left_out_are_named") {
        return;
    }
    let lab = Lab::new("host-wide").expect("root");
    let source = Source::of(&["workers.c"]);
    let (program, fix) = (source.build(), lab.object("int victim(int x) { return x + 2; }"));
    let program = program.to_str().expect("ASCII");
    let (one, two, other) = (source.start(&["1"]), source.start(&["1"]), Source::of(&["loads.c"]).start(&[]));
    // Nobody is there to be asked: the list is shown, and nothing is done.
    let answer = lab.asap(&["patch", "--exe", program, "--function", "victim", &fix]);
    assert_eq!((answer.code, answer.failure().kind), (2, FailureKind::Usage));
    assert!(answer.errors.contains(&one.pid_text()) && answer.errors.contains(&two.pid_text()), "{answer:?}");
    assert_eq!((one.number("call 1"), two.number("call 1")), (2, 2));

    let patch = ["patch", "--exe", program, "--yes", "--function", "victim", "--name", "wide", &fix];
    let report = scoped(&lab, &patch, 0);
    lab.agent();
    assert_eq!(pids(&report), sorted(&[&one, &two]));
    assert_eq!((one.number("call 1"), two.number("call 1"), other.number("beats") >= 0), (3, 3, true));
    assert_eq!(lab.status().targets.len(), 2, "the other program is not attached");

    // A dry run leaves what it attached, and a process that is traced is left out, and listed so.
    let third = source.start(&["1"]);
    let tracer = Tracer::of(third.pid());
    let report = scoped(&lab, &["attach", "--exe", program, "--yes"], 0);
    assert_eq!(pids(&report), sorted(&[&one, &two]));
    assert_eq!(lab.status().targets.len(), 2);
    let listed = lab.asap_as_text(&["attach", "--exe", program, "--yes"]);
    let line = listed.errors.lines().find(|line| line.contains(&third.pid_text())).expect("it is listed");
    assert!(line.contains("left out: it is being traced by process"), "{line}");
    drop(tracer);
    let dry = scoped(&lab, &["patch", "--exe", program, "--yes", "--dry-run", "--function", "victim", &fix], 0);
    assert_eq!(dry.targets.len(), 3);
    assert_eq!(lab.status().targets.len(), 2, "a dry run leaves what it attached for it");

    // The log has one request, with its processes.
    let log = fs::read_to_string(lab.path("log/audit.jsonl")).expect("a log");
    let results: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let wide = results.iter().find(|record| record["patch"] == "wide" && record["phase"] == "result").expect("logged");
    let mut logged: Vec<i64> =
        wide["targets"].as_array().expect("targets").iter().filter_map(|pid| pid.as_i64()).collect();
    logged.sort_unstable();
    assert_eq!(logged, sorted(&[&one, &two]).into_iter().map(i64::from).collect::<Vec<_>>());
    assert_eq!(wide["result"], "done");
}

/// strace or gdb, as far as the target sees: somebody who traces it.
struct Tracer(std::process::Child);

impl Tracer {
    fn of(pid: i32) -> Self {
        // PTRACE_SEIZE; it ends with its standard input.
        let script = format!(
            "import ctypes, sys\nif ctypes.CDLL(None).ptrace(0x4206, {pid}, 0, 0): sys.exit(1)\nprint('+', flush=True)\nsys.stdin.read()"
        );
        let mut child = Command::new("python3")
            .args(["-c", &script])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("python3 runs");
        let mut word = [0; 1];
        std::io::Read::read_exact(child.stdout.as_mut().expect("piped"), &mut word).expect("it traces");
        Self(child)
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

#[test]
fn some_that_can_not_be_done_are_reported_and_with_all_or_none_nothing_is() {
    if !is_inside("some_that_can_not_be_done_are_reported_and_with_all_or_none_nothing_is") {
        return;
    }
    let lab = Lab::new("host-wide").expect("root");
    // Two programs that map one library; one of them never leaves it.
    let library = Source::of(&["plugin.c"]).with(&["-O2", "-fPIC", "-shared"]).build();
    let host = Source::of(&["host.c"]).build();
    let start = |library: &Path| Fixture::start(Command::new(&host).arg(library));
    let (one, two) = (start(&library), start(&library));
    let fix = lab.object("int plugged(int x, int descriptor) { (void)descriptor; return x + 2; }");
    two.ask("enter");
    let library_name = library.file_name().and_then(|name| name.to_str()).expect("ASCII").to_owned();
    let base = ["patch", "--lib", &library_name, "--yes", "--timeout", "300ms", "--function", "plugged", &fix];
    let all_or_none = lab.asap(&[&base[..], &["--all-or-none"]].concat());
    let failure = all_or_none.failure();
    assert_eq!((all_or_none.code, failure.kind), (4, FailureKind::Timeout), "{failure:?}");
    assert_eq!(one.number("call 1"), 2);
    assert!(lab.status().targets.is_empty(), "what was attached for it is left again");

    let report = scoped(&lab, &base, 3);
    lab.agent();
    let failure = report.failure().expect("one is left");
    assert_eq!((failure.kind, failure.state), (FailureKind::Partial, TargetState::PartlyDone), "{failure:?}");
    for target in &report.targets {
        match (&target.outcome, target.pid == one.pid()) {
            (ScopedOutcome::Patched(_), true) => {}
            (ScopedOutcome::Failed(failure), false) => assert_eq!(failure.kind, FailureKind::Timeout),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(one.number("call 1"), 3);
    assert_eq!(lab.status().targets.len(), 1, "the one that refused is left as it was");
    assert!(runs(two.pid()));
    // The library is replaced, as packages are upgraded: who maps the old one is found by its name all the same.
    let new = library.with_extension("new");
    fs::copy(&library, &new).expect("copied");
    fs::rename(&new, &library).expect("renamed");
    let report = scoped(&lab, &["attach", "--lib", library.to_str().expect("ASCII"), "--yes"], 0);
    assert_eq!(pids(&report), sorted(&[&one, &two]));
}

#[test]
fn builds_and_control_groups_select_and_process_1_is_left_out() {
    if !is_inside("builds_and_control_groups_select_and_process_1_is_left_out") {
        return;
    }
    let lab = Lab::new("host-wide").expect("root");
    let with_id = |id: &'static str| Source::of(&["workers.c"]).with(&["-O2", "-fpie", "-pie", id]).start(&["1"]);
    let one = with_id("-Wl,--build-id=0x00112233445566778899");
    let two = with_id("-Wl,--build-id=0xffeeddccbbaa9988");
    let report = scoped(&lab, &["attach", "--all-with-build-id", "00112233445566", "--yes"], 0);
    lab.agent();
    assert_eq!(pids(&report), [one.pid()]);
    for (id, code) in [("0011", 2), ("no hex digits", 2), ("0123456789", 1)] {
        let answer = lab.asap(&["attach", "--all-with-build-id", id, "--yes"]);
        assert_eq!(answer.code, code, "{id}: {answer:?}");
    }
    // Everything here maps the C library, process 1, asap and its agent as well.
    let listed = lab.asap_as_text(&["attach", "--lib", "libc.so.6", "--yes"]);
    assert_eq!(listed.code, 0, "{listed:?}");
    let line = |start: &str| listed.errors.lines().find(|line| line.trim_start().starts_with(start)).map(str::to_owned);
    assert!(line("1 ").is_some_and(|line| line.contains("left out: it is the system's first process")), "{listed:?}");
    let agent = format!("{} ", lab.agent());
    assert!(line(&agent).is_some_and(|line| line.contains("left out: it is asap itself")), "{listed:?}");
    let attached: Vec<i32> = lab.status().targets.iter().map(|target| target.pid).collect();
    assert_eq!(attached, sorted(&[&one, &two]));
    // A control group of the test's own, where there may be one.
    let own = format!("asap-test-{}", fs::metadata("/proc/self/ns/pid").map_or(0, |facts| facts.ino()));
    let hierarchies =
        ["", "unified/", "systemd/", "cpu/", "pids/", "freezer/"].map(|name| format!("/sys/fs/cgroup/{name}"));
    // Both versions (linux/magic.h).
    let is_hierarchy = |folder: &&String| {
        let kind = nix::sys::statfs::statfs(folder.as_str()).map(|facts| facts.filesystem_type().0);
        kind.is_ok_and(|kind| [0x6367_7270, 0x0027_e0eb].contains(&kind))
    };
    let Some(hierarchy) = hierarchies.iter().find(is_hierarchy) else {
        println!("SKIPPED: there are no control groups here");
        return;
    };
    let group = format!("{hierarchy}{own}");
    let moved = fs::create_dir(&group).and_then(|()| fs::write(format!("{group}/cgroup.procs"), two.pid_text()));
    let answer = moved.as_ref().ok().map(|()| lab.asap(&["attach", "--unit", &own, "--yes"]));
    let _ = fs::write(format!("{hierarchy}cgroup.procs"), two.pid_text());
    // The agent's helper was there for a moment.
    lab.detach(&["--pid", &two.pid_text()]);
    let _ = fs::remove_dir(&group);
    match answer {
        Some(answer) => {
            assert_eq!(answer.code, 0, "{answer:?}");
            let Ok(Reply::Scoped(report)) = serde_json::from_str(&answer.text) else { panic!("{answer:?}") };
            assert_eq!(pids(&report), [two.pid()]);
        }
        None => println!("SKIPPED: no process can be moved into a control group here: {moved:?}"),
    }
}
