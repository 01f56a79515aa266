//! The inner half: process 1 of a guest, and, under the name of a compiler, a caller of the host's.
//! It carries no test of its own; what it does shows in the tests that run in guests.

mod boot;
mod compiler;
mod port;
mod runner;
mod setting;

use std::process::ExitCode;
use vm_tests::protocol::HOSTED;

fn main() -> ExitCode {
    let name = std::env::args().next().unwrap_or_default();
    let name = name.rsplit('/').next().unwrap_or_default();
    if HOSTED.contains(&name) {
        return compiler::ask(name);
    }
    if std::process::id() != 1 {
        eprintln!(
            "{name}: this is process 1 of a virtual machine, started by `cargo xtask vm-test`; it does nothing else"
        );
        return ExitCode::FAILURE;
    }
    // The kernel panics when process 1 ends, which is what the host should see, after the reason.
    match boot::up().and_then(|()| runner::serve()) {
        Ok(()) => boot::power_off(),
        Err(error) => println!("asap-vm-guest: {error:#}"),
    }
    ExitCode::FAILURE
}
