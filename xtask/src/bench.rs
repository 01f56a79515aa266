//! `cargo xtask bench`: what patching costs. Each figure stands beside its baseline of the same run; medians of all rounds.

use crate::{
    agent::Agent,
    apache::Apache,
    command, demo,
    owned::{Folder, Owned},
    peers, sandbox_bench, setup,
    workers::{self, Workers},
};
use anyhow::{Context, Result, bail, ensure};
use asap::{
    engine::Engine,
    process::{
        info,
        ptrace::{Stopped, Stopping},
    },
    report::{
        AttachRequest, Consistency, DetachRequest, Mechanism, Operations, PatchFile, PatchRequest, RevertRequest,
    },
};
use serde_json::{Value, json};
use std::{
    fmt::Write as _,
    fs,
    path::Path,
    time::{Duration, Instant},
};

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum What {
    /// Longest pause of any thread, and time until all run the new code.
    Pause,
    /// Cost of a call of a patched function.
    Calls,
    /// From command to active, Apache with 3 children and 75 threads.
    Apache,
    /// Attach to a large executable.
    Large,
    /// 10,000 times in and out under load.
    Cycles,
    /// The same repair by asap, Frida, gdb, and a restart; not part of everything: it installs Frida from PyPI.
    Peers,
    /// Making a patch of Debian's nginx; not part of everything: it fetches sources, and builds for minutes.
    Build,
    /// Cost of the sandbox: servers and programs, natively and inside; not part of everything.
    Sandbox,
}

const ALL: [What; 5] = [What::Pause, What::Calls, What::Apache, What::Large, What::Cycles];
/// Thread counts of `pause`.
const THREADS: [usize; 4] = [2, 32, 256, 2000];
/// Cycles of `cycles`.
const CYCLES: usize = 10_000;

/// Measures `what`, or everything.
pub fn run(what: Option<What>, as_json: bool, rounds: usize) -> Result<()> {
    if !command::is_root() {
        bail!("the benchmarks need root: they attach to processes");
    }
    setup::run()?;
    let asap = command::build_asap(true, &[])?;
    let mut report = serde_json::Map::new();
    for what in what.map_or(ALL.to_vec(), |what| vec![what]) {
        let folder = Folder::new("asap-bench-")?;
        let (text, figures) = match what {
            What::Pause => pause(&asap, folder.path(), rounds)?,
            What::Calls => calls(&asap, folder.path(), rounds)?,
            What::Apache => apache(&asap, folder.path(), rounds)?,
            What::Large => large(&asap, folder.path(), rounds)?,
            What::Cycles => cycles(folder.path())?,
            What::Build => crate::bench_build::run(&asap, folder.path(), rounds)?,
            What::Peers => peers::run(&asap, folder.path(), rounds)?,
            What::Sandbox => sandbox_bench::run(&asap, folder.path(), rounds)?,
        };
        if !as_json {
            println!("{text}");
        }
        report.insert(format!("{what:?}").to_lowercase(), figures);
    }
    if as_json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    }
    Ok(())
}

/// The middle one.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    if values.is_empty() { f64::NAN } else { values[values.len() / 2] }
}

/// CLOCK_MONOTONIC, ns.
pub fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a live local.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

const MS: f64 = 1e-6;

