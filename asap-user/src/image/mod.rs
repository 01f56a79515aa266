//! ELF files as the engine needs them: identity, segments, symbols, function bounds, unwind tables. Bytes in, plain data
//! out; touches no process and opens no file. Everything in a file may be wrong: what it costs is bounded by its size.

mod body;
mod bytes;
mod code;
mod debug_files;
mod dynamic;
mod error;
mod landing_pads;
mod minidebug;
mod names;
mod parse;
mod query;
mod segments;
mod similar;
mod symbols;
mod told;
mod unwind;

pub use body::FunctionBody;
pub use bytes::ImageBytes;
pub use error::ImageError;
pub use names::demangle;
pub use query::{FunctionQuery, LookupError};
pub use segments::{Segment, TlsSegment};
pub use symbols::{Binding, Symbol, SymbolKind};
pub use unwind::UnwindSections;

use crate::{address::ImageOffset, hex::hex};
use dynamic::{Dynamic, Slots};
use std::sync::OnceLock;
use symbols::SymbolTable;

/// Where the bounds of a function are known from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BoundsSource {
    /// A symbol with a size.
    Symbol,
    /// An unwind-table entry.
    UnwindTable,
}

/// A function of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Raw name, where there is a symbol.
    pub name: Option<String>,
    /// Source file of a local symbol.
    pub file: Option<String>,
    /// Entry.
    pub address: ImageOffset,
    /// Length, bytes.
    pub size: u64,
    /// Where that is known from.
    pub source: BoundsSource,
}

/// A parsed ELF executable or shared library.
pub struct Image {
    name: String,
    bytes: ImageBytes,
    build_id: Option<Vec<u8>>,
    position_independent: bool,
    segments: Vec<Segment>,
    tls: Option<TlsSegment>,
    /// PT_GNU_RELRO: address and size.
    relro: Option<(ImageOffset, u64)>,
    dynamic_at: Option<ImageOffset>,
    dynamic: Dynamic,
    soname: Option<String>,
    needed: Vec<String>,
    debug_link: Option<String>,
    debug: Vec<ImageBytes>,
    told: Vec<Symbol>,
    unwind: unwind::Tables,
    index: OnceLock<Index>,
}

/// What is looked up by name or address: built when it is first needed.
struct Index {
    symbols: SymbolTable,
    slots: Slots,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Image {
    fn index(&self) -> &Index {
        self.index.get_or_init(|| {
            let mut symbols = SymbolTable::default();
            if let Some(packed) = debug_files::mini_debug_info(self.bytes.bytes())
                && let Some(unpacked) = minidebug::unpack(packed)
            {
                symbols.add_symtab(&unpacked.into());
            }
            symbols.add_symtab(&self.bytes);
            for file in &self.debug {
                symbols.add_symtab(file);
            }
            told::add(&self.told, &mut symbols);
            let slots = self.dynamic.index(self, &mut symbols);
            symbols.finish();
            Index { symbols, slots }
        })
    }

    fn symbols(&self) -> &SymbolTable {
        &self.index().symbols
    }

    /// Its name, as given.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// NT_GNU_BUILD_ID.
    #[must_use]
    pub fn build_id(&self) -> Option<&[u8]> {
        self.build_id.as_deref()
    }

    /// The build-id in hex.
    #[must_use]
    pub fn build_id_hex(&self) -> Option<String> {
        self.build_id().map(hex)
    }

    /// ET_DYN.
    #[must_use]
    pub fn is_position_independent(&self) -> bool {
        self.position_independent
    }

    /// PT_LOAD segments.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// PT_TLS.
    #[must_use]
    pub fn tls_segment(&self) -> Option<TlsSegment> {
        self.tls
    }

    /// PT_DYNAMIC.
    #[must_use]
    pub fn dynamic_address(&self) -> Option<ImageOffset> {
        self.dynamic_at
    }

    /// DT_SONAME.
    #[must_use]
    pub fn soname(&self) -> Option<&str> {
        self.soname.as_deref()
    }

    /// DT_NEEDED.
    #[must_use]
    pub fn needed(&self) -> &[String] {
        &self.needed
    }

    /// A symbol that other modules can use.
    #[must_use]
    pub fn export(&self, name: &str) -> Option<Symbol> {
        self.symbols().named(name).find(|symbol| symbol.exported)
    }

    /// All definitions of `name`, static ones included; in source file `file` only, where given.
    #[must_use]
    pub fn locals(&self, name: &str, file: Option<&str>) -> Vec<Symbol> {
        let from_file = self.symbols().named(name).filter(|s| file.is_none_or(|file| s.is_from(file)));
        let mut found: Vec<Symbol> = from_file.collect();
        // Of several tables that tell about one symbol, the one that tells most. Offsets in the TLS segment are no
        // addresses: they may be equal by chance.
        found.sort_by_key(|symbol| {
            (symbol.address, symbol.kind == SymbolKind::Tls, symbol.size == 0, symbol.file.is_none())
        });
        found.dedup_by_key(|symbol| (symbol.address, symbol.kind == SymbolKind::Tls));
        found
    }

    /// Slots that the target's linker fills with the address (or thread-pointer offset) of `name`.
    #[must_use]
    pub fn got_slots(&self, name: &str) -> Vec<ImageOffset> {
        self.index().slots.of(name)
    }

    /// Its unwind tables.
    #[must_use]
    pub fn unwind(&self) -> UnwindSections<'_> {
        self.unwind.sections(self)
    }

    /// Offset in .eh_frame of the entry that holds `at`. Found also where there is no .eh_frame_hdr: statically linked
    /// programs have none.
    #[must_use]
    pub fn unwind_entry(&self, at: ImageOffset) -> Option<usize> {
        self.unwind.entry_at(self, at)
    }
}

#[cfg(test)]
mod tests;
