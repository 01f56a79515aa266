//! `asap revert`.

use super::{
    client::{ask, unexpected},
    context::{Global, require_root},
    report, values,
};
use crate::report::{Consistency, Failure, PatchReport, Reply, Request, RevertRequest};
use std::time::Duration;

/// Take a patch out again: the functions are what they were before it.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  asap revert
  asap revert --pid 1234 CVE-2026-1
  asap revert 2 --timeout 2min")]
pub struct Revert {
    /// The attached target; may be left out when there is one only.
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
    /// Name or number of the patch; the newest if left out.
    #[arg(value_name = "PATCH")]
    patch: Option<String>,
    /// Give up when there was no moment without a thread inside the new functions for so long.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = values::duration)]
    timeout: Duration,
    /// Whether calls of the new functions must have ended, or may end later.
    #[arg(long, value_enum, default_value_t)]
    consistency: Consistency,
}

impl Revert {
    pub fn run(self, global: &Global) -> Result<(), Failure> {
        require_root("revert")?;
        let request = Request::Revert(RevertRequest {
            pid: self.pid,
            patch: self.patch,
            timeout_ms: values::milliseconds(self.timeout),
            consistency: self.consistency,
        });
        let reply = ask(&global.socket, &request)?;
        let Reply::Reverted(report) = &reply else { return Err(unexpected(&reply)) };
        global.show(&reply, || reverted(report))
    }
}

fn reverted(report: &PatchReport) -> String {
    let name = super::text::printable(&report.patch.name);
    let took = super::text::microseconds(report.total_us);
    format!("{name} (patch {}) is out, {took} after the request\n", report.patch.id.0) + &report::patch_details(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revert_tells_what_came_out() {
        let text = reverted(&report::tests::patch_report());
        assert!(text.starts_with("fix (patch 1) is out, 12.3 ms after the request\n  FUNCTION "), "{text}");
    }
}
