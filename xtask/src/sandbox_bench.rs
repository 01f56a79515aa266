//! What the sandbox costs: processor time per request of servers, and of whole programs, natively and inside, in one run; and how
//! long going in takes.

use crate::{
    agent::Agent,
    apache::{self, Apache},
    bench::median,
    load::Load,
    soak::nginx::{self, Nginx},
};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::{
    fmt::Write,
    fs,
    net::SocketAddr,
    path::Path,
    process::{Command, Stdio},
};

/// Sandbox without guards, and with all of them.
const GUARDS: [&str; 3] = ["", "shadow-stack,cfi", "shadow-stack,cfi,nx,syscalls"];
/// Length of a load, seconds.
const LOAD: u64 = 3;

/// Programs that compute: a name, what must be there, and the command.
const PROGRAMS: [(&str, &str, &[&str]); 7] = [
    ("fib", "", &["FIB"]),
    ("indirect calls", "", &["INDIRECT"]),
    (
        "lua",
        "/usr/bin/lua5.4",
        &["/usr/bin/lua5.4", "-e", "local t={} for i=1,2500000 do t[i%1000]=(t[(i*7)%1000] or 0)+i end print(t[1])"],
    ),
    (
        "python",
        "/usr/bin/python3",
        &["/usr/bin/python3", "-c", "d={}\nfor i in range(1500000): d[i%1000]=d.get(i*7%1000,0)+i\nprint(d[1])"],
    ),
    ("gzip", "/usr/bin/gzip", &["/usr/bin/gzip", "-9", "-c", "DATA"]),
    ("xz", "/usr/bin/xz", &["/usr/bin/xz", "-2", "-c", "DATA"]),
    (
        "sqlite",
        "/usr/bin/sqlite3",
        &[
            "/usr/bin/sqlite3",
            ":memory:",
            "with recursive n(i) as (select 1 union all select i+1 from n where i<1500000) select sum(i*i%7) from n;",
        ],
    ),
];

const FIB: &str =
    "static long fib(long n){return n<2?n:fib(n-1)+fib(n-2);}int main(void){return fib(36)==14930352?0:1;}\n";
const INDIRECT: &str = "typedef long(*step)(long);static long a(long x){return x+1;}static long b(long x){return x^3;}\
static long c(long x){return x*5;}static long d(long x){return x-2;}step volatile steps[4]={a,b,c,d};\
int main(void){long x=1;for(long i=0;i<80000000;i++)x=steps[x>>3&3](x);return x==0;}\n";

/// Measures both.
pub fn run(asap: &Path, folder: &Path, rounds: usize) -> Result<(String, Value)> {
    let agent = Agent::start(asap, folder)?;
    let mut text = String::from("Processor time inside the sandbox, by that of native code (medians)\n");
    let _ = writeln!(text, "{:<28} {:>9} {:>9} {:>9} {:>9}  enter, ms", "server", "native", "open", "ret+cfi", "all");
    let mut servers = Vec::new();
    let web = folder.join("apache");
    fs::create_dir(&web)?;
    let apache = Apache::start(&web)?;
    servers.push(server(
        &agent,
        "Apache, 287 kB",
        apache.pid(),
        &|| apache.processes(),
        apache.address,
        apache::FILE,
        rounds,
    )?);
    drop(apache);
    let nginx = Nginx::start(folder)?;
    servers.push(server(
        &agent,
        "nginx, 1 kB",
        nginx.pid(),
        &|| nginx.processes(),
        nginx.address,
        nginx::FILE,
        rounds,
    )?);
    drop(nginx);
    for row in &servers {
        row.write(&mut text);
    }
    let _ = writeln!(text, "{:<28} {:>9} {:>9} {:>9} {:>9}", "program", "native", "open", "ret+cfi", "all");
    let programs = programs(&agent, folder, rounds)?;
    let mut products = [1.0; GUARDS.len()];
    for row in &programs {
        row.write(&mut text);
        row.ratios.iter().zip(&mut products).for_each(|(ratio, product)| *product *= ratio);
    }
    let means = products.map(|product: f64| product.powf(1.0 / programs.len().max(1) as f64));
    let _ = write!(text, "{:<28} {:>9}", "geometric mean", "");
    for mean in means {
        let _ = write!(text, " {mean:>9.2}");
    }
    text.push('\n');
    let told = |rows: &[Row]| rows.iter().map(Row::json).collect::<Vec<_>>();
    Ok((text, json!({ "servers": told(&servers), "programs": told(&programs), "geometric_means": means })))
}

struct Row {
    name: String,
    /// Native time: microseconds per request, or seconds.
    native: f64,
    /// By the native one, per set of guards.
    ratios: Vec<f64>,
    enter_ms: Vec<f64>,
}

impl Row {
    fn write(&self, text: &mut String) {
        let _ = write!(text, "{:<28} {:>9.2}", self.name, self.native);
        for ratio in &self.ratios {
            let _ = write!(text, " {ratio:>9.2}");
        }
        for ms in &self.enter_ms {
            let _ = write!(text, "  {ms:.0}");
        }
        text.push('\n');
    }

    fn json(&self) -> Value {
        json!({ "name": self.name, "native": self.native, "guards": GUARDS, "ratios": self.ratios, "enter_ms": self.enter_ms })
    }
}

