//! Gates: a text page that lets nobody through for a moment. A memfd page with the same bytes, registered with
//! userfaultfd(2) in MINOR mode, lies over the text page; a thread that comes to execute it waits in the kernel. Nobody is
//! stopped who does not come.
//!
//! MINOR mode only, and always with the page's content in place: when the agent dies, the kernel lets every thread go on
//! with those bytes (P1). Not for deciding when to close or open.

pub use super::userfault::GateError;
use super::{puppet::Puppet, userfault};
use crate::{
    address::{PAGE_SIZE, TargetAddr},
    kernel::uffd::{Event, Uffd},
};
use std::{
    collections::HashMap,
    fs::File,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
    time::Instant,
};

/// Threads seen waiting at closed gates, by id, with the time they were first seen.
type Waiting = Arc<Mutex<HashMap<i32, Instant>>>;

/// The gates of one process.
#[derive(Debug)]
pub struct Gatekeeper {
    pid: i32,
    uffd: Arc<Uffd>,
    name: TargetAddr,
    content: Option<Content>,
    waiting: Waiting,
    reader: Option<JoinHandle<()>>,
    stop: OwnedFd,
    /// Faults of the kernel itself on a closed gate wait, too; otherwise they fail with EFAULT.
    pub covers_kernel_faults: bool,
}

/// The memory behind the gates of one transaction. Never used again for another: a child that was forked while a gate was
/// closed keeps mapping it, and its bytes must stay.
#[derive(Debug)]
struct Content {
    file: File,
    /// Number of the descriptor in the puppet.
    in_puppet: u64,
    pages: u64,
}

impl Gatekeeper {
    /// Makes the userfaultfd and the memfd in the target's address space, by its puppet. `scratch` is a place in the puppet's
    /// home for a short string.
    ///
    /// # Errors
    /// The kernel has no userfaultfd for this process, or not its MINOR mode.
    pub fn new(
        puppet: &mut Puppet,
        memory: &super::memory::Memory,
        target: i32,
        scratch: TargetAddr,
    ) -> Result<Self, GateError> {
        let fail = |step| GateError::at(target, step);
        let (uffd, covers_kernel_faults) = userfault::open(puppet, target, userfault::Forks::Ignore)?;
        memory.write(scratch, b"asap-gate\0").map_err(fail("writing a name"))?;
        let uffd = Arc::new(uffd);
        let stop = nix::sys::eventfd::EventFd::from_flags(nix::sys::eventfd::EfdFlags::EFD_CLOEXEC)
            .map_err(|errno| fail("eventfd")(errno.into()))?;
        let stop = OwnedFd::from(stop);
        let waiting = Waiting::default();
        let reader = std::thread::Builder::new()
            .name(format!("gate-{target}"))
            .stack_size(64 * 1024)
            .spawn({
                let (uffd, waiting) = (Arc::clone(&uffd), Arc::clone(&waiting));
                let stop = stop.try_clone().map_err(fail("eventfd"))?;
                move || read_events(&uffd, &waiting, &stop)
            })
            .map_err(fail("starting the reader"))?;
        Ok(Self {
            pid: target,
            uffd,
            name: scratch,
            content: None,
            waiting,
            reader: Some(reader),
            stop,
            covers_kernel_faults,
        })
    }

    /// Lays a gate for a text page ready, whose bytes now are `content`. Moved over the page it is closed: who comes waits.
    /// It ends when something else is moved over the page, followed by [`Self::wake`].
    ///
    /// # Errors
    /// The kernel refuses the mapping or its registration; nothing is left.
    pub fn prepare(&mut self, puppet: &mut Puppet, content: &[u8]) -> Result<TargetAddr, GateError> {
        let fail = |step| GateError::at(self.pid, step);
        if self.content.is_none() {
            let arguments = [self.name.0, u64::from(libc::MFD_CLOEXEC), 0, 0, 0, 0];
            let in_puppet = puppet.syscall("memfd_create", libc::SYS_memfd_create, arguments)?;
            // The puppet keeps its descriptor for the mmap of each gate: duplicated, not taken over.
            let file = File::from(puppet.fd_of(in_puppet).map_err(fail("memfd"))?);
            self.content = Some(Content { file, in_puppet, pages: 0 });
        }
        let Some(behind) = &mut self.content else { unreachable!("made above") };
        let offset = behind.pages * PAGE_SIZE;
        behind.file.set_len(offset + PAGE_SIZE).map_err(fail("growing the memfd"))?;
        behind.file.write_all_at(content, offset).map_err(fail("filling the memfd"))?;
        behind.pages += 1;
        crate::fault::touch("touch.gate").map_err(fail("registering a gate"))?;
        let at = userfault::map_text(puppet, behind.in_puppet, offset, PAGE_SIZE, None)?;
        if let Err(errno) = self.uffd.register(&(at.0..at.0 + PAGE_SIZE)) {
            let _ = puppet.syscall("munmap", libc::SYS_munmap, [at.0, PAGE_SIZE, 0, 0, 0, 0]);
            return Err(fail("registering a gate")(errno.into()));
        }
        Ok(at)
    }

    /// Removes a gate that was prepared and is not needed.
    pub fn discard(&self, puppet: &mut Puppet, gate: TargetAddr) {
        let _ = puppet.syscall("munmap", libc::SYS_munmap, [gate.0, PAGE_SIZE, 0, 0, 0, 0]);
    }

    /// Lets those who wait at `text` look again; what lies there now decides.
    ///
    /// # Errors
    /// The target is gone.
    pub fn wake(&self, text: TargetAddr) -> Result<(), GateError> {
        let woken = self.uffd.wake(&(text.0..text.0 + PAGE_SIZE));
        woken.map_err(|errno| GateError::at(self.pid, "waking")(errno.into()))
    }

    /// Ends a transaction: lets go of the memory behind its gates, and gives the threads that were seen waiting, with the
    /// time of their arrival.
    pub fn finish(&mut self, puppet: &mut Puppet) -> HashMap<i32, Instant> {
        if let Some(content) = self.content.take() {
            let _ = puppet.syscall("close", libc::SYS_close, [content.in_puppet, 0, 0, 0, 0, 0]);
        }
        std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Gatekeeper {
    fn drop(&mut self) {
        let _ = nix::unistd::write(self.stop.as_fd(), &1_u64.to_ne_bytes());
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// Reads what the kernel reports until told to stop. Never blocks elsewhere and never touches the target's memory: while it
/// runs, mremap(2) in the target can proceed.
fn read_events(uffd: &Uffd, waiting: &Waiting, stop: &OwnedFd) {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    loop {
        let mut ready = [PollFd::new(uffd.as_fd(), PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, PollTimeout::NONE).is_err() {
            continue;
        }
        if ready[1].any().unwrap_or(true) {
            return;
        }
        loop {
            match uffd.read_event() {
                Ok(Some(Event::Fault { thread, .. })) => {
                    let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
                    waiting.entry(thread).or_insert_with(Instant::now);
                }
                Ok(Some(_)) => {}
                Ok(None) => break,
                // The address space is gone.
                Err(_) => return,
            }
        }
    }
}
