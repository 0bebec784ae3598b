//! The event store and its routes: order, pagination, counts, limits, and deletion.

use std::collections::HashSet;

use serde_json::{Value, json};
use shared::Time;
use shared::aws::Aws;
use shared::config::{Names, SandboxConfig};
use shared::error::Error;
use shared::event::store::{Cursor, Event, EventFilter, EventStore, SortOrder};
use shared::http::page::PAGE_SIZE;
use shared::stores::Stores;
use shared::user::UserId;
use tempfile::TempDir;
use uuid::Uuid;

use crate::support::api::Api;
use crate::support::engines::Engines;
use crate::support::log::all_events;

/// The event store alone, on engines of its own.
struct Log {
    engines: Engines,
    aws: Aws,
    names: Names,
    store: EventStore,
    user: UserId,
    conversation: Uuid,
    _folder: TempDir,
}

impl Log {
    async fn new() -> Self {
        let folder = TempDir::new().expect("a folder");
        let engines = Engines::start(folder.path()).await;
        let aws = Aws::new(&engines.sdk_config().await);
        let names = engines.names("events-");
        schema::make_all(&aws, &names, "events-").await.expect("a schema");
        let store = Stores::without_key(&names, &aws).events();
        let (user, conversation) = (UserId::new("user-one"), Uuid::new_v4());
        Self { engines, aws, names, store, user, conversation, _folder: folder }
    }

    async fn append(&self, events: Vec<Event>) {
        self.store.append(&self.user, self.conversation, events).await.expect("stored");
    }

    async fn page(
        &self,
        filter: &EventFilter,
        order: SortOrder,
        after: Option<&Cursor>,
        limit: usize,
    ) -> (Vec<String>, Option<Cursor>) {
        let page = self.store.page(&self.user, self.conversation, filter, order, after, limit).await.expect("a page");
        (page.events.into_iter().map(|event| event.id).collect(), page.next)
    }

    /// The ids of all pages.
    async fn walk(&self, filter: &EventFilter, order: SortOrder, limit: usize) -> Vec<String> {
        let (mut ids, mut after) = (Vec::new(), None);
        loop {
            let (more, next) = self.page(filter, order, after.as_ref(), limit).await;
            assert!(more.len() <= limit);
            ids.extend(more);
            after = next;
            if after.is_none() {
                return ids;
            }
        }
    }

    async fn count(&self, filter: &EventFilter) -> u64 {
        self.store.count(&self.user, self.conversation, filter).await.expect("a count")
    }

    async fn objects(&self) -> usize {
        let list = self.aws.s3.list_objects_v2().bucket(&self.names.bucket).send().await.expect("a list");
        list.contents.unwrap_or_default().len()
    }
}

fn event(id: &str, timestamp: &str, kind: &str) -> Event {
    let json = json!({"id": id, "timestamp": timestamp, "kind": kind}).to_string();
    Event { id: id.into(), timestamp: timestamp.into(), kind: kind.into(), json }
}

fn large(id: &str, timestamp: &str, bytes: usize) -> Event {
    let json = json!({"id": id, "timestamp": timestamp, "kind": "ObservationEvent", "text": "x".repeat(bytes)});
    Event { json: json.to_string(), ..event(id, timestamp, "ObservationEvent") }
}

fn time(text: &str) -> Time {
    serde_json::from_value(json!(text)).expect("a time")
}

fn between(from: Option<&str>, to: Option<&str>) -> EventFilter {
    EventFilter { kind: None, timestamp_gte: from.map(time), timestamp_lt: to.map(time) }
}

fn of_kind(kind: &str) -> EventFilter {
    EventFilter { kind: Some(kind.into()), ..EventFilter::default() }
}

