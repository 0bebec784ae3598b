use std::collections::BTreeMap;
use std::panic::{self, AssertUnwindSafe};
use std::process::Command;

use dynoxide::actions::scan::ScanRequest;
use dynoxide::{AttributeValue, Database, Item};
use rusqlite::Connection;
use shared::aws::Aws;
use shared::config::Names;
use tempfile::TempDir;

use super::step::{Conversion, RunningStep};
use super::*;
use crate::engines::{Engines, IN_PROCESS_S3};
use crate::server::PREFIX;

/// Unpacks a recorded data folder.
fn recorded(name: &str) -> TempDir {
    let folder = TempDir::new().expect("a folder");
    let archive = format!("{}/../../tests/data/data-folders/{name}.tar.gz", env!("CARGO_MANIFEST_DIR"));
    let unpacked = Command::new("tar").arg("-xzf").arg(archive).arg("-C").arg(folder.path()).status().expect("tar");
    assert!(unpacked.success());
    folder
}

/// The list of contents of a recorded data folder.
fn expected(name: &str) -> serde_json::Value {
    let path = format!("{}/../../tests/data/data-folders/expected.json", env!("CARGO_MANIFEST_DIR"));
    let all: serde_json::Value = serde_json::from_slice(&fs::read(path).expect("the list")).expect("JSON");
    all[name].clone()
}

/// All items of a database by table, in a comparable form.
fn contents(file: &Path) -> BTreeMap<String, Vec<String>> {
    let database = Database::new(file.to_str().expect("UTF-8")).expect("a database");
    let mut contents = BTreeMap::new();
    for table in database.table_stats().expect("tables") {
        let scan = |start| {
            let request = ScanRequest {
                table_name: table.table_name.clone(),
                exclusive_start_key: start,
                ..ScanRequest::default()
            };
            database.scan(request).expect("a page")
        };
        let mut page = scan(None);
        let mut items: Vec<Item> = page.items.take().expect("items");
        while let Some(start) = page.last_evaluated_key {
            page = scan(Some(start));
            items.extend(page.items.take().expect("items"));
        }
        let sorted = |item: &Item| {
            let mut shown: BTreeMap<String, String> =
                item.iter().map(|(name, value)| (name.clone(), format!("{value:?}"))).collect();
            if shown.contains_key("expires_at") {
                // The time of the migration decides when a failed start expires.
                for name in ["expires_at", "due_at"] {
                    shown.insert(name.to_owned(), "a time".to_owned());
                }
            }
            shown
        };
        let mut items: Vec<String> = items.iter().map(|item| format!("{:?}", sorted(item))).collect();
        items.sort_unstable();
        contents.insert(table.table_name, items);
    }
    contents
}

/// The names of the entries of a data folder that belong to the database.
fn database_files(data: &Path) -> Vec<String> {
    let entries = fs::read_dir(data).expect("the folder");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8")).collect();
    names.retain(|name| name.starts_with(DATABASE) || name == VERSION_FILE);
    names.sort_unstable();
    names
}

fn ignore(_: Reached) {}

const MIGRATED: [&str; 3] = ["dynamodb.sqlite", "dynamodb.sqlite.before-2", "schema-version"];

