//! The audit log's second copy: to systemd's journal where there is one, by its native protocol
//! (<https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>): one datagram of fields per record. The file stays what `asap log` reads; that
//! the journal is missing, full or slow changes nothing.

use super::audit::{Phase, Record};
use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::{
        memfd::{MFdFlags, memfd_create},
        socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg},
    },
};
use std::{
    fs::File,
    io::{self, IoSlice, Write},
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixDatagram,
    },
    path::{Path, PathBuf},
};

/// Where systemd-journald listens.
pub const DEFAULT_JOURNAL: &str = "/run/systemd/journal/socket";
/// What all records have in common, for `journalctl MESSAGE_ID=...`.
const MESSAGE_ID: &str = "5c1f6e0d7a3b4f0c9a56f2b1d8e47a90";

/// Sends records to the journal.
#[derive(Clone, Debug)]
pub struct Journal {
    socket: PathBuf,
}

impl Journal {
    /// The journal whose socket is `socket`, whether it is there or not.
    #[must_use]
    pub fn at(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Sends a record; does not wait. What can't be sent is said and left.
    pub fn send(&self, record: &Record, json: &str) {
        match self.try_send(&datagram(record, json)) {
            // No systemd here, or not now.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {}
            Err(error) => tracing::warn!(%error, "the journal does not take a record; the audit log's file has it"),
            Ok(()) => {}
        }
    }

    fn try_send(&self, fields: &[u8]) -> io::Result<()> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        match socket.send_to(fields, &self.socket) {
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => self.send_file(&socket, fields),
            sent => sent.map(drop),
        }
    }

    /// What is too long for a datagram goes as a sealed file in memory.
    fn send_file(&self, socket: &UnixDatagram, fields: &[u8]) -> io::Result<()> {
        let file = memfd_create(c"asap-journal", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC)?;
        let mut file = File::from(file);
        file.write_all(fields)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        let (descriptors, address): ([RawFd; 1], _) = ([file.as_raw_fd()], UnixAddr::new(&self.socket)?);
        let rights = [ControlMessage::ScmRights(&descriptors)];
        let nothing = [IoSlice::new(&[])];
        sendmsg(socket.as_raw_fd(), &nothing, &rights, MsgFlags::empty(), Some(&address))?;
        Ok(())
    }
}

/// The fields of a record.
fn datagram(record: &Record, json: &str) -> Vec<u8> {
    let failed = record.result.as_deref().is_some_and(|result| !matches!(result, "done" | "ended" | "replaced"));
    // Of syslog(3): warning, informational, notice.
    let priority = match (failed, record.phase) {
        (true, _) => "4",
        (false, Phase::Intent) => "6",
        (false, _) => "5",
    };
    let phase = match record.phase {
        Phase::Intent => "intent",
        Phase::Result => "result",
        Phase::Event => "event",
    };
    let mut bytes = Vec::new();
    let mut add = |name: &str, value: &str| field(&mut bytes, name, value);
    add("MESSAGE", &message(record));
    add("MESSAGE_ID", MESSAGE_ID);
    add("PRIORITY", priority);
    add("SYSLOG_IDENTIFIER", "asap");
    add("ASAP_PHASE", phase);
    add("ASAP_NUMBER", &record.number.to_string());
    add("ASAP_UID", &record.uid.to_string());
    add("ASAP_CLIENT", &record.pid.to_string());
    add("ASAP_COMMAND", &record.command);
    if let Some(target) = record.target {
        add("ASAP_TARGET", &target.to_string());
    }
    for (name, value) in
        [("ASAP_PATCH", &record.patch), ("ASAP_SHA256", &record.sha256), ("ASAP_RESULT", &record.result)]
    {
        if let Some(value) = value {
            add(name, value);
        }
    }
    // A field may be there several times.
    for function in &record.functions {
        add("ASAP_FUNCTION", function);
    }
    add("ASAP_RECORD", json);
    bytes
}

/// One line for people.
fn message(record: &Record) -> String {
    let mut text = record.command.clone();
    if let Some(target) = record.target {
        text.push_str(&format!(" of process {target}"));
    }
    if let Some(patch) = &record.patch {
        text.push_str(&format!(", patch {patch}"));
    }
    match (&record.result, &record.message) {
        (Some(result), Some(message)) => text.push_str(&format!(": {result}: {message}")),
        (Some(result), None) => text.push_str(&format!(": {result}")),
        (None, _) => text.push_str(&format!(": asked for by user {}", record.uid)),
    }
    text
}