#[tokio::test]
async fn log_is_ordered_by_instant_whatever_the_timestamp_format() {
    let log = Log::new().await;
    let events = [
        ("undated", "yesterday"),
        ("a", "2026-11-22T15:31:31"),
        ("b", "2026-11-22T15:31:31.000001"),
        ("c", "2026-11-22T17:31:31.05+02:00"),
        ("d", "2026-11-22T15:31:31.1"),
        ("e", "2026-11-22T15:31:31.656900Z"),
        ("f", "2026-11-22 15:31:32"),
    ];
    let backwards = events.iter().rev().map(|(id, timestamp)| event(id, timestamp, "MessageEvent")).collect();
    log.append(backwards).await;
    let all: Vec<&str> = events.iter().map(|(id, _)| *id).collect();
    let mut newest_first = all.clone();
    newest_first.reverse();
    for filter in [EventFilter::default(), of_kind("MessageEvent")] {
        for limit in [1, 2, 3, 7, 100] {
            assert_eq!(log.walk(&filter, SortOrder::Timestamp, limit).await, all);
            assert_eq!(log.walk(&filter, SortOrder::TimestampDesc, limit).await, newest_first);
        }
    }
    // Filters compare instants; an event without a valid timestamp matches no time range.
    for (from, to, expected) in [
        (None, None, &all[..]),
        (Some("2026-11-22T15:31:31Z"), None, &all[1..]),
        (Some("2026-11-22T10:01:31.05-05:30"), None, &all[3..]),
        (None, Some("2026-11-22T15:31:31.1Z"), &all[1..4]),
        (Some("2026-11-22T15:31:31.000001Z"), Some("2026-11-22T15:31:31.6569Z"), &all[2..5]),
        (Some("2026-11-22T15:31:32Z"), Some("2026-11-22T15:31:31Z"), &[]),
        (Some("2027-01-01T00:00:00Z"), None, &[]),
    ] {
        for kind in [None, Some("MessageEvent".to_owned())] {
            let filter = EventFilter { kind, ..between(from, to) };
            assert_eq!(log.walk(&filter, SortOrder::Timestamp, 2).await, expected, "{filter:?}");
            let mut backwards = log.walk(&filter, SortOrder::TimestampDesc, 2).await;
            backwards.reverse();
            assert_eq!(backwards, expected, "{filter:?}");
            assert_eq!(log.count(&filter).await, expected.len() as u64, "{filter:?}");
        }
    }
    log.engines.shutdown().await;
}

#[tokio::test]
async fn kind_filter_matches_exactly_whatever_the_kinds_name() {
    let log = Log::new().await;
    let kinds = ["A", "AB", "A#x", "A#2026-01-01T00:00:00.000000000Z#id", "1:A", "Ä", ""];
    let events = kinds.iter().enumerate();
    log.append(events.map(|(index, kind)| event(&format!("e{index}"), "2026-01-01T00:00:00", kind)).collect()).await;
    for (index, kind) in kinds.iter().enumerate() {
        assert_eq!(log.walk(&of_kind(kind), SortOrder::Timestamp, 100).await, [format!("e{index}")], "{kind}");
        assert_eq!(log.count(&of_kind(kind)).await, 1, "{kind}");
    }
    assert_eq!(log.count(&of_kind("B")).await, 0);
    log.engines.shutdown().await;
}

#[tokio::test]
async fn appending_an_existing_id_replaces_the_event() {
    let log = Log::new().await;
    log.append(vec![event("a", "2026-01-01T00:00:00", "K"), event("b", "2026-01-01T00:00:01", "K")]).await;
    log.append(vec![event("a", "2026-01-01T00:00:00", "K")]).await;
    assert_eq!(log.walk(&EventFilter::default(), SortOrder::Timestamp, 100).await, ["a", "b"]);
    log.append(vec![event("a", "2026-01-01T00:00:02", "L")]).await;
    assert_eq!(log.walk(&EventFilter::default(), SortOrder::Timestamp, 1).await, ["b", "a"]);
    assert_eq!(log.count(&of_kind("K")).await, 1);
    assert_eq!(log.count(&EventFilter::default()).await, 2);
    let ids = ["b", "unknown", "a", "", "a", &"x".repeat(2000)].map(ToOwned::to_owned);
    let found = log.store.batch_get(&log.user, log.conversation, &ids).await.expect("events");
    let timestamps: Vec<_> = found.iter().map(|event| event.as_ref().map(|event| event.timestamp.as_str())).collect();
    let (a, b) = (Some("2026-01-01T00:00:02"), Some("2026-01-01T00:00:01"));
    assert_eq!(timestamps, [b, None, a, None, a, None]);
    log.engines.shutdown().await;
}

