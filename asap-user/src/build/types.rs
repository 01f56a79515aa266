//! Types whose layout differs between two builds of an object, by their debug information: data that the running program has
//! made in the old layout would be misread. Says nothing where there is no debug information. Pure. Not for values, which are in
//! the objects' sections.

use super::compare::{
    Finding,
    object::{Kind, Object},
};
use crate::patch::manifest::Class;
use gimli::{AttributeValue, DebuggingInformationEntry, Dwarf, EndianSlice, LittleEndian, Unit, UnitOffset};
use std::{borrow::Cow, collections::BTreeMap};

type Slice<'a> = EndianSlice<'a, LittleEndian>;

/// Most types of an object that are looked at.
const TYPES_MOST: usize = 200_000;

/// Layout of a structure, union or enumeration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Layout {
    size: Option<u64>,
    /// Name and place of each member; of enumerations the values.
    members: Vec<(String, Member)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Member {
    at: Option<i128>,
    /// Kind of type and, of scalars and arrays, its size.
    kind: String,
}

/// Compares the types that both builds of an object know.
#[must_use]
pub fn compare(source: &str, old: &[u8], new: &[u8]) -> Vec<Finding> {
    let (Some(old), Some(new)) = (layouts(source, old), layouts(source, new)) else { return Vec::new() };
    let mut findings = Vec::new();
    for (name, before) in &old {
        let Some(after) = new.get(name).filter(|after| *after != before) else { continue };
        let Some(change) = difference(name, before, after) else { continue };
        findings.push(Finding {
            class: Class::DataLayout,
            object: source.to_owned(),
            subject: name.clone(),
            reason: change,
            way_out: "keep the layout (put what is new beside it), or restart the program with a repaired build"
                .to_owned(),
        });
    }
    findings
}

/// What subjects of functions begin with.
pub const FUNCTION: &str = "function ";

fn difference(name: &str, before: &Layout, after: &Layout) -> Option<String> {
    if let Some(function) = name.strip_prefix(FUNCTION) {
        return Some(format!("{function} takes or returns something else, and code that stays calls it as before"));
    }
    if name.starts_with("enum ") {
        // Constants that are new harm nobody.
        let changed = |(member, place): &&(String, Member)| {
            after.members.iter().any(|(other, now)| other == member && now.at != place.at)
        };
        let (member, _) = before.members.iter().find(changed)?;
        return Some(format!("{member} of {name} has another value, which the running program may hold"));
    }
    if before.size != after.size {
        let size = |layout: &Layout| layout.size.map_or_else(|| "unknown".to_owned(), |size| size.to_string());
        return Some(format!("{name} has {} bytes instead of {}", size(after), size(before)));
    }
    for (member, place) in &before.members {
        match after.members.iter().find(|(other, _)| other == member) {
            None => return Some(format!("{name} has no member {member} any more")),
            Some((_, now)) if now.at != place.at => return Some(format!("{member} of {name} is at another place")),
            Some((_, now)) if now.kind != place.kind => {
                return Some(format!("{member} of {name} is {} instead of {}", now.kind, place.kind));
            }
            Some(_) => {}
        }
    }
    let is_new = |(member, _): &&(String, Member)| !before.members.iter().any(|(other, _)| other == member);
    let (member, _) = after.members.iter().find(is_new)?;
    Some(format!("{name} has a new member {member}, which what the running program has made lacks"))
}

/// All named types of an object; none, if it has no debug information that can be read.
fn layouts(source: &str, bytes: &[u8]) -> Option<BTreeMap<String, Layout>> {
    let object = Object::read(source, bytes).ok()?;
    let sections: BTreeMap<String, Vec<u8>> =
        object.of_kind(Kind::Debug).map(|at| (object.sections[at].name.clone(), relocated(&object, at))).collect();
    sections.get(".debug_info")?;
    let load = |id: gimli::SectionId| -> Result<Cow<'_, [u8]>, gimli::Error> {
        Ok(sections.get(id.name()).map_or(Cow::Borrowed(&[][..]), |data| Cow::Borrowed(data.as_slice())))
    };
    let dwarf = gimli::DwarfSections::load(load).ok()?;
    let dwarf = dwarf.borrow(|section| EndianSlice::new(section, LittleEndian));
    let mut found = BTreeMap::new();
    let mut units = dwarf.units();
    while let Ok(Some(header)) = units.next() {
        let unit = dwarf.unit(header).ok()?;
        read_unit(&dwarf, &unit, &mut found).ok()?;
    }
    Some(found)
}

