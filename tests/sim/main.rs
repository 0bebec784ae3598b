//! The deterministic simulation: thousands of starts, tenants, workers and sandboxes on a paused clock, in one thread and without sockets.
//! The code of the product is the real one; AWS, the sandbox provider and the agent servers are models with faults. A seed determines
//! everything: what clients do, what fails, how long each call takes.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::needless_pass_by_value,
    clippy::disallowed_methods,
    clippy::cast_precision_loss,
    reason = "a test fails by panicking"
)]

mod agents;
mod aws;
mod cost;
mod dice;
mod invariants;
mod known_faults;
mod net;
mod scenario;
mod world;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
