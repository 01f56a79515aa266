//! `cargo xtask`: set-up, demo, tests, benchmarks. Each command does all its own set-up on a fresh machine.

mod agent;
mod apache;
mod bench;
mod bench_build;
mod command;
mod demo;
mod ebpf;
mod fuzz;
mod http;
mod load;
mod owned;
mod peers;
mod programs;
mod sandbox_bench;
mod snapshot;
mod soak;
mod study;
mod supply;
mod test;
mod vm_test;
mod workers;

use clap::{Parser, Subcommand};
use std::process::ExitCode;
use xtask_setup as setup;

/// Tasks around asap.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Check what is needed, and install what is missing (Debian packages, as root).
    Setup,
    /// Run all tests.
    Test {
        /// Only tests whose name contains this.
        filter: Option<String>,
    },
    /// Run tests on other kernels, in virtual machines.
    VmTest(vm_test::Options),
    /// Repair a live Apache under load, and show what happened.
    Demo(demo::Options),
    /// Build the eBPF object that the library embeds (nightly tool chain).
    Ebpf {
        /// Compare the stored object with its source, change nothing.
        #[arg(long)]
        check: bool,
    },
    /// Try hostile input on every parser, with libFuzzer (nightly tool chain, cargo-fuzz).
    Fuzz(fuzz::Options),
    /// Check the licence and origin of every package that asap is built of.
    Licences,
    /// List what is in the program, as CycloneDX JSON.
    Sbom {
        /// Where to; standard output if left out.
        #[arg(long)]
        output: Option<std::path::PathBuf>,
    },
    /// Measure.
    Bench {
        /// What to measure; everything if left out.
        what: Option<bench::What>,
        /// Print the figures as JSON.
        #[arg(long)]
        json: bool,
        /// Rounds of each measurement; medians are printed.
        #[arg(long, default_value_t = 5)]
        rounds: usize,
    },
    /// Run real programs natively and in the sandbox, and compare what they do.
    Programs(programs::Options),
    /// Patch and repair servers under load for a long time: nothing may fail, nothing may grow.
    Soak(soak::Options),
    /// Make patches of real fixes from Debian's sources, and try each on the live server that it is for.
    Study(study::Options),
}

fn main() -> ExitCode {
    let task = Arguments::parse().task;
    let result = owned::clean_up_on_signals().and_then(|()| match task {
        Task::Setup => setup::run(),
        Task::Test { filter } => test::run(filter.as_deref()),
        Task::VmTest(options) => vm_test::run(&options),
        Task::Demo(options) => demo::run(options),
        Task::Ebpf { check } => ebpf::run(check),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Licences => supply::check_licences(),
        Task::Sbom { output } => supply::sbom(output.as_deref()),
        Task::Bench { what, json, rounds } => bench::run(what, json, rounds),
        Task::Programs(options) => programs::run(&options),
        Task::Soak(options) => soak::run(&options),
        Task::Study(options) => study::run(&options),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
