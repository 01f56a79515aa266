//! Detached signatures of patch files: `fix.asap.sig` beside `fix.asap`, ed25519. Pure: text and bytes in and out. Not for
//! which keys an agent trusts (`folder`, and the agent), nor for whether a patch fits a process.
//!
//! Keys and signatures are lines of text. What is signed is the file as a whole, hashed with SHA-512 (Ed25519ph, RFC 8032
//! section 5.1) under a context of our own, so that no other program's signature can be taken for one of a patch.

pub mod folder;
#[cfg(test)]
mod tests;

use crate::hex::hex;
use base64::{Engine, engine::general_purpose::STANDARD};
use ed25519_dalek::{Sha512, SigningKey, VerifyingKey};
use sha2::{Digest, Sha256};

/// What signatures of patch files are made under, beside the file itself.
const CONTEXT: &[u8] = b"asap patch file 1";
/// First word of a public key.
const PUBLIC: &str = "asap-ed25519";
/// First word of a secret key.
const SECRET: &str = "asap-ed25519-secret";
/// First line of a signature.
const SIGNATURE: &str = "asap-signature 1";
/// Longest text of a key or signature that is looked at.
pub const TEXT_MOST: usize = 4096;
/// Longest comment of a key, bytes.
const COMMENT_MOST: usize = 256;
/// What the name of a signature's file ends with, after the name of the file that is signed.
pub const SUFFIX: &str = ".sig";

/// A key or signature can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// The text is no public key.
    #[error("it is no public key of asap: {0}; public keys are made by `asap keygen` and begin with `{PUBLIC} `")]
    NoPublicKey(&'static str),
    /// The text is no secret key.
    #[error("it is no secret key of asap: {0}; secret keys are made by `asap keygen` and begin with `{SECRET} `")]
    NoSecretKey(&'static str),
    /// The text is no signature.
    #[error("its signature is damaged: {0}; sign the file again with `asap sign`")]
    NoSignature(&'static str),
    /// The comment can't be written in a line.
    #[error("a comment is one line of at most {COMMENT_MOST} bytes without control characters")]
    Comment,
    /// Another key made the signature.
    #[error("it is signed with the key {0}, which is another one")]
    OtherKey(KeyId),
    /// The file, or the signature, is not what was signed.
    #[error(
        "its signature by the key {0} does not fit: the file was changed after it was signed, or it is another file"
    )]
    DoesNotFit(KeyId),
    /// The system has no random numbers.
    #[error("the system gives no random numbers for a key: {0}")]
    Random(String),
}

/// A short name of a key: the beginning of its SHA-256. To find a key and to talk about it; proves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId([u8; 8]);

impl std::fmt::Display for KeyId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

/// The key that tells whether a signature is good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey {
    key: VerifyingKey,
    /// What people call it; is not signed.
    comment: String,
}

impl PublicKey {
    /// Reads the line of a `.pub` file.
    ///
    /// # Errors
    /// It is something else.
    pub fn parse(text: &str) -> Result<Self, SignatureError> {
        let failed = SignatureError::NoPublicKey;
        let (bytes, comment) = parse_key(text, PUBLIC).map_err(failed)?;
        let key = VerifyingKey::from_bytes(&bytes).map_err(|_| failed("its number is no point of the curve"))?;
        if key.is_weak() {
            return Err(failed("it would take any signature for good"));
        }
        Ok(Self { key, comment })
    }

    /// The line of a `.pub` file.
    #[must_use]
    pub fn to_text(&self) -> String {
        key_text(PUBLIC, self.key.as_bytes(), &self.comment)
    }

    /// Its short name.
    #[must_use]
    pub fn id(&self) -> KeyId {
        let digest = Sha256::digest(self.key.as_bytes());
        let mut id = [0; 8];
        id.copy_from_slice(&digest[..8]);
        KeyId(id)
    }

    /// Its short name, and what people call it.
    #[must_use]
    pub fn name(&self) -> String {
        if self.comment.is_empty() { self.id().to_string() } else { format!("{} ({})", self.id(), self.comment) }
    }

    /// Whether `signature` was made of `file` with this key's secret half.
    ///
    /// # Errors
    /// It was not.
    pub fn verify(&self, file: &[u8], signature: &Signature) -> Result<(), SignatureError> {
        if signature.key != self.id() {
            return Err(SignatureError::OtherKey(signature.key));
        }
        let bytes = ed25519_dalek::Signature::from_bytes(&signature.bytes);
        let fits = self.key.verify_prehashed_strict(Sha512::default().chain_update(file), Some(CONTEXT), &bytes);
        fits.map_err(|_| SignatureError::DoesNotFit(self.id()))
    }
}

