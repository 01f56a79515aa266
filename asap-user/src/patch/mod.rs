//! Patch objects: ordinary `.o` files that a compiler made, read, checked and linked against a live target the way the
//! target's own linker would have done it. Pure: bytes in, plain data out; no process is touched, and nothing is guessed (P6).
//!
//! The steps: [`PatchObject::read`] parses and merges the files, [`PatchObject::layout`] says how much memory they need,
//! [`PatchObject::link`] makes the bytes for given addresses, with a [`Resolver`] that knows the target's symbols.
//! [`prologue`] is the other half of a native patch: the jump at the old entry, and the relocated instructions that
//! keep the original callable. `include/asap-patch.h` is what authors of patches use.
//!
//! Not supported, and refused with a reason: new thread-local variables, constructors, IFUNC definitions, 32-bit code.
//! Sections of equal strings (SHF_MERGE) are laid out as they stand: merging them would only save a few bytes.

mod declarations;
mod error;
mod input;
mod layout;
mod link;
pub mod manifest;
mod merge;
pub mod prologue;
mod relocation;
mod tls;
mod unwind;

#[cfg(test)]
mod tests;

pub use error::PatchError;

use crate::address::TargetAddr;
use input::{Binding, Input, Place, SectionKind, SymbolKind};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, ops::Range};

/// One or more object files, merged.
#[derive(Clone, Debug)]
pub struct PatchObject {
    program: merge::Program,
    placement: layout::Placement,
}

/// A function that the patch defines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionDef {
    /// Name as in the symbol table (mangled).
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Visible to other objects, not static.
    pub global: bool,
}

/// A variable that the patch defines. When the target has one of that name too, they are two variables: a patch that was
/// compiled from a whole source file brings copies of its statics, which hardly ever is what the author wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VariableDef {
    /// Name as in the symbol table (mangled).
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Visible to other objects, not static.
    pub global: bool,
    /// The program may change it.
    pub writable: bool,
}

/// A declared replacement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replacement {
    /// Function of the target: "f" or "file.c:f".
    pub replaces: String,
    /// Symbol of the patch that takes its place.
    pub new_symbol: String,
}

/// Functions of the patch to run in the target; symbol names. Compilers reorder them: several of one kind have no order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hooks {
    /// `int f(void)`, before new code is installed; other than 0: refused.
    pub pre_apply: Vec<String>,
    /// `void f(void)`, after new code was installed.
    pub post_apply: Vec<String>,
    /// `int f(void)`, before old code is put back; other than 0: the patch stays.
    pub pre_revert: Vec<String>,
    /// `void f(void)`, after old code was put back.
    pub post_revert: Vec<String>,
}

impl Hooks {
    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &String> {
        [&self.pre_apply, &self.post_apply, &self.pre_revert, &self.post_revert].into_iter().flatten()
    }
}

/// Something that the target must have.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Import {
    /// Symbol name (mangled).
    pub name: String,
    /// What it is used as.
    pub kind: ImportKind,
    /// The patch can do without.
    pub weak: bool,
    /// Source file of a static name, as declared by ASAP_IMPORT.
    pub file: Option<String>,
}

/// What an import is used as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImportKind {
    /// Function or variable.
    Any,
    /// Thread-local variable.
    Tls,
}

/// Bytes and alignment of a segment; the alignment is at most a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentSize {
    /// Bytes.
    pub size: usize,
    /// Power of two, at most 4096.
    pub alignment: usize,
}

/// Memory that a patch needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Executable: functions, and stubs for far calls.
    pub code: SegmentSize,
    /// Read only once written: constants, unwind table, address slots.
    pub rodata: SegmentSize,
    /// Variables, zeroed ones included.
    pub data: SegmentSize,
}

/// Where a patch will be. The three should lie within 2 GiB of each other and of the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bases {
    /// Of the code.
    pub code: TargetAddr,
    /// Of the constants.
    pub rodata: TargetAddr,
    /// Of the variables.
    pub data: TargetAddr,
}

/// Knows the target's symbols.
pub trait Resolver {
    /// Where an import is; none: the target has nothing of that name.
    fn resolve(&self, import: &Import) -> Option<Resolution>;
    /// Where the original of a replaced function stays callable.
    fn original(&self, function: &str) -> Option<TargetAddr>;
}

/// What an import turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// A function or variable (of an IFUNC: the implementation that was chosen).
    Address(TargetAddr),
    /// A thread-local variable in the static TLS block: its distance from the thread pointer, %fs:0.
    TlsOffset(i64),
}

/// A patch made for certain addresses.
#[derive(Clone, Debug)]
pub struct LinkedPatch {
    /// Contents of the code segment.
    pub code: Vec<u8>,
    /// Contents of the constants' segment.
    pub rodata: Vec<u8>,
    /// Contents of the variables' segment.
    pub data: Vec<u8>,
    /// What the patch defines.
    pub symbols: Vec<LinkedSymbol>,
    /// The unwind table, ended by a zero word, as `__register_frame` wants it.
    pub eh_frame: Option<Range<TargetAddr>>,
}

/// A function or variable of a linked patch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkedSymbol {
    /// Name (mangled).
    pub name: String,
    /// Where it is.
    pub address: TargetAddr,
    /// Bytes.
    pub size: u64,
    /// Function, not variable.
    pub is_function: bool,
    /// Not static.
    pub is_global: bool,
}

