//! A compiler that is none: sends its arguments and the files they name to process 1, which asks the host, and writes what comes
//! back.

use anyhow::{Context, Result, ensure};
use std::{
    fs,
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::Path,
    process::ExitCode,
};
use vm_tests::{
    compile::collect,
    protocol::{self, Compile, Compiled, FileHead, GUEST},
};

/// Where process 1 listens.
pub const SOCKET: &str = "/run/asap-compilers";

/// More is not sent: it would be a mistake of this program, not a source.
const LIMIT: usize = 64 << 20;

/// Runs the host's `program` with our arguments.
pub fn ask(program: &str) -> ExitCode {
    match compile(program) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("{program}: the host's can't be used: {error:#}");
            ExitCode::from(125)
        }
    }
}

fn compile(program: &str) -> Result<u8> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let directory = std::env::current_dir()?.to_str().context("the working directory has a strange name")?.to_owned();
    let mut input = Vec::new();
    if arguments.iter().any(|argument| argument == "-") {
        std::io::stdin().read_to_end(&mut input)?;
    }
    let mut sent = Sent::default();
    // A working directory is a test's own, or where all began.
    if directory.strip_prefix(GUEST).is_some_and(|below| below.starts_with("/tmp/")) {
        sent.folder(Path::new(&directory))?;
    }
    for argument in &arguments {
        for path in protocol::guest_paths(argument) {
            let path = Path::new(path);
            if path.is_dir() {
                sent.folder(path)?;
            } else if path.is_file() {
                sent.file(path)?;
            }
        }
    }
    let id = u64::from(std::process::id());
    let request = Compile { id, program: program.to_owned(), arguments, directory, input, files: sent.heads };
    let mut stream = UnixStream::connect(SOCKET).context(SOCKET)?;
    protocol::send(&mut stream, &request, &sent.heap)?;
    let (answer, heap) = protocol::receive::<Compiled>(&mut stream)?.context("process 1 did not answer")?;
    for (head, bytes) in protocol::files(&answer.files, &heap)? {
        // As compilers do: a program that runs is not overwritten but replaced.
        let _ = fs::remove_file(&head.path);
        if let Some(folder) = Path::new(&head.path).parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&head.path, bytes).with_context(|| head.path.clone())?;
        fs::set_permissions(&head.path, fs::Permissions::from_mode(head.mode))?;
    }
    std::io::stdout().write_all(&answer.output)?;
    std::io::stderr().write_all(&answer.errors)?;
    Ok(answer.code.try_into().unwrap_or(126))
}

#[derive(Default)]
struct Sent {
    heads: Vec<FileHead>,
    heap: Vec<u8>,
}

impl Sent {
    fn folder(&mut self, folder: &Path) -> Result<()> {
        collect(folder, &mut |path| self.file(path))
    }

    fn file(&mut self, path: &Path) -> Result<()> {
        let name = path.to_str().context("a file with a strange name")?.to_owned();
        if self.heads.iter().any(|head| head.path == name) {
            return Ok(());
        }
        let bytes = fs::read(path).with_context(|| name.clone())?;
        ensure!(self.heap.len() + bytes.len() < LIMIT, "{name} and those before it are too much to send");
        let mode = fs::metadata(path)?.permissions().mode() & 0o777;
        self.heads.push(FileHead { path: name, mode, length: bytes.len() });
        self.heap.extend(bytes);
        Ok(())
    }
}
