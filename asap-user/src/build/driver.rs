//! Builds a source twice with its own build command, as it is and with the diff, and has the objects that differ compared. In a
//! copy; the source itself is left alone. The first build is exactly the project's: it gives the twin. What a comparison needs is
//! compiled afterwards, in both versions, and only for what the diff made compile again. Not for judging: that is `assemble`.

use super::{
    assemble::{self, AssembleError, Facts, Pair, Verdict},
    diff::{Diff, DiffError, Text},
    wrapper::{self, Record},
};
use crate::image::{Image, SymbolKind};
use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Lines of the log that a failed build shows.
const LINES_SHOWN: usize = 25;
/// Most bytes of the log that are looked through for them.
const LOG_SHOWN: u64 = 64 << 10;
/// Largest executable, bytes.
const IMAGE_MOST: u64 = 4 << 30;

/// What to build.
#[derive(Clone, Debug)]
pub struct Project {
    /// The source.
    pub source: PathBuf,
    /// Diffs, in order.
    pub diffs: Vec<PathBuf>,
    /// The executable or library that runs.
    pub target: PathBuf,
    /// The build command, run in the copy.
    pub command: Vec<String>,
    /// Run before the second build, in the copy.
    pub between: Vec<String>,
    /// Set while the project builds.
    pub environment: Vec<(String, String)>,
    /// The twin within the source after the build; none: found by the target's file name.
    pub twin: Option<PathBuf>,
    /// Folder for copies, objects and the log.
    pub work: PathBuf,
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

/// Builds, compares, and makes the patch. `step` is told what is being done.
///
/// # Errors
/// Something can't be read, built or compared.
pub fn build(project: &Project, facts: &Facts, step: &dyn Fn(&str)) -> Result<Verdict, BuildError> {
    let module = image(&project.target)?;
    let diffs = read_diffs(&project.diffs)?;
    let site = Site::new(project)?;
    step("copying the source");
    copy(&project.source, &site.tree)?;
    // Whether the diff fits is said before an hour of building.
    let changes = changes(&diffs, &site.tree)?;
    step("building the source as it is");
    site.build("first", &site.records("first"))?;
    let twin = image(&find_twin(project, &site.tree)?)?;
    let before = site.work.join("before");
    copy(&site.tree, &before)?;
    step("building it with the change");
    for (path, text) in &changes {
        write(&site.tree.join(path), text)?;
    }
    site.between()?;
    let second = site.records("second");
    site.build("second", &second)?;
    let records = wrapper::read(&second).map_err(at(&second))?;
    if records.is_empty() {
        let first = site.records("first");
        let any = wrapper::read(&first).map_err(at(&first))?;
        // The diff may change what is not compiled: documentation, scripts.
        return match any.is_empty() {
            true => Err(BuildError::NothingCompiled("first")),
            false => Ok(assemble::assemble(&[], &twin, &module, facts)?),
        };
    }
    step("compiling what changed for comparison");
    let jobs = jobs(&records);
    let new = site.compile_again(&jobs, "new")?;
    let after = site.work.join("after");
    fs::rename(&site.tree, &after).map_err(at(&site.tree))?;
    fs::rename(&before, &site.tree).map_err(at(&before))?;
    let old = site.compile_again(&jobs, "old")?;
    step("comparing");
    let pairs = pairs(&jobs, old, new, &site.tree);
    Ok(assemble::assemble(&pairs, &twin, &module, facts)?)
}

fn image(path: &Path) -> Result<Image, BuildError> {
    let length = fs::metadata(path).map_err(at(path))?.len();
    if length > IMAGE_MOST {
        return Err(at(path)(io::Error::other("it is too large")));
    }
    let bytes = fs::read(path).map_err(at(path))?;
    Ok(Image::parse(&path.display().to_string(), bytes.into())?)
}

fn read_diffs(files: &[PathBuf]) -> Result<Vec<(String, Diff)>, BuildError> {
    let read = |file: &PathBuf| {
        let bytes = fs::read(file).map_err(at(file))?;
        let name = file.display().to_string();
        let diff = Diff::parse(&bytes).map_err(|error| BuildError::Diff { file: name.clone(), error })?;
        Ok((name, diff))
    };
    files.iter().map(read).collect()
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
            text.change(file, &path.display().to_string())
                .map_err(|error| BuildError::Diff { file: name.clone(), error })?;
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
    Ok(changed.into_iter().map(write).collect())
}

fn write(path: &Path, text: &Option<Vec<u8>>) -> Result<(), BuildError> {
    let Some(text) = text else { return fs::remove_file(path).map_err(at(path)) };
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(at(folder))?;
    }
    fs::write(path, text).map_err(at(path))
}

/// Copies a folder with all times, by which make decides what to build.
fn copy(from: &Path, to: &Path) -> Result<(), BuildError> {
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
    tree: PathBuf,
    log: PathBuf,
    compilers: PathBuf,
}

/// A source to be compiled once more.
struct Job {
    record: Record,
    source: String,
}

impl<'a> Site<'a> {
    fn new(project: &'a Project) -> Result<Self, BuildError> {
        let work = project.work.as_path();
        fs::create_dir_all(work).map_err(at(work))?;
        let build = work.join("build");
        if build.exists() {
            return Err(at(&build)(io::Error::other("it holds an earlier build; give another folder, or remove it")));
        }
        let compilers = work.join("compilers");
        wrapper::make(&compilers).map_err(at(&compilers))?;
        let name = project.source.file_name().unwrap_or("source".as_ref());
        Ok(Self { project, work, tree: build.join(name), log: work.join("build.log"), compilers })
    }

