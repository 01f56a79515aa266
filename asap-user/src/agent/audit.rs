//! Who changed what, when, with which files, and what came of it: one line of JSON before each changing request and one after;
//! and one when an attached process takes its patches with it, by ending or by running another program.
//! JSON escapes line ends and control characters, so no name can forge a record.
//!
//! systemd's journal gets a copy, where there is one (`journal`). The file is opened for each record, so that log rotation needs no help; it is only ever appended to.

use super::journal::Journal;
use crate::{
    hex::hex,
    report::{
        Failure, Fate, News, PatchFile, PatchRequest, Reply, Request, SandboxAction, SandboxRequest, ScopedOutcome,
        ScopedReport, ScopedWork,
    },
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    fs::{DirBuilder, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

/// Longest part of a name that is kept.
const NAME_LIMIT: usize = 256;
/// How much of the end of the file is read to show the last records.
const TAIL: u64 = 4 << 20;

/// The audit log can't be used.
#[derive(Debug, thiserror::Error)]
#[error("the audit log {path} can't be used: {why}")]
pub struct AuditError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub why: String,
}

/// Before or after.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// It is about to be tried.
    Intent,
    /// This came of it.
    Result,
    /// Nobody asked for it: an attached process did it by itself.
    Event,
}

/// One file of a patch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileDigest {
    /// Its name, as the client gave it.
    pub name: String,
    /// SHA-256 of its bytes, hex: what sha256sum(1) prints.
    pub sha256: String,
}

/// A line of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// RFC 3339, UTC.
    pub time: String,
    /// Before or after.
    pub phase: Phase,
    /// The agent's pid; with `number` it pairs intent and result.
    pub agent: i32,
    /// Counts the agent's changing requests.
    pub number: u64,
    /// The user who asked; of events the agent's.
    pub uid: u32,
    /// The client's process; of events the agent's.
    pub pid: i32,
    /// attach, patch, check, revert, detach, sandbox enter, sandbox leave, stop; of events: exit, exec.
    pub command: String,
    /// Process asked about, or the first one that was worked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<i32>,
    /// Processes asked about, of a request for many; in the result those in which it was done.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub targets: Vec<i32>,
    /// Name or number of the patch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patch: Option<String>,
    /// SHA-256 of the patch as `list` shows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// The files that were sent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<FileDigest>,
    /// The key that signed the patch, of those that the agent trusts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signed_by: Option<String>,
    /// The functions: asked for in the intent, replaced in the result.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub functions: Vec<String>,
    /// "done", or the class of the failure; of events "ended" or "replaced".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<String>,
    /// Why it failed; of events what went with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// How long it took, microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_us: Option<u64>,
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    /// User.
    pub uid: u32,
    /// Process.
    pub pid: i32,
}

/// Writes the log.
#[derive(Debug)]
pub struct AuditLog {
    path: PathBuf,
    number: u64,
    journal: Option<Journal>,
}

