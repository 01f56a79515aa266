//! apt with a configuration of our own: the machine's sources with their source packages, lists and archives in a folder of
//! ours, no hooks. The machine's own lists, archives and configuration stay as they are. Not for installing: that is done in a
//! private layer (`room`), with this.

use super::{DebianError, run, text_of};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// Lists that are younger are used as they are.
const FRESH: Duration = Duration::from_secs(3600);
/// What the machine's administrator has run beside apt would change the machine.
const HOOKS: [&str; 6] = [
    "APT::Update::Pre-Invoke",
    "APT::Update::Post-Invoke",
    "APT::Update::Post-Invoke-Success",
    "DPkg::Pre-Invoke",
    "DPkg::Post-Invoke",
    "DPkg::Pre-Install-Pkgs",
];

/// A configuration.
#[derive(Clone, Debug)]
pub struct Apt {
    configuration: PathBuf,
    folder: PathBuf,
    log: PathBuf,
}

impl Apt {
    /// Writes the configuration into `folder`, which may be that of an earlier one. `log` takes what apt says.
    ///
    /// # Errors
    /// The folder can't be written.
    pub fn new(folder: &Path, log: &Path) -> Result<Self, DebianError> {
        let sources = folder.join("sources.d");
        let lists = folder.join("lists");
        for made in [&sources, &lists.join("partial"), &folder.join("archives/partial")] {
            fs::create_dir_all(made).map_err(DebianError::at(made))?;
        }
        for (name, text) in machine_sources() {
            let file = sources.join(name);
            fs::write(&file, text).map_err(DebianError::at(&file))?;
        }
        let at = folder.display();
        let mut text = format!(
            "Dir::Etc::sourcelist \"/dev/null\";\nDir::Etc::sourceparts \"{at}/sources.d\";\n\
             Dir::State::lists \"{at}/lists\";\nDir::Cache::archives \"{at}/archives\";\n\
             Dir::Cache::pkgcache \"\";\nDir::Cache::srcpkgcache \"\";\nAcquire::Languages \"none\";\n\
             Acquire::http::Timeout \"30\";\nAcquire::https::Timeout \"30\";\nAcquire::Retries \"1\";\n\
             APT::Keep-Downloaded-Packages \"true\";\nBinary::apt-get::APT::Keep-Downloaded-Packages \"true\";\n"
        );
        // The folder belongs to us, and apt's own user may not enter it.
        if nix::unistd::geteuid().is_root() {
            text.push_str("APT::Sandbox::User \"root\";\n");
        }
        HOOKS.iter().for_each(|hook| text.push_str(&format!("#clear {hook};\n")));
        let configuration = folder.join("apt.conf");
        fs::write(&configuration, text).map_err(DebianError::at(&configuration))?;
        Ok(Self { configuration, folder: folder.to_owned(), log: log.to_owned() })
    }

    /// A command of apt (`apt-get`, `apt-cache`).
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-c").arg(&self.configuration).env("LC_ALL", "C.UTF-8").env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    /// Brings the lists up to date, unless they are.
    ///
    /// # Errors
    /// There are none to be had.
    pub fn update(&self) -> Result<(), DebianError> {
        let stamp = self.folder.join("updated");
        let age = fs::metadata(&stamp).and_then(|data| data.modified()).ok().and_then(|time| time.elapsed().ok());
        if age.is_some_and(|age| age < FRESH) {
            return Ok(());
        }
        if age.is_none() {
            self.borrow_lists();
        }
        run(self.command("apt-get").args(["-q", "update"]), &self.log, "apt-get update")?;
        fs::write(&stamp, "").map_err(DebianError::at(&stamp))
    }

