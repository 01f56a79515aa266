//! First pass: which section of the old build is which of the new one. By symbols first; then by what compilers number
//! (`f.isra.0`, `counter.1`): numbers change with every edit, so that such names belong together by the functions that use them,
//! or by being the only ones; last, what has no symbol by the name of its section. What is not certain stays alone. Not for
//! whether they are equal.

use super::{
    code,
    object::{Kind, Object, Place, SymbolKind},
};
use std::collections::{BTreeMap, HashMap, HashSet};

/// Sections that belong together.
#[derive(Clone, Debug)]
pub struct Correlation {
    to_new: Vec<Option<usize>>,
    to_old: Vec<Option<usize>>,
}

impl Correlation {
    /// The section of the new build that is this one of the old build.
    #[must_use]
    pub fn new_of(&self, old: usize) -> Option<usize> {
        self.to_new.get(old).copied().flatten()
    }

    /// The section of the old build that is this one of the new build.
    #[must_use]
    pub fn old_of(&self, new: usize) -> Option<usize> {
        self.to_old.get(new).copied().flatten()
    }

    /// All pairs: old, new.
    pub fn pairs(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.to_new.iter().enumerate().filter_map(|(old, new)| new.map(|new| (old, new)))
    }

    fn pair(&mut self, old: usize, new: usize) {
        if self.to_new[old].is_none() && self.to_old[new].is_none() {
            self.to_new[old] = Some(new);
            self.to_old[new] = Some(old);
        }
    }

    fn is_free(&self, old: usize, new: usize) -> bool {
        self.to_new[old].is_none() && self.to_old[new].is_none()
    }
}

/// The name without the numbers that compilers append: `counter.12` is `counter`, `f.isra.0` is `f.isra`, `f.part.0.cold`
/// is `f.part.cold`; in C++ without those of lambdas (`UliE0_`) and of static variables that share a name (`_ZZ1fvE1n_0`).
pub fn base_name(name: &str) -> String {
    let is_number = |part: &&str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let mut parts = name.split('.');
    let first = parts.next().unwrap_or_default();
    let mut base = if first.starts_with("_Z") { without_discriminators(first) } else { first.to_owned() };
    for part in parts.filter(|part| !is_number(part)) {
        base.push('.');
        base.push_str(part);
    }
    base
}

/// A mangled name without the numbers by which entities of one scope are told apart (Itanium C++ ABI, "closure types",
/// "scope encoding").
fn without_discriminators(name: &str) -> String {
    let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let name = match name.rsplit_once('_') {
        Some((rest, number)) if name.starts_with("_ZZ") && !number.is_empty() && digits(number) == number.len() => rest,
        _ => name,
    };
    // clang counts lambdas through the whole source: `3$_0`, `4$_10`.
    if let Some((before, after)) = name.split_once("$_") {
        let before = before.trim_end_matches(|c: char| c.is_ascii_digit());
        return format!("{before}$_{}", without_discriminators(&after[digits(after)..]));
    }
    let Some(lambda) = name.find("Ul").or_else(|| name.find("Ut")) else { return name.to_owned() };
    let (mut base, mut rest) = (name[..lambda].to_owned(), &name[lambda..]);
    while let Some(at) = rest.find(['E', 't']) {
        let length = digits(&rest[at + 1..]);
        base.push_str(&rest[..=at]);
        rest = &rest[at + 1..];
        if rest[length..].starts_with('_') {
            rest = &rest[length..];
        }
    }
    base + rest
}

/// Whether it is the unlikely part of a function, split off by the compiler.
pub fn is_cold(name: &str) -> bool {
    name.ends_with(".cold") || base_name(name).ends_with(".cold")
}

/// Whether sections of this kind have an identity of their own.
fn is_element(kind: Kind) -> bool {
    matches!(kind, Kind::Code | Kind::Constant | Kind::Variable | Kind::ThreadLocal | Kind::Startup)
}

/// The name by which a section is known: its first function or variable.
fn key(object: &Object, section: usize) -> Option<(String, bool)> {
    let symbol = object.symbols_in(section).into_iter().find(|symbol| {
        matches!(symbol.kind, SymbolKind::Function | SymbolKind::Ifunc | SymbolKind::Object | SymbolKind::ThreadLocal)
            || !symbol.local
    })?;
    Some((symbol.name.clone(), symbol.local))
}

