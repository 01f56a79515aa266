//! Objects made by real compilers, linked at chosen places, and run in this process.

mod cxx;
mod harness;
mod header;
mod languages;
mod mutations;
mod prologues;
mod refusals;
mod thread_local;