/// A section of debug information with its offsets filled in; code is at 0, and nobody asks.
fn relocated(object: &Object, at: usize) -> Vec<u8> {
    let section = &object.sections[at];
    let mut data = section.data.clone();
    for relocation in &section.relocations {
        let value = object.symbols[relocation.symbol].value.wrapping_add_signed(relocation.addend);
        let width = if relocation.kind == object::elf::R_X86_64_64.0 { 8 } else { 4 };
        let Ok(place) = usize::try_from(relocation.offset) else { continue };
        if let Some(field) = place.checked_add(width).and_then(|end| data.get_mut(place..end)) {
            field.copy_from_slice(&value.to_le_bytes()[..width]);
        }
    }
    data
}

fn read_unit(
    dwarf: &Dwarf<Slice<'_>>,
    unit: &Unit<Slice<'_>>,
    found: &mut BTreeMap<String, Layout>,
) -> Result<(), gimli::Error> {
    let mut tree = unit.entries_tree(None)?;
    let root = tree.root()?;
    let mut children = root.children();
    let mut pending: Vec<UnitOffset> = Vec::new();
    while let Some(child) = children.next()? {
        pending.push(child.entry().offset());
    }
    // Types stand at the top, or in namespaces; those of one function only are no business of others.
    while let Some(offset) = pending.pop() {
        if found.len() >= TYPES_MOST {
            break;
        }
        let entry = unit.entry(offset)?;
        let word = match entry.tag() {
            gimli::DW_TAG_structure_type | gimli::DW_TAG_class_type => "struct",
            gimli::DW_TAG_union_type => "union",
            gimli::DW_TAG_enumeration_type => "enum",
            gimli::DW_TAG_typedef => "typedef",
            gimli::DW_TAG_subprogram => {
                if let Some((name, signature)) = signature(dwarf, unit, &entry)? {
                    found.entry(name).or_insert(signature);
                }
                continue;
            }
            gimli::DW_TAG_namespace => {
                let mut tree = unit.entries_tree(Some(offset))?;
                let mut children = tree.root()?.children();
                while let Some(child) = children.next()? {
                    pending.push(child.entry().offset());
                }
                continue;
            }
            _ => continue,
        };
        let Some(name) = name(dwarf, unit, &entry) else { continue };
        // `typedef struct { ... } name`.
        let offset = if word == "typedef" {
            let Some(AttributeValue::UnitRef(inner)) = entry.attr_value(gimli::DW_AT_type) else { continue };
            let inner_entry = unit.entry(inner)?;
            let is_plain = matches!(
                inner_entry.tag(),
                gimli::DW_TAG_structure_type | gimli::DW_TAG_union_type | gimli::DW_TAG_enumeration_type
            );
            if !is_plain || self::name(dwarf, unit, &inner_entry).is_some() {
                continue;
            }
            inner
        } else {
            offset
        };
        if unit.entry(offset)?.attr_value(gimli::DW_AT_declaration).is_some() {
            continue;
        }
        let layout = layout(dwarf, unit, offset)?;
        found.entry(format!("{word} {name}")).or_insert(layout);
    }
    Ok(())
}

/// How a function that others may call is called; in C++ its name tells its parameters.
fn signature(
    dwarf: &Dwarf<Slice<'_>>,
    unit: &Unit<Slice<'_>>,
    entry: &DebuggingInformationEntry<Slice<'_>>,
) -> Result<Option<(String, Layout)>, gimli::Error> {
    let has = |name| entry.attr_value(name).is_some();
    let is_defined = has(gimli::DW_AT_low_pc) && has(gimli::DW_AT_external) && !has(gimli::DW_AT_linkage_name);
    let Some(name) = name(dwarf, unit, entry).filter(|_| is_defined) else { return Ok(None) };
    // Whether a number has a sign is no matter of who passes it.
    let plain = |kind: String| Member { at: None, kind: kind.replace("an unsigned number", "a number") };
    let mut layout = Layout { size: None, members: vec![("(result)".to_owned(), plain(kind(unit, entry, 0)?))] };
    let mut tree = unit.entries_tree(Some(entry.offset()))?;
    let mut children = tree.root()?.children();
    while let Some(child) = children.next()? {
        let child = child.entry();
        if child.tag() == gimli::DW_TAG_formal_parameter {
            layout.members.push((format!("(parameter {})", layout.members.len()), plain(kind(unit, child, 0)?)));
        }
    }
    Ok(Some((format!("{FUNCTION}{name}"), layout)))
}

