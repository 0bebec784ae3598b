//! The summary of an import: counts of imported and existing rows, and the reasons for which rows were skipped.

use std::collections::BTreeSet;
use std::fmt;

use shared::user::UserId;

/// The number of locations that are listed for each reason.
const MAX_LOCATIONS: usize = 3;
/// The number of reasons that are counted separately, and of owners that are listed.
const MAX_LISTED: usize = 100;

/// A row that was skipped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skip {
    /// The file, and the line or row in it.
    pub location: String,
    /// Rows with the same reason are counted together.
    pub reason: String,
}

/// The number of rows of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Rows that this run wrote.
    pub imported: u64,
    /// Rows that existed before, and were not changed.
    pub already_present: u64,
}

impl Tally {
    /// Adds rows. `new` holds for each row whether it was written.
    pub(super) fn add(&mut self, new: &[bool]) {
        let imported = new.iter().filter(|new| **new).count() as u64;
        self.imported += imported;
        self.already_present += new.len() as u64 - imported;
    }
}

/// Rows that were skipped for the same reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    pub reason: String,
    pub count: u64,
    /// The locations of the first few rows.
    pub locations: Vec<String>,
}

/// The result of an import, or of the finished part of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    pub conversations: Tally,
    pub start_tasks: Tally,
    pub events: Tally,
    /// The skipped rows by reason, in the order of the first row of each reason.
    pub skipped: Vec<Skipped>,
    owners: BTreeSet<String>,
}

impl Summary {
    /// The number of rows that were imported, existed before, or were skipped.
    #[must_use]
    pub fn settled(&self) -> u64 {
        let tallies = [self.conversations, self.start_tasks, self.events];
        tallies.iter().map(|tally| tally.imported + tally.already_present).sum::<u64>() + self.skipped_rows()
    }

    #[must_use]
    pub fn skipped_rows(&self) -> u64 {
        self.skipped.iter().map(|skipped| skipped.count).sum()
    }

    pub(super) fn skip(&mut self, skip: Skip) {
        let known = self.skipped.iter().position(|skipped| skipped.reason == skip.reason);
        let index = known.or((self.skipped.len() > MAX_LISTED).then_some(MAX_LISTED)).unwrap_or_else(|| {
            let reason = if self.skipped.len() == MAX_LISTED { "other reasons".to_owned() } else { skip.reason };
            self.skipped.push(Skipped { reason, count: 0, locations: Vec::new() });
            self.skipped.len() - 1
        });
        let skipped = &mut self.skipped[index];
        skipped.count += 1;
        if skipped.locations.len() < MAX_LOCATIONS {
            skipped.locations.push(skip.location);
        }
    }

    pub(super) fn owner(&mut self, user: &UserId) {
        if self.owners.len() <= MAX_LISTED && !self.owners.contains(user.as_str()) {
            self.owners.insert(user.as_str().to_owned());
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tallies =
            [("conversations", self.conversations), ("start tasks", self.start_tasks), ("events", self.events)];
        for (name, tally) in tallies {
            writeln!(out, "{name:<13} {} imported, {} already present", tally.imported, tally.already_present)?;
        }
        if self.owners.iter().any(|owner| UserId::new(owner).shown().is_some()) {
            let name = |owner: &String| UserId::new(owner).shown().unwrap_or("the local user").to_owned();
            let mut names: Vec<String> = self.owners.iter().take(MAX_LISTED).map(name).collect();
            if self.owners.len() > MAX_LISTED {
                names.push("…".into());
            }
            writeln!(out, "{:<13} {}", "owners", names.join(", "))?;
        }
        writeln!(out, "{:<13} {}", "skipped", self.skipped_rows())?;
        for Skipped { reason, count, locations } in &self.skipped {
            let more = if *count > locations.len() as u64 { ", …" } else { "" };
            writeln!(out, "  {count} × {reason} ({}{more})", locations.join(", "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_counted_by_reason_and_the_first_locations_are_listed() {
        let mut summary = Summary::default();
        summary.conversations.add(&[true, true, false]);
        for line in 1..=5 {
            summary.skip(Skip { location: format!("a:{line}"), reason: "no JSON".into() });
        }
        summary.skip(Skip { location: "a:9".into(), reason: "no owner".into() });
        summary.owner(&UserId::local());
        summary.owner(&UserId::new("ann"));
        assert_eq!(summary.settled(), 9);
        let text = summary.to_string();
        for line in [
            "conversations 2 imported, 1 already present\n",
            "owners        ann, the local user\n",
            "skipped       6\n",
            "  5 × no JSON (a:1, a:2, a:3, …)\n",
            "  1 × no owner (a:9)\n",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }

    #[test]
    fn the_number_of_reasons_in_memory_is_bounded() {
        let mut summary = Summary::default();
        for line in 0..1000 {
            summary.skip(Skip { location: "a".into(), reason: format!("{line}") });
        }
        assert_eq!(summary.skipped_rows(), 1000);
        assert_eq!(summary.skipped.len(), MAX_LISTED + 1);
        assert_eq!(
            (summary.skipped[MAX_LISTED].reason.as_str(), summary.skipped[MAX_LISTED].count),
            ("other reasons", 900)
        );
    }
}
