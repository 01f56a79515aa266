//! What came of one fix. Kept in a file, so that a study can be taken up again.

use anyhow::Result;
use asap::patch::manifest::Class;
use serde::{Deserialize, Serialize};
use std::{fs, path::Path};

/// How it went with a fix, the worst last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The patch went in, its code was seen to run, it went out, and nothing was left of it.
    Repaired,
    /// It went in and out, and nothing was left; nothing was asked that runs its code.
    InAndOut,
    /// There is no patch: its class says why.
    NoPatch,
    /// Something did not work.
    Failed,
    /// The server served no longer, or not rightly, with the patch.
    Broken,
}

impl Verdict {
    /// All, in order.
    pub const ALL: [Self; 5] = [Self::Repaired, Self::InAndOut, Self::NoPatch, Self::Failed, Self::Broken];

    /// In words.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Repaired => "repaired",
            Self::InAndOut => "in and out",
            Self::NoPatch => "no patch",
            Self::Failed => "FAILED",
            Self::Broken => "BROKEN",
        }
    }

    /// A patch was made, and the server is fine with it.
    pub const fn is_patched(self) -> bool {
        matches!(self, Self::Repaired | Self::InAndOut)
    }
}

/// One step of a fix.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Step {
    /// What was done.
    pub name: String,
    /// What was seen.
    pub seen: String,
    /// How long it took, seconds.
    pub seconds: f64,
}

/// What came of a fix.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Source package.
    pub package: String,
    /// Debian's version, which has the fix.
    pub version: String,
    /// Name of the fix.
    pub fix: String,
    /// Its CVE.
    pub cve: String,
    /// What it repairs.
    pub about: String,
    /// How it went.
    pub verdict: Verdict,
    /// The class that was found.
    pub class: Option<Class>,
    /// The class that the corpus says it has.
    pub expected: Class,
    /// Functions that are replaced.
    pub functions: usize,
    /// Of these, those whose new code was seen to run.
    pub ran: Vec<String>,
    /// The vulnerable and the repaired answer were told apart.
    pub reproduced: bool,
    /// From request to active in all processes, ms.
    pub patch_ms: Option<f64>,
    /// Longest time that a gate was closed, us.
    pub gate_us: Option<u64>,
    /// Answers of the load while the patch went in; all of them right.
    pub answers: u64,
    /// Why there is no patch, or what failed.
    pub why: Option<String>,
    /// What the corpus says besides.
    #[serde(default)]
    pub note: Option<String>,
    /// What was done.
    pub steps: Vec<Step>,
    /// The fix's file when it was studied.
    pub described: String,
}

impl Outcome {
    /// Whether it is what the corpus says.
    pub fn is_expected(&self) -> bool {
        !matches!(self.verdict, Verdict::Failed | Verdict::Broken) && self.class == Some(self.expected)
    }

    /// Keeps it.
    pub fn write(&self, file: &Path) -> Result<()> {
        if let Some(folder) = file.parent() {
            fs::create_dir_all(folder)?;
        }
        Ok(fs::write(file, serde_json::to_vec_pretty(self)?)?)
    }

    /// The one that is kept.
    pub fn read(file: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(file).ok()?).ok()
    }
}
