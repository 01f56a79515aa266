//! `cargo xtask vm-test`: the tests on other kernels, in virtual machines.

use crate::{
    command,
    owned::{Folder, Owned},
    setup,
};
use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use std::{
    collections::VecDeque,
    fs,
    io::Write,
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use vm_tests::{
    archive::{self, Archive},
    kernels::{self, Kernel},
    machine::{self, Accelerator, Files},
    modules,
    protocol::{Run, Setting},
    root::{self, Programs},
    session::{Session, Verdict},
};

/// How long a guest may take to boot.
const BOOT: Duration = Duration::from_secs(180);

/// How many guests may be lost in one run before it is given up.
const LOSSES: usize = 5;

/// What to run, and where.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Only tests whose name contains this.
    filter: Option<String>,
    /// Kernel of Debian: 6.1, 6.12, 7, newest, or a whole version; may be given several times.
    #[arg(long, default_values = ["6.1", "6.12", "newest"])]
    kernel: Vec<String>,
    /// Who runs the guest's instructions.
    #[arg(long, value_enum, default_value_t = Accel::Tcg)]
    accel: Accel,
    /// Seconds that one test may take.
    #[arg(long, default_value_t = 300)]
    limit: u64,
    /// Show what passing tests print, too.
    #[arg(long)]
    show_output: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Accel {
    /// QEMU itself; works everywhere, slowly.
    Tcg,
    /// The host's CPU, where /dev/kvm really works.
    Kvm,
}

/// A test, by its program and name.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Test {
    program: PathBuf,
    name: String,
}

/// What was built for a run.
struct Build {
    tests: Vec<PathBuf>,
    asap: PathBuf,
    guest: PathBuf,
}

/// How a run went.
#[derive(Debug, Default)]
pub struct Counts {
    /// Tests that did what they should.
    pub passed: usize,
    /// What did not, with the kernel's release.
    pub failed: Vec<String>,
    /// What did not run, with the kernel's release and the reason.
    pub skipped: Vec<String>,
}

/// Runs the task.
pub fn run(options: &Options) -> Result<()> {
    setup::run()?;
    let counts = test(options)?;
    for skipped in &counts.skipped {
        println!("SKIPPED {skipped}");
    }
    for failed in &counts.failed {
        println!("FAILED  {failed}");
    }
    println!("\nvm-test: {} passed; {} failed; {} skipped", counts.passed, counts.failed.len(), counts.skipped.len());
    ensure!(counts.failed.is_empty(), "tests failed");
    Ok(())
}

/// Builds, boots, runs.
pub fn test(options: &Options) -> Result<Counts> {
    let version = machine::version()?;
    let cache = target_folder()?.join("vm-tests");
    let kernels: Vec<_> = options.kernel.iter().map(|wanted| kernels::find(wanted, &cache)).collect::<Result<_>>()?;
    let build = build()?;
    let tests = list(&build.tests, options.filter.as_deref())?;
    ensure!(!tests.is_empty(), "no test that runs in virtual machines has that in its name");
    let scratch = Folder::new("asap-vm-")?;
    let programs = Programs { guest: &build.guest, asap: &build.asap, tests: &build.tests };
    let base = root::build(&programs, scratch.path())?;
    let mut counts = Counts::default();
    for kernel in &kernels {
        let machine = Machine { kernel, base: &base, scratch: scratch.path(), version, options };
        machine.run_all(&tests, &mut counts)?;
    }
    Ok(counts)
}

/// The folder that cargo builds in.
fn target_folder() -> Result<PathBuf> {
    let output = command::cargo().args(["metadata", "--no-deps", "--format-version=1"]).output()?;
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
    Ok(metadata["target_directory"].as_str().context("cargo does not tell where it builds")?.into())
}

/// Builds the test programs, as `cargo xtask test` does, and what runs in guests.
fn build() -> Result<Build> {
    let mut cargo = command::cargo();
    cargo.args(["test", "--workspace", "--all-features", "--no-run"]);
    let mut built = command::executables(cargo)?;
    // No test needs the guest's program, so that cargo may not build it with them.
    let mut cargo = command::cargo();
    cargo.args(["build", "--package", "vm-tests"]);
    built.extend(command::executables(cargo)?);
    let (mut tests, mut asap, mut guest) = (Vec::new(), None, None);
    for executable in built {
        match (executable.name.as_str(), executable.kind.as_str(), executable.is_test) {
            ("asap", "bin", false) => asap = Some(executable.path),
            ("asap-vm-guest", "bin", false) => guest = Some(executable.path),
            ("asap", "lib", true) | ("live" | "command_line", "test", true) => tests.push(executable.path),
            _ => (),
        }
    }
    let missing = "cargo did not say where it is";
    Ok(Build { tests, asap: asap.context(missing)?, guest: guest.context(missing)? })
}

/// The tests of these programs that depend on the kernel.
fn list(programs: &[PathBuf], filter: Option<&str>) -> Result<Vec<Test>> {
    let mut tests = Vec::new();
    for program in programs {
        let output = Command::new(program).args(["--list", "--format", "terse"]).output()?;
        ensure!(output.status.success(), "{} does not list its tests", program.display());
        let text = String::from_utf8_lossy(&output.stdout);
        let names = text.lines().filter_map(|line| line.strip_suffix(": test"));
        let is_library = program.file_name().is_some_and(|name| name.to_string_lossy().starts_with("asap-"));
        for name in names {
            let depends = !is_library || KERNEL_MODULES.iter().any(|module| name.starts_with(module));
            if depends && filter.is_none_or(|filter| name.contains(filter)) {
                tests.push(Test { program: program.clone(), name: name.to_owned() });
            }
        }
    }
    Ok(tests)
}

