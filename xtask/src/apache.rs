//! Debian's own Apache with a private configuration: event MPM, three children of 25 threads as www-data, a loopback port.

use anyhow::{Context, Result, bail};
use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Length of the file that is served, bytes.
pub const FILE_LENGTH: usize = 287_000;

/// A running Apache; ends with this value.
pub struct Apache {
    parent: Child,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Apache {
    /// Starts it in `directory`, which must be new.
    pub fn start(directory: &Path) -> Result<Self> {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o755))?;
        let root = directory.join("htdocs");
        fs::create_dir(&root)?;
        fs::write(root.join("file.bin"), vec![b'x'; FILE_LENGTH])?;
        // Free at this moment; should somebody take it before Apache does, Apache says so and the demo fails.
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let modules = "/usr/lib/apache2/modules";
        let (at, log) = (directory.display(), directory.join("error.log"));
        let configuration = format!(
            "ServerRoot {at}\nServerName localhost\nListen {address}\nPidFile {at}/pid\nErrorLog {log}\n\
             Mutex file:{at} default\n\
             LoadModule mpm_event_module {modules}/mod_mpm_event.so\n\
             LoadModule authz_core_module {modules}/mod_authz_core.so\n\
             User www-data\nGroup www-data\nDocumentRoot {root}\n\
             <Directory {root}>\nRequire all granted\n</Directory>\n\
             StartServers 3\nServerLimit 3\nThreadsPerChild 25\nMaxRequestWorkers 75\n\
             MinSpareThreads 75\nMaxSpareThreads 75\n\
             KeepAlive On\nMaxKeepAliveRequests 0\nKeepAliveTimeout 30\n\
             MaxRanges unlimited\nMaxRangeOverlaps unlimited\nMaxRangeReversals unlimited\n",
            log = log.display(),
            root = root.display(),
        );
        let file = directory.join("apache.conf");
        fs::write(&file, configuration)?;
        let parent = Command::new("/usr/sbin/apache2")
            .args(["-DFOREGROUND", "-f"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("apache2 can't be started")?;
        let mut apache = Self { parent, address };
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if apache.children().len() == 3 && crate::http::get(address, "/file.bin", 0).is_ok_and(|a| a.status == 200)
            {
                return Ok(apache);
            }
            if let Some(status) = apache.parent.try_wait()? {
                bail!("apache2 ended with {status}: {}", fs::read_to_string(log).unwrap_or_default());
            }
            if Instant::now() > deadline {
                bail!("apache2 does not answer: {}", fs::read_to_string(log).unwrap_or_default());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Process id of the parent.
    pub fn pid(&self) -> i32 {
        self.parent.id() as i32
    }

    /// Its worker processes.
    pub fn children(&self) -> Vec<i32> {
        let pid = self.pid();
        let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let all = text.split_ascii_whitespace().filter_map(|word| word.parse().ok());
        // A helper of asap's is a child, too, but not a worker: it runs as whoever it was made from, with one thread.
        all.filter(|&child| threads(child) > 1).collect()
    }
}

/// Number of threads of a process.
fn threads(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count)
}

impl Drop for Apache {
    fn drop(&mut self) {
        let pid = self.pid();
        // SIGTERM ends the children as well; give it a moment.
        // SAFETY: no memory is involved; the child has not been waited for, so the pid is its own.
        unsafe { libc::kill(pid, libc::SIGTERM) };
        let deadline = Instant::now() + Duration::from_secs(5);
        let children = self.children();
        while Instant::now() < deadline {
            if matches!(self.parent.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        for child in children {
            // SAFETY: as above; the parent lives, so a child's pid can't have been given away without its wait.
            unsafe { libc::kill(child, libc::SIGKILL) };
        }
        let _ = self.parent.kill();
        let _ = self.parent.wait();
    }
}

/// A bounded load of wrk on the server, in the background.
pub struct Load(Child);

/// What wrk saw.
#[derive(Debug, serde::Serialize)]
pub struct LoadReport {
    /// Requests that were answered.
    pub requests: u64,
    /// Connections that broke, answers that were no 2xx or 3xx, time-outs.
    pub failed: u64,
}

impl Load {
    /// Starts it for `seconds`.
    pub fn start(server: SocketAddr, seconds: u64) -> Result<Self> {
        let child = Command::new("/usr/bin/wrk")
            .args(["-t1", "-c16", &format!("-d{seconds}s"), "--timeout", "10s", &format!("http://{server}/file.bin")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("wrk can't be started")?;
        Ok(Self(child))
    }

    /// Waits for its end.
    pub fn finish(mut self) -> Result<LoadReport> {
        let mut text = String::new();
        if let Some(mut output) = self.0.stdout.take() {
            std::io::Read::read_to_string(&mut output, &mut text)?;
        }
        self.0.wait()?;
        let number = |word: &str| word.trim_matches(|c: char| !c.is_ascii_digit()).parse::<u64>().unwrap_or(0);
        let requests = text
            .lines()
            .find_map(|line| line.trim().split_once(" requests in").map(|(count, _)| number(count)))
            .with_context(|| format!("wrk's report can't be read:\n{text}"))?;
        // "Socket errors: connect 0, read 0, write 0, timeout 0", "Non-2xx or 3xx responses: 1": only where there are any.
        let errors = text.lines().filter(|line| line.contains("Socket errors:") || line.contains("Non-2xx"));
        let failed =
            errors.flat_map(|line| line.split([':', ',', ' '])).map(|word| word.parse::<u64>().unwrap_or(0)).sum();
        Ok(LoadReport { requests, failed })
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