#[tokio::test]
async fn event_appended_during_pagination_appears_once_if_it_is_after_the_cursor() {
    let log = Log::new().await;
    let at = |number: usize| {
        event(&format!("e{number:03}"), &format!("2026-01-01T00:{:02}:{:02}", number / 60, number % 60), "K")
    };
    log.append((0..200).step_by(2).map(at).collect()).await;
    for order in [SortOrder::Timestamp, SortOrder::TimestampDesc] {
        let (mut met, mut after, mut extra) = (Vec::new(), None, 300);
        loop {
            let (ids, next) = log.page(&EventFilter::default(), order, after.as_ref(), 7).await;
            met.extend(ids);
            after = next;
            let Some(_) = after else { break };
            // One event before and one after all others; only one of them is after the cursor.
            extra += 1;
            let early = format!("2025-01-01T00:00:{:02}", 359 - extra);
            log.append(vec![at(extra), event(&format!("early-{extra}-{order}"), &early, "K")]).await;
        }
        let once: HashSet<&String> = met.iter().collect();
        assert_eq!(once.len(), met.len(), "no event appears twice");
        for number in (0..200).step_by(2) {
            assert!(once.contains(&format!("e{number:03}")), "{order}: {number}");
        }
        // Each was appended before the last page was read, so every event after the cursor appears.
        let ahead = match order {
            SortOrder::Timestamp => format!("e{extra}"),
            SortOrder::TimestampDesc => format!("early-{extra}-{order}"),
        };
        assert!(once.contains(&ahead), "{order}: {ahead}");
    }
    log.engines.shutdown().await;
}

#[tokio::test]
async fn batch_get_accepts_duplicate_ids() {
    let log = Log::new().await;
    log.append(vec![event("a", "2026-01-01T00:00:01", "K"), event("a", "2026-01-01T00:00:02", "K")]).await;
    let ids = ["a", "b", "a", "b"].map(ToOwned::to_owned);
    let asked = ids.iter().map(|id| event(id, "2026-01-01T00:00:03", "K")).collect();
    let unknown = log.store.unknown(&log.user, log.conversation, asked).await.expect("the store");
    assert_eq!(unknown.iter().map(|event| event.id.as_str()).collect::<Vec<_>>(), ["b"]);
    let found = log.store.batch_get(&log.user, log.conversation, &ids).await.expect("the store");
    assert_eq!(found.iter().map(Option::is_some).collect::<Vec<_>>(), [true, false, true, false]);
    log.engines.shutdown().await;
}

