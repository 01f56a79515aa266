//! `cargo xtask demo`: Debian's Apache, as installed, is repaired while it serves a load. Every statement that is printed was
//! checked in this run; the first that is wrong ends it.

use crate::{
    agent::Agent,
    apache::{self, Apache, CHILDREN, FILE, FILE_LENGTH, THREADS},
    command, http,
    load::Load,
    owned::Folder,
    setup,
    snapshot::{Extent, Snapshot},
};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};
use std::{
    net::SocketAddr,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

/// Ranges in the request: of the kind that the advisory of CVE-2011-3192 is about.
const RANGES: usize = 600;
/// The load before anything is done and the load while it is done, seconds.
const LOADS: (u64, u64) = (4, 10);
/// What the demo repairs, and with what.
const FUNCTION: &str = "ap_byterange_filter";
const SOURCE: &str = "patches/apache2/byterange-limit/fix.c";

/// How the demo is run.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Options {
    /// Print the figures as JSON, and nothing else.
    #[arg(long)]
    json: bool,
    /// Leave the folder with configuration, logs and patch.
    #[arg(long)]
    keep: bool,
}

/// Runs the demo.
pub fn run(options: Options) -> Result<()> {
    if !command::is_root() {
        bail!("the demo needs root: it starts a web server and attaches to it");
    }
    setup::run()?;
    let asap = command::build_asap(true, &[])?;
    let mut folder = Folder::new("asap-demo-")?;
    if options.keep {
        folder.keep();
        eprintln!("files: {}", folder.path().display());
    }
    let fix = folder.path().join("byterange-limit.o");
    compile(&command::top().join(SOURCE), &fix)?;
    let apache = Apache::start(folder.path())?;
    let agent = Agent::start(&asap, folder.path())?;
    let fix = fix.to_str().context("a path in UTF-8")?.to_owned();
    let mut demo = Demo { asap, folder, fix, apache, agent, silent: options.json, figures: Map::new() };
    demo.introduce()?;
    demo.repair_under_load()?;
    demo.leave_no_trace()?;
    demo.follow_new_children()?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&demo.figures)?);
    } else {
        println!("Every statement above was checked in this run.");
    }
    Ok(())
}

/// Fields in the order in which they must end.
struct Demo {
    agent: Agent,
    apache: Apache,
    asap: std::path::PathBuf,
    folder: Folder,
    fix: String,
    silent: bool,
    figures: Map<String, Value>,
}

impl Demo {
    fn say(&self, when: &str, what: impl AsRef<str>) {
        if !self.silent {
            println!("{when:<10}{}", what.as_ref());
        }
    }

    fn note(&mut self, name: &str, value: impl serde::Serialize) -> Result<()> {
        self.figures.insert(name.to_owned(), serde_json::to_value(value)?);
        Ok(())
    }

    fn server(&self) -> SocketAddr {
        self.apache.address
    }

    /// What is there.
    fn introduce(&mut self) -> Result<()> {
        let (version, parent, children) = (apache::version()?, self.apache.pid(), self.apache.children());
        ensure!(children.len() == CHILDREN, "{} children", children.len());
        for &child in &children {
            let user = apache::user(child)?;
            ensure!(user == "www-data", "child {child} runs as {user}");
            ensure!(Snapshot::of(child)?.maps_file("mod_mpm_event.so"), "child {child} does not use the event MPM");
        }
        self.say("server", format!(
            "Debian's apache2 {version}, event MPM, at {}: parent {parent}, {CHILDREN} children with {THREADS} threads as www-data",
            self.server()
        ));
        self.served_in_full()?;
        self.say("before", format!("a request for {RANGES} ranges is served in full: 206 with {RANGES} parts"));
        self.note("server", json!({ "version": version, "children": CHILDREN, "threads": THREADS }))
    }

