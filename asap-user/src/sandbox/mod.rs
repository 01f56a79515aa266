//! The sandbox: while a process is in it, its code runs out of pages that are ours, and each page is shown to its threads when the
//! first of them comes to it. Entered and left while the process works; nobody is stopped, nothing of the file's text is lost.
//!
//! Per text mapping there are: the *curtain* (memory of ours, at the place of the text) and the *spare* (the file's own mapping,
//! moved aside). Leaving moves the spare back. What is where is recorded in the target before it is done, so that a later
//! agent finds it. Not for deciding which processes belong together, nor for patches.

mod area;
mod code;
mod evict;
mod family;
mod judge;
mod library;
pub mod policy;
mod record;
mod session;
mod targets;
mod texts;
mod view;
mod violation;
mod watchman;

pub use code::Figures;
pub use family::Family;
pub use record::{Record, State, Text};
pub use session::{Host, SandboxError, Session, ThreadStack, leave, settle};
pub use texts::NativeCode;
pub use view::{as_native, elsewhere, is_curtain};
pub use violation::Violation;
