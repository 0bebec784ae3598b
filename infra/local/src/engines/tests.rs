//! Tests of the engines through AWS SDK clients.

use std::collections::HashSet;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aws_config::SdkConfig;
use aws_sdk_dynamodb::error::ProvideErrorMetadata;
use aws_sdk_dynamodb::operation::put_item::PutItemError;
use aws_sdk_dynamodb::types as ddb;
use aws_sdk_s3::presigning::PresigningConfig;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use aws_sdk_sqs::types as sqs_types;
use aws_sdk_sqs::types::{MessageSystemAttributeName as System, QueueAttributeName as Attribute};
use tempfile::TempDir;

use super::{EngineError, EnginePorts, Engines, IN_PROCESS_S3};
use crate::access::Origins;

async fn start() -> (TempDir, Engines, SdkConfig) {
    let data = TempDir::new().unwrap();
    let engines = listening(data.path(), EnginePorts::default()).await.unwrap();
    let config = engines.sdk_config().await;
    (data, engines, config)
}

async fn listening(data: &Path, ports: EnginePorts) -> Result<Engines, EngineError> {
    Engines::listening(data, ports, &Origins::new(["https://app.example".to_owned()])).await
}

fn s(value: &str) -> ddb::AttributeValue {
    ddb::AttributeValue::S(value.to_owned())
}

async fn create_table(client: &aws_sdk_dynamodb::Client) {
    let attribute = |name: &str| {
        ddb::AttributeDefinition::builder()
            .attribute_name(name)
            .attribute_type(ddb::ScalarAttributeType::S)
            .build()
            .unwrap()
    };
    let key = |name: &str, kind| ddb::KeySchemaElement::builder().attribute_name(name).key_type(kind).build().unwrap();
    client
        .create_table()
        .table_name("things")
        .attribute_definitions(attribute("user"))
        .attribute_definitions(attribute("id"))
        .key_schema(key("user", ddb::KeyType::Hash))
        .key_schema(key("id", ddb::KeyType::Range))
        .billing_mode(ddb::BillingMode::PayPerRequest)
        .send()
        .await
        .unwrap();
}

#[tokio::test]
async fn dynamodb_keeps_its_records_after_a_restart() {
    let (data, engines, config) = start().await;
    let client = aws_sdk_dynamodb::Client::new(&config);
    create_table(&client).await;
    let put = |id: &str| client.put_item().table_name("things").item("user", s("u")).item("id", s(id));
    put("a").send().await.unwrap();
    let again = put("a").condition_expression("attribute_not_exists(id)").send().await.unwrap_err();
    assert!(again.into_service_error().is_conditional_check_failed_exception());

    let write = |id: &str, condition: &str| {
        let put = ddb::Put::builder()
            .table_name("things")
            .item("user", s("u"))
            .item("id", s(id))
            .condition_expression(condition)
            .build()
            .unwrap();
        ddb::TransactWriteItem::builder().put(put).build()
    };
    let refused = client
        .transact_write_items()
        .transact_items(write("b", "attribute_not_exists(id)"))
        .transact_items(write("a", "attribute_not_exists(id)"))
        .send()
        .await
        .unwrap_err()
        .into_service_error();
    let aws_sdk_dynamodb::operation::transact_write_items::TransactWriteItemsError::TransactionCanceledException(
        cancelled,
    ) = refused
    else {
        panic!("{refused:?}")
    };
    let codes: Vec<_> = cancelled.cancellation_reasons().iter().map(|reason| reason.code().unwrap()).collect();
    assert_eq!(codes, ["None", "ConditionalCheckFailed"]);
    client
        .transact_write_items()
        .transact_items(write("b", "attribute_not_exists(id)"))
        .transact_items(write("c", "attribute_not_exists(id)"))
        .send()
        .await
        .unwrap();

    let credentials = engines.credentials.clone();
    engines.shutdown().await;
    assert!(!data.path().join("dynamodb.sqlite-wal").exists(), "the log is merged into the file");

    let engines = listening(data.path(), EnginePorts::default()).await.unwrap();
    assert_eq!(engines.credentials.secret_access_key, credentials.secret_access_key);
    let client = aws_sdk_dynamodb::Client::new(&engines.sdk_config().await);
    let query = client
        .query()
        .table_name("things")
        .key_condition_expression("#u = :u")
        .expression_attribute_names("#u", "user")
        .expression_attribute_values(":u", s("u"))
        .send()
        .await
        .unwrap();
    let ids: Vec<_> = query.items().iter().map(|item| item["id"].as_s().unwrap().as_str()).collect();
    assert_eq!(ids, ["a", "b", "c"]);
    engines.shutdown().await;
}

