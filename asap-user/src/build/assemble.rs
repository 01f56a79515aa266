//! From objects in two versions to a patch file: compares them, keeps those that the program is made of, finds their names in
//! the running build with the twin, and writes the manifest. Pure: bytes in, bytes and a verdict out. Not for building: that is
//! `driver`.

use super::{
    compare::{self, Changed, CompareError, Comparison, Finding, Reason, object::Object},
    extract::{self, ExtractError, Part},
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

struct Compared {
    source: String,
    old: Object,
    new: Object,
    comparison: Comparison,
    types: Vec<Finding>,
    is_new: bool,
    /// Changed functions that have the size in the twin that they have in the object.
    score: usize,
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

/// Compares the objects and makes the patch, if there can be one.
///
/// # Errors
/// The objects, the twin or the target are not what they should be.
pub fn assemble(pairs: &[Pair], twin: &Image, module: &Image, facts: &Facts) -> Result<Verdict, AssembleError> {
    let build_id = module.build_id_hex().ok_or_else(|| AssembleError::NoBuildId(module.name().to_owned()))?;
    let names = Names::of(twin);
    let mut verdict = Verdict {
        class: Class::NotApplicable,
        functions: Vec::new(),
        added: Vec::new(),
        new_data: Vec::new(),
        findings: Vec::new(),
        compiled: pairs.len(),
        elsewhere: Vec::new(),
        patch: None,
    };
    let (mut compared, mut fresh) = (Vec::new(), HashSet::new());
    for pair in pairs {
        compared.extend(compare_pair(pair, &names, &mut fresh)?);
    }
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
        verdict.findings.extend(part.comparison.findings.iter().chain(&part.types).cloned());
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
            None => verdict.findings.push(not_found(&name, file.as_deref(), module)),
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
        origin: facts.origin.clone(),
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

fn not_found(name: &str, file: Option<&str>, module: &Image) -> Finding {
    Finding {
        class: Class::NotApplicable,
        object: file.unwrap_or_default().to_owned(),
        subject: name.to_owned(),
        reason: format!(
            "{name} can't be found for certain in {}: its code there is not what was built here",
            module.name()
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

/// `fresh` gets the names of global functions and variables that the source did not have before.
fn compare_pair(pair: &Pair, names: &Names, fresh: &mut HashSet<String>) -> Result<Option<Compared>, AssembleError> {
    let new = Object::read(&pair.source, &pair.new)?;
    let old = match &pair.old {
        Some(bytes) => Object::read(&pair.source, bytes)?,
        None => Object::empty(&pair.source),
    };
    let globals = new.symbols.iter().map(|symbol| &symbol.name);
    fresh.extend(globals.filter(|name| new.defines(name) && !old.defines(name)).cloned());
    let mut comparison = compare::compare(&old, &new);
    let types = match &pair.old {
        Some(bytes) => types::compare(&pair.source, bytes, &pair.new),
        None => Vec::new(),
    };
    if comparison.is_same() && types.is_empty() {
        return Ok(None);
    }
    let file = |changed: &Changed| old.source.clone().filter(|_| changed.local);
    // What the linker has left out of the program needs no replacement.
    let before = comparison.changed.len();
    comparison.changed.retain(|changed| names.find(&changed.old, file(changed).as_deref()).is_some());
    let size =
        |changed: &Changed| old.symbols.iter().find(|symbol| symbol.name == changed.old).map(|symbol| symbol.size);
    let same_size = |changed: &&Changed| {
        names.find(&changed.old, file(changed).as_deref()).map(|symbol| symbol.size) == size(changed)
    };
    let score = comparison.changed.iter().filter(same_size).count();
    let is_elsewhere = before > 0 && comparison.changed.is_empty();
    let score = if is_elsewhere { 0 } else { score + 1 };
    let (source, is_new) = (pair.source.clone(), pair.old.is_none());
    Ok(Some(Compared { source, old, new, comparison, types, is_new, score }))
}

/// The objects that the program is made of; of a source that is compiled several times the one whose functions have the
/// program's sizes.
fn keep(compared: Vec<Compared>, names: &Names, elsewhere: &mut Vec<String>) -> Vec<Compared> {
    let mut kept: Vec<Compared> = Vec::new();
    let mut waiting = Vec::new();
    for object in compared {
        if object.is_new {
            waiting.push(object);
            continue;
        }
        if object.score == 0 || !is_part(&object.old, names) {
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

/// Whether a function of the object is in the program.
fn is_part(object: &Object, names: &Names) -> bool {
    object.symbols.iter().any(|symbol| {
        let file = object.source.as_deref().filter(|_| symbol.local);
        let is_defined = matches!(symbol.place, compare::object::Place::Section(_));
        let is_function = symbol.kind == compare::object::SymbolKind::Function;
        is_defined
            && is_function
            && names
                .find(&symbol.name, file)
                .is_some_and(|found| found.size == symbol.size && (symbol.local || !symbol.weak))
    })
}
