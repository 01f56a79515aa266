//! Relocated entries, executed: what they compute must be what the whole function computes.

use super::harness::{Region, call, compile, compilers};
use crate::address::TargetAddr;
use crate::patch::prologue::{PrologueError, branches_into_window, entry_jump, relocate};
use iced_x86::{Decoder, DecoderOptions, FlowControl};
use object::{Object, ObjectSection, ObjectSymbol, SymbolKind};

/// The .text of an assembler file.
fn assemble(source: &str) -> Vec<u8> {
    let object = compile("gcc", &[], "s", &format!(".text\n{source}\n"));
    let file = object::File::parse(&*object).expect("an object");
    file.section_by_name(".text").expect("text").data().expect("text").to_vec()
}

/// Puts a function into memory, moves its first instructions away and overwrites them with traps; returns what the moved
/// entry computes. With `far`, the two are more than 2 GiB apart.
fn run_moved(code: &[u8], far: bool, argument: i64) -> Result<i64, PrologueError> {
    let region = Region::new(0x10000, true);
    let elsewhere = Region::new(0x1000, !far);
    let at = region.start + 0x1000;
    region.write(at, code);
    let moved = relocate(code, TargetAddr(at), 5, TargetAddr(elsewhere.start))?;
    assert!(moved.consumed >= 5 && moved.consumed <= code.len());
    // The rest must do without them.
    region.write(at, &vec![0xcc; moved.consumed]);
    elsewhere.write(elsewhere.start, &moved.bytes);
    region.protect(region.start, 0x10000, libc::PROT_READ | libc::PROT_EXEC);
    elsewhere.protect(elsewhere.start, 0x1000, libc::PROT_READ | libc::PROT_EXEC);
    Ok(call(elsewhere.start, argument))
}

/// Name, source, results for 0, 1, -5.
const FUNCTIONS: [(&str, &str, [i64; 3]); 11] = [
    ("push", "push %rbp; mov %rsp,%rbp; lea 3(%rdi),%rax; pop %rbp; ret", [3, 4, -2]),
    ("endbr", "endbr64; lea (%rdi,%rdi),%rax; ret", [0, 2, -10]),
    ("near", "mov value(%rip),%rax; add %rdi,%rax; ret; value: .quad 40", [40, 41, 35]),
    ("short branch", "test %rdi,%rdi; js 1f; mov $7,%eax; ret; 1: mov $8,%eax; ret", [7, 7, 8]),
    ("jump", "xor %eax,%eax; jmp 1f; nop; nop; 1: add %rdi,%rax; ret", [0, 1, -5]),
    ("branch within", "test %edi,%edi; je 1f; 1: nop; lea 1(%rdi),%rax; ret", [1, 2, -4]),
    ("jrcxz", "mov %rdi,%rcx; jrcxz 1f; mov $5,%eax; ret; 1: mov $6,%eax; ret", [6, 5, 5]),
    ("loop", "mov $3,%ecx; loop 1f; ud2; 1: lea (%rdi,%rcx),%rax; ret", [2, 3, -3]),
    (
        "call at the end",
        "sub $8,%rsp; nop; call 1f; add $8,%rsp; ret; 1: mov (%rsp),%rax; lea 1f(%rip),%rcx; sub %rcx,%rax; add %rdi,%rax; ret; 1:",
        [-23, -22, -28],
    ),
    ("indirect call", "lea 1f(%rip),%rax; call *%rax; inc %rax; ret; 1: mov %rdi,%rax; ret", [1, 2, -4]),
    ("tail", "cmp $0,%rdi; jge 1f; mov $2,%eax; ret; nop; 1: mov $1,%eax; ret", [1, 1, 2]),
];

#[test]
fn moved_entries_compute_what_the_function_does() {
    for (name, source, expected) in FUNCTIONS {
        let code = assemble(source);
        for (argument, expected) in [0, 1, -5].into_iter().zip(expected) {
            let result = run_moved(&code, false, argument).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(result, expected, "{name}({argument})");
            // The whole function, unmoved, says the same.
            let region = Region::new(0x1000, true);
            region.write(region.start, &code);
            region.protect(region.start, 0x1000, libc::PROT_READ | libc::PROT_EXEC);
            assert_eq!(call(region.start, argument), expected, "{name}({argument}) in place");
        }
    }
}

#[test]
fn branches_reach_over_any_distance() {
    for name in ["push", "short branch", "jump", "branch within", "jrcxz", "loop", "call at the end", "tail"] {
        let (_, source, expected) = FUNCTIONS.iter().find(|f| f.0 == name).expect("in the table");
        let code = assemble(source);
        for (argument, expected) in [0, 1, -5].into_iter().zip(*expected) {
            let result = run_moved(&code, true, argument).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(result, expected, "{name}({argument})");
        }
    }
}