    /// Lists that the machine has already need not be fetched again.
    fn borrow_lists(&self) {
        let Ok(entries) = fs::read_dir("/var/lib/apt/lists") else { return };
        for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file())) {
            if entry.file_name() != "lock" {
                // cp keeps the times, by which servers are asked whether there is something newer.
                let to = self.folder.join("lists").join(entry.file_name());
                let _ = Command::new("cp").arg("-a").arg(entry.path()).arg(to).output();
            }
        }
    }

    /// What `apt-cache` says; nothing, if it knows nothing.
    pub fn ask(&self, arguments: &[&str]) -> String {
        text_of(self.command("apt-cache").args(arguments)).unwrap_or_default()
    }

    /// Fetches a source package (without unpacking it) into `folder`; its `.dsc` file.
    ///
    /// # Errors
    /// It can't be had.
    pub fn source(&self, source: &str, version: &str, folder: &Path) -> Result<PathBuf, DebianError> {
        fs::create_dir_all(folder).map_err(DebianError::at(folder))?;
        let mut command = self.command("apt-get");
        command.args(["-q", "source", "--download-only", "--only-source"]).arg(format!("{source}={version}"));
        let fetched = run(command.current_dir(folder), &self.log, "apt-get source");
        let dsc = folder.join(super::package::dsc_name(source, version));
        match fetched {
            Ok(()) if dsc.is_file() => Ok(dsc),
            fetched => {
                let listed = self.ask(&["showsrc", "--only-source", source]);
                let mut versions: Vec<String> = super::package::values(&listed, "Version").map(str::to_owned).collect();
                versions.sort();
                versions.dedup();
                Err(DebianError::NoSource {
                    source_package: source.to_owned(),
                    version: version.to_owned(),
                    is_listed: versions.iter().any(|known| known == version),
                    others: versions.into_iter().filter(|known| known != version).collect(),
                    words: fetched.err().map(|error| error.to_string()).unwrap_or_default(),
                })
            }
        }
    }

    /// Fetches a binary package into `folder`.
    ///
    /// # Errors
    /// It can't be had.
    pub fn binary(&self, package: &str, version: &str, folder: &Path) -> Result<PathBuf, DebianError> {
        let own = folder.join(package);
        fs::create_dir_all(&own).map_err(DebianError::at(&own))?;
        let mut command = self.command("apt-get");
        command.args(["-q", "download"]).arg(format!("{package}={version}"));
        run(command.current_dir(&own), &self.log, "apt-get download")?;
        let mut entries = fs::read_dir(&own).map_err(DebianError::at(&own))?.flatten().map(|entry| entry.path());
        let deb = entries.find(|path| path.extension().is_some_and(|ending| ending == "deb"));
        deb.ok_or_else(|| DebianError::at(&own)(std::io::Error::other("apt-get download left no package")))
    }

    /// Installs what a source package needs to be built, where this process is.
    ///
    /// # Errors
    /// Something can't be installed.
    pub fn install_dependencies(&self, dsc: &Path) -> Result<(), DebianError> {
        let mut command = self.command("apt-get");
        command.args(["-q", "--yes", "--no-install-recommends", "-o", "Dpkg::Options::=--force-confold"]);
        command.args(["-o", "Dpkg::Options::=--force-unsafe-io", "build-dep", "--arch-only", "-P", "nocheck"]).arg(dsc);
        run(&mut command, &self.log, "apt-get build-dep")?;
        // What was there already may be older than what Debian built with: its versions are in the code.
        let text = fs::read_to_string(dsc).map_err(DebianError::at(dsc))?;
        let mut command = self.command("apt-get");
        command.args(["-q", "--yes", "--no-install-recommends", "-o", "Dpkg::Options::=--force-confold"]);
        command.args(["-o", "Dpkg::Options::=--force-unsafe-io", "install", "--only-upgrade"]);
        let installed = super::installed()?;
        let is_there = |name: &String| installed.iter().any(|package| package.name == *name);
        command.args(super::package::build_dependencies(&text).into_iter().filter(is_there));
        run(&mut command, &self.log, "apt-get install --only-upgrade")
    }
}

/// The machine's lists of sources, completed by source packages: names and texts.
fn machine_sources() -> Vec<(String, String)> {
    let mut found = Vec::new();
    if let Ok(text) = fs::read_to_string("/etc/apt/sources.list") {
        found.push(("machine.list".to_owned(), with_sources_list(&text)));
    }
    let entries = fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(text) = fs::read_to_string(entry.path()) else { continue };
        match name.rsplit_once('.') {
            Some((_, "list")) => found.push((name, with_sources_list(&text))),
            Some((_, "sources")) => found.push((name, with_sources_stanzas(&text))),
            _ => {}
        }
    }
    found
}

/// One-line style: each `deb` is followed by its `deb-src`.
fn with_sources_list(text: &str) -> String {
    let mut all = String::new();
    for line in text.lines() {
        all.push_str(line);
        all.push('\n');
        let rest = line.trim_start().strip_prefix("deb").filter(|rest| rest.starts_with([' ', '\t']));
        if let Some(rest) = rest {
            all.push_str(&format!("deb-src{rest}\n"));
        }
    }
    all
}

/// Stanzas (deb822): each type `deb` gets `deb-src` beside it.
fn with_sources_stanzas(text: &str) -> String {
    let line = |line: &str| match line.split_once(':') {
        Some((name, types)) if name.eq_ignore_ascii_case("types") => {
            let has = |word: &str| types.split_whitespace().any(|known| known == word);
            if has("deb") && !has("deb-src") { format!("{line} deb-src\n") } else { format!("{line}\n") }
        }
        _ => format!("{line}\n"),
    };
    text.lines().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_completed_by_source_packages() {
        let list =
            "# deb no\ndeb [signed-by=/k.gpg] http://m/debian bookworm main\ndeb-src http://m/debian bookworm main\n";
        assert_eq!(
            with_sources_list(list),
            "# deb no\ndeb [signed-by=/k.gpg] http://m/debian bookworm main\n\
             deb-src [signed-by=/k.gpg] http://m/debian bookworm main\ndeb-src http://m/debian bookworm main\n"
        );
        let stanzas = "Types: deb\nURIs: http://m/debian\n\nTypes: deb-src deb\nURIs: http://n\n";
        assert_eq!(
            with_sources_stanzas(stanzas),
            "Types: deb deb-src\nURIs: http://m/debian\n\nTypes: deb-src deb\nURIs: http://n\n"
        );
    }
}