fn layout(dwarf: &Dwarf<Slice<'_>>, unit: &Unit<Slice<'_>>, offset: UnitOffset) -> Result<Layout, gimli::Error> {
    let mut tree = unit.entries_tree(Some(offset))?;
    let root = tree.root()?;
    let mut layout = Layout {
        size: root.entry().attr_value(gimli::DW_AT_byte_size).and_then(|size| size.udata_value()),
        members: Vec::new(),
    };
    let mut children = root.children();
    while let Some(child) = children.next()? {
        let entry = child.entry();
        let at = match entry.tag() {
            gimli::DW_TAG_member | gimli::DW_TAG_inheritance => {
                // Bit-fields say their place in bits, in DWARF 4 counted from the other end of their unit.
                let value = |name| entry.attr_value(name).and_then(|at| at.udata_value());
                let bits = value(gimli::DW_AT_data_bit_offset);
                let bytes = value(gimli::DW_AT_data_member_location);
                let back = value(gimli::DW_AT_bit_offset)
                    .map_or(0, |bits| i128::from(bits) + i128::from(value(gimli::DW_AT_bit_size).unwrap_or(0)));
                bits.map(i128::from).or(bytes.map(|bytes| i128::from(bytes) * 8 - back))
            }
            gimli::DW_TAG_enumerator => {
                let value = entry.attr_value(gimli::DW_AT_const_value);
                value.and_then(|value| {
                    value.sdata_value().map(i128::from).or_else(|| value.udata_value().map(i128::from))
                })
            }
            _ => continue,
        };
        let name = name(dwarf, unit, entry).unwrap_or_else(|| format!("(member {})", layout.members.len() + 1));
        let bits = entry.attr_value(gimli::DW_AT_bit_size).and_then(|size| size.udata_value());
        let kind = kind(unit, entry, 0)? + &bits.map_or_else(String::new, |bits| format!(", {bits} bits of it"));
        layout.members.push((name, Member { at, kind }));
    }
    Ok(layout)
}

/// What a member is, as far as it decides how it is read: pointers are alike.
fn kind(
    unit: &Unit<Slice<'_>>,
    entry: &DebuggingInformationEntry<Slice<'_>>,
    depth: usize,
) -> Result<String, gimli::Error> {
    let Some(AttributeValue::UnitRef(offset)) = entry.attr_value(gimli::DW_AT_type) else { return Ok(String::new()) };
    let target = unit.entry(offset)?;
    let size = || target.attr_value(gimli::DW_AT_byte_size).and_then(|size| size.udata_value()).unwrap_or(0);
    Ok(match target.tag() {
        gimli::DW_TAG_typedef
        | gimli::DW_TAG_const_type
        | gimli::DW_TAG_volatile_type
        | gimli::DW_TAG_atomic_type
        | gimli::DW_TAG_restrict_type
            if depth < 64 =>
        {
            kind(unit, &target, depth + 1)?
        }
        gimli::DW_TAG_pointer_type | gimli::DW_TAG_reference_type => "a pointer".to_owned(),
        gimli::DW_TAG_array_type => {
            let mut counts = Vec::new();
            let mut tree = unit.entries_tree(Some(offset))?;
            let mut children = tree.root()?.children();
            while let Some(child) = children.next()? {
                let value = |name| child.entry().attr_value(name).and_then(|value| value.udata_value());
                let count =
                    value(gimli::DW_AT_count).or_else(|| Some(value(gimli::DW_AT_upper_bound)?.wrapping_add(1)));
                counts.push(count.map_or_else(|| "?".to_owned(), |count| count.to_string()));
            }
            format!("an array of {} times {}", counts.join(" by "), kind(unit, &target, depth + 1)?)
        }
        gimli::DW_TAG_base_type => {
            let encoding = match target.attr_value(gimli::DW_AT_encoding) {
                Some(AttributeValue::Encoding(gimli::DW_ATE_float)) => "a floating-point number",
                Some(AttributeValue::Encoding(gimli::DW_ATE_boolean)) => "a truth value",
                Some(AttributeValue::Encoding(gimli::DW_ATE_unsigned | gimli::DW_ATE_unsigned_char)) => {
                    "an unsigned number"
                }
                _ => "a number",
            };
            format!("{encoding} of {} bytes", size())
        }
        gimli::DW_TAG_enumeration_type => format!("an enumeration of {} bytes", size()),
        _ => format!("a structure of {} bytes", size()),
    })
}

