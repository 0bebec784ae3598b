//! Lists of records, compared with a model in memory: filters, orders, pagination and counts, with concurrent changes.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;
use http::StatusCode;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::strategy::ValueTree as _;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};
use shared::Time;
use shared::config::SandboxConfig;
use shared::conversation::ConversationRecord;
use shared::conversation::store::ConversationChange;
use shared::dynamo::{Item, text};
use shared::objects;
use shared::paging::{self, Bounds, MAX_EVALUATED, Source};
use shared::user::UserId;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use uuid::Uuid;

use crate::support::account;
use crate::support::api::Api;
use crate::support::engines::is_ministack;
use crate::support::meter::Meter;
use crate::support::seed;
use crate::support::server;

/// The engines that all cases of a property share; each case is a tenant of its own.
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

    /// Checks the property for random cases, and shrinks a failing case.
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

/// An instant in microseconds since the beginning of 2025.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct At(i64);

impl At {
    fn time(self) -> Time {
        const BEGIN: i64 = 1_735_689_600_000_000;
        jiff::Timestamp::from_microsecond(BEGIN + self.0).expect("an instant").into()
    }

    fn of(time: Time) -> Self {
        let [at, begin] = [time, At(0).time()].map(|time| jiff::Timestamp::from(time).as_microsecond());
        Self(at - begin)
    }

    /// The instant in one of the formats that clients send.
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
    /// The value of its tag `team`.
    team: Option<&'static str>,
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
                "tags": self.team.map_or_else(|| json!({}), |team| json!({"team": team, "also": ""})),
                "created_at": self.created.time(),
                "updated_at": self.updated.time(),
            }),
        )
    }
}

/// Spreads ids, so that neighbouring numbers are far apart.
fn uuid_of(id: u64) -> Uuid {
    Uuid::from_u64_pair(id.wrapping_mul(0x9E37_79B9_7F4A_7C15), id)
}

const SANDBOXES: [&str; 5] = ["", "s", "S", "s#1", "sandbox-with-a-longer-name"];
const TEAMS: [&str; 3] = ["", "a", "a:b"];
const TITLE: &str = "[abAB%_'\"\\\\ äÄß😀#:]{0,6}";

/// Few instants, so that many rows share one, and bounds fall on and next to them.
fn at() -> impl Strategy<Value = At> {
    const DAY: i64 = 86_400_000_000;
    (select(vec![0, 1_000_000, 1_500_000, DAY, 40 * DAY]), -1..=1_i64).prop_map(|(at, off)| At(at + off))
}

fn rows(most: usize) -> impl Strategy<Value = Vec<Row>> {
    let row = (
        option::weighted(0.8, TITLE),
        select(&SANDBOXES[..]),
        option::weighted(0.25, 0..40_u64),
        option::of(select(&TEAMS[..])),
        at(),
        at(),
    );
    vec(row, 0..most).prop_map(|rows| {
        let row = |(id, (title, sandbox, parent, team, created, updated)): (u64, (_, _, _, _, At, At))| {
            // No row is updated before it is created.
            Row { id, title, sandbox, parent, team, created, updated: updated.max(created) }
        };
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
            Self::Updated | Self::UpdatedDesc => rows.sort_by_key(|row| (row.updated, Reverse(row.uuid()))),
            _ => rows.sort_by_key(|row| (row.created, Reverse(row.uuid()))),
        }
        if !matches!(self, Self::Created | Self::Updated) {
            rows.reverse();
        }
    }
}

