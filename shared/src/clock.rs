//! Instants as the contract writes them.

use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An instant with microsecond precision.
///
/// On the wire it is `2025-03-02T12:34:56.789012Z`; a whole second has no fraction. In the store it is
/// [`Time::sortable`], whose text order is the order in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(Timestamp);

impl Time {
    /// The current instant, cut to microseconds.
    #[must_use]
    pub fn now() -> Self {
        Self::from(Timestamp::now())
    }

    /// This instant `later` on; saturates at the end of time.
    #[must_use]
    pub fn plus(self, later: Duration) -> Self {
        Self(self.0.saturating_add(later).unwrap_or(Timestamp::MAX))
    }

    /// This instant `earlier`; saturates at the beginning of time.
    #[must_use]
    pub fn minus(self, earlier: Duration) -> Self {
        Self(self.0.saturating_sub(earlier).unwrap_or(Timestamp::MIN))
    }

    /// How long it is from `earlier` to this instant; zero if it is the other way round.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::try_from(self.0.duration_since(earlier.0)).unwrap_or_default()
    }

    /// Fixed-width text with six fraction digits, so that text order is order in time.
    #[must_use]
    pub fn sortable(self) -> String {
        format!("{:.6}", self.0)
    }

    /// `2025-03-02T12:34:56.789012`: without a zone, as Python's `datetime.isoformat()` writes it.
    #[must_use]
    pub fn naive(self) -> String {
        self.to_string().trim_end_matches('Z').to_owned()
    }

    /// Seconds since the Unix epoch.
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

/// Serialises a [`Time`] in its sortable form, for attributes that indexes are ordered by.
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
    }
}
