//! The second and third pass. Compare: do two sections that belong together do the same? Mark: what changed, and what must
//! be replaced with it: a function with the parts that were split off it, the functions that use a constant that changed. Not
//! for what they need besides: that is `include`.

use super::{
    Changed, Reason,
    code::{self, Referent},
    correlate::{Correlation, is_cold},
    object::{Kind, Object, Place, SymbolKind},
};
use std::collections::{BTreeMap, BTreeSet};

/// What changed, by sections of the new build.
#[derive(Clone, Debug, Default)]
pub struct Marks {
    /// Code that is in both builds, and why it is to be replaced.
    pub code: BTreeMap<usize, Reason>,
    /// Constants that are in both builds and changed, or use such.
    pub constants: BTreeSet<usize>,
    /// Variables that start with another value or size.
    pub variables: BTreeSet<usize>,
    /// The list of what runs at start changed.
    pub startup: bool,
}

/// Whether a reference leads to the same in both builds.
fn same_referent(found: &Correlation, old: &Referent, new: &Referent) -> bool {
    match (old, new) {
        (Referent::Section { section: a, offset: x }, Referent::Section { section: b, offset: y }) => {
            found.new_of(*a) == Some(*b) && x == y
        }
        (old, new) => old == new,
    }
}

/// Whether two sections do the same.
pub fn same(old: &Object, new: &Object, found: &Correlation, a: usize, b: usize) -> bool {
    let (left, right) = (&old.sections[a], &new.sections[b]);
    if left.kind != right.kind || (left.kind != Kind::Code && left.size != right.size) {
        return false;
    }
    let (olds, news) = (code::items(old, a), code::items(new, b));
    olds.len() == news.len()
        && olds.iter().zip(&news).all(|(old, new)| {
            let mut references = old.references.iter().zip(&new.references);
            old.is_like(new) && references.all(|((_, old), (_, new))| same_referent(found, old, new))
        })
}

/// The sections that a section refers to, each once.
pub fn uses(object: &Object, section: usize) -> BTreeSet<usize> {
    let target = |symbol: usize| match object.symbols.get(symbol)?.place {
        Place::Section(target) => Some(target),
        _ => None,
    };
    object.sections[section].relocations.iter().filter_map(|relocation| target(relocation.symbol)).collect()
}

/// Whether a section is called by a name that people or linkers know it by.
pub fn is_named(object: &Object, section: usize) -> bool {
    object.symbols_in(section).iter().any(|symbol| symbol.kind != SymbolKind::Untyped || !symbol.local)
}

/// Finds what changed.
pub fn mark(old: &Object, new: &Object, found: &Correlation) -> Marks {
    let mut marks = Marks::default();
    for (a, b) in found.pairs() {
        if same(old, new, found, a, b) {
            continue;
        }
        match new.sections[b].kind {
            Kind::Code => {
                marks.code.insert(b, Reason::Code);
            }
            Kind::Constant => {
                marks.constants.insert(b);
            }
            Kind::Startup => marks.startup = true,
            _ => {
                marks.variables.insert(b);
            }
        }
    }
    // The runtime's list of constructors has no partner when there was none before.
    marks.startup |= new.of_kind(Kind::Startup).any(|at| found.old_of(at).is_none());
    spread(new, found, &mut marks);
    marks
}

/// Who uses a constant that changed must change; parts of a function go together.
fn spread(new: &Object, found: &Correlation, marks: &mut Marks) {
    let elements: Vec<usize> =
        new.of_kind(Kind::Code).chain(new.of_kind(Kind::Constant)).filter(|&at| found.old_of(at).is_some()).collect();
    let all_uses: BTreeMap<usize, BTreeSet<usize>> = elements.iter().map(|&at| (at, uses(new, at))).collect();
    let parts = parts(new);
    loop {
        let before = (marks.code.len(), marks.constants.len());
        for &at in &elements {
            let Some(&constant) = all_uses[&at].iter().find(|used| marks.constants.contains(used)) else { continue };
            match new.sections[at].kind {
                Kind::Code => {
                    let reason = Reason::Constant(new.title(constant).to_owned());
                    marks.code.entry(at).or_insert(reason);
                }
                _ => {
                    marks.constants.insert(at);
                }
            }
        }
        for &(whole, part) in &parts {
            let name = new.title(part).to_owned();
            if marks.code.contains_key(&part) || found.old_of(part).is_none() && found.old_of(whole).is_some() {
                marks.code.entry(whole).or_insert(Reason::Part(name));
            }
            if marks.code.contains_key(&whole) && found.old_of(part).is_some() {
                marks.code.entry(part).or_insert(Reason::Code);
            }
        }
        if before == (marks.code.len(), marks.constants.len()) {
            return;
        }
    }
}

/// Functions and the unlikely parts that were split off them.
pub fn parts(object: &Object) -> Vec<(usize, usize)> {
    let code: BTreeMap<&str, usize> = object.of_kind(Kind::Code).map(|at| (object.title(at), at)).collect();
    let whole = |name: &str| {
        name.strip_suffix(".cold").or_else(|| name.rsplit_once(".cold.").map(|(whole, _)| whole)).map(str::to_owned)
    };
    let pair = |(name, part): (&&str, &usize)| {
        let whole = whole(name).filter(|_| is_cold(name))?;
        Some((*code.get(whole.as_str())?, *part))
    };
    code.iter().filter_map(pair).collect()
}

impl Marks {
    /// The functions to be replaced: what has an entry of its own. Parts go with their functions.
    pub fn changed(&self, old: &Object, new: &Object, found: &Correlation) -> Vec<Changed> {
        let mut changed: Vec<Changed> = Vec::new();
        for (&section, reason) in &self.code {
            let Some(before) = found.old_of(section) else { continue };
            let (Some(a), Some(b)) = (function(old, before), function(new, section)) else { continue };
            if is_cold(&a.name) {
                continue;
            }
            let (old, new, local) = (a.name.clone(), b.name.clone(), a.local);
            changed.push(Changed { old, new, local, reason: reason.clone(), section });
        }
        changed.sort_by(|a, b| a.old.cmp(&b.old));
        changed
    }
}

/// The first function of a section.
pub fn function(object: &Object, section: usize) -> Option<&super::object::Symbol> {
    object.symbols_in(section).into_iter().find(|symbol| symbol.kind == SymbolKind::Function)
}
