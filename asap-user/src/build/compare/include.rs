//! The fourth pass: what the changed functions need. New functions, new variables, and constants without identity come along;
//! what the running program has already stays there and is referred to by its name. Not for writing the file: that is
//! `extract`.

use super::{
    correlate::{Correlation, base_name},
    mark::{Marks, is_named, parts, uses},
    object::{Kind, Object, SymbolKind},
};
use object::elf;
use std::collections::{BTreeMap, BTreeSet};

/// What a patch holds of an object.
#[derive(Clone, Debug, Default)]
pub struct Inclusion {
    /// Sections of the new build that come along.
    pub sections: BTreeSet<usize>,
    /// Sections of the new build that stand for what the program has, by its name there.
    pub imports: BTreeMap<usize, Import>,
    /// Names of new variables and constants.
    pub new_data: Vec<String>,
    /// Used, but of no name by which it could be found in the program.
    pub nameless: BTreeSet<usize>,
}

/// Something of the running program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Import {
    /// Raw name there.
    pub name: String,
    /// Static.
    pub local: bool,
    /// Where in its section the name stands.
    pub offset: u64,
    /// The section of the old build.
    pub section: usize,
}

/// Collects what is needed.
pub fn include(old: &Object, new: &Object, found: &Correlation, marks: &Marks) -> Inclusion {
    let mut inclusion = Inclusion::default();
    let mut queue: Vec<usize> = marks.code.keys().copied().collect();
    // A new global function is for another object.
    queue.extend(new.of_kind(Kind::Code).filter(|&at| {
        let is_for_others =
            |symbol: &super::object::Symbol| symbol.kind == SymbolKind::Function && !symbol.local && !symbol.weak;
        found.old_of(at).is_none() && new.symbols_in(at).into_iter().any(is_for_others)
    }));
    queue.extend(new.of_kind(Kind::Declaration));
    let parts = parts(new);
    while let Some(at) = queue.pop() {
        if !inclusion.sections.insert(at) {
            continue;
        }
        queue.extend(parts.iter().filter(|(whole, _)| *whole == at).map(|&(_, part)| part));
        queue.extend(parts.iter().filter(|(_, part)| *part == at).map(|&(whole, _)| whole));
        if new.sections[at].kind == Kind::Code {
            queue.extend(exception_table(new, at));
        }
        for used in uses(new, at) {
            if comes_along(new, found, marks, used) {
                queue.push(used);
            } else if let Some(import) = import(old, found, used) {
                inclusion.imports.insert(used, import);
            } else if is_element(new, used) {
                inclusion.nameless.insert(used);
            }
        }
    }
    // The unwind table refers to what only it needs (the personality routine's pointer).
    if !inclusion.sections.is_empty() {
        for table in new.of_kind(Kind::Unwind) {
            for used in uses(new, table).into_iter().filter(|&at| new.title(at).starts_with("DW.ref.")) {
                inclusion.sections.insert(used);
            }
        }
    }
    let is_new = |&&at: &&usize| {
        let kind = new.sections[at].kind;
        matches!(kind, Kind::Variable | Kind::ThreadLocal) && !is_pointers(new, at)
            || kind == Kind::Constant && is_named(new, at) && found.old_of(at).is_none() && !is_generated(new.title(at))
    };
    inclusion.new_data = inclusion
        .sections
        .iter()
        .filter(is_new)
        .map(|&at| new.title(at).to_owned())
        .filter(|name| !name.starts_with("DW.ref."))
        .collect();
    inclusion
}

fn is_element(new: &Object, at: usize) -> bool {
    matches!(new.sections[at].kind, Kind::Code | Kind::Constant | Kind::Variable | Kind::ThreadLocal)
}

/// Constants that the compiler makes: nobody compares their addresses, and a copy is as good.
fn is_generated(name: &str) -> bool {
    const GENERATED: [&str; 6] = ["CSWTCH", "__func__", "__FUNCTION__", "__PRETTY_FUNCTION__", "C", "DW.ref"];
    GENERATED.contains(&base_name(name).as_str())
        || name.starts_with("switch.table.")
        || name.starts_with("DW.ref.")
        || base_name(name)
            .rsplit('.')
            .next()
            .is_some_and(|last| last.starts_with("__func__") || last.starts_with("__PRETTY"))
}

fn comes_along(new: &Object, found: &Correlation, marks: &Marks, at: usize) -> bool {
    let is_old = found.old_of(at).is_some();
    match new.sections[at].kind {
        Kind::Code => !is_old || marks.code.contains_key(&at),
        Kind::Constant => !is_old || marks.constants.contains(&at) || !is_named(new, at) || is_generated(new.title(at)),
        Kind::Strings | Kind::Literals => true,
        Kind::Variable => !is_old || is_pointers(new, at),
        Kind::ThreadLocal => !is_old,
        Kind::Startup | Kind::Declaration | Kind::Unwind | Kind::Debug | Kind::Other => false,
    }
}

/// Addresses that the compiler put aside for itself (exception tables reach type information by such): a copy is as good.
fn is_pointers(new: &Object, at: usize) -> bool {
    let section = &new.sections[at];
    let covered = section.relocations.iter().filter(|relocation| relocation.kind == elf::R_X86_64_64.0).count();
    new.symbols_in(at).is_empty() && covered as u64 * 8 == section.size
}

fn import(old: &Object, found: &Correlation, at: usize) -> Option<Import> {
    let section = found.old_of(at)?;
    let symbols = old.symbols_in(section);
    // A global name is certain.
    let symbol = symbols
        .iter()
        .find(|symbol| !symbol.local)
        .or_else(|| symbols.iter().find(|symbol| symbol.kind != SymbolKind::Untyped))?;
    Some(Import { name: symbol.name.clone(), local: symbol.local, offset: symbol.value, section })
}

/// Where a function's exceptions go, which its unwind entry refers to, not itself.
fn exception_table(new: &Object, code: usize) -> Option<usize> {
    let title = new.title(code);
    let own = format!(".gcc_except_table.{title}");
    let whole = title.strip_suffix(".cold").map(|whole| format!(".gcc_except_table.{whole}"));
    let named =
        |wanted: &str| (0..new.sections.len()).find(|&at| new.sections[at].name == wanted && new.sections[at].size > 0);
    named(&own).or_else(|| named(&whole?)).or_else(|| named(".gcc_except_table"))
}
