//! Every place where the agent touches a target, a file or a socket, with everything that can go wrong there: the agent dies, hangs,
//! a call fails, there is no memory; the target exits, runs another program, forks, gets signals, makes threads. After each the
//! target must be alive and right, nobody may be parked, no helper may be left, and a next agent must be able to clear up.
//!
//! On demand: `ASAP_FAULT_WALK=all` walks all of them, a number so many, at random, and `ASAP_FAULT_REPORT=FILE` writes what came of
//! each as JSON. docs/safety.md says which losses are known.

use crate::support::{
    Fixture, Lab, PATIENCE, Random, Snapshot, Source, is_stopped, kill, lab_answer, maps, runs, wait_until,
};
use std::{
    collections::BTreeMap,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::Child,
    time::{Duration, Instant},
};

/// What happens at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
enum Deed {
    /// The agent is killed.
    Kill,
    /// It hangs.
    Stop,
    /// The call fails.
    Error,
    /// The target is killed.
    Exit,
    /// It runs its program anew.
    Exec,
    /// It forks.
    Fork,
    /// It gets a storm of signals.
    Signals,
    /// It makes threads that come and go.
    Threads,
}

const DEEDS: [Deed; 8] =
    [Deed::Kill, Deed::Stop, Deed::Error, Deed::Exit, Deed::Exec, Deed::Fork, Deed::Signals, Deed::Threads];

impl Deed {
    /// For `ASAP_FAULT_DO`.
    fn asked(self, point: &str) -> String {
        match self {
            Self::Kill => "kill".to_owned(),
            Self::Stop => "stop".to_owned(),
            Self::Error if point == "touch.map" => format!("error {}", nix::libc::ENOMEM),
            Self::Error => format!("error {}", nix::libc::EIO),
            Self::Exit | Self::Exec | Self::Fork | Self::Signals | Self::Threads => "meet".to_owned(),
        }
    }

    /// Whether the target is as before when all is over, but for what it did by itself.
    const fn changes_the_target(self) -> bool {
        matches!(self, Self::Exit | Self::Exec | Self::Fork | Self::Threads)
    }
}

/// A fault to walk.
#[derive(Clone, Debug, serde::Serialize)]
struct Fault {
    /// In which operation it is met, as things usually go.
    operation: &'static str,
    point: String,
    /// Which pass of the point, counted over all operations.
    pass: u32,
    deed: Deed,
}

/// What came of one.
#[derive(Debug, serde::Serialize)]
struct Walked {
    #[serde(flatten)]
    fault: Fault,
    /// It took place; which pass is the last of a point may vary.
    reached: bool,
    /// The operation that failed, and what was said.
    failed: Option<(&'static str, String)>,
    /// What was lost. There must be none.
    loss: Option<String>,
}

struct Walk {
    lab: Lab,
    fix: String,
    source: Source,
    meeting: PathBuf,
}

/// The operations, in the order in which they are walked.
fn operations<'a>(pid: &'a str, fix: &'a str) -> [(&'static str, Vec<&'a str>); 7] {
    [
        ("attach", vec!["attach", "--pid", pid]),
        ("patch", vec!["patch", "--function", "victim", "--timeout", "20s", fix]),
        ("revert", vec!["revert", "--timeout", "20s"]),
        ("sandbox enter", vec!["sandbox", "enter"]),
        ("sandbox leave", vec!["sandbox", "leave"]),
        ("patch again", vec!["patch", "--function", "victim", "--timeout", "20s", fix]),
        ("detach", vec!["detach", "--revert", "--timeout", "20s"]),
    ]
}

/// All threads of the target compute, and compute right.
fn assert_well(target: &Fixture) {
    assert!(runs(target.pid()), "the target has ended");
    let before = target.numbers("counts");
    let sum = |counts: &[i64]| counts[..3].iter().sum::<i64>();
    wait_until("the workers work", || sum(&target.numbers("counts")) > sum(&before) + 200);
    assert_eq!(target.numbers("counts")[3], 0, "wrong results");
    assert!((2..=3).contains(&target.number("call 1")));
}

