//! Timestamps in the formats of the API contract and of the store.

use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::id::base62;

/// The length of [`Time::compact`].
pub const COMPACT_LENGTH: usize = 10;

/// An instant with microsecond precision.
///
/// The JSON format is `2025-03-02T12:34:56.789012Z`; a whole second has no fraction. The store uses [`Time::sortable`], whose lexicographic
/// order is the chronological order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(Timestamp);

impl Time {
    /// Returns the current time, truncated to microseconds.
    #[must_use]
    pub fn now() -> Self {
        #[cfg(feature = "simulation")]
        if let Some(now) = crate::simulation::now() {
            return Self::from(now);
        }
        Self::from(Timestamp::now())
    }

    /// Adds a duration; saturates at the latest time.
    #[must_use]
    pub fn plus(self, later: Duration) -> Self {
        Self(self.0.saturating_add(later).unwrap_or(Timestamp::MAX))
    }

    /// Subtracts a duration; saturates at the earliest time.
    #[must_use]
    pub fn minus(self, earlier: Duration) -> Self {
        Self(self.0.saturating_sub(earlier).unwrap_or(Timestamp::MIN))
    }

    /// Returns the time since `earlier`; zero if `earlier` is later than this time.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::try_from(self.0.duration_since(earlier.0)).unwrap_or_default()
    }

    /// Returns ten base-62 digits, whose lexicographic order is the chronological order: for keys of indexes, which are charged by their size.
    #[must_use]
    pub fn compact(self) -> String {
        // No time is earlier than this number of microseconds before 1970.
        const OFFSET: i64 = 400_000_000_000_000_000;
        let microseconds = self.0.as_microsecond().saturating_add(OFFSET);
        base62(u128::try_from(microseconds).unwrap_or_default(), COMPACT_LENGTH)
    }

    /// Returns fixed-width text with six fraction digits, whose lexicographic order is the chronological order.
    #[must_use]
    pub fn sortable(self) -> String {
        format!("{:.6}", self.0)
    }

    /// Returns `2025-03-02T12:34:56.789012`: without a time zone, like Python's `datetime.isoformat()`.
    #[must_use]
    pub fn naive(self) -> String {
        self.to_string().trim_end_matches('Z').to_owned()
    }

    /// Returns the seconds since the Unix epoch.
    #[must_use]
    pub fn unix_seconds(self) -> i64 {
        self.0.as_second()
    }
}

impl From<Timestamp> for Time {
    fn from(timestamp: Timestamp) -> Self {
        Self(Timestamp::from_microsecond(timestamp.as_microsecond()).unwrap_or(timestamp))
    }
}

impl From<Time> for Timestamp {
    fn from(time: Time) -> Self {
        time.0
    }
}

impl fmt::Display for Time {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.subsec_microsecond() == 0 && self.0.subsec_millisecond() == 0 {
            write!(out, "{:.0}", self.0)
        } else {
            write!(out, "{:.6}", self.0)
        }
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse::<Timestamp>().map(Self::from).map_err(serde::de::Error::custom)
    }
}

/// Serialises a [`Time`] in its sortable form, for sort keys of indexes.
pub mod sortable {
    use serde::Serializer;

    use super::Time;

    /// See [`Time::sortable`].
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(time: &Time, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&time.sortable())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(text: &str) -> Time {
        serde_json::from_value(serde_json::Value::String(text.to_owned())).expect("a time")
    }

    #[test]
    fn a_whole_second_has_no_fraction_and_any_other_has_six_digits() {
        for (given, shown) in [
            ("2025-03-02T12:34:56Z", "2025-03-02T12:34:56Z"),
            ("2025-03-02T12:34:56.5Z", "2025-03-02T12:34:56.500000Z"),
            ("2025-03-02T12:34:56.000001Z", "2025-03-02T12:34:56.000001Z"),
            ("2025-03-02T12:34:56.7890129Z", "2025-03-02T12:34:56.789012Z"),
            ("2025-03-02T12:34:56+02:00", "2025-03-02T10:34:56Z"),
        ] {
            assert_eq!(time(given).to_string(), shown);
        }
    }

    #[test]
    fn the_sortable_form_sorts_as_time_does() {
        let mut texts = ["2025-03-02T12:34:56.5Z", "2025-03-02T12:34:56Z", "2025-03-02T12:34:56.05Z"]
            .map(|text| time(text).sortable());
        texts.sort();
        assert_eq!(
            texts,
            ["2025-03-02T12:34:56.000000Z", "2025-03-02T12:34:56.050000Z", "2025-03-02T12:34:56.500000Z"]
        );
        let times = [
            Time(Timestamp::MIN),
            time("0001-01-01T00:00:00Z"),
            time("1969-12-31T23:59:59.999999Z"),
            time("1970-01-01T00:00:00Z"),
            time("2025-03-02T12:34:56.05Z"),
            time("2025-03-02T12:34:56.050001Z"),
            Time(Timestamp::MAX),
        ];
        let compact = times.map(Time::compact);
        assert!(compact.is_sorted_by(|one, other| one < other), "{compact:?}");
        assert!(compact.iter().all(|text| text.len() == COMPACT_LENGTH));
    }
}
