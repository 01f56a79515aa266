//! A server of the corpus, started from what its package's file says: private configuration, loopback, own ports.

use super::corpus::{Exchange, Package, Server};
use crate::{command, owned::Owned};
use anyhow::{Context, Result, bail, ensure};
use asap::process::info;
use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Silence that ends an answer which nothing else ends.
const SILENCE: Duration = Duration::from_millis(150);
/// Ports that a server may use.
const PORTS: [&str; 4] = ["port", "port2", "port3", "port4"];
/// Clients that ask while a patch goes in.
const CLIENTS: usize = 2;

/// How a server can be asked.
#[derive(Clone, Debug)]
struct Door {
    folder: PathBuf,
    /// What stands for what in the texts of the corpus.
    words: Vec<(String, String)>,
}

/// A running server; ends with this value.
pub struct Running {
    process: Owned,
    door: Door,
    serves: Exchange,
}

/// Where a server comes from.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    /// Its package.
    pub package: &'a Package,
    /// What is started.
    pub server: &'a Server,
    /// The source, built.
    pub tree: &'a Path,
    /// The target, as it is installed.
    pub target: &'a Path,
}

impl Running {
    /// Starts it in `folder`.
    pub fn start(origin: &Origin, folder: &Path) -> Result<Self> {
        let server = origin.server;
        fs::create_dir_all(folder)?;
        // Workers that are not root have to get in.
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?;
        let door = Door { folder: folder.to_owned(), words: words(origin, folder)? };
        for (name, text) in &server.files {
            let file = folder.join(name);
            fs::create_dir_all(file.parent().context("a folder")?)?;
            fs::write(&file, door.fill(text))?;
        }
        if let Some(line) = &server.prepare {
            let (status, said) = door.run(line)?;
            ensure!(status, "the server's folder can't be prepared: {said}");
        }
        let output = folder.join("output.log");
        let log = File::create(&output)?;
        let (program, arguments) = server.command.split_first().context("a command")?;
        let mut start = Command::new(door.fill(program));
        start.args(arguments.iter().map(|word| door.fill(word))).current_dir(folder);
        start.envs(server.environment.iter().map(|(name, value)| (name, door.fill(value))));
        start.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut running = Self { process: Owned::spawn(&mut start)?, door, serves: server.serves.clone() };
        let (ask, serves) = (running.door.clone(), running.serves.clone());
        let words = || {
            let mut text = fs::read_to_string(&output).unwrap_or_default();
            text.extend(fs::read_to_string(folder.join("error.log")));
            format!("{text}; asked, it says {:?}", ask.ask(&serves).map_err(|error| format!("{error:#}")))
        };
        running.process.until("serves", || ask.serves(&serves).is_ok(), words).context("the server")?;
        Ok(running)
    }

    /// Process id of the first process.
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// All its processes that run the same executable.
    pub fn processes(&self) -> Vec<i32> {
        let executable = |pid: i32| fs::read_link(format!("/proc/{pid}/exe")).ok();
        let own = executable(self.pid());
        let mut found = vec![self.pid()];
        let mut next = 0;
        while let Some(&parent) = found.get(next) {
            found.extend(info::children(parent).into_iter().filter(|&child| executable(child) == own));
            next += 1;
        }
        found
    }

    /// Whether it has ended by itself.
    pub fn ensure_alive(&mut self) -> Result<()> {
        match self.process.ended()? {
            Some(status) => bail!("the server ended with {status}"),
            None => Ok(()),
        }
    }

    /// Asks, and gives the answer.
    pub fn ask(&self, exchange: &Exchange) -> Result<String> {
        self.door.ask(exchange)
    }

    /// Whether it answers as it should.
    pub fn serves(&self) -> Result<()> {
        self.door.serves(&self.serves)
    }

    /// Starts a light load.
    pub fn load(&self) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let answers = Arc::new(AtomicU64::new(0));
        let threads = (0..CLIENTS).map(|_| {
            let (door, serves) = (self.door.clone(), self.serves.clone());
            let (stop, answers) = (Arc::clone(&stop), Arc::clone(&answers));
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    door.serves(&serves)?;
                    answers.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(3));
                }
                Ok(())
            })
        });
        Load { threads: threads.collect(), stop, answers }
    }
}

/// Clients that ask, and check every answer.
pub struct Load {
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Load {
    /// Answers so far.
    pub fn answers(&self) -> u64 {
        self.answers.load(Ordering::Relaxed)
    }

    /// Stops them; gives how many answers came.
    ///
    /// # Errors
    /// An answer was wrong, or none came.
    pub fn finish(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        Ok(self.answers.load(Ordering::Relaxed))
    }
}

fn words(origin: &Origin, folder: &Path) -> Result<Vec<(String, String)>> {
    let path = |path: &Path| path.display().to_string();
    let fixtures = command::top().join("xtask/fixtures/study");
    let mut words = vec![
        ("{dir}".to_owned(), path(folder)),
        ("{target}".to_owned(), path(origin.target)),
        ("{tree}".to_owned(), path(origin.tree)),
        ("{package}".to_owned(), path(&origin.package.folder)),
        ("{fixtures}".to_owned(), path(&fixtures)),
    ];
    // All are held at once, so that they differ.
    let held: Vec<_> = PORTS.iter().map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect::<Result<_, _>>()?;
    for (name, socket) in PORTS.iter().zip(&held) {
        words.push((format!("{{{name}}}"), socket.local_addr()?.port().to_string()));
    }
    Ok(words)
}

/// What can be read and written with a time limit.
trait Connection: Read + Write {}
impl Connection for TcpStream {}
impl Connection for UnixStream {}

impl Door {
    fn fill(&self, text: &str) -> String {
        self.words.iter().fold(text.to_owned(), |text, (name, value)| text.replace(name, value))
    }

