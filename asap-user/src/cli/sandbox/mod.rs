//! `asap sandbox`.

mod dump;
mod guards;
mod learned;
mod show;
mod top;

pub use guards::GuardOptions;
pub use learned::write as write_learned;
pub use show::violations_of;

use super::{
    client::{ask, ask_or_start, unexpected},
    context::{Global, require_root},
};
use crate::{
    agent::DEFAULT_IDLE_EXIT,
    report::{Failure, Reply, Request, SandboxAction, SandboxReport, SandboxRequest},
};
use std::path::{Path, PathBuf};

/// Run a live process in the sandbox, and take it out again.
///
/// In the sandbox, code runs out of pages that asap holds, one page after the other as threads first come to it. The file's own text
/// is kept aside and comes back when the process leaves. Children are in with their parent; a program that is started by
/// execve(2) is not. Patches go in and out as ever, and stay when the sandbox is left.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  asap sandbox enter --pid 1234
  asap sandbox enter --pid 1234 --guards shadow-stack,cfi,nx --action log
  asap sandbox status
  asap sandbox top
  asap sandbox leave")]
#[command(arg_required_else_help = true, subcommand_required = true, disable_help_subcommand = true)]
pub struct Sandbox {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Take a process in, with its descendants that run the same executable. It is attached first if it is not yet.
    #[command(after_help = "\
Examples:
  asap sandbox enter --pid 1234
  asap sandbox enter --pid 1234 --guards shadow-stack,cfi --action log
  asap sandbox enter --pid 1234 --policy web.toml
  asap sandbox enter --pid 1234 --learn")]
    Enter(Enter),
    /// Take it out again; text and memory map are then what they were.
    #[command(after_help = "Examples:\n  asap sandbox leave --pid 1234\n  asap sandbox leave --learned web.toml")]
    Leave(Leave),
    /// Show what runs in the sandbox, what runs natively and why, and what the guards have met.
    #[command(after_help = "Examples:\n  asap sandbox status --pid 1234 --json")]
    Status(Target),
    /// Show the same every second, with what happens per second; q ends it.
    #[command(after_help = "Examples:\n  asap sandbox top\n  asap sandbox top --once")]
    Top(top::Top),
    /// Show the code of a function: the file's beside what runs.
    #[command(
        after_help = "Examples:\n  asap sandbox dump --function ap_read_request\n  asap sandbox dump --function 0x555555559000 --json"
    )]
    Dump(dump::Dump),
    /// Write the policy that allows just the system calls that were seen since `enter --learn`.
    #[command(
        after_help = "Examples:\n  asap sandbox learned\n  asap sandbox learned --default \"errno EPERM\" --output web.toml"
    )]
    Learned(learned::Learned),
}

#[derive(Debug, clap::Args)]
struct Target {
    /// The target; may be left out when there is one only.
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
}

#[derive(Debug, clap::Args)]
struct Enter {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    guards: GuardOptions,
    /// Note which system calls are made; `learned` and `leave --learned` make a policy of them.
    #[arg(long)]
    learn: bool,
}

#[derive(Debug, clap::Args)]
struct Leave {
    #[command(flatten)]
    target: Target,
    /// First write what was learned of its system calls to this file, as a policy.
    #[arg(long, value_name = "FILE")]
    learned: Option<PathBuf>,
}

impl Sandbox {
    pub fn run(self, global: &Global) -> Result<(), Failure> {
        match self.action {
            Action::Enter(enter) => enter.run(global),
            Action::Leave(leave) => leave.run(global),
            Action::Status(target) => {
                require_root("sandbox status")?;
                let request = SandboxRequest { pid: target.pid, ..SandboxRequest::default() };
                shown(global, &Request::Sandbox(request), SandboxAction::Status)
            }
            Action::Top(top) => top.run(global),
            Action::Dump(dump) => dump.run(global),
            Action::Learned(learned) => learned.run(global),
        }
    }
}

impl Enter {
    fn run(&self, global: &Global) -> Result<(), Failure> {
        require_root("sandbox enter")?;
        let request = SandboxRequest {
            pid: self.target.pid,
            action: SandboxAction::Enter,
            policy: self.guards.read()?,
            learns: self.learn,
            function: None,
        };
        let reply = ask_or_start(&global.agent_options(Some(DEFAULT_IDLE_EXIT)), &Request::Sandbox(request))?;
        let Reply::Sandbox(report) = &reply else { return Err(unexpected(&reply)) };
        global.show(&reply, || show::report(report, SandboxAction::Enter))
    }
}

impl Leave {
    fn run(&self, global: &Global) -> Result<(), Failure> {
        require_root("sandbox leave")?;
        let pid = self.target.pid;
        if let Some(path) = &self.learned {
            learned::write(path, &status(&global.socket, pid)?)?;
        }
        let request = SandboxRequest { pid, action: SandboxAction::Leave, ..SandboxRequest::default() };
        shown(global, &Request::Sandbox(request), SandboxAction::Leave)
    }
}

fn shown(global: &Global, request: &Request, action: SandboxAction) -> Result<(), Failure> {
    let reply = ask(&global.socket, request)?;
    let Reply::Sandbox(report) = &reply else { return Err(unexpected(&reply)) };
    global.show(&reply, || show::report(report, action))
}

/// How the target runs, or ran.
pub fn status(socket: &Path, pid: Option<i32>) -> Result<SandboxReport, Failure> {
    match ask(socket, &Request::Sandbox(SandboxRequest { pid, ..SandboxRequest::default() }))? {
        Reply::Sandbox(report) => Ok(report),
        other => Err(unexpected(&other)),
    }
}
