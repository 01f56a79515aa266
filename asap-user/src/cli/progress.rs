//! A line on the terminal for what takes longer than half a second. Nothing is shown where no person is looking.

use super::text::printable;
use crate::report;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    io::{IsTerminal, stderr},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread::{self, JoinHandle},
    time::Duration,
};

/// What is done faster needs no words.
const PATIENCE: Duration = Duration::from_millis(500);

/// The line; gone when this is dropped.
pub struct Progress {
    bar: Arc<Mutex<ProgressBar>>,
    /// Dropped: the waiting thread ends.
    done: Option<mpsc::Sender<()>>,
    waiter: Option<JoinHandle<()>>,
}

impl Progress {
    /// Begins to wait.
    pub fn start() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed} {wide_msg}") {
            bar.set_style(style);
        }
        let bar = Arc::new(Mutex::new(bar));
        let mut progress = Self { bar: Arc::clone(&bar), done: None, waiter: None };
        if stderr().is_terminal() {
            let (done, is_done) = mpsc::channel::<()>();
            progress.done = Some(done);
            progress.waiter = Some(thread::spawn(move || {
                if is_done.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
                    let bar = bar.lock().unwrap_or_else(PoisonError::into_inner);
                    bar.set_draw_target(ProgressDrawTarget::stderr());
                    bar.enable_steady_tick(Duration::from_millis(100));
                }
            }));
        }
        progress
    }

    /// The agent is at another step.
    pub fn step(&self, step: &report::Progress) {
        let part = step
            .fraction
            .filter(|part| *part > 0.0 && part.is_finite())
            .map(|part| format!(" ({:.0} %)", part * 100.0));
        let words = format!("{}{}", printable(&step.step), part.unwrap_or_default());
        self.bar.lock().unwrap_or_else(PoisonError::into_inner).set_message(words);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        drop(self.done.take());
        if let Some(waiter) = self.waiter.take() {
            let _ = waiter.join();
        }
        self.bar.lock().unwrap_or_else(PoisonError::into_inner).finish_and_clear();
    }
}
