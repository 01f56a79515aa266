//! How a report of the sandbox looks, for `status` and its relatives.

use crate::{
    cli::text::{count, microseconds, point_in_time, printable, table},
    report::{SandboxAction, SandboxFamily, SandboxReport, SiteCount},
    sandbox::{NativeCode, Violation, policy::Guard},
};
use std::collections::BTreeMap;

/// Most violations that are shown with their stacks; `--json` has all that the agent still knows.
const VIOLATIONS_SHOWN: usize = 10;

/// The whole report.
pub fn report(report: &SandboxReport, action: SandboxAction) -> String {
    let processes = count(report.processes.len(), "process", "processes");
    let took = microseconds(report.total_us);
    let mut text = match action {
        SandboxAction::Enter => format!("{}: {processes} in the sandbox in {took}\n", report.pid),
        SandboxAction::Leave => format!("{}: {processes} out of the sandbox in {took}\n", report.pid),
        SandboxAction::Status | SandboxAction::Dump => format!("{}: {processes}\n", report.pid),
    };
    if action != SandboxAction::Leave {
        text.push_str(&processes_of(report));
        text.push_str(&native(report));
        report.families.iter().for_each(|known| text.push_str(&family(known)));
    }
    text + &report.notes.iter().map(|note| format!("  note: {}\n", printable(note))).collect::<String>()
}

fn processes_of(report: &SandboxReport) -> String {
    let rows = report.processes.iter().map(|process| {
        vec![
            process.pid.to_string(),
            process.since.filter(|_| process.inside).map_or_else(|| "native".to_owned(), point_in_time),
            process.texts.to_string(),
            process.pages.to_string(),
            process.traps.to_string(),
        ]
    });
    table("  ", &["PROCESS", "INSIDE SINCE", "TEXTS", "PAGES", "TRAPS"], rows)
}

/// What runs natively, once for all processes that say the same.
fn native(report: &SandboxReport) -> String {
    let mut found: BTreeMap<(&str, &str), (u64, usize)> = BTreeMap::new();
    for process in &report.processes {
        for NativeCode { length, name, reason, .. } in &process.native {
            let entry = found.entry((name, reason)).or_default();
            *entry = (*length.max(&entry.0), entry.1 + 1);
        }
    }
    let line = |((name, reason), (length, times)): ((&str, &str), (u64, usize))| {
        let name = if name.is_empty() { "anonymous memory" } else { name };
        let times = if times == 1 { String::new() } else { format!(", {times} times") };
        format!("  native: {} ({} KiB{times}): {}\n", printable(name), length / 1024, printable(reason))
    };
    found.into_iter().map(line).collect()
}

/// What is checked in a family, and what came of it.
fn family(family: &SandboxFamily) -> String {
    if family.policy.guards.is_empty() && family.learned.is_none() {
        return String::new();
    }
    let mut text = format!("  guards of {}: {}\n", list(&family.pids), guards(family));
    text.push_str(&format!(
        "  code: {} translated, {} KiB of fragments, {} left native\n",
        count(family.pages as usize, "page", "pages"),
        family.fragments.div_ceil(1024),
        count(family.refused.len(), "page", "pages"),
    ));
    text.push_str(&sites(family));
    text.push_str(&stops(family));
    if let Some(learned) = &family.learned {
        text.push_str(&format!("  learned: {}\n", count(learned.calls().count(), "system call", "system calls")));
    }
    text.push_str(&violations(family, VIOLATIONS_SHOWN));
    text
}

