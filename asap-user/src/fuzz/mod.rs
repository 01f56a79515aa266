//! What hostile bytes are tried on: one plain function for each kind of input that asap reads from a target, a file or a socket.
//! Each takes any bytes at all, must end soon, must not panic, and looks at what has to hold for whatever was accepted. Compiled
//! for tests and with the feature `fuzzing` only.
//!
//! `fuzz/` (a workspace of its own, cargo-fuzz's layout) hands them to libFuzzer; the tests here run them on stable over the same
//! corpora, with damage of their own. Not for whether valid input does the right thing: that is tested beside each parser.

mod diff;
mod image;
mod ledger;
mod manifest;
mod patch_object;
mod policy;
mod proc_files;
mod protocol;
mod signature;
#[cfg(test)]
mod tests;
mod translator;
mod unwind;

/// A function that takes any bytes.
pub type Check = fn(&[u8]);

/// All of them, by the names of their programs and corpora in `fuzz/`.
pub const TARGETS: [(&str, Check); 11] = [
    ("diff", diff::check),
    ("image", image::check),
    ("ledger", ledger::check),
    ("manifest", manifest::check),
    ("patch_object", patch_object::check),
    ("policy", policy::check),
    ("proc_files", proc_files::check),
    ("protocol", protocol::check),
    ("signature", signature::check),
    ("translator", translator::check),
    ("unwind", unwind::check),
];

/// Runs the check called `name`.
///
/// # Panics
/// There is none of that name, or the check has found something.
pub fn run(name: &str, bytes: &[u8]) {
    let (_, check) = TARGETS.iter().find(|(known, _)| *known == name).expect("the name of a fuzz target");
    check(bytes);
}
