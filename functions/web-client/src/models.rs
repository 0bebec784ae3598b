//! The models and providers that a front end offers: `GET /api/v1/config/models/search` and `/providers/search`.
//!
//! The list is part of the program (`models.txt`) and is the same for every caller. `infra/generate/models.py` renews it. A model that is
//! not in the list works as well: a user types its name.

use axum::Json;
use axum::extract::RawQuery;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Serialize;
use shared::error::{Error, Result};
use shared::http::page::{self, PageOut};
use shared::http::pydantic::query::{Bounds, Query};

/// The models in the order of their names, each in a line of its own, with a `*` in front of those that are verified.
const MODELS: &str = include_str!("models.txt");

/// The provider that is listed first: its models need no account at another provider.
const FIRST_PROVIDER: &str = "openhands";

const DEFAULT_LIMIT: i64 = 50;

/// A model of the list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = LLMModel))]
pub struct ModelOut {
    /// Null if the name of the model has no provider.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    provider: Option<&'static str>,
    /// The name without the provider. Settings contain `provider/name`.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    name: &'static str,
    /// Whether agents are known to work well with the model.
    verified: bool,
    /// Always false.
    hidden: bool,
    /// Always null.
    canonical: Option<String>,
}

/// A provider of models.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = LLMProvider))]
pub struct ProviderOut {
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    name: &'static str,
    /// Whether any of its models is verified.
    verified: bool,
}

/// The filters and the page of a request.
#[derive(Debug)]
struct ListRequest {
    offset: usize,
    limit: usize,
    /// In lower case.
    part: Option<String>,
    verified: Option<bool>,
}

impl ListRequest {
    fn read(query: &mut Query) -> Self {
        let offset = query.string("page_id").and_then(|page_id| offset(&page_id)).unwrap_or_default();
        let limit = query.integer("limit", DEFAULT_LIMIT, Bounds::PAGE);
        let part = query.string("query").map(|part| part.to_lowercase());
        let verified = query.string("verified__eq").map(|_| query.boolean("verified__eq", false));
        // The bounds make this conversion infallible.
        Self { offset, limit: usize::try_from(limit).unwrap_or(50), part, verified }
    }

    fn matches(&self, name: &str, is_verified: bool) -> bool {
        self.part.as_deref().is_none_or(|part| name.to_lowercase().contains(part))
            && self.verified.is_none_or(|verified| verified == is_verified)
    }

    fn page<T: Serialize>(&self, matching: impl Iterator<Item = T>) -> Result<PageOut<T>> {
        let mut rest = matching.skip(self.offset);
        let items: Vec<T> = rest.by_ref().take(self.limit).collect();
        let next = rest.next().map(|_| URL_SAFE_NO_PAD.encode(self.offset.saturating_add(self.limit).to_string()));
        Ok(page::fitting(&items)?.into_page(next))
    }
}

/// Reads a page id, the offset as text in URL-safe base64. An unreadable one is the first page, as in the contract: the list is never
/// longer than a few pages, and is the same for everybody.
fn offset(page_id: &str) -> Option<usize> {
    String::from_utf8(URL_SAFE_NO_PAD.decode(page_id.trim_end_matches('=')).ok()?).ok()?.parse().ok()
}

fn models(list: &'static str) -> impl Iterator<Item = ModelOut> {
    list.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).map(|line| {
        let (verified, id) = line.strip_prefix('*').map_or((false, line), |id| (true, id));
        let (provider, name) = id.split_once('/').map_or((None, id), |(provider, name)| (Some(provider), name));
        ModelOut { provider, name, verified, hidden: false, canonical: None }
    })
}

/// The providers: first `openhands`, then those with verified models, then the others; each group by name.
fn providers(list: &'static str) -> Vec<ProviderOut> {
    let mut providers: Vec<ProviderOut> = Vec::new();
    for model in models(list) {
        let Some(name) = model.provider else { continue };
        match providers.last_mut().filter(|provider| provider.name == name) {
            Some(provider) => provider.verified |= model.verified,
            None => providers.push(ProviderOut { name, verified: model.verified }),
        }
    }
    providers.sort_by_key(|provider| (provider.name != FIRST_PROVIDER, !provider.verified, provider.name));
    providers
}

fn models_page(list: &'static str, query: Option<&str>) -> Result<PageOut<ModelOut>> {
    let mut query = Query::parse(query);
    let request = ListRequest::read(&mut query);
    let provider = query.string("provider__eq");
    query.finish().map_err(Error::Invalid)?;
    request.page(models(list).filter(|model| {
        provider.as_deref().is_none_or(|provider| model.provider == Some(provider))
            && request.matches(model.name, model.verified)
    }))
}

fn providers_page(list: &'static str, query: Option<&str>) -> Result<PageOut<ProviderOut>> {
    let mut query = Query::parse(query);
    let request = ListRequest::read(&mut query);
    query.finish().map_err(Error::Invalid)?;
    request.page(providers(list).into_iter().filter(|provider| request.matches(provider.name, provider.verified)))
}

pub(crate) async fn search_models(RawQuery(query): RawQuery) -> Result<Json<PageOut<ModelOut>>> {
    models_page(MODELS, query.as_deref()).map(Json)
}

