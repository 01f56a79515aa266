//! Debian's kernels: found in the package indexes of its releases when asked for, checked as apt checks, unpacked into a folder
//! that is kept. The machine's own apt is neither changed nor asked to install anything.

use crate::apt::{Indexes, Kind, Suite, field, output};
use anyhow::{Context, Result, bail, ensure};
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Releases that bring kernels; true: those of the security archive.
const SUITES: [Suite; 5] =
    [("bookworm", false), ("bookworm-security", true), ("trixie", false), ("trixie-security", true), ("sid", false)];
/// The package whose versions and dependencies lead to all others. Kernels for clouds need few modules.
const PACKAGE: &str = "linux-image-cloud-amd64";

/// A kernel that can be booted.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Version of its package.
    pub version: String,
    /// The image.
    pub image: PathBuf,
    /// Folder with its modules.
    pub modules: PathBuf,
}

/// Finds a kernel: "6.1", "6.12", "7", a whole version, or "newest". What was fetched before is found without a network.
pub fn find(wanted: &str, cache: &Path) -> Result<Kernel> {
    fs::create_dir_all(cache).with_context(|| format!("{} can't be made", cache.display()))?;
    let cache = &cache.canonicalize()?;
    let chosen = match versions(cache) {
        Ok(versions) => choose(wanted, versions).map(|version| (version, true)),
        Err(error) => {
            eprintln!("vm-test: Debian's package indexes can't be had ({error:#}); looking at kernels fetched before");
            choose(wanted, unpacked(cache)).map(|version| (version, false))
        }
    };
    let Some((version, online)) = chosen else {
        bail!("Debian has no kernel {wanted} (in {})", SUITES.map(|suite| suite.0).join(", "));
    };
    let folder = cache.join(format!("linux-{}", file_name(&version)));
    if !folder.exists() {
        ensure!(online, "kernel {version} is not there, and can't be fetched");
        fetch(&version, cache, &folder)?;
    }
    look(&version, &folder)
}

/// Versions have an epoch's colon at times.
fn file_name(version: &str) -> String {
    version.replace([':', '/'], "_")
}

fn unpacked(cache: &Path) -> Vec<String> {
    let entries = fs::read_dir(cache).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.strip_prefix("linux-").map(str::to_owned)).collect()
}

/// The newest version that is meant.
fn choose(wanted: &str, versions: Vec<String>) -> Option<String> {
    let meant = |version: &&String| {
        let rest = version.strip_prefix(wanted);
        wanted == "newest" || rest.is_some_and(|rest| !rest.starts_with(|next: char| next.is_ascii_digit()))
    };
    versions.iter().filter(meant).max_by_key(|version| numbers(version)).cloned()
}

fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

/// Debian's indexes.
fn indexes(cache: &Path) -> Result<Indexes> {
    Indexes::open(cache, Kind::Packages, &SUITES, "vm-test")
}

/// The kernels in them.
fn versions(cache: &Path) -> Result<Vec<String>> {
    let shown = output(indexes(cache)?.apt("apt-cache").args(["show", PACKAGE]))?;
    let versions: Vec<_> = field(&shown, "Version").map(str::to_owned).collect();
    ensure!(!versions.is_empty(), "no index has {PACKAGE}");
    Ok(versions)
}

/// All packages that make up a kernel: those it depends on in exactly one version. (Newer kernels come as several packages,
/// and the one called image is empty.)
fn parts(version: &str, cache: &Path) -> Result<BTreeSet<String>> {
    let indexes = indexes(cache)?;
    let mut found = BTreeSet::new();
    let mut open = vec![format!("{PACKAGE}={version}")];
    while let Some(package) = open.pop() {
        let shown = output(indexes.apt("apt-cache").args(["show", &package]))?;
        for needed in field(&shown, "Depends").flat_map(|line| line.split(", ")) {
            let Some((name, exact)) = needed.split_once(" (= ") else { continue };
            let part = format!("{name}={}", exact.trim_end_matches(')'));
            if name.starts_with("linux-") && found.insert(part.clone()) {
                open.push(part);
            }
        }
    }
    Ok(found)
}

