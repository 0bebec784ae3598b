//! Tests of the models themselves.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use aws_sdk_dynamodb::error::ProvideErrorMetadata as _;
use aws_sdk_dynamodb::types::{
    AttributeValue, ConditionCheck, KeysAndAttributes, Put, PutRequest, TransactWriteItem, Update, WriteRequest,
};
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use aws_sdk_sqs::types::SendMessageBatchRequestEntry;
use futures::future::join_all;
use jiff::Timestamp;
use serde_json::{Value, json};
use shared::aws::Aws;
use shared::config::{Config, ExportConfig, SandboxConfig, SealingConfig, StartConfig};
use shared::http::caller::Caller;
use shared::http_client::AddressPolicy;
use shared::id::UserId;
use shared::jobs::observe_boots::ObserveBoots;
use shared::jobs::queue::Job;
use shared::user::seal::Sealer;
use tokio::time::{Instant, sleep, timeout};
use tower::ServiceExt as _;

use super::lambda::{Ended, Function, Handler, Invocation, Mapping};
use super::sdk_client::{Detail, Trace};
use super::services::Services;
use super::sqs::{Depth, url};
use super::{Clock, Faults, lock};

const SEED: u64 = 7;
/// Bytes.
const STACK: usize = 64 << 20;
const CONVERSATIONS: &str = "conversations";

/// Runs a simulation in a runtime and a thread of its own. The product's futures need more stack than a test has.
fn simulate<F: Future<Output: Send>>(seed: u64, faults: &Faults, run: impl FnOnce(Services) -> F + Send) -> F::Output {
    simulate_with(Detail::Lines, seed, faults, run)
}

