//! The configuration of a language model: the fields of the SDK's `LLM`, as clients send them, as they are stored, and as responses show
//! them.

use std::fmt;

use serde_json::{Map, Value, json};

use super::declared::{self, Field, Kind, Preset, Secrets};
use crate::http::pydantic::validation::Checker;
use crate::http::secret::MASK;

/// The largest configuration of a profile, in bytes of its JSON.
pub const MAX_LLM: usize = 16 * 1024;

/// A field that is computed. Clients send it back with the others.
const IS_SUBSCRIPTION: &str = "is_subscription";
/// A field of later versions: a key that profiles share. Clients send null for a profile with a key of its own.
const PROVIDER_CONNECTION: &str = "provider_connection_id";
const SUBSCRIPTION: &str = "subscription";
const MODEL: &str = "model";
const API_KEY: &str = "api_key";
const BASE_URL: &str = "base_url";
const NO_MODEL: &str = "model must be specified in LLM";

/// The fields in the order of app server 1.11, with its defaults (schema `LLM-Output`). The model has no default here.
pub(super) const FIELDS: &[Field] = &[
    Field::optional(MODEL, Kind::Text),
    Field::optional(API_KEY, Kind::Secret),
    Field::with("auth_type", Kind::Choice(&["api_key", SUBSCRIPTION]), Preset::Text("api_key")),
    Field::optional("subscription_vendor", Kind::Choice(&["openai"])),
    Field::optional(BASE_URL, Kind::Text),
    Field::optional("api_version", Kind::Text),
    Field::optional("aws_access_key_id", Kind::Secret),
    Field::optional("aws_secret_access_key", Kind::Secret),
    Field::optional("aws_session_token", Kind::Secret),
    Field::optional("aws_region_name", Kind::Text),
    Field::optional("aws_profile_name", Kind::Text),
    Field::optional("aws_role_name", Kind::Text),
    Field::optional("aws_session_name", Kind::Text),
    Field::optional("aws_bedrock_runtime_endpoint", Kind::Text),
    Field::with("openrouter_site_url", Kind::Text, Preset::Text("https://docs.all-hands.dev/")),
    Field::with("openrouter_app_name", Kind::Text, Preset::Text("OpenHands")),
    Field::with("num_retries", Kind::Integer(0), Preset::Integer(5)),
    Field::with("retry_multiplier", Kind::Number(0.0, f64::MAX), Preset::Number(8.0)),
    Field::with("retry_min_wait", Kind::Integer(0), Preset::Integer(8)),
    Field::with("retry_max_wait", Kind::Integer(0), Preset::Integer(64)),
    Field::nullable("timeout", Kind::Integer(0), Preset::Integer(300)),
    Field::with("max_message_chars", Kind::Integer(1), Preset::Integer(30_000)),
    Field::optional("temperature", Kind::Number(0.0, f64::MAX)),
    Field::optional("top_p", Kind::Number(0.0, 1.0)),
    Field::optional("top_k", Kind::Number(0.0, f64::MAX)),
    Field::optional("max_input_tokens", Kind::Integer(1)),
    Field::optional("max_output_tokens", Kind::Integer(1)),
    Field::optional("model_canonical_name", Kind::Text),
    // Headers often contain credentials.
    Field::optional("extra_headers", Kind::Secrets),
    Field::optional("input_cost_per_token", Kind::Number(0.0, f64::MAX)),
    Field::optional("output_cost_per_token", Kind::Number(0.0, f64::MAX)),
    Field::optional("ollama_base_url", Kind::Text),
    Field::with("stream", Kind::Flag, Preset::Flag(false)),
    Field::with("drop_params", Kind::Flag, Preset::Flag(true)),
    Field::with("modify_params", Kind::Flag, Preset::Flag(true)),
    Field::optional("disable_vision", Kind::Flag),
    Field::nullable("disable_stop_word", Kind::Flag, Preset::Flag(false)),
    Field::with("caching_prompt", Kind::Flag, Preset::Flag(true)),
    Field::with("log_completions", Kind::Flag, Preset::Flag(false)),
    Field::with("log_completions_folder", Kind::Text, Preset::Text("logs/completions")),
    Field::optional("custom_tokenizer", Kind::Text),
    Field::with("native_tool_calling", Kind::Flag, Preset::Flag(true)),
    Field::optional("force_string_serializer", Kind::Flag),
    Field::optional("inline_image_urls", Kind::Flag),
    Field::nullable(
        "reasoning_effort",
        Kind::Choice(&["low", "medium", "high", "xhigh", "none"]),
        Preset::Text("high"),
    ),
    Field::optional("reasoning_summary", Kind::Choice(&["auto", "concise", "detailed"])),
    Field::with("enable_encrypted_reasoning", Kind::Flag, Preset::Flag(true)),
    Field::nullable("prompt_cache_retention", Kind::Text, Preset::Text("24h")),
    Field::nullable("extended_thinking_budget", Kind::Integer(i64::MIN), Preset::Integer(200_000)),
    Field::optional("seed", Kind::Integer(i64::MIN)),
    Field::with("usage_id", Kind::Text, Preset::Text("default")),
    Field::with("litellm_extra_body", Kind::Open, Preset::Object),
];

