//! The sandbox on real servers under load: no request fails while they go in and out, also when agents die; and their code and
//! executable mappings are in the end what they were.

use crate::support::{Lab, maps, memory_at, wait_until};
use asap::report::{Reply, SandboxReport};
use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

const FILE: &str = "/file.bin";
const LENGTH: usize = 30_000;

/// A server; ends with this value.
struct Server {
    process: Child,
    address: SocketAddr,
    name: &'static str,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid()), nix::sys::signal::SIGTERM);
        let _ = self.process.wait();
    }
}

impl Server {
    /// Debian's nginx or Apache with a private configuration; none, and a word, if it is not installed.
    fn start(lab: &Lab, name: &'static str) -> Option<Self> {
        let program = format!("/usr/sbin/{name}");
        if !Path::new(&program).exists() {
            println!("SKIPPED: {name} is not installed");
            return None;
        }
        let folder = lab.path(name);
        let pages = folder.join("pages");
        fs::create_dir_all(&pages).expect("a folder");
        for above in [folder.parent().expect("the laboratory"), &folder, &pages] {
            fs::set_permissions(above, fs::Permissions::from_mode(0o755)).expect("it is ours");
        }
        fs::write(pages.join(FILE.trim_start_matches('/')), vec![b'x'; LENGTH]).expect("a page");
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|l| l.local_addr()).expect("a free port");
        let (at, pages) = (folder.display(), pages.display());
        let (text, arguments): (String, &[&str]) = if name == "nginx" {
            let text = format!(
                "daemon off;\nuser www-data;\nworker_processes 2;\npid {at}/pid;\nerror_log {at}/error.log;\n\
                 events {{ worker_connections 256; }}\n\
                 http {{ access_log off; keepalive_requests 1000000000; client_body_temp_path {at}/body;\n\
                 proxy_temp_path {at}/proxy; fastcgi_temp_path {at}/fastcgi; uwsgi_temp_path {at}/uwsgi;\n\
                 scgi_temp_path {at}/scgi;\nserver {{ listen {address}; root {pages}; }} }}\n"
            );
            (text, &["-c"])
        } else {
            let modules = "/usr/lib/apache2/modules";
            let text = format!(
                "ServerRoot {at}\nServerName localhost\nListen {address}\nPidFile {at}/pid\nErrorLog {at}/error.log\n\
                 Mutex file:{at} default\nLoadModule mpm_event_module {modules}/mod_mpm_event.so\n\
                 LoadModule authz_core_module {modules}/mod_authz_core.so\nUser www-data\nGroup www-data\n\
                 DocumentRoot {pages}\n<Directory {pages}>\nRequire all granted\n</Directory>\n\
                 StartServers 2\nServerLimit 2\nThreadsPerChild 25\nThreadLimit 25\nMaxRequestWorkers 50\n\
                 MinSpareThreads 50\nMaxSpareThreads 50\nKeepAlive On\nMaxKeepAliveRequests 0\nKeepAliveTimeout 60\n"
            );
            (text, &["-DFOREGROUND", "-f"])
        };
        let file = folder.join("configuration");
        fs::write(&file, text).expect("a configuration");
        let mut command = Command::new(program);
        command.args(arguments).arg(&file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let process = command.spawn().expect("the server starts");
        let server = Self { process, address, name };
        wait_until("the server serves", || {
            TcpStream::connect(address).is_ok_and(|mut stream| request(&mut stream).is_ok())
        });
        wait_until("all its processes are there", || server.processes().len() == 3);
        Some(server)
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.process.id()).expect("pids fit")
    }

    /// Those that serve, and their parent. Helpers of asap's are children, too, with one thread and no descriptors.
    fn processes(&self) -> Vec<i32> {
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.pid())).unwrap_or_default();
        let serves = |pid: &i32| fs::read_dir(format!("/proc/{pid}/fd")).is_ok_and(|files| files.count() > 0);
        let children = children.split_whitespace().filter_map(|pid| pid.parse().ok()).filter(serves);
        children.chain([self.pid()]).collect()
    }

    /// Executable mappings of files, with their bytes.
    fn code(&self, pid: i32) -> Vec<(String, Vec<u8>)> {
        let text = maps(pid).into_iter().filter(|line| line.contains(" r-xp ") && line.contains(" /"));
        text.map(|line| {
            let (start, end) = line.split(' ').next().and_then(|range| range.split_once('-')).expect("a range");
            let number = |text| u64::from_str_radix(text, 16).expect("hex");
            let (start, end) = (number(start), number(end));
            let bytes = memory_at(pid, start, (end - start) as usize);
            (line, bytes)
        })
        .collect()
    }
}

