//! Thread-local variables of the target, accessed by every model there is; `errno` plays the target's variable.

use super::harness::{Symbols, compile, compilers, load, read};
use crate::patch::{ImportKind, PatchError};

/// All three names are one variable here, which the compiler must not know.
const PROGRAM: &str = r#"
extern __thread int first;
extern __thread int second VISIBILITY;
extern __thread int third VISIBILITY;
long get(long n) { return first + n; }
long set(long n) { first = (int)n; return 0; }
long hidden(long n) { second = (int)n; __asm__ volatile("" ::: "memory"); return second + third; }
long pointer(long n) { int *volatile p = &first; *p += n; return *p; }
"#;

fn errno() -> *mut i32 {
    // SAFETY: returns this thread's errno.
    unsafe { libc::__errno_location() }
}

fn errno_offset() -> i64 {
    let thread_pointer: u64;
    // SAFETY: the x86-64 TLS ABI keeps the thread pointer's own address at %fs:0.
    unsafe { std::arch::asm!("mov {}, fs:0", out(reg) thread_pointer, options(readonly, nostack, preserves_flags)) };
    (errno() as u64).wrapping_sub(thread_pointer) as i64
}

fn check(compiler: &str, flags: &[&str], low: bool) {
    let case = format!("{compiler} {flags:?}");
    let object = read(vec![compile(compiler, flags, "c", PROGRAM)]).unwrap_or_else(|e| panic!("{case}: {e}"));
    let imports = object.imports();
    assert!(imports.iter().all(|i| i.kind == ImportKind::Tls), "{case}: {imports:?}");
    assert_eq!(imports.len(), 3, "{case}: {imports:?}");
    let mut symbols = Symbols::default();
    for name in ["first", "second", "third"] {
        symbols.thread_local.insert(name.to_owned(), errno_offset());
    }
    let patch = load(&object, low, &[], symbols).unwrap_or_else(|e| panic!("{case}: {e}"));
    let (get, set, hidden, pointer) =
        (patch.address("get"), patch.address("set"), patch.address("hidden"), patch.address("pointer"));
    let call = super::harness::call;
    call(set, 40);
    let seen = call(get, 2);
    assert_eq!(seen, 42, "{case}");
    call(set, 7);
    // SAFETY: this thread's errno.
    let direct = unsafe { *errno() };
    assert_eq!(direct, 7, "{case}");
    let sum = call(hidden, 10);
    assert_eq!(sum, 20, "{case}");
    let through = call(pointer, 9);
    assert_eq!(through, 19, "{case}");
}

#[test]
fn every_model_reaches_the_targets_variables() {
    let hidden = r#"-DVISIBILITY=__attribute__((visibility("hidden")))"#;
    for compiler in compilers(&["gcc", "clang"]) {
        for level in ["-O0", "-O2"] {
            for model in ["global-dynamic", "local-dynamic", "initial-exec", "local-exec"] {
                let model = format!("-ftls-model={model}");
                for visibility in ["-DVISIBILITY=", hidden] {
                    check(compiler, &[level, "-fPIC", visibility, &model], false);
                    check(compiler, &[level, "-fPIC", "-fno-plt", visibility, &model], false);
                    check(compiler, &[level, "-fPIE", visibility, &model], false);
                    check(compiler, &[level, "-fno-pic", "-fno-pie", visibility, &model], true);
                }
            }
        }
    }
}

#[test]
fn descriptors_and_large_models_too() {
    let hidden = r#"-DVISIBILITY=__attribute__((visibility("hidden")))"#;
    for level in ["-O0", "-O2"] {
        for visibility in ["-DVISIBILITY=", hidden] {
            check("gcc", &[level, "-fPIC", "-mtls-dialect=gnu2", visibility], false);
            check("gcc", &[level, "-fPIC", "-mtls-dialect=gnu2", "-ftls-model=local-dynamic", visibility], false);
            check("gcc", &[level, "-fPIC", "-mcmodel=large", visibility], false);
            check("gcc", &[level, "-fPIC", "-mcmodel=large", "-ftls-model=local-dynamic", visibility], false);
        }
    }
}

#[test]
fn a_sequence_that_is_none_is_refused() {
    let source = ".text\nlea x@tlsgd(%rip),%rdi\nnop\ncall __tls_get_addr@plt\nret\n";
    let error = read(vec![compile("gcc", &[], "s", source)]).expect_err("refused");
    assert!(matches!(error, PatchError::TlsSequence { .. }), "{error}");
    let source = ".text\nmov x@tlsdesc(%rip),%rax\nret\n";
    let error = read(vec![compile("gcc", &[], "s", source)]).expect_err("refused");
    assert!(matches!(error, PatchError::TlsSequence { .. }), "{error}");
}

#[test]
fn an_ordinary_variable_is_no_thread_local_one() {
    let object = read(vec![compile("gcc", &["-O2", "-fPIC"], "c", "extern int x; long get(long n) { return x; }")]);
    let mut symbols = Symbols::default();
    symbols.addresses.insert("x".to_owned(), 0x1000);
    assert!(load(&object.expect("an object"), false, &[], symbols).is_ok());
    let source = "extern __thread int x; long get(long n) { return x; }";
    let object = read(vec![compile("gcc", &["-O2", "-fPIC"], "c", source)]).expect("an object");
    let error = load(&object, false, &[], Symbols::default()).err().expect("unresolved");
    assert_eq!(error, PatchError::Unresolved { names: vec!["`x`".to_owned()] });
}