#[derive(Clone, Debug)]
struct Question {
    title: Option<String>,
    created: [Option<At>; 2],
    updated: [Option<At>; 2],
    sandbox: Option<&'static str>,
    /// A filter by tag.
    tag: Option<&'static str>,
    include_sub_conversations: Option<bool>,
    order: Order,
    limit: usize,
    /// Which of the formats of times to use.
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
        option::weighted(0.4, select(vec!["team", "team:a", "team:", "team:a:b", "other", "team:b"])),
        option::of(any::<bool>()),
        select(orders),
        1..=8_usize,
        0..3_usize,
    )
        .prop_map(|(title, created, updated, sandbox, tag, include_sub_conversations, order, limit, way)| {
            Question { title, created, updated, sandbox, tag, include_sub_conversations, order, limit, way }
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
            // All filters have to match.
            self.tag.map(|tag| ("tag", tag.to_owned())),
            self.tag.map(|_| ("tag", "also:".to_owned())),
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

    fn is_match(&self, row: &Row, sub_conversations: bool) -> bool {
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
            && self
                .tag
                .is_none_or(|tag| row.team.is_some_and(|team| tag == "team" || tag.strip_prefix("team:") == Some(team)))
            && (sub_conversations || row.parent.is_none())
    }
}

async fn store(api: &Api, user: &UserId, rows: &[Row]) {
    let records: Vec<ConversationRecord> = rows.iter().map(|row| row.record(user)).collect();
    let added = api.stores.conversations().import(user, &records).await.expect("stored");
    assert_eq!(added, vec![true; rows.len()]);
}

/// The next page of a list: its items, and the next page id.
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

/// All items, page by page. Only the last page may be short: there are fewer rows than one request evaluates.
async fn walk(api: &Api, user: &UserId, path: &str, query: &[(&'static str, String)], limit: usize) -> Vec<Value> {
    let (mut all, mut next) = (Vec::new(), None);
    loop {
        let (items, following) = page(api, user, path, query, next).await;
        assert!(if following.is_some() { items.len() == limit } else { items.len() <= limit }, "{query:?}");
        assert!(!items.is_empty() || all.is_empty(), "the page of a page id is empty: {query:?}");
        all.extend(items);
        next = following;
        if next.is_none() {
            return all;
        }
    }
}

#[test]
fn pagination_returns_the_filtered_and_sorted_list_and_count_its_length() {
    let world = World::new();
    world.check(40, (rows(40), vec(question(), 6)), async |api, user, (rows, questions)| {
        store(api, user, rows).await;
        for question in questions {
            let mut expected: Vec<&Row> = rows
                .iter()
                .filter(|row| question.is_match(row, question.include_sub_conversations == Some(true)))
                .collect();
            question.order.sort(&mut expected);
            let expected: Vec<Value> = expected.into_iter().map(shown).collect();
            let found = walk(api, user, "/search", &question.query(), question.limit).await;
            let found: Vec<Value> = found.iter().map(parts).collect();
            assert_eq!(found, expected, "{question:?}");
            // Unlike search, count includes sub-conversations unless the query excludes them.
            let subs = question.include_sub_conversations != Some(false);
            let expected = rows.iter().filter(|row| question.is_match(row, subs)).count();
            assert_eq!(api.get(user, "/count", &question.filters()).await, (200, expected.into()), "{question:?}");
        }
    });
}

/// Imports any number of rows.
async fn store_all(api: &Api, user: &UserId, rows: &[Row]) {
    for rows in rows.chunks(90) {
        store(api, user, rows).await;
    }
}

/// Rows of which one in fifty was changed late, the others soon after their creation.
fn sparse_changes() -> Vec<Row> {
    const DAY: i64 = 86_400_000_000;
    let row = |id: u64| {
        let created = At(i64::try_from(id).expect("few") * 1_000_000);
        let updated = if id % 50 == 7 { At(40 * DAY - created.0) } else { created };
        let sandbox = if id % 50 == 7 { "s" } else { "" };
        Row {
            id,
            title: Some(format!("title {id}")),
            sandbox,
            parent: (id % 50 == 8).then(|| id - 1),
            team: (id % 50 == 7).then_some("a"),
            created,
            updated,
        }
    };
    (0..300).map(row).collect()
}

/// Filters that the index of the list does not have: the index of the filter serves them where it has few entries.
#[tokio::test]
async fn filter_of_another_index_reads_few_rows() {
    const DAY: i64 = 86_400_000_000;
    let folder = TempDir::new().expect("a folder");
    let mut api = Api::at(folder.path(), SandboxConfig::None).await;
    let user = UserId::new("user-one");
    let rows = sparse_changes();
    store_all(&api, &user, &rows).await;
    let any = Question {
        title: None,
        created: [None; 2],
        updated: [None; 2],
        sandbox: None,
        tag: None,
        include_sub_conversations: Some(true),
        order: Order::Created,
        limit: 4,
        way: 0,
    };
    let late = [Some(At(39 * DAY)), None];
    let questions = [
        Question { updated: late, ..any.clone() },
        Question { updated: late, order: Order::CreatedDesc, include_sub_conversations: None, ..any.clone() },
        Question { updated: late, title: Some("TITLE 1".to_owned()), ..any.clone() },
        Question { updated: [Some(At(50 * DAY)), None], ..any.clone() },
        Question { sandbox: Some("s"), order: Order::Updated, ..any.clone() },
        Question { sandbox: Some("s"), order: Order::UpdatedDesc, updated: late, ..any.clone() },
        Question { sandbox: Some("S"), order: Order::Updated, ..any.clone() },
        Question { sandbox: Some("s"), tag: Some("team:a"), ..any.clone() },
        Question { updated: late, tag: Some("team:a"), ..any.clone() },
        Question { updated: late, tag: Some("team"), order: Order::UpdatedDesc, ..any.clone() },
    ];
    let meter = Meter::new();
    let way = api.measure(&meter).await;
    for question in questions {
        let subs = question.include_sub_conversations == Some(true);
        let mut expected: Vec<&Row> = rows.iter().filter(|row| question.is_match(row, subs)).collect();
        question.order.sort(&mut expected);
        let expected: Vec<Value> = expected.into_iter().map(shown).collect();
        meter.take();
        let found = walk(&api, &user, "/search", &question.query(), question.limit).await;
        assert_eq!(found.iter().map(parts).collect::<Vec<_>>(), expected, "{question:?}");
        let units: f64 = meter.take().values().map(|cost| cost.units).sum();
        // Reading all rows would cost 150 units for each page.
        let pages = f64::from(u32::try_from(expected.len() / question.limit + 1).expect("few"));
        assert!(units <= 35.0 * pages, "{units} units for {pages} pages: {question:?}");
    }
    drop(way);
    api.stop().await;
}

/// Neither the next rows of the list match, nor has the index of the filter few entries.
#[tokio::test]
async fn list_continues_in_its_order_if_the_index_of_the_filter_has_many_entries() {
    let folder = TempDir::new().expect("a folder");
    let api = Api::at(folder.path(), SandboxConfig::None).await;
    let user = UserId::new("user-one");
    let row = |id: u64| {
        let created = At(i64::try_from(id).expect("few") * 1_000_000);
        let (sandbox, later) = if id < 100 { ("", 1_000_000_000) } else { ("s", 0) };
        Row { id, title: None, sandbox, parent: None, team: None, created, updated: At(created.0 + later) }
    };
    let rows: Vec<Row> = (0..320).map(row).collect();
    store_all(&api, &user, &rows).await;
    let query = |order: &str| {
        let query = [("sandbox_id__eq", "s"), ("sort_order", order), ("limit", "50")];
        query.map(|(name, value)| (name, value.to_owned()))
    };
    let mut expected: Vec<String> = rows[100..].iter().map(|row| row.uuid().simple().to_string()).collect();
    for order in ["UPDATED_AT", "UPDATED_AT_DESC"] {
        let found = walk(&api, &user, "/search", &query(order), 50).await;
        let found: Vec<&str> = found.iter().filter_map(|item| item["id"].as_str()).collect();
        assert_eq!(found, expected, "{order}");
        expected.reverse();
    }
    let (status, count) = api
        .get(&user, "/count", &[("sandbox_id__eq", "s".to_owned()), ("updated_at__gte", rows[110].updated.written(0))])
        .await;
    assert_eq!((status, count), (200, json!(210)));
    api.stop().await;
}

/// An index lags: it still has the entry of a row that is being deleted, or that no longer exists.
#[tokio::test]
async fn entry_of_a_deleted_row_is_not_listed() {
    let folder = TempDir::new().expect("a folder");
    let api = Api::at(folder.path(), SandboxConfig::None).await;
    let user = UserId::new("user-one");
    let rows: Vec<Row> = sparse_changes().into_iter().take(5).collect();
    store(&api, &user, &rows).await;
    let key = |row: &Row| [("user", "user-one".to_owned()), ("id", row.uuid().simple().to_string())];
    let mut mark = api.aws.dynamodb.update_item().table_name(&api.names.conversations);
    for (name, value) in key(&rows[2]) {
        mark = mark.key(name, text(value));
    }
    mark.update_expression("SET deleting_since = :now")
        .expression_attribute_values(":now", text("2026-01-01T00:00:00.000000Z"))
        .send()
        .await
        .expect("marked");
    let expected: Vec<Value> = [0, 1, 3, 4].map(|row: usize| shown(&rows[row])).to_vec();
    for (order, sandbox) in [("CREATED_AT", None), ("UPDATED_AT", None), ("CREATED_AT", Some(""))] {
        let mut query = vec![("sort_order", order.to_owned()), ("limit", "2".to_owned())];
        query.extend(sandbox.map(|sandbox: &str| ("sandbox_id__eq", sandbox.to_owned())));
        let found = walk(&api, &user, "/search", &query, 2).await;
        assert_eq!(found.iter().map(parts).collect::<Vec<_>>(), expected, "{query:?}");
    }
    api.stop().await;
}

/// After an expensive search of an account its titles are kept in memory. Later searches find the same as without them, also what has changed
/// since, and read little.
#[tokio::test]
async fn titles_in_memory_are_searched_as_the_index_is() {
    let folder = TempDir::new().expect("a folder");
    let mut api = Api::at(folder.path(), SandboxConfig::None).await;
    let user = UserId::new("user-one");
    let mut runner = TestRunner::deterministic();
    let mut rows = vec(rows(2), 120).new_tree(&mut runner).expect("rows").current().concat();
    // Rows without a title match no search, and make it expensive.
    let untitled =
        |_| Row { id: 0, title: None, sandbox: "", parent: None, team: None, created: At(0), updated: At(0) };
    rows.extend((0..1_000).map(untitled));
    for (id, row) in (1_000..).zip(&mut rows) {
        row.id = id;
    }
    store_all(&api, &user, &rows).await;
    let meter = Meter::new();
    let way = api.measure(&meter).await;
    let nothing = [("title__contains", "nothing".to_owned()), ("include_sub_conversations", "true".to_owned())];
    let mut units = Vec::new();
    // The first search is expensive; the second one reads all titles; the third one reads changes.
    for _ in 0..3 {
        meter.take();
        assert_eq!(api.get(&user, "/search", &nothing).await, (200, json!({"items": [], "next_page_id": null})));
        units.push(meter.take().values().map(|cost| cost.units).sum::<f64>());
    }
    // The other engine does not count the units of a filtered query as DynamoDB does.
    let are_expensive = is_ministack() || units[..2].iter().all(|units| *units > 10.0);
    assert!(are_expensive && units[2] < 2.0, "{units:?}");

    let question = (question(), "[abAB%_'\"\\\\ äÄß😀#:]{0,1}").prop_map(|(question, title)| Question {
        title: Some(title),
        sandbox: None,
        ..question
    });
    for round in 0..12 {
        for _ in 0..6 {
            let question = question.new_tree(&mut runner).expect("a question").current();
            let subs = question.include_sub_conversations == Some(true);
            let mut expected: Vec<&Row> = rows.iter().filter(|row| question.is_match(row, subs)).collect();
            question.order.sort(&mut expected);
            let expected: Vec<Value> = expected.into_iter().map(shown).collect();
            let found = walk(&api, &user, "/search", &question.query(), question.limit).await;
            let found: Vec<Value> = found.iter().map(parts).collect();
            assert_eq!(found, expected, "round {round}: {question:?}");
        }
        // A page id of another list is refused, as without titles in memory.
        let foreign = [("title__contains", "a".to_owned()), ("page_id", "AAAA".to_owned())];
        assert_eq!(api.get(&user, "/search", &foreign).await.0, 400);
        let id = rows[round * 3].uuid();
        let (status, _) = change(&api, &user, id, &json!({"title": "aB%"})).await;
        assert_eq!(status, 200);
        rows[round * 3].title = Some("aB%".to_owned());
        let (_, shown) = api.get(&user, "", &[("ids", id.simple().to_string())]).await;
        let updated: Time = serde_json::from_value(shown[0]["updated_at"].clone()).expect("a time");
        rows[round * 3].updated = At::of(updated);
        let path = format!("/api/v1/app-conversations/{}", rows[round * 3 + 1].uuid());
        assert_eq!(api.call(&user, "DELETE", &path, None).await, (200, json!({"success": true})));
        rows.remove(round * 3 + 1);
        let now = At::of(Time::now());
        let new = Row {
            id: 10_000 + u64::try_from(round).expect("few"),
            title: Some("Ab".to_owned()),
            created: now,
            updated: now,
            ..untitled(0)
        };
        store(&api, &user, std::slice::from_ref(&new)).await;
        rows.push(new);
    }
    drop(way);
    api.stop().await;
}

/// The fields in which rows differ, as the API must return them.
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

/// A change between two pages.
#[derive(Clone, Debug)]
enum Event {
    Insert(Row),
    Rename(Index),
    Delete(Index),
}

fn event() -> impl Strategy<Value = Event> {
    // Ids that no row of the account has or had. A deleted row keeps its id until a worker has removed it.
    let inserted = (rows(2), (1_000..u64::MAX).no_shrink())
        .prop_filter_map("no row", |(rows, id)| rows.into_iter().next().map(|row| Event::Insert(Row { id, ..row })));
    prop_oneof![inserted, any::<Index>().prop_map(Event::Rename), any::<Index>().prop_map(Event::Delete)]
}

/// How often each row appeared during the pagination.
type Seen = BTreeMap<Uuid, usize>;

#[test]
fn changes_during_pagination_neither_skip_nor_repeat_other_rows() {
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
                apply_change(api, user, event, &mut alive, &mut renamed).await;
            }
        }
        for row in rows.iter().filter(|row| alive.contains_key(&row.uuid()) && (*subs || row.parent.is_none())) {
            let times = seen.get(&row.uuid()).copied().unwrap_or_default();
            match (order, renamed.contains(&row.uuid())) {
                // The row moved to the end: it appears again if it has appeared already.
                (Order::Updated, true) => assert!(times >= 1, "{row:?} is missing"),
                // The row moved to the front: it does not appear any more if it has not appeared yet.
                (Order::UpdatedDesc, true) => assert!(times <= 1, "{row:?} came {times} times"),
                _ => assert_eq!(times, 1, "{row:?} {seen:?}"),
            }
        }
        let count = alive.values().filter(|row| *subs || row.parent.is_none()).count();
        let asked = [("include_sub_conversations", subs.to_string())];
        assert_eq!(api.get(user, "/count", &asked).await, (200, count.into()));
    });
}