    /// Runs a command line in the server's folder; whether it succeeded, and what it said.
    fn run(&self, line: &str) -> Result<(bool, String)> {
        let mut shell = Command::new("timeout");
        shell.args(["60", "sh", "-c", &self.fill(line)]).current_dir(&self.folder).stdin(Stdio::null());
        command::hear_signals(&mut shell);
        let output = shell.output().context("sh can't be started")?;
        let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        Ok((output.status.success(), text))
    }

    fn ask(&self, exchange: &Exchange) -> Result<String> {
        if let Some(line) = &exchange.run {
            return Ok(self.run(line)?.1);
        }
        let mut pieces: Vec<Vec<u8>> = exchange.send.iter().map(|text| self.fill(text).into_bytes()).collect();
        for digits in &exchange.send_hex {
            pieces.push(bytes(digits)?);
        }
        let port = exchange.port.as_deref().unwrap_or(PORTS[0]);
        let number = self.words.iter().find(|(name, _)| *name == format!("{{{port}}}")).map(|(_, value)| value.parse());
        let answer = match number {
            Some(number) if exchange.udp => by_udp(number?, &pieces)?,
            Some(number) => {
                let address = (Ipv4Addr::LOCALHOST, number?).into();
                let stream = TcpStream::connect_timeout(&address, PATIENCE).context("connecting")?;
                stream.set_nodelay(true)?;
                let quick = stream.try_clone()?;
                talk(Box::new(stream), &|limit| quick.set_read_timeout(Some(limit)), &pieces)?
            }
            None => {
                let stream = UnixStream::connect(self.folder.join(port)).context("connecting")?;
                let quick = stream.try_clone()?;
                talk(Box::new(stream), &|limit| quick.set_read_timeout(Some(limit)), &pieces)?
            }
        };
        Ok(match exchange.send_hex.is_empty() {
            true => String::from_utf8_lossy(&answer).into_owned(),
            false => answer.iter().map(|byte| format!("{byte:02x}")).collect(),
        })
    }

    fn serves(&self, exchange: &Exchange) -> Result<()> {
        let answer = self.ask(exchange)?;
        let expected = exchange.before.as_deref().unwrap_or_default();
        ensure!(answer.contains(expected), "it answered {answer:?}, which does not contain {expected:?}");
        Ok(())
    }
}

fn bytes(digits: &str) -> Result<Vec<u8>> {
    let digits: Vec<u8> = digits.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let byte = |pair: &[u8]| Ok(u8::from_str_radix(std::str::from_utf8(pair)?, 16)?);
    digits.chunks(2).map(byte).collect::<Result<_>>().context("hexadecimal digits")
}

fn by_udp(port: u16, pieces: &[Vec<u8>]) -> Result<Vec<u8>> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.connect((Ipv4Addr::LOCALHOST, port))?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut all = Vec::new();
    for piece in pieces {
        socket.send(piece)?;
        let mut answer = [0; 4096];
        match socket.recv(&mut answer) {
            Ok(length) => all.extend_from_slice(&answer[..length]),
            // A server may have nothing to say to that.
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(all)
}

/// Sends the pieces, and reads after each until the other side is silent, or has closed.
fn talk(
    mut stream: Box<dyn Connection>,
    limit: &dyn Fn(Duration) -> std::io::Result<()>,
    pieces: &[Vec<u8>],
) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    let mut buffer = [0; 16 << 10];
    for piece in pieces {
        stream.write_all(piece)?;
        limit(PATIENCE)?;
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => return Ok(all),
                Ok(length) => all.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {
                    all.extend_from_slice(b"(reset)");
                    return Ok(all);
                }
                Err(error) => return Err(error).context("reading the answer"),
            }
            limit(SILENCE)?;
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_digits_are_read() {
        assert_eq!(bytes("00ff 10").expect("bytes"), [0, 255, 16]);
        assert!(bytes("0g").is_err());
    }

    #[test]
    fn an_answer_is_what_comes_until_silence() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let address = listener.local_addr().expect("its number");
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            for _ in 0..2 {
                let mut byte = [0];
                stream.read_exact(&mut byte).expect("a question");
                stream.write_all(&[byte[0], b'!']).expect("an answer");
            }
        });
        let stream = TcpStream::connect(address).expect("a server");
        let quick = stream.try_clone().expect("a copy");
        let limit = |limit| quick.set_read_timeout(Some(limit));
        let answer = talk(Box::new(stream), &limit, &[b"a".to_vec(), b"b".to_vec()]).expect("an answer");
        assert_eq!(answer, b"a!b!");
        server.join().expect("its end");
    }
}
