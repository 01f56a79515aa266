//! Finding a function by what a person writes.

use super::{BoundsSource, Function, Image, Symbol, SymbolKind, demangle, names::Wanted, similar::similar};
use crate::address::ImageOffset;

/// A function as the user named it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FunctionQuery {
    /// Name: raw, or demangled with or without its arguments. Empty if only an address was given.
    pub name: String,
    /// Source file, or module, in front of the name.
    pub file: Option<String>,
    /// Address in the image.
    pub address: Option<ImageOffset>,
}

impl FunctionQuery {
    /// Reads `f`, `file.c:f`, `ns::f`, `ns::f(int)`, `0x1234`.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let text = text.trim();
        if let Some(address) = text.strip_prefix("0x").and_then(|hex| u64::from_str_radix(hex, 16).ok()) {
            return Self { address: Some(ImageOffset(address)), ..Self::default() };
        }
        // The colon of a file name stands alone; those of C++ and Rust come in pairs.
        let bytes = text.as_bytes();
        let lone = (0..bytes.len())
            .find(|&at| bytes[at] == b':' && bytes.get(at + 1) != Some(&b':') && (at == 0 || bytes[at - 1] != b':'));
        match lone {
            Some(at) if at > 0 && at + 1 < text.len() => {
                Self { name: text[at + 1..].to_owned(), file: Some(text[..at].to_owned()), address: None }
            }
            _ => Self { name: text.to_owned(), ..Self::default() },
        }
    }
}

/// Why a function was not found, or not one.
#[derive(Debug, thiserror::Error)]
pub enum LookupError {
    /// No such function.
    #[error("there is no function {name}")]
    Unknown {
        /// What was looked for.
        name: String,
        /// Names that look alike.
        similar: Vec<String>,
    },
    /// Several.
    #[error("{name} is ambiguous: {}", candidates.join(", "))]
    Ambiguous {
        /// What was looked for.
        name: String,
        /// Each with file, address and size.
        candidates: Vec<String>,
    },
    /// A function that chooses another.
    #[error("{0} is an IFUNC: it stands for whichever implementation its resolver chose")]
    Ifunc(String),
    /// Data.
    #[error("{0} is not a function")]
    NotAFunction(String),
    /// Its end is not known.
    #[error("{0} has no known size: neither its symbol nor the unwind tables tell where it ends")]
    UnknownSize(String),
}

/// Most candidates that are told of an ambiguous name.
const CANDIDATES_MOST: usize = 20;
/// How far code without an unwind table may lie behind the symbol without a size that it is named after, bytes.
const UNSIZED_MOST: u64 = 4096;

impl Image {
    /// Finds the one function that `query` means.
    ///
    /// # Errors
    /// There is none, several, or it can't be replaced by its nature.
    pub fn find_function(&self, query: &FunctionQuery) -> Result<Function, LookupError> {
        if query.name.is_empty() {
            let name = query.address.map(|at| at.to_string()).unwrap_or_default();
            let found = query.address.and_then(|at| self.function_at(at).filter(|function| function.address == at));
            return found.ok_or(LookupError::Unknown { name, similar: Vec::new() });
        }
        let name = query.name.clone();
        let mut found: Vec<Symbol> = self.symbols().named(&name).collect();
        if found.is_empty() {
            found = self.readable(&name);
        }
        if let Some(file) = &query.file {
            found.retain(|symbol| symbol.is_from(file));
        }
        if let Some(address) = query.address {
            found.retain(|symbol| symbol.address == address);
        }
        if !found.is_empty() && found.iter().all(|s| matches!(s.kind, SymbolKind::Data | SymbolKind::Tls)) {
            return Err(LookupError::NotAFunction(name));
        }
        found.retain(|symbol| matches!(symbol.kind, SymbolKind::Function | SymbolKind::Ifunc));
        // Several names or tables for one piece of code are one function.
        found.sort_by_key(|symbol| (symbol.address, symbol.size == 0, symbol.file.is_none()));
        found.dedup_by_key(|symbol| symbol.address);
        match found.as_slice() {
            [] => Err(LookupError::Unknown { similar: similar(&name, self.symbols().code_names()), name }),
            [symbol] if symbol.kind == SymbolKind::Ifunc => Err(LookupError::Ifunc(name)),
            [symbol] => self.complete(symbol).ok_or(LookupError::UnknownSize(name)),
            several => Err(LookupError::Ambiguous { name, candidates: candidates(several) }),
        }
    }