/// Processes that somebody traces.
fn traced_by(agent: i32) -> Vec<i32> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let line = format!("TracerPid:\t{agent}\n");
    pids.filter(|pid| fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|status| status.contains(&line)))
        .collect()
}

/// Code that belongs to no file, and memory of ours.
fn ours(pid: i32) -> Vec<String> {
    let is_ours = |line: &String| {
        let mut words = line.split_whitespace();
        let access = words.nth(1).unwrap_or_default();
        let name = words.nth(3).unwrap_or_default();
        line.contains("asap-") || (access.contains('x') && name.is_empty())
    };
    maps(pid).into_iter().filter(is_ours).collect()
}

impl Walk {
    fn new(lab: Lab) -> Self {
        let fix = lab.object("int victim(int x) { return x + 2; }");
        let meeting = lab.path("meeting");
        lab.set_environment("ASAP_FAULT_MEET", meeting.to_str().expect("ASCII"));
        Self { lab, fix, source: Source::of(&["workers.c"]), meeting }
    }

    fn start(&self) -> Fixture {
        let target = self.source.start(&["2"]);
        target.ask("handle");
        target
    }

    /// Starts an agent, so that it is known before anything is asked of it.
    fn start_agent(&self) -> i32 {
        let answer = self.lab.asap(&["agent", "--background", "--idle-exit", "0"]);
        assert_eq!(answer.code, 0, "{answer:?}");
        self.lab.agent()
    }

    /// Which points are passed in which operation: first and last pass of each in each, counted over all operations.
    fn learn(&self) -> Vec<(&'static str, String, u32)> {
        let (points, touches) = (self.lab.path("points"), self.lab.path("touches"));
        self.lab.set_environment("ASAP_FAULT_LIST", points.to_str().expect("ASCII"));
        self.lab.set_environment("ASAP_FAULT_TOUCHES", touches.to_str().expect("ASCII"));
        let target = self.start();
        let pid = target.pid_text();
        self.start_agent();
        let count = |path: &Path, seen: &mut BTreeMap<String, u32>| {
            seen.clear();
            for name in fs::read_to_string(path).unwrap_or_default().lines() {
                *seen.entry(name.to_owned()).or_default() += 1;
            }
        };
        let mut found = Vec::new();
        let (mut before, mut after) = (BTreeMap::new(), BTreeMap::new());
        let both = |seen: &mut BTreeMap<String, u32>| {
            let mut more = BTreeMap::new();
            count(&points, seen);
            count(&touches, &mut more);
            seen.append(&mut more);
        };
        both(&mut before);
        for (operation, command) in operations(&pid, &self.fix) {
            let answer = self.lab.asap(&command);
            assert_eq!(answer.code, 0, "{answer:?}");
            both(&mut after);
            for (name, &times) in &after {
                let first = before.get(name).copied().unwrap_or(0) + 1;
                if times >= first {
                    found.push((operation, name.clone(), first));
                    let middle = first + (times - first) / 2;
                    if middle > first {
                        found.push((operation, name.clone(), middle));
                    }
                }
            }
            before.clone_from(&after);
        }
        assert_eq!(self.lab.asap(&["stop"]).code, 0);
        self.lab.set_environment("ASAP_FAULT_LIST", "");
        self.lab.set_environment("ASAP_FAULT_TOUCHES", "");
        found
    }

