//! Looks up a few things in the kernel's own type information (Documentation/bpf/btf.rst): ids of functions, places of
//! members. Much quicker than making objects of its hundred thousand types. Pure: bytes in, numbers out.

use super::KernelError;

const MAGIC: u16 = 0xeb9f;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const FUNCTION: u32 = 12;
/// A member of a member of ... without a name; deeper nesting is hostile input.
const DEEPEST: u32 = 8;

/// Type information, checked and indexed.
pub struct Types<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// Where in `types` each type begins; type ids count from 1.
    index: Vec<usize>,
}

#[derive(Clone, Copy)]
struct Type {
    name: u32,
    kind: u32,
    members: usize,
    /// Member offsets hold the size of a bit field, too.
    bit_fields: bool,
    size: u32,
    /// Where what follows the common part begins.
    body: usize,
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_le_bytes)
}

fn unknown(what: impl Into<String>) -> KernelError {
    KernelError::UnknownType { what: what.into() }
}

impl<'a> Types<'a> {
    /// Checks the header and walks all types once.
    pub fn parse(data: &'a [u8]) -> Result<Self, KernelError> {
        Self::parse_checked(data).ok_or_else(|| unknown("its own format"))
    }

    fn parse_checked(data: &'a [u8]) -> Option<Self> {
        if data.get(..2)? != MAGIC.to_le_bytes() {
            return None;
        }
        let header = word(data, 4)? as usize;
        let part = |offset: usize, length: usize| {
            let start = header.checked_add(word(data, offset)? as usize)?;
            data.get(start..start.checked_add(word(data, length)? as usize)?)
        };
        let mut parsed = Self { types: part(8, 12)?, strings: part(16, 20)?, index: Vec::new() };
        let mut at = 0;
        while at < parsed.types.len() {
            parsed.index.push(at);
            let this = parsed.at(at)?;
            let rest = match this.kind {
                1 | 14 | 17 => 4,
                3 => 12,
                STRUCT | UNION | 15 | 19 => this.members.checked_mul(12)?,
                6 | 13 => this.members.checked_mul(8)?,
                2 | 7..=FUNCTION | 16 | 18 => 0,
                // A newer kind, of unknown length.
                _ => return None,
            };
            at = this.body.checked_add(rest)?;
        }
        Some(parsed)
    }

    fn at(&self, at: usize) -> Option<Type> {
        let info = word(self.types, at.checked_add(4)?)?;
        Some(Type {
            name: word(self.types, at)?,
            kind: (info >> 24) & 0x1f,
            members: (info & 0xffff) as usize,
            bit_fields: info >> 31 != 0,
            size: word(self.types, at.checked_add(8)?)?,
            body: at.checked_add(12)?,
        })
    }

    fn is_named(&self, name: u32, wanted: &str) -> bool {
        let rest = self.strings.get(name as usize..).unwrap_or_default();
        rest.strip_prefix(wanted.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
    }

    fn find(&self, kind: u32, name: &str) -> Option<(u32, Type)> {
        self.index.iter().zip(1_u32..).find_map(|(&at, id)| {
            let this = self.at(at)?;
            (this.kind == kind && self.is_named(this.name, name)).then_some((id, this))
        })
    }

    /// Type id of a function.
    pub fn function(&self, name: &str) -> Result<u32, KernelError> {
        self.find(FUNCTION, name).map(|(id, _)| id).ok_or_else(|| unknown(format!("a function {name}")))
    }

    /// Size of a structure, in bytes.
    pub fn size(&self, structure: &str) -> Result<u32, KernelError> {
        self.find(STRUCT, structure)
            .map(|(_, this)| this.size)
            .ok_or_else(|| unknown(format!("a structure {structure}")))
    }

    /// Offsets of members of a structure, in bytes; members of members without a name count as its own.
    pub fn members<const N: usize>(&self, structure: &str, names: [&str; N]) -> Result<[u32; N], KernelError> {
        let (_, this) = self.find(STRUCT, structure).ok_or_else(|| unknown(format!("a structure {structure}")))?;
        let mut offsets = [0; N];
        for (offset, name) in offsets.iter_mut().zip(names) {
            let bits = self
                .member(this, name, 0)
                .filter(|bits| bits % 8 == 0)
                .ok_or_else(|| unknown(format!("a member {structure}.{name}")))?;
            *offset = bits / 8;
        }
        Ok(offsets)
    }

    fn member(&self, structure: Type, wanted: &str, depth: u32) -> Option<u32> {
        for member in 0..structure.members {
            let at = structure.body.checked_add(member * 12)?;
            let (name, kind, offset) = (word(self.types, at)?, word(self.types, at + 4)?, word(self.types, at + 8)?);
            let bits = if structure.bit_fields { offset & 0x00ff_ffff } else { offset };
            if self.is_named(name, wanted) {
                return Some(bits);
            }
            if name == 0 && depth < DEEPEST {
                let inner = self.at(*self.index.get((kind as usize).checked_sub(1)?)?)?;
                if matches!(inner.kind, STRUCT | UNION)
                    && let Some(more) = self.member(inner, wanted, depth + 1)
                {
                    return bits.checked_add(more);
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct outer { long first; struct { int second; }; }` and a function `walk`.
    fn sample() -> Vec<u8> {
        let strings = b"\0outer\0first\0second\0walk\0int\0";
        let at = |name: &str| {
            let pattern = format!("\0{name}\0");
            strings.windows(pattern.len()).position(|window| window == pattern.as_bytes()).expect("name") as u32 + 1
        };
        let types = [
            [at("int"), 1 << 24, 4, 32].as_slice(),
            &[0, STRUCT << 24 | 1, 4, at("second"), 1, 0],
            &[at("outer"), STRUCT << 24 | 2, 16, at("first"), 1, 0, 0, 2, 64],
            &[at("walk"), FUNCTION << 24, 1],
        ]
        .concat();
        let types: Vec<u8> = types.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut data = vec![0x9f, 0xeb, 1, 0];
        for value in [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32] {
            data.extend(value.to_le_bytes());
        }
        data.extend(types);
        data.extend(strings);
        data
    }

    #[test]
    fn members_and_functions_are_found() {
        let data = sample();
        let types = Types::parse(&data).expect("valid");
        assert_eq!(types.members("outer", ["first", "second"]).expect("both"), [0, 8]);
        assert_eq!(types.function("walk").expect("there"), 4);
        assert_eq!(types.size("outer").expect("there"), 16);
    }

    #[test]
    fn what_is_missing_is_named() {
        let data = sample();
        let types = Types::parse(&data).expect("valid");
        let error = types.members("outer", ["third"]).expect_err("not there").to_string();
        assert!(error.contains("outer.third"), "{error}");
    }

    #[test]
    fn damaged_information_is_refused_without_panic() {
        let data = sample();
        for length in 0..data.len() {
            if let Ok(types) = Types::parse(&data[..length]) {
                let _ = types.members("outer", ["first", "second"]);
            }
        }
        for at in 0..data.len() {
            for value in [0, 0x7f, 0xff] {
                let mut damaged = data.clone();
                damaged[at] = value;
                if let Ok(types) = Types::parse(&damaged) {
                    let _ = types.members("outer", ["first", "second"]);
                    let _ = types.function("walk");
                }
            }
        }
    }
}
