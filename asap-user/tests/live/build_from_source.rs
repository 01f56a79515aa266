//! `asap build`: from a source and a diff to a patch that goes into a running, stripped program; and what is said where there
//! can't be one.

use crate::support::{Answer, Fixture, Lab, Snapshot};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const SERVER: &str = r#"
#include "serve.h"
#include "parts.h"
int main(void)
{
    char line[128];
    long number;
    ANSWER("ready\n");
    while (next_line(line, sizeof line)) {
        if (command_with(line, "call", &number))
            ANSWER("%d\n", answer((int)number));
        else if (command_with(line, "hold", &number))
            ANSWER("%d\n", held((int)number));
        else if (command_with(line, "text", &number))
            ANSWER("%s\n", text((int)number));
    }
    return 0;
}
"#;

const PARTS_HEADER: &str = r#"
#define VICTIM __attribute__((noinline, noclone))
#define ENSURE(x) do { if (!(x)) failed(__FILE__, __LINE__); } while (0)
struct item { int kind; int value; };
int answer(int), held(int);
const char *text(int);
void failed(const char *, int);
"#;

const PARTS: &str = r#"
#include "parts.h"
static volatile int seen;
static struct item items[4] = { { 1, 10 }, { 2, 20 }, { 3, 30 }, { 4, 40 } };
static int (*volatile callback)(int);
volatile int failures;

VICTIM void failed(const char *file, int line)
{
    failures += line + file[0];
}

__attribute__((constructor)) static void prepare(void)
{
    seen = 40;
}

static VICTIM int scale(int x)
{
    static volatile int calls;
    calls++;
    seen = x;
    return x * 2 + calls;
}

static VICTIM int offset(int x)
{
    static volatile int calls;
    calls += 10;
    items[x & 3].kind++;
    return x + calls;
}

VICTIM int answer(int x)
{
    ENSURE(x >= 0);
    switch (x & 7) {
    case 0: return scale(x);
    case 1: return offset(x);
    case 2: return items[x & 3].value;
    case 3: return scale(x) + items[0].value;
    case 4: return -offset(x);
    case 5: return seen;
    case 6: return 66 + items[1].value;
    }
    return 7;
}

VICTIM int held(int x)
{
    return callback ? callback(x) : -1;
}

VICTIM const char *text(int x)
{
    ENSURE(x >= 0);
    return x > 4 ? "many" : "few";
}
"#;

const MAKEFILE: &str = "CFLAGS = -O2 -g -fpie\nserver: server.o parts.o other.o\n\t$(CC) -pie -o $@ $^\n\
                        server.o parts.o: parts.h\n";

/// A source with its build, and what is installed of it: without symbols.
struct Project<'a> {
    lab: &'a Lab,
    source: PathBuf,
    installed: PathBuf,
}

impl<'a> Project<'a> {
    /// None, and a word, where there are no tools to build with (in virtual machines).
    fn new(lab: &'a Lab) -> Option<Self> {
        let runs = |tool: &&str| Command::new(tool).arg("--version").output().is_ok_and(|done| done.status.success());
        if let Some(missing) = ["make", "diff", "strip"].into_iter().find(|tool| !runs(tool)) {
            println!("SKIPPED (needs {missing})");
            return None;
        }
        let source = lab.path("source");
        fs::create_dir(&source).expect("a folder");
        let serve = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/serve.h");
        fs::copy(serve, source.join("serve.h")).expect("copied");
        let files = [
            ("server.c", SERVER),
            ("parts.h", PARTS_HEADER),
            ("parts.c", PARTS),
            ("other.c", "int unrelated(void) { return 1; }\n"),
            ("Makefile", MAKEFILE),
        ];
        for (name, text) in files {
            fs::write(source.join(name), text).expect("written");
        }
        let project = Self { lab, source, installed: lab.path("installed/server") };
        project.install(&[]);
        Some(project)
    }

    /// Builds the program and installs it without symbols, with these changes of its source.
    fn install(&self, edits: &[(&str, &str)]) {
        let build = self.lab.path("elsewhere");
        let _ = fs::remove_dir_all(&build);
        run(Command::new("cp").arg("-a").arg(&self.source).arg(&build));
        let parts = edits.iter().fold(PARTS.to_owned(), |text, (before, after)| text.replace(before, after));
        fs::write(build.join("parts.c"), parts).expect("written");
        run(Command::new("make").arg("-C").arg(&build));
        fs::create_dir_all(self.installed.parent().expect("a folder")).expect("a folder");
        run(Command::new("strip").arg("-o").arg(&self.installed).arg(build.join("server")));
    }

