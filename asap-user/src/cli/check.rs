//! `asap check`: a patch without the patching.

use super::{context::Global, patch::PatchOptions};
use crate::report::Failure;

/// Say whether a patch would go in, and what would happen; change nothing.
///
/// The same as `asap patch --dry-run`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  asap check --function ap_byterange_filter fix.o
  asap check --pid 1234 fix.o && asap patch --pid 1234 fix.o")]
pub struct Check {
    #[command(flatten)]
    options: PatchOptions,
}

impl Check {
    pub fn run(self, global: &Global) -> Result<(), Failure> {
        self.options.run(global, "check", true)
    }
}
