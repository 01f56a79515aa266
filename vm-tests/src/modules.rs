//! Kernel modules that the guest must load before it can speak with the host, in the order in which they can be loaded.
//! Debian's packages bring no list of dependencies (depmod makes it at installation), but each module names its own.

use crate::compile::collect;
use anyhow::{Context, Result, ensure};
use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// What the guest needs. Where a kernel has one built in, there is no file of it.
const NEEDED: [&str; 2] = ["virtio_pci", "virtio_console"];

/// Names and contents of the modules, in loading order.
pub fn needed(folder: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let mut files = HashMap::new();
    collect(&folder.join("kernel"), &mut |path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if let Some((name, _)) = name.split_once(".ko") {
            files.insert(name.replace('-', "_"), path.to_owned());
        }
        Ok(())
    })?;
    ensure!(!files.is_empty(), "{} has no modules", folder.display());
    let mut loaded = Vec::new();
    for name in NEEDED {
        add(name, &files, &mut loaded, 0)?;
    }
    Ok(loaded)
}

fn add(name: &str, files: &HashMap<String, PathBuf>, loaded: &mut Vec<(String, Vec<u8>)>, depth: usize) -> Result<()> {
    ensure!(depth < 20, "module {name} depends on itself");
    let Some(file) = files.get(name) else { return Ok(()) };
    if loaded.iter().any(|(known, _)| known == name) {
        return Ok(());
    }
    let bytes = read(file)?;
    for needed in depends(&bytes) {
        add(&needed, files, loaded, depth + 1)?;
    }
    loaded.push((name.to_owned(), bytes));
    Ok(())
}

/// The bytes of a module, unpacked.
fn read(file: &Path) -> Result<Vec<u8>> {
    let packed = file.extension().and_then(|extension| extension.to_str()).filter(|&extension| extension != "ko");
    let Some(packed) = packed else { return fs::read(file).with_context(|| format!("{}", file.display())) };
    let program = match packed {
        "xz" => "xz",
        "zst" => "zstd",
        "gz" => "gzip",
        other => anyhow::bail!("{}: how to unpack .{other} is not known", file.display()),
    };
    let output = Command::new(program).arg("-dc").arg(file).output().with_context(|| format!("{program} can't run"))?;
    ensure!(output.status.success(), "{program} can't unpack {}", file.display());
    Ok(output.stdout)
}

/// What a module says it depends on.
fn depends(module: &[u8]) -> Vec<String> {
    // The section .modinfo: words that end with a zero byte, "depends=a,b" among them.
    let mut words = module.split(|&byte| byte == 0);
    let Some(list) = words.find_map(|word| word.strip_prefix(b"depends=")) else { return Vec::new() };
    let list = String::from_utf8_lossy(list);
    list.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_depend_on() {
        let folder = tempfile::tempdir().expect("a folder");
        let below = folder.path().join("kernel/drivers");
        fs::create_dir_all(&below).expect("made");
        for (name, depends) in [
            ("virtio", ""),
            ("virtio_ring", "virtio"),
            ("virtio_pci", "virtio,virtio_ring"),
            ("virtio_console", "virtio_ring"),
            ("other", ""),
        ] {
            let text = format!("\x7fELF\0license=GPL\0depends={depends}\0name={name}\0");
            fs::write(below.join(format!("{}.ko", name.replace('_', "-"))), text).expect("written");
        }
        let names: Vec<_> = needed(folder.path()).expect("found").into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["virtio", "virtio_ring", "virtio_pci", "virtio_console"]);
        fs::write(below.join("virtio.ko"), "\0depends=virtio_ring\0").expect("written");
        assert!(needed(folder.path()).is_err(), "a circle");
    }
}
