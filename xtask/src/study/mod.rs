//! `cargo xtask study`: every fix of the corpus is built as a patch from Debian's source, goes into the live server that it is for,
//! is seen to work, and goes out again. What came of each is kept, and put into a table and a picture.

mod breakpoint;
mod corpus;
mod outcome;
mod paper;
mod picture;
mod server;
mod source;
mod table;
mod trial;

use crate::{command, setup};
use anyhow::{Context, Result, bail};
use corpus::Package;
use outcome::{Outcome, Verdict};
use source::Source;
use std::{
    fs,
    path::{Path, PathBuf},
};
use trial::Bench;

/// What is studied, and how.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Packages and fixes, by their folders' names in `patches/`; everything if left out.
    #[arg(value_name = "PACKAGE|FIX")]
    wanted: Vec<String>,
    /// Take up an earlier study: fixes that went well and are described as they were are not studied again.
    #[arg(long)]
    resume: bool,
    /// Take patches from an earlier run instead of building them; what they do is studied again.
    #[arg(long)]
    reuse: bool,
    /// Only a few fixes of two packages that are built quickly.
    #[arg(long)]
    fast: bool,
    /// Print the results as JSON.
    #[arg(long)]
    json: bool,
    /// Folder for sources, patches and results; the report is study.md, study.json, study.svg in it.
    #[arg(long, default_value = "target/study")]
    output: PathBuf,
}

/// Runs it.
pub fn run(options: &Options) -> Result<()> {
    if !command::is_root() {
        bail!("the study needs root: it starts servers and attaches to them");
    }
    let mut packages = corpus::read(&command::top().join("patches"), &options.wanted)?;
    if options.fast {
        for package in &mut packages {
            package.fixes.retain(|fix| fix.fast);
        }
        packages.retain(|package| !package.fixes.is_empty());
    }
    setup::run()?;
    let mut needs: Vec<&str> = vec!["dpkg-dev", "patch", "make", "binutils"];
    needs.extend(packages.iter().flat_map(|package| package.recipe.needs.iter().map(String::as_str)));
    setup::packages_for("the study", &needs)?;
    let asap = command::build_asap(false, &[])?;
    fs::create_dir_all(&options.output)?;
    let cache = options.output.canonicalize()?;
    let bench = Bench { asap: &asap, cache: &cache, reuse: options.reuse };
    let mut outcomes = Vec::new();
    for package in &packages {
        outcomes.extend(study(bench, package, options.resume)?);
        report(&outcomes, &cache)?;
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&outcomes)?);
    } else {
        print!("{}", table::markdown(&outcomes));
    }
    let bad: Vec<String> = outcomes
        .iter()
        .filter(|outcome| !outcome.is_expected())
        .map(|outcome| {
            let class = outcome.class.map_or("none", |class| class.name());
            let why = outcome.why.as_deref().unwrap_or_default();
            let verdict = outcome.verdict.words();
            format!("{}/{}: {verdict}, class {class} for {}: {why}", outcome.package, outcome.fix, outcome.expected)
        })
        .collect();
    if !bad.is_empty() {
        bail!("not as the corpus says:\n{}", bad.join("\n"));
    }
    Ok(())
}

/// Studies the fixes of a package, in the order of Debian's series.
fn study(bench: Bench, package: &Package, resume: bool) -> Result<Vec<Outcome>> {
    let file = |fix: &corpus::Fix| bench.cache.join(&package.name).join("results").join(format!("{}.json", fix.name));
    let mut outcomes = Vec::new();
    let mut open = Vec::new();
    for fix in &package.fixes {
        let described = fs::read_to_string(package.folder.join(&fix.name).join("patch.toml"))?;
        let known = Outcome::read(&file(fix)).filter(|known| {
            resume && known.described == described && !matches!(known.verdict, Verdict::Failed | Verdict::Broken)
        });
        match known {
            Some(known) => outcomes.push(known),
            None => open.push(fix),
        }
    }
    if open.is_empty() {
        return Ok(outcomes);
    }
    let mut source = match Source::open(package, bench.cache) {
        Ok(source) => source,
        Err(error) => {
            outcomes.extend(open.iter().map(|fix| trial::failed(package, fix, &error)));
            return Ok(outcomes);
        }
    };
    open.sort_by_key(|fix| source.place(fix));
    for fix in open {
        if !source.has(fix) {
            let missing = anyhow::anyhow!("{} {} has not all of its patches in one row", package.name, source.version);
            outcomes.push(trial::failed(package, fix, &missing));
            continue;
        }
        let outcome = trial::run(bench, package, fix, &mut source)?;
        let seconds: f64 = outcome.steps.iter().map(|step| step.seconds).sum();
        let why = outcome.why.as_deref().map(|why| format!(": {why}")).unwrap_or_default();
        eprintln!("study: {}/{}: {} ({seconds:.0} s){why}", package.name, fix.name, outcome.verdict.words());
        outcome.write(&file(fix))?;
        outcomes.push(outcome);
    }
    Ok(outcomes)
}

/// Writes table, data and picture.
fn report(outcomes: &[Outcome], folder: &Path) -> Result<()> {
    fs::write(folder.join("study.md"), table::markdown(outcomes) + "\n" + &paper::summary()?)?;
    fs::write(folder.join("study.json"), serde_json::to_vec_pretty(outcomes)?)?;
    picture::write(&folder.join("study.svg"), outcomes).context("the picture")
}
