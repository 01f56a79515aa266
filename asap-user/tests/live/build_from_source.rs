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
