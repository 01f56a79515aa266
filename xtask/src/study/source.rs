//! A package's source: fetched with apt under a configuration of its own, unpacked once, built once. It stands at a place of
//! Debian's series of patches, and moves along it: each fix is studied on the source as it was right before Debian took it.

use super::corpus::{Fix, Package};
use crate::command;
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};
use vm_tests::apt::{Indexes, Kind, Suite, field, output};

/// Where sources come from; true: the security archive.
const SUITES: [Suite; 3] = [("bookworm", false), ("bookworm-updates", false), ("bookworm-security", true)];

/// Where the source stands.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    version: String,
    /// Patches of the series that are in.
    applied: usize,
    /// The recipe that it was configured with; none: it is not configured.
    configured: Option<String>,
}

/// An unpacked source.
#[derive(Debug)]
pub struct Source {
    /// Debian's version of it.
    pub version: String,
    folder: PathBuf,
    /// Debian's patches, in order.
    series: Vec<String>,
    state: State,
}

/// Fetches the indexes of Debian's sources.
pub fn indexes(cache: &Path) -> Result<Indexes> {
    Indexes::open(cache, Kind::Sources, &SUITES, "study")
}

impl Source {
    /// Takes the one that is there, or fetches and unpacks it.
    pub fn open(package: &Package, cache: &Path) -> Result<Self> {
        let folder = cache.join(&package.name);
        fs::create_dir_all(&folder)?;
        let known: Option<State> =
            fs::read(folder.join("state.json")).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let known = known.filter(|state| upstream(&state.version) == package.recipe.version);
        let state = match known {
            Some(state) => state,
            None => {
                let version = unpack(package, cache, &folder)?;
                State { version, applied: 0, configured: None }
            }
        };
        let series = fs::read_to_string(folder.join("patches/series")).context("the series of Debian's patches")?;
        let series = series.lines().filter_map(|line| line.split_ascii_whitespace().next());
        let series = series.filter(|name| !name.starts_with('#')).map(str::to_owned).collect();
        let source = Self { version: state.version.clone(), folder, series, state };
        source.remember()?;
        Ok(source)
    }

    /// The source's top folder.
    pub fn tree(&self) -> PathBuf {
        self.folder.join("tree")
    }

    /// The file of a patch.
    pub fn patch(&self, name: &str) -> PathBuf {
        self.folder.join("patches").join(name)
    }

    /// The place of a fix in the series; none: this version does not have it.
    pub fn place(&self, fix: &Fix) -> Option<usize> {
        self.series.iter().position(|name| *name == fix.patches[0])
    }

    /// Whether all patches of a fix are there, one behind the other.
    pub fn has(&self, fix: &Fix) -> bool {
        self.place(fix).is_some_and(|at| self.series[at..].starts_with(&fix.patches))
    }

    fn remember(&self) -> Result<()> {
        let fresh = self.folder.join("state.new");
        fs::write(&fresh, serde_json::to_vec(&self.state)?)?;
        fs::rename(fresh, self.folder.join("state.json"))?;
        Ok(())
    }

    /// Moves to the place right before a fix, and builds; what does not change is not built again.
    pub fn build_before(&mut self, package: &Package, fix: &Fix) -> Result<()> {
        let place = self.place(fix).context("the fix is not in this version's series")?;
        let log = self.folder.join("build.log");
        // While it moves it stands nowhere: a run that is ended here begins anew.
        fs::remove_file(self.folder.join("state.json"))?;
        while self.state.applied != place {
            let forward = self.state.applied < place;
            let next = if forward { self.state.applied } else { self.state.applied - 1 };
            self.apply(&self.series[next], !forward)?;
            self.state.applied = if forward { next + 1 } else { next };
        }
        let recipe = format!("{}\n{}", package.recipe.configure, package.recipe.build);
        if self.state.configured.as_ref() != Some(&recipe) {
            shell(&package.recipe.configure, &self.tree(), &log).context("configuring")?;
            self.state.configured = Some(recipe);
        }
        self.remember()?;
        shell(&package.recipe.build, &self.tree(), &log).context("building")
    }

    fn apply(&self, name: &str, reverse: bool) -> Result<()> {
        let mut patch = Command::new("patch");
        patch.args(["-t", "-F0", "-p1", "-u", "-E", "-s", "-Vnever", "--no-backup-if-mismatch"]);
        patch.arg(if reverse { "-R" } else { "-N" }).arg("-i").arg(self.patch(name)).current_dir(self.tree());
        output(&mut patch).map(drop)
    }
}

