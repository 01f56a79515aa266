//! Unwind tables of a target, and its stack, both made to hurt: two bytes say how long the table is, then it, then the stack.

use crate::{
    address::TargetAddr,
    quiesce::unwind::{Unwinder, WalkRegisters},
};

/// Where the code is, and its length.
const CODE: (u64, u64) = (0x1000, 0x4000);
const STACK: u64 = 0x7000_0000;
/// More words than this are not read for one walk: 8192 frames, each with sixteen registers, some by an expression.
const READS_MOST: u64 = 8192 * 17 * 256;

pub(super) fn check(bytes: &[u8]) {
    let Some((&[low, high], rest)) = bytes.split_first_chunk() else { return };
    let length = usize::from(u16::from_le_bytes([low, high])).min(rest.len());
    let (table, stack) = rest.split_at(length);
    let mut unwinder = Unwinder::new();
    unwinder.add_code(TargetAddr(CODE.0)..TargetAddr(CODE.0 + CODE.1), table.to_vec(), TargetAddr(0x8000));
    for ip in [0x1010, 0x1000, 0x2020, 0x3030, 0] {
        let mut reads = 0;
        let registers = WalkRegisters::bare(ip, STACK).with_preserved([1, STACK + 64, 3, STACK, 5, u64::MAX]);
        let walk = unwinder.walk(&registers, &mut |at| {
            reads += 1;
            let offset = usize::try_from(at.checked_sub(STACK)?).ok()?;
            let word = stack.get(offset..offset.checked_add(8)?)?;
            word.try_into().ok().map(u64::from_le_bytes)
        });
        assert!(walk.frames.len() <= 8192 && reads <= READS_MOST);
        let _ = unwinder.stack_is_as_at_entry(TargetAddr(ip));
    }
}
