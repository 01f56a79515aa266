//! `asap patch`: options of a patch, and what became of it.

use super::{
    client::{ask, ask_or_start, unexpected},
    context::{Global, require_root},
    files, report,
    scope::{self, Selectors},
    values,
};
use crate::{
    agent::DEFAULT_IDLE_EXIT,
    report::{
        Consistency, Failure, FailureKind, Mechanism, PatchReport, PatchRequest, Reply, Request, ScopedRequest,
        ScopedWork,
    },
};
use std::{path::PathBuf, time::Duration};

/// Replace functions of an attached target.
///
/// All functions in all processes of the target, or none. New code goes in at a moment when no thread is inside the old
/// function, neither running there nor about to return there.
///
/// With a selector (--exe, --lib, --unit, --all-with-build-id) processes of the whole machine are meant: they are listed, and
/// attached where they are not yet. Each target gets the patch whole or not at all; what failed is said for each.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  asap patch --function ap_byterange_filter fix.o
  asap patch --pid 1234 --function core.c:handler --name CVE-2026-1 --timeout 2min fix.o
  asap patch --dry-run fix.o helper.o
  asap patch --lib /usr/lib/x86_64-linux-gnu/libssl.so.3 fix.asap
  asap patch --all-with-build-id 2be7ff1a --yes fix.asap")]
pub struct Patch {
    #[command(flatten)]
    options: PatchOptions,
    /// Say what would happen and whether it could; change nothing.
    #[arg(long)]
    dry_run: bool,
}

/// What `patch` and `check` have in common.
#[derive(Debug, clap::Args)]
pub struct PatchOptions {
    /// The attached target; may be left out when there is one only.
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
    #[command(flatten)]
    selectors: Selectors,
    /// Function to replace, by the function of that name in the files; `file.c:name` for one of several static functions.
    /// May be given several times; may be left out when the files declare what they replace.
    #[arg(long = "function", short, value_name = "NAME")]
    functions: Vec<String>,
    /// Which of several functions of one name: its address in the executable, as `asap` lists it.
    #[arg(long, value_name = "ADDRESS", value_parser = values::address)]
    address: Option<u64>,
    /// Name of the patch, for list, revert and log; else that of the first file.
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Give up when there was no moment without a thread inside the functions for so long.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = values::duration)]
    timeout: Duration,
    /// When new code may go in: when nobody is inside the old one, or at once (old calls then end in old code).
    #[arg(long, value_enum, default_value_t)]
    consistency: Consistency,
    /// How calls reach the new code.
    #[arg(long, value_enum, default_value_t)]
    mechanism: Mechanism,
    /// Object files (ELF, relocatable) with the new functions.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

impl Patch {
    pub fn run(self, global: &Global) -> Result<(), Failure> {
        self.options.run(global, "patch", self.dry_run)
    }
}

impl PatchOptions {
    /// Sends the request and shows the answer.
    pub fn run(self, global: &Global, command: &str, dry_run: bool) -> Result<(), Failure> {
        require_root(command)?;
        let Some(members) = self.selectors.choose(global, command)? else {
            let reply = ask(&global.socket, &self.request(dry_run)?)?;
            let Reply::Patched(_) = &reply else { return Err(unexpected(&reply)) };
            return global.show(&reply, || shown(&reply));
        };
        let all_or_none = self.selectors.all_or_none();
        let work = ScopedWork::Patch(self.patch_request(dry_run)?);
        let request = Request::Scoped(ScopedRequest { members, all_or_none, work });
        let reply = ask_or_start(&global.agent_options(Some(DEFAULT_IDLE_EXIT)), &request)?;
        let Reply::Scoped(report) = &reply else { return Err(unexpected(&reply)) };
        scope::finish(global, &reply, report)
    }

    /// The request, with the files read.
    pub fn request(self, dry_run: bool) -> Result<Request, Failure> {
        if self.selectors.is_given() {
            return Err(Failure {
                kind: FailureKind::Usage,
                ..Failure::refused("this command is about one target", "asap patch --dry-run, with the selector")
            });
        }
        self.patch_request(dry_run).map(Request::Patch)
    }

    fn patch_request(self, dry_run: bool) -> Result<PatchRequest, Failure> {
        Ok(PatchRequest {
            pid: self.pid,
            functions: self.functions,
            address: self.address,
            files: files::read(&self.files)?,
            name: self.name,
            dry_run,
            timeout_ms: values::milliseconds(self.timeout),
            consistency: self.consistency,
            mechanism: self.mechanism,
        })
    }
}

/// The answer to a request to patch.
pub fn shown(reply: &Reply) -> String {
    match reply {
        Reply::Patched(report) => patched(report),
        other => format!("{other:?}\n"),
    }
}

fn patched(report: &PatchReport) -> String {
    let name = super::text::printable(&report.patch.name);
    let took = super::text::microseconds(report.total_us);
    let first = if report.already {
        format!("{name} is in already, as patch {}: nothing was to be done\n", report.patch.id.0)
    } else if report.dry_run {
        format!("{name} would go in; nothing was changed ({took})\n")
    } else {
        format!("{name} is in as patch {}, {took} after the request\n", report.patch.id.0)
    };
    first + &report::patch_details(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patch_tells_what_went_in_and_what_it_cost() {
        assert_eq!(
            patched(&report::tests::patch_report()),
            "\
fix is in as patch 1, 12.3 ms after the request
  FUNCTION             MODULE   OLD             NEW
  ap_byterange_filter  apache2  0x55d0c0de1000  0x55d0a0000040
  PROCESS  HOW                   TRIES  THREADS  STOPPED  LONGEST STOP  AT GATE  GATE CLOSED
  1234     gate and stack walks  1      27       2        85 µs         3        120 µs
  note: a note
"
        );
        let dry = PatchReport { dry_run: true, ..report::tests::patch_report() };
        assert!(patched(&dry).starts_with("fix would go in; nothing was changed (12.3 ms)\n"));
    }
}
