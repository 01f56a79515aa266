//! The words that engine, agent and command line share: what can be asked, what is reported, how a refusal looks.
//! Plain data, serialised as it is over the agent's socket and by `--json`.

use crate::{
    address::TargetAddr,
    sandbox::{
        Violation,
        policy::{Learned, Policy},
    },
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, os::fd::BorrowedFd, time::Duration};

/// What a client asks of the agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Take a process (and its descendants of the same executable) into care.
    Attach(AttachRequest),
    /// Replace functions.
    Patch(PatchRequest),
    /// Take a patch out again.
    Revert(RevertRequest),
    /// Leave a target; patches stay unless asked otherwise.
    Detach(DetachRequest),
    /// What is attached and in what state.
    Status(StatusRequest),
    /// Which patches are in.
    List(StatusRequest),
    /// Run a target in the sandbox, or natively again, or tell how it runs.
    Sandbox(SandboxRequest),
    /// One of these for all processes that a selector found.
    Scoped(ScopedRequest),
    /// End the agent; targets stay as they are.
    Shutdown,
}

/// `--exe`, `--lib`, `--unit`, `--all-with-build-id`: one request for many processes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ScopedRequest {
    /// The processes.
    pub members: Vec<Member>,
    /// What can't be done to all of them is done to none.
    pub all_or_none: bool,
    /// What to do.
    pub work: ScopedWork,
}

/// A process, named for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Member {
    /// Its pid.
    pub pid: i32,
    /// When it started, clock ticks since boot: the pid may be another's by now.
    pub start_time: u64,
}

/// What is done to many processes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum ScopedWork {
    /// Take them into care. Descendants come along, as with one.
    Attach {
        /// Those processes alone, without their descendants.
        only: bool,
        /// From now on the agent accepts signed patches only, until it ends.
        #[serde(default)]
        require_signature: bool,
    },
    /// Replace functions; what is not attached yet is attached first.
    Patch(PatchRequest),
}

/// `asap sandbox`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SandboxRequest {
    /// The target; none: the only one there is. To enter, it need not be attached yet.
    pub pid: Option<i32>,
    /// What to do.
    pub action: SandboxAction,
    /// To enter: what is checked inside. A process that is inside already is checked by this from now on.
    #[serde(default)]
    pub policy: Policy,
    /// To enter: system calls are noted, to make a policy of them.
    #[serde(default)]
    pub learns: bool,
    /// To dump: a function, as the user wrote it, or an address (`0x...`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub function: Option<String>,
}

/// What to do about the sandbox.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SandboxAction {
    /// Go in.
    Enter,
    /// Come out.
    Leave,
    /// Tell.
    #[default]
    Status,
    /// Show the code of a function, native and translated.
    Dump,
}

/// `asap attach`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AttachRequest {
    /// Process to attach to.
    pub pid: i32,
    /// That process alone, without its descendants.
    pub only: bool,
    /// From now on the agent accepts signed patches only, until it ends.
    #[serde(default)]
    pub require_signature: bool,
}

/// `asap patch`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PatchRequest {
    /// The attached target (root process); none: the only one there is.
    pub pid: Option<i32>,
    /// Functions to replace, as the user wrote them (`f`, `file.c:f`, demangled names); empty: what the objects declare.
    pub functions: Vec<String>,
    /// Address of the function where its name is ambiguous (as `asap` printed it: an address in the image file).
    pub address: Option<u64>,
    /// The object files.
    pub files: Vec<PatchFile>,
    /// A name for the patch; none: derived from the first file's name.
    pub name: Option<String>,
    /// Say what would happen, change nothing.
    pub dry_run: bool,
    /// Give up after so many milliseconds without a quiescent moment.
    pub timeout_ms: u64,
    /// Whether old activations must have ended.
    pub consistency: Consistency,
    /// How the new code is reached.
    pub mechanism: Mechanism,
}

/// One object file of a patch, sent by content: the agent opens no paths on behalf of a client.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PatchFile {
    /// File name, for messages only.
    pub name: String,
    /// The file's bytes.
    #[serde(with = "base64_bytes")]
    pub bytes: Vec<u8>,
    /// The text of its detached signature, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<String>,
}

