//! The step to version 2.
//!
//! - A sandbox holds its members: the ids of its unfinished starts (`starts`) and of its conversations (`conversations`). `wanted` is
//!   `desired`. A sandbox that an unfinished start has created has `delete_when_empty`. Every sandbox is due (`due_shard`, `due_at`), so
//!   that the reconciler looks at each of them once.
//! - A start task has a second row, its lease row, with all that workers change while the start goes on. It exists while the start is
//!   unfinished. A failed start keeps it, with the time (`expires_at`) after which the sweep removes both rows: 30 days after the migration.
//! - A conversation has narrow indexes: `list` (its user and whether it has a parent) is the partition of the indexes by time; sort keys are
//!   compact; `created` and `search` are for filters. `top_level_user` and `title_search` are removed. Its last change is not before its
//!   creation.
//! - The counts of a user are in eight items, `counters#0` to `counters#7`, and include unfinished starts. They are counted from the rows.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use dynoxide::{AttributeValue, Item};
use jiff::Timestamp;
use shared::Time;

use super::step::{Conversion, RunningStep, Step};

pub(super) const STEP: Step = Step {
    to: 2,
    begin: || RunningStep {
        tables: &["conversations", "sandboxes", "start-tasks", "users"],
        gathered: &["sandboxes", "conversations", "start-tasks"],
        conversion: Box::new(ToVersion2::new(Time::now())),
    },
};

const DUE_SHARDS: u8 = 4;
const UNFINISHED_SHARD: &str = "unfinished_shard";
/// The attributes of a start task that are in its lease row.
const LEASE_ATTRIBUTES: [&str; 9] = [
    "due_at",
    "lease_owner",
    "lease_until",
    "last_write",
    "open_claims",
    "attempts",
    "refusals",
    "command",
    UNFINISHED_SHARD,
];
/// How long failed starts are kept.
const FAILED_STARTS_EXPIRE: Duration = Duration::from_secs(30 * 24 * 3600);
const SUB_COUNTERS: u8 = 8;
const COUNTERS: &str = "counters";

/// A user and an id.
type Key = (String, String);

struct ToVersion2 {
    /// When failed starts expire.
    expires_at: Time,
    sandboxes: HashMap<Key, Members>,
    /// By user and number of the sub-counter.
    counts: BTreeMap<(String, u8), Counts>,
}

#[derive(Default)]
struct Members {
    starts: BTreeSet<String>,
    conversations: BTreeSet<String>,
    is_of_start: bool,
}

#[derive(Default)]
struct Counts {
    conversations: u64,
    top_level_conversations: u64,
    start_tasks: u64,
    unfinished_starts: u64,
}

impl ToVersion2 {
    fn new(now: Time) -> Self {
        Self { expires_at: now.plus(FAILED_STARTS_EXPIRE), sandboxes: HashMap::new(), counts: BTreeMap::new() }
    }

    fn gather_conversation(&mut self, item: &Item) -> Option<()> {
        let (user, id) = key(item)?;
        // A conversation that is being deleted is not counted. It leaves its sandbox when its deletion ends.
        if !item.contains_key("deleting_since") {
            let counts = self.counts.entry((user.clone(), sub_counter(&id)?)).or_default();
            counts.conversations += 1;
            counts.top_level_conversations += u64::from(!item.contains_key("parent_conversation_id"));
        }
        let members = self.sandboxes.get_mut(&(user, text(item, "sandbox_id")?))?;
        members.conversations.insert(id);
        Some(())
    }

    fn gather_start(&mut self, item: &Item) -> Option<()> {
        let (user, id) = key(item)?;
        let counts = self.counts.entry((user.clone(), sub_counter(&id)?)).or_default();
        counts.start_tasks += 1;
        // No worker continues an imported start, which may have any status.
        let is_unfinished = item.contains_key(UNFINISHED_SHARD);
        if !is_unfinished {
            return None;
        }
        counts.unfinished_starts += 1;
        let created = text(item, "new_sandbox_id");
        // Between the creation of a sandbox and the write that names it, the start has only the id that it has chosen.
        let sandbox = text(item, "sandbox_id").or_else(|| created.clone())?;
        let members = self.sandboxes.get_mut(&(user, sandbox.clone()))?;
        members.is_of_start |= created == Some(sandbox);
        members.starts.insert(id);
        Some(())
    }

