//! Builds a source twice with its own build command, as it is and with the diff, and compiles what differs once more, in both
//! versions, for comparison. In a copy; the source itself is left alone. The first build is exactly the project's: it gives the twin. What a comparison needs is
//! compiled afterwards, in both versions, and only for what the diff made compile again. Not for judging: that is `assemble`.

use super::{
    assemble::{self, AssembleError, Compared, Facts, Pair, Verdict},
    diff::{Diff, DiffError, Text},
    wrapper::{self, Record},
};
use crate::image::{Image, SymbolKind};
use std::{
    collections::HashSet,
    ffi::OsString,
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// Lines of the log that a failed build shows.
const LINES_SHOWN: usize = 25;
/// Most bytes of the log that are looked through for them.
const LOG_SHOWN: u64 = 64 << 10;
/// Of more executables than so many, only those of the target's name are looked into.
const CANDIDATES_MOST: usize = 400;
/// A disk with fewer bytes left is full.
const DISK_LEAST: u64 = 64 << 10;
/// Largest executable, bytes.
const IMAGE_MOST: u64 = 4 << 30;

/// What to build.
#[derive(Clone, Debug, Default)]
pub struct Project {
    /// The source as the build sees it: a copy that may be changed.
    pub tree: PathBuf,
    /// The same folder within `work`.
    pub backing: PathBuf,
    /// Names and texts of diffs, in order.
    pub diffs: Vec<(String, Vec<u8>)>,
    /// The build command, run in the tree.
    pub command: Vec<String>,
    /// How the command is run again, with the change.
    pub again: Again,
    /// Set while the project builds.
    pub environment: Vec<(String, String)>,
    /// Not set while the project builds.
    pub cleared: Vec<String>,
    /// Where programs are looked for while it builds; none: as now.
    pub path: Option<OsString>,
    /// The twin within the source after the build; none: found by the targets' build-ids and file names.
    pub twin: Option<PathBuf>,
    /// Folder for copies, objects and the log.
    pub work: PathBuf,
    /// This process is in a room: stand-ins lie over the compilers.
    pub in_room: bool,
}

/// How the second build is made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Again {
    /// The same command in the same tree: only what depends on the change is built.
    #[default]
    SameCommand,
    /// First this shell script; these programs do nothing. If nothing comes of it, all is built from the beginning.
    AfterScript {
        /// Run by `sh -c` in the tree.
        script: String,
        /// Programs found in PATH.
        without: Vec<String>,
    },
}

/// An executable or library that runs.
#[derive(Debug)]
pub struct Target {
    /// Path that people know it by.
    pub path: PathBuf,
    /// Its file.
    pub image: Image,
}

impl Target {
    /// Reads a file.
    ///
    /// # Errors
    /// It can't be read, or is none.
    pub fn read(path: &Path) -> Result<Self, BuildError> {
        Ok(Self { path: path.to_owned(), image: image(path)? })
    }

    /// File name, without symbolic links where they can be seen through.
    #[must_use]
    pub fn file_name(&self) -> String {
        let real = self.path.canonicalize().unwrap_or_else(|_| self.path.clone());
        real.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }
}

/// Both builds: what a verdict is made of.
#[derive(Debug)]
pub struct Built {
    /// Sources that were compiled again, in both versions.
    pub pairs: Vec<Pair>,
    /// For each target, in their order: what came out of the first build with its symbols; else what there is.
    pub twins: Vec<Result<Image, BuildError>>,
    /// How long the project's own two builds took.
    pub compiling: Duration,
    /// There are objects without debug information, by which changed types are seen.
    pub is_blind: bool,
}