fn fetch(version: &str, cache: &Path, folder: &Path) -> Result<()> {
    let parts = parts(version, cache)?;
    ensure!(!parts.is_empty(), "{PACKAGE} {version} depends on no kernel");
    eprintln!("vm-test: fetching kernel {version}: {}", Vec::from_iter(parts.iter().map(String::as_str)).join(", "));
    // Beside its place, under a name of this run's own: two runs may fetch at once.
    let fresh = cache.join(format!("fetching-{}-{}", file_name(version), std::process::id()));
    let result = (|| {
        fs::create_dir_all(fresh.join("packages"))?;
        output(indexes(cache)?.apt("apt-get").current_dir(fresh.join("packages")).arg("download").args(&parts))?;
        for package in fs::read_dir(fresh.join("packages"))? {
            output(Command::new("dpkg-deb").arg("-x").arg(package?.path()).arg(&fresh))?;
        }
        fs::remove_dir_all(fresh.join("packages"))?;
        look(version, &fresh)?;
        if let Err(error) = fs::rename(&fresh, folder) {
            ensure!(folder.exists(), "{} can't be put into place: {error}", folder.display());
        }
        Ok(())
    })();
    let _ = fs::remove_dir_all(&fresh);
    result
}

/// Finds image and modules in an unpacked kernel.
fn look(version: &str, folder: &Path) -> Result<Kernel> {
    let below = |parent: &str| {
        let entries = fs::read_dir(folder.join(parent)).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let modules = ["lib/modules", "usr/lib/modules"].into_iter().flat_map(below).find(|path| path.is_dir());
    let modules = modules.with_context(|| format!("the packages of kernel {version} have no modules"))?;
    let images = below("boot").into_iter().chain([modules.join("vmlinuz")]);
    let mut images = images.filter(|path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz")) && path.is_file()
    });
    let image = images.next().with_context(|| format!("the packages of kernel {version} have no image"))?;
    Ok(Kernel { version: version.to_owned(), image, modules })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_of_the_meant_versions_is_chosen() {
        let versions = || ["6.1.176-1", "6.1.192-2", "6.12.107-1", "6.12.95-1", "7.2.13-1"].map(str::to_owned).to_vec();
        for (wanted, chosen) in [
            ("6.1", Some("6.1.192-2")),
            ("6.12", Some("6.12.107-1")),
            ("6", Some("6.12.107-1")),
            ("7", Some("7.2.13-1")),
            ("newest", Some("7.2.13-1")),
            ("6.1.176-1", Some("6.1.176-1")),
            ("5.10", None),
        ] {
            assert_eq!(choose(wanted, versions()).as_deref(), chosen, "{wanted}");
        }
    }

    #[test]
    fn fields_are_read_by_their_whole_name() {
        let shown = "Package: x\nVersion: 1\nDepends: a (= 1), b\nPre-Depends: c\n\nVersion: 2\n";
        assert_eq!(Vec::from_iter(field(shown, "Version")), ["1", "2"]);
        assert_eq!(Vec::from_iter(field(shown, "Depends")), ["a (= 1), b"]);
    }

    #[test]
    fn images_are_found_where_packages_put_them() {
        for (image, modules) in
            [("boot/vmlinuz-1", "lib/modules/1"), ("usr/lib/modules/1/vmlinuz", "usr/lib/modules/1")]
        {
            let folder = tempfile::tempdir().expect("a folder");
            fs::create_dir_all(folder.path().join(modules)).expect("made");
            assert!(look("1", folder.path()).is_err(), "no image yet");
            fs::create_dir_all(folder.path().join(image).parent().expect("one")).expect("made");
            fs::write(folder.path().join(image), "").expect("written");
            assert_eq!(look("1", folder.path()).expect("found").image, folder.path().join(image));
        }
    }
}
