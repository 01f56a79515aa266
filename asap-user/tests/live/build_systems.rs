//! `asap build` with the ways in which projects are built: make, CMake, autotools, Meson, Debian's packages; a library and a
//! program in one diff; compilers that are called by their absolute paths.

use crate::support::{Answer, Fixture, Lab};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const LIBRARY: &str = "#include \"calc.h\"
static volatile int calls;
__attribute__((noinline)) int calc_scale(int x) { calls++; return x * 2 + calls - calls; }
";
const HEADER: &str = "int calc_scale(int);\n";
const PROGRAM: &str = "#include \"serve.h\"
#include \"calc.h\"
static __attribute__((noinline, noclone)) int local(int x) { return calc_scale(x) + 1; }
int main(void)
{
    char line[128];
    long number;
    ANSWER(\"ready\\n\");
    while (next_line(line, sizeof line))
        if (command_with(line, \"call\", &number))
            ANSWER(\"%d\\n\", local((int)number));
    return 0;
}
";
/// Changes both.
const DIFF: &str = "--- a/src/calc.c
+++ b/src/calc.c
@@ -3 +3 @@
-__attribute__((noinline)) int calc_scale(int x) { calls++; return x * 2 + calls - calls; }
+__attribute__((noinline)) int calc_scale(int x) { calls++; return x * 3 + calls - calls; }
--- a/src/prog.c
+++ b/src/prog.c
@@ -3 +3 @@
-static __attribute__((noinline, noclone)) int local(int x) { return calc_scale(x) + 1; }
+static __attribute__((noinline, noclone)) int local(int x) { return calc_scale(x) + 5; }
";

/// A way to build the project.
struct System {
    /// Programs that it needs.
    needs: &'static [&'static str],
    files: &'static [(&'static str, &'static str)],
    command: &'static str,
    library: &'static str,
    program: &'static str,
}

const MAKE: System = System {
    needs: &["make"],
    files: &[(
        "Makefile",
        "CC = gcc\nall: prog\nlibcalc.so: src/calc.o\n\t$(CC) -shared -o $@ $^\nprog: src/prog.o libcalc.so\n\t$(CC) -o $@ src/prog.o -L. \
         -lcalc -Wl,-rpath,'$$ORIGIN'\nsrc/%.o: src/%.c src/calc.h\n\t$(CC) -O2 -fPIC -c -o $@ $<\n",
    )],
    command: "make",
    library: "libcalc.so",
    program: "prog",
};

const CMAKE: System = System {
    needs: &["cmake", "make"],
    files: &[(
        "CMakeLists.txt",
        "cmake_minimum_required(VERSION 3.10)\nproject(calc C)\nset(CMAKE_BUILD_TYPE RelWithDebInfo)\n\
         add_library(calc SHARED src/calc.c)\nadd_executable(prog src/prog.c)\ntarget_link_libraries(prog calc)\n",
    )],
    command: "cmake -S . -B out && make -C out",
    library: "out/libcalc.so",
    program: "out/prog",
};

const AUTOTOOLS: System = System {
    needs: &["autoreconf", "automake", "libtoolize", "make"],
    files: &[
        (
            "configure.ac",
            "AC_INIT([calc], [1])\nAM_INIT_AUTOMAKE([foreign subdir-objects])\nAC_PROG_CC\nLT_INIT([disable-static])\n\
             AC_CONFIG_FILES([Makefile])\nAC_OUTPUT\n",
        ),
        (
            "Makefile.am",
            "lib_LTLIBRARIES = libcalc.la\nlibcalc_la_SOURCES = src/calc.c\nlibcalc_la_LDFLAGS = -avoid-version\n\
             bin_PROGRAMS = prog\nprog_SOURCES = src/prog.c\nprog_LDADD = libcalc.la\n",
        ),
    ],
    command: "test -f Makefile || { autoreconf -fi && ./configure; } && make",
    library: ".libs/libcalc.so",
    program: ".libs/prog",
};

const MESON: System = System {
    needs: &["meson", "ninja"],
    files: &[(
        "meson.build",
        "project('calc', 'c', default_options: ['buildtype=debugoptimized'])\n\
         calc = shared_library('calc', 'src/calc.c')\nexecutable('prog', 'src/prog.c', link_with: calc)\n",
    )],
    command: "test -d out || meson setup out; ninja -C out",
    library: "out/libcalc.so",
    program: "out/prog",
};

const DEBIAN: System = System {
    needs: &["dpkg-buildpackage", "dh", "make"],
    files: &[
        ("Makefile", MAKE.files[0].1),
        ("debian/rules", "#!/usr/bin/make -f\n%:\n\tdh $@\noverride_dh_auto_install:\n"),
        (
            "debian/changelog",
            "calc (1) unstable; urgency=low\n\n  * One.\n\n -- A <a@b.example>  Mon, 01 Jan 2024 00:00:00 +0000\n",
        ),
        (
            "debian/control",
            "Source: calc\nMaintainer: A <a@b.example>\nBuild-Depends: debhelper-compat (= 13)\nStandards-Version: 4.6.2\n\n\
             Package: calc\nArchitecture: any\nDescription: a test\n more of it\n",
        ),
        ("debian/source/format", "3.0 (native)\n"),
    ],
    command: "dpkg-buildpackage -us -uc -b -d --rules-target=build-arch",
    library: "libcalc.so",
    program: "prog",
};

struct Project<'a> {
    lab: &'a Lab,
    source: PathBuf,
    library: PathBuf,
    program: PathBuf,
}

impl<'a> Project<'a> {
    /// Builds the project once, and installs it without symbols. None, and a word, where there are no tools for that.
    fn new(lab: &'a Lab, system: &System, edit: &dyn Fn(&str) -> String) -> Option<Self> {
        let runs = |tool: &&&str| Command::new(tool).arg("--version").output().is_ok_and(|done| done.status.success());
        if let Some(missing) = system.needs.iter().chain(&["strip"]).find(|tool| !runs(tool)) {
            println!("SKIPPED (needs {missing})");
            return None;
        }
        let source = lab.path("project");
        let serve = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/serve.h");
        let serve = fs::read_to_string(serve).expect("readable");
        let sources =
            [("src/calc.c", LIBRARY), ("src/calc.h", HEADER), ("src/prog.c", PROGRAM), ("src/serve.h", serve.as_str())];
        for (name, text) in sources.iter().chain(system.files) {
            let path = source.join(name);
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            fs::write(&path, edit(text)).expect("written");
            if name.ends_with("rules") {
                run(Command::new("chmod").arg("+x").arg(path));
            }
        }
        // In the same place, as a package is built; then the source is as it was.
        let kept = lab.path("kept");
        run(Command::new("cp").arg("-a").arg(&source).arg(&kept));
        run(Command::new("sh").args(["-c", system.command]).current_dir(&source));
        let installed = lab.path("installed");
        fs::create_dir_all(&installed).expect("made");
        let install = |file: &str| {
            let name = installed.join(Path::new(file).file_name().expect("a name"));
            run(Command::new("strip").arg("-o").arg(&name).arg(source.join(file)));
            name
        };
        let (library, program) = (install(system.library), install(system.program));
        fs::remove_dir_all(&source).expect("removed");
        fs::rename(&kept, &source).expect("renamed");
        Some(Self { lab, source, library, program })
    }

    fn build(&self, diff: &str, output: &str, command: &str) -> Answer {
        let path = self.lab.path("change.diff");
        fs::write(&path, diff).expect("written");
        let work = tempfile::tempdir_in(self.lab.path("")).expect("a folder");
        let text = |path: &Path| path.to_str().expect("ASCII").to_owned();
        let (source, patch, work) = (text(&self.source), text(&path), text(work.path()));
        let (library, program, output) = (text(&self.library), text(&self.program), text(&self.lab.path(output)));
        let arguments = ["build", "--source", &source, "--patch", &patch, "--target", &library, "--target", &program];
        self.lab.asap(&[&arguments[..], &["-o", &output, "--work", &work, "--", "sh", "-c", command]].concat())
    }
}

fn run(command: &mut Command) {
    let done = command.output().expect("it runs");
    let said = || format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{command:?}: {}", said());
}

fn document(answer: &Answer) -> serde_json::Value {
    serde_json::from_str(&answer.text).unwrap_or_else(|error| panic!("{error}: {answer:?}"))
}

fn functions(target: &serde_json::Value) -> Vec<&str> {
    target["functions"].as_array().expect("a list").iter().filter_map(|function| function["name"].as_str()).collect()
}

fn both_targets_are_built(name: &str, system: &System) {
    let Some(lab) = Lab::new(name) else { return };
    let Some(project) = Project::new(&lab, system, &str::to_owned) else { return };
    let answer = project.build(DIFF, "fix.asap", system.command);
    let found = document(&answer);
    assert_eq!((answer.code, found["class"].as_str()), (0, Some("code-only")), "{found:#}");
    let targets = found["targets"].as_array().expect("a list");
    assert_eq!(targets.iter().map(functions).collect::<Vec<_>>(), [["calc_scale"], ["local"]], "{found:#}");
    let files: Vec<&str> = targets.iter().filter_map(|target| target["output"].as_str()).collect();
    assert!(files[0].ends_with("fix.libcalc.so.asap") && files[1].ends_with("fix.prog.asap"), "{files:?}");
    let mut command = Command::new(&project.program);
    let running = Fixture::start(command.env("LD_LIBRARY_PATH", lab.path("installed")));
    assert_eq!(running.number("call 10"), 21);
    lab.attach(running.pid());
    files.iter().for_each(|file| drop(lab.patch(&[file])));
    assert_eq!(running.number("call 10"), 35);
    lab.detach(&["--revert"]);
    assert_eq!(running.number("call 10"), 21);
}

#[test]
fn make_builds_a_library_and_a_program() {
    both_targets_are_built("make_builds_a_library_and_a_program", &MAKE);
}

#[test]
fn cmake_builds_a_library_and_a_program() {
    both_targets_are_built("cmake_builds_a_library_and_a_program", &CMAKE);
}

#[test]
fn autotools_build_a_library_and_a_program() {
    both_targets_are_built("autotools_build_a_library_and_a_program", &AUTOTOOLS);
}

#[test]
fn meson_builds_a_library_and_a_program() {
    both_targets_are_built("meson_builds_a_library_and_a_program", &MESON);
}

#[test]
fn dpkg_buildpackage_builds_a_library_and_a_program() {
    both_targets_are_built("dpkg_buildpackage_builds_a_library_and_a_program", &DEBIAN);
}

#[test]
fn compilers_that_are_called_by_their_paths_are_seen() {
    let Some(lab) = Lab::new("compilers_that_are_called_by_their_paths_are_seen") else { return };
    for compiler in ["/usr/bin/gcc", "/usr/bin/clang"].into_iter().filter(|path| Path::new(path).exists()) {
        let edit = |text: &str| text.replace("CC = gcc", &format!("CC = {compiler}"));
        let Some(project) = Project::new(&lab, &MAKE, &edit) else { return };
        // Also where the build clears its environment.
        for command in ["make", "env -i PATH=/usr/bin:/bin make"] {
            let found = document(&project.build(DIFF, "fix.asap", command));
            assert_eq!(found["class"].as_str(), Some("code-only"), "{compiler}: {found:#}");
        }
        for folder in ["project", "installed"] {
            fs::remove_dir_all(lab.path(folder)).expect("removed");
        }
    }
}

#[test]
fn a_header_that_the_makefile_forgot_is_not_forgotten() {
    let Some(lab) = Lab::new("a_header_that_the_makefile_forgot_is_not_forgotten") else { return };
    let edit = |text: &str| {
        let text = text.replace(" src/calc.h\n\t$(CC) -O2", "\n\t$(CC) -O2");
        text.replace("return x * 2 + calls", "return x * FACTOR + calls")
            .replace("int calc_scale(int);\n", "int calc_scale(int);\n#define FACTOR 2\n")
    };
    let Some(project) = Project::new(&lab, &MAKE, &edit) else { return };
    let diff = "--- a/src/calc.h\n+++ b/src/calc.h\n@@ -1,2 +1,2 @@\n int calc_scale(int);\n-#define FACTOR 2\n+#define FACTOR 3\n";
    let found = document(&project.build(diff, "fix.asap", "make"));
    assert_eq!((found["class"].as_str(), functions(&found)), (Some("code-only"), vec!["calc_scale"]), "{found:#}");
}

#[test]
fn a_fix_that_cannot_go_into_one_of_its_targets_is_made_for_none() {
    let Some(lab) = Lab::new("a_fix_that_cannot_go_into_one_of_its_targets_is_made_for_none") else { return };
    let Some(project) = Project::new(&lab, &MAKE, &str::to_owned) else { return };
    let diff = DIFF
        .replace("+static __attribute__", "+static volatile int more[2] = { 1, 2 };\n+static __attribute__")
        .replace("@@ -3 +3 @@\n-static", "@@ -3 +3,2 @@\n-static");
    let diff = diff
        .replace("return x * 3 + calls - calls", "static volatile __thread int own; own = x; return own * 3 + calls");
    let answer = project.build(&diff, "fix.asap", "make");
    let found = document(&answer);
    assert_eq!((answer.code, found["class"].as_str()), (1, Some("data-layout")), "{found:#}");
    let message = answer.failure().message;
    assert!(message.contains("for") && message.contains("libcalc.so") && message.contains("data-layout"), "{message}");
    assert!(found["targets"][1]["output"].is_null() && !lab.path("fix.prog.asap").exists(), "{found:#}");
}
