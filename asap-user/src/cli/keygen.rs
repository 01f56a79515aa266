//! `asap keygen`.

use super::{
    context::{Global, shown},
    signing,
};
use crate::{report::Failure, signature::SecretKey};
use serde::Serialize;
use std::path::PathBuf;

/// Make a pair of keys for signing patches: FILE, which only its owner may read, and FILE.pub for everybody.
///
/// The secret key is not encrypted: keep it where patches are made, not on the machines that they are for. Copy FILE.pub to
/// /etc/asap/keys there. Files that exist are left alone.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  asap keygen release
  asap keygen --comment 'patches of the web team' ~/keys/web")]
pub struct Keygen {
    /// What people call the key; goes into both files, and is not protected.
    #[arg(long, value_name = "TEXT", default_value = "")]
    comment: String,
    /// The secret key's file; the public one gets `.pub` after its name.
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

#[derive(Serialize)]
struct Made {
    key: String,
    secret: PathBuf,
    public: PathBuf,
}

impl Keygen {
    pub fn run(self, global: &Global) -> Result<(), Failure> {
        let public_file = signing::beside(&self.file, ".pub");
        // Both, before there is a key that would have to be taken away again.
        for file in [&self.file, &public_file] {
            if file.symlink_metadata().is_ok() {
                return Err(Failure::refused(
                    format!("{} is there already, and a key is never overwritten", shown(file)),
                    "choose another name",
                ));
            }
        }
        let secret = SecretKey::generate(&self.comment)
            .map_err(|error| Failure::refused(error.to_string(), "choose another --comment"))?;
        let public = secret.public();
        signing::create(&self.file, 0o600, &secret.to_text())?;
        if let Err(failure) = signing::create(&public_file, 0o644, &public.to_text()) {
            // Half a pair is none, and it is ours alone.
            let _ = std::fs::remove_file(&self.file);
            return Err(failure);
        }
        let made = Made { key: public.name(), secret: self.file, public: public_file };
        global.show(&made, || {
            format!(
                "key {}\n  secret: {} (keep it; whoever has it can sign patches)\n  public: {} (copy it to \
                 /etc/asap/keys of the machines that are to trust it)\n",
                super::text::printable(&made.key),
                shown(&made.secret),
                shown(&made.public)
            )
        })
    }
}
