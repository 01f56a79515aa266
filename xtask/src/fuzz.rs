//! `cargo xtask fuzz`: libFuzzer on everything that asap reads from targets, files and sockets. The checks are plain functions of the
//! library (`asap-user/src/fuzz`), which the ordinary tests run on stable, too; here they get time, and coverage to steer by.

use crate::command;
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

/// What brings libFuzzer and cargo together.
const TOOL: (&str, &str) = ("cargo-fuzz", "0.13.2");
/// Longest input that is made, bytes: files in the corpora are smaller.
const INPUT_MOST: usize = 16 << 10;
/// An input that takes longer than this, seconds, is a finding: hostile input must cost bounded time.
const SLOW: u32 = 20;
/// A check that takes more memory than this, MiB, is a finding.
const MEMORY: u32 = 2048;

/// What to fuzz, and for how long.
#[derive(clap::Args)]
pub struct Options {
    /// One target; all if left out.
    target: Option<String>,
    /// How long each target runs, minutes.
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// Install cargo-fuzz (into the folder `target`) if it is missing.
    #[arg(long)]
    install: bool,
}

/// Runs the fuzzers one after the other; ends at the first finding.
pub fn run(options: &Options) -> Result<()> {
    ensure!(options.minutes > 0.0 && options.minutes < 100_000.0, "--minutes must be more than 0");
    let top = command::top();
    let tool = find_tool(options.install)?;
    let targets = targets(&top)?;
    let is_wanted = |name: &&String| options.target.as_ref().is_none_or(|target| target == *name);
    let wanted: Vec<&String> = targets.iter().filter(is_wanted).collect();
    ensure!(!wanted.is_empty(), "the fuzz targets are: {}", targets.join(", "));
    let build = top.join("target/fuzz");
    for target in &wanted {
        // The seeds are read, what is found is kept elsewhere: libFuzzer writes into the first folder.
        let found = build.join("corpus").join(target);
        let artifacts = build.join("artifacts").join(target);
        for folder in [&found, &artifacts] {
            fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        let mut fuzz = command::nightly("cargo");
        fuzz.current_dir(&top).env("PATH", with_folder_of(&tool)).args(["fuzz", "run", "--target-dir"]).arg(&build);
        fuzz.arg(target).arg(&found).arg(top.join("fuzz/corpus").join(target)).arg("--");
        fuzz.arg(format!("-max_total_time={}", (options.minutes * 60.0).ceil()));
        fuzz.arg(format!("-artifact_prefix={}/", artifacts.display()));
        fuzz.arg(format!("-timeout={SLOW}")).arg(format!("-rss_limit_mb={MEMORY}"));
        fuzz.arg(format!("-max_len={INPUT_MOST}")).args(["-print_final_stats=1", "-verbosity=1"]);
        let log = build.join(format!("{target}.log"));
        let output = fs::File::create(&log).with_context(|| log.display().to_string())?;
        fuzz.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        command::hear_signals(&mut fuzz);
        let status = fuzz.status().context("cargo fuzz can't be started")?;
        let text = String::from_utf8_lossy(&fs::read(&log).unwrap_or_default()).into_owned();
        if !status.success() {
            let tail: Vec<&str> = text.lines().rev().take(40).collect();
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
            bail!(
                "{target}: a finding, in {}; repeat it with: cargo +nightly fuzz run {target} FILE. Make it a test",
                artifacts.display()
            );
        }
        let stat = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or(" ?").trim().to_owned();
        println!(
            "fuzz: {target}: {} inputs, {} of them new, at most {} MiB, no finding",
            stat("stat::number_of_executed_units:"),
            stat("stat::new_units_added:"),
            stat("stat::peak_rss_mb:")
        );
    }
    Ok(())
}

/// The names of the targets: those of the programs.
fn targets(top: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    let folder = top.join("fuzz/fuzz_targets");
    for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let name = path.file_stem().and_then(|name| name.to_str()).context("a target without a name")?;
        names.push(name.to_owned());
    }
    names.sort_unstable();
    Ok(names)
}

/// Where cargo-fuzz is.
fn find_tool(install: bool) -> Result<PathBuf> {
    let version = command::nightly("rustc").arg("--version").stderr(Stdio::null()).output();
    ensure!(
        version.is_ok_and(|output| output.status.success()),
        "libFuzzer needs a nightly tool chain: rustup toolchain install nightly"
    );
    let own = command::top().join("target/tools");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain([own.join("bin")]);
    if let Some(found) = folders.map(|folder| folder.join(TOOL.0)).find(|path| path.is_file()) {
        return Ok(found);
    }
    ensure!(install, "{} is missing: cargo install {} --locked, or --install", TOOL.0, TOOL.0);
    let mut cargo = command::cargo();
    cargo.args(["install", TOOL.0, "--version", TOOL.1, "--locked", "--root"]).arg(&own);
    command::run(&mut cargo)?;
    Ok(own.join("bin").join(TOOL.0))
}

/// The search path for programs, with the folder of `tool` in it.
fn with_folder_of(tool: &Path) -> std::ffi::OsString {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(tool.parent().map(Path::to_owned));
    std::env::join_paths(folders).unwrap_or(path.clone())
}
