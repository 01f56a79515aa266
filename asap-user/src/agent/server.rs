//! The agent's main loop: lets clients in, ends when told to or when there is nothing left to do. Decides nothing about
//! targets; whatever happens here, they stay as they are.

use super::{
    AgentError, AgentOptions, OperationsFactory,
    audit::{AuditLog, Client},
    engine_thread::{self, EngineEvents, EngineQueue},
    journal::Journal,
    session::{self, Hall},
    socket,
    trust::Trust,
    watchdog::Watchdog,
};
use nix::sys::socket::{SockFlag, accept4};
use std::{
    fs,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
    sync::Arc,
    time::Duration,
};
use tokio::{
    net::{UnixListener, UnixStream},
    signal::unix::{Signal, SignalKind, signal},
    sync::{Notify, Semaphore, watch},
    task::JoinSet,
    time::{sleep, timeout},
};

/// Clients served at a time; more wait to be let in.
const MAX_CLIENTS: usize = 32;
/// How long a request in progress may take to end when the agent is told to.
const GRACE: Duration = Duration::from_secs(2);
/// How long replies may take to get out then.
const FLUSH: Duration = Duration::from_secs(1);

/// Runs an agent on this thread until it is told to end or has nothing left to do. `ready` is called when clients can connect.
///
/// To be called on the main thread, before others exist: the watchdog takes the end of this thread for the agent's.
///
/// # Errors
/// It can't start (another one runs, directory or log can't be trusted), or its engine ended by a bug.
pub fn run(options: &AgentOptions, factory: OperationsFactory, ready: impl FnOnce()) -> Result<(), AgentError> {
    socket::prepare_directory(&options.socket)?;
    // The engine's thread goes before all others; without this, the one that answers clients would get nothing done meanwhile
    // where the two share a processor, and they would take the agent for hung. It needs little.
    // SAFETY: no memory is involved. Without the right to raise it the priority stays.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) };
    let audit = AuditLog::open(&options.log)?.with_journal(options.journal.as_deref().map(Journal::at));
    let trust = Trust { folder: options.keys.clone(), required: options.require_signature };
    let lock = socket::take_lock(&options.socket)?;
    let watchdog = Watchdog::start().map_err(AgentError::Watchdog)?;
    let listener = socket::listen(&options.socket, &lock)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(AgentError::Setup)?;
    let outcome = runtime.block_on(async {
        // Before the engine thread starts, so that the signals are never without a handler.
        let signals = Signals::new()?;
        let listener = UnixListener::from_std(listener).map_err(AgentError::Setup)?;
        let (engine, events) = engine_thread::start(factory, watchdog, audit, trust).map_err(AgentError::Setup)?;
        tracing::info!(socket = %options.socket.display(), "ready");
        ready();
        serve(options, listener, engine, events, signals).await
    });
    runtime.shutdown_background();
    drop(lock);
    outcome
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Self, AgentError> {
        let listen = |kind| signal(kind).map_err(AgentError::Setup);
        Ok(Self { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    async fn any(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

async fn serve(
    options: &AgentOptions,
    listener: UnixListener,
    engine: EngineQueue,
    mut events: EngineEvents,
    mut signals: Signals,
) -> Result<(), AgentError> {
    let stop = Arc::new(Notify::new());
    let (closing_sender, closing) = watch::channel(false);
    let hall = Hall { engine: engine.clone(), stop: Arc::clone(&stop), closing, large: Arc::new(Semaphore::new(1)) };
    let mut sessions = JoinSet::new();
    let engine_ended = loop {
        let idle_limit = options.idle_exit.filter(|_| !*events.attached.borrow_and_update() && sessions.is_empty());
        tokio::select! {
            accepted = listener.accept(), if sessions.len() < MAX_CLIENTS => match accepted {
                Ok((stream, _)) => admit(stream, &hall, &mut sessions),
                Err(error) => {
                    // Out of descriptors, most likely: let some sessions end first.
                    tracing::warn!(%error, "a client could not be let in");
                    sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = sessions.join_next() => {}
            Ok(()) = events.attached.changed() => {}
            () = sleep(idle_limit.unwrap_or_default()), if idle_limit.is_some() => {
                match withdraw(&listener, &options.socket) {
                    Withdrawn::Unseen => break None,
                    Withdrawn::LateClient(stream) => admit(stream, &hall, &mut sessions),
                }
            }
            () = signals.any() => break None,
            () = stop.notified() => break None,
            outcome = &mut events.ended => break Some(outcome.unwrap_or(Ok(()))),
        }
    };
    let _ = fs::remove_file(&options.socket);
    drop(listener);
    let outcome = match engine_ended {
        Some(outcome) => outcome,
        None => {
            engine.end();
            let late = || {
                tracing::warn!("a request is still being worked at; the targets free themselves when the agent ends");
                Ok(())
            };
            timeout(GRACE, events.ended).await.map_or_else(|_| late(), |ended| ended.unwrap_or(Ok(())))
        }
    };
    // Replies on their way get out; whoever waits for nothing is sent home.
    closing_sender.send_replace(true);
    let _ = timeout(FLUSH, async { while sessions.join_next().await.is_some() {} }).await;
    outcome.map_err(AgentError::EngineEnded)
}

enum Withdrawn {
    /// Nobody came; the agent can end.
    Unseen,
    /// Somebody connected just before the name was taken away.
    LateClient(UnixStream),
}

/// Takes the socket's name away, unless a client came meanwhile. Whoever comes later finds no agent and starts a new one.
fn withdraw(listener: &UnixListener, socket: &Path) -> Withdrawn {
    let aside = socket.with_extension("closing");
    if fs::rename(socket, &aside).is_err() {
        return Withdrawn::Unseen;
    }
    // Asked of the kernel, since the runtime may not have heard of the client yet.
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    if let Ok(late) = accept4(listener.as_raw_fd(), flags) {
        // SAFETY: a new descriptor that nobody else owns.
        let stream = std::os::unix::net::UnixStream::from(unsafe { OwnedFd::from_raw_fd(late) });
        if let Ok(stream) = UnixStream::from_std(stream)
            && fs::rename(&aside, socket).is_ok()
        {
            return Withdrawn::LateClient(stream);
        }
    }
    let _ = fs::remove_file(&aside);
    Withdrawn::Unseen
}

fn admit(stream: UnixStream, hall: &Hall, sessions: &mut JoinSet<()>) {
    let Ok(peer) = stream.peer_cred() else { return };
    if !socket::admits(peer.uid()) {
        tracing::warn!(uid = peer.uid(), pid = peer.pid(), "refused a client of another user");
        return;
    }
    let client = Client { uid: peer.uid(), pid: peer.pid().unwrap_or(0) };
    sessions.spawn(session::serve(stream, client, hall.clone()));
}