/// A build that gave no verdict.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A file.
    #[error("{path}: {error}")]
    File {
        /// Its path.
        path: String,
        /// What the system said.
        error: io::Error,
    },
    /// The diff.
    #[error("{file}: {error}")]
    Diff {
        /// The diff's file.
        file: String,
        /// What is wrong.
        error: DiffError,
    },
    /// The diff names files that the source does not have.
    #[error("{file}: it changes {missing}, which the source has not; give the top folder of the source")]
    MissingFile {
        /// The diff's file.
        file: String,
        /// The file that is missing.
        missing: String,
    },
    /// The source has the change already.
    #[error("{file}: the source has this change already{by}")]
    Already {
        /// The diff's file.
        file: String,
        /// By which of its own patches.
        by: String,
    },
    /// The diff changes nothing.
    #[error("{0}: it changes nothing in the source")]
    ChangesNothing(String),
    /// The project's build command failed.
    #[error("the {which} build failed ({status}); its last words:\n{lines}\nall of it is in {log}")]
    Failed {
        /// Which one.
        which: &'static str,
        /// How it ended.
        status: String,
        /// What it said at last.
        lines: String,
        /// The log.
        log: String,
    },
    /// A source can't be compiled once more.
    #[error("{source_file} can't be compiled once more ({status}); the log says why: {log}")]
    Again {
        /// The source.
        source_file: String,
        /// How the compiler ended.
        status: String,
        /// The log.
        log: String,
    },
    /// Nothing was compiled.
    #[error(
        "the {0} build compiled nothing that was seen; use a build command that runs the compiler by its plain name (gcc, \
         cc, clang, found in PATH), and a source that is not built yet"
    )]
    NothingCompiled(&'static str),
    /// No twin.
    #[error("no file of the name {name} with symbols came out of the build; name it with --twin ({candidates})")]
    NoTwin {
        /// The name that was looked for.
        name: String,
        /// What there is.
        candidates: String,
    },
    /// An executable.
    #[error(transparent)]
    Image(#[from] crate::image::ImageError),
    /// No verdict.
    #[error(transparent)]
    Assemble(#[from] AssembleError),
}

impl BuildError {
    /// What to do next.
    #[must_use]
    pub fn way_out(&self) -> &'static str {
        match self {
            Self::File { .. } => "look whether the path is right, and whether the disk has room",
            Self::Diff { .. } | Self::MissingFile { .. } => "get the source and the diff of one version",
            Self::Already { .. } => {
                "nothing is to be done for this source; if the program still runs without the change, restart it"
            }
            Self::ChangesNothing(_) => "look whether it is the right diff",
            Self::Failed { .. } => "make the build command work by itself, in a copy of the source",
            Self::Again { .. } | Self::NothingCompiled(_) => "build with gcc or clang, called by their plain names",
            Self::NoTwin { .. } => "name what the build makes with --twin, and build it with its symbols",
            Self::Image(_) => "give the executable or library that runs as --target",
            Self::Assemble(_) => "build with the flags of the running program, without -flto",
        }
    }
}

fn at(path: &Path) -> impl Fn(io::Error) -> BuildError + '_ {
    |error| BuildError::File { path: path.display().to_string(), error }
}

/// Builds both versions, and compiles what differs for comparison. `step` is told what is being done.
///
/// # Errors
/// Something can't be read or built.
pub fn build(project: &Project, targets: &[Target], step: &dyn Fn(&str)) -> Result<Built, BuildError> {
    let diffs = parse(&project.diffs)?;
    let site = Site::new(project)?;
    // Whether the diff fits is said before an hour of building.
    let changes = changes(&diffs, site.tree)?;
    let pristine = match &project.again {
        Again::SameCommand => None,
        Again::AfterScript { .. } => Some(site.keep("pristine")?),
    };
    step("building the source as it is");
    let begin = Instant::now();
    site.build("first", &[])?;
    let mut compiling = begin.elapsed();
    let first = site.read_records("first")?;
    if first.is_empty() {
        return Err(BuildError::NothingCompiled("first"));
    }
    let twins = find_twins(project, targets)?;
    site.keep("before")?;
    step("building it with the change");
    let begin = Instant::now();
    let second = site.build_again(&changes, pristine)?;
    compiling += begin.elapsed();
    let mut differing = wrapper::differing(&first, second.clone());
    differing.extend(overlooked(&first, &second, &changes, site.tree));
    step("compiling what changed for comparison");
    let jobs = jobs(&differing);
    let new = site.compile_again(&jobs, "new")?;
    site.put_back("before", "after")?;
    let old = site.compile_again(&jobs, "old")?;
    let pairs = pairs(&jobs, old, new, site.tree);
    let is_blind = pairs.iter().any(|pair| memchr::memmem::find(&pair.new, b".debug_info").is_none());
    Ok(Built { pairs, twins, compiling, is_blind })
}

