//! The command line: one file per subcommand, each thin. They read options, ask the agent, and render what it says. What a
//! request means is the engine's business.

mod agent;
mod attach;
mod build;
mod check;
mod client;
mod completions;
mod context;
mod detach;
mod doctor;
mod files;
mod inspect;
mod interrupt;
mod keygen;
mod list;
mod log;
mod man;
mod patch;
mod progress;
mod report;
mod revert;
mod run;
mod sandbox;
mod scope;
mod sign;
mod signing;
mod status;
mod stop;
mod text;
mod values;
mod verify;

use crate::{
    agent::OperationsFactory,
    report::{Failure, FailureKind},
};
use clap::{CommandFactory, Parser, Subcommand, error::ErrorKind};
use context::Global;
use std::process::ExitCode;

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  refused, failed or cancelled; the target is untouched or as before
  2  the command line or the request makes no sense
  3  partly done: in some processes, not in others
  4  timed out: no moment at which the functions were unused

Examples:
  asap attach --pid 1234
  asap patch --function ap_byterange_filter fix.o
  asap status
  asap revert
  asap detach --revert

Environment:
  ASAP_SOCKET     as --socket
  ASAP_LOG        as --log
  ASAP_KEYS       as --keys
  ASAP_LOG_LEVEL  what the agent reports: error, warn, info, debug, trace";

/// Repair running programs: replace functions of a live process with repaired ones.
///
/// asap works from outside: no restart, no preload, no recompiled program. A process is attached once; then patches go in
/// and out while it serves its users. An agent in the background does the work; it is started when needed and ends by itself.
#[derive(Debug, Parser)]
#[command(name = "asap", version, after_help = EXIT_CODES, disable_help_subcommand = true)]
#[command(propagate_version = true, arg_required_else_help = true, subcommand_required = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Attach(attach::Attach),
    Patch(patch::Patch),
    Check(check::Check),
    Build(Box<build::Build>),
    Status(status::Status),
    List(list::List),
    Revert(revert::Revert),
    Detach(detach::Detach),
    Sandbox(sandbox::Sandbox),
    Run(run::Run),
    Doctor(doctor::Doctor),
    Inspect(inspect::Inspect),
    Log(log::Log),
    Keygen(keygen::Keygen),
    Sign(sign::Sign),
    Verify(verify::Verify),
    Agent(agent::Agent),
    Stop(stop::Stop),
    Completions(completions::Completions),
    Man(man::Man),
}

impl Command {
    fn run(self, global: &Global, factory: OperationsFactory) -> Result<ExitCode, Failure> {
        let done = match self {
            // Its exit code is that of what it runs.
            Self::Run(command) => return Ok(command.run(global)),
            Self::Attach(command) => command.run(global),
            Self::Patch(command) => command.run(global),
            Self::Check(command) => command.run(global),
            Self::Build(command) => command.run(global),
            Self::Status(command) => command.run(global),
            Self::List(command) => command.run(global),
            Self::Revert(command) => command.run(global),
            Self::Detach(command) => command.run(global),
            Self::Sandbox(command) => command.run(global),
            Self::Doctor(command) => command.run(global),
            Self::Inspect(command) => command.run(global),
            Self::Log(command) => command.run(global),
            Self::Keygen(command) => command.run(global),
            Self::Sign(command) => command.run(global),
            Self::Verify(command) => command.run(global),
            Self::Agent(command) => command.run(global, factory),
            Self::Stop(command) => command.run(global),
            Self::Completions(command) => command.run(global),
            Self::Man(command) => command.run(global),
        };
        done.map(|()| ExitCode::SUCCESS)
    }
}

/// The whole program: reads the command line, does it, and gives the exit code. `factory` makes the engine of an agent.
pub fn main(factory: OperationsFactory) -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage_error(&error, std::env::args_os().any(|argument| argument == "--json")),
    };
    match cli.command.run(&cli.global, factory) {
        Ok(code) => code,
        Err(failure) => {
            cli.global.show_failure(&failure);
            ExitCode::from(failure.kind.exit_code())
        }
    }
}

/// Help and version are asked for on the same way; the rest is an error that a program may want to read too.
fn usage_error(error: &clap::Error, json: bool) -> ExitCode {
    let is_error = error.use_stderr() && error.kind() != ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    if json && is_error {
        let text = error.to_string();
        // What is wrong, without the usage and the hints that follow after an empty line.
        let message: Vec<_> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
        let message = message.join(" ");
        let message = message.trim_start_matches("error: ");
        let failure = Failure { kind: FailureKind::Usage, ..Failure::refused(message, "asap --help") };
        let document = serde_json::json!({ "failed": failure });
        let _ = context::print(&format!("{document:#}\n"));
    } else {
        let _ = error.print();
    }
    ExitCode::from(if error.use_stderr() { FailureKind::Usage.exit_code() } else { 0 })
}

/// The command tree, for completions and man pages.
fn tree() -> clap::Command {
    Cli::command()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_tree_is_sound() {
        tree().debug_assert();
    }

    #[test]
    fn every_command_has_help_and_examples() {
        for command in tree().get_subcommands() {
            assert!(command.get_about().is_some(), "{} lacks help", command.get_name());
            let examples = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(examples.starts_with("Examples:\n  asap "), "{} lacks examples", command.get_name());
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{} {} lacks help", command.get_name(), argument.get_id());
            }
        }
    }
}