    /// Walks one fault; the target is there for more of them afterwards unless it was changed.
    fn walk(&self, fault: &Fault, target: &Fixture) -> (bool, Option<(&'static str, String)>) {
        let before = Snapshot::of(target.pid());
        let pid = target.pid_text();
        self.lab.set_environment("ASAP_FAULT", &format!("{}:{}", fault.point, fault.pass));
        self.lab.set_environment("ASAP_FAULT_DO", &fault.deed.asked(&fault.point));
        // Only where it is waited for: on a busy machine a second is soon over.
        let patience = if fault.deed == Deed::Stop { "2000" } else { "" };
        self.lab.set_environment("ASAP_FAULT_PATIENCE", patience);
        let _ = fs::remove_file(&self.meeting);
        let agent = self.start_agent();
        self.lab.set_environment("ASAP_FAULT", "");
        self.lab.set_environment("ASAP_FAULT_PATIENCE", "");
        let (mut reached, mut failed) = (false, None);
        for (operation, command) in operations(&pid, &self.fix) {
            let answer = self.watched(self.lab.start(&command), agent, fault.deed, target, &mut reached);
            if answer.as_ref().is_none_or(|answer| answer.code != 0) {
                let said = answer.map_or_else(|| "the agent hung".to_owned(), |answer| answer.text);
                failed = Some((operation, said.chars().take(400).collect()));
                break;
            }
        }
        if fault.deed == Deed::Stop && is_stopped(agent) {
            reached = true;
            // A hung agent holds up nobody, or not for long.
            let held = |pid| fs::read_to_string(format!("/proc/{pid}/task/{pid}/stat")).unwrap_or_default();
            assert!(!held(target.pid()).is_empty());
            assert_well(target);
            kill(agent);
        }
        if matches!(fault.deed, Deed::Kill | Deed::Stop) {
            if failed.is_some() {
                // Killed, by us or by the watchdog, and not gone yet.
                wait_until("the agent ends", || !runs(agent) || is_stopped(agent));
            }
            if !runs(agent) || is_stopped(agent) {
                reached = true;
                self.lab.wait_for_the_end_of(agent);
            }
        } else {
            assert!(runs(agent), "the agent has ended: {failed:?}");
        }
        let failing = self.meeting.with_extension("failed");
        if fault.deed == Deed::Error && failing.exists() {
            fs::remove_file(failing).expect("it was there");
            reached = true;
        }
        self.clear_up(fault.deed, target, &before, reached);
        (reached, failed)
    }

    /// Waits for a command, and does at the meeting what is to be done. None: the agent hangs, and so does the command.
    fn watched(
        &self,
        mut client: Child,
        agent: i32,
        deed: Deed,
        target: &Fixture,
        reached: &mut bool,
    ) -> Option<crate::support::Answer> {
        let began = Instant::now();
        loop {
            if self.meeting.exists() {
                do_to(target, deed);
                *reached = true;
                fs::remove_file(&self.meeting).expect("it was there");
            }
            if client.try_wait().is_ok_and(|status| status.is_some()) {
                return Some(lab_answer(client));
            }
            if deed == Deed::Stop && (is_stopped(agent) || !runs(agent)) {
                kill(client.id() as i32);
                let _ = client.wait();
                return None;
            }
            assert!(began.elapsed() < PATIENCE * 2, "a command does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The target is well; and the agent, or a next one, can leave it as it was.
    fn clear_up(&self, deed: Deed, target: &Fixture, before: &Snapshot, reached: bool) {
        let pid = target.pid();
        if deed == Deed::Exit && reached {
            wait_until("it has ended", || !runs(pid));
            wait_until("the agent has let go", || self.lab.status().targets.is_empty());
        } else {
            if reached {
                match deed {
                    Deed::Exec => assert_eq!(target.line(), "ready"),
                    Deed::Fork => assert_eq!(target.line(), "forked"),
                    Deed::Threads => assert_eq!(target.line(), "0", "short-lived threads computed wrong"),
                    _ => {}
                }
            }
            assert_well(target);
            if !self.lab.status().targets.iter().any(|target| target.pid == pid) {
                self.lab.attach(pid);
            }
            let left = self.lab.detach(&["--revert"]);
            assert!(left.remaining.is_empty(), "{left:?}");
            assert_eq!(target.number("call 1"), 2, "after the last agent");
            assert_well(target);
            assert_eq!(ours(pid), Vec::<String>::new(), "something of ours is left");
            if !deed.changes_the_target() {
                Snapshot::of(pid).assert_same(before, "after all");
            }
        }
        let agent = self.lab.agent();
        assert_eq!(traced_by(agent), Vec::<i32>::new(), "helpers are left");
        assert_eq!(self.lab.asap(&["stop"]).code, 0);
    }
}

fn do_to(target: &Fixture, deed: Deed) {
    match deed {
        Deed::Kill | Deed::Stop | Deed::Error => {}
        // Not waited for: whoever is traced can be, only when its tracer has heard of its end.
        Deed::Exit => kill(target.pid()),
        Deed::Exec => target.tell("exec"),
        Deed::Fork => target.tell("fork 2"),
        Deed::Threads => target.tell("short-lived 100"),
        Deed::Signals => {
            for _ in 0..200 {
                let target = nix::unistd::Pid::from_raw(target.pid());
                nix::sys::signal::kill(target, nix::sys::signal::SIGUSR1).expect("it runs");
            }
        }
    }
}

#[test]
fn p1_every_fault_leaves_the_target_alive_and_right() {
    let name = "p1_every_fault_leaves_the_target_alive_and_right";
    if !cfg!(feature = "fault-points") {
        println!("SKIPPED (needs the feature fault-points): {name}");
        return;
    }
    let wanted = std::env::var("ASAP_FAULT_WALK").unwrap_or_default();
    if wanted.is_empty() {
        println!("SKIPPED (on demand: ASAP_FAULT_WALK=all, or how many): {name}");
        return;
    }
    let Some(lab) = Lab::new(name) else { return };
    let walk = Walk::new(lab);
    let places = walk.learn();
    let mut faults: Vec<Fault> = Vec::new();
    for (operation, point, pass) in &places {
        for deed in DEEDS.into_iter().filter(|deed| *deed != Deed::Error || point.starts_with("touch.")) {
            faults.push(Fault { operation, point: point.clone(), pass: *pass, deed });
        }
    }
    let points: std::collections::BTreeSet<&str> = places.iter().map(|(_, point, _)| point.as_str()).collect();
    println!("{} points, {} places, {} faults", points.len(), places.len(), faults.len());
    assert!(points.len() > 40 && faults.len() > 1000, "{points:?}");
    let wanted = if wanted == "all" { faults.len() } else { wanted.parse().expect("all, or a number") };
    let mut random = Random::new();
    for index in 0..wanted.min(faults.len()) {
        let other = index + random.below(faults.len() - index);
        faults.swap(index, other);
    }
    faults.truncate(wanted);
    let mut target = walk.start();
    let mut walked = Vec::new();
    for fault in faults {
        let outcome = catch_unwind(AssertUnwindSafe(|| walk.walk(&fault, &target)));
        let anew = outcome.is_err() || fault.deed.changes_the_target();
        let result = match outcome {
            Ok((reached, failed)) => Walked { fault, reached, failed, loss: None },
            Err(panic) => {
                let words = panic.downcast_ref::<String>().cloned();
                let words = words.or_else(|| panic.downcast_ref::<&str>().map(|words| (*words).to_owned()));
                let _ = walk.lab.asap(&["stop"]);
                let loss = Some(words.unwrap_or_default().chars().take(2000).collect());
                Walked { fault, reached: true, failed: None, loss }
            }
        };
        if result.loss.is_some() {
            println!("LOSS: {result:?}");
        }
        walked.push(result);
        if anew {
            target = walk.start();
        }
    }
    if let Some(path) = std::env::var_os("ASAP_FAULT_REPORT") {
        fs::write(path, serde_json::to_string_pretty(&walked).expect("JSON")).expect("written");
    }
    let reached = walked.iter().filter(|one| one.reached).count();
    let lost: Vec<&Walked> = walked.iter().filter(|one| one.loss.is_some()).collect();
    println!("{} faults walked, {reached} took place, {} losses", walked.len(), lost.len());
    assert!(reached * 10 >= walked.len() * 6, "most must take place");
    assert!(lost.is_empty(), "{} of {} faults: {lost:#?}", lost.len(), walked.len());
}