/// Compares, and makes the patch for one target, if there can be one.
///
/// # Errors
/// Objects, twin or target are not what they should be.
pub fn judge(compared: &[Compared], twin: &Image, target: &Target, facts: &Facts) -> Result<Verdict, BuildError> {
    Ok(assemble::assemble(compared, twin, &target.image, facts)?)
}

/// Sources that a change reaches and the project did not compile again: those who write makefiles forget headers.
fn overlooked(first: &[Record], second: &[Record], changes: &[Change], tree: &Path) -> Vec<Record> {
    let known: HashSet<(&PathBuf, &Vec<String>)> =
        second.iter().map(|record| (&record.directory, &record.sources)).collect();
    let changed: Vec<PathBuf> = changes.iter().map(|(path, _)| tree.join(path)).collect();
    let is_header = |path: &PathBuf| {
        !first.iter().any(|record| record.sources.iter().any(|source| record.directory.join(source) == *path))
    };
    let headers: Vec<&PathBuf> = changed.iter().filter(|path| is_header(path)).collect();
    let left = || first.iter().filter(|record| !known.contains(&(&record.directory, &record.sources)));
    let includes = |record: &Record| {
        let paths = record.includes();
        paths.iter().any(|path| headers.iter().any(|header| same_path(&record.directory.join(path), header)))
    };
    let is_changed = |record: &Record| {
        let sources = record.sources.iter().map(|source| record.directory.join(source));
        sources.into_iter().any(|source| changed.iter().any(|path| same_path(&source, path)))
    };
    let all: Vec<&Record> = left().collect();
    let found = parallel(&all, |record| is_changed(record) || !headers.is_empty() && includes(record));
    all.into_iter().zip(found).filter(|(_, is_found)| *is_found).map(|(record, _)| record.clone()).collect()
}

/// Whether two paths are one, without asking the file system.
fn same_path(a: &Path, b: &Path) -> bool {
    fn plain(path: &Path) -> PathBuf {
        path.components().fold(PathBuf::new(), |mut plain, part| {
            match part {
                std::path::Component::ParentDir => drop(plain.pop()),
                std::path::Component::CurDir => {}
                part => plain.push(part),
            }
            plain
        })
    }
    plain(a) == plain(b)
}

/// Does the same for all, on all processors; the results in order.
pub(super) fn parallel<T: Sync, R: Send>(all: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<(usize, R)>> = Mutex::new(Vec::with_capacity(all.len()));
    let run = || {
        while let Some((number, item)) = {
            let number = next.fetch_add(1, Ordering::Relaxed);
            all.get(number).map(|item| (number, item))
        } {
            let result = work(item);
            results.lock().unwrap_or_else(PoisonError::into_inner).push((number, result));
        }
    };
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(all.len());
    std::thread::scope(|scope| (0..workers).for_each(|_| drop(scope.spawn(run))));
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|&(number, _)| number);
    results.into_iter().map(|(_, result)| result).collect()
}

fn image(path: &Path) -> Result<Image, BuildError> {
    let length = fs::metadata(path).map_err(at(path))?.len();
    if length > IMAGE_MOST {
        return Err(at(path)(io::Error::other("it is too large")));
    }
    let bytes = fs::read(path).map_err(at(path))?;
    Ok(Image::parse(&path.display().to_string(), bytes.into())?)
}

/// Reads diffs. Of one that changes a Debian package (`debian/patches`), the patches that it brings are what changes the code.
fn parse(texts: &[(String, Vec<u8>)]) -> Result<Vec<(String, Diff)>, BuildError> {
    let mut diffs = Vec::new();
    for (name, text) in texts {
        let wrong = |error| BuildError::Diff { file: name.clone(), error };
        let mut diff = Diff::parse(text).map_err(wrong)?;
        for (inner, text) in diff.inner().map_err(wrong)? {
            let name = format!("{name} ({inner})");
            let wrong = |error| BuildError::Diff { file: name.clone(), error };
            diffs.push((name.clone(), Diff::parse(&text).map_err(wrong)?));
        }
        diff.leave_out_packaging();
        if !diff.files.is_empty() {
            diffs.push((name.clone(), diff));
        }
    }
    match (diffs.is_empty(), texts.first()) {
        (true, Some((name, _))) => Err(BuildError::ChangesNothing(name.clone())),
        _ => Ok(diffs),
    }
}

