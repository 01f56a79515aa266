//! Thread-local accesses of an object, made static. A patch only uses thread-local variables that the target has already,
//! at an offset from the thread pointer that is known when it is linked: so the general-dynamic, local-dynamic and
//! descriptor sequences are rewritten to local-exec here (psABI 1.0, 11.1), and no call of __tls_get_addr remains. Not for the
//! offsets themselves: the relocations that remain are TPOFF32, TPOFF64 and GOTTPOFF.

use super::error::PatchError;
use super::input::{Input, Relocation, Section, SectionKind, Symbol};
use super::relocation;
use object::elf;

/// `mov %fs:0,%rax`
const THREAD_POINTER: [u8; 9] = [0x64, 0x48, 0x8b, 0x04, 0x25, 0, 0, 0, 0];

/// Rewrites all sections of an object.
pub(super) fn make_static(input: &mut Input) -> Result<(), PatchError> {
    let Input { name, sections, symbols, .. } = input;
    for section in sections {
        if section.is_laid_out() && section.relocations.iter().any(|r| is_dynamic(r.kind)) {
            rewrite(name, section, symbols)?;
        }
    }
    Ok(())
}

fn is_dynamic(kind: u32) -> bool {
    [
        elf::R_X86_64_TLSGD,
        elf::R_X86_64_TLSLD,
        elf::R_X86_64_DTPOFF32,
        elf::R_X86_64_DTPOFF64,
        elf::R_X86_64_GOTPC32_TLSDESC,
        elf::R_X86_64_TLSDESC_CALL,
    ]
    .iter()
    .any(|k| k.0 == kind)
}

fn rewrite(file: &str, section: &mut Section, symbols: &[Symbol]) -> Result<(), PatchError> {
    let old = std::mem::take(&mut section.relocations);
    let mut new = Vec::with_capacity(old.len());
    let mut rest = old.iter().copied().peekable();
    while let Some(r) = rest.next() {
        let refuse = || PatchError::TlsSequence {
            file: file.to_owned(),
            section: section.name.clone(),
            offset: r.offset,
            kind: relocation::name(r.kind),
        };
        if !is_dynamic(r.kind) {
            new.push(r);
            continue;
        }
        let at = usize::try_from(r.offset).map_err(|_| refuse())?;
        let local_exec = |offset: usize, addend: i64| Relocation {
            offset: offset as u64,
            kind: elf::R_X86_64_TPOFF32.0,
            symbol: r.symbol,
            addend,
        };
        match elf::RelocationType(r.kind) {
            // Behind a TLSLD (whose base becomes the thread pointer itself) these are offsets from it. In data they
            // would be read by a debugger only.
            elf::R_X86_64_DTPOFF32 if section.kind == SectionKind::Code => {
                new.push(local_exec(at, r.addend));
            }
            elf::R_X86_64_DTPOFF64 if section.kind == SectionKind::Code => {
                new.push(Relocation { kind: elf::R_X86_64_TPOFF64.0, ..r });
            }
            elf::R_X86_64_TLSGD | elf::R_X86_64_TLSLD => {
                let call = rest.next().filter(|c| symbols[c.symbol].name == "__tls_get_addr").ok_or_else(refuse)?;
                let general = r.kind == elf::R_X86_64_TLSGD.0;
                let sequence = Sequence::find(&section.data, at, general, call).ok_or_else(refuse)?;
                let code = section.data.get_mut(sequence.start..sequence.end).ok_or_else(refuse)?;
                if general {
                    code[..9].copy_from_slice(&THREAD_POINTER);
                    // lea tpoff(%rax),%rax
                    code[9..16].copy_from_slice(&[0x48, 0x8d, 0x80, 0, 0, 0, 0]);
                    // nopw 0(%rax,%rax,1)
                    fill(&mut code[16..], &[0x66, 0x0f, 0x1f, 0x44, 0, 0]);
                    new.push(local_exec(sequence.start + 12, r.addend.wrapping_add(4)));
                } else {
                    let padding = code.len() - THREAD_POINTER.len();
                    // data16 prefixes, as linkers write them; the large model's rest is a long nop.
                    let (prefix, access) = code.split_at_mut(padding);
                    if padding <= 4 {
                        prefix.fill(0x66);
                    } else {
                        fill(prefix, &[0x66, 0x66, 0x66, 0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0]);
                    }
                    access.copy_from_slice(&THREAD_POINTER);
                }
            }
            elf::R_X86_64_GOTPC32_TLSDESC => {
                // lea x@tlsdesc(%rip),%reg -> mov $tpoff,%reg
                let start = at.checked_sub(3).ok_or_else(refuse)?;
                let code = section.data.get_mut(start..start + 7).ok_or_else(refuse)?;
                if code[0] & 0xfb != 0x48 || code[1] != 0x8d || code[2] & 0xc7 != 0x05 {
                    return Err(refuse());
                }
                code[0] = 0x48 | (code[0] >> 2 & 1);
                code[2] = 0xc0 | (code[2] >> 3 & 7);
                code[1] = 0xc7;
                code[3..].fill(0);
                // The base of a module's own block: with DTPOFF read as TPOFF, that is the thread pointer, offset 0.
                if symbols[r.symbol].name != "_TLS_MODULE_BASE_" {
                    new.push(local_exec(at, r.addend.wrapping_add(4)));
                }
            }
            elf::R_X86_64_TLSDESC_CALL => {
                // call *(%rax) -> xchg %ax,%ax
                let code = section.data.get_mut(at..at.saturating_add(2)).ok_or_else(refuse)?;
                if *code != [0xff, 0x10] {
                    return Err(refuse());
                }
                code.copy_from_slice(&[0x66, 0x90]);
            }
            _ => return Err(refuse()),
        }
    }
    // A rewritten field may lie behind the one it replaces.
    new.sort_by_key(|r| r.offset);
    section.relocations = new;
    Ok(())
}

