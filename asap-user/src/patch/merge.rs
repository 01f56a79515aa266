//! Several objects as one program, by the rules of a static linker: one definition per global name, COMDAT groups once, COMMON
//! symbols merged; what is left undefined is an import. Not for addresses: that is `layout`.

use super::declarations::{self, Declarations};
use super::error::PatchError;
use super::input::{Binding, Input, Place, SectionKind, Symbol, SymbolKind};
use super::{Import, ImportKind};
use crate::patch::relocation::{self, Formula};
use std::collections::{BTreeMap, HashMap, HashSet};

/// Undefined symbols of this prefix are the original of the function that follows it (see asap-patch.h).
const ORIGINAL_PREFIX: &str = "asap.original.";
const TABLE_SYMBOL: &str = "_GLOBAL_OFFSET_TABLE_";

/// What a symbol of a file stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Meaning {
    /// A place in a section of the patch.
    Section { file: usize, section: usize, offset: u64 },
    /// A number.
    Absolute(u64),
    /// A COMMON variable of the patch.
    Common(usize),
    /// Something of the target.
    Import(usize),
    /// Data with vague linkage (C++ inline variables, statics of inline functions): the target's where it has it, else
    /// the patch's own; as the dynamic linker would bind it.
    Shared { import: usize, file: usize, section: usize, offset: u64 },
    /// The original of a replaced function.
    Original(usize),
    /// Start of the slots.
    Table,
    /// In a section that has no address in the patch.
    Dropped,
}

/// A COMMON variable.
#[derive(Clone, Debug)]
pub(super) struct Common {
    pub name: String,
    pub size: u64,
    pub alignment: u64,
}

/// All objects of a patch, with their symbols bound to each other.
#[derive(Clone, Debug)]
pub(super) struct Program {
    pub inputs: Vec<Input>,
    /// Per file, per symbol.
    pub meanings: Vec<Vec<Meaning>>,
    pub imports: Vec<Import>,
    /// Names of the replaced functions whose original is wanted.
    pub originals: Vec<String>,
    pub commons: Vec<Common>,
    pub declarations: Declarations,
}

/// File and symbol index.
type SymbolId = (usize, usize);

impl Program {
    pub fn merge(mut inputs: Vec<Input>) -> Result<Self, PatchError> {
        discard_repeated_groups(&mut inputs);
        let definitions = definitions(&inputs)?;
        let declarations = declarations::read(&inputs)?;
        let mut binder = Binder {
            inputs: &inputs,
            definitions: &definitions,
            declarations: &declarations,
            commons: commons(&inputs, &definitions)?
                .into_values()
                .enumerate()
                .map(|(i, c)| (c.name.clone(), (i, c)))
                .collect(),
            imports: Vec::new(),
            by_name: HashMap::new(),
            originals: Vec::new(),
        };
        let meanings = binder.bind_all();
        let Binder { commons, imports, originals, .. } = binder;
        let mut commons: Vec<(usize, Common)> = commons.into_values().collect();
        commons.sort_by_key(|&(index, _)| index);
        let commons = commons.into_iter().map(|(_, common)| common).collect();

        for (file, meanings) in meanings.iter().enumerate() {
            for section in 0..inputs[file].sections.len() {
                if inputs[file].sections[section].kind == SectionKind::Unwind {
                    super::unwind::filter(&mut inputs[file], section, |input, relocation| {
                        match meanings[relocation.symbol] {
                            // A name may lead to the definition that another file brought: not this table's business.
                            Meaning::Section { file: f, section, .. } => {
                                f == file && input.sections[section].is_laid_out()
                            }
                            _ => false,
                        }
                    })?;
                }
            }
        }
        let mut program = Self { inputs, meanings, imports, originals, commons, declarations };
        program.drop_unused_imports();
        Ok(program)
    }

    /// Sections that have an address or go into the unwind table.
    pub fn kept_sections(&self) -> impl Iterator<Item = (usize, usize)> {
        self.inputs.iter().enumerate().flat_map(|(file, input)| {
            input
                .sections
                .iter()
                .enumerate()
                .filter(|(_, s)| s.is_laid_out() || s.kind == SectionKind::Unwind)
                .map(move |(section, _)| (file, section))
        })
    }

    /// What a symbol is called in messages.
    pub fn display_name(&self, file: usize, symbol: usize) -> String {
        let input = &self.inputs[file];
        let symbol = &input.symbols[symbol];
        match (symbol.kind, symbol.place) {
            (SymbolKind::Section, Place::Section(s)) => input.sections[s].name.clone(),
            _ => symbol.name.clone(),
        }
    }

