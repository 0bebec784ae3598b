//! Custom secrets: reads the bodies of their routes, and changes them in the document.

use serde_json::{Value, json};

use super::{MAX_TEXT, SECRETS, SettingsDocument};
use crate::error::{Error, Result};
use crate::http::pydantic::validation::{self, Checked, Checker, Fields};
use crate::http::secret::{self, MASK, MAX_SECRETS};

/// The part of a value that a violation may show: an object without its secret.
fn without(value: &Value, secret: &str) -> Value {
    match value {
        Value::Object(fields) => Value::Object(
            fields.iter().filter(|(name, _)| *name != secret).map(|(n, v)| (n.clone(), v.clone())).collect(),
        ),
        // A value of another type may itself be the secret.
        _ => MASK.into(),
    }
}

/// The creation or change of a secret.
#[derive(Debug)]
pub struct SecretChange {
    /// The name after the change.
    pub name: String,
    /// The new value; `None` leaves it unchanged.
    pub value: Option<String>,
    /// The new description; `None` leaves it unchanged.
    pub description: Option<String>,
}

impl SecretChange {
    /// Reads the body of `POST /api/v1/secrets` (`{name, value, description?}`) or, with the name of the path, that of
    /// `PUT /api/v1/secrets/{name}`, where every field is optional.
    ///
    /// # Errors
    /// Every violation; none contains a value.
    pub fn read(body: &Value, name_of_path: Option<&str>) -> Checked<Self> {
        let mut check = Checker::new("body");
        let read = Self::read_object(&mut check, body, name_of_path);
        check.finish(read)
    }

    fn read_object(check: &mut Checker, body: &Value, name_of_path: Option<&str>) -> Option<Self> {
        // A `missing` violation shows the whole object, which must not contain the value.
        let harmless = without(body, "value");
        let fields = Fields::of(check, &harmless)?;
        let name = match name_of_path {
            Some(name) => {
                // Earlier versions did not check names; a secret keeps its invalid name until it is renamed.
                let read = |check: &mut Checker, value: &Value| match value.as_str() {
                    Some(given) if given == name => Some(given.to_owned()),
                    _ => secret::name(check, value),
                };
                fields.nullable(check, "name", read).map(|given| given.unwrap_or_else(|| name.to_owned()))
            }
            None => fields.required(check, "name", secret::name),
        };
        let value = check.within("value", |check| match body.get("value") {
            None | Some(Value::Null) if name_of_path.is_some() => Some(None),
            None => {
                check.report_missing(harmless.clone());
                None
            }
            // A client that sends the mask back has no new value.
            Some(Value::String(text)) if text == MASK && name_of_path.is_some() => Some(None),
            // The value is not trimmed, because the line break at the end of a key file is part of it.
            Some(value) => secret::value_of_variable(check, value).map(|text| Some(text.to_owned())),
        });
        if let (Some(name), Some(Some(_))) = (&name, &value)
            && let Some(fault) = secret::fault_of_name(name)
        {
            check.within("name", |check| {
                check.report_value_error(
                    format_args!("{fault}; send another name with the value"),
                    name.as_str().into(),
                );
            });
        }
        let description =
            fields.nullable(check, "description", |check, value| validation::string_up_to(MAX_TEXT, check, value));
        Some(Self { name: name?, value: value?, description: description? })
    }
}

impl SettingsDocument {
    /// The names of the custom secrets with their descriptions, in the order of the names.
    pub fn secrets(&self) -> impl Iterator<Item = (&str, Option<&str>)> {
        let mut secrets: Vec<_> = self
            .0
            .get(SECRETS)
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
            .map(|(name, secret)| (name.as_str(), secret["description"].as_str()))
            .collect();
        secrets.sort_unstable();
        secrets.into_iter()
    }

    /// Creates a secret, or replaces the one of the same name. Returns whether the secret is new.
    ///
    /// # Errors
    /// [`Error::Refused`] when the user has too many secrets.
    pub fn put_secret(&mut self, change: &SecretChange) -> Result<bool> {
        let secrets = self.part(SECRETS);
        let stored = secrets.get(&change.name).cloned();
        if stored.is_none() && secrets.len() >= MAX_SECRETS {
            return Err(Error::Refused(format!(
                "You have {MAX_SECRETS} secrets, the most that are allowed; delete one first"
            )));
        }
        let new = stored.is_none();
        let mut stored = stored.unwrap_or_else(|| json!({"secret": "", "description": null}));
        set_secret(&mut stored, change);
        secrets.insert(change.name.clone(), stored);
        Ok(new)
    }

    /// Changes a secret, including its name.
    ///
    /// # Errors
    /// [`Error::NotFound`], or [`Error::Conflict`] when another secret has the new name.
    pub fn change_secret(&mut self, name: &str, change: &SecretChange) -> Result<()> {
        let secrets = self.part(SECRETS);
        let mut stored = secrets.get(name).cloned().ok_or_else(|| no_secret(name))?;
        if name != change.name && secrets.contains_key(&change.name) {
            return Err(Error::Conflict(format!("Secret {} already exists", change.name)));
        }
        secrets.remove(name);
        set_secret(&mut stored, change);
        secrets.insert(change.name.clone(), stored);
        Ok(())
    }

    /// # Errors
    /// [`Error::NotFound`].
    pub fn delete_secret(&mut self, name: &str) -> Result<()> {
        self.part(SECRETS).remove(name).map(|_| ()).ok_or_else(|| no_secret(name))
    }
}

fn no_secret(name: &str) -> Error {
    Error::NotFound(format!("Secret {name} not found"))
}

fn set_secret(stored: &mut Value, change: &SecretChange) {
    if let Some(value) = &change.value {
        if let Some(fields) = stored.as_object_mut() {
            // Stored documents may have the value under this name.
            fields.remove("value");
        }
        stored["secret"] = value.as_str().into();
    }
    if let Some(description) = &change.description {
        stored["description"] = description.as_str().into();
    }
}