#[test]
fn a_folder_of_version_1_is_migrated_and_its_database_is_kept() {
    for name in ["6132741", "efb6cde"] {
        let folder = recorded(name);
        let file = folder.path().join(DATABASE);
        let before = contents(&file);
        prepare(folder.path()).expect("migrated");
        assert_eq!(database_files(folder.path()), MIGRATED);
        assert_eq!(fs::read_to_string(folder.path().join(VERSION_FILE)).expect("the version"), "2\n");
        assert_eq!(contents(&folder.path().join("dynamodb.sqlite.before-2")), before);
        let after = contents(&file);
        let [conversations, events] = ["conversations", "events"].map(|table| format!("{PREFIX}{table}"));
        assert!(!before[&events].is_empty());
        assert_eq!(after[&events], before[&events]);
        assert_eq!(after[&conversations].len(), before[&conversations].len());
        // All but one that is being deleted are in a list.
        let count = |attribute: &str| after[&conversations].iter().filter(|row| row.contains(attribute)).count();
        assert_eq!([count("\"list\""), count("\"search\"")], [before[&conversations].len() - 1; 2]);
        assert_eq!([count("\"title_search\""), count("\"top_level_user\"")], [0, 0]);
        let [starts, leases] = [false, true].map(|is_lease| {
            after[&format!("{PREFIX}start-tasks")].iter().filter(|row| row.contains("#lease") == is_lease).count()
        });
        assert_eq!(starts, before[&format!("{PREFIX}start-tasks")].len());
        // Those in each unfinished status, one that is being cleaned up, and one that has failed and expires.
        assert_eq!(leases, expected(name)["unfinished"].as_object().expect("starts").len() + 2);
        let expiring = after[&format!("{PREFIX}start-tasks")].iter().filter(|row| row.contains("\"expires_at\""));
        assert!(expiring.clone().count() == 1 && expiring.clone().all(|row| row.contains("#lease")));
        let sandboxes = &after[&format!("{PREFIX}sandboxes")];
        assert_eq!(sandboxes.len(), before[&format!("{PREFIX}sandboxes")].len());
        for (id, wanted) in expected(name)["sandboxes"].as_object().expect("sandboxes") {
            let found = sandboxes.iter().find(|sandbox| sandbox.contains(id)).expect("the sandbox");
            let desired = format!("\"desired\": \"S(\\\"{}\\\")\"", wanted.as_str().expect("a state"));
            assert!(found.contains(&desired) && !found.contains("\"wanted\""), "{desired}: {found}");
        }
        assert!(sandboxes.iter().any(|sandbox| sandbox.contains("\"starts\"")));
        assert!(sandboxes.iter().any(|sandbox| sandbox.contains("\"conversations\"")));
    }
}

/// The events are by far the most rows.
#[test]
fn tables_that_have_not_changed_are_not_built_anew() {
    let folder = recorded("6132741");
    let steps: Vec<RunningStep> = STEPS.iter().map(Step::begin).collect();
    let changed = changed_tables(&folder.path().join(DATABASE), &steps).expect("tables");
    let changed: Vec<&str> = changed.iter().map(|table| table.name).collect();
    assert_eq!(changed, ["conversations", "start-tasks", "sandboxes", "users"]);
}

#[tokio::test]
async fn a_migrated_folder_has_the_definitions_of_a_new_one() {
    let definitions = |folder: &Path| {
        let connection = Connection::open(folder.join(DATABASE)).expect("a database");
        let mut rows = connection
            .prepare("SELECT table_name, key_schema, attribute_definitions, gsi_definitions FROM _tables ORDER BY 1")
            .expect("a statement");
        let rows = rows.query_map([], |row| Ok([row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?]));
        rows.expect("rows").collect::<rusqlite::Result<Vec<[String; 4]>>>().expect("rows")
    };
    let (old, new) = (recorded("6132741"), TempDir::new().expect("a folder"));
    // Every table is rebuilt.
    let step = Step {
        to: schema::VERSION,
        begin: || counting(&["conversations", "start-tasks", "sandboxes", "events", "users"]),
    };
    prepare_with(old.path(), &[step], &mut ignore).expect("migrated");
    for folder in [&old, &new] {
        let engines = Engines::in_process(folder.path(), IN_PROCESS_S3).await.expect("engines");
        let aws = Aws::new(&engines.sdk_config().await);
        schema::make_all(&aws, &Names::with_prefix(PREFIX), PREFIX).await.expect("the tables");
        engines.shutdown().await;
    }
    assert_eq!(definitions(old.path()), definitions(new.path()));
}

/// Counts the start tasks that it gathers, copies each item of the first table under another id, and adds an item with the count.
struct Counting(&'static str, u32);

fn counting(tables: &'static [&'static str]) -> RunningStep {
    RunningStep { tables, gathered: &["start-tasks"], conversion: Box::new(Counting(tables[0], 0)) }
}

impl Conversion for Counting {
    fn gather(&mut self, table: &str, _: &Item) {
        assert_eq!(table, "start-tasks");
        self.1 += 1;
    }

    fn convert(&self, table: &'static str, item: Item) -> Vec<(&'static str, Item)> {
        let mut items = vec![(table, item.clone())];
        if table == self.0 {
            let (_, copy) = &mut items[0];
            let AttributeValue::S(id) = &copy["id"] else { panic!("an id") };
            let id = AttributeValue::S(format!("{id}-copy"));
            copy.insert("id".to_owned(), id);
            items.push((table, item));
        }
        items
    }

    fn finish(&self) -> Vec<(&'static str, Item)> {
        let text = |text: String| AttributeValue::S(text);
        let attributes =
            [("user", text("all".into())), ("id", text("count".into())), ("count", text(self.1.to_string()))];
        vec![(self.0, attributes.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())]
    }
}