    fn records(&self, which: &str) -> PathBuf {
        self.work.join(format!("{which}.records"))
    }

    fn log(&self) -> Result<File, BuildError> {
        File::options().create(true).append(true).open(&self.log).map_err(at(&self.log))
    }

    fn command(&self, words: &[String], records: &Path) -> Result<Option<Command>, BuildError> {
        let Some((program, arguments)) = words.split_first() else { return Ok(None) };
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut folders = vec![self.compilers.clone()];
        folders.extend(std::env::split_paths(&path));
        let path = std::env::join_paths(folders).map_err(|error| at(&self.compilers)(io::Error::other(error)))?;
        let log = self.log()?;
        let mut command = Command::new(program);
        command.args(arguments).current_dir(&self.tree).env("PATH", path).env(wrapper::RECORDS, records);
        command.envs(self.project.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(log.try_clone().map_err(at(&self.log))?).stderr(log);
        Ok(Some(command))
    }

    fn build(&self, which: &'static str, records: &Path) -> Result<(), BuildError> {
        let begin = fs::metadata(&self.log).map_or(0, |log| log.len());
        let Some(mut command) = self.command(&self.project.command, records)? else { return Ok(()) };
        let program = PathBuf::from(command.get_program());
        let status = command.status().map_err(at(&program))?;
        if status.success() {
            return Ok(());
        }
        let (status, log) = (status.to_string(), self.log.display().to_string());
        Err(BuildError::Failed { which, status, lines: self.last_words(begin), log })
    }

    fn between(&self) -> Result<(), BuildError> {
        if let Some(mut command) = self.command(&self.project.between, &self.records("between"))? {
            let program = PathBuf::from(command.get_program());
            command.status().map_err(at(&program))?;
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
        let errors: Vec<&str> = text.lines().filter(|line| line.contains("error")).take(LINES_SHOWN).collect();
        let all: Vec<&str> = text.lines().collect();
        let shown = if errors.is_empty() { &all[all.len().saturating_sub(LINES_SHOWN)..] } else { &errors[..] };
        shown.join("\n")
    }

    /// The objects of all jobs, in their order; none where the source is not there (it is new, or was for a moment only).
    fn compile_again(&self, jobs: &[Job], version: &str) -> Result<Vec<Option<Vec<u8>>>, BuildError> {
        let folder = self.work.join(version);
        fs::create_dir_all(&folder).map_err(at(&folder))?;
        let (next, failed) = (AtomicUsize::new(0), Mutex::new(None));
        let objects: Vec<Mutex<Option<Vec<u8>>>> = jobs.iter().map(|_| Mutex::new(None)).collect();
        let work = || {
            while let Some((number, job)) = {
                let number = next.fetch_add(1, Ordering::Relaxed);
                jobs.get(number).map(|job| (number, job))
            } {
                match self.compile_job(job, &folder.join(format!("{number}.o"))) {
                    Ok(bytes) => *objects[number].lock().unwrap_or_else(PoisonError::into_inner) = bytes,
                    Err(error) => {
                        failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                        next.store(jobs.len(), Ordering::Relaxed);
                    }
                }
            }
        };
        let workers = std::thread::available_parallelism().map_or(1, usize::from).min(jobs.len().max(1));
        std::thread::scope(|scope| (0..workers).for_each(|_| drop(scope.spawn(work))));
        match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(objects
                .into_iter()
                .map(|object| object.into_inner().unwrap_or_else(PoisonError::into_inner))
                .collect()),
        }
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
        .filter_map(|((job, old), new)| Some(Pair { source: source(job), old, new: new? }))
        .collect()
}

/// The file of the build that is the target with its symbols.
fn find_twin(project: &Project, tree: &Path) -> Result<PathBuf, BuildError> {
    if let Some(twin) = &project.twin {
        return Ok(tree.join(twin));
    }
    let name = project.target.canonicalize().unwrap_or_else(|_| project.target.clone());
    let name = name.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut candidates = Vec::new();
    let mut folders = vec![tree.to_owned()];
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
    let is_named = |path: &&PathBuf| path.file_name().is_some_and(|other| other.to_string_lossy() == name);
    let count = |path: &PathBuf| -> usize {
        let Ok(image) = image(path) else { return 0 };
        image.all_symbols().filter(|symbol| symbol.kind == SymbolKind::Function && !symbol.exported).count()
    };
    let best = candidates.iter().filter(is_named).map(|path| (count(path), path)).max();
    match best {
        Some((symbols, path)) if symbols > 0 => Ok(path.clone()),
        _ => {
            let shown = |path: &PathBuf| path.strip_prefix(tree).unwrap_or(path).display().to_string();
            let mut shown: Vec<String> = candidates.iter().map(shown).collect();
            shown.sort();
            shown.truncate(8);
            Err(BuildError::NoTwin { name, candidates: shown.join(", ") })
        }
    }
}

/// An executable or shared library (ET_EXEC, ET_DYN).
fn is_linked(path: &Path) -> bool {
    let mut header = [0; 18];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut header));
    read.is_ok() && header.starts_with(b"\x7fELF\x02\x01") && matches!(header[16], 2 | 3)
}
