//! The compiler's stand-in: this program under the names `gcc`, `cc`, `clang++` and so on. In a private view of the file system
//! (`room`) it lies over the compilers, wherever they are called from; where there is none, in a folder that comes first in PATH.
//! It runs the real compiler with the arguments as they are, and writes down what was compiled. Not for compiling otherwise: what
//! a comparison needs is compiled afterwards, from these records.

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    unistd::{getegid, geteuid},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    fs::OpenOptions,
    io::Write,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

/// The file that records go to. That it is set makes this program a stand-in; empty: one that writes nothing down.
pub const RECORDS: &str = "ASAP_BUILD_RECORDS";
/// In a room, the folder with the compilers that stand-ins lie over.
pub const ASIDE: &str = "/.asap/real";
/// In a room, the name of the file that records go to, for builds that clear their environment.
pub const RECORDS_IN_ROOM: &str = "/.asap/records";
/// What compilers and their preprocessors heed (gcc's and clang's manuals: environment variables).
const HEEDED: [&str; 14] = [
    "CPATH",
    "C_INCLUDE_PATH",
    "CPLUS_INCLUDE_PATH",
    "OBJC_INCLUDE_PATH",
    "COMPILER_PATH",
    "GCC_EXEC_PREFIX",
    "LIBRARY_PATH",
    "SOURCE_DATE_EPOCH",
    "CCC_OVERRIDE_OPTIONS",
    "PWD",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LC_MESSAGES",
];
/// Compilers that a stand-in is made for; also with a version (`gcc-12`).
const NAMES: [&str; 10] =
    ["cc", "c++", "gcc", "g++", "clang", "clang++", "c89", "c99", "x86_64-linux-gnu-gcc", "x86_64-linux-gnu-g++"];

/// One run of a compiler that made code.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Record {
    /// Where it ran.
    pub directory: PathBuf,
    /// The real compiler.
    pub compiler: PathBuf,
    /// All arguments; files of arguments (`@file`) are read.
    pub arguments: Vec<String>,
    /// Those of them that are sources.
    pub sources: Vec<String>,
    /// Variables that compilers heed.
    #[serde(default)]
    pub environment: Vec<(String, String)>,
    /// SHA-256 of the object file that came out, where there is one; equal ones need no comparison.
    #[serde(default)]
    pub object: Option<String>,
}

/// The compilers of this machine, without symbolic links: those in PATH, and where distributions put them.
#[must_use]
pub fn compilers() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/local/bin", "/usr/bin", "/bin"].map(PathBuf::from));
    let this = std::env::current_exe().ok().and_then(|file| file.canonicalize().ok());
    let mut found: Vec<PathBuf> = folders
        .filter_map(|folder| std::fs::read_dir(folder).ok())
        .flat_map(|entries| entries.flatten())
        .filter(|entry| is_compiler(&entry.file_name()))
        .filter_map(|entry| entry.path().canonicalize().ok())
        .filter(|file| file.is_file() && Some(file) != this.as_ref())
        .collect();
    found.sort();
    found.dedup();
    found
}

/// Makes the stand-ins for all compilers that there are.
///
/// # Errors
/// The folder can't be written.
pub fn make(folder: &Path) -> std::io::Result<()> {
    let this = std::env::current_exe()?;
    std::fs::create_dir_all(folder)?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    for directory in std::env::split_paths(&path) {
        let Ok(entries) = std::fs::read_dir(directory) else { continue };
        for name in entries.flatten().map(|entry| entry.file_name()).filter(|name| is_compiler(name)) {
            let link = folder.join(name);
            if link.symlink_metadata().is_err() {
                std::os::unix::fs::symlink(&this, link)?;
            }
        }
    }
    Ok(())
}

fn is_compiler(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else { return false };
    let is_version = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    NAMES.iter().any(|known| {
        name.strip_prefix(known).is_some_and(|rest| rest.is_empty() || rest.strip_prefix('-').is_some_and(is_version))
    })
}