pub(crate) async fn search_providers(RawQuery(query): RawQuery) -> Result<Json<PageOut<ProviderOut>>> {
    providers_page(MODELS, query.as_deref()).map(Json)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::{Value, json};

    use super::*;

    fn body<T>(page: Result<PageOut<T>>) -> Value {
        match page {
            Ok(page) => json!(page),
            Err(Error::Invalid(violations)) => json!({"detail": violations}),
            Err(other) => panic!("{other}"),
        }
    }

    /// The list of the recorded server, in our form, with one more verified model.
    fn recorded_list(also_verified: Option<&str>) -> &'static str {
        let file = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/contract/models-1.11.json"));
        let list: Value = serde_json::from_str(file).expect("JSON");
        let verified: BTreeSet<&str> = list["verified"]
            .as_array()
            .expect("a list")
            .iter()
            .filter_map(Value::as_str)
            .chain(also_verified)
            .collect();
        let mut ids = Vec::new();
        for (provider, names) in list["by_provider"].as_object().expect("providers") {
            for name in names.as_array().expect("names").iter().filter_map(Value::as_str) {
                ids.push(if provider.is_empty() { name.to_owned() } else { format!("{provider}/{name}") });
            }
        }
        ids.sort();
        assert_eq!(list["count"], ids.len());
        let line = |id: String| if verified.contains(&*id) { format!("*{id}\n") } else { format!("{id}\n") };
        ids.into_iter().map(line).collect::<String>().leak()
    }

    #[test]
    fn on_the_recorded_list_every_response_is_the_recorded_one() {
        let list = recorded_list(None);
        // The recorded server also calls a provider verified none of whose models is.
        let list_for_providers = recorded_list(Some("minimax/MiniMax-M2"));
        let file =
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/contract/app-1.11-models.jsonl"));
        let (mut cases, mut refused) = (0, 0);
        for line in file.lines() {
            let case: Value = serde_json::from_str(line).expect("a case");
            let query = case["request"]["query"].as_str();
            let ours = match case["request"]["path"].as_str().expect("a path") {
                "/api/v1/config/models/search" => body(models_page(list, query)),
                "/api/v1/config/providers/search" => body(providers_page(list_for_providers, query)),
                other => panic!("{other}"),
            };
            assert_eq!(ours, case["response"]["body"], "{}", case["label"]);
            cases += 1;
            refused += usize::from(case["response"]["status"] == 422);
        }
        assert_eq!((cases, refused), (16, 2));
    }

    #[test]
    fn the_list_is_sorted_and_contains_what_agents_can_use() {
        let ids = || MODELS.lines().skip(1).map(|line| line.trim_start_matches('*'));
        assert!(MODELS.starts_with("# litellm "));
        assert!(ids().zip(ids().skip(1)).all(|(one, next)| one < next), "sorted, each once");
        assert!(
            ids().all(|id| id.split_once('/').is_some_and(|(provider, name)| !provider.is_empty() && !name.is_empty()))
        );
        let all: BTreeSet<&str> = ids().collect();
        for model in [
            "anthropic/claude-sonnet-4-5",
            "openai/gpt-4o",
            "gemini/gemini-2.5-pro",
            "openrouter/anthropic/claude-opus-5",
        ] {
            assert!(all.contains(model), "{model}");
        }
        for other in [
            "openai/dall-e-3",
            "openai/text-embedding-3-small",
            "openai/whisper-1",
            "openai/container",
            "high/1024-x-1024/gpt-image-1",
        ] {
            assert!(!all.contains(other), "{other}");
        }
    }

    #[test]
    fn a_walk_of_pages_shows_each_model_once() {
        let (mut walked, mut page_id) = (Vec::new(), String::new());
        loop {
            let page = body(models_page(MODELS, Some(&format!("limit=100&page_id={page_id}"))));
            walked.extend(page["items"].as_array().expect("items").iter().map(|model| {
                format!(
                    "{}/{}",
                    model["provider"].as_str().expect("a provider"),
                    model["name"].as_str().expect("a name")
                )
            }));
            match page["next_page_id"].as_str() {
                Some(next) => page_id = next.to_owned(),
                None => break,
            }
        }
        assert!(walked.iter().map(String::as_str).eq(MODELS.lines().skip(1).map(|line| line.trim_start_matches('*'))));
    }

    #[test]
    fn the_first_providers_are_those_with_verified_models() {
        let page = body(providers_page(MODELS, Some("limit=100")));
        let names: Vec<&str> =
            page["items"].as_array().expect("items").iter().filter_map(|one| one["name"].as_str()).collect();
        assert_eq!(names[..2], ["openhands", "anthropic"]);
        assert_eq!(page["next_page_id"], Value::Null, "front ends read one page of 100");
        let (verified, others) = names.split_at(names.iter().position(|name| *name == "ai21").expect("ai21"));
        assert!(verified.contains(&"openai") && verified[1..].is_sorted() && others.is_sorted());
    }

    #[test]
    fn a_page_id_of_another_kind_is_the_first_page() {
        let first = body(models_page(MODELS, None));
        assert_eq!(first["items"].as_array().map(Vec::len), Some(50));
        for page_id in ["", "x", "MTAw!", "-1", "LTE", "OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk5"] {
            assert_eq!(body(models_page(MODELS, Some(&format!("page_id={page_id}")))), first, "{page_id}");
        }
        // 18446744073709551615
        let last = body(models_page(MODELS, Some("page_id=MTg0NDY3NDQwNzM3MDk1NTE2MTU")));
        assert_eq!(last, json!({"items": [], "next_page_id": null}));
    }
}
