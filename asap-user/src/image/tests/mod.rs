//! Images of real compilers, made by the tests.

mod hostile;
mod languages;
mod layouts;
mod parts;
mod symbols;
mod system;

use super::*;
use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// A directory with sources, and what tools make of them; goes away with the value.
struct Workshop(tempfile::TempDir);

impl Workshop {
    fn with(files: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        for (name, text) in files {
            fs::write(directory.path().join(name), text).expect("written");
        }
        Self(directory)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run<S: AsRef<OsStr>>(&self, program: &str, arguments: &[S]) -> String {
        let output = Command::new(program).current_dir(self.0.path()).args(arguments).output();
        let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn read(&self, name: &str) -> Image {
        read(&self.path(name))
    }

    /// Strips `name`, and reads the result.
    fn stripped(&self, name: &str) -> Image {
        let output = format!("{name}.stripped");
        self.run("strip", &["-o", &output, name]);
        self.read(&output)
    }
}

fn read(path: &Path) -> Image {
    Image::parse(&path.to_string_lossy(), ImageBytes::from(fs::read(path).expect("it is there"))).expect("an image")
}

fn find(image: &Image, text: &str) -> Function {
    image.find_function(&FunctionQuery::parse(text)).unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn why_not(image: &Image, text: &str) -> LookupError {
    image.find_function(&FunctionQuery::parse(text)).expect_err(text)
}

/// Two files with a static function of one name; an initialised thread-local variable; a function with a cold part.
const TWO_FILES: &[(&str, &str)] = &[
    (
        "a.c",
        r#"
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
extern __typeof__(victim) also_victim __attribute__((alias("victim")));
int main(int argc, char **argv) { printf("%d\n", victim(argc) + other(argc)); return 0; }
"#,
    ),
    (
        "b.c",
        r#"
__attribute__((noinline)) static int twin(int x) { return x * 5; }
int other(int x) { return twin(x) + 1; }
"#,
    ),
];

fn two_files(flags: &[&str]) -> Workshop {
    let shop = Workshop::with(TWO_FILES);
    shop.run("gcc", &[&["-O2", "-o", "program", "a.c", "b.c"], flags].concat());
    shop
}