/// Names that compilers number: also the first of several, which may have none (clang: `f.counter`, `f.counter.1`).
pub struct Numbered {
    /// Base names of several functions, variables or constants of one build.
    shared: HashSet<String>,
}

impl Numbered {
    /// Those of two builds.
    pub fn of(old: &Object, new: &Object) -> Self {
        let mut shared = HashSet::new();
        for object in [old, new] {
            let mut once = HashSet::new();
            for section in (0..object.sections.len()).filter(|&at| is_element(object.sections[at].kind)) {
                if let Some(base) = key(object, section).map(|(name, _)| base_name(&name))
                    && !once.insert(base.clone())
                {
                    shared.insert(base);
                }
            }
        }
        Self { shared }
    }

    /// Whether the name does not tell by itself what it is.
    pub fn has(&self, name: &str) -> bool {
        let base = base_name(name);
        base != name || self.shared.contains(&base)
    }
}

/// Finds what belongs together.
pub fn correlate(old: &Object, new: &Object) -> Correlation {
    let mut found = Correlation { to_new: vec![None; old.sections.len()], to_old: vec![None; new.sections.len()] };
    let numbered = Numbered::of(old, new);
    by_symbol(old, new, &numbered, &mut found);
    by_use(old, new, &numbered, &mut found);
    by_base(old, new, &numbered, &mut found);
    // A function that only now has its partner may tell of its variables.
    by_use(old, new, &numbered, &mut found);
    by_base_only_one(old, new, &numbered, &mut found);
    by_section(old, new, &mut found);
    found
}

type Named = BTreeMap<(String, bool), Vec<usize>>;

fn named(object: &Object, keep: impl Fn(&str) -> bool) -> Named {
    let mut named = Named::new();
    for section in (0..object.sections.len()).filter(|&at| is_element(object.sections[at].kind)) {
        let is_code = object.sections[section].kind == Kind::Code;
        if let Some((name, _)) = key(object, section).filter(|(name, _)| keep(name)) {
            named.entry((name, is_code)).or_default().push(section);
        }
    }
    named
}

/// Same name, once in each.
fn by_symbol(old: &Object, new: &Object, numbered: &Numbered, found: &mut Correlation) {
    let certain = |name: &str| !numbered.has(name);
    let (olds, news) = (named(old, certain), named(new, certain));
    for (name, sections) in &olds {
        if let ([a], Some([b])) = (&sections[..], news.get(name).map(Vec::as_slice)) {
            found.pair(*a, *b);
        }
    }
}

/// In functions that belong together, what they use in the same order belongs together if it is called the same.
fn by_use(old: &Object, new: &Object, numbered: &Numbered, found: &mut Correlation) {
    let pairs: Vec<_> = found.pairs().collect();
    for (a, b) in pairs {
        if old.sections[a].kind == Kind::Startup {
            continue;
        }
        let (mut used_old, mut used_new) = (numbered_uses(old, a, numbered), numbered_uses(new, b, numbered));
        for (name, olds) in &mut used_old {
            let Some(news) = used_new.get_mut(name) else { continue };
            olds.retain(|&at| found.new_of(at).is_none());
            news.retain(|&at| found.old_of(at).is_none());
            // One more or one less: which one, is not certain; but what is the same is.
            if olds.len() == news.len() {
                for (&a, &b) in olds.iter().zip(&*news) {
                    if alike(old, a, new, b) {
                        found.pair(a, b);
                    }
                }
            } else {
                by_contents(old, olds, new, news, found);
            }
        }
    }
}

/// Only constants can be told apart by their contents.
fn by_contents(old: &Object, olds: &[usize], new: &Object, news: &[usize], found: &mut Correlation) {
    for &a in olds.iter().filter(|&&at| old.sections[at].kind == Kind::Constant) {
        let same = |&&b: &&usize| {
            new.sections[b].kind == Kind::Constant
                && new.sections[b].data == old.sections[a].data
                && new.sections[b].relocations.is_empty()
                && old.sections[a].relocations.is_empty()
        };
        let mut matching = news.iter().filter(same);
        if let (Some(&b), None) = (matching.next(), matching.next()) {
            found.pair(a, b);
        }
    }
}

