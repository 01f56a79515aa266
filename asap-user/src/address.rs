//! Addresses that can't be mixed up: in a live target, and in an image file. Not for file offsets or lengths, which are
//! plain integers with a name.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A virtual address in a target process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct TargetAddr(pub u64);

/// A virtual address as an ELF file states it (`p_vaddr`, `st_value`): before the load bias of a mapping is added.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct ImageOffset(pub u64);

/// The difference between where an image is mapped and where its file says it is (gABI "base address"). Wraps.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct LoadBias(pub u64);

/// Size of a base page on x86-64, in bytes.
pub const PAGE_SIZE: u64 = 4096;

impl TargetAddr {
    /// The start of the page that holds this address.
    #[must_use]
    pub const fn page(self) -> Self {
        Self(self.0 & !(PAGE_SIZE - 1))
    }

    /// Offset within the page, 0..4096.
    #[must_use]
    pub const fn page_offset(self) -> usize {
        (self.0 & (PAGE_SIZE - 1)) as usize
    }

    /// This address moved by `delta` bytes; wraps as machine arithmetic does.
    #[must_use]
    pub const fn offset(self, delta: i64) -> Self {
        Self(self.0.wrapping_add_signed(delta))
    }

    /// Bytes from `origin` to here; wraps.
    #[must_use]
    pub const fn wrapping_distance(self, origin: Self) -> i64 {
        self.0.wrapping_sub(origin.0) as i64
    }

    /// The image address that `bias` maps here.
    #[must_use]
    pub const fn in_image(self, bias: LoadBias) -> ImageOffset {
        ImageOffset(self.0.wrapping_sub(bias.0))
    }
}

impl ImageOffset {
    /// Where `bias` puts this address in the target.
    #[must_use]
    pub const fn in_target(self, bias: LoadBias) -> TargetAddr {
        TargetAddr(self.0.wrapping_add(bias.0))
    }
}

macro_rules! hex_display {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    )*};
}
hex_display!(TargetAddr, ImageOffset, LoadBias);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_address_and_its_mapping_convert_back_and_forth() {
        let bias = LoadBias(0x5555_0000_0000);
        let mapped = ImageOffset(0x1234).in_target(bias);
        assert_eq!(mapped, TargetAddr(0x5555_0000_1234));
        assert_eq!(mapped.in_image(bias), ImageOffset(0x1234));
        assert_eq!(mapped.page(), TargetAddr(0x5555_0000_1000));
        assert_eq!(mapped.page_offset(), 0x234);
    }
}