impl AuditLog {
    /// A log at `path`; makes the file and its directory, and checks that both can be trusted.
    ///
    /// # Errors
    /// They can't be made or are not ours alone.
    pub fn open(path: &Path) -> Result<Self, AuditError> {
        let failed = |why: String| AuditError { path: path.to_owned(), why };
        if let Some(directory) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            match DirBuilder::new().mode(0o700).create(directory) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(failed(format!("{}: {error}", directory.display())));
                }
                _ => {}
            }
            check_folder(directory).map_err(|why| failed(format!("{}: {why}", directory.display())))?;
        }
        let log = Self { path: path.to_owned(), number: 0, journal: None };
        log.file().map_err(|error| failed(error.to_string()))?;
        Ok(log)
    }

    /// The same, with a copy of each record for the system's journal.
    #[must_use]
    pub fn with_journal(self, journal: Option<Journal>) -> Self {
        Self { journal, ..self }
    }

    fn file(&self) -> io::Result<File> {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(&self.path)?;
        let facts = file.metadata()?;
        if !facts.is_file() {
            return Err(io::Error::other("it is not a regular file"));
        }
        if facts.uid() != nix::unistd::geteuid().as_raw() || facts.mode() & 0o022 != 0 {
            return Err(io::Error::other("others can write it"));
        }
        Ok(file)
    }

    /// Appends one record, in one write.
    ///
    /// # Errors
    /// The disk is full, or the file can't be trusted any more.
    pub fn append(&self, record: &Record) -> Result<(), AuditError> {
        let failed = |why: String| AuditError { path: self.path.clone(), why };
        let mut line = serde_json::to_string(record).map_err(|error| failed(error.to_string()))?;
        line.push('\n');
        let written = crate::fault::touch("touch.log").and_then(|()| self.file());
        let written = written.and_then(|mut file| file.write_all(line.as_bytes()));
        written.map_err(|error| failed(error.to_string()))?;
        if let Some(journal) = &self.journal {
            journal.send(record, line.trim_end());
        }
        Ok(())
    }

    /// The record to write before `request` is tried; none: it changes nothing.
    pub fn intent(&mut self, client: Client, request: &Request) -> Option<Record> {
        let mut record = self.next(Phase::Intent, client);
        let command = match request {
            Request::Attach(request) => {
                record.target = Some(request.pid);
                "attach"
            }
            Request::Patch(request) => {
                record.target = request.pid;
                note_patch(&mut record, request)
            }
            Request::Revert(request) => {
                record.target = request.pid;
                record.patch = request.patch.as_deref().map(shortened);
                "revert"
            }
            Request::Detach(request) => {
                record.target = request.pid;
                if request.revert { "detach --revert" } else { "detach" }
            }
            Request::Sandbox(SandboxRequest { action: SandboxAction::Status | SandboxAction::Dump, .. }) => {
                return None;
            }
            Request::Sandbox(request) => {
                record.target = request.pid;
                sandbox_command(request.action)
            }
            Request::Scoped(request) => {
                record.targets = request.members.iter().map(|member| member.pid).collect();
                match &request.work {
                    ScopedWork::Attach { .. } => "attach",
                    ScopedWork::Patch(request) => note_patch(&mut record, request),
                }
            }
            Request::Shutdown => "stop",
            Request::Status(_) | Request::List(_) => return None,
        };
        command.clone_into(&mut record.command);
        self.number = record.number;
        Some(record)
    }

    /// The record of what an attached process did by itself.
    pub fn event(&mut self, news: &News) -> Record {
        let agent = Client { uid: nix::unistd::geteuid().as_raw(), pid: nix::unistd::getpid().as_raw() };
        let mut record = self.next(Phase::Event, agent);
        self.number = record.number;
        record.target = Some(news.target);
        let (command, result, mut message) = match &news.fate {
            Fate::Ended => ("exit", "ended", format!("process {}", news.pid)),
            Fate::RunsOther(program) => {
                ("exec", "replaced", format!("process {} runs {} now", news.pid, shortened(program)))
            }
        };
        if !news.patches.is_empty() {
            let names: Vec<_> = news.patches.iter().map(|name| shortened(name)).collect();
            message.push_str(&format!("; with it went its patches: {}", names.join(", ")));
        }
        command.clone_into(&mut record.command);
        record.result = Some(result.to_owned());
        record.message = Some(message.chars().take(4 * NAME_LIMIT).collect());
        record
    }

    fn next(&self, phase: Phase, who: Client) -> Record {
        Record {
            time: timestamp(),
            phase,
            agent: nix::unistd::getpid().as_raw(),
            number: self.number + 1,
            uid: who.uid,
            pid: who.pid,
            command: String::new(),
            target: None,
            targets: Vec::new(),
            patch: None,
            sha256: None,
            files: Vec::new(),
            signed_by: None,
            functions: Vec::new(),
            result: None,
            message: None,
            duration_us: None,
        }
    }
}

/// What is to go in; gives the word for it.
fn note_patch(record: &mut Record, request: &PatchRequest) -> &'static str {
    record.patch = request.name.as_deref().map(shortened);
    record.functions = request.functions.iter().map(|name| shortened(name)).collect();
    record.files = request.files.iter().map(FileDigest::of).collect();
    if request.dry_run { "check" } else { "patch" }
}