async fn apply_change(
    api: &Api,
    user: &UserId,
    event: &Event,
    alive: &mut BTreeMap<Uuid, Row>,
    renamed: &mut BTreeSet<Uuid>,
) {
    let chosen = |index: &Index| (!alive.is_empty()).then(|| *index.get(&alive.keys().copied().collect::<Vec<_>>()));
    match event {
        Event::Insert(row) => {
            let added = api.stores.conversations().import(user, &[row.record(user)]).await.expect("stored");
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
            let path = format!("/api/v1/app-conversations/{id}");
            assert_eq!(api.call(user, "DELETE", &path, None).await, (200, json!({"success": true})));
            // Its sub-conversations are deleted, too.
            let mut family = vec![id];
            while let Some(gone) = family.pop() {
                alive.remove(&gone);
                family.extend(alive.values().filter(|row| row.parent.map(uuid_of) == Some(gone)).map(Row::uuid));
            }
        }
    }
}

async fn change(api: &Api, user: &UserId, id: Uuid, body: &Value) -> (u16, Value) {
    api.call(user, "PATCH", &format!("/api/v1/app-conversations/{id}"), Some(body)).await
}

/// A start task of the account.
#[derive(Clone, Debug)]
struct Task {
    id: u64,
    conversation: Option<u64>,
    created: At,
    updated: At,
}

