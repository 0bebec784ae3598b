//! `cargo local recount`: computes a user's counters again from the rows.

use std::path::Path;

use shared::dynamo::Table;
use shared::stores::Stores;
use shared::user::counters::{Counter, Recount};

use crate::options::TargetOptions;
use crate::target::{Target, TargetError};

/// Why the command failed. Each message is a sentence.
#[derive(Debug, thiserror::Error)]
pub enum RecountError {
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The store failed.
    #[error("{}", .0.context())]
    Store(#[from] shared::Error),
}

/// Replaces the user's counters by the numbers of rows. Returns the text to print.
///
/// # Errors
/// See [`RecountError`].
pub async fn run(options: &TargetOptions, data: &Path) -> Result<String, RecountError> {
    let user = options.owner()?;
    let target = Target::open(options, data).await?;
    let stores = Stores::without_key(&target.names, &target.aws);
    let mut recount = Recount::default();
    let counted = async {
        stores.conversations().recount(&user, &mut recount).await?;
        stores.start_tasks_without_secrets().recount(&user, &mut recount).await?;
        recount.store(&Table::new(target.aws.dynamodb.clone(), target.names.users.clone()), &user).await
    };
    let counted = counted.await;
    target.close().await;
    counted?;
    Ok(format!(
        "{} conversations, {} of them top-level; {} starts, {} of them unfinished\n",
        recount.sum(Counter::Conversations),
        recount.sum(Counter::TopLevelConversations),
        recount.sum(Counter::StartTasks),
        recount.sum(Counter::UnfinishedStarts),
    ))
}
