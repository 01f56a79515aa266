//! `asap log`.

use super::{
    context::{Global, shown},
    text::{microseconds, table},
};
use crate::{
    agent::audit::{Phase, Record, last_records},
    report::Failure,
};
use serde::Serialize;
use std::{collections::HashSet, io::ErrorKind};

/// Show which changes were asked for, by whom, and what came of them; and which targets ended or run another program.
///
/// This reads the file that --log names. Where systemd's journal runs, it has a copy: journalctl SYSLOG_IDENTIFIER=asap
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  asap log
  asap log -n 100 --json")]
pub struct Log {
    /// So many of the last records; each request has two.
    #[arg(short = 'n', long = "records", value_name = "N", default_value_t = 40)]
    records: usize,
}

#[derive(Serialize)]
struct Records {
    records: Vec<Record>,
    /// Lines that are no records.
    damaged: usize,
}

impl Log {
    pub fn run(self, global: &Global) -> Result<(), Failure> {
        let (records, damaged) = match last_records(&global.log, self.records) {
            Ok(read) => read,
            Err(error) if error.kind() == ErrorKind::NotFound => (Vec::new(), 0),
            Err(error) => {
                return Err(Failure::refused(
                    format!("the audit log {} can't be read: {error}", shown(&global.log)),
                    "run asap as root, or name the log with --log",
                ));
            }
        };
        let records = Records { records, damaged };
        global.show(&records, || log(&records))
    }
}

fn log(log: &Records) -> String {
    let answered: HashSet<_> = log.records.iter().filter(|record| record.phase == Phase::Result).map(key).collect();
    let rows: Vec<_> = log
        .records
        .iter()
        // An intent says something only where its result is missing.
        .filter(|record| record.phase == Phase::Result || !answered.contains(&key(record)))
        .map(row)
        .collect();
    let mut text = if rows.is_empty() {
        "nothing is logged\n".to_owned()
    } else {
        table("", &["TIME", "USER", "COMMAND", "TARGET", "PATCH", "FUNCTIONS", "TOOK", "RESULT"], rows)
    };
    if log.damaged > 0 {
        text.push_str(&format!("{} damaged lines were left out\n", log.damaged));
    }
    text
}

/// Pairs intent and result. The client's pid tells agents apart that had the same pid.
fn key(record: &Record) -> (i32, u64, i32) {
    (record.agent, record.number, record.pid)
}

fn row(record: &Record) -> Vec<String> {
    let result = match (&record.result, &record.message) {
        (Some(result), Some(message)) => format!("{result}: {message}"),
        (Some(result), None) => result.clone(),
        (None, _) => "no result yet, or the agent ended".to_owned(),
    };
    vec![
        record.time.clone(),
        record.uid.to_string(),
        record.command.clone(),
        targets(record),
        record.patch.clone().or_else(|| Some(record.files.first()?.name.clone())).unwrap_or_default(),
        record.functions.join(", "),
        record.duration_us.map_or_else(String::new, microseconds),
        result,
    ]
}

/// The process, or the first of many.
fn targets(record: &Record) -> String {
    match (record.target, &record.targets[..]) {
        (Some(pid), _) | (None, &[pid]) => pid.to_string(),
        (None, []) => String::new(),
        (None, [first, rest @ ..]) => format!("{first} and {} more", rest.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_one_line_and_a_missing_result_is_told() {
        let intent = Record {
            time: "2026-01-02T03:04:05.678Z".to_owned(),
            phase: Phase::Intent,
            agent: 9,
            number: 1,
            uid: 0,
            pid: 77,
            command: "patch".to_owned(),
            target: Some(1234),
            targets: Vec::new(),
            patch: Some("fix".to_owned()),
            sha256: None,
            files: Vec::new(),
            signed_by: None,
            functions: vec!["f".to_owned()],
            result: None,
            message: None,
            duration_us: None,
        };
        let result = Record {
            phase: Phase::Result,
            result: Some("timeout".to_owned()),
            message: Some("`f`\nis busy".to_owned()),
            duration_us: Some(12_345),
            ..intent.clone()
        };
        let second = Record { number: 2, ..intent.clone() };
        assert_eq!(
            log(&Records { records: vec![intent, result, second], damaged: 1 }),
            "\
TIME                      USER  COMMAND  TARGET  PATCH  FUNCTIONS  TOOK     RESULT
2026-01-02T03:04:05.678Z  0     patch    1234    fix    f          12.3 ms  timeout: `f`\\nis busy
2026-01-02T03:04:05.678Z  0     patch    1234    fix    f                   no result yet, or the agent ended
1 damaged lines were left out
"
        );
        assert_eq!(log(&Records { records: Vec::new(), damaged: 0 }), "nothing is logged\n");
    }
}
