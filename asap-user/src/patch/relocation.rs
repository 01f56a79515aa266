//! The relocation types of x86-64 (psABI 1.0, table 4.9): what each computes and how wide its field is. Not for where
//! symbols are, and not for the thread-local sequences that `tls` rewrites before.

use object::elf;

/// What a relocation computes. S symbol, A addend, P place, GOT start of the slots, G slot of the symbol, L the symbol or
/// its stub, Z its size, TP its offset from the thread pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Formula {
    /// Nothing.
    None,
    /// S + A
    Absolute,
    /// S + A - P
    Relative,
    /// L + A - P
    Call,
    /// G + A - P
    SlotRelative,
    /// GOT + A - P
    TableRelative,
    /// G - GOT + A
    SlotInTable,
    /// S + A - GOT
    FromTable,
    /// Z + A
    Size,
    /// TP + A
    ThreadOffset,
    /// slot that holds TP, + A - P
    ThreadSlotRelative,
}

/// Which values fit the field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Range {
    Signed,
    Unsigned,
    /// Either reading will do.
    Both,
}

/// A relocation type.
#[derive(Clone, Copy, Debug)]
pub(super) struct Form {
    pub name: &'static str,
    pub formula: Formula,
    /// Bytes: 0, 1, 2, 4, 8.
    pub width: usize,
    pub range: Range,
}

/// The type of that number, if this linker applies it.
pub(super) fn form(kind: u32) -> Option<Form> {
    use Formula as F;
    use Range::{Both, Signed, Unsigned};
    let (name, formula, width, range) = match elf::RelocationType(kind) {
        elf::R_X86_64_NONE => ("R_X86_64_NONE", F::None, 0, Both),
        elf::R_X86_64_64 => ("R_X86_64_64", F::Absolute, 8, Both),
        elf::R_X86_64_PC32 => ("R_X86_64_PC32", F::Relative, 4, Signed),
        elf::R_X86_64_PLT32 => ("R_X86_64_PLT32", F::Call, 4, Signed),
        elf::R_X86_64_32 => ("R_X86_64_32", F::Absolute, 4, Unsigned),
        elf::R_X86_64_32S => ("R_X86_64_32S", F::Absolute, 4, Signed),
        elf::R_X86_64_16 => ("R_X86_64_16", F::Absolute, 2, Both),
        elf::R_X86_64_PC16 => ("R_X86_64_PC16", F::Relative, 2, Signed),
        elf::R_X86_64_8 => ("R_X86_64_8", F::Absolute, 1, Both),
        elf::R_X86_64_PC8 => ("R_X86_64_PC8", F::Relative, 1, Signed),
        elf::R_X86_64_PC64 => ("R_X86_64_PC64", F::Relative, 8, Both),
        elf::R_X86_64_GOT32 => ("R_X86_64_GOT32", F::SlotInTable, 4, Signed),
        elf::R_X86_64_GOT64 => ("R_X86_64_GOT64", F::SlotInTable, 8, Both),
        // GOTPLT64 says that the symbol also has a stub: of no consequence where slots are filled in at once.
        GOTPLT64 => ("R_X86_64_GOTPLT64", F::SlotInTable, 8, Both),
        elf::R_X86_64_GOTPCREL => ("R_X86_64_GOTPCREL", F::SlotRelative, 4, Signed),
        elf::R_X86_64_GOTPCRELX => ("R_X86_64_GOTPCRELX", F::SlotRelative, 4, Signed),
        elf::R_X86_64_REX_GOTPCRELX => ("R_X86_64_REX_GOTPCRELX", F::SlotRelative, 4, Signed),
        GOTPCREL64 => ("R_X86_64_GOTPCREL64", F::SlotRelative, 8, Both),
        elf::R_X86_64_GOTPC32 => ("R_X86_64_GOTPC32", F::TableRelative, 4, Signed),
        GOTPC64 => ("R_X86_64_GOTPC64", F::TableRelative, 8, Both),
        elf::R_X86_64_GOTOFF64 => ("R_X86_64_GOTOFF64", F::FromTable, 8, Both),
        // 64 bits reach the function itself: no stub.
        PLTOFF64 => ("R_X86_64_PLTOFF64", F::FromTable, 8, Both),
        elf::R_X86_64_SIZE32 => ("R_X86_64_SIZE32", F::Size, 4, Unsigned),
        elf::R_X86_64_SIZE64 => ("R_X86_64_SIZE64", F::Size, 8, Both),
        elf::R_X86_64_TPOFF32 => ("R_X86_64_TPOFF32", F::ThreadOffset, 4, Signed),
        elf::R_X86_64_TPOFF64 => ("R_X86_64_TPOFF64", F::ThreadOffset, 8, Both),
        elf::R_X86_64_GOTTPOFF => ("R_X86_64_GOTTPOFF", F::ThreadSlotRelative, 4, Signed),
        _ => return None,
    };
    Some(Form { name, formula, width, range })
}

