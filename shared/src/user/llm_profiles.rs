//! LLM profiles: the named model configurations of a user, and which of them is active.

use std::fmt;

use serde_json::{Map, Value, json};

use super::declared::Secrets;
use super::llm::Llm;
use crate::error::{Error, Result};
use crate::http::pydantic::validation::{Checked, Checker};

/// The most profiles of a user.
pub const MAX_PROFILES: usize = 10;
/// The longest name, in characters.
pub const MAX_NAME: usize = 64;
/// The name of a profile that is made without its user's request: of settings that are older than profiles, and of the environment.
pub const DEFAULT_NAME: &str = "default";

const PATTERN: &str = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$";
const PROFILES: &str = "profiles";
const ACTIVE: &str = "active";

/// The profiles of a user in the order of their creation. Holds secrets in clear text.
#[derive(Clone, Default, PartialEq)]
pub struct LlmProfiles {
    profiles: Vec<(String, Llm)>,
    /// The name of one of them.
    active: Option<String>,
}

/// Shows only names and models.
impl fmt::Debug for LlmProfiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LlmProfiles").field(PROFILES, &self.profiles).field(ACTIVE, &self.active).finish()
    }
}

impl LlmProfiles {
    /// Reads the stored form, `{"profiles": {name: configuration}, "active": name}`. A profile that this version does not accept is left
    /// out.
    #[must_use]
    pub fn stored(value: &Value) -> Self {
        let stored = value.get(PROFILES).and_then(Value::as_object).into_iter().flatten();
        let profiles: Vec<(String, Llm)> = stored
            .filter_map(|(name, llm)| Some((name.clone(), Llm::stored(llm.as_object()?))))
            .filter(|(_, llm)| llm.model().is_some())
            .take(MAX_PROFILES)
            .collect();
        let active = value.get(ACTIVE).and_then(Value::as_str);
        let active = active.filter(|active| profiles.iter().any(|(name, _)| name == active)).map(str::to_owned);
        Self { profiles, active }
    }

    /// The only profile of settings that are older than profiles; none without a model.
    #[must_use]
    pub fn of_settings(llm: Llm) -> Self {
        if llm.model().is_none() {
            return Self::default();
        }
        Self { profiles: vec![(DEFAULT_NAME.to_owned(), llm)], active: Some(DEFAULT_NAME.to_owned()) }
    }

    /// The stored form, with secrets.
    #[must_use]
    pub fn to_json(&self) -> Value {
        self.json(|llm| llm.fields().clone())
    }

    /// The form of responses.
    #[must_use]
    pub fn shown(&self, secrets: Secrets) -> Value {
        self.json(|llm| llm.shown(secrets))
    }

    fn json(&self, of: impl Fn(&Llm) -> Map<String, Value>) -> Value {
        let profiles: Map<String, Value> =
            self.profiles.iter().map(|(name, llm)| (name.clone(), of(llm).into())).collect();
        json!({PROFILES: profiles, ACTIVE: self.active})
    }

