//! The source of a Debian package that is installed, or of a named version: which one it is, where it comes from, what it needs
//! to be built, and how Debian builds it. The machine's packages and apt's state are left as they are. Not for building, which is
//! `driver`.

pub mod apt;
pub mod package;

use super::driver::Again;
use apt::Apt;
use package::Package;
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Debian's build machines unpack sources here, and the path is part of what comes out.
pub const BUILD_PATH: &str = "/build/reproducible-path";
/// Lines of apt's words that are shown.
const LINES_SHOWN: usize = 6;
/// Programs that are needed to unpack and build anything.
const TOOLS: [&str; 3] = ["dpkg-source", "dpkg-buildpackage", "make"];

/// A package can't be had or built.
#[derive(Debug, thiserror::Error)]
pub enum DebianError {
    /// A file.
    #[error("{path}: {error}")]
    File {
        /// Its path.
        path: String,
        /// What the system said.
        error: io::Error,
    },
    /// Not a Debian system.
    #[error("{0} can't be run: {1}")]
    NoTool(String, io::Error),
    /// Not installed.
    #[error("no package or source package {0} is installed")]
    NotInstalled(String),
    /// Of a source, packages of several versions are installed.
    #[error("of {source_package}, packages of several versions are installed: {versions}")]
    SeveralVersions {
        /// The source package.
        source_package: String,
        /// The versions.
        versions: String,
    },
    /// No such version.
    #[error("{package} {version} is not to be had; there are: {others}")]
    NoVersion {
        /// Name of the package.
        package: String,
        /// The version that was asked for.
        version: String,
        /// Those that there are.
        others: String,
    },
    /// The source is not there.
    #[error("the source {source_package} {version} {}{}{words}",
        if *is_listed { "is in the lists, but the servers do not have it" } else { "is not to be had" },
        if others.is_empty() { String::new() } else { format!(" (there are: {})", others.join(", ")) })]
    NoSource {
        /// The source package.
        source_package: String,
        /// Its version.
        version: String,
        /// The lists have it.
        is_listed: bool,
        /// Versions that there are.
        others: Vec<String>,
        /// What apt said.
        words: String,
    },
    /// Packages that are needed to build it.
    #[error("{source_package} needs packages to be built that are not installed: {missing}")]
    Missing {
        /// The source package.
        source_package: String,
        /// As dpkg-checkbuilddeps says it.
        missing: String,
        /// The command that installs them.
        command: String,
    },
    /// A program failed.
    #[error("{what} failed ({status}):\n{words}")]
    Failed {
        /// What was run.
        what: String,
        /// How it ended.
        status: String,
        /// What it said at last.
        words: String,
    },
    /// Nothing that could be patched.
    #[error("{0} brings no executable and no library")]
    NoFiles(String),
}

impl DebianError {
    pub(super) fn at(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        |error| Self::File { path: path.display().to_string(), error }
    }

    /// What to do next.
    #[must_use]
    pub fn way_out(&self) -> String {
        match self {
            Self::File { .. } => "look whether the path is right, and whether the disk has room".to_owned(),
            Self::NoTool(..) => "install dpkg-dev and apt, or build with --source".to_owned(),
            Self::NotInstalled(package) => {
                format!("name the version with --version (apt-cache policy {package}), or build with --source")
            }
            Self::SeveralVersions { .. } => "name a binary package, not the source".to_owned(),
            Self::NoVersion { .. } => "name one of those versions, the one that runs".to_owned(),
            Self::NoSource { source_package, version, .. } => format!(
                "get it from https://snapshot.debian.org/package/{source_package}/{version}/ and give its .dsc file with --dsc; \
                 or name with --version the version of the program that runs, if it is another"
            ),
            Self::Missing { command, .. } => {
                format!("as root, --install-dependencies installs them for this build alone; or: {command}")
            }
            Self::Failed { .. } => {
                "set right what is said there; the log in the work folder has more (--work)".to_owned()
            }
            Self::NoFiles(_) => "name the package that brings the program (dpkg -S PATH)".to_owned(),
        }
    }
}

