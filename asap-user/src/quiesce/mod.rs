//! Who is inside the code that is about to change: stack walks and observation of threads that stops as few of them as
//! possible. Not for deciding what to do about it.

mod asleep;
pub use asleep::OpenThreads;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use asleep::parse_thread_files;
pub mod observe;
mod signal_frame;
pub mod snapshot;
mod stack;
pub mod unwind;

#[cfg(test)]
mod tests;
