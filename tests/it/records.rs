//! Lists of records, against what a list in memory says: filters, orders, pages, counts, whatever happens meanwhile.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::future::join_all;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};
use shared::Time;
use shared::config::SandboxConfig;
use shared::conversation::ConversationRecord;
use shared::conversation::store::ConversationChange;
use shared::user::UserId;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use uuid::Uuid;

use crate::support::api::Api;
use crate::support::seed;

/// Engines that all cases of a property share; each case is a tenant of its own.
struct World {
    runtime: Runtime,
    api: Api,
    tenants: AtomicUsize,
    _folder: TempDir,
}

impl World {
    fn new() -> Self {
        let folder = TempDir::new().expect("a folder");
        let runtime = Runtime::new().expect("a runtime");
        let api = runtime.block_on(Api::at(folder.path(), SandboxConfig::None));
        Self { runtime, api, tenants: AtomicUsize::new(0), _folder: folder }
    }

    /// Checks the property for random cases, and finds a small one that breaks it.
    fn check<S: Strategy>(&self, cases: u32, strategy: S, property: impl AsyncFn(&Api, &UserId, &S::Value))
    where
        S::Value: std::fmt::Debug,
    {
        let config = Config { cases, max_shrink_iters: 200, failure_persistence: None, ..Config::default() };
        TestRunner::new(config)
            .run(&strategy, |case| {
                let tenant = self.tenants.fetch_add(1, Ordering::Relaxed);
                self.runtime.block_on(property(&self.api, &UserId::new(format!("tenant {tenant}")), &case));
                Ok(())
            })
            .unwrap_or_else(|error| panic!("{error}"));
        // Engines end with their runtime.
    }
}

/// An instant: microseconds since the beginning of 2025.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct At(i64);

impl At {
    fn time(self) -> Time {
        const BEGIN: i64 = 1_735_689_600_000_000;
        jiff::Timestamp::from_microsecond(BEGIN + self.0).expect("an instant").into()
    }

    /// In one of the ways in which clients write it.
    fn written(self, way: usize) -> String {
        match way % 3 {
            0 => self.time().to_string(),
            1 => self.time().naive(),
            _ => {
                let zone = jiff::tz::Offset::from_seconds(19_800).expect("an offset");
                jiff::Timestamp::from(self.time()).display_with_offset(zone).to_string()
            }
        }
    }
}

#[derive(Clone, Debug)]
struct Row {
    id: u64,
    title: Option<String>,
    sandbox: &'static str,
    parent: Option<u64>,
    created: At,
    updated: At,
}

impl Row {
    fn uuid(&self) -> Uuid {
        uuid_of(self.id)
    }

    fn record(&self, user: &UserId) -> ConversationRecord {
        seed::conversation(
            user,
            json!({
                "id": self.uuid().simple().to_string(),
                "sandbox_id": self.sandbox,
                "title": self.title,
                "parent_conversation_id": self.parent.map(|parent| uuid_of(parent).simple().to_string()),
                "created_at": self.created.time(),
                "updated_at": self.updated.time(),
            }),
        )
    }
}

/// Neighbours in number are far apart as ids.
fn uuid_of(id: u64) -> Uuid {
    Uuid::from_u64_pair(id.wrapping_mul(0x9E37_79B9_7F4A_7C15), id)
}

const SANDBOXES: [&str; 5] = ["", "s", "S", "s#1", "sandbox-with-a-longer-name"];
const TITLE: &str = "[abAB%_'\"\\\\ äÄß😀#:]{0,6}";

/// Few instants, so that many rows share one, and bounds fall on and beside them.
fn at() -> impl Strategy<Value = At> {
    const DAY: i64 = 86_400_000_000;
    (select(vec![0, 1_000_000, 1_500_000, DAY, 40 * DAY]), -1..=1_i64).prop_map(|(at, off)| At(at + off))
}

