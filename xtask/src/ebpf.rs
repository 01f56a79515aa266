//! `cargo xtask ebpf`: builds the eBPF programs of `asap-ebpf` and stores the object where the library embeds it, so that
//! everybody else needs neither a nightly compiler nor a BPF linker. With `--check`: compares what is stored with its source.

use crate::command;
use anyhow::{Context, Result, bail, ensure};
use object::{Object, ObjectSection, ObjectSymbol};
use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

/// The linker, and the LLVM of the compiler that it links against.
const LINKER: (&str, &str, &str) = ("bpf-linker", "0.10.3", "rust-llvm-22");
/// Where the object lies; beside it, `BUILT_WITH` names the compiler that made it.
const OBJECT: &str = "asap-user/src/kernel/asap.bpf.o";
const BUILT_WITH: &str = "asap-user/src/kernel/asap.bpf.o.built-with";

/// Builds the object; stores it, or compares it with the stored one.
pub fn run(check: bool) -> Result<()> {
    let root = &command::top();
    let compiler = compiler()?;
    let built = build(root)?;
    let (stored, built_with) = (root.join(OBJECT), root.join(BUILT_WITH));
    if check {
        let old = fs::read(&stored).with_context(|| format!("{OBJECT}: build it with `cargo xtask ebpf`"))?;
        let old_compiler = fs::read_to_string(&built_with).unwrap_or_default();
        compare(&old, old_compiler.trim(), &built, &compiler)?;
    } else {
        fs::write(&stored, &built).with_context(|| format!("writing {OBJECT}"))?;
        fs::write(&built_with, format!("{compiler}\n")).with_context(|| format!("writing {BUILT_WITH}"))?;
        println!("ebpf: {OBJECT}: {} bytes, built with {compiler}", built.len());
    }
    Ok(())
}

fn compare(old: &[u8], old_compiler: &str, new: &[u8], new_compiler: &str) -> Result<()> {
    if old_compiler == new_compiler {
        ensure!(old == new, "{OBJECT} is not what asap-ebpf builds: run `cargo xtask ebpf` and commit the result");
        println!("ebpf: {OBJECT} is what {new_compiler} builds, byte for byte");
        return Ok(());
    }
    // Another compiler makes other instructions: what the loader relies on must be the same.
    let (old, new) = (interface(old)?, interface(new)?);
    for name in old.keys().chain(new.keys()) {
        let (before, now) = (old.get(name), new.get(name));
        ensure!(
            before == now,
            "{OBJECT}: {name} is {before:?}, but asap-ebpf builds {now:?}: run `cargo xtask ebpf` and commit the result"
        );
    }
    println!(
        "ebpf: {OBJECT} has the programs and maps of asap-ebpf (built with {old_compiler}, here is {new_compiler})"
    );
    Ok(())
}

/// Programs with their sections, and maps with their definitions.
fn interface(data: &[u8]) -> Result<BTreeMap<String, String>> {
    let file = object::File::parse(data).context("the eBPF object")?;
    let mut found = BTreeMap::new();
    for symbol in file.symbols().filter(|symbol| symbol.is_global() && symbol.is_definition()) {
        let Some(section) = symbol.section_index().and_then(|index| file.section_by_index(index).ok()) else {
            continue;
        };
        let (name, section_name) = (symbol.name()?.to_owned(), section.name()?);
        let description = if section_name == "maps" {
            let definition =
                section.data_range(symbol.address(), symbol.size())?.context("a map outside its section")?;
            format!("map {definition:02x?}")
        } else if section.kind() == object::SectionKind::Text && section_name != ".text" {
            format!("program in {section_name}")
        } else {
            continue;
        };
        found.insert(name, description);
    }
    ensure!(!found.is_empty(), "the eBPF object has no programs");
    Ok(found)
}