    fn start(&self) -> Fixture {
        Fixture::start(&mut Command::new(&self.installed))
    }

    /// `diff -u` of a file and its edited version, with the names of a real one.
    fn diff(&self, file: &str, edits: &[(&str, &str)]) -> String {
        let before = fs::read_to_string(self.source.join(file)).expect("a source");
        let after = edits.iter().fold(before.clone(), |text, (before, after)| {
            assert!(text.contains(before), "{before}");
            text.replacen(before, after, 1)
        });
        fs::write(self.lab.path("after"), after).expect("written");
        let labels = [format!("a/{file}"), format!("b/{file}")];
        let mut command = Command::new("diff");
        command.args(["-u", "--label", &labels[0], "--label", &labels[1]]);
        let done = command.arg(self.source.join(file)).arg(self.lab.path("after")).output().expect("diff runs");
        let path = self.lab.path("CVE-2026-12345.diff");
        fs::write(&path, done.stdout).expect("written");
        path.to_str().expect("ASCII").to_owned()
    }

    fn build(&self, diff: &str) -> Answer {
        let path = |path: &Path| path.to_str().expect("ASCII").to_owned();
        let (source, target, output) = (path(&self.source), path(&self.installed), self.patch());
        // In the laboratory, with which it goes: logs of failed builds are kept otherwise.
        let work = tempfile::tempdir_in(self.lab.path("")).expect("a folder");
        let arguments = ["build", "--source", &source, "--patch", diff, "--target", &target, "-o", &output, "--work"];
        self.lab.asap(&[&arguments[..], &[&path(work.path()), "--", "make"]].concat())
    }

    /// Installs a build with other flags or another compiler, and has the project built with flags of ours.
    fn flags(&self, installed: &str, ours: &str) {
        let set = |flags: &str| {
            let text = MAKEFILE.replace("CFLAGS = -O2 -g -fpie", &format!("CFLAGS = -fpie {flags}"));
            let text = text.replace("$(CC) -pie", "$(CC) $(CFLAGS) -pie");
            fs::write(self.source.join("Makefile"), text).expect("written");
        };
        set(installed);
        self.install(&[]);
        set(ours);
    }

    fn patch(&self) -> String {
        self.lab.path("fix.asap").to_str().expect("ASCII").to_owned()
    }
}

fn run(command: &mut Command) {
    let done = command.output().expect("it runs");
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
}

fn json(answer: &Answer) -> serde_json::Value {
    serde_json::from_str(&answer.text).unwrap_or_else(|error| panic!("{error}: {answer:?}"))
}

fn names(value: &serde_json::Value) -> Vec<&str> {
    value["functions"].as_array().expect("a list").iter().filter_map(|function| function["name"].as_str()).collect()
}

#[test]
fn a_diff_becomes_a_patch_that_goes_into_the_running_program_and_out() {
    let Some(lab) = Lab::new("a_diff_becomes_a_patch_that_goes_into_the_running_program_and_out") else { return };
    let Some(project) = Project::new(&lab) else { return };
    let target = project.start();
    assert_eq!((target.number("call 8"), target.number("call 9")), (17, 19));
    // A static function, a function with a jump table, new data, a pointer to a changed function that stays behind.
    let diff = project.diff(
        "parts.c",
        &[
            ("    return x * 2 + calls;", "    if (x > 100)\n        return -1;\n    return x * 3 + calls;"),
            ("    switch", "    static volatile int fresh = 1000;\n    callback = scale;\n    switch"),
            ("return 66 + items[1].value", "return ++fresh + items[1].value + text(x)[0]"),
        ],
    );
    let verdict = json(&project.build(&diff));
    // text() and held() stand behind the changes, and have line numbers in them: they don't count as changed.
    assert_eq!(
        (verdict["class"].as_str(), names(&verdict)),
        (Some("new-data"), vec!["answer", "scale"]),
        "{verdict:#}"
    );
    let before = Snapshot::of(target.pid());
    lab.attach(target.pid());
    let report = lab.patch(&[&project.patch()]);
    assert_eq!(report.patch.functions.len(), 2);
    // The static counters went on: 1 call of scale, 1 of offset so far.
    assert_eq!((target.number("call 8"), target.number("call 9")), (8 * 3 + 2, 9 + 20));
    assert_eq!((target.number("call 104"), target.number("call 2")), (-1, 30));
    assert_eq!(target.number("call 6"), 1001 + 20 + i64::from(b'm'));
    assert_eq!((target.number("call 5"), target.ask("text 1")), (104, "few".to_owned()));
    assert_eq!(target.number("hold 5"), 5 * 3 + 4);
    lab.revert(&[]);
    // The pointer that the new code left behind leads to the old function.
    assert_eq!(target.number("hold 5"), 5 * 2 + 5);
    assert_eq!(target.number("call 6"), 86);
    assert_eq!(lab.detach(&[]).clean, Some(true));
    Snapshot::of(target.pid()).assert_same(&before, "detached");
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let Some(lab) = Lab::new("the_same_input_gives_the_same_bytes") else { return };
    let Some(project) = Project::new(&lab) else { return };
    let diff = project.diff("parts.c", &[("return 7", "return 8")]);
    let build = || {
        json(&project.build(&diff));
        fs::read(project.patch()).expect("a patch")
    };
    assert!(build() == build(), "two builds of one patch differ");
}

