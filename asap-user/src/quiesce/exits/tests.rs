//! Exits of hand-made bytes, and of what compilers make.

use super::*;
use crate::image::{FunctionQuery, ImageBytes};
use std::{fs, process::Command};

/// Code at 0x1000, and nothing else.
struct Bare(&'static [u8]);

impl Surroundings for Bare {
    fn bytes(&self, at: ImageOffset, length: usize) -> Option<&[u8]> {
        let offset = usize::try_from(at.0.checked_sub(0x1000)?).ok()?;
        self.0.get(offset..offset.checked_add(length)?)
    }

    fn stack_is_as_at_entry(&self, _at: ImageOffset) -> Option<bool> {
        None
    }
}

fn of_bytes(code: &'static [u8]) -> Exits {
    find(&[ImageOffset(0x1000)..ImageOffset(0x1000 + code.len() as u64)], &Bare(code))
}

const fn at(offset: u64) -> ImageOffset {
    ImageOffset(0x1000 + offset)
}

#[test]
fn plain_exits_are_found() {
    // test edi, edi; je +1; ret; jmp 0x2000
    let exits = of_bytes(&[0x85, 0xff, 0x74, 0x01, 0xc3, 0xe9, 0xf6, 0x0f, 0, 0]);
    let expected =
        [Exit { at: at(4), kind: ExitKind::Return }, Exit { at: at(5), kind: ExitKind::TailJump(ImageOffset(0x2000)) }];
    assert_eq!(exits, Exits { found: expected.to_vec(), doubts: Vec::new() });
    // A loop to the entry; jmp [rip+0] through a slot.
    assert_eq!(of_bytes(&[0x90, 0xeb, 0xfd]).found, [Exit { at: at(1), kind: ExitKind::ToEntry }]);
    let slot = of_bytes(&[0xff, 0x25, 0, 0, 0, 0]);
    assert_eq!(slot.found, [Exit { at: at(0), kind: ExitKind::IndirectTailJump }]);
    assert!(slot.are_countable());
}

#[test]
fn what_cannot_be_counted_is_said() {
    // je out
    assert_eq!(of_bytes(&[0x74, 0x70, 0xc3]).doubts, [Uncountable::Conditional(at(0))]);
    // nop; nop: runs on
    assert_eq!(of_bytes(&[0x31, 0xc0]).doubts, [Uncountable::FallsThrough(at(0))]);
    // jmp rax, from nowhere
    assert_eq!(of_bytes(&[0xff, 0xe0]).doubts, [Uncountable::Indirect(at(0))]);
    // mov rax, [rdi]; jmp rax; a label that nothing else reaches: ret
    assert_eq!(of_bytes(&[0x48, 0x8b, 0x07, 0xff, 0xe0, 0xc3]).doubts, [Uncountable::Indirect(at(3))]);
    // iretq
    assert_eq!(of_bytes(&[0x48, 0xcf]).doubts, [Uncountable::Strange(at(0))]);
    // Not an instruction in 64-bit mode; a jump into the middle of one.
    assert_eq!(of_bytes(&[0x06, 0xc3]).doubts, [Uncountable::Undecodable(at(0))]);
    let middle = Uncountable::Overlapping { at: at(5), target: at(1) };
    assert_eq!(of_bytes(&[0xb8, 1, 2, 3, 4, 0xeb, 0xfa]).doubts, [middle]);
    // Bytes that the file does not have.
    let missing = find(&[at(0)..at(64)], &Bare(&[0xc3]));
    assert_eq!(missing.doubts, [Uncountable::Missing(at(0))]);
}

#[test]
fn padding_and_calls_that_do_not_return_end_a_function() {
    // ret; nop
    assert!(of_bytes(&[0xc3, 0x66, 0x90]).are_countable());
    // call out
    assert!(of_bytes(&[0xe8, 0, 0x10, 0, 0]).are_countable());
    // xor eax, eax; nop
    assert_eq!(of_bytes(&[0x31, 0xc0, 0x90]).doubts, [Uncountable::FallsThrough(at(2))]);
}

const SOURCE: &str = r#"
struct object { int (*method)(struct object *, int); };
extern int (*table[])(int);
__attribute__((noinline)) int g(int x) { __asm__ volatile("" ::: "memory"); return x + 1; }
__attribute__((noinline)) int many(int x) {
    switch (x) {
    case 0: return g(1);     case 1: return g(7) + 1; case 2: return g(9) * 3; case 3: return x ^ 77;
    case 4: return g(0) - 1; case 5: return g(3) | 1; case 6: return g(12) & 5; case 9: return g(4) + 9;
    }
    return 0;
}
__attribute__((noinline)) int tail(int x) { return g(x + 1); }
__attribute__((noinline)) int method(struct object *o, int x) { return o->method(o, x * 3); }
__attribute__((noinline)) int plain(int x) { return g(x) + g(x + 2); }
__attribute__((noinline)) long threaded(const char *code, long x) {
    static void *const labels[] = { &&add, &&twice, &&end };
    goto *labels[(int)*code++];
add: x += 3; goto *labels[(int)*code++];
twice: x *= 2; goto *labels[(int)*code++];
end: return x;
}
int (*table[])(int) = { g, tail };
int main(int c, char **v) { struct object o = { 0 }; (void)v; return many(c) + tail(c) + method(&o, c) + plain(c) + threaded("", c); }
"#;

fn build(compiler: &str, flags: &[&str]) -> Option<Arc<Image>> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    fs::write(directory.path().join("f.c"), SOURCE).expect("written");
    let status = Command::new(compiler).current_dir(&directory).args(flags).args(["-o", "f", "f.c"]).status().ok()?;
    assert!(status.success(), "{compiler} {flags:?}");
    let bytes = fs::read(directory.path().join("f")).expect("built");
    Some(Arc::new(Image::parse("f", ImageBytes::from(bytes)).expect("an image")))
}

