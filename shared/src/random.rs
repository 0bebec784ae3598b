//! Random numbers. All of this program's come from here: from the thread's cryptographic generator, or in a simulation from a seeded one.

#[cfg(feature = "simulation")]
use crate::simulation;

/// Returns random bytes.
#[must_use]
pub fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    #[cfg(feature = "simulation")]
    if simulation::fill(&mut bytes) {
        return bytes;
    }
    rand::Rng::fill_bytes(&mut rand::rng(), &mut bytes);
    bytes
}

/// Returns a random number below `bound`, which is not zero. For bounds up to 2^32 no number is preferred by more than 1 in 2^32.
#[must_use]
pub fn below(bound: usize) -> usize {
    let number = u128::from(u64::from_le_bytes(bytes()));
    usize::try_from((number * bound as u128) >> 64).unwrap_or_default()
}

/// Returns a random number from 0 to 1.
#[must_use]
pub fn fraction() -> f64 {
    f64::from(u32::from_le_bytes(bytes())) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_cover_their_range() {
        let mut counts = [0_u32; 62];
        for _ in 0..62_000 {
            counts[below(62)] += 1;
        }
        assert!(counts.iter().all(|count| (700..1300).contains(count)), "{counts:?}");
        assert_eq!((below(1), below(0)), (0, 0));
        let fractions: Vec<f64> = (0..1000).map(|_| fraction()).collect();
        assert!(fractions.iter().all(|one| (0.0..=1.0).contains(one)));
        assert!(fractions.iter().any(|one| *one < 0.1) && fractions.iter().any(|one| *one > 0.9));
        assert_ne!(bytes::<16>(), bytes::<16>());
    }
}
