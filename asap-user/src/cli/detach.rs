//! `asap detach`.

use super::{
    client::{ask, unexpected},
    context::{Global, require_root},
    text::{count, printable},
    values,
};
use crate::report::{DetachReport, DetachRequest, Failure, InstalledPatch, Reply, Request};
use std::time::Duration;

/// Leave a target. Its patches stay in and go on working, unless --revert is given.
///
/// A later `asap attach` takes over the patches that it finds.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  asap detach
  asap detach --pid 1234 --revert")]
pub struct Detach {
    /// The attached target; may be left out when there is one only.
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
    /// Take all patches out first; the target then is as it was before it was attached.
    #[arg(long)]
    revert: bool,
    /// With --revert: give up when there was no moment without a thread inside the new functions for so long.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = values::duration)]
    timeout: Duration,
}

impl Detach {
    pub fn run(self, global: &Global) -> Result<(), Failure> {
        require_root("detach")?;
        let timeout_ms = values::milliseconds(self.timeout);
        let request = Request::Detach(DetachRequest { pid: self.pid, revert: self.revert, timeout_ms });
        let reply = ask(&global.socket, &request)?;
        let Reply::Detached(report) = &reply else { return Err(unexpected(&reply)) };
        global.show(&reply, || detached(report))
    }
}

fn detached(report: &DetachReport) -> String {
    let names = |patches: &[InstalledPatch]| {
        let names: Vec<_> = patches.iter().map(|patch| printable(&patch.name)).collect();
        names.join(", ")
    };
    let mut text = format!("detached from {}\n", report.pid);
    if !report.reverted.is_empty() {
        let number = count(report.reverted.len(), "patch", "patches");
        text.push_str(&format!("  {number} taken out: {}\n", names(&report.reverted)));
    }
    if !report.remaining.is_empty() {
        let number = count(report.remaining.len(), "patch stays", "patches stay");
        text.push_str(&format!("  {number} in: {}\n", names(&report.remaining)));
    }
    match report.clean {
        Some(true) => text.push_str("  text and memory map are what they were before attach\n"),
        Some(false) => text.push_str("  text or memory map differ from what they were before attach\n"),
        None => {}
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detach_tells_what_stays() {
        let fix = super::super::report::tests::installed();
        let mut report = DetachReport { pid: 5, reverted: vec![fix.clone()], remaining: Vec::new(), clean: Some(true) };
        assert_eq!(
            detached(&report),
            "detached from 5\n  1 patch taken out: fix\n  text and memory map are what they were before attach\n"
        );
        report = DetachReport { reverted: Vec::new(), remaining: vec![fix.clone(), fix], clean: None, ..report };
        assert_eq!(detached(&report), "detached from 5\n  2 patches stay in: fix, fix\n");
    }
}