/// `asap revert`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RevertRequest {
    /// The attached target; none: the only one there is.
    pub pid: Option<i32>,
    /// Patch name or id; none: the newest.
    pub patch: Option<String>,
    /// Give up after so many milliseconds.
    pub timeout_ms: u64,
    /// Whether activations of the patch must have ended.
    pub consistency: Consistency,
}

/// `asap detach`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DetachRequest {
    /// The attached target; none: the only one there is.
    pub pid: Option<i32>,
    /// Revert all patches first, and leave no trace.
    pub revert: bool,
    /// Time limit of the reverts, milliseconds.
    pub timeout_ms: u64,
}

/// `asap status`, `asap list`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct StatusRequest {
    /// One target; none: all.
    pub pid: Option<i32>,
}

/// When new code may be installed (promise P3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Consistency {
    /// No thread is inside the old function.
    #[default]
    Quiescent,
    /// At once; old activations finish in old code.
    Lazy,
}

/// How calls reach the new function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mechanism {
    /// The best that works here.
    #[default]
    Auto,
    /// A jump at the function's entry, installed by exchanging the text page.
    Page,
    /// An eBPF uprobe program that writes the instruction pointer; needs a kernel that lets it (`asap doctor`), and costs each
    /// call a trap.
    Redirect,
}

/// A patch's number, unique within a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PatchId(pub u32);

/// What the agent answers, one per line; any number of `Progress`, then one of the others.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// Still at it.
    Progress(Progress),
    /// Answer to `Attach`.
    Attached(AttachReport),
    /// Answer to `Patch`.
    Patched(PatchReport),
    /// Answer to `Revert`.
    Reverted(PatchReport),
    /// Answer to `Detach`.
    Detached(DetachReport),
    /// Answer to `Status` and `List`.
    Status(StatusReport),
    /// Answer to `Sandbox`.
    Sandbox(SandboxReport),
    /// Answer to `Scoped`.
    Scoped(ScopedReport),
    /// Answer to `Shutdown`.
    Bye,
    /// Refused or failed.
    Failed(Failure),
}

/// A step of a longer operation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done, for a person.
    pub step: String,
    /// Part done, 0.0..=1.0, where known.
    pub fraction: Option<f64>,
}

/// What `attach` did.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AttachReport {
    /// The target's state after attach.
    pub target: TargetReport,
    /// An earlier agent's patches were found in it and taken over.
    pub adopted: bool,
    /// Time from request to end, microseconds.
    pub total_us: u64,
    /// Longest stop of one thread, microseconds.
    pub longest_stop_us: u64,
}

/// One attached target: a process and those of its descendants that run the same executable.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TargetReport {
    /// The process that was attached to.
    pub pid: i32,
    /// Its executable, as the target sees it.
    pub executable: String,
    /// Build-id of the executable, hex, where it has one.
    pub build_id: Option<String>,
    /// All processes of the target.
    pub processes: Vec<ProcessReport>,
    /// Patches, oldest first.
    pub patches: Vec<InstalledPatch>,
    /// Things the administrator should know (foreign breakpoints, fall-backs in use).
    pub notes: Vec<String>,
}

/// One process of a target.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProcessReport {
    /// Process id.
    pub pid: i32,
    /// Number of threads.
    pub threads: usize,
    /// Patches active in it.
    pub patches: Vec<PatchId>,
}

/// A patch that is in.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct InstalledPatch {
    /// Number within the target.
    pub id: PatchId,
    /// Name.
    pub name: String,
    /// SHA-256 of the object files, hex.
    pub sha256: String,
    /// When it went in, seconds since the epoch.
    pub installed_at: u64,
    /// How calls reach it: never `auto`.
    pub mechanism: Mechanism,
    /// The functions it replaces.
    pub functions: Vec<FunctionReport>,
}

/// One replaced function.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FunctionReport {
    /// Name, demangled.
    pub name: String,
    /// Path of the module it lives in, as the target sees it.
    pub module: String,
    /// Entry of the function in the target.
    pub old: TargetAddr,
    /// Entry of its replacement; equal in all processes of a target that were forked after the patch, else of the first.
    pub new: TargetAddr,
}

