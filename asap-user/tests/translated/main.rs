//! Translated code that runs: programs under all guards against the same programs natively, and random code against itself, with
//! registers, flags, memory and faults compared. Needs no root: the programs translate themselves, helped by `preload.c`.

mod generate;
mod launch;
mod programs;
#[path = "../../src/random.rs"]
mod random;
mod random_code;
mod translations;
