//! `asap attach`.

use super::{
    client::{ask_or_start, unexpected},
    context::{Global, require_root},
    report,
    scope::{self, Selectors},
    signing::TrustOptions,
    values,
};
use crate::{
    agent::DEFAULT_IDLE_EXIT,
    report::{AttachReport, AttachRequest, Failure, Reply, Request, ScopedRequest, ScopedWork},
};
use std::time::Duration;

/// Take a process into care, so that patches can go in.
///
/// With it come its descendants that run the same executable, also those that are forked later. Nothing is changed in how it
/// runs. Patches that an earlier agent left in it are taken over.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  asap attach --pid 1234
  asap attach --pid $(pidof -s nginx) --only
  asap attach --exe /usr/sbin/nginx
  asap attach --unit nginx.service --yes
  asap attach --pid 1234 --require-signature")]
pub struct Attach {
    /// The process.
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    #[arg(required_unless_present_any = ["exe", "lib", "unit", "all_with_build_id"])]
    pid: Option<i32>,
    #[command(flatten)]
    selectors: Selectors,
    /// This process alone, without its descendants.
    #[arg(long)]
    only: bool,
    /// If an agent must be started: it ends after so long without a target; 0: never.
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    idle_exit: Option<Duration>,
    #[command(flatten)]
    trust: TrustOptions,
}

impl Attach {
    pub fn run(self, global: &Global) -> Result<(), Failure> {
        require_root("attach")?;
        let idle_exit = Some(self.idle_exit.unwrap_or(DEFAULT_IDLE_EXIT)).filter(|limit| !limit.is_zero());
        let options = self.trust.bind(global.agent_options(idle_exit));
        let (only, require_signature) = (self.only, self.trust.require_signature);
        if let Some(members) = self.selectors.choose(global, "attach to")? {
            let work = ScopedWork::Attach { only, require_signature };
            let all_or_none = self.selectors.all_or_none();
            let reply = ask_or_start(&options, &Request::Scoped(ScopedRequest { members, all_or_none, work }))?;
            let Reply::Scoped(report) = &reply else { return Err(unexpected(&reply)) };
            return scope::finish(global, &reply, report);
        }
        let pid = self.pid.ok_or_else(|| Failure::refused("no process is named", "name one: --pid N"))?;
        let request = Request::Attach(AttachRequest { pid, only, require_signature });
        let reply = ask_or_start(&options, &request)?;
        let Reply::Attached(report) = &reply else { return Err(unexpected(&reply)) };
        global.show(&reply, || attached(report))
    }
}

fn attached(report: &AttachReport) -> String {
    let took = super::text::microseconds(report.total_us);
    let stop = super::text::microseconds(report.longest_stop_us);
    let mut text = format!("attached in {took}; longest stop of a thread {stop}\n");
    if report.adopted {
        text.push_str("patches of an earlier agent were taken over\n");
    }
    text.push_str(&report::target(&report.target));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attach_tells_times_and_target() {
        let report =
            AttachReport { target: report::tests::target(), adopted: true, total_us: 12_345, longest_stop_us: 85 };
        let text = attached(&report);
        assert!(text.starts_with(
            "attached in 12.3 ms; longest stop of a thread 85 µs\npatches of an earlier agent were taken over\n1234 "
        ));
    }
}
