//! The SQLite files of a migration: inspection, and the new database that is built from the old one.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use dynoxide::actions::create_table::CreateTableRequest;
use dynoxide::actions::delete_table::DeleteTableRequest;
use dynoxide::actions::scan::ScanRequest;
use dynoxide::{Database, ImportOptions, Item, TableMetadata};
use rusqlite::Connection;
use schema::{Index, Projected, TABLES, Table};
use serde_json::{Value, json};

use super::Result;
use super::step::RunningStep;
use crate::engines::{EngineError, open_failure};
use crate::server::PREFIX;

/// How long to wait for another program, such as a backup, that has locked the file.
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);
/// The number of items that are read and written at once. The write is one transaction.
const PAGE: usize = 500;

/// What a database shows of its version.
pub(super) struct Found {
    /// The version that it states; 0 if it states none.
    pub(super) version: u32,
    /// The names of the product's tables, without the prefix, and of their indexes.
    pub(super) tables: BTreeMap<String, Vec<String>>,
}

/// Reads the version and the tables of a database.
pub(super) fn inspect(file: &Path) -> Result<Found, EngineError> {
    read(file).map_err(|error| EngineError::Database { path: file.to_owned(), reason: open_failure(&error) })
}

fn read(file: &Path) -> rusqlite::Result<Found> {
    let connection = connect(file)?;
    let version = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let mut tables = BTreeMap::new();
    let has_tables: bool = connection.query_row(
        "SELECT EXISTS (SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = '_tables')",
        [],
        |row| row.get(0),
    )?;
    if has_tables {
        let mut rows = connection.prepare("SELECT table_name, gsi_definitions FROM _tables")?;
        let mut rows = rows.query([])?;
        while let Some(row) = rows.next()? {
            let (name, indexes): (String, Option<String>) = (row.get(0)?, row.get(1)?);
            if let Some(name) = name.strip_prefix(PREFIX) {
                tables.insert(name.to_owned(), index_names(indexes.as_deref()));
            }
        }
    }
    Ok(Found { version, tables })
}

fn index_names(definitions: Option<&str>) -> Vec<String> {
    let definitions: Vec<Value> = definitions.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    definitions.iter().filter_map(|index| Some(index["IndexName"].as_str()?.to_owned())).collect()
}

/// States the version of a database.
pub(super) fn set_version(file: &Path, version: u32) -> Result<(), EngineError> {
    connect(file)
        .and_then(|connection| connection.pragma_update(None, "user_version", version))
        .map_err(|error| EngineError::Database { path: file.to_owned(), reason: open_failure(&error) })
}

/// Moves all data of a database into its main file, and removes its log.
pub(super) fn settle(file: &Path) -> Result<()> {
    let settled = connect(file)
        .and_then(|connection| connection.query_row("PRAGMA journal_mode = DELETE", [], |row| row.get::<_, String>(0)));
    match settled {
        Ok(mode) if mode == "delete" => Ok(()),
        Ok(_) => Err(format!("another program has {} open", file.display())),
        Err(error) => Err(format!("{}: {}", file.display(), open_failure(&error))),
    }
}

fn connect(file: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(file)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    Ok(connection)
}

/// The tables that have to be rebuilt: those that steps name, and those whose definition in the database is not the present one.
pub(super) fn changed_tables(file: &Path, steps: &[RunningStep]) -> Result<Vec<&'static Table>> {
    let (existing, present) = (open(file)?, Database::memory().map_err(text)?);
    let mut changed = Vec::new();
    for table in &TABLES {
        create(&present, table)?;
        let name = name_of(table.name);
        let [old, new] = [&existing, &present].map(|database| database.get_table_metadata(&name));
        let (old, new) =
            (old.map_err(text)?.map(|old| definition(&old)), new.map_err(text)?.map(|new| definition(&new)));
        // A missing table is created when the stores are opened, unless a step writes to it.
        let is_named = steps.iter().any(|step| step.tables.contains(&table.name));
        if is_named || (old.is_some() && old != new) {
            changed.push(table);
        }
    }
    Ok(changed)
}

/// The parts of a table's definition that its rows depend on.
fn definition(table: &TableMetadata) -> (String, Vec<String>) {
    let indexes: Option<Vec<Value>> = table.gsi_definitions.as_deref().and_then(|text| serde_json::from_str(text).ok());
    let mut indexes: Vec<String> = indexes.unwrap_or_default().iter().map(ToString::to_string).collect();
    indexes.sort_unstable();
    (table.key_schema.clone(), indexes)
}