#[test]
fn what_cannot_be_patched_is_said_by_class() {
    let Some(lab) = Lab::new("what_cannot_be_patched_is_said_by_class") else { return };
    let Some(project) = Project::new(&lab) else { return };
    for (file, edits, class, words) in [
        ("parts.c", &[("{ 2, 20 }", "{ 2, 21 }")][..], "data-layout", "items"),
        ("parts.h", &[("int kind; int value;", "int kind; long value;")], "data-layout", "struct item"),
        ("server.c", &[("return 0;", "return 1;")], "never-quiescent", "main"),
        ("parts.c", &[("static volatile int seen;", "static volatile int seen; /* by scale */")], "not-applicable", ""),
        ("parts.c", &[("seen = 40", "seen = 41")], "start-up-only", "prepare runs when the program starts"),
    ] {
        let _ = fs::remove_file(project.patch());
        let answer = project.build(&project.diff(file, edits));
        let verdict = json(&answer);
        assert_eq!(verdict["class"].as_str(), Some(class), "{edits:?}: {verdict:#}");
        assert!(verdict["findings"].to_string().contains(words), "{verdict:#}");
        // Only what may go in under some condition is written.
        assert_eq!(Path::new(&project.patch()).exists(), class == "never-quiescent");
        assert_eq!(verdict["failed"].is_null(), class == "never-quiescent");
    }
}

#[test]
fn bad_input_is_refused_with_the_reason() {
    let Some(lab) = Lab::new("bad_input_is_refused_with_the_reason") else { return };
    let Some(project) = Project::new(&lab) else { return };
    let good = project.diff("parts.c", &[("return 7", "return 8")]);
    let text = fs::read_to_string(&good).expect("a diff");
    for (bad, words) in [
        (text.replace("return 7", "return 9"), "does not fit parts.c"),
        (text.replace("parts.c", "absent.c"), "absent.c, which the source has not"),
        ("nothing\n".to_owned(), "no unified diff"),
        (text.replace("return 8;", "return 8"), "error: expected"),
        (text.replace("a/parts.c", "../parts.c").replace("b/parts.c", "../parts.c"), "not within the source"),
    ] {
        let file = lab.path("bad.diff");
        fs::write(&file, bad).expect("written");
        let failure = project.build(file.to_str().expect("ASCII")).failure();
        assert!(failure.message.contains(words), "{words}: {failure:?}");
    }
    // Another version runs than the source is.
    project.install(&[("return x * 2 + calls", "return x * 5 - calls"), ("x > 4", "x > 5")]);
    let changes_scale = project.diff("parts.c", &[("return x * 2 + calls", "return x * 3 + calls")]);
    let verdict = json(&project.build(&changes_scale));
    assert_eq!(verdict["class"].as_str(), Some("not-applicable"), "{verdict:#}");
    assert!(verdict["findings"].to_string().contains("scale can't be found for certain"), "{verdict:#}");
}