/// Runs a command line with Debian's compiler flags; what it says goes to the log.
fn shell(line: &str, folder: &Path, log: &Path) -> Result<()> {
    let log_file = File::options().create(true).append(true).open(log)?;
    writeln!(&log_file, "$ {line}")?;
    let status = flagged(line)
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(log_file.try_clone()?)
        .stderr(log_file)
        .status()
        .context("sh can't be started")?;
    ensure!(status.success(), "{line:?} ended with {status}; its words are in {}", log.display());
    Ok(())
}

/// A shell that has Debian's compiler flags in its environment, for a command line.
fn flagged(line: &str) -> Command {
    let [shell, option, script] = words(line);
    let mut shell = Command::new(shell);
    shell.args([option, script]);
    command::hear_signals(&mut shell);
    shell
}

/// The words of the build command, as `asap build` takes it, too.
pub fn words(line: &str) -> [String; 3] {
    ["sh".to_owned(), "-ec".to_owned(), format!("eval \"$(dpkg-buildflags --export=sh)\"\n{line}")]
}

/// A Debian version without epoch and revision.
fn upstream(version: &str) -> &str {
    let version = version.split_once(':').map_or(version, |(_, rest)| rest);
    version.rsplit_once('-').map_or(version, |(upstream, _)| upstream)
}

/// Debian's versions of a package that are of the recipe's upstream version, newest first.
fn versions(package: &Package, indexes: &Indexes) -> Result<Vec<String>> {
    let shown = output(indexes.apt("apt-cache").args(["showsrc", "--only-source", &package.name]))?;
    let of_upstream = |version: &&str| upstream(version) == package.recipe.version;
    let mut found: Vec<String> = field(&shown, "Version").filter(of_upstream).map(str::to_owned).collect();
    // dpkg knows what a newer version is: a sort by insertion, of a handful.
    let newer = |one: &str, other: &str| {
        let compared = Command::new("dpkg").args(["--compare-versions", one, "gt", other]).status();
        compared.is_ok_and(|status| status.success())
    };
    for at in 1..found.len() {
        let mut place = at;
        while place > 0 && newer(&found[place], &found[place - 1]) {
            found.swap(place, place - 1);
            place -= 1;
        }
    }
    found.dedup();
    Ok(found)
}

/// Fetches the newest source that the mirror really has, and unpacks it; gives its version.
fn unpack(package: &Package, cache: &Path, folder: &Path) -> Result<String> {
    let sources = cache.join("sources");
    fs::create_dir_all(&sources)?;
    let indexes = indexes(cache)?;
    let versions = versions(package, &indexes)?;
    let mut said = Vec::new();
    for version in &versions {
        let wanted = format!("{}={version}", package.name);
        eprintln!("study: fetching the source {wanted}");
        let fetched = output(
            indexes
                .apt("apt-get")
                .args(["-qq", "source", "--only-source", "--download-only", &wanted])
                .current_dir(&sources),
        );
        if let Err(error) = fetched {
            said.push(format!("{wanted}: {error:#}"));
            continue;
        }
        let file = version.split_once(':').map_or(version.as_str(), |(_, rest)| rest);
        let description = sources.join(format!("{}_{file}.dsc", package.name));
        for old in ["tree", "patches"] {
            let old = folder.join(old);
            if old.exists() {
                fs::remove_dir_all(old)?;
            }
        }
        // apt has checked it by the archive's signature.
        let mut unpack = Command::new("dpkg-source");
        unpack.args(["--no-check", "-x", "--skip-patches"]).arg(description).arg("tree").current_dir(folder);
        output(&mut unpack)?;
        // dpkg-source copies the archive to where it unpacks.
        for copy in fs::read_dir(folder)?.flatten().map(|entry| entry.path()) {
            if copy.file_name().is_some_and(|name| name.to_string_lossy().contains(".orig")) {
                fs::remove_file(copy)?;
            }
        }
        // Kept apart: a patch may change the folder that it lies in.
        output(Command::new("cp").arg("-a").arg("tree/debian/patches").arg("patches").current_dir(folder))?;
        return Ok(version.clone());
    }
    bail!("no source of {} {} can be fetched:\n{}", package.name, package.recipe.version, said.join("\n"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_taken_apart() {
        for (version, of) in [
            ("1.22.1-9+deb12u9", "1.22.1"),
            ("5:7.0.15-1~deb12u10", "7.0.15"),
            ("2.9.14+dfsg-1.3~deb12u6", "2.9.14+dfsg"),
            ("1.0", "1.0"),
        ] {
            assert_eq!(upstream(version), of);
        }
    }
}
