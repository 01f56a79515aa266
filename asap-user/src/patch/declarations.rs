//! What asap-patch.h lets an author declare: replacements, originals, imports of static names, hooks. They stand in sections
//! `.asap.*` as pairs of pointers (symbol, name), read here through their relocations, so that neither optimisation nor C++ name
//! mangling matter. Not for whether the target has what they name.

use super::error::PatchError;
use super::input::{Input, Place, Relocation, SectionKind, SymbolKind};
use super::{Hooks, Replacement};
use std::collections::HashMap;

/// Functions put into `.text.asap.replaces:NAME` replace NAME.
const REPLACES_PREFIX: &str = ".text.asap.replaces:";
/// Size of a record: two pointers.
const RECORD: usize = 16;
/// Records in one section.
const RECORD_LIMIT: usize = 4096;

/// All declarations of a patch.
#[derive(Clone, Debug, Default)]
pub(super) struct Declarations {
    pub replacements: Vec<Replacement>,
    pub hooks: Hooks,
    /// Undefined symbol -> function whose original it is.
    pub originals: HashMap<String, String>,
    /// Undefined symbol -> "name" or "file.c:name" in the target.
    pub imports: HashMap<String, String>,
}

impl Declarations {
    /// What the function `symbol` of the patch was declared to replace.
    pub fn replaced_by(&self, symbol: &str) -> Option<&str> {
        self.replacements.iter().find(|r| r.new_symbol == symbol).map(|r| r.replaces.as_str())
    }
}

/// "file.c:name" as name and file; a C++ qualified name is no file.
pub(super) fn split_name(declared: &str) -> (String, Option<String>) {
    let colon = declared
        .char_indices()
        .find(|&(i, c)| c == ':' && !declared[i + 1..].starts_with(':') && !declared[..i].ends_with(':'))
        .map(|(i, _)| i)
        .filter(|&i| i > 0 && declared[..i].contains('.') && i + 1 < declared.len());
    match colon {
        Some(i) => (declared[i + 1..].to_owned(), Some(declared[..i].to_owned())),
        None => (declared.to_owned(), None),
    }
}

/// Reads the declarations of all files.
pub(super) fn read(inputs: &[Input]) -> Result<Declarations, PatchError> {
    let mut all = Declarations::default();
    for input in inputs {
        for (index, section) in input.sections.iter().enumerate() {
            if section.kind == SectionKind::Declaration {
                read_section(input, index, &mut all)?;
            } else if section.kind == SectionKind::Code
                && let Some(replaced) = section.name.strip_prefix(REPLACES_PREFIX)
            {
                let new_symbol = only_function(input, index)?;
                add_replacement(input, &section.name, &mut all, replaced.to_owned(), new_symbol)?;
            }
        }
    }
    refuse_ambiguous(inputs, all.replacements.iter().map(|r| &r.new_symbol).chain(all.hooks.all()))?;
    Ok(all)
}

fn read_section(input: &Input, index: usize, all: &mut Declarations) -> Result<(), PatchError> {
    let section = &input.sections[index];
    let refuse = |problem: &str| PatchError::Declaration {
        file: input.name.clone(),
        section: section.name.clone(),
        problem: problem.to_owned(),
    };
    // The manifest of a built patch is for others.
    let Some(what) = section.name.strip_prefix(".asap.") else { return Ok(()) };
    if section.data.len() > RECORD * RECORD_LIMIT {
        return Err(refuse("it has more declarations than any patch needs"));
    }
    if !section.data.len().is_multiple_of(RECORD) {
        return Err(refuse("its size is not a multiple of a declaration's"));
    }
    for start in (0..section.data.len()).step_by(RECORD) {
        let relocation_at = |offset: usize| {
            let at = section.relocations.partition_point(|r| r.offset < offset as u64);
            let r = section.relocations.get(at)?;
            (r.offset == offset as u64 && r.kind == object::elf::R_X86_64_64.0).then_some(r)
        };
        let subject = relocation_at(start).ok_or_else(|| refuse("a declaration names no symbol"))?;
        let name = || match relocation_at(start + 8) {
            Some(r) => string(input, r).map(Some).ok_or_else(|| refuse("a name is not a string of the object")),
            None => Ok(None),
        };
        let undefined = || {
            let symbol = &input.symbols[subject.symbol];
            match symbol.place {
                Place::Undefined if !symbol.name.is_empty() => Ok(symbol.name.clone()),
                _ => Err(refuse(&format!(
                    "`{}` stands for something of the target, but the patch defines it; declare it extern only",
                    symbol.name
                ))),
            }
        };
        let function =
            || function(input, subject).ok_or_else(|| refuse("a declaration names no function of this object"));
        let named =
            |name: Option<String>| name.filter(|n| !n.is_empty()).ok_or_else(|| refuse("a declaration has no name"));
        match what {
            "replace" => {
                let new_symbol = function()?;
                let replaces = name()?.unwrap_or_else(|| new_symbol.clone());
                add_replacement(input, &section.name, all, replaces, new_symbol)?;
            }
            "original" => {
                all.originals.insert(undefined()?, named(name()?)?);
            }
            // The second pointer is the new function itself: its symbol is the (mangled) name.
            "original_of" => {
                let of = relocation_at(start + 8).ok_or_else(|| refuse("a declaration names no function"))?;
                let symbol = &input.symbols[of.symbol];
                let of = if symbol.place == Place::Undefined {
                    Some(symbol.name.clone())
                } else {
                    self::function(input, of)
                };
                all.originals.insert(undefined()?, named(of)?);
            }
            "import" => {
                all.imports.insert(undefined()?, named(name()?)?);
            }
            "pre_apply" => all.hooks.pre_apply.push(function()?),
            "post_apply" => all.hooks.post_apply.push(function()?),
            "pre_revert" => all.hooks.pre_revert.push(function()?),
            "post_revert" => all.hooks.post_revert.push(function()?),
            _ => return Err(refuse("declarations of this kind are unknown to this version")),
        }
    }
    Ok(())
}