fn tasks() -> impl Strategy<Value = Vec<Task>> {
    vec((option::weighted(0.6, 0..3_u64), at(), at()), 0..30).prop_map(|tasks| {
        let task = |(id, (conversation, created, updated)): (u64, (_, At, At))| Task {
            id,
            conversation,
            created,
            updated: updated.max(created),
        };
        (0..).zip(tasks).map(task).collect()
    })
}

#[test]
fn pagination_of_start_tasks_returns_the_filtered_and_sorted_list_and_count_its_length() {
    let world = World::new();
    let orders = vec![Order::Unsaid, Order::Created, Order::CreatedDesc, Order::Updated, Order::UpdatedDesc];
    let question =
        (option::weighted(0.3, 0..4_u64), option::weighted(0.4, at()), select(orders), 1..=6_usize, 0..3_usize);
    world.check(25, (tasks(), vec(question, 5)), async |api, user, (tasks, questions)| {
        let lines = tasks.iter().map(|task| {
            let conversation = task.conversation.map(|id| uuid_of(id).simple().to_string());
            json!({"type": "start_task", "data": {
                "id": uuid_of(task.id).simple().to_string(),
                "status": if conversation.is_some() { "READY" } else { "ERROR" },
                "app_conversation_id": conversation,
                "request": {},
                "created_at": task.created.time(),
                "updated_at": task.updated.time(),
            }})
        });
        seed::load(&api.stores, user, lines).await;
        for (conversation, from, order, limit, way) in questions {
            let mut expected: Vec<&Task> = tasks
                .iter()
                .filter(|task| conversation.is_none() || task.conversation == *conversation)
                .filter(|task| from.is_none_or(|from| task.created >= from))
                .collect();
            match order {
                Order::Updated | Order::UpdatedDesc => expected.sort_by_key(|task| (task.updated, uuid_of(task.id))),
                _ => expected.sort_by_key(|task| (task.created, uuid_of(task.id))),
            }
            if !matches!(order, Order::Created | Order::Updated) {
                expected.reverse();
            }
            let filters: Vec<(&str, String)> = [
                conversation.map(|id| ("conversation_id__eq", uuid_of(id).to_string())),
                from.map(|from| ("created_at__gte", from.written(*way))),
            ]
            .into_iter()
            .flatten()
            .collect();
            let mut query = filters.clone();
            query.extend(order.name().map(|name| ("sort_order", name.to_owned())));
            query.push(("limit", limit.to_string()));
            let found = walk(api, user, "/start-tasks/search", &query, *limit).await;
            let found: Vec<Uuid> = found.iter().map(id_of).collect();
            assert_eq!(found, expected.iter().map(|task| uuid_of(task.id)).collect::<Vec<_>>(), "{query:?}");
            let count = api.get(user, "/start-tasks/count", &filters).await;
            assert_eq!(count, (200, expected.len().into()), "{query:?}");
        }
    });
}

/// Rows in the order of their numbers, one second apart.
fn plain_rows(count: u64) -> Vec<Row> {
    (0..count)
        .map(|id| Row {
            id,
            title: Some(format!("row {id}")),
            sandbox: "s",
            parent: None,
            team: None,
            created: At(i64::try_from(id).expect("few") * 1_000_000),
            updated: At(0),
        })
        .collect()
}