/// Stands in for a compiler, if this program was started as one; none: it was not.
#[must_use]
pub fn run_if_asked() -> Option<ExitCode> {
    let mut arguments = std::env::args_os();
    let called = PathBuf::from(arguments.next()?);
    let this = std::env::current_exe().ok()?;
    let aside = Path::new(ASIDE).join(this.strip_prefix("/").ok()?);
    let records = std::env::var_os(RECORDS);
    let arguments: Vec<OsString> = arguments.collect();
    if aside.is_file() {
        let told = || std::fs::read_to_string(RECORDS_IN_ROOM).ok().map(|text| OsString::from(text.trim_end()));
        let records = records.or_else(told).filter(|records| !records.is_empty());
        let compiler = absolute(&called).unwrap_or_else(|| this.clone());
        return Some(stand_in(records.as_deref(), &compiler, &uncover(&this, aside), &called, &arguments));
    }
    let (name, records) = (called.file_name().filter(|name| is_compiler(name))?, records?);
    let Some(compiler) = real(name) else {
        eprintln!("asap: {} is not in PATH; install the compiler", name.to_string_lossy());
        return Some(ExitCode::from(127));
    };
    let records = Some(records.as_os_str()).filter(|records| !records.is_empty());
    // By its path: gcc looks for its parts beside itself.
    Some(stand_in(records, &compiler, &compiler, &compiler, &arguments))
}

/// The program that a shell would run under that name.
fn absolute(called: &Path) -> Option<PathBuf> {
    if called.is_absolute() {
        return Some(called.to_owned());
    }
    if called.components().count() > 1 {
        return Some(std::env::current_dir().ok()?.join(called));
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(called)).find(|file| file.is_file())
}

/// Where the compiler under a stand-in can be run: at its own path, by which it finds its parts, in a namespace of our own; else
/// where it was put aside.
fn uncover(this: &Path, aside: PathBuf) -> PathBuf {
    let own = || -> nix::Result<()> {
        let (user, group) = (geteuid(), getegid());
        if unshare(CloneFlags::CLONE_NEWNS).is_err() {
            unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)?;
            let write = |file: &str, text: String| {
                std::fs::write(format!("/proc/self/{file}"), text).map_err(|_| nix::Error::EPERM)
            };
            write("setgroups", "deny".to_owned())?;
            write("uid_map", format!("{user} {user} 1\n"))?;
            write("gid_map", format!("{group} {group} 1\n"))?;
        }
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)?;
        mount(Some(&aside), this, None::<&str>, MsFlags::MS_BIND, None::<&str>)
    };
    if own().is_ok() { this.to_owned() } else { aside }
}

/// Runs `program`, called `called`, and writes down what it did as `compiler`.
fn stand_in(
    records: Option<&OsStr>,
    compiler: &Path,
    program: &Path,
    called: &Path,
    arguments: &[OsString],
) -> ExitCode {
    let mut command = Command::new(program);
    // If it starts others, those need not be written down once more.
    command.arg0(called).args(arguments).env(RECORDS, "");
    let Some(records) = records else {
        let error = command.exec();
        eprintln!("asap: {}: {error}", program.display());
        return ExitCode::from(126);
    };
    let done = match command.status() {
        Ok(done) => done,
        Err(error) => {
            eprintln!("asap: {}: {error}", program.display());
            return ExitCode::from(126);
        }
    };
    if done.success()
        && let Some(record) = record(compiler.to_owned(), arguments)
        && let Err(error) = write(records, &record)
    {
        eprintln!("asap: {}: {error}; is the disk full?", records.to_string_lossy());
        return ExitCode::from(125);
    }
    // A signal's number as shells tell it.
    let code = done.code().unwrap_or_else(|| 128 + ExitStatusExt::signal(&done).unwrap_or(0));
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

/// The next program of that name in PATH that is not this one.
fn real(name: &OsStr) -> Option<PathBuf> {
    let this = std::env::current_exe().ok()?;
    let path = std::env::var_os("PATH")?;
    let is_other = |file: &PathBuf| file.canonicalize().is_ok_and(|file| file != this) && file.is_file();
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(is_other)
}

/// What is written down of a run; nothing, if it made no code.
fn record(compiler: PathBuf, arguments: &[OsString]) -> Option<Record> {
    let arguments: Vec<String> =
        arguments.iter().map(|argument| argument.to_str().map(str::to_owned)).collect::<Option<_>>()?;
    let arguments = expanded(arguments, 0);
    if arguments.iter().any(|argument| matches!(argument.as_str(), "-E" | "-S" | "-M" | "-MM" | "-fsyntax-only")) {
        return None;
    }
    let sources = sources(&arguments);
    if sources.is_empty() {
        return None;
    }
    let variables = HEEDED.iter().filter_map(|&name| Some((name.to_owned(), std::env::var(name).ok()?)));
    let object = output(&arguments, &sources).and_then(|file| std::fs::read(file).ok());
    Some(Record {
        directory: std::env::current_dir().ok()?,
        compiler,
        environment: variables.collect(),
        object: object.map(|bytes| crate::patch::manifest::sha256_hex(&bytes)),
        arguments,
        sources,
    })
}

/// The object file that a run makes: one source, compiled and not linked.
fn output(arguments: &[String], sources: &[String]) -> Option<PathBuf> {
    let [source] = sources else { return None };
    if !arguments.iter().any(|argument| argument == "-c") {
        return None;
    }
    let mut rest = arguments.iter();
    let mut named = None;
    while let Some(argument) = rest.next() {
        match argument.strip_prefix("-o") {
            Some("") => named = rest.next().cloned(),
            Some(file) if !file.starts_with("bj") => named = Some(file.to_owned()),
            _ => {}
        }
    }
    Some(named.map_or_else(
        || Path::new(Path::new(source).file_name().unwrap_or_default()).with_extension("o"),
        PathBuf::from,
    ))
}

/// Arguments with those that stand in files (`@file`, as gcc reads them): words, quotes, backslashes.
fn expanded(arguments: Vec<String>, depth: usize) -> Vec<String> {
    let mut all = Vec::with_capacity(arguments.len());
    for argument in arguments {
        let text = argument.strip_prefix('@').filter(|_| depth < 8).and_then(|file| std::fs::read_to_string(file).ok());
        match text {
            Some(text) => all.extend(expanded(words(&text), depth + 1)),
            None => all.push(argument),
        }
    }
    all
}

fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let (mut word, mut is_open, mut quote) = (String::new(), false, None);
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        match (quote, c) {
            (_, '\\') => {
                word.extend(rest.next());
                is_open = true;
            }
            (Some(end), c) if c == end => quote = None,
            (None, '"' | '\'') => {
                quote = Some(c);
                is_open = true;
            }
            (None, c) if c.is_whitespace() => {
                if std::mem::take(&mut is_open) {
                    words.push(std::mem::take(&mut word));
                }
            }
            (_, c) => {
                word.push(c);
                is_open = true;
            }
        }
    }
    if is_open {
        words.push(word);
    }
    words
}

