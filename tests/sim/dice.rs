//! Seeded decisions. Each decision is drawn from the seed, its own name and a counter of its subject, and never from a shared stream of
//! random numbers, so that a decision that is added elsewhere does not change the others.

use std::hash::{DefaultHasher, Hash, Hasher as _};

/// Returns 64 random bits for a decision: SipHash with fixed keys.
pub fn seeded(seed: u64, what: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    (seed, what).hash(&mut hasher);
    hasher.finish()
}

/// As [`seeded`], from 0 to 1.
pub fn random(seed: u64, what: &impl Hash) -> f64 {
    let bits = u32::try_from(seeded(seed, what) >> 32).expect("32 bits");
    f64::from(bits) / f64::from(u32::MAX)
}
