//! `asap man`.

use super::context::{Global, shown};
use crate::report::Failure;
use std::path::PathBuf;

/// Write the man pages, one for each command, into a directory.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  asap man /usr/local/share/man/man1")]
pub struct Man {
    /// An existing directory.
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

impl Man {
    pub fn run(self, global: &Global) -> Result<(), Failure> {
        clap_mangen::generate_to(super::tree(), &self.directory).map_err(|error| {
            Failure::refused(
                format!("the man pages can't be written to {}: {error}", shown(&self.directory)),
                "name a directory that exists and that you may write to",
            )
        })?;
        let directory = shown(&self.directory);
        global.show(&serde_json::json!({ "directory": directory }), || format!("wrote the man pages to {directory}\n"))
    }
}