/// Runs a program with its words in the log.
fn run(command: &mut Command, log: &Path, what: &str) -> Result<(), DebianError> {
    let file = File::options().create(true).append(true).open(log).map_err(DebianError::at(log))?;
    let begin = file.metadata().map_err(DebianError::at(log))?.len();
    let errors = file.try_clone().map_err(DebianError::at(log))?;
    command.stdin(Stdio::null()).stdout(file).stderr(errors);
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.status().map_err(|error| DebianError::NoTool(program, error))?;
    if status.success() {
        return Ok(());
    }
    let text = fs::read(log).map(|bytes| bytes.get(begin as usize..).unwrap_or_default().to_vec()).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let lines = |wanted: fn(&&str) -> bool| text.lines().filter(wanted).take(LINES_SHOWN).collect::<Vec<_>>();
    let errors = lines(|line| line.starts_with("E: ") || line.contains("error:"));
    let all: Vec<&str> = text.lines().collect();
    let words = if errors.is_empty() { all[all.len().saturating_sub(LINES_SHOWN)..].to_vec() } else { errors };
    Err(DebianError::Failed { what: what.to_owned(), status: status.to_string(), words: words.join("\n") })
}

/// Standard output of a program that succeeds.
fn text_of(command: &mut Command) -> Result<String, DebianError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let done = command.stdin(Stdio::null()).output().map_err(|error| DebianError::NoTool(program.clone(), error))?;
    if done.status.success() {
        return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
    }
    let words = String::from_utf8_lossy(&done.stderr).trim().to_owned();
    Err(DebianError::Failed { what: program, status: done.status.to_string(), words })
}

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Binary or source package.
    pub package: String,
    /// Version of the binary package; none: the installed one.
    pub version: Option<String>,
    /// Description of the source package, already fetched.
    pub dsc: Option<PathBuf>,
    /// Folder to work in.
    pub work: PathBuf,
    /// Folder of apt's lists and archives.
    pub cache: PathBuf,
    /// What programs say goes here.
    pub log: PathBuf,
}

/// A package with its source.
#[derive(Clone, Debug)]
pub struct Origin {
    /// The package; of a source package, one of those.
    pub package: Package,
    /// Executables and libraries that it and its sisters bring: path on the machine that has it installed, and the file.
    pub files: Vec<(PathBuf, PathBuf)>,
    /// The source package's description.
    pub dsc: PathBuf,
    /// Folder name of the unpacked source.
    pub folder: String,
    /// What a rebuild without changes added to the changelog.
    rebuilt: Option<String>,
    apt: Apt,
    log: PathBuf,
}

/// Finds the package, and fetches its source.
///
/// # Errors
/// It is not installed, not to be had, or not of one version.
pub fn find(wanted: &Wanted, step: &dyn Fn(&str)) -> Result<Origin, DebianError> {
    let installed = installed()?;
    let here = choose(&installed, &wanted.package)?;
    let apt = Apt::new(&wanted.cache, &wanted.log)?;
    let is_here = |version: &String| {
        here.as_ref().is_some_and(|here| *version == here.version || *version == here.source_version)
    };
    if here.is_none() && wanted.version.is_none() {
        return Err(DebianError::NotInstalled(wanted.package.clone()));
    }
    let is_installed = wanted.version.as_ref().map_or(here.is_some(), is_here);
    if !is_installed || wanted.dsc.is_none() {
        step("asking Debian's servers what there is");
        apt.update()?;
    }
    let (package, files) = match (&here, is_installed) {
        (Some(here), true) => (here.clone(), files_of_installed(&installed, here)?),
        _ => {
            let Some(version) = &wanted.version else { return Err(DebianError::NotInstalled(wanted.package.clone())) };
            step("fetching the binary package");
            fetched(&apt, &installed, &wanted.package, version, &wanted.work)?
        }
    };
    if files.is_empty() {
        return Err(DebianError::NoFiles(wanted.package.clone()));
    }
    let dsc = match &wanted.dsc {
        Some(dsc) => dsc.clone(),
        None => {
            step("fetching the source");
            apt.source(&package.source, &package.source_version, &wanted.work.join("source"))?
        }
    };
    let rebuilt = rebuilt(&package, &files);
    let folder = package::folder_name(&package.source, &package.source_version);
    Ok(Origin { package, files, dsc, folder, rebuilt, apt, log: wanted.log.clone() })
}

/// The installed packages.
fn installed() -> Result<Vec<Package>, DebianError> {
    Ok(package::installed(&text_of(Command::new("dpkg-query").args(["-W", "-f", package::FORMAT]))?))
}