/// What `patch` or `revert` did.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PatchReport {
    /// The patch.
    pub patch: InstalledPatch,
    /// Per process.
    pub processes: Vec<ProcessPatchReport>,
    /// Nothing was changed.
    pub dry_run: bool,
    /// It was in already, in all processes: nothing was to be done.
    #[serde(default)]
    pub already: bool,
    /// From request to active everywhere, microseconds.
    pub total_us: u64,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// What happened in one process.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ProcessPatchReport {
    /// Process id.
    pub pid: i32,
    /// How quiescence was established, for a person ("gate and stack walks", "stop all", "lazy").
    pub quiescence: String,
    /// How often it was tried with closed gates, or with all threads stopped.
    pub attempts: u32,
    /// Threads it has.
    pub threads: usize,
    /// Threads that were stopped for a look at their stack.
    pub threads_stopped: usize,
    /// Longest of those stops, microseconds.
    pub longest_stop_us: u64,
    /// Threads that waited at a closed gate.
    pub threads_parked: usize,
    /// Longest time a gate was closed, microseconds: the upper bound of any thread's wait.
    pub longest_gate_us: u64,
}

/// What `detach` did.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DetachReport {
    /// The target that was left.
    pub pid: i32,
    /// Patches taken out.
    pub reverted: Vec<InstalledPatch>,
    /// Patches that stay.
    pub remaining: Vec<InstalledPatch>,
    /// Text bytes and memory map were compared with the state before attach and are the same.
    pub clean: Option<bool>,
}

/// How a target runs, after `asap sandbox`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SandboxReport {
    /// The target.
    pub pid: i32,
    /// Its processes.
    pub processes: Vec<SandboxProcess>,
    /// Those of them that are inside, by the translated code that they share.
    #[serde(default)]
    pub families: Vec<SandboxFamily>,
    /// The function that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dump: Option<CodeDump>,
    /// From request to end, microseconds.
    pub total_us: u64,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// Processes that have the same translated code, and the same policy: one that entered, and those that it has forked since.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxFamily {
    /// The processes.
    pub pids: Vec<i32>,
    /// What is checked in them.
    pub policy: Policy,
    /// Pages of code that were translated.
    pub pages: u64,
    /// Bytes of fragments: translated code beside the pages.
    pub fragments: u64,
    /// What became of the instructions that guards are about, in the pages that were translated.
    pub sites: Vec<SiteCount>,
    /// How often a thread was stopped and asked about, by what it was about to do.
    pub stops: BTreeMap<String, u64>,
    /// The last violations, oldest first.
    pub violations: Vec<Violation>,
    /// How many there were.
    pub violation_count: u64,
    /// Pages that run natively, and why.
    pub refused: Vec<String>,
    /// What was learned of its system calls, if it is to be learned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learned: Option<Learned>,
}

/// Instructions that a guard is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteCount {
    /// What they are: "return", "indirect call", ...
    pub kind: String,
    /// They are guarded, or need not be; else they run natively.
    pub is_guarded: bool,
    /// How they are guarded, or why not.
    pub reason: String,
    /// How many.
    pub count: u64,
}

/// A function's code, as the file has it and as it runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodeDump {
    /// The process that it was read from.
    pub pid: i32,
    /// The function.
    pub function: String,
    /// Path of the module it lies in, as the target sees it.
    pub module: String,
    /// The file's code.
    pub native: CodeBytes,
    /// What is in its place now. None: it has not run in the sandbox.
    pub translated: Option<CodeBytes>,
    /// Code beside it that it jumps to and comes back from.
    pub fragments: Vec<CodeFragment>,
}

/// Code at a place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodeBytes {
    /// Where it lies in the process.
    pub at: TargetAddr,
    /// The bytes.
    #[serde(with = "base64_bytes")]
    pub bytes: Vec<u8>,
}

/// Code that stands for some instructions of a function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodeFragment {
    /// The first native instruction that it stands for.
    pub of: TargetAddr,
    /// What it is: "return", "indirect call", "displaced", ...
    pub kind: String,
    /// The code.
    pub code: CodeBytes,
}

