//! `cargo xtask soak`: Debian's Apache, nginx and Redis serve their loads while patches go in and out of them at random, agents
//! are killed and follow each other, and Apache's children are replaced. Nothing may fail, and nothing may grow.

pub mod nginx;
mod plot;
mod redis;
mod sandbox;

use crate::{
    agent::Agent,
    apache::{self, Apache},
    command, demo, http,
    load::Load,
    owned::Folder,
    setup,
    snapshot::{Extent, Snapshot},
};
use anyhow::{Context, Result, bail, ensure};
use nginx::Nginx;
use redis::{Clients, Redis};
use serde::Serialize;
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// What a repaired Redis says to PING.
pub const PING_REPAIRED: &str = "repaired";
/// Length of one load of wrk's, seconds.
const SLICE: u64 = 5;

/// How the soak test is run.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// How long.
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Repeat an earlier run's choices.
    #[arg(long)]
    seed: Option<u64>,
    /// Where the report goes: soak.json, soak.md, soak.svg.
    #[arg(long, default_value = "target/soak")]
    output: PathBuf,
    /// Instead of patches: into the sandbox and out of it, as often as --cycles and --kills say.
    #[arg(long)]
    sandbox: bool,
    /// How often each server goes in and out.
    #[arg(long, requires = "sandbox", default_value_t = 1000)]
    cycles: u64,
    /// How often an agent is killed while a server is inside.
    #[arg(long, requires = "sandbox", default_value_t = 200)]
    kills: u64,
    /// A development build of asap, which is there sooner and works more slowly.
    #[arg(long)]
    unoptimised: bool,
    /// Guards, as for `asap sandbox enter --guards`.
    #[arg(long, requires = "sandbox")]
    guards: Option<String>,
}

/// Loads of all servers.
struct Loads {
    web: Load,
    pages: Load,
    clients: Clients,
    /// Shortly before the first of them ends.
    end: Instant,
}

/// A patch that can be put in.
struct Patch {
    /// Its object's name, without the extension: also its name in the agent.
    name: &'static str,
    source: &'static str,
    functions: &'static [&'static str],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Server {
    Apache,
    Nginx,
    Redis,
}

const SERVERS: [Server; 3] = [Server::Apache, Server::Nginx, Server::Redis];

impl Server {
    const fn patches(self) -> &'static [Patch] {
        match self {
            Self::Apache => &[
                Patch {
                    name: "ranges",
                    source: "patches/apache2/byterange-limit/fix.c",
                    functions: &["ap_byterange_filter"],
                },
                Patch { name: "banner", source: "xtask/fixtures/soak/banner.c", functions: &["ap_get_server_banner"] },
            ],
            Self::Nginx => &[
                Patch { name: "time", source: "xtask/fixtures/soak/time.c", functions: &["ngx_http_time"] },
                Patch { name: "header", source: "xtask/fixtures/soak/header.c", functions: &["ngx_http_send_header"] },
            ],
            Self::Redis => &[
                Patch { name: "ping", source: "xtask/fixtures/soak/ping.c", functions: &["pingCommand"] },
                Patch { name: "get", source: "xtask/fixtures/soak/get.c", functions: &["getCommand", "setCommand"] },
            ],
        }
    }
}

/// What is counted.
#[derive(Default, Serialize)]
struct Totals {
    seed: u64,
    seconds: f64,
    /// Requests that were answered, by server.
    requests: BTreeMap<Server, u64>,
    /// Of these, wrong or broken.
    failed: u64,
    patches: u64,
    reverts: u64,
    attaches: u64,
    detaches: u64,
    /// No quiescent moment within the time limit: allowed, and told.
    timeouts: u64,
    /// Agents killed at rest, and in the middle of a request.
    agents_killed: (u64, u64),
    children_replaced: u64,
    /// Times at which a server without patches was found to be as before its first attach, code and memory map.
    clean: u64,
    /// Resident memory of agents after their first minute and at the end, KiB, largest.
    agent_rss_kib: u64,
    agent_descriptors: u64,
}

/// One moment.
#[derive(Serialize)]
struct Sample {
    seconds: f64,
    requests: u64,
    agent_rss_kib: u64,
    /// Lines of the memory maps of the three first processes, together.
    mappings: usize,
    patches: usize,
}

