//! Compares two builds of an object file, in named passes: **correlate** finds which section of one build is which of the
//! other, **compare** asks whether they do the same, **mark** spreads what changed to all that must change with it, **include**
//! collects what a patch needs besides, and **verify** says what can't be patched, and why. Pure: objects in, plain data out.
//! Not for writing the patch: that is `extract`.
//!
//! Both builds must have a section for each function and variable (`-ffunction-sections -fdata-sections`). Sections are
//! compared by decoded instructions and by what they refer to, not by bytes.

#[cfg(test)]
mod apache22;
mod code;
mod correlate;
mod include;
mod mark;
pub mod object;
#[cfg(test)]
pub(in crate::build) mod tests;
mod verify;

use crate::patch::manifest::Class;
use object::Object;
use serde::{Deserialize, Serialize};

pub use code::{Referent, referent};
pub use correlate::Correlation;
pub use include::Inclusion;

/// Objects can't be compared.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompareError {
    /// Not an object file.
    #[error("{file}: {problem}; build it again, and see the log for what the compiler said")]
    NotAnObject {
        /// The file.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// It holds no machine code.
    #[error("{file} was made for link-time optimisation and holds no machine code; build without -flto")]
    LinkTimeOptimisation {
        /// The file.
        file: String,
    },
}

/// What a comparison found.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// Which section of one build is which of the other.
    pub correlation: Correlation,
    /// Functions of both builds that are to be replaced.
    pub changed: Vec<Changed>,
    /// Functions that only the new build has.
    pub added: Vec<String>,
    /// Functions that only the old build has.
    pub removed: Vec<String>,
    /// Variables and constants that only the new build has, and changed functions use.
    pub new_data: Vec<String>,
    /// What the patch holds.
    pub inclusion: Inclusion,
    /// What stands in the way, and what should be known.
    pub findings: Vec<Finding>,
}

/// A function that is to be replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    /// Raw name in the old build.
    pub old: String,
    /// Raw name in the new build.
    pub new: String,
    /// Static.
    pub local: bool,
    /// Why it is: itself, or with what.
    pub reason: Reason,
    /// Section of the new build.
    pub section: usize,
}

/// Why a function is replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Its code is another.
    Code,
    /// It uses that constant, which is another.
    Constant(String),
    /// That part of it changed.
    Part(String),
}

/// Something about a change that decides whether a running program can be repaired.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What it means.
    pub class: Class,
    /// The object file, or the source.
    pub object: String,
    /// Function, variable or type.
    pub subject: String,
    /// What was found.
    pub reason: String,
    /// What can be done.
    pub way_out: String,
}

/// Compares two builds of an object.
#[must_use]
pub fn compare(old: &Object, new: &Object) -> Comparison {
    let correlation = correlate::correlate(old, new);
    let marks = mark::mark(old, new, &correlation);
    let inclusion = include::include(old, new, &correlation, &marks);
    let findings = verify::verify(old, new, &correlation, &marks, &inclusion);
    Comparison {
        changed: marks.changed(old, new, &correlation),
        added: names(
            new,
            inclusion
                .sections
                .iter()
                .copied()
                .filter(|&at| new.sections[at].kind == object::Kind::Code && correlation.old_of(at).is_none()),
        ),
        removed: names(old, old.of_kind(object::Kind::Code).filter(|&at| correlation.new_of(at).is_none())),
        new_data: inclusion.new_data.clone(),
        correlation,
        inclusion,
        findings,
    }
}

impl Comparison {
    /// Whether a patch would hold anything of this object.
    #[must_use]
    pub fn is_same(&self) -> bool {
        self.changed.is_empty() && self.inclusion.sections.is_empty() && self.findings.is_empty()
    }

    /// What the change means for a running program.
    #[must_use]
    pub fn class(&self) -> Class {
        class(&self.changed, &self.new_data, self.is_same(), &self.findings)
    }
}

/// The class of a change: the gravest finding decides. What also runs at other times than at start is worth a patch.
#[must_use]
pub fn class(changed: &[Changed], new_data: &[String], is_same: bool, findings: &[Finding]) -> Class {
    let has = |class| findings.iter().any(|finding| finding.class == class);
    let is_late = |function: &Changed| {
        !findings.iter().any(|finding| finding.class == Class::StartUpOnly && finding.subject == function.new)
    };
    if is_same {
        return Class::NotApplicable;
    }
    for grave in [Class::NotApplicable, Class::DataLayout, Class::NeverQuiescent] {
        if has(grave) {
            return grave;
        }
    }
    if has(Class::StartUpOnly) && !changed.iter().any(is_late) {
        return Class::StartUpOnly;
    }
    if has(Class::NeedsHook) {
        return Class::NeedsHook;
    }
    if new_data.is_empty() { Class::CodeOnly } else { Class::NewData }
}

/// What sections are called; parts that the compiler split off a function are no functions.
fn names(object: &Object, sections: impl Iterator<Item = usize>) -> Vec<String> {
    let is_function =
        |at: usize| object.symbols_in(at).iter().any(|symbol| symbol.kind == object::SymbolKind::Function);
    let mut names: Vec<String> = sections.filter(|&at| is_function(at)).map(|at| object.title(at).to_owned()).collect();
    names.retain(|name| !correlate::is_cold(name));
    names.sort();
    names
}
