//! The agent's protocol, both ways: what a client sends, in lines of any length, and what an agent answers.

use crate::{
    agent::protocol::{Line, read_line, request},
    report::{Reply, Request},
};
use std::time::Duration;

/// Limit of a line here.
const LIMIT: usize = 256;

pub(super) fn check(bytes: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    runtime.block_on(async {
        let mut reader = tokio::io::BufReader::with_capacity(7, bytes);
        loop {
            let line = read_line(&mut reader, Vec::new(), LIMIT, Duration::from_secs(60)).await.expect("memory reads");
            match line {
                Line::Complete(line) => {
                    assert!(line.len() <= LIMIT && !line.contains(&b'\n'));
                    check_line(&line);
                }
                Line::Longer(line) => {
                    assert!(line.len() <= LIMIT + 7, "no more is kept than was asked for");
                    break;
                }
                Line::End | Line::Half => break,
                Line::Silent => unreachable!("memory is never silent"),
            }
        }
    });
    check_line(bytes);
}

fn check_line(line: &[u8]) {
    if let Ok(request) = request(line) {
        let text = serde_json::to_vec(&request).expect("a request can be written");
        assert!(!text.contains(&b'\n'), "one request, one line");
        let again: Request = serde_json::from_slice(&text).expect("what was written can be read");
        assert_eq!(serde_json::to_vec(&again).expect("written before"), text);
    }
    if let Ok(reply) = serde_json::from_slice::<Reply>(line) {
        let text = serde_json::to_vec(&reply).expect("a reply can be written");
        assert!(!text.contains(&b'\n'), "one reply, one line");
    }
}
