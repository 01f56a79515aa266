//! A private view of the file system for a build, as only this process and its children see it: folders shown at other paths
//! (Debian's packages are built below `/build/reproducible-path`, and the path is part of the code), compilers replaced by
//! their stand-ins wherever they are called from, and, if wanted, a layer that takes what is written to the system's folders, so
//! that packages can be installed for the build alone. The machine itself is left as it is, and all of it goes with the process.
//! Not for confinement: a build can do what its user can do.

use super::wrapper;
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    unistd::{getegid, geteuid, pivot_root},
};
use std::{
    fs, io,
    os::unix::fs::{FileTypeExt, symlink},
    path::{Path, PathBuf},
};

/// Where packages write to when they are installed.
const LAYERED: [&str; 6] = ["/usr", "/etc", "/opt", "/var/lib", "/var/cache", "/var/log"];
/// Of a system's running state, what a build may need: how names are resolved.
const KEPT_OF_RUN: [&str; 3] = ["systemd/resolve", "resolvconf", "NetworkManager"];

/// What is to be seen.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Folder of our own, outside of the system's folders.
    pub work: PathBuf,
    /// Absolute path, and the folder that is to be seen there.
    pub shown: Vec<(PathBuf, PathBuf)>,
    /// Writes to the system's folders go to a layer, which is thrown away.
    pub layered: bool,
}

/// There is no such view to be had.
#[derive(Debug, thiserror::Error)]
pub enum RoomError {
    /// The system refuses.
    #[error("a private view of the file system can't be made: {step}: {error}")]
    System {
        /// What was tried.
        step: String,
        /// What the system said.
        error: io::Error,
    },
    /// A path with signs that mount options can't hold.
    #[error("{0} holds a comma, colon or backslash; give another folder with --work")]
    Path(String),
    /// Only root can own files of others.
    #[error("a layer for packages needs root")]
    NotRoot,
}

fn at(step: impl Into<String>) -> impl FnOnce(nix::Error) -> RoomError {
    |error| RoomError::System { step: step.into(), error: error.into() }
}

fn by(step: impl Into<String>) -> impl FnOnce(io::Error) -> RoomError {
    |error| RoomError::System { step: step.into(), error }
}

const NONE: Option<&str> = None;

/// Moves this process into such a view. It must have one thread only, as it is where user namespaces are needed.
///
/// # Errors
/// The system does not allow it. Then this process may be in namespaces of its own, but sees what it saw.
pub fn enter(plan: &Plan) -> Result<(), RoomError> {
    if plan.layered && !geteuid().is_root() {
        return Err(RoomError::NotRoot);
    }
    let work = plan.work.display().to_string();
    if plan.layered && work.contains([',', ':', '\\']) {
        return Err(RoomError::Path(work));
    }
    let here = std::env::current_dir().map_err(by("the current folder"))?;
    let compilers = wrapper::compilers();
    separate()?;
    // What is mounted on the machine meanwhile shows up here, but nothing goes the other way (mount_namespaces(7)).
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE).map_err(at("mount /"))?;
    let root = plan.work.join("room");
    fs::create_dir_all(&root).map_err(by(root.display().to_string()))?;
    mount(Some("tmpfs"), &root, Some("tmpfs"), MsFlags::empty(), Some("mode=755,size=64m"))
        .map_err(at("mount tmpfs"))?;
    furnish(&root)?;
    if plan.layered {
        layer(&root, &plan.work)?;
    }
    for (inside, outside) in &plan.shown {
        fs::create_dir_all(outside).map_err(by(outside.display().to_string()))?;
        show(outside, &below(&root, inside))?;
    }
    // The stand-ins: this program over each compiler, and the compiler itself aside.
    let this = std::env::current_exe().map_err(by("this program"))?;
    for compiler in &compilers {
        let aside = below(&below(&root, Path::new(wrapper::ASIDE)), compiler);
        show(compiler, &aside)?;
        bind(&this, &below(&root, compiler), MsFlags::empty())?;
    }
    let root_of_ours = root.canonicalize().map_err(by(root.display().to_string()))?;
    std::env::set_current_dir(&root).map_err(by(root.display().to_string()))?;
    // The old root lies on top of the new one, and is taken away (pivot_root(2)).
    pivot_root(".", ".").map_err(at("pivot_root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(at("umount of the old root"))?;
    // The copy of the new root within the folder that it was made in.
    let _ = umount2(&root_of_ours, MntFlags::MNT_DETACH);
    std::env::set_current_dir(&here).map_err(by(here.display().to_string()))
}

/// Namespaces of our own; for others than root with a user namespace in which they are who they were.
fn separate() -> Result<(), RoomError> {
    if geteuid().is_root() {
        return unshare(CloneFlags::CLONE_NEWNS).map_err(at("unshare"));
    }
    let (user, group) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)
        .map_err(at("unshare (user namespaces may be switched off here; root needs none)"))?;
    let write = |file: &str, text: String| fs::write(format!("/proc/self/{file}"), text).map_err(by(file));
    write("setgroups", "deny".to_owned())?;
    write("uid_map", format!("{user} {user} 1\n"))?;
    write("gid_map", format!("{group} {group} 1\n"))
}

fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// Shows all that is in `/`.
fn furnish(root: &Path) -> Result<(), RoomError> {
    for entry in fs::read_dir("/").map_err(by("/"))?.flatten() {
        let (path, to) = (entry.path(), root.join(entry.file_name()));
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_symlink() {
            let target = fs::read_link(&path).map_err(by(path.display().to_string()))?;
            symlink(target, &to).map_err(by(to.display().to_string()))?;
        } else if kind.is_dir() || kind.is_file() {
            show(&path, &to)?;
        } else if kind.is_socket() || kind.is_fifo() {
            continue;
        }
    }
    Ok(())
}

/// Shows a file or folder at another path.
fn show(from: &Path, to: &Path) -> Result<(), RoomError> {
    if from.is_dir() {
        fs::create_dir_all(to).map_err(by(to.display().to_string()))?;
    } else {
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder).map_err(by(folder.display().to_string()))?;
        }
        if !to.exists() {
            fs::write(to, "").map_err(by(to.display().to_string()))?;
        }
    }
    bind(from, to, MsFlags::MS_REC)
}

fn bind(from: &Path, to: &Path, flags: MsFlags) -> Result<(), RoomError> {
    mount(Some(from), to, NONE, MsFlags::MS_BIND | flags, NONE).map_err(at(format!(
        "bind {} to {}",
        from.display(),
        to.display()
    )))
}

/// A layer over the system's folders. Services that packages would start are not started, and the system's manager is not seen.
fn layer(root: &Path, work: &Path) -> Result<(), RoomError> {
    for (number, folder) in LAYERED.into_iter().enumerate() {
        let path = Path::new(folder);
        if !path.is_dir() || path.symlink_metadata().is_ok_and(|data| data.is_symlink()) {
            continue;
        }
        let (upper, scratch) = (work.join(format!("layer/{number}/upper")), work.join(format!("layer/{number}/work")));
        for folder in [&upper, &scratch] {
            fs::create_dir_all(folder).map_err(by(folder.display().to_string()))?;
        }
        copy_mode(path, &upper)?;
        let options = format!("lowerdir={folder},upperdir={},workdir={}", upper.display(), scratch.display());
        mount(Some("overlay"), &below(root, path), Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .map_err(at(format!("a layer over {folder}")))?;
    }
    let run = below(root, Path::new("/run"));
    mount(Some("tmpfs"), &run, Some("tmpfs"), MsFlags::empty(), Some("mode=755")).map_err(at("tmpfs on /run"))?;
    for kept in KEPT_OF_RUN {
        let (from, to) = (Path::new("/run").join(kept), run.join(kept));
        if from.exists() {
            show(&from, &to)?;
        }
    }
    fs::create_dir_all(run.join("lock")).map_err(by("/run/lock"))?;
    // invoke-rc.d(8): 101 means that nothing may be started.
    let policy = below(root, Path::new("/usr/sbin/policy-rc.d"));
    fs::write(&policy, "#!/bin/sh\nexit 101\n").map_err(by("/usr/sbin/policy-rc.d"))?;
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&policy, executable).map_err(by("/usr/sbin/policy-rc.d"))
}

fn copy_mode(from: &Path, to: &Path) -> Result<(), RoomError> {
    let mode = fs::metadata(from).map_err(by(from.display().to_string()))?.permissions();
    fs::set_permissions(to, mode).map_err(by(to.display().to_string()))
}