/// The installed package of that name, or one of the source package of that name.
fn choose(installed: &[Package], name: &str) -> Result<Option<Package>, DebianError> {
    if let Some(package) = installed.iter().find(|package| package.name == name) {
        return Ok(Some(package.clone()));
    }
    let sisters: Vec<&Package> = installed.iter().filter(|package| package.source == name).collect();
    let mut versions: Vec<&str> = sisters.iter().map(|package| package.source_version.as_str()).collect();
    versions.sort_unstable();
    versions.dedup();
    if versions.len() > 1 {
        return Err(DebianError::SeveralVersions { source_package: name.to_owned(), versions: versions.join(", ") });
    }
    Ok(sisters.first().map(|&package| package.clone()))
}

type Files = Vec<(PathBuf, PathBuf)>;

/// The files of all installed packages of the same source and version: what one of them needs may be in another.
fn files_of_installed(installed: &[Package], package: &Package) -> Result<Files, DebianError> {
    let is_sister = |other: &&Package| other.source == package.source && other.source_version == package.source_version;
    let names = installed.iter().filter(is_sister).map(|package| package.name.clone());
    let list = text_of(Command::new("dpkg-query").arg("-L").args(names))?;
    let mut files: Files =
        list.lines().map(PathBuf::from).filter(|path| is_target(path)).map(|path| (path.clone(), path)).collect();
    files.sort();
    files.dedup();
    Ok(files)
}

/// Fetches a package of that version with its sisters, and unpacks them.
fn fetched(
    apt: &Apt,
    installed: &[Package],
    name: &str,
    version: &str,
    work: &Path,
) -> Result<(Package, Files), DebianError> {
    let about = |name: &str| apt.ask(&["show", &format!("{name}={version}")]);
    let record = about(name);
    let Some(package) = package::shown(&record) else {
        let mut others: Vec<String> =
            package::values(&apt.ask(&["show", name]), "Version").map(str::to_owned).collect();
        others.dedup();
        let others = if others.is_empty() { "none".to_owned() } else { others.join(", ") };
        return Err(DebianError::NoVersion { package: name.to_owned(), version: version.to_owned(), others });
    };
    let needed = package::values(&record, "Depends").flat_map(package::names).collect::<Vec<_>>();
    let beside = installed.iter().filter(|other| other.source == package.source).map(|other| other.name.clone());
    let mut sisters: Vec<String> = needed.into_iter().chain(beside).filter(|other| *other != package.name).collect();
    sisters.sort();
    sisters.dedup();
    let is_sister = |other: &String| {
        package::shown(&about(other))
            .is_some_and(|other| other.source == package.source && other.source_version == package.source_version)
    };
    sisters.retain(is_sister);
    let root = work.join("installed");
    fs::create_dir_all(&root).map_err(DebianError::at(&root))?;
    for name in std::iter::once(&package.name).chain(&sisters) {
        let deb = apt.binary(name, version, &work.join("packages"))?;
        text_of(Command::new("dpkg-deb").arg("-x").arg(deb).arg(&root))?;
    }
    let mut files = Files::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(DebianError::at(&folder))?.flatten() {
            let (path, Ok(kind)) = (entry.path(), entry.file_type()) else { continue };
            if kind.is_dir() {
                folders.push(path);
            } else if is_target(&path) {
                files.push((Path::new("/").join(path.strip_prefix(&root).unwrap_or(&path)), path));
            }
        }
    }
    files.sort();
    Ok((package, files))
}

/// An executable or shared library, itself and not by a link.
fn is_target(path: &Path) -> bool {
    let is_file = path.symlink_metadata().is_ok_and(|data| data.is_file());
    is_file && !path.starts_with("/usr/lib/debug") && super::driver::is_linked(path)
}

/// The changelog's entry of a rebuild without changes (binNMU), as the binary package brings it.
fn rebuilt(package: &Package, files: &Files) -> Option<String> {
    if package.version == package.source_version {
        return None;
    }
    // Where the package's files are: `/`, or the folder that it was unpacked to.
    let (inside, outside) = files.first()?;
    let depth = inside.components().count() - 1;
    let root = outside.ancestors().nth(depth)?;
    let changelog = root.join("usr/share/doc").join(&package.name).join("changelog.Debian.amd64.gz");
    let text = text_of(Command::new("gzip").arg("-dc").arg(changelog)).ok()?;
    package::first_entry(&text)
}

impl Origin {
    /// Where Debian's build machines have the source.
    #[must_use]
    pub fn tree(&self) -> PathBuf {
        Path::new(BUILD_PATH).join(&self.folder)
    }

    /// Installs what it needs to be built, where this process is: in a layer of its own.
    ///
    /// # Errors
    /// Something can't be installed.
    pub fn install_dependencies(&self) -> Result<(), DebianError> {
        self.apt.install_dependencies(&self.dsc)
    }

