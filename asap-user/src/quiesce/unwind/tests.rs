//! Walks over stacks and unwind tables made by hand: no process is needed to lie to an unwinder.

use super::*;

/// Instructions of a table (DWARF 5, 6.4.2). The CIE says: CFA is rsp + 8, the return address lies at CFA - 8.
const PUSHED_RBP: &[u8] = &[0x0e, 16, 0x86, 2]; // CFA is rsp + 16; rbp lies at CFA - 16
const FRAME_POINTER: &[u8] = &[0x0c, 6, 16, 0x86, 2]; // CFA is rbp + 16; rbp lies at CFA - 16
const BOTTOM: &[u8] = &[0x07, 16]; // the return address is undefined
const RBP_LOST: &[u8] = &[0x07, 6];
const CFA_IN_RBP: &[u8] = &[0x0f, 2, 0x76, 16]; // CFA is the value of an expression: rbp + 16

/// An .eh_frame with one CIE and one FDE.
fn eh_frame(range: &Range<u64>, instructions: &[u8]) -> Vec<u8> {
    fn entry(out: &mut Vec<u8>, mut body: Vec<u8>) {
        // The length does not count itself; no-ops fill up to a multiple of eight.
        body.resize((body.len() + 4).next_multiple_of(8) - 4, 0);
        out.extend_from_slice(&(body.len() as u32).to_le_bytes());
        out.extend_from_slice(&body);
    }
    let mut out = Vec::new();
    // CIE: id 0, version 1, no augmentation, code by 1, data by -8, return address in 16; def_cfa rsp 8; offset 16 1.
    entry(&mut out, [&0_u32.to_le_bytes()[..], &[1, 0, 1, 0x78, 16, 0x0c, 7, 8, 0x90, 1]].concat());
    let to_cie = out.len() as u32 + 4;
    let length = range.end - range.start;
    let head = [&to_cie.to_le_bytes()[..], &range.start.to_le_bytes(), &length.to_le_bytes()].concat();
    entry(&mut out, [&head[..], instructions].concat());
    out.extend_from_slice(&0_u32.to_le_bytes());
    out
}

/// Functions at 0x1000, 0x2000, ..., each 0x100 long, with these tables.
fn unwinder(functions: &[&[u8]]) -> Unwinder {
    let mut unwinder = Unwinder::new();
    for (start, instructions) in (0x1000..).step_by(0x1000).zip(functions) {
        let range = start..start + 0x100;
        unwinder.add_code(
            TargetAddr(range.start)..TargetAddr(range.end),
            eh_frame(&range, instructions),
            TargetAddr(0),
        );
    }
    unwinder
}

const STACK: u64 = 0x7000_0000;

/// Walks from `ip`; the stack holds `words` from its pointer upwards.
fn walk(unwinder: &mut Unwinder, ip: u64, rbp: Option<u64>, words: &[u64]) -> (Vec<u64>, WalkEnd) {
    let mut registers = WalkRegisters::bare(ip, STACK);
    registers.values[6] = rbp;
    let walk = unwinder.walk(&registers, &mut |at| {
        let offset = at.checked_sub(STACK)?;
        (offset % 8 == 0).then(|| words.get(usize::try_from(offset / 8).ok()?).copied())?
    });
    (walk.frames.iter().map(|frame| frame.0).collect(), walk.end)
}

#[test]
fn a_stack_is_walked_to_its_bottom() {
    let mut unwinder = unwinder(&[&[], PUSHED_RBP, BOTTOM]);
    let (frames, end) = walk(&mut unwinder, 0x1010, None, &[0x2020, 77, 0x3030]);
    assert_eq!((frames, end), (vec![0x1010, 0x2020, 0x3030], WalkEnd::Complete));
    // A return address of zero ends a stack too (psABI, 3.4.1).
    let (frames, end) = walk(&mut unwinder, 0x1010, None, &[0]);
    assert_eq!((frames, end), (vec![0x1010], WalkEnd::Complete));
}

#[test]
fn a_call_at_the_end_of_a_function_belongs_to_it() {
    let mut unwinder = unwinder(&[&[], BOTTOM]);
    assert_eq!(walk(&mut unwinder, 0x1000, None, &[0x2100]).1, WalkEnd::Complete);
    // To stand there is to be elsewhere.
    assert!(matches!(walk(&mut unwinder, 0x2100, None, &[]).1, WalkEnd::Truncated(_)));
    // The same address, both ways, in one walk: what is remembered of one is not taken for the other.
    assert_eq!(walk(&mut unwinder, 0x1000, None, &[0x2100]).1, WalkEnd::Complete);
}

#[test]
fn registers_that_are_not_known_are_not_guessed() {
    for frame_pointer in [FRAME_POINTER, CFA_IN_RBP] {
        let mut unwinder = unwinder(&[frame_pointer, BOTTOM, RBP_LOST]);
        let words = [1, 2, STACK + 0x100, 0x2020];
        assert_eq!(walk(&mut unwinder, 0x1010, Some(STACK + 16), &words).1, WalkEnd::Complete);
        let unknown = (vec![0x1010], WalkEnd::Truncated("a register that is not known"));
        assert_eq!(walk(&mut unwinder, 0x1010, None, &words), unknown);
        // A function in between does not say where it left rbp.
        let (frames, end) = walk(&mut unwinder, 0x3010, Some(STACK + 16), &[0x1020, 0, STACK, 0x2020]);
        assert_eq!((frames, end), (vec![0x3010, 0x1020], WalkEnd::Truncated("a register that is not known")));
    }
}

