//! Defines the tables, indexes, bucket and queues. `cargo local` and tests create them from these definitions; a test compares the
//! deployed template with them.

use std::time::Duration;

use aws_sdk_dynamodb::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};
use aws_sdk_dynamodb::types::{
    AttributeDefinition, BillingMode, GlobalSecondaryIndex, KeySchemaElement, KeyType, Projection, ProjectionType,
    ScalarAttributeType,
};
use aws_sdk_sqs::types::QueueAttributeName;
use shared::aws::Aws;
use shared::config::Names;
use shared::jobs::queue::DEAD_LETTER_SUFFIX;
use shared::{conversation, event, pending_message, sandbox, start};

/// The version of the layout: tables, indexes, and the format of items. `cargo local` migrates data folders of older versions; a change of
/// the layout needs a new version and a step to it (`infra/local/src/migration`).
pub const VERSION: u32 = 2;

/// The attributes that an index contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Projected {
    All,
    Keys,
    /// The keys and these attributes.
    KeysAnd(&'static [&'static str]),
}

/// A global secondary index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Index {
    pub name: &'static str,
    /// Rows without this attribute are not in the index.
    pub partition_key: &'static str,
    pub sort_key: Option<&'static str>,
    pub projected: Projected,
}

/// A table. All keys are strings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    /// The name without the prefix of a deployment.
    pub name: &'static str,
    pub partition_key: &'static str,
    pub sort_key: &'static str,
    pub indexes: &'static [Index],
}

const fn index(name: &'static str, partition_key: &'static str, sort_key: &'static str, projected: Projected) -> Index {
    Index { name, partition_key, sort_key: Some(sort_key), projected }
}

pub const TABLES: [Table; 5] = [
    Table {
        name: "conversations",
        partition_key: "user",
        sort_key: "id",
        indexes: &[
            index(
                conversation::store::BY_CREATED,
                conversation::store::LIST,
                conversation::store::CREATED_SORT,
                Projected::KeysAnd(&[conversation::store::SEARCH]),
            ),
            index(
                conversation::store::BY_UPDATED,
                conversation::store::LIST,
                conversation::store::UPDATED_SORT,
                Projected::KeysAnd(&[conversation::store::CREATED, conversation::store::SEARCH]),
            ),
            index(
                conversation::store::BY_SANDBOX,
                conversation::store::SANDBOX_KEY,
                conversation::store::CREATED_SORT,
                Projected::KeysAnd(&[conversation::store::LIST, conversation::store::SEARCH]),
            ),
            index(conversation::store::BY_PARENT, "parent_key", conversation::store::CREATED_SORT, Projected::Keys),
            index(conversation::store::DELETIONS, "deletion_shard", "due_at", Projected::Keys),
        ],
    },
    Table {
        name: "start-tasks",
        partition_key: "user",
        sort_key: "id",
        indexes: &[
            index(start::store::BY_CREATED, "user", "created_sort", Projected::Keys),
            index(start::store::BY_UPDATED, "user", "updated_sort", Projected::KeysAnd(&[start::store::CREATED_AT])),
            index(start::store::BY_CONVERSATION, "conversation_key", "created_sort", Projected::Keys),
            index(start::store::UNFINISHED, "unfinished_shard", "due_at", Projected::Keys),
        ],
    },
    Table {
        name: "sandboxes",
        partition_key: "user",
        sort_key: "id",
        indexes: &[
            Index {
                name: sandbox::store::BY_SESSION_KEY,
                partition_key: "session_key_hash",
                sort_key: None,
                projected: Projected::All,
            },
            index(sandbox::store::BY_CREATED, "user", "created_at", Projected::All),
            index(sandbox::store::DUE, "due_shard", "due_at", Projected::Keys),
        ],
    },
    Table {
        name: "events",
        partition_key: "conversation",
        sort_key: "id",
        indexes: &[
            index(event::store::BY_POSITION, "conversation", "position", Projected::KeysAnd(&[event::store::SIZE])),
            index(event::store::BY_KIND, "conversation", "kind_position", Projected::KeysAnd(&[event::store::SIZE])),
        ],
    },
    Table {
        name: "users",
        partition_key: "user",
        sort_key: "kind",
        indexes: &[index(
            pending_message::store::UNDELIVERED,
            "undelivered_shard",
            "due_at",
            Projected::KeysAnd(&[pending_message::store::CONVERSATION]),
        )],
    },
];

/// A lifecycle rule of the bucket, which removes objects below a prefix. `cargo local` applies it when the server starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expiry {
    /// The prefix of the objects' keys.
    pub prefix: &'static str,
    /// Days after which an object is removed.
    pub days: u32,
    /// Days after which a multipart upload that was not completed is removed.
    pub incomplete_upload_days: u32,
}

