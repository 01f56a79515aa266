//! `asap build`: a patch from a source and a diff.

use super::{
    context::Global,
    progress::Progress,
    text::{count, table},
};
use crate::{
    build::{
        assemble::{Facts, Verdict},
        driver::{self, BuildError, Project},
    },
    image::demangle,
    patch::manifest::{Class, Origin, sha256_hex},
    report::{self, Failure, FailureKind},
};
use serde::Serialize;
use std::{
    cell::Cell,
    fs, io,
    path::{Path, PathBuf},
};

/// Make a patch from a source tree and a diff, or say why there can't be one.
///
/// The source is copied and built twice with its own build command, as it is and with the diff; what differs in the objects
/// becomes the patch. Give the same version, compiler and flags that the running program was built with.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  asap build --source nginx-1.22.1 --patch CVE-2022-41741.patch --target /usr/sbin/nginx -o fix.asap -- make -j2
  asap build --source src --patch fix.diff --target ./server -o fix.asap -- sh -c 'cmake -B out && make -C out'
  asap build --json --source src --patch fix.diff --target ./server -o fix.asap -- make | jq .class")]
pub struct Build {
    /// Source of the running program: its top folder, not built yet.
    #[arg(long, value_name = "DIR")]
    source: PathBuf,
    /// Unified diff to be built in; several are applied in order.
    #[arg(long, value_name = "DIFF", required = true)]
    patch: Vec<PathBuf>,
    /// Executable or library that runs, as it is installed.
    #[arg(long, value_name = "EXE")]
    target: PathBuf,
    /// Patch file to be written.
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
    /// Build command, run in a copy of the source.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl Build {
    pub fn run(self, global: &Global) -> Result<(), Failure> {
        let work = match &self.work {
            Some(folder) => Work { folder: absolute(folder)?, is_ours: Cell::new(false) },
            None => Work::temporary().map_err(|error| refused("a temporary folder can't be made", &error))?,
        };
        let diffs: Vec<Vec<u8>> = self.patch.iter().map(|file| read(file)).collect::<Result<_, _>>()?;
        let mut fixes: Vec<String> = self.patch.iter().zip(&diffs).flat_map(|(file, diff)| cves(file, diff)).collect();
        fixes.sort();
        fixes.dedup();
        let stem = |file: &Path| file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let file_name = |file: &Path| file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let target = absolute(&self.target)?;
        let real = target.canonicalize().unwrap_or_else(|_| target.clone());
        let facts = Facts {
            name: self.name.clone().unwrap_or_else(|| stem(&self.output)),
            target: file_name(&real),
            origin: Origin {
                diff_sha256: Some(sha256_hex(&diffs.concat())),
                diff: self.patch.first().map(|file| file_name(file)),
                fixes,
                ..Origin::default()
            },
            replaces: self.replaces.clone(),
            requires: self.requires.clone(),
        };
        let project = Project {
            source: absolute(&self.source)?,
            diffs: self.patch.iter().map(|file| absolute(file)).collect::<Result<_, _>>()?,
            target,
            command: self.command.clone(),
            between: Vec::new(),
            environment: Vec::new(),
            twin: self.twin.clone(),
            work: work.folder.clone(),
        };
        let progress = Progress::start();
        let step = |words: &str| progress.step(&report::Progress { step: words.to_owned(), fraction: None });
        let verdict = driver::build(&project, &facts, &step);
        drop(progress);
        let verdict = verdict.map_err(|error| {
            work.keep();
            failure(&error)
        })?;
        if let Some(patch) = &verdict.patch {
            fs::write(&self.output, patch).map_err(|error| refused(&self.output.display().to_string(), &error))?;
        }
        let class = verdict.class;
        let failed =
            || Failure::refused(format!("no patch was made: class {class}, {}", class.meaning()), way_out(&verdict));
        let failed = verdict.patch.is_none().then(failed);
        let document = Document { verdict: &verdict, failed: failed.as_ref() };
        global.show(&document, || shown(&verdict, &self.output))?;
        global.is_said.set(true);
        failed.map_or(Ok(()), Err)
    }
}

/// What `--json` prints.
#[derive(Serialize)]
struct Document<'a> {
    #[serde(flatten)]
    verdict: &'a Verdict,
    #[serde(skip_serializing_if = "Option::is_none")]
    failed: Option<&'a Failure>,
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

fn shown(verdict: &Verdict, output: &Path) -> String {
    let mut text = match verdict.patch {
        Some(_) => format!("{}: ", output.display()),
        None => String::new(),
    };
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