fn rows(most: usize) -> impl Strategy<Value = Vec<Row>> {
    let row = (option::weighted(0.8, TITLE), select(&SANDBOXES[..]), option::weighted(0.25, 0..40_u64), at(), at());
    vec(row, 0..most).prop_map(|rows| {
        let row =
            |(id, (title, sandbox, parent, created, updated))| Row { id, title, sandbox, parent, created, updated };
        (0..).zip(rows).map(row).collect()
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Unsaid,
    Unknown,
    Created,
    CreatedDesc,
    Updated,
    UpdatedDesc,
}

impl Order {
    fn name(self) -> Option<&'static str> {
        match self {
            Self::Unsaid => None,
            Self::Unknown => Some("BY_NAME"),
            Self::Created => Some("CREATED_AT"),
            Self::CreatedDesc => Some("CREATED_AT_DESC"),
            Self::Updated => Some("UPDATED_AT"),
            Self::UpdatedDesc => Some("UPDATED_AT_DESC"),
        }
    }

    fn sort(self, rows: &mut [&Row]) {
        match self {
            Self::Updated | Self::UpdatedDesc => rows.sort_by_key(|row| (row.updated, row.uuid())),
            _ => rows.sort_by_key(|row| (row.created, row.uuid())),
        }
        if !matches!(self, Self::Created | Self::Updated) {
            rows.reverse();
        }
    }
}

/// A search.
#[derive(Clone, Debug)]
struct Question {
    title: Option<String>,
    created: [Option<At>; 2],
    updated: [Option<At>; 2],
    sandbox: Option<&'static str>,
    include_sub_conversations: Option<bool>,
    order: Order,
    limit: usize,
    /// In which way times are written.
    way: usize,
}

fn question() -> impl Strategy<Value = Question> {
    let bounds = || [option::weighted(0.3, at()), option::weighted(0.3, at())];
    let orders =
        vec![Order::Unsaid, Order::Unknown, Order::Created, Order::CreatedDesc, Order::Updated, Order::UpdatedDesc];
    (
        option::weighted(0.3, "[abAB%_'\"\\\\ äÄß😀#:]{0,2}"),
        bounds(),
        bounds(),
        option::weighted(0.3, select(&SANDBOXES[..])),
        option::of(any::<bool>()),
        select(orders),
        1..=8_usize,
        0..3_usize,
    )
        .prop_map(|(title, created, updated, sandbox, include_sub_conversations, order, limit, way)| Question {
            title,
            created,
            updated,
            sandbox,
            include_sub_conversations,
            order,
            limit,
            way,
        })
}

impl Question {
    fn filters(&self) -> Vec<(&'static str, String)> {
        let time = |name, at: Option<At>| at.map(|at| (name, at.written(self.way)));
        [
            self.title.clone().map(|title| ("title__contains", title)),
            time("created_at__gte", self.created[0]),
            time("created_at__lt", self.created[1]),
            time("updated_at__gte", self.updated[0]),
            time("updated_at__lt", self.updated[1]),
            self.sandbox.map(|sandbox| ("sandbox_id__eq", sandbox.to_owned())),
            self.include_sub_conversations.map(|include| ("include_sub_conversations", include.to_string())),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    fn query(&self) -> Vec<(&'static str, String)> {
        let mut query = self.filters();
        query.extend(self.order.name().map(|name| ("sort_order", name.to_owned())));
        query.push(("limit", self.limit.to_string()));
        query
    }

    fn lets_through(&self, row: &Row, sub_conversations: bool) -> bool {
        let within = |at: At, [from, before]: [Option<At>; 2]| {
            from.is_none_or(|from| at >= from) && before.is_none_or(|before| at < before)
        };
        let lower = |text: &str| text.to_ascii_lowercase();
        let titled = self
            .title
            .as_deref()
            .is_none_or(|part| row.title.as_deref().is_some_and(|title| lower(title).contains(&lower(part))));
        titled
            && within(row.created, self.created)
            && within(row.updated, self.updated)
            && self.sandbox.is_none_or(|sandbox| row.sandbox == sandbox)
            && (sub_conversations || row.parent.is_none())
    }
}

async fn store(api: &Api, user: &UserId, rows: &[Row]) {
    let records: Vec<ConversationRecord> = rows.iter().map(|row| row.record(user)).collect();
    let added = api.stores.conversations.import(user, &records).await.expect("stored");
    assert_eq!(added, vec![true; rows.len()]);
}

/// The next page of a walk: its ids, and where to go on.
async fn page(
    api: &Api,
    user: &UserId,
    path: &str,
    query: &[(&'static str, String)],
    page_id: Option<String>,
) -> (Vec<Value>, Option<String>) {
    let mut query = query.to_vec();
    query.extend(page_id.map(|page_id| ("page_id", page_id)));
    let (status, mut answer) = api.get(user, path, &query).await;
    assert_eq!(status, 200, "{query:?}: {answer}");
    let Value::Array(items) = answer["items"].take() else { panic!("no items: {answer}") };
    (items, answer["next_page_id"].as_str().map(str::to_owned))
}

fn id_of(item: &Value) -> Uuid {
    item["id"].as_str().and_then(|id| id.parse().ok()).expect("an id")
}

/// All items, page by page. No page but the last is short: there are fewer rows than one request looks at.
async fn walk(api: &Api, user: &UserId, path: &str, query: &[(&'static str, String)], limit: usize) -> Vec<Value> {
    let (mut all, mut next) = (Vec::new(), None);
    loop {
        let (items, following) = page(api, user, path, query, next).await;
        assert!(if following.is_some() { items.len() == limit } else { items.len() <= limit }, "{query:?}");
        assert!(!items.is_empty() || all.is_empty(), "a page id led to nothing: {query:?}");
        all.extend(items);
        next = following;
        if next.is_none() {
            return all;
        }
    }
}

#[test]
fn a_walk_over_pages_is_the_filtered_and_sorted_list_and_counts_are_its_length() {
    let world = World::new();
    world.check(40, (rows(40), vec(question(), 6)), async |api, user, (rows, questions)| {
        store(api, user, rows).await;
        for question in questions {
            let mut expected: Vec<&Row> = rows
                .iter()
                .filter(|row| question.lets_through(row, question.include_sub_conversations == Some(true)))
                .collect();
            question.order.sort(&mut expected);
            let expected: Vec<Value> = expected.into_iter().map(shown).collect();
            let found = walk(api, user, "/search", &question.query(), question.limit).await;
            let found: Vec<Value> = found.iter().map(parts).collect();
            assert_eq!(found, expected, "{question:?}");
            // Unlike search, count has sub-conversations in it unless it is told not to.
            let subs = question.include_sub_conversations != Some(false);
            let expected = rows.iter().filter(|row| question.lets_through(row, subs)).count();
            assert_eq!(api.get(user, "/count", &question.filters()).await, (200, expected.into()), "{question:?}");
        }
    });
}

/// What the API must show of a row, as far as the rows differ.
fn shown(row: &Row) -> Value {
    json!([
        row.uuid().simple().to_string(),
        row.title,
        row.sandbox,
        row.parent.map(|parent| uuid_of(parent).simple().to_string()),
        row.created.time(),
        row.updated.time()
    ])
}

fn parts(item: &Value) -> Value {
    ["id", "title", "sandbox_id", "parent_conversation_id", "created_at", "updated_at"]
        .into_iter()
        .map(|name| item[name].clone())
        .collect()
}

/// What happens between two pages.
#[derive(Clone, Debug)]
enum Event {
    Insert(Row),
    Rename(Index),
    Delete(Index),
}

fn event() -> impl Strategy<Value = Event> {
    // Ids that no row of the account has.
    let inserted = (rows(2), 1_000..2_000_u64)
        .prop_filter_map("no row", |(rows, id)| rows.into_iter().next().map(|row| Event::Insert(Row { id, ..row })));
    prop_oneof![inserted, any::<Index>().prop_map(Event::Rename), any::<Index>().prop_map(Event::Delete)]
}

/// Rows by the number of times that they were in a walk.
type Seen = BTreeMap<Uuid, usize>;

#[test]
fn rows_that_come_go_and_change_during_a_walk_lose_and_repeat_no_other_row() {
    let world = World::new();
    let orders = select(vec![Order::Created, Order::CreatedDesc, Order::Updated, Order::UpdatedDesc]);
    let cases = (rows(30), orders, 1..=5_usize, any::<bool>(), vec(event(), 0..20));
    world.check(60, cases, async |api, user, (rows, order, limit, subs, events)| {
        store(api, user, rows).await;
        let query = [
            ("sort_order", order.name().expect("an order").to_owned()),
            ("limit", limit.to_string()),
            ("include_sub_conversations", subs.to_string()),
        ];
        let mut alive: BTreeMap<Uuid, Row> = rows.iter().map(|row| (row.uuid(), row.clone())).collect();
        let (mut renamed, mut seen, mut next) = (BTreeSet::new(), Seen::new(), None);
        let mut events = events.iter();
        loop {
            let (items, following) = page(api, user, "/search", &query, next).await;
            for item in &items {
                assert!(alive.contains_key(&id_of(item)), "a deleted row is shown");
                *seen.entry(id_of(item)).or_default() += 1;
            }
            next = following;
            if next.is_none() {
                break;
            }
            for event in events.by_ref().take(2) {
                happen(api, user, event, &mut alive, &mut renamed).await;
            }
        }
        for row in rows.iter().filter(|row| alive.contains_key(&row.uuid()) && (*subs || row.parent.is_none())) {
            let times = seen.get(&row.uuid()).copied().unwrap_or_default();
            match (order, renamed.contains(&row.uuid())) {
                // It moved behind everything: it comes again if it has been there.
                (Order::Updated, true) => assert!(times >= 1, "{row:?} is missing"),
                // It moved before everything: it does not come any more if it has not been there.
                (Order::UpdatedDesc, true) => assert!(times <= 1, "{row:?} came {times} times"),
                _ => assert_eq!(times, 1, "{row:?} {seen:?}"),
            }
        }
        let count = alive.values().filter(|row| *subs || row.parent.is_none()).count();
        let asked = [("include_sub_conversations", subs.to_string())];
        assert_eq!(api.get(user, "/count", &asked).await, (200, count.into()));
    });
}

async fn happen(
    api: &Api,
    user: &UserId,
    event: &Event,
    alive: &mut BTreeMap<Uuid, Row>,
    renamed: &mut BTreeSet<Uuid>,
) {
    let chosen = |index: &Index| (!alive.is_empty()).then(|| *index.get(&alive.keys().copied().collect::<Vec<_>>()));
    match event {
        Event::Insert(row) => {
            let added = api.stores.conversations.import(user, &[row.record(user)]).await.expect("stored");
            assert_eq!(added, [!alive.contains_key(&row.uuid())]);
            alive.entry(row.uuid()).or_insert_with(|| row.clone());
        }
        Event::Rename(index) => {
            let Some(id) = chosen(index) else { return };
            let (status, _) = change(api, user, id, &json!({"title": "renamed"})).await;
            assert_eq!(status, 200);
            renamed.insert(id);
        }
        Event::Delete(index) => {
            let Some(id) = chosen(index) else { return };
            let record = api.stores.conversations.get(user, id).await.expect("the store").expect("a row");
            assert!(api.stores.conversations.begin_deletion(user, &[record], Time::now()).await.expect("the store"));
            if index.index(2) == 0 {
                api.stores.conversations.end_deletion(user, id).await.expect("the store");
            }
            alive.remove(&id);
        }
    }
}

async fn change(api: &Api, user: &UserId, id: Uuid, body: &Value) -> (u16, Value) {
    api.call(user, "PATCH", &format!("/api/v1/app-conversations/{id}"), Some(body)).await
}
