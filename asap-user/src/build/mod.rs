//! Making patches from source changes. Pure parts only know bytes; not for applying anything, which is the engine's.

pub mod compare;
pub mod twin;