/// One request on an open connection.
fn request(stream: &mut TcpStream) -> std::io::Result<()> {
    let refuse = |what: String| Err(std::io::Error::other(what));
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    write!(stream, "GET {FILE} HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
    let mut answer = Vec::new();
    let mut buffer = [0; 16 * 1024];
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return refuse(format!("the connection ended after {} bytes", answer.len()));
        }
        answer.extend_from_slice(&buffer[..count]);
        let Some(head) = answer.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
        if !answer.starts_with(b"HTTP/1.1 200") {
            return refuse(String::from_utf8_lossy(&answer[..head]).into_owned());
        }
        if answer.len() >= head + 4 + LENGTH {
            let body = &answer[head + 4..];
            let is_right = body.len() == LENGTH && body.iter().all(|&byte| byte == b'x');
            return if is_right { Ok(()) } else { refuse(format!("a wrong body of {} bytes", body.len())) };
        }
    }
}

/// Clients that ask all the time, each on one connection.
struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    clients: Vec<JoinHandle<Result<(), String>>>,
}

impl Load {
    fn on(address: SocketAddr, clients: usize) -> Self {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let client = |_| {
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
            std::thread::spawn(move || {
                let mut stream = TcpStream::connect(address).map_err(|error| error.to_string())?;
                while !stop.load(Ordering::Relaxed) {
                    request(&mut stream).map_err(|error| error.to_string())?;
                    answered.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            })
        };
        let clients = (0..clients).map(client).collect();
        Self { stop, answered, clients }
    }

    /// Waits until it has had so many more answers.
    fn go_on(&self, more: u64) {
        let goal = self.answered.load(Ordering::Relaxed) + more;
        wait_until("the server answers", || {
            self.answered.load(Ordering::Relaxed) >= goal || self.clients.iter().any(JoinHandle::is_finished)
        });
    }

    /// How many answers there were; the first that was wrong fails the test.
    fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            assert_eq!(client.join().expect("no panic"), Ok(()));
        }
        self.answered.load(Ordering::Relaxed)
    }
}

fn sandbox(lab: &Lab, arguments: &[&str]) -> SandboxReport {
    let answer = lab.asap(&[&["sandbox"], arguments].concat());
    let Reply::Sandbox(report) = answer.reply() else { panic!("{answer:?}") };
    report
}

/// How many times each server goes in and out.
fn cycles() -> usize {
    std::env::var("ASAP_SANDBOX_CYCLES").ok().and_then(|text| text.parse().ok()).unwrap_or(10)
}

#[test]
fn servers_go_in_and_out_under_load() {
    let Some(lab) = Lab::new("servers_go_in_and_out_under_load") else { return };
    for name in ["nginx", "apache2"] {
        let Some(server) = Server::start(&lab, name) else { continue };
        let pid = server.pid().to_string();
        let before: Vec<_> = server.processes().into_iter().map(|pid| (pid, server.code(pid))).collect();
        let load = Load::on(server.address, 6);
        load.go_on(20);
        for cycle in 0..cycles() {
            let inside = sandbox(&lab, &["enter", "--pid", &pid]);
            lab.agent();
            assert_eq!(inside.processes.iter().filter(|process| process.inside).count(), 3, "{name}: {inside:?}");
            load.go_on(20);
            if cycle % 5 == 4 {
                lab.kill_agent();
                load.go_on(20);
                lab.attach(server.pid());
            }
            assert!(sandbox(&lab, &["leave"]).processes.iter().all(|process| !process.inside), "{name}");
            load.go_on(20);
        }
        lab.detach(&[]);
        let answered = load.end();
        for (pid, code) in before {
            let now = server.code(pid);
            assert!(!now.iter().any(|(line, _)| line.contains("/memfd:")), "{name}: {:#?}", maps(pid));
            // What it has loaded meanwhile itself is its own affair.
            for (line, bytes) in code {
                let same = now.iter().find(|(other, _)| *other == line);
                assert!(same.is_some_and(|(_, now)| *now == bytes), "{name}: {line} in {:#?}", maps(pid));
            }
        }
        println!("{}: {answered} answers while it went in and out {} times", server.name, cycles());
    }
}
