//! The configuration of a model in the form that agent servers receive: in the body that creates a conversation, and in the request that
//! switches a running one to another model.

use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::config::StartConfig;
use crate::digest::sha256_hex;
use crate::id::{self, UserId};
use crate::user::llm::Llm;

/// The version of this control plane in trace metadata.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Fields whose values do not come from the user's configuration.
const OWN_FIELDS: [&str; 6] = ["model", "api_key", "base_url", "stream", "usage_id", "litellm_extra_body"];

/// For whom a model is configured.
#[derive(Clone, Copy, Debug)]
pub struct LlmUse<'a> {
    pub user: &'a UserId,
    pub conversation_id: Uuid,
    pub config: &'a StartConfig,
}

/// The configuration for a usage, with secrets in clear text. Models `openhands/…` get the names that their proxy knows.
///
/// An address that is not set stays null: the agent's client then uses that of the model's provider.
#[must_use]
pub fn llm_body(usage: LlmUse<'_>, llm: &Llm, usage_id: &str) -> Value {
    let config = usage.config;
    let mut base_url = llm.base_url().map(ToOwned::to_owned);
    let mut model = llm.model().unwrap_or_default().to_owned();
    if let Some(name) = model.strip_prefix("openhands/") {
        base_url = base_url
            .or_else(|| config.openhands_provider_base_url.clone())
            .or_else(|| Some("https://llm-proxy.app.all-hands.dev/".to_owned()));
        model = format!("litellm_proxy/{name}");
    }
    let api_version = model.starts_with("azure").then_some("2024-12-01-preview");
    let mut extra_body = match llm.fields().get("litellm_extra_body") {
        Some(Value::Object(own)) => own.clone(),
        _ => Map::new(),
    };
    if model.contains("openhands/") || model.contains("litellm_proxy/") {
        let host = config.web_host.as_deref().unwrap_or("unspecified");
        let mut metadata = json!({
            "trace_version": VERSION,
            "tags": [
                "app:openhands",
                format!("model:{model}"),
                format!("type:{usage_id}"),
                format!("web_host:{host}"),
                format!("openhands_version:{VERSION}"),
                "conversation_version:V1",
            ],
            "session_id": id::dashed(usage.conversation_id),
        });
        if let Some(user) = usage.user.shown() {
            metadata["trace_user_id"] = user.into();
        }
        extra_body.entry("metadata").or_insert(metadata);
    }
    let mut body = json!({
        "model": model,
        "api_key": llm.api_key(),
        "base_url": base_url,
        "api_version": api_version,
        "aws_access_key_id": null,
        "aws_secret_access_key": null,
        "aws_region_name": null,
        "openrouter_site_url": "https://docs.all-hands.dev/",
        "openrouter_app_name": "OpenHands",
        "num_retries": 5,
        "retry_multiplier": 8.0,
        "retry_min_wait": 8,
        "retry_max_wait": 64,
        "timeout": 300,
        "max_message_chars": 30000,
        "temperature": null,
        "top_p": null,
        "top_k": null,
        "max_input_tokens": null,
        "max_output_tokens": null,
        "model_canonical_name": null,
        "extra_headers": null,
        "input_cost_per_token": null,
        "output_cost_per_token": null,
        "ollama_base_url": null,
        "stream": false,
        "drop_params": true,
        "modify_params": true,
        "disable_vision": null,
        "disable_stop_word": false,
        "caching_prompt": true,
        "log_completions": false,
        "log_completions_folder": "logs/completions",
        "custom_tokenizer": null,
        "native_tool_calling": true,
        "force_string_serializer": null,
        "reasoning_effort": "high",
        "reasoning_summary": null,
        "enable_encrypted_reasoning": true,
        "prompt_cache_retention": "24h",
        "extended_thinking_budget": 200_000,
        "seed": null,
        "safety_settings": null,
        "usage_id": usage_id,
        "litellm_extra_body": extra_body,
    });
    for (name, value) in llm.fields().iter().filter(|(name, _)| !OWN_FIELDS.contains(&name.as_str())) {
        body[name] = value.clone();
    }
    body
}

/// The configuration to which a running conversation is switched: without nulls, and with a usage id that only this configuration has,
/// because an agent server keeps the first configuration of each usage id.
#[must_use]
pub fn switched_llm_body(usage: LlmUse<'_>, llm: &Llm, profile: &str, streaming: bool) -> Value {
    let Value::Object(mut body) = llm_body(usage, llm, "") else { return Value::Null };
    body.shift_remove("usage_id");
    body.insert("stream".to_owned(), streaming.into());
    body.retain(|_, value| !value.is_null());
    let digest = sha256_hex(&Value::Object(body.clone()).to_string());
    body.insert("usage_id".to_owned(), format!("profile:{profile}:{}", &digest[..12]).into());
    Value::Object(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llm(value: &Value) -> Llm {
        Llm::stored(value.as_object().expect("an object"))
    }

    fn usage<'a>(user: &'a UserId, config: &'a StartConfig) -> LlmUse<'a> {
        LlmUse { user, conversation_id: Uuid::from_u128(1), config }
    }

    #[test]
    fn the_users_fields_replace_the_defaults() {
        let (user, config) = (UserId::new("u"), StartConfig::default());
        let own = json!({"model": "litellm_proxy/m", "api_key": "k", "temperature": 0.2, "reasoning_effort": null, "stream": true,
            "usage_id": "mine", "extra_headers": {"X": "y"}, "litellm_extra_body": {"a": 1}, "aws_session_token": "t"});
        let body = llm_body(usage(&user, &config), &llm(&own), "agent");
        for (name, value) in [
            ("model", json!("litellm_proxy/m")),
            ("api_key", json!("k")),
            ("temperature", json!(0.2)),
            ("reasoning_effort", json!(null)),
            ("stream", json!(false)),
            ("usage_id", json!("agent")),
            ("extra_headers", json!({"X": "y"})),
            ("aws_session_token", json!("t")),
            ("num_retries", json!(5)),
        ] {
            assert_eq!(body[name], value, "{name}");
        }
        assert_eq!(body["litellm_extra_body"]["a"], 1);
        assert_eq!(body["litellm_extra_body"]["metadata"]["trace_user_id"], "u");
    }

    #[test]
    fn each_configuration_of_a_profile_has_a_usage_of_its_own() {
        let (user, config) = (UserId::local(), StartConfig::default());
        let of = |value: Value| switched_llm_body(usage(&user, &config), &llm(&value), "fast", true);
        let first = of(json!({"model": "openai/a", "api_key": "k"}));
        assert_eq!(first, of(json!({"model": "openai/a", "api_key": "k"})));
        let id = first["usage_id"].as_str().expect("an id");
        assert!(id.starts_with("profile:fast:") && id.len() == "profile:fast:".len() + 12, "{id}");
        assert!(first.as_object().expect("an object").values().all(|value| !value.is_null()));
        for other in [
            json!({"model": "openai/a", "api_key": "other"}),
            json!({"model": "openai/a"}),
            json!({"model": "openai/b"}),
        ] {
            assert_ne!(of(other)["usage_id"], first["usage_id"]);
        }
    }
}