/// Lines of this many start tasks.
fn plain_tasks(count: u64) -> impl Iterator<Item = Value> {
    (0..count).map(|id| {
        json!({"type": "start_task", "data": {
            "id": uuid_of(id).simple().to_string(),
            "status": "ERROR",
            "request": {},
            "created_at": At(0).time(),
            "updated_at": At(0).time(),
        }})
    })
}

fn is_refused(answer: &(u16, Value)) -> bool {
    answer.0 == 400 && answer.1["detail"].is_string() && answer.1.as_object().is_some_and(|body| body.len() == 1)
}

#[tokio::test]
async fn forged_page_id_and_page_id_of_another_list_are_refused() {
    let folder = TempDir::new().expect("a folder");
    let api = Api::at(folder.path(), SandboxConfig::None).await;
    let [me, you] = ["me", "you"].map(UserId::new);
    for user in [&me, &you] {
        store(&api, user, &plain_rows(10)).await;
        seed::load(&api.stores, user, plain_tasks(10)).await;
    }
    let lists = [
        ("/search", vec![("limit", "3".to_owned())]),
        ("/search", vec![("limit", "3".to_owned()), ("title__contains", "row".to_owned())]),
        ("/search", vec![("limit", "3".to_owned()), ("sort_order", "UPDATED_AT".to_owned())]),
        ("/search", vec![("limit", "3".to_owned()), ("sandbox_id__eq", "s".to_owned())]),
        ("/search", vec![("limit", "3".to_owned()), ("include_sub_conversations", "true".to_owned())]),
        ("/search", vec![("limit", "3".to_owned()), ("created_at__gte", At(0).time().to_string())]),
        ("/start-tasks/search", vec![("limit", "3".to_owned())]),
        ("/start-tasks/search", vec![("limit", "3".to_owned()), ("sort_order", "CREATED_AT".to_owned())]),
    ];
    let ask = async |user: &UserId, list: usize, page_id: &str| {
        let (path, mut query) = lists[list].clone();
        query.push(("page_id", page_id.to_owned()));
        api.get(user, path, &query).await
    };
    let mut page_ids = Vec::new();
    for (path, query) in &lists {
        page_ids.push(page(&api, &me, path, query, None).await.1.expect("a next page"));
    }
    for (of, page_id) in page_ids.iter().enumerate() {
        for list in 0..lists.len() {
            let answer = ask(&me, list, page_id).await;
            assert!(if list == of { answer.0 == 200 } else { is_refused(&answer) }, "{of} in {list}: {answer:?}");
        }
        // A page may have another size than the previous one.
        let (path, mut query) = lists[of].clone();
        query[0].1 = "5".to_owned();
        query.push(("page_id", page_id.clone()));
        assert_eq!(api.get(&me, path, &query).await.0, 200);
        let answer = ask(&you, of, page_id).await;
        assert!(is_refused(&answer), "another user's: {answer:?}");
    }
    for of in [0, 6] {
        let page_id = &page_ids[of];
        for place in 0..page_id.len() {
            for char in ['A', 'Q', '_', '=', 'é', '\0', '0'] {
                let mut changed = page_id.clone();
                changed.replace_range(place..=place, &char.to_string());
                let answer = ask(&me, of, &changed).await;
                assert!(changed == *page_id || is_refused(&answer), "{place} {char}: {answer:?}");
            }
            let answer = ask(&me, of, &page_id[..place]).await;
            assert!(is_refused(&answer), "cut at {place}: {answer:?}");
        }
        let long = "A".repeat(60_000);
        for other in ["1", "-1", "", " ", "null", "e30", &format!("{page_id}="), &format!("{page_id}AAAA"), &long] {
            let answer = ask(&me, of, other).await;
            assert!(is_refused(&answer), "{other:.20}: {answer:?}");
        }
    }
    api.stop().await;
}

#[tokio::test]
async fn pagination_continues_after_a_restart() {
    let folder = TempDir::new().expect("a folder");
    let user = UserId::new("user-one");
    let query = [("limit", "3".to_owned())];
    let api = Api::at(folder.path(), SandboxConfig::None).await;
    store(&api, &user, &plain_rows(10)).await;
    seed::load(&api.stores, &user, plain_tasks(10)).await;
    let mut walks = Vec::new();
    for path in ["/search", "/start-tasks/search"] {
        let (items, next) = page(&api, &user, path, &query, None).await;
        walks.push((path, items, next));
    }
    api.stop().await;
    let api = Api::at(folder.path(), SandboxConfig::None).await;
    for (path, items, mut next) in walks {
        let mut seen: Vec<Uuid> = items.iter().map(id_of).collect();
        while next.is_some() {
            let (items, following) = page(&api, &user, path, &query, next).await;
            seen.extend(items.iter().map(id_of));
            next = following;
        }
        let once: BTreeSet<Uuid> = seen.iter().copied().collect();
        assert_eq!((seen.len(), once.len()), (10, 10), "{path}");
        let count = format!("{}/count", path.trim_end_matches("/search"));
        assert_eq!(api.get(&user, &count, &[]).await, (200, 10.into()));
    }
    api.stop().await;
}

#[tokio::test]
async fn unusual_filter_values_are_accepted() {
    let folder = TempDir::new().expect("a folder");
    let api = Api::at(folder.path(), SandboxConfig::None).await;
    let user = UserId::new("user-one");
    store(&api, &user, &plain_rows(3)).await;
    let long = "é".repeat(5_000);
    for (name, value) in [
        ("sandbox_id__eq", long.as_str()),
        ("sandbox_id__eq", ""),
        ("sandbox_id__eq", "\0"),
        ("title__contains", &long),
        ("title__contains", "\0"),
        ("created_at__gte", "9999-12-31T23:59:59.999999Z"),
        ("created_at__lt", "0001-01-01"),
        ("updated_at__gte", "9999-12-31T23:59:59.999999Z"),
        ("updated_at__lt", "0001-01-01T00:00:00+14:00"),
    ] {
        for order in ["CREATED_AT", "UPDATED_AT_DESC", "nonsense"] {
            let query = [(name, value.to_owned()), ("sort_order", order.to_owned())];
            let (status, answer) = api.get(&user, "/search", &query).await;
            assert_eq!((status, &answer["items"]), (200, &json!([])), "{name}={value:.30}: {answer}");
        }
        let count = api.get(&user, "/count", &[(name, value.to_owned())]).await;
        assert_eq!(count, (200, 0.into()), "{name}={value:.30}");
    }
    api.stop().await;
}