/// The words for a command of the sandbox.
pub(super) fn sandbox_command(action: SandboxAction) -> &'static str {
    match action {
        SandboxAction::Enter => "sandbox enter",
        SandboxAction::Leave => "sandbox leave",
        SandboxAction::Status => "sandbox status",
        SandboxAction::Dump => "sandbox dump",
    }
}

impl Record {
    /// The record that tells what came of this intent.
    #[must_use]
    pub fn result(mut self, reply: &Reply, took: Duration) -> Self {
        self.time = timestamp();
        self.phase = Phase::Result;
        self.duration_us = Some(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        self.result = Some("done".to_owned());
        match reply {
            Reply::Attached(report) => self.target = Some(report.target.pid),
            Reply::Patched(report) | Reply::Reverted(report) => {
                // Nobody need name the only target; its first process is told then.
                self.target = self.target.or_else(|| report.processes.first().map(|process| process.pid));
                self.patch = Some(shortened(&report.patch.name));
                self.sha256 = Some(report.patch.sha256.clone());
                self.functions = report.patch.functions.iter().map(|function| shortened(&function.name)).collect();
            }
            Reply::Detached(report) => self.target = Some(report.pid),
            Reply::Failed(Failure { kind, message, .. }) => {
                let kind = serde_json::to_value(kind).ok();
                self.result = kind.and_then(|kind| kind.as_str().map(str::to_owned));
                self.message = Some(message.chars().take(4 * NAME_LIMIT).collect());
            }
            Reply::Sandbox(report) => self.target = Some(report.pid),
            Reply::Scoped(report) => self.note_scoped(report),
            Reply::Status(_) | Reply::Bye | Reply::Progress(_) => {}
        }
        self
    }
}

impl Record {
    fn note_scoped(&mut self, report: &ScopedReport) {
        self.targets.clear();
        for target in &report.targets {
            match &target.outcome {
                ScopedOutcome::Failed(_) => continue,
                ScopedOutcome::Attached(_) => {}
                ScopedOutcome::Patched(report) => {
                    self.patch = Some(shortened(&report.patch.name));
                    self.sha256 = Some(report.patch.sha256.clone());
                }
            }
            self.targets.push(target.pid);
        }
        if let Some(Failure { kind, message, .. }) = report.failure() {
            let kind = serde_json::to_value(kind).ok();
            self.result = kind.and_then(|kind| kind.as_str().map(str::to_owned));
            self.message = Some(message.chars().take(4 * NAME_LIMIT).collect());
        }
    }
}

impl FileDigest {
    fn of(file: &PatchFile) -> Self {
        let sha256 = hex(&Sha256::digest(&file.bytes));
        Self { name: shortened(&file.name), sha256 }
    }
}

fn shortened(name: &str) -> String {
    name.chars().take(NAME_LIMIT).collect()
}

fn timestamp() -> String {
    humantime::format_rfc3339_millis(SystemTime::now()).to_string()
}

/// Whoever can write in the folder could put another file in the log's place.
fn check_folder(path: &Path) -> Result<(), String> {
    let facts = std::fs::metadata(path).map_err(|error| error.to_string())?;
    let us = nix::unistd::geteuid().as_raw();
    if facts.uid() != us && facts.uid() != 0 {
        return Err(format!("it belongs to user {}, and must be of user {us} or root", facts.uid()));
    }
    // In a folder like /tmp nobody can move another user's file.
    if facts.mode() & 0o022 != 0 && facts.mode() & libc::S_ISVTX == 0 {
        return Err(format!("others can write it (mode {:04o}); close it with chmod go-w", facts.mode() & 0o7777));
    }
    Ok(())
}

/// The last `count` records of a log, oldest first, and how many lines among those read were none.
///
/// # Errors
/// The file can't be read.
pub fn last_records(path: &Path, count: usize) -> io::Result<(Vec<Record>, usize)> {
    let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let start = file.metadata()?.len().saturating_sub(TAIL);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(2 * TAIL).read_to_end(&mut bytes)?;
    // The first line is a part of one unless the file was read from its start.
    let whole =
        if start == 0 { 0 } else { bytes.iter().position(|&byte| byte == b'\n').map_or(bytes.len(), |end| end + 1) };
    let mut records = Vec::new();
    let mut damaged = 0;
    for line in bytes[whole..].split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
        match serde_json::from_slice::<Record>(line) {
            Ok(record) => records.push(record),
            Err(_) => damaged += 1,
        }
    }
    let surplus = records.len().saturating_sub(count);
    Ok((records.split_off(surplus), damaged))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{AttachRequest, Consistency, Mechanism, StatusRequest};

