//! `asap build`: a patch from a source and a diff.

use super::{
    context::Global,
    progress::Progress,
    text::{count, table},
};
use crate::{
    build::{
        assemble::{self, Facts, Verdict},
        debian::{self, DebianError, Wanted},
        driver::{self, BuildError, Project, Target},
        room::{self, Plan},
    },
    image::demangle,
    patch::manifest::{Class, Origin, sha256_hex},
    report::{self, Failure, FailureKind},
};
use serde::Serialize;
use std::{
    cell::Cell,
    fs::{self, File},
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    time::Instant,
};

/// Make a patch from a source tree and a diff, or say why there can't be one.
///
/// The source is copied and built twice with its own build command, as it is and with the diff; what differs in the objects
/// becomes the patch. Give the same version, compiler and flags that the running program was built with. With --debian, source,
/// build command and flags are those of Debian's package, and the target is what of it is installed.
///
/// The build runs in a private view of the file system: the copy stands at the path of the source (of Debian's packages: where
/// Debian builds them), and asap stands in for the compilers. The source and the machine's packages are left alone.
#[derive(Debug, clap::Args)]
#[command(disable_version_flag = true)]
#[command(group(clap::ArgGroup::new("origin").required(true).args(["source", "debian"])))]
#[command(after_help = "\
Examples:
  asap build --source nginx-1.22.1 --patch CVE-2022-41741.patch --target /usr/sbin/nginx -o fix.asap -- make -j2
  asap build --source src --patch fix.diff --target ./server -o fix.asap -- sh -c 'cmake -B out && make -C out'
  asap build --debian nginx --patch CVE-2022-41741.patch -o fix.asap
  asap build --debian nginx --version 1.22.1-9+deb12u9 --install-dependencies --patch fix.diff -o fix.asap
  asap build --json --source src --patch fix.diff --target ./server -o fix.asap -- make | jq .class")]
pub struct Build {
    /// Source of the running program: its top folder, not built yet.
    #[arg(long, value_name = "DIR", requires = "target", requires = "command")]
    source: Option<PathBuf>,
    /// Debian package whose program runs, or its source package.
    #[arg(long, value_name = "PACKAGE")]
    debian: Option<String>,
    /// Version of the package [default: the installed one].
    #[arg(long, value_name = "VERSION", requires = "debian")]
    version: Option<String>,
    /// Source package that was fetched already: its .dsc file, the others beside it.
    #[arg(long, value_name = "FILE", requires = "debian")]
    dsc: Option<PathBuf>,
    /// Install what the package needs to be built, for this build alone: the machine is left as it is. Needs root.
    #[arg(long, requires = "debian")]
    install_dependencies: bool,
    /// Folder for apt's lists and archives, to be used again by later builds [default: in the folder of --work].
    #[arg(long, value_name = "DIR", requires = "debian")]
    cache: Option<PathBuf>,
    /// Unified diff to be built in; several are applied in order.
    #[arg(long, value_name = "DIFF", required = true)]
    patch: Vec<PathBuf>,
    /// Executable or library that runs, as it is installed; may be given several times [default with --debian: those of the
    /// package and of its sisters that the diff changes].
    #[arg(long, value_name = "EXE")]
    target: Vec<PathBuf>,
    /// Patch file to be written; where the diff changes several targets, each gets its name into that: fix.libx.so.1.asap.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Name of the patch [default: the name of the patch file].
    #[arg(long)]
    name: Option<String>,
    /// What the build makes of the target, if it has another file name there: path within the source.
    #[arg(long, value_name = "PATH")]
    twin: Option<PathBuf>,
    /// Patch that this one replaces: it goes out when this one goes in.
    #[arg(long, value_name = "NAME")]
    replaces: Vec<String>,
    /// Patch that must be in before this one.
    #[arg(long, value_name = "NAME")]
    requires: Vec<String>,
    /// Folder for the copies and the log, kept afterwards [default: a temporary one, removed when all went well].
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// Build command, run in a copy of the source [default with --debian: dpkg-buildpackage].
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// What is built, and for which targets.
struct Prepared {
    project: Project,
    targets: Vec<Target>,
    origin: Origin,
    notes: Vec<String>,
}

impl Build {
    pub fn run(self, global: &Global) -> Result<(), Failure> {
        let begin = Instant::now();
        let work = match &self.work {
            Some(folder) => Work { folder: absolute(folder)?, is_ours: Cell::new(false) },
            None => Work::temporary().map_err(|error| refused("a temporary folder can't be made", &error))?,
        };
        let diffs: Vec<(String, Vec<u8>)> = self
            .patch
            .iter()
            .map(|file| Ok((file.display().to_string(), read(file)?)))
            .collect::<Result<_, Failure>>()?;
        // Before the view of the file system changes: it may lie in the source.
        let output = Output::open(&self.output)?;
        let mut document = self.make(&work.folder, diffs, &output).inspect_err(|_| work.keep())?;
        document.total_ms = begin.elapsed().as_millis() as u64;
        global.show(&document, || document.shown())?;
        global.is_said.set(true);
        document.failed.map_or(Ok(()), Err)
    }