/// Rebuilds tables of `draft` from the items of `source`, as the steps convert them. `observe` gets the numbers of rows that are read.
pub(super) fn build(
    source: &Path,
    draft: &Path,
    tables: &[&'static Table],
    steps: &mut [RunningStep],
    observe: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let (source, draft) = (open(source)?, open(draft)?);
    // Until it replaces the old database, the draft may be lost in a power failure.
    draft.enable_bulk_loading().map_err(text)?;
    let counts = source.table_stats().map_err(text)?;
    let count = |table: &str| {
        let found = counts.iter().find(|stats| stats.table_name == name_of(table));
        found.and_then(|stats| u64::try_from(stats.item_count).ok()).unwrap_or_default()
    };
    let read_by: Vec<Vec<&'static str>> = (0..steps.len()).map(|current| read_by(steps, current)).collect();
    let total = read_by.iter().flatten().copied().chain(tables.iter().map(|table| table.name)).map(count).sum();
    let mut read = 0;
    observe(read, total);
    let mut count_page = |items: usize| {
        read += u64::try_from(items).unwrap_or_default();
        observe(read, total);
    };
    for (current, tables) in read_by.iter().enumerate() {
        let (before, rest) = steps.split_at_mut(current);
        let Some(step) = rest.first_mut() else { break };
        for table in tables {
            for_each_page(&source, table, |items| {
                count_page(items.len());
                step.gather(&converted(before, table, items));
                Ok(())
            })?;
        }
        for number in 0..current {
            step.gather(&added(before, number));
        }
    }
    for table in tables {
        let name = name_of(table.name);
        if draft.get_table_metadata(&name).map_err(text)?.is_some() {
            draft.delete_table(DeleteTableRequest { table_name: name }).map_err(text)?;
        }
        create(&draft, table)?;
    }
    for table in tables {
        for_each_page(&source, table.name, |items| {
            count_page(items.len());
            write(&draft, converted(steps, table.name, items))
        })?;
    }
    for number in 0..steps.len() {
        write(&draft, added(steps, number))?;
    }
    draft.disable_bulk_loading().map_err(text)
}

/// The tables that are read for a step to gather from: besides its own, those from which an earlier step may move items into them.
fn read_by(steps: &[RunningStep], current: usize) -> Vec<&'static str> {
    let earlier = steps[..current].iter().flat_map(|step| step.tables);
    let mut tables: Vec<&'static str> = Vec::new();
    for table in steps[current].gathered.iter().chain(earlier) {
        if !tables.contains(table) {
            tables.push(table);
        }
    }
    tables
}

/// The items that a step adds, as the later steps convert them.
fn added(steps: &[RunningStep], number: usize) -> Vec<(&'static str, Item)> {
    let added = steps[number].finish();
    added.into_iter().flat_map(|(table, item)| converted(&steps[number + 1..], table, vec![item])).collect()
}

/// Converts items of a table by the steps, in their order.
fn converted(steps: &[RunningStep], table: &'static str, items: Vec<Item>) -> Vec<(&'static str, Item)> {
    let mut items: Vec<(&'static str, Item)> = items.into_iter().map(|item| (table, item)).collect();
    for step in steps {
        items = items.into_iter().flat_map(|(table, item)| step.convert(table, item)).collect();
    }
    items
}

/// Writes items, those of each table in one transaction. Writing them again changes nothing.
fn write(draft: &Database, items: Vec<(&'static str, Item)>) -> Result<()> {
    let mut of_tables: BTreeMap<&str, Vec<Item>> = BTreeMap::new();
    for (table, item) in items {
        of_tables.entry(table).or_default().push(item);
    }
    for (table, items) in of_tables {
        draft.import_items(&name_of(table), items, ImportOptions::default()).map_err(text)?;
    }
    Ok(())
}

/// Reads all items of a table; none if there is no such table.
fn for_each_page(database: &Database, table: &str, mut each: impl FnMut(Vec<Item>) -> Result<()>) -> Result<()> {
    let name = name_of(table);
    if database.get_table_metadata(&name).map_err(text)?.is_none() {
        return Ok(());
    }
    let mut start = None;
    loop {
        let request = ScanRequest {
            table_name: name.clone(),
            limit: Some(PAGE),
            exclusive_start_key: start,
            ..ScanRequest::default()
        };
        let page = database.scan(request).map_err(text)?;
        each(page.items.unwrap_or_default())?;
        start = page.last_evaluated_key;
        if start.is_none() {
            return Ok(());
        }
    }
}

fn open(file: &Path) -> Result<Database> {
    Database::new(file.to_str().ok_or("its path is not valid UTF-8")?).map_err(text)
}

fn name_of(table: &str) -> String {
    format!("{PREFIX}{table}")
}

/// Creates a table of the present layout, as `schema::make_all` does.
fn create(database: &Database, table: &Table) -> Result<()> {
    let keys = |partition: &str, sort: Option<&str>| -> Value {
        let key = |name: &str, kind: &str| json!({"AttributeName": name, "KeyType": kind});
        std::iter::once(key(partition, "HASH")).chain(sort.map(|sort| key(sort, "RANGE"))).collect()
    };
    let index = |index: &Index| {
        let projection = match index.projected {
            Projected::All => json!({"ProjectionType": "ALL"}),
            Projected::Keys => json!({"ProjectionType": "KEYS_ONLY"}),
            Projected::KeysAnd(attributes) => json!({"ProjectionType": "INCLUDE", "NonKeyAttributes": attributes}),
        };
        let keys = keys(index.partition_key, index.sort_key);
        json!({"IndexName": index.name, "KeySchema": keys, "Projection": projection})
    };
    let mut attributes: Vec<&str> = vec![table.partition_key, table.sort_key];
    for index in table.indexes {
        attributes.push(index.partition_key);
        attributes.extend(index.sort_key);
    }
    attributes.sort_unstable();
    attributes.dedup();
    let mut request = json!({
        "TableName": name_of(table.name),
        "BillingMode": "PAY_PER_REQUEST",
        "AttributeDefinitions": attributes.iter().map(|name| json!({"AttributeName": name, "AttributeType": "S"})).collect::<Value>(),
        "KeySchema": keys(table.partition_key, Some(table.sort_key)),
    });
    if !table.indexes.is_empty() {
        request["GlobalSecondaryIndexes"] = table.indexes.iter().map(index).collect();
    }
    let request: CreateTableRequest = serde_json::from_value(request).map_err(text)?;
    database.create_table(request).map(|_| ()).map_err(text)
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
