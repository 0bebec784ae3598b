//! A user's settings and secrets: one sealed record.

use std::collections::BTreeMap;
use std::time::Duration;

use aws_sdk_dynamodb::Client;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::UserId;
use super::agent_profiles::{AgentProfiles, LaunchProfile};
use super::git;
use super::llm::Llm;
use super::llm_profiles::LlmProfiles;
use super::mcp::{self, McpServers};
use super::seal::Sealer;
use super::settings_document::SettingsDocument;
use crate::dynamo::{Backoff, Condition, Item, Table, store_error, text, unless_written};
use crate::error::{Error, Result};
use crate::http::pydantic::validation::{Loc, wire_enum};
use crate::user::git::ProviderType;

wire_enum! {
    /// How a start chooses among the user's running sandboxes.
    #[derive(Default)]
    pub enum SandboxGroupingStrategy {
        /// A sandbox of its own for every conversation.
        #[default]
        NoGrouping = "NO_GROUPING",
        /// The sandbox that was made last.
        GroupByNewest = "GROUP_BY_NEWEST",
        /// The sandbox in which nothing was started for the longest time.
        LeastRecentlyUsed = "LEAST_RECENTLY_USED",
        /// The sandbox with the fewest conversations.
        FewestConversations = "FEWEST_CONVERSATIONS",
        /// The first that is not full.
        AddToAny = "ADD_TO_ANY",
    }
}

/// A user's settings, in the contract's shape (`settings-auth`): fields that a start does not use are kept as they came.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// The model that agents use unless a start names another.
    pub llm_model: Option<String>,
    /// Its key.
    pub llm_api_key: Option<SecretString>,
    /// Where it is served.
    pub llm_base_url: Option<String>,
    /// The whole configuration of the model, the three fields above included.
    #[serde(skip)]
    pub llm: Llm,
    /// The user's LLM profiles.
    #[serde(skip)]
    pub llm_profiles: LlmProfiles,
    /// The user's agent profiles.
    #[serde(skip)]
    pub agent_profiles: AgentProfiles,
    /// The agent profile of a start, see [`Settings::with_agent_profile`].
    #[serde(skip)]
    pub agent_profile: Option<LaunchProfile>,
    /// How often an agent may call its model in a conversation.
    pub max_iterations: Option<i64>,
    /// Whether a conversation's history is condensed.
    pub enable_default_condenser: Option<bool>,
    /// The settings of the condenser that have no flat name.
    #[serde(skip)]
    pub condenser: Map<String, Value>,
    /// Whether the agent asks before it acts.
    pub confirmation_mode: Option<bool>,
    /// `llm` lets the model judge its own actions' risk.
    pub security_analyzer: Option<String>,
    /// The size at which a conversation's history is condensed.
    pub condenser_max_size: Option<u32>,
    /// Skills that are left out of new conversations.
    pub disabled_skills: Option<Vec<String>>,
    /// Key of the search service.
    pub search_api_key: Option<SecretString>,
    /// MCP servers.
    pub mcp_config: McpServers,
    /// git identity in new sandboxes.
    pub git_user_name: Option<String>,
    /// git identity in new sandboxes.
    pub git_user_email: Option<String>,
    /// How a start chooses its sandbox.
    #[serde(deserialize_with = "null_is_default")]
    pub sandbox_grouping_strategy: SandboxGroupingStrategy,
    /// Tokens of git providers.
    #[serde(deserialize_with = "null_is_default")]
    pub provider_tokens: ProviderTokens,
    /// Secrets that agents may use, by name.
    #[serde(deserialize_with = "null_is_default")]
    pub custom_secrets: BTreeMap<String, CustomSecret>,
}

/// Tokens in the order in which they were given: it is the order in which they are tried.
#[derive(Clone, Debug, Default)]
pub struct ProviderTokens(pub Vec<(ProviderType, ProviderToken)>);

/// A git provider's token.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ProviderToken {
    /// The token; `user:password` for some providers.
    pub token: Option<SecretString>,
    /// Another host than the provider's own.
    pub host: Option<String>,
    /// The user's id there.
    pub user_id: Option<String>,
}

/// A secret that agents may use.
#[derive(Clone, Debug, Deserialize)]
pub struct CustomSecret {
    /// Its value.
    #[serde(alias = "value")]
    pub secret: SecretString,
    /// What it is for.
    #[serde(default)]
    pub description: Option<String>,
}

impl<'de> Deserialize<'de> for ProviderTokens {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let given = serde_json::Map::deserialize(deserializer)?;
        let mut tokens = Vec::new();
        for (name, value) in given {
            // Providers that this version does not know are skipped, as the reference does.
            let Ok(provider) = serde_json::from_value::<ProviderType>(serde_json::Value::String(name)) else {
                continue;
            };
            let mut token: ProviderToken = serde_json::from_value(value).map_err(serde::de::Error::custom)?;
            // Settings files and earlier versions have tokens as they were pasted.
            token.token = token.token.map(|token| match git::normal_token(token.expose_secret()) {
                Ok(normal) => normal.into_owned().into(),
                Err(_) => token,
            });
            tokens.push((provider, token));
        }
        Ok(Self(tokens))
    }
}