fn pause(asap: &Path, folder: &Path, rounds: usize) -> Result<(String, Value)> {
    let program = workers::compile(folder, "workers.c", &["-pthread"], "workers")?;
    let fix = workers::compile(folder, "victim.c", &["-c"], "victim.o")?;
    let fix = fix.to_str().context("a path in UTF-8")?;
    let agent = Agent::start(asap, folder)?;
    let mut text = String::from(
        "Longest pause of a worker, and time from the commands (attach, patch) until every worker runs the new code; ms, medians\n\
         threads      left alone   commands alone   stop-all   asap   until all run it   (gate closed   longest stop)\n",
    );
    let mut figures = Vec::new();
    for threads in THREADS {
        let hot = threads == 2;
        let mut workers = Workers::start(&program, threads, hot)?;
        let pid = workers.pid();
        std::thread::sleep(Duration::from_millis(500));
        let (mut alone, mut commands, mut stopped, mut patched) = <(Vec<f64>, Vec<f64>, Vec<f64>, Vec<f64>)>::default();
        let (mut until, mut gate, mut stop) = <(Vec<f64>, Vec<f64>, Vec<f64>)>::default();
        for _ in 0..rounds {
            workers.mark()?;
            std::thread::sleep(Duration::from_millis(300));
            alone.push(workers.report()?.longest as f64 * MS);

            // Two commands that do nothing to the target: processes that start take processor time from it, whatever they do.
            workers.mark()?;
            std::thread::sleep(Duration::from_millis(50));
            agent.ask(&["status"])?;
            agent.ask(&["status"])?;
            std::thread::sleep(Duration::from_millis(250));
            commands.push(workers.report()?.longest as f64 * MS);

            workers.mark()?;
            std::thread::sleep(Duration::from_millis(50));
            stop_all(pid)?;
            std::thread::sleep(Duration::from_millis(250));
            stopped.push(workers.report()?.longest as f64 * MS);

            workers.mark()?;
            std::thread::sleep(Duration::from_millis(50));
            let begin = now();
            agent.ask(&["attach", "--pid", &pid.to_string()])?;
            let report = agent.ask(&["patch", "--function", "victim", fix])?;
            std::thread::sleep(Duration::from_millis(250));
            let mut seen = workers.report()?;
            let deadline = Instant::now() + Duration::from_secs(10);
            while seen.fresh < threads && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(50));
                seen = workers.report()?;
            }
            ensure!(seen.fresh == threads && seen.wrong == 0, "{seen:?} with {threads} threads");
            patched.push(seen.longest as f64 * MS);
            until.push(seen.last_new.saturating_sub(begin) as f64 * MS);
            let process = &report["processes"][0];
            gate.push(process["longest_gate_us"].as_f64().unwrap_or(f64::NAN) / 1000.0);
            stop.push(process["longest_stop_us"].as_f64().unwrap_or(f64::NAN) / 1000.0);
            agent.ask(&["detach", "--revert"])?;
        }
        let row = [&mut alone, &mut commands, &mut stopped, &mut patched, &mut until, &mut gate, &mut stop]
            .map(|values| median(values));
        let _ = writeln!(
            text,
            "{threads:>5} {:6}   {:>8.2}   {:>14.2}   {:>8.2}   {:>6.2}   {:>10.2}      {:>10.2}   {:>10.2}",
            if hot { "hot" } else { "paced" },
            row[0],
            row[1],
            row[2],
            row[3],
            row[4],
            row[5],
            row[6]
        );
        figures.push(json!({ "threads": threads, "hot": hot, "alone_ms": row[0], "commands_ms": row[1],
            "stop_all_ms": row[2], "asap_ms": row[3], "until_all_ms": row[4], "gate_ms": row[5], "stop_ms": row[6] }));
    }
    Ok((text, Value::Array(figures)))
}

/// What live patchers without gates do: stop all threads, look at each, let them go.
fn stop_all(pid: i32) -> Result<()> {
    let stopping: Vec<_> = info::threads(pid)?.into_iter().filter_map(|tid| Stopping::begin(tid).ok()).collect();
    let stopped: Vec<Stopped> = stopping.into_iter().filter_map(|thread| thread.stopped().ok()).collect();
    for thread in &stopped {
        thread.registers()?;
    }
    drop(stopped);
    Ok(())
}

