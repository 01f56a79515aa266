//! `cargo xtask demo`: Debian's Apache, as installed, is repaired while it serves a load. Every statement that is printed was
//! checked in this run; the first that is wrong ends it.

use crate::{
    agent::Agent,
    apache::{Apache, FILE_LENGTH, Load},
    command, http, setup,
};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::{fs, os::unix::fs::FileExt, process::Command, time::Instant};

/// Ranges in the request: of the kind that the advisory of CVE-2011-3192 is about.
const RANGES: usize = 600;
/// Load, seconds.
const LOAD: u64 = 8;

/// Runs the demo.
pub fn run(as_json: bool) -> Result<()> {
    if !command::is_root() {
        bail!("the demo needs root: it starts a web server and attaches to it");
    }
    setup::run()?;
    let asap = command::build_asap(true, &[])?;
    let folder = tempfile::Builder::new().prefix("asap-demo-").tempdir()?;
    let say = |text: String| {
        if !as_json {
            println!("{text}");
        }
    };

    let fix = folder.path().join("byterange-limit.o");
    let source = command::top().join("patches/apache2/byterange-limit/fix.c");
    compile(&source, &fix)?;
    let apache = Apache::start(folder.path())?;
    let server = apache.address;
    let workers = apache.children();
    say(format!(
        "apache2 {} serves on {server}: parent {}, {} children of 25 threads, as www-data",
        version(),
        apache.pid(),
        workers.len()
    ));
    let processes: Vec<i32> = workers.iter().copied().chain([apache.pid()]).collect();
    let before: Vec<Text> = processes.iter().map(|&pid| Text::of(pid)).collect::<Result<_>>()?;

    many_ranges(server, 206)?;
    say(format!("before:   a request for {RANGES} ranges is served in full: 206, in {RANGES} parts"));
    let load = Load::start(server, LOAD)?;
    std::thread::sleep(std::time::Duration::from_secs(1));

    let agent = Agent::start(&asap, folder.path())?;
    let pid = apache.pid().to_string();
    let attached = agent.ask(&["attach", "--pid", &pid])?;
    let known = attached["target"]["processes"].as_array().map_or(0, Vec::len);
    ensure!(known == processes.len(), "{known} processes were attached, {} expected", processes.len());
    let stop = figure(&attached, "longest_stop_us")?;
    say(format!(
        "attach:   {known} processes in {}; no thread was stopped for longer than {}",
        time(&attached, "total_us")?,
        micros(stop)
    ));

    let begin = Instant::now();
    let fix = fix.to_str().context("a path in UTF-8")?;
    let patched = agent.ask(&["patch", "--function", "ap_byterange_filter", fix])?;
    let command_us = begin.elapsed().as_micros() as u64;
    let per_process = patched["processes"].as_array().cloned().unwrap_or_default();
    ensure!(per_process.len() == processes.len(), "not every process was patched: {patched}");
    let sum = |name: &str| per_process.iter().filter_map(|p| p[name].as_u64()).sum::<u64>();
    let most = |name: &str| per_process.iter().filter_map(|p| p[name].as_u64()).max().unwrap_or(0);
    say(format!(
        "patch:    ap_byterange_filter replaced in {} processes, under load, {} after the command was given",
        per_process.len(),
        micros(command_us)
    ));
    say(format!(
        "          {} of {} threads waited at a gate, none for longer than {}; {} stopped for a stack walk, none for longer than {}",
        sum("threads_parked"),
        sum("threads"),
        micros(most("longest_gate_us")),
        sum("threads_stopped"),
        micros(most("longest_stop_us"))
    ));
    let limited = http::get(server, "/file.bin", RANGES)?;
    ensure!(
        limited.status == 200 && limited.length == FILE_LENGTH,
        "after the patch: {} {}",
        limited.status,
        limited.head
    );
    let few = http::get(server, "/file.bin", 3)?;
    ensure!(few.status == 206, "a request for 3 ranges is no longer served: {}", few.head);
    say(format!(
        "after:    the same request gets the whole file: 200, {FILE_LENGTH} bytes; 3 ranges are served as ever: 206"
    ));

    let reverted = agent.ask(&["revert"])?;
    many_ranges(server, 206)?;
    say(format!("revert:   as before: 206, {RANGES} parts; it took {}", time(&reverted, "total_us")?));
    let detached = agent.ask(&["detach", "--revert"])?;
    ensure!(detached["remaining"].as_array().is_some_and(Vec::is_empty), "patches remain: {detached}");
    ensure!(detached["clean"] == Value::Bool(true), "asap itself saw a difference: {detached}");
    let seen = load.finish()?;
    ensure!(seen.requests > 0, "wrk made no requests");
    ensure!(seen.failed == 0, "{} of {} requests failed", seen.failed, seen.requests);
    for (&pid, before) in processes.iter().zip(&before) {
        let after = Text::of(pid)?;
        ensure!(after.bytes == before.bytes, "text bytes of process {pid} differ from before attach");
        ensure!(
            after.mappings == before.mappings,
            "mappings of process {pid} differ from before attach:\n{:#?}\n{:#?}",
            before.mappings,
            after.mappings
        );
    }
    say("detach:   text bytes and file mappings of all processes are what they were before attach; nothing else was left".to_owned());
    say(format!("load:     {} requests of {FILE_LENGTH} bytes meanwhile, 0 failed", seen.requests));
    if as_json {
        let report = json!({ "attach": attached, "patch": patched, "patch_command_us": command_us, "revert": reverted,
            "detach": detached, "load": seen });
        println!("{}", serde_json::to_string_pretty(&report)?);
    }
    Ok(())
}

