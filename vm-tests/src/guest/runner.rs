//! Runs tests as the host asks, each in a group of its own, which is empty afterwards or named.

use super::{compiler, port::Port, setting};
use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    sys::wait::{WaitPidFlag, WaitStatus, waitpid},
    unistd::Pid,
};
use std::{
    collections::HashMap,
    fs::{self, File},
    io::Read,
    os::unix::{
        fs::{OpenOptionsExt, PermissionsExt},
        net::{UnixListener, UnixStream},
        process::CommandExt,
    },
    process::{Command, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{Sender, channel},
    },
    time::{Duration, Instant},
};
use vm_tests::protocol::{self, Compile, Compiled, End, Ended, Run, ToGuest, ToHost};

/// The cgroup of the running test.
const GROUP: &str = "/sys/fs/cgroup/test";

/// How long what a test has ended may take to be gone.
const AFTER: Duration = Duration::from_secs(5);

/// Serves the host until it ends the machine.
pub fn serve() -> Result<()> {
    let (port, mut incoming) = Port::open()?;
    let port = Arc::new(port);
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
    let (runs, orders) = channel();
    let compilers = Arc::new(Compilers::default());
    compilers.listen(&port)?;
    std::thread::spawn({
        let compilers = Arc::clone(&compilers);
        move || {
            let done = receive(&mut incoming, &runs, &compilers);
            println!("asap-vm-guest: the host has ended: {done:?}");
        }
    });
    let mut kernel = Kernel::listen()?;
    port.send(&ToHost::Ready { release }, b"")?;
    for run in orders {
        let ended = test(&run, &port, &mut kernel)?;
        port.send(&ToHost::Ended(ended), b"")?;
    }
    Ok(())
}

/// Passes on what comes from the host; ends with the machine.
fn receive(incoming: &mut File, runs: &Sender<Run>, compilers: &Compilers) -> Result<()> {
    loop {
        match protocol::receive(incoming)?.context("no host")? {
            (ToGuest::Run(run), _) => runs.send(run)?,
            (ToGuest::Compiled(answer), heap) => compilers.answer(answer, heap),
            (ToGuest::PowerOff, _) => {
                super::boot::power_off();
                return Ok(());
            }
        }
    }
}

/// Runs one test to its end.
fn test(run: &Run, port: &Arc<Port>, kernel: &mut Kernel) -> Result<Ended> {
    let begun = Instant::now();
    fs::create_dir_all(GROUP).context("a cgroup")?;
    let _ = kernel.complaints();
    let end = match start(run) {
        Ok((pid, output)) => {
            let (port, (done, pumped)) = (Arc::clone(port), channel());
            std::thread::spawn(move || {
                pump(output, &port);
                let _ = done.send(());
            });
            let end = wait(pid, begun + Duration::from_secs(run.limit))?;
            let left = clear()?;
            // All that could write is gone, so this ends; but never at the price of all other tests.
            let _ = pumped.recv_timeout(AFTER);
            (end, left)
        }
        Err(error) => (End::NotStarted(format!("{error:#}")), Vec::new()),
    };
    let (end, left) = end;
    // What it left in the temporary folder would fill the memory in time.
    if let Ok(folder) = std::env::var("TMPDIR") {
        for entry in fs::read_dir(folder)?.flatten() {
            let path = entry.path();
            let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        }
    }
    let took = begun.elapsed().as_millis() as u64;
    Ok(Ended { end, left, complaints: kernel.complaints(), took })
}

fn start(run: &Run) -> Result<(Pid, std::io::PipeReader)> {
    let setting = setting::prepare(&run.setting)?;
    let (output, input) = std::io::pipe()?;
    let mut command = Command::new(&run.program);
    command.args(&run.arguments).stdin(Stdio::null()).stdout(input.try_clone()?).stderr(input).current_dir("/root");
    let group = std::path::PathBuf::from(GROUP).join("cgroup.procs");
    let mut group = File::options().write(true).open(group)?;
    // SAFETY: between fork and exec only system calls are made; what they need was made before.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            std::io::Write::write_all(&mut group, b"0")?;
            setting.enter()
        });
    }
    let child = command.spawn().with_context(|| run.program.clone())?;
    // It is waited for with all others that end.
    Ok((Pid::from_raw(child.id() as i32), output))
}

