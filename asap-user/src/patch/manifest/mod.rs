//! The manifest of a patch file (`fix.asap`): an object file like any other, with a section `.asap` that says what it is for,
//! which functions it replaces, and where the target keeps what its own symbol tables don't tell. `docs/patches.md` describes
//! the format. Pure: bytes in, bytes out. Not for making patches (that is `build`), nor for whether one fits a process
//! (`engine`).
//!
//! The section is text: a first line with the version and a checksum over the whole file, then JSON. The version is looked
//! at first, so that an old asap refuses a new file by name instead of misreading it.

mod elf;
#[cfg(test)]
mod tests;

use super::Hooks;
use crate::{address::ImageOffset, hex::hex};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Version of the manifest that this program writes, and the newest that it reads.
pub const VERSION: u32 = 1;
/// Name of the section.
pub const SECTION: &str = ".asap";
/// Largest manifest, bytes.
const SIZE_MOST: usize = 16 << 20;
/// Most entries of any list in a manifest.
const ENTRIES_MOST: usize = 1 << 16;
/// Longest name of anything in a manifest, bytes; C++ names are long.
const NAME_MOST: usize = 16 << 10;
/// What the section begins with; the version follows.
const MAGIC: &str = "asap-patch ";
/// Hex digits of the checksum.
const DIGITS: usize = 64;

/// What a change means for a running program: whether it can be repaired, and what it takes. Machine-readable; `asap build`
/// and `asap check` print it, and the study counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// Functions change, nothing else: goes in.
    CodeOnly,
    /// Functions change and bring variables or constants of their own: goes in.
    NewData,
    /// State that already exists must be converted or set up: goes in with a hook.
    NeedsHook,
    /// The layout or the initial value of data in use changes: does not go in by itself.
    DataLayout,
    /// The changed code has run already, when the program started: it would go in and change nothing.
    StartUpOnly,
    /// A changed function never returns while the program runs: goes in, if at all, with `--consistency lazy`.
    NeverQuiescent,
    /// Nothing of the target changes, or it is not this program's code.
    NotApplicable,
}

impl Class {
    /// All of them, in the order of their definition.
    pub const ALL: [Self; 7] = [
        Self::CodeOnly,
        Self::NewData,
        Self::NeedsHook,
        Self::DataLayout,
        Self::StartUpOnly,
        Self::NeverQuiescent,
        Self::NotApplicable,
    ];

    /// The word for it, as in manifests and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::CodeOnly => "code-only",
            Self::NewData => "new-data",
            Self::NeedsHook => "needs-hook",
            Self::DataLayout => "data-layout",
            Self::StartUpOnly => "start-up-only",
            Self::NeverQuiescent => "never-quiescent",
            Self::NotApplicable => "not-applicable",
        }
    }

    /// Whether a patch of this class repairs a running program without more ado.
    #[must_use]
    pub const fn is_live(self) -> bool {
        matches!(self, Self::CodeOnly | Self::NewData | Self::NeedsHook)
    }

    /// What it means, in a few words.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::CodeOnly => "functions change, nothing else",
            Self::NewData => "functions change and bring data of their own",
            Self::NeedsHook => "existing state must be converted by a hook",
            Self::DataLayout => "the layout or initial value of data in use changes",
            Self::StartUpOnly => "the changed code only runs when the program starts",
            Self::NeverQuiescent => "a changed function never returns while the program runs",
            Self::NotApplicable => "nothing of this program changes",
        }
    }
}

impl std::fmt::Display for Class {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What a patch file says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Name of the patch, by which others refer to it and `asap list` shows it.
    pub name: String,
    /// What the change means for a running program.
    pub class: Class,
    /// File name of the executable or library that it repairs.
    pub target: String,
    /// The builds of the target that it fits; at least one.
    pub builds: Vec<Build>,
    /// The functions that it replaces; at least one.
    pub functions: Vec<Replaced>,
    /// Functions of the patch that run around apply and revert (a copy of what the object declares, for readers).
    #[serde(default)]
    pub hooks: Hooks,
    /// Where it comes from.
    #[serde(default)]
    pub origin: Origin,
    /// Names of patches that must be in before it.
    #[serde(default)]
    pub requires: Vec<String>,
    /// Names of patches that it replaces: they go out in the same transaction in which it goes in.
    #[serde(default)]
    pub replaces: Vec<String>,
    /// The program that made it, with its version.
    pub tool: String,
}

