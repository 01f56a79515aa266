//! Patches with a manifest: what the request's file says of itself, and whether that goes with what a process has. Not for
//! placing or linking, which are the same for all patches.

use super::{modules::Module, plan::PlannedFunction, process::TargetProcess};
use crate::{
    image::{Binding, FunctionQuery, Symbol, SymbolKind},
    patch::manifest::{self, Build, Class, Manifest, ManifestError, Place, PlaceKind, sha256_hex},
    report::{Consistency, Failure, FailureKind, PatchRequest},
};

/// The manifest of the request's patch file; none: plain object files.
///
/// # Errors
/// The file was changed, is of a newer version, or is mixed with others.
pub fn manifest_of(request: &PatchRequest) -> Result<Option<Manifest>, Failure> {
    let mut found = None;
    for file in &request.files {
        let claims = file.name.ends_with(".asap");
        match manifest::read(&file.bytes) {
            Ok(Some(manifest)) => found = Some(manifest),
            Ok(None) if !claims => {}
            // Whoever reads the object says what is wrong with it.
            Err(ManifestError::NotAnObject(_)) if !claims => {}
            Ok(None) => {
                return Err(Failure::refused(
                    format!("{}: a patch file has a manifest, and this one has none", file.name),
                    "build it with `asap build`; plain object files are named .o",
                ));
            }
            Err(error) => {
                return Err(Failure::refused(
                    format!("{}: {error}", file.name),
                    "see `asap inspect` for what is in it",
                ));
            }
        }
    }
    let usage =
        |message: &str, way_out: &str| Failure { kind: FailureKind::Usage, ..Failure::refused(message, way_out) };
    if found.is_some() && request.files.len() > 1 {
        return Err(usage("a patch file goes in alone, without other files", "apply them one after the other"));
    }
    if found.is_some() && (!request.functions.is_empty() || request.address.is_some()) {
        return Err(usage(
            "a patch file says itself which functions it replaces",
            "leave out --function and --address, or use the plain object file",
        ));
    }
    Ok(found)
}

/// Refuses what would not repair a running program, whatever process it is for.
///
/// # Errors
/// The class of the patch says so.
pub fn check_class(manifest: &Manifest, consistency: Consistency) -> Result<(), Failure> {
    let way_out = match manifest.class {
        class if class.is_live() => return Ok(()),
        Class::NeverQuiescent if consistency == Consistency::Lazy => return Ok(()),
        Class::NeverQuiescent => {
            "with --consistency lazy new calls use the new code, and the old call goes on in the old code"
        }
        Class::DataLayout => "write a hook that converts the data (asap-patch.h), or restart with a repaired build",
        _ => "restart the program with a repaired build",
    };
    let class = manifest.class;
    Err(Failure::refused(format!("{} is of class {class}: {}", manifest.name, class.meaning()), way_out))
}

/// The module that the patch is for, and what the manifest says of its build.
#[must_use]
pub fn home<'a>(modules: &[Module], manifest: &'a Manifest) -> Option<(usize, &'a Build)> {
    let of = |module: &Module| module.image.build_id_hex().and_then(|id| manifest.build(&id));
    modules.iter().enumerate().find_map(|(index, module)| of(module).map(|build| (index, build)))
}

/// Words for a process without that build.
pub fn other_build(pid: i32, modules: &[Module], manifest: &Manifest) -> Failure {
    let wanted: Vec<_> = manifest.builds.iter().map(|build| build.build_id.as_str()).collect();
    let same_name = modules.iter().find(|module| module.file_name() == manifest.target);
    let runs = match same_name {
        Some(module) => format!(
            "process {pid} runs another build of it ({})",
            module.image.build_id_hex().unwrap_or_else(|| "without build-id".to_owned())
        ),
        None => format!("process {pid} has nothing of that name"),
    };
    Failure::refused(
        format!("{} is for {} with build-id {}, and {runs}", manifest.name, manifest.target, wanted.join(" or ")),
        "build the patch for the version that runs: `asap build`",
    )
}

/// The symbols of a build, as its image takes them.
#[must_use]
pub fn symbols(build: &Build) -> Vec<Symbol> {
    let symbol = |place: &Place| Symbol {
        name: place.name.clone(),
        address: place.address,
        size: place.size,
        kind: match place.kind {
            PlaceKind::Function => SymbolKind::Function,
            PlaceKind::Data => SymbolKind::Data,
            PlaceKind::Tls => SymbolKind::Tls,
        },
        binding: Binding::Local,
        file: place.file.clone(),
        exported: false,
    };
    build.symbols.iter().map(symbol).collect()
}

/// What of the manifest's functions is replaced by what.
#[must_use]
pub fn pairs(manifest: &Manifest) -> Vec<(String, String)> {
    manifest.functions.iter().map(|function| (function.written(), function.new.clone())).collect()
}

/// Compares the functions to be replaced with what the patch was made for.
///
/// # Errors
/// One has other code.
pub fn check_fingerprints(module: &Module, build: &Build, planned: &[PlannedFunction]) -> Result<(), Failure> {
    for function in planned {
        let query = FunctionQuery::parse(&function.written);
        let place = build.symbols.iter().find(|place| place.name == query.name && place.file == query.file);
        let Some((place, print)) = place.and_then(|place| Some((place, place.fingerprint.as_ref()?))) else { continue };
        let length = usize::try_from(place.size).unwrap_or(usize::MAX);
        let code = module.image.bytes_at(place.address, length);
        if code.is_none_or(|code| sha256_hex(code) != *print) {
            return Err(Failure::refused(
                format!("{} of {} is not the code that the patch was made for", function.name, module.path),
                "build the patch again for exactly this file: `asap build`",
            ));
        }
    }
    Ok(())
}

/// Refuses a patch whose bases are missing in a process, or whose name another one has there.
///
/// # Errors
/// The process lacks a required patch, or has another of that name.
pub fn check_company(process: &TargetProcess, manifest: &Manifest) -> Result<(), Failure> {
    let patches = &process.book.ledger.patches;
    let has = |name: &String| patches.iter().any(|patch| patch.name == *name);
    let missing: Vec<_> = manifest.requires.iter().filter(|name| !has(name)).cloned().collect();
    if !missing.is_empty() {
        return Err(Failure::refused(
            format!("{} builds upon {}, not in process {}", manifest.name, missing.join(", "), process.pid),
            format!("apply {} first", missing[0]),
        ));
    }
    if has(&manifest.name) && !manifest.replaces.contains(&manifest.name) {
        return Err(Failure::refused(
            format!("another patch of the name {} is in process {}", manifest.name, process.pid),
            format!("take it out first (asap revert {}), or build this one to replace it", manifest.name),
        ));
    }
    Ok(())
}