/// Options whose value is the next argument.
const WITH_VALUE: [&str; 33] = [
    "-o",
    "-x",
    "-I",
    "-D",
    "-U",
    "-L",
    "-l",
    "-MF",
    "-MT",
    "-MQ",
    "-include",
    "-imacros",
    "-isystem",
    "-iquote",
    "-idirafter",
    "-Xlinker",
    "-Xassembler",
    "-Xpreprocessor",
    "-T",
    "-u",
    "-z",
    "--param",
    "-Xclang",
    "-mllvm",
    "-target",
    "-isysroot",
    "--sysroot",
    "-iprefix",
    "-iwithprefix",
    "-MJ",
    "-dumpbase",
    "-dumpdir",
    "-B",
];

fn sources(arguments: &[String]) -> Vec<String> {
    const ENDINGS: [&str; 6] = [".c", ".cc", ".cpp", ".cxx", ".c++", ".C"];
    let mut found = Vec::new();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        if WITH_VALUE.contains(&argument.as_str()) {
            rest.next();
        } else if !argument.starts_with('-') && ENDINGS.iter().any(|ending| argument.ends_with(ending)) {
            found.push(argument.clone());
        }
    }
    found
}

fn write(records: &OsStr, record: &Record) -> std::io::Result<()> {
    let mut line = serde_json::to_string(record)?;
    line.push('\n');
    // One write to a file that is open for appending does not mix with others (write(2)).
    OpenOptions::new().create(true).append(true).open(records)?.write_all(line.as_bytes())
}

impl Record {
    fn without_object(&self) -> Self {
        Self { object: None, ..self.clone() }
    }

    /// Whether it leaves code to be made when the program is linked.
    #[must_use]
    pub fn is_lto(&self) -> bool {
        let last =
            self.arguments.iter().rev().find(|argument| argument.starts_with("-flto") || *argument == "-fno-lto");
        last.is_some_and(|last| last != "-fno-lto")
    }

    /// The files that its sources include, as its compiler tells them (`-M`); none, if it does not.
    #[must_use]
    pub fn includes(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for source in &self.sources {
            let mut command = self.again(source, Path::new("/dev/stdout"));
            let Ok(done) = command.arg("-M").stderr(Stdio::null()).output() else { continue };
            let text = String::from_utf8_lossy(&done.stdout).replace("\\\n", " ");
            found.extend(text.split_whitespace().map(PathBuf::from));
        }
        found
    }