/// Runs it.
pub fn run(options: &Options) -> Result<()> {
    if !command::is_root() {
        bail!("the soak test needs root: it starts servers and attaches to them");
    }
    setup::run()?;
    let seed = options.seed.unwrap_or_else(|| fastrand::u64(..1 << 48));
    println!("seed {seed} (repeat with --seed {seed})");
    let asap = command::build_asap(!options.unoptimised, &[])?;
    let folder = Folder::new("asap-soak-")?;
    for patch in SERVERS.iter().flat_map(|server| server.patches()) {
        demo::compile(&command::top().join(patch.source), &folder.path().join(patch.name).with_extension("o"))?;
    }
    let apache = Apache::start(folder.path())?;
    let nginx = Nginx::start(folder.path())?;
    let redis = Redis::start(folder.path())?;
    let agent = Agent::start(&asap, folder.path())?;
    let mut soak = Soak {
        random: fastrand::Rng::with_seed(seed),
        begin: Instant::now(),
        asap,
        agent: Some(agent),
        apache,
        nginx,
        redis,
        folder,
        state: BTreeMap::new(),
        before: BTreeMap::new(),
        totals: Totals { seed, ..Totals::default() },
        sandbox: sandbox::Counts::default(),
        samples: Vec::new(),
        events: Vec::new(),
    };
    let done = match options.sandbox {
        true => soak.go_in_and_out(options),
        false => soak.all(Duration::from_secs(options.minutes * 60)),
    };
    if let Err(error) = done {
        for event in soak.events.iter().rev().take(60).rev() {
            eprintln!("{event}");
        }
        return Err(error);
    }
    soak.write(options)?;
    ensure!(soak.totals.failed == 0, "{} requests failed", soak.totals.failed);
    Ok(())
}

/// A run. The agent ends first, then the servers, then the folder.
struct Soak {
    agent: Option<Agent>,
    apache: Apache,
    nginx: Nginx,
    redis: Redis,
    random: fastrand::Rng,
    begin: Instant,
    asap: PathBuf,
    folder: Folder,
    /// Attached servers, and the patches in them, oldest first.
    state: BTreeMap<Server, Vec<String>>,
    /// What the processes were before the first attach.
    before: BTreeMap<i32, Snapshot>,
    totals: Totals,
    sandbox: sandbox::Counts,
    samples: Vec<Sample>,
    /// What was done when: for those who look for the cause of a failure.
    events: Vec<String>,
}

impl Soak {
    fn note(&mut self, what: impl std::fmt::Display) {
        self.events.push(format!("{:9.4} {what}", self.begin.elapsed().as_secs_f64()));
    }

    fn agent(&self) -> Result<&Agent> {
        self.agent.as_ref().context("an agent")
    }

    fn pid(&self, server: Server) -> i32 {
        match server {
            Server::Apache => self.apache.pid(),
            Server::Nginx => self.nginx.pid(),
            Server::Redis => self.redis.pid(),
        }
    }

    fn processes(&self, server: Server) -> Vec<i32> {
        match server {
            Server::Apache => self.apache.processes(),
            Server::Nginx => self.nginx.processes(),
            Server::Redis => vec![self.redis.pid()],
        }
    }

    fn all(&mut self, length: Duration) -> Result<()> {
        self.warm_up()?;
        self.begin = Instant::now();
        while self.begin.elapsed() < length {
            self.slice()?;
            // wrk takes the end of an idle connection for a failure: children are replaced between two loads.
            if self.random.u8(..3) == 0 {
                self.note("replace Apache's children");
                self.apache.restart_gracefully()?;
                self.totals.children_replaced += apache::CHILDREN as u64;
                self.check(Server::Apache)?;
            }
        }
        for server in SERVERS {
            if self.state.contains_key(&server) {
                self.detach(server)?;
            }
        }
        self.totals.seconds = self.begin.elapsed().as_secs_f64();
        Ok(())
    }

    /// What the servers were before anything was done to them.
    fn warm_up(&mut self) -> Result<()> {
        // Past their first requests, when they map and load what they need.
        for address in [self.apache.address, self.nginx.address] {
            let path = if address == self.apache.address { apache::FILE } else { nginx::FILE };
            let warm = Load::start(address, path, 2)?.finish()?;
            ensure!(warm.failed == 0, "{} requests failed before anything was done", warm.failed);
        }
        let pids: Vec<i32> = SERVERS.iter().flat_map(|&server| self.processes(server)).collect();
        for pid in pids {
            self.before.insert(pid, Snapshot::of(pid)?);
        }
        Ok(())
    }

    /// Some seconds of load, in which as much is done as can be.
    fn slice(&mut self) -> Result<()> {
        let loads = self.start_loads()?;
        while Instant::now() < loads.end {
            self.step()?;
            std::thread::sleep(Duration::from_millis(self.random.u64(..150)));
        }
        self.finish_loads(loads)
    }

    fn start_loads(&mut self) -> Result<Loads> {
        let end = Instant::now() + Duration::from_secs(SLICE) - Duration::from_millis(300);
        self.note("load");
        let web = Load::start(self.apache.address, apache::FILE, SLICE)?;
        let pages = Load::start(self.nginx.address, nginx::FILE, SLICE)?;
        let clients = Clients::start(self.redis.address);
        Ok(Loads { web, pages, clients, end })
    }