fn add_replacement(
    input: &Input,
    section: &str,
    all: &mut Declarations,
    replaces: String,
    new_symbol: String,
) -> Result<(), PatchError> {
    let refuse = |problem| PatchError::Declaration { file: input.name.clone(), section: section.to_owned(), problem };
    if replaces.is_empty() {
        return Err(refuse("a replacement has an empty name".to_owned()));
    }
    if all.replacements.len() >= RECORD_LIMIT {
        return Err(refuse("there are more replacements than any patch needs".to_owned()));
    }
    if let Some(other) = all.replacements.iter().find(|r| r.replaces == replaces) {
        if other.new_symbol == new_symbol {
            return Ok(());
        }
        return Err(refuse(format!("both `{}` and `{new_symbol}` replace `{replaces}`", other.new_symbol)));
    }
    all.replacements.push(Replacement { replaces, new_symbol });
    Ok(())
}

/// The string that a relocation points to.
fn string(input: &Input, r: &Relocation) -> Option<String> {
    let symbol = &input.symbols[r.symbol];
    let Place::Section(section) = symbol.place else { return None };
    let start = usize::try_from(symbol.value.checked_add_signed(r.addend)?).ok()?;
    let bytes = input.sections[section].data.get(start..)?;
    let end = bytes.iter().position(|&b| b == 0)?;
    Some(std::str::from_utf8(&bytes[..end]).ok()?.to_owned())
}

/// The name of the function that a relocation points to; static functions are often referred to by section and offset.
fn function(input: &Input, r: &Relocation) -> Option<String> {
    let symbol = &input.symbols[r.symbol];
    let Place::Section(section) = symbol.place else { return None };
    if input.sections[section].kind != SectionKind::Code {
        return None;
    }
    if symbol.kind != SymbolKind::Section && r.addend == 0 {
        return Some(symbol.name.clone());
    }
    let offset = symbol.value.checked_add_signed(r.addend)?;
    let mut candidates =
        input.symbols.iter().filter(|s| s.place == Place::Section(section) && s.value == offset && !s.name.is_empty());
    candidates.find(|s| s.kind == SymbolKind::Function).map(|s| s.name.clone())
}

/// The one function in a section; parts that the compiler split off or specialised don't count.
fn only_function(input: &Input, section: usize) -> Result<String, PatchError> {
    let is_part = |name: &str| [".part.", ".constprop.", ".isra.", ".cold", ".llvm."].iter().any(|p| name.contains(p));
    let mut names: Vec<&str> = input
        .symbols
        .iter()
        .filter(|s| s.place == Place::Section(section) && s.kind == SymbolKind::Function && !is_part(&s.name))
        .map(|s| s.name.as_str())
        .collect();
    names.dedup();
    match names[..] {
        [name] => Ok(name.to_owned()),
        _ => Err(PatchError::Declaration {
            file: input.name.clone(),
            section: input.sections[section].name.clone(),
            problem: format!("one function should be in it, but there are {}", names.len()),
        }),
    }
}

/// The functions that declarations name are passed on by name, so that each name must belong to one function only.
fn refuse_ambiguous<'a>(inputs: &[Input], names: impl Iterator<Item = &'a String>) -> Result<(), PatchError> {
    let mut count: HashMap<&str, usize> = names.map(|n| (n.as_str(), 0)).collect();
    for (input, symbol) in inputs.iter().flat_map(|i| i.symbols.iter().map(move |s| (i, s))) {
        if symbol.kind == SymbolKind::Function
            && let Place::Section(section) = symbol.place
            && input.sections[section].kind == SectionKind::Code
            && let Some(count) = count.get_mut(symbol.name.as_str())
        {
            *count += 1;
        }
    }
    match count.iter().filter(|&(_, &n)| n > 1).map(|(&name, _)| name).min() {
        Some(symbol) => Err(PatchError::AmbiguousSymbol { symbol: symbol.to_owned() }),
        None => Ok(()),
    }
}
