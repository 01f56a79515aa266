//! What asap is made of: `cargo xtask licences` checks the licence and the origin of every package, `cargo xtask sbom` lists what is in
//! the program that users get (CycloneDX). Both work offline, from Cargo.lock and cargo's own metadata. Not for known
//! vulnerabilities: their list is not to be had without a network (`cargo audit`, where there is one).

use crate::command;
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

/// Licences that may be in a program under MIT without more duties than naming them.
const ALLOWED: [&str; 12] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-1-Clause",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC0-1.0",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];
/// Where packages may come from.
const ORIGIN: &str = "registry+https://github.com/rust-lang/crates.io-index";
/// Packages that are there in two versions, since others that we use want them so. One more is looked at before it is let in.
const TWICE: [&str; 9] =
    ["cpufeatures", "getrandom", "nix", "object", "rand_core", "shlex", "syn", "thiserror", "thiserror-impl"];

/// Checks every package of the lock file.
pub fn check_licences() -> Result<()> {
    let metadata = metadata(&command::top(), &[])?;
    let mut problems = Vec::new();
    let mut versions: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut count = 0;
    for package in packages(&metadata) {
        count += 1;
        let (name, version) = (word(&package["name"]), word(&package["version"]));
        versions.entry(name.clone()).or_default().insert(version.clone());
        match package["license"].as_str() {
            None => problems.push(format!("{name} {version} names no licence")),
            Some(licence) if !is_allowed(licence)? => problems.push(format!("{name} {version}: {licence}")),
            Some(_) => {}
        }
        if let Some(source) = package["source"].as_str().filter(|source| *source != ORIGIN) {
            problems.push(format!("{name} {version} comes from {source}"));
        }
    }
    for (name, versions) in versions.iter().filter(|(_, versions)| versions.len() > 1) {
        if !TWICE.contains(&name.as_str()) {
            let versions: Vec<_> = versions.iter().cloned().collect();
            problems.push(format!("{name} is there in several versions: {}", versions.join(", ")));
        }
    }
    ensure!(problems.is_empty(), "packages that may not be used as they are:\n  {}", problems.join("\n  "));
    println!("licences: {count} packages, all under licences that asap may use, all from crates.io");
    Ok(())
}

/// Writes what is in the program as a CycloneDX document; to standard output if no file is named.
pub fn sbom(output: Option<&Path>) -> Result<()> {
    let metadata = metadata(&command::top(), &["--filter-platform", "x86_64-unknown-linux-gnu"])?;
    let text = format!("{:#}\n", document(&metadata)?);
    match output {
        None => print!("{text}"),
        Some(path) => fs::write(path, text).with_context(|| path.display().to_string())?,
    }
    Ok(())
}

fn metadata(top: &Path, more: &[&str]) -> Result<Value> {
    let mut cargo = command::cargo();
    cargo.current_dir(top).args(["metadata", "--format-version", "1", "--locked"]).args(more);
    let output = cargo.output().context("cargo can't be started")?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).context("cargo's metadata")
}

fn packages(metadata: &Value) -> impl Iterator<Item = &Value> {
    metadata["packages"].as_array().into_iter().flatten()
}

