//! How targets and patches look; used by several subcommands.

use super::text::{count, microseconds, point_in_time, printable, table};
use crate::report::{InstalledPatch, Mechanism, PatchReport, TargetReport};

/// A target with its processes, patches and notes.
pub fn target(report: &TargetReport) -> String {
    let threads = report.processes.iter().map(|process| process.threads).sum();
    let processes = count(report.processes.len(), "process", "processes");
    let threads = count(threads, "thread", "threads");
    let mut text = format!("{}  {}  {processes}, {threads}", report.pid, printable(&report.executable));
    if let Some(id) = &report.build_id {
        text.push_str(&format!("  build-id {}", printable(id)));
    }
    text.push('\n');
    if report.patches.is_empty() {
        text.push_str("  no patches\n");
    } else {
        let rows = report.patches.iter().map(|patch| {
            let active = report.processes.iter().filter(|process| process.patches.contains(&patch.id)).count();
            let mut row = patch_row(patch);
            row.push(format!("{active} of {}", report.processes.len()));
            row
        });
        text.push_str(&table("  ", &["PATCH", "NAME", "FUNCTIONS", "SINCE", "SHA-256", "PROCESSES"], rows));
    }
    text + &notes(&report.notes)
}

/// Number, name, functions, time, hash.
pub fn patch_row(patch: &InstalledPatch) -> Vec<String> {
    let mut functions: Vec<_> = patch.functions.iter().map(|function| function.name.as_str()).collect();
    if patch.mechanism == Mechanism::Redirect {
        functions.push("(redirected)");
    }
    vec![
        patch.id.0.to_string(),
        patch.name.clone(),
        functions.join(", "),
        point_in_time(patch.installed_at),
        patch.sha256.chars().take(12).collect(),
    ]
}

/// What was replaced, and what it cost each process.
pub fn patch_details(report: &PatchReport) -> String {
    let functions = report.patch.functions.iter().map(|function| {
        vec![function.name.clone(), function.module.clone(), function.old.to_string(), function.new.to_string()]
    });
    let mut text = table("  ", &["FUNCTION", "MODULE", "OLD", "NEW"], functions);
    if !report.processes.is_empty() {
        let header = ["PROCESS", "HOW", "TRIES", "THREADS", "STOPPED", "LONGEST STOP", "AT GATE", "GATE CLOSED"];
        let rows = report.processes.iter().map(|process| {
            vec![
                process.pid.to_string(),
                process.quiescence.clone(),
                process.attempts.to_string(),
                process.threads.to_string(),
                process.threads_stopped.to_string(),
                microseconds(process.longest_stop_us),
                process.threads_parked.to_string(),
                microseconds(process.longest_gate_us),
            ]
        });
        text.push_str(&table("  ", &header, rows));
    }
    text + &notes(&report.notes)
}

fn notes(notes: &[String]) -> String {
    notes.iter().map(|note| format!("  note: {}\n", printable(note))).collect()
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::{
        address::TargetAddr,
        report::{FunctionReport, Mechanism, PatchId, ProcessPatchReport, ProcessReport},
    };

    pub fn installed() -> InstalledPatch {
        InstalledPatch {
            id: PatchId(1),
            name: "fix".to_owned(),
            sha256: "0123456789abcdef".repeat(4),
            installed_at: 1_700_000_000,
            mechanism: Mechanism::Page,
            functions: vec![FunctionReport {
                name: "ap_byterange_filter".to_owned(),
                module: "apache2".to_owned(),
                old: TargetAddr(0x55d0_c0de_1000),
                new: TargetAddr(0x55d0_a000_0040),
            }],
        }
    }

    pub fn target() -> TargetReport {
        TargetReport {
            pid: 1234,
            executable: "/usr/sbin/apache2".to_owned(),
            build_id: Some("c0ffee".to_owned()),
            processes: vec![
                ProcessReport { pid: 1234, threads: 1, patches: vec![PatchId(1)] },
                ProcessReport { pid: 1240, threads: 27, patches: Vec::new() },
            ],
            patches: vec![installed()],
            notes: vec!["a breakpoint\u{1b} of somebody else".to_owned()],
        }
    }

    pub fn patch_report() -> PatchReport {
        PatchReport {
            patch: installed(),
            processes: vec![ProcessPatchReport {
                pid: 1234,
                quiescence: "gate and stack walks".to_owned(),
                attempts: 1,
                threads: 27,
                threads_stopped: 2,
                longest_stop_us: 85,
                threads_parked: 3,
                longest_gate_us: 120,
            }],
            dry_run: false,
            already: false,
            total_us: 12_345,
            notes: vec!["a note".to_owned()],
        }
    }

    #[test]
    fn a_target_tells_its_processes_patches_and_notes() {
        assert_eq!(
            super::target(&target()),
            "\
1234  /usr/sbin/apache2  2 processes, 28 threads  build-id c0ffee
  PATCH  NAME  FUNCTIONS            SINCE                 SHA-256       PROCESSES
  1      fix   ap_byterange_filter  2023-11-14T22:13:20Z  0123456789ab  1 of 2
  note: a breakpoint\\u{1b} of somebody else
"
        );
        let bare = TargetReport { patches: Vec::new(), notes: Vec::new(), build_id: None, ..target() };
        assert_eq!(super::target(&bare), "1234  /usr/sbin/apache2  2 processes, 28 threads\n  no patches\n");
    }
}