    fn finish_loads(&mut self, loads: Loads) -> Result<()> {
        for (server, load) in [(Server::Apache, loads.web), (Server::Nginx, loads.pages)] {
            let report = load.finish()?;
            *self.totals.requests.entry(server).or_default() += report.requests;
            self.totals.failed += report.failed;
            ensure!(
                report.failed == 0,
                "{} of {} requests to {server:?} failed ({})",
                report.failed,
                report.requests,
                report.failures
            );
        }
        *self.totals.requests.entry(Server::Redis).or_default() += loads.clients.finish()?;
        self.sample()
    }

    /// One thing, at random.
    fn step(&mut self) -> Result<()> {
        let server = SERVERS[self.random.usize(..SERVERS.len())];
        let Some(applied) = self.state.get(&server) else { return self.attach(server) };
        let open: Vec<_> =
            server.patches().iter().filter(|patch| !applied.iter().any(|name| name == patch.name)).collect();
        match self.random.u8(..20) {
            0 => self.detach(server),
            1 => self.lose_agent(None),
            2 if !open.is_empty() => {
                let patch = open[self.random.usize(..open.len())];
                let words = self.words(server, patch);
                self.lose_agent(Some((server, words)))
            }
            3..=11 if !open.is_empty() => {
                let patch = open[self.random.usize(..open.len())];
                self.patch(server, patch)
            }
            12..=18 if !applied.is_empty() => self.revert(server),
            _ => self.check(server),
        }
    }

    fn attach(&mut self, server: Server) -> Result<()> {
        self.note(format_args!("attach {server:?}"));
        let report = self.agent()?.ask(&["attach", "--pid", &self.pid(server).to_string()])?;
        self.totals.attaches += 1;
        self.state.insert(server, names(&report["target"]["patches"]));
        self.check(server)
    }

    fn words(&self, server: Server, patch: &Patch) -> Vec<String> {
        let mut words: Vec<String> = ["patch", "--pid", &self.pid(server).to_string()].map(str::to_owned).into();
        words.extend(patch.functions.iter().flat_map(|name| ["--function".to_owned(), (*name).to_owned()]));
        words.push(self.folder.path().join(patch.name).with_extension("o").display().to_string());
        words
    }

    fn patch(&mut self, server: Server, patch: &Patch) -> Result<()> {
        let words = self.words(server, patch);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        self.note(format_args!("patch {server:?}: {}", patch.name));
        match self.agent()?.ask(&words) {
            Ok(_) => {
                self.totals.patches += 1;
                self.state.entry(server).or_default().push(patch.name.to_owned());
            }
            Err(error) if format!("{error:#}").contains("there was no moment") => self.totals.timeouts += 1,
            Err(error) => return Err(error),
        }
        self.check(server)
    }

    /// The newest, or the one below it.
    fn revert(&mut self, server: Server) -> Result<()> {
        let applied = self.state.entry(server).or_default();
        let name = applied[self.random.usize(..applied.len())].clone();
        self.note(format_args!("revert {server:?}: {name}"));
        match self.agent()?.ask(&["revert", "--pid", &self.pid(server).to_string(), &name]) {
            Ok(_) => {
                self.totals.reverts += 1;
                self.state.entry(server).or_default().retain(|other| *other != name);
            }
            Err(error) if format!("{error:#}").contains("there was no moment") => self.totals.timeouts += 1,
            Err(error) => return Err(error),
        }
        self.check(server)
    }

    /// Nothing may be left of us then.
    fn detach(&mut self, server: Server) -> Result<()> {
        self.note(format_args!("detach {server:?}"));
        self.agent()?.ask(&["detach", "--pid", &self.pid(server).to_string(), "--revert"])?;
        self.totals.detaches += 1;
        self.state.remove(&server);
        for pid in self.processes(server) {
            let now = Snapshot::of(pid)?;
            now.ensure_code_is_of_files()?;
            // Apache's new children were not there before the first attach.
            if let Some(before) = self.before.get(&pid) {
                before.ensure_same(&now, Extent::Code)?;
                self.totals.clean += 1;
            }
        }
        self.check(server)
    }

    /// The agent is killed, at rest or while it does something; the next one takes over.
    fn lose_agent(&mut self, while_it: Option<(Server, Vec<String>)>) -> Result<()> {
        self.note(format_args!("kill the agent, while it: {while_it:?}"));
        let mut agent = self.agent.take().context("an agent")?;
        match while_it {
            None => {
                agent.kill()?;
                self.totals.agents_killed.0 += 1;
            }
            Some((_, words)) => {
                let mut request = agent.begin(&words.iter().map(String::as_str).collect::<Vec<_>>())?;
                std::thread::sleep(Duration::from_micros(self.random.u64(..40_000)));
                agent.kill()?;
                request.wait()?;
                self.totals.agents_killed.1 += 1;
            }
        }
        drop(agent);
        self.agent = Some(Agent::start(&self.asap, self.folder.path())?);
        let attached: Vec<_> = self.state.keys().copied().collect();
        self.state.clear();
        for server in attached {
            self.attach(server)?;
        }
        Ok(())
    }