#[tokio::test]
async fn s3_puts_gets_and_refuses() {
    let (_data, engines, config) = start().await;
    let client = aws_sdk_s3::Client::new(&config);
    client.create_bucket().bucket("files").send().await.unwrap();
    let again = client.create_bucket().bucket("files").send().await.unwrap_err().into_service_error();
    assert!(again.is_bucket_already_owned_by_you(), "{again:?}");
    engines.ensure_bucket("files").unwrap();
    engines.ensure_bucket("others").unwrap();
    assert!(matches!(engines.ensure_bucket("No/Bucket"), Err(EngineError::BucketName { .. })));

    let put = |bucket: &str, key: &str| {
        client.put_object().bucket(bucket).key(key).body(b"hello".to_vec().into()).content_type("text/plain")
    };
    put("files", "dir/a.txt").metadata("kind", "test").send().await.unwrap();
    let got = client.get_object().bucket("files").key("dir/a.txt").send().await.unwrap();
    assert_eq!(got.content_type(), Some("text/plain"));
    assert_eq!(got.metadata().unwrap()["kind"], "test");
    assert_eq!(got.body.collect().await.unwrap().to_vec(), b"hello");

    let exists = put("files", "dir/a.txt").if_none_match("*").send().await.unwrap_err();
    assert_eq!(exists.code(), Some("PreconditionFailed"));
    let no_bucket = put("nowhere", "a").send().await.unwrap_err();
    assert_eq!(no_bucket.code(), Some("NoSuchBucket"));
    for key in ["dir", "other"] {
        let missing = client.get_object().bucket("files").key(key).send().await.unwrap_err().into_service_error();
        assert!(missing.is_no_such_key(), "{key}: {missing:?}");
        let missing = client.head_object().bucket("files").key(key).send().await.unwrap_err().into_service_error();
        assert!(missing.is_not_found(), "{key}: {missing:?}");
    }
    // Whether or not a client resolves dots in a path, no request reaches another bucket.
    assert!(put("files", "../others/x").send().await.is_err());
    assert_eq!(client.list_objects_v2().bucket("others").send().await.unwrap().contents().len(), 0);

    put("files", &"k".repeat(140)).send().await.unwrap();
    let long = put("files", &"k".repeat(200)).send().await.unwrap_err();
    assert_eq!(long.code(), Some("KeyTooLongError"));

    client.delete_object().bucket("files").key("dir/a.txt").send().await.unwrap();
    client.delete_object().bucket("files").key("dir/a.txt").send().await.unwrap();
    client.delete_object().bucket("files").key("k".repeat(140)).send().await.unwrap();
    let left: Vec<_> = std::fs::read_dir(engines.buckets.as_path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "only the buckets are left: {left:?}");
    engines.shutdown().await;
}

#[tokio::test]
async fn s3_multipart_replaces_an_object_whole() {
    let (_data, engines, config) = start().await;
    engines.ensure_bucket("files").unwrap();
    let client = aws_sdk_s3::Client::new(&config);
    let at = |key: &str| (key.to_owned(), "files".to_owned());
    let (key, bucket) = at("big.zip");
    client.put_object().bucket(&bucket).key(&key).body(b"small".to_vec().into()).send().await.unwrap();

    let upload = client
        .create_multipart_upload()
        .bucket(&bucket)
        .key(&key)
        .content_type("application/zip")
        .send()
        .await
        .unwrap();
    let id = upload.upload_id().unwrap();
    let parts = [vec![1_u8; 5 * 1024 * 1024], vec![2_u8; 1000]];
    let mut done = CompletedMultipartUpload::builder();
    for (number, part) in (1..).zip(&parts) {
        let sent = client
            .upload_part()
            .bucket(&bucket)
            .key(&key)
            .upload_id(id)
            .part_number(number)
            .body(part.clone().into())
            .send()
            .await
            .unwrap();
        done = done.parts(CompletedPart::builder().part_number(number).set_e_tag(sent.e_tag).build());
    }
    client
        .complete_multipart_upload()
        .bucket(&bucket)
        .key(&key)
        .upload_id(id)
        .multipart_upload(done.build())
        .send()
        .await
        .unwrap();
    let got = client.get_object().bucket(&bucket).key(&key).send().await.unwrap();
    assert_eq!(got.content_type(), Some("application/zip"));
    // The SDK verifies the checksum if the response has one.
    assert_eq!(got.body.collect().await.unwrap().to_vec(), parts.concat());
    let range = client.get_object().bucket(&bucket).key(&key).range("bytes=5242878-5242881").send().await.unwrap();
    assert_eq!(range.body.collect().await.unwrap().to_vec(), [1, 1, 2, 2]);
    engines.shutdown().await;
}