    /// The command that compiles one of its sources once more, with a section for each function and variable.
    #[must_use]
    pub fn again(&self, source: &str, output: &Path) -> Command {
        let mut command = Command::new(&self.compiler);
        command.current_dir(&self.directory).env(RECORDS, "");
        for name in HEEDED {
            command.env_remove(name);
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        let mut rest = self.arguments.iter();
        while let Some(argument) = rest.next() {
            match argument.as_str() {
                "-o" | "-MF" | "-MT" | "-MQ" | "-MJ" | "-dumpbase" | "-dumpdir" => {
                    rest.next();
                }
                "-c" | "-MD" | "-MMD" | "-MP" | "-pipe" | "-s" => {}
                _ if self.sources.contains(argument) => {}
                argument if argument.starts_with("-Wp,-MD") || argument.starts_with("-Wp,-MMD") => {}
                // Objects and libraries are for linking.
                argument
                    if !argument.starts_with('-')
                        && [".o", ".a", ".so", ".lo"].iter().any(|end| argument.ends_with(end)) => {}
                with_value if WITH_VALUE.contains(&with_value) => {
                    command.arg(argument);
                    command.args(rest.next());
                }
                _ => {
                    command.arg(argument);
                }
            }
        }
        command.args([
            "-ffunction-sections",
            "-fdata-sections",
            "-fno-common",
            "-fno-lto",
            // Without optimisation, too, each string by itself.
            "-fmerge-constants",
            "-g",
            "-gno-record-gcc-switches",
        ]);
        command.args(["-w", "-c", "-o"]).arg(output).arg(source);
        command
    }
}

/// What was compiled, by the records in a file; each run once.
///
/// # Errors
/// The file is damaged.
pub fn read(records: &Path) -> std::io::Result<Vec<Record>> {
    let text = match std::fs::read_to_string(records) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        text => text?,
    };
    // Of runs that differ in nothing but what came out, the last one counts.
    let mut all: Vec<Record> = Vec::new();
    let mut known: HashMap<Record, usize> = HashMap::new();
    for line in text.lines() {
        let record: Record = serde_json::from_str(line)?;
        match known.get(&record.without_object()) {
            Some(&at) => all[at] = record,
            None => {
                known.insert(record.without_object(), all.len());
                all.push(record);
            }
        }
    }
    Ok(all)
}

/// Of the records of a second build, those whose object is not the same as in the first.
#[must_use]
pub fn differing(first: &[Record], second: Vec<Record>) -> Vec<Record> {
    let known: HashMap<Record, &Option<String>> =
        first.iter().map(|record| (record.without_object(), &record.object)).collect();
    let is_same = |record: &Record| {
        record.object.is_some() && known.get(&record.without_object()).is_some_and(|object| **object == record.object)
    };
    second.into_iter().filter(|record| !is_same(record)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn what_makes_code_is_written_down() {
        let sources = |text| record(PathBuf::from("/usr/bin/gcc"), &arguments(text)).map(|record| record.sources);
        assert_eq!(sources("-O2 -c -o x.o dir/x.c"), Some(vec!["dir/x.c".to_owned()]));
        assert_eq!(sources("-o prog a.c b.cc -lm"), Some(vec!["a.c".to_owned(), "b.cc".to_owned()]));
        assert_eq!(sources("-include config.c -c y.c"), Some(vec!["y.c".to_owned()]));
        for nothing in ["-E x.c", "-MM x.c", "-o prog a.o b.o", "--version", "-S x.c"] {
            assert_eq!(sources(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn compiling_again_keeps_what_decides_about_the_code() {
        let record =
            record(PathBuf::from("/usr/bin/gcc"), &arguments("-O3 -DX=1 -I inc -MD -MF x.d -c -fPIE -o x.o x.c"));
        let command = record.expect("it makes code").again("x.c", Path::new("/tmp/out.o"));
        let arguments: Vec<_> = command.get_args().map(|argument| argument.to_str().expect("text")).collect();
        let text = arguments.join(" ");
        assert!(text.starts_with("-O3 -DX=1 -I inc -fPIE -ffunction-sections"), "{text}");
        assert!(text.ends_with("-c -o /tmp/out.o x.c"), "{text}");
    }

    #[test]
    fn compilers_are_known_by_name() {
        for (name, is) in
            [("gcc", true), ("g++-12", true), ("clang-14", true), ("gcc-ar", false), ("asap", false), ("cc1", false)]
        {
            assert_eq!(is_compiler(OsStr::new(name)), is, "{name}");
        }
    }
}
