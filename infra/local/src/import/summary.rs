//! What an import took, and what it did not and why.

use std::collections::BTreeSet;
use std::fmt;

use shared::user::UserId;

/// How many places are named for each reason.
const PLACES: usize = 3;
/// How many reasons are told apart, and how many owners are named.
const MANY: usize = 100;

/// A row that was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skip {
    /// Where it is: a file, and the line or row in it.
    pub place: String,
    /// Why. Rows with the same reason are counted together.
    pub reason: String,
}

/// Rows of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Rows written by this run.
    pub taken: u64,
    /// Rows that were there already, and were left as they are.
    pub already_there: u64,
}

impl Tally {
    /// Adds rows: for each, whether it is new.
    pub(super) fn add(&mut self, new: &[bool]) {
        let taken = new.iter().filter(|new| **new).count() as u64;
        self.taken += taken;
        self.already_there += new.len() as u64 - taken;
    }
}

/// Rows that were not taken for the same reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// Why.
    pub reason: String,
    /// How many.
    pub count: u64,
    /// Where the first few of them are.
    pub places: Vec<String>,
}

/// The result of an import, or of the part of it that is done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Conversations.
    pub conversations: Tally,
    /// Start tasks.
    pub start_tasks: Tally,
    /// Events.
    pub events: Tally,
    /// What was not taken, in the order of the first of each reason.
    pub skipped: Vec<Skipped>,
    owners: BTreeSet<String>,
}

impl Summary {
    /// How many rows are settled, in whichever way.
    #[must_use]
    pub fn settled(&self) -> u64 {
        let tallies = [self.conversations, self.start_tasks, self.events];
        tallies.iter().map(|tally| tally.taken + tally.already_there).sum::<u64>() + self.skipped_rows()
    }

    /// How many rows were not taken.
    #[must_use]
    pub fn skipped_rows(&self) -> u64 {
        self.skipped.iter().map(|skipped| skipped.count).sum()
    }

    pub(super) fn skip(&mut self, skip: Skip) {
        let known = self.skipped.iter().position(|skipped| skipped.reason == skip.reason);
        let index = known.or((self.skipped.len() > MANY).then_some(MANY)).unwrap_or_else(|| {
            let reason = if self.skipped.len() == MANY { "other reasons".to_owned() } else { skip.reason };
            self.skipped.push(Skipped { reason, count: 0, places: Vec::new() });
            self.skipped.len() - 1
        });
        let skipped = &mut self.skipped[index];
        skipped.count += 1;
        if skipped.places.len() < PLACES {
            skipped.places.push(skip.place);
        }
    }

    pub(super) fn owner(&mut self, user: &UserId) {
        if self.owners.len() <= MANY && !self.owners.contains(user.as_str()) {
            self.owners.insert(user.as_str().to_owned());
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tallies =
            [("conversations", self.conversations), ("start tasks", self.start_tasks), ("events", self.events)];
        for (name, tally) in tallies {
            writeln!(out, "{name:<13} {} taken, {} already there", tally.taken, tally.already_there)?;
        }
        if self.owners.iter().any(|owner| UserId::new(owner).shown().is_some()) {
            let name = |owner: &String| UserId::new(owner).shown().unwrap_or("the local user").to_owned();
            let mut names: Vec<String> = self.owners.iter().take(MANY).map(name).collect();
            if self.owners.len() > MANY {
                names.push("…".into());
            }
            writeln!(out, "{:<13} {}", "owners", names.join(", "))?;
        }
        writeln!(out, "{:<13} {}", "skipped", self.skipped_rows())?;
        for Skipped { reason, count, places } in &self.skipped {
            let more = if *count > places.len() as u64 { ", …" } else { "" };
            writeln!(out, "  {count} × {reason} ({}{more})", places.join(", "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_counted_together_and_the_first_places_are_named() {
        let mut summary = Summary::default();
        summary.conversations.add(&[true, true, false]);
        for line in 1..=5 {
            summary.skip(Skip { place: format!("a:{line}"), reason: "no JSON".into() });
        }
        summary.skip(Skip { place: "a:9".into(), reason: "no owner".into() });
        summary.owner(&UserId::local());
        summary.owner(&UserId::new("somebody"));
        assert_eq!(summary.settled(), 9);
        let text = summary.to_string();
        for line in [
            "conversations 2 taken, 1 already there\n",
            "owners        the local user, somebody\n",
            "skipped       6\n",
            "  5 × no JSON (a:1, a:2, a:3, …)\n",
            "  1 × no owner (a:9)\n",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }

    #[test]
    fn reasons_without_end_take_no_memory_without_end() {
        let mut summary = Summary::default();
        for line in 0..1000 {
            summary.skip(Skip { place: "a".into(), reason: format!("{line}") });
        }
        assert_eq!(summary.skipped_rows(), 1000);
        assert_eq!(summary.skipped.len(), MANY + 1);
        assert_eq!((summary.skipped[MANY].reason.as_str(), summary.skipped[MANY].count), ("other reasons", 900));
    }
}