fn word(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// Whether an SPDX expression leaves a choice that is allowed. `/` is the old way to write OR.
fn is_allowed(expression: &str) -> Result<bool> {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut rest = &words[..];
    let allowed = any(&mut rest, 0)?;
    ensure!(rest.is_empty(), "the licence `{expression}` can't be read");
    Ok(allowed)
}

fn any(rest: &mut &[&str], depth: usize) -> Result<bool> {
    let mut allowed = all(rest, depth)?;
    while let ["OR", tail @ ..] = *rest {
        *rest = tail;
        allowed |= all(rest, depth)?;
    }
    Ok(allowed)
}

fn all(rest: &mut &[&str], depth: usize) -> Result<bool> {
    let mut allowed = one(rest, depth)?;
    while let ["AND", tail @ ..] = *rest {
        *rest = tail;
        allowed &= one(rest, depth)?;
    }
    Ok(allowed)
}

fn one(rest: &mut &[&str], depth: usize) -> Result<bool> {
    match *rest {
        ["(", tail @ ..] if depth < 16 => {
            *rest = tail;
            let allowed = any(rest, depth + 1)?;
            let [")", tail @ ..] = *rest else { bail!("a licence with an open parenthesis") };
            *rest = tail;
            Ok(allowed)
        }
        [name, "WITH", exception, tail @ ..] => {
            *rest = tail;
            Ok(ALLOWED.contains(&format!("{name} WITH {exception}").as_str()))
        }
        [name, tail @ ..] if !["(", ")", "AND", "OR"].contains(name) => {
            *rest = tail;
            Ok(ALLOWED.contains(name))
        }
        _ => bail!("a licence that can't be read"),
    }
}

/// The packages that are linked into `asap`, with their dependencies. The same input gives the same document.
fn document(metadata: &Value) -> Result<Value> {
    let by_id: BTreeMap<String, &Value> = packages(metadata).map(|package| (word(&package["id"]), package)).collect();
    let nodes: BTreeMap<String, &Value> =
        metadata["resolve"]["nodes"].as_array().into_iter().flatten().map(|node| (word(&node["id"]), node)).collect();
    let root = by_id.iter().find(|(_, package)| package["name"] == "asap-user").context("the package asap-user")?;
    // Not what only tests and build scripts need.
    let needs = |id: &str| -> Vec<String> {
        let dependencies = nodes.get(id).and_then(|node| node["deps"].as_array()).into_iter().flatten();
        let is_linked = |dependency: &&Value| {
            dependency["dep_kinds"].as_array().into_iter().flatten().any(|kind| kind["kind"].is_null())
        };
        dependencies.filter(is_linked).map(|dependency| word(&dependency["pkg"])).collect()
    };
    let mut linked = BTreeSet::new();
    let mut queue = vec![root.0.clone()];
    while let Some(id) = queue.pop() {
        if linked.insert(id.clone()) {
            queue.extend(needs(&id));
        }
    }
    let url = |id: &str| -> String {
        by_id.get(id).map_or_else(String::new, |package| {
            format!("pkg:cargo/{}@{}", word(&package["name"]), word(&package["version"]))
        })
    };
    let component = |id: &String| -> Option<Value> {
        let package = by_id.get(id)?;
        Some(json!({
            "type": "library",
            "bom-ref": url(id),
            "purl": url(id),
            "name": package["name"],
            "version": package["version"],
            "licenses": [{ "expression": word(&package["license"]).replace('/', " OR ") }],
        }))
    };
    let components: Vec<Value> = linked.iter().filter(|id| *id != root.0).filter_map(component).collect();
    let dependencies: Vec<Value> = linked
        .iter()
        .map(|id| json!({ "ref": url(id), "dependsOn": needs(id).iter().map(|id| url(id)).collect::<Vec<_>>() }))
        .collect();
    Ok(json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": { "component": {
            "type": "application",
            "bom-ref": url(root.0),
            "name": "asap",
            "version": root.1["version"],
            "licenses": [{ "expression": root.1["license"] }],
        } },
        "components": components,
        "dependencies": dependencies,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licences_are_read_as_expressions() {
        for good in [
            "MIT",
            "MIT/Apache-2.0",
            "GPL-3.0 OR MIT",
            "(MIT OR GPL-2.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception",
        ] {
            assert!(is_allowed(good).expect(good), "{good}");
        }
        for bad in
            ["GPL-3.0", "MIT AND GPL-3.0", "Apache-2.0 WITH Something", "Proprietary", "MIT AND (GPL-2.0 OR LGPL-2.1)"]
        {
            assert!(!is_allowed(bad).expect(bad), "{bad}");
        }
        for odd in ["", "(MIT", "MIT)", "MIT OR", "AND", &"(".repeat(100)] {
            is_allowed(odd).expect_err(odd);
        }
    }

    #[test]
    fn the_document_lists_what_is_linked() {
        let package = |name: &str, licence: &str| json!({ "id": name, "name": name, "version": "1.0.0", "license": licence, "source": ORIGIN });
        let link = |name: &str, kind: Value| json!({ "pkg": name, "dep_kinds": [{ "kind": kind }] });
        let metadata = json!({
            "packages": [package("asap-user", "MIT"), package("used", "MIT/Apache-2.0"), package("tested", "MIT"), package("below", "MIT")],
            "resolve": { "nodes": [
                { "id": "asap-user", "deps": [link("used", Value::Null), link("tested", json!("dev"))] },
                { "id": "used", "deps": [link("below", Value::Null)] },
                { "id": "tested", "deps": [] },
                { "id": "below", "deps": [] },
            ] },
        });
        let document = document(&metadata).expect("a document");
        let names: Vec<&str> =
            document["components"].as_array().expect("a list").iter().filter_map(|one| one["name"].as_str()).collect();
        assert_eq!(names, ["below", "used"]);
        assert_eq!(document["components"][1]["licenses"][0]["expression"], "MIT OR Apache-2.0");
        assert_eq!(document["components"][1]["purl"], "pkg:cargo/used@1.0.0");
    }
}
