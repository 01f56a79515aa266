//! `cargo xtask bench peers`: the same repair by asap and by what anybody can install beside it: Frida, gdb by hand, a restart of the
//! server. In one run, in turns, and with what each costs those who are being served.

mod picture;
mod ways;

use crate::{
    apache::{self, Apache},
    bench::{median, memory, now},
    command, demo,
    load::Load,
    owned::Folder,
    workers::{self, Seen, Workers},
};
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;
use std::{
    fmt::Write as _,
    fs,
    path::Path,
    time::{Duration, Instant},
};
use ways::{Asap, Frida, Gdb, Job, Way};

/// Threads of the worker program.
const THREADS: usize = 256;
/// Threads that do nothing but call the function while it is replaced and restored again and again.
const HOT: usize = 4;
/// How often.
const CYCLES: usize = 20;
/// How long a server is under load in each round, seconds.
const LOAD: u64 = 6;

/// What one way does to 256 threads; medians.
#[derive(Debug, Serialize)]
struct OnWorkers {
    way: String,
    /// From the command until every thread has run the new code, ms. `None`: it never did in some round.
    until_all_ms: Option<f64>,
    /// Longest pause of any thread meanwhile, ms: the median of the rounds, and the longest of all.
    pause_ms: f64,
    worst_pause_ms: f64,
    /// A call of the replaced function, ns, beside one before.
    call_ns: f64,
    call_before_ns: f64,
    /// Still there when all was undone, after the first round: mappings, threads, KiB of its own memory.
    left: [i64; 3],
    /// In and out of a function that 4 threads call without a pause.
    cycles: String,
}

/// What is done to a server under load.
enum Change<'a> {
    Nothing,
    By(&'a mut dyn Way),
    /// Stop and start, as an update of the package does; what is called graceful keeps the parent's executable.
    Restart,
}

/// What one way costs who is served by Apache.
#[derive(Debug, Serialize)]
struct OnApache {
    way: String,
    /// From the command until all processes have the new code, ms; median.
    until_all_ms: f64,
    /// Requests that failed, and that were answered, in all rounds.
    failed: u64,
    requests: u64,
    /// Longest time without any answer, ms; median and longest.
    gap_ms: f64,
    worst_gap_ms: f64,
}

/// Measures; leaves `peers.json`, `peers.md`, `peers.svg` in the target folder.
pub fn run(asap: &Path, folder: &Path, rounds: usize) -> Result<(String, Value)> {
    let library = workers::compile(folder, "victim.c", &["-shared", "-fPIC"], "victim.so")?;
    let object = workers::compile(folder, "victim.c", &["-c"], "victim.o")?;
    let program = workers::compile(folder, "workers.c", &["-pthread"], "workers")?;
    let job = Job { function: "victim".into(), object, library };

    let mut frida = Frida::start()?;
    let frida_name = frida.name();
    let mut asap_way = Asap::start(asap, folder)?;
    let mut gdb = Gdb::find(folder)?;
    let mut rows = Vec::new();
    {
        let mut ways: [&mut dyn Way; 3] = [&mut asap_way, &mut frida, &mut gdb];
        rows.push(left_alone(&program, rounds)?);
        for way in &mut ways {
            rows.push(on_workers(*way, &program, &job, rounds).with_context(|| way.name())?);
        }
    }
    let mut servers = Vec::new();
    let apache_job = apache_job(folder)?;
    let changes = [Change::Nothing, Change::By(&mut asap_way), Change::By(&mut frida), Change::Restart];
    for change in changes {
        servers.push(on_apache(change, &apache_job, rounds)?);
    }
    let text = table(&rows, &servers, &frida_name, &gdb.name(), rounds)?;
    let output = command::top().join("target/peers");
    fs::create_dir_all(&output)?;
    let figures = serde_json::json!({ "rounds": rounds, "workers": rows, "apache": servers });
    fs::write(output.join("peers.json"), serde_json::to_string_pretty(&figures)?)?;
    fs::write(output.join("peers.md"), &text)?;
    picture::write(&output.join("peers.svg"), &rows, &servers)?;
    Ok((format!("{text}\nTable and picture: {}\n", output.display()), figures))
}