    /// Attach, patch, lose the agent, adopt, revert, detach, and no request fails.
    fn repair_under_load(&mut self) -> Result<()> {
        let warm = Load::start(self.server(), FILE, LOADS.0)?.finish()?;
        ensure!(warm.failed == 0, "{} requests failed before anything was done", warm.failed);
        let processes = self.apache.processes();
        let before: Vec<Snapshot> = processes.iter().map(|&pid| Snapshot::of(pid)).collect::<Result<_>>()?;
        let load = Load::start(self.server(), FILE, LOADS.1)?;
        let begin = Instant::now();
        std::thread::sleep(Duration::from_secs(1));

        let attached = self.attach(false)?;
        let (time, stop) = (duration(&attached, "total_us")?, duration(&attached, "longest_stop_us")?);
        self.say("attach", format!("{} processes in {time}; longest stop of a thread {stop}", processes.len()));
        self.note("attach", &attached)?;

        let (patched, command_us) = self.patch()?;
        let threads = Threads::of(&patched)?;
        self.say(
            "patch",
            format!(
                "{FUNCTION} replaced in {} processes under load, {} after the command was given",
                processes.len(),
                micros(command_us)
            ),
        );
        self.say("", threads.to_string());
        self.limited()?;
        self.say(
            "after",
            format!(
                "the same request gets the whole file: 200 with {FILE_LENGTH} bytes; 3 ranges are served as ever: 206"
            ),
        );
        self.note("patch", &patched)?;
        self.note("patch_command_us", command_us)?;

        std::thread::sleep(Duration::from_secs(1));
        self.replace_agent()?;
        self.limited()?;
        let adopted = self.attach(true)?;
        let time = duration(&adopted, "total_us")?;
        self.say("agent", format!("killed: the repair stays and works; a new agent adopted it in {time}"));
        self.note("adopt", &adopted)?;

        let reverted = self.agent.ask(&["revert"])?;
        self.served_in_full()?;
        self.say("revert", format!("as before: 206 with {RANGES} parts; it took {}", duration(&reverted, "total_us")?));
        self.note("revert", &reverted)?;
        let detached = self.detach()?;
        self.note("detach", &detached)?;
        ensure!(begin.elapsed() < Duration::from_secs(LOADS.1), "the load ended before everything was done");

        let seen = load.finish()?;
        ensure!(seen.requests > 0, "wrk made no requests");
        ensure!(seen.failed == 0, "{} of {} requests failed", seen.failed, seen.requests);
        self.say(
            "load",
            format!(
                "{} requests of {FILE_LENGTH} bytes meanwhile, 0 failed; slowest {} ({} in the {} s before)",
                seen.requests,
                micros(seen.slowest_us as u64),
                micros(warm.slowest_us as u64),
                LOADS.0
            ),
        );
        self.note("load_before_and_during", [&warm, &seen])?;
        let mut code = 0;
        for before in &before {
            let after = Snapshot::of(before.pid)?;
            before.ensure_same(&after, Extent::Code)?;
            code += after.code_length();
        }
        self.say("detach", format!("all {} KiB of code are, byte for byte, what they were before attach", code / 1024));
        Ok(())
    }

    /// The same without a load, so that the server itself changes nothing and everything can be compared.
    fn leave_no_trace(&mut self) -> Result<()> {
        let processes = self.apache.processes();
        // Connections of the load may still be lingering.
        std::thread::sleep(Duration::from_secs(3));
        let before: Vec<Snapshot> = processes.iter().map(|&pid| Snapshot::of(pid)).collect::<Result<_>>()?;
        self.attach(false)?;
        let (patched, command_us) = self.patch()?;
        ensure!(Snapshot::of(processes[0])?.ensure_code_is_of_files().is_err(), "patched, and no code has changed");
        self.agent.ask(&["revert"])?;
        let detached = self.detach()?;
        ensure!(detached["clean"] == Value::Bool(true), "asap does not say that it left no trace: {detached}");
        for before in &before {
            let after = Snapshot::of(before.pid)?;
            after.ensure_code_is_of_files()?;
            before.ensure_same(&after, Extent::Everything)?;
        }
        self.say(
            "traces",
            "none: attached, patched, reverted, detached on the idle server; memory maps, descriptors and",
        );
        self.say("", "signal handling of all processes are line for line as before, code is what the files say");
        self.note("patch_idle", &patched)?;
        self.note("patch_idle_command_us", command_us)
    }

