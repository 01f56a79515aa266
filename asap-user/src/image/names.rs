//! Names as people write them: C++ and Rust symbols demangled, and whether a symbol is what a person wrote.

use std::fmt::{self, Write};

/// Longest readable name, bytes: some hundred bytes of a mangled name can stand for gigabytes.
const READABLE_MOST: usize = 64 << 10;
/// How deep a mangled name may nest. Each level costs stack.
const DEPTH_MOST: u32 = 96;

/// Text up to a length; more is an error, which ends the writer's work.
struct Bounded(String);

impl Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if self.0.len() + text.len() > READABLE_MOST {
            return Err(fmt::Error);
        }
        self.0.push_str(text);
        Ok(())
    }
}

/// The name that a person would write, for C++ (Itanium ABI) and Rust symbols; others stay as they are.
#[must_use]
pub fn demangle(name: &str) -> String {
    if !name.starts_with("_Z") && !name.starts_with("_R") {
        return name.to_owned();
    }
    if let Ok(rust) = rustc_demangle::try_demangle(name) {
        let mut text = Bounded(String::new());
        return write!(text, "{rust:#}").map_or_else(|_| name.to_owned(), |()| text.0);
    }
    let parse = cpp_demangle::ParseOptions::default().recursion_limit(DEPTH_MOST);
    let options = cpp_demangle::DemangleOptions::default().recursion_limit(DEPTH_MOST);
    if let Ok(symbol) = cpp_demangle::Symbol::new_with_options(name, &parse) {
        let mut text = Bounded(String::new());
        if symbol.structured_demangle(&mut text, &options).is_ok() {
            return text.0;
        }
    }
    name.to_owned()
}

/// A name as a person wrote it, to be compared with symbols.
pub(super) struct Wanted {
    /// Without spaces.
    written: String,
    has_parameters: bool,
    /// An identifier that the mangled form holds as it is; empty where the name has none (operators).
    identifier: String,
}

impl Wanted {
    pub(super) fn new(written: &str) -> Self {
        let written = without_spaces(written);
        let plain = without_parameters(&written);
        let has_parameters = plain.len() < written.len();
        let identifier = last_identifier(plain);
        Self { has_parameters, identifier, written }
    }

    /// Cheap look at a mangled name: false if it can't be meant.
    pub(super) fn can_be(&self, raw: &[u8]) -> bool {
        (raw.starts_with(b"_Z") || raw.starts_with(b"_R"))
            && memchr::memmem::find(raw, self.identifier.as_bytes()).is_some()
    }

    /// The symbol `raw` is meant: its whole readable name, or that without the parameters.
    pub(super) fn is(&self, raw: &str) -> bool {
        let readable = demangle(raw);
        // A clone (`f(int) [clone .cold]`) is no f.
        if readable == raw || readable.contains("[clone ") {
            return false;
        }
        let full = without_spaces(&readable);
        if full == self.written {
            return true;
        }
        let named = without_return_type(&readable);
        let full = without_spaces(named);
        full == self.written || (!self.has_parameters && without_parameters(&full) == self.written)
    }
}

fn without_spaces(name: &str) -> String {
    name.chars().filter(|c| !c.is_whitespace()).collect()
}