fn null_is_default<'de, D: serde::Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

impl Settings {
    /// Reads settings in the contract's JSON shape; tokens and secrets may stand at the top or under `secrets_store`.
    ///
    /// # Errors
    /// Says which field is not as it should be.
    pub fn from_json(json: &str) -> Result<Self, serde_json::Error> {
        SettingsDocument::parse(json)?.into_settings()
    }

    /// The model of a start that names this one, or none. A named model is that of the profile that has it, with its key; without such a
    /// profile the name replaces that of the active profile's model, or else of the settings' model.
    #[must_use]
    pub fn llm_of_start(&self, named: Option<&str>) -> Llm {
        let own = self.llm_profiles.active_llm().map(|llm| llm.clone().with_key_of(&self.llm));
        let own = own.unwrap_or_else(|| self.llm.clone());
        let Some(model) = named.filter(|model| !model.trim().is_empty()) else { return own };
        match self.llm_profiles.with_model(model) {
            Some(llm) => llm.clone().with_key_of(&own),
            None if own.model() == Some(model) => own,
            None => own.with_model(model),
        }
    }
}

const KIND: &str = "settings";
/// How often a change is repeated while other requests change the same settings.
const CHANGE: Backoff = Backoff { first: Duration::from_millis(10), longest: Duration::from_millis(320), attempts: 20 };

/// The settings of all users, sealed.
#[derive(Clone, Debug)]
pub struct SettingsStore {
    table: Table,
    sealer: Sealer,
}

impl SettingsStore {
    /// A store on the `users` table.
    #[must_use]
    pub(crate) fn new(dynamodb: Client, table: String, sealer: Sealer) -> Self {
        Self { table: Table::new(dynamodb, table), sealer }
    }

    /// The user's settings, or `None` when none were ever stored.
    ///
    /// # Errors
    /// [`Error::Store`], or [`Error::Internal`] when they were sealed under another key.
    pub async fn get(&self, user: &UserId) -> Result<Option<Settings>> {
        let Some((json, _)) = self.stored(user).await? else { return Ok(None) };
        Settings::from_json(json.expose_secret()).map(Some).map_err(unreadable)
    }

    /// The user's settings as the document that clients change, or `None` when none were ever stored.
    ///
    /// # Errors
    /// As [`SettingsStore::get`].
    pub async fn document(&self, user: &UserId) -> Result<Option<SettingsDocument>> {
        let Some((json, _)) = self.stored(user).await? else { return Ok(None) };
        SettingsDocument::parse(json.expose_secret()).map(Some).map_err(unreadable)
    }

    /// Changes the user's document, which is empty when none was ever stored. `change` is applied to the document that is stored at the
    /// time of the write, so that concurrent changes lose nothing of each other.
    ///
    /// # Errors
    /// Those of `change`; [`Error::TooLarge`]; [`Error::Store`]; [`Error::Unavailable`] when every attempt met a concurrent change.
    pub async fn change<T>(&self, user: &UserId, change: impl Fn(&mut SettingsDocument) -> Result<T>) -> Result<T> {
        let mut attempts = CHANGE.start();
        while attempts.next().await {
            let stored = self.stored(user).await?;
            let (mut document, before) = match stored {
                Some((json, sealed)) => {
                    (SettingsDocument::parse(json.expose_secret()).map_err(unreadable)?, Some(sealed))
                }
                None => (SettingsDocument::default(), None),
            };
            let done = change(&mut document)?;
            let json = SecretString::from(document.to_json()?);
            // What does not read later must not be written now.
            Settings::from_json(json.expose_secret()).map_err(unreadable)?;
            let sealed = self.sealer.seal(&purpose(user), &json).await?;
            let unchanged = Condition::unchanged("sealed", before.map(text));
            // No two sealed forms are equal: this one is stored only if this call has stored it.
            let is_stored = async || Ok(self.sealed(user).await?.as_ref() == Some(&sealed));
            match self.table.put(item(user, &sealed), unchanged).await {
                Ok(true) => return Ok(done),
                // The SDK repeats a put whose response was lost, and the condition does not hold any more.
                Ok(false) if is_stored().await? => return Ok(done),
                Ok(false) => {}
                Err(error) => return unless_written(Err(error), is_stored).await.map(|()| done),
            }
        }
        Err(Error::Unavailable("Settings were modified concurrently; try again".to_owned()))
    }