    /// Unpacks the source below `folder`, with the package's own patches in.
    ///
    /// # Errors
    /// Something is missing or damaged.
    pub fn unpack(&self, folder: &Path) -> Result<PathBuf, DebianError> {
        for tool in TOOLS {
            Command::new(tool)
                .arg("--version")
                .output()
                .map_err(|error| DebianError::NoTool(tool.to_owned(), error))?;
        }
        fs::create_dir_all(folder).map_err(DebianError::at(folder))?;
        let tree = folder.join(&self.folder);
        let mut command = Command::new("dpkg-source");
        command.args(["--no-check", "-x"]).arg(&self.dsc).arg(&tree);
        run(&mut command, &self.log, "dpkg-source -x")?;
        if let Some(entry) = &self.rebuilt {
            let file = tree.join("debian/changelog");
            let text = fs::read_to_string(&file).map_err(DebianError::at(&file))?;
            fs::write(&file, format!("{entry}{text}")).map_err(DebianError::at(&file))?;
        }
        Ok(tree)
    }

    /// Says what is not installed of what it needs to be built.
    ///
    /// # Errors
    /// Something is missing.
    pub fn check_dependencies(&self, tree: &Path) -> Result<(), DebianError> {
        let mut command = Command::new("dpkg-checkbuilddeps");
        command.args(["-B", "-P", "nocheck"]).current_dir(tree).env("LC_ALL", "C.UTF-8");
        let done = command.output().map_err(|error| DebianError::NoTool("dpkg-checkbuilddeps".to_owned(), error))?;
        if done.status.success() {
            return Ok(());
        }
        let words = String::from_utf8_lossy(&done.stderr).into_owned();
        let missing = words.lines().filter_map(|line| line.split_once("dependencies: ")).map(|(_, list)| list.trim());
        let missing: Vec<&str> = missing.collect();
        if missing.is_empty() {
            let words = words.trim().to_owned();
            return Err(DebianError::Failed {
                what: "dpkg-checkbuilddeps".to_owned(),
                status: done.status.to_string(),
                words,
            });
        }
        Err(DebianError::Missing {
            source_package: self.package.source.clone(),
            missing: missing.join(", "),
            command: format!("apt-get build-dep --arch-only {}={}", self.package.source, self.package.source_version),
        })
    }
}

/// Debian's way to compile a package: flags come from its own tools.
#[must_use]
pub fn command() -> Vec<String> {
    ["dpkg-buildpackage", "--no-sign", "--no-check-builddeps", "--build=any", "--rules-target=build-arch"]
        .map(str::to_owned)
        .to_vec()
}

/// The second time: marks of what is done go; what prepares the source has been done.
#[must_use]
pub fn again() -> Again {
    let script = "rm -f debian/debhelper-build-stamp debian/*.debhelper.log debian/stamp-build* debian/stamp-makefile-build \
                  debian/build-stamp debian/build*-stamp build-stamp build-arch-stamp build*-stamp stamp-build* *.build-stamp";
    let without = ["dh_update_autotools_config", "dh_autoreconf", "dh_auto_configure", "dh_auto_test", "dh_auto_clean"];
    Again::AfterScript { script: script.to_owned(), without: without.map(str::to_owned).to_vec() }
}

/// As on Debian's build machines, without tests.
#[must_use]
pub fn environment() -> Vec<(String, String)> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let all = [
        ("LC_ALL", "C.UTF-8".to_owned()),
        ("HOME", "/sbuild-nonexistent".to_owned()),
        ("DEB_BUILD_OPTIONS", format!("nocheck parallel={processors}")),
        ("DEB_BUILD_PROFILES", "nocheck".to_owned()),
    ];
    all.map(|(name, value)| (name.to_owned(), value)).to_vec()
}

/// Variables of a user that would change what is built.
#[must_use]
pub fn cleared() -> Vec<String> {
    let own = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    let is_of_builds = |name: &String| {
        let known =
            ["CC", "CXX", "CPP", "AR", "LD", "RANLIB", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "LANG", "LANGUAGE", "TZ"];
        known.contains(&name.as_str())
            || ["DEB_", "DH_", "LC_", "PERL", "PYTHON", "PKG_CONFIG"].iter().any(|start| name.starts_with(start))
            || name.ends_with("FLAGS")
    };
    own.filter(is_of_builds).collect()
}
