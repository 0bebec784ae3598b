//! The REQUEST authorizer of the REST API: who calls. It answers with the user's id, which the other functions read from the
//! request context, or with nothing but a refusal.

pub mod tokens;

use std::collections::HashMap;

use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use serde_json::{Value, json};
use shared::config::AuthorizerConfig;
use shared::user::UserId;
use shared::user::api_key::ApiKeyStore;

use crate::tokens::{Clock, Tokens};

/// Headers that credentials come in; the first one that is there decides.
const CREDENTIALS: [&str; 3] = ["authorization", "x-access-token", "x-session-api-key"];
/// No credential of ours is longer; API gateways take 10 KB of headers.
const MAX_CREDENTIAL: usize = 8 * 1024;

/// Why a request does not go on. The texts of the first is what API Gateway answers 401 for.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// No credentials, or none that hold.
    #[error("Unauthorized")]
    Unauthorized,
    /// Whether they hold cannot be found out now.
    #[error("the credentials could not be checked")]
    Unknown(#[source] shared::Error),
}

/// What API Gateway sends.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Request {
    method_arn: String,
    #[serde(default)]
    headers: Option<HashMap<String, String>>,
}

/// Finds out who calls.
#[derive(Debug)]
pub struct Authorizer {
    keys: ApiKeyStore,
    tokens: Option<Tokens>,
}

impl Authorizer {
    /// An authorizer that takes API keys and, where an issuer is configured, its tokens.
    #[must_use]
    pub fn new(config: &AuthorizerConfig, keys: ApiKeyStore) -> Self {
        Self { keys, tokens: config.oidc.clone().map(Tokens::new) }
    }

    /// The same with another clock for how old an issuer's keys are.
    #[must_use]
    pub fn with_clock(config: &AuthorizerConfig, keys: ApiKeyStore, clock: Clock) -> Self {
        Self { keys, tokens: config.oidc.clone().map(|oidc| Tokens::with_clock(oidc, clock)) }
    }

    /// Answers an event of a REQUEST authorizer with a policy that allows the request, and the caller's `user_id` as context.
    ///
    /// # Errors
    /// See [`Refusal`]; also for an event that is none.
    pub async fn handle(&self, event: Value) -> Result<Value, Refusal> {
        let request: Request =
            serde_json::from_value(event).map_err(|error| Refusal::Unknown(shared::Error::internal(error)))?;
        let Some(credential) = credential(request.headers.unwrap_or_default()) else {
            return Err(Refusal::Unauthorized);
        };
        let Some(user) = self.user(&credential).await? else { return Err(Refusal::Unauthorized) };
        Ok(json!({
            "principalId": user,
            "policyDocument": {
                "Version": "2012-10-17",
                "Statement": [{"Action": "execute-api:Invoke", "Effect": "Allow", "Resource": request.method_arn}],
            },
            "context": {"user_id": user},
        }))
    }

    async fn user(&self, credential: &SecretString) -> Result<Option<UserId>, Refusal> {
        let text = credential.expose_secret();
        let user = if ApiKeyStore::looks_like_one(text) {
            self.keys.owner(credential).await.map_err(Refusal::Unknown)?
        } else if let Some(tokens) = &self.tokens {
            tokens.user(text).await.map_err(Refusal::Unknown)?
        } else {
            None
        };
        // The single user of local servers is nobody here.
        Ok(user.filter(|user| user.shown().is_some()))
    }
}

/// The first of the headers that is there, without `Bearer`.
fn credential(headers: HashMap<String, String>) -> Option<SecretString> {
    let headers: HashMap<String, String> =
        headers.into_iter().map(|(name, value)| (name.to_ascii_lowercase(), value)).collect();
    let (name, value) = CREDENTIALS.iter().find_map(|name| Some((*name, headers.get(*name)?)))?;
    let value = match name {
        "authorization" => {
            let (scheme, token) = value.trim().split_once(' ')?;
            if !scheme.eq_ignore_ascii_case("bearer") {
                return None;
            }
            token
        }
        _ => value,
    };
    let value = value.trim();
    (!value.is_empty() && value.len() <= MAX_CREDENTIAL).then(|| value.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_credential_decides() {
        let found = |headers: &[(&str, &str)]| {
            let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            credential(headers).map(|credential| credential.expose_secret().to_owned())
        };
        for (headers, expected) in [
            (vec![], None),
            (vec![("Authorization", "Bearer one")], Some("one")),
            (vec![("authorization", "bearer  one ")], Some("one")),
            (vec![("Authorization", "Basic b25lOnR3bw==")], None),
            (vec![("Authorization", "one")], None),
            (vec![("Authorization", "Bearer ")], None),
            (vec![("Authorization", "Bearer one"), ("X-Session-API-Key", "two")], Some("one")),
            // One that is no credential does not let another one in.
            (vec![("Authorization", "Basic x"), ("X-Session-API-Key", "two")], None),
            (vec![("x-access-token", "one"), ("x-session-api-key", "two")], Some("one")),
            (vec![("X-Session-API-Key", "two")], Some("two")),
            (vec![("X-Session-API-Key", " ")], None),
            (vec![("Cookie", "session=one")], None),
        ] {
            assert_eq!(found(&headers).as_deref(), expected, "{headers:?}");
        }
        assert_eq!(found(&[("x-access-token", &"x".repeat(MAX_CREDENTIAL + 1))]), None);
    }
}
