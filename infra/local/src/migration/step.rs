//! Steps from one version of the layout to the next one.
//!
//! A step that was released never changes: it names tables and attributes itself, not by the constants of the present code.

use std::collections::BTreeMap;

use dynoxide::Item;

/// All steps, oldest first.
pub(super) const STEPS: [Step; 1] = [super::version_2::STEP];

/// A step to a version of the layout.
pub(super) struct Step {
    /// The version that it leads to.
    pub(super) to: u32,
    /// Creates the state of one run.
    pub(super) begin: fn() -> RunningStep,
}

impl Step {
    pub(super) fn begin(&self) -> RunningStep {
        (self.begin)()
    }
}

/// Reads, converts and adds items, in this order.
pub(super) trait Conversion {
    /// Reads one item of the tables in [`RunningStep::gathered`], before any item is converted.
    fn gather(&mut self, table: &str, item: &Item);

    /// Converts one item of a table to items of the next version; it may drop the item, or split it. It depends on the item and on what
    /// was gathered, so that converting it again gives the same items.
    fn convert(&self, table: &'static str, item: Item) -> Vec<(&'static str, Item)>;

    /// Items that no single item of the version before corresponds to.
    fn finish(&self) -> Vec<(&'static str, Item)>;
}

/// A run of a step.
pub(super) struct RunningStep {
    /// The tables whose items it changes or adds.
    pub(super) tables: &'static [&'static str],
    /// The tables that it gathers from, in this order.
    pub(super) gathered: &'static [&'static str],
    pub(super) conversion: Box<dyn Conversion>,
}

impl RunningStep {
    pub(super) fn gather(&mut self, items: &[(&'static str, Item)]) {
        for (table, item) in items.iter().filter(|(table, _)| self.gathered.contains(table)) {
            self.conversion.gather(table, item);
        }
    }

    pub(super) fn convert(&self, table: &'static str, item: Item) -> Vec<(&'static str, Item)> {
        if self.tables.contains(&table) { self.conversion.convert(table, item) } else { vec![(table, item)] }
    }

    pub(super) fn finish(&self) -> Vec<(&'static str, Item)> {
        self.conversion.finish()
    }
}

/// The indexes of version 1, by table.
const VERSION_1: [(&str, &[&str]); 5] = [
    (
        "conversations",
        &[
            "all-by-created",
            "all-by-updated",
            "top-level-by-created",
            "top-level-by-updated",
            "by-sandbox",
            "by-parent",
            "deletions",
        ],
    ),
    ("start-tasks", &["by-created", "by-updated", "by-conversation", "unfinished"]),
    ("sandboxes", &["by-session-key", "by-created"]),
    ("events", &["by-position", "by-kind"]),
    ("users", &["undelivered"]),
];

/// The first index that a table lacks, compared with version 1. A whole table may be missing: the first start of the folder was killed
/// before it was created.
pub(super) fn missing_in_version_1(tables: &BTreeMap<String, Vec<String>>) -> Option<String> {
    VERSION_1.iter().find_map(|(table, indexes)| {
        let found = tables.get(*table)?;
        let missing = indexes.iter().find(|index| !found.iter().any(|found| found == *index))?;
        Some(format!("the index {missing} of the table {table}"))
    })
}
