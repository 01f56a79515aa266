//! `asap doctor`: what this system offers, and how to get what it lacks.

use super::{
    client::Client,
    context::{Global, shown},
    text::printable,
};
use crate::{agent::socket, report::Failure};
use serde::Serialize;

/// Say what works here, what does not, and how to get it.
///
/// Changes nothing. Run it as root to see what the agent will find; without root most things are missing.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  asap doctor
  asap doctor --json | jq '.findings[] | select(.available == false)'")]
pub struct Doctor {}

#[derive(Serialize)]
struct Findings {
    findings: Vec<Finding>,
}

/// One thing that was looked at.
#[derive(Serialize)]
struct Finding {
    name: String,
    available: bool,
    /// What was seen.
    detail: String,
    /// What it is good for.
    gives: String,
    /// How to get it.
    how_to_get: String,
}

impl Doctor {
    pub fn run(self, global: &Global) -> Result<(), Failure> {
        let kernel = crate::kernel::features().into_iter().map(|feature| Finding {
            name: feature.name.to_string(),
            available: feature.available,
            detail: feature.detail.to_string(),
            gives: feature.gives.to_string(),
            how_to_get: feature.how_to_get.to_string(),
        });
        let findings = [root(), agent(global), directory(global)].into_iter().chain(kernel).collect();
        let findings = Findings { findings };
        global.show(&findings, || doctor(&findings))
    }
}

fn root() -> Finding {
    let uid = nix::unistd::geteuid();
    Finding {
        name: "root".to_owned(),
        available: uid.is_root(),
        detail: format!("runs as user {uid}"),
        gives: "the right to read and change other processes".to_owned(),
        how_to_get: "sudo asap ...".to_owned(),
    }
}

fn agent(global: &Global) -> Finding {
    let (available, detail) = match Client::connect(&global.socket) {
        Ok(Some(client)) => (true, format!("runs, pid {}", client.agent())),
        Ok(None) => (true, "does not run; attach starts it".to_owned()),
        Err(failure) => (false, failure.message),
    };
    Finding {
        name: "agent".to_owned(),
        available,
        detail,
        gives: "attach, patch, status, revert, detach".to_owned(),
        how_to_get: "run asap as root; name the agent's socket with --socket".to_owned(),
    }
}

fn directory(global: &Global) -> Finding {
    let (detail, how_to_get) = match socket::check_directory(&global.agent_options(None).socket) {
        Ok(()) => ("closed to others, or made so when needed".to_owned(), None),
        Err((why, way_out)) => (why, Some(way_out)),
    };
    Finding {
        name: format!("socket {}", shown(&global.socket)),
        available: how_to_get.is_none(),
        detail,
        gives: "orders that nobody but root can give".to_owned(),
        how_to_get: how_to_get.unwrap_or_default().to_owned(),
    }
}

fn doctor(findings: &Findings) -> String {
    let width = findings.findings.iter().map(|finding| finding.name.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for finding in &findings.findings {
        let mark = if finding.available { "yes" } else { "NO " };
        text.push_str(&format!("{mark}  {:width$}  {}\n", finding.name, printable(&finding.detail)));
        if !finding.available {
            let indent = " ".repeat(width + 7);
            text.push_str(&format!("{indent}gives: {}\n", printable(&finding.gives)));
            text.push_str(&format!("{indent}get it: {}\n", printable(&finding.how_to_get)));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_told_with_how_to_get_it() {
        let finding = |name: &str, available| Finding {
            name: name.to_owned(),
            available,
            detail: "seen".to_owned(),
            gives: "more".to_owned(),
            how_to_get: "buy it".to_owned(),
        };
        let findings = Findings { findings: vec![finding("root", true), finding("gates", false)] };
        assert_eq!(
            doctor(&findings),
            "yes  root   seen\nNO   gates  seen\n            gives: more\n            get it: buy it\n"
        );
    }
}
