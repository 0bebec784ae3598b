//! Replaces the clock, the random numbers and the network of a thread, so that a simulation of this crate depends on its seed alone. Only
//! tests enable the feature; without a call of [`enter`] it changes nothing.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::time::Instant;

/// Why a simulated request has no response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoResponse {
    /// There is no connection, so the request had no effect.
    Unreachable,
    /// The connection was closed before the response was complete.
    CutOff,
}

/// The result of a simulated request. One without a response at all never ends, and runs into its timeout.
pub type Exchange = Pin<Box<dyn Future<Output = Result<http::Response<Bytes>, NoResponse>> + Send>>;

/// The servers that [`crate::http_client::HttpClient`] reaches in a simulation.
pub trait Network: Send + Sync {
    /// Sends a request.
    fn send(&self, request: reqwest::Request) -> Exchange;
}

struct World {
    random: StdRng,
    network: Arc<dyn Network>,
    began_at: Timestamp,
    began: Instant,
}

thread_local! {
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
}

/// Ends the simulation of its thread when it is dropped.
#[derive(Debug)]
pub struct Entered(PhantomData<*const ()>);

/// Makes this thread a simulation: from now on its clock is tokio's, which begins at `now`, its random numbers follow from the seed, and
/// its HTTP clients reach this network.
#[must_use]
pub fn enter(seed: u64, now: Timestamp, network: Arc<dyn Network>) -> Entered {
    let world = World { random: StdRng::seed_from_u64(seed), network, began_at: now, began: Instant::now() };
    WORLD.set(Some(world));
    Entered(PhantomData)
}

impl Drop for Entered {
    fn drop(&mut self) {
        WORLD.set(None);
    }
}

/// The simulated time.
pub(crate) fn now() -> Option<Timestamp> {
    WORLD.with_borrow(|world| {
        let world = world.as_ref()?;
        world.began_at.saturating_add(world.began.elapsed()).ok()
    })
}

/// Fills the bytes from the seeded generator. Returns false outside of a simulation.
pub(crate) fn fill(bytes: &mut [u8]) -> bool {
    WORLD.with_borrow_mut(|world| {
        let Some(world) = world else { return false };
        world.random.fill_bytes(bytes);
        true
    })
}

/// The simulated network.
pub(crate) fn network() -> Option<Arc<dyn Network>> {
    WORLD.with_borrow(|world| world.as_ref().map(|world| world.network.clone()))
}

/// Whether this thread is a simulation.
pub(crate) fn is_entered() -> bool {
    WORLD.with_borrow(Option::is_some)
}
