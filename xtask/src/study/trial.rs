//! The trial of one fix: a patch is built, goes into a live server under a light load, is seen to work, and goes out again.

use super::{
    breakpoint::{self, Counter},
    corpus::{Exchange, Fix, Package, Server},
    outcome::{Outcome, Step, Verdict},
    server::{Origin, Running},
    source::{self, Source},
};
use crate::{
    agent::Agent,
    command,
    owned::Folder,
    snapshot::{Extent, Snapshot},
};
use anyhow::{Context, Error, Result, bail, ensure};
use asap::patch::manifest::Class;
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// How long a patch may wait for a moment.
const TIMEOUT: &str = "20s";
/// Answers that the load gets before and after the patch.
const ANSWERS: u64 = 10;

/// What all trials share.
#[derive(Clone, Copy, Debug)]
pub struct Bench<'a> {
    /// `asap`.
    pub asap: &'a Path,
    /// Where sources, patches and results are kept.
    pub cache: &'a Path,
    /// Take patches that are there from an earlier run.
    pub reuse: bool,
}

/// A trial, as far as it has come.
struct Trial<'a> {
    bench: Bench<'a>,
    package: &'a Package,
    fix: &'a Fix,
    server: &'a Server,
    outcome: Outcome,
    /// The server did not stay what it was while the patch was in.
    broken: bool,
}

/// A replaced function.
struct Function {
    name: String,
    old: u64,
}

/// Runs it. What goes wrong is told in the outcome.
pub fn run(bench: Bench, package: &Package, fix: &Fix, source: &mut Source) -> Result<Outcome> {
    let described = fs::read_to_string(package.folder.join(&fix.name).join("patch.toml"))?;
    let outcome = Outcome {
        package: package.name.clone(),
        version: source.version.clone(),
        fix: fix.name.clone(),
        cve: fix.cve.clone(),
        about: fix.about.clone(),
        verdict: Verdict::Failed,
        class: None,
        expected: fix.class,
        functions: 0,
        ran: Vec::new(),
        reproduced: false,
        patch_ms: None,
        gate_us: None,
        answers: 0,
        why: None,
        note: fix.note.clone(),
        steps: Vec::new(),
        described,
    };
    let mut trial = Trial { bench, package, fix, server: package.server(fix)?, outcome, broken: false };
    match trial.all(source) {
        Ok(verdict) => trial.outcome.verdict = verdict,
        Err(error) => {
            trial.outcome.verdict = if trial.broken { Verdict::Broken } else { Verdict::Failed };
            let step = trial.outcome.steps.last().map_or("", |step| step.name.as_str());
            trial.outcome.why = Some(format!("after \"{step}\": {error:#}"));
        }
    }
    Ok(trial.outcome)
}

