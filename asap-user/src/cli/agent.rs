//! `asap agent`: the other half of this program.

use super::{
    context::{Global, require_root},
    signing::TrustOptions,
    values,
};
use crate::{
    agent::{
        AgentError, DEFAULT_IDLE_EXIT, OperationsFactory,
        audit::AuditLog,
        confine::confine,
        journal::DEFAULT_JOURNAL,
        launch::{self, Detached},
        run,
    },
    report::Failure,
};
use std::time::Duration;
use tracing::level_filters::LevelFilter;

/// Run the agent, in the foreground unless told otherwise.
///
/// `asap attach` starts one when none runs, so this is for service managers. It ends on SIGTERM, SIGINT and `asap stop`;
/// targets stay as they are then, and the next agent takes them over at `asap attach`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  asap agent --verbose
  asap agent --background --idle-exit 5min")]
pub struct Agent {
    /// Detach from terminal and session; return when clients can connect.
    #[arg(long)]
    background: bool,
    /// End after so long without a target; 0: never [default: 10s in the background, else never].
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    idle_exit: Option<Duration>,
    /// Socket of the system's journal, which gets a copy of the audit log where there is one; empty: no copy.
    #[arg(long, value_name = "PATH", env = "ASAP_JOURNAL", default_value = DEFAULT_JOURNAL)]
    journal: String,
    #[command(flatten)]
    trust: TrustOptions,
    /// Say more of what is done (twice: everything).
    #[arg(long, short, action = clap::ArgAction::Count)]
    verbose: u8,
}

impl Agent {
    pub fn run(self, global: &Global, factory: OperationsFactory) -> Result<(), Failure> {
        require_root("agent")?;
        let default = self.background.then_some(DEFAULT_IDLE_EXIT);
        let options = global.agent_options(self.idle_exit.or(default).filter(|limit| !limit.is_zero()));
        let mut options = self.trust.bind(options);
        options.journal = (!self.journal.is_empty()).then(|| self.journal.into());
        let mut herald = None;
        if self.background {
            // The messages of a background agent go beside the audit log, so its directory must be there first.
            AuditLog::open(&options.log).map_err(|error| AgentError::from(error).to_failure())?;
            match launch::detach(&launch::message_log(&options.log)) {
                Ok(Detached::Agent(child)) => herald = Some(child),
                Ok(Detached::Starter(outcome)) => return outcome,
                Err(error) => return Err(AgentError::Setup(error).to_failure()),
            }
        }
        let _ = nix::sys::prctl::set_name(c"asap-agent");
        start_messages(self.verbose);
        // Before the watchdog and the threads are made, so that they are confined, too.
        let outcome = confine().map_err(AgentError::Setup).and_then(|()| {
            run(&options, factory, || match herald.take() {
                Some(herald) => herald.ready(),
                None => launch::notify_service_manager(),
            })
        });
        let outcome = outcome.map_err(|error| error.to_failure());
        if let (Err(failure), Some(herald)) = (&outcome, herald) {
            herald.failed(failure);
        }
        outcome
    }
}

/// Messages go to standard error: the terminal, the service manager's journal, or the background agent's file.
fn start_messages(verbose: u8) {
    let asked = std::env::var("ASAP_LOG_LEVEL").ok().and_then(|level| level.parse::<LevelFilter>().ok());
    let level = match verbose {
        0 => asked.unwrap_or(LevelFilter::WARN),
        1 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let _ = tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).with_ansi(false).try_init();
}
