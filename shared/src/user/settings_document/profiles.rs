//! LLM profiles in the settings document.
//!
//! While a profile is active, the model of the settings is that profile's: a change of one of them changes the other. So a client that
//! reads only the settings sees the model that starts use.

use serde_json::Value;

use super::SettingsDocument;
use super::nested::{AGENT_SETTINGS, LLM_API_KEY, LLM_BASE_URL, LLM_MODEL};
use crate::digest::sha256_hex;
use crate::error::{Error, Result};
use crate::http::pydantic::body::FromJson;
use crate::http::pydantic::validation::{self, Checker};
use crate::user::llm::{GivenLlm, Llm, MAX_LLM};
use crate::user::llm_profiles::{self, DEFAULT_NAME, LlmProfiles};

pub(super) const LLM_PROFILES: &str = "llm_profiles";
/// The key of the digest of the model with which the server was started last; see [`SettingsDocument::start_with_llm`].
const STARTED_WITH: &str = "started_with_llm";
/// The key that is set once the settings' model has been offered as a profile; see [`SettingsDocument::offer_first_profile`].
const OFFERED: &str = "offered_first_profile";
/// A profile that names another in the settings.
const TITLE_PROFILE: &str = "title_llm_profile";

/// The body of a request that saves a profile.
#[derive(Debug)]
pub struct ProfileSave {
    include_secrets: bool,
    /// The configuration; `None` for that of the settings.
    llm: Option<GivenLlm>,
    preserve_existing_api_key: bool,
}

impl Default for ProfileSave {
    fn default() -> Self {
        Self { include_secrets: true, llm: None, preserve_existing_api_key: false }
    }
}

impl FromJson for ProfileSave {
    fn from_json(check: &mut Checker, value: &Value) -> Option<Self> {
        let Value::Object(given) = value else {
            let msg = "Input should be a valid dictionary or object to extract fields from";
            // It may be a secret.
            check.report("model_attributes_type", msg, crate::http::secret::MASK.into(), None);
            return None;
        };
        let flag = |check: &mut Checker, name: &'static str, default: bool| match given.get(name) {
            None => Some(default),
            Some(value) => check.within(name, |check| validation::boolean(check, value)),
        };
        let include_secrets = flag(check, "include_secrets", true);
        let llm = match given.get("llm") {
            None | Some(Value::Null) => Some(None),
            Some(llm) => check.within("llm", |check| GivenLlm::read(check, llm)).map(Some),
        };
        let preserve_existing_api_key = flag(check, "preserve_existing_api_key", false);
        Some(Self {
            include_secrets: include_secrets?,
            llm: llm?,
            preserve_existing_api_key: preserve_existing_api_key?,
        })
    }
}

/// The body of a request that renames a profile.
#[derive(Debug)]
pub struct ProfileRename {
    /// The name after the change.
    pub new_name: String,
}

impl FromJson for ProfileRename {
    fn from_json(check: &mut Checker, value: &Value) -> Option<Self> {
        let fields = validation::Fields::of(check, value)?;
        fields.required(check, "new_name", llm_profiles::read_name).map(|new_name| Self { new_name })
    }
}

impl SettingsDocument {
    /// The user's LLM profiles.
    #[must_use]
    pub fn llm_profiles(&self) -> LlmProfiles {
        self.0.get(LLM_PROFILES).map(LlmProfiles::stored).unwrap_or_default()
    }

    pub(super) fn set_llm_profiles(&mut self, profiles: &LlmProfiles) {
        self.0.insert(LLM_PROFILES.to_owned(), profiles.to_json());
    }

    /// Gives settings that are older than profiles one profile, which has their model. Otherwise the settings get the model of the active
    /// profile, which they may lack in a settings file.
    pub(super) fn add_profiles(&mut self) {
        let stored = self.0.get(LLM_PROFILES).filter(|stored| !stored.is_null()).map(LlmProfiles::stored);
        let profiles = stored.unwrap_or_else(|| LlmProfiles::of_settings(self.llm()));
        if let Some(active) = profiles.active_llm().filter(|active| **active != self.llm()) {
            self.set_llm(active.clone());
        }
        self.set_llm_profiles(&profiles);
    }

    /// Makes the settings' model the profile `default`, and active, for a user who chose a model before any profile: the first dialog of
    /// the web UI saves only settings, and its pages show only profiles. Returns whether it did. It does so once, so that a user can
    /// delete the last profile, and never where the server's environment has made a profile.
    pub fn offer_first_profile(&mut self) -> bool {
        if self.0.contains_key(OFFERED) || self.0.contains_key(STARTED_WITH) {
            return false;
        }
        let first = LlmProfiles::of_settings(self.llm());
        if first.active().is_none() || self.llm_profiles().iter().next().is_some() {
            return false;
        }
        self.set_llm_profiles(&first);
        self.0.insert(OFFERED.to_owned(), true.into());
        true
    }

    /// Saves a profile. A profile that is active stays active, with the new configuration.
    ///
    /// # Errors
    /// [`Error::Refused`] if the settings whose model is to be saved have none; [`Error::Conflict`] when there are too many;
    /// [`Error::TooLarge`].
    pub fn save_profile(&mut self, name: &str, save: &ProfileSave) -> Result<()> {
        let mut profiles = self.llm_profiles();
        let stored = profiles.get(name);
        let mut llm = match &save.llm {
            Some(given) => given.in_place_of(stored),
            None => self.llm().in_place_of(stored),
        };
        if llm.model().is_none() {
            return Err(Error::Refused("The settings have no model; send one in llm".to_owned()));
        }
        if !save.include_secrets {
            llm.remove_secrets();
        }
        if let Some(stored) = stored.filter(|_| save.preserve_existing_api_key) {
            llm.take_key_of(stored);
        }
        if llm.size() > MAX_LLM {
            return Err(Error::TooLarge(format!("A profile must not exceed {} KiB", MAX_LLM / 1024)));
        }
        profiles.put(name, llm.clone())?;
        if profiles.active() == Some(name) {
            self.set_llm(llm);
        }
        self.set_llm_profiles(&profiles);
        Ok(())
    }

