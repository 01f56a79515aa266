//! `asap list`.

use super::{context::Global, report::patch_row, status, text::table};
use crate::report::{Failure, Reply, Request, StatusReport, StatusRequest};

/// List the patches that are in, oldest first.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  asap list
  asap list --json | jq '.targets[].patches[].name'")]
pub struct List {
    /// This target only.
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
}

impl List {
    pub fn run(self, global: &Global) -> Result<(), Failure> {
        let report = status::ask(global, Request::List(StatusRequest { pid: self.pid }))?;
        global.show(&Reply::Status(report.clone()), || list(&report))
    }
}

fn list(report: &StatusReport) -> String {
    if report.targets.is_empty() {
        return status::nothing_attached(report);
    }
    let rows = report.targets.iter().flat_map(|target| {
        target.patches.iter().map(|patch| [vec![target.pid.to_string()], patch_row(patch)].concat())
    });
    let rows: Vec<_> = rows.collect();
    if rows.is_empty() {
        return "no patches\n".to_owned();
    }
    table("", &["TARGET", "PATCH", "NAME", "FUNCTIONS", "SINCE", "SHA-256"], rows)
}

#[cfg(test)]
mod tests {
    use super::{super::report::tests, *};

    #[test]
    fn patches_are_listed_by_target() {
        let mut report = StatusReport { agent: 9, version: "0.1.0".to_owned(), targets: vec![tests::target()] };
        assert_eq!(
            list(&report),
            "\
TARGET  PATCH  NAME  FUNCTIONS            SINCE                 SHA-256
1234    1      fix   ap_byterange_filter  2023-11-14T22:13:20Z  0123456789ab
"
        );
        report.targets[0].patches.clear();
        assert_eq!(list(&report), "no patches\n");
    }
}