/// Parts of the library whose tests can go otherwise on other kernels. All else works on bytes alone.
const KERNEL_MODULES: [&str; 5] = ["kernel::", "process::", "quiesce::", "agent::", "watchdog::"];

struct Machine<'a> {
    kernel: &'a Kernel,
    base: &'a Archive,
    scratch: &'a Path,
    version: u32,
    options: &'a Options,
}

/// A booted guest.
struct Guest {
    // In this order: the conversation ends before the emulator does.
    session: Session,
    qemu: Owned,
    _files: Folder,
}

impl Machine<'_> {
    fn boot(&self) -> Result<Guest> {
        let files = Folder::new("asap-vm-")?;
        let path = |name: &str| files.path().join(name);
        let mut archive = self.base.clone();
        for (number, (name, bytes)) in modules::needed(&self.kernel.modules)?.into_iter().enumerate() {
            archive.file(&format!("/modules/{number:02}-{name}.ko"), 0o644, bytes)?;
        }
        archive::store(&archive, &path("root"))?;
        drop(archive);
        let listener = UnixListener::bind(path("port"))?;
        let paths =
            Files { kernel: &self.kernel.image, root: &path("root"), console: &self.console(), socket: &path("port") };
        let accelerator = match self.options.accel {
            Accel::Tcg => Accelerator::Emulation,
            Accel::Kvm => Accelerator::Kvm,
        };
        let mut command = machine::command(&paths, accelerator, self.version);
        let errors = fs::File::create(path("errors"))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
        let mut qemu = Owned::spawn(&mut command)?;
        let mut lives = || Ok(qemu.ended()?.is_none());
        let session = Session::begin(&listener, BOOT, self.scratch.to_owned(), &mut lives);
        let said = || fs::read_to_string(path("errors")).unwrap_or_default();
        let session = session.with_context(|| format!("{}; {}", said().trim(), self.last_words()))?;
        Ok(Guest { session, qemu, _files: files })
    }

    fn console(&self) -> PathBuf {
        self.scratch.join("console")
    }

    /// The end of what the console shows.
    fn last_words(&self) -> String {
        let bytes = fs::read(self.console()).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<_> = text.lines().collect();
        // A panic is told before the stacks that follow it.
        let panic = lines.iter().rposition(|line| line.contains("Kernel panic") || line.contains("BUG:"));
        let from = panic.map_or(lines.len().saturating_sub(12), |at| at.saturating_sub(3));
        let shown = &lines[from..(from + 25).min(lines.len())];
        format!("the guest's console ends with\n  {}", shown.join("\n  "))
    }

    /// Runs tests, in as many guests as it takes.
    fn run_all(&self, tests: &[Test], counts: &mut Counts) -> Result<()> {
        let mut open: VecDeque<_> = tests.iter().collect();
        let mut losses = 0;
        let mut guest = None;
        while let Some(test) = open.front() {
            let Guest { session, .. } = match &mut guest {
                Some(guest) => guest,
                None => {
                    let begun = Instant::now();
                    let booted = self.boot().with_context(|| format!("kernel {}", self.kernel.version))?;
                    let release = &booted.session.release;
                    println!("\nkernel {release} ({}): booted in {:.1?}", self.kernel.version, begun.elapsed());
                    guest.insert(booted)
                }
            };
            let what = format!("{}: {}", session.release, test.name);
            print!("{what} ... ");
            std::io::stdout().flush()?;
            let run = Run {
                program: root::place(&test.program),
                arguments: ["--exact", &test.name, "--nocapture", "--test-threads=1"].map(str::to_owned).to_vec(),
                limit: self.options.limit,
                setting: Setting::default(),
            };
            open.pop_front();
            let outcome = match session.run(&run) {
                Ok(outcome) => outcome,
                Err(error) => {
                    println!("GUEST LOST: {error:#}");
                    println!("{}", self.last_words());
                    counts.failed.push(format!("{what}: the guest was lost: {error:#}"));
                    guest = None;
                    losses += 1;
                    if losses == LOSSES {
                        bail!("{LOSSES} guests were lost; {} tests have not run", open.len());
                    }
                    continue;
                }
            };
            let verdict = outcome.verdict();
            let took = outcome.ended.took as f64 / 1000.0;
            match &verdict {
                Verdict::Passed => {
                    println!("ok ({took:.1} s)");
                    counts.passed += 1;
                }
                Verdict::Skipped(why) => {
                    println!("SKIPPED: {why}");
                    counts.skipped.push(format!("{what}: {why}"));
                }
                Verdict::Failed(why) => {
                    println!("FAILED ({took:.1} s): {why}");
                    counts.failed.push(format!("{what}: {why}"));
                }
            }
            if self.options.show_output || matches!(verdict, Verdict::Failed(_)) {
                for line in String::from_utf8_lossy(&outcome.output).lines() {
                    println!("    {line}");
                }
            }
        }
        let Some(Guest { session, mut qemu, .. }) = guest else { return Ok(()) };
        session.power_off()?;
        let begun = Instant::now();
        while qemu.ended()?.is_none() && begun.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}