fn alike(old: &Object, a: usize, new: &Object, b: usize) -> bool {
    old.sections[a].kind == new.sections[b].kind
}

/// What a section uses of numbered names, by base name, in the order of first use.
fn numbered_uses(object: &Object, section: usize, numbered: &Numbered) -> HashMap<(String, bool), Vec<usize>> {
    let mut uses: HashMap<(String, bool), Vec<usize>> = HashMap::new();
    for relocation in &object.sections[section].relocations {
        let Some(Place::Section(target)) = object.symbols.get(relocation.symbol).map(|symbol| symbol.place) else {
            continue;
        };
        if !is_element(object.sections[target].kind) || target == section {
            continue;
        }
        let is_code = object.sections[target].kind == Kind::Code;
        let Some((name, _)) = key(object, target).filter(|(name, _)| numbered.has(name)) else { continue };
        let list = uses.entry((base_name(&name), is_code)).or_default();
        if !list.contains(&target) {
            list.push(target);
        }
    }
    uses
}

fn grouped(object: &Object, numbered: &Numbered, free: impl Fn(usize) -> bool) -> Named {
    let mut groups = Named::new();
    for (name, sections) in named(object, |name| numbered.has(name)) {
        let group = groups.entry((base_name(&name.0), name.1)).or_default();
        group.extend(sections.into_iter().filter(|&at| free(at)));
    }
    groups
}

/// Functions with the same base name: those that do the same first.
fn by_base(old: &Object, new: &Object, numbered: &Numbered, found: &mut Correlation) {
    let olds = grouped(old, numbered, |at| found.new_of(at).is_none());
    let news = grouped(new, numbered, |at| found.old_of(at).is_none());
    for (name, sections) in olds.iter().filter(|((_, is_code), _)| *is_code) {
        let Some(others) = news.get(name) else { continue };
        for &a in sections {
            let items = code::items(old, a);
            let same = |&&b: &&usize| {
                let others = code::items(new, b);
                found.is_free(a, b)
                    && items.len() == others.len()
                    && items.iter().zip(&others).all(|(a, b)| a.is_like(b))
            };
            let mut matching = others.iter().filter(same);
            if let (Some(&b), None) = (matching.next(), matching.next()) {
                found.pair(a, b);
            }
        }
    }
}

/// One is left in each.
fn by_base_only_one(old: &Object, new: &Object, numbered: &Numbered, found: &mut Correlation) {
    let olds = grouped(old, numbered, |at| found.new_of(at).is_none());
    let news = grouped(new, numbered, |at| found.old_of(at).is_none());
    for (name, sections) in &olds {
        if let ([a], Some([b])) = (&sections[..], news.get(name).map(Vec::as_slice))
            && alike(old, *a, new, *b)
        {
            found.pair(*a, *b);
        }
    }
}

/// Without symbols: the same name of the section. It ends with its function's name (`.rodata.f`, `.gcc_except_table.f`), which
/// may have got another number.
fn by_section(old: &Object, new: &Object, found: &mut Correlation) {
    let renamed: HashMap<String, String> =
        found.pairs().filter_map(|(a, b)| Some((key(old, a)?.0, key(new, b)?.0))).filter(|(a, b)| a != b).collect();
    let anonymous = |object: &Object| -> HashMap<String, Vec<usize>> {
        let mut sections: HashMap<String, Vec<usize>> = HashMap::new();
        for (at, section) in object.sections.iter().enumerate() {
            if is_element(section.kind) && section.size > 0 && key(object, at).is_none() {
                sections.entry(section.name.clone()).or_default().push(at);
            }
        }
        sections
    };
    let news = anonymous(new);
    for (name, olds) in anonymous(old) {
        let owner = renamed.iter().find(|(a, _)| name.ends_with(&format!(".{a}")));
        let wanted = owner.map_or_else(|| name.clone(), |(a, b)| format!("{}{b}", &name[..name.len() - a.len()]));
        if let ([a], Some([b])) = (&olds[..], news.get(&wanted).map(Vec::as_slice))
            && alike(old, *a, new, *b)
        {
            found.pair(*a, *b);
        }
    }
}
