//! Between two requests the agent does nothing, and still hears at once what becomes of its targets.

use crate::support::{Fixture, Lab, Source, program, wait_until};
use serde_json::Value;
use std::{fs, process::Command, time::Duration};

const FIX: &str = "int victim(int x, int how, int depth) { (void)how; (void)depth; return x + 2; }";

fn inside() -> Fixture {
    Source::of(&["inside.c"]).start(&[])
}

/// The records of events about this target. Reads the log; does not ask the agent, which might look around then.
fn events(lab: &Lab, target: i32) -> Vec<Value> {
    let log = fs::read_to_string(lab.path("log/audit.jsonl")).unwrap_or_default();
    let records = log.lines().map(|line| serde_json::from_str::<Value>(line).expect("a record"));
    records.filter(|record| record["phase"] == "event" && record["target"] == target).collect()
}

/// How often threads of `pid` have been given a processor.
fn switches(pid: i32) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let of = |status: String| -> u64 {
        let lines = status.lines().filter(|line| line.contains("_ctxt_switches"));
        lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum()
    };
    tasks.map(|task| of(fs::read_to_string(task.path().join("status")).unwrap_or_default())).sum()
}

fn children(pid: i32) -> Vec<i32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().map(|word| word.parse().expect("a pid")).collect()
}

/// Whether the kernel tells the agent what processes do.
fn is_told(lab: &Lab) -> bool {
    let document: Value = serde_json::from_str(&lab.asap(&["doctor"]).text).expect("JSON");
    let findings = document["findings"].as_array().expect("a list");
    let told = findings.iter().find(|finding| finding["name"] == "process life cycle").expect("a finding");
    let is_told = told["available"] == true;
    if !is_told {
        println!("SKIPPED: the agent has to look from time to time: {}", told["detail"]);
    }
    is_told
}

#[test]
fn an_agent_at_rest_is_never_woken() {
    let Some(lab) = Lab::new("an_agent_at_rest_is_never_woken") else { return };
    if !is_told(&lab) {
        return;
    }
    let target = inside();
    lab.attach(target.pid());
    lab.patch(&["--function", "victim", &lab.object(FIX)]);
    let agent = lab.agent();
    let everything = || switches(agent) + children(agent).into_iter().map(switches).sum::<u64>();
    // It looks for children once more after it was attached.
    std::thread::sleep(Duration::from_secs(2));
    // Five looks a second would be 25. What else runs on the machine wakes nobody here.
    let before = everything();
    std::thread::sleep(Duration::from_secs(5));
    let woken = everything() - before;
    assert!(woken < 10, "its threads ran {woken} times in five seconds in which nothing happened");
    assert_eq!(target.number("call 1"), 3);
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
}

#[test]
fn the_end_of_a_target_is_heard_and_logged() {
    let Some(lab) = Lab::new("the_end_of_a_target_is_heard_and_logged") else { return };
    let (target, other) = (inside(), inside());
    lab.attach(other.pid());
    lab.attach(target.pid());
    lab.patch(&["--pid", &target.pid_text(), "--function", "victim", "--name", "the-fix", &lab.object(FIX)]);
    assert_eq!(events(&lab, target.pid()), Vec::<Value>::new());
    target.tell("exit 0");
    wait_until("the log tells of the end", || !events(&lab, target.pid()).is_empty());
    let event = &events(&lab, target.pid())[0];
    assert_eq!((event["command"].as_str(), event["result"].as_str()), (Some("exit"), Some("ended")));
    assert!(event["message"].as_str().is_some_and(|words| words.contains("the-fix")), "{event}");
    // Once, and nothing of the other.
    assert_eq!(lab.status().targets.len(), 1);
    assert_eq!((events(&lab, target.pid()).len(), events(&lab, other.pid()).len()), (1, 0));
    let shown = lab.asap(&["log"]);
    assert!(shown.text.contains("\"exit\"") && shown.text.contains("\"damaged\": 0"), "{shown:?}");
}