/// A removed export is built again by the next request for it.
pub const EXPORTS_EXPIRE: Expiry = Expiry { prefix: shared::export::store::PREFIX, days: 1, incomplete_upload_days: 1 };

/// A queue and its dead-letter queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queue {
    /// The name without the prefix of a deployment.
    pub name: &'static str,
    /// How long a received message stays hidden: six times a worker's time limit, as AWS advises for Lambda.
    pub visibility_timeout: Duration,
    /// The number of deliveries after which a message moves to the dead-letter queue.
    pub max_receive_count: u32,
}

/// The time limit of one worker invocation.
pub const WORKER_TIMEOUT: Duration = Duration::from_secs(150);

/// The time limit of one invocation of the function `exports`: Lambda's longest.
pub const EXPORT_TIMEOUT: Duration = Duration::from_secs(900);

/// The job queue. Its dead-letter queue has the same name with `-dead-letters`.
pub const JOB_QUEUE: Queue =
    Queue { name: "jobs", visibility_timeout: WORKER_TIMEOUT.saturating_mul(6), max_receive_count: 5 };

/// The queue of exports. A message that failed stays hidden for a long time, and clients, which retry every few seconds, enqueue
/// the export again before it is redelivered. Therefore few deliveries are enough.
pub const EXPORT_QUEUE: Queue =
    Queue { name: "exports", visibility_timeout: EXPORT_TIMEOUT.saturating_mul(6), max_receive_count: 3 };

/// A table, the bucket or a queue could not be created.
#[derive(Debug, thiserror::Error)]
#[error("{what} could not be created: {context}")]
pub struct SchemaError {
    what: String,
    context: String,
}