/// In the form that may hold anything: a value with a line end would else forge the next field.
fn field(bytes: &mut Vec<u8>, name: &str, value: &str) {
    bytes.extend_from_slice(name.as_bytes());
    bytes.push(b'\n');
    bytes.extend_from_slice(&(value.len() as u64).to_le_bytes());
    bytes.extend_from_slice(value.as_bytes());
    bytes.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{IoSliceMut, Read, Seek},
        os::fd::{FromRawFd, OwnedFd},
    };

    fn record() -> Record {
        let json = r#"{"time":"2026-01-02T03:04:05.678Z","phase":"result","agent":9,"number":1,"uid":0,"pid":77,
            "command":"patch","target":1234,"patch":"fix\nPRIORITY=0","functions":["f","g"],"result":"timeout","message":"busy"}"#;
        serde_json::from_str(json).expect("a record")
    }

    /// Fields of a datagram, as the journal reads them.
    fn fields(mut bytes: &[u8]) -> Vec<(String, String)> {
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let end = bytes.iter().position(|&byte| byte == b'\n').expect("a name");
            let length = u64::from_le_bytes(bytes[end + 1..end + 9].try_into().expect("eight bytes")) as usize;
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8");
            fields.push((text(&bytes[..end]), text(&bytes[end + 9..end + 9 + length])));
            assert_eq!(bytes[end + 9 + length], b'\n');
            bytes = &bytes[end + 10 + length..];
        }
        fields
    }

    #[test]
    fn a_record_is_one_datagram_and_names_forge_no_fields() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let socket = UnixDatagram::bind(dir.path().join("socket")).expect("bound");
        Journal::at(&dir.path().join("socket")).send(&record(), "{}");
        let mut buffer = vec![0; 1 << 16];
        let length = socket.recv(&mut buffer).expect("a datagram");
        let fields = fields(&buffer[..length]);
        let values = |name: &str| -> Vec<&str> {
            fields.iter().filter(|(known, _)| known == name).map(|(_, value)| value.as_str()).collect()
        };
        assert_eq!(values("PRIORITY"), ["4"], "{fields:?}");
        assert_eq!(values("ASAP_PATCH"), ["fix\nPRIORITY=0"]);
        assert_eq!(values("ASAP_FUNCTION"), ["f", "g"]);
        assert_eq!(values("MESSAGE"), ["patch of process 1234, patch fix\nPRIORITY=0: timeout: busy"]);
        assert_eq!((values("SYSLOG_IDENTIFIER"), values("ASAP_RECORD")), (vec!["asap"], vec!["{}"]));
    }

    #[test]
    fn a_long_record_goes_as_a_sealed_file() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let socket = UnixDatagram::bind(dir.path().join("socket")).expect("bound");
        let long = Record { functions: vec!["f".repeat(4096); 1024], ..record() };
        Journal::at(&dir.path().join("socket")).send(&long, "{}");
        let mut nothing = [0; 16];
        let mut room = nix::cmsg_space!([RawFd; 1]);
        let mut parts = [IoSliceMut::new(&mut nothing)];
        let message = nix::sys::socket::recvmsg::<()>(
            socket.as_raw_fd(),
            &mut parts,
            Some(&mut room),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )
        .expect("a datagram");
        assert_eq!(message.bytes, 0);
        let descriptor = message.cmsgs().expect("control data").find_map(|part| match part {
            nix::sys::socket::ControlMessageOwned::ScmRights(descriptors) => descriptors.first().copied(),
            _ => None,
        });
        // SAFETY: a new descriptor that nobody else owns.
        let mut file = File::from(unsafe { OwnedFd::from_raw_fd(descriptor.expect("a descriptor")) });
        file.write_all(b"x").expect_err("sealed");
        let mut bytes = Vec::new();
        file.rewind().expect("a file");
        file.read_to_end(&mut bytes).expect("readable");
        assert_eq!(fields(&bytes).iter().filter(|(name, _)| name == "ASAP_FUNCTION").count(), 1024);
    }

    #[test]
    fn no_journal_is_no_error() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        Journal::at(&dir.path().join("nobody")).send(&record(), "{}");
    }
}