#[test]
fn another_program_in_a_target_is_heard_and_logged() {
    let Some(lab) = Lab::new("another_program_in_a_target_is_heard_and_logged") else { return };
    let target = inside();
    lab.attach(target.pid());
    lab.patch(&["--function", "victim", "--name", "the-fix", &lab.object(FIX)]);
    target.tell("exec");
    assert_eq!(target.line(), "ready");
    wait_until("the log tells of the program", || !events(&lab, target.pid()).is_empty());
    let event = &events(&lab, target.pid())[0];
    assert_eq!((event["command"].as_str(), event["result"].as_str()), (Some("exec"), Some("replaced")));
    assert!(
        event["message"].as_str().is_some_and(|words| words.contains("/inside") && words.contains("the-fix")),
        "{event}"
    );
    // The new program is rid of the helper of the old one.
    wait_until("no helper is left", || children(target.pid()).is_empty());
    assert_eq!(target.number("call 1"), 2);
}

#[test]
fn a_new_child_is_taken_into_care_without_being_asked_for() {
    let Some(lab) = Lab::new("a_new_child_is_taken_into_care_without_being_asked_for") else { return };
    let target = inside();
    lab.attach(target.pid());
    lab.patch(&["--function", "victim", &lab.object(FIX)]);
    let child: i32 = target.ask("fork").parse().expect("a pid");
    wait_until("the child has a helper", || children(child).len() == 1);
    assert_eq!(target.number("call 1"), 3, "the child's answer");
    wait_until("it has ended", || fs::metadata(format!("/proc/{child}")).is_err());
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
    assert_eq!(events(&lab, target.pid()), Vec::<Value>::new(), "children that come and go are no news");
}

#[test]
fn without_ebpf_the_agent_looks_for_itself() {
    let Some(lab) = Lab::new("without_ebpf_the_agent_looks_for_itself") else { return };
    // An agent without the rights for eBPF.
    let mut command = Command::new("setpriv");
    command.arg("--bounding-set=-bpf,-sys_admin,-perfmon").arg("--inh-caps=-bpf,-sys_admin,-perfmon").arg(program());
    command
        .env("ASAP_JOURNAL", "")
        .arg("--socket")
        .arg(lab.path("run/agent.sock"))
        .arg("--log")
        .arg(lab.path("log/audit.jsonl"));
    let started = command.args(["agent", "--background"]).output();
    if !started.as_ref().is_ok_and(|output| output.status.success()) {
        println!("SKIPPED: no agent without rights can be started: {started:?}");
        return;
    }
    let target = inside();
    lab.attach(target.pid());
    lab.patch(&["--function", "victim", &lab.object(FIX)]);
    let child: i32 = target.ask("fork").parse().expect("a pid");
    wait_until("the child has a helper", || children(child).len() == 1);
    assert_eq!(target.number("call 1"), 3, "the child's answer");
    target.tell("exec");
    assert_eq!(target.line(), "ready");
    wait_until("the log tells of the program", || !events(&lab, target.pid()).is_empty());
    assert_eq!(events(&lab, target.pid())[0]["command"], "exec");
}

#[test]
fn a_thread_that_stops_too_late_is_let_go() {
    let Some(lab) = Lab::new("a_thread_that_stops_too_late_is_let_go") else { return };
    let (target, other) = (inside(), inside());
    // Keeps the agent alive: with its end the kernel would let the thread go.
    lab.attach(other.pid());
    let agent = lab.agent();
    // Its only thread waits for the child, and can't be stopped meanwhile.
    assert_eq!(target.ask("vfork 4000"), "vfork");
    lab.asap(&["attach", "--pid", &target.pid_text()]).refusal(&["stop"]);
    assert_eq!(target.number("call 1"), 2, "it goes on when its child is done");
    assert_eq!(lab.agent(), agent);
    lab.attach(target.pid());
    assert_eq!(lab.detach(&["--pid", &target.pid_text()]).clean, Some(true));
}
