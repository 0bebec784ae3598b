//! Serves the secrets of a sandbox's owner to the agents in the sandbox.

use axum::Json;
use axum::extract::{Path, State};
use axum::response::{IntoResponse as _, Response};
use http::HeaderMap;
use http::header::CONTENT_TYPE;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Serialize;
use shared::error::{Error, Result};
use shared::http::secret::SecretNameOut;
use shared::sandbox::session_key;
use shared::user::settings::Settings;

use crate::Context;

/// The names of the secrets that an agent can use.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = SecretNames))]
pub struct SecretNamesOut {
    secrets: Vec<SecretNameOut>,
}

pub(crate) async fn list(
    State(context): State<Context>,
    Path(sandbox): Path<String>,
    headers: HeaderMap,
) -> Result<Json<SecretNamesOut>> {
    let settings = context.settings_of_owner(&sandbox, &headers).await?;
    let secrets = secrets(&settings)
        .into_iter()
        .map(|secret| SecretNameOut { name: secret.name, description: secret.description })
        .collect();
    Ok(Json(SecretNamesOut { secrets }))
}

pub(crate) async fn value(
    State(context): State<Context>,
    Path((sandbox, name)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Response> {
    let settings = context.settings_of_owner(&sandbox, &headers).await?;
    let secret = secrets(&settings).into_iter().find(|secret| secret.name == name);
    let secret = secret.ok_or_else(|| Error::NotFound("Secret not found".to_owned()))?;
    let value = secret.value.expose_secret();
    if value.is_empty() {
        return Err(Error::NotFound("Secret has no value".to_owned()));
    }
    Ok(([(CONTENT_TYPE, "text/plain; charset=utf-8")], value.to_owned()).into_response())
}

struct Secret<'a> {
    name: String,
    description: Option<String>,
    value: &'a SecretString,
}

/// Lists custom secrets before provider tokens, so that a custom secret takes precedence over a token of the same name.
fn secrets(settings: &Settings) -> Vec<Secret<'_>> {
    let custom = settings.custom_secrets.iter().map(|(name, secret)| Secret {
        name: name.clone(),
        description: secret.description.clone(),
        value: &secret.secret,
    });
    let tokens = settings.provider_tokens.0.iter().filter_map(|(provider, token)| {
        let value = token.token.as_ref().filter(|token| !token.expose_secret().is_empty())?;
        let provider = provider.as_str();
        Some(Secret {
            name: format!("{provider}_token"),
            description: Some(format!("{provider} provider token")),
            value,
        })
    });
    custom.chain(tokens).collect()
}

impl Context {
    /// Reads the settings of the sandbox's owner, if the request sends the sandbox's session key.
    async fn settings_of_owner(&self, sandbox: &str, headers: &HeaderMap) -> Result<Settings> {
        let record = session_key::sandbox_of_request(&self.records, headers).await?;
        if record.id != sandbox {
            return Err(Error::Forbidden("Session API key does not match sandbox".to_owned()));
        }
        Ok(self.settings.get(&record.user).await?.unwrap_or_default())
    }
}