    fn readable(&self, name: &str) -> Vec<Symbol> {
        let wanted = Wanted::new(name);
        self.symbols().code_where(|raw| wanted.can_be(raw)).filter(|symbol| wanted.is(&symbol.name)).collect()
    }

    /// The symbol as a function; its end from the unwind table where the symbol does not tell.
    fn complete(&self, symbol: &Symbol) -> Option<Function> {
        let (mut size, mut source) = (symbol.size, BoundsSource::Symbol);
        if size == 0 {
            let bounds = self.unwind.bounds_at(self, symbol.address)?;
            size = bounds.end.0.checked_sub(symbol.address.0)?;
            source = BoundsSource::UnwindTable;
        }
        Some(Function {
            name: Some(symbol.name.clone()),
            file: symbol.file.clone(),
            address: symbol.address,
            size,
            source,
        })
    }

    /// The function that holds `at`: by symbol, else by unwind table, and then perhaps without a name.
    #[must_use]
    pub fn function_at(&self, at: ImageOffset) -> Option<Function> {
        if let Some(symbol) = self.symbols().function_containing(at) {
            return self.complete(&symbol);
        }
        let bounds = self.unwind.bounds_at(self, at)?;
        let named = self.symbols().code_at(bounds.start).next().and_then(|symbol| self.complete(&symbol));
        named.filter(|function| at.0 - function.address.0 < function.size).or_else(|| unnamed(&bounds))
    }

    /// Name and offset for an address, readable.
    #[must_use]
    pub fn symbolise(&self, at: ImageOffset) -> Option<(String, u64)> {
        let sized = self.symbols().function_containing(at);
        let symbol = sized.or_else(|| {
            // Assembly may lack a size; but what belongs to another entry of the unwind table is another function.
            let symbol = self.symbols().code_before(at).filter(|symbol| symbol.size == 0)?;
            let is_same = match self.unwind.bounds_at(self, at) {
                Some(bounds) => bounds.start <= symbol.address,
                None => at.0 - symbol.address.0 < UNSIZED_MOST,
            };
            is_same.then_some(symbol)
        })?;
        Some((demangle(&symbol.name), at.0 - symbol.address.0))
    }

    /// All functions that are known, by address: with a name where a symbol tells it, else from the unwind tables. Parts that
    /// the compiler split off are listed like functions.
    pub fn functions(&self) -> impl Iterator<Item = Function> {
        let mut all: Vec<Function> = Vec::new();
        for symbol in self.symbols().code() {
            if all.last().is_none_or(|last| last.address != symbol.address) {
                all.extend(self.complete(&symbol));
            }
        }
        let named = all.len();
        let is_named = |at: ImageOffset, all: &[Function]| {
            let before = all[..named].partition_point(|function| function.address <= at);
            all[..before].last().is_some_and(|function| at.0 - function.address.0 < function.size)
        };
        for bounds in self.unwind.all(self) {
            if !is_named(bounds.start, &all) {
                all.extend(unnamed(&bounds));
            }
        }
        all.sort_by_key(|function| function.address);
        all.into_iter()
    }
}

fn unnamed(bounds: &std::ops::Range<ImageOffset>) -> Option<Function> {
    let size = bounds.end.0.checked_sub(bounds.start.0)?;
    Some(Function { name: None, file: None, address: bounds.start, size, source: BoundsSource::UnwindTable })
}

fn candidates(several: &[Symbol]) -> Vec<String> {
    let told = several.iter().take(CANDIDATES_MOST).map(|symbol| {
        let file = symbol.file.as_deref().map_or_else(String::new, |file| format!("{file}:"));
        format!("{file}{} at {} ({} bytes)", demangle(&symbol.name), symbol.address, symbol.size)
    });
    let mut told: Vec<String> = told.collect();
    if several.len() > CANDIDATES_MOST {
        told.push(format!("and {} more", several.len() - CANDIDATES_MOST));
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_write_is_understood() {
        let query = |name: &str, file: Option<&str>| FunctionQuery {
            name: name.into(),
            file: file.map(Into::into),
            address: None,
        };
        assert_eq!(FunctionQuery::parse("f"), query("f", None));
        assert_eq!(FunctionQuery::parse("src/file.c:f"), query("f", Some("src/file.c")));
        assert_eq!(FunctionQuery::parse("ns::f(int)"), query("ns::f(int)", None));
        assert_eq!(FunctionQuery::parse("lib.so.1:ns::f"), query("ns::f", Some("lib.so.1")));
        assert_eq!(FunctionQuery::parse("0x10").address, Some(ImageOffset(16)));
    }
}
