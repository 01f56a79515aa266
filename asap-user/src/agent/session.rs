//! One client: reads its requests, checks their size, hands them to the engine, and streams back what it says. A client that
//! sends rubbish, falls silent or does not read its replies loses its connection; nobody else notices.

use super::{
    audit::Client,
    engine_thread::{EngineQueue, Job},
    protocol::{self, LARGE_LINE, LINE_PATIENCE, Line, MAX_LINE, read_line},
};
use crate::{
    cancel::Cancel,
    report::{Failure, FailureKind, Progress, Reply, Request},
};
use std::{io, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Notify, Semaphore, mpsc, oneshot, watch},
    time::{sleep, timeout},
};

/// How long a client may take to read a reply.
const WRITE_PATIENCE: Duration = Duration::from_secs(20);
/// Steps that wait for a client to read them; more are dropped.
const STEPS: usize = 16;
/// How long who asks for the status waits for the engine before the last one is told.
const TURN: Duration = Duration::from_millis(250);

/// What all sessions share.
#[derive(Clone)]
pub(super) struct Hall {
    pub engine: EngineQueue,
    /// Told when a client asks the agent to end.
    pub stop: Arc<Notify>,
    /// True when connections that wait for nothing are to be closed.
    pub closing: watch::Receiver<bool>,
    /// The right to send a large request; one at a time, so that memory stays bounded.
    pub large: Arc<Semaphore>,
}

/// Serves one connection until it ends.
pub(super) async fn serve(stream: UnixStream, client: Client, hall: Hall) {
    let (reader, writer) = stream.into_split();
    let mut session = Session { reader: BufReader::new(reader), writer, client, hall };
    if let Err(error) = session.run().await {
        tracing::debug!(client = client.pid, %error, "connection lost");
    }
}

struct Session {
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    client: Client,
    hall: Hall,
}

impl Session {
    async fn run(&mut self) -> io::Result<()> {
        loop {
            let mut line = tokio::select! {
                line = read_line(&mut self.reader, Vec::new(), LARGE_LINE, LINE_PATIENCE) => line?,
                _ = self.hall.closing.wait_for(|closing| *closing) => return Ok(()),
            };
            let mut permit = None;
            if let Line::Longer(part) = line {
                permit = self.hall.large.clone().acquire_owned().await.ok();
                line = read_line(&mut self.reader, part, MAX_LINE, LINE_PATIENCE).await?;
            }
            let text = match line {
                Line::Complete(text) => text,
                Line::End | Line::Half | Line::Silent => return Ok(()),
                Line::Longer(_) => {
                    let limit = MAX_LINE >> 20;
                    return self.refuse(format!("the request is longer than {limit} MiB")).await;
                }
            };
            let parsed = protocol::request(&text);
            drop(text);
            let request = match parsed {
                Ok(request) => request,
                Err(why) => return self.refuse(why).await,
            };
            let stops = matches!(request, Request::Shutdown);
            self.pass_on(request).await?;
            drop(permit);
            if stops {
                self.hall.stop.notify_one();
                // The end of the connection tells the client that the agent has ended.
                let _ = self.hall.closing.wait_for(|closing| *closing).await;
                return Ok(());
            }
        }
    }

    /// Has the engine do it, and tells the client about it as it goes on. A client that closes its half of the connection
    /// meanwhile, or all of it, has no use for the outcome any more: the request is cancelled, if it still can be.
    async fn pass_on(&mut self, request: Request) -> io::Result<()> {
        let wanted = match &request {
            Request::Status(wanted) | Request::List(wanted) => Some(wanted.clone()),
            _ => None,
        };
        if let Some(report) = wanted.as_ref().and_then(|wanted| self.hall.engine.status_while_busy(wanted)) {
            return self.write(&Reply::Status(report)).await;
        }
        let step = match self.hall.engine.busy_with() {
            Some(other) => format!("waiting for another request: {other}"),
            None => "started".to_owned(),
        };
        // At once, so that a client can tell a busy agent from a hung one.
        self.write(&Reply::Progress(Progress { step, fraction: None })).await?;
        let (progress, mut steps) = mpsc::channel(STEPS);
        let (reply, mut answer) = oneshot::channel();
        let cancel = Unwanted(Cancel::default());
        self.hall.engine.send(Job { request, client: self.client, progress, reply, cancel: cancel.0.clone() });
        let mut listens = true;
        loop {
            tokio::select! {
                biased;
                answer = &mut answer => return self.write(&answer.unwrap_or_else(|_| Reply::Failed(ending()))).await,
                Some(step) = steps.recv() => self.write(&Reply::Progress(step)).await?,
                // Another request was faster, and may take long.
                () = sleep(TURN), if wanted.is_some() => {
                    if let Some(report) = wanted.as_ref().and_then(|wanted| self.hall.engine.status_while_busy(wanted)) {
                        return self.write(&Reply::Status(report)).await;
                    }
                }
                more = self.reader.fill_buf(), if listens => {
                    // The next request may be there already: then its end can't be seen before that has been read.
                    listens = false;
                    if !more.is_ok_and(|bytes| !bytes.is_empty()) {
                        cancel.say();
                    }
                }
            }
        }
    }

    async fn refuse(&mut self, message: String) -> io::Result<()> {
        let failure = Failure {
            kind: FailureKind::Usage,
            ..Failure::refused(
                message,
                "use the `asap` program that belongs to the agent, or `asap stop` the agent first",
            )
        };
        self.write(&Reply::Failed(failure)).await?;
        // Closing with unread bytes would reset the connection and take the answer with it (unix(7)): read what still comes.
        self.writer.shutdown().await?;
        let drain = async { tokio::io::copy(&mut self.reader, &mut tokio::io::sink()).await };
        let _ = timeout(Duration::from_secs(2), drain).await;
        Ok(())
    }

    async fn write(&mut self, reply: &Reply) -> io::Result<()> {
        let mut line = serde_json::to_vec(reply)?;
        line.push(b'\n');
        crate::fault::touch("touch.answer")?;
        timeout(WRITE_PATIENCE, self.writer.write_all(&line)).await.map_err(|_| io::ErrorKind::TimedOut)?
    }
}

/// Cancels the request when its session ends before the answer is there.
struct Unwanted(Cancel);

impl Unwanted {
    fn say(&self) {
        self.0.ask("its client was interrupted or went away");
    }
}

impl Drop for Unwanted {
    fn drop(&mut self) {
        self.say();
    }
}

fn ending() -> Failure {
    Failure::refused("the agent is ending", "try again: `asap attach --pid N` starts a new agent")
}