/// One build of the target, told apart by its build-id.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Build {
    /// Build-id, lower-case hex.
    pub build_id: String,
    /// Functions and variables of this build that the patch names and the target's own tables may lack: found by the twin.
    #[serde(default)]
    pub symbols: Vec<Place>,
}

/// Where a build of the target has a function or variable. It is known under `name` to the patch's undefined symbols and to
/// [`Replaced::old`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Raw name.
    pub name: String,
    /// Source file, where several static ones share the name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// What it is.
    pub kind: PlaceKind,
    /// Address in the image; of a thread-local variable its offset in the TLS segment.
    pub address: ImageOffset,
    /// Bytes.
    #[serde(default)]
    pub size: u64,
    /// SHA-256 of the function's bytes in the image file, hex: looked at before anything is replaced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
}

/// What a [`Place`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PlaceKind {
    /// Code.
    Function,
    /// A variable or constant.
    Data,
    /// A thread-local variable.
    Tls,
}

/// One function that is replaced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replaced {
    /// Its raw name in the target.
    pub old: String,
    /// Its source file, where several static functions share the name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// The symbol of the patch that takes its place.
    pub new: String,
}

/// Where a patch comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Origin {
    /// SHA-256 of the diff, hex.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diff_sha256: Option<String>,
    /// Name of the diff's file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diff: Option<String>,
    /// Source package.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub package: Option<String>,
    /// Its version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// What it repairs: CVE numbers and the like.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub fixes: Vec<String>,
    /// The compiler, as it names itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compiler: Option<String>,
}

/// A manifest can't be read or written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// A newer program wrote it.
    #[error(
        "its manifest has version {found}, and this asap reads up to {VERSION}; use a newer asap, or build the patch again"
    )]
    Version {
        /// The version that it has.
        found: u32,
    },
    /// The file is not what was written.
    #[error("it was changed after it was made (its checksum does not fit); get the file again from where it was built")]
    Tampered,
    /// The manifest makes no sense.
    #[error("its manifest is damaged: {0}; build the patch again")]
    Damaged(String),
    /// The file around it makes no sense.
    #[error("it is no object file that could carry a manifest: {0}; build the patch again")]
    NotAnObject(String),
    /// It has a manifest already.
    #[error("it has a manifest already; write the manifest to the object file that the compiler made")]
    Present,
}

/// Lower-case hex of a SHA-256, as in manifests.
#[must_use]
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// The object file `object` with a section that holds `manifest`. The same input gives the same bytes.
///
/// # Errors
/// It is no object file, has a manifest already, or the manifest is not sound.
pub fn write(object: &[u8], manifest: &Manifest) -> Result<Vec<u8>, ManifestError> {
    check(manifest)?;
    if elf::find(object, SECTION)?.is_some() {
        return Err(ManifestError::Present);
    }
    let json = serde_json::to_string_pretty(manifest).map_err(|error| ManifestError::Damaged(error.to_string()))?;
    let text = format!("{MAGIC}{VERSION} sha256:{}\n{json}\n", "0".repeat(DIGITS));
    if text.len() > SIZE_MOST {
        return Err(ManifestError::Damaged(format!("{} bytes are too much", text.len())));
    }
    let mut bytes = elf::append(object, SECTION, text.as_bytes())?;
    let digest = sha256_hex(&bytes);
    let section = elf::find(&bytes, SECTION)?.ok_or_else(|| ManifestError::NotAnObject("no room".to_owned()))?;
    let at = section.start + digits_at(VERSION);
    bytes[at..at + DIGITS].copy_from_slice(digest.as_bytes());
    Ok(bytes)
}