#[tokio::test]
async fn s3_presigned_links_work_in_browsers() {
    let (_data, engines, config) = start().await;
    engines.ensure_bucket("files").unwrap();
    let client = aws_sdk_s3::Client::new(&config);
    let web = reqwest::Client::new();
    let soon = || PresigningConfig::expires_in(Duration::from_secs(60)).unwrap();

    let put = client.put_object().bucket("files").key("up load.bin").presigned(soon()).await.unwrap();
    let upload = || {
        let request = web.put(put.uri()).body("bytes");
        put.headers().fold(request, |request, (name, value)| request.header(name, value))
    };
    // Web pages may only read.
    assert_eq!(upload().header("origin", "https://app.example").send().await.unwrap().status(), 403);
    let response = upload().send().await.unwrap();
    assert_eq!(response.status(), 200, "{}", response.text().await.unwrap());

    let get = client
        .get_object()
        .bucket("files")
        .key("up load.bin")
        .response_content_disposition("attachment; filename=\"x.zip\"")
        .response_content_type("application/zip")
        .presigned(soon())
        .await
        .unwrap();
    let response = web.get(get.uri()).header("origin", "https://app.example").send().await.unwrap();
    assert_eq!(response.status(), 200);
    let header = |name: &str| response.headers()[name].to_str().unwrap().to_lowercase();
    assert_eq!(header("content-disposition"), "attachment; filename=\"x.zip\"");
    assert_eq!(header("content-type"), "application/zip");
    assert_eq!(header("content-length"), "5");
    assert_eq!(header("access-control-allow-origin"), "https://app.example");
    for exposed in ["etag", "content-length", "content-disposition"] {
        assert!(header("access-control-expose-headers").contains(exposed));
    }
    assert_eq!(response.text().await.unwrap(), "bytes");

    let (before, signature) = get.uri().split_once("X-Amz-Signature=").unwrap();
    let digit = if signature.starts_with('0') { '1' } else { '0' };
    let forged = format!("{before}X-Amz-Signature={digit}{}", &signature[1..]);
    assert_eq!(web.get(forged).send().await.unwrap().status(), 403);
    assert_eq!(web.get(format!("{}/files/up%20load.bin", engines.s3)).send().await.unwrap().status(), 403);

    let brief = PresigningConfig::expires_in(Duration::from_secs(1)).unwrap();
    let expired = client.get_object().bucket("files").key("up load.bin").presigned(brief).await.unwrap();
    tokio::time::sleep(Duration::from_millis(2100)).await;
    assert_eq!(web.get(expired.uri()).send().await.unwrap().status(), 403);

    let preflight = |method: &str, origin: &str| {
        web.request(reqwest::Method::OPTIONS, get.uri())
            .header("origin", origin.to_owned())
            .header("access-control-request-method", method.to_owned())
            .header("access-control-request-headers", "range")
            .send()
    };
    let answer = preflight("GET", "https://app.example").await.unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["access-control-allow-origin"], "https://app.example");
    assert_eq!(answer.headers()["access-control-allow-methods"], "GET,HEAD");
    // The requested headers are listed: for requests with credentials, browsers read `*` as the name of a header.
    assert_eq!(answer.headers()["access-control-allow-headers"], "range");
    for origin in ["https://evil.example", "null"] {
        assert_eq!(preflight("GET", origin).await.unwrap().status(), 403, "{origin}");
        assert_eq!(web.get(get.uri()).header("origin", origin).send().await.unwrap().status(), 403, "{origin}");
    }
    engines.shutdown().await;
}

/// A queue, with the operations that tests use.
struct Queue {
    client: aws_sdk_sqs::Client,
    url: String,
}

impl Queue {
    async fn new(config: &SdkConfig, name: &str, attributes: &[(Attribute, &str)]) -> Self {
        let client = aws_sdk_sqs::Client::new(config);
        let mut create = client.create_queue().queue_name(name);
        for (name, value) in attributes {
            create = create.attributes(name.clone(), *value);
        }
        let url = create.send().await.unwrap().queue_url.unwrap();
        Self { client, url }
    }

    async fn send(&self, body: &str) {
        self.client.send_message().queue_url(&self.url).message_body(body).send().await.unwrap();
    }

    async fn receive(&self, wait: i32) -> Vec<sqs_types::Message> {
        self.client
            .receive_message()
            .queue_url(&self.url)
            .wait_time_seconds(wait)
            .max_number_of_messages(10)
            .message_system_attribute_names(System::All)
            .send()
            .await
            .unwrap()
            .messages
            .unwrap_or_default()
    }

