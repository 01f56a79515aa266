//! Whose patches an agent accepts: looks at the signatures of the very bytes that the engine is about to apply, with keys that
//! are read anew for each request. Decides nothing about whether a patch fits a process.

use crate::{
    report::{Failure, PatchFile, Reply, Request, ScopedOutcome, ScopedRequest, ScopedWork},
    signature::{
        PublicKey, Signature, SignatureError,
        folder::{self, Trusted},
    },
};
use std::path::PathBuf;

/// The keys that count, and whether one is needed.
#[derive(Debug)]
pub(super) struct Trust {
    /// Where the keys are.
    pub folder: PathBuf,
    /// Patches without a good signature are refused. Is never taken back while the agent lives.
    pub required: bool,
}

/// What a request may do.
#[derive(Debug, Default)]
pub(super) struct Admitted {
    /// The key that signed the patch.
    pub signer: Option<String>,
    /// What whoever asked should know.
    note: Option<String>,
}

impl Trust {
    /// Looks at the signatures of a patch. A request to be stricter takes effect at once.
    ///
    /// # Errors
    /// A signature is needed and is missing, or does not fit, or is by a key that is not trusted; or the keys can't be trusted
    /// themselves.
    pub fn admit(&mut self, request: &Request) -> Result<Admitted, Failure> {
        match request {
            Request::Attach(request) => {
                self.required |= request.require_signature;
                Ok(Admitted::default())
            }
            Request::Patch(request) => self.examine(&request.files),
            Request::Scoped(ScopedRequest { work: ScopedWork::Patch(request), .. }) => self.examine(&request.files),
            Request::Scoped(ScopedRequest { work: ScopedWork::Attach { require_signature, .. }, .. }) => {
                self.required |= require_signature;
                Ok(Admitted::default())
            }
            _ => Ok(Admitted::default()),
        }
    }

    fn examine(&self, files: &[PatchFile]) -> Result<Admitted, Failure> {
        let trusted = folder::read(&self.folder).map_err(|error| {
            Failure::refused(
                error.to_string(),
                "set it right, or name another folder with --keys when the agent starts",
            )
        })?;
        let required = self.required || trusted.required;
        let mut admitted = Admitted::default();
        for file in files {
            match signer(file, &trusted) {
                Ok(key) => admitted.signer = Some(key.name()),
                // A file that was tampered with goes nowhere, whether signatures are needed or not.
                Err(Objection::Bad(error)) => return Err(bad(file, &error)),
                Err(objection) if required => return Err(self.unsigned(file, &objection)),
                Err(Objection::Unknown(error)) => {
                    admitted.note = Some(format!("{}: {error}; signatures are not required here", file.name));
                }
                Err(Objection::Missing) => {}
            }
            if required && !says_what_it_replaces(file) {
                return Err(Failure::refused(
                    format!("{}: this agent accepts signed patch files only, and it is a plain object file", file.name),
                    "build a patch file with `asap build`: it says itself which functions of which program it replaces",
                ));
            }
        }
        if files.is_empty() && required {
            return Err(Failure::refused("there is no file to look at", "name a signed patch file"));
        }
        Ok(admitted)
    }

    fn unsigned(&self, file: &PatchFile, objection: &Objection) -> Failure {
        let why = match objection {
            Objection::Missing => "it is not signed, and this agent accepts signed patches only".to_owned(),
            Objection::Unknown(error) | Objection::Bad(error) => format!("{error}, and not among those trusted here"),
        };
        Failure::refused(
            format!("{}: {why}", file.name),
            format!(
                "have it signed (`asap sign`; the signature {0}.sig lies beside it) with a key whose public half is in {1}",
                file.name,
                self.folder.display()
            ),
        )
    }
}

impl Admitted {
    /// Adds to an answer what is known of the patch's origin.
    pub fn tell(self, mut answer: Reply) -> Reply {
        let signed = self.signer.map(|signer| format!("signed by {signer}"));
        let notes: Vec<String> = signed.into_iter().chain(self.note).collect();
        match &mut answer {
            Reply::Patched(report) => report.notes.extend(notes),
            Reply::Scoped(report) => {
                for target in &mut report.targets {
                    if let ScopedOutcome::Patched(report) = &mut target.outcome {
                        report.notes.extend(notes.iter().cloned());
                    }
                }
            }
            _ => {}
        }
        answer
    }
}

/// Why a file is not taken for signed.
#[derive(Debug)]
enum Objection {
    /// It has no signature.
    Missing,
    /// It has one that no trusted key made.
    Unknown(SignatureError),
    /// It has one that does not fit.
    Bad(SignatureError),
}

/// The trusted key that signed the file.
fn signer<'a>(file: &PatchFile, trusted: &'a Trusted) -> Result<&'a PublicKey, Objection> {
    let text = file.signature.as_deref().ok_or(Objection::Missing)?;
    let signature = Signature::parse(text).map_err(Objection::Bad)?;
    let key = trusted.keys.iter().find(|key| key.id() == signature.key);
    let key = key.ok_or(Objection::Unknown(SignatureError::OtherKey(signature.key)))?;
    key.verify(&file.bytes, &signature).map(|()| key).map_err(Objection::Bad)
}

fn bad(file: &PatchFile, error: &SignatureError) -> Failure {
    let way_out = "get file and signature again from where they were made; don't apply this one";
    Failure::refused(format!("{}: {error}", file.name), way_out)
}

/// Plain objects leave it to whoever applies them what they replace, so their signature would not cover it.
fn says_what_it_replaces(file: &PatchFile) -> bool {
    matches!(crate::patch::manifest::read(&file.bytes), Ok(Some(_)))
}