#[test]
fn what_cant_be_moved_is_refused_with_the_reason() {
    for (source, reason) in [
        ("ret", "has 1 bytes"),
        ("int3; push %rbp; mov %rsp,%rbp; ret", "breakpoint"),
        ("1: dec %rdi; jne 1b; mov %rdi,%rax; ret", "branches into the middle of an instruction or moves"),
        ("nop; 1: dec %rdi; nop; nop; nop; nop; jne 1b; ret", "jumps back"),
        ("1: nop; nop; nop; nop; nop; dec %rdi; jne 1b; ret", "jumps back"),
        ("call 1f; 1: pop %rax; ret", ""),
        (".byte 0xe8, 0, 0, 0, 0; pop %rax; ret", ""),
        ("push %rax; .byte 0xff, 0xd0; nop; nop; ret", "entry jump overwrites"),
        ("sub $8,%rsp; call *8(%rsp); nop; ret", "through the stack"),
        ("ljmp *(%rax); nop; nop; nop; ret", "code segment"),
        ("xbegin 1f; 1: ret; nop; nop", "transaction"),
        (".byte 0x06; nop; nop; nop; nop; nop", "no instruction"),
        ("mov 1f(%eip),%eax; 1: ret", "32-bit instruction pointer"),
    ] {
        let code = assemble(source);
        let moved = relocate(&code, TargetAddr(0x40_0000), 5, TargetAddr(0x50_0000));
        match (moved, reason) {
            // get-pc: pushes the old address and goes on in the old code.
            (Ok(moved), "") => assert_eq!(moved.consumed, 5, "{source}"),
            // A loop of the window's own instructions moves with them.
            (Ok(moved), r) if r.ends_with("or moves") => assert!(moved.consumed >= 5, "{source}"),
            (Ok(moved), _) => panic!("{source}: moved to {:02x?}", moved.bytes),
            (Err(e), _) => assert!(!reason.is_empty() && e.to_string().contains(reason), "{source}: {e}"),
        }
    }
}

#[test]
fn data_out_of_reach_is_refused() {
    let code = assemble("mov value(%rip),%rax; ret; value: .quad 40");
    let error = relocate(&code, TargetAddr(0x40_0000), 5, TargetAddr(0x7f00_0000_0000)).expect_err("out of reach");
    assert!(matches!(error, PrologueError::OutOfReach { to: TargetAddr(0x40_0008), .. }), "{error}");
}

#[test]
fn branches_into_the_window_are_found() {
    let at = TargetAddr(0x1000);
    let window = at..at.offset(5);
    let code = assemble("nop; 1: nop; nop; nop; nop; nop; dec %edi; jne 1b; ret");
    assert_eq!(branches_into_window(&code, at, window.clone()), Some(at.offset(8)));
    let entry = assemble("1: nop; nop; nop; nop; nop; nop; dec %edi; jne 1b; ret");
    assert_eq!(branches_into_window(&entry, at, window.clone()), None, "the entry is fine");
    let inside = assemble("test %edi,%edi; je 1f; 1: nop; ret");
    assert_eq!(branches_into_window(&inside, at, window), None, "the window's own branches are overwritten");
}

#[test]
fn entry_jumps_reach_two_gigabytes() {
    let from = TargetAddr(0x7f00_0000_0000);
    assert_eq!(entry_jump(from, from.offset(5)), Some([0xe9, 0, 0, 0, 0]));
    assert_eq!(entry_jump(from, from.offset(0x7fff_ffff + 5)), Some([0xe9, 0xff, 0xff, 0xff, 0x7f]));
    assert_eq!(entry_jump(from, from.offset(0x8000_0000 + 5)), None);
    assert_eq!(entry_jump(from, from.offset(-0x8000_0000 + 5)), Some([0xe9, 0, 0, 0, 0x80]));
    assert_eq!(entry_jump(from, from.offset(-0x8000_0001 + 5)), None);
}

/// What a function should compute.
type Model = fn(i64) -> i64;

