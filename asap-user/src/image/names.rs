//! Names as people write them: C++ and Rust symbols demangled.

/// The name that a person would write, for C++ (Itanium ABI) and Rust symbols; others stay as they are.
#[must_use]
pub fn demangle(name: &str) -> String {
    if let Ok(rust) = rustc_demangle::try_demangle(name) {
        return format!("{rust:#}");
    }
    if name.starts_with("_Z")
        && let Ok(symbol) = cpp_demangle::Symbol::new(name)
        && let Ok(text) = symbol.demangle(&cpp_demangle::DemangleOptions::default())
    {
        return text;
    }
    name.to_owned()
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_become_readable() {
        assert_eq!(super::demangle("_ZN2ns1fEi"), "ns::f(int)");
        assert_eq!(super::demangle("_ZN4core3fmt9Formatter3pad17h0123456789abcdefE"), "core::fmt::Formatter::pad");
        assert_eq!(super::demangle("ap_byterange_filter"), "ap_byterange_filter");
        assert_eq!(super::demangle("_Z"), "_Z");
    }
}