fn fill(place: &mut [u8], nop: &[u8]) {
    for (byte, n) in place.iter_mut().zip(nop.iter().chain(std::iter::repeat(&0x90))) {
        *byte = *n;
    }
}

/// Where the instructions of a general-dynamic or local-dynamic access begin and end.
struct Sequence {
    start: usize,
    end: usize,
}

impl Sequence {
    /// `at` is the field of the `lea x@tlsgd(%rip),%rdi`, `call` the relocation of the call that follows.
    fn find(code: &[u8], at: usize, general: bool, call: Relocation) -> Option<Self> {
        let lea = [0x48, 0x8d, 0x3d];
        let after = at.checked_add(4)?;
        if code.get(at.checked_sub(3)?..at)? != lea {
            return None;
        }
        let tail = code.get(after..)?;
        let near = [elf::R_X86_64_PLT32.0, elf::R_X86_64_PC32.0].contains(&call.kind);
        let slot = [elf::R_X86_64_GOTPCREL, elf::R_X86_64_GOTPCRELX, elf::R_X86_64_REX_GOTPCRELX]
            .iter()
            .any(|k| k.0 == call.kind);
        // movabs $__tls_get_addr@pltoff,%rax; add %rbx|%r15,%rax; call *%rax
        let large = call.kind == 31
            && tail.starts_with(&[0x48, 0xb8])
            && matches!(tail.get(10..15)?, [0x48, 0x01, 0xd8, 0xff, 0xd0] | [0x4c, 0x01, 0xf8, 0xff, 0xd0]);
        let data16 = at >= 4 && code[at - 4] == 0x66;
        let (start, field) = match general {
            _ if large => (at - 3, after + 2),
            // data16 lea; data16 data16 rex.W call | data16 lea; data16 rex.W call *slot
            true if near && data16 && tail.starts_with(&[0x66, 0x66, 0x48, 0xe8]) => (at - 4, after + 4),
            true if slot && data16 && tail.starts_with(&[0x66, 0x48, 0xff, 0x15]) => (at - 4, after + 4),
            false if near && tail.starts_with(&[0xe8]) => (at - 3, after + 1),
            false if slot && tail.starts_with(&[0xff, 0x15]) => (at - 3, after + 2),
            _ => return None,
        };
        let end = if large { after + 15 } else { field + 4 };
        (call.offset == field as u64 && end <= code.len()).then_some(Self { start, end })
    }
}
