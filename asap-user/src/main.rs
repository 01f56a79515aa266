//! The one binary: client and agent.

use std::process::ExitCode;

fn main() -> ExitCode {
    // While `asap build` runs, this program stands in for compilers.
    if let Some(code) = asap::build::wrapper::run_if_asked() {
        return code;
    }
    asap::cli::main(Box::new(|| Box::new(asap::engine::Engine::new())))
}