fn calls(asap: &Path, folder: &Path, rounds: usize) -> Result<(String, Value)> {
    let program = workers::compile(folder, "workers.c", &["-pthread"], "workers")?;
    let fix = workers::compile(folder, "victim.c", &["-c"], "victim.o")?;
    let agent = Agent::start(asap, folder)?;
    let mut workers = Workers::start(&program, 0, false)?;
    let pid = workers.pid().to_string();
    agent.ask(&["attach", "--pid", &pid])?;
    let (mut before, mut after, mut again) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        before.push(workers.calls()?);
        agent.ask(&["patch", "--function", "victim", fix.to_str().context("a path in UTF-8")?])?;
        after.push(workers.calls()?);
        agent.ask(&["revert"])?;
        again.push(workers.calls()?);
    }
    agent.ask(&["detach", "--revert"])?;
    let (before, after, again) = (median(&mut before), median(&mut after), median(&mut again));
    let text = format!(
        "A call of victim(), ns, medians: {before:.2} unpatched, {after:.2} patched ({:+.2}), {again:.2} after revert\n",
        after - before
    );
    Ok((text, json!({ "unpatched_ns": before, "patched_ns": after, "reverted_ns": again })))
}

fn apache(asap: &Path, folder: &Path, rounds: usize) -> Result<(String, Value)> {
    let fix = folder.join("fix.o");
    demo::compile(&command::top().join("patches/apache2/byterange-limit/fix.c"), &fix)?;
    let fix = fix.to_str().context("a path in UTF-8")?;
    let server = Apache::start(folder)?;
    let agent = Agent::start(asap, folder)?;
    let (mut attach, mut patch, mut rest) = (Vec::new(), Vec::new(), 0);
    for _ in 0..rounds {
        let begin = Instant::now();
        agent.ask(&["attach", "--pid", &server.pid().to_string()])?;
        attach.push(begin.elapsed().as_secs_f64() * 1000.0);
        let begin = Instant::now();
        let report = agent.ask(&["patch", "--function", "ap_byterange_filter", fix])?;
        patch.push(begin.elapsed().as_secs_f64() * 1000.0);
        ensure!(report["processes"].as_array().is_some_and(|p| p.len() == 4), "{report}");
        agent.ask(&["detach", "--revert"])?;
        rest = resident(agent.pid())?;
    }
    let (attach, patch) = (median(&mut attach), median(&mut patch));
    let text = format!(
        "Apache, 3 children and 75 threads, ms from command to active, medians: attach {attach:.1}, patch {patch:.1}; agent afterwards {rest} KiB\n"
    );
    Ok((text, json!({ "attach_ms": attach, "patch_ms": patch, "agent_rss_kib": rest })))
}

/// Resident memory of a process, KiB.
pub fn resident(pid: i32) -> Result<u64> {
    memory(pid, "VmRSS:")
}

/// A size in `/proc/PID/status`, KiB.
pub fn memory(pid: i32, what: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(what)).context("a size")?;
    line.trim().trim_end_matches(" kB").parse().context("a number")
}

fn large(asap: &Path, folder: &Path, rounds: usize) -> Result<(String, Value)> {
    const FUNCTIONS: usize = 300_000;
    let mut source =
        String::from(".text\n.globl main\nmain:\n.cfi_startproc\n1: mov $34, %eax\nsyscall\njmp 1b\n.cfi_endproc\n");
    for n in 0..FUNCTIONS {
        let _ = write!(
            source,
            ".globl function_number_{n}\n.type function_number_{n}, @function\nfunction_number_{n}:\n.skip 320, 0x90\nret\n.size function_number_{n}, .-function_number_{n}\n"
        );
    }
    source.push_str(".section .note.GNU-stack,\"\",@progbits\n");
    let file = folder.join("large.s");
    fs::write(&file, source)?;
    let program = folder.join("large");
    command::run(std::process::Command::new("gcc").arg("-o").arg(&program).arg(&file))?;
    let size = fs::metadata(&program)?.len() / 1_000_000;
    let fix_source = folder.join("fix.c");
    fs::write(&fix_source, "int function_number_299999(void) { return 7; }\n")?;
    let fix = folder.join("fix.o");
    command::run(std::process::Command::new("gcc").args(["-O2", "-c", "-o"]).arg(&fix).arg(&fix_source))?;
    let agent = Agent::start(asap, folder)?;
    let child = Owned::spawn(&mut std::process::Command::new(&program))?;
    std::thread::sleep(Duration::from_millis(300));
    let (mut attach, mut patch) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let begin = Instant::now();
        agent.ask(&["attach", "--pid", &child.pid().to_string()])?;
        attach.push(begin.elapsed().as_secs_f64() * 1000.0);
        let begin = Instant::now();
        agent.ask(&["patch", "--function", "function_number_299999", fix.to_str().context("a path in UTF-8")?])?;
        patch.push(begin.elapsed().as_secs_f64() * 1000.0);
        agent.ask(&["detach", "--revert"])?;
    }
    let (attach, patch) = (median(&mut attach), median(&mut patch));
    let text = format!(
        "An executable of {size} MB with {FUNCTIONS} symbols, ms, medians: attach {attach:.1}, patch {patch:.1}\n"
    );
    Ok((text, json!({ "megabytes": size, "symbols": FUNCTIONS, "attach_ms": attach, "patch_ms": patch })))
}