/// Time that the threads of these processes have spent on processors (proc_pid_schedstat), ns.
fn spent(processes: &[i32]) -> u64 {
    let tasks = |pid: &i32| fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let time = |task: fs::DirEntry| {
        fs::read_to_string(task.path().join("schedstat")).ok()?.split(' ').next()?.parse::<u64>().ok()
    };
    processes.iter().flat_map(tasks).filter_map(time).sum::<u64>()
}

fn per_request(processes: &dyn Fn() -> Vec<i32>, address: SocketAddr, path: &str) -> Result<f64> {
    let before = spent(&processes());
    let report = Load::start(address, path, LOAD)?.finish()?;
    if report.failed > 0 {
        bail!("{} requests failed: {}", report.failed, report.failures);
    }
    Ok(spent(&processes()).saturating_sub(before) as f64 / 1e3 / report.requests.max(1) as f64)
}

fn server(
    agent: &Agent,
    name: &str,
    pid: i32,
    processes: &dyn Fn() -> Vec<i32>,
    address: SocketAddr,
    path: &str,
    rounds: usize,
) -> Result<Row> {
    let pid_text = pid.to_string();
    let mut native = Vec::new();
    let mut inside = vec![Vec::new(); GUARDS.len()];
    let mut enter = vec![Vec::new(); GUARDS.len()];
    agent.ask(&["attach", "--pid", &pid_text])?;
    per_request(processes, address, path)?;
    for _ in 0..rounds {
        native.push(per_request(processes, address, path)?);
        for (index, guards) in GUARDS.iter().enumerate() {
            let mut words = vec!["sandbox", "enter", "--pid", &pid_text];
            if !guards.is_empty() {
                words.extend(["--guards", guards]);
            }
            let answer = agent.ask(&words)?;
            let took = answer.pointer("/sandbox/total_us").and_then(Value::as_f64).context("the time it took")?;
            enter[index].push(took / 1e3);
            // Once for the pages to be translated.
            Load::start(address, path, 1)?.finish()?;
            inside[index].push(per_request(processes, address, path)?);
            agent.ask(&["sandbox", "leave", "--pid", &pid_text])?;
        }
    }
    agent.ask(&["detach", "--pid", &pid_text])?;
    let native = median(&mut native);
    Ok(Row {
        name: format!("{name}, us a request"),
        native,
        ratios: inside.iter_mut().map(|times| median(times) / native).collect(),
        enter_ms: enter.iter_mut().map(|times| median(times)).collect(),
    })
}

/// User and system time of a command and all that it waited for, seconds.
fn time(command: &mut Command) -> Result<f64> {
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().with_context(|| format!("{command:?}"))?;
    // SAFETY: all-zero bytes are a valid value of this plain C struct.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    let mut status = 0;
    // SAFETY: live locals; the child is ours, and nobody else waits for it.
    let waited = unsafe { libc::wait4(child.id() as i32, &raw mut status, 0, &raw mut usage) };
    if waited < 0 || !libc::WIFEXITED(status) || libc::WEXITSTATUS(status) != 0 {
        bail!("{command:?} ended with status {status:#x}");
    }
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    Ok(seconds(usage.ru_utime) + seconds(usage.ru_stime))
}

fn programs(agent: &Agent, folder: &Path, rounds: usize) -> Result<Vec<Row>> {
    let compiled = |name: &str, source: &str| -> Result<String> {
        let (from, to) = (folder.join(format!("{name}.c")), folder.join(name));
        fs::write(&from, source)?;
        let status = Command::new("gcc").args(["-O2", "-o"]).args([&to, &from]).status()?;
        if !status.success() {
            bail!("gcc ended with {status}");
        }
        Ok(to.to_string_lossy().into_owned())
    };
    let (fib, indirect) = (compiled("fib", FIB)?, compiled("indirect", INDIRECT)?);
    let data = folder.join("data");
    let lines: String =
        (0..400_000_u64).map(|n| format!("{} some text that repeats {}\n", n * n % 7919, n % 13)).collect();
    fs::write(&data, lines)?;
    let data = data.to_string_lossy().into_owned();
    let asap = agent.command_line();
    let mut asap_words = asap.split(' ');
    let program = asap_words.next().context("a program")?;
    let options: Vec<&str> = asap_words.collect();
    let mut rows = Vec::new();
    for (name, needed, words) in PROGRAMS {
        if !needed.is_empty() && !Path::new(needed).exists() {
            continue;
        }
        let word = |word: &&str| match *word {
            "FIB" => fib.clone(),
            "INDIRECT" => indirect.clone(),
            "DATA" => data.clone(),
            other => other.to_owned(),
        };
        let words: Vec<String> = words.iter().map(word).collect();
        let mut native = Vec::new();
        let mut inside = vec![Vec::new(); GUARDS.len()];
        for _ in 0..rounds {
            native.push(time(Command::new(&words[0]).args(&words[1..]))?);
            for (index, guards) in GUARDS.iter().enumerate() {
                let mut command = Command::new(program);
                command.args(&options).arg("run");
                if !guards.is_empty() {
                    command.args(["--guards", guards]);
                }
                inside[index].push(time(command.arg("--").args(&words))?);
            }
        }
        let native = median(&mut native);
        let ratios = inside.iter_mut().map(|times| median(times) / native).collect();
        rows.push(Row { name: format!("{name}, s"), native, ratios, enter_ms: Vec::new() });
    }
    Ok(rows)
}