#[tokio::test]
async fn concurrent_updates_of_one_record_lose_nothing() {
    const ROUNDS: usize = 10;
    let folder = TempDir::new().expect("a folder");
    let api = Api::at(folder.path(), SandboxConfig::None).await;
    let user = UserId::new("user-one");
    let row = &plain_rows(1)[0];
    store(&api, &user, std::slice::from_ref(row)).await;
    let before = api.stores.conversations().get(&user, row.uuid()).await.expect("the store").expect("the row");
    // Each attribute has one writer per round, so the expected result is unique.
    for round in 0..ROUNDS {
        let bodies = [
            json!({"title": format!("title {round}")}),
            json!({"public": round % 2 == 0}),
            json!({"selected_repository": format!("owner/{round}")}),
            json!({"selected_branch": format!("branch-{round}")}),
        ];
        let patches = join_all(bodies.iter().map(async |body| {
            let (status, answer) = change(&api, &user, row.uuid(), body).await;
            let (name, value) = body.as_object().and_then(|body| body.iter().next()).expect("one field");
            assert_eq!((status, &answer[name]), (200, value), "its own change is in the answer");
        }));
        let sandbox = format!("sandbox {round}");
        let worker = async {
            let change = ConversationChange::default().sandbox(&user, &sandbox);
            let updated = api.stores.conversations().update(&user, row.uuid(), change).await.expect("the store");
            assert_eq!(updated.expect("the row").sandbox_id, sandbox);
        };
        tokio::join!(patches, worker);
        let now = api.stores.conversations().get(&user, row.uuid()).await.expect("the store").expect("the row");
        let wanted = ConversationRecord {
            title: Some(format!("title {round}")),
            public: Some(round % 2 == 0),
            tags: shared::conversation::tags::Tags::default(),
            agent_kind: "openhands".to_owned(),
            acp_server: None,
            launched_agent_profile: None,
            selected_repository: Some(format!("owner/{round}")),
            selected_branch: Some(format!("branch-{round}")),
            sandbox_id: sandbox,
            updated_at: now.updated_at,
            ..before.clone()
        };
        assert_eq!(now, wanted);
        assert!(now.updated_at > before.updated_at);
    }
    // All at once: in the end every attribute is one that was sent, and lists find the row by it.
    let titles: Vec<String> = (0..50).map(|number| format!("racing {number}")).collect();
    join_all(titles.iter().map(async |title| {
        let (status, answer) = change(&api, &user, row.uuid(), &json!({"title": title})).await;
        assert_eq!((status, answer["title"].as_str()), (200, Some(title.as_str())));
    }))
    .await;
    let now = api.stores.conversations().get(&user, row.uuid()).await.expect("the store").expect("the row");
    let title = now.title.clone().expect("a title");
    assert!(titles.contains(&title));
    for order in ["CREATED_AT", "UPDATED_AT"] {
        let query = [("title__contains", title.clone()), ("sort_order", order.to_owned())];
        let (items, _) = page(&api, &user, "/search", &query, None).await;
        assert_eq!(items.iter().map(|item| item["updated_at"].clone()).collect::<Vec<_>>(), [json!(now.updated_at)]);
    }
    api.stop().await;
}

#[tokio::test]
async fn cost_of_a_page_does_not_depend_on_its_depth_and_unfiltered_count_costs_one_request() {
    let folder = TempDir::new().expect("a folder");
    let mut api = Api::at(folder.path(), SandboxConfig::None).await;
    let user = UserId::new("user-one");
    let lines = || (0..240).map(account::conversation);
    seed::load(&api.stores, &user, lines()).await;
    let meter = Meter::new();
    let way = api.measure(&meter).await;
    let spent =
        || meter.take().into_values().fold((0, 0.0), |(n, units), cost| (n + cost.requests, units + cost.units));
    let walks: [&[(&str, String)]; 5] = [
        &[],
        &[("include_sub_conversations", "true".to_owned())],
        &[("sort_order", "UPDATED_AT_DESC".to_owned())],
        &[("sort_order", "UPDATED_AT".to_owned()), ("updated_at__gte", account::created_at(220))],
        &[("created_at__gte", account::created_at(230)), ("created_at__lt", account::created_at(10))],
    ];
    for filters in walks {
        let mut query = filters.to_vec();
        query.push(("limit", "20".to_owned()));
        let (mut next, mut pages) = (None, 0);
        loop {
            (_, next) = page(&api, &user, "/search", &query, next).await;
            let (requests, units) = spent();
            // The entries of each list, and twenty rows of less than 4 KiB at half a unit each.
            let lists = 1 + usize::from(query.iter().any(|(name, _)| *name == "include_sub_conversations"));
            assert!(
                requests == lists + 1 && units <= 12.0,
                "{query:?}, page {pages}: {requests} requests, {units} units"
            );
            pages += 1;
            if next.is_none() {
                break;
            }
        }
        assert!(pages > 9, "{query:?}");
    }
    let row = &account::conversation(120)["data"];
    let sandbox = row["sandbox_id"].as_str().expect("a sandbox").to_owned();
    for (path, query, most) in [
        ("/search", vec![("sandbox_id__eq", sandbox.clone())], (2, 6.0)),
        ("/count", vec![("sandbox_id__eq", sandbox)], (1, 2.0)),
        // A unit for each of the nine items that share the count.
        ("/count", vec![], (1, 9.0)),
        ("/count", vec![("include_sub_conversations", "false".to_owned())], (1, 9.0)),
        ("/start-tasks/count", vec![], (1, 9.0)),
    ] {
        assert_eq!(api.get(&user, path, &query).await.0, 200);
        let (requests, units) = spent();
        assert!(requests <= most.0 && units <= most.1, "{path} {query:?}: {requests} requests, {units} units");
    }
    drop(way);
    api.stop().await;
}

