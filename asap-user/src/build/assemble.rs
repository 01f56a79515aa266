//! From objects in two versions to a patch file: compares them, keeps those that the program is made of, finds their names in
//! the running build with the twin, and writes the manifest. Pure: bytes in, bytes and a verdict out. Not for building: that is
//! `driver`.

use super::{
    compare::{self, Changed, CompareError, Comparison, Finding, Reason, object::Object},
    extract::{self, ExtractError, Part},
    same_code,
    twin::{self, Located, TwinError},
    types,
};
use crate::{
    image::{Image, Symbol, SymbolKind},
    patch::{
        PatchError, PatchObject,
        manifest::{self, Build, Class, Manifest, ManifestError, Origin, Place, PlaceKind},
    },
};
use serde::Serialize;
use std::collections::{HashMap, HashSet};

/// A source that was compiled before and after the change.
#[derive(Clone, Debug)]
pub struct Pair {
    /// The source file.
    pub source: String,
    /// Its object before; none: it is new.
    pub old: Option<Vec<u8>>,
    /// Its object after.
    pub new: Vec<u8>,
    /// The project has it optimised when it is linked.
    pub is_lto: bool,
}

/// What the manifest says besides.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Name of the patch.
    pub name: String,
    /// File name of the target.
    pub target: String,
    /// Where the change comes from.
    pub origin: Origin,
    /// Patches that this one replaces.
    pub replaces: Vec<String>,
    /// Patches that it builds upon.
    pub requires: Vec<String>,
    /// Sources that were compiled again.
    pub compiled: usize,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// What the change means for a running program.
    pub class: Class,
    /// Functions that are replaced.
    pub functions: Vec<ReplacedFunction>,
    /// Functions that are new.
    pub added: Vec<String>,
    /// Variables and constants that are new.
    pub new_data: Vec<String>,
    /// What stands in the way, and what should be known.
    pub findings: Vec<Finding>,
    /// Sources that were compiled again.
    pub compiled: usize,
    /// Sources whose objects changed, but are not part of the target.
    pub elsewhere: Vec<String>,
    /// The patch file; none: it can't go in.
    #[serde(skip)]
    pub patch: Option<Vec<u8>>,
}

/// A function that is replaced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ReplacedFunction {
    /// Raw name.
    pub name: String,
    /// Its source.
    pub source: String,
    /// Why.
    pub reason: String,
}

