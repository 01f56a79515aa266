//! The translator of the sandbox: bytes in, bytes and plain data out; it touches no process.
//!
//! Its form is *translated pages in place*: an instruction that needs nothing stays where it is. What a guard or a patch is about
//! jumps to a *fragment* in a cache near the image, and back. Return addresses stay native. Addresses are those of the image,
//! so that one translation serves every process that maps it.
//!
//! The passes: a [`CodeView`] of the image; an [`Analysis`] of it (instructions, functions, where control may arrive); for each
//! page the sites, room for jumps to their fragments, and the fragments: [`Translator::translate_page`]. Whoever uses it writes
//! the fragments, then the page, and moves threads by the places that come with it.

mod analysis;
mod bits;
mod code;
mod counts;
mod emit;
mod guards;
mod indirect;
mod operand;
mod options;
mod places;
mod relocate;
mod room;
mod rseq;
mod tables;
mod translate;
mod view;

pub use analysis::{Analysis, Unrecovered};
pub use counts::{Counts, Form, Needless, Outcome, Reason, SiteKind};
pub use guards::TrapReason;
pub use operand::{Base, Found, Operand, Registers, Segment};
pub use options::{Constants, Options, PatchPoint, ShadowForm, SyscallTable, TargetTable};
pub use places::{Displaced, Place, Saved, Undo};
pub use translate::{Patched, TRAP_SLOT, TranslateError, TranslatedPage, Translator, Trap};
pub use view::{CodeView, FunctionBounds};

#[cfg(test)]
mod tests;