fn name(
    dwarf: &Dwarf<Slice<'_>>,
    unit: &Unit<Slice<'_>>,
    entry: &DebuggingInformationEntry<Slice<'_>>,
) -> Option<String> {
    let value = entry.attr_value(gimli::DW_AT_name)?;
    Some(dwarf.attr_string(unit, value).ok()?.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use crate::build::compare::tests::{compile, compilers};

    const SOURCE: &str = "struct inner { char c; }; typedef struct { int count; struct inner *list; char name[16]; unsigned f:3; } item;\n\
                          enum mode { OFF, ON }; int use(item *i, enum mode m) { return i->count + i->name[2] + (m == ON) + i->f; }\n";

    fn found(edits: &[(&str, &str)], flags: &[&str]) -> Vec<Vec<String>> {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let edited = edits.iter().fold(SOURCE.to_owned(), |text, (before, after)| text.replace(before, after));
        let run = |compiler: &&str| {
            let old = compile(directory.path(), compiler, "c", SOURCE, flags);
            let new = compile(directory.path(), compiler, "c", &edited, flags);
            super::compare("unit.c", &old, &new).into_iter().map(|finding| finding.reason).collect()
        };
        compilers("c").iter().map(run).collect()
    }

    #[test]
    fn a_layout_that_changes_is_said_with_the_member() {
        for (edits, words) in [
            (&[("int count;", "int count, more;")][..], "typedef item has a new member more"),
            (&[("char name[16]", "char name[32]")], "typedef item has 56 bytes instead of 40"),
            (&[("char name[16]", "char name[8]; int x, y")], "name of typedef item is an array of 8 times"),
            (&[("int count;", "unsigned count;")], "count of typedef item is an unsigned number of 4 bytes"),
            (&[("f:3", "g:2, f:1")], "f of typedef item is at another place"),
            (&[("OFF, ON", "ON, OFF")], "OFF of enum mode has another value"),
        ] {
            for flags in [&["-gdwarf-5"][..], &["-gdwarf-4"]] {
                for reasons in found(edits, flags) {
                    assert!(reasons.iter().any(|reason| reason.starts_with(words)), "{words}: {reasons:?}");
                }
            }
        }
    }

    #[test]
    fn a_signature_that_changes_is_said() {
        for edits in [
            &[("use(item *i, enum mode m)", "use(item *i, enum mode m, int more)")][..],
            &[("int use(item *i", "long use(item *i")],
            &[("use(item *i, enum mode m)", "use(item *i, long m)")],
        ] {
            for reasons in found(edits, &[]) {
                assert!(
                    reasons.iter().any(|reason| reason.starts_with("use takes or returns")),
                    "{edits:?}: {reasons:?}"
                );
            }
        }
    }

    #[test]
    fn what_changes_no_layout_is_not_said() {
        let more = [
            ("int use(item *i, enum mode m)", "unsigned use(item *const i, enum mode how)"),
            ("(m == ON)", "(how == ON)"),
            ("count +", "count * 2 +"),
            ("OFF, ON", "OFF, ON, AUTOMATIC"),
            ("struct inner *list", "struct other *list"),
        ];
        for edits in [&[][..], &more] {
            assert!(found(edits, &[]).iter().all(Vec::is_empty), "{edits:?}");
        }
        assert!(found(&[("int count;", "int count, more;")], &["-g0"]).iter().all(Vec::is_empty));
    }
}