impl PatchObject {
    /// Reads object files (name, contents) and merges them as a static linker would.
    pub fn read(files: &[(String, Vec<u8>)]) -> Result<Self, PatchError> {
        if files.is_empty() {
            return Err(PatchError::NoFiles);
        }
        let mut total = 0;
        let mut inputs = Vec::with_capacity(files.len());
        for (name, bytes) in files {
            total += bytes.len() as u64;
            if total > input::SIZE_LIMIT {
                let (file, limit) = (name.clone(), input::SIZE_LIMIT);
                return Err(PatchError::TooLarge { file, size: total, limit });
            }
            let mut input = Input::read(name, bytes)?;
            tls::make_static(&mut input)?;
            inputs.push(input);
        }
        let program = merge::Program::merge(inputs)?;
        let placement = layout::Placement::compute(&program)?;
        Ok(Self { program, placement })
    }

    /// The functions that the patch defines.
    #[must_use]
    pub fn functions(&self) -> Vec<FunctionDef> {
        let of_function =
            |symbol: &input::Symbol, kind| symbol.kind == SymbolKind::Function && kind == SectionKind::Code;
        let functions = self.defined(of_function);
        functions
            .map(|(s, _)| FunctionDef { name: s.name.clone(), size: s.size, global: s.binding != Binding::Local })
            .collect()
    }

    /// The variables that the patch defines.
    #[must_use]
    pub fn variables(&self) -> Vec<VariableDef> {
        let of_variable = |symbol: &input::Symbol, kind| symbol.kind == SymbolKind::Object && kind != SectionKind::Code;
        let mut variables: Vec<VariableDef> = self
            .defined(of_variable)
            .map(|(s, kind)| VariableDef {
                name: s.name.clone(),
                size: s.size,
                global: s.binding != Binding::Local,
                writable: kind == SectionKind::Data,
            })
            .collect();
        variables.extend(self.program.commons.iter().map(|c| VariableDef {
            name: c.name.clone(),
            size: c.size,
            global: true,
            writable: true,
        }));
        variables
    }

    fn defined<'a>(
        &'a self,
        wanted: impl Fn(&input::Symbol, SectionKind) -> bool + 'a,
    ) -> impl Iterator<Item = (&'a input::Symbol, SectionKind)> {
        self.program
            .inputs
            .iter()
            .enumerate()
            .flat_map(|(file, i)| i.symbols.iter().enumerate().map(move |(n, s)| (file, n, i, s)))
            .filter_map(move |(file, index, input, symbol)| {
                let Place::Section(section) = symbol.place else { return None };
                let kind = input.sections[section].kind;
                // A definition that another file's overrode is not part of the patch.
                let is_own = match self.program.meanings[file][index] {
                    merge::Meaning::Section { file: f, section: s, .. }
                    | merge::Meaning::Shared { file: f, section: s, .. } => (f, s) == (file, section),
                    _ => false,
                };
                (is_own && !symbol.name.is_empty() && wanted(symbol, kind)).then_some((symbol, kind))
            })
    }

    /// What was declared with ASAP_REPLACES and ASAP_REPLACE.
    #[must_use]
    pub fn replacements(&self) -> &[Replacement] {
        &self.program.declarations.replacements
    }

    /// What was declared with ASAP_PRE_APPLY and the like.
    #[must_use]
    pub fn hooks(&self) -> &Hooks {
        &self.program.declarations.hooks
    }

    /// Replaced functions whose original the patch calls, by the name they are replaced by ("f" or "file.c:f").
    #[must_use]
    pub fn originals(&self) -> Vec<String> {
        self.program.originals.clone()
    }

    /// What the patch needs from the target.
    #[must_use]
    pub fn imports(&self) -> Vec<Import> {
        self.program.imports.clone()
    }

    /// The types of the relocations that are to be applied, and how often each occurs.
    #[must_use]
    pub fn relocations(&self) -> BTreeMap<String, usize> {
        let sections = self.program.inputs.iter().flat_map(|input| &input.sections);
        let mut counts = BTreeMap::new();
        for relocation in sections.filter(|section| section.is_laid_out()).flat_map(|section| &section.relocations) {
            *counts.entry(relocation::name(relocation.kind)).or_default() += 1;
        }
        counts
    }

    /// How much memory the patch needs.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.placement.sizes
    }

    /// The patch's bytes for these addresses.
    pub fn link(&self, bases: &Bases, resolver: &dyn Resolver) -> Result<LinkedPatch, PatchError> {
        link::link(&self.program, &self.placement, bases, resolver)
    }
}

impl LinkedPatch {
    /// The symbol of that name; a global one before static ones.
    #[must_use]
    pub fn symbol(&self, name: &str) -> Option<&LinkedSymbol> {
        let mut found = self.symbols.iter().filter(|s| s.name == name);
        let first = found.next()?;
        Some(if first.is_global { first } else { found.find(|s| s.is_global).unwrap_or(first) })
    }

    /// First byte to behind the last byte of a function.
    #[must_use]
    pub fn function_range(&self, name: &str) -> Option<Range<TargetAddr>> {
        let symbol = self.symbol(name).filter(|s| s.is_function)?;
        Some(symbol.address..symbol.address.offset(i64::try_from(symbol.size).ok()?))
    }
}
