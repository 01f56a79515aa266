//! The compiler's stand-in: this program under the names `gcc`, `cc`, `clang++` and so on, in a folder that comes first in PATH
//! while a project builds. It runs the real compiler with the arguments as they are, and writes down what was compiled. Not for
//! compiling otherwise: what a comparison needs is compiled afterwards, from these records.

use serde::{Deserialize, Serialize};
use std::{
    ffi::{OsStr, OsString},
    fs::OpenOptions,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

/// The file that records go to; that it is set is what makes this program a stand-in.
pub const RECORDS: &str = "ASAP_BUILD_RECORDS";
/// Compilers that a stand-in is made for; also with a version (`gcc-12`).
const NAMES: [&str; 10] =
    ["cc", "c++", "gcc", "g++", "clang", "clang++", "c89", "c99", "x86_64-linux-gnu-gcc", "x86_64-linux-gnu-g++"];

/// One run of a compiler that made code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Where it ran.
    pub directory: PathBuf,
    /// The real compiler.
    pub compiler: PathBuf,
    /// All arguments.
    pub arguments: Vec<String>,
    /// Those of them that are sources.
    pub sources: Vec<String>,
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
    let records = std::env::var_os(RECORDS)?;
    let mut arguments = std::env::args_os();
    let called = PathBuf::from(arguments.next()?);
    let name = called.file_name().filter(|name| is_compiler(name))?.to_owned();
    let arguments: Vec<OsString> = arguments.collect();
    Some(stand_in(&records, &name, &arguments))
}

fn stand_in(records: &OsStr, name: &OsStr, arguments: &[OsString]) -> ExitCode {
    let Some(compiler) = real(name) else {
        eprintln!("asap: {} is not in PATH; install the compiler", name.to_string_lossy());
        return ExitCode::from(127);
    };
    let mut command = Command::new(&compiler);
    // By its path: gcc looks for its parts beside itself. If it starts others, those need not be written down once more.
    command.args(arguments).env_remove(RECORDS);
    let done = match command.status() {
        Ok(done) => done,
        Err(error) => {
            eprintln!("asap: {}: {error}", compiler.display());
            return ExitCode::from(126);
        }
    };
    if done.success()
        && let Some(record) = record(compiler, arguments)
        && let Err(error) = write(records, &record)
    {
        eprintln!("asap: {}: {error}; is the disk full?", records.to_string_lossy());
        return ExitCode::from(125);
    }
    // A signal's number as shells tell it.
    let code = done.code().unwrap_or_else(|| 128 + std::os::unix::process::ExitStatusExt::signal(&done).unwrap_or(0));
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
    if arguments.iter().any(|argument| matches!(argument.as_str(), "-E" | "-S" | "-M" | "-MM" | "-fsyntax-only")) {
        return None;
    }
    let sources = sources(&arguments);
    let directory = std::env::current_dir().ok()?;
    (!sources.is_empty()).then_some(Record { directory, compiler, arguments, sources })
}

/// Options whose value is the next argument.
const WITH_VALUE: [&str; 22] = [
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
    /// The command that compiles one of its sources once more, with a section for each function and variable.
    #[must_use]
    pub fn again(&self, source: &str, output: &Path) -> Command {
        let mut command = Command::new(&self.compiler);
        command.current_dir(&self.directory).env_remove(RECORDS);
        let mut rest = self.arguments.iter();
        while let Some(argument) = rest.next() {
            match argument.as_str() {
                "-o" | "-MF" | "-MT" | "-MQ" => {
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
    let mut all: Vec<Record> = Vec::new();
    for line in text.lines() {
        let record: Record = serde_json::from_str(line)?;
        if !all.contains(&record) {
            all.push(record);
        }
    }
    Ok(all)
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