#[test]
fn steps_follow_each_other() {
    let folder = recorded("6132741");
    let file = folder.path().join(DATABASE);
    let before = contents(&file)[&format!("{PREFIX}start-tasks")].len();
    let step = || Step { to: schema::VERSION, begin: || counting(&["start-tasks"]) };
    let old_step = Step { to: FIRST, begin: || panic!("the folder has this version") };
    prepare_with(folder.path(), &[old_step, step(), step()], &mut ignore).expect("migrated");
    let after = &contents(&file)[&format!("{PREFIX}start-tasks")];
    // Each step copies each item under another id; the copies of the first step's copies and of the items have the same ids. The second
    // step gathers the items that the first one has made, and the one that it has added.
    assert_eq!(after.len(), before * 3 + 2);
    let count =
        |count: usize| after.iter().filter(|item| item.contains(&format!("\"count\": \"S(\\\"{count}\\\")\""))).count();
    assert_eq!((count(before), count(2 * before + 1)), (1, 1), "{after:#?}");
}

/// What one run observes.
fn observed(data: &Path) -> Vec<Reached> {
    let mut all = Vec::new();
    prepare_with(data, &STEPS, &mut |reached| all.push(reached)).expect("migrated");
    all
}

#[test]
fn a_migration_that_is_interrupted_at_any_point_starts_again() {
    let reference = recorded("efb6cde");
    let before = contents(&reference.path().join(DATABASE));
    let points = observed(reference.path());
    assert!(points.len() > 8, "{points:?}");
    let migrated = contents(&reference.path().join(DATABASE));
    for (number, point) in points.iter().enumerate() {
        let folder = recorded("efb6cde");
        let mut left = number;
        let interrupted = panic::catch_unwind(AssertUnwindSafe(|| {
            prepare_with(folder.path(), &STEPS, &mut |_| {
                assert_ne!(left, 0, "interrupted");
                left -= 1;
            })
        }));
        assert!(interrupted.is_err(), "{point:?}");
        if *point != Reached::InPlace {
            assert_eq!(contents(&folder.path().join(DATABASE)), before, "{point:?}");
        }
        let again = observed(folder.path());
        assert_eq!(again.is_empty(), *point == Reached::InPlace);
        assert_eq!(database_files(folder.path()), MIGRATED, "{point:?}");
        assert_eq!(contents(&folder.path().join(DATABASE)), migrated, "{point:?}");
        assert_eq!(contents(&folder.path().join("dynamodb.sqlite.before-2")), before, "{point:?}");
    }
}

#[test]
fn a_folder_of_the_present_version_is_opened_without_a_copy() {
    let folder = TempDir::new().expect("a folder");
    for _ in 0..2 {
        assert_eq!(observed(folder.path()), []);
        assert_eq!(database_files(folder.path()), ["dynamodb.sqlite", "schema-version"]);
    }
    // The first start was killed before it created a table: of this program, and of one that writes no version.
    let file = folder.path().join(DATABASE);
    for empty in [true, false] {
        fs::remove_file(&file).expect("removed");
        fs::remove_file(folder.path().join(VERSION_FILE)).expect("removed");
        match empty {
            true => fs::write(&file, "").expect("a file"),
            false => drop(Database::new(file.to_str().expect("UTF-8")).expect("a database")),
        }
        assert_eq!(observed(folder.path()), []);
        assert_eq!(database_files(folder.path()), ["dynamodb.sqlite", "schema-version"]);
    }
}

#[test]
fn newer_and_unknown_folders_are_refused_unchanged() {
    let newer = schema::VERSION + 1;
    let folder = recorded("6132741");
    let (version, file) = (folder.path().join(VERSION_FILE), folder.path().join(DATABASE));
    let before = fs::read(&file).expect("the database");
    fs::write(&version, format!("{newer}\n")).expect("a file");
    for refused in [prepare(folder.path()), refuse_newer(folder.path())] {
        let text = refused.expect_err("refused").to_string();
        assert!(text.contains("has version 3, and this program supports versions up to 2"), "{text}");
    }
    fs::write(&version, "two\n").expect("a file");
    let text = prepare(folder.path()).expect_err("refused").to_string();
    assert!(text.contains("schema-version does not contain the version of a data folder"), "{text}");
    fs::remove_file(&version).expect("removed");
    refuse_newer(folder.path()).expect("no version");
    assert_eq!(fs::read(&file).expect("the database"), before);

    // The file is missing, but the database states its version.
    database::set_version(&file, newer).expect("set");
    let text = prepare(folder.path()).expect_err("refused").to_string();
    assert!(text.contains("has version 3"), "{text}");

    let folder = recorded("6132741");
    let connection = Connection::open(folder.path().join(DATABASE)).expect("the database");
    let changed = connection
        .execute("UPDATE _tables SET gsi_definitions = replace(gsi_definitions, 'by-sandbox', 'x') WHERE table_name LIKE '%conversations'", [])
        .expect("changed");
    assert_eq!(changed, 1);
    drop(connection);
    let text = prepare(folder.path()).expect_err("refused").to_string();
    assert!(text.contains("it lacks the index by-sandbox of the table conversations"), "{text}");
    assert_eq!(database_files(folder.path()), ["dynamodb.sqlite"]);
}