#[test]
fn a_saved_frame_pointer_is_found_again() {
    let mut unwinder = unwinder(&[PUSHED_RBP, FRAME_POINTER, BOTTOM]);
    let words = [STACK + 32, 0x2020, 5, 6, 7, 0x3030];
    let (frames, end) = walk(&mut unwinder, 0x1010, None, &words);
    assert_eq!((frames, end), (vec![0x1010, 0x2020, 0x3030], WalkEnd::Complete));
}

#[test]
fn stacks_that_lie_come_to_an_end() {
    let mut unwinder = unwinder(&[FRAME_POINTER, &[]]);
    // A frame that is its own caller.
    let (frames, end) = walk(&mut unwinder, 0x1010, Some(STACK), &[STACK, 0x1010]);
    assert_eq!(end, WalkEnd::Truncated("the stack does not grow downwards"), "{frames:x?}");
    // Frames without end.
    let (frames, end) = walk(&mut unwinder, 0x2010, None, &vec![0x2020; 2 * FRAMES_MOST]);
    assert_eq!((frames.len(), end), (FRAMES_MOST, WalkEnd::Truncated("too many frames")));
    // Memory that is not there, and addresses at the end of the world.
    assert_eq!(walk(&mut unwinder, 0x2010, None, &[]).1, WalkEnd::Truncated("the stack can't be read"));
    assert!(matches!(walk(&mut unwinder, 0x1010, Some(u64::MAX), &[]).1, WalkEnd::Truncated(_)));
    assert!(matches!(walk(&mut unwinder, u64::MAX, None, &[]).1, WalkEnd::Truncated(_)));
    assert!(matches!(walk(&mut unwinder, 0x2010, None, &[0x5555]).1, WalkEnd::Truncated(_)));
}

#[test]
fn a_signal_frame_without_tables_is_known_by_its_trampoline() {
    let mut unwinder = unwinder(&[&[], FRAME_POINTER, BOTTOM]);
    let trampoline = *b"\x48\xc7\xc0\x0f\0\0\0\x0f\x05\0\0\0\0\0\0\0";
    // The handler at 0x1010 ran on another stack, above the interrupted one. Its return address is the trampoline; then come
    // flags, link and stack of the ucontext, and the registers: rbp is the tenth, rsp and rip are the last two.
    let mut words = [0_u64; 64];
    words[0] = 0x9000;
    let registers = 1 + 5;
    let other = STACK - 0x1000;
    words[registers + 10] = other;
    words[registers + 15] = other - 64;
    words[registers + 16] = 0x2000;
    let read = |at: u64| match at {
        0x9000 | 0x9008 => trampoline[(at - 0x9000) as usize..][..8].try_into().ok().map(u64::from_le_bytes),
        _ if at == other => Some(0),
        _ if at == other + 8 => Some(0x3030),
        _ => words.get(usize::try_from(at.checked_sub(STACK)? / 8).ok()?).copied(),
    };
    let walk = unwinder.walk(&WalkRegisters::bare(0x1010, STACK), &mut { read });
    // The interrupted function stood at its first byte: looked up there, and not before.
    let frames: Vec<u64> = walk.frames.iter().map(|frame| frame.0).collect();
    assert_eq!((frames, walk.end), (vec![0x1010, 0x9000, 0x2000, 0x3030], WalkEnd::Complete));
    // Any other code without a table stays unknown.
    let walk =
        unwinder.walk(&WalkRegisters::bare(0x1010, STACK), &mut |at| if at == STACK { Some(0x9900) } else { None });
    assert_eq!(walk.end, WalkEnd::Truncated("it leads outside all known code"));
}

#[test]
fn code_that_was_removed_is_unknown() {
    let mut unwinder = unwinder(&[&[], BOTTOM]);
    assert_eq!(walk(&mut unwinder, 0x1010, None, &[0x2020]).1, WalkEnd::Complete);
    unwinder.remove(TargetAddr(0x2000));
    let (frames, end) = walk(&mut unwinder, 0x1010, None, &[0x2020]);
    assert_eq!((frames, end), (vec![0x1010, 0x2020], WalkEnd::Truncated("it leads outside all known code")));
}

#[test]
fn damaged_tables_end_a_walk_and_nothing_else() {
    let range = 0x1000..0x1100;
    let good = eh_frame(&range, FRAME_POINTER);
    for position in 0..good.len() {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut bad = good.clone();
            bad[position] = value;
            let mut unwinder = Unwinder::new();
            unwinder.add_code(TargetAddr(0x1000)..TargetAddr(0x1100), bad, TargetAddr(0));
            let (frames, _) = walk(&mut unwinder, 0x1010, Some(STACK), &[STACK, 0x1010]);
            assert!(frames.len() <= FRAMES_MOST);
        }
    }
    for length in 0..good.len() {
        let mut unwinder = Unwinder::new();
        unwinder.add_code(TargetAddr(0x1000)..TargetAddr(0x1100), good[..length].to_vec(), TargetAddr(0));
        let _ = walk(&mut unwinder, 0x1010, Some(STACK), &[STACK, 0x1010]);
    }
}

#[test]
fn where_the_stack_is_as_at_entry_is_told() {
    let unwinder = unwinder(&[&[], PUSHED_RBP, FRAME_POINTER, CFA_IN_RBP]);
    let told: Vec<_> = (1..6).map(|n| unwinder.stack_is_as_at_entry(TargetAddr(0x1000 * n + 8))).collect();
    assert_eq!(told, [Some(true), Some(false), Some(false), None, None]);
}