#[tokio::test]
async fn page_of_events_fits_into_one_response() {
    let log = Log::new().await;
    let million = 1_000_000;
    let at = |number: usize| format!("2026-01-01T00:00:{number:02}");
    let mut events: Vec<Event> = (0..9).map(|number| large(&format!("e{number}"), &at(number), million)).collect();
    events[4] = large("e4", &at(4), 7 * million);
    log.append(events).await;
    let mut after = None;
    let mut pages = Vec::new();
    loop {
        let (ids, next) = log.page(&EventFilter::default(), SortOrder::Timestamp, after.as_ref(), 100).await;
        pages.push(ids.join(" "));
        after = next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(pages, ["e0 e1 e2 e3", "e4", "e5 e6 e7 e8"]);
    assert_eq!(log.count(&EventFilter::default()).await, 9);
    let get = async |ids: &[&str]| {
        let ids: Vec<String> = ids.iter().map(|id| (*id).to_owned()).collect();
        log.store.batch_get(&log.user, log.conversation, &ids).await
    };
    let single = get(&["e4", "nothing"]).await.expect("one event, however large");
    assert!(single[0].as_ref().is_some_and(|event| event.json.len() as u64 > PAGE_SIZE) && single[1].is_none());
    assert_eq!(get(&["e0", "e1", "e2", "e3"]).await.expect("what fits").iter().flatten().count(), 4);
    assert!(matches!(get(&["e0", "e4"]).await, Err(Error::TooLarge(_))));
    log.engines.shutdown().await;
}

#[tokio::test]
async fn deleting_a_log_removes_all_of_it_and_nothing_of_other_logs() {
    let log = Log::new().await;
    let other = UserId::new("user-two");
    let events = || {
        let small = (0..60).map(|number| event(&format!("e{number}"), "2026-01-01T00:00:00", "K"));
        small.chain((0..5).map(|number| large(&format!("large{number}"), "2026-01-01T00:00:00", 400_000)))
    };
    log.append(events().collect()).await;
    log.store.append(&other, log.conversation, events().collect()).await.expect("stored");
    assert_eq!(log.objects().await, 10);
    for _ in 0..2 {
        log.store.delete_all(&log.user, log.conversation).await.expect("deleted");
        assert_eq!(log.count(&EventFilter::default()).await, 0);
        assert_eq!(log.objects().await, 5);
    }
    assert_eq!(all_events(&log.store, &other, log.conversation).await.len(), 65);
    log.engines.shutdown().await;
}

/// The API, with the log of one conversation.
struct Served {
    api: Api,
    store: EventStore,
    user: UserId,
    conversation: Uuid,
    _folder: TempDir,
}

impl Served {
    async fn new(events: Vec<Event>) -> Self {
        let folder = TempDir::new().expect("a folder");
        let api = Api::at(folder.path(), SandboxConfig::None).await;
        let (aws, names) = (&api.aws, &api.names);
        let store = Stores::without_key(names, aws).events();
        let (user, conversation) = (UserId::new("user-one"), Uuid::new_v4());
        store.append(&user, conversation, events).await.expect("stored");
        Self { api, store, user, conversation, _folder: folder }
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        let target = format!("/api/v1/conversation/{}/events{path}", self.conversation);
        self.api.call(&self.user, "GET", &target, None).await
    }

    /// The ids of all pages.
    async fn walk(&self, query: &str) -> Vec<String> {
        let (mut ids, mut page_id) = (Vec::new(), String::new());
        loop {
            let (status, page) = self.get(&format!("/search?{query}{page_id}")).await;
            assert_eq!(status, 200, "{page}");
            let items = page["items"].as_array().expect("items");
            ids.extend(items.iter().map(|item| item["id"].as_str().expect("an id").to_owned()));
            match page["next_page_id"].as_str() {
                Some(next) => page_id = format!("&page_id={next}"),
                None => return ids,
            }
        }
    }
}

#[tokio::test]
async fn events_are_returned_byte_for_byte() {
    let sent = r#"{"timestamp":"2025-01-01T00:00:00.5", "kind":"UnknownKindEvent","more":[1.10, 1e2,123456789012345678901234567890],  "text":"\u00e9é", "id":"strange"}"#;
    let strange = Event { json: sent.into(), ..event("strange", "2025-01-01T00:00:00.5", "UnknownKindEvent") };
    let served = Served::new(vec![strange, event("later", "2025-01-01T00:00:01", "MessageEvent")]).await;
    for (path, expected) in [
        ("/search?limit=1".to_owned(), format!(r#"{{"items":[{sent}],"next_page_id":""#)),
        ("?id=strange&id=missing&id=strange".to_owned(), format!("[{sent},null,{sent}]")),
        ("/count".to_owned(), "2".to_owned()),
        ("/count?kind__eq=MessageEvent".to_owned(), "1".to_owned()),
        ("/count?timestamp__lt=2025-01-01T00:00:01Z".to_owned(), "1".to_owned()),
        ("/search?kind__eq=TokenEvent".to_owned(), r#"{"items":[],"next_page_id":null}"#.to_owned()),
    ] {
        let target = format!("/api/v1/conversation/{}/events{path}", served.conversation.simple());
        let (status, text) = served.api.text(&served.user, &target).await;
        assert_eq!(status, 200);
        assert!(text.starts_with(&expected), "{path}: {text}");
    }
    served.api.stop().await;
}

#[tokio::test]
async fn pagination_over_http_returns_every_event_once_in_either_order() {
    let kinds = ["MessageEvent", "ActionEvent", "ObservationEvent"];
    let events = (0..25)
        .map(|number| event(&format!("e{number:02}"), &format!("2026-01-01T00:00:{number:02}"), kinds[number % 3]));
    let served = Served::new(events.collect()).await;
    let all: Vec<String> = (0..25).map(|number| format!("e{number:02}")).collect();
    let mut newest_first = all.clone();
    newest_first.reverse();
    for limit in [1, 7, 25, 100] {
        assert_eq!(served.walk(&format!("limit={limit}")).await, all);
        assert_eq!(served.walk(&format!("limit={limit}&sort_order=TIMESTAMP_DESC")).await, newest_first);
    }
    // The same instant with an offset, with a fraction, and as a unix time.
    let of_kind: Vec<String> = (0..25).filter(|number| number % 3 == 1).map(|number| format!("e{number:02}")).collect();
    assert_eq!(served.walk("limit=2&kind__eq=ActionEvent").await, of_kind);
    assert_eq!(served.walk("timestamp__gte=2026-01-01T01:00:20%2B01:00&limit=2").await, all[20..]);
    assert_eq!(served.walk("timestamp__lt=1767225604.5&limit=2").await, all[..5]);
    assert_eq!(served.walk("timestamp__gte=2026-01-01&timestamp__lt=2026-01-01T00:00:03.0").await, all[..3]);
    assert_eq!(served.get("/count?kind__eq=ActionEvent&timestamp__gte=2026-01-01T00:00:05Z").await, (200, json!(6)));

    // A page id is valid only for the list that it was issued for.
    let (_, page) = served.get("/search?limit=5&kind__eq=ActionEvent").await;
    let page_id = page["next_page_id"].as_str().expect("a next page");
    let other = Uuid::new_v4();
    let same = format!("/api/v1/conversation/{}/events/search?kind__eq=ActionEvent&page_id=", served.conversation);
    let elsewhere = same.replace(&served.conversation.to_string(), &other.to_string());
    let mut damaged = page_id.to_owned();
    damaged.replace_range(3..4, if &page_id[3..4] == "A" { "B" } else { "A" });
    let stranger = UserId::new("stranger");
    for (user, target, expected) in [
        (&served.user, format!("{same}{page_id}"), 200),
        (&served.user, format!("{same}{page_id}&limit=1"), 200),
        (&served.user, format!("{same}{page_id}&sort_order=TIMESTAMP_DESC"), 400),
        (&served.user, format!("{same}{page_id}&timestamp__gte=2026-01-01"), 400),
        (&served.user, format!("{same}{page_id}").replace("kind__eq=ActionEvent&", ""), 400),
        (&served.user, format!("{elsewhere}{page_id}"), 400),
        (&served.user, format!("{same}{damaged}"), 400),
        (&served.user, format!("{same}2"), 400),
        (&served.user, same.clone(), 400),
        (&stranger, format!("{same}{page_id}"), 400),
    ] {
        let (status, answer) = served.api.call(user, "GET", &target, None).await;
        assert_eq!(status, expected, "{target}: {answer}");
        assert!(
            expected == 200 || answer["detail"].as_str().is_some_and(|detail| detail.contains("page_id")),
            "{answer}"
        );
    }
    served.api.stop().await;
}

#[tokio::test]
async fn invalid_requests_for_events_get_the_contracts_validation_errors() {
    let served = Served::new(vec![event("e", "2026-01-01T00:00:00", "MessageEvent")]).await;
    let too_long = format!("/count?kind__eq={}", "K".repeat(101));
    for (path, faults) in [
        ("/search?limit=0", vec![("greater_than", "limit", "Input should be greater than 0")]),
        ("/search?limit=101", vec![("less_than_equal", "limit", "Input should be less than or equal to 100")]),
        (&too_long, vec![("string_too_long", "kind__eq", "String should have at most 100 characters")]),
        (
            "/search?timestamp__lt=x&sort_order=x&limit=x",
            vec![
                (
                    "datetime_from_date_parsing",
                    "timestamp__lt",
                    "Input should be a valid datetime or date, input is too short",
                ),
                ("enum", "sort_order", "Input should be 'TIMESTAMP' or 'TIMESTAMP_DESC'"),
                ("int_parsing", "limit", "Input should be a valid integer, unable to parse string as an integer"),
            ],
        ),
        ("", vec![("missing", "id", "Field required")]),
    ] {
        let (status, answer) = served.get(path).await;
        let violations: Vec<_> = answer["detail"].as_array().into_iter().flatten().collect();
        let expected: Vec<_> =
            faults.iter().map(|(kind, name, text)| (json!(kind), json!(["query", name]), json!(text))).collect();
        let violations: Vec<_> = violations
            .iter()
            .map(|fault| (fault["type"].clone(), fault["loc"].clone(), fault["msg"].clone()))
            .collect();
        assert_eq!((status, violations), (422, expected), "{path}");
    }
    for path in ["", "/search", "/count"] {
        let target = format!("/api/v1/conversation/bad/events{path}?id=x");
        let (status, answer) = served.api.call(&served.user, "GET", &target, None).await;
        assert_eq!((status, &answer["detail"][0]["type"]), (422, &json!("uuid_parsing")), "{answer}");
        assert_eq!(answer["detail"][0]["loc"], json!(["path", "conversation_id"]));
    }
    let ids = |count: usize| format!("?{}", vec!["id=e"; count].join("&"));
    let (status, answer) = served.get(&ids(100)).await;
    assert_eq!((status, answer.as_array().map(Vec::len)), (200, Some(100)));
    let many = (400, json!({"detail": "Cannot request more than 100 events at once, got 101"}));
    assert_eq!(served.get(&ids(101)).await, many);
    // Another user's log is not readable, and the response does not reveal whether it exists.
    for (user, conversation) in [("stranger", served.conversation), ("user-one", Uuid::new_v4())] {
        let get = async |path: &str| {
            let target = format!("/api/v1/conversation/{conversation}/events{path}");
            served.api.call(&UserId::new(user), "GET", &target, None).await
        };
        assert_eq!(get("/search").await, (200, json!({"items": [], "next_page_id": null})));
        assert_eq!(get("/count").await, (200, json!(0)));
        assert_eq!(get("?id=e").await, (200, json!([null])));
    }
    served.api.stop().await;
}

#[tokio::test]
async fn large_events_are_returned_a_few_per_page() {
    let million = 1_000_000;
    let at = |number: usize| format!("2026-01-01T00:00:{number:02}");
    let served =
        Served::new((0..3).map(|number| large(&format!("e{number}"), &at(number), 5 * million)).collect()).await;
    served.store.append(&served.user, served.conversation, vec![event("small", &at(9), "K")]).await.expect("stored");
    let (status, page) = served.get("/search").await;
    assert_eq!((status, page["items"].as_array().map(Vec::len)), (200, Some(1)));
    assert_eq!(served.walk("").await, ["e0", "e1", "e2", "small"]);
    let (status, answer) = served.get("?id=e0&id=e1").await;
    assert_eq!(
        (status, answer),
        (413, json!({"detail": "These events are too large for one response; request fewer at once"}))
    );
    let (status, answer) = served.get("?id=e0&id=missing").await;
    assert_eq!((status, answer[0]["text"].as_str().map(str::len)), (200, Some(5 * million)));
    served.api.stop().await;
}