    fn sandbox(&self, mut item: Item) -> Item {
        if let Some(wanted) = item.remove("wanted") {
            item.insert("desired".to_owned(), wanted);
        }
        if let (Some(id), Some(used_at)) = (text(&item, "id"), item.get("used_at").cloned()) {
            let shard = id.bytes().fold(0, u8::wrapping_add) % DUE_SHARDS;
            item.insert("due_shard".to_owned(), AttributeValue::S(shard.to_string()));
            item.insert("due_at".to_owned(), used_at);
        }
        if let Some(members) = key(&item).and_then(|key| self.sandboxes.get(&key)) {
            for (name, ids) in [("starts", &members.starts), ("conversations", &members.conversations)] {
                // DynamoDB has no empty sets.
                if !ids.is_empty() {
                    item.insert(name.to_owned(), AttributeValue::SS(ids.iter().cloned().collect()));
                }
            }
            if members.is_of_start {
                item.insert("delete_when_empty".to_owned(), AttributeValue::BOOL(true));
            }
        }
        item
    }
}

/// A conversation with the keys of the new indexes.
fn conversation(mut item: Item) -> Item {
    item.remove("top_level_user");
    let search = item.remove("title_search");
    // A conversation that is being deleted, and a tombstone, are in no list.
    if item.contains_key("deleting_since") {
        return item;
    }
    let created = text(&item, "created_at").and_then(|text| text.parse::<Timestamp>().ok());
    let updated = text(&item, "updated_at").and_then(|text| text.parse::<Timestamp>().ok());
    let id = text(&item, "id").and_then(|id| uuid::Uuid::try_parse(&id).ok());
    let (Some((user, _)), Some(created), Some(updated), Some(id)) = (key(&item), created, updated, id) else {
        return item;
    };
    if updated < created
        && let Some(created_at) = item.get("created_at").cloned()
    {
        item.insert("updated_at".to_owned(), created_at);
    }
    // Rows with the same time are in the order of the complements of their ids.
    let id = base62(!id.as_u128(), 22);
    let (created, updated) = (compact(created), compact(updated.max(created)));
    let list = if item.contains_key("parent_conversation_id") { "s" } else { "t" };
    let attributes = [
        ("list", format!("{user}/{list}")),
        ("created_sort", format!("{created}{id}")),
        ("updated_sort", format!("{updated}{id}")),
        ("created", created),
    ];
    for (name, value) in attributes {
        item.insert(name.to_owned(), AttributeValue::S(value));
    }
    item.extend(search.map(|search| ("search".to_owned(), search)));
    item
}

/// A time as ten base-62 digits: microseconds since long before the earliest time.
fn compact(time: Timestamp) -> String {
    let microseconds = time.as_microsecond().saturating_add(400_000_000_000_000_000);
    base62(u128::try_from(microseconds).unwrap_or_default(), 10)
}

fn base62(mut number: u128, digits: usize) -> String {
    const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let mut text = vec![DIGITS[0]; digits];
    for digit in text.iter_mut().rev() {
        *digit = DIGITS[usize::try_from(number % 62).unwrap_or_default()];
        number /= 62;
    }
    text.into_iter().map(char::from).collect()
}

