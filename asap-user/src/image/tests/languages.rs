//! Names of C++ and Rust programs, as their authors write them.

use super::*;

#[test]
fn cpp_functions_are_found_as_they_are_written() {
    let source = r#"
#include <stdexcept>
#include <cstdio>
#define KEEP __attribute__((noinline, used))
namespace { KEEP int hidden(int x) { asm volatile(""); return x + 1; } }
namespace ns {
KEEP int f(int x) { asm volatile(""); return x; }
KEEP int f(long x) { asm volatile(""); return (int)x * 2; }
template <class T> KEEP T twice(T x) { asm volatile(""); return x * 2; }
struct S {
    int v;
    KEEP explicit S(int x) : v(x) { asm volatile(""); }
    KEEP ~S() { asm volatile(""); }
    KEEP int get() const { asm volatile(""); return v; }
    KEEP int operator()(int x) { asm volatile(""); return v + x; }
};
KEEP int thrower(int x) { if (x > 100) throw std::runtime_error("large"); return x; }
}
int main(int argc, char **argv) {
    ns::S s(argc);
    return hidden(argc) + ns::f(argc) + ns::f(2L) + ns::twice(argc) + s.get() + s(3) + ns::thrower(argc);
}
"#;
    let shop = Workshop::with(&[("p.cc", source)]);
    shop.run("g++", &["-O2", "-o", "p", "p.cc"]);
    let image = shop.read("p");
    let named = |text: &str| find(&image, text).name.expect("named");
    assert_eq!(named("(anonymous namespace)::hidden"), "_ZN12_GLOBAL__N_16hiddenEi");
    assert_eq!(named("ns::f(long)"), "_ZN2ns1fEl");
    assert_eq!(named("_ZN2ns1fEi"), "_ZN2ns1fEi");
    assert_eq!(named("ns::twice<int>"), "_ZN2ns5twiceIiEET_S1_");
    assert_eq!(named("ns::S::get"), "_ZNK2ns1S3getEv");
    assert_eq!(named("ns::S::operator()"), "_ZN2ns1SclEi");
    assert_eq!(named("p.cc:(anonymous namespace)::hidden(int)"), "_ZN12_GLOBAL__N_16hiddenEi");
    // Complete and base constructors are one piece of code.
    assert!(named("ns::S::S").starts_with("_ZN2ns1SC") && named("ns::S::~S()").starts_with("_ZN2ns1SD"));
    let LookupError::Ambiguous { candidates, .. } = why_not(&image, "ns::f") else { panic!("two of them") };
    assert!(candidates.iter().any(|c| c.starts_with("ns::f(long) at 0x")), "{candidates:?}");
    let LookupError::Unknown { similar, .. } = why_not(&image, "ns::throwen") else { panic!("unknown") };
    assert_eq!(similar, ["ns::thrower(int)"]);
    // The cold part of thrower is a part, and not a second function of the name.
    let thrower = find(&image, "ns::thrower");
    let cold = image.locals("_ZN2ns7throwerEi.cold", None);
    assert_eq!(cold.len(), 1, "gcc splits thrower");
    assert_eq!(image.body(&thrower).ranges[1..], [cold[0].address..ImageOffset(cold[0].address.0 + cold[0].size)]);
}

#[test]
fn rust_functions_are_found_as_they_are_written() {
    let source = r#"
pub mod inner {
    pub struct S(pub u64);
    pub trait Doubles { fn double(&self) -> u64; }
    impl Doubles for S { #[inline(never)] fn double(&self) -> u64 { std::hint::black_box(self.0) * 2 } }
    #[inline(never)] pub fn victim(x: u64) -> u64 { std::hint::black_box(x) + 1 }
}
use inner::Doubles;
fn main() { println!("{}", inner::victim(3) + inner::S(4).double()); }
"#;
    for mangling in ["legacy", "v0"] {
        let shop = Workshop::with(&[("r.rs", source)]);
        let flag = format!("-Csymbol-mangling-version={mangling}");
        // The legacy form has become an unstable option on some releases.
        let output = Command::new("rustc").current_dir(shop.path("")).args(["-O", &flag, "r.rs"]).output();
        let output = output.expect("rustc runs");
        if !output.status.success() && mangling == "legacy" {
            println!("skipped: this compiler has no legacy mangling");
            continue;
        }
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let image = shop.read("r");
        let victim = find(&image, "r::inner::victim");
        assert_eq!(image.symbolise(victim.address), Some(("r::inner::victim".into(), 0)));
        let double = find(&image, "<r::inner::S as r::inner::Doubles>::double");
        assert!(double.size > 0 && double.address != victim.address);
    }
}

#[test]
fn handlers_of_exceptions_belong_to_the_function_also_without_symbols() {
    let source = r#"
#include <cstdio>
#include <stdexcept>
struct Held { int v; ~Held() { std::printf("released %d\n", v); } };
__attribute__((noinline)) int risky(int x) { if (x > 100) throw std::runtime_error("large"); return x * 2; }
__attribute__((noinline)) int catches(int x) {
    Held held{x};
    try { return risky(x) + risky(x + 1); }
    catch (const std::exception &error) { std::printf("%s\n", error.what()); return -1; }
}
int main(int argc, char **) { return catches(argc); }
"#;
    let shop = Workshop::with(&[("e.cc", source)]);
    shop.run("g++", &["-O2", "-o", "e", "e.cc"]);
    let image = shop.read("e");
    let catches = find(&image, "catches");
    let cold = image.locals(&format!("{}.cold", catches.name.clone().expect("named")), None);
    assert_eq!(cold.len(), 1, "g++ puts handlers elsewhere");
    let whole = image.body(&catches);
    assert!(whole.ranges[1..].iter().any(|range| range.contains(&cold[0].address)), "{whole:?}");
    let bare = shop.stripped("e");
    assert_eq!(bare.body(&bare.function_at(catches.address).expect("known")), whole);
}