    /// Whether a server does what the patches that are in it say.
    fn check(&mut self, server: Server) -> Result<()> {
        self.note(format_args!("check {server:?}"));
        let applied = self.state.get(&server).cloned().unwrap_or_default();
        let has = |name: &str| applied.iter().any(|other| other == name);
        match server {
            Server::Apache => {
                let ranges: Vec<_> = (0..100).map(|n| (n * 3, n * 3)).collect();
                let answer = http::get(self.apache.address, apache::FILE, &ranges)?;
                let expected = if has("ranges") { 200 } else { 206 };
                ensure!(answer.status == expected, "apache answered {} with {applied:?}", answer.status);
                let banner = answer.header("Server").unwrap_or_default();
                ensure!((banner == "Repaired") == has("banner"), "apache is {banner:?} with {applied:?}");
            }
            Server::Nginx => {
                let date = self.nginx.header("Last-Modified")?;
                ensure!(date.contains(" 1999 ") == has("time"), "nginx says {date:?} with {applied:?}");
            }
            Server::Redis => {
                let said = self.redis.ping()?;
                ensure!((said == PING_REPAIRED) == has("ping"), "redis says {said:?} with {applied:?}");
            }
        }
        Ok(())
    }

    fn sample(&mut self) -> Result<()> {
        let agent = self.agent()?.pid();
        let descriptors = fs::read_dir(format!("/proc/{agent}/fd"))?.count() as u64;
        let rss = crate::bench::resident(agent)?;
        self.totals.agent_rss_kib = self.totals.agent_rss_kib.max(rss);
        self.totals.agent_descriptors = self.totals.agent_descriptors.max(descriptors);
        let mut mappings = 0;
        for server in SERVERS {
            mappings += fs::read_to_string(format!("/proc/{}/maps", self.pid(server)))?.lines().count();
        }
        self.samples.push(Sample {
            seconds: self.begin.elapsed().as_secs_f64(),
            requests: self.totals.requests.values().sum(),
            agent_rss_kib: rss,
            mappings,
            patches: self.state.values().map(Vec::len).sum(),
        });
        Ok(())
    }

    fn summary(&self) -> String {
        let t = &self.totals;
        let requests: Vec<_> = t.requests.iter().map(|(server, count)| format!("{count} {server:?}")).collect();
        format!(
            "# Soak test, {:.0} s, seed {}\n\n\
             | what | count |\n|---|---|\n\
             | requests answered | {} |\n| failed | {} |\n\
             | patches in / out | {} / {} |\n| attach / detach | {} / {} |\n\
             | no quiescent moment in time | {} |\n\
             | agents killed at rest / in the middle | {} / {} |\n| Apache children replaced | {} |\n\
             | processes found as before attach (code, executable mappings) | {} |\n\
             | agent: most memory, KiB / descriptors | {} / {} |\n\n![over time](soak.svg)\n",
            t.seconds,
            t.seed,
            requests.join(", "),
            t.failed,
            t.patches,
            t.reverts,
            t.attaches,
            t.detaches,
            t.timeouts,
            t.agents_killed.0,
            t.agents_killed.1,
            t.children_replaced,
            t.clean,
            t.agent_rss_kib,
            t.agent_descriptors
        )
    }

    fn write(&self, options: &Options) -> Result<()> {
        let output: &Path = &options.output;
        fs::create_dir_all(output).with_context(|| format!("{} can't be made", output.display()))?;
        let (name, summary) = match options.sandbox {
            true => ("sandbox", self.sandbox_summary()),
            false => ("soak", self.summary()),
        };
        fs::write(output.join(name).with_extension("md"), &summary)?;
        let report = serde_json::json!({ "totals": self.totals, "sandbox": self.sandbox, "samples": self.samples });
        fs::write(output.join(name).with_extension("json"), serde_json::to_string_pretty(&report)?)?;
        if !options.sandbox {
            plot::write(&output.join("soak.svg"), &self.samples)?;
        }
        println!("report: {}", output.display());
        print!("{summary}");
        Ok(())
    }
}

/// Names of patches in an answer.
fn names(patches: &Value) -> Vec<String> {
    let all = patches.as_array().map(Vec::as_slice).unwrap_or_default();
    all.iter().filter_map(|patch| patch["name"].as_str()).map(str::to_owned).collect()
}