    /// The profiles with their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Llm)> {
        self.profiles.iter().map(|(name, llm)| (name.as_str(), llm))
    }

    /// The configuration of a profile.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Llm> {
        self.iter().find(|(known, _)| *known == name).map(|(_, llm)| llm)
    }

    /// The configuration of a profile.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn find(&self, name: &str) -> Result<&Llm> {
        self.get(name).ok_or_else(|| Error::NotFound(format!("Profile '{name}' not found")))
    }

    /// The name of the active profile.
    #[must_use]
    pub fn active(&self) -> Option<&str> {
        self.active.as_deref()
    }

    /// The configuration of the active profile.
    #[must_use]
    pub fn active_llm(&self) -> Option<&Llm> {
        self.active().and_then(|active| self.get(active))
    }

    /// The profile for a model that is named without a profile: the active one if it has the model, or else the first that has it.
    #[must_use]
    pub fn with_model(&self, model: &str) -> Option<&Llm> {
        let all = self.iter().map(|(_, llm)| llm);
        self.active_llm().into_iter().chain(all).find(|llm| llm.model() == Some(model))
    }

    /// Stores a profile under its name, in the place of one that has the name.
    ///
    /// # Errors
    /// [`Error::Conflict`] when there are too many.
    pub fn put(&mut self, name: &str, llm: Llm) -> Result<()> {
        if let Some((_, known)) = self.profiles.iter_mut().find(|(known, _)| known == name) {
            *known = llm;
            return Ok(());
        }
        if self.profiles.len() >= MAX_PROFILES {
            return Err(Error::Conflict(format!(
                "Profile limit reached ({MAX_PROFILES}). Delete a profile before saving a new one."
            )));
        }
        self.profiles.push((name.to_owned(), llm));
        Ok(())
    }

    /// Replaces the configuration of the active profile, if there is one. A configuration without a model makes none active.
    pub fn set_active_llm(&mut self, llm: Llm) {
        let Some(active) = self.active.clone() else { return };
        if llm.model().is_none() {
            self.active = None;
        } else if let Some((_, known)) = self.profiles.iter_mut().find(|(known, _)| *known == active) {
            *known = llm;
        }
    }

    /// Makes a profile the active one.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn activate(&mut self, name: &str) -> Result<&Llm> {
        self.find(name)?;
        self.active = Some(name.to_owned());
        self.find(name)
    }

    /// Deletes a profile. If it was active, the first of those that remain becomes active. Returns whether there was one.
    pub fn delete(&mut self, name: &str) -> bool {
        let before = self.profiles.len();
        self.profiles.retain(|(known, _)| known != name);
        if self.active() == Some(name) {
            self.active = self.profiles.first().map(|(first, _)| first.clone());
        }
        self.profiles.len() < before
    }

    /// Renames a profile, which keeps its place and stays active if it was.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Conflict`] when another has the new name.
    pub fn rename(&mut self, name: &str, new_name: &str) -> Result<()> {
        self.find(name)?;
        if name != new_name && self.get(new_name).is_some() {
            return Err(Error::Conflict(format!("Profile '{new_name}' already exists")));
        }
        for (known, _) in self.profiles.iter_mut().filter(|(known, _)| known == name) {
            new_name.clone_into(known);
        }
        if self.active() == Some(name) {
            self.active = Some(new_name.to_owned());
        }
        Ok(())
    }
}

/// Reads the name of a profile. Violations: `string_type`, `string_too_long`, `string_pattern_mismatch`.
///
/// The name begins with a letter or a digit, as those of agent servers do, so that no name is a step in a path.
pub fn read_name(check: &mut Checker, value: &Value) -> Option<String> {
    let name = crate::http::pydantic::validation::string_up_to(MAX_NAME, check, value)?;
    let is_valid = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
        && name.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric());
    if !is_valid {
        let msg = format!("String should match pattern '{PATTERN}'");
        check.report("string_pattern_mismatch", msg, value.clone(), Some(json!({"pattern": PATTERN})));
    }
    is_valid.then_some(name)
}

