//! Builds and drives the test program.

use object::{Object, ObjectSymbol};
use std::{
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::OnceLock,
};

/// A running test program. Killed when dropped.
pub struct Fixture {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

/// Compiles the source file of this folder.
fn build() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/kernel/tests/fixture.c");
    // Beside the test's own executable: one of each build, which `cargo clean` takes away.
    let own = std::env::current_exe().expect("the test knows its file");
    let program = own.with_file_name("kernel-fixture");
    // Another run of the tests may be executing the last one.
    let fresh = own.with_file_name(format!("kernel-fixture-{}", std::process::id()));
    let status = Command::new("gcc")
        .args(["-O2", "-fno-optimize-sibling-calls", "-fno-ipa-ra", "-pthread", "-o"])
        .args([&fresh, &source])
        .status()
        .expect("the compiler runs");
    assert!(status.success(), "the fixture compiles");
    std::fs::rename(&fresh, &program).expect("it can be put in place");
    program
}

fn program() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(build)
}

impl Fixture {
    pub fn start() -> Self {
        Self::start_by(Command::new(program()))
    }

    /// Starts it by a command that runs the program's path as its last argument.
    pub fn start_under(command: &str, arguments: &[&str]) -> Self {
        let mut outer = Command::new(command);
        outer.args(arguments).arg(program());
        Self::start_by(outer)
    }

    fn start_by(mut command: Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the fixture starts");
        let orders = child.stdin.take().expect("piped");
        let answers = BufReader::new(child.stdout.take().expect("piped"));
        let mut fixture = Self { child, orders, answers };
        // It has come as far as reading orders.
        assert_eq!(fixture.order("call 1"), "1");
        fixture
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Gives an order and waits for the answer.
    pub fn order(&mut self, order: &str) -> String {
        writeln!(self.orders, "{order}").expect("the fixture lives");
        let mut answer = String::new();
        self.answers.read_line(&mut answer).expect("the fixture answers");
        answer.trim_end().to_owned()
    }

    /// Makes it end, and waits for that.
    pub fn end(mut self) {
        let _ = writeln!(self.orders, "end");
        let _ = self.child.wait();
    }

    /// The very file that it runs.
    pub fn file(&self) -> PathBuf {
        format!("/proc/{}/exe", self.pid()).into()
    }

    /// Address and size of a function in the file.
    pub fn function(&self, name: &str) -> (u64, u64) {
        let data = std::fs::read(self.file()).expect("the fixture can be read");
        let file = object::File::parse(&*data).expect("an ELF file");
        let symbol = file.symbols().find(|symbol| symbol.name() == Ok(name)).expect("the function is there");
        (symbol.address(), symbol.size())
    }

    /// Where the program is mapped (it is position independent).
    pub fn base(&self) -> u64 {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.pid())).expect("the fixture lives");
        let line = maps.lines().find(|line| line.contains("/kernel-fixture")).expect("it is mapped");
        u64::from_str_radix(line.split('-').next().unwrap_or_default(), 16).expect("an address")
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