    /// Prepares, builds, judges for each target that the change concerns, and writes the patches.
    fn make(&self, work: &Path, diffs: Vec<(String, Vec<u8>)>, output: &Output) -> Result<Document, Failure> {
        driver::claim(work).map_err(|error| failure(&error))?;
        let origin = self.origin(&diffs);
        let Prepared { project, targets, origin, notes } = match (&self.source, &self.debian) {
            (Some(source), _) => self.of_source(source, work, diffs, origin)?,
            (None, Some(package)) => self.of_debian(package, work, diffs, origin)?,
            (None, None) => return Err(Failure::refused("there is no source", "give --source or --debian")),
        };
        let progress = Progress::start();
        let step = |words: &str| progress.step(&report::Progress { step: words.to_owned(), fraction: None });
        let built = driver::build(&project, &targets, &step).map_err(|error| failure(&error))?;
        step("comparing");
        let compared = assemble::compare_all(&built.pairs).map_err(|error| failure(&error.into()))?;
        let mut document = Document { notes, compiling_ms: built.compiling.as_millis() as u64, ..Document::default() };
        let (mut concerned, mut others, mut without) = (Vec::new(), Vec::new(), Vec::new());
        for (target, twin) in targets.iter().zip(built.twins) {
            match twin {
                Ok(twin) if assemble::concerns(&compared, &twin) => concerned.push((target, twin)),
                Ok(twin) => others.push((target, twin)),
                Err(error) => without.push((target, error)),
            }
        }
        if concerned.is_empty() {
            match (others.into_iter().next(), without.into_iter().next()) {
                // Something else of the package may be what changes.
                (_, Some((_, error))) if !compared.is_empty() => return Err(failure(&error)),
                (Some(first), _) => concerned.push(first),
                (None, Some((_, error))) => return Err(failure(&error)),
                (None, None) => return Err(Failure::refused("there is no target", "name one with --target")),
            }
        } else {
            let said = without.iter().map(|(target, error)| format!("{} was left out: {error}", target.path.display()));
            document.notes.extend(said);
        }
        let name = self.name.clone().unwrap_or_else(|| stem(&self.output));
        let is_one = concerned.len() == 1;
        for (target, twin) in concerned {
            let file_name = target.file_name();
            let facts = Facts {
                name: if is_one { name.clone() } else { format!("{name}.{file_name}") },
                target: file_name,
                origin: origin.clone(),
                replaces: self.replaces.clone(),
                requires: self.requires.clone(),
                compiled: built.pairs.len(),
            };
            let verdict = driver::judge(&compared, &twin, target, &facts).map_err(|error| failure(&error))?;
            document.targets.push(Outcome { target: target.path.display().to_string(), output: None, verdict });
        }
        // All or nothing: a fix that is in the program and not in its library is none.
        if document.targets.iter().all(|outcome| outcome.verdict.patch.is_some()) {
            for outcome in &mut document.targets {
                let written = if is_one { output.name.clone() } else { output.name_for(&outcome.target) };
                if let Some(patch) = &outcome.verdict.patch {
                    outcome.output = Some(output.write(&written, patch)?);
                }
            }
        }
        if built.is_blind {
            document.notes.push("there is no debug information: whether types change was not looked at".to_owned());
        }
        document.conclude();
        Ok(document)
    }

    fn origin(&self, diffs: &[(String, Vec<u8>)]) -> Origin {
        let mut fixes: Vec<String> = diffs.iter().flat_map(|(file, diff)| cves(Path::new(file), diff)).collect();
        fixes.sort();
        fixes.dedup();
        let texts: Vec<&[u8]> = diffs.iter().map(|(_, diff)| diff.as_slice()).collect();
        Origin {
            diff_sha256: Some(sha256_hex(&texts.concat())),
            diff: self.patch.first().map(|file| file_name(file)),
            fixes,
            ..Origin::default()
        }
    }

