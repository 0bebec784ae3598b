//! `/api/v1/secrets/git-providers`: the tokens of all git providers as a whole.

use axum::extract::State;
use axum::routing::post;
use axum::{Json, Router};
use serde_json::Value;
use shared::error::{Error, Result};
use shared::http::caller::Caller;
use shared::http::extract::JsonBody;
use shared::http::response::MessageOut;
use shared::user::settings_document::GitProvidersChange;

use crate::Context;

pub(crate) fn router() -> Router<Context> {
    Router::new().route("/api/v1/secrets/git-providers", post(put).delete(remove))
}

/// Stores tokens after their providers have accepted them. Each is sent to its own provider's host only.
async fn put(
    State(context): State<Context>,
    Caller(user): Caller,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<MessageOut>> {
    let change = GitProvidersChange::read(&body).map_err(Error::Invalid)?;
    let new = change.new_tokens();
    // Seven providers at most, of which each has its own time limit.
    let checks = new.iter().map(|(provider, token)| context.tokens.check(*provider, token));
    futures::future::try_join_all(checks).await?;
    context.settings.change(&user, |document| document.replace_git_providers(&change)).await?;
    Ok(MessageOut::json("Git providers stored"))
}

async fn remove(State(context): State<Context>, Caller(user): Caller) -> Result<Json<MessageOut>> {
    let remove = |document: &mut shared::user::settings_document::SettingsDocument| {
        document.remove_git_providers();
        Ok(())
    };
    // Without settings there is nothing to remove, and front ends distinguish settings that were never stored.
    if context.settings.document(&user).await?.is_some() {
        context.settings.change(&user, remove).await?;
    }
    Ok(MessageOut::json("Unset Git provider tokens"))
}