    async fn delete(&self, handle: &str) {
        self.client.delete_message().queue_url(&self.url).receipt_handle(handle).send().await.unwrap();
    }

    async fn attribute(&self, name: Attribute) -> String {
        let got = self.client.get_queue_attributes().queue_url(&self.url).attribute_names(Attribute::All).send().await;
        got.unwrap().attributes.unwrap()[&name].clone()
    }

    /// The numbers of visible messages, messages in flight and delayed messages.
    async fn counts(&self) -> [String; 3] {
        [
            self.attribute(Attribute::ApproximateNumberOfMessages).await,
            self.attribute(Attribute::ApproximateNumberOfMessagesNotVisible).await,
            self.attribute(Attribute::ApproximateNumberOfMessagesDelayed).await,
        ]
    }
}

fn handle(message: &sqs_types::Message) -> &str {
    message.receipt_handle().unwrap()
}

fn receive_count(message: &sqs_types::Message) -> &str {
    &message.attributes().unwrap()[&System::ApproximateReceiveCount]
}

#[tokio::test]
async fn sqs_hides_delays_and_deletes() {
    let (_data, engines, config) = start().await;
    let queue = Queue::new(&config, "q", &[(Attribute::VisibilityTimeout, "1")]).await;

    let send = queue.client.send_message().queue_url(&queue.url);
    send.message_body("late").delay_seconds(1).send().await.unwrap();
    assert_eq!(queue.counts().await, ["0", "0", "1"]);
    assert!(queue.receive(0).await.is_empty());
    let started = Instant::now();
    let first = queue.receive(5).await;
    assert!(started.elapsed() < Duration::from_secs(2));
    assert_eq!((first[0].body().unwrap(), receive_count(&first[0])), ("late", "1"));
    assert_eq!(queue.counts().await, ["0", "1", "0"]);

    // The message becomes visible again, and the earlier handle no longer deletes it.
    let second = queue.receive(5).await;
    assert_eq!(receive_count(&second[0]), "2");
    let times =
        |message: &sqs_types::Message| message.attributes().unwrap()[&System::ApproximateFirstReceiveTimestamp].clone();
    assert_eq!(times(&first[0]), times(&second[0]));
    queue.delete(handle(&first[0])).await;
    assert_eq!(queue.counts().await, ["0", "1", "0"]);
    queue.delete(handle(&second[0])).await;
    queue.delete(handle(&second[0])).await;
    assert_eq!(queue.counts().await, ["0", "0", "0"]);
    let malformed = queue.client.delete_message().queue_url(&queue.url).receipt_handle("x").send().await;
    assert!(malformed.unwrap_err().into_service_error().is_receipt_handle_is_invalid());

    // After its visibility timeout a message can still be deleted, unless it was received again.
    queue.send("slow").await;
    let slow = queue.receive(0).await;
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(queue.counts().await, ["1", "0", "0"]);
    queue.delete(handle(&slow[0])).await;
    assert_eq!(queue.counts().await, ["0", "0", "0"]);

    // With a visibility timeout of zero, one receive returns a message once.
    queue.send("peek").await;
    let peek = || queue.client.receive_message().queue_url(&queue.url).visibility_timeout(0).max_number_of_messages(10);
    assert_eq!(peek().send().await.unwrap().messages().len(), 1);
    assert_eq!(peek().send().await.unwrap().messages().len(), 1);
    queue.client.purge_queue().queue_url(&queue.url).send().await.unwrap();
    assert_eq!(queue.counts().await, ["0", "0", "0"]);
    engines.shutdown().await;
}

#[tokio::test]
async fn sqs_wakes_a_waiting_receive() {
    let (_data, engines, config) = start().await;
    let queue = Queue::new(&config, "q", &[]).await;
    let started = Instant::now();
    let (received, ()) = tokio::join!(queue.receive(20), async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        queue.send("now").await;
    });
    assert_eq!(received[0].body(), Some("now"));
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    assert!(queue.receive(1).await.is_empty());

    // A waiting receive returns a hidden message at the time when it becomes visible.
    queue.delete(handle(&received[0])).await;
    queue.send("again").await;
    let receive = queue.client.receive_message().queue_url(&queue.url);
    assert_eq!(receive.visibility_timeout(1).send().await.unwrap().messages().len(), 1);
    let again = queue.receive(20).await;
    assert_eq!(receive_count(&again[0]), "2");
    assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());

    // The engines' shutdown ends the wait.
    let started = Instant::now();
    let waiting = tokio::spawn(queue.client.receive_message().queue_url(&queue.url).wait_time_seconds(20).send());
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!waiting.is_finished());
    engines.shutdown().await;
    assert!(waiting.await.unwrap().unwrap().messages().is_empty());
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
}

