//! Debian's own nginx with a private configuration: a master and two workers as www-data, a loopback port.

use crate::{http, owned::Owned};
use anyhow::{Context, Result};
use asap::process::info;
use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
    process::{Command, Stdio},
};

const PROGRAM: &str = "/usr/sbin/nginx";
/// What is served.
pub const FILE: &str = "/page.txt";
const WORKERS: usize = 2;

/// A running nginx; ends with this value.
pub struct Nginx {
    master: Owned,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Nginx {
    /// Starts it in `directory`, which www-data can enter.
    pub fn start(directory: &Path) -> Result<Self> {
        let at = directory.join("nginx");
        fs::create_dir_all(at.join("pages"))?;
        fs::write(at.join("pages").join(FILE.trim_start_matches('/')), "a page\n".repeat(150))?;
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let folder = at.display();
        let configuration = format!(
            "daemon off;\nuser www-data;\nworker_processes {WORKERS};\npid {folder}/pid;\nerror_log {folder}/error.log;\n\
             events {{ worker_connections 256; }}\n\
             http {{ access_log off; keepalive_requests 1000000000; client_body_temp_path {folder}/body;\n\
             proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi;\n\
             scgi_temp_path {folder}/scgi;\n\
             server {{ listen {address}; root {folder}/pages; }} }}\n"
        );
        let file = at.join("nginx.conf");
        fs::write(&file, configuration)?;
        let mut command = Command::new(PROGRAM);
        // Messages from before the configuration is read go there, too.
        command.args(["-e"]).arg(at.join("error.log")).arg("-c").arg(&file).stdin(Stdio::null()).stdout(Stdio::null());
        let mut nginx = Self { master: Owned::spawn(&mut command)?, address };
        let (pid, log) = (nginx.pid(), || fs::read_to_string(at.join("error.log")).unwrap_or_default());
        let serves = || {
            processes(pid).len() == WORKERS + 1
                && http::get(address, FILE, &[]).is_ok_and(|answer| answer.status == 200)
        };
        nginx.master.until("serves with all workers", serves, log).context("nginx")?;
        Ok(nginx)
    }

    /// Process id of the master.
    pub fn pid(&self) -> i32 {
        self.master.pid()
    }

    /// The master and its workers.
    pub fn processes(&self) -> Vec<i32> {
        processes(self.pid())
    }

    /// A header of an answer to a request for the page.
    pub fn header(&self, name: &str) -> Result<String> {
        let answer = http::get(self.address, FILE, &[])?;
        Ok(answer.header(name).with_context(|| format!("nginx's answer has no {name}"))?.to_owned())
    }
}

fn processes(master: i32) -> Vec<i32> {
    // A helper of asap's runs nothing of its own: its command line is the master's.
    let is_worker = |pid: &i32| {
        fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.contains("worker process"))
    };
    info::children(master).into_iter().filter(is_worker).chain([master]).collect()
}