    fn of_source(
        &self,
        source: &Path,
        work: &Path,
        diffs: Vec<(String, Vec<u8>)>,
        origin: Origin,
    ) -> Result<Prepared, Failure> {
        let absolute_source = absolute(source)?;
        let source = absolute_source.canonicalize().map_err(|error| refused(&source.display().to_string(), &error))?;
        if work.canonicalize().is_ok_and(|work| work.starts_with(&source)) {
            return Err(Failure {
                kind: FailureKind::Usage,
                ..Failure::refused("the work folder lies within the source", "name another with --work")
            });
        }
        let targets = self.targets()?;
        let backing = work.join("build").join(source.file_name().unwrap_or("source".as_ref()));
        driver::copy(&source, &backing).map_err(|error| failure(&error))?;
        let shown = vec![(source.clone(), backing.clone())];
        let entered = room::enter(&Plan { work: work.to_owned(), shown, layered: false });
        let (tree, in_room) = if entered.is_ok() { (source, true) } else { (backing.clone(), false) };
        let project = Project {
            tree,
            backing,
            diffs,
            command: self.command.clone(),
            twin: self.twin.clone(),
            work: work.to_owned(),
            in_room,
            ..Project::default()
        };
        let note = |error| {
            format!("the build ran in a copy at another path, with stand-ins for compilers in PATH only: {error}")
        };
        Ok(Prepared { project, targets, origin, notes: entered.err().map(note).into_iter().collect() })
    }

    fn of_debian(
        &self,
        package: &str,
        work: &Path,
        diffs: Vec<(String, Vec<u8>)>,
        origin: Origin,
    ) -> Result<Prepared, Failure> {
        let wrong = |error: DebianError| {
            let kind = match error {
                DebianError::Failed { .. } | DebianError::File { .. } => FailureKind::Failed,
                _ => FailureKind::Refused,
            };
            Failure { kind, ..Failure::refused(error.to_string(), error.way_out()) }
        };
        let dsc = self.dsc.as_deref().map(absolute).transpose()?;
        let cache = self.cache.as_deref().map_or_else(|| Ok(work.join("apt")), absolute)?;
        let version = self.version.clone();
        let log = work.join("build.log");
        let wanted = Wanted { package: package.to_owned(), version, dsc, work: work.to_owned(), cache, log };
        let say = |words: &str| {
            if std::io::IsTerminal::is_terminal(&std::io::stderr()) {
                eprintln!("{words}");
            }
        };
        let found = debian::find(&wanted, &say).map_err(wrong)?;
        let mut targets = self.targets()?;
        if targets.is_empty() {
            let read = |(path, file): &(PathBuf, PathBuf)| {
                let target = Target::read(file)?;
                Ok(Target { path: path.clone(), ..target })
            };
            targets =
                found.files.iter().map(read).collect::<Result<_, BuildError>>().map_err(|error| failure(&error))?;
            // What has no build-id can't be patched, and is helpers and the like.
            targets.retain(|target| target.image.build_id().is_some());
        }
        let build = work.join("build");
        let shown = vec![(PathBuf::from(debian::BUILD_PATH), build.clone())];
        let layered = self.install_dependencies;
        let mut notes = Vec::new();
        let in_room = match room::enter(&Plan { work: work.to_owned(), shown, layered }) {
            Ok(()) => true,
            Err(error) if layered => {
                return Err(Failure::refused(
                    error.to_string(),
                    "install what the package needs yourself (apt-get build-dep)",
                ));
            }
            Err(error) => {
                notes.push(format!("built at another path than Debian builds: {error}"));
                false
            }
        };
        if layered {
            say("installing what it needs to be built, for this build alone");
            found.install_dependencies().map_err(wrong)?;
        }
        let tree = found.unpack(if in_room { Path::new(debian::BUILD_PATH) } else { &build }).map_err(wrong)?;
        found.check_dependencies(&tree).map_err(wrong)?;
        let origin = Origin {
            package: Some(found.package.source.clone()),
            version: Some(found.package.version.clone()),
            ..origin
        };
        let is_own = self.command.is_empty();
        let project = Project {
            backing: build.join(tree.file_name().unwrap_or_default()),
            tree,
            diffs,
            command: if is_own { debian::command() } else { self.command.clone() },
            again: debian::again(),
            environment: debian::environment(),
            cleared: debian::cleared(),
            path: Some("/usr/sbin:/usr/bin:/sbin:/bin".into()),
            twin: self.twin.clone(),
            work: work.to_owned(),
            in_room,
        };
        Ok(Prepared { project, targets, origin, notes })
    }