/// A file of the source and its new contents; none: it goes.
type Change = (PathBuf, Option<Vec<u8>>);

/// The new contents of all files that the diffs change.
fn changes(diffs: &[(String, Diff)], tree: &Path) -> Result<Vec<Change>, BuildError> {
    // Numbers of lines are written at last: what one diff adds is context of the next.
    let mut changed: Vec<(PathBuf, Option<Text>)> = Vec::new();
    for (name, diff) in diffs {
        let is_there =
            |path: &str| tree.join(path).is_file() || changed.iter().any(|(known, _)| known == Path::new(path));
        let exists = |strip: &usize| {
            diff.files.iter().all(|file| file.old.is_none() || file.path(*strip).is_some_and(|path| is_there(&path)))
        };
        let Some(strip) = (0..4).find(exists) else {
            let missing = diff.files.iter().find_map(|file| file.path(1)).unwrap_or_default();
            return Err(BuildError::MissingFile { file: name.clone(), missing });
        };
        // Of new files alone nothing says how many folders to leave out; diffs are made with one.
        let strip = if diff.files.iter().all(|file| file.old.is_none()) { 1 } else { strip };
        for file in &diff.files {
            let Some(path) = file.path(strip).map(PathBuf::from) else { continue };
            let known = changed.iter().position(|(other, _)| *other == path);
            let mut text = match known {
                Some(known) => changed[known].1.take().unwrap_or_default(),
                None if file.old.is_none() => Text::default(),
                None => Text::read(&fs::read(tree.join(&path)).map_err(at(&path))?),
            };
            text.change(file, &path.display().to_string()).map_err(|error| match error {
                DiffError::DoesNotFit { .. } if has_already(diff, strip, tree) => {
                    BuildError::Already { file: name.clone(), by: by_own_patch(diff, tree) }
                }
                error => BuildError::Diff { file: name.clone(), error },
            })?;
            let text = file.new.as_ref().map(|_| text);
            match known {
                Some(known) => changed[known].1 = text,
                None => changed.push((path, text)),
            }
        }
    }
    let write = |(path, text): (PathBuf, Option<Text>)| {
        let text = text.map(|text| text.write(&path.display().to_string()));
        (path, text)
    };
    let changed: Vec<Change> = changed.into_iter().map(write).collect();
    let is_same = |(path, text): &Change| {
        text.as_ref().is_some_and(|text| fs::read(tree.join(path)).is_ok_and(|before| before == *text))
    };
    match diffs.first() {
        Some((name, _)) if changed.iter().all(is_same) => Err(BuildError::ChangesNothing(name.clone())),
        _ => Ok(changed),
    }
}

/// Whether the source is what the diff makes of it.
fn has_already(diff: &Diff, strip: usize, tree: &Path) -> bool {
    diff.files.iter().all(|file| {
        let Some(path) = file.path(strip) else { return false };
        let text = fs::read(tree.join(&path)).unwrap_or_default();
        file.new.is_some() && file.reversed().apply(&path, &text).is_ok()
    })
}

/// Which patch of a Debian package brought it, where one adds the same lines.
fn by_own_patch(diff: &Diff, tree: &Path) -> String {
    let folder = tree.join("debian/patches");
    let series = fs::read_to_string(folder.join("series")).unwrap_or_default();
    let has_it = |name: &&str| {
        let text = fs::read(folder.join(name)).unwrap_or_default();
        Diff::parse(&text).is_ok_and(|own| own.adds_all_of(diff))
    };
    let names = series.lines().filter_map(|line| line.split_whitespace().next()).filter(|name| !name.starts_with('#'));
    names.into_iter().find(has_it).map_or_else(String::new, |name| format!(" (debian/patches/{name})"))
}

fn write(path: &Path, text: &Option<Vec<u8>>) -> Result<(), BuildError> {
    let Some(text) = text else { return fs::remove_file(path).map_err(at(path)) };
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(at(folder))?;
    }
    fs::write(path, text).map_err(at(path))
}

/// Copies a folder with all times, by which make decides what to build.
///
/// # Errors
/// Something can't be read or written.
pub fn copy(from: &Path, to: &Path) -> Result<(), BuildError> {
    let mut source = from.as_os_str().to_owned();
    source.push("/.");
    fs::create_dir_all(to).map_err(at(to))?;
    let done =
        Command::new("cp").args(["-a", "--reflink=auto", "--"]).arg(source).arg(to).output().map_err(at(from))?;
    if done.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&done.stderr).lines().next().unwrap_or_default().to_owned();
    Err(at(from)(io::Error::other(words)))
}

