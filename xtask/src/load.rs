//! A bounded load of wrk's on a server, and what wrk saw.

use crate::owned::Owned;
use anyhow::{Context, Result, ensure};
use std::{
    io::Read,
    net::SocketAddr,
    process::{Command, Stdio},
};

/// A load in the background; ends with this value.
pub struct Load(Owned);

/// What wrk saw.
#[derive(Debug, PartialEq, serde::Serialize)]
pub struct LoadReport {
    /// Requests that were answered.
    pub requests: u64,
    /// Connections that broke, answers that were no 2xx or 3xx, time-outs.
    pub failed: u64,
    /// Requests in a second.
    pub rate: f64,
    /// The slowest answer, microseconds.
    pub slowest_us: f64,
    /// How wrk described the failures.
    pub failures: String,
}

impl Load {
    /// Starts it for `seconds`, with 16 connections that stay open.
    pub fn start(server: SocketAddr, path: &str, seconds: u64) -> Result<Self> {
        let mut wrk = Command::new("/usr/bin/wrk");
        wrk.args(["-t1", "-c16", &format!("-d{seconds}s"), "--timeout", "10s", &format!("http://{server}{path}")]);
        Owned::spawn(wrk.stdin(Stdio::null()).stdout(Stdio::piped())).map(Self)
    }

    /// Waits for its end.
    pub fn finish(mut self) -> Result<LoadReport> {
        let mut text = String::new();
        self.0.stdout().context("a pipe")?.read_to_string(&mut text)?;
        let status = self.0.wait()?;
        ensure!(status.success(), "wrk ended with {status}:\n{text}");
        read(&text).with_context(|| format!("wrk's report can't be read:\n{text}"))
    }
}

/// Reads what wrk prints.
fn read(text: &str) -> Option<LoadReport> {
    let lines = || text.lines().map(str::trim);
    let requests = lines().find_map(|line| line.split_once(" requests in ")?.0.parse().ok())?;
    let rate = lines().find_map(|line| line.strip_prefix("Requests/sec:")?.trim().parse().ok())?;
    // "Latency  3.21ms  1.02ms  25.33ms  88.10%": mean, deviation, most.
    let slowest = lines().find_map(|line| line.strip_prefix("Latency")?.split_ascii_whitespace().nth(2))?;
    let (mut failed, mut failures) = (0, Vec::new());
    // "Socket errors: connect 0, read 0, write 0, timeout 0", "Non-2xx or 3xx responses: 1": only where there are any.
    for line in lines() {
        if line.starts_with("Socket errors:") || line.starts_with("Non-2xx or 3xx responses:") {
            failures.push(line);
        }
        if let Some(counts) = line.strip_prefix("Socket errors:") {
            for count in counts.split(',') {
                failed += count.split_ascii_whitespace().last()?.parse::<u64>().ok()?;
            }
        } else if let Some(count) = line.strip_prefix("Non-2xx or 3xx responses:") {
            failed += count.trim().parse::<u64>().ok()?;
        }
    }
    Some(LoadReport { requests, failed, rate, slowest_us: microseconds(slowest)?, failures: failures.join("; ") })
}

/// A duration as wrk writes it.
fn microseconds(text: &str) -> Option<f64> {
    let at = text.find(|c: char| c.is_ascii_alphabetic())?;
    let factor = match &text[at..] {
        "us" => 1.0,
        "ms" => 1e3,
        "s" => 1e6,
        "m" => 60e6,
        _ => return None,
    };
    text[..at].parse::<f64>().ok().map(|number| number * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUIET: &str = "Running 2s test @ http://127.0.0.1:8080/file.bin
  1 threads and 16 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.52ms  730.10us  17.30ms   91.03%
    Req/Sec    10.62k     1.19k   12.28k    75.00%
  21133 requests in 2.00s, 5.66GB read
";

    #[test]
    fn a_report_is_read() {
        let text = format!("{QUIET}Requests/sec:  10563.21\nTransfer/sec:      2.83GB\n");
        let expected =
            LoadReport { requests: 21133, failed: 0, rate: 10563.21, slowest_us: 17300.0, failures: String::new() };
        assert_eq!(read(&text), Some(expected));
    }

    #[test]
    fn every_kind_of_failure_counts() {
        let text = format!(
            "{QUIET}  Socket errors: connect 1, read 20, write 300, timeout 4000\n  Non-2xx or 3xx responses: 50000\n\
             Requests/sec:  10563.21\n"
        );
        assert_eq!(read(&text).map(|report| report.failed), Some(54321));
        assert_eq!(read("unable to connect to 127.0.0.1:1 Connection refused"), None);
        assert_eq!(read(&text.replace("read 20", "read many")), None);
    }
}
