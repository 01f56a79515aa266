//! The corpus as it is written down: `patches/PACKAGE/package.toml` tells how a Debian package is built, started and asked;
//! `patches/PACKAGE/FIX/patch.toml` tells one fix. The diffs are in Debian's source packages.

use anyhow::{Context, Result, bail, ensure};
use asap::patch::manifest::Class;
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// A package and its fixes.
#[derive(Debug)]
pub struct Package {
    /// Name of the source package, and of the folder.
    pub name: String,
    /// The folder.
    pub folder: PathBuf,
    /// How it is built and run.
    pub recipe: Recipe,
    /// Its fixes, by name.
    pub fixes: Vec<Fix>,
}

/// How a package is built and run.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Upstream version; of Debian's versions of it, the newest that can be fetched is taken.
    pub version: String,
    /// Debian packages that are needed.
    #[serde(default)]
    pub needs: Vec<String>,
    /// Run once in the source, by `sh`; Debian's compiler flags are in the environment.
    pub configure: String,
    /// Run in the source, by `sh`, after each change.
    pub build: String,
    /// What runs, by name.
    pub servers: BTreeMap<String, Server>,
}

/// A server that a fix goes into.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Server {
    /// What the fix changes, within the source after the build: the server itself, or a library that it loads.
    pub target: PathBuf,
    /// The name that the target is installed under; its own if left out.
    pub install: Option<String>,
    /// Run before the start in the server's folder, by `sh`.
    pub prepare: Option<String>,
    /// Files in the server's folder.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
    /// How it is started.
    pub command: Vec<String>,
    /// Set in its environment.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// What shows that it serves.
    pub serves: Exchange,
}

/// Something that is asked of a server, and what it should say.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exchange {
    /// Sent over one connection, each after the answer to the one before.
    #[serde(default)]
    pub send: Vec<String>,
    /// The same as hexadecimal digits, blanks left out.
    #[serde(default)]
    pub send_hex: Vec<String>,
    /// Run by `sh` in the server's folder instead; what it prints is the answer.
    pub run: Option<String>,
    /// Which port: `port`, `port2`, `port3`, `port4`, or the name of a socket in the server's folder.
    pub port: Option<String>,
    /// By UDP.
    #[serde(default)]
    pub udp: bool,
    /// In the answer of a server that is vulnerable; for `serves`: in the answer always.
    pub before: Option<String>,
    /// In the answer of one that is repaired.
    pub after: Option<String>,
}

/// One fix.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fix {
    /// Its folder's name.
    #[serde(skip)]
    pub name: String,
    /// Its name in `debian/patches`; several that make up one fix, in order.
    pub patches: Vec<String>,
    /// The CVE, or what else it is known by.
    pub cve: String,
    /// What it repairs, in a line.
    pub about: String,
    /// The server, where there are several.
    pub server: Option<String>,
    /// The class that it is found to have.
    pub class: Class,
    /// Why there is no patch, or what else a reader should know.
    pub note: Option<String>,
    /// Part of `--fast`.
    #[serde(default)]
    pub fast: bool,
    /// What shows it, or at least runs its code.
    pub exercise: Option<Exchange>,
}

impl Package {
    /// The server of a fix.
    pub fn server(&self, fix: &Fix) -> Result<&Server> {
        let servers = &self.recipe.servers;
        match &fix.server {
            Some(name) => servers.get(name).with_context(|| format!("{} has no server {name}", self.name)),
            None if servers.len() == 1 => servers.values().next().context("a server"),
            None => bail!("{}/{}: which of the servers?", self.name, fix.name),
        }
    }
}

/// Reads the packages of the corpus that `wanted` names: packages, fixes, `PACKAGE/FIX`; all if it names none.
pub fn read(folder: &Path, wanted: &[String]) -> Result<Vec<Package>> {
    let mut packages = Vec::new();
    for at in folders(folder)? {
        let file = at.join("package.toml");
        if !file.exists() {
            continue;
        }
        let recipe: Recipe = parse(&file)?;
        let mut fixes = Vec::new();
        for at in folders(&at)? {
            let file = at.join("patch.toml");
            if file.exists() {
                let mut fix: Fix = parse(&file)?;
                fix.name = name(&at);
                ensure!(!fix.patches.is_empty(), "{}: it names no patch", file.display());
                fixes.push(fix);
            }
        }
        let package = Package { name: name(&at), folder: at, recipe, fixes };
        for fix in &package.fixes {
            package.server(fix)?;
        }
        packages.push(package);
    }
    let all: Vec<String> = packages.iter().flat_map(names).collect();
    if let Some(unknown) = wanted.iter().find(|name| !all.contains(name)) {
        bail!("the corpus has no package or fix {unknown}");
    }
    for package in &mut packages {
        let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|wanted| wanted == name);
        let whole = is_wanted(&package.name);
        let owner = package.name.clone();
        package.fixes.retain(|fix| whole || is_wanted(&fix.name) || is_wanted(&format!("{owner}/{}", fix.name)));
    }
    packages.retain(|package| !package.fixes.is_empty());
    Ok(packages)
}

/// The names by which a package and its fixes can be asked for.
fn names(package: &Package) -> Vec<String> {
    let fixes = package.fixes.iter().flat_map(|fix| [fix.name.clone(), format!("{}/{}", package.name, fix.name)]);
    fixes.chain([package.name.clone()]).collect()
}

fn parse<T: serde::de::DeserializeOwned>(file: &Path) -> Result<T> {
    let text = fs::read_to_string(file).with_context(|| format!("{}", file.display()))?;
    toml::from_str(&text).with_context(|| format!("{}", file.display()))
}

fn name(folder: &Path) -> String {
    folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn folders(parent: &Path) -> Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> =
        fs::read_dir(parent)?.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_corpus_can_be_read_and_is_large_enough() {
        let corpus = read(&crate::command::top().join("patches"), &[]).expect("the corpus");
        let fixes: usize = corpus.iter().map(|package| package.fixes.len()).sum();
        assert!(corpus.len() >= 8 && fixes >= 40, "{} packages, {fixes} fixes", corpus.len());
        for package in &corpus {
            let mut patches: Vec<_> = package.fixes.iter().flat_map(|fix| &fix.patches).collect();
            let all = patches.len();
            patches.sort();
            patches.dedup();
            assert_eq!(all, patches.len(), "a patch of {} is in two fixes", package.name);
        }
    }

    #[test]
    fn a_part_is_asked_for_by_name() {
        let folder = crate::command::top().join("patches");
        let one = read(&folder, &["nginx/CVE-2026-42945".to_owned()]).expect("a fix");
        assert_eq!((one.len(), one[0].fixes.len()), (1, 1));
        assert!(read(&folder, &["nginx".to_owned()]).expect("a package")[0].fixes.len() > 10);
        assert!(read(&folder, &["CVE-0000-0000".to_owned()]).is_err());
    }
}