impl Trial<'_> {
    /// Does a step, and writes down what was seen and how long it took.
    fn step<T>(&mut self, name: &str, act: impl FnOnce(&mut Self) -> Result<(T, String)>) -> Result<T> {
        let begin = Instant::now();
        let (value, seen) = act(self).with_context(|| name.to_owned())?;
        self.outcome.steps.push(Step { name: name.to_owned(), seen, seconds: begin.elapsed().as_secs_f64() });
        Ok(value)
    }

    fn all(&mut self, source: &mut Source) -> Result<Verdict> {
        let folder = self.bench.cache.join(&self.package.name).join("fixes").join(&self.fix.name);
        let (target, patch, report) = (self.installed(&folder)?, folder.join("fix.asap"), folder.join("build.json"));
        if !(self.bench.reuse && report.exists() && target.exists()) {
            self.step("build the vulnerable version", |trial| {
                source.build_before(trial.package, trial.fix)?;
                Ok(((), format!("{} before {}", source.version, trial.fix.patches[0])))
            })?;
            if folder.exists() {
                fs::remove_dir_all(&folder)?;
            }
            install(&source.tree().join(&self.server.target), &target)?;
            self.step("build the patch", |trial| trial.build(source, &target, &folder))?;
        }
        let document: Value = serde_json::from_slice(&fs::read(&report)?)?;
        self.outcome.class = Some(serde_json::from_value(document["class"].clone())?);
        self.outcome.functions = document["functions"].as_array().map_or(0, Vec::len);
        if !patch.exists() {
            self.outcome.why = Some(reason(&document));
            return Ok(Verdict::NoPatch);
        }
        let scratch = Folder::new("asap-study-")?;
        self.live(&source.tree(), &target, &patch, scratch.path())
    }

    /// Where the target is, stripped as Debian's are.
    fn installed(&self, folder: &Path) -> Result<PathBuf> {
        let own = self.server.target.file_name().context("a target")?;
        Ok(folder.join("installed").join(self.server.install.as_ref().map_or(own, |name| name.as_ref())))
    }

    /// Has `asap build` make the patch, or say why there is none.
    fn build(&self, source: &Source, target: &Path, folder: &Path) -> Result<((), String)> {
        let work = folder.join("work");
        let mut build = Command::new(self.bench.asap);
        build.args(["--json", "build", "--source"]).arg(source.tree());
        for name in &self.fix.patches {
            build.arg("--patch").arg(source.patch(name));
        }
        build.arg("--target").arg(target).arg("--twin").arg(&self.server.target);
        build.args(["--name", &self.fix.name, "--work"]).arg(&work).arg("-o").arg(folder.join("fix.asap"));
        build.arg("--").args(source::words(&self.package.recipe.build)).stdin(Stdio::null());
        command::hear_signals(&mut build);
        let output = build.output().context("asap can't be started")?;
        let said = String::from_utf8_lossy(&output.stdout);
        let document: Value = serde_json::from_str(&said).unwrap_or_default();
        if document["class"].is_null() {
            bail!("asap build: {}{said}", String::from_utf8_lossy(&output.stderr));
        }
        fs::write(folder.join("build.json"), said.as_bytes())?;
        // The copies are large; the log stays.
        for copy in ["build", "before", "after"] {
            let copy = work.join(copy);
            if copy.exists() {
                fs::remove_dir_all(copy)?;
            }
        }
        Ok(((), format!("class {}", document["class"].as_str().unwrap_or_default())))
    }

    fn live(&mut self, tree: &Path, target: &Path, patch: &Path, scratch: &Path) -> Result<Verdict> {
        let origin = Origin { package: self.package, server: self.server, tree, target };
        let mut server = self.step("start the server", |_| {
            let server = Running::start(&origin, &scratch.join("server"))?;
            let seen = format!("{} processes", server.processes().len());
            Ok((server, seen))
        })?;
        let pid = server.pid().to_string();
        self.step("ask it before", |trial| Ok(((), trial.exercise(&mut server, |exchange| &exchange.before)?)))?;
        for _ in 0..ANSWERS {
            server.serves()?;
        }
        let agent = Agent::start(self.bench.asap, scratch)?;
        let before: BTreeMap<i32, Snapshot> =
            server.processes().into_iter().map(|pid| Ok((pid, Snapshot::of(pid)?))).collect::<Result<_>>()?;
        self.step("attach", |_| Ok(((), us(&agent.ask(&["attach", "--pid", &pid])?["total_us"]))))?;
        let result = self.with_patch(&mut server, &agent, patch, &before);
        if result.is_err() && server.ensure_alive().and_then(|()| server.serves()).is_err() {
            self.broken = true;
        }
        if self.outcome.class == Some(Class::NeverQuiescent)
            && !self.broken
            && let Err(error) = &result
        {
            self.outcome.why = Some(format!("{error:#}"));
            return Ok(Verdict::NoPatch);
        }
        self.outcome.ran = result?;
        let exercise = self.fix.exercise.as_ref();
        self.outcome.reproduced = exercise.is_some_and(|e| e.after.is_some() && e.before.is_some());
        if exercise.is_none() {
            return Ok(Verdict::InAndOut);
        }
        ensure!(
            !self.outcome.ran.is_empty() || self.outcome.reproduced,
            "the new code was never seen to run, though the corpus says that it would"
        );
        Ok(Verdict::Repaired)
    }

    /// From the patch until nothing of it is left; gives which of its functions ran.
    fn with_patch(
        &mut self,
        server: &mut Running,
        agent: &Agent,
        patch: &Path,
        before: &BTreeMap<i32, Snapshot>,
    ) -> Result<Vec<String>> {
        let pid = server.pid().to_string();
        let functions = self.step("patch under load", |trial| trial.patch(server, agent, patch))?;
        let ran = self.step("ask it with the patch", |trial| {
            let new = |pid: i32, function: &Function| replacement(pid, function.old);
            let (ran, said) = trial.watched(server, &functions, new, |exchange| &exchange.after)?;
            let seen = format!("{said}; new code ran: {}", list(&ran));
            Ok((ran, seen))
        })?;
        self.step("revert", |_| {
            let report = agent.ask(&["revert", "--pid", &pid, "--timeout", TIMEOUT])?;
            server.ensure_alive()?;
            Ok(((), us(&report["total_us"])))
        })?;
        self.step("ask it after the revert", |trial| {
            server.serves()?;
            let old = |_: i32, function: &Function| Ok(function.old);
            let (ran, said) = trial.watched(server, &functions, old, |exchange| &exchange.before)?;
            Ok(((), format!("{said}; old code ran: {}", list(&ran))))
        })?;
        self.step("detach", |_| {
            agent.ask(&["detach", "--pid", &pid, "--revert"])?;
            let mut compared = 0;
            for pid in server.processes() {
                let now = Snapshot::of(pid)?;
                now.ensure_code_is_of_files()?;
                if let Some(before) = before.get(&pid) {
                    before.ensure_same(&now, Extent::Code)?;
                    compared += 1;
                }
            }
            server.serves()?;
            Ok(((), format!("code and map of {compared} processes are as before")))
        })?;
        Ok(ran)
    }

    fn patch(&mut self, server: &mut Running, agent: &Agent, patch: &Path) -> Result<(Vec<Function>, String)> {
        let load = server.load();
        let wait = |more: u64| {
            let until = load.answers() + more;
            let deadline = Instant::now() + Duration::from_secs(20);
            while load.answers() < until && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        wait(ANSWERS);
        let (pid, patch) = (server.pid().to_string(), patch.display().to_string());
        let mut request = vec!["patch", "--pid", &pid, "--timeout", TIMEOUT];
        if self.outcome.class == Some(Class::NeverQuiescent) {
            request.extend(["--consistency", "lazy"]);
        }
        request.push(&patch);
        let report = agent.ask(&request);
        wait(ANSWERS);
        let answers = load.finish();
        self.broken = answers.is_err();
        if let Err(error) = &report
            && format!("{error:#}").contains("there was no moment")
        {
            self.outcome.class = Some(Class::NeverQuiescent);
        }
        let report = report?;
        self.outcome.answers = answers.context("the load")?;
        server.ensure_alive()?;
        server.serves()?;
        self.outcome.patch_ms = report["total_us"].as_f64().map(|us| us / 1000.0);
        let processes = report["processes"].as_array().context("processes")?;
        self.outcome.gate_us = processes.iter().filter_map(|process| process["longest_gate_us"].as_u64()).max();
        let functions = report["patch"]["functions"].as_array().context("functions")?;
        let function = |value: &Value| {
            Ok(Function {
                name: value["name"].as_str().context("a name")?.to_owned(),
                old: address(&value["old"]).context("an address")?,
            })
        };
        let functions: Vec<Function> = functions.iter().map(function).collect::<Result<_>>()?;
        let seen =
            format!("{}, in {} processes; {} answers", us(&report["total_us"]), processes.len(), self.outcome.answers);
        Ok((functions, seen))
    }

    /// Asks what the fix is about; `expected` says which of the answers it must be.
    fn exercise(&self, server: &mut Running, expected: fn(&Exchange) -> &Option<String>) -> Result<String> {
        let Some(exchange) = &self.fix.exercise else { return Ok("nothing is asked".to_owned()) };
        let answer = server.ask(exchange)?;
        server.ensure_alive()?;
        if let Some(expected) = expected(exchange) {
            ensure!(answer.contains(expected), "it answered {answer:?}, which does not contain {expected:?}");
            return Ok(format!("the answer contains {expected:?}"));
        }
        Ok(format!("it answered {:?}", answer.chars().take(120).collect::<String>()))
    }

    /// The same, and which of the functions ran meanwhile, `at` being where they begin in a process.
    fn watched(
        &self,
        server: &mut Running,
        functions: &[Function],
        at: impl Fn(i32, &Function) -> Result<u64>,
        expected: fn(&Exchange) -> &Option<String>,
    ) -> Result<(Vec<String>, String)> {
        let mut ran = Vec::new();
        let mut said = String::new();
        for some in functions.chunks(breakpoint::MOST) {
            let mut counters = Vec::new();
            for function in some {
                let places = server.processes().into_iter().map(|pid| Ok((pid, at(pid, function)?)));
                // Some virtual machines have no breakpoints: then nothing is counted.
                if let Ok(counter) = Counter::of(&places.collect::<Result<Vec<_>>>()?) {
                    counters.push((function, counter));
                }
            }
            said = self.exercise(server, expected)?;
            for (function, counter) in counters {
                let count = counter.count()?;
                if count > 0 {
                    ran.push(format!("{} ({count} times)", function.name));
                }
            }
            if self.fix.exercise.is_none() {
                break;
            }
        }
        Ok((ran, said))
    }
}