fn output(command: &mut Command, purpose: &str) -> Result<String> {
    let output = command.output().with_context(|| format!("{purpose}: can't run {:?}", command.get_program()))?;
    ensure!(output.status.success(), "{purpose}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

fn compiler() -> Result<String> {
    let version = output(
        command::nightly("rustc").arg("--version"),
        "the eBPF programs need a nightly tool chain (rustup toolchain install nightly)",
    )?;
    let sysroot = PathBuf::from(sysroot()?);
    ensure!(
        sysroot.join("lib/rustlib/src/rust/library/core").is_dir(),
        "the eBPF programs need the library's source: rustup component add rust-src --toolchain nightly"
    );
    Ok(version)
}

fn sysroot() -> Result<String> {
    output(command::nightly("rustc").args(["--print", "sysroot"]), "asking for the sysroot")
}

fn target_directory(root: &Path) -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from)
}

/// The folder of the linker if it has to be put on the path; builds it where there is none.
fn linker(target: &Path) -> Result<Option<PathBuf>> {
    let (name, version, feature) = LINKER;
    let answers = |program: &Path| {
        let output = Command::new(program).arg("--version").output().ok()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        said.contains(version).then_some(())
    };
    if answers(Path::new(name)).is_some() {
        return Ok(None);
    }
    let tools = target.join("tools");
    let folder = tools.join("bin");
    if answers(&folder.join(name)).is_none() {
        println!("ebpf: building {name} {version} (some minutes, once)");
        let mut install = command::nightly("cargo");
        install.args(["install", name, "--version", version, "--no-default-features", "--features", feature]);
        install.arg("--root").arg(&tools).arg("--target-dir").arg(tools.join("build"));
        command::run(&mut install)?;
    }
    Ok(Some(folder))
}

fn build(root: &Path) -> Result<Vec<u8>> {
    let target = target_directory(root);
    let folder = linker(&target)?;
    let target = target.join("ebpf");
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")))
        .context("neither CARGO_HOME nor HOME is set")?;
    let remap = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
    let mut flags = vec![
        "-Clinker=bpf-linker".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        // Atomic operations that return a value.
        "-Ctarget-cpu=v3".to_owned(),
        "--cfg=bpf_target_arch=\"x86_64\"".to_owned(),
        // No path of the machine that builds may show.
        remap(root, "asap"),
        remap(Path::new(&sysroot()?), "rust"),
    ];
    // Each registry has a folder of its own, whose name says which it is.
    for registry in fs::read_dir(cargo_home.join("registry/src")).into_iter().flatten().flatten() {
        flags.push(remap(&registry.path(), "crates"));
    }
    let mut cargo = command::nightly("cargo");
    cargo.current_dir(root.join("asap-ebpf"));
    cargo.args(["build", "--quiet", "--release", "--locked", "--target", "bpfel-unknown-none", "-Zbuild-std=core"]);
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f")).env("CARGO_TARGET_DIR", &target);
    if let Some(folder) = folder {
        let path = env::var_os("PATH").unwrap_or_default();
        cargo.env("PATH", env::join_paths([folder].into_iter().chain(env::split_paths(&path)))?);
    }
    command::run(&mut cargo)?;
    let file = target.join("bpfel-unknown-none/release/asap-ebpf");
    let stripped = strip(&fs::read(&file).with_context(|| format!("reading {}", file.display()))?)?;
    if let Some(at) = stripped.windows(6).position(|window| window == b"/home/" || window == b"/root/") {
        bail!("the eBPF object names a path of this machine (at byte {at})");
    }
    Ok(stripped)
}

/// Takes DWARF out; BTF, which the kernel's tools show, stays.
fn strip(data: &[u8]) -> Result<Vec<u8>> {
    let mut builder = object::build::elf::Builder::read(data)?;
    for section in &mut builder.sections {
        let name = section.name.to_vec();
        section.delete = name.starts_with(b".debug_") || name.starts_with(b".rel.debug_");
    }
    // LLVM keeps names of sections and of symbols in one table, the writer wants two.
    let names = builder.sections.add();
    names.name = ".shstrtab".into();
    names.sh_type = object::elf::SHT_STRTAB;
    names.data = object::build::elf::SectionData::SectionString;
    builder.delete_orphans();
    builder.delete_unused_versions();
    let mut stripped = Vec::new();
    builder.write(&mut stripped)?;
    Ok(stripped)
}
