//! The one binary: client and agent.

use std::process::ExitCode;

fn main() -> ExitCode {
    asap::cli::main(Box::new(|| Box::new(asap::engine::Engine::new())))
}
