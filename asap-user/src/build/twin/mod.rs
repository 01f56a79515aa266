//! A program without symbols, and its twin: the same source built again, not stripped. Finds the twin's functions and
//! variables in the stripped one, by what their code does and refers to. Pure: two images in, symbols out.
//!
//! Nothing is guessed (P6): of a symbol whose place is not certain nothing is said. A function is found if its code, with
//! addresses masked, is the same and occurs once, and is long or uses a string that no other function uses; or if a function
//! that was found calls it or holds its address at the same place; or if it stands between two that were found, in builds
//! that have all functions in the same order. Where two such conclusions contradict each other, both are dropped. Bounds
//! come from the unwind tables of both images. Not for telling what a change means: that is the comparison of objects.

mod data;
mod pairs;
#[cfg(test)]
mod tests;
mod view;

use crate::{
    address::ImageOffset,
    image::{Image, Symbol, SymbolKind},
    patch::manifest::{Place, PlaceKind, sha256_hex},
};
use view::View;

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Located {
    /// Symbols of the twin with their places in the module; by address.
    pub found: Vec<Found>,
    /// Functions of the twin that were not found: their code differs, or it is not certain which they are.
    pub missing: Vec<Symbol>,
    /// Both files hold the same code and data: every symbol of the twin holds.
    pub identical: bool,
}

/// A symbol of the twin in the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// As the twin has it.
    pub symbol: Symbol,
    /// Its place in the module (of a thread-local variable: its offset in the TLS segment).
    pub address: ImageOffset,
    /// Bytes that it has there.
    pub size: u64,
    /// How it was found.
    pub evidence: Evidence,
}

/// How a symbol was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Evidence {
    /// Both files are the same.
    Identical,
    /// The linker tells its name.
    Exported,
    /// Its code occurs once.
    Code,
    /// Code that was found refers to it.
    Reference,
    /// It stands between others that were found.
    Order,
}

/// Two images can't be compared.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TwinError {
    /// The twin has no symbols.
    #[error("{0} has no symbols to look for; build it without stripping (nostrip, no -s)")]
    Stripped(String),
    /// One is position-independent, the other is not.
    #[error(
        "{twin} and {module} are linked in different ways (one is position-independent, one is not); use the same flags"
    )]
    OtherModel {
        /// The twin.
        twin: String,
        /// The module.
        module: String,
    },
}

/// Finds the symbols of `twin` in `module`.
///
/// # Errors
/// They can't be compared.
pub fn locate(twin: &Image, module: &Image) -> Result<Located, TwinError> {
    if twin.is_position_independent() != module.is_position_independent() {
        return Err(TwinError::OtherModel { twin: twin.name().to_owned(), module: module.name().to_owned() });
    }
    let mut symbols: Vec<Symbol> = twin.all_symbols().filter(|symbol| symbol.address.0 != 0).collect();
    symbols.sort_by(|a, b| (a.address, &a.name, a.exported).cmp(&(b.address, &b.name, b.exported)));
    // .dynsym and .symtab both tell of what is exported; the latter knows more.
    symbols.dedup_by(|b, a| a.address == b.address && a.name == b.name);
    if !symbols.iter().any(|symbol| symbol.kind == SymbolKind::Function && !symbol.exported) {
        return Err(TwinError::Stripped(twin.name().to_owned()));
    }
    let mut located = Located { identical: same_contents(twin, module), ..Located::default() };
    if located.identical {
        let same = |symbol: Symbol| Found {
            address: symbol.address,
            size: symbol.size,
            symbol,
            evidence: Evidence::Identical,
        };
        located.found = symbols.into_iter().map(same).collect();
        return Ok(located);
    }
    let (a, b) = (View::of(twin, &symbols), View::of(module, &[]));
    let objects = data::Objects::of(&symbols, &a);
    let (pairs, places) = pairs::find(&a, &b, &objects);
    let same_tls = twin.tls_segment().map(|tls| (tls.file_size, tls.memory_size, tls.alignment))
        == module.tls_segment().map(|tls| (tls.file_size, tls.memory_size, tls.alignment));
    for symbol in symbols {
        let found = match symbol.kind {
            SymbolKind::Function | SymbolKind::Ifunc => {
                let piece = a.piece_starting_at(symbol.address.0);
                piece.and_then(|piece| pairs.of(piece)).map(|(piece, evidence)| {
                    let piece = &b.pieces[piece];
                    (ImageOffset(piece.start), piece.end - piece.start, evidence)
                })
            }
            SymbolKind::Data => {
                places.get(&symbol.address.0).map(|&(at, evidence)| (ImageOffset(at), symbol.size, evidence))
            }
            // Offsets from the thread pointer are part of the code: where all of that is in the same order, they hold.
            SymbolKind::Tls => {
                (same_tls && pairs.keeps_order).then_some((symbol.address, symbol.size, Evidence::Order))
            }
        };
        match found {
            Some((address, size, evidence)) => located.found.push(Found { symbol, address, size, evidence }),
            None if symbol.kind == SymbolKind::Function && symbol.size > 0 => located.missing.push(symbol),
            None => {}
        }
    }
    located.found.sort_by(|a, b| (a.address, &a.symbol.name).cmp(&(b.address, &b.symbol.name)));
    Ok(located)
}

/// What is loaded into memory is the same in both; of the ELF header, which tells where sections are, that is not asked.
fn same_contents(twin: &Image, module: &Image) -> bool {
    const HEADER: usize = 64;
    if twin.segments() != module.segments() || twin.build_id() != module.build_id() {
        return false;
    }
    twin.segments().iter().filter(|segment| segment.file_size > 0).all(|segment| {
        let Ok(size) = usize::try_from(segment.file_size) else { return false };
        let skip = if segment.file_offset == 0 { HEADER.min(size) } else { 0 };
        let (a, b) = (twin.bytes_at(segment.address, size), module.bytes_at(segment.address, size));
        matches!((a, b), (Some(a), Some(b)) if a[skip..] == b[skip..])
    })
}

impl Located {
    /// Where the symbol `name` (of source file `file`, where given) is, as a manifest has it; none, if it is not certain.
    #[must_use]
    pub fn place(&self, module: &Image, name: &str, file: Option<&str>) -> Option<Place> {
        let wanted = |found: &&Found| found.symbol.name == name && file.is_none_or(|file| found.symbol.is_from(file));
        let mut matching = self.found.iter().filter(wanted);
        let found = matching.next()?;
        if matching.any(|other| other.address != found.address) {
            return None;
        }
        let kind = match found.symbol.kind {
            SymbolKind::Function | SymbolKind::Ifunc => PlaceKind::Function,
            SymbolKind::Data => PlaceKind::Data,
            SymbolKind::Tls => PlaceKind::Tls,
        };
        let code = usize::try_from(found.size).ok().and_then(|size| module.bytes_at(found.address, size));
        Some(Place {
            name: name.to_owned(),
            file: file.map(str::to_owned),
            kind,
            address: found.address,
            size: found.size,
            fingerprint: code.filter(|_| kind == PlaceKind::Function).map(sha256_hex),
        })
    }
}