/// The rows of a start task.
fn start_rows(mut item: Item, expires_at: Time) -> Vec<Item> {
    let mut moved: Item = LEASE_ATTRIBUTES.iter().filter_map(|name| item.remove_entry(*name)).collect();
    if !moved.contains_key(UNFINISHED_SHARD) {
        // Imported starts, which no worker has run, chose no sandbox and do not expire.
        let has_run = text(&item, "new_sandbox_id").is_some_and(|id| !id.is_empty());
        if !has_run || text(&item, "status").as_deref() != Some("ERROR") {
            return vec![item];
        }
        let Some(shard) = text(&item, "id").and_then(|id| Some(id.get(..1)?.to_owned())) else { return vec![item] };
        moved = [
            (UNFINISHED_SHARD, AttributeValue::S(shard)),
            ("due_at", AttributeValue::S(expires_at.sortable())),
            ("expires_at", AttributeValue::N(expires_at.unix_seconds().to_string())),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
    }
    // Only a start that is unfinished has a deadline.
    let lacks_deadline = !moved.contains_key("expires_at") && !item.contains_key("deadline");
    if let (true, Some(updated_at)) = (lacks_deadline, item.get("updated_at").cloned()) {
        item.insert("deadline".to_owned(), updated_at);
    }
    let Some((user, id)) = key(&item) else { return vec![item] };
    let mut lease = moved;
    lease.insert("user".to_owned(), AttributeValue::S(user));
    lease.insert("id".to_owned(), AttributeValue::S(format!("{id}#lease")));
    vec![item, lease]
}

impl Conversion for ToVersion2 {
    fn gather(&mut self, table: &str, item: &Item) {
        // An item without a key cannot exist.
        let _gathered = match table {
            "sandboxes" => key(item).map(|key| drop(self.sandboxes.insert(key, Members::default()))),
            "conversations" => self.gather_conversation(item),
            _ => self.gather_start(item),
        };
    }

    fn convert(&self, table: &'static str, item: Item) -> Vec<(&'static str, Item)> {
        match table {
            "conversations" => vec![(table, conversation(item))],
            "sandboxes" => vec![(table, self.sandbox(item))],
            "start-tasks" => start_rows(item, self.expires_at).into_iter().map(|item| (table, item)).collect(),
            _ if text(&item, "kind").as_deref() == Some(COUNTERS) => Vec::new(),
            _ => vec![(table, item)],
        }
    }

    fn finish(&self) -> Vec<(&'static str, Item)> {
        let number = |count: u64| AttributeValue::N(count.to_string());
        self.counts
            .iter()
            .map(|((user, sub_counter), counts)| {
                let item = [
                    ("user", AttributeValue::S(user.clone())),
                    ("kind", AttributeValue::S(format!("{COUNTERS}#{sub_counter}"))),
                    ("conversations", number(counts.conversations)),
                    ("top_level_conversations", number(counts.top_level_conversations)),
                    ("start_tasks", number(counts.start_tasks)),
                    ("unfinished_starts", number(counts.unfinished_starts)),
                ];
                ("users", item.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
            })
            .collect()
    }
}

fn text(item: &Item, name: &str) -> Option<String> {
    match item.get(name)? {
        AttributeValue::S(text) => Some(text.clone()),
        _ => None,
    }
}

fn key(item: &Item) -> Option<Key> {
    Some((text(item, "user")?, text(item, "id")?))
}

/// The number of the sub-counter that counts the row with this id.
fn sub_counter(id: &str) -> Option<u8> {
    let id = uuid::Uuid::try_parse(id).ok()?;
    Some(id.as_bytes().iter().fold(0, |sum, byte| sum ^ byte) % SUB_COUNTERS)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn item(attributes: Value) -> Item {
        serde_json::from_value(attributes).expect("an item")
    }

    fn s(text: &str) -> Value {
        json!({"S": text})
    }

    fn running() -> ToVersion2 {
        ToVersion2::new(serde_json::from_value(json!("2026-11-20T10:00:00Z")).expect("a time"))
    }

    const A: &str = "000000000000000000000000000000a1";
    const B: &str = "000000000000000000000000000000b2";
    const C: &str = "000000000000000000000000000000c3";

    #[test]
    fn a_sandbox_gets_its_members() {
        let mut step = running();
        let used_at = s("2026-11-20T10:00:00.000000Z");
        let sandbox = |id: &str| item(json!({"user": s("u"), "id": s(id), "wanted": s("paused"), "used_at": used_at}));
        for id in ["one", "two", "empty"] {
            step.gather("sandboxes", &sandbox(id));
        }
        for (id, sandbox, more) in [(A, "one", None), (B, "one", Some("deleting_since")), (C, "gone", None)] {
            let mut conversation = json!({"user": s("u"), "id": s(id), "sandbox_id": s(sandbox)});
            if let Some(more) = more {
                conversation[more] = s("2026-11-20T10:00:00.000000Z");
            }
            step.gather("conversations", &item(conversation));
        }
        let start = |id: &str, more: Value| {
            let mut start = json!({"user": s("u"), "id": s(id), "status": s("WORKING")});
            for (name, value) in more.as_object().expect("attributes") {
                start[name] = value.clone();
            }
            item(start)
        };
        // One joined a sandbox, one has created its own and not named it yet, one is finished.
        step.gather(
            "start-tasks",
            &start(A, json!({"unfinished_shard": s("a"), "sandbox_id": s("one"), "new_sandbox_id": s("x")})),
        );
        step.gather("start-tasks", &start(B, json!({"unfinished_shard": s("b"), "new_sandbox_id": s("two")})));
        step.gather("start-tasks", &start(C, json!({"sandbox_id": s("two"), "new_sandbox_id": s("two")})));
        let converted = |id: &str, shard: &str| {
            let mut items = step.convert("sandboxes", sandbox(id));
            assert_eq!(items.len(), 1);
            let mut converted = serde_json::to_value(items.remove(0).1).expect("JSON");
            let common = [("user", s("u")), ("id", s(id)), ("desired", s("paused")), ("used_at", used_at.clone())];
            let due = [("due_shard", s(shard)), ("due_at", used_at.clone())];
            for (name, value) in common.into_iter().chain(due) {
                assert_eq!(converted[name].take(), value, "{name} of {id}");
            }
            let mut more = converted.as_object().expect("attributes").clone();
            more.retain(|_, value| !value.is_null());
            Value::Object(more)
        };
        assert_eq!(converted("one", "2"), json!({"starts": {"SS": [A]}, "conversations": {"SS": [A, B]}}));
        assert_eq!(converted("two", "2"), json!({"starts": {"SS": [B]}, "delete_when_empty": {"BOOL": true}}));
        assert_eq!(converted("empty", "3"), json!({}));
    }

    #[test]
    fn a_conversation_gets_the_keys_of_narrow_indexes() {
        let converted = |more: Value| {
            let mut row = json!({"user": s("u"), "id": s(A), "created_at": s("2026-11-20T10:00:00.000000Z"),
                "updated_at": s("2026-11-20T11:00:00.000000Z"), "created_sort": s("x"), "updated_sort": s("y"), "sandbox_key": s("z"),
                "top_level_user": s("u")});
            row.as_object_mut().expect("attributes").extend(more.as_object().expect("attributes").clone());
            let mut rows = running().convert("conversations", item(row));
            assert_eq!(rows.len(), 1);
            serde_json::to_value(rows.remove(0).1).expect("JSON")
        };
        let row = converted(json!({"title": s("A"), "title_search": s("a")}));
        assert_eq!([&row["list"], &row["search"]], [&s("u/t"), &s("a")]);
        for gone in ["top_level_user", "title_search"] {
            assert!(row.get(gone).is_none(), "{gone}");
        }
        // The keys that the store writes and reads.
        let time = |text: &str| serde_json::from_value::<shared::Time>(json!(text)).expect("a time");
        let key = |at: &str| {
            let id = uuid::Uuid::try_parse(A).expect("an id");
            serde_json::to_value(shared::conversation::search::Cursor::at(time(at), id)).expect("JSON")
        };
        let (created, updated) = ("2026-11-20T10:00:00.000000Z", "2026-11-20T11:00:00.000000Z");
        assert_eq!(row["created"], s(&time(created).compact()));
        assert_eq!([&row["created_sort"]["S"], &row["updated_sort"]["S"]], [&key(created), &key(updated)]);
        let row = converted(json!({"parent_conversation_id": s(B), "updated_at": s("2026-11-20T09:00:00.000000Z")}));
        assert_eq!([&row["list"], &row["updated_at"]], [&s("u/s"), &s(created)]);
        assert_eq!(row["updated_sort"], row["created_sort"]);
        let row = converted(json!({"deleting_since": s(created)}));
        assert!(row.get("list").is_none(), "{row}");
    }

    #[test]
    fn an_unfinished_start_gets_a_lease_row() {
        let step = running();
        let rows = |row: &Value| {
            let rows = step.convert("start-tasks", item(row.clone()));
            assert!(rows.iter().all(|(table, _)| *table == "start-tasks"));
            rows.into_iter().map(|(_, row)| serde_json::to_value(row).expect("JSON")).collect::<Vec<_>>()
        };
        let at = s("2026-11-20T10:00:00.000000Z");
        let common =
            json!({"user": s("u"), "id": s(A), "status": s("WORKING"), "updated_at": at, "history": {"L": []}});
        let with = |more: Value| {
            let mut row = common.clone();
            row.as_object_mut().expect("attributes").extend(more.as_object().expect("attributes").clone());
            row
        };
        let command = json!({"M": {"name": s("setup-script"), "id": s("c")}});
        let leased = json!({"unfinished_shard": s("0"), "due_at": at, "lease_owner": s("w"), "lease_until": at, "last_write": s("x"),
            "open_claims": {"N": "1"}, "attempts": {"N": "2"}, "refusals": {"N": "0"}, "command": command});
        let mut lease = leased.clone();
        lease["user"] = s("u");
        lease["id"] = s(&format!("{A}#lease"));
        let kept = json!({"deadline": s("2026-11-20T11:00:00.000000Z"), "failure": s("why")});
        let mut whole = with(kept.clone());
        whole.as_object_mut().expect("attributes").extend(leased.as_object().expect("attributes").clone());
        assert_eq!(rows(&whole), [with(kept), lease.clone()]);
        // Without a deadline, the step is overdue.
        assert_eq!(rows(&with(leased)), [with(json!({"deadline": at})), lease]);
        // A finished start, and one that was imported.
        assert_eq!(rows(&with(json!({"attempts": {"N": "2"}, "last_write": s("x")}))), std::slice::from_ref(&common));
        // A failed start.
        let imported = with(json!({"status": s("ERROR"), "new_sandbox_id": s("")}));
        assert_eq!(rows(&imported), [imported]);
        let failed = with(json!({"status": s("ERROR"), "new_sandbox_id": s("x")}));
        let lease = json!({"user": s("u"), "id": s(&format!("{A}#lease")), "unfinished_shard": s("0"),
            "due_at": s("2026-12-20T10:00:00.000000Z"), "expires_at": {"N": "1797760800"}});
        assert_eq!(rows(&failed), [failed, lease]);
    }

    #[test]
    fn counters_are_made_from_the_rows() {
        let mut step = running();
        let ids: Vec<String> = (0..100u128).map(|id| uuid::Uuid::from_u128(id << 64).simple().to_string()).collect();
        for (number, id) in ids.iter().enumerate() {
            let mut conversation = json!({"user": s("u"), "id": s(id), "sandbox_id": s("x")});
            if number < 30 {
                conversation["parent_conversation_id"] = s(A);
            }
            step.gather("conversations", &item(conversation));
            let mut start = json!({"user": s("u"), "id": s(id), "status": s("WORKING")});
            if number < 20 {
                start["unfinished_shard"] = s("0");
            }
            step.gather("start-tasks", &item(start));
        }
        step.gather("conversations", &item(json!({"user": s("v"), "id": s(A), "sandbox_id": s("x")})));
        let deleted = json!({"user": s("v"), "id": s(B), "sandbox_id": s("x"), "deleting_since": s("2026-11-20T10:00:00.000000Z")});
        step.gather("conversations", &item(deleted));
        let counters = json!({"user": s("u"), "kind": s("counters"), "conversations": {"N": "7"}});
        assert!(step.convert("users", item(counters)).is_empty());
        let settings = item(json!({"user": s("u"), "kind": s("settings"), "sealed": s("x")}));
        assert_eq!(step.convert("users", settings.clone()), [("users", settings)]);
        let counted = step.finish();
        assert_eq!(counted.len(), 9, "eight items of u, one of v");
        let sum = |user: &str, name: &str| -> u64 {
            let of_user = counted.iter().filter(|(_, item)| text(item, "user").as_deref() == Some(user));
            of_user
                .map(|(_, item)| match &item[name] {
                    AttributeValue::N(number) => number.parse::<u64>().expect("a number"),
                    other => panic!("{other:?}"),
                })
                .sum()
        };
        let names = ["conversations", "top_level_conversations", "start_tasks", "unfinished_starts"];
        assert_eq!(names.map(|name| sum("u", name)), [100, 70, 100, 20]);
        assert_eq!(names.map(|name| sum("v", name)), [1, 1, 0, 0]);
    }
}