/// Functions as compilers make them: every one that can be moved must still work when it was.
#[test]
fn entries_made_by_compilers_move() {
    let source = r"
        long fib(long n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
        long sum(long n) { long s = 0; for (long i = 0; i < n; i++) s += i * i; return s; }
        long bits(long n) { long c = 0; for (unsigned long v = n; v; v >>= 1) c += v & 1; return c; }
        long pick(long n) { switch (n & 7) { case 0: return 11; case 1: return 5; case 3: return n; default: return -n; } }
        long clamp(long n) { if (n < 3) return 3; if (n > 9) return 9; return n; }
        static volatile long total = 5; long add(long n) { return n + total; }
        double half(long n) { return n * 0.5; } long halves(long n) { return (long)(half(n) * 4); }
    ";
    let expected: [(&str, Model); 5] = [
        ("fib", |n| (0..n).fold((0, 1), |(a, b), _| (b, a + b)).0),
        ("sum", |n| (0..n).map(|i| i * i).sum()),
        ("bits", |n| i64::from(n.count_ones())),
        ("pick", |n| match n & 7 {
            0 => 11,
            1 => 5,
            3 => n,
            _ => -n,
        }),
        ("clamp", |n| n.clamp(3, 9)),
    ];
    let mut moved = 0;
    for compiler in compilers(&["gcc", "clang"]) {
        for level in ["-O0", "-O1", "-O2", "-O3", "-Os"] {
            let flags = [level, "-fPIC", "-fno-jump-tables", "-fcf-protection=none"];
            let object = super::harness::read(vec![compile(compiler, &flags, "c", source)]).expect("an object");
            for (name, model) in expected {
                let patch =
                    super::harness::load(&object, true, &[], super::harness::Symbols::default()).expect("links");
                let range = patch.patch.function_range(name).expect("a function");
                let size = range.end.wrapping_distance(range.start) as usize;
                // SAFETY: the function's own bytes, mapped while `patch` lives.
                let code = unsafe { std::slice::from_raw_parts(range.start.0 as *const u8, size) };
                let elsewhere = Region::new(4096, true);
                let Ok(entry) = relocate(code, range.start, 5, TargetAddr(elsewhere.start)) else { continue };
                elsewhere.write(elsewhere.start, &entry.bytes);
                elsewhere.protect(elsewhere.start, 4096, libc::PROT_READ | libc::PROT_EXEC);
                for n in [0, 1, 2, 7, 12] {
                    assert_eq!(call(elsewhere.start, n), model(n), "{compiler} {level} {name}({n})");
                }
                moved += 1;
            }
        }
    }
    assert!(moved >= 40, "only {moved} of 50 entries could be moved");
}

/// libc is written by people who know every trick: nearly all of its functions can be moved, and what the moved
/// instructions address is what the old ones did.
#[test]
fn entries_of_libc_move() {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("own maps");
    let path = maps.lines().find_map(|l| l.split_whitespace().nth(5).filter(|p| p.contains("/libc.so"))).expect("libc");
    let bytes = std::fs::read(path).expect("libc");
    let file = object::File::parse(&*bytes).expect("an ELF file");
    let text = file.section_by_name(".text").expect("text");
    let (start, data) = (text.address(), text.data().expect("text"));
    let (mut moved, mut refused) = (0, Vec::new());
    for symbol in file.dynamic_symbols().filter(|s| s.is_definition() && s.kind() == SymbolKind::Text && s.size() >= 5)
    {
        let Some(offset) = symbol.address().checked_sub(start).map(|o| o as usize) else { continue };
        let Some(code) = data.get(offset..offset + symbol.size() as usize) else { continue };
        let destination = TargetAddr(0x1000_0000);
        match relocate(code, TargetAddr(symbol.address()), 5, destination) {
            Ok(entry) => {
                moved += 1;
                let old = addressed(&code[..entry.consumed], symbol.address());
                let new = addressed(&entry.bytes, destination.0);
                assert_eq!(new, old, "{}", symbol.name().unwrap_or_default());
            }
            Err(e) => refused.push(format!("{}: {e}", symbol.name().unwrap_or_default())),
        }
    }
    assert!(moved > 1000 && refused.len() * 50 < moved, "{moved} moved; refused: {refused:#?}");
}

/// What instructions address relative to themselves, far jumps of the relocation excepted.
fn addressed(code: &[u8], at: u64) -> Vec<u64> {
    let decoder = Decoder::with_ip(64, code, at, DecoderOptions::NONE);
    decoder
        .into_iter()
        .filter(|i| i.is_ip_rel_memory_operand() && i.flow_control() != FlowControl::IndirectBranch)
        .map(|i| i.ip_rel_memory_address())
        .collect()
}

#[test]
fn padding_behind_a_short_function_gives_it_room() {
    for padding in ["int3; int3; int3; int3", "nopl 0(%rax)", "nop; nop; nop; nop"] {
        let code = assemble(&format!("lea 1(%rdi),%eax; ret; {padding}"));
        assert_eq!(run_moved(&code, false, 41), Ok(42), "{padding}");
    }
}
