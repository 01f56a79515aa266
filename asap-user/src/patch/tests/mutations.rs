//! Damaged objects: an error or a result, never a panic. ASAP_TEST_SEED repeats a run.

use super::harness::compile;
use crate::patch::{Bases, Import, ImportKind, PatchObject, Resolution, Resolver, prologue};
use crate::{address::TargetAddr, random::Random};
use std::panic::catch_unwind;

/// Has everything.
pub(super) struct Everything;

impl Resolver for Everything {
    fn resolve(&self, import: &Import) -> Option<Resolution> {
        Some(match import.kind {
            ImportKind::Any => Resolution::Address(TargetAddr(0x5000_0000)),
            ImportKind::Tls => Resolution::TlsOffset(-64),
        })
    }

    fn original(&self, _: &str) -> Option<TargetAddr> {
        Some(TargetAddr(0x5000_1000))
    }
}

fn use_all(bytes: Vec<u8>) -> bool {
    let Ok(object) = PatchObject::read(&[("fix.o".to_owned(), bytes)]) else { return false };
    let _ = (object.functions(), object.variables(), object.imports(), object.originals());
    let _ = (object.replacements().len(), object.hooks().all().count());
    let bases = Bases { code: TargetAddr(0x4000_0000), rodata: TargetAddr(0x4800_0000), data: TargetAddr(0x4c00_0000) };
    let Ok(patch) = object.link(&bases, &Everything) else { return false };
    for symbol in &patch.symbols {
        let _ = (patch.symbol(&symbol.name), patch.function_range(&symbol.name));
    }
    true
}

fn samples() -> Vec<Vec<u8>> {
    let cxx = r#"
        #include <asap-patch.h>
        extern "C" { long f(long); extern __thread long t; extern long v; long g(long); }
        ASAP_REPLACE(f); ASAP_IMPORT(v, "a.c:v");
        inline long counted(long n) { static long count = n; return count += n; }
        long f(long n) { try { return g(n) + v + t + ASAP_ORIGINAL(f)(n); } catch (int e) { return counted(e); } }
        static int before() { return 0; }
        ASAP_PRE_APPLY(before);
    "#;
    let mut samples = vec![
        compile("g++", &["-O1", "-fPIC"], "cc", cxx),
        compile("g++", &["-O1", "-fPIC", "-mcmodel=large"], "cc", cxx),
        compile("g++", &["-O0", "-fPIC", "-mtls-dialect=gnu2", "-fno-plt"], "cc", cxx),
    ];
    let c = "long c; static const char *n[] = {\"a\", \"b\"}; long f(long i) { c++; return n[i][0]; }";
    samples.push(compile("gcc", &["-O2", "-fPIC", "-fcommon"], "c", c));
    samples
}

#[test]
fn damaged_objects_never_panic() {
    let mut random = Random::new();
    let seed = random.seed;
    let samples = samples();
    for sample in &samples {
        assert!(use_all(sample.clone()), "undamaged, it links");
    }
    let (mut survived, mut refused) = (0, 0);
    for round in 0..12_000 {
        let mut bytes = samples[round % samples.len()].clone();
        for _ in 0..=random.below(4) {
            let at = random.below(bytes.len());
            match random.below(4) {
                0 => bytes[at] ^= 1 << random.below(8),
                1 => bytes[at] = random.next() as u8,
                2 => {
                    // Aligned fields with extreme values: headers, sizes, offsets, indexes.
                    let at = at & !7;
                    let value = [0, u64::MAX, 1 << 31, 1 << 63, 0xffff_fff0][random.below(5)];
                    let width = [2, 4, 8][random.below(3)].min(bytes.len() - at);
                    bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
                }
                _ => {
                    // A field of the section headers, which decide over everything else.
                    let table = bytes.len().saturating_sub(64 * 24);
                    let at = table + random.below(bytes.len() - table);
                    bytes[at] = random.next() as u8;
                }
            }
        }
        match catch_unwind(|| use_all(bytes)) {
            Ok(true) => survived += 1,
            Ok(false) => refused += 1,
            Err(_) => panic!("round {round} of ASAP_TEST_SEED={seed} panicked"),
        }
    }
    assert!(survived > 100 && refused > 100, "{survived} linked, {refused} refused: the damage does not vary");
}

#[test]
fn random_bytes_as_prologues_never_panic() {
    let mut random = Random::new();
    let seed = random.seed;
    let mut moved = 0;
    for round in 0..50_000 {
        let code: Vec<u8> = (0..random.below(40)).map(|_| random.next() as u8).collect();
        let at = TargetAddr(random.next() >> random.below(64));
        let destination = TargetAddr(if random.below(2) == 0 { at.0.wrapping_add(0x10000) } else { random.next() });
        let result = catch_unwind(|| {
            let _ = prologue::branches_into_window(&code, at, at..at.offset(5));
            let _ = prologue::entry_jump(at, destination);
            prologue::relocate(&code, at, 5, destination).is_ok_and(|p| p.consumed >= 5 && p.consumed <= code.len())
        });
        moved += usize::from(
            result.unwrap_or_else(|_| panic!("round {round} of ASAP_TEST_SEED={seed} panicked: {code:02x?}")),
        );
    }
    assert!(moved > 1000, "only {moved} could be moved");
}