fn exits_of(image: &Arc<Image>, name: &str) -> Exits {
    let function = image.find_function(&FunctionQuery::parse(name)).expect("in the fixture");
    find_in_image(image, &image.body(&function).ranges)
}

#[test]
fn exits_of_compiled_functions_are_found() {
    for (compiler, flags) in [
        ("gcc", &["-O2"][..]),
        ("gcc", &["-O2", "-fno-pie", "-no-pie", "-fcf-protection=none"]),
        ("gcc", &["-O3", "-fPIC", "-fcf-protection=full", "-fno-omit-frame-pointer"]),
        ("clang", &["-O2"]),
        ("clang", &["-O2", "-fno-pie", "-no-pie"]),
    ] {
        let Some(image) = build(compiler, flags) else {
            eprintln!("SKIPPED (no {compiler}): exits_of_compiled_functions_are_found");
            continue;
        };
        let context = format!("{compiler} {flags:?}");
        for name in ["many", "plain"] {
            let exits = exits_of(&image, name);
            assert!(exits.are_countable(), "{context}: {name}: {exits:?}");
            assert!(exits.found.iter().any(|exit| exit.kind == ExitKind::Return), "{context}: {name}: {exits:?}");
        }
        let g = image.find_function(&FunctionQuery::parse("g")).expect("in the fixture").address;
        let tail = exits_of(&image, "tail");
        assert!(tail.are_countable(), "{context}: {tail:?}");
        assert_eq!(tail.found.iter().map(|exit| exit.kind).collect::<Vec<_>>(), [ExitKind::TailJump(g)], "{context}");
        let method = exits_of(&image, "method");
        let kinds: Vec<_> = method.found.iter().map(|exit| exit.kind).collect();
        assert_eq!((kinds, method.doubts.len()), (vec![ExitKind::IndirectTailJump], 0), "{context}");
        // Each jump may go to any label: it does not leave, whatever is found out about it.
        let threaded = exits_of(&image, "threaded");
        let leaves = threaded.found.iter().any(|exit| exit.kind == ExitKind::IndirectTailJump);
        assert!(!leaves, "{context}: {threaded:?}");
    }
}

#[test]
fn most_functions_of_the_c_library_can_be_counted() {
    let Ok(maps) = fs::read_to_string("/proc/self/maps") else { return };
    let path =
        maps.lines().filter_map(|line| line.split_ascii_whitespace().nth(5)).find(|path| path.contains("/libc.so"));
    let Some(path) = path else {
        eprintln!("SKIPPED (no libc.so): most_functions_of_the_c_library_can_be_counted");
        return;
    };
    let bytes = fs::read(path).expect("mapped");
    let image = Arc::new(Image::parse(path, ImageBytes::from(bytes)).expect("an image"));
    let (mut all, mut countable) = (0, 0);
    for function in image.functions().take(1500) {
        let exits = find_in_image(&image, &image.body(&function).ranges);
        all += 1;
        countable += usize::from(exits.are_countable());
        assert!(exits.found.windows(2).all(|pair| pair[0].at < pair[1].at), "each exit once, in order");
    }
    assert!(countable * 10 > all * 8, "{countable} of {all}");
    eprintln!("{countable} of {all} functions of {path} have exits that can be counted");
}