/// A configuration: the fields that differ from their default. Holds secrets in clear text.
#[derive(Clone, Default, PartialEq)]
pub struct Llm(Map<String, Value>);

/// Shows only the model and the names of the other fields, because these may be secret.
impl fmt::Debug for Llm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Llm").field(MODEL, &self.model()).field("fields", &self.0.keys().collect::<Vec<_>>()).finish()
    }
}

impl Llm {
    /// Reads what is stored. What this version does not accept is left out.
    #[must_use]
    pub fn stored(value: &Map<String, Value>) -> Self {
        let mut fields = declared::sparse(FIELDS, value);
        fields.retain(|name, value| name != MODEL || value.as_str().is_some_and(|model| !model.trim().is_empty()));
        Self(fields)
    }

    /// The fields that differ from their default, secrets in clear text.
    #[must_use]
    pub fn fields(&self) -> &Map<String, Value> {
        &self.0
    }

    /// Consumes the configuration; see [`Llm::fields`].
    #[must_use]
    pub fn into_fields(self) -> Map<String, Value> {
        self.0
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).and_then(Value::as_str).filter(|text| !text.trim().is_empty())
    }

    /// The name of the model, if one is set.
    #[must_use]
    pub fn model(&self) -> Option<&str> {
        self.text(MODEL)
    }

    /// The address that is set.
    #[must_use]
    pub fn base_url(&self) -> Option<&str> {
        self.text(BASE_URL)
    }

    /// The key that is set.
    #[must_use]
    pub fn api_key(&self) -> Option<&str> {
        self.text(API_KEY)
    }

    /// Whether a key is set.
    #[must_use]
    pub fn has_api_key(&self) -> bool {
        self.api_key().is_some()
    }

    /// The address that is set, or else the default of the model's provider.
    #[must_use]
    pub fn resolved_base_url(&self) -> Option<&str> {
        self.base_url().or_else(|| self.model().and_then(default_base_url))
    }

    /// The same configuration with another model. An address that is the default of the former model's provider does not stay for a model
    /// of another provider.
    #[must_use]
    pub fn with_model(&self, model: &str) -> Self {
        let mut other = self.clone();
        other.0.insert(MODEL.to_owned(), model.into());
        other.drop_default_address_of(self.model());
        other
    }

    /// Removes the address where it is only the default of another model's provider.
    pub fn drop_default_address_of(&mut self, model: Option<&str>) {
        let former = model.and_then(default_base_url);
        let now = self.model().and_then(default_base_url);
        if former.is_some() && former != now && self.base_url() == former {
            self.0.shift_remove(BASE_URL);
        }
    }

    /// The same configuration with the key of another one, if it has none itself and both are for the same provider and address. So a
    /// stored key is never sent elsewhere.
    #[must_use]
    pub fn with_key_of(mut self, other: &Self) -> Self {
        let is_same_place =
            provider(self.model()) == provider(other.model()) && self.resolved_base_url() == other.resolved_base_url();
        if let Some(key) = other.0.get(API_KEY).filter(|_| !self.has_api_key() && is_same_place) {
            self.0.insert(API_KEY.to_owned(), key.clone());
        }
        self
    }

    /// Removes every secret.
    pub fn remove_secrets(&mut self) {
        declared::remove_secrets(FIELDS, &mut self.0);
    }

    /// Sets the key to that of another configuration, if that has one.
    pub fn take_key_of(&mut self, other: &Self) {
        if let Some(key) = other.0.get(API_KEY) {
            self.0.insert(API_KEY.to_owned(), key.clone());
        }
    }

    /// This configuration in place of a stored one, whose secrets stay where this one has none.
    #[must_use]
    pub fn in_place_of(&self, stored: Option<&Self>) -> Self {
        Self(declared::replaced(FIELDS, stored.map(|stored| &stored.0), &self.0))
    }

    /// Every field as responses show it.
    #[must_use]
    pub fn shown(&self, secrets: Secrets) -> Map<String, Value> {
        let mut shown = declared::shown(FIELDS, &self.0, secrets);
        let is_subscription = self.text("auth_type") == Some(SUBSCRIPTION);
        shown.insert(IS_SUBSCRIPTION.to_owned(), is_subscription.into());
        shown
    }

    /// The size in bytes of the stored form.
    #[must_use]
    pub fn size(&self) -> usize {
        json!(self.0).to_string().len()
    }
}

