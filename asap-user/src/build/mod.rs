//! Making patches from source changes. Pure parts only know bytes; not for applying anything, which is the engine's.

pub mod assemble;
pub mod compare;
pub mod debian;
pub mod diff;
pub mod driver;
pub mod extract;
pub mod room;
pub mod same_code;
pub mod twin;
pub mod types;
pub mod wrapper;
