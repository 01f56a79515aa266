//! `cargo xtask programs`: real programs do in the sandbox what they do natively. Each is a shell script in
//! asap-user/tests/programs, which is run twice in a folder of its own: with its programs started as they are, and with
//! `asap run`. Output and exit status must be the same.

use crate::{agent::Agent, command, owned::Folder, setup};
use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use std::{
    fs,
    io::Read,
    net::{Ipv4Addr, TcpListener},
    os::unix::{
        fs::PermissionsExt,
        process::{CommandExt, ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// How long a script may take.
const PATIENCE: Duration = Duration::from_secs(1200);
/// Lines of a difference that are shown.
const LINES_SHOWN: usize = 12;

/// How programs are run.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Guards, as for `asap run --guards`.
    #[arg(long)]
    guards: Option<String>,
    /// A policy, as for `asap run --policy`.
    #[arg(long, conflicts_with = "guards")]
    policy: Option<PathBuf>,
    /// Only programs whose name contains this; may be given several times.
    #[arg(long)]
    only: Vec<String>,
    /// Leave out those that take minutes.
    #[arg(long)]
    fast: bool,
    /// Install what is missing (Debian packages).
    #[arg(long)]
    install: bool,
    /// An optimised asap.
    #[arg(long)]
    release: bool,
    /// Print the table as JSON.
    #[arg(long)]
    json: bool,
}

/// What a script says of itself in its first lines.
#[derive(Debug, PartialEq, Eq)]
struct Header {
    /// Files that it needs, with their packages.
    needs: Vec<(String, String)>,
    is_slow: bool,
}

impl Header {
    /// "# needs: FILE (PACKAGE) ...", "# slow".
    fn of(text: &str) -> Self {
        let words = text.lines().find_map(|line| line.strip_prefix("# needs: ")).unwrap_or_default();
        let words: Vec<&str> = words.split_ascii_whitespace().collect();
        let need = |pair: &[&str]| match pair {
            [file, package] => Some(((*file).to_owned(), package.trim_matches(['(', ')']).to_owned())),
            _ => None,
        };
        Self { needs: words.chunks(2).filter_map(need).collect(), is_slow: text.lines().any(|line| line == "# slow") }
    }

    fn missing(&self) -> Vec<&(String, String)> {
        self.needs.iter().filter(|(file, _)| !Path::new(file).exists()).collect()
    }
}

struct Script {
    name: String,
    path: PathBuf,
    header: Header,
}

/// A line of the table.
#[derive(Serialize)]
struct Row {
    program: String,
    verdict: &'static str,
    native_seconds: Option<f64>,
    sandbox_seconds: Option<f64>,
    lines: usize,
    words: String,
}

/// Runs them.
pub fn run(options: &Options) -> Result<()> {
    ensure!(command::is_root(), "this needs root: it attaches to the programs that it starts");
    setup::run()?;
    let scripts = scripts(options)?;
    ensure!(!scripts.is_empty(), "no program has such a name");
    if options.install {
        let mut packages: Vec<&str> =
            scripts.iter().flat_map(|script| script.header.missing()).map(|(_, package)| package.as_str()).collect();
        packages.sort_unstable();
        packages.dedup();
        setup::install_packages(&packages)?;
    }
    let asap = command::build_asap(options.release, &[])?;
    let folder = Folder::new("asap-programs-")?;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
    let agent = Agent::start(&asap, folder.path())?;
    let mut guards = String::new();
    if let Some(names) = &options.guards {
        guards.push_str(&format!(" --guards {names}"));
    }
    if let Some(policy) = &options.policy {
        guards.push_str(&format!(" --policy {}", std::path::absolute(policy)?.display()));
    }
    let inside = Way {
        run: format!("{} run{guards} --", agent.command_line()),
        as_nobody: format!("{} run{guards} --user nobody --", agent.command_line()),
    };
    let native =
        Way { run: String::new(), as_nobody: "setpriv --reuid nobody --regid nogroup --clear-groups".to_owned() };
    let mut rows = Vec::new();
    for script in &scripts {
        if !options.json {
            eprintln!("programs: {}", script.name);
        }
        rows.push(compare(script, folder.path(), &native, &inside)?);
    }
    let failed = rows.iter().filter(|row| row.verdict == "differs").count();
    if options.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        print!("{}", table(&rows));
    }
    ensure!(failed == 0, "{failed} of {} programs differ in the sandbox", rows.len());
    Ok(())
}

fn scripts(options: &Options) -> Result<Vec<Script>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(command::top().join("asap-user/tests/programs"))? {
        let path = entry?.path();
        let Some(name) = path.file_stem().and_then(|name| name.to_str()).map(str::to_owned) else { continue };
        let header = Header::of(&fs::read_to_string(&path)?);
        let wanted = options.only.is_empty() || options.only.iter().any(|part| name.contains(part));
        if wanted && !(options.fast && header.is_slow) {
            found.push(Script { name, path, header });
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// How the programs of a script are started.
struct Way {
    run: String,
    as_nobody: String,
}

/// What came of a script.
struct Outcome {
    text: String,
    status: String,
    errors: String,
    seconds: f64,
}

fn compare(script: &Script, folder: &Path, native: &Way, inside: &Way) -> Result<Row> {
    let row = |verdict, words| Row {
        program: script.name.clone(),
        verdict,
        native_seconds: None,
        sandbox_seconds: None,
        lines: 0,
        words,
    };
    if let Some((file, package)) = script.header.missing().first() {
        return Ok(row("skipped", format!("{file} is missing: package {package} (--install)")));
    }
    let own = once(script, folder, native)?;
    ensure!(
        own.status == "0" && !own.text.is_empty(),
        "{} does not work natively ({}): {}",
        script.name,
        own.status,
        own.errors
    );
    let other = once(script, folder, inside)?;
    let is_same = (&own.text, &own.status) == (&other.text, &other.status);
    if !is_same {
        eprintln!("{}", difference(&own, &other));
    }
    let words = if is_same { String::new() } else { format!("ended with {}", other.status) };
    Ok(Row {
        native_seconds: Some(own.seconds),
        sandbox_seconds: Some(other.seconds),
        lines: own.text.lines().count(),
        ..row(if is_same { "same" } else { "differs" }, words)
    })
}

/// Runs a script in a new folder.
fn once(script: &Script, folder: &Path, way: &Way) -> Result<Outcome> {
    let at = folder.join("work");
    let _ = fs::remove_dir_all(&at);
    fs::create_dir(&at)?;
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
    let (output, errors) = (folder.join("output"), folder.join("errors"));
    let mut command = Command::new("sh");
    command.arg("-eu").arg(&script.path).current_dir(&at);
    command.env("RUN", &way.run).env("RUN_AS_NOBODY", &way.as_nobody).env("PORT", port.to_string());
    command.stdin(Stdio::null()).stdout(fs::File::create(&output)?).stderr(fs::File::create(&errors)?);
    // Servers signal their group when they end.
    command.process_group(0);
    command::hear_signals(&mut command);
    let begin = Instant::now();
    let mut child = command.spawn().context("sh can't be started")?;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if begin.elapsed() > PATIENCE {
            let group = nix::unistd::Pid::from_raw(child.id() as i32);
            let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
            let _ = child.wait();
            bail!("{} did not end within {} s", script.name, PATIENCE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let read = |path: &Path| -> Result<String> {
        let mut bytes = Vec::new();
        fs::File::open(path)?.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let seconds = begin.elapsed().as_secs_f64();
    let word = match (status.code(), status.signal()) {
        (Some(code), _) => code.to_string(),
        (None, signal) => format!("signal {}", signal.unwrap_or(0)),
    };
    Ok(Outcome { text: read(&output)?, status: word, errors: read(&errors)?, seconds })
}

/// The first lines that differ.
fn difference(own: &Outcome, other: &Outcome) -> String {
    let mut text = format!("  natively it ended with {}, in the sandbox with {}\n", own.status, other.status);
    let (mut a, mut b) = (own.text.lines(), other.text.lines());
    let mut shown = 0;
    loop {
        match (a.next(), b.next()) {
            (None, None) => break,
            (x, y) if x == y => {}
            (x, y) => {
                text.push_str(&format!("  natively: {}\n  sandbox:  {}\n", x.unwrap_or("(end)"), y.unwrap_or("(end)")));
                shown += 1;
                if shown == LINES_SHOWN {
                    break;
                }
            }
        }
    }
    let errors: Vec<&str> = other.errors.lines().rev().take(LINES_SHOWN).collect();
    errors.iter().rev().for_each(|line| text.push_str(&format!("  its errors: {line}\n")));
    text
}

fn table(rows: &[Row]) -> String {
    let mut text = String::from(
        "\n| program | in the sandbox | lines compared | native, s | sandbox, s | |\n|---|---|---|---|---|---|\n",
    );
    let seconds = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.1}"));
    for row in rows {
        let (native, sandbox) = (seconds(row.native_seconds), seconds(row.sandbox_seconds));
        let Row { program, verdict, lines, words, .. } = row;
        text.push_str(&format!("| {program} | {verdict} | {lines} | {native} | {sandbox} | {words} |\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_say_what_they_need() {
        let header = Header::of("# needs: /usr/bin/xz (xz-utils) /usr/bin/zstd (zstd)\n# slow\necho\n");
        let need = |file: &str, package: &str| (file.to_owned(), package.to_owned());
        assert_eq!(header.needs, [need("/usr/bin/xz", "xz-utils"), need("/usr/bin/zstd", "zstd")]);
        assert!(header.is_slow);
        assert_eq!(Header::of("echo\n"), Header { needs: Vec::new(), is_slow: false });
    }

    #[test]
    fn every_script_says_what_it_needs() {
        let all = Options {
            guards: None,
            policy: None,
            only: Vec::new(),
            fast: false,
            install: false,
            release: false,
            json: false,
        };
        let scripts = scripts(&all).expect("scripts");
        assert!(scripts.len() > 10);
        for script in scripts {
            assert!(!script.header.needs.is_empty(), "{}", script.name);
        }
    }
}
