//! `cargo xtask soak --sandbox`: the three servers go into the sandbox and come out again, and lose their agents while they are
//! inside. No request may fail, and in the end their code and memory maps are as before.

use super::{Options, SERVERS, Server, Soak};
use anyhow::{Result, ensure};
use serde::Serialize;
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// What is counted.
#[derive(Default, Serialize)]
pub struct Counts {
    /// Times that each server went in and came out.
    cycles: BTreeMap<Server, u64>,
    /// Agents killed while a server was inside: at rest, and on its way out.
    killed_inside: (u64, u64),
    /// Agents killed while a server was on its way in.
    killed_entering: u64,
    /// Milliseconds that entering took, of all processes of a server: median and longest.
    enter_ms: BTreeMap<Server, (f64, f64)>,
}

impl Soak {
    /// The whole run.
    pub(super) fn go_in_and_out(&mut self, options: &Options) -> Result<()> {
        self.warm_up()?;
        self.begin = Instant::now();
        let mut took: BTreeMap<Server, Vec<f64>> = BTreeMap::new();
        let guards = options.guards.clone();
        for server in SERVERS {
            self.attach(server)?;
        }
        while let Some(server) = self.behind(options.cycles) {
            let loads = self.start_loads()?;
            let mut next = server;
            while Instant::now() < loads.end {
                let begin = Instant::now();
                self.turn(next, "enter", guards.as_deref())?;
                took.entry(next).or_default().push(begin.elapsed().as_secs_f64() * 1e3);
                std::thread::sleep(Duration::from_millis(self.random.u64(..20)));
                self.turn(next, "leave", None)?;
                let cycles = self.sandbox.cycles.entry(next).or_default();
                *cycles += 1;
                if cycles.is_multiple_of(50) {
                    self.check(next)?;
                }
                let Some(other) = self.behind(options.cycles) else { break };
                next = other;
            }
            self.finish_loads(loads)?;
            println!("in and out: {:?}", self.sandbox.cycles);
        }
        while self.sandbox.killed_inside.0 + self.sandbox.killed_inside.1 < options.kills {
            let loads = self.start_loads()?;
            while Instant::now() < loads.end {
                self.lose_agent_inside(guards.as_deref())?;
            }
            self.finish_loads(loads)?;
            println!("agents killed while a server was inside: {:?}", self.sandbox.killed_inside);
        }
        for (server, mut times) in took {
            times.sort_by(f64::total_cmp);
            let middle = times.get(times.len() / 2).copied().unwrap_or(0.0);
            self.sandbox.enter_ms.insert(server, (middle, times.last().copied().unwrap_or(0.0)));
        }
        for server in SERVERS {
            self.turn(server, "leave", None)?;
            self.detach(server)?;
        }
        self.totals.seconds = self.begin.elapsed().as_secs_f64();
        Ok(())
    }

    /// The server with the fewest cycles, if it has not had enough.
    fn behind(&self, goal: u64) -> Option<Server> {
        let done = |server: &Server| self.sandbox.cycles.get(server).copied().unwrap_or(0);
        SERVERS.into_iter().filter(|server| done(server) < goal).min_by_key(done)
    }

    fn turn_words(&self, server: Server, action: &str, guards: Option<&str>) -> Vec<String> {
        let mut words: Vec<String> =
            ["sandbox", action, "--pid", &self.pid(server).to_string()].map(str::to_owned).into();
        if let Some(guards) = guards {
            words.extend(["--guards".to_owned(), guards.to_owned()]);
        }
        words
    }

    fn turn(&mut self, server: Server, action: &str, guards: Option<&str>) -> Result<()> {
        self.note(format_args!("{action} {server:?}"));
        let words = self.turn_words(server, action, guards);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let report = self.agent()?.ask(&words)?;
        let processes = report["processes"].as_array().map(Vec::as_slice).unwrap_or_default();
        let inside = processes.iter().filter(|process| process["inside"] == true).count();
        let expected = if action == "enter" { processes.len() } else { 0 };
        ensure!(inside == expected && !processes.is_empty(), "{server:?} after {action}: {report}");
        Ok(())
    }

    /// A server is inside, or on its way, and its agent is killed; the next one takes over.
    fn lose_agent_inside(&mut self, guards: Option<&str>) -> Result<()> {
        let server = SERVERS[self.random.usize(..SERVERS.len())];
        let way = self.random.u8(..5);
        if way == 0 {
            self.turn(server, "leave", None)?;
            let words = self.turn_words(server, "enter", guards);
            self.lose_agent(Some((server, words)))?;
            self.sandbox.killed_entering += 1;
        } else {
            self.turn(server, "enter", guards)?;
            let on_its_way = (way == 1).then(|| (server, self.turn_words(server, "leave", None)));
            let count = &mut self.sandbox.killed_inside;
            *(if on_its_way.is_some() { &mut count.1 } else { &mut count.0 }) += 1;
            std::thread::sleep(Duration::from_millis(self.random.u64(..60)));
            self.lose_agent(on_its_way)?;
        }
        self.check(server)
    }

    /// What came of it, as text.
    pub(super) fn sandbox_summary(&self) -> String {
        let (t, s) = (&self.totals, &self.sandbox);
        let each = |map: &BTreeMap<Server, u64>| -> String {
            let each: Vec<_> = map.iter().map(|(server, count)| format!("{count} {server:?}")).collect();
            each.join(", ")
        };
        let entered: Vec<_> =
            s.enter_ms.iter().map(|(server, (median, most))| format!("{server:?} {median:.0} / {most:.0}")).collect();
        format!(
            "# Sandbox under load, {:.0} s, seed {}\n\n\
             | what | count |\n|---|---|\n\
             | requests answered | {} |\n| failed | {} |\n\
             | times in and out | {} |\n| command `enter`, ms: median / longest | {} |\n\
             | agents killed while a server was inside: at rest / on its way out | {} / {} |\n\
             | agents killed while a server was on its way in | {} |\n\
             | processes found as before attach (code, executable mappings) | {} |\n\
             | agent: most memory, KiB / descriptors | {} / {} |\n",
            t.seconds,
            t.seed,
            each(&t.requests),
            t.failed,
            each(&s.cycles),
            entered.join(", "),
            s.killed_inside.0,
            s.killed_inside.1,
            s.killed_entering,
            t.clean,
            t.agent_rss_kib,
            t.agent_descriptors
        )
    }
}