impl SchemaError {
    fn new(what: impl Into<String>, context: impl std::fmt::Display) -> Self {
        Self { what: what.into(), context: context.to_string() }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueUrls {
    pub jobs: String,
    pub dead_letters: String,
    pub exports: String,
    pub export_dead_letters: String,
}

/// Creates missing tables, the bucket and queues. Existing tables keep their rows.
///
/// # Errors
/// States what could not be created and why. A table that lacks an index, because an older version created it, is an error as well.
pub async fn make_all(aws: &Aws, names: &Names, prefix: &str) -> Result<QueueUrls, SchemaError> {
    for table in &TABLES {
        make_table(aws, table, &format!("{prefix}{}", table.name)).await?;
    }
    make_bucket(aws, &names.bucket).await?;
    let (jobs, dead_letters) = make_queue(aws, prefix, &JOB_QUEUE).await?;
    let (exports, export_dead_letters) = make_queue(aws, prefix, &EXPORT_QUEUE).await?;
    Ok(QueueUrls { jobs, dead_letters, exports, export_dead_letters })
}

fn known<E: ProvideErrorMetadata, R>(error: &SdkError<E, R>, codes: &[&str]) -> bool {
    error.as_service_error().and_then(ProvideErrorMetadata::code).is_some_and(|code| codes.contains(&code))
}

async fn make_table(aws: &Aws, table: &Table, name: &str) -> Result<(), SchemaError> {
    let failed = |error: &dyn std::fmt::Display| SchemaError::new(format!("table {name}"), error);
    let mut attributes: Vec<&str> = vec![table.partition_key, table.sort_key];
    for index in table.indexes {
        attributes.push(index.partition_key);
        attributes.extend(index.sort_key);
    }
    attributes.sort_unstable();
    attributes.dedup();
    let attributes: Vec<AttributeDefinition> = attributes
        .into_iter()
        .map(|name| AttributeDefinition::builder().attribute_name(name).attribute_type(ScalarAttributeType::S).build())
        .collect::<Result<_, _>>()
        .map_err(|error| failed(&error))?;
    let keys = key_schema(table.partition_key, Some(table.sort_key)).map_err(|error| failed(&error))?;
    let indexes: Vec<GlobalSecondaryIndex> = table
        .indexes
        .iter()
        .map(|index| {
            let projection = Projection::builder()
                .projection_type(match index.projected {
                    Projected::All => ProjectionType::All,
                    Projected::Keys => ProjectionType::KeysOnly,
                    Projected::KeysAnd(_) => ProjectionType::Include,
                })
                .set_non_key_attributes(match index.projected {
                    Projected::KeysAnd(attributes) => Some(attributes.iter().map(|name| (*name).to_owned()).collect()),
                    Projected::All | Projected::Keys => None,
                })
                .build();
            GlobalSecondaryIndex::builder()
                .index_name(index.name)
                .set_key_schema(Some(key_schema(index.partition_key, index.sort_key)?))
                .projection(projection)
                .build()
        })
        .collect::<Result<_, _>>()
        .map_err(|error| failed(&error))?;
    let made = aws
        .dynamodb
        .create_table()
        .table_name(name)
        .billing_mode(BillingMode::PayPerRequest)
        .set_attribute_definitions(Some(attributes))
        .set_key_schema(Some(keys))
        .set_global_secondary_indexes((!indexes.is_empty()).then_some(indexes))
        .send()
        .await;
    match made {
        Err(error) if known(&error, &["ResourceInUseException"]) => check_indexes(aws, table, name).await,
        Err(error) => Err(failed(&DisplayErrorContext(&error))),
        Ok(_) => Ok(()),
    }
}

/// Checks that an existing table has all indexes: reads of a missing index fail, and an index that is added now would lack the rows
/// without its attributes. A data folder has been migrated before.
async fn check_indexes(aws: &Aws, table: &Table, name: &str) -> Result<(), SchemaError> {
    let failed = |error: &dyn std::fmt::Display| SchemaError::new(format!("table {name}"), error);
    let described = aws.dynamodb.describe_table().table_name(name).send().await;
    let described = described.map_err(|error| failed(&DisplayErrorContext(&error)))?;
    let indexes = described.table.and_then(|table| table.global_secondary_indexes).unwrap_or_default();
    let is_there = |wanted: &Index| indexes.iter().any(|index| index.index_name.as_deref() == Some(wanted.name));
    match table.indexes.iter().find(|index| !is_there(index)) {
        Some(missing) => Err(failed(&format!(
            "it lacks the index {}, because another version of this program created it; restore a backup or use another data folder",
            missing.name
        ))),
        None => Ok(()),
    }
}

fn key_schema(
    partition_key: &str,
    sort_key: Option<&str>,
) -> Result<Vec<KeySchemaElement>, aws_sdk_dynamodb::error::BuildError> {
    let element = |name: &str, kind| KeySchemaElement::builder().attribute_name(name).key_type(kind).build();
    let mut keys = vec![element(partition_key, KeyType::Hash)?];
    if let Some(sort_key) = sort_key {
        keys.push(element(sort_key, KeyType::Range)?);
    }
    Ok(keys)
}

async fn make_bucket(aws: &Aws, name: &str) -> Result<(), SchemaError> {
    if aws.s3.head_bucket().bucket(name).send().await.is_ok() {
        return Ok(());
    }
    let made = aws.s3.create_bucket().bucket(name).send().await;
    match made {
        Err(error) if !known(&error, &["BucketAlreadyOwnedByYou"]) => {
            Err(SchemaError::new(format!("bucket {name}"), DisplayErrorContext(&error)))
        }
        _ => Ok(()),
    }
}

/// Creates a queue and its dead-letter queue, and returns their URLs.
async fn make_queue(aws: &Aws, prefix: &str, queue: &Queue) -> Result<(String, String), SchemaError> {
    let name = format!("{prefix}{}", queue.name);
    let dead_name = format!("{name}{DEAD_LETTER_SUFFIX}");
    let hidden = queue.visibility_timeout.as_secs().to_string();
    let make = async |name: &str, redrive: Option<String>| {
        let made = aws
            .sqs
            .create_queue()
            .queue_name(name)
            .attributes(QueueAttributeName::VisibilityTimeout, &hidden)
            .set_attributes(redrive.map(|policy| {
                [(QueueAttributeName::VisibilityTimeout, hidden.clone()), (QueueAttributeName::RedrivePolicy, policy)]
                    .into()
            }))
            .send()
            .await
            .map_err(|error| SchemaError::new(format!("queue {name}"), DisplayErrorContext(&error)))?;
        made.queue_url.ok_or_else(|| SchemaError::new(format!("queue {name}"), "it has no URL"))
    };
    let dead_letters = make(&dead_name, None).await?;
    let attributes = aws
        .sqs
        .get_queue_attributes()
        .queue_url(&dead_letters)
        .attribute_names(QueueAttributeName::QueueArn)
        .send()
        .await
        .map_err(|error| SchemaError::new(format!("queue {dead_name}"), DisplayErrorContext(&error)))?;
    let arn = attributes
        .attributes
        .and_then(|mut attributes| attributes.remove(&QueueAttributeName::QueueArn))
        .ok_or_else(|| SchemaError::new(format!("queue {dead_name}"), "it has no ARN"))?;
    let redrive = format!(r#"{{"deadLetterTargetArn":"{arn}","maxReceiveCount":{}}}"#, queue.max_receive_count);
    Ok((make(&name, Some(redrive)).await?, dead_letters))
}