fn pauses(seen: &[Seen]) -> (f64, f64) {
    let mut all: Vec<f64> = seen.iter().map(|seen| seen.longest as f64 * 1e-6).collect();
    let worst = all.iter().copied().fold(0.0, f64::max);
    (median(&mut all), worst)
}

fn left_alone(program: &Path, rounds: usize) -> Result<OnWorkers> {
    let mut workers = Workers::start(program, THREADS, false)?;
    std::thread::sleep(Duration::from_millis(500));
    let mut seen = Vec::new();
    for _ in 0..rounds {
        workers.mark()?;
        std::thread::sleep(Duration::from_millis(500));
        seen.push(workers.report()?);
    }
    let call = workers.calls()?;
    let (pause_ms, worst_pause_ms) = pauses(&seen);
    Ok(OnWorkers {
        way: "left alone".into(),
        until_all_ms: None,
        pause_ms,
        worst_pause_ms,
        call_ns: call,
        call_before_ns: call,
        left: [0; 3],
        cycles: String::new(),
    })
}

/// Mappings, threads, KiB of its own memory.
fn size(pid: i32) -> Result<[i64; 3]> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?.lines().count();
    let threads = fs::read_dir(format!("/proc/{pid}/task"))?.count();
    // Its own memory: pages of files that somebody has read stay in the page cache anyhow.
    Ok([maps as i64, threads as i64, memory(pid, "RssAnon:")? as i64])
}

fn on_workers(way: &mut dyn Way, program: &Path, job: &Job, rounds: usize) -> Result<OnWorkers> {
    let mut workers = Workers::start(program, THREADS, false)?;
    let pid = workers.pid();
    std::thread::sleep(Duration::from_millis(500));
    let call_before_ns = workers.calls()?;
    let before = size(pid)?;
    let (mut seen, mut until, mut calls, mut left) = (Vec::new(), Vec::new(), Vec::new(), [0; 3]);
    for round in 0..rounds {
        workers.mark()?;
        std::thread::sleep(Duration::from_millis(50));
        let begin = now();
        way.replace(pid, job)?;
        std::thread::sleep(Duration::from_millis(450));
        let report = workers.report()?;
        ensure!(report.wrong == 0, "wrong results: {report:?}");
        until.push((report.fresh == THREADS).then(|| report.last_new.saturating_sub(begin) as f64 * 1e-6));
        seen.push(report);
        calls.push(workers.calls()?);
        way.undo(pid, job)?;
        std::thread::sleep(Duration::from_millis(200));
        if round == 0 {
            let after = size(pid)?;
            left = [0, 1, 2].map(|n| after[n] - before[n]);
        }
    }
    drop(workers);
    let (pause_ms, worst_pause_ms) = pauses(&seen);
    let all: Option<Vec<f64>> = until.into_iter().collect();
    Ok(OnWorkers {
        way: way.name(),
        until_all_ms: all.map(|mut all| median(&mut all)),
        pause_ms,
        worst_pause_ms,
        call_ns: median(&mut calls),
        call_before_ns,
        left,
        cycles: cycles(way, program, job)?,
    })
}

/// In and out under threads that are inside nearly always; a target that dies is a result.
fn cycles(way: &mut dyn Way, program: &Path, job: &Job) -> Result<String> {
    let mut workers = Workers::start(program, HOT, true)?;
    let pid = workers.pid();
    std::thread::sleep(Duration::from_millis(200));
    for cycle in 1..=CYCLES {
        let went = way.replace(pid, job).and_then(|()| way.undo(pid, job));
        if workers.ended()?.is_some() {
            return Ok(format!("target died in cycle {cycle}"));
        }
        if let Err(error) = went {
            return Ok(format!("cycle {cycle}: {error:#}"));
        }
    }
    Ok(match workers.report() {
        Ok(seen) if seen.wrong == 0 => format!("{CYCLES} of {CYCLES}"),
        Ok(seen) => format!("{CYCLES}, {} wrong results", seen.wrong),
        Err(_) => format!("target died after {CYCLES} cycles"),
    })
}

