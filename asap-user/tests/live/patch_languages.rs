//! Patches as compilers make them: gcc and clang, C, C++ and Rust, every level of optimisation, position independent or not;
//! exceptions that pass through patched code.

use crate::support::{Lab, Snapshot, Source};

#[test]
fn c_from_gcc_and_clang_at_every_level() {
    let Some(lab) = Lab::new("c_from_gcc_and_clang_at_every_level") else { return };
    let target = Source::of(&["names_a.c", "names_b.c"]).start(&[]);
    target.number("thread 1");
    let before = Snapshot::of(target.pid());
    lab.attach(target.pid());
    let source = "
        #include <string.h>
        static int calls = 3;
        static int zeroed[200];
        extern int shared_count;
        static const char *const names[] = {\"zero\", \"one\", \"two\", \"three\"};
        int only_here(int);
        static __attribute__((noinline)) int twice(int x) { return 2 * x + zeroed[x & 127]; }
        static int by_switch(int x)
        {
            switch (x) {
            case 0: return 11;
            case 1: return twice(3);
            case 2: return (int)strlen(names[3]);
            case 3: return only_here(3);
            case 4: return calls;
            case 5: return shared_count > 39;
            default: return -1;
            }
        }
        static int (*const ways[])(int) = {by_switch, twice};
        int victim(int x)
        {
            calls++;
            return ways[x == 9](x);
        }";
    for compiler in ["gcc", "clang"] {
        for level in ["-O0", "-O1", "-O2", "-O3", "-Os"] {
            for model in [&["-fPIC"][..], &["-fPIE"], &["-fno-pic", "-mcmodel=large"], &["-fPIC", "-fno-plt"]] {
                let what = format!("{compiler} {level} {model:?}");
                let fix = lab.compile(compiler, "c", &[&[level], model].concat(), source);
                lab.patch(&["--function", "victim", &fix]);
                let answers: Vec<_> =
                    [0, 1, 2, 3, 4, 5, 6, 9].iter().map(|x| target.number(&format!("call {x}"))).collect();
                assert_eq!(answers, [11, 6, 5, 24, 8, 1, -1, 18], "{what}");
                lab.revert(&[]);
                assert_eq!(target.number("call 5"), 6, "{what}");
            }
        }
    }
    assert_eq!(lab.detach(&[]).clean, Some(true));
    Snapshot::of(target.pid()).assert_same(&before, "after detach");
}

#[test]
fn c_that_is_not_position_independent() {
    let Some(lab) = Lab::new("c_that_is_not_position_independent") else { return };
    // At fixed addresses below 2 GiB, as such code expects.
    let target = Source::of(&["names_a.c", "names_b.c"]).with(&["-O2", "-no-pie", "-fno-pie"]).start(&[]);
    lab.attach(target.pid());
    let source = "static int values[4] = {3, 5, 7, 9}; extern int shared_count; int only_here(int);
        int victim(int x) { return x == 9 ? shared_count > 39 : x > 3 ? only_here(3) : values[x & 3]++; }";
    for compiler in ["gcc", "clang"] {
        for level in ["-O0", "-O2"] {
            let fix = lab.compile(compiler, "c", &[level, "-fno-pic"], source);
            lab.patch(&["--function", "victim", &fix]);
            let answers: Vec<_> = [1, 1, 4, 9].iter().map(|x| target.number(&format!("call {x}"))).collect();
            assert_eq!(answers, [5, 6, 24, 1], "{compiler} {level}");
            lab.revert(&[]);
        }
    }
    assert_eq!(lab.detach(&[]).clean, Some(true));
}

#[test]
fn cxx_and_its_exceptions() {
    let Some(lab) = Lab::new("cxx_and_its_exceptions") else { return };
    let target = Source::of(&["throwing.cc"]).start(&[]);
    assert_eq!(target.ask("call 4"), "10 1");
    assert_eq!(target.ask("call -4"), "caught negative 2");
    let mut unwound = 2;
    let mut ask = |command: &str, answer: &str| {
        unwound += 1;
        assert_eq!(target.ask(command), format!("{answer} {unwound}"), "{command}");
    };
    lab.attach(target.pid());
    for compiler in ["g++", "clang++"] {
        for level in ["-O0", "-O2"] {
            let flags = [level, "-fPIC"];
            // An exception from below passes through patched code, which has something to clean up.
            let passes = "namespace shop { extern int unwound; struct Guard { ~Guard() { ++unwound; } }; \
                __attribute__((noinline)) int middle(int x); } extern \"C\" int thrower(int); \
                int shop::middle(int x) { Guard guard; return thrower(x) * 100; }";
            lab.patch(&["--function", "shop::middle", &lab.compile(compiler, "cc", &flags, passes)]);
            ask("call 4", "500");
            ask("call -4", "caught negative");
            lab.revert(&[]);
            ask("call 4", "10");
            // An exception is thrown by patched code.
            let throws = "#include <stdexcept>\nextern \"C\" int thrower(int x) \
                { if (x > 100) throw std::out_of_range(\"too much\"); return x; }";
            lab.patch(&["--function", "thrower", &lab.compile(compiler, "cc", &flags, throws)]);
            ask("call 4", "8");
            ask("call 400", "caught too much");
            ask("call -4", "-8");
            // One that is thrown and caught in patched code, of a type that the target does not know.
            let own = "struct Own { int value; }; extern \"C\" int thrower(int x) \
                { try { if (x > 1) throw Own{x + 70}; } catch (const Own &own) { return own.value; } return -1; }";
            lab.patch(&["--function", "thrower", &lab.compile(compiler, "cc", &flags, own)]);
            ask("call 4", "148");
            ask("call 0", "-2");
            lab.revert(&[]);
            lab.revert(&[]);
            ask("call 4", "10");
            ask("call -1", "caught negative");
        }
    }
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
    ask("call -1", "caught negative");
}

#[test]
fn rust_without_its_standard_library() {
    let Some(lab) = Lab::new("rust_without_its_standard_library") else { return };
    let target = Source::of(&["names_a.c", "names_b.c"]).start(&[]);
    lab.attach(target.pid());
    let source = "#![no_std]
        unsafe extern \"C\" { fn only_here(x: i32) -> i32; static mut shared_count: i32; }
        static TABLE: [i32; 4] = [10, 20, 30, 40];
        #[unsafe(no_mangle)]
        pub extern \"C\" fn victim(x: i32) -> i32 {
            let text: &str = match x { 0 => \"none\", 1 => \"a few\", _ => \"plenty\" };
            // SAFETY: as the target's own code calls it.
            unsafe { shared_count += 1; *TABLE.get((x & 3) as usize).unwrap_or(&0) + only_here(3) + text.len() as i32 }
        }";
    for level in ["-Copt-level=0", "-Copt-level=2", "-Copt-level=3"] {
        let flags = [level, "-Cpanic=abort", "-Cdebug-assertions=off", "-Coverflow-checks=off"];
        let fix = lab.compile("rustc", "rs", &flags, source);
        lab.patch(&["--function", "victim", &fix]);
        assert_eq!((target.number("call 0"), target.number("call 1")), (10 + 24 + 4, 20 + 24 + 5), "{level}");
        lab.revert(&[]);
    }
    assert_eq!(lab.detach(&[]).clean, Some(true));
}

#[test]
fn a_patch_of_several_objects() {
    let Some(lab) = Lab::new("a_patch_of_several_objects") else { return };
    let target = Source::of(&["names_a.c", "names_b.c"]).start(&[]);
    lab.attach(target.pid());
    let main = lab.object("int helper_of_patch(int); extern int patch_count; int victim(int x) { patch_count++; return helper_of_patch(x); }");
    let helper = lab.compile(
        "clang",
        "c",
        &["-O1", "-fPIC"],
        "int patch_count = 5; int helper_of_patch(int x) { return x * patch_count; }",
    );
    lab.patch(&["--function", "victim", &main, &helper]);
    assert_eq!((target.number("call 10"), target.number("call 10")), (60, 70));
    assert_eq!(lab.detach(&["--revert"]).clean, Some(true));
}
