//! `asap inspect`: what is in a patch, without any target.

use super::{
    context::Global,
    files,
    text::{count, printable, table},
};
use crate::{
    image::demangle,
    patch::{
        ImportKind, PatchObject,
        manifest::{self, Manifest},
    },
    report::Failure,
    signature::Signature,
};
use serde::Serialize;
use std::{collections::BTreeMap, path::PathBuf};

/// Show what object files bring as a patch: functions, replacements, hooks, what they need from the target; and what a patch
/// file says of itself.
///
/// The files are read as one patch. No target and no agent is needed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  asap inspect fix.o
  asap inspect fix.asap
  asap inspect --json fix.o helper.o | jq '.needs[].name'")]
pub struct Inspect {
    /// Object files (ELF, relocatable).
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// What is shown.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Contents {
    #[serde(skip_serializing_if = "Option::is_none")]
    manifest: Option<Manifest>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    signatures: Vec<String>,
    pub functions: Vec<Defined>,
    pub variables: Vec<Defined>,
    replaces: Vec<Replaces>,
    calls_original: Vec<String>,
    hooks: Vec<Hook>,
    needs: Vec<Need>,
    relocations: BTreeMap<String, usize>,
    pub code_bytes: usize,
    rodata_bytes: usize,
    data_bytes: usize,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Defined {
    name: String,
    bytes: u64,
    scope: &'static str,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Replaces {
    replaces: String,
    by: String,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Hook {
    when: &'static str,
    function: String,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Need {
    name: String,
    kind: &'static str,
    file: Option<String>,
}

impl Inspect {
    pub fn run(self, global: &Global) -> Result<(), Failure> {
        let files = files::read(&self.files)?;
        let signatures = files.iter().filter_map(|file| {
            let signature = Signature::parse(file.signature.as_deref()?);
            Some(format!(
                "{}: {}",
                file.name,
                signature.map_or_else(|error| error.to_string(), |by| by.key.to_string())
            ))
        });
        let signatures: Vec<_> = signatures.collect();
        let files: Vec<_> = files.into_iter().map(|file| (file.name, file.bytes)).collect();
        let object = PatchObject::read(&files).map_err(|error| Failure::refused(error.to_string(), String::new()))?;
        let mut contents = Contents { signatures, ..Contents::of(&object) };
        for (name, bytes) in &files {
            let read =
                manifest::read(bytes).map_err(|error| Failure::refused(format!("{name}: {error}"), String::new()))?;
            contents.manifest = contents.manifest.or(read);
        }
        global.show(&contents, || inspect(&contents))
    }
}

impl Contents {
    /// With what a patch file says of itself.
    pub fn with(self, manifest: Option<Manifest>) -> Self {
        Self { manifest, ..self }
    }

    /// What is in object files.
    pub fn of(object: &PatchObject) -> Self {
        let scope = |global: bool| if global { "global" } else { "static" };
        let hooks = object.hooks();
        let hooks = [
            ("before apply", &hooks.pre_apply),
            ("after apply", &hooks.post_apply),
            ("before revert", &hooks.pre_revert),
            ("after revert", &hooks.post_revert),
        ];
        let hooks = hooks.into_iter().flat_map(|(when, functions)| {
            functions.iter().map(move |function| Hook { when, function: demangle(function) })
        });
        let needs = object.imports().into_iter().map(|import| {
            let kind = match (import.kind, import.weak) {
                (ImportKind::Tls, _) => "thread-local variable",
                (ImportKind::Any, true) => "function or variable, if there is one",
                (ImportKind::Any, false) => "function or variable",
            };
            Need { name: demangle(&import.name), kind, file: import.file }
        });
        let layout = object.layout();
        let functions = object.functions().into_iter();
        let variables = object.variables().into_iter();
        let replaces = object.replacements().iter();
        Self {
            manifest: None,
            signatures: Vec::new(),
            functions: functions
                .map(|f| Defined { name: demangle(&f.name), bytes: f.size, scope: scope(f.global) })
                .collect(),
            variables: variables
                .map(|v| Defined { name: demangle(&v.name), bytes: v.size, scope: scope(v.global) })
                .collect(),
            replaces: replaces
                .map(|r| Replaces { replaces: r.replaces.clone(), by: demangle(&r.new_symbol) })
                .collect(),
            calls_original: object.originals(),
            hooks: hooks.collect(),
            needs: needs.collect(),
            relocations: object.relocations(),
            code_bytes: layout.code.size,
            rodata_bytes: layout.rodata.size,
            data_bytes: layout.data.size,
        }
    }
}

fn inspect(contents: &Contents) -> String {
    let mut parts: Vec<String> = contents.manifest.iter().map(described).collect();
    let signed = |by: &String| format!("signed, not checked here (`asap verify`): {}\n", printable(by));
    parts.extend(contents.signatures.iter().map(signed));
    parts.push(format!(
        "{}; memory: {} bytes of code, {} of constants, {} of variables\n",
        count(contents.functions.len(), "function", "functions"),
        contents.code_bytes,
        contents.rodata_bytes,
        contents.data_bytes
    ));
    let mut section = |header: &[&str], rows: Vec<Vec<String>>| {
        if !rows.is_empty() {
            parts.push(table("  ", header, rows));
        }
    };
    let defined = |all: &[Defined]| {
        let row = |d: &Defined| vec![d.name.clone(), d.bytes.to_string(), d.scope.to_owned()];
        all.iter().map(row).collect()
    };
    section(&["FUNCTION", "BYTES", "SCOPE"], defined(&contents.functions));
    section(&["VARIABLE", "BYTES", "SCOPE"], defined(&contents.variables));
    section(&["REPLACES", "BY"], contents.replaces.iter().map(|r| vec![r.replaces.clone(), r.by.clone()]).collect());
    section(&["CALLS THE ORIGINAL OF"], contents.calls_original.iter().map(|name| vec![name.clone()]).collect());
    section(
        &["HOOK", "RUNS"],
        contents.hooks.iter().map(|hook| vec![hook.function.clone(), hook.when.to_owned()]).collect(),
    );
    section(
        &["NEEDS", "AS", "OF"],
        contents
            .needs
            .iter()
            .map(|need| vec![need.name.clone(), need.kind.to_owned(), need.file.clone().unwrap_or_default()])
            .collect(),
    );
    section(
        &["RELOCATION", "TIMES"],
        contents.relocations.iter().map(|(name, times)| vec![name.clone(), times.to_string()]).collect(),
    );
    parts.concat()
}

/// What a patch file says of itself.
fn described(manifest: &Manifest) -> String {
    let class = manifest.class;
    let mut text = format!("{}: class {class} ({}), made by {}\n", manifest.name, class.meaning(), manifest.tool);
    let mut line = |name: &str, values: Vec<String>| {
        if !values.is_empty() {
            text.push_str(&format!("  {name}: {}\n", values.join(", ")));
        }
    };
    line("target", vec![manifest.target.clone()]);
    line("builds", manifest.builds.iter().map(|build| build.build_id.clone()).collect());
    line("replaces the functions", manifest.functions.iter().map(|function| demangle(&function.written())).collect());
    let origin = &manifest.origin;
    let package = [&origin.package, &origin.version].into_iter().flatten().cloned().collect::<Vec<_>>().join(" ");
    line("package", Some(package).filter(|package| !package.is_empty()).into_iter().collect());
    line("diff", origin.diff.iter().chain(&origin.diff_sha256).cloned().collect());
    line("fixes", origin.fixes.clone());
    line("compiled by", origin.compiler.iter().cloned().collect());
    line("requires the patches", manifest.requires.clone());
    line("replaces the patches", manifest.replaces.clone());
    printable_lines(&text)
}

/// Names come from a file that anyone may have made.
fn printable_lines(text: &str) -> String {
    text.lines().map(|line| printable(line) + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_there_is_is_shown_and_nothing_else() {
        let mut contents = Contents {
            functions: vec![Defined { name: "f".to_owned(), bytes: 17, scope: "global" }],
            code_bytes: 32,
            ..Contents::default()
        };
        assert_eq!(
            inspect(&contents),
            "1 function; memory: 32 bytes of code, 0 of constants, 0 of variables\n  FUNCTION  BYTES  SCOPE\n  f         17     global\n"
        );
        contents.hooks.push(Hook { when: "before apply", function: "ready".to_owned() });
        contents.needs.push(Need { name: "puts".to_owned(), kind: "function or variable", file: None });
        contents.relocations.insert("R_X86_64_PC32".to_owned(), 3);
        assert!(inspect(&contents).ends_with(
            "  HOOK   RUNS\n  ready  before apply\n\
             \x20 NEEDS  AS                    OF\n  puts   function or variable\n\
             \x20 RELOCATION     TIMES\n  R_X86_64_PC32  3\n"
        ));
    }

    #[test]
    fn a_patch_file_says_what_it_is_for() {
        let json = serde_json::json!({
            "name": "fix", "class": "new-data", "target": "nginx", "builds": [{ "build_id": "c0ffee" }],
            "functions": [{ "old": "f", "file": "a.c", "new": "f" }, { "old": "\u{1b}[2Jg", "new": "g" }],
            "origin": { "diff": "CVE-2026-1.patch", "fixes": ["CVE-2026-1"] }, "tool": "asap 0.1.0",
        });
        let manifest: Manifest = serde_json::from_value(json).expect("a manifest");
        let text = described(&manifest);
        assert!(
            text.starts_with(
                "fix: class new-data (functions change and bring data of their own), made by asap 0.1.0\n\
                 \x20 target: nginx\n  builds: c0ffee\n  replaces the functions: a.c:f, "
            ),
            "{text}"
        );
        assert!(
            text.ends_with("  diff: CVE-2026-1.patch\n  fixes: CVE-2026-1\n") && !text.contains('\u{1b}'),
            "{text}"
        );
    }
}