#[tokio::test]
async fn sqs_accepts_batches_of_messages() {
    let (_data, engines, config) = start().await;
    let queue = Queue::new(&config, "q", &[]).await;
    let entry = |id: &str, body: &str| {
        sqs_types::SendMessageBatchRequestEntry::builder().id(id).message_body(body).build().unwrap()
    };
    let batch = || queue.client.send_message_batch().queue_url(&queue.url);
    let sent = batch().entries(entry("a", "one")).entries(entry("b", "\u{1}")).entries(entry("c", "three")).send();
    let sent = sent.await.unwrap();
    assert_eq!((sent.successful().len(), sent.failed().len()), (2, 1));
    assert_eq!((sent.failed()[0].id(), sent.failed()[0].code()), ("b", "InvalidMessageContents"));
    let twice = batch().entries(entry("a", "1")).entries(entry("a", "2")).send().await.unwrap_err();
    assert!(twice.into_service_error().is_batch_entry_ids_not_distinct());
    let invalid = batch().entries(entry("a b", "1")).send().await.unwrap_err();
    assert!(invalid.into_service_error().is_invalid_batch_entry_id());
    let group = |id: &str, group: &str| {
        let entry = sqs_types::SendMessageBatchRequestEntry::builder().id(id).message_body("grouped");
        entry.message_group_id(group).build().unwrap()
    };
    let groups = batch().entries(group("a", &"x".repeat(128))).entries(group("b", &"x".repeat(129))).send();
    let groups = groups.await.unwrap();
    assert_eq!((groups.successful()[0].id(), groups.failed()[0].id()), ("a", "b"));
    let empty = batch().set_entries(Some(Vec::new())).send().await.unwrap_err();
    assert!(empty.into_service_error().is_empty_batch_request());
    let many = (0..11).map(|n| entry(&n.to_string(), "x")).collect();
    let many = batch().set_entries(Some(many)).send().await.unwrap_err();
    assert_eq!(many.code(), Some("AWS.SimpleQueueService.TooManyEntriesInBatchRequest"));
    let half = "x".repeat(600 * 1024);
    let long = batch().entries(entry("a", &half)).entries(entry("b", &half)).send().await.unwrap_err();
    assert!(long.into_service_error().is_batch_request_too_long());
    let received = queue.receive(0).await;
    let bodies: Vec<_> = received.iter().map(|message| message.body().unwrap()).collect();
    assert_eq!(bodies, ["one", "three", "grouped"]);
    engines.shutdown().await;
}

