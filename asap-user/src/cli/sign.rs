//! `asap sign`.

use super::{
    context::{Global, shown},
    files, signing,
};
use crate::{
    patch::manifest,
    report::Failure,
    signature::{SUFFIX, SecretKey},
};
use serde::Serialize;
use std::path::PathBuf;

/// Sign patch files: writes FILE.sig beside each. A signature that is there is replaced.
///
/// Signed is the file as a whole. What it does, `asap inspect` shows; look before you sign.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  asap sign --key release fix.asap
  asap sign --key release *.asap --json")]
pub struct Sign {
    /// The secret key, as made by `asap keygen`. Nobody else may be able to read it.
    #[arg(long, short, value_name = "FILE")]
    key: PathBuf,
    /// Patch files.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

#[derive(Serialize)]
struct Signed {
    key: String,
    signatures: Vec<PathBuf>,
}

impl Sign {
    pub fn run(self, global: &Global) -> Result<(), Failure> {
        let text = signing::read_secret(&self.key)?;
        let secret = SecretKey::parse(&text).map_err(|error| signing::unusable(&self.key, &error))?;
        let mut made = Vec::new();
        // All or none: nothing is written before all could be signed.
        for path in &self.files {
            let file = files::read_plain(path)?;
            match manifest::read(&file.bytes) {
                Ok(Some(_)) => {}
                Ok(None) => {
                    return Err(Failure::refused(
                        format!(
                            "{} has no manifest: nothing says which functions of which program it replaces",
                            shown(path)
                        ),
                        "build a patch file with `asap build`",
                    ));
                }
                Err(error) => {
                    return Err(Failure::refused(
                        format!("{}: {error}", shown(path)),
                        "sign what `asap build` wrote, unchanged",
                    ));
                }
            }
            let signature = secret.sign(&file.bytes).map_err(|error| signing::unusable(path, &error))?;
            made.push((signing::beside(path, SUFFIX), signature.to_text()));
        }
        for (path, text) in &made {
            signing::replace(path, text)?;
        }
        let signed =
            Signed { key: secret.public().name(), signatures: made.into_iter().map(|(path, _)| path).collect() };
        global.show(&signed, || {
            let lines = signed.signatures.iter().map(|path| format!("{}\n", shown(path)));
            format!("signed with the key {}\n", super::text::printable(&signed.key)) + &lines.collect::<String>()
        })
    }
}
