//! `asap completions`.

use super::context::Global;
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
    pub fn run(self, global: &Global) -> Result<(), Failure> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut super::tree(), "asap", &mut script);
        let script = String::from_utf8_lossy(&script).into_owned();
        global.show(&serde_json::json!({ "shell": self.shell.to_string(), "script": script }), || script.clone())
    }
}
