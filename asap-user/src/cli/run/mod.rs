//! `asap run`: a program in the sandbox from its first instruction.

mod program;

use super::{
    client::{self, unexpected},
    context::{Global, require_root, shown},
    sandbox::{GuardOptions, status, violations_of, write_learned},
};
use crate::{
    agent::DEFAULT_IDLE_EXIT,
    report::{Failure, FailureKind, Reply, Request, SandboxAction, SandboxRequest, TargetState},
};
use nix::unistd::User;
use program::{Program, StartError};
use std::{ffi::OsString, path::PathBuf, process::ExitCode};

/// Exit codes that coreutils' env(1), timeout(1) and others have made usual.
const OWN_FAILURE: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

/// Run a program in the sandbox, from its first instruction.
///
/// It has this terminal, standard input and output, environment and user, and gets the signals that are sent to asap. When it
/// ends, asap ends in the same way.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  asap run -- nginx -g 'daemon off;'
  asap run --guards shadow-stack,cfi,nx --user www-data -- ./server --port 8080
  asap run --learn web.toml -- nginx -g 'daemon off;'

Exit codes:
  that of the program, or 128 + N where signal N ended it
  125  asap could not take it into the sandbox; it did not run
  126  the program is there, but can't be run
  127  there is no such program")]
pub struct Run {
    #[command(flatten)]
    guards: GuardOptions,
    /// Note which system calls it makes, and write the policy that allows just these when it ends.
    #[arg(long, value_name = "FILE")]
    learn: Option<PathBuf>,
    /// Run it as this user, with that user's groups.
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "PROGRAM")]
    program: Vec<OsString>,
}

impl Run {
    pub fn run(self, global: &Global) -> ExitCode {
        match self.to_the_end(global) {
            Ok(code) => ExitCode::from(code),
            Err((code, failure)) => {
                global.show_failure(&failure);
                ExitCode::from(code)
            }
        }
    }

    fn to_the_end(&self, global: &Global) -> Result<u8, (u8, Failure)> {
        let own = |failure: Failure| (OWN_FAILURE, failure);
        require_root("run").map_err(own)?;
        let policy = self.guards.read().map_err(own)?;
        let user = self.user.as_deref().map(find_user).transpose().map_err(own)?;
        // Before there is a program, and before signals are held back: an agent inherits what we are.
        let options = global.agent_options(Some(DEFAULT_IDLE_EXIT));
        let mut agent = client::connect_or_start(&options).map_err(own)?;
        let mut program = Program::start(&self.program, user.as_ref()).map_err(|error| self.not_started(error))?;
        let request = SandboxRequest {
            pid: Some(program.pid()),
            action: SandboxAction::Enter,
            policy,
            learns: self.learn.is_some(),
            function: None,
        };
        let is_watched = request.learns || !request.policy.guards.is_empty();
        match agent.ask(&Request::Sandbox(request)) {
            Ok(Reply::Sandbox(_)) => {}
            Ok(other) => return Err(own(unexpected(&other))),
            Err(failure) => return Err(own(not_run(failure))),
        }
        drop(agent);
        let lost = |error: std::io::Error| own(system("the program was lost", &error));
        program.release().map_err(|errno| lost(errno.into()))?;
        let end = program.wait().map_err(lost)?;
        if is_watched && let Err(failure) = self.tell(global, program.pid()) {
            // It ran, and ended as it did.
            global.show_failure(&failure);
        }
        Ok(end.code())
    }

    /// What its guards met, and what was learned.
    fn tell(&self, global: &Global, pid: i32) -> Result<(), Failure> {
        let report = status(&global.socket, Some(pid))?;
        eprint!("{}", violations_of(&report));
        self.learn.as_ref().map_or(Ok(()), |path| write_learned(path, &report))
    }

    fn not_started(&self, error: StartError) -> (u8, Failure) {
        let name = shown(self.program.first().map_or("".as_ref(), AsRef::as_ref));
        let failure = Failure::refused(format!("{name}: {error}"), "name a program as a shell would find it");
        match error {
            StartError::NotFound => (NOT_FOUND, failure),
            StartError::NotExecutable(_) => (NOT_EXECUTABLE, failure),
            StartError::Ended(signal) => (program::End::Signal(signal as i32).code(), failure),
            StartError::Argument | StartError::System(..) => (OWN_FAILURE, failure),
        }
    }
}

/// The program was ended before it began: that is how the target is now.
fn not_run(failure: Failure) -> Failure {
    let message = format!("the program was not run: {}", failure.message);
    Failure { message, state: TargetState::Gone, ..failure }
}

fn find_user(name: &str) -> Result<User, Failure> {
    match User::from_name(name) {
        Ok(Some(user)) => Ok(user),
        Ok(None) => Err(Failure {
            kind: FailureKind::Usage,
            ..Failure::refused(format!("there is no user {name}"), "see getent passwd for those that are")
        }),
        Err(errno) => Err(system("users can't be looked up", &errno.into())),
    }
}

fn system(what: &str, error: &std::io::Error) -> Failure {
    Failure { kind: FailureKind::Failed, ..Failure::refused(format!("{what}: {error}"), "see `asap log`") }
}
