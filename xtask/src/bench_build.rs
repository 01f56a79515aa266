//! `cargo xtask bench build`: what making patches costs, on Debian's nginx. How much `asap build` adds to the two compiles; how long
//! the comparison of all its objects takes; how long it takes to find a twin's functions in a stripped program of 5 MB, in
//! another order and in another version, and whether any is taken for another. Fetches nginx's source and what it needs to be
//! built, for these builds alone.

use anyhow::{Context, Result, bail, ensure};
use asap::{
    build::{
        assemble::{self, Pair},
        twin,
        wrapper::{self, Record},
    },
    image::{Image, SymbolKind},
};
use serde_json::{Value, json};
use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// A change of one function that means nothing.
const DIFF: &str = "--- a/src/http/ngx_http_header_filter_module.c
+++ b/src/http/ngx_http_header_filter_module.c
@@ -172,1 +172,1 @@
-    if (r->header_sent) {
+    if (r->header_sent || r->method == 4242) {
";
/// A library with all its objects, from package libssl-dev: linked whole, a program of 5 MB.
const ARCHIVE: &str = "/usr/lib/x86_64-linux-gnu/libcrypto.a";

/// Measures in `folder`.
pub fn run(asap: &Path, folder: &Path, rounds: usize) -> Result<(String, Value)> {
    let (work, built) = build(asap, folder)?;
    let (total, compiling) = (built["total_ms"].as_u64().unwrap_or(0), built["compiling_ms"].as_u64().unwrap_or(0));
    ensure!(compiling > 0, "the build did not say how long it took: {built}");
    let added = 100.0 * (total - compiling) as f64 / compiling as f64;
    let pairs = pairs(&work, folder)?;
    let objects = pairs.len();
    let compared = median(rounds, || assemble::compare_all(&pairs).map(|_| ()).map_err(Into::into))?;
    let shuffled = shuffled(folder, rounds)?;
    let version = other_version(&work, folder, rounds)?;
    let text = format!(
        "asap build --debian nginx: {:.0} s in its two builds, {:.0} s in all else ({added:.1} %)\n\
         comparison of {objects} objects of nginx in two builds: {:.2} s\n{}{}",
        compiling as f64 / 1e3,
        (total - compiling) as f64 / 1e3,
        compared.as_secs_f64(),
        shuffled.text("a stripped program, objects in another order"),
        version.text("nginx against its next version"),
    );
    let figures = json!({
        "total_ms": total, "compiling_ms": compiling, "added_percent": added, "objects": objects,
        "compare_ms": compared.as_millis() as u64, "shuffled": shuffled.json(), "version": version.json(),
    });
    Ok((text, figures))
}

fn median(rounds: usize, mut what: impl FnMut() -> Result<()>) -> Result<Duration> {
    let mut times = Vec::new();
    for _ in 0..rounds.max(1) {
        let begin = Instant::now();
        what()?;
        times.push(begin.elapsed());
    }
    times.sort();
    Ok(times[times.len() / 2])
}

/// Builds a patch of the installed nginx, or of the newest version that the servers have the source of.
fn build(asap: &Path, folder: &Path) -> Result<(PathBuf, Value)> {
    let diff = folder.join("change.diff");
    fs::write(&diff, DIFF)?;
    let attempt = |version: Option<&str>, work: &Path| -> Result<Value> {
        let mut command = Command::new(asap);
        command.args(["build", "--json", "--debian", "nginx", "--install-dependencies", "--patch"]).arg(&diff);
        command.args(version.iter().flat_map(|version| ["--version", version]));
        command.arg("--cache").arg(folder.join("apt")).arg("--work").arg(work).arg("-o").arg(folder.join("fix.asap"));
        let done = command.stderr(Stdio::null()).output().context("asap build")?;
        serde_json::from_slice(&done.stdout).context("asap build printed no JSON")
    };
    let work = folder.join("installed");
    let first = attempt(None, &work)?;
    let Some(message) = first["failed"]["message"].as_str() else { return Ok((work, first)) };
    let others = message.split_once("(there are: ").and_then(|(_, rest)| rest.split_once(')')).map(|(list, _)| list);
    let Some(version) = others.and_then(|list| list.split(", ").last()) else { bail!("asap build: {message}") };
    let work = folder.join("other");
    let second = attempt(Some(version), &work)?;
    ensure!(second["failed"].is_null(), "asap build: {}", second["failed"]);
    Ok((work, second))
}

/// All objects of both builds, compiled once more for comparison; without those whose headers this machine lacks.
fn pairs(work: &Path, folder: &Path) -> Result<Vec<Pair>> {
    let records = wrapper::read(&work.join("first.records"))?;
    let trees = fs::read_dir(work.join("build"))?.flatten().map(|entry| entry.path());
    let old = trees.into_iter().next().context("the build left no tree")?;
    let shown = Path::new(asap::build::debian::BUILD_PATH).join(old.file_name().context("a name")?);
    let new = work.join("after");
    let mut pairs = Vec::new();
    let mut seen = HashSet::new();
    for record in records.iter().filter(|record| record.object.is_some()) {
        let [source] = &record.sources[..] else { continue };
        let Ok(inside) = record.directory.strip_prefix(&shown) else { continue };
        if !seen.insert((inside.to_owned(), source.clone())) {
            continue;
        }
        let compile = |tree: &Path| -> Option<Vec<u8>> {
            let moved = Record { directory: tree.join(inside), ..record.clone() };
            let output = folder.join("again.o");
            let mut command = moved.again(source, &output);
            command.stdout(Stdio::null()).stderr(Stdio::null()).stdin(Stdio::null());
            command.env_remove("PWD").env_remove(wrapper::RECORDS);
            command.status().ok().filter(std::process::ExitStatus::success)?;
            fs::read(output).ok()
        };
        if let (Some(old), Some(new)) = (compile(&old), compile(&new)) {
            pairs.push(Pair { source: source.clone(), old: Some(old), new, is_lto: false });
        }
    }
    ensure!(pairs.len() > 50, "only {} objects could be compiled once more", pairs.len());
    Ok(pairs)
}

/// What was found of a twin in a program whose symbols are known.
struct Found {
    bytes: u64,
    functions: usize,
    found: usize,
    wrong: usize,
    time: Duration,
}

impl Found {
    fn text(&self, what: &str) -> String {
        format!(
            "{what} ({:.1} MB): {} of {} functions found, {} wrong, {:.2} s\n",
            self.bytes as f64 / 1e6,
            self.found,
            self.functions,
            self.wrong,
            self.time.as_secs_f64()
        )
    }

    fn json(&self) -> Value {
        json!({
            "bytes": self.bytes, "functions": self.functions, "found": self.found, "wrong": self.wrong,
            "ms": self.time.as_millis() as u64,
        })
    }
}

fn image(path: &Path) -> Result<Image> {
    Ok(Image::parse(&path.display().to_string(), fs::read(path)?.into())?)
}

fn run_quietly(command: &mut Command) -> Result<()> {
    let done = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    ensure!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    Ok(())
}

/// Looks for `twin` in `module` without its symbols, which say afterwards what was right.
fn judge(twin: &Path, module: &Path, folder: &Path, rounds: usize) -> Result<Found> {
    let stripped = folder.join("stripped");
    run_quietly(Command::new("strip").arg("-s").arg("-o").arg(&stripped).arg(module))?;
    let (twin, truth) = (image(twin)?, image(module)?);
    // Each time anew: an image remembers what it has read.
    let time = median(rounds, || {
        let module = image(&stripped)?;
        twin::locate(&twin, &module)?;
        Ok(())
    })?;
    let located = twin::locate(&twin, &image(&stripped)?)?;
    let mut places: HashMap<String, Vec<u64>> = HashMap::new();
    for symbol in truth.all_symbols() {
        places.entry(symbol.name).or_default().push(symbol.address.0);
    }
    let wrong = |found: &&twin::Found| !places.get(&found.symbol.name).is_some_and(|at| at.contains(&found.address.0));
    let functions = |symbols: &mut dyn Iterator<Item = (SymbolKind, u64)>| {
        let addresses = symbols.filter(|(kind, _)| *kind == SymbolKind::Function).map(|(_, address)| address);
        addresses.collect::<HashSet<u64>>().len()
    };
    Ok(Found {
        bytes: fs::metadata(&stripped)?.len(),
        functions: functions(&mut twin.all_symbols().filter(|symbol| symbol.size > 0).map(|s| (s.kind, s.address.0))),
        found: functions(&mut located.found.iter().map(|found| (found.symbol.kind, found.symbol.address.0))),
        wrong: located.found.iter().filter(wrong).count(),
        time,
    })
}

/// All objects of a library, linked twice: as they are, and in a random order.
fn shuffled(folder: &Path, rounds: usize) -> Result<Found> {
    let parts = folder.join("parts");
    fs::create_dir_all(&parts)?;
    run_quietly(Command::new("ar").arg("x").arg(ARCHIVE).current_dir(&parts))
        .with_context(|| format!("{ARCHIVE} (package libssl-dev)"))?;
    let mut objects: Vec<PathBuf> = fs::read_dir(&parts)?.flatten().map(|entry| entry.path()).collect();
    objects.sort();
    let main = folder.join("main.c");
    fs::write(&main, "int main(void) { return 0; }\n")?;
    let link = |objects: &[PathBuf], output: &str| -> Result<PathBuf> {
        let (list, output) = (folder.join("objects"), folder.join(output));
        let lines: Vec<String> = objects.iter().map(|path| path.display().to_string()).collect();
        fs::write(&list, lines.join("\n"))?;
        let mut command = Command::new("gcc");
        command.args(["-O2", "-w", "-Wl,--unresolved-symbols=ignore-all", "-o"]).arg(&output).arg(&main);
        run_quietly(command.arg(format!("@{}", list.display())).args(["-ldl", "-lpthread"]))?;
        Ok(output)
    };
    let twin = link(&objects, "twin")?;
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_nanos() as u64 | 1;
    eprintln!("bench: order by seed {seed}");
    let mut state = seed;
    let mut below = |bound: usize| {
        // xorshift64: any order will do.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % bound as u64) as usize
    };
    for last in (1..objects.len()).rev() {
        objects.swap(last, below(last + 1));
    }
    let module = link(&objects, "module")?;
    judge(&twin, &module, folder, rounds)
}

/// The first build as the twin of the second, in which a function differs.
fn other_version(work: &Path, folder: &Path, rounds: usize) -> Result<Found> {
    let find = |tree: &Path| -> Result<PathBuf> {
        let mut folders = vec![tree.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder)?.flatten() {
                let path = entry.path();
                if entry.file_type()?.is_dir() {
                    folders.push(path);
                } else if entry.file_name() == "nginx" && image(&path).is_ok() {
                    return Ok(path);
                }
            }
        }
        bail!("{} holds no nginx", tree.display())
    };
    judge(&find(&work.join("build"))?, &find(&work.join("after"))?, folder, rounds)
}