/// How one process runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxProcess {
    /// Process id.
    pub pid: i32,
    /// It is in the sandbox.
    pub inside: bool,
    /// Since when, seconds since the epoch; a forked child tells its parent's time.
    pub since: Option<u64>,
    /// Text mappings in the sandbox.
    pub texts: usize,
    /// Their pages.
    pub pages: u64,
    /// How often a thread waited for a page, since this agent cares for it.
    pub traps: u64,
    /// Code that runs natively.
    pub native: Vec<crate::sandbox::NativeCode>,
}

/// `status` and `list`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StatusReport {
    /// The agent's pid.
    pub agent: i32,
    /// Its version.
    pub version: String,
    /// All attached targets.
    pub targets: Vec<TargetReport>,
}

/// What became of a request for many processes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ScopedReport {
    /// Per target: a process that was asked for, with its descendants.
    pub targets: Vec<ScopedResult>,
    /// From request to end, microseconds.
    pub total_us: u64,
}

/// What became of one target.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ScopedResult {
    /// Its first process; where it can't be attached, the process that was asked for.
    pub pid: i32,
    /// Processes that were asked for and belong to it.
    pub members: Vec<i32>,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: ScopedOutcome,
}

/// What became of one target.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScopedOutcome {
    /// It is attached.
    Attached(TargetReport),
    /// It is patched.
    Patched(PatchReport),
    /// Nothing of it was changed, unless the failure says so.
    Failed(Failure),
}

impl ScopedReport {
    /// The failure that all of it amounts to; none: everything was done.
    #[must_use]
    pub fn failure(&self) -> Option<Failure> {
        let failures: Vec<(i32, &Failure)> = self
            .targets
            .iter()
            .filter_map(|target| match &target.outcome {
                ScopedOutcome::Failed(failure) => Some((target.pid, failure)),
                ScopedOutcome::Attached(_) | ScopedOutcome::Patched(_) => None,
            })
            .collect();
        let (_, first) = failures.first()?;
        let count = self.targets.len();
        let words: Vec<String> = failures.iter().take(8).map(|(pid, failure)| format!("{pid}: {failure}")).collect();
        let more = if failures.len() > 8 { format!("\nand {} others", failures.len() - 8) } else { String::new() };
        let words = format!("{}{more}", words.join("\n"));
        let way_out =
            "what failed is as it was; do what is said for each, and ask again: what is done already stays so";
        if failures.len() < count {
            return Some(Failure {
                kind: FailureKind::Partial,
                state: TargetState::PartlyDone,
                ..Failure::refused(
                    format!("done in {} of {count} targets, not in\n{words}", count - failures.len()),
                    way_out,
                )
            });
        }
        let alike = failures.iter().all(|(_, failure)| failure.kind == first.kind);
        let untouched = failures.iter().all(|(_, failure)| failure.state == TargetState::Untouched);
        Some(Failure {
            kind: if alike { first.kind } else { FailureKind::Failed },
            state: if untouched { TargetState::Untouched } else { first.state },
            ..Failure::refused(format!("done in none of {count} targets:\n{words}"), first.way_out.clone())
        })
    }
}

/// A refusal or failure, for the administrator and for scripts (promise P6).
#[derive(Clone, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Class.
    pub kind: FailureKind,
    /// What was refused and why.
    pub message: String,
    /// In which state the target is now.
    pub state: TargetState,
    /// What to do next.
    pub way_out: String,
    /// Threads that kept a function busy.
    #[serde(default)]
    pub busy: Vec<BusyThread>,
}

/// Class of a failure; decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// The request makes no sense as it stands (exit code 2).
    Usage,
    /// It does not fit; nothing was tried (exit code 1).
    Refused,
    /// It was tried and failed; rolled back (exit code 1).
    Failed,
    /// No quiescent moment within the time limit (exit code 4).
    Timeout,
    /// Given up because whoever asked for it no longer wanted it (exit code 1).
    Cancelled,
    /// Done in some processes only (exit code 3).
    Partial,
}

impl FailureKind {
    /// The process exit code for this class of failure.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Usage => 2,
            Self::Refused | Self::Failed | Self::Cancelled => 1,
            Self::Partial => 3,
            Self::Timeout => 4,
        }
    }
}

