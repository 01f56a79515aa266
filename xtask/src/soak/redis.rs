//! Debian's own Redis with a private configuration, and clients that check every answer.

use crate::owned::Owned;
use anyhow::{Context, Result, ensure};
use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

const PROGRAM: &str = "/usr/bin/redis-server";
/// Clients at a time.
const CLIENTS: usize = 4;

/// A running Redis; ends with this value.
pub struct Redis {
    server: Owned,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Redis {
    /// Starts it; its files go below `directory`.
    pub fn start(directory: &Path) -> Result<Self> {
        let at = directory.join("redis");
        fs::create_dir(&at)?;
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let port = address.port().to_string();
        let mut command = Command::new(PROGRAM);
        command.args(["--bind", "127.0.0.1", "--port", &port, "--save", "", "--appendonly", "no"]);
        command.args(["--daemonize", "no", "--dir"]).arg(&at).stdin(Stdio::null()).stdout(Stdio::null());
        let mut redis = Self { server: Owned::spawn(&mut command)?, address };
        let answers = || Client::connect(address).and_then(|mut client| client.ask(&["PING"])).is_ok();
        redis.server.until("answers", answers, String::new).context("redis-server")?;
        Ok(redis)
    }

    /// Process id.
    pub fn pid(&self) -> i32 {
        self.server.pid()
    }

    /// What it says to PING.
    pub fn ping(&self) -> Result<String> {
        Client::connect(self.address)?.ask(&["PING"])
    }
}

/// One connection.
struct Client {
    input: BufReader<TcpStream>,
}

impl Client {
    fn connect(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.set_nodelay(true)?;
        Ok(Self { input: BufReader::new(stream) })
    }

    /// Sends a command, gives the answer: a status or a string.
    fn ask(&mut self, words: &[&str]) -> Result<String> {
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        self.input.get_mut().write_all(request.as_bytes())?;
        let mut line = String::new();
        self.input.read_line(&mut line)?;
        let line = line.trim_end();
        if let Some(status) = line.strip_prefix('+') {
            return Ok(status.to_owned());
        }
        let length = line.strip_prefix('$').with_context(|| format!("redis answered {line:?}"))?;
        let length: usize = length.parse().with_context(|| format!("redis answered {line:?}"))?;
        let mut bytes = vec![0; length + 2];
        self.input.read_exact(&mut bytes)?;
        ensure!(bytes.ends_with(b"\r\n"), "a string of redis that does not end");
        bytes.truncate(length);
        Ok(String::from_utf8(bytes)?)
    }
}

/// Clients that ask and check, until they are told to stop.
pub struct Clients {
    stop: Arc<AtomicBool>,
    /// Answers so far.
    pub answers: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Clients {
    /// Starts them.
    pub fn start(address: SocketAddr) -> Self {
        let (stop, answers) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let threads = (0..CLIENTS).map(|number| {
            let (stop, answers) = (Arc::clone(&stop), Arc::clone(&answers));
            std::thread::spawn(move || work(address, number, &stop, &answers))
        });
        let threads = threads.collect();
        Self { stop, answers, threads }
    }

    /// Stops them.
    ///
    /// # Errors
    /// One of them got a wrong answer, or none.
    pub fn finish(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().map_err(|_| anyhow::anyhow!("a client of redis panicked"))??;
        }
        Ok(self.answers.load(Ordering::Relaxed))
    }
}

fn work(address: SocketAddr, number: usize, stop: &AtomicBool, answers: &AtomicU64) -> Result<()> {
    let mut client = Client::connect(address)?;
    for round in 0_u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let (key, value) = (format!("key-{number}-{}", round % 100), format!("value {round}"));
        let said = client.ask(&["SET", &key, &value]).context("SET")?;
        ensure!(said == "OK", "SET was answered with {said:?}");
        let said = client.ask(&["GET", &key]).context("GET")?;
        ensure!(said == value, "GET was answered with {said:?} instead of {value:?}");
        let said = client.ask(&["PING"]).context("PING")?;
        ensure!(said == "PONG" || said == super::PING_REPAIRED, "PING was answered with {said:?}");
        answers.fetch_add(3, Ordering::Relaxed);
        // Leave some of the processors to the other servers.
        if round.is_multiple_of(32) {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    Ok(())
}