/// A filter that matches almost nothing must not make one request read the whole account.
#[tokio::test]
async fn filtered_page_ends_at_its_limits_and_the_next_page_continues() {
    let folder = TempDir::new().expect("a folder");
    let api = Api::at(folder.path(), SandboxConfig::None).await;
    let user = UserId::new("u");
    seed::load(&api.stores, &user, plain_tasks(60)).await;
    // All tasks have the same creation time, so they are in the order of their ids.
    let mut ids: Vec<String> = (0..60).map(|id| uuid_of(id).simple().to_string()).collect();
    ids.sort_unstable();
    let expected = ids.split_off(57);
    let last = expected[0].clone();
    let query = || {
        let query = api.aws.dynamodb.query().table_name(&api.names.start_tasks).index_name("by-created");
        query
            .key_condition_expression("#user = :user")
            .filter_expression("id >= :last")
            .expression_attribute_names("#user", "user")
            .expression_attribute_values(":user", text("u"))
            .expression_attribute_values(":last", text(&last))
    };
    let source = || Source {
        queries: vec![query()],
        sort_key: "created_sort",
        is_ascending: true,
        is_filtered: true,
        is_exact: true,
    };
    let usual = Bounds::of_page(2);
    let unbounded = Bounds { evaluated: usize::MAX, time: Duration::from_secs(3600), ..usual };
    let walk = async |bounds: Bounds| {
        let (mut found, mut pages, mut starts) = (Vec::new(), Vec::new(), None);
        loop {
            let fetch = |entries: Vec<Item>| async move {
                Ok(entries.into_iter().map(|entry| Some(entry["id"].as_s().expect("an id").clone())).collect())
            };
            let page = paging::page("Query", bounds, source(), starts.take(), fetch, |_| Ok(10)).await;
            let page = page.expect("the store");
            pages.push(page.rows.len());
            found.extend(page.rows);
            let Some(next) = page.next else { return (found, pages) };
            // The key attributes with which a query on the index continues.
            let id = next.rsplit('#').next().expect("an id").to_owned();
            let keys = [("user", "u".to_owned()), ("id", id), ("created_sort", next)];
            starts = Some(vec![keys.map(|(name, value)| (name.to_owned(), text(value))).into()]);
        }
    };
    assert_eq!(walk(unbounded).await, (expected.clone(), vec![2, 1]));
    let (found, pages) = walk(Bounds { evaluated: 20, ..unbounded }).await;
    assert_eq!(found, expected);
    assert!(pages.len() > 3 && pages.starts_with(&[0]), "{pages:?}");
    let (found, pages) = walk(Bounds { time: Duration::ZERO, ..unbounded }).await;
    assert_eq!(found, expected);
    assert!(pages.len() > 3 && pages.starts_with(&[0]), "{pages:?}");
    // Limit in bytes: what does not fit is on the next page, and one row always fits.
    let (found, pages) = walk(Bounds { bytes: 5, ..unbounded }).await;
    assert_eq!((found, pages), (expected, vec![1, 1, 1]));

    let too_many = paging::count_within(Duration::ZERO, "Query", query().limit(7), "too many").await;
    assert!(matches!(too_many, Err(shared::Error::Refused(text)) if text == "too many"));
    let counted = paging::count_within(Duration::from_secs(3600), "Query", query().limit(7), "too many").await;
    assert_eq!(counted.expect("a count"), 3);
    api.stop().await;
}

/// No index has the tags: a page reads at most 2,000 rows and a few more, whichever way it takes, and a count ends at its limit.
#[tokio::test]
async fn filter_by_tag_reads_a_bounded_number_of_rows() {
    let folder = TempDir::new().expect("a folder");
    let mut api = Api::at(folder.path(), SandboxConfig::None).await;
    let user = UserId::new("u");
    let mut rows = plain_rows(2_400);
    rows[0].team = Some("a");
    rows[2_399].team = Some("a");
    store_all(&api, &user, &rows).await;
    let meter = Meter::new();
    let way = api.measure(&meter).await;
    let tag = ("tag", "team:a".to_owned());
    for filters in [
        vec![tag.clone()],
        vec![tag.clone(), ("updated_at__gte", At(0).written(0))],
        vec![tag.clone(), ("title__contains", "row".to_owned())],
        // After an expensive search for titles, the next one has them in memory.
        vec![tag.clone(), ("title__contains", "ro".to_owned())],
        vec![tag.clone(), ("sandbox_id__eq", "s".to_owned()), ("sort_order", "UPDATED_AT_DESC".to_owned())],
    ] {
        let (mut found, mut pages, mut next) = (Vec::new(), 0, None);
        loop {
            meter.take();
            let (items, following) = page(&api, &user, "/search", &filters, next).await;
            let units: f64 = meter.take().values().map(|cost| cost.units).sum();
            // Half a unit for each row, and the entries of the index.
            assert!(units < 1_400.0, "{units} units: {filters:?}");
            found.extend(items.iter().map(id_of));
            pages += 1;
            next = following;
            if next.is_none() {
                break;
            }
        }
        found.sort_unstable();
        let mut expected = [0, 2_399].map(uuid_of);
        expected.sort_unstable();
        assert_eq!(found, expected, "{filters:?}");
        assert!(pages > 1, "{filters:?}");
    }
    assert_eq!(api.get(&user, "/count", &[tag]).await, (200, json!(2)));
    for (tags, kind) in [(vec![""], "value_error"), (vec![":a"], "value_error"), (vec!["a"; 11], "too_long")] {
        let query: Vec<_> = tags.into_iter().map(|tag| ("tag", tag.to_owned())).collect();
        for path in ["/search", "/count"] {
            let (status, answer) = api.get(&user, path, &query).await;
            assert_eq!((status, &answer["detail"][0]["type"]), (422, &json!(kind)), "{query:?}");
        }
    }
    drop(way);
    api.stop().await;
}

