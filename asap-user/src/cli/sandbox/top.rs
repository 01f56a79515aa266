//! `asap sandbox top`: how a target runs in the sandbox, every second. Nothing but text and, on a terminal, the sequences that
//! clear it.

use super::{Target, show, status};
use crate::{
    cli::{
        context::{Global, print, require_root},
        text::{count, point_in_time, table},
    },
    report::{Failure, FailureKind, SandboxReport},
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::termios::{LocalFlags, SetArg, SpecialCharacterIndices, Termios, tcgetattr, tcsetattr},
};
use std::{
    collections::BTreeMap,
    io::{IsTerminal, stdin, stdout},
    os::fd::AsFd,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// How often it looks.
const PERIOD: Duration = Duration::from_secs(1);
/// Violations that fit on a screen.
const VIOLATIONS_SHOWN: usize = 5;
/// Moves to the upper left corner and clears the terminal (ECMA-48: CUP, ED).
const CLEAR: &str = "\x1b[H\x1b[2J";
/// Ctrl-C, as a byte.
const INTERRUPT: u8 = 3;

/// See the module.
#[derive(Debug, clap::Args)]
pub struct Top {
    #[command(flatten)]
    target: Target,
    /// Look twice, a second apart, print, and end.
    #[arg(long)]
    once: bool,
}

impl Top {
    pub fn run(&self, global: &Global) -> Result<(), Failure> {
        require_root("sandbox top")?;
        let look = || status(&global.socket, self.target.pid).map(|report| Sample { at: Instant::now(), report });
        let mut before = look()?;
        if self.once || global.json || !stdout().is_terminal() {
            std::thread::sleep(PERIOD);
            let now = look()?;
            return global.show(&now.report, || screen(&before, &now));
        }
        let keys = Keys::listen();
        loop {
            if keys.quit_within(PERIOD) {
                return Ok(());
            }
            let now = match look() {
                Ok(now) => now,
                Err(failure) if failure.kind == FailureKind::Refused => {
                    print("\n")?;
                    return Err(failure);
                }
                Err(failure) => return Err(failure),
            };
            print(&format!("{CLEAR}{}", screen(&before, &now)))?;
            before = now;
        }
    }
}

/// What was seen at a moment.
struct Sample {
    at: Instant,
    report: SandboxReport,
}

/// The screen: how it is, and what happened since `before`.
fn screen(before: &Sample, now: &Sample) -> String {
    let seconds = now.at.duration_since(before.at).as_secs_f64().max(0.001);
    let rate = |now: u64, before: u64| format!("{:.0}", now.saturating_sub(before) as f64 / seconds);
    let report = &now.report;
    let inside = report.processes.iter().filter(|process| process.inside).count();
    let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let mut text = format!(
        "{}  {}: {inside} of {} in the sandbox  (q quits)\n",
        point_in_time(time),
        report.pid,
        count(report.processes.len(), "process", "processes")
    );
    let earlier: BTreeMap<i32, u64> = before.report.processes.iter().map(|known| (known.pid, known.traps)).collect();
    let rows = report.processes.iter().map(|process| {
        vec![
            process.pid.to_string(),
            process.since.filter(|_| process.inside).map_or_else(|| "native".to_owned(), point_in_time),
            process.pages.to_string(),
            process.traps.to_string(),
            rate(process.traps, earlier.get(&process.pid).copied().unwrap_or(process.traps)),
        ]
    });
    text.push_str(&table("", &["PROCESS", "INSIDE SINCE", "PAGES", "TRAPS", "PER SECOND"], rows));
    for family in &report.families {
        let known = before.report.families.iter().find(|known| known.pids.first() == family.pids.first());
        let stops_before = |what: &str| known.and_then(|known| known.stops.get(what)).copied().unwrap_or(0);
        text.push_str(&format!(
            "\nguards of {}: {}\n",
            family.pids.first().copied().unwrap_or(0),
            show::guards(family)
        ));
        text.push_str(&format!(
            "translated: {}, {} KiB of fragments, {} left native\n",
            count(family.pages as usize, "page", "pages"),
            family.fragments.div_ceil(1024),
            count(family.refused.len(), "page", "pages"),
        ));
        let rows: Vec<_> = family
            .stops
            .iter()
            .map(|(what, &times)| vec![what.clone(), times.to_string(), rate(times, stops_before(what))])
            .collect();
        if !rows.is_empty() {
            text.push_str(&table("", &["STOPPED AT", "TIMES", "PER SECOND"], rows));
        }
        text.push_str(&show::sites(family));
        text.push_str(&show::violations(family, VIOLATIONS_SHOWN));
    }
    text
}

/// Keys are read one by one, and not shown. The terminal is as it was when this is dropped.
struct Keys(Option<Termios>);

impl Keys {
    fn listen() -> Self {
        let before = stdin().is_terminal().then(|| tcgetattr(stdin()).ok()).flatten();
        if let Some(before) = &before {
            let mut raw = before.clone();
            // Ctrl-C comes as a byte, too: the terminal is to be left as it was.
            raw.local_flags.remove(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG);
            raw.control_chars[SpecialCharacterIndices::VMIN as usize] = 1;
            raw.control_chars[SpecialCharacterIndices::VTIME as usize] = 0;
            let _ = tcsetattr(stdin(), SetArg::TCSANOW, &raw);
        }
        Self(before)
    }

    /// Waits so long; gives whether somebody wants to quit.
    fn quit_within(&self, time: Duration) -> bool {
        if self.0.is_none() {
            std::thread::sleep(time);
            return false;
        }
        let until = Instant::now() + time;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let input = stdin();
            let mut ready = [PollFd::new(input.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ready, PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO)) {
                Ok(0) | Err(_) => return false,
                Ok(_) => {}
            }
            let mut key = [0];
            match nix::unistd::read(input.as_fd(), &mut key) {
                Ok(1) if matches!(key[0], b'q' | b'Q' | INTERRUPT) => return true,
                Ok(1) => {}
                // The terminal is gone.
                _ => return true,
            }
        }
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(stdin(), SetArg::TCSANOW, before);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_shows_what_happens_per_second() {
        let at = Instant::now();
        let before = Sample { at, report: show::tests::example() };
        let mut now = Sample { at: at + Duration::from_secs(2), report: show::tests::example() };
        now.report.processes[0].traps += 20;
        now.report.families[0].stops.insert("return".to_owned(), 5);
        let text = screen(&before, &now);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].ends_with("7: 1 of 2 processes in the sandbox  (q quits)"), "{text}");
        assert_eq!(lines[2], "7        2023-11-14T22:13:20Z  500    61     10");
        assert_eq!(lines[3], "8        native                0      0      0");
        assert!(text.contains("STOPPED AT  TIMES  PER SECOND\nreturn      5      2\n"), "{text}");
        assert!(text.contains("1 violation\n") && text.contains("serve+0x1c\\u{1b}"), "{text}");
    }
}
