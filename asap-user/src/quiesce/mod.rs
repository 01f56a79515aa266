//! Who is inside the code that is about to change: stack walks, observation of threads that stops as few of them as
//! possible, and the ways out of a function. Not for deciding what to do about it.

mod asleep;
pub mod exits;
pub use asleep::OpenThreads;
pub mod observe;
mod signal_frame;
pub mod snapshot;
mod stack;
pub mod unwind;

#[cfg(test)]
mod tests;