    /// Merges settings in the contract's JSON shape into the stored ones: fields that they name are replaced, all others stay.
    ///
    /// # Errors
    /// [`Error::Refused`] when they are not valid settings; those of [`SettingsStore::change`].
    pub async fn lay_over(&self, user: &UserId, json: &SecretString) -> Result<()> {
        check_given(json)?;
        let over = SettingsDocument::parse_given(json.expose_secret()).map_err(unreadable)?;
        self.change(user, |document| {
            document.merge(&over);
            Ok(())
        })
        .await
    }

    /// The document's text and its sealed form.
    async fn stored(&self, user: &UserId) -> Result<Option<(SecretString, String)>> {
        let Some(sealed) = self.sealed(user).await? else { return Ok(None) };
        Ok(Some((self.sealer.open(&purpose(user), &sealed).await?, sealed)))
    }

    async fn sealed(&self, user: &UserId) -> Result<Option<String>> {
        let found = self.table.get(key(user)).await?;
        Ok(found.and_then(|item| item.get("sealed")?.as_s().ok().cloned()))
    }

    /// Stores settings in the contract's JSON shape. The text is sealed and stored unchanged.
    ///
    /// # Errors
    /// [`Error::Refused`] when they are not valid settings; [`Error::Store`].
    pub async fn put(&self, user: &UserId, json: &SecretString) -> Result<()> {
        check_given(json)?;
        let sealed = self.sealer.seal(&purpose(user), json).await?;
        let put = self.table.client.put_item().table_name(&self.table.name).set_item(Some(item(user, &sealed)));
        put.send().await.map_err(store_error("PutItem users"))?;
        Ok(())
    }
}

/// Checks settings that come from a file, MCP servers as strictly as those of requests.
fn check_given(json: &SecretString) -> Result<()> {
    let refused = |text: String| Error::Refused(format!("The settings are not valid: {text}"));
    Settings::from_json(json.expose_secret()).map_err(|error| refused(error.to_string()))?;
    let given: serde_json::Value =
        serde_json::from_str(json.expose_secret()).map_err(|error| refused(error.to_string()))?;
    let Some(servers) = given.get("mcp_config") else { return Ok(()) };
    let Err(violations) = mcp::given(servers) else { return Ok(()) };
    let texts = violations.iter().map(|violation| {
        let step = |step: &Loc| match step {
            Loc::Key(key) => key.clone().into_owned(),
            Loc::Index(index) => index.to_string(),
        };
        let place: Vec<String> = violation.loc.iter().map(step).collect();
        format!("{}: {}", place.join("."), violation.msg)
    });
    Err(refused(texts.collect::<Vec<_>>().join("; ")))
}

/// The error's own text could quote a secret.
fn unreadable(_: serde_json::Error) -> Error {
    Error::internal("stored settings do not read as settings")
}

fn key(user: &UserId) -> Item {
    Item::from([("user".into(), text(user.as_str())), ("kind".into(), text(KIND))])
}

fn item(user: &UserId, sealed: &str) -> Item {
    let mut item = key(user);
    item.insert("sealed".into(), text(sealed));
    item
}

fn purpose(user: &UserId) -> String {
    format!("settings:{user}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_read_in_the_contracts_shape() {
        let settings = Settings::from_json(
            r#"{"llm_model":"openai/x","llm_api_key":"sk-1","language":"en","disabled_skills":null,
                "sandbox_grouping_strategy":"FEWEST_CONVERSATIONS",
                "mcp_config":{"sse_servers":["http://a"],"shttp_servers":[{"url":"http://b","api_key":"k"}]},
                "secrets_store":{"provider_tokens":{"gitlab":{"token":"t1"},"nowhere":{"token":"x"},"github":{"token":"t2","host":"h"}},
                                 "custom_secrets":{"A":{"secret":"s","description":""}}}}"#,
        )
        .expect("settings");
        assert_eq!(settings.sandbox_grouping_strategy, SandboxGroupingStrategy::FewestConversations);
        let providers: Vec<_> = settings.provider_tokens.0.iter().map(|(provider, _)| *provider).collect();
        assert_eq!(providers, [ProviderType::Gitlab, ProviderType::Github]);
        assert_eq!(settings.mcp_config.names().collect::<Vec<_>>(), ["sse", "shttp"]);
        assert!(!format!("{settings:?}").contains("sk-1"));
    }

    #[test]
    fn tokens_that_were_stored_as_pasted_are_read() {
        let settings = Settings::from_json(
            r#"{"provider_tokens": {"github": {"token": " Bearer t1\n"}, "gitlab": {"token": "'t2'"}, "forgejo": {"token": "a\nb"}}}"#,
        )
        .expect("settings");
        let tokens: Vec<&str> = settings
            .provider_tokens
            .0
            .iter()
            .filter_map(|(_, token)| token.token.as_ref().map(ExposeSecret::expose_secret))
            .collect();
        assert_eq!(tokens, ["t1", "t2", "a\nb"]);
    }
}