    fn targets(&self) -> Result<Vec<Target>, Failure> {
        let read = |path: &PathBuf| Target::read(&absolute(path)?).map_err(|error| failure(&error));
        self.target.iter().map(read).collect()
    }
}

/// The place of the patch files, held open: the build's view of the file system may show something else there.
struct Output {
    folder: File,
    /// As given.
    shown: PathBuf,
    name: String,
}

impl Output {
    fn open(path: &Path) -> Result<Self, Failure> {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = File::open(parent).map_err(|error| refused(&parent.display().to_string(), &error))?;
        Ok(Self { folder, shown: path.to_owned(), name: file_name(path) })
    }

    /// `fix.asap` for `/usr/lib/libx.so.1`: `fix.libx.so.1.asap`.
    fn name_for(&self, target: &str) -> String {
        let target = file_name(Path::new(target));
        match self.name.rsplit_once('.') {
            Some((stem, ending)) => format!("{stem}.{target}.{ending}"),
            None => format!("{}.{target}", self.name),
        }
    }

    /// Writes a file, whole or not at all; its path.
    fn write(&self, name: &str, bytes: &[u8]) -> Result<String, Failure> {
        let at = |name: &str| PathBuf::from(format!("/proc/self/fd/{}/{name}", self.folder.as_raw_fd()));
        let unfinished = format!(".{name}.{}", std::process::id());
        let written = fs::write(at(&unfinished), bytes).and_then(|()| fs::rename(at(&unfinished), at(name)));
        let path = self.shown.with_file_name(name).display().to_string();
        written.map_err(|error| {
            let _ = fs::remove_file(at(&unfinished));
            refused(&path, &error)
        })?;
        Ok(path)
    }
}

/// What `--json` prints. What concerns the whole change is at the top: of several targets, the gravest verdict.
#[derive(Default, Serialize)]
struct Document {
    #[serde(flatten)]
    verdict: Option<Verdict>,
    targets: Vec<Outcome>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    notes: Vec<String>,
    /// How long all took.
    total_ms: u64,
    /// How long of that the project's two builds took.
    compiling_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    failed: Option<Failure>,
}

/// What came of the change for one target.
#[derive(Serialize)]
struct Outcome {
    target: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    output: Option<String>,
    #[serde(flatten)]
    verdict: Verdict,
}

/// Of several verdicts, the one that decides.
fn gravity(class: Class) -> usize {
    let order = [
        Class::CodeOnly,
        Class::NewData,
        Class::NeedsHook,
        Class::NeverQuiescent,
        Class::StartUpOnly,
        Class::DataLayout,
        Class::NotApplicable,
    ];
    order.iter().position(|&known| known == class).unwrap_or(order.len())
}

impl Document {
    fn conclude(&mut self) {
        let verdicts = self.targets.iter().map(|outcome| &outcome.verdict);
        self.verdict = verdicts.max_by_key(|verdict| gravity(verdict.class)).cloned();
        let is_one = self.targets.len() == 1;
        self.failed = self.targets.iter().find(|outcome| outcome.verdict.patch.is_none()).map(|outcome| {
            let class = outcome.verdict.class;
            let (of, hint) = match is_one {
                true => (String::new(), ""),
                false => (format!(" for {}", outcome.target), "; --target builds for one alone"),
            };
            let message = format!("no patch was made{of}: class {class}, {}", class.meaning());
            Failure::refused(message, way_out(&outcome.verdict) + hint)
        });
    }