    /// Records of .eh_frame that were dropped may have been the only ones to mention a symbol.
    fn drop_unused_imports(&mut self) {
        let mut used = vec![false; self.imports.len()];
        for (file, section) in self.kept_sections() {
            for r in &self.inputs[file].sections[section].relocations {
                if let Meaning::Import(i) | Meaning::Shared { import: i, .. } = self.meanings[file][r.symbol] {
                    used[i] = true;
                }
            }
        }
        let mut renumbered = Vec::with_capacity(used.len());
        let mut count = 0;
        for &u in &used {
            renumbered.push(count);
            count += usize::from(u);
        }
        let mut keep = used.iter();
        self.imports.retain(|_| keep.next().copied().unwrap_or(false));
        for meaning in self.meanings.iter_mut().flatten() {
            match meaning {
                Meaning::Import(i) if !used[*i] => *meaning = Meaning::Dropped,
                Meaning::Shared { import, file, section, offset } if !used[*import] => {
                    *meaning = Meaning::Section { file: *file, section: *section, offset: *offset };
                }
                Meaning::Import(i) | Meaning::Shared { import: i, .. } => *i = renumbered[*i],
                _ => {}
            }
        }
    }
}

fn discard_repeated_groups(inputs: &mut [Input]) {
    let mut seen = HashSet::new();
    for input in inputs {
        for (signature, members) in std::mem::take(&mut input.groups) {
            if !seen.insert(signature) {
                for member in members {
                    let section = &mut input.sections[member];
                    section.kind = SectionKind::Discarded;
                    section.relocations.clear();
                }
            }
        }
    }
}

/// How much a definition outweighs another one of the same name.
fn weight(symbol: &Symbol) -> u8 {
    match (symbol.place, symbol.binding) {
        (Place::Common, _) => 2,
        (_, Binding::Weak | Binding::Unique) => 1,
        _ => 3,
    }
}

fn definitions(inputs: &[Input]) -> Result<HashMap<String, SymbolId>, PatchError> {
    let mut definitions: HashMap<String, SymbolId> = HashMap::new();
    for (file, input) in inputs.iter().enumerate() {
        for (index, symbol) in input.symbols.iter().enumerate() {
            let defined = match symbol.place {
                Place::Undefined => false,
                Place::Section(s) => input.sections[s].kind != SectionKind::Discarded,
                Place::Absolute | Place::Common => true,
            };
            if !defined || symbol.binding == Binding::Local || symbol.name.is_empty() {
                continue;
            }
            let Some(&(first_file, first)) = definitions.get(&symbol.name) else {
                definitions.insert(symbol.name.clone(), (file, index));
                continue;
            };
            let earlier = &inputs[first_file].symbols[first];
            if weight(earlier) == 3 && weight(symbol) == 3 {
                return Err(PatchError::DuplicateDefinition {
                    symbol: symbol.name.clone(),
                    first: inputs[first_file].name.clone(),
                    second: input.name.clone(),
                });
            }
            if weight(symbol) > weight(earlier) {
                definitions.insert(symbol.name.clone(), (file, index));
            }
        }
    }
    Ok(definitions)
}

/// COMMON variables that no definition overrides, by name; as large and as aligned as the largest declaration.
fn commons(inputs: &[Input], definitions: &HashMap<String, SymbolId>) -> Result<BTreeMap<String, Common>, PatchError> {
    let mut commons: BTreeMap<String, Common> = BTreeMap::new();
    for input in inputs {
        for symbol in input.symbols.iter().filter(|s| s.place == Place::Common) {
            let overridden =
                definitions.get(&symbol.name).is_some_and(|&(f, s)| inputs[f].symbols[s].place != Place::Common);
            if overridden {
                continue;
            }
            let alignment = symbol.value.max(1);
            if !alignment.is_power_of_two() || alignment > super::input::ALIGNMENT_LIMIT {
                return Err(PatchError::Alignment { file: input.name.clone(), what: symbol.name.clone(), alignment });
            }
            let common = commons.entry(symbol.name.clone()).or_insert_with(|| Common {
                name: symbol.name.clone(),
                size: 0,
                alignment: 1,
            });
            common.size = common.size.max(symbol.size);
            common.alignment = common.alignment.max(alignment);
        }
    }
    Ok(commons)
}

struct Binder<'a> {
    inputs: &'a [Input],
    definitions: &'a HashMap<String, SymbolId>,
    declarations: &'a Declarations,
    commons: HashMap<String, (usize, Common)>,
    imports: Vec<Import>,
    by_name: HashMap<String, usize>,
    originals: Vec<String>,
}