/// The manifest of a patch file; none: an object file without one.
///
/// # Errors
/// There is one, but it is of a newer version, damaged, or the file was changed.
pub fn read(file: &[u8]) -> Result<Option<Manifest>, ManifestError> {
    let Some(section) = elf::find(file, SECTION)? else { return Ok(None) };
    let damaged = |what: &str| ManifestError::Damaged(what.to_owned());
    if section.len() > SIZE_MOST {
        return Err(ManifestError::Damaged(format!("{} bytes are too much", section.len())));
    }
    let text = std::str::from_utf8(&file[section.clone()]).map_err(|_| damaged("it is no text"))?;
    let rest = text.strip_prefix(MAGIC).ok_or_else(|| damaged("it does not begin like one"))?;
    let (head, json) = rest.split_once('\n').ok_or_else(|| damaged("it has one line only"))?;
    let (version, checksum) = head.split_once(" sha256:").ok_or_else(|| damaged("it has no checksum"))?;
    let found: u32 = version.parse().map_err(|_| damaged("its version is no number"))?;
    if found > VERSION {
        return Err(ManifestError::Version { found });
    }
    // `+1` is a number, too, but nothing that was written.
    if found == 0 || version != found.to_string() || checksum.len() != DIGITS {
        return Err(damaged("its first line is not as it should be"));
    }
    let at = section.start + digits_at(found);
    let zeros = [b'0'; DIGITS];
    let digest = Sha256::new().chain_update(&file[..at]).chain_update(zeros).chain_update(&file[at + DIGITS..]);
    if hex(&digest.finalize()) != checksum {
        return Err(ManifestError::Tampered);
    }
    let manifest: Manifest = serde_json::from_str(json).map_err(|error| ManifestError::Damaged(error.to_string()))?;
    check(&manifest)?;
    Ok(Some(manifest))
}

/// Where the checksum's digits begin in the section.
fn digits_at(version: u32) -> usize {
    MAGIC.len() + version.to_string().len() + " sha256:".len()
}

/// What every manifest must be like, whoever wrote it.
fn check(manifest: &Manifest) -> Result<(), ManifestError> {
    let damaged = |what: String| Err(ManifestError::Damaged(what));
    let lists = [manifest.builds.len(), manifest.functions.len(), manifest.requires.len(), manifest.replaces.len()];
    let symbols = manifest.builds.iter().map(|build| build.symbols.len()).sum();
    if lists.into_iter().chain([symbols, manifest.origin.fixes.len()]).any(|length| length > ENTRIES_MOST) {
        return damaged(format!("it has a list with more than {ENTRIES_MOST} entries"));
    }
    if manifest.builds.is_empty() || manifest.functions.is_empty() {
        return damaged("it names no build of the target, or no function".to_owned());
    }
    let is_hex = |text: &str| text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    for build in &manifest.builds {
        let id = &build.build_id;
        if id.is_empty() || id.len() > 128 || id.len() % 2 != 0 || !is_hex(id) {
            return damaged("a build-id is not lower-case hex".to_owned());
        }
        let prints = build.symbols.iter().filter_map(|place| place.fingerprint.as_deref());
        if prints.into_iter().any(|print| print.len() != DIGITS || !is_hex(print)) {
            return damaged("a fingerprint is no SHA-256".to_owned());
        }
    }
    let names = [&manifest.name, &manifest.target, &manifest.tool].into_iter();
    let names = names.chain(manifest.functions.iter().flat_map(|function| [&function.old, &function.new]));
    let names = names.chain(manifest.builds.iter().flat_map(|build| &build.symbols).map(|place| &place.name));
    let mut names = names.chain(&manifest.requires).chain(&manifest.replaces).chain(manifest.hooks.all());
    if let Some(name) = names.find(|name| name.is_empty() || name.len() > NAME_MOST || name.contains('\0')) {
        return damaged(format!("a name has {} bytes, or a NUL", name.len()));
    }
    let mut olds: Vec<_> = manifest.functions.iter().map(|function| (&function.old, &function.file)).collect();
    olds.sort_unstable();
    if let Some(twice) = olds.windows(2).find(|pair| pair[0] == pair[1]) {
        return damaged(format!("it replaces {} twice", twice[0].0));
    }
    Ok(())
}

impl Manifest {
    /// What it says of the build with that id.
    #[must_use]
    pub fn build(&self, build_id: &str) -> Option<&Build> {
        self.builds.iter().find(|build| build.build_id == build_id)
    }
}

impl Replaced {
    /// The function as people and queries write it: `f`, or `file.c:f`.
    #[must_use]
    pub fn written(&self) -> String {
        match &self.file {
            Some(file) => format!("{file}:{}", self.old),
            None => self.old.clone(),
        }
    }
}