/// Compiles the demo's patch as an administrator would.
pub fn compile(source: &std::path::Path, object: &std::path::Path) -> Result<()> {
    command::run(
        Command::new("gcc")
            .args(["-O2", "-fPIC", "-c", "-Wall", "-Werror", "-I/usr/include/apache2", "-I/usr/include/apr-1.0"])
            .arg("-I")
            .arg(command::top().join("asap-user/include"))
            .arg("-o")
            .arg(object)
            .arg(source),
    )
}

/// Sends the advisory's request and checks the answer.
fn many_ranges(server: std::net::SocketAddr, status: u16) -> Result<()> {
    let answer = http::get(server, "/file.bin", RANGES)?;
    ensure!(answer.status == status, "a request for {RANGES} ranges got {}:\n{}", answer.status, answer.head);
    ensure!(answer.head.contains("multipart/byteranges"), "no multipart answer:\n{}", answer.head);
    Ok(())
}

/// What a process must have again after detach: the bytes of its executable file mappings, and all mappings that are not its
/// own doing (heap, stacks and anonymous memory grow and shrink under load).
struct Text {
    mappings: Vec<String>,
    bytes: Vec<Vec<u8>>,
}

impl Text {
    fn of(pid: i32) -> Result<Self> {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let memory = fs::File::open(format!("/proc/{pid}/mem"))?;
        let (mut mappings, mut bytes) = (Vec::new(), Vec::new());
        for line in maps.lines() {
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            let executable = words.get(1).is_some_and(|flags| flags.contains('x'));
            // Executable memory of any kind counts: nothing of ours may stay.
            let of_file = words.get(5).is_some_and(|name| name.starts_with('/') && !name.contains("file.bin"));
            if !executable && !of_file {
                continue;
            }
            mappings.push(line.to_owned());
            let (start, end) = words[0].split_once('-').context("a range")?;
            let (start, end) = (u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?);
            if executable && of_file {
                let mut buffer = vec![0; (end - start) as usize];
                memory.read_exact_at(&mut buffer, start)?;
                bytes.push(buffer);
            }
        }
        Ok(Self { mappings, bytes })
    }
}

fn version() -> String {
    let output = Command::new("/usr/sbin/apache2").arg("-v").output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.split_ascii_whitespace().find(|word| word.starts_with("Apache/")).unwrap_or("of this system").to_owned()
}

fn figure(value: &Value, name: &str) -> Result<u64> {
    value[name].as_u64().with_context(|| format!("no {name} in {value}"))
}

fn time(value: &Value, name: &str) -> Result<String> {
    figure(value, name).map(micros)
}

/// Microseconds for people.
pub fn micros(us: u64) -> String {
    if us < 1000 { format!("{us} µs") } else { format!("{:.1} ms", us as f64 / 1000.0) }
}
