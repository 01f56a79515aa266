//! The guest's compilers are the host's: what a test compiles in there is compiled out here, in a folder that stands for the
//! guest's. So the image needs no compiler, and an emulated CPU need not run one.

use crate::protocol::{self, Compile, Compiled, FileHead, GUEST, HOSTED};
use anyhow::{Context, Result, bail, ensure};
use std::{
    collections::HashMap,
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Component, Path, PathBuf},
    process::{Command, Stdio},
};

/// Runs what the guest asks for, with files below `scratch`, a folder of its own; gives the answer and its heap.
pub fn compile(request: &Compile, heap: &[u8], scratch: &Path) -> Result<(Compiled, Vec<u8>)> {
    ensure!(HOSTED.contains(&request.program.as_str()), "{} is not run for guests", request.program);
    let mut sent = HashMap::new();
    for (head, bytes) in protocol::files(&request.files, heap)? {
        let path = place(&head.path, scratch)?;
        fs::create_dir_all(path.parent().unwrap_or(scratch))?;
        fs::write(&path, &bytes)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(head.mode & 0o777))?;
        sent.insert(path, bytes);
    }
    let inside = scratch.to_str().context("the temporary folder has a strange name")?;
    let directory =
        if request.directory.starts_with(GUEST) { place(&request.directory, scratch)? } else { scratch.join("cwd") };
    fs::create_dir_all(&directory)?;
    let mut command = Command::new(&request.program);
    command.current_dir(&directory).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    for argument in &request.arguments {
        for path in protocol::guest_paths(argument) {
            // Where it is to write a file, or look for one.
            fs::create_dir_all(place(path, scratch)?.parent().unwrap_or(scratch))?;
        }
        command.arg(argument.replace(GUEST, inside));
    }
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            let errors = format!("{}: not on the host: {error}\n", request.program).into_bytes();
            return Ok((Compiled { id: request.id, code: 127, output: vec![], errors, files: vec![] }, vec![]));
        }
    };
    let mut stdin = child.stdin.take().context("a pipe")?;
    let input = request.input.clone();
    let feeder = std::thread::spawn(move || {
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output()?;
    let _ = feeder.join();
    let (mut files, mut heap) = (Vec::new(), Vec::new());
    collect(scratch, &mut |path| {
        let bytes = fs::read(path)?;
        if sent.get(path) == Some(&bytes) {
            return Ok(());
        }
        let below = path.strip_prefix(scratch)?.to_str().context("a file with a strange name")?;
        let mode = fs::metadata(path)?.permissions().mode() & 0o777;
        files.push(FileHead { path: format!("{GUEST}/{below}"), mode, length: bytes.len() });
        heap.extend(bytes);
        Ok(())
    })?;
    let guests = |said: Vec<u8>| String::from_utf8_lossy(&said).replace(inside, GUEST).into_bytes();
    let code = output.status.code().unwrap_or(126);
    let (output, errors) = (guests(output.stdout), guests(output.stderr));
    Ok((Compiled { id: request.id, code, output, errors, files }, heap))
}

/// Where a file of the guest is in `scratch`.
fn place(path: &str, scratch: &Path) -> Result<PathBuf> {
    let below = Path::new(path).strip_prefix(GUEST).with_context(|| format!("{path} is not of the guest"))?;
    if below.components().any(|part| !matches!(part, Component::Normal(_))) {
        bail!("{path} leads elsewhere");
    }
    Ok(scratch.join(below))
}

/// Calls `see` with each regular file below a folder.
pub fn collect(folder: &Path, see: &mut dyn FnMut(&Path) -> Result<()>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("{} can't be read", folder.display()))? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            collect(&entry.path(), see)?;
        } else if kind.is_file() {
            see(&entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(arguments: &[&str], files: &[(&str, &str)]) -> (Compile, Vec<u8>) {
        let heads =
            files.iter().map(|(path, text)| FileHead { path: (*path).to_owned(), mode: 0o644, length: text.len() });
        let request = Compile {
            id: 7,
            program: "gcc".to_owned(),
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
            directory: format!("{GUEST}/tmp/x"),
            input: vec![],
            files: heads.collect(),
        };
        (request, files.iter().flat_map(|(_, text)| text.bytes()).collect())
    }

    #[test]
    fn what_the_guest_sends_is_compiled_and_comes_back() {
        let scratch = tempfile::tempdir().expect("a folder");
        let files = [
            ("/asap-guest/tmp/x/f.c", "#include \"h.h\"\nint f(void) { return N; }\n"),
            ("/asap-guest/i/h.h", "#define N 1\n"),
        ];
        let (request, heap) = request(&["-c", "-I/asap-guest/i", "-o", "/asap-guest/o/f.o", "f.c"], &files);
        let (answer, heap) = compile(&request, &heap, scratch.path()).expect("gcc runs");
        assert_eq!(answer.code, 0, "{}", String::from_utf8_lossy(&answer.errors));
        assert_eq!((answer.id, answer.files.len(), answer.files[0].path.as_str()), (7, 1, "/asap-guest/o/f.o"));
        assert!(heap.starts_with(b"\x7fELF") && heap.len() == answer.files[0].length);
    }

    #[test]
    fn errors_speak_of_the_guests_files() {
        let scratch = tempfile::tempdir().expect("a folder");
        let (request, heap) = request(&["-c", "/asap-guest/tmp/x/f.c"], &[("/asap-guest/tmp/x/f.c", "int f(\n")]);
        let (answer, _) = compile(&request, &heap, scratch.path()).expect("gcc runs");
        assert_ne!(answer.code, 0);
        assert!(String::from_utf8_lossy(&answer.errors).contains("/asap-guest/tmp/x/f.c:"), "{answer:?}");
    }

    #[test]
    fn no_file_lands_outside() {
        let scratch = tempfile::tempdir().expect("a folder");
        for path in ["/etc/passwd", "/asap-guest/../x"] {
            let (request, heap) = request(&[], &[(path, "")]);
            assert!(compile(&request, &heap, scratch.path()).is_err(), "{path}");
        }
        let (mut request, heap) = request(&[], &[]);
        "sh".clone_into(&mut request.program);
        assert!(compile(&request, &heap, scratch.path()).is_err());
    }
}