fn list(pids: &[i32]) -> String {
    pids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// The guards, with what they do.
pub fn guards(family: &SandboxFamily) -> String {
    let one = |guard: &Guard| match (guard, &family.policy.syscalls) {
        (Guard::Syscalls, Some(calls)) => {
            let default = String::from(calls.default);
            format!("syscalls ({default} by default, {})", count(calls.rules.len(), "rule", "rules"))
        }
        (Guard::Syscalls, None) => "syscalls".to_owned(),
        (guard, _) => {
            let action = serde_json::to_value(family.policy.action(*guard)).ok();
            format!("{guard} ({})", action.as_ref().and_then(|action| action.as_str()).unwrap_or_default())
        }
    };
    match family.policy.guards.as_slice() {
        [] => "none".to_owned(),
        guards => guards.iter().map(one).collect::<Vec<_>>().join(", "),
    }
}

/// What became of the instructions that guards are about: per kind, and the reasons of those that are native.
pub fn sites(family: &SandboxFamily) -> String {
    let mut kinds: BTreeMap<&str, Vec<&SiteCount>> = BTreeMap::new();
    for site in &family.sites {
        kinds.entry(&site.kind).or_default().push(site);
    }
    let row = |(kind, sites): (&str, Vec<&SiteCount>)| {
        let (guarded, mut native): (Vec<_>, Vec<_>) = sites.into_iter().partition(|site| site.is_guarded);
        native.sort_unstable_by_key(|site| std::cmp::Reverse(site.count));
        let reasons: Vec<String> = native.iter().map(|site| format!("{} {}", site.count, site.reason)).collect();
        let sum = |sites: &[&SiteCount]| sites.iter().map(|site| site.count).sum::<u64>().to_string();
        vec![kind.to_owned(), sum(&guarded), sum(&native), reasons.join(", ")]
    };
    let rows: Vec<_> = kinds.into_iter().map(row).collect();
    if rows.is_empty() { String::new() } else { table("  ", &["SITES", "GUARDED", "NATIVE", "BECAUSE OF"], rows) }
}

fn stops(family: &SandboxFamily) -> String {
    let each: Vec<String> =
        family.stops.iter().map(|(what, times)| format!("{times} at {}", printable(what))).collect();
    if each.is_empty() { String::new() } else { format!("  threads stopped: {}\n", each.join(", ")) }
}

/// What the guards of a program have met that was run; nothing, if that is nothing.
pub fn violations_of(report: &SandboxReport) -> String {
    let found: String = report.families.iter().map(|family| violations(family, VIOLATIONS_SHOWN)).collect();
    if found.is_empty() { found } else { format!("asap: the guards of process {}:\n{found}", report.pid) }
}

/// The last violations.
pub fn violations(family: &SandboxFamily, most: usize) -> String {
    let mut text = String::new();
    let hidden = family.violation_count.saturating_sub(most.min(family.violations.len()) as u64);
    if family.violation_count > 0 {
        let more = if hidden > 0 { format!("; {hidden} older ones are not shown") } else { String::new() };
        let number = count(family.violation_count as usize, "violation", "violations");
        text.push_str(&format!("  {number}{more}\n"));
    }
    let skipped = family.violations.len().saturating_sub(most);
    family.violations.iter().skip(skipped).for_each(|met| text.push_str(&violation(met)));
    text
}

fn violation(met: &Violation) -> String {
    let mut text = format!(
        "  {} {} {}/{} at {}: {}: {}\n",
        point_in_time(met.time_ms / 1000),
        met.guard,
        met.pid,
        met.tid,
        printable(&met.at),
        printable(&met.attempted),
        printable(&met.action)
    );
    for (depth, frame) in met.stack.iter().enumerate() {
        text.push_str(&format!("    #{depth:<2} {}\n", printable(frame)));
    }
    text
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{
        address::TargetAddr,
        report::SandboxProcess,
        sandbox::policy::{Action, Policy},
    };

    /// A target with two processes, one of them inside, and a violation.
    pub fn example() -> SandboxReport {
        let native = NativeCode {
            start: TargetAddr(0x1000),
            length: 8192,
            name: "[vdso]".to_owned(),
            reason: "it belongs to the kernel".to_owned(),
        };
        let inside = SandboxProcess {
            pid: 7,
            inside: true,
            since: Some(1_700_000_000),
            texts: 3,
            pages: 500,
            traps: 41,
            native: vec![native.clone()],
        };
        let outside =
            SandboxProcess { pid: 8, inside: false, since: None, texts: 0, pages: 0, traps: 0, ..inside.clone() };
        let site = |kind: &str, is_guarded, reason: &str, count| SiteCount {
            kind: kind.to_owned(),
            is_guarded,
            reason: reason.to_owned(),
            count,
        };
        let violation = Violation {
            time_ms: 1_700_000_001_500,
            pid: 7,
            tid: 9,
            guard: Guard::ShadowStack,
            at: "serve+0x1c\u{1b}".to_owned(),
            attempted: "a return to 0x41414141".to_owned(),
            action: "killed".to_owned(),
            stack: vec!["serve+0x1c".to_owned(), "main".to_owned()],
        };
        let family = SandboxFamily {
            pids: vec![7],
            policy: Policy::of(&[Guard::ShadowStack, Guard::Syscalls], Action::Kill),
            pages: 12,
            fragments: 5000,
            sites: vec![
                site("return", true, "in place", 90),
                site("return", false, "no room", 3),
                site("return", false, "not understood", 7),
            ],
            stops: [("return".to_owned(), 1)].into(),
            violations: vec![violation],
            violation_count: 1,
            ..SandboxFamily::default()
        };
        SandboxReport {
            pid: 7,
            processes: vec![inside, outside],
            families: vec![family],
            dump: None,
            total_us: 1500,
            notes: vec!["a note".to_owned()],
        }
    }

    #[test]
    fn status_tells_what_is_in_and_what_is_not() {
        assert_eq!(
            report(&example(), SandboxAction::Status),
            "\
7: 2 processes
  PROCESS  INSIDE SINCE          TEXTS  PAGES  TRAPS
  7        2023-11-14T22:13:20Z  3      500    41
  8        native                0      0      0
  native: [vdso] (8 KiB, 2 times): it belongs to the kernel
  guards of 7: shadow-stack (kill), syscalls (allow by default, 0 rules)
  code: 12 pages translated, 5 KiB of fragments, 0 pages left native
  SITES   GUARDED  NATIVE  BECAUSE OF
  return  90       10      7 not understood, 3 no room
  threads stopped: 1 at return
  1 violation
  2023-11-14T22:13:21Z shadow-stack 7/9 at serve+0x1c\\u{1b}: a return to 0x41414141: killed
    #0  serve+0x1c
    #1  main
  note: a note
"
        );
        assert_eq!(
            report(&example(), SandboxAction::Leave),
            "7: 2 processes out of the sandbox in 1.5 ms\n  note: a note\n"
        );
    }

    #[test]
    fn only_the_last_violations_are_shown() {
        let mut family = example().families.remove(0);
        let one = family.violations[0].clone();
        family.violations = (0..30).map(|tid| Violation { tid, stack: Vec::new(), ..one.clone() }).collect();
        family.violation_count = 100;
        let text = violations(&family, 10);
        assert!(text.starts_with("  100 violations; 90 older ones are not shown\n"), "{text}");
        assert_eq!(text.lines().count(), 11);
        assert!(text.contains("7/29 at") && text.contains("7/20 at") && !text.contains("7/19 at"), "{text}");
    }
}