/// More tasks than one request evaluates, none of which matches.
#[tokio::test]
async fn search_for_start_tasks_reads_a_bounded_number_of_rows() {
    let folder = TempDir::new().expect("a folder");
    let api = Api::at(folder.path(), SandboxConfig::None).await;
    let user = UserId::new("u");
    let tasks = u64::try_from(MAX_EVALUATED).expect("few") + 100;
    seed::load(&api.stores, &user, plain_tasks(tasks)).await;
    let mut query = vec![("created_at__gte", At(1).time().to_string()), ("sort_order", "UPDATED_AT".to_owned())];
    let (status, page) = api.get(&user, "/start-tasks/search", &query).await;
    assert_eq!((status, &page["items"]), (200, &json!([])));
    query.push(("page_id", page["next_page_id"].as_str().expect("there is more to read").to_owned()));
    let (status, page) = api.get(&user, "/start-tasks/search", &query).await;
    assert_eq!((status, page), (200, json!({"items": [], "next_page_id": null})));
    api.stop().await;
}

/// When a conversation is deleted, objects are removed before their rows; and any object may be lost.
#[tokio::test]
async fn missing_object_does_not_fail_a_list() {
    let folder = TempDir::new().expect("a folder");
    let api = Api::at(folder.path(), SandboxConfig::None).await;
    let user = UserId::new("u");
    let long = json!({"title": "kept", "system_message_suffix": "x".repeat(20_000)});
    let mut lines: Vec<Value> = plain_tasks(3).collect();
    for (index, line) in (0..).zip(&mut lines) {
        line["data"]["created_at"] = json!(At(index).time());
        if index < 2 {
            line["data"]["request"] = long.clone();
        }
    }
    seed::load(&api.stores, &user, lines).await;
    let ids: Vec<String> = (0..3).map(|id| uuid_of(id).simple().to_string()).collect();
    // In the format of an earlier version, without the abridged request.
    let update = api.aws.dynamodb.update_item().table_name(&api.names.start_tasks);
    let update = update.key("user", text("u")).key("id", text(&ids[1])).update_expression("SET #request = :none");
    let update =
        update.expression_attribute_names("#request", "request").expression_attribute_values(":none", text(""));
    update.send().await.expect("changed");
    let batch: Vec<(&str, String)> = ids.iter().map(|id| ("ids", id.clone())).collect();
    let both = async || {
        let (status, tasks) = api.get(&user, "/start-tasks", &batch).await;
        assert_eq!(status, 200, "{tasks}");
        let (status, page) = api.get(&user, "/start-tasks/search", &[("sort_order", "CREATED_AT".to_owned())]).await;
        assert_eq!((status, &page["items"]), (200, &tasks));
        tasks
    };
    let tasks = both().await;
    let suffix = |task: &Value| task["request"]["system_message_suffix"].as_str().map(str::len);
    assert_eq!([0, 1, 2].map(|index| suffix(&tasks[index])), [Some(20_000), Some(20_000), None]);
    let objects = api.aws.s3.list_objects_v2().bucket(&api.names.bucket).prefix("start-requests/").send().await;
    for object in objects.expect("a list").contents.unwrap_or_default() {
        let delete = api.aws.s3.delete_object().bucket(&api.names.bucket).set_key(object.key);
        delete.send().await.expect("deleted");
    }
    let tasks = both().await;
    assert_eq!((&tasks[0]["request"]["title"], &tasks[1]["request"]["title"]), (&json!("kept"), &Value::Null));
    assert_eq!(tasks[1]["request"]["agent_type"], "default", "still in the contract's format");
    api.stop().await;
}

/// S3 responds with 404 for a missing key only to callers that may list the bucket, and `HEAD` has no body.
#[tokio::test]
async fn every_form_of_missing_object_is_recognised_and_bucket_failures_are_errors() {
    let error = |code: &str| format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>m</Message></Error>");
    for (status, code, is_missing) in [
        (404, "NoSuchKey", true),
        (403, "AccessDenied", true),
        (404, "NoSuchBucket", false),
        (403, "SignatureDoesNotMatch", false),
        (500, "InternalError", false),
    ] {
        let body = error(code);
        let bucket = server::Server::start(move |request| {
            let body = if request.method == "HEAD" { String::new() } else { body.clone() };
            async move { Ok(server::raw(StatusCode::from_u16(status).expect("a status"), "application/xml", body)) }
        })
        .await;
        let config = aws_sdk_s3::Config::builder()
            .behavior_version(aws_config::BehaviorVersion::latest())
            .region(aws_config::Region::new("eu-central-1"))
            .credentials_provider(aws_sdk_s3::config::Credentials::new("a", "b", None, None, "test"))
            .retry_config(aws_config::retry::RetryConfig::disabled())
            .endpoint_url(bucket.url())
            .force_path_style(true);
        let s3 = aws_sdk_s3::Client::from_conf(config.build());
        let opened = objects::open(&s3, "bucket", "key", "GetObject").await;
        assert_eq!(matches!(opened, Ok(None)), is_missing, "{status} {code}: {opened:?}");
        assert_eq!(opened.is_err(), !is_missing, "{status} {code}");
        // Without a body, only the status 403 or 404 is known.
        let head = objects::head(&s3, "bucket", "key", "HeadObject").await;
        assert_eq!(matches!(head, Ok(None)), status < 500, "{status} {code}: {head:?}");
    }
}
