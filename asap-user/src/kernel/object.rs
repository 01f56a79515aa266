//! The embedded eBPF object: its maps, made one by one, and its programs, loaded one by one with just the maps they use.
//! So a program that a kernel refuses takes nothing else with it, and several sets of probes can be active at once.

use super::{
    KernelError,
    syscall::{self, ProgramType},
};
use aya::maps::MapData;
use aya_obj::Object;
use std::{
    collections::HashSet,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

/// Built from `asap-ebpf` by `cargo xtask ebpf`.
static BYTES: &[u8] = aya::include_bytes_aligned!("asap.bpf.o");

fn parse() -> Result<Object, KernelError> {
    Object::parse(BYTES).map_err(|error| KernelError::Object(with_causes(&error)))
}

/// Makes a map as the object describes it.
pub fn create_map(name: &str) -> Result<MapData, KernelError> {
    let mut object = parse()?;
    let description = object.maps.remove(name).ok_or_else(|| KernelError::Object(format!("it has no map `{name}`")))?;
    MapData::create(description, name, None).map_err(|error| map_error(name, error))
}

/// An error of aya's about a map.
pub fn map_error(map: &str, error: impl std::error::Error) -> KernelError {
    KernelError::Map { map: map.to_owned(), message: with_causes(&error) }
}

/// aya's messages leave the cause to `source`.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        message = format!("{message}: {inner}");
        cause = inner.source();
    }
    message
}

/// Stores into a slot of an array map.
pub fn store<V: Copy>(map: BorrowedFd<'_>, name: &str, slot: u32, value: &V) -> Result<(), KernelError> {
    syscall::update_map(map, &slot, value)
        .map_err(|source| KernelError::Map { map: name.to_owned(), message: source.to_string() })
}

/// Loads the program `name`, with these maps.
pub fn load_program(name: &str, maps: &[(&str, &MapData)], what: ProgramType) -> Result<OwnedFd, KernelError> {
    let mut object = parse()?;
    let unusable = |error: &dyn std::error::Error| KernelError::Object(with_causes(error));
    let key = object
        .programs
        .get(name)
        .ok_or_else(|| KernelError::Object(format!("it has no program `{name}`")))?
        .function_key();
    // Sections of functions that are called, as opposed to programs.
    let programs: HashSet<usize> = object.programs.values().map(|program| program.section_index).collect();
    let text: HashSet<usize> =
        object.functions.keys().map(|(section, _)| *section).filter(|section| !programs.contains(section)).collect();
    object.programs.retain(|other, _| other == name);
    object.functions.retain(|other, _| *other == key || text.contains(&other.0));
    let descriptions = std::mem::take(&mut object.maps);
    let used = maps.iter().filter_map(|(name, map)| {
        descriptions.get(*name).map(|description| (*name, map.fd().as_fd().as_raw_fd(), description))
    });
    object.relocate_maps(used, &text).map_err(|error| unusable(&error))?;
    object.relocate_calls(&text).map_err(|error| unusable(&error))?;
    let function =
        object.functions.get(&key).ok_or_else(|| KernelError::Object(format!("`{name}` has no instructions")))?;
    syscall::load_program(name, &object.license, &function.instructions, what)
        .map_err(|(source, verdict)| KernelError::Program { program: name.to_owned(), source, verdict })
}

/// Plain data out of an event of a ring buffer; none if it is too short.
pub fn plain<T: Plain>(bytes: &[u8]) -> Option<T> {
    // SAFETY: the length is checked, every pattern of bits is a valid `T`, and the read is unaligned.
    (bytes.len() >= size_of::<T>()).then(|| unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// Data that is valid whatever its bits are.
///
/// # Safety
/// It holds nothing but integers and arrays of them.
pub unsafe trait Plain: Copy {}

// SAFETY: integers only.
unsafe impl Plain for asap_common::TaskRecord {}
// SAFETY: integers only.
unsafe impl Plain for asap_common::TaskBrief {}
// SAFETY: integers only.
unsafe impl Plain for asap_common::LifeRecord {}
