//! `asap completions`.

use super::context::print;
use crate::report::Failure;
use clap_complete::Shell;

/// Print completions for a shell.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  asap completions bash > /usr/share/bash-completion/completions/asap
  asap completions zsh > /usr/share/zsh/vendor-completions/_asap")]
pub struct Completions {
    /// The shell.
    shell: Shell,
}

impl Completions {
    pub fn run(self) -> Result<(), Failure> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut super::tree(), "asap", &mut script);
        print(&String::from_utf8_lossy(&script))
    }
}
