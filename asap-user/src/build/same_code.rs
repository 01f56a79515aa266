//! Whether a function of an object is the function of a linked program: the same instructions, whatever the linker filled in.
//! What is compiled once more for comparison must be what the program was made of, else a verdict would be about something
//! else. Pure. Not for finding functions, which is `twin`.

use super::compare::object::{Object, Place, Relocation, Symbol};
use crate::image::{Image, Symbol as ImageSymbol};
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind};
use object::elf;

/// Bytes of the sequence that finds a thread-local variable by way of a function; linkers replace it as a whole (psABI, "TLS
/// linker optimization").
const GENERAL_DYNAMIC: usize = 16;
/// The same for the variables of a module: `lea`, and a call directly or by way of a table.
const LOCAL_DYNAMIC: usize = 12;
const LOCAL_DYNAMIC_BY_TABLE: usize = 13;

/// Whether `symbol` of the object is `there` in the program.
#[must_use]
pub fn is_same(object: &Object, symbol: &Symbol, program: &Image, there: &ImageSymbol) -> bool {
    let Place::Section(section) = symbol.place else { return false };
    let section = &object.sections[section];
    let here = range(symbol.value, symbol.size).and_then(|range| section.data.get(range));
    let size = usize::try_from(there.size).ok();
    let (Some(here), Some(there)) = (here, size.and_then(|size| program.bytes_at(there.address, size))) else {
        return false;
    };
    let (start, end) = (symbol.value, symbol.value + symbol.size);
    let relocations: Vec<Relocation> = section
        .relocations
        .iter()
        .filter(|relocation| (start..end).contains(&relocation.offset))
        .map(|relocation| Relocation { offset: relocation.offset - start, ..*relocation })
        .collect();
    same_instructions(here, &relocations, there)
}

fn range(start: u64, size: u64) -> Option<std::ops::Range<usize>> {
    let (start, size) = (usize::try_from(start).ok()?, usize::try_from(size).ok()?);
    Some(start..start.checked_add(size)?)
}

/// Instructions from somewhere on, without padding.
struct Stream<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Stream<'_> {
    fn next(&mut self) -> Option<(usize, Instruction)> {
        loop {
            let rest = self.bytes.get(self.at..).filter(|rest| !rest.is_empty())?;
            let mut decoder = Decoder::with_ip(64, rest, self.at as u64, DecoderOptions::NONE);
            let instruction = decoder.decode();
            let start = self.at;
            self.at += instruction.len().max(1);
            if instruction.mnemonic() != Mnemonic::Nop {
                return Some((start, instruction));
            }
        }
    }
}

fn same_instructions(here: &[u8], relocations: &[Relocation], there: &[u8]) -> bool {
    let mut relocations = relocations.iter().peekable();
    let (mut a, mut b) = (Stream { bytes: here, at: 0 }, Stream { bytes: there, at: 0 });
    loop {
        let (start, one) = match a.next() {
            Some(next) => next,
            None => return b.next().is_none(),
        };
        let Some((other_start, other)) = b.next() else { return false };
        let mut kinds = Vec::new();
        while let Some(relocation) = relocations.next_if(|relocation| (relocation.offset as usize) < a.at) {
            kinds.push(elf::RelocationType(relocation.kind));
        }
        let sequence = kinds.iter().find_map(|kind| match *kind {
            elf::R_X86_64_TLSGD => Some(GENERAL_DYNAMIC),
            elf::R_X86_64_TLSLD if here.get(a.at) == Some(&0xff) => Some(LOCAL_DYNAMIC_BY_TABLE),
            elf::R_X86_64_TLSLD => Some(LOCAL_DYNAMIC),
            _ => None,
        });
        if let Some(length) = sequence {
            (a.at, b.at) = (start + length, other_start + length);
            while relocations.next_if(|relocation| (relocation.offset as usize) < a.at).is_some() {}
            continue;
        }
        let is_same = match kinds.is_empty() {
            // Distances within the function: short or near, and what they lead to is compared as it comes.
            true if is_branch(&one) => one.mnemonic() == other.mnemonic(),
            true => here.get(start..a.at) == there.get(other_start..b.at),
            false => one.mnemonic() == other.mnemonic() || is_relaxed(&kinds, &one, &other),
        };
        if !is_same {
            return false;
        }
    }
}

