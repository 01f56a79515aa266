//! .eh_frame of an object: records of functions that were dropped with a COMDAT group are taken out, so that the unwinder
//! never meets a function twice or at address nothing. Not for running the tables.

use super::error::PatchError;
use super::input::{Input, Relocation};
use std::collections::HashMap;

struct Record {
    start: usize,
    end: usize,
    /// Where its CIE starts; none: it is one.
    cie: Option<usize>,
}

/// Drops from section `index` all records whose function `is_kept` denies (it is asked with the relocation of the start
/// address), CIEs that nobody uses any more, and terminators.
pub(super) fn filter(
    input: &mut Input,
    index: usize,
    is_kept: impl Fn(&Input, &Relocation) -> bool,
) -> Result<(), PatchError> {
    let section = &input.sections[index];
    let records = records(&section.data).map_err(|problem| PatchError::Malformed {
        file: input.name.clone(),
        problem: format!(".eh_frame: {problem}"),
    })?;
    let first_relocation = |offset: usize| {
        let at = section.relocations.partition_point(|r| r.offset < offset as u64);
        section.relocations.get(at).filter(|r| r.offset == offset as u64)
    };
    let mut used_cies: HashMap<usize, usize> = HashMap::new();
    let mut kept = Vec::new();
    for record in &records {
        if let Some(cie) = record.cie {
            // The start address follows the length and the CIE pointer.
            if first_relocation(record.start + 8).is_some_and(|r| is_kept(input, r)) {
                used_cies.insert(cie, 0);
                kept.push(record);
            }
        } else {
            kept.push(record);
        }
    }
    kept.retain(|r| r.cie.is_some() || used_cies.contains_key(&r.start));

    let mut data = Vec::with_capacity(section.data.len());
    let mut relocations = Vec::with_capacity(section.relocations.len());
    for record in kept {
        let moved_to = data.len();
        data.extend_from_slice(&section.data[record.start..record.end]);
        match record.cie {
            None => {
                used_cies.insert(record.start, moved_to);
            }
            Some(cie) => {
                // A CIE precedes its FDEs: `records` saw to it.
                let distance = moved_to + 4 - used_cies[&cie];
                data[moved_to + 4..moved_to + 8].copy_from_slice(&(distance as u32).to_le_bytes());
            }
        }
        let from = section.relocations.partition_point(|r| r.offset < record.start as u64);
        for r in section.relocations[from..].iter().take_while(|r| r.offset < record.end as u64) {
            relocations.push(Relocation { offset: r.offset - record.start as u64 + moved_to as u64, ..*r });
        }
    }
    let size = data.len() as u64;
    let section = &mut input.sections[index];
    section.data = data;
    section.relocations = relocations;
    section.size = size;
    Ok(())
}

fn records(data: &[u8]) -> Result<Vec<Record>, &'static str> {
    let word = |at: usize| -> Option<u32> { Some(u32::from_le_bytes(data.get(at..at + 4)?.try_into().ok()?)) };
    let mut cies = std::collections::HashSet::new();
    let mut records = Vec::new();
    let mut at = 0;
    while at < data.len() {
        let length = match word(at).ok_or("it ends within a record")? {
            0 => {
                at += 4;
                continue;
            }
            0xffff_ffff => return Err("64-bit records are not supported"),
            length => length as usize,
        };
        let start = at;
        at += 4;
        let end = at.checked_add(length).filter(|&e| e <= data.len()).ok_or("a record is longer than the section")?;
        let id = word(at).filter(|_| length >= 4).ok_or("a record is too short")? as usize;
        let cie = match id {
            0 => {
                cies.insert(start);
                None
            }
            _ if length < 8 => return Err("a record is too short"),
            back => Some(at.checked_sub(back).filter(|c| cies.contains(c)).ok_or("a record has no CIE before it")?),
        };
        records.push(Record { start, end, cie });
        at = end;
    }
    Ok(records)
}
