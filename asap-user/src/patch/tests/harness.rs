//! Compiles, links, maps and calls patches; the test process plays the target.

use crate::address::TargetAddr;
use crate::patch::{Bases, Import, ImportKind, LinkedPatch, PatchError, PatchObject, Resolution, Resolver};
use std::collections::HashMap;
use std::ffi::CString;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A compiler that the tests use, or a loud word that it is missing.
pub(super) fn compilers(candidates: &[&'static str]) -> Vec<&'static str> {
    let found: Vec<_> = candidates
        .iter()
        .copied()
        .filter(|c| {
            let found = Command::new(c).arg("--version").output().is_ok_and(|o| o.status.success());
            if !found {
                eprintln!("SKIPPED: {c} is not installed; its objects are not tested");
            }
            found
        })
        .collect();
    assert!(!found.is_empty(), "none of {candidates:?} is installed");
    found
}

/// Compiles `source` to an object.
pub(super) fn compile(compiler: &str, flags: &[&str], extension: &str, source: &str) -> Vec<u8> {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let directory = std::env::temp_dir().join(format!(
        "asap-patch-test-{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    ));
    std::fs::create_dir(&directory).expect("temporary directory");
    let (input, output) = (directory.join(format!("patch.{extension}")), directory.join("patch.o"));
    std::fs::write(&input, source).expect("source file");
    let mut command = Command::new(compiler);
    if compiler.contains("rustc") {
        command.args(["--crate-type=lib", "--emit=obj", "--crate-name=patch"]);
    } else {
        command.arg("-c").arg(concat!("-I", env!("CARGO_MANIFEST_DIR"), "/include"));
    }
    let result = command.args(flags).arg("-o").arg(&output).arg(&input).output().expect("compiler runs");
    let object = std::fs::read(&output);
    std::fs::remove_dir_all(&directory).expect("temporary directory");
    assert!(result.status.success(), "{compiler} {flags:?}:\n{}\n{source}", String::from_utf8_lossy(&result.stderr));
    object.expect("object file")
}

pub(super) fn read(objects: Vec<Vec<u8>>) -> Result<PatchObject, PatchError> {
    let files: Vec<_> = objects.into_iter().enumerate().map(|(i, bytes)| (format!("fix{i}.o"), bytes)).collect();
    PatchObject::read(&files)
}

/// The symbols of the test process: given ones, then whatever the dynamic linker finds.
#[derive(Default)]
pub(super) struct Symbols {
    pub addresses: HashMap<String, u64>,
    pub thread_local: HashMap<String, i64>,
    pub originals: HashMap<String, u64>,
}

impl Resolver for Symbols {
    fn resolve(&self, import: &Import) -> Option<Resolution> {
        if import.kind == ImportKind::Tls {
            return self.thread_local.get(&import.name).map(|&offset| Resolution::TlsOffset(offset));
        }
        let name = match &import.file {
            Some(file) => format!("{file}:{}", import.name),
            None => import.name.clone(),
        };
        let address = self.addresses.get(&name).copied().or_else(|| dynamic_symbol(&name))?;
        Some(Resolution::Address(TargetAddr(address)))
    }

    fn original(&self, function: &str) -> Option<TargetAddr> {
        self.originals.get(function).map(|&a| TargetAddr(a))
    }
}

fn dynamic_symbol(name: &str) -> Option<u64> {
    let name = CString::new(name).ok()?;
    // SAFETY: a lookup by name; nothing is called.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!address.is_null()).then_some(address as u64)
}

/// Memory of the test process, unmapped when dropped.
pub(super) struct Region {
    pub start: u64,
    length: usize,
}

impl Region {
    /// `low`: below 2 GiB, where code without -fPIC works.
    pub fn new(length: usize, low: bool) -> Self {
        let length = length.next_multiple_of(4096);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | if low { libc::MAP_32BIT } else { 0 };
        // SAFETY: new anonymous memory at a place of the kernel's choice.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Self { start: start as u64, length }
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        assert!(at >= self.start && at + bytes.len() as u64 <= self.start + self.length as u64);
        // SAFETY: within this region, which is writable until it is protected.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) };
    }

    pub fn protect(&self, at: u64, length: usize, protection: i32) {
        if length > 0 {
            // SAFETY: pages of this region only.
            let result = unsafe { libc::mprotect(at as *mut _, length.next_multiple_of(4096), protection) };
            assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: made by mmap with this length; tests keep no pointers into it.
        unsafe { libc::munmap(self.start as *mut _, self.length) };
    }
}

/// A patch in memory, ready to be called.
pub(super) struct Loaded {
    pub patch: LinkedPatch,
    /// Registered unwind table.
    frames: Option<u64>,
    /// Keeps it mapped.
    _region: Region,
}

/// Links and maps. Names in `module` get consecutive 8-byte words of the module's data.
pub(super) fn load(
    object: &PatchObject,
    low: bool,
    module: &[&str],
    mut symbols: Symbols,
) -> Result<Loaded, PatchError> {
    let layout = object.layout();
    let pages = |size: usize| size.next_multiple_of(4096) as u64;
    let (code, rodata, data) = (pages(layout.code.size), pages(layout.rodata.size), pages(layout.data.size));
    let region = Region::new((code + rodata + data + 4096) as usize, low);
    let bases = Bases {
        code: TargetAddr(region.start),
        rodata: TargetAddr(region.start + code),
        data: TargetAddr(region.start + code + rodata),
    };
    let module_data = region.start + code + rodata + data;
    for (i, name) in module.iter().enumerate() {
        symbols.addresses.insert((*name).to_owned(), module_data + 8 * i as u64);
    }
    let patch = object.link(&bases, &symbols)?;
    assert_eq!(
        (patch.code.len(), patch.rodata.len(), patch.data.len()),
        (layout.code.size, layout.rodata.size, layout.data.size)
    );
    region.write(bases.code.0, &patch.code);
    region.write(bases.rodata.0, &patch.rodata);
    region.write(bases.data.0, &patch.data);
    region.protect(bases.code.0, patch.code.len(), libc::PROT_READ | libc::PROT_EXEC);
    region.protect(bases.rodata.0, patch.rodata.len(), libc::PROT_READ);
    Ok(Loaded { patch, frames: None, _region: region })
}

type FrameFunction = unsafe extern "C" fn(u64);

/// `__register_frame` or `__deregister_frame` of the unwinder that this process uses.
fn frame_function(name: &str) -> FrameFunction {
    let address = dynamic_symbol(name).unwrap_or_else(|| panic!("{name} is missing"));
    // SAFETY: both are documented to be void (void *).
    unsafe { std::mem::transmute::<usize, FrameFunction>(address as usize) }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        if let Some(frames) = self.frames {
            // SAFETY: was registered by `register_frames`, and is mapped until after this.
            unsafe { frame_function("__deregister_frame")(frames) };
        }
    }
}

impl Loaded {
    /// Lets exceptions pass through the patch.
    pub fn register_frames(mut self) -> Self {
        let table = self.patch.eh_frame.clone().expect("an unwind table");
        let end = (table.end.0 - 4) as *const u32;
        // SAFETY: within the mapped rodata; the table ends with a zero word, as the function wants it.
        unsafe {
            assert_eq!(end.read_unaligned(), 0, "the terminator");
            frame_function("__register_frame")(table.start.0);
        }
        self.frames = Some(table.start.0);
        self
    }

    pub fn address(&self, name: &str) -> u64 {
        self.patch.symbol(name).unwrap_or_else(|| panic!("{name} is not in {:?}", self.patch.symbols)).address.0
    }

    /// Calls `long name(long)`.
    pub fn call(&self, name: &str, argument: i64) -> i64 {
        call(self.address(name), argument)
    }
}

/// Calls `long (*)(long)` at an address.
pub(super) fn call(address: u64, argument: i64) -> i64 {
    // SAFETY: tests pass addresses of mapped functions of this type.
    let function: extern "C-unwind" fn(i64) -> i64 = unsafe { std::mem::transmute(address as usize) };
    function(argument)
}
