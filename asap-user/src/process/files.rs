//! Opens files by names that a target has a say in: the executable and the libraries behind its mappings, the debug files in its
//! root. What is opened is a regular file, and nothing happens to anything else: a device would be woken by being opened, a pipe
//! would block. A container's links lead nowhere outside of the container.

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2},
    sys::stat::{FileStat, Mode, SFlag, fstat},
};
use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

/// Opens, for reading, the regular file that a magic link of `/proc` leads to (`map_files/...`, `exe`).
///
/// # Errors
/// There is none, or it is something else.
pub fn open_by_link(link: &str) -> io::Result<File> {
    crate::fault::touch("touch.file")?;
    // O_PATH opens nothing: it only names the file (open(2)).
    let handle = open(link, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    reopen(&handle)
}

/// Opens, for reading, the regular file `path` as the process of thread `tid` (or "self") sees it. Links are followed within its root only, and
/// none that `/proc` makes up.
///
/// # Errors
/// There is none, it is something else, or the process has ended.
pub fn open_in_root_of(tid: impl std::fmt::Display, path: &Path) -> io::Result<File> {
    let root = open(
        format!("/proc/{tid}/root").as_str(),
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let handle = openat2(&root, path, how)?;
    reopen(&handle)
}

/// The file behind an O_PATH descriptor, if it is a regular one.
fn reopen(handle: &OwnedFd) -> io::Result<File> {
    let facts: FileStat = fstat(handle)?;
    if SFlag::from_bits_truncate(facts.st_mode & SFlag::S_IFMT.bits()) != SFlag::S_IFREG {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    File::open(format!("/proc/self/fd/{}", handle.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, io::Read, os::unix::fs::symlink};

    fn own() -> i32 {
        i32::try_from(std::process::id()).expect("pids fit i32")
    }

    #[test]
    fn only_regular_files_are_opened() {
        let dir = tempfile::tempdir().expect("a folder");
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, Mode::S_IRUSR | Mode::S_IWUSR).expect("a pipe");
        // Opened plainly it would wait for somebody to write.
        for other in [pipe.as_path(), dir.path(), Path::new("/dev/null")] {
            let error = open_in_root_of(own(), other).expect_err("no regular file");
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{}: {error}", other.display());
            assert!(open_by_link(other.to_str().expect("ASCII")).is_err());
        }
        let mut text = String::new();
        open_by_link("/proc/self/exe").expect("this program").take(4).read_to_string(&mut text).expect("ELF");
        assert_eq!(text, "\x7fELF");
    }

    #[test]
    fn links_do_not_lead_out_of_the_process_s_root() {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED (needs root): links_do_not_lead_out_of_the_process_s_root");
            return;
        }
        // A process whose root is a folder: there its /secret is a link to the system's, by every way that links know.
        let dir = tempfile::tempdir().expect("a folder");
        let outside = tempfile::NamedTempFile::new().expect("a file");
        fs::write(outside.path(), "outside").expect("written");
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("lib")).expect("made");
        fs::write(root.join("lib/inside"), "inside").expect("written");
        symlink(outside.path(), root.join("absolute")).expect("linked");
        let up = format!("../../../../../../../..{}", outside.path().display());
        symlink(up, root.join("relative")).expect("linked");
        symlink("/lib/inside", root.join("within")).expect("linked");
        symlink(format!("/proc/{}/root{}", own(), outside.path().display()), root.join("magic")).expect("linked");
        let confined = Confined::start(&root);
        let read = |name: &str| {
            let mut text = String::new();
            open_in_root_of(confined.0, Path::new(name))
                .and_then(|mut file| file.read_to_string(&mut text))
                .map(|_| text)
        };
        assert_eq!(read("/within").expect("a link inside"), "inside");
        assert_eq!(read("/../../lib/inside").expect("above the root is the root"), "inside");
        for name in ["/absolute", "/relative", "/magic"] {
            assert_eq!(read(name).expect_err(name).kind(), io::ErrorKind::NotFound, "{name}");
        }
    }

    /// A process that waits in another root.
    struct Confined(i32);

    impl Confined {
        fn start(root: &Path) -> Self {
            let root = std::ffi::CString::new(root.as_os_str().as_encoded_bytes()).expect("no NUL");
            let (reader, writer) = nix::unistd::pipe().expect("a pipe");
            // SAFETY: the child makes system calls on memory that it has, allocates nothing, and never returns.
            match unsafe { nix::unistd::fork() }.expect("a process") {
                nix::unistd::ForkResult::Child => {
                    // SAFETY: as above.
                    unsafe {
                        libc::chroot(root.as_ptr());
                        libc::write(writer.as_raw_fd(), c"+".as_ptr().cast(), 1);
                        libc::alarm(60);
                        libc::pause();
                        libc::_exit(0)
                    }
                }
                nix::unistd::ForkResult::Parent { child } => {
                    drop(writer);
                    let mut byte = [0];
                    File::from(reader).read_exact(&mut byte).expect("it is in its root");
                    Self(child.as_raw())
                }
            }
        }
    }

    impl Drop for Confined {
        fn drop(&mut self) {
            let child = nix::unistd::Pid::from_raw(self.0);
            let _ = nix::sys::signal::kill(child, nix::sys::signal::SIGKILL);
            let _ = nix::sys::wait::waitpid(child, None);
        }
    }
}