#[test]
fn other_flags_are_used_or_the_reason_is_said() {
    let Some(lab) = Lab::new("other_flags_are_used_or_the_reason_is_said") else { return };
    let Some(project) = Project::new(&lab) else { return };
    let diff = project.diff("parts.c", &[("return x * 2 + calls", "return x * 3 + calls")]);
    // Without optimisation, and without debug information: as always. What is lost is little: it is compiled for comparison with it.
    for flags in ["-O0 -g", "-O2", "-O3 -g0", "-Os -g"] {
        project.flags(flags, flags);
        let verdict = json(&project.build(&diff));
        assert_eq!(verdict["class"].as_str(), Some("code-only"), "{flags}: {verdict:#}");
        assert!(names(&verdict).contains(&"scale") || flags != "-O2", "{flags}: {verdict:#}");
        let target = project.start();
        lab.attach(target.pid());
        lab.patch(&[&project.patch()]);
        assert_eq!(target.number("call 8"), 25, "{flags}");
        lab.detach(&["--revert"]);
        assert_eq!(target.number("call 8"), 18, "{flags}");
    }
    project.flags("-O2 -flto", "-O2 -flto");
    let answer = project.build(&diff);
    let verdict = json(&answer);
    assert_eq!((answer.code, verdict["class"].as_str()), (1, Some("not-applicable")), "{verdict:#}");
    let finding = verdict["findings"].to_string();
    assert!(finding.contains("parts.c is compiled with -flto") && finding.contains("without -flto"), "{verdict:#}");
    // Other code than what runs, by flags or by compilers.
    let mut cases = vec![("-O1", "-O2", "its code there is not what was built here".to_owned())];
    if Command::new("clang").arg("--version").output().is_ok_and(|done| done.status.success()) {
        cases.push(("-O2\nCC = clang", "-O2", "it was compiled by".to_owned()));
    }
    for (installed, ours, words) in cases {
        project.flags(installed, ours);
        let answer = project.build(&diff);
        let verdict = json(&answer);
        assert_eq!((answer.code, verdict["class"].as_str()), (1, Some("not-applicable")), "{installed:?}: {verdict:#}");
        assert!(verdict["findings"].to_string().contains(&words), "{installed:?}: {verdict:#}");
        assert!(verdict["findings"][0]["way_out"].as_str().is_some_and(|words| words.contains("compiler and flags")));
    }
}

#[test]
fn what_is_in_already_or_changes_nothing_is_said() {
    let Some(lab) = Lab::new("what_is_in_already_or_changes_nothing_is_said") else { return };
    let Some(project) = Project::new(&lab) else { return };
    let diff = project.diff("parts.c", &[("return 7", "return 8")]);
    let repaired =
        fs::read_to_string(project.source.join("parts.c")).expect("a source").replace("return 7", "return 8");
    let before = fs::read_to_string(project.source.join("parts.c")).expect("a source");
    fs::write(project.source.join("parts.c"), repaired).expect("written");
    let failure = project.build(&diff).failure();
    assert!(failure.message.contains("has this change already"), "{failure:?}");
    // A Debian package says in which of its patches.
    fs::create_dir_all(project.source.join("debian/patches")).expect("made");
    fs::write(project.source.join("debian/patches/series"), "other.patch\nfix.patch # why\n").expect("written");
    fs::copy(&diff, project.source.join("debian/patches/fix.patch")).expect("copied");
    let failure = project.build(&diff).failure();
    assert!(failure.message.contains("(debian/patches/fix.patch)"), "{failure:?}");
    fs::write(project.source.join("parts.c"), before).expect("written");
    let text = fs::read_to_string(&diff).expect("a diff").replace("return 8", "return 7");
    fs::write(&diff, text).expect("written");
    let failure = project.build(&diff).failure();
    assert!(failure.message.contains("changes nothing"), "{failure:?}");
    let packaging = "--- a/debian/changelog\n+++ b/debian/changelog\n@@ -1 +1,2 @@\n+new\n old\n";
    fs::write(&diff, packaging).expect("written");
    let failure = project.build(&diff).failure();
    assert!(failure.message.contains("changes nothing"), "{failure:?}");
}

#[test]
fn a_debdiff_brings_its_patches() {
    let Some(lab) = Lab::new("a_debdiff_brings_its_patches") else { return };
    let Some(project) = Project::new(&lab) else { return };
    let inner = fs::read_to_string(project.diff("parts.c", &[("return x * 2 + calls", "return x * 3 + calls")]))
        .expect("a diff");
    let lines: Vec<String> = inner.lines().map(|line| format!("+{line}\n")).collect();
    let debdiff = format!(
        "diff -Nru a/debian/patches/fix.patch b/debian/patches/fix.patch\n--- /dev/null\n+++ b/debian/patches/fix.patch\n\
         @@ -0,0 +1,{} @@\n{}--- a/debian/patches/series\n+++ b/debian/patches/series\n@@ -1 +1,2 @@\n one.patch\n+fix.patch\n",
        lines.len(),
        lines.concat()
    );
    let file = lab.path("CVE-2026-4.debdiff");
    fs::write(&file, debdiff).expect("written");
    let verdict = json(&project.build(file.to_str().expect("ASCII")));
    assert_eq!((verdict["class"].as_str(), names(&verdict)), (Some("code-only"), vec!["scale"]), "{verdict:#}");
}