/// `ns::f(int) const` -> `ns::f`; parentheses that belong to the name (`(anonymous namespace)`, `operator()`) stay.
fn without_parameters(name: &str) -> &str {
    let trimmed = name.trim_end_matches(|c: char| c != ')');
    // Behind the parameters only qualifiers can stand; anything else means that the last `)` belongs to the name.
    let behind = &name[trimmed.len()..];
    if !behind.is_empty() && !matches!(behind.trim(), "const" | "volatile" | "constvolatile" | "&" | "&&" | "const&") {
        return name;
    }
    let mut depth = 0usize;
    for (at, byte) in trimmed.bytes().enumerate().rev() {
        match byte {
            b')' => depth += 1,
            b'(' if depth == 1 => {
                let head = &trimmed[..at];
                let is_name = head.is_empty() || head.ends_with("::") || head.ends_with("operator");
                return if is_name { name } else { head };
            }
            b'(' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    name
}

/// `void ns::f<int>(int)` -> `ns::f<int>(int)`: templates carry their return type in the mangled name.
fn without_return_type(name: &str) -> &str {
    let head = without_parameters(name);
    if head.contains("operator") {
        return name;
    }
    let (mut depth, mut start) = (0usize, 0);
    for (at, byte) in head.bytes().enumerate() {
        match byte {
            b'<' | b'(' | b'{' => depth += 1,
            b'>' | b')' | b'}' => depth = depth.saturating_sub(1),
            b' ' if depth == 0 => start = at + 1,
            _ => {}
        }
    }
    &name[start..]
}

/// `ns::T<a::b>::f<c>` -> `f`; empty for operators, closures and the like.
fn last_identifier(name: &str) -> String {
    let mut depth = 0usize;
    let mut last = String::new();
    for c in name.chars() {
        match c {
            '<' => depth += 1,
            '>' => depth = depth.saturating_sub(1),
            ':' if depth == 0 => last.clear(),
            _ if depth == 0 => last.push(c),
            _ => {}
        }
    }
    let last = last.trim_start_matches('~');
    let is_plain = last.chars().all(|c| c.is_alphanumeric() || c == '_') && !last.starts_with("operator");
    if is_plain && last.is_ascii() { last.to_owned() } else { String::new() }
}

/// The last identifier of a raw name, for comparing letters: `_ZN2ns1fEi` -> `f`. C names are one themselves.
pub(super) fn bare_identifier(raw: &str) -> &str {
    let Some(mut rest) = raw.strip_prefix("_ZN").or_else(|| raw.strip_prefix("_Z")) else { return raw };
    let mut last = raw;
    rest = rest.trim_start_matches('L');
    // Length-prefixed identifiers, one behind the other (Itanium ABI, <source-name>).
    while let Some(end) = rest.find(|c: char| !c.is_ascii_digit()).filter(|&end| end > 0) {
        let Ok(length) = rest[..end].parse::<usize>() else { break };
        let Some(name) = rest.get(end..).and_then(|tail| tail.get(..length)) else { break };
        // Rust's legacy form ends with a hash.
        let is_hash = name.len() == 17 && name.starts_with('h') && name[1..].bytes().all(|b| b.is_ascii_hexdigit());
        if !is_hash {
            last = name;
        }
        rest = rest[end + length..].trim_start_matches('L');
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_readable() {
        assert_eq!(demangle("_ZN2ns1fEi"), "ns::f(int)");
        assert_eq!(demangle("_ZN4core3fmt9Formatter3pad17h0123456789abcdefE"), "core::fmt::Formatter::pad");
        assert_eq!(demangle("_RNvC6_123foo3bar"), "123foo::bar");
        assert_eq!(demangle("ap_byterange_filter"), "ap_byterange_filter");
        assert_eq!(demangle("_Z"), "_Z");
    }

    #[test]
    fn a_name_that_would_never_end_stays_as_it_is() {
        // Each substitution names the two before it: the readable form doubles with every step.
        let mut name = "_Z1fI1AE".to_owned();
        name.push('v');
        let mut types = String::from("St4pairIiiE");
        for step in 0..40 {
            types.push_str(&format!("St4pairIS{}_S{}_E", digit(step), digit(step)));
        }
        let bomb = format!("_Z1f{types}");
        assert!(demangle(&bomb).len() <= READABLE_MOST);
        let deep = format!("_Z1f{}i", "P".repeat(100_000));
        assert_eq!(demangle(&deep), deep);
    }

    fn digit(step: usize) -> String {
        // S_ is the first substitution, S0_ the second, S1_ the third; base 36.
        match step.checked_sub(1) {
            None => String::new(),
            Some(n) if n < 36 => char::from_digit(n as u32, 36).expect("a digit").to_ascii_uppercase().to_string(),
            Some(n) => format!("1{}", char::from_digit(n as u32 - 36, 36).expect("a digit").to_ascii_uppercase()),
        }
    }

    #[test]
    fn people_leave_out_what_they_like() {
        let meant = |written: &str, raw: &str| {
            let wanted = Wanted::new(written);
            wanted.can_be(raw.as_bytes()) && wanted.is(raw)
        };
        for written in ["ns::f", "ns::f(int)", "ns::f( int )"] {
            assert!(meant(written, "_ZN2ns1fEi"), "{written}");
        }
        assert!(!meant("ns::f(long)", "_ZN2ns1fEi") && !meant("f", "_ZN2ns1fEi") && !meant("ns::ff", "_ZN2ns1fEi"));
        // A part of f is not f.
        assert!(!meant("ns::f", "_ZN2ns1fEi.cold"));
        for written in ["(anonymous namespace)::hid", "(anonymous namespace)::hid(int)"] {
            assert!(meant(written, "_ZN12_GLOBAL__N_13hidEi"), "{written}");
        }
        // void ns::t<int>(int), int C::get() const, C::operator()(int), C::~C(), operator+(C, C)
        for written in ["ns::t<int>", "ns::t<int>(int)", "void ns::t<int>(int)"] {
            assert!(meant(written, "_ZN2ns1tIiEEvT_"), "{written}: {}", demangle("_ZN2ns1tIiEEvT_"));
        }
        assert!(meant("C::get", "_ZNK1C3getEv") && meant("C::get() const", "_ZNK1C3getEv"));
        assert!(meant("C::operator()", "_ZN1CclEi") && meant("C::operator()(int)", "_ZN1CclEi"));
        assert!(meant("C::~C", "_ZN1CD1Ev") && meant("C::C", "_ZN1CC1Ev"));
        assert!(meant("operator+", "_Zpl1CS_"), "{}", demangle("_Zpl1CS_"));
        assert!(meant("core::fmt::Formatter::pad", "_ZN4core3fmt9Formatter3pad17h0123456789abcdefE"));
    }

    #[test]
    fn the_last_identifier_is_compared() {
        assert_eq!(bare_identifier("_ZN2ns6victimEi"), "victim");
        assert_eq!(bare_identifier("_Z6victimi"), "victim");
        assert_eq!(bare_identifier("_ZN4core3fmt9Formatter3pad17h0123456789abcdefE"), "pad");
        assert_eq!(bare_identifier("victim"), "victim");
        assert_eq!(bare_identifier("_ZN99999999999999999999xE"), "_ZN99999999999999999999xE");
    }
}
