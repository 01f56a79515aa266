//! What belongs to a function: its cold parts, and not the functions that it jumps to.

use super::*;

#[test]
fn cold_parts_belong_to_the_function_also_without_symbols() {
    let shop = two_files(&[]);
    let image = shop.read("program");
    let victim = find(&image, "victim");
    let whole = image.body(&victim);
    assert!(whole.ranges.len() >= 2, "gcc splits victim: {whole:?}");
    assert_eq!(whole.ranges[0], victim.address..ImageOffset(victim.address.0 + victim.size));
    let bare = shop.stripped("program");
    let unnamed = bare.function_at(victim.address).expect("from the unwind table");
    assert_eq!(bare.body(&unnamed), whole);
    let addressed = FunctionQuery::parse(&victim.address.to_string());
    assert_eq!(bare.find_function(&addressed).expect("by address"), unnamed);
}

const JUMPS: &str = r#"
#include <stdio.h>
__attribute__((noinline, cold)) int slow(int x) { return printf("%d\n", x); }
/* Without a frame of their own: the cold part begins like a function. One returns by itself, one goes back. */
__attribute__((noinline)) int frameless(int x) {
    if (__builtin_expect(x == 7, 0)) return slow(x) + 1;
    return x * 3;
}
int global;
__attribute__((noinline)) int goes_back(int x) {
    if (__builtin_expect(x == 7, 0)) { global += slow(x) * 3; x = global; }
    __asm__ volatile("" : "+r"(x));
    return (x * 3) ^ global;
}
/* Tail calls: through the linker's stub, to a function, and to one that has no other caller. */
__attribute__((noinline)) int to_stub(const char *s) { return puts(s); }
__attribute__((noinline)) int second(int x) { return printf("second %d\n", x) + global; }
__attribute__((noinline)) int to_function(int x) { global = x; return second(x + 1); }
__attribute__((noinline)) static int only_here(int x) { return printf("only %d\n", x) * global; }
__attribute__((noinline)) int to_only(int x) { global = x; return only_here(x + 1); }
int main(int argc, char **argv) {
    return frameless(argc) + goes_back(argc) + to_stub(argv[0]) + to_function(argc) + second(argc) + to_only(argc);
}
"#;

#[test]
fn parts_are_told_from_functions_that_are_jumped_to() {
    for flags in [&["-fcf-protection=none"][..], &["-fcf-protection=full"], &["-no-pie"]] {
        let shop = Workshop::with(&[("j.c", JUMPS)]);
        shop.run("gcc", &[&["-O2", "-o", "j", "j.c"], flags].concat());
        let (image, bare) = (shop.read("j"), shop.stripped("j"));
        for (name, parts) in
            [("frameless", 2), ("goes_back", 2), ("to_stub", 1), ("to_function", 1), ("to_only", 1), ("second", 1)]
        {
            let function = find(&image, name);
            let body = image.body(&function);
            assert_eq!(body.ranges.len(), parts, "{name} {flags:?}: {body:?}");
            let unnamed = bare.function_at(function.address).expect(name);
            assert_eq!(bare.body(&unnamed), body, "{name} {flags:?}, stripped");
        }
    }
}

#[test]
fn a_function_in_assembly_without_size_has_the_bounds_of_its_unwind_table() {
    let source = r#"
int main(void) { return 0; }
__asm__(".text\n.globl sized_by_table\n.type sized_by_table, @function\nsized_by_table:\n.cfi_startproc\n"
        "mov %edi, %eax\nnop\nret\n.cfi_endproc\n"
        ".globl without_any\n.type without_any, @function\nwithout_any:\nnop\nret\n");
"#;
    let shop = Workshop::with(&[("s.c", source)]);
    shop.run("gcc", &["-O2", "-o", "s", "s.c"]);
    let image = shop.read("s");
    let sized = find(&image, "sized_by_table");
    assert_eq!((sized.size, sized.source), (4, BoundsSource::UnwindTable));
    assert!(matches!(why_not(&image, "without_any"), LookupError::UnknownSize(_)));
    assert_eq!(image.symbolise(ImageOffset(sized.address.0 + 5)), Some(("without_any".into(), 1)));
}

/// A handler in a part of its own, to which only the exception table leads: newer compilers split functions that way.
const HANDLER: &str = r#"
int main(void) { return 0; }
__asm__(".text\nthrows: ret\npersonality: ret\n"
        ".globl handled\n.type handled, @function\nhandled:\n.cfi_startproc\n"
        ".cfi_personality 0x1b, personality\n.cfi_lsda 0x1b, .Ltable\n"
        "push %rbx\n.cfi_def_cfa_offset 16\n.Lcall: call throws\n.Lcalled: pop %rbx\n.cfi_def_cfa_offset 8\nret\n"
        ".cfi_endproc\n.size handled, .-handled\n"
        ".p2align 4\n.Lcold:\n.cfi_startproc\n.cfi_def_cfa_offset 16\nnop\n.Lpad: xor %eax, %eax\npop %rbx\n"
        ".cfi_def_cfa_offset 8\nret\n.cfi_endproc\n.Lend:\n"
        ".section .gcc_except_table, \"a\"\n.Ltable: .byte 0x1b\n.long .Lcold - .\n.byte 0xff, 0x01\n"
        ".uleb128 .Lsites_end - .Lsites\n.Lsites:\n.uleb128 .Lcall - handled\n.uleb128 .Lcalled - .Lcall\n"
        ".uleb128 .Lpad - .Lcold\n.uleb128 0\n.Lsites_end:\n.text\n");
"#;

#[test]
fn a_handler_that_only_exceptions_reach_is_a_part() {
    let shop = Workshop::with(&[("h.c", HANDLER)]);
    shop.run("gcc", &["-O2", "-o", "h", "h.c"]);
    let (image, bare) = (shop.read("h"), shop.stripped("h"));
    let handled = find(&image, "handled");
    let body = image.body(&handled);
    assert_eq!(body.ranges.len(), 2, "{body:?}");
    // nop; xor; pop; ret
    assert_eq!(image.bytes_at(body.ranges[1].start, 5), Some(&[0x90, 0x31, 0xc0, 0x5b, 0xc3][..]));
    assert_eq!(bare.body(&bare.function_at(handled.address).expect("known")), body);
}