    fn shown(&self) -> String {
        let is_one = self.targets.len() == 1;
        let mut text: String = self
            .targets
            .iter()
            .map(|outcome| {
                let target = if is_one { String::new() } else { format!("{}: ", outcome.target) };
                target + &shown(&outcome.verdict, outcome.output.as_deref())
            })
            .collect();
        self.notes.iter().for_each(|note| text.push_str(&format!("  note: {note}\n")));
        text
    }
}

fn way_out(verdict: &Verdict) -> String {
    let gravest = verdict.findings.iter().find(|finding| finding.class == verdict.class);
    match gravest {
        Some(finding) => finding.way_out.clone(),
        None if !verdict.elsewhere.is_empty() => {
            format!(
                "give another --target: the change is in {}, which it does not contain",
                verdict.elsewhere.join(", ")
            )
        }
        None => "look whether the diff changes code that this program is made of".to_owned(),
    }
}

fn shown(verdict: &Verdict, output: Option<&str>) -> String {
    let mut text = output.map_or_else(String::new, |output| format!("{output}: "));
    text.push_str(&format!(
        "class {} ({}); {} of {} that were compiled again\n",
        verdict.class,
        verdict.class.meaning(),
        count(verdict.functions.len(), "function changes", "functions change"),
        count(verdict.compiled, "source", "sources"),
    ));
    let mut section = |header: &[&str], rows: Vec<Vec<String>>| {
        if !rows.is_empty() {
            text.push_str(&table("  ", header, rows));
        }
    };
    let functions = verdict.functions.iter();
    let functions = functions.map(|f| vec![demangle(&f.name), f.source.clone(), f.reason.clone()]).collect();
    section(&["REPLACED", "SOURCE", "WHY"], functions);
    section(&["NEW FUNCTION"], verdict.added.iter().map(|name| vec![demangle(name)]).collect());
    section(&["NEW DATA"], verdict.new_data.iter().map(|name| vec![demangle(name)]).collect());
    for finding in &verdict.findings {
        text.push_str(&format!(
            "  {}: {} ({})\n    {}\n",
            finding.class, finding.reason, finding.object, finding.way_out
        ));
    }
    if verdict.class == Class::NotApplicable && !verdict.elsewhere.is_empty() {
        text.push_str(&format!("  not part of the target: {}\n", verdict.elsewhere.join(", ")));
    }
    text
}

fn stem(file: &Path) -> String {
    file.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

fn file_name(file: &Path) -> String {
    file.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|error| refused(&path.display().to_string(), &error))
}

fn read(file: &Path) -> Result<Vec<u8>, Failure> {
    fs::read(file).map_err(|error| refused(&file.display().to_string(), &error))
}

fn refused(what: &str, error: &io::Error) -> Failure {
    Failure {
        kind: FailureKind::Usage,
        ..Failure::refused(format!("{what}: {error}"), "look whether the path is right")
    }
}

fn failure(error: &BuildError) -> Failure {
    let kind = match error {
        BuildError::Failed { .. } | BuildError::Again { .. } => FailureKind::Failed,
        BuildError::File { .. } | BuildError::MissingFile { .. } | BuildError::Diff { .. } => FailureKind::Usage,
        _ => FailureKind::Refused,
    };
    Failure { kind, ..Failure::refused(error.to_string(), error.way_out()) }
}

/// CVE numbers in a diff's name and in what stands before its first hunk.
fn cves(file: &Path, diff: &[u8]) -> Vec<String> {
    let head = diff.split(|&byte| byte == b'\n').take_while(|line| !line.starts_with(b"@@ "));
    let lines = head.map(|line| String::from_utf8_lossy(line).into_owned());
    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut found = Vec::new();
    for line in std::iter::once(name).chain(lines) {
        for (at, _) in line.match_indices("CVE-") {
            let end =
                line[at + 4..].find(|c: char| !c.is_ascii_digit() && c != '-').map_or(line.len(), |end| at + 4 + end);
            let number = line[at..end].trim_end_matches('-');
            let is_whole = number.split('-').count() == 3 && number.len() >= 13;
            if is_whole {
                found.push(number.to_owned());
            }
        }
    }
    found
}

/// The folder that is worked in; removed afterwards if it is ours.
struct Work {
    folder: PathBuf,
    is_ours: Cell<bool>,
}

impl Work {
    fn temporary() -> io::Result<Self> {
        for number in 0_u32.. {
            let folder = std::env::temp_dir().join(format!("asap-build-{}-{number}", std::process::id()));
            match fs::DirBuilder::new().create(&folder) {
                Ok(()) => return Ok(Self { folder, is_ours: Cell::new(true) }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other("all names are taken"))
    }

    /// Leaves it, for the log that a message names.
    fn keep(&self) {
        self.is_ours.set(false);
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if self.is_ours.get() {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cve_numbers_are_found_in_names_and_headers() {
        let diff = b"Description: fixes CVE-2024-12345.\nCVE-x\n--- a\n+++ b\n@@ -1 +1 @@\n-CVE-2000-0001\n";
        assert_eq!(cves(Path::new("CVE-2022-41741.patch"), diff), ["CVE-2022-41741", "CVE-2024-12345"]);
    }
}
