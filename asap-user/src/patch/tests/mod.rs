//! Objects made by real compilers, linked at chosen places, and run in this process.

mod harness;
mod header;
mod languages;
mod prologues;