/// A checked configuration from a request that replaces a stored one.
#[derive(Clone)]
pub struct GivenLlm(Map<String, Value>);

impl fmt::Debug for GivenLlm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl GivenLlm {
    /// Reads a whole configuration.
    ///
    /// Violations: `extra_forbidden` for unknown fields, `value_error` without a model, and those of the fields. None contains a value
    /// that may be a secret.
    pub fn read(check: &mut Checker, value: &Value) -> Option<Self> {
        let Value::Object(given) = value else {
            let msg = "Input should be a valid dictionary or object to extract fields from";
            check.report("model_attributes_type", msg, MASK.into(), None);
            return None;
        };
        for (name, value) in given {
            let msg = match name.as_str() {
                IS_SUBSCRIPTION => continue,
                PROVIDER_CONNECTION if value.is_null() => continue,
                PROVIDER_CONNECTION => "Provider connections are not supported; set the key in the profile",
                name if FIELDS.iter().any(|field| field.name == name) => continue,
                _ => "Extra inputs are not permitted",
            };
            check.within(name.clone(), |check| check.report("extra_forbidden", msg, MASK.into(), None));
        }
        let read = declared::read(check, FIELDS, given)?;
        let is_model_set = read.get(MODEL).and_then(Value::as_str).is_some_and(|model| !model.trim().is_empty());
        if !is_model_set {
            check.report_value_error(NO_MODEL, MASK.into());
        }
        check.is_clean().then_some(Self(read))
    }

    /// The configuration that replaces a stored one. A secret that is the mask or is absent stays; null or a blank clears it.
    #[must_use]
    pub fn in_place_of(&self, stored: Option<&Llm>) -> Llm {
        Llm(declared::replaced(FIELDS, stored.map(|stored| &stored.0), &self.0))
    }
}

/// The provider in a model's name.
fn provider(model: Option<&str>) -> Option<&str> {
    model.and_then(|model| model.split_once('/')).map(|(provider, _)| provider)
}