    /// Makes a profile the active one, and its model that of the settings. Returns it.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn activate_profile(&mut self, name: &str) -> Result<Llm> {
        let mut profiles = self.llm_profiles();
        let llm = profiles.activate(name)?.clone();
        self.set_llm(llm.clone());
        self.set_llm_profiles(&profiles);
        Ok(llm)
    }

    /// Deletes a profile. If it was active, the first of those that remain becomes active; after the last one the settings keep its model.
    /// Returns whether there was one.
    pub fn delete_profile(&mut self, name: &str) -> bool {
        let mut profiles = self.llm_profiles();
        if !profiles.delete(name) {
            return false;
        }
        if let Some(llm) = profiles.active_llm() {
            self.set_llm(llm.clone());
        }
        self.set_llm_profiles(&profiles);
        if self.0.get(TITLE_PROFILE).is_some_and(|title| title == name) {
            self.0.shift_remove(TITLE_PROFILE);
        }
        true
    }

    /// Renames a profile.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Conflict`] when another has the new name.
    pub fn rename_profile(&mut self, name: &str, new_name: &str) -> Result<()> {
        let mut profiles = self.llm_profiles();
        profiles.rename(name, new_name)?;
        self.set_llm_profiles(&profiles);
        self.rename_llm_profile_of_agents(name, new_name);
        if let Some(title) = self.0.get_mut(TITLE_PROFILE).filter(|title| **title == name) {
            *title = new_name.into();
        }
        Ok(())
    }

    /// Carries a change of the settings' model over to the active profile.
    pub(super) fn model_changed_from(&mut self, before: &Llm) {
        let mut llm = self.llm();
        if llm == *before {
            return;
        }
        if llm.base_url() == before.base_url() {
            llm.drop_default_address_of(before.model());
        }
        let mut profiles = self.llm_profiles();
        profiles.set_active_llm(llm.clone());
        self.set_llm(llm);
        self.set_llm_profiles(&profiles);
    }

    /// Applies the model that the environment or the settings file of a server names. The first time it becomes the profile `default`,
    /// which is activated. A later start changes that profile only if the given model has changed since, and never makes it again after
    /// its user has deleted it. Fields that are not given keep their value.
    pub(super) fn start_with_llm(&mut self, given: &Llm) {
        if given.fields().is_empty() {
            return;
        }
        let digest = sha256_hex(&Value::Object(given.fields().clone()).to_string());
        let known = self.0.get(STARTED_WITH).and_then(Value::as_str);
        if known == Some(&digest) {
            return;
        }
        let is_first = known.is_none();
        let mut profiles = self.llm_profiles();
        let current = self.llm();
        let former = profiles.get(DEFAULT_NAME).unwrap_or(&current);
        let mut fields = former.fields().clone();
        fields.extend(given.fields().clone());
        let mut llm = Llm::stored(&fields);
        if given.base_url().is_none() {
            llm.drop_default_address_of(former.model());
        }
        if llm.model().is_none() {
            // A key without a model waits for one in the settings.
            self.set_llm(llm);
            return;
        }
        // After its user has deleted it, it is not made again.
        if is_first || profiles.get(DEFAULT_NAME).is_some() {
            let made = profiles.put(DEFAULT_NAME, llm.clone());
            let made = made.and_then(|()| if is_first { profiles.activate(DEFAULT_NAME).map(|_| ()) } else { Ok(()) });
            if let Err(error) = made {
                tracing::warn!(profile = DEFAULT_NAME, %error, "settings.profile_left_out");
            }
        }
        if profiles.active().is_none() || profiles.active() == Some(DEFAULT_NAME) {
            self.set_llm(llm);
        }
        self.set_llm_profiles(&profiles);
        self.0.insert(STARTED_WITH.to_owned(), digest.into());
    }

    /// Merges the model and the profiles of another document, which comes from a settings file.
    pub(super) fn merge_models(&mut self, other: &Self) {
        if let Some(given) = other.0.get(LLM_PROFILES).filter(|given| given.is_object()) {
            let given = LlmProfiles::stored(given);
            let mut profiles = self.llm_profiles();
            for (name, llm) in given.iter() {
                if let Err(error) = profiles.put(name, llm.clone()) {
                    tracing::warn!(profile = name, %error, "settings.profile_left_out");
                }
            }
            self.set_llm_profiles(&profiles);
            if let Some(active) = given.active() {
                // It is one of those that were stored, unless it was left out.
                let _active = self.activate_profile(active);
            }
        }
        if other.0.get(LLM_PROFILES).is_none_or(|given| LlmProfiles::stored(given).active().is_none()) {
            self.start_with_llm(&other.llm());
        }
    }

    /// Whether a key holds a part of the model, which [`Self::merge_models`] merges.
    pub(super) fn is_of_model(name: &str) -> bool {
        [LLM_MODEL, LLM_API_KEY, LLM_BASE_URL, LLM_PROFILES, AGENT_SETTINGS].contains(&name)
    }
}