// Table 4.9 numbers that the reader library does not name (or names differently from release to release).
const GOTPCREL64: elf::RelocationType = elf::RelocationType(28);
const GOTPC64: elf::RelocationType = elf::RelocationType(29);
const GOTPLT64: elf::RelocationType = elf::RelocationType(30);
const PLTOFF64: elf::RelocationType = elf::RelocationType(31);

/// Name of a type for people, known or not.
pub(super) fn name(kind: u32) -> String {
    if let Some(form) = form(kind) {
        return form.name.to_owned();
    }
    let name = match kind {
        5 => "R_X86_64_COPY",
        6 => "R_X86_64_GLOB_DAT",
        7 => "R_X86_64_JUMP_SLOT",
        8 => "R_X86_64_RELATIVE",
        16 => "R_X86_64_DTPMOD64",
        17 => "R_X86_64_DTPOFF64",
        19 => "R_X86_64_TLSGD",
        20 => "R_X86_64_TLSLD",
        21 => "R_X86_64_DTPOFF32",
        34 => "R_X86_64_GOTPC32_TLSDESC",
        35 => "R_X86_64_TLSDESC_CALL",
        36 => "R_X86_64_TLSDESC",
        37 => "R_X86_64_IRELATIVE",
        43 => "R_X86_64_CODE_4_GOTPCRELX",
        44 => "R_X86_64_CODE_4_GOTTPOFF",
        45 => "R_X86_64_CODE_4_GOTPC32_TLSDESC",
        _ => return format!("number {kind}"),
    };
    name.to_owned()
}

impl Form {
    /// Whether a 64-bit result fits the field.
    pub fn fits(&self, value: u64) -> bool {
        let bits = self.width as u32 * 8;
        if bits == 0 || bits >= 64 {
            return true;
        }
        let signed = (value as i64) >> (bits - 1);
        let fits_signed = signed == 0 || signed == -1;
        let fits_unsigned = value >> bits == 0;
        match self.range {
            Range::Signed => fits_signed,
            Range::Unsigned => fits_unsigned,
            Range::Both => fits_signed || fits_unsigned,
        }
    }

    /// How to compile so that it fits.
    pub fn way_out(&self) -> &'static str {
        match self.formula {
            Formula::Absolute => "the object was compiled for addresses below 2 GiB; compile it with -fPIC",
            Formula::Relative => {
                "the object assumes that this symbol is within 2 GiB, as if it were linked into the same module; \
                 compile with -fPIC, or with -mcmodel=large"
            }
            Formula::ThreadOffset => "compile with -ftls-model=initial-exec",
            _ => "code and data of the patch lie too far from each other; compile with -fPIC -mcmodel=large",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_fits_as_the_field_is_read() {
        let pc32 = form(2).expect("PC32");
        assert!(pc32.fits(0x7fff_ffff) && pc32.fits(-0x8000_0000_i64 as u64));
        assert!(!pc32.fits(0x8000_0000) && !pc32.fits(-0x8000_0001_i64 as u64));
        let abs32 = form(10).expect("32");
        assert!(abs32.fits(0xffff_ffff) && !abs32.fits(0x1_0000_0000) && !abs32.fits(-1_i64 as u64));
        let abs16 = form(12).expect("16");
        assert!(abs16.fits(0xffff) && abs16.fits(-0x8000_i64 as u64) && !abs16.fits(0x1_0000));
        assert!(form(1).expect("64").fits(u64::MAX));
    }

    #[test]
    fn unknown_types_are_named_or_numbered() {
        assert_eq!(name(5), "R_X86_64_COPY");
        assert_eq!(name(9), "R_X86_64_GOTPCREL");
        assert_eq!(name(12345), "number 12345");
        assert!(form(12345).is_none());
    }
}
