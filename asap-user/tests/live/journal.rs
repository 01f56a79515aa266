//! What is in the audit log is in the system's journal, too.

use crate::support::{Lab, Source};
use std::{os::unix::net::UnixDatagram, time::Duration};

#[test]
fn the_journal_gets_a_copy_of_the_audit_log() {
    let Some(lab) = Lab::new("the_journal_gets_a_copy_of_the_audit_log") else { return };
    let journal = UnixDatagram::bind(lab.path("journal")).expect("bound");
    journal.set_read_timeout(Some(Duration::from_secs(60))).expect("set");
    let next = || {
        let mut buffer = vec![0; 1 << 16];
        let length = journal.recv(&mut buffer).expect("a record");
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    let target = Source::of(&["workers.c"]).start(&["0"]);
    lab.attach(target.pid());
    for phase in ["intent", "result"] {
        let record = next();
        for part in ["SYSLOG_IDENTIFIER", "asap", "attach of process", &target.pid_text(), phase] {
            assert!(record.contains(part), "no {part} in {record}");
        }
    }
    lab.patch(&["--function", "victim", "--name", "the-fix", &lab.object("int victim(int x) { return x + 2; }")]);
    assert!(next().contains("intent"));
    assert!(next().contains("the-fix: done"));
    target.kill();
    let event = next();
    assert!(event.contains("ASAP_COMMAND") && event.contains("exit") && event.contains("the-fix"), "{event}");
    // The file has the same, whether there is a journal or not.
    let log = std::fs::read_to_string(lab.path("log/audit.jsonl")).expect("a log");
    assert_eq!(log.lines().count(), 5, "{log}");
    std::fs::remove_file(lab.path("journal")).expect("there");
    let other = Source::of(&["workers.c"]).start(&["0"]);
    lab.attach(other.pid());
    let log = std::fs::read_to_string(lab.path("log/audit.jsonl")).expect("a log");
    assert_eq!(log.lines().count(), 7, "{log}");
}