/// Reads the name in a path.
///
/// # Errors
/// Those of [`read_name`], at `["path", "name"]`.
pub fn name_in_path(name: &str) -> Checked<String> {
    let mut check = Checker::new("path");
    let read = check.within("name", |check| read_name(check, &name.into()));
    check.finish(read)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llm(model: &str) -> Llm {
        Llm::stored(&Map::from_iter([("model".to_owned(), model.into()), ("api_key".to_owned(), "k".into())]))
    }

    fn names(profiles: &LlmProfiles) -> Vec<&str> {
        profiles.iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn profiles_keep_their_order_and_one_is_active() {
        let mut profiles = LlmProfiles::default();
        for name in ["a", "b", "c"] {
            profiles.put(name, llm(name)).expect("stored");
        }
        assert_eq!(profiles.active(), None);
        assert_eq!(profiles.activate("b").expect("active").model(), Some("b"));
        profiles.rename("b", "z").expect("renamed");
        assert_eq!((names(&profiles), profiles.active()), (vec!["a", "z", "c"], Some("z")));
        profiles.rename("z", "z").expect("its own name");
        assert!(matches!(profiles.rename("z", "a"), Err(Error::Conflict(_))));
        assert!(matches!(profiles.rename("none", "x"), Err(Error::NotFound(_))));
        assert!(matches!(profiles.activate("none"), Err(Error::NotFound(_))));
        profiles.set_active_llm(llm("new"));
        assert_eq!(profiles.active_llm().and_then(Llm::model), Some("new"));
        assert_eq!(LlmProfiles::stored(&profiles.to_json()), profiles);
        assert!(profiles.delete("z") && !profiles.delete("z"));
        assert_eq!((names(&profiles), profiles.active()), (vec!["a", "c"], Some("a")));
        assert!(profiles.delete("c") && profiles.delete("a"));
        assert_eq!(profiles, LlmProfiles::default());
    }

    #[test]
    fn there_are_ten_at_most() {
        let mut profiles = LlmProfiles::default();
        for index in 0..MAX_PROFILES {
            profiles.put(&index.to_string(), llm("m")).expect("stored");
        }
        let refused = profiles.put("one more", llm("m")).expect_err("too many");
        assert_eq!(refused.to_string(), "Profile limit reached (10). Delete a profile before saving a new one.");
        profiles.put("0", llm("new")).expect("replaced");
        assert_eq!(profiles.get("0").and_then(Llm::model), Some("new"));
    }

    #[test]
    fn a_model_belongs_to_the_active_profile_first() {
        let mut profiles = LlmProfiles::default();
        for (name, model) in [("a", "m"), ("b", "n"), ("c", "m")] {
            let key = Value::from(format!("key of {name}"));
            let fields = Map::from_iter([("model".to_owned(), model.into()), ("api_key".to_owned(), key)]);
            profiles.put(name, Llm::stored(&fields)).expect("stored");
        }
        let key = |profiles: &LlmProfiles| profiles.with_model("m").map(|llm| llm.fields()["api_key"].clone());
        assert_eq!(key(&profiles), Some("key of a".into()));
        profiles.activate("c").expect("active");
        assert_eq!(key(&profiles), Some("key of c".into()));
        assert_eq!(profiles.with_model("other"), None);
    }

    #[test]
    fn stored_profiles_that_are_not_valid_are_left_out() {
        let stored = json!({"profiles": {"a": {"model": "m", "temperature": "hot"}, "b": {"api_key": "k"}, "c": 5}, "active": "b"});
        let profiles = LlmProfiles::stored(&stored);
        assert_eq!((names(&profiles), profiles.active()), (vec!["a"], None));
        for other in [json!(null), json!([]), json!({"profiles": 5, "active": 7})] {
            assert_eq!(LlmProfiles::stored(&other), LlmProfiles::default());
        }
    }

    #[test]
    fn names_begin_with_a_letter_or_a_digit() {
        for name in ["a", "A.b_c-9", "9", &"x".repeat(64)] {
            assert_eq!(name_in_path(name).expect("a name"), name);
        }
        for (name, kind) in [
            ("", "string_pattern_mismatch"),
            ("..", "string_pattern_mismatch"),
            (".a", "string_pattern_mismatch"),
            ("-a", "string_pattern_mismatch"),
            ("a b", "string_pattern_mismatch"),
            ("é", "string_pattern_mismatch"),
            (&"x".repeat(65), "string_too_long"),
        ] {
            let violations = serde_json::to_value(name_in_path(name).expect_err("no name")).expect("JSON");
            assert_eq!((&violations[0]["type"], &violations[0]["loc"]), (&json!(kind), &json!(["path", "name"])));
        }
    }
}