/// The demo's fix as an object, and as a library for those who load one.
fn apache_job(folder: &Path) -> Result<Job> {
    let source = command::top().join("patches/apache2/byterange-limit/fix.c");
    let object = folder.join("fix.o");
    demo::compile(&source, &object)?;
    let library = folder.join("fix.so");
    demo::compile_with(&source, &library, &["-shared", "-include", &ways::original_header(folder)?])?;
    Ok(Job { function: "ap_byterange_filter".into(), object, library })
}

fn on_apache(mut change: Change<'_>, job: &Job, rounds: usize) -> Result<OnApache> {
    let (mut until, mut gaps, mut failed, mut requests) = (Vec::new(), Vec::new(), 0, 0);
    for _ in 0..rounds {
        let place = Folder::new("asap-peers-")?;
        let mut server = Apache::start(place.path())?;
        let address = server.address;
        let load = Load::start(address, apache::FILE, LOAD)?;
        let watch = ways::Watch::start(address);
        std::thread::sleep(Duration::from_secs(2));
        let begin = Instant::now();
        match &mut change {
            Change::Nothing => {}
            Change::By(way) => {
                for pid in way.processes(&server) {
                    way.replace(pid, job)?;
                }
            }
            Change::Restart => server.restart()?,
        }
        until.push(begin.elapsed().as_secs_f64() * 1e3);
        std::thread::sleep(Duration::from_secs(1));
        if let Change::By(way) = &mut change {
            for pid in way.processes(&server) {
                way.undo(pid, job)?;
            }
        }
        let report = load.finish()?;
        gaps.push(watch.finish().as_secs_f64() * 1e3);
        failed += report.failed;
        requests += report.requests;
    }
    let worst_gap_ms = gaps.iter().copied().fold(0.0, f64::max);
    Ok(OnApache {
        way: match change {
            Change::Nothing => "left alone".into(),
            Change::By(way) => way.name(),
            Change::Restart => "stop and start".into(),
        },
        until_all_ms: median(&mut until),
        failed,
        requests,
        gap_ms: median(&mut gaps),
        worst_gap_ms,
    })
}

fn table(rows: &[OnWorkers], servers: &[OnApache], frida: &str, gdb: &str, rounds: usize) -> Result<String> {
    let mut text = format!(
        "{THREADS} threads that call a function every 5 ms; {frida}, {gdb}; medians of {rounds} rounds (longest in brackets):\n\n\
         | way | command to new code in every thread, ms | longest pause of a thread, ms | a call, ns (before) | left behind: mappings, threads, KiB | in and out under {HOT} spinning threads |\n\
         |---|---|---|---|---|---|\n"
    );
    for row in rows {
        let until = match row.until_all_ms {
            Some(until) => format!("{until:.0}"),
            None if row.cycles.is_empty() => String::new(),
            None => "not within 450 ms".into(),
        };
        let left = if row.cycles.is_empty() {
            String::new()
        } else {
            format!("{:+}, {:+}, {:+}", row.left[0], row.left[1], row.left[2])
        };
        writeln!(
            text,
            "| {} | {until} | {:.1} ({:.1}) | {:.1} ({:.1}) | {left} | {} |",
            row.way, row.pause_ms, row.worst_pause_ms, row.call_ns, row.call_before_ns, row.cycles
        )?;
    }
    write!(
        text,
        "\nApache (parent, 3 children, 75 threads) under load on 16 connections; all rounds together:\n\n\
         | way | until the new code is everywhere, ms | failed requests | answered | longest time without an answer, ms |\n\
         |---|---|---|---|---|\n"
    )?;
    for row in servers {
        writeln!(
            text,
            "| {} | {:.0} | {} | {} | {:.0} ({:.0}) |",
            row.way, row.until_all_ms, row.failed, row.requests, row.gap_ms, row.worst_gap_ms
        )?;
    }
    Ok(text)
}
