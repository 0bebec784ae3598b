//! Work that takes long without a wait runs on threads of its own. A simulation has one thread, and does it there.

use tokio::sync::mpsc::Sender;
use tokio::sync::mpsc::error::SendError;
use tokio::task::JoinHandle;

/// Whether work has to be done on the thread of its caller.
fn is_inline() -> bool {
    #[cfg(feature = "simulation")]
    let is_inline = crate::simulation::is_entered();
    #[cfg(not(feature = "simulation"))]
    let is_inline = false;
    is_inline
}

/// Runs work on a thread that may block.
pub(crate) fn spawn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    if is_inline() { tokio::spawn(async move { work() }) } else { tokio::task::spawn_blocking(work) }
}

/// The capacity of a channel to which such work sends values.
pub(crate) fn capacity(capacity: usize) -> usize {
    // What is sent is not received before the work is done.
    if is_inline() { 1 << 16 } else { capacity }
}

/// Sends a value from such work. Blocks while the channel is full.
///
/// # Errors
/// When the receiver is dropped.
pub(crate) fn send<T>(sender: &Sender<T>, value: T) -> Result<(), SendError<T>> {
    if is_inline() {
        return sender.try_send(value).map_err(|error| SendError(error.into_inner()));
    }
    sender.blocking_send(value)
}