#[test]
fn going_back_and_migrating_again_keeps_both_copies() {
    let folder = recorded("efb6cde");
    let file = folder.path().join(DATABASE);
    let copy = folder.path().join("dynamodb.sqlite.before-2");
    prepare(folder.path()).expect("migrated");
    let before = contents(&copy);
    fs::copy(&copy, &file).expect("copied");
    // An older program goes on with it, and ignores the file `schema-version`.
    let connection = Connection::open(&file).expect("the database");
    let removed = connection.execute("DELETE FROM \"openhands-events\"", []).expect("removed");
    assert!(removed > 0);
    drop(connection);
    prepare(folder.path()).expect("migrated");
    assert_eq!(contents(&copy), before);
    let second = contents(&folder.path().join("dynamodb.sqlite.before-2.2"));
    assert_eq!(second["openhands-events"], [""; 0]);
    assert_eq!(second["openhands-users"], before["openhands-users"]);
}

/// A program that was killed leaves its last writes in the log of the database.
#[test]
fn writes_in_the_log_are_migrated() {
    let folder = recorded("efb6cde");
    let file = folder.path().join(DATABASE);
    let crashed = TempDir::new().expect("a folder");
    let connection = Connection::open(&file).expect("the database");
    connection.query_row("PRAGMA journal_mode = WAL", [], |_| Ok(())).expect("a log");
    let removed = connection.execute("DELETE FROM \"openhands-events\"", []).expect("removed");
    for name in [DATABASE.to_owned(), format!("{DATABASE}-wal")] {
        fs::copy(folder.path().join(&name), crashed.path().join(&name)).expect("copied");
    }
    assert!(fs::metadata(crashed.path().join(format!("{DATABASE}-wal"))).expect("a log").len() > 0);
    assert!(removed > 0);
    prepare(crashed.path()).expect("migrated");
    assert_eq!(database_files(crashed.path()), MIGRATED);
    for name in [DATABASE, "dynamodb.sqlite.before-2"] {
        assert_eq!(contents(&crashed.path().join(name))["openhands-events"], [""; 0], "{name}");
    }
}

#[test]
fn a_database_that_another_program_has_open_is_not_replaced() {
    let folder = recorded("efb6cde");
    let file = folder.path().join(DATABASE);
    let other = Connection::open(&file).expect("the database");
    other.query_row("PRAGMA journal_mode = WAL", [], |_| Ok(())).expect("a log");
    other.query_row("SELECT count(*) FROM _tables", [], |_| Ok(())).expect("a read");
    let text = prepare(folder.path()).expect_err("refused").to_string();
    assert!(text.contains("cannot be migrated") && text.contains("locked"), "{text}");
    assert!(text.contains("Its data is unchanged"), "{text}");
    drop(other);
    prepare(folder.path()).expect("migrated");
}

#[test]
fn a_full_disk_is_found_before_the_migration() {
    let mib = 1024 * 1024;
    assert_eq!(enough_space(100 * mib, 332 * mib), Ok(()));
    let refused = enough_space(100 * mib, 331 * mib);
    assert_eq!(refused, Err("the disk has 331 MiB free, and the migration needs 332 MiB".to_owned()));
}

/// The digest of the present layout. If it has changed, increase [`schema::VERSION`] and add a step (which may be empty, because tables
/// with a changed definition are rebuilt), and then replace the digest. Until a version is released, its step may be changed instead.
#[test]
fn a_change_of_the_layout_has_a_version() {
    let layout = shared::digest::sha256_hex(&format!("{:?}", schema::TABLES));
    assert_eq!((schema::VERSION, &layout[..16]), (2, "20dfacf3ac5e9013"));
}
