//! Where the agent listens, and who may talk to it: a directory that only its owner can enter, a lock that one agent at a
//! time holds, a socket that only its owner can open, and a look at the peer's user id. Knows no requests.

use super::AgentError;
use nix::fcntl::{Flock, FlockArg};
use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::{
        fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// How long a new agent waits for one that is just ending.
const PATIENCE: Duration = Duration::from_secs(3);

/// The right to be the agent behind a socket; ends with the process, however that ends.
#[derive(Debug)]
pub struct Lock {
    _file: Flock<File>,
}

/// May a peer with this user id give orders?
#[must_use]
pub fn admits(uid: u32) -> bool {
    uid == 0 || uid == nix::unistd::geteuid().as_raw()
}

/// Makes the socket's directory, or checks that nobody else can enter the one there is.
///
/// # Errors
/// It can't be made, is a symbolic link, belongs to somebody else, or is open to others.
pub fn prepare_directory(socket: &Path) -> Result<(), AgentError> {
    make(parent(socket)).and_then(|()| check_private(parent(socket))).map_err(|(why, way_out)| AgentError::Directory {
        path: parent(socket).to_owned(),
        why,
        way_out,
    })
}

fn parent(socket: &Path) -> &Path {
    socket.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// What is wrong with a directory, and what to do.
type Complaint = (String, &'static str);

fn make(path: &Path) -> Result<(), Complaint> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err((error.to_string(), "make it (mode 0700), or choose another socket with --socket"))
        }
        _ => Ok(()),
    }
}

/// The directory of a socket, if it exists, is no link, is ours, and is closed to all others.
///
/// # Errors
/// What is wrong with it, and what to do.
pub fn check_directory(socket: &Path) -> Result<(), Complaint> {
    if parent(socket).symlink_metadata().is_err() { Ok(()) } else { check_private(parent(socket)) }
}

fn check_private(path: &Path) -> Result<(), Complaint> {
    let facts =
        fs::symlink_metadata(path).map_err(|error| (error.to_string(), "choose another socket with --socket"))?;
    let us = nix::unistd::geteuid().as_raw();
    if facts.file_type().is_symlink() {
        return Err(("it is a symbolic link".to_owned(), "replace it by a directory of mode 0700"));
    }
    if !facts.is_dir() {
        return Err(("it is not a directory".to_owned(), "choose another socket with --socket"));
    }
    if facts.uid() != us {
        let why = format!("it belongs to user {}, the agent runs as user {us}", facts.uid());
        return Err((why, "remove it, or choose another socket with --socket"));
    }
    if facts.mode() & 0o077 != 0 {
        let why = format!("others can enter it (mode {:04o})", facts.mode() & 0o7777);
        return Err((why, "close it with chmod 0700, or choose another socket with --socket"));
    }
    Ok(())
}

/// Where the lock of a socket is.
#[must_use]
pub fn lock_path(socket: &Path) -> PathBuf {
    socket.with_extension("lock")
}

/// Becomes the agent behind `socket`. Waits a moment for one that is just ending.
///
/// # Errors
/// Another agent lives.
pub fn take_lock(socket: &Path) -> Result<Lock, AgentError> {
    let path = lock_path(socket);
    let started = Instant::now();
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(&path)
        .map_err(|source| AgentError::Socket { path: path.clone(), source })?;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut lock) => {
                // The pid is there for people and for messages; the lock is what counts.
                let noted = lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id()));
                noted.map_err(|source| AgentError::Socket { path, source })?;
                return Ok(Lock { _file: lock });
            }
            Err((back, _)) => file = back,
        }
        // An agent that ends takes its socket away first; one that answers will stay.
        if UnixStream::connect(socket).is_ok() || started.elapsed() > PATIENCE {
            let pid = fs::read_to_string(&path).unwrap_or_default();
            let pid = pid.trim().parse::<i32>().map_or_else(|_| "unknown".to_owned(), |pid| pid.to_string());
            return Err(AgentError::AlreadyRunning { pid, socket: socket.to_owned() });
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Opens the socket. What a dead agent left is replaced: the lock proves that it is dead.
///
/// # Errors
/// The system refuses; the name is taken by something that is no socket.
pub fn listen(socket: &Path, _lock: &Lock) -> Result<UnixListener, AgentError> {
    let failed = |source| AgentError::Socket { path: socket.to_owned(), source };
    if let Ok(facts) = fs::symlink_metadata(socket) {
        use std::os::unix::fs::FileTypeExt;
        if !facts.file_type().is_socket() {
            return Err(failed(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "something that is no socket has its name",
            )));
        }
        fs::remove_file(socket).map_err(failed)?;
    }
    let listener = UnixListener::bind(socket).map_err(failed)?;
    fs::set_permissions(socket, Permissions::from_mode(0o600)).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let socket = dir.path().join("run/agent.sock");
        (dir, socket)
    }

    #[test]
    fn a_directory_open_to_others_is_refused() {
        let (_dir, socket) = place();
        prepare_directory(&socket).expect("a new directory is private");
        prepare_directory(&socket).expect("and stays acceptable");
        fs::set_permissions(parent(&socket), Permissions::from_mode(0o755)).expect("chmod");
        let refusal = prepare_directory(&socket).expect_err("open to others");
        assert!(refusal.to_string().contains("mode 0755"), "{refusal}");
        assert!(refusal.way_out().contains("chmod 0700"), "{refusal:?}");
    }

    #[test]
    fn a_link_in_place_of_the_directory_is_refused() {
        let (dir, socket) = place();
        let elsewhere = dir.path().join("elsewhere");
        DirBuilder::new().mode(0o700).create(&elsewhere).expect("mkdir");
        std::os::unix::fs::symlink(&elsewhere, parent(&socket)).expect("symlink");
        let refusal = prepare_directory(&socket).expect_err("a link").to_string();
        assert!(refusal.contains("symbolic link"), "{refusal}");
    }

    #[test]
    fn a_directory_of_another_user_is_refused() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let (_dir, socket) = place();
        prepare_directory(&socket).expect("made");
        std::os::unix::fs::chown(parent(&socket), Some(65534), None).expect("chown");
        let refusal = prepare_directory(&socket).expect_err("another user's").to_string();
        assert!(refusal.contains("user 65534"), "{refusal}");
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_living_agent_is_not_displaced() {
        let (_dir, socket) = place();
        prepare_directory(&socket).expect("directory");
        drop(UnixListener::bind(&socket).expect("a socket that nobody serves any more"));
        let lock = take_lock(&socket).expect("no agent lives");
        let listener = listen(&socket, &lock).expect("stale socket is replaced");
        assert_eq!(fs::metadata(&socket).expect("socket").mode() & 0o777, 0o600);
        let refusal = take_lock(&socket).expect_err("an agent lives").to_string();
        assert!(refusal.contains(&format!("pid {}", std::process::id())), "{refusal}");
        drop((listener, lock));
        take_lock(&socket).expect("the agent is gone");
    }

    #[test]
    fn a_file_in_place_of_the_socket_is_left_alone() {
        let (_dir, socket) = place();
        prepare_directory(&socket).expect("directory");
        fs::write(&socket, "precious").expect("write");
        let lock = take_lock(&socket).expect("lock");
        listen(&socket, &lock).expect_err("no socket");
        assert_eq!(fs::read_to_string(&socket).expect("still there"), "precious");
    }
}
