//! The way to the host: whole frames, from any thread.

use anyhow::{Context, Result};
use serde::Serialize;
use std::{
    fs::{self, File},
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};
use vm_tests::protocol::{self, PORT};

/// How long the device may take to appear.
const PATIENCE: Duration = Duration::from_secs(30);

/// The sending half.
pub struct Port(Mutex<File>);

impl Port {
    /// Opens the port; gives both halves.
    pub fn open() -> Result<(Self, File)> {
        let begun = Instant::now();
        let path = loop {
            if let Some(path) = find() {
                break path;
            }
            anyhow::ensure!(begun.elapsed() < PATIENCE, "there is no virtio port named {PORT}");
            std::thread::sleep(Duration::from_millis(20));
        };
        let file = File::options().read(true).write(true).open(&path);
        let file = file.with_context(|| format!("{}", path.display()))?;
        let other = file.try_clone()?;
        Ok((Self(Mutex::new(file)), other))
    }

    /// Sends a frame.
    pub fn send(&self, header: &impl Serialize, heap: &[u8]) -> Result<()> {
        protocol::send(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), header, heap)
    }
}

fn find() -> Option<PathBuf> {
    let ports = fs::read_dir("/sys/class/virtio-ports").ok()?.flatten();
    let ours =
        |port: &fs::DirEntry| fs::read_to_string(port.path().join("name")).is_ok_and(|name| name.trim_end() == PORT);
    let name = ports.into_iter().find(ours)?.file_name();
    Some(PathBuf::from("/dev").join(name)).filter(|path| path.exists())
}