fn is_branch(instruction: &Instruction) -> bool {
    instruction.op_count() > 0 && instruction.op0_kind() == OpKind::NearBranch64
}

/// Linkers load an address directly where a table of addresses held it (psABI, "optimize GOTPCRELX relocations").
fn is_relaxed(kinds: &[elf::RelocationType], one: &Instruction, other: &Instruction) -> bool {
    let of_table = kinds.iter().any(|kind| {
        matches!(
            *kind,
            elf::R_X86_64_GOTPCREL
                | elf::R_X86_64_GOTPCRELX
                | elf::R_X86_64_REX_GOTPCRELX
                | elf::R_X86_64_GOTTPOFF
                | elf::R_X86_64_GOTPC32_TLSDESC
                | elf::R_X86_64_TLSDESC_CALL
        )
    });
    of_table
        && matches!(
            (one.mnemonic(), other.mnemonic()),
            (Mnemonic::Mov, Mnemonic::Lea) | (Mnemonic::Add, Mnemonic::Lea) | (Mnemonic::Lea, Mnemonic::Mov)
        )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::compare::tests::compilers;
    use std::process::Command;

    const SOURCE: &str = r#"
extern int printf(const char *, ...);
static __thread int own;
static volatile int count;
static __attribute__((noinline)) int inner(int x) { count++; return x * 3 + own; }
int outer(int x) { if (x > 5) return inner(x); printf("%d\n", x); return inner(x - 1) + 2; }
int pick(int x) { switch (x) { case 0: return inner(1); case 1: return outer(5); case 2: return 9; case 3: return inner(x) - 1; case 4: return 1; } return own; }
int tail(int x) { own = x; return inner(x + 1); }
int main(int argc, char **argv) { (void)argv; return outer(argc) + pick(argc) + tail(argc); }
"#;

    #[test]
    fn what_a_program_was_made_of_is_known_and_nothing_else() {
        let dir = tempfile::tempdir().expect("a directory");
        let source = dir.path().join("unit.c");
        std::fs::write(&source, SOURCE).expect("written");
        let run = |compiler: &str, flags: &[&str]| {
            let done = Command::new(compiler).args(flags).current_dir(dir.path()).output().expect("it runs");
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        };
        for compiler in compilers("c") {
            for model in [
                &["-O2", "-fPIE", "-pie"][..],
                &["-O2", "-fno-pie", "-no-pie"],
                &["-O0", "-fPIC", "-pie"],
                &["-O3", "-fPIE", "-pie", "-fno-plt"],
            ] {
                let (compile, link) = (&model[..2], model);
                run(compiler, &[link, &["-w", "-o", "program", "unit.c"]].concat());
                let sections = ["-ffunction-sections", "-fdata-sections", "-g", "-w", "-c", "-o", "unit.o", "unit.c"];
                let extra: &[&str] = if model.contains(&"-fno-plt") { &["-fno-plt"] } else { &[] };
                run(compiler, &[compile, extra, &sections[..]].concat());
                let image = Image::parse("program", std::fs::read(dir.path().join("program")).expect("read").into());
                let image = image.expect("an executable");
                let object = Object::read("unit.o", &std::fs::read(dir.path().join("unit.o")).expect("read"));
                let object = object.expect("an object");
                let place = |name: &str| image.all_symbols().find(|symbol| symbol.name == name);
                let symbol = |name: &str| object.symbols.iter().find(|symbol| symbol.name == name);
                for name in ["inner", "outer", "pick", "tail", "main"] {
                    let (Some(symbol), Some(there)) = (symbol(name), place(name)) else { continue };
                    assert!(is_same(&object, symbol, &image, &there), "{compiler} {model:?} {name}");
                    for other in ["inner", "outer", "pick", "tail", "main"].into_iter().filter(|other| *other != name) {
                        let Some(there) = place(other) else { continue };
                        assert!(
                            !is_same(&object, symbol, &image, &there),
                            "{compiler} {model:?}: {name} is not {other}"
                        );
                    }
                }
            }
        }
    }
}