fn simulate_with<F: Future<Output: Send>>(
    detail: Detail,
    seed: u64,
    faults: &Faults,
    run: impl FnOnce(Services) -> F + Send,
) -> F::Output {
    let simulation = || {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_time().start_paused(true).build().expect("a runtime");
        runtime.block_on(async {
            let clock = Clock::start(Timestamp::constant(1_800_000_000, 0));
            let services = Services::start(seed, clock, faults, 1000, Trace::new(clock, detail)).await;
            run(services).await
        })
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, simulation).expect("a thread");
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn s(value: impl Into<String>) -> AttributeValue {
    AttributeValue::S(value.into())
}

type Item = HashMap<String, AttributeValue>;

fn key(user: &str, id: &str) -> Item {
    HashMap::from([("user".to_owned(), s(user)), ("id".to_owned(), s(id))])
}

/// An item that is in the index `by-created`.
fn listed(user: &str, id: &str, created: &str) -> Item {
    let mut item = key(user, id);
    item.extend([("list".to_owned(), s(user)), ("created_sort".to_owned(), s(created))]);
    item
}

async fn put(aws: &Aws, item: Item) {
    let put = aws.dynamodb.put_item().table_name(CONVERSATIONS).set_item(Some(item));
    put.send().await.expect("an item");
}

/// The ids in the index `by-created`.
async fn listed_ids(aws: &Aws, user: &str) -> Vec<String> {
    let query = aws.dynamodb.query().table_name(CONVERSATIONS).index_name("by-created");
    let query = query.key_condition_expression("#list = :list").expression_attribute_names("#list", "list");
    let found = query.expression_attribute_values(":list", s(user)).send().await.expect("a query");
    found.items.unwrap_or_default().iter().map(|item| item["id"].as_s().expect("a string").clone()).collect()
}

/// What one client of the workload does.
async fn work(aws: Aws, client: usize, rounds: usize) {
    let user = format!("user-{}", client % 3);
    for round in 0..rounds {
        let id = format!("{client:02}-{round:03}");
        let item = listed(&user, &id, &format!("{round:05}"));
        let _may_fail = aws.dynamodb.put_item().table_name(CONVERSATIONS).set_item(Some(item)).send().await;
        let update = aws.dynamodb.update_item().table_name(CONVERSATIONS).set_key(Some(key(&user, &id)));
        let update =
            update.update_expression("SET created_sort = :sort, n = :n").expression_attribute_values(":n", s("1"));
        let _may_fail = update.expression_attribute_values(":sort", s(format!("x{round}"))).send().await;
        // All clients check and change the same item.
        let shared_key = key(&user, "shared");
        let change = Update::builder().table_name(CONVERSATIONS).set_key(Some(shared_key.clone()));
        let change = change.update_expression("SET n = :n").expression_attribute_values(":n", s(&id));
        let added = Put::builder().table_name("sandboxes").set_item(Some(key(&user, &id)));
        let check = ConditionCheck::builder().table_name(CONVERSATIONS).set_key(Some(key(&user, &id)));
        let check = check.condition_expression("attribute_not_exists(absent)");
        let actions = [
            TransactWriteItem::builder().update(change.build().expect("an update")).build(),
            TransactWriteItem::builder().put(added.build().expect("a put")).build(),
            TransactWriteItem::builder().condition_check(check.build().expect("a check")).build(),
        ];
        let transaction = aws.dynamodb.transact_write_items().set_transact_items(Some(actions.to_vec()));
        let transaction = transaction.client_request_token(format!("{client}-{round}"));
        let shared_update = aws.dynamodb.update_item().table_name(CONVERSATIONS).set_key(Some(shared_key));
        let shared_update = shared_update.update_expression("SET m = :m").expression_attribute_values(":m", s(&id));
        let _may_fail = tokio::join!(transaction.send(), shared_update.send());
        let wanted = [key(&user, &id), key(&user, "shared"), key(&user, "absent")];
        let wanted = KeysAndAttributes::builder().set_keys(Some(wanted.to_vec())).build().expect("keys");
        let _may_fail = aws.dynamodb.batch_get_item().request_items(CONVERSATIONS, wanted).send().await;
        let writes: Vec<WriteRequest> = (0..5)
            .map(|number| {
                let put = PutRequest::builder().set_item(Some(key(&user, &format!("{id}-{number}"))));
                WriteRequest::builder().put_request(put.build().expect("a put")).build()
            })
            .collect();
        let _may_fail = aws.dynamodb.batch_write_item().request_items("sandboxes", writes).send().await;
        let query = aws.dynamodb.query().table_name(CONVERSATIONS).index_name("by-created");
        let query = query.key_condition_expression("#list = :list").expression_attribute_names("#list", "list");
        let _may_fail = query.expression_attribute_values(":list", s(&user)).send().await;
        let all = aws.dynamodb.query().table_name(CONVERSATIONS).key_condition_expression("#user = :user");
        let all = all.expression_attribute_names("#user", "user").expression_attribute_values(":user", s(&user));
        let _may_fail = all.send().await;
        let get = aws.dynamodb.get_item().table_name(CONVERSATIONS).set_key(Some(key(&user, &id)));
        let _may_fail = get.send().await;
        let send = aws.sqs.send_message().queue_url(url("jobs")).message_body(format!("{id} a"));
        let _may_fail = send.message_group_id(&user).delay_seconds(1).send().await;
        let entries = (0..3).map(|number| {
            let entry = SendMessageBatchRequestEntry::builder().id(number.to_string());
            entry.message_body(format!("{id} b{number}")).message_group_id(&user).build().expect("an entry")
        });
        let send = aws.sqs.send_message_batch().queue_url(url("jobs")).set_entries(Some(entries.collect()));
        let _may_fail = send.send().await;
        let object = aws.s3.put_object().bucket("data").key(&id).body(id.clone().into_bytes().into());
        // The product's client of S3 has no time limit.
        let _may_fail = timeout(Duration::from_secs(60), object.send()).await;
        let get = aws.s3.get_object().bucket("data").key(&id);
        let _may_fail = timeout(Duration::from_secs(60), get.send()).await;
    }
}

/// The clients at the same time, and workers that process the messages.
async fn workload(services: &Services, clients: usize, rounds: usize) {
    let worker = services.clone();
    let handler: Handler = Arc::new(move |invocation: Invocation| {
        let aws = worker.aws();
        Box::pin(async move {
            let body = invocation.event["Records"][0]["body"].as_str().expect("a body").to_owned();
            put(&aws, key("worker", &body)).await;
            sleep(Duration::from_millis(300)).await;
            Ok(json!({}))
        })
    });
    let limit = Duration::from_secs(150);
    services.lambda.add(Function { name: "worker", timeout: limit, reserved: None, handler });
    services.map_worker("worker", 10);
    join_all((0..clients).map(|client| work(services.aws(), client, rounds))).await;
    sleep(Duration::from_secs(2 * 3600)).await;
}

#[test]
fn one_seed_gives_one_sequence_of_calls() {
    let run = |seed| {
        simulate(seed, &Faults::hostile(), async |services| {
            workload(&services, 6, 8).await;
            (services.trace.hash(), services.trace.calls(), services.trace.lines(), services.happened())
        })
    };
    let (first, second) = (run(SEED), run(SEED));
    // To be compared with that of another process.
    println!("{} calls, hash {:016x}", first.1, first.0);
    assert!(first.1 > 500, "{} calls", first.1);
    for (number, (one, other)) in first.2.iter().zip(&second.2).enumerate() {
        assert_eq!(one, other, "call {number}");
    }
    assert_eq!((first.0, first.1, &first.3), (second.0, second.1, &second.3));
    assert_ne!(run(SEED + 1).0, first.0);
}

#[test]
fn each_fault_happens() {
    let often = Faults { hung: 0.01, outages: 0.5, frozen: 0.05, throttled: 0.2, conflicts: 0.1, ..Faults::hostile() };
    let mut happened = BTreeSet::new();
    for seed in 0..3 {
        simulate(seed, &often, async |services| {
            workload(&services, 10, 8).await;
            happened.extend(services.happened().into_keys());
        });
    }
    let expected = [
        ("dynamodb", "failed"),
        ("dynamodb", "lagging_index_read"),
        ("dynamodb", "late_replica_read"),
        ("dynamodb", "hung"),
        ("dynamodb", "lost"),
        ("dynamodb", "outage"),
        ("dynamodb", "refused"),
        ("dynamodb", "seeded_transaction_conflict"),
        ("dynamodb", "stalled"),
        ("dynamodb", "throttled"),
        ("dynamodb", "transaction_conflict"),
        ("dynamodb", "transaction_conflict_of_write"),
        ("dynamodb", "unprocessed"),
        ("lambda", "crashed"),
        ("lambda", "frozen"),
        ("lambda", "undeleted"),
        ("s3", "failed"),
        ("s3", "lost"),
        ("s3", "throttled"),
        ("sqs", "delivered_late"),
        ("sqs", "duplicated"),
        ("sqs", "entry_failed"),
        ("sqs", "failed"),
        ("sqs", "lost"),
        ("sqs", "throttled"),
    ];
    let missing: Vec<_> = expected.iter().filter(|fault| !happened.contains(*fault)).collect();
    assert!(missing.is_empty(), "{missing:?} of {happened:?}");
}

#[test]
fn an_index_is_never_a_consistent_snapshot() {
    let faults = Faults { lag: Duration::from_secs(3), ..Faults::none() };
    let overtaken = (0..5).filter(|seed| {
        simulate(*seed, &faults, async |services| {
            let aws = services.aws();
            let ids: Vec<String> = (0..20).map(|number| format!("{number:02}")).collect();
            for id in &ids {
                put(&aws, listed("user", id, id)).await;
            }
            let mut is_overtaken = false;
            loop {
                let found = listed_ids(&aws, "user").await;
                // A later item is there, an earlier one is not.
                let is_prefix = ids.starts_with(&found);
                is_overtaken |= !is_prefix;
                if found.len() == ids.len() {
                    return is_overtaken;
                }
                sleep(Duration::from_millis(20)).await;
            }
        })
    });
    assert!(overtaken.count() >= 3);
}

#[test]
fn indexes_of_one_table_lag_by_themselves() {
    let faults = Faults { lag: Duration::from_secs(3), ..Faults::none() };
    simulate(SEED, &faults, async |services| {
        let aws = services.aws();
        let count = async |index: &str| {
            let query = aws.dynamodb.query().table_name(CONVERSATIONS).index_name(index);
            let query = query.key_condition_expression("#list = :list").expression_attribute_names("#list", "list");
            query.expression_attribute_values(":list", s("user")).send().await.expect("a query").count
        };
        let mut different = 0;
        for number in 0..30 {
            let mut item = listed("user", &format!("{number}"), &format!("{number}"));
            item.insert("updated_sort".to_owned(), s(format!("{number}")));
            put(&aws, item).await;
            different += i32::from(count("by-created").await != count("by-updated").await);
        }
        assert!(different > 3, "{different}");
        services.dynamodb.catch_up();
        assert_eq!((count("by-created").await, count("by-updated").await), (30, 30));
    });
}

#[test]
fn without_faults_everything_is_current() {
    simulate(SEED, &Faults::none(), async |services| {
        let aws = services.aws();
        for number in 0..10 {
            put(&aws, listed("user", &format!("{number}"), &format!("{number}"))).await;
            assert_eq!(listed_ids(&aws, "user").await.len(), number + 1);
        }
        // The item moves in the index, leaves it, and is deleted.
        put(&aws, listed("user", "0", "x")).await;
        assert_eq!(listed_ids(&aws, "user").await.last().map(String::as_str), Some("0"));
        put(&aws, key("user", "0")).await;
        let delete = aws.dynamodb.delete_item().table_name(CONVERSATIONS).set_key(Some(key("user", "1")));
        delete.send().await.expect("a deletion");
        assert_eq!(listed_ids(&aws, "user").await, (2..10).map(|number| number.to_string()).collect::<Vec<_>>());
        assert!(services.happened().is_empty(), "{:?}", services.happened());
        let usage = services.dynamodb.usage();
        let puts = usage[&(CONVERSATIONS.to_owned(), "PutItem".to_owned())];
        // Each put costs a unit of the table and one of the index; the entry that moved two, the one that left one.
        assert_eq!((puts.calls, puts.write_units), (12, 12.0 + 10.0 + 2.0 + 1.0));
    });
}

#[test]
fn a_write_takes_effect_after_its_client_is_gone() {
    let faults = Faults { stalled: 1.0, ..Faults::none() };
    simulate(SEED, &faults, async |services| {
        let aws = services.aws();
        let writing = tokio::spawn({
            let aws = aws.clone();
            async move { put(&aws, key("user", "late")).await }
        });
        sleep(Duration::from_millis(200)).await;
        writing.abort();
        assert_eq!(services.dynamodb.items(CONVERSATIONS), Vec::<Value>::new());
        sleep(Duration::from_secs(25)).await;
        assert_eq!(services.dynamodb.items(CONVERSATIONS).len(), 1);
    });
}

#[test]
fn items_expire_hours_late() {
    simulate(SEED, &Faults::none(), async |services| {
        let aws = services.aws();
        for number in 0..20 {
            let mut item = key("user", &format!("{number:02}"));
            let at = services.clock.unix_seconds() + 60.0;
            item.insert("expires_at".to_owned(), AttributeValue::N(format!("{at:.0}")));
            put(&aws, item).await;
        }
        // One item is kept after all.
        put(&aws, key("user", "00")).await;
        let left = || services.dynamodb.items(CONVERSATIONS).len();
        sleep(Duration::from_secs(600)).await;
        assert!(left() > 17, "{}", left());
        sleep(Duration::from_secs(24 * 3600)).await;
        assert!((3..=17).contains(&left()), "{}", left());
        sleep(Duration::from_secs(25 * 3600)).await;
        assert_eq!(left(), 1);
    });
}

#[test]
fn a_hot_partition_is_throttled() {
    simulate(SEED, &Faults::none(), async |services| {
        let aws = services.aws();
        let body = "x".repeat(300_000);
        let puts = (0..8).map(|number| {
            let mut item = key("user", &number.to_string());
            item.insert("body".to_owned(), s(&body));
            aws.dynamodb.put_item().table_name(CONVERSATIONS).set_item(Some(item)).send()
        });
        for result in join_all(puts).await {
            // The clients try again in the next second.
            let code = result.err().map(|error| error.code().map(ToOwned::to_owned));
            assert!(code.is_none_or(|code| code.as_deref() == Some("ProvisionedThroughputExceededException")));
        }
        assert!(services.dynamodb.happened()["partition_limit"] > 0);
        let (peak, partition) = services.dynamodb.peaks()[CONVERSATIONS].clone();
        assert!(peak > 1.0 && partition == "user", "{peak} {partition}");
    });
}

/// The receive count and the time of each delivery, by body.
type Deliveries = Arc<Mutex<BTreeMap<String, Vec<(u64, Duration)>>>>;

/// A handler that notes its deliveries, and then does this.
fn noting(
    services: &Services,
    deliveries: &Deliveries,
    then: impl Fn(String) -> Pin<Box<dyn Future<Output = Result<Value, String>> + Send>> + Send + Sync + 'static,
) -> Handler {
    let (clock, deliveries) = (services.clock, deliveries.clone());
    Arc::new(move |invocation: Invocation| {
        let record = &invocation.event["Records"][0];
        let body = record["body"].as_str().expect("a body").to_owned();
        let receives = record["attributes"]["ApproximateReceiveCount"].as_str().and_then(|text| text.parse().ok());
        lock(&deliveries).entry(body.clone()).or_default().push((receives.expect("a number"), clock.elapsed()));
        then(body)
    })
}

async fn send(aws: &Aws, group: &str, body: &str, delay: i32) {
    let send = aws.sqs.send_message().queue_url(url("jobs")).message_body(body).message_group_id(group);
    send.delay_seconds(delay).send().await.expect("a message");
}

#[test]
fn failed_messages_come_again_and_end_as_dead_letters() {
    simulate(SEED, &Faults::none(), async |services| {
        let deliveries = Deliveries::default();
        let handler = noting(&services, &deliveries, |body| {
            Box::pin(async move {
                match &*body {
                    "error" => Err("an error".to_owned()),
                    "panic" => panic!("a panic"),
                    "hang" => std::future::pending().await,
                    "failure" => Ok(json!({ "batchItemFailures": [{ "itemIdentifier": "" }] })),
                    _ => Ok(json!({})),
                }
            })
        });
        let limit = Duration::from_secs(150);
        services.lambda.add(Function { name: "worker", timeout: limit, reserved: None, handler });
        let mapping = Mapping { queue: "jobs".to_owned(), function: "worker", batch_size: 1, maximum_concurrency: 5 };
        services.lambda.map(&services.sqs, mapping);
        let aws = services.aws();
        for body in ["good", "error", "panic", "hang", "failure"] {
            send(&aws, "user", body, if body == "good" { 60 } else { 0 }).await;
        }
        sleep(Duration::from_secs(6 * 900)).await;
        let deliveries = lock(&deliveries).clone();
        let (receives, at) = deliveries["good"][0];
        assert!(deliveries["good"].len() == 1 && receives == 1 && at >= Duration::from_secs(60), "{at:?}");
        for body in ["error", "panic", "hang", "failure"] {
            let counts: Vec<u64> = deliveries[body].iter().map(|(receives, _)| *receives).collect();
            assert_eq!(counts, [1, 2, 3, 4, 5], "{body}");
            assert!(deliveries[body].windows(2).all(|pair| pair[1].1 >= pair[0].1 + Duration::from_secs(898)));
        }
        let mut dead = services.sqs.bodies("jobs-dead-letters");
        dead.sort_unstable();
        assert_eq!(dead, ["error", "failure", "hang", "panic"]);
        assert_eq!(services.sqs.depth("jobs"), Depth::default());
        let usage = services.lambda.usage()["worker"];
        assert_eq!((usage.invocations, usage.errors, usage.timed_out, usage.crashed), (21, 5, 5, 5));
        assert!(usage.busy > limit * 5 && usage.busy < limit * 6, "{:?}", usage.busy);
        assert_eq!(services.lambda.panics().len(), 5);
    });
}

#[test]
fn messages_are_delivered_twice_and_in_another_order() {
    let faults = Faults { duplicated: 0.2, reordering: Duration::from_secs(2), ..Faults::none() };
    simulate(SEED, &faults, async |services| {
        let deliveries = Deliveries::default();
        let handler = noting(&services, &deliveries, |_| Box::pin(async { Ok(json!({})) }));
        let limit = Duration::from_secs(150);
        services.lambda.add(Function { name: "worker", timeout: limit, reserved: None, handler });
        let aws = services.aws();
        for number in 0..100 {
            send(&aws, "user", &format!("{number:03}"), 0).await;
        }
        services.map_worker("worker", 2);
        sleep(Duration::from_secs(300)).await;
        let deliveries = lock(&deliveries).clone();
        let twice = deliveries.values().filter(|times| times.len() > 1).count();
        assert!(deliveries.len() == 100 && (5..50).contains(&twice), "{twice}");
        let first: Vec<Duration> = deliveries.values().map(|times| times[0].1).collect();
        assert!(!first.is_sorted());
        assert_eq!(services.sqs.depth("jobs"), Depth::default());
    });
}

#[test]
fn a_backlog_of_one_group_delays_no_other() {
    simulate(SEED, &Faults::none(), async |services| {
        let deliveries = Deliveries::default();
        let handler = noting(&services, &deliveries, |_| {
            Box::pin(async {
                sleep(Duration::from_secs(1)).await;
                Ok(json!({}))
            })
        });
        let limit = Duration::from_secs(150);
        services.lambda.add(Function { name: "worker", timeout: limit, reserved: None, handler });
        let aws = services.aws();
        for number in 0..500 {
            send(&aws, "busy", &format!("busy {number}"), 0).await;
        }
        services.map_worker("worker", 10);
        sleep(Duration::from_secs(10)).await;
        let sent_at = services.clock.elapsed();
        for number in 0..10 {
            send(&aws, "quiet", &format!("quiet {number}"), 0).await;
        }
        sleep(Duration::from_secs(200)).await;
        let deliveries = lock(&deliveries).clone();
        assert_eq!(deliveries.len(), 510);
        let usage = services.sqs.usage()["jobs"];
        assert_eq!((usage.send_requests, usage.sent, usage.received, usage.deleted), (510, 510, 510, 510));
        assert!(services.queues_are_empty());
        let last = deliveries.iter().filter(|(body, _)| body.starts_with("quiet")).map(|(_, times)| times[0].1).max();
        let last = last.expect("deliveries");
        assert!(last < sent_at + Duration::from_secs(6), "{sent_at:?} {last:?}");
        assert!(services.lambda.usage()["worker"].most_concurrent <= 10);
    });
}

#[test]
fn concurrency_ramps_up_and_reserved_concurrency_throttles() {
    let run = |reserved: Option<usize>| {
        simulate(SEED, &Faults::none(), async move |services| {
            let deliveries = Deliveries::default();
            let handler = noting(&services, &deliveries, |_| {
                Box::pin(async {
                    sleep(Duration::from_secs(20)).await;
                    Ok(json!({}))
                })
            });
            services.lambda.add(Function { name: "worker", timeout: Duration::from_secs(150), reserved, handler });
            let aws = services.aws();
            for number in 0..200 {
                send(&aws, "user", &number.to_string(), 0).await;
            }
            services.map_worker("worker", 100);
            sleep(Duration::from_millis(2500)).await;
            let early = services.lambda.usage()["worker"].most_concurrent;
            sleep(Duration::from_secs(6 * 900)).await;
            // Messages that were throttled too often are dead letters, without one delivery.
            assert_eq!(lock(&deliveries).len() + services.sqs.bodies("jobs-dead-letters").len(), 200);
            (early, services.lambda.usage()["worker"])
        })
    };
    let (early, usage) = run(None);
    assert!((5..=20).contains(&early), "{early}");
    assert!(usage.most_concurrent > 80 && usage.most_concurrent <= 100 && usage.throttled == 0, "{usage:?}");
    assert!(usage.cold_starts >= 80 && usage.cold_starts <= 100, "{usage:?}");
    let (_, usage) = run(Some(8));
    assert!(usage.most_concurrent == 8 && usage.throttled > 0, "{usage:?}");
}

#[test]
fn a_killed_invocation_stops_where_it_waits() {
    simulate(SEED, &Faults::none(), async |services| {
        let (began, ended) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let handler: Handler = {
            let (began, ended) = (began.clone(), ended.clone());
            Arc::new(move |invocation| {
                let (began, ended) = (began.clone(), ended.clone());
                Box::pin(async move {
                    began.fetch_add(invocation.environment, Ordering::Relaxed);
                    sleep(Duration::from_secs(60)).await;
                    ended.store(true, Ordering::Relaxed);
                    Ok(Value::Null)
                })
            })
        };
        services.lambda.add(Function { name: "api", timeout: Duration::from_secs(29), reserved: Some(1), handler });
        let before = Instant::now();
        let (one, other) =
            tokio::join!(services.lambda.invoke("api", json!({})), services.lambda.invoke("api", json!({})));
        assert_eq!((one, other), (Err(Ended::TimedOut), Err(Ended::Throttled)));
        assert!(before.elapsed() < Duration::from_secs(31));
        sleep(Duration::from_secs(100)).await;
        assert_eq!((began.load(Ordering::Relaxed), ended.load(Ordering::Relaxed)), (1, false));
        // The next invocation has another environment.
        assert_eq!(services.lambda.invoke("api", json!({})).await, Err(Ended::TimedOut));
        assert_eq!(began.load(Ordering::Relaxed), 1 + 2);
    });
}

#[test]
fn a_frozen_invocation_goes_on_later() {
    let faults = Faults { frozen: 1.0, ..Faults::none() };
    simulate(SEED, &faults, async |services| {
        let handler: Handler = Arc::new(|_| {
            Box::pin(async move {
                let began = Instant::now();
                for _ in 0..20 {
                    sleep(Duration::from_secs(1)).await;
                }
                Ok(json!(began.elapsed().as_secs()))
            })
        });
        services.lambda.add(Function { name: "api", timeout: Duration::from_secs(900), reserved: None, handler });
        let seconds = services.lambda.invoke("api", json!({})).await.expect("an end").expect("a value");
        assert!((22..=141).contains(&seconds.as_u64().expect("a number")), "{seconds}");
    });
}

#[test]
fn schedules_invoke_and_failed_invocations_are_repeated() {
    simulate(SEED, &Faults::none(), async |services| {
        let calls = Arc::new(AtomicU64::new(0));
        let handler: Handler = {
            let calls = calls.clone();
            Arc::new(move |_| {
                let number = calls.fetch_add(1, Ordering::Relaxed);
                Box::pin(async move { if number == 0 { Err("once".to_owned()) } else { Ok(Value::Null) } })
            })
        };
        services.lambda.add(Function { name: "sweep", timeout: Duration::from_secs(150), reserved: None, handler });
        services.lambda.schedule("sweep", Duration::from_secs(60), json!({}));
        sleep(Duration::from_secs(600)).await;
        assert!((10..=12).contains(&calls.load(Ordering::Relaxed)), "{calls:?}");
        let usage = services.lambda.usage()["sweep"];
        assert_eq!((usage.errors, usage.cold_starts), (1, 1));
    });
}

#[test]
fn objects_are_stored_listed_and_deleted() {
    simulate(SEED, &Faults::none(), async |services| {
        let s3 = services.aws().s3;
        for number in 0..5 {
            let put = s3.put_object().bucket("data").key(format!("a/{number} ü")).content_type("text/plain");
            put.metadata("began", "today").body(vec![b'x'; number].into()).send().await.expect("an object");
        }
        let head = s3.head_object().bucket("data").key("a/3 ü").send().await.expect("an object");
        assert_eq!((head.content_length(), head.content_type()), (Some(3), Some("text/plain")));
        let object = s3.get_object().bucket("data").key("a/3 ü").send().await.expect("an object");
        assert_eq!(object.metadata().and_then(|metadata| metadata.get("began")).map(String::as_str), Some("today"));
        assert_eq!(object.body.collect().await.expect("a body").into_bytes(), "xxx");
        let error = s3.get_object().bucket("data").key("b").send().await.expect_err("no object");
        assert_eq!(error.code(), Some("NoSuchKey"));
        assert!(s3.head_object().bucket("data").key("b").send().await.is_err());
        let mut pages = s3.list_objects_v2().bucket("data").prefix("a/").max_keys(2).into_paginator().send();
        let mut keys = Vec::new();
        while let Some(page) = pages.next().await {
            keys.extend(page.expect("a page").contents.unwrap_or_default().into_iter().filter_map(|object| object.key));
        }
        assert_eq!(keys, (0..5).map(|number| format!("a/{number} ü")).collect::<Vec<_>>());
        for key in &keys {
            s3.delete_object().bucket("data").key(key).send().await.expect("a deletion");
        }
        assert!(services.s3.objects("data").is_empty());
        let usage = services.s3.usage();
        assert_eq!(
            (usage["PutObject"].calls, usage["PutObject"].bytes_received, usage["GetObject"].bytes_sent),
            (5, 10, 3)
        );
    });
}

/// The names are those that the product's stores use.
#[test]
fn a_job_of_the_product_reaches_the_worker() {
    simulate(SEED, &Faults::none(), async |services| {
        let sealer = Sealer::ephemeral();
        let stores = shared::stores::Stores::new(&services.names, &services.aws(), &sealer);
        let job = Job::from(ObserveBoots {});
        stores.queue().send(&job, Duration::ZERO).await.expect("a job");
        let bodies = services.sqs.bodies("jobs");
        assert_eq!(Job::from_body(&bodies[0]).expect("a job"), job);
    });
}

/// The product without a provider of sandboxes, so every start ends in an error.
#[test]
fn the_product_runs_on_the_models() {
    simulate(SEED, &Faults::none(), async |services| {
        let config = Config {
            start: StartConfig::default(),
            sandbox: SandboxConfig::None,
            names: services.names.clone(),
            sealing: SealingConfig::Kms(String::new()),
            single_user: false,
            live_status_budget: Duration::from_secs(1),
            sandbox_request_budget: Duration::from_secs(2),
            sandbox_idle_limit: None,
            address_policy: AddressPolicy::Any,
            export: ExportConfig::default(),
        };
        let sealer = Sealer::ephemeral();
        // A process for each execution environment.
        let contexts: Arc<Mutex<BTreeMap<u64, Arc<worker::Context>>>> = Arc::default();
        let handler: Handler = {
            let (services, config, sealer) = (services.clone(), config.clone(), sealer.clone());
            Arc::new(move |invocation: Invocation| {
                let make = || Arc::new(worker::Context::new(&config, &services.aws(), &sealer));
                let context = lock(&contexts).entry(invocation.environment).or_insert_with(make).clone();
                Box::pin(async move {
                    let response = worker::handle(&context, invocation.event).await.map_err(|error| error.context())?;
                    Ok(serde_json::to_value(response).expect("JSON"))
                })
            })
        };
        let limit = schema::WORKER_TIMEOUT;
        services.lambda.add(Function { name: "worker", timeout: limit, reserved: None, handler });
        let no_handler: Handler = Arc::new(|_| unreachable!("the API is called directly"));
        let api = Function { name: "start", timeout: Duration::from_secs(29), reserved: None, handler: no_handler };
        services.lambda.add(api);
        services.map_worker("worker", 5);
        services.lambda.schedule("worker", Duration::from_secs(60), json!({}));
        let router = start::router(start::Context::new(&config, &services.aws(), &sealer));
        for number in 0..10 {
            let request = http::Request::post("/api/v1/app-conversations").header("content-type", "application/json");
            let caller = Caller(UserId::new(format!("user-{}", number % 3)));
            let request = request.extension(caller).body(axum::body::Body::from("{}")).expect("a request");
            let response = services.lambda.run("start", |_| router.clone().oneshot(request)).await;
            assert_eq!(response.expect("an end").expect("a response").status(), 200);
        }
        sleep(Duration::from_secs(600)).await;
        let tasks = services.dynamodb.items("start-tasks");
        let ended = tasks.iter().filter(|task| task.to_string().contains(r#"{"S":"ERROR"}"#)).count();
        assert_eq!(ended, 10, "{tasks:?}");
        assert_eq!((services.lambda.panics(), services.lambda.usage()["worker"].errors), (Vec::new(), 0));
        assert_eq!(services.lambda.usage()["start"].invocations, 10);
    });
}

#[test]
fn uploads_are_completed_or_aborted() {
    simulate(SEED, &Faults::none(), async |services| {
        let s3 = services.aws().s3;
        let start = async || {
            let started = s3.create_multipart_upload().bucket("data").key("exports/zip").send().await;
            started.expect("an upload").upload_id.expect("an id")
        };
        let part = async |upload: &str, number: i32, size: usize| {
            let part = s3.upload_part().bucket("data").key("exports/zip").upload_id(upload).part_number(number);
            let sent = part.body(vec![b'x'; size].into()).send().await.expect("a part");
            CompletedPart::builder()
                .part_number(number)
                .set_e_tag(sent.e_tag)
                .set_checksum_crc32(sent.checksum_crc32)
                .build()
        };
        let complete = async |upload: &str, parts: &[CompletedPart]| {
            let parts = CompletedMultipartUpload::builder().set_parts(Some(parts.to_vec())).build();
            let complete = s3.complete_multipart_upload().bucket("data").key("exports/zip").upload_id(upload);
            complete.multipart_upload(parts).send().await.map_err(|error| error.code().map(ToOwned::to_owned))
        };
        let upload = start().await;
        let parts = [part(&upload, 1, 5 << 20).await, part(&upload, 2, 10).await];
        complete(&upload, &parts).await.expect("an object");
        assert_eq!(services.s3.objects("data")["exports/zip"].len(), (5 << 20) + 10);
        assert_eq!(complete(&upload, &parts).await.expect_err("no upload").as_deref(), Some("NoSuchUpload"));
        let upload = start().await;
        let small = [part(&upload, 1, 10).await, part(&upload, 2, 10).await];
        assert_eq!(complete(&upload, &small).await.expect_err("too small").as_deref(), Some("EntityTooSmall"));
        assert_eq!(services.s3.uploads().len(), 1);
        let abort = s3.abort_multipart_upload().bucket("data").key("exports/zip").upload_id(&upload);
        abort.send().await.expect("an abort");
        assert!(services.s3.uploads().is_empty());
        // Objects below the prefix of the rule are removed.
        sleep(Duration::from_secs(2 * 24 * 3600)).await;
        assert!(services.s3.objects("data").is_empty());
    });
}

#[test]
fn an_upload_may_fail_with_status_200() {
    let faults = Faults { failed: 0.5, ..Faults::none() };
    simulate(SEED, &faults, async |services| {
        let s3 = services.aws().s3;
        let mut completed = 0;
        for number in 0..30 {
            let key = format!("{number}");
            let Ok(upload) = s3.create_multipart_upload().bucket("data").key(&key).send().await else { continue };
            let upload = upload.upload_id.expect("an id");
            let part = s3.upload_part().bucket("data").key(&key).upload_id(&upload).part_number(1);
            let Ok(part) = part.body(b"x".to_vec().into()).send().await else { continue };
            let part = CompletedPart::builder().part_number(1).set_e_tag(part.e_tag).build();
            let complete = s3.complete_multipart_upload().bucket("data").key(&key).upload_id(&upload);
            let parts = CompletedMultipartUpload::builder().parts(part).build();
            let is_completed = complete.multipart_upload(parts).send().await.is_ok();
            // The SDK reads the error in the body.
            assert_eq!(is_completed, services.s3.objects("data").contains_key(&key));
            completed += i32::from(is_completed);
        }
        assert!(completed > 5 && services.s3.happened()["error_with_status_200"] > 0, "{completed}");
    });
}

/// Prints what calls cost. `cargo test --test sim -- --ignored --nocapture cost_of_calls`
#[test]
#[ignore = "it measures"]
fn cost_of_calls() {
    const COUNT: u32 = 2000;
    let all = [("no faults", Faults::none()), ("usual", Faults::usual()), ("hostile", Faults::hostile())];
    for (name, faults) in all {
        simulate_with(Detail::Sizes, SEED, &faults, async |services| {
            let aws = services.aws();
            let user = |number: u32| format!("user-{}", number % 50);
            let id = |number: u32| format!("{number:06}");
            let began = std::time::Instant::now();
            for number in 0..COUNT {
                let mut item = listed(&user(number), &id(number), &id(number));
                item.insert("body".to_owned(), s("x".repeat(800)));
                let _may_fail = aws.dynamodb.put_item().table_name(CONVERSATIONS).set_item(Some(item)).send().await;
            }
            println!("{name}: put {:?}", began.elapsed() / COUNT);
            let began = std::time::Instant::now();
            for number in 0..COUNT {
                let get = aws.dynamodb.get_item().table_name(CONVERSATIONS).consistent_read(true);
                let _may_fail = get.set_key(Some(key(&user(number), &id(number)))).send().await;
            }
            println!("{name}: get {:?}", began.elapsed() / COUNT);
            let began = std::time::Instant::now();
            for number in 0..COUNT {
                let update = aws.dynamodb.update_item().table_name(CONVERSATIONS);
                let update = update.set_key(Some(key(&user(number), &id(number))));
                let update = update.update_expression("SET n = :n").condition_expression("attribute_exists(id)");
                let _may_fail = update.expression_attribute_values(":n", s("x")).send().await;
            }
            println!("{name}: update {:?}", began.elapsed() / COUNT);
            let began = std::time::Instant::now();
            for number in 0..COUNT {
                let query = aws.dynamodb.query().table_name(CONVERSATIONS).index_name("by-created").limit(5);
                let query = query.key_condition_expression("#list = :list").expression_attribute_names("#list", "list");
                let _may_fail = query.expression_attribute_values(":list", s(user(number))).send().await;
            }
            println!("{name}: query of an index {:?}", began.elapsed() / COUNT);
            let began = std::time::Instant::now();
            for number in 0..COUNT {
                let send =
                    aws.sqs.send_message().queue_url(url("jobs")).message_body("a").message_group_id(user(number));
                let _may_fail = send.send().await;
            }
            println!("{name}: send {:?}", began.elapsed() / COUNT);
            let began = std::time::Instant::now();
            for _ in 0..100 {
                std::hint::black_box(services.aws());
            }
            println!("{name}: clients {:?}", began.elapsed() / 100);
        });
    }
    let engine = local::engines::InMemoryDynamoDb::new().expect("an engine");
    let table = json!({
        "TableName": "plain", "BillingMode": "PAY_PER_REQUEST",
        "KeySchema": [{ "AttributeName": "user", "KeyType": "HASH" }, { "AttributeName": "id", "KeyType": "RANGE" }],
        "AttributeDefinitions": [
            { "AttributeName": "user", "AttributeType": "S" }, { "AttributeName": "id", "AttributeType": "S" },
        ],
    });
    engine.execute("CreateTable", &table).expect("a table");
    let key = |number: u32| json!({ "user": { "S": "u" }, "id": { "S": number.to_string() } });
    let began = std::time::Instant::now();
    for number in 0..COUNT {
        let mut item = key(number);
        item["body"] = json!({ "S": "x".repeat(800) });
        let body = json!({ "TableName": "plain", "Item": item, "ReturnConsumedCapacity": "TOTAL" });
        engine.execute("PutItem", &body).expect("a put");
    }
    println!("embedded engine: put {:?}", began.elapsed() / COUNT);
    let began = std::time::Instant::now();
    for number in 0..COUNT {
        let body = json!({ "TableName": "plain", "Key": key(number), "ConsistentRead": true });
        engine.execute("GetItem", &body).expect("a get");
    }
    println!("embedded engine: get {:?}", began.elapsed() / COUNT);
}
