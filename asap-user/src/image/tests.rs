//! Images of real compilers, made by the tests.

use super::*;
use std::{fs, path::PathBuf, process::Command};

struct Built(PathBuf);

impl Drop for Built {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const SOURCE_A: &str = r#"
#include <stdio.h>
#include <stdlib.h>
extern int other(int);
__thread int counter = 3;
int shared_value = 5;
__attribute__((noinline)) static int twin(int x) { return x * 3 + counter; }
__attribute__((noinline, cold)) static void fail(const char *s) { fprintf(stderr, "%s\n", s); exit(1); }
__attribute__((noinline)) int victim(int x) {
    if (__builtin_expect(x == 7777, 0)) { fail("seven"); fail(getenv("A")); }
    if (__builtin_expect(x == 8888, 0)) { fprintf(stderr, "eight %d\n", x); abort(); }
    return twin(x) + shared_value;
}
int main(int argc, char **argv) { printf("%d\n", victim(argc) + other(argc)); return 0; }
"#;
const SOURCE_B: &str = r#"
__attribute__((noinline)) static int twin(int x) { return x * 5; }
int other(int x) { return twin(x) + 1; }
"#;

fn build(name: &str, flags: &[&str]) -> (Built, PathBuf) {
    let directory = std::env::temp_dir().join(format!("asap-image-{}-{name}", std::process::id()));
    fs::create_dir_all(&directory).expect("a temporary directory");
    fs::write(directory.join("a.c"), SOURCE_A).expect("written");
    fs::write(directory.join("b.c"), SOURCE_B).expect("written");
    let output = directory.join("program");
    let status = Command::new("gcc")
        .current_dir(&directory)
        .args(["-O2", "-o", "program", "a.c", "b.c"])
        .args(flags)
        .status()
        .expect("gcc runs");
    assert!(status.success());
    (Built(directory), output)
}

fn read(path: &std::path::Path) -> Image {
    Image::parse(&path.to_string_lossy(), ImageBytes::from(fs::read(path).expect("built"))).expect("an image")
}

#[test]
fn functions_are_found_by_name_file_and_address() {
    let (_keep, path) = build("names", &[]);
    let image = read(&path);
    assert!(image.build_id().is_some_and(|id| id.len() == 20) && image.is_position_independent());
    let victim = image.find_function(&FunctionQuery::parse("victim")).expect("victim");
    assert!(victim.size > 10 && image.bytes_at(victim.address, victim.size as usize).is_some());
    assert_eq!(image.function_at(ImageOffset(victim.address.0 + 3)).expect("inside"), victim);
    assert_eq!(image.symbolise(ImageOffset(victim.address.0 + 3)), Some(("victim".into(), 3)));
    let LookupError::Ambiguous { candidates, .. } =
        image.find_function(&FunctionQuery::parse("twin")).expect_err("two")
    else {
        panic!("ambiguous");
    };
    assert!(candidates.len() == 2 && candidates.iter().any(|c| c.starts_with("b.c:")), "{candidates:?}");
    let a = image.find_function(&FunctionQuery::parse("a.c:twin")).expect("one");
    let b = image.find_function(&FunctionQuery::parse("b.c:twin")).expect("one");
    assert_ne!(a.address, b.address);
    let by_address = FunctionQuery { name: "twin".into(), file: None, address: Some(b.address) };
    assert_eq!(image.find_function(&by_address).expect("one").address, b.address);
    let LookupError::Unknown { similar, .. } = image.find_function(&FunctionQuery::parse("victin")).expect_err("none")
    else {
        panic!("unknown");
    };
    assert_eq!(similar, ["victim"]);
    assert!(matches!(image.find_function(&FunctionQuery::parse("shared_value")), Err(LookupError::NotAFunction(_))));
    assert_eq!(image.locals("twin", None).len(), 2);
    let tls = image.locals("counter", None);
    assert_eq!(tls[0].kind, SymbolKind::Tls);
    assert!(image.tls_segment().is_some_and(|tls| tls.memory_size >= 4));
    assert!(!image.got_slots("exit").is_empty());
    assert!(image.needed().iter().any(|lib| lib.starts_with("libc.so")));
}

#[test]
fn cold_parts_belong_to_the_function_also_without_symbols() {
    let (keep, path) = build("cold", &[]);
    let image = read(&path);
    let victim = image.find_function(&FunctionQuery::parse("victim")).expect("victim");
    let whole = image.body(&victim);
    assert!(whole.ranges.len() >= 2, "gcc splits victim: {whole:?}");
    let stripped = keep.0.join("stripped");
    assert!(Command::new("strip").arg("-o").arg(&stripped).arg(&path).status().expect("strip runs").success());
    let bare = read(&stripped);
    assert!(bare.find_function(&FunctionQuery::parse("victim")).is_err());
    let unnamed = bare.function_at(victim.address).expect("from the unwind table");
    assert_eq!(
        (unnamed.address, unnamed.size, unnamed.source),
        (victim.address, victim.size, BoundsSource::UnwindTable)
    );
    assert_eq!(bare.body(&unnamed), whole);
    let addressed = FunctionQuery::parse(&victim.address.to_string());
    assert_eq!(bare.find_function(&addressed).expect("by address").size, victim.size);
}

#[test]
fn debug_files_and_mini_debuginfo_give_symbols_back() {
    let (keep, path) = build("debug", &[]);
    let debug = keep.0.join("program.debug");
    let stripped = keep.0.join("stripped");
    let run = |program: &str, arguments: &[&std::ffi::OsStr]| {
        assert!(Command::new(program).args(arguments).status().expect("it runs").success(), "{program}");
    };
    run("objcopy", &["--only-keep-debug".as_ref(), path.as_ref(), debug.as_ref()]);
    run("strip", &["-o".as_ref(), stripped.as_ref(), path.as_ref()]);
    let mut image = read(&stripped);
    assert!(image.debug_file_candidates().iter().any(|c| c.contains("/.build-id/")));
    image.add_symbols_from(&fs::read(&debug).expect("made")).expect("the same build");
    assert!(image.find_function(&FunctionQuery::parse("a.c:twin")).is_ok());
    let (_other, foreign) = build("debug2", &["-O1"]);
    assert!(matches!(image.add_symbols_from(&fs::read(foreign).expect("built")), Err(ImageError::OtherBuild(_))));
    // .gnu_debugdata holds an xz-packed ELF file with a .symtab.
    run("xz", &["-k".as_ref(), debug.as_ref()]);
    let packed = keep.0.join("program.debug.xz");
    let mini = keep.0.join("mini");
    let section = format!(".gnu_debugdata={}", packed.display());
    run("objcopy", &["--add-section".as_ref(), section.as_ref(), stripped.as_ref(), mini.as_ref()]);
    assert!(read(&mini).find_function(&FunctionQuery::parse("b.c:twin")).is_ok());
}

#[test]
fn other_kinds_of_files_are_refused_by_name() {
    let parse = |bytes: Vec<u8>| Image::parse("x", ImageBytes::from(bytes));
    assert!(matches!(parse(Vec::new()), Err(ImageError::Damaged { .. })));
    assert!(matches!(parse(vec![7; 4096]), Err(ImageError::Damaged { .. })));
    let mut arm = vec![0; 64];
    arm[..6].copy_from_slice(b"\x7fELF\x02\x01");
    arm[16] = 3;
    arm[18] = 183;
    assert!(matches!(parse(arm.clone()), Err(ImageError::Foreign { machine: 183, .. })));
    arm[4] = 1;
    assert!(matches!(parse(arm), Err(ImageError::Foreign { class: 1, .. })));
}

#[test]
fn damaged_images_cost_nothing_but_an_error() {
    let (_keep, path) = build("damage", &[]);
    let whole = fs::read(path).expect("built");
    let seed =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |t| t.as_nanos() as u64) | 1;
    println!("seed {seed}");
    let mut state = seed;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as usize
    };
    for round in 0..400 {
        let mut bytes = whole.clone();
        // Headers and tables matter most: half of the flips go to the first pages.
        for _ in 0..1 + round % 8 {
            let reach = if random() % 2 == 0 { 0x1000 } else { bytes.len() };
            let at = random() % reach;
            bytes[at] = random() as u8;
        }
        if round % 5 == 0 {
            bytes.truncate(random() % whole.len());
        }
        if let Ok(image) = Image::parse("damaged", ImageBytes::from(bytes)) {
            for name in ["victim", "twin", "main", "getenv"] {
                if let Ok(function) = image.find_function(&FunctionQuery::parse(name)) {
                    let _ = image.body(&function);
                }
                let _ = (image.export(name), image.locals(name, Some("a.c")), image.got_slots(name));
            }
            for at in [0, 0x1100, u64::MAX] {
                let _ = (
                    image.function_at(ImageOffset(at)),
                    image.symbolise(ImageOffset(at)),
                    image.bytes_at(ImageOffset(at), 16),
                );
            }
        }
    }
}