/// The key that signs.
pub struct SecretKey {
    key: SigningKey,
    comment: String,
}

impl std::fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SecretKey of {}", self.public().id())
    }
}

impl SecretKey {
    /// A new key, of the system's random numbers.
    ///
    /// # Errors
    /// The system has none, or the comment is not one line.
    pub fn generate(comment: &str) -> Result<Self, SignatureError> {
        check_comment(comment)?;
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|error| SignatureError::Random(error.to_string()))?;
        Ok(Self { key: SigningKey::from_bytes(&seed), comment: comment.to_owned() })
    }

    /// Reads the line of a secret key's file.
    ///
    /// # Errors
    /// It is something else.
    pub fn parse(text: &str) -> Result<Self, SignatureError> {
        let (seed, comment) = parse_key(text, SECRET).map_err(SignatureError::NoSecretKey)?;
        Ok(Self { key: SigningKey::from_bytes(&seed), comment })
    }

    /// The line of a secret key's file.
    #[must_use]
    pub fn to_text(&self) -> String {
        key_text(SECRET, self.key.as_bytes(), &self.comment)
    }

    /// The half that everybody may know.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        PublicKey { key: self.key.verifying_key(), comment: self.comment.clone() }
    }

    /// Signs a file. The same key and file give the same signature.
    ///
    /// # Errors
    /// None in practice: the context is short enough.
    pub fn sign(&self, file: &[u8]) -> Result<Signature, SignatureError> {
        let signed = self.key.sign_prehashed(Sha512::default().chain_update(file), Some(CONTEXT));
        let signed = signed.map_err(|_| SignatureError::NoSignature("it can't be made"))?;
        Ok(Signature { key: self.public().id(), bytes: signed.to_bytes() })
    }
}

/// A signature, as in a `.sig` file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    /// Which key is said to have made it.
    pub key: KeyId,
    bytes: [u8; 64],
}

impl Signature {
    /// Reads a `.sig` file.
    ///
    /// # Errors
    /// It is something else.
    pub fn parse(text: &str) -> Result<Self, SignatureError> {
        let failed = SignatureError::NoSignature;
        if text.len() > TEXT_MOST {
            return Err(failed("it is too long"));
        }
        let mut lines = text.lines();
        if lines.next() != Some(SIGNATURE) {
            return Err(failed("its first line is not that of a signature that this asap knows"));
        }
        let mut field = |name: &str| lines.next()?.strip_prefix(name)?.strip_prefix(' ');
        let (key, value) = (field("key"), field("ed25519"));
        if lines.next().is_some() {
            return Err(failed("it has lines too many"));
        }
        let key = key.and_then(key_id).ok_or(failed("its second line does not name a key"))?;
        let bytes = value.and_then(|value| STANDARD.decode(value).ok()).and_then(|bytes| bytes.try_into().ok());
        Ok(Self { key, bytes: bytes.ok_or(failed("its third line is not 64 bytes as base64"))? })
    }

    /// The text of a `.sig` file.
    #[must_use]
    pub fn to_text(&self) -> String {
        format!("{SIGNATURE}\nkey {}\ned25519 {}\n", self.key, STANDARD.encode(self.bytes))
    }
}

fn key_id(text: &str) -> Option<KeyId> {
    let digits = text.len() == 16 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let number = u64::from_str_radix(text, 16).ok().filter(|_| digits)?;
    Some(KeyId(number.to_be_bytes()))
}

fn key_text(kind: &str, bytes: &[u8; 32], comment: &str) -> String {
    let mut text = format!("{kind} {} {comment}", STANDARD.encode(bytes));
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}

/// The bytes and the comment of a key.
fn parse_key(text: &str, kind: &str) -> Result<([u8; 32], String), &'static str> {
    if text.len() > TEXT_MOST {
        return Err("it is too long");
    }
    let mut lines = text.lines();
    let (Some(line), None) = (lines.next(), lines.next()) else { return Err("it is not one line") };
    let mut words = line.splitn(3, ' ');
    if words.next() != Some(kind) {
        return Err("it begins otherwise");
    }
    let bytes = words.next().and_then(|word| STANDARD.decode(word).ok()).and_then(|bytes| bytes.try_into().ok());
    let bytes = bytes.ok_or("its second word is not 32 bytes as base64")?;
    // As it is written: blanks at the end of a line are nothing.
    let comment = words.next().unwrap_or_default().trim_end();
    check_comment(comment).map_err(|_| "its comment is too long or not printable")?;
    Ok((bytes, comment.to_owned()))
}

fn check_comment(comment: &str) -> Result<(), SignatureError> {
    let fits = comment.len() <= COMMENT_MOST && !comment.chars().any(char::is_control);
    if fits { Ok(()) } else { Err(SignatureError::Comment) }
}