struct Site<'a> {
    project: &'a Project,
    work: &'a Path,
    tree: &'a Path,
    log: PathBuf,
    /// Comes first in PATH.
    programs: PathBuf,
}

/// A source to be compiled once more.
struct Job {
    record: Record,
    source: String,
}

/// Makes a folder of the work folder, where there must be none yet.
///
/// # Errors
/// It holds an earlier build.
pub fn claim(work: &Path) -> Result<(), BuildError> {
    fs::create_dir_all(work).map_err(at(work))?;
    let build = work.join("build");
    fs::create_dir(&build).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => {
            at(&build)(io::Error::other("it holds an earlier build; give another folder, or remove it"))
        }
        _ => at(&build)(error),
    })
}

impl<'a> Site<'a> {
    fn new(project: &'a Project) -> Result<Self, BuildError> {
        let work = project.work.as_path();
        let programs = work.join("programs");
        fs::create_dir_all(&programs).map_err(at(&programs))?;
        if !project.in_room {
            wrapper::make(&programs).map_err(at(&programs))?;
        }
        Ok(Self { project, work, tree: &project.tree, log: work.join("build.log"), programs })
    }

    fn records(&self, which: &str) -> PathBuf {
        self.work.join(format!("{which}.records"))
    }

    fn read_records(&self, which: &str) -> Result<Vec<Record>, BuildError> {
        let file = self.records(which);
        wrapper::read(&file).map_err(at(&file))
    }

    fn log(&self) -> Result<File, BuildError> {
        File::options().create(true).append(true).open(&self.log).map_err(at(&self.log))
    }