    const CLIENT: Client = Client { uid: 0, pid: 77 };

    fn log() -> (tempfile::TempDir, PathBuf, AuditLog) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("log/audit.jsonl");
        let log = AuditLog::open(&path).expect("a new log");
        (dir, path, log)
    }

    fn patch(name: &str) -> Request {
        Request::Patch(PatchRequest {
            pid: Some(5),
            functions: vec!["f".to_owned()],
            address: None,
            files: vec![PatchFile { name: "fix.o".to_owned(), bytes: b"abc".to_vec(), signature: None }],
            name: Some(name.to_owned()),
            dry_run: false,
            timeout_ms: 1,
            consistency: Consistency::Quiescent,
            mechanism: Mechanism::Auto,
        })
    }

    #[test]
    fn a_name_with_line_ends_forges_no_record() {
        let (_dir, path, mut log) = log();
        let evil = "x\"}\n{\"time\":\"forged\"}\r\n\u{1b}[2J";
        let intent = log.intent(CLIENT, &patch(evil)).expect("changes something");
        log.append(&intent).expect("written");
        let failure = Failure::refused("no such function", "look again");
        log.append(&intent.result(&Reply::Failed(failure), Duration::from_millis(3))).expect("written");
        let text = std::fs::read_to_string(&path).expect("readable");
        assert_eq!(text.lines().count(), 2);
        assert!(!text.contains('\u{1b}'));
        let (records, damaged) = last_records(&path, 10).expect("readable");
        assert_eq!((records.len(), damaged), (2, 0));
        assert_eq!(records[0].patch.as_deref(), Some(evil));
        assert_eq!(records[0].files[0].sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(records[1].result.as_deref(), Some("refused"));
        assert_eq!(records[1].duration_us, Some(3000));
        assert_eq!(records[0].number, records[1].number);
    }

    #[test]
    fn only_changing_requests_are_logged_and_each_has_its_number() {
        let (_dir, _path, mut log) = log();
        assert!(log.intent(CLIENT, &Request::Status(StatusRequest::default())).is_none());
        let numbers =
            [Request::Attach(AttachRequest { pid: 5, only: false, require_signature: false }), Request::Shutdown]
                .map(|request| log.intent(CLIENT, &request).expect("changes something").number);
        assert_eq!(numbers, [1, 2]);
    }

    #[test]
    fn a_link_or_a_file_that_others_can_write_is_no_log() {
        let (dir, path, log) = log();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).expect("symlink");
        AuditLog::open(&link).expect_err("a link");
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).expect("chmod");
        let record = AuditLog::intent(
            &mut AuditLog { path: path.clone(), number: 0, journal: None },
            CLIENT,
            &Request::Shutdown,
        );
        log.append(&record.expect("changes something")).expect_err("others can write it");
    }

    #[test]
    fn a_folder_that_others_can_write_holds_no_log() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("a temporary directory");
        let open = |mode| {
            std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(mode)).expect("chmod");
            AuditLog::open(&dir.path().join("audit.jsonl"))
        };
        let refusal = open(0o777).expect_err("others can write").to_string();
        assert!(refusal.contains("mode 0777") && refusal.contains("chmod go-w"), "{refusal}");
        open(0o770).expect_err("a group can write");
        open(0o1777).expect("a folder like /tmp");
        open(0o755).expect("others can look");
    }

    #[test]
    fn damaged_lines_are_counted_and_the_last_records_are_shown() {
        let (_dir, path, mut log) = log();
        std::fs::write(&path, "{\"half\": \n").expect("write");
        for _ in 0..5 {
            let record = log.intent(CLIENT, &Request::Shutdown).expect("changes something");
            log.append(&record).expect("written");
        }
        let (records, damaged) = last_records(&path, 2).expect("readable");
        assert_eq!(records.iter().map(|record| record.number).collect::<Vec<_>>(), [4, 5]);
        assert_eq!(damaged, 1);
    }
}