fn cycles(folder: &Path) -> Result<(String, Value)> {
    let program = workers::compile(folder, "workers.c", &["-pthread"], "workers")?;
    let fix = workers::compile(folder, "victim.c", &["-c"], "victim.o")?;
    let mut workers = Workers::start(&program, 4, true)?;
    let pid = workers.pid();
    let bytes = fs::read(fix)?;
    let mut engine = Engine::new();
    let mut quiet = |_| ();
    engine.attach(&AttachRequest { pid, only: true, require_signature: false }, &mut quiet)?;
    let patch = PatchRequest {
        pid: None,
        functions: vec!["victim".into()],
        address: None,
        files: vec![PatchFile { name: "victim.o".into(), bytes, signature: None }],
        name: None,
        dry_run: false,
        timeout_ms: 30_000,
        consistency: Consistency::Quiescent,
        mechanism: Mechanism::Auto,
    };
    let revert = RevertRequest { pid: None, patch: None, timeout_ms: 30_000, consistency: Consistency::Quiescent };
    let count = |what: &str, pid: i32| fs::read_dir(format!("/proc/{pid}/{what}")).map_or(0, Iterator::count);
    let maps = |pid: i32| fs::read_to_string(format!("/proc/{pid}/maps")).map_or(0, |text| text.lines().count());
    let own = std::process::id() as i32;
    let state = |engine: &mut Engine| -> Result<[u64; 6]> {
        engine.housekeeping();
        Ok([
            maps(pid) as u64,
            count("fd", pid) as u64,
            resident(pid)?,
            maps(own) as u64,
            count("fd", own) as u64,
            resident(own)?,
        ])
    };
    let mut before = [0; 6];
    let begin = Instant::now();
    for cycle in 0..CYCLES {
        engine.patch(&patch, &mut quiet)?;
        engine.revert(&revert, &mut quiet)?;
        // What is allocated once has been allocated by then.
        if cycle == CYCLES / 10 {
            before = state(&mut engine)?;
        }
    }
    let seconds = begin.elapsed().as_secs_f64();
    let after = state(&mut engine)?;
    engine.detach(&DetachRequest { pid: None, revert: true, timeout_ms: 10_000 }, &mut quiet)?;
    let seen = workers.report()?;
    ensure!(seen.wrong == 0, "{} wrong results", seen.wrong);
    let text = format!(
        "{CYCLES} times in and out under 4 hot threads in {seconds:.0} s: {} wrong results; from cycle {} on\n  \
         target: mappings {:+}, descriptors {:+}, resident {:+} KiB; agent: mappings {:+}, descriptors {:+}, resident {:+} KiB\n",
        seen.wrong,
        CYCLES / 10,
        after[0] as i64 - before[0] as i64,
        after[1] as i64 - before[1] as i64,
        after[2] as i64 - before[2] as i64,
        after[3] as i64 - before[3] as i64,
        after[4] as i64 - before[4] as i64,
        after[5] as i64 - before[5] as i64,
    );
    Ok((text, json!({ "cycles": CYCLES, "seconds": seconds, "wrong": seen.wrong, "before": before, "after": after })))
}