#[tokio::test]
async fn sqs_moves_messages_to_the_dead_letter_queue() {
    let (_data, engines, config) = start().await;
    let dead = Queue::new(&config, "dead", &[]).await;
    let target = dead.attribute(Attribute::QueueArn).await;
    let policy = format!(r#"{{"deadLetterTargetArn":"{target}","maxReceiveCount":"2"}}"#);
    let attributes = [(Attribute::RedrivePolicy, policy.as_str()), (Attribute::VisibilityTimeout, "0")];
    let queue = Queue::new(&config, "q", &attributes).await;
    queue.send("poison").await;
    for count in ["1", "2"] {
        let got = queue.receive(0).await;
        assert_eq!(receive_count(&got[0]), count);
        assert_eq!(dead.counts().await, ["0", "0", "0"]);
    }
    // The next receive moves the message instead, which wakes a waiting receive on the dead-letter queue.
    let (nothing, letters) = tokio::join!(queue.receive(0), dead.receive(5));
    assert!(nothing.is_empty());
    assert_eq!((letters[0].body().unwrap(), receive_count(&letters[0])), ("poison", "1"));
    let source = &letters[0].attributes().unwrap()[&System::DeadLetterQueueSourceArn];
    assert_eq!(*source, queue.attribute(Attribute::QueueArn).await);
    assert_eq!(queue.counts().await, ["0", "0", "0"]);

    let nowhere = r#"{"deadLetterTargetArn":"arn:aws:sqs:us-east-1:000000000000:none","maxReceiveCount":2}"#;
    let set = queue.client.set_queue_attributes().queue_url(&queue.url).attributes(Attribute::RedrivePolicy, nowhere);
    assert_eq!(set.send().await.unwrap_err().code(), Some("InvalidParameterValue"));
    engines.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sqs_delivers_each_message_to_one_of_many_receivers() {
    let (_data, engines, config) = start().await;
    let queue = Queue::new(&config, "q", &[]).await;
    let receivers: Vec<_> = (0..50)
        .map(|_| {
            let receive = queue.client.receive_message().queue_url(&queue.url).wait_time_seconds(10);
            tokio::spawn(async move { receive.send().await.unwrap().messages.unwrap_or_default() })
        })
        .collect();
    for n in 0..50 {
        queue.send(&n.to_string()).await;
    }
    let mut seen = HashSet::new();
    for receiver in receivers {
        for message in receiver.await.unwrap() {
            assert!(seen.insert(message.body.unwrap()));
        }
    }
    assert_eq!(seen.len(), 50);
    engines.shutdown().await;
}

#[tokio::test]
async fn sqs_returns_typed_errors() {
    let (_data, engines, config) = start().await;
    let queue = Queue::new(&config, "q", &[(Attribute::VisibilityTimeout, "60")]).await;
    let client = &queue.client;
    let create =
        |timeout: &str| client.create_queue().queue_name("q").attributes(Attribute::VisibilityTimeout, timeout);
    assert_eq!(create("60").send().await.unwrap().queue_url(), Some(queue.url.as_str()));
    assert!(create("61").send().await.unwrap_err().into_service_error().is_queue_name_exists());
    assert!(create("x").send().await.unwrap_err().into_service_error().is_invalid_attribute_value());
    let unsupported = client.create_queue().queue_name("r").attributes(Attribute::DelaySeconds, "1").send().await;
    assert!(unsupported.unwrap_err().into_service_error().is_invalid_attribute_name());

    let full = "x".repeat(1024 * 1024);
    queue.send(&full).await;
    let long = client.send_message().queue_url(&queue.url).message_body(full + "x").send().await.unwrap_err();
    assert_eq!(long.code(), Some("InvalidParameterValue"));
    assert!(long.message().unwrap().contains("1048576"), "{:?}", long.message());

    let url = queue.url.replace("/q", "/none");
    let missing = client.send_message().queue_url(url).message_body("x").send().await.unwrap_err();
    assert!(missing.into_service_error().is_queue_does_not_exist());
    let attribute = sqs_types::MessageAttributeValue::builder().data_type("String").string_value("v").build().unwrap();
    let send = client.send_message().queue_url(&queue.url).message_body("x").message_attributes("name", attribute);
    let unsupported = send.send().await.unwrap_err();
    assert!(unsupported.message().unwrap().contains("does not support message attributes"));
    let fifo = client.create_queue().queue_name("q.fifo").send().await.unwrap_err();
    assert_eq!(fifo.code(), Some("InvalidParameterValue"));
    let unsupported = client.list_queues().send().await.unwrap_err();
    assert!(unsupported.message().unwrap().contains("does not support AmazonSQS.ListQueues"), "{unsupported:?}");
    engines.shutdown().await;
}

#[tokio::test]
async fn clients_reach_engines_without_ports() {
    let data = TempDir::new().unwrap();
    let engines = Engines::in_process(data.path(), IN_PROCESS_S3).await.unwrap();
    let config = engines.sdk_config().await;
    let dynamodb = aws_sdk_dynamodb::Client::new(&config);
    create_table(&dynamodb).await;
    let item = |id: &str| dynamodb.put_item().table_name("things").item("user", s("u")).item("id", s(id));
    item("a").item("note", s("first")).send().await.unwrap();

    // Errors have the SDK's types, and their fields are set.
    let refused = item("a")
        .condition_expression("attribute_not_exists(id)")
        .return_values_on_condition_check_failure(ddb::ReturnValuesOnConditionCheckFailure::AllOld)
        .send()
        .await
        .unwrap_err()
        .into_service_error();
    let PutItemError::ConditionalCheckFailedException(failed) = refused else { panic!("{refused:?}") };
    assert_eq!(failed.item().unwrap()["note"], s("first"));
    let missing =
        dynamodb.get_item().table_name("none").key("user", s("u")).key("id", s("a")).send().await.unwrap_err();
    assert!(missing.into_service_error().is_resource_not_found_exception());
    for invalid in [item("b").condition_expression("size("), item("b").item("empty", ddb::AttributeValue::Ss(vec![]))] {
        let invalid = invalid.send().await.unwrap_err();
        assert_eq!(invalid.code(), Some("ValidationException"), "{invalid:?}");
        assert!(invalid.message().is_some_and(|text| !text.contains("VALIDATION") && !text.contains("at line")));
    }
    let unknown = dynamodb.list_backups().send().await.unwrap_err();
    assert_eq!(unknown.code(), Some("UnknownOperationException"));
    let too_large = item("b").item("note", s(&"x".repeat(400 * 1024))).send().await.unwrap_err();
    assert_eq!(too_large.code(), Some("ValidationException"));

    let s3 = aws_sdk_s3::Client::from_conf(aws_sdk_s3::config::Builder::from(&config).force_path_style(true).build());
    engines.ensure_bucket("files").unwrap();
    let large = vec![7_u8; 3 * 1024 * 1024];
    s3.put_object().bucket("files").key("dir/large object").body(large.clone().into()).send().await.unwrap();
    let got = s3.get_object().bucket("files").key("dir/large object").range("bytes=1-2097152").send().await.unwrap();
    assert_eq!(got.content_length(), Some(2_097_152));
    assert_eq!(got.body.collect().await.unwrap().to_vec(), &large[1..=2_097_152]);
    let none = s3.get_object().bucket("files").key("none").send().await.unwrap_err().into_service_error();
    assert!(none.is_no_such_key());

    let queue = Queue::new(&config, "q", &[]).await;
    let waiting = tokio::spawn({
        let receive = queue.client.receive_message().queue_url(&queue.url).wait_time_seconds(20);
        async move { receive.send().await.unwrap().messages.unwrap_or_default().len() }
    });
    tokio::task::yield_now().await;
    queue.send("hello").await;
    assert_eq!(waiting.await.unwrap(), 1);
    // A waiting receive returns when the engines stop.
    let waiting = tokio::spawn({
        let receive = queue.client.receive_message().queue_url(&queue.url).wait_time_seconds(20);
        async move { receive.send().await.unwrap().messages.unwrap_or_default().len() }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;

    engines.shutdown().await;
    assert_eq!(waiting.await.unwrap(), 0);
    // Requests of clients that outlive the engines fail.
    let closed = item("c").send().await.unwrap_err();
    assert!(closed.raw_response().is_some_and(|response| response.status().as_u16() == 503), "{closed:?}");
    let again = Engines::in_process(data.path(), IN_PROCESS_S3).await.unwrap();
    let dynamodb = aws_sdk_dynamodb::Client::new(&again.sdk_config().await);
    let kept = dynamodb.get_item().table_name("things").key("user", s("u")).key("id", s("a")).send().await.unwrap();
    assert_eq!(kept.item().unwrap()["note"], s("first"));
    again.shutdown().await;
}

#[tokio::test]
async fn a_client_in_process_reaches_no_other_host() {
    let data = TempDir::new().unwrap();
    let engines = Engines::in_process(data.path(), IN_PROCESS_S3).await.unwrap();
    let config = aws_sdk_dynamodb::config::Builder::from(&engines.sdk_config().await);
    let elsewhere = aws_sdk_dynamodb::Client::from_conf(config.endpoint_url("http://127.0.0.1:1").build());
    let failed = elsewhere.list_tables().send().await.unwrap_err();
    assert!(format!("{failed:?}").contains("no engine of this process"), "{failed:?}");
    engines.shutdown().await;
}

/// Each of many concurrent requests gets its own response, even if other callers cancel theirs.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn calls_at_the_same_time_do_not_mix() {
    let data = TempDir::new().unwrap();
    let engines = Engines::in_process(data.path(), IN_PROCESS_S3).await.unwrap();
    let client = aws_sdk_dynamodb::Client::new(&engines.sdk_config().await);
    create_table(&client).await;
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..64 {
        let client = client.clone();
        tasks.spawn(async move {
            let id = number.to_string();
            let put = client.put_item().table_name("things").item("user", s("u")).item("id", s(&id)).send();
            if number % 4 == 0 {
                // Either outcome is valid: cancelled or executed.
                let _cancelled = tokio::time::timeout(Duration::from_micros(1), put).await;
                return;
            }
            put.await.unwrap();
            let key = client.get_item().table_name("things").key("user", s("u")).key("id", s(&id));
            assert_eq!(key.send().await.unwrap().item().unwrap()["id"], s(&id));
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    engines.shutdown().await;
}

async fn refused(data: &Path, ports: EnginePorts) -> String {
    listening(data, ports).await.unwrap_err().to_string()
}

#[tokio::test]
async fn engines_report_why_they_cannot_start() {
    let (data, engines, _) = start().await;
    let text = refused(data.path(), EnginePorts::default()).await;
    assert!(text.contains(data.path().to_str().unwrap()) && text.contains("in use by another process"), "{text}");

    let other = TempDir::new().unwrap();
    let used_port: u16 = engines.sqs.rsplit(':').next().unwrap().parse().unwrap();
    let text = refused(other.path(), EnginePorts { sqs: used_port, ..EnginePorts::default() }).await;
    assert!(text.contains(&format!("Port {used_port} on 127.0.0.1 cannot be opened for SQS")), "{text}");

    // The folder and the ports are free after a shutdown, and soon after a drop.
    engines.shutdown().await;
    let ports = EnginePorts { sqs: used_port, ..EnginePorts::default() };
    let engines = listening(data.path(), ports).await.unwrap();
    assert_eq!(engines.sqs, format!("http://127.0.0.1:{used_port}"));
    assert!(engines.environment().contains(&("AWS_ENDPOINT_URL_SQS".to_owned(), engines.sqs.clone())));
    drop(engines);
    listening(data.path(), EnginePorts::default()).await.unwrap().shutdown().await;

    let file = data.path().join("dynamodb.sqlite");
    let locker = rusqlite::Connection::open(&file).unwrap();
    locker.execute_batch("BEGIN EXCLUSIVE").unwrap();
    let text = refused(data.path(), EnginePorts::default()).await;
    assert!(text.contains(file.to_str().unwrap()) && text.contains("another program has it locked"), "{text}");
    drop(locker);

    std::fs::write(&file, vec![7; 8192]).unwrap();
    let text = refused(data.path(), EnginePorts::default()).await;
    assert!(text.contains(file.to_str().unwrap()) && text.contains("damaged"), "{text}");

    std::fs::write(other.path().join("engine-credentials.json"), "{}").unwrap();
    let text = refused(other.path(), EnginePorts::default()).await;
    assert!(text.contains("engine-credentials.json does not contain"), "{text}");

    let inside = other.path().join("engine-credentials.json/data");
    let text = refused(&inside, EnginePorts::default()).await;
    assert!(text.contains(inside.to_str().unwrap()) && text.contains("cannot be used"), "{text}");
}

/// The files and folders below the folder to which other users than the owner have access.
fn open_to_others(folder: &Path) -> Vec<(PathBuf, u32)> {
    let (mut found, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap().map(Result::unwrap) {
            let metadata = entry.metadata().unwrap();
            let mode = metadata.permissions().mode() & 0o777;
            if mode & 0o077 != 0 {
                found.push((entry.path(), mode));
            }
            if metadata.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    found
}

#[tokio::test]
async fn the_engines_files_are_private_to_the_owner() {
    let data = TempDir::new().unwrap();
    let engines = Engines::in_process(data.path(), IN_PROCESS_S3).await.unwrap();
    assert!(!format!("{engines:?}").contains(&engines.credentials.secret_access_key));
    let config = engines.sdk_config().await;
    create_table(&aws_sdk_dynamodb::Client::new(&config)).await;
    engines.ensure_bucket("files").unwrap();
    let s3 = aws_sdk_s3::Client::from_conf(aws_sdk_s3::config::Builder::from(&config).force_path_style(true).build());
    let put = s3.put_object().bucket("files").key("a b/c/d.txt").content_type("text/plain");
    put.body(b"hello".to_vec().into()).send().await.unwrap();
    for finished in [true, false] {
        let upload = s3.create_multipart_upload().bucket("files").key("parts/x.zip").send().await.unwrap();
        let part = s3.upload_part().bucket("files").key("parts/x.zip").upload_id(upload.upload_id().unwrap());
        let part = part.part_number(1).body(vec![0_u8; 1024].into()).send().await.unwrap();
        if finished {
            let part = CompletedPart::builder().part_number(1).set_e_tag(part.e_tag).build();
            let parts = CompletedMultipartUpload::builder().parts(part).build();
            let complete = s3.complete_multipart_upload().bucket("files").key("parts/x.zip");
            complete.set_upload_id(upload.upload_id).multipart_upload(parts).send().await.unwrap();
        }
    }
    let names: Vec<_> = std::fs::read_dir(data.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.iter().any(|name| name == "dynamodb.sqlite-wal"), "{names:?}");
    assert_eq!(open_to_others(data.path()), []);
    engines.shutdown().await;

    // Files that an earlier version or another program has made readable for all users.
    let make_open = |path: &Path, mode| std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    make_open(data.path(), 0o755);
    for path in ["dynamodb.sqlite", "engine-credentials.json", "engines.lock", "s3/files/a b/c/d.txt"] {
        make_open(&data.path().join(path), 0o644);
    }
    for path in ["s3", "s3/files", "s3/files/a b"] {
        make_open(&data.path().join(path), 0o755);
    }
    Engines::in_process(data.path(), IN_PROCESS_S3).await.unwrap().shutdown().await;
    assert_eq!(open_to_others(data.path()), []);
    assert_eq!(std::fs::metadata(data.path()).unwrap().permissions().mode() & 0o777, 0o700);
}