    /// Children that are forked later run repaired, and are reverted with the others.
    fn follow_new_children(&mut self) -> Result<()> {
        self.attach(false)?;
        self.patch()?;
        self.apache.restart_gracefully()?;
        self.everywhere(limited)?;
        self.say("restart", format!("graceful: {CHILDREN} new children, and all of them are repaired"));
        let reverted = self.agent.ask(&["revert"])?;
        self.expect_processes(&reverted["processes"])?;
        self.everywhere(served_in_full)?;
        self.detach()?;
        for pid in self.apache.processes() {
            Snapshot::of(pid)?.ensure_code_is_of_files()?;
        }
        self.say("", "revert and detach reached them, too: the code of all processes is what the files say");
        Ok(())
    }

    fn attach(&self, adopts: bool) -> Result<Value> {
        let attached = self.agent.ask(&["attach", "--pid", &self.apache.pid().to_string()])?;
        self.expect_processes(&attached["target"]["processes"])?;
        ensure!(attached["adopted"] == Value::Bool(adopts), "adopted should be {adopts}: {attached}");
        Ok(attached)
    }

    /// The report, and the time from the command to its answer in microseconds.
    fn patch(&self) -> Result<(Value, u64)> {
        let begin = Instant::now();
        let patched = self.agent.ask(&["patch", "--function", FUNCTION, &self.fix])?;
        let time = begin.elapsed().as_micros() as u64;
        self.expect_processes(&patched["processes"])?;
        Ok((patched, time))
    }

    fn detach(&self) -> Result<Value> {
        let detached = self.agent.ask(&["detach", "--revert"])?;
        ensure!(detached["remaining"].as_array().is_some_and(Vec::is_empty), "patches remain: {detached}");
        ensure!(detached["clean"] != Value::Bool(false), "asap itself saw a difference: {detached}");
        Ok(detached)
    }

    /// Kills the agent; another takes its place, which knows nothing yet.
    fn replace_agent(&mut self) -> Result<()> {
        self.agent.kill()?;
        self.limited()?;
        self.agent = Agent::start(&self.asap, self.folder.path())?;
        Ok(())
    }

    /// Whether a report is about the server's processes, all of them and no others.
    fn expect_processes(&self, reported: &Value) -> Result<()> {
        let mut expected = self.apache.processes();
        let list = reported.as_array().context("a report without processes")?;
        let mut seen: Vec<i32> = list.iter().filter_map(|process| process["pid"].as_i64()).map(|n| n as i32).collect();
        expected.sort_unstable();
        seen.sort_unstable();
        ensure!(seen == expected, "asap speaks of the processes {seen:?}, the server has {expected:?}");
        Ok(())
    }

    fn served_in_full(&self) -> Result<()> {
        served_in_full(self.server())
    }

    fn limited(&self) -> Result<()> {
        limited(self.server())
    }

    /// Whether `holds` is said by every child: requests are made, several at a time, until each has answered some of them.
    fn everywhere(&self, holds: impl Fn(SocketAddr) -> Result<()> + Sync) -> Result<()> {
        let children = self.apache.children();
        let begin = Instant::now();
        self.apache.forget_ranges()?;
        loop {
            std::thread::scope(|scope| {
                let batch = [(); 8].map(|()| scope.spawn(|| holds(self.server())));
                batch.into_iter().try_for_each(|request| request.join().unwrap_or_else(|_| bail!("a request failed")))
            })?;
            let answered = self.apache.answered_ranges()?;
            if children.iter().all(|child| answered.contains(child)) {
                return Ok(());
            }
            ensure!(begin.elapsed() < Duration::from_secs(20), "of {children:?} only {answered:?} answer");
        }
    }
}