impl Binder<'_> {
    fn bind_all(&mut self) -> Vec<Vec<Meaning>> {
        let mut meanings = Vec::with_capacity(self.inputs.len());
        for (file, input) in self.inputs.iter().enumerate() {
            // Only what the patch uses: a symbol that is merely declared needs no counterpart in the target.
            let mut used = vec![false; input.symbols.len()];
            let mut thread_local = vec![false; input.symbols.len()];
            for section in input.sections.iter().filter(|s| s.is_laid_out() || s.kind == SectionKind::Unwind) {
                for r in &section.relocations {
                    used[r.symbol] = true;
                    thread_local[r.symbol] |= relocation::form(r.kind)
                        .is_some_and(|f| matches!(f.formula, Formula::ThreadOffset | Formula::ThreadSlotRelative));
                }
            }
            let bound = input.symbols.iter().enumerate().map(|(index, symbol)| {
                let thread_local = thread_local[index] || symbol.kind == SymbolKind::ThreadLocal;
                self.bind((file, index), symbol, used[index], thread_local)
            });
            meanings.push(bound.collect());
        }
        meanings
    }

    fn bind(&mut self, (file, index): SymbolId, symbol: &Symbol, used: bool, thread_local: bool) -> Meaning {
        if index == 0 {
            return Meaning::Absolute(0);
        }
        if symbol.binding == Binding::Local {
            return self.place((file, index));
        }
        if let Some(&(def_file, def_index)) = self.definitions.get(&symbol.name) {
            let meaning = self.place((def_file, def_index));
            return match meaning {
                Meaning::Section { file, section, offset } if used && self.is_shared(def_file, def_index) => {
                    let kind = ImportKind::Any;
                    let import = Import { name: symbol.name.clone(), kind, weak: true, file: None };
                    Meaning::Shared { import: self.import(symbol.name.clone(), import), file, section, offset }
                }
                other => other,
            };
        }
        if !used {
            return Meaning::Dropped;
        }
        if symbol.name == TABLE_SYMBOL {
            return Meaning::Table;
        }
        let declared = self.declarations.originals.get(&symbol.name).map(String::as_str);
        if let Some(name) = declared.or_else(|| symbol.name.strip_prefix(ORIGINAL_PREFIX)) {
            // A replacement may go by another name than what it replaces.
            let name = self.declarations.replaced_by(name).unwrap_or(name).to_owned();
            let known = self.originals.iter().position(|o| *o == name);
            return Meaning::Original(known.unwrap_or_else(|| {
                self.originals.push(name);
                self.originals.len() - 1
            }));
        }
        let (name, from) = match self.declarations.imports.get(&symbol.name) {
            Some(declared) => declarations::split_name(declared),
            None => (symbol.name.clone(), None),
        };
        let kind = if thread_local { ImportKind::Tls } else { ImportKind::Any };
        let import = Import { name, kind, weak: symbol.binding == Binding::Weak, file: from };
        Meaning::Import(self.import(symbol.name.clone(), import))
    }

    /// The number of an import; what several files say of it is combined.
    fn import(&mut self, key: String, import: Import) -> usize {
        if let Some(&index) = self.by_name.get(&key) {
            let known = &mut self.imports[index];
            known.weak &= import.weak;
            if import.kind == ImportKind::Tls {
                known.kind = ImportKind::Tls;
            }
            return index;
        }
        self.imports.push(import);
        self.by_name.insert(key, self.imports.len() - 1);
        self.imports.len() - 1
    }

    fn place(&self, (file, index): SymbolId) -> Meaning {
        let symbol = &self.inputs[file].symbols[index];
        match symbol.place {
            Place::Absolute => Meaning::Absolute(symbol.value),
            Place::Section(section) if self.inputs[file].sections[section].is_laid_out() => {
                Meaning::Section { file, section, offset: symbol.value }
            }
            Place::Common => {
                self.commons.get(&symbol.name).map_or(Meaning::Dropped, |&(index, _)| Meaning::Common(index))
            }
            Place::Section(_) | Place::Undefined => Meaning::Dropped,
        }
    }

    fn is_shared(&self, file: usize, index: usize) -> bool {
        let symbol = &self.inputs[file].symbols[index];
        let Place::Section(section) = symbol.place else { return false };
        let section = &self.inputs[file].sections[section];
        matches!(symbol.binding, Binding::Weak | Binding::Unique)
            && symbol.kind == SymbolKind::Object
            && section.kind == SectionKind::Data
            // Constant after relocation: vtables and type information, of which a copy is as good.
            && !section.name.starts_with(".data.rel")
            && !symbol.name.starts_with("DW.ref.")
    }
}