/// Where the jump at a replaced function's entry leads, in one process.
fn replacement(pid: i32, entry: u64) -> Result<u64> {
    let mut bytes = [0; 16];
    fs::File::open(format!("/proc/{pid}/mem"))?.read_exact_at(&mut bytes, entry)?;
    // endbr64 may stay before it.
    let at = if bytes.starts_with(&[0xf3, 0x0f, 0x1e, 0xfa]) { 4 } else { 0 };
    ensure!(bytes[at] == 0xe9, "no jump at the entry {entry:#x} of process {pid}: {bytes:02x?}");
    let distance = i32::from_le_bytes(bytes[at + 1..at + 5].try_into()?);
    Ok((entry + at as u64 + 5).wrapping_add_signed(distance.into()))
}

/// Puts a target where it runs from, without its symbols.
fn install(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.parent().context("a folder")?)?;
    let stripped = Command::new("strip").arg("-o").arg(to).arg(from).output().context("strip can't be started")?;
    ensure!(stripped.status.success(), "{}: {}", from.display(), String::from_utf8_lossy(&stripped.stderr));
    Ok(())
}

/// Why there is no patch, in the words of `asap build`.
fn reason(document: &Value) -> String {
    let findings = document["findings"].as_array().map_or(&[][..], Vec::as_slice);
    let grave = findings.iter().filter(|finding| finding["class"] == document["class"]);
    let reasons: Vec<&str> = grave.filter_map(|finding| finding["reason"].as_str()).take(3).collect();
    match reasons.is_empty() {
        true => document["failed"]["message"].as_str().unwrap_or("nothing of the target changes").to_owned(),
        false => reasons.join("; "),
    }
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

fn us(value: &Value) -> String {
    value.as_f64().map_or_else(|| "done".to_owned(), |us| format!("{:.1} ms", us / 1000.0))
}

/// An address in a report: a number, or hexadecimal text.
fn address(value: &Value) -> Option<u64> {
    let hex = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok();
    value.as_u64().or_else(|| hex(value.as_str()?))
}

/// Makes errors of a whole package those of its fixes.
pub fn failed(package: &Package, fix: &Fix, error: &Error) -> Outcome {
    Outcome {
        package: package.name.clone(),
        version: package.recipe.version.clone(),
        fix: fix.name.clone(),
        cve: fix.cve.clone(),
        about: fix.about.clone(),
        verdict: Verdict::Failed,
        class: None,
        expected: fix.class,
        functions: 0,
        ran: Vec::new(),
        reproduced: false,
        patch_ms: None,
        gate_us: None,
        answers: 0,
        why: Some(format!("{error:#}")),
        note: None,
        steps: Vec::new(),
        described: String::new(),
    }
}