    /// Runs a command in the tree; `without`: programs that do nothing meanwhile.
    fn run(&self, words: &[String], which: &str, without: &[String]) -> Result<ExitStatus, BuildError> {
        let program = words.first().map_or_else(|| PathBuf::from("true"), PathBuf::from);
        let mut folders = vec![self.programs.clone()];
        if !without.is_empty() {
            let idle = self.work.join("idle");
            fs::create_dir_all(&idle).map_err(at(&idle))?;
            for name in without {
                let link = idle.join(name);
                if link.symlink_metadata().is_err() {
                    std::os::unix::fs::symlink("/bin/true", &link).map_err(at(&link))?;
                }
            }
            folders.insert(0, idle);
        }
        let records = self.records(which);
        if self.project.in_room {
            let file = Path::new(wrapper::RECORDS_IN_ROOM);
            fs::write(file, records.display().to_string()).map_err(at(file))?;
        }
        let path = self.project.path.clone().or_else(|| std::env::var_os("PATH")).unwrap_or_default();
        folders.extend(std::env::split_paths(&path));
        let path = std::env::join_paths(folders).map_err(|error| at(&self.programs)(io::Error::other(error)))?;
        let log = self.log()?;
        let mut command = Command::new(&program);
        command.args(words.get(1..).unwrap_or_default()).current_dir(self.tree);
        for name in &self.project.cleared {
            command.env_remove(name);
        }
        command.env("PATH", path).env("PWD", self.tree).env(wrapper::RECORDS, &records);
        command.envs(self.project.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(log.try_clone().map_err(at(&self.log))?).stderr(log);
        command.status().map_err(at(&program))
    }

    fn build(&self, which: &'static str, without: &[String]) -> Result<(), BuildError> {
        let begin = fs::metadata(&self.log).map_or(0, |log| log.len());
        let status = self.run(&self.project.command, which, without)?;
        if status.success() {
            return Ok(());
        }
        let (status, log) = (status.to_string(), self.log.display().to_string());
        Err(BuildError::Failed { which, status, lines: self.last_words(begin), log })
    }

    /// The second build; `pristine`: the source before the first one, for another beginning. What was compiled.
    fn build_again(&self, changes: &[Change], pristine: Option<PathBuf>) -> Result<Vec<Record>, BuildError> {
        self.change(changes)?;
        let Again::AfterScript { script, without } = &self.project.again else {
            self.build("second", &[])?;
            return self.read_records("second");
        };
        let script = ["sh", "-c", script].map(str::to_owned);
        let built = self.run(&script, "between", &[]).and_then(|_| self.build("second", without));
        if built.is_ok() {
            let records = self.read_records("second")?;
            if !records.is_empty() || !changes.iter().any(|(path, _)| is_source(path)) {
                return Ok(records);
            }
        }
        let Some(pristine) = pristine else { return built.and_then(|()| self.read_records("second")) };
        let name = pristine.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.put_back(&name, "unfinished")?;
        self.change(changes)?;
        self.build("third", &[])?;
        self.read_records("third")
    }

    fn change(&self, changes: &[Change]) -> Result<(), BuildError> {
        changes.iter().try_for_each(|(path, text)| write(&self.tree.join(path), text))
    }

    /// A copy of the tree as it is.
    fn keep(&self, name: &str) -> Result<PathBuf, BuildError> {
        let kept = self.work.join(name);
        copy(self.tree, &kept)?;
        Ok(kept)
    }

    /// The tree becomes what was kept as `name`; what it was goes to `aside`. The folder itself stays: it may be shown elsewhere.
    fn put_back(&self, name: &str, aside: &str) -> Result<(), BuildError> {
        let (kept, aside) = (self.work.join(name), self.work.join(aside));
        fs::create_dir_all(&aside).map_err(at(&aside))?;
        for (from, to) in [(&self.project.backing, &aside), (&kept, &self.project.backing)] {
            for entry in fs::read_dir(from).map_err(at(from))? {
                let name = entry.map_err(at(from))?.file_name();
                fs::rename(from.join(&name), to.join(&name)).map_err(at(from))?;
            }
        }
        Ok(())
    }

    /// What a person looks for in a log: the errors, else its end.
    fn last_words(&self, begin: u64) -> String {
        let read = || -> io::Result<String> {
            let mut log = File::open(&self.log)?;
            let end = log.metadata()?.len();
            log.seek(SeekFrom::Start(begin.max(end.saturating_sub(LOG_SHOWN))))?;
            let mut bytes = Vec::new();
            log.take(LOG_SHOWN).read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let text = read().unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        let is_error = |line: &str| {
            ["error:", "Error ", "undefined reference", "No space left", "No such file"]
                .iter()
                .any(|word| line.contains(word))
        };
        // Compilers show the place below, indented.
        let is_place = |at: usize| {
            let above = (at.saturating_sub(3)..at).rev().find(|&above| !all[above].starts_with(' '));
            all[at].starts_with(' ') && above.is_some_and(|above| is_error(all[above]))
        };
        let errors: Vec<&str> = (0..all.len())
            .filter(|&at| is_error(all[at]) || is_place(at))
            .map(|at| all[at])
            .take(LINES_SHOWN)
            .collect();
        let shown = if errors.is_empty() { &all[all.len().saturating_sub(LINES_SHOWN)..] } else { &errors[..] };
        let mut shown = shown.join("\n");
        // The log may have had no room for that.
        let room = nix::sys::statvfs::statvfs(self.work).map(|disk| disk.blocks_available() * disk.fragment_size());
        if room.is_ok_and(|room| room < DISK_LEAST) {
            shown.push_str(&format!("\nNo space left on device: {}", self.work.display()));
        }
        shown
    }

    /// The objects of all jobs, in their order; none where the source is not there (it is new, or was for a moment only).
    fn compile_again(&self, jobs: &[Job], version: &str) -> Result<Vec<Option<Vec<u8>>>, BuildError> {
        let folder = self.work.join(version);
        fs::create_dir_all(&folder).map_err(at(&folder))?;
        let numbered: Vec<(usize, &Job)> = jobs.iter().enumerate().collect();
        let compile = |(number, job): &(usize, &Job)| self.compile_job(job, &folder.join(format!("{number}.o")));
        parallel(&numbered, compile).into_iter().collect()
    }

    fn compile_job(&self, job: &Job, output: &Path) -> Result<Option<Vec<u8>>, BuildError> {
        if !job.record.directory.join(&job.source).is_file() {
            return Ok(None);
        }
        let log = self.log()?;
        let mut command = job.record.again(&job.source, output);
        command.stdin(Stdio::null()).stdout(log.try_clone().map_err(at(&self.log))?).stderr(log);
        let status = command.status().map_err(at(&job.record.compiler))?;
        if status.success() {
            return fs::read(output).map(Some).map_err(at(output));
        }
        let (source_file, log) = (job.source.clone(), self.log.display().to_string());
        Err(BuildError::Again { source_file, status: status.to_string(), log })
    }
}

/// What has to be compiled once more; what only tried the compiler out is gone by now.
fn jobs(records: &[Record]) -> Vec<Job> {
    let of = |record: &Record| -> Vec<Job> {
        record.sources.iter().map(|source| Job { record: record.clone(), source: source.clone() }).collect()
    };
    let exists = |job: &Job| job.record.directory.join(&job.source).is_file();
    records.iter().flat_map(of).filter(exists).collect()
}

fn pairs(jobs: &[Job], old: Vec<Option<Vec<u8>>>, new: Vec<Option<Vec<u8>>>, tree: &Path) -> Vec<Pair> {
    let source = |job: &Job| {
        let path = job.record.directory.join(&job.source);
        path.strip_prefix(tree).unwrap_or(&path).display().to_string()
    };
    jobs.iter()
        .zip(old)
        .zip(new)
        .filter_map(|((job, old), new)| Some(Pair { source: source(job), old, new: new?, is_lto: job.record.is_lto() }))
        .collect()
}

/// For each target, the file of the build that is it with its symbols: of the same build-id, or else of the same name. Of
/// several, the one in which most of the target's code is found.
fn find_twins(project: &Project, targets: &[Target]) -> Result<Vec<Result<Image, BuildError>>, BuildError> {
    if let Some(twin) = &project.twin {
        let twin = project.tree.join(twin);
        return Ok(targets.iter().map(|_| image(&twin)).collect());
    }
    let mut candidates = Vec::new();
    let mut folders = vec![project.tree.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(at(&folder))?.flatten() {
            let (Ok(kind), path) = (entry.file_type(), entry.path()) else { continue };
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_file() && is_linked(&path) {
                candidates.push(path);
            }
        }
    }
    candidates.sort();
    Ok(targets.iter().map(|target| find_twin(project, target, &candidates)).collect())
}

fn find_twin(project: &Project, target: &Target, candidates: &[PathBuf]) -> Result<Image, BuildError> {
    let name = target.file_name();
    let own = |image: &Image| {
        image.all_symbols().filter(|symbol| symbol.kind == SymbolKind::Function && !symbol.exported).count()
    };
    let mut named = Vec::new();
    for path in candidates {
        let is_named = path.file_name().is_some_and(|other| *other == *name);
        // Tests and helpers are many, and only what has the target's build-id or name is looked into.
        if !is_named && candidates.len() > CANDIDATES_MOST {
            continue;
        }
        let Ok(image) = image(path) else { continue };
        let is_same = image.build_id().is_some() && image.build_id() == target.image.build_id();
        if is_same && own(&image) > 0 {
            return Ok(image);
        }
        if is_named && own(&image) > 0 {
            named.push(image);
        }
    }
    let found =
        |image: &Image| crate::build::twin::locate(image, &target.image).map_or(0, |located| located.found.len());
    let best = match named.len() {
        0 | 1 => named.pop(),
        _ => named.into_iter().max_by_key(found),
    };
    best.ok_or_else(|| {
        let shown = |path: &PathBuf| path.strip_prefix(&project.tree).unwrap_or(path).display().to_string();
        let mut shown: Vec<String> = candidates.iter().map(shown).collect();
        shown.truncate(8);
        BuildError::NoTwin { name, candidates: shown.join(", ") }
    })
}

/// Whether compilers read it.
fn is_source(path: &Path) -> bool {
    const ENDINGS: [&str; 10] = ["c", "h", "cc", "cpp", "cxx", "C", "hh", "hpp", "hxx", "inc"];
    path.extension().and_then(|ending| ending.to_str()).is_some_and(|ending| ENDINGS.contains(&ending))
}

/// An executable or shared library (ET_EXEC, ET_DYN).
pub(super) fn is_linked(path: &Path) -> bool {
    let mut header = [0; 18];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut header));
    read.is_ok() && header.starts_with(b"\x7fELF\x02\x01") && matches!(header[16], 2 | 3)
}
