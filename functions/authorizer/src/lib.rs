//! The REQUEST authorizer of the REST API. It authenticates the caller and returns the user's id, which the other functions read from the
//! request context, or rejects the request.

pub mod tokens;

use std::collections::HashMap;

use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use serde_json::{Value, json};
use shared::config::AuthorizerConfig;
use shared::user::UserId;
use shared::user::api_key::ApiKeyStore;

use crate::tokens::{Clock, Tokens};

/// The headers that carry credentials; the first one that is present decides.
const CREDENTIALS: [&str; 3] = ["authorization", "x-access-token", "x-session-api-key"];
/// The longest credential, in bytes: no valid one is longer. API Gateway accepts 10 KB of headers.
const MAX_CREDENTIAL: usize = 8 * 1024;

/// Why a request is rejected. API Gateway returns 401 for the text of the first variant only.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The request has no credentials, or invalid ones.
    #[error("Unauthorized")]
    Unauthorized,
    /// The credentials could not be checked.
    #[error("the credentials could not be checked")]
    Unknown(#[source] shared::Error),
}

/// The event that API Gateway sends.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Request {
    method_arn: String,
    #[serde(default)]
    headers: Option<HashMap<String, String>>,
}

/// Authenticates callers.
#[derive(Debug)]
pub struct Authorizer {
    keys: ApiKeyStore,
    tokens: Option<Tokens>,
}

impl Authorizer {
    /// An authorizer that accepts API keys and, if an issuer is configured, its tokens.
    #[must_use]
    pub fn new(config: &AuthorizerConfig, keys: ApiKeyStore) -> Self {
        Self { keys, tokens: config.oidc.clone().map(Tokens::new) }
    }

    /// The same with another clock, which determines the age of the issuer's keys.
    #[must_use]
    pub fn with_clock(config: &AuthorizerConfig, keys: ApiKeyStore, clock: Clock) -> Self {
        Self { keys, tokens: config.oidc.clone().map(|oidc| Tokens::with_clock(oidc, clock)) }
    }

    /// Handles an event of a REQUEST authorizer. Returns a policy that allows the request, with the caller's `user_id` as context.
    ///
    /// # Errors
    /// See [`Refusal`]; [`Refusal::Unknown`] for a malformed event.
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
        // The id of the single user of local servers is not valid here.
        Ok(user.filter(|user| user.shown().is_some()))
    }
}

/// Returns the credential of the first header that is present, without `Bearer`.
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
            // An invalid credential does not fall back to the next header.
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
