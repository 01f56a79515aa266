//! `asap verify`.

use super::{
    context::{Global, shown},
    files, signing,
    text::printable,
};
use crate::{
    agent::DEFAULT_KEYS,
    report::Failure,
    signature::{PublicKey, Signature, SignatureError, folder},
};
use serde::Serialize;
use std::path::PathBuf;

/// Say who signed patch files: FILE.sig beside each must be the signature of a trusted key.
///
/// No agent is needed. The agent looks for itself, at the bytes that it is about to apply.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  asap verify fix.asap
  asap verify --key release.pub fix.asap")]
pub struct Verify {
    /// Trust this public key, and not those of --keys; may be given several times.
    #[arg(long = "key", short, value_name = "FILE")]
    key: Vec<PathBuf>,
    /// Trust the public keys in this folder.
    #[arg(long, value_name = "DIR", env = "ASAP_KEYS", default_value = DEFAULT_KEYS)]
    keys: PathBuf,
    /// Patch files.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

#[derive(Serialize)]
struct Verified {
    file: PathBuf,
    signed_by: String,
}

impl Verify {
    pub fn run(self, global: &Global) -> Result<(), Failure> {
        let keys = self.trusted()?;
        let verified = self.files.iter().map(|path| {
            let file = files::read_signed(path)?;
            let refuse = |why: String| {
                Failure::refused(format!("{}: {why}", shown(path)), "get file and signature from where they were made")
            };
            let text = file.signature.ok_or_else(|| refuse(format!("there is no signature {}.sig", shown(path))))?;
            let signature = Signature::parse(&text).map_err(|error| refuse(error.to_string()))?;
            let key = keys.iter().find(|key| key.id() == signature.key);
            let key = key.ok_or_else(|| refuse(SignatureError::OtherKey(signature.key).to_string()))?;
            key.verify(&file.bytes, &signature).map_err(|error| refuse(error.to_string()))?;
            Ok(Verified { file: path.clone(), signed_by: key.name() })
        });
        let verified = verified.collect::<Result<Vec<_>, Failure>>()?;
        global.show(&verified, || {
            let line = |one: &Verified| format!("{}: signed by {}\n", shown(&one.file), printable(&one.signed_by));
            verified.iter().map(line).collect()
        })
    }

    fn trusted(&self) -> Result<Vec<PublicKey>, Failure> {
        if self.key.is_empty() {
            let trusted = folder::read(&self.keys);
            let trusted = trusted.map_err(|error| Failure::refused(error.to_string(), "name keys with --key"))?;
            if trusted.keys.is_empty() {
                let folder = shown(&self.keys);
                return Err(Failure::refused(format!("there are no keys in {folder}"), "name keys with --key"));
            }
            return Ok(trusted.keys);
        }
        let key = |path: &PathBuf| {
            let text = signing::read_text(path)?;
            PublicKey::parse(&text).map_err(|error| signing::unusable(path, &error))
        };
        self.key.iter().map(key).collect()
    }
}
