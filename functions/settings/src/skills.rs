//! `GET /api/v1/skills/search`: the skills that a user can disable.
//!
//! Agent servers load skills in their sandboxes: the public ones from a repository, the others from the user's folders and the project. A
//! function has no sandbox. It knows the names of the public skills, from a list that is part of the program (`public_skills.json`, renewed
//! by `infra/generate/skills.py`), and the skills that the user has disabled; these are listed too, so that they can be enabled again.

use std::collections::BTreeSet;

use axum::Json;
use axum::extract::{RawQuery, State};
use serde::{Deserialize, Serialize};
use shared::error::{Error, Result};
use shared::http::caller::Caller;
use shared::http::extract::PageRequest;
use shared::http::page::{self, PageOut};
use shared::http::pydantic::query::Query;

use crate::Context;

/// The public skills in the order of their names.
const PUBLIC: &str = include_str!("public_skills.json");
/// The list to which page ids belong.
const LIST: &str = "skills";

#[derive(Deserialize)]
struct PublicSkill {
    name: String,
    category: String,
    triggers: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
enum SkillSource {
    /// The repository of public skills.
    Public,
    /// Not a public skill: the user has disabled it by its name.
    User,
}

/// A skill that a user can disable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = SkillInfo))]
pub struct SkillInfoOut {
    name: String,
    /// Always `knowledge`: front ends show the other types in conversations only.
    #[serde(rename = "type")]
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    kind: &'static str,
    source: SkillSource,
    /// Words and commands that make an agent use it; empty if the agent itself decides.
    triggers: Vec<String>,
    /// Null for a skill that is not public.
    category: Option<String>,
    /// Whether the settings of the user disable it.
    disabled: bool,
}

/// The public skills, then the others that are disabled, each by name.
fn skills(disabled: &[String]) -> Result<Vec<SkillInfoOut>> {
    let public: Vec<PublicSkill> = serde_json::from_str(PUBLIC).map_err(Error::internal)?;
    let disabled: BTreeSet<&str> = disabled.iter().map(String::as_str).collect();
    let names: BTreeSet<String> = public.iter().map(|skill| skill.name.clone()).collect();
    let others = disabled.iter().filter(|name| !names.contains(**name)).map(|name| SkillInfoOut {
        name: (*name).to_owned(),
        kind: "knowledge",
        source: SkillSource::User,
        triggers: Vec::new(),
        category: None,
        disabled: true,
    });
    let public = public.into_iter().map(|PublicSkill { name, category, triggers }| SkillInfoOut {
        disabled: disabled.contains(name.as_str()),
        name,
        kind: "knowledge",
        source: SkillSource::Public,
        triggers,
        category: Some(category),
    });
    Ok(public.chain(others).collect())
}

pub(crate) async fn search(
    State(context): State<Context>,
    Caller(user): Caller,
    RawQuery(query): RawQuery,
) -> Result<Json<PageOut<SkillInfoOut>>> {
    let mut query = Query::parse(query.as_deref());
    let page = PageRequest::read(&mut query);
    query.finish().map_err(Error::Invalid)?;
    let page = page.of(&user, LIST.to_owned());
    let after: Option<(SkillSourceKey, String)> = page.after()?;
    let disabled = context.settings.get(&user).await?.and_then(|settings| settings.disabled_skills);
    let mut found = skills(&disabled.unwrap_or_default())?;
    found.retain(|skill| after.as_ref().is_none_or(|after| skill.position() > *after));
    let has_more = found.len() > page.limit;
    found.truncate(page.limit);
    let items = page::fitting(&found)?;
    let is_cut = has_more || items.len() < found.len();
    let next = found.get(..items.len()).and_then(<[_]>::last).filter(|_| is_cut).map(SkillInfoOut::position);
    Ok(Json(items.into_page(page.next_page_id(next)?)))
}

/// A source in page ids: public skills come first.
type SkillSourceKey = u8;

impl SkillInfoOut {
    fn position(&self) -> (SkillSourceKey, String) {
        (u8::from(self.source == SkillSource::User), self.name.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_skills_are_listed_by_name_and_others_while_they_are_disabled() {
        let disabled = ["docker", "mine", "a-project's"].map(str::to_owned);
        let all = skills(&disabled).expect("skills");
        assert!(all.iter().map(SkillInfoOut::position).is_sorted(), "pages rely on it");
        let of = |name: &str| all.iter().find(|skill| skill.name == name).expect("a skill");
        assert_eq!((of("docker").disabled, of("docker").source), (true, SkillSource::Public));
        assert!(of("docker").triggers.contains(&"container".to_owned()) && !of("github").disabled);
        assert_eq!((of("mine").disabled, of("mine").source), (true, SkillSource::User));
        assert_eq!(all.len(), skills(&[]).expect("skills").len() + 2);
        let names: BTreeSet<&str> = all.iter().map(|skill| skill.name.as_str()).collect();
        assert_eq!(names.len(), all.len(), "each once");
    }
}