/// What a failure left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TargetState {
    /// Nothing was changed.
    Untouched,
    /// Changes were made and taken back.
    RolledBack,
    /// The target no longer exists.
    Gone,
    /// Some processes carry the change, others don't.
    PartlyDone,
    /// Nobody is left to tell; attach again to see.
    Unknown,
}

/// A thread that is inside a function to be replaced.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BusyThread {
    /// Its process.
    pub pid: i32,
    /// Thread id.
    pub tid: i32,
    /// `comm` of the thread.
    pub name: String,
    /// The function that it is inside of.
    pub inside: String,
    /// Its stack, innermost first, symbolised.
    pub stack: Vec<String>,
}

impl Failure {
    /// A refusal: nothing was tried, the target is as it was.
    #[must_use]
    pub fn refused(message: impl Into<String>, way_out: impl Into<String>) -> Self {
        Self {
            kind: FailureKind::Refused,
            message: message.into(),
            state: TargetState::Untouched,
            way_out: way_out.into(),
            busy: Vec::new(),
        }
    }

    /// It was given up while it waited; nothing was changed.
    #[must_use]
    pub fn cancelled(reason: &str) -> Self {
        Self {
            kind: FailureKind::Cancelled,
            ..Self::refused(format!("the request was cancelled: {reason}"), "ask again when you want it done")
        }
    }

    /// Something went wrong on the way and was taken back.
    #[must_use]
    pub fn rolled_back(message: impl Into<String>, way_out: impl Into<String>) -> Self {
        Self { kind: FailureKind::Failed, state: TargetState::RolledBack, ..Self::refused(message, way_out) }
    }
}

/// What the agent offers; the engine is the real one, tests put others in its place.
pub trait Operations {
    /// Takes a process into care.
    fn attach(&mut self, request: &AttachRequest, progress: &mut dyn FnMut(Progress)) -> Result<AttachReport, Failure>;
    /// Replaces functions.
    fn patch(&mut self, request: &PatchRequest, progress: &mut dyn FnMut(Progress)) -> Result<PatchReport, Failure>;
    /// Takes a patch out.
    fn revert(&mut self, request: &RevertRequest, progress: &mut dyn FnMut(Progress)) -> Result<PatchReport, Failure>;
    /// Leaves a target.
    fn detach(&mut self, request: &DetachRequest, progress: &mut dyn FnMut(Progress)) -> Result<DetachReport, Failure>;
    /// Into the sandbox, out of it, or how it stands.
    fn sandbox(
        &mut self,
        request: &SandboxRequest,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<SandboxReport, Failure>;
    /// One of these for many processes.
    fn scoped(&mut self, request: &ScopedRequest, progress: &mut dyn FnMut(Progress)) -> Result<ScopedReport, Failure>;
    /// Tells what is attached.
    fn status(&mut self, request: &StatusRequest) -> Result<StatusReport, Failure>;
    /// Tells what was attached when it last looked, without looking.
    fn known(&self) -> StatusReport;
    /// Looks after the targets (children that were forked, processes that ended, threads that have to be let go). Called after
    /// each request, when one of [`Self::alarms`] is readable, and after the time that it asked for the last time; none: it
    /// needs no time of its own.
    fn housekeeping(&mut self) -> Option<Duration>;
    /// Descriptors that are readable when there is something to look after.
    fn alarms(&self) -> Vec<BorrowedFd<'_>>;
    /// What became of attached processes by themselves since this was asked last.
    fn news(&mut self) -> Vec<News>;
}

/// A process in care went its own way, and the patches in it are gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct News {
    /// The target that it belonged to.
    pub target: i32,
    /// The process.
    pub pid: i32,
    /// What it did.
    pub fate: Fate,
    /// Names of the patches that it had.
    pub patches: Vec<String>,
}

/// How a process went out of care by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It ended.
    Ended,
    /// It runs another program now: this file.
    RunsOther(String),
}

/// Bytes as base64 in JSON.
mod base64_bytes {
    use base64::{Engine, engine::general_purpose::STANDARD};
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        STANDARD.decode(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}
