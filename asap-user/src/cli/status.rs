//! `asap status`, and the question behind it that `asap list` asks too.

use super::{
    client::{Client, unexpected},
    context::Global,
    report,
};
use crate::report::{Failure, Reply, Request, StatusReport, StatusRequest};

/// Show what is attached, and in what state.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  asap status
  asap status --pid 1234 --json")]
pub struct Status {
    /// This target only.
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
}

impl Status {
    pub fn run(self, global: &Global) -> Result<(), Failure> {
        let report = ask(global, Request::Status(StatusRequest { pid: self.pid }))?;
        global.show(&Reply::Status(report.clone()), || status(&report))
    }
}

/// The agent's report; without an agent, one that says that nothing is attached (agent 0).
pub fn ask(global: &Global, request: Request) -> Result<StatusReport, Failure> {
    let Some(mut client) = Client::connect(&global.socket)? else {
        return Ok(StatusReport { agent: 0, version: env!("CARGO_PKG_VERSION").to_owned(), targets: Vec::new() });
    };
    match client.ask(&request)? {
        Reply::Status(report) => Ok(report),
        other => Err(unexpected(&other)),
    }
}

/// The words for a report without targets.
pub fn nothing_attached(report: &StatusReport) -> String {
    if report.agent == 0 {
        "no agent is running; nothing is attached\n".to_owned()
    } else {
        format!("agent {}: nothing is attached\n", report.agent)
    }
}

fn status(report: &StatusReport) -> String {
    if report.targets.is_empty() {
        return nothing_attached(report);
    }
    let mut text = format!("agent {}, version {}\n", report.agent, super::text::printable(&report.version));
    for target in &report.targets {
        text.push_str(&report::target(target));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_tells_agent_and_targets() {
        let mut report = StatusReport { agent: 9, version: "0.1.0".to_owned(), targets: vec![report::tests::target()] };
        assert!(status(&report).starts_with("agent 9, version 0.1.0\n1234  /usr/sbin/apache2  "));
        report.targets.clear();
        assert_eq!(status(&report), "agent 9: nothing is attached\n");
        report.agent = 0;
        assert_eq!(status(&report), "no agent is running; nothing is attached\n");
    }
}