/// No verdict.
#[derive(Debug, thiserror::Error)]
pub enum AssembleError {
    /// Objects.
    #[error(transparent)]
    Compare(#[from] CompareError),
    /// The patch.
    #[error(transparent)]
    Extract(#[from] ExtractError),
    /// The twin.
    #[error(transparent)]
    Twin(#[from] TwinError),
    /// The patch linker refuses it.
    #[error("the patch that was built is refused: {0}")]
    Patch(#[from] PatchError),
    /// The manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The target can't be told apart from others.
    #[error("{0} has no build-id, by which a patch knows what it fits; link it with -Wl,--build-id")]
    NoBuildId(String),
}

/// Two builds of an object, and what is different.
#[derive(Clone, Debug)]
pub struct Compared {
    source: String,
    old: Object,
    new: Object,
    comparison: Comparison,
    types: Vec<Finding>,
    is_new: bool,
    is_lto: bool,
    /// Global functions and variables that the source did not have before.
    fresh: Vec<String>,
    /// Changed functions that have the code in the twin that they have in the object, and one.
    score: usize,
}

/// Compares all objects that were built twice; those that differ are given back.
///
/// # Errors
/// Something is no object.
pub fn compare_all(pairs: &[Pair]) -> Result<Vec<Compared>, AssembleError> {
    let compared: Vec<_> = super::driver::parallel(pairs, compare_pair).into_iter().collect::<Result<_, _>>()?;
    Ok(compared.into_iter().flatten().collect())
}

/// The functions and variables of an image by name.
struct Names(HashMap<String, Vec<Symbol>>);

impl Names {
    fn of(image: &Image) -> Self {
        let mut names: HashMap<String, Vec<Symbol>> = HashMap::new();
        for symbol in image.all_symbols() {
            names.entry(symbol.name.clone()).or_default().push(symbol);
        }
        Self(names)
    }

    fn find(&self, name: &str, file: Option<&str>) -> Option<&Symbol> {
        let all = self.0.get(name)?;
        all.iter().find(|symbol| file.is_none_or(|file| symbol.file.is_none() || symbol.is_from(file)))
    }
}

/// Makes the patch for one program, if there can be one.
///
/// # Errors
/// The objects, the twin or the target are not what they should be.
pub fn assemble(all: &[Compared], twin: &Image, module: &Image, facts: &Facts) -> Result<Verdict, AssembleError> {
    let build_id = module.build_id_hex().ok_or_else(|| AssembleError::NoBuildId(module.name().to_owned()))?;
    let names = Names::of(twin);
    let mut verdict = Verdict {
        class: Class::NotApplicable,
        functions: Vec::new(),
        added: Vec::new(),
        new_data: Vec::new(),
        findings: Vec::new(),
        compiled: facts.compiled,
        elsewhere: Vec::new(),
        patch: None,
    };
    let fresh: HashSet<&String> = all.iter().flat_map(|object| &object.fresh).collect();
    let compared = all.iter().map(|object| object.within(&names, twin)).collect();
    let kept = keep(compared, &names, &mut verdict.elsewhere);
    for part in &kept {
        let of = |changed: &Changed| ReplacedFunction {
            name: changed.old.clone(),
            source: part.source.clone(),
            reason: match &changed.reason {
                Reason::Code => "its code changes".to_owned(),
                Reason::Constant(name) => format!("it uses the constant {name}, which changes"),
                Reason::Part(name) => format!("its part {name} changes"),
            },
        };
        verdict.functions.extend(part.comparison.changed.iter().map(of));
        verdict.added.extend(part.comparison.added.iter().cloned());
        verdict.new_data.extend(part.comparison.new_data.iter().cloned());
        verdict
            .findings
            .extend(part.comparison.findings.iter().chain(&part.types).filter(|f| concerns_others(f, module)).cloned());
        verdict.findings.extend(part.is_lto.then(|| made_at_link_time(&part.source)));
    }
    verdict.functions.sort_by(|a, b| (&a.name, &a.source).cmp(&(&b.name, &b.source)));
    verdict.functions.dedup();
    let changed: Vec<Changed> = kept.iter().flat_map(|part| part.comparison.changed.iter().cloned()).collect();
    let located = twin::locate(twin, module)?;
    let mut made = None;
    if !changed.is_empty() {
        let parts: Vec<Part<'_>> =
            kept.iter().map(|part| Part { old: &part.old, new: &part.new, comparison: &part.comparison }).collect();
        match extract::extract(&parts) {
            Ok(extracted) => made = Some(extracted),
            // A finding has said so already.
            Err(ExtractError::Nameless { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let is_same = changed.is_empty() && verdict.findings.is_empty();
    verdict.class = compare::class(&changed, &verdict.new_data, is_same, &verdict.findings);
    if changed.is_empty() && verdict.class.is_live() {
        verdict.class = Class::NotApplicable;
    }
    let Some(extracted) = made.filter(|_| verdict.class.is_live() || verdict.class == Class::NeverQuiescent) else {
        return Ok(verdict);
    };
    let object = PatchObject::read(&[(format!("{}.o", facts.name), extracted.bytes.clone())])?;
    let mut places: Vec<Place> = Vec::new();
    let wanted = extracted.functions.iter().map(|function| (function.old.clone(), function.file.clone()));
    let wanted = wanted.chain(object.imports().into_iter().map(|import| (import.name, import.file)));
    let mut seen = HashSet::new();
    for (name, file) in wanted.filter(|wanted| seen.insert(wanted.clone())) {
        // What the twin has not comes from a library, and libraries tell their names.
        let Some(symbol) = names.find(&name, file.as_deref()) else {
            if fresh.contains(&name) {
                verdict.findings.push(not_set_up(&name));
            }
            continue;
        };
        match place(&located, module, &name, file.as_deref(), symbol) {
            Some(place) => places.push(place),
            None if module.export(&name).is_some() && file.is_none() => {}
            None => verdict.findings.push(not_found(&name, file.as_deref(), twin, module)),
        }
    }
    for grave in [Class::NotApplicable, Class::DataLayout] {
        if verdict.findings.iter().any(|finding| finding.class == grave) {
            verdict.class = grave;
            return Ok(verdict);
        }
    }
    places.sort_by(|a, b| (&a.name, &a.file).cmp(&(&b.name, &b.file)));
    let manifest = Manifest {
        name: facts.name.clone(),
        class: verdict.class,
        target: facts.target.clone(),
        builds: vec![Build { build_id, symbols: places }],
        functions: extracted.functions,
        hooks: object.hooks().clone(),
        origin: Origin {
            compiler: Some(twin.compilers().join(" and ")).filter(|names| !names.is_empty()),
            ..facts.origin.clone()
        },
        requires: facts.requires.clone(),
        replaces: facts.replaces.clone(),
        tool: concat!("asap ", env!("CARGO_PKG_VERSION")).to_owned(),
    };
    verdict.patch = Some(manifest::write(&extracted.bytes, &manifest)?);
    Ok(verdict)
}

/// Where the running build has it. An indirect function is resolved by the program, not by us.
fn place(located: &Located, module: &Image, name: &str, file: Option<&str>, symbol: &Symbol) -> Option<Place> {
    let place = located.place(module, name, file)?;
    let is_sound = symbol.kind != SymbolKind::Ifunc || place.kind != PlaceKind::Function;
    is_sound.then_some(place)
}

fn not_found(name: &str, file: Option<&str>, twin: &Image, module: &Image) -> Finding {
    Finding {
        class: Class::NotApplicable,
        object: file.unwrap_or_default().to_owned(),
        subject: name.to_owned(),
        reason: format!(
            "{name} can't be found for certain in {}: its code there is not what was built here{}",
            module.name(),
            other_compiler(twin, module).unwrap_or_default()
        ),
        way_out: "build with the compiler and flags of the running program; its package's are used by --debian"
            .to_owned(),
    }
}

/// Such variables belong to tables and lists that programs set up when they start.
fn not_set_up(name: &str) -> Finding {
    Finding {
        class: Class::DataLayout,
        object: String::new(),
        subject: name.to_owned(),
        reason: format!(
            "{name} is a new variable that several sources share, and the running program has not set it up"
        ),
        way_out: "restart the program with a repaired build".to_owned(),
    }
}

fn compare_pair(pair: &Pair) -> Result<Option<Compared>, AssembleError> {
    let new = Object::read(&pair.source, &pair.new)?;
    let old = match &pair.old {
        Some(bytes) => Object::read(&pair.source, bytes)?,
        None => Object::empty(&pair.source),
    };
    let globals = new.symbols.iter().map(|symbol| &symbol.name);
    let fresh = globals.filter(|name| new.defines(name) && !old.defines(name)).cloned().collect();
    let comparison = compare::compare(&old, &new);
    let types = match &pair.old {
        Some(bytes) => types::compare(&pair.source, bytes, &pair.new),
        None => Vec::new(),
    };
    if comparison.is_same() && types.is_empty() {
        return Ok(None);
    }
    let (source, is_new, is_lto) = (pair.source.clone(), pair.old.is_none(), pair.is_lto);
    Ok(Some(Compared { source, old, new, comparison, types, is_new, is_lto, fresh, score: 0 }))
}

/// Whether something that changed is part of the program of that twin.
#[must_use]
pub fn concerns(all: &[Compared], twin: &Image) -> bool {
    let names = Names::of(twin);
    let is_part = |object: &Compared| {
        let object = object.within(&names, twin);
        object.score > 0 && is_part(&object, &names)
    };
    all.iter().any(is_part)
}

impl Compared {
    /// As far as it concerns the program with these names.
    fn within(&self, names: &Names, twin: &Image) -> Self {
        let mut object = self.clone();
        let file = |changed: &Changed| object.old.source.clone().filter(|_| changed.local);
        // What the linker has left out of the program needs no replacement.
        let mut changed = object.comparison.changed.clone();
        changed.retain(|changed| names.find(&changed.old, file(changed).as_deref()).is_some());
        let is_same = |changed: &&Changed| {
            let symbol = object.old.symbols.iter().find(|symbol| is_function(symbol) && symbol.name == changed.old);
            let there = names.find(&changed.old, file(changed).as_deref());
            symbol.zip(there).is_some_and(|(symbol, there)| same_code::is_same(&object.old, symbol, twin, there))
        };
        let score = changed.iter().filter(is_same).count();
        let is_elsewhere = !object.comparison.changed.is_empty() && changed.is_empty();
        object.score = if is_elsewhere { 0 } else { score + 1 };
        object.comparison.changed = changed;
        object
    }
}

/// The objects that the program is made of; of a source that is compiled several times the one whose functions have the
/// program's code.
fn keep(compared: Vec<Compared>, names: &Names, elsewhere: &mut Vec<String>) -> Vec<Compared> {
    let mut kept: Vec<Compared> = Vec::new();
    let mut waiting = Vec::new();
    for object in compared {
        if object.is_new {
            waiting.push(object);
            continue;
        }
        if object.score == 0 || !is_part(&object, names) {
            elsewhere.push(object.source);
            continue;
        }
        match kept.iter_mut().find(|other| other.source == object.source) {
            Some(other) if other.score < object.score => *other = object,
            Some(_) => {}
            None => kept.push(object),
        }
    }
    // A new file is part of the program if what is in it is used there.
    while let Some(at) = waiting.iter().position(|object| {
        let used = |symbol: &&compare::object::Symbol| symbol.place == compare::object::Place::Undefined;
        kept.iter().flat_map(|kept| &kept.new.symbols).filter(used).any(|symbol| object.new.defines(&symbol.name))
    }) {
        kept.push(waiting.swap_remove(at));
    }
    elsewhere.extend(waiting.into_iter().map(|object| object.source));
    elsewhere.sort();
    elsewhere.dedup();
    kept
}

fn is_function(symbol: &compare::object::Symbol) -> bool {
    symbol.kind == compare::object::SymbolKind::Function && matches!(symbol.place, compare::object::Place::Section(_))
}

/// Whether a function of the object is in the program. Optimisation at link time changes sizes, and leaves out most.
fn is_part(object: &Compared, names: &Names) -> bool {
    object.old.symbols.iter().any(|symbol| {
        let file = object.old.source.as_deref().filter(|_| symbol.local && !object.is_lto);
        let is_defined = matches!(symbol.place, compare::object::Place::Section(_));
        let is_function = symbol.kind == compare::object::SymbolKind::Function;
        let is_same = |found: &Symbol| object.is_lto || found.size == symbol.size && (symbol.local || !symbol.weak);
        is_defined && is_function && names.find(&symbol.name, file).is_some_and(is_same)
    })
}

/// A function's signature is a matter of others where it is a library's; within a program, all callers change with it.
fn concerns_others(finding: &Finding, module: &Image) -> bool {
    let Some(function) = finding.subject.strip_prefix(types::FUNCTION) else { return true };
    module.soname().is_some() && module.export(function).is_some()
}

fn made_at_link_time(source: &str) -> Finding {
    Finding {
        class: Class::NotApplicable,
        object: source.to_owned(),
        subject: source.to_owned(),
        reason: format!(
            "{source} is compiled with -flto: the program's code is made when it is linked, of all sources together, and parts of \
             this one may be in functions of others"
        ),
        way_out:
            "restart the program with a repaired build; what is to be patched while it runs must be built without -flto"
                .to_owned(),
    }
}

/// What the compilers of both say of themselves, if it is not the same.
fn other_compiler(twin: &Image, module: &Image) -> Option<String> {
    let (here, there) = (twin.compilers(), module.compilers());
    let is_other = !here.is_empty() && !there.is_empty() && here != there;
    is_other.then(|| format!("; it was compiled by {}, this build by {}", there.join(" and "), here.join(" and ")))
}