fn pump(mut output: std::io::PipeReader, port: &Port) {
    let mut bytes = [0; 16384];
    while let Ok(count) = output.read(&mut bytes) {
        if count == 0 || port.send(&ToHost::Output, &bytes[..count]).is_err() {
            return;
        }
    }
}

/// Reaps all that ends until the test does.
fn wait(test: Pid, deadline: Instant) -> Result<End> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == test => return Ok(End::Code(code)),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == test => return Ok(End::Signal(signal as i32)),
            Ok(WaitStatus::StillAlive) => {
                if Instant::now() > deadline {
                    return Ok(End::TimeLimit);
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(_) | Err(Errno::EINTR) => (),
            Err(error) => return Err(error).context("process 1 waits"),
        }
    }
}

/// Ends what is left of a test, and names it. What ends by itself meanwhile is not meant.
fn clear() -> Result<Vec<String>> {
    let begun = Instant::now();
    let mut left: Vec<String> = Vec::new();
    loop {
        let members = fs::read_to_string(format!("{GROUP}/cgroup.procs"))?;
        if members.is_empty() {
            break;
        }
        if begun.elapsed() > AFTER && left.is_empty() {
            left = members.lines().map(describe).collect();
            fs::write(format!("{GROUP}/cgroup.kill"), "1")?;
        }
        anyhow::ensure!(begun.elapsed() < 3 * AFTER, "these can't be killed: {}", left.join(", "));
        reap();
        std::thread::sleep(Duration::from_millis(5));
    }
    reap();
    Ok(left)
}

fn reap() {
    let flags = Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL);
    while waitpid(None, flags).is_ok_and(|status| status != WaitStatus::StillAlive) {}
}

fn describe(pid: &str) -> String {
    let name = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let name = String::from_utf8_lossy(&name).replace('\0', " ");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let state = status.lines().find_map(|line| line.strip_prefix("State:\t")).unwrap_or("gone");
    format!("{pid} {} ({state})", name.trim_end())
}

/// What the kernel says.
struct Kernel(File);

impl Kernel {
    fn listen() -> Result<Self> {
        let log = File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open("/dev/kmsg")?;
        Ok(Self(log))
    }

    /// What it complained of since the last call.
    fn complaints(&mut self) -> Vec<String> {
        let mut complaints = Vec::new();
        // A read gives one record, and fails where it is cut short or overtaken.
        let mut record = [0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(0) => break,
                Ok(length) => {
                    let text = String::from_utf8_lossy(&record[..length]);
                    let words = text.split_once(';').map_or("", |(_, words)| words).lines().next().unwrap_or_default();
                    if ["BUG:", "WARNING:", "Oops", "INFO: task", "soft lockup"].iter().any(|word| words.contains(word))
                    {
                        complaints.push(words.to_owned());
                    }
                }
                Err(error) if error.raw_os_error() == Some(nix::libc::EPIPE) => (),
                Err(_) => break,
            }
        }
        complaints
    }
}

/// Compilers that wait for the host.
#[derive(Default)]
struct Compilers {
    waiting: Mutex<HashMap<u64, (u64, UnixStream)>>,
    next: AtomicU64,
}

impl Compilers {
    /// Takes requests of [`compiler`], in a thread of its own.
    fn listen(self: &Arc<Self>, port: &Arc<Port>) -> Result<()> {
        let listener = UnixListener::bind(compiler::SOCKET)?;
        fs::set_permissions(compiler::SOCKET, fs::Permissions::from_mode(0o666))?;
        let (compilers, port) = (Arc::clone(self), Arc::clone(port));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if let Err(error) = compilers.ask(stream, &port) {
                    println!("asap-vm-guest: {error:#}");
                }
            }
        });
        Ok(())
    }

    fn ask(&self, mut stream: UnixStream, port: &Port) -> Result<()> {
        let (mut request, heap) = protocol::receive::<Compile>(&mut stream)?.context("a compiler that says nothing")?;
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let theirs = std::mem::replace(&mut request.id, id);
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(id, (theirs, stream));
        port.send(&ToHost::Compile(request), &heap)
    }

    fn answer(&self, mut answer: Compiled, heap: Vec<u8>) {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&answer.id);
        let Some((theirs, mut stream)) = waiting else { return };
        answer.id = theirs;
        // A compiler that was killed meanwhile does not want it.
        let _ = protocol::send(&mut stream, &answer, &heap);
    }
}