/// What a patch report says of threads.
struct Threads {
    all: u64,
    parked: u64,
    longest_gate: u64,
    stopped: u64,
    longest_stop: u64,
}

impl Threads {
    fn of(report: &Value) -> Result<Self> {
        let processes = report["processes"].as_array().context("a report without processes")?;
        let each = |name: &str| processes.iter().map(|process| figure(process, name)).collect::<Result<Vec<u64>>>();
        let sum = |name: &str| each(name).map(|figures| figures.iter().sum());
        let most = |name: &str| each(name).map(|figures| figures.into_iter().max().unwrap_or(0));
        Ok(Self {
            all: sum("threads")?,
            parked: sum("threads_parked")?,
            longest_gate: most("longest_gate_us")?,
            stopped: sum("threads_stopped")?,
            longest_stop: most("longest_stop_us")?,
        })
    }
}

impl std::fmt::Display for Threads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (gate, stop) = (micros(self.longest_gate), micros(self.longest_stop));
        let Self { all, parked, stopped, .. } = self;
        write!(
            f,
            "of {all} threads, {parked} waited at a gate (at most {gate}), {stopped} were stopped (at most {stop})"
        )
    }
}

/// Compiles the demo's patch as an administrator would.
pub fn compile(source: &Path, object: &Path) -> Result<()> {
    compile_with(source, object, &["-c"])
}

/// As [`compile`], with more arguments.
pub fn compile_with(source: &Path, output: &Path, arguments: &[&str]) -> Result<()> {
    let mut gcc = Command::new("gcc");
    gcc.args(["-O2", "-fPIC", "-Wall", "-Werror", "-I/usr/include/apache2", "-I/usr/include/apr-1.0", "-I"]);
    gcc.arg(command::top().join("asap-user/include")).args(arguments).arg("-o").arg(output).arg(source);
    command::run(&mut gcc)
}

/// Single bytes, three apart, as the request of the advisory wants them.
fn ranges(count: usize) -> Vec<(usize, usize)> {
    (0..count).map(|n| (3 * n, 3 * n)).collect()
}

/// Whether `count` ranges are answered by as many parts, each with the bytes that belong there.
fn served_in_parts(server: SocketAddr, count: usize) -> Result<()> {
    let wanted = ranges(count);
    let answer = http::get(server, FILE, &wanted)?;
    ensure!(answer.status == 206, "a request for {count} ranges got {}", answer.head);
    let parts = answer.parts()?;
    let contents = apache::contents();
    ensure!(parts.len() == wanted.len(), "a request for {count} ranges got {} parts", parts.len());
    for (wanted, part) in wanted.into_iter().zip(parts) {
        let right = part.range == wanted && contents.get(wanted.0..=wanted.1) == Some(part.bytes);
        ensure!(right, "for the bytes {wanted:?} came {part:?}");
    }
    Ok(())
}

/// As without the patch.
fn served_in_full(server: SocketAddr) -> Result<()> {
    served_in_parts(server, RANGES)
}

/// As with the patch: many ranges get the whole file, few get what they ask for.
fn limited(server: SocketAddr) -> Result<()> {
    let answer = http::get(server, FILE, &ranges(RANGES))?;
    ensure!(answer.status == 200, "a request for {RANGES} ranges got {}", answer.head);
    ensure!(answer.body == apache::contents(), "a request for {RANGES} ranges got a wrong file");
    served_in_parts(server, 3)
}

fn figure(value: &Value, name: &str) -> Result<u64> {
    value[name].as_u64().with_context(|| format!("no {name} in {value}"))
}

fn duration(value: &Value, name: &str) -> Result<String> {
    figure(value, name).map(micros)
}

/// Microseconds for people.
fn micros(us: u64) -> String {
    if us < 1000 { format!("{us} µs") } else { format!("{:.1} ms", us as f64 / 1000.0) }
}
