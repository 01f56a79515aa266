//! What a rule asks of an argument: equal to one of some values, certain bits, a range; several of these may be said of one.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;

/// Most values that are compared with.
const MAX_VALUES: usize = 256;

/// A number as programs mean it: written in TOML as an integer, negative ones included, or as text ("0xffffffffffffffff").
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Value(pub u64);

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // TOML has no integers above 2^63 - 1.
        match i64::try_from(self.0) {
            Ok(number) => serializer.serialize_i64(number),
            Err(_) => serializer.serialize_str(&format!("{:#x}", self.0)),
        }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Value;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number")
            }
            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Value, E> {
                Ok(Value(number as u64))
            }
            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Value, E> {
                Ok(Value(number))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Value, E> {
                let number = match text.strip_prefix("0x") {
                    Some(digits) => u64::from_str_radix(digits, 16),
                    None => text.parse(),
                };
                number.map(Value).map_err(|_| E::custom(format!("`{text}` is no number of at most 64 bits")))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// What must be so of an argument.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ArgumentMatch {
    /// Which: 0 to 5.
    pub argument: u8,
    /// How many bits of it count: 32 for `int` and `unsigned`, of which the kernel does not look at more, else 64.
    #[serde(default = "all_bits", skip_serializing_if = "is_all_bits")]
    pub bits: u8,
    /// Only these bits are compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<Value>,
    /// It is one of these.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "one_or_more")]
    pub equals: Option<Vec<Value>>,
    /// It is none of these.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "one_or_more")]
    pub differs: Option<Vec<Value>>,
    /// It is not smaller, without sign.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Value>,
    /// It is not larger, without sign.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Value>,
}

const fn all_bits() -> u8 {
    64
}

#[allow(clippy::trivially_copy_pass_by_ref)]
const fn is_all_bits(bits: &u8) -> bool {
    *bits == all_bits()
}

impl ArgumentMatch {
    /// One that asks nothing yet.
    #[must_use]
    pub const fn of(argument: u8, bits: u8) -> Self {
        Self { argument, bits, mask: None, equals: None, differs: None, from: None, to: None }
    }

    /// Whether it can be asked.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.argument > 5 {
            return Err(format!("argument {}: they are counted from 0 to 5", self.argument));
        }
        if self.bits != 32 && self.bits != 64 {
            return Err(format!("bits = {}: 32 or 64", self.bits));
        }
        let lists = [&self.equals, &self.differs];
        if lists.iter().all(|list| list.is_none()) && self.from.is_none() && self.to.is_none() {
            return Err("nothing is asked: say equals, differs, from, or to".to_owned());
        }
        for list in lists.into_iter().flatten() {
            if list.is_empty() || list.len() > MAX_VALUES {
                return Err(format!("{} values to compare with; from 1 to {MAX_VALUES}", list.len()));
            }
        }
        let never = |value: &Value| self.seen(value.0) & !self.mask.map_or(u64::MAX, |mask| mask.0) != 0;
        if let Some(value) = self.equals.iter().flatten().find(|value| never(value)) {
            return Err(format!("equals = {:#x} is never so: it has bits that the mask leaves out", value.0));
        }
        if let (Some(from), Some(to)) = (self.from, self.to)
            && self.seen(from.0) > self.seen(to.0)
        {
            return Err(format!("from {:#x} to {:#x}: no number is in there", from.0, to.0));
        }
        Ok(())
    }

    /// The bits that count.
    fn seen(&self, value: u64) -> u64 {
        if self.bits == 32 { value & u64::from(u32::MAX) } else { value }
    }

    /// Whether it is so.
    #[must_use]
    pub fn fits(&self, arguments: &[u64; 6]) -> bool {
        let Some(&argument) = arguments.get(usize::from(self.argument)) else { return false };
        let value = self.seen(argument) & self.mask.map_or(u64::MAX, |mask| mask.0);
        let is_in = |list: &[Value]| list.iter().any(|other| self.seen(other.0) == value);
        self.equals.as_deref().is_none_or(is_in)
            && self.differs.as_deref().is_none_or(|list| !is_in(list))
            && self.from.is_none_or(|from| value >= self.seen(from.0))
            && self.to.is_none_or(|to| value <= self.seen(to.0))
    }
}

/// A number, or a list of them.
mod one_or_more {
    use super::{MAX_VALUES, Value};
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
    use std::fmt;

    pub fn serialize<S: Serializer>(values: &Option<Vec<Value>>, serializer: S) -> Result<S::Ok, S::Error> {
        match values.as_deref() {
            Some([value]) => value.serialize(serializer),
            values => values.serialize(serializer),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<Value>>, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Vec<Value>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number or a list of numbers")
            }
            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Vec<Value>, E> {
                Ok(vec![Value(number as u64)])
            }
            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Vec<Value>, E> {
                Ok(vec![Value(number)])
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Vec<Value>, E> {
                Value::deserialize(de::value::StrDeserializer::new(text)).map(|value| vec![value])
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> Result<Vec<Value>, A::Error> {
                let mut values = Vec::new();
                while let Some(value) = list.next_element()? {
                    values.push(value);
                    if values.len() > MAX_VALUES {
                        return Err(de::Error::custom(format!("more than {MAX_VALUES} values")));
                    }
                }
                Ok(values)
            }
        }
        deserializer.deserialize_any(Visitor).map(Some)
    }
}
