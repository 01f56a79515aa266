//! `asap stop`.

use super::{
    client::{Client, unexpected},
    context::{Global, require_root},
};
use crate::report::{Failure, Reply, Request};

/// End the agent. Targets stay as they are, patches go on working.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  asap stop")]
pub struct Stop {}

impl Stop {
    pub fn run(self, global: &Global) -> Result<(), Failure> {
        let Some(mut client) = Client::connect(&global.socket)? else {
            require_root("stop")?;
            return global.show(&Reply::Bye, || "no agent is running\n".to_owned());
        };
        let reply = client.ask(&Request::Shutdown)?;
        let Reply::Bye = reply else { return Err(unexpected(&reply)) };
        client.wait_for_end()?;
        global.show(&reply, || "the agent has ended; targets stay as they are\n".to_owned())
    }
}