#[test]
fn a_full_disk_is_said_and_leaves_no_patch_behind() {
    let Some(lab) = Lab::new("a_full_disk_is_said_and_leaves_no_patch_behind") else { return };
    let Some(project) = Project::new(&lab) else { return };
    let diff = project.diff("parts.c", &[("return 7", "return 8")]);
    let text = |path: &Path| path.to_str().expect("ASCII").to_owned();
    let small = lab.path("small");
    fs::create_dir(&small).expect("made");
    let (program, source, target) = (text(&crate::support::program()), text(&project.source), text(&project.installed));
    // In a mount namespace of its own, a disk of so many KiB: too small for the copy, for the objects.
    let run = |size: usize, work: &str, output: &str| {
        let script = format!(
            "mount -t tmpfs -o size={size}k tmpfs {small} && {program} --json build --source {source} --patch {diff} --target {target} \
             -o {output} --work {work} -- make; code=$?; ls -A {small} >&2; exit $code",
            small = text(&small),
        );
        let done = Command::new("unshare").args(["-m", "sh", "-c", &script]).output().expect("unshare runs");
        let [out, errors] = [done.stdout, done.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        (done.status.code(), out, errors)
    };
    let elsewhere = lab.path("fix.asap");
    for size in [8, 64] {
        let (code, out, errors) = run(size, &text(&small.join("work")), &text(&elsewhere));
        assert!(code.is_some_and(|code| code != 0), "{size}: {out} {errors}");
        assert!(out.contains("No space left on device"), "{size}: {out} {errors}");
        assert!(!elsewhere.exists());
    }
    // Only the patch finds no room: it is written whole or not at all.
    let (code, out, errors) = run(4, &text(&lab.path("roomy")), &text(&small.join("fix.asap")));
    assert!(code.is_some_and(|code| code != 0) && out.contains("No space left on device"), "{out} {errors}");
    assert!(!errors.contains("fix.asap"), "left behind: {errors}");
}

#[test]
fn check_tells_class_contents_and_processes() {
    let Some(lab) = Lab::new("check_tells_class_contents_and_processes") else { return };
    let Some(project) = Project::new(&lab) else { return };
    let diff =
        project.diff("parts.c", &[("    switch", "    static volatile int fresh = 1000;\n    fresh++;\n    switch")]);
    let verdict = json(&project.build(&diff));
    assert_eq!(verdict["class"].as_str(), Some("new-data"), "{verdict:#}");
    // What a new variable starts with is said: the program may have passed the place where it is set.
    assert!(verdict["findings"].to_string().contains("starts at its initial value"), "{verdict:#}");
    let target = project.start();
    lab.attach(target.pid());
    let before = Snapshot::of(target.pid());
    let found = json(&lab.asap(&["check", &project.patch()]));
    assert_eq!((found["class"].as_str(), found["would_go_in"].as_bool()), (Some("new-data"), Some(true)), "{found:#}");
    assert_eq!(found["contents"]["manifest"]["functions"][0]["old"].as_str(), Some("answer"), "{found:#}");
    assert!(found.to_string().contains(&format!("\"pid\":{}", target.pid())), "{found:#}");
    Snapshot::of(target.pid()).assert_same(&before, "checked");
    // Of another build.
    project.install(&[("return 7", "return 9")]);
    let other = project.start();
    lab.detach(&[]);
    lab.attach(other.pid());
    let answer = lab.asap(&["check", &project.patch()]);
    let found = json(&answer);
    assert_eq!((answer.code, found["would_go_in"].as_bool()), (1, Some(false)), "{found:#}");
    assert_eq!(found["class"].as_str(), Some("new-data"));
    assert!(answer.failure().message.contains("build-id"), "{answer:?}");
}

#[test]
fn a_debian_package_that_is_not_there_is_said() {
    let Some(lab) = Lab::new("a_debian_package_that_is_not_there_is_said") else { return };
    let Some(project) = Project::new(&lab) else { return };
    if Command::new("dpkg-query").arg("--version").output().is_err() {
        println!("SKIPPED (needs dpkg)");
        return;
    }
    let diff = project.diff("parts.c", &[("return 7", "return 8")]);
    let work = lab.path("work");
    let work = work.to_str().expect("ASCII");
    let arguments = ["build", "--debian", "no-such-package", "--patch", &diff, "-o", &project.patch(), "--work", work];
    let failure = lab.asap(&arguments).refusal(&["no package or source package no-such-package is installed"]);
    assert!(failure.way_out.contains("--version") && failure.way_out.contains("--source"), "{failure:?}");
    // Options of one kind of source do not go with the other.
    let failure =
        lab.asap(&["build", "--source", work, "--version", "1", "--patch", &diff, "-o", "x", "--", "make"]).failure();
    assert_eq!(failure.kind, asap::report::FailureKind::Usage, "{failure:?}");
}
