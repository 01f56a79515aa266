//! Which processes of this machine a selector means: those that run a file, map a library, belong to a service, or map a certain
//! build. Looks only; nothing is stopped or changed. Not for what becomes of them: that is the engine's, which looks at each again.

mod matching;

use crate::{
    image::{Image, ImageBytes},
    process::{
        files,
        info::{self, ProcessInfo},
        maps::{Mapping, Maps},
    },
    report::Member,
};
use matching::{NamedFile, is_in_unit};
use std::{collections::HashMap, fs, io, os::unix::fs::MetadataExt, path::PathBuf};

/// What is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    /// Processes that run this file, or ran it before it was replaced.
    Executable(PathBuf),
    /// Processes that map this file as code, or one that was there before it was replaced; a name without `/` means any file of
    /// that name.
    Library(PathBuf),
    /// Processes of a service (systemd) or another control group of this name.
    Unit(String),
    /// Processes that map code of the build whose build-id begins so.
    BuildId(String),
}

/// Shortest beginning of a build-id that is taken.
pub const BUILD_ID_LEAST: usize = 8;

/// A process that a selector means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Names it.
    pub member: Member,
    /// Its name, as it gives itself one.
    pub name: String,
    /// What it runs, as it sees it.
    pub executable: String,
    /// Its user.
    pub user: u32,
    /// It sees other files than we do: a container.
    pub is_elsewhere: bool,
    /// Why it is left out.
    pub skipped: Option<String>,
}

/// A selector can't be used.
#[derive(Debug, thiserror::Error)]
pub enum SelectorError {
    /// It makes no sense.
    #[error("{0}")]
    Senseless(String),
    /// The processes can't be listed.
    #[error("the processes of this machine can't be listed: {0}")]
    Unlisted(#[source] io::Error),
}

/// Whether a process is meant.
enum Test {
    Executable(NamedFile),
    Library(NamedFile),
    Unit(String),
    BuildId(String),
}

/// Finds the processes that `selector` means, by pid. Those that can't or must not be touched are there with the reason, but for
/// asap's own helpers, which nobody needs to know of.
///
/// # Errors
/// The selector makes no sense.
pub fn find(selector: &Selector) -> Result<Vec<Candidate>, SelectorError> {
    let test = match selector {
        Selector::Executable(path) => Test::Executable(named(path)?),
        Selector::Library(path) if !path.to_string_lossy().contains('/') => {
            Test::Library(NamedFile::by_name(&path.to_string_lossy()))
        }
        Selector::Library(path) => Test::Library(named(path)?),
        Selector::Unit(name) if name.is_empty() || name.contains('/') => {
            return Err(SelectorError::Senseless(format!("`{name}` is no name of a unit")));
        }
        Selector::Unit(name) => Test::Unit(name.clone()),
        Selector::BuildId(id) => {
            let id = id.to_ascii_lowercase();
            if id.len() < BUILD_ID_LEAST || !id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                let why = format!("`{id}` is no build-id, nor the first {BUILD_ID_LEAST} or more digits of one");
                return Err(SelectorError::Senseless(why));
            }
            Test::BuildId(id)
        }
    };
    let mut builds = Builds::default();
    let mut found = Vec::new();
    let mut pids: Vec<i32> = fs::read_dir("/proc")
        .map_err(SelectorError::Unlisted)?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    let own = fs::metadata("/proc/self/exe").ok().map(|facts| (facts.dev(), facts.ino()));
    let own_root = fs::metadata("/proc/self/ns/mnt").ok().map(|facts| facts.ino());
    for pid in pids {
        // What ends meanwhile is not meant.
        let Ok(info) = ProcessInfo::of(pid) else { continue };
        if info.kernel_thread {
            continue;
        }
        let Some(tid) = info::living_thread(pid) else { continue };
        if !test.fits(tid, &mut builds) {
            continue;
        }
        if info.tracer != 0 && identity(info.tracer) == own && own.is_some() {
            continue;
        }
        let executable = fs::read_link(format!("/proc/{tid}/exe")).unwrap_or_default().to_string_lossy().into_owned();
        let skipped = if pid == 1 {
            Some("it is the system's first process".to_owned())
        } else if identity(tid) == own && own.is_some() {
            Some("it is asap itself".to_owned())
        } else if info.tracer != 0 {
            Some(format!("it is being traced by process {}", info.tracer))
        } else {
            None
        };
        let root = fs::metadata(format!("/proc/{tid}/ns/mnt")).ok().map(|facts| facts.ino());
        found.push(Candidate {
            member: Member { pid, start_time: info.start_time },
            name: info.name,
            executable,
            user: fs::metadata(format!("/proc/{pid}")).map_or(u32::MAX, |facts| facts.uid()),
            is_elsewhere: root != own_root,
            skipped,
        });
    }
    Ok(found)
}

/// Device and inode of what a process runs.
fn identity(pid: i32) -> Option<(u64, u64)> {
    fs::metadata(format!("/proc/{pid}/exe")).ok().map(|facts| (facts.dev(), facts.ino()))
}

fn named(path: &std::path::Path) -> Result<NamedFile, SelectorError> {
    // A file that was removed still has a name.
    let whole = match fs::canonicalize(path) {
        Ok(whole) => whole,
        Err(error) if error.kind() == io::ErrorKind::NotFound => std::path::absolute(path)
            .map_err(|error| SelectorError::Senseless(format!("{}: {error}", path.display())))?,
        Err(error) => return Err(SelectorError::Senseless(format!("{}: {error}", path.display()))),
    };
    let inode = fs::metadata(&whole).ok().map(|facts| (facts.dev(), facts.ino()));
    Ok(NamedFile::by_path(&whole.to_string_lossy(), inode))
}

impl Test {
    fn fits(&self, tid: i32, builds: &mut Builds) -> bool {
        let code = || {
            let maps = Maps::of(tid).unwrap_or_default();
            maps.0.into_iter().filter(|mapping| mapping.executable && mapping.is_file())
        };
        match self {
            Self::Executable(file) => {
                let shown = fs::read_link(format!("/proc/{tid}/exe")).unwrap_or_default();
                file.is(&shown.to_string_lossy(), identity(tid))
            }
            Self::Library(file) => code().any(|mapping| {
                let inode = || fs::metadata(mapping.map_file(tid)).ok().map(|facts| (facts.dev(), facts.ino()));
                file.is_mapped(&mapping.name) || (file.may_be_inode(mapping.inode) && file.is_inode(inode()))
            }),
            Self::Unit(name) => {
                let groups = fs::read(format!("/proc/{tid}/cgroup")).unwrap_or_default();
                is_in_unit(&String::from_utf8_lossy(&groups), name)
            }
            Self::BuildId(id) => {
                code().any(|mapping| builds.of(tid, &mapping).is_some_and(|build| build.starts_with(id)))
            }
        }
    }
}

/// Build-ids of files, by device and inode.
#[derive(Default)]
struct Builds(HashMap<(String, u64), Option<String>>);

/// Larger files that are not root's are not read for their build-id, bytes.
const READ_MOST: u64 = 64 << 20;

impl Builds {
    fn of(&mut self, tid: i32, mapping: &Mapping) -> Option<&String> {
        let key = (mapping.device.clone(), mapping.inode);
        let read = || {
            let file = files::open_by_link(&mapping.map_file(tid)).ok()?;
            let mut room = READ_MOST;
            Image::parse(mapping.path(), ImageBytes::map(&file, &mut room).ok()?).ok()?.build_id_hex()
        };
        self.0.entry(key).or_insert_with(read).as_ref()
    }
}
