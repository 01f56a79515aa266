//! Finding a function by what a person writes.

use super::{BoundsSource, Function, Image, Symbol, SymbolKind, demangle, symbols};
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

impl Image {
    /// Finds the one function that `query` means.
    ///
    /// # Errors
    /// There is none, several, or it can't be replaced by its nature.
    pub fn find_function(&self, query: &FunctionQuery) -> Result<Function, LookupError> {
        let name = if query.name.is_empty() {
            query.address.map(|at| at.to_string()).unwrap_or_default()
        } else {
            query.name.clone()
        };
        if query.name.is_empty() {
            let at = query.address.ok_or_else(|| LookupError::Unknown { name: name.clone(), similar: Vec::new() })?;
            let found = self.function_at(at).filter(|function| function.address == at);
            return found.ok_or(LookupError::Unknown { name, similar: Vec::new() });
        }
        let mut found: Vec<Symbol> = self.symbols().named(&query.name).collect();
        if found.is_empty() {
            found = self.demangled(&query.name);
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
            [] => Err(LookupError::Unknown { similar: self.similar(&query.name), name }),
            [symbol] if symbol.kind == SymbolKind::Ifunc => Err(LookupError::Ifunc(name)),
            [symbol] => self.complete(symbol).ok_or(LookupError::UnknownSize(name)),
            several => Err(LookupError::Ambiguous {
                name,
                candidates: several
                    .iter()
                    .map(|s| {
                        let file = s.file.as_deref().map_or_else(String::new, |file| format!("{file}:"));
                        format!("{file}{} at {} ({} bytes)", demangle(&s.name), s.address, s.size)
                    })
                    .collect(),
            }),
        }
    }

    fn demangled(&self, name: &str) -> Vec<Symbol> {
        // Only names that can be meant are demangled: the last component stands in the raw name as it is.
        let last = name.split('(').next().unwrap_or(name).rsplit("::").next().unwrap_or(name);
        let last = last.trim_start_matches('~').split('<').next().unwrap_or(last);
        if last.is_empty() {
            return Vec::new();
        }
        let can_mean = |raw: &[u8]| {
            (raw.starts_with(b"_Z") || raw.starts_with(b"_R"))
                && raw.windows(last.len()).any(|window| window == last.as_bytes())
        };
        let means = |symbol: &Symbol| {
            let plain = demangle(&symbol.name);
            plain == name || (!name.contains('(') && plain.split('(').next() == Some(name))
        };
        self.symbols().code_where(can_mean).filter(means).collect()
    }

    /// The symbol as a function; its end from the unwind table where the symbol does not tell.
    fn complete(&self, symbol: &Symbol) -> Option<Function> {
        let mut function = symbols::function(symbol);
        if function.size == 0 {
            let entry = self.unwind.entry_at(self, symbol.address)?;
            function.size = entry.end.0.checked_sub(symbol.address.0)?;
            function.source = BoundsSource::UnwindTable;
        }
        Some(function)
    }

    /// The function that holds `at`.
    #[must_use]
    pub fn function_at(&self, at: ImageOffset) -> Option<Function> {
        if let Some(symbol) = self.symbols().function_containing(at)
            && let Some(function) = self.complete(&symbol)
            && at.0 - function.address.0 < function.size
        {
            return Some(function);
        }
        let entry = self.unwind.entry_at(self, at)?;
        let size = entry.end.0 - entry.start.0;
        Some(Function { name: None, file: None, address: entry.start, size, source: BoundsSource::UnwindTable })
    }

    /// All functions that are known by name, by address.
    pub fn functions(&self) -> impl Iterator<Item = Function> + '_ {
        let mut last = None;
        self.symbols().code().filter_map(move |symbol| {
            if last.replace(symbol.address) == Some(symbol.address) {
                return None;
            }
            self.complete(&symbol)
        })
    }

    /// The first function or symbol that begins behind `at`.
    #[must_use]
    pub fn next_function_start(&self, at: ImageOffset) -> Option<ImageOffset> {
        self.symbols().next_code(at)
    }

    fn similar(&self, name: &str) -> Vec<String> {
        let lower = name.to_lowercase();
        let mut close: Vec<(usize, String)> = Vec::new();
        for symbol in self.symbols().code() {
            // A long list of symbols is not worth a long wait: only names of about the same length are compared.
            if symbol.name.len().abs_diff(name.len()) <= 3 {
                let distance = distance(&symbol.name.to_lowercase(), &lower);
                if distance <= 2 + name.len() / 8 {
                    close.push((distance, demangle(&symbol.name)));
                }
            } else if name.len() >= 5 && symbol.name.to_lowercase().contains(&lower) {
                close.push((3, demangle(&symbol.name)));
            }
        }
        close.sort();
        close.dedup();
        close.truncate(5);
        close.into_iter().map(|(_, name)| name).collect()
    }
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &y) in b.iter().enumerate() {
            let cost = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = cost.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
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

    #[test]
    fn alike_is_measured_in_letters() {
        assert_eq!(distance("abc", "abc"), 0);
        assert_eq!(distance("abc", "axc"), 1);
        assert_eq!(distance("", "abc"), 3);
    }
}
