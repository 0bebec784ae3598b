//! The tokens of git providers as a whole: reads the body of `POST /api/v1/secrets/git-providers`, and replaces the stored tokens.

use serde_json::{Map, Value, json};

use super::changes::{read_host, read_token};
use super::{MAX_TEXT, SettingsDocument, TOKENS};
use crate::error::{Error, Result};
use crate::http::pydantic::validation::{self, Checked, Checker, Fields};
use crate::http::secret::MASK;
use crate::user::git::ProviderType;
use crate::user::settings::ProviderToken;

/// What a request sends about one provider.
#[derive(Debug)]
struct GivenToken {
    provider: ProviderType,
    /// In its normal form; `None` keeps the stored token.
    token: Option<String>,
    host: Option<String>,
    user_id: Option<String>,
}

/// The git providers of a request. They replace all stored ones.
#[derive(Debug)]
pub struct GitProvidersChange(Vec<GivenToken>);

impl GitProvidersChange {
    /// Reads `{"provider_tokens": {provider: {token?, host?, user_id?}}}`. Without `provider_tokens` there are none.
    ///
    /// # Errors
    /// Every violation; none contains a token.
    pub fn read(body: &Value) -> Checked<Self> {
        let mut check = Checker::new("body");
        let read = Self::read_object(&mut check, body);
        check.finish(read)
    }

    fn read_object(check: &mut Checker, body: &Value) -> Option<Self> {
        if !body.is_object() {
            // The text may contain a token.
            Fields::of(check, &Value::from(MASK))?;
        }
        let entries = match body.get(TOKENS) {
            None => return Some(Self(Vec::new())),
            Some(Value::Object(entries)) => entries,
            Some(_) => {
                check.within(TOKENS, |check| {
                    check.report("dict_type", "Input should be a valid dictionary", MASK.into(), None);
                });
                return None;
            }
        };
        let mut given = Vec::new();
        check.within(TOKENS, |check| {
            for (name, value) in entries {
                check.within(name.clone(), |check| {
                    let provider = check.within("[key]", |check| {
                        validation::choice::<ProviderType>(check, &Value::from(name.as_str()))
                    });
                    given.extend(provider.and_then(|provider| read_entry(check, provider, value)));
                });
            }
        });
        Some(Self(given))
    }

    /// The new tokens in the request, each with its host. The caller checks them before it stores the change.
    #[must_use]
    pub fn new_tokens(&self) -> Vec<(ProviderType, ProviderToken)> {
        let new = self.0.iter().filter_map(|given| {
            let token = Some(given.token.as_deref()?.into());
            Some((given.provider, ProviderToken { token, host: given.host.clone(), user_id: None }))
        });
        new.collect()
    }
}

fn read_entry(check: &mut Checker, provider: ProviderType, value: &Value) -> Option<GivenToken> {
    let Value::Object(fields) = value else {
        let text = "Input should be a valid dictionary or object to extract fields from";
        check.report("model_attributes_type", text, MASK.into(), None);
        return None;
    };
    let field = |name: &str| fields.get(name).unwrap_or(&Value::Null);
    let token = check.within("token", |check| read_token(check, field("token")));
    let host = check.within("host", |check| read_host(check, provider, field("host")));
    let user_id = check.within("user_id", |check| match field("user_id") {
        Value::Null => None,
        value => validation::string_up_to(MAX_TEXT, check, value),
    });
    let text = |value: Option<Value>| value.and_then(|value| value.as_str().map(str::to_owned));
    Some(GivenToken { provider, token: text(token), host: text(host), user_id })
}

impl SettingsDocument {
    /// Replaces the git providers. A provider without a new token keeps its stored one, which stays bound to its host; one that has
    /// no token at all is not stored.
    ///
    /// # Errors
    /// [`Error::Refused`] when a stored token would get another host.
    pub fn replace_git_providers(&mut self, change: &GitProvidersChange) -> Result<()> {
        let stored = self.part(TOKENS);
        let mut tokens = Map::new();
        for given in &change.0 {
            let name = given.provider.as_str();
            let before = stored.get(name);
            let token = match &given.token {
                Some(token) => Value::from(token.as_str()),
                None => {
                    let Some(before) = before.filter(|before| before["token"].as_str().is_some_and(|t| !t.is_empty()))
                    else {
                        continue;
                    };
                    if before["host"].as_str().unwrap_or_default() != given.host.as_deref().unwrap_or_default() {
                        return Err(Error::Refused(format!(
                            "The token of {name} is stored for another host; send the token with the new host"
                        )));
                    }
                    before["token"].clone()
                }
            };
            tokens.insert(name.to_owned(), json!({"token": token, "host": given.host, "user_id": given.user_id}));
        }
        *stored = tokens;
        Ok(())
    }

    /// Removes the tokens of all git providers.
    pub fn remove_git_providers(&mut self) {
        self.part(TOKENS).clear();
    }
}