/// The default address of a model's provider, if this server knows it.
#[must_use]
pub fn default_base_url(model: &str) -> Option<&'static str> {
    match provider(Some(model))? {
        "openai" => Some("https://api.openai.com"),
        "anthropic" => Some("https://api.anthropic.com"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llm(value: &Value) -> Llm {
        Llm::stored(value.as_object().expect("an object"))
    }

    fn given(value: &Value) -> Result<GivenLlm, Value> {
        let mut check = Checker::new("body");
        let read = check.within("llm", |check| GivenLlm::read(check, value));
        check.finish(read).map_err(|violations| serde_json::to_value(violations).expect("JSON"))
    }

    #[test]
    fn what_was_shown_can_be_sent_back() {
        let stored = llm(&json!({"model": "openai/a", "api_key": "k", "temperature": 0.2, "reasoning_effort": null,
            "extra_headers": {"X": "s"}}));
        for secrets in [Secrets::Masked, Secrets::Clear] {
            let shown = Value::Object(stored.shown(secrets));
            assert_eq!(given(&shown).expect("valid").in_place_of(Some(&stored)), stored);
        }
        assert_eq!(stored.shown(Secrets::Masked).len(), FIELDS.len() + 1);
        assert!(!format!("{stored:?}").contains("\"k\""));
    }

    #[test]
    fn a_configuration_names_a_model_and_only_known_fields() {
        let violations = given(&json!({"model": "m", "key": "canary"})).expect_err("not valid");
        assert_eq!(violations[0]["type"], "extra_forbidden");
        assert_eq!(violations[0]["loc"], json!(["body", "llm", "key"]));
        for value in [json!({}), json!({"model": ""}), json!({"model": null, "api_key": "canary"})] {
            let violations = given(&value).expect_err("not valid");
            assert_eq!(violations[0]["msg"], "Value error, model must be specified in LLM");
            assert!(!violations.to_string().contains("canary"), "{violations}");
        }
        assert_eq!(given(&json!({"model": 5})).expect_err("not valid")[0]["type"], "string_type");
        assert_eq!(given(&json!("canary")).expect_err("not valid")[0]["type"], "model_attributes_type");
    }

    #[test]
    fn only_the_absence_of_a_provider_connection_is_accepted() {
        let own_key = given(&json!({"model": "m", "api_key": "k", "provider_connection_id": null})).expect("valid");
        assert_eq!(own_key.in_place_of(None), llm(&json!({"model": "m", "api_key": "k"})));
        let violations = given(&json!({"model": "m", "provider_connection_id": "shared"})).expect_err("not valid");
        assert_eq!(violations[0]["type"], "extra_forbidden");
        assert_eq!(violations[0]["loc"], json!(["body", "llm", "provider_connection_id"]));
        assert_eq!(violations[0]["msg"], "Provider connections are not supported; set the key in the profile");
    }

    #[test]
    fn addresses_follow_the_provider() {
        let openai = llm(&json!({"model": "openai/a", "base_url": "https://api.openai.com"}));
        assert_eq!(openai.with_model("openai/b").base_url(), Some("https://api.openai.com"));
        assert_eq!(openai.with_model("anthropic/b").base_url(), None);
        assert_eq!(openai.with_model("anthropic/b").resolved_base_url(), Some("https://api.anthropic.com"));
        let own = llm(&json!({"model": "openai/a", "base_url": "https://proxy.example/v1"}));
        assert_eq!(own.with_model("anthropic/b").base_url(), Some("https://proxy.example/v1"));
        assert_eq!(llm(&json!({"model": "gpt"})).resolved_base_url(), None);
    }

    #[test]
    fn a_key_is_taken_only_from_a_configuration_for_the_same_place() {
        let with_key = llm(&json!({"model": "openai/a", "api_key": "k", "base_url": "https://api.openai.com"}));
        for (other, is_taken) in [
            (json!({"model": "openai/b"}), true),
            (json!({"model": "anthropic/b"}), false),
            (json!({"model": "openai/b", "base_url": "https://elsewhere.example"}), false),
        ] {
            assert_eq!(llm(&other).with_key_of(&with_key).has_api_key(), is_taken, "{other}");
        }
        let own = llm(&json!({"model": "openai/b", "api_key": "own"})).with_key_of(&with_key);
        assert_eq!(own.fields()["api_key"], "own");
    }
}
