//! Nested settings objects whose fields are declared in a table: reads, merges and shows them.
//!
//! An object is stored sparsely: without the fields that have their default. Changes are merge patches (RFC 7396) with two additions: a
//! secret that is the mask stays as it is, and a blank secret is removed as null is.

use serde_json::{Map, Value, json};

use crate::http::pydantic::validation::{self, Checker};
use crate::http::secret::{self, MASK};

/// The longest text, in characters.
const MAX_TEXT: usize = 10_000;
/// The most entries of a list or of an object with any keys.
const MAX_ENTRIES: usize = 1_000;

/// The values of a field.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// A text.
    Text,
    /// A text that responses do not show.
    Secret,
    /// true or false.
    Flag,
    /// An integer of at least this value.
    Integer(i64),
    /// A number between these values.
    Number(f64, f64),
    /// One of these texts.
    Choice(&'static [&'static str]),
    /// A list of texts.
    Texts,
    /// An object of secrets with any names.
    Secrets,
    /// Any list.
    List,
    /// Any object.
    Open,
    /// An object with these fields.
    Object(&'static [Field]),
}

/// The value of a field that is not stored.
#[derive(Clone, Copy, Debug)]
pub enum Preset {
    /// Null.
    Null,
    /// A flag.
    Flag(bool),
    /// An integer.
    Integer(i64),
    /// A number.
    Number(f64),
    /// A text.
    Text(&'static str),
    /// An empty list.
    List,
    /// An empty object, or the defaults of an object's fields.
    Object,
}

impl Preset {
    fn value(self) -> Value {
        match self {
            Self::Null => Value::Null,
            Self::Flag(flag) => flag.into(),
            Self::Integer(integer) => integer.into(),
            Self::Number(number) => number.into(),
            Self::Text(text) => text.into(),
            Self::List => json!([]),
            Self::Object => json!({}),
        }
    }
}

/// A declared field.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its key.
    pub name: &'static str,
    /// Its values.
    pub kind: Kind,
    /// Its value where none is stored.
    pub default: Preset,
    /// Whether null is a value of its own, beside the default.
    pub nullable: bool,
}

impl Field {
    /// A field whose default is null.
    #[must_use]
    pub const fn optional(name: &'static str, kind: Kind) -> Self {
        Self { name, kind, default: Preset::Null, nullable: true }
    }

    /// A field that has a default.
    #[must_use]
    pub const fn with(name: &'static str, kind: Kind, default: Preset) -> Self {
        Self { name, kind, default, nullable: false }
    }

    /// A field that has a default and may be null.
    #[must_use]
    pub const fn nullable(name: &'static str, kind: Kind, default: Preset) -> Self {
        Self { name, kind, default, nullable: true }
    }
}

/// What a response shows in place of secrets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Secrets {
    /// Null, or for secrets with names the mask.
    Hidden,
    /// The mask.
    Masked,
    /// The secrets themselves.
    Clear,
}

fn field<'f>(fields: &'f [Field], name: &str) -> Option<&'f Field> {
    fields.iter().find(|field| field.name == name)
}

/// Reads an object: the declared fields that it has, each checked. Null stays null, and a masked secret stays the mask. Other keys are left
/// out.
///
/// Violations: those of the fields; none contains a secret.
pub fn read(check: &mut Checker, fields: &'static [Field], given: &Map<String, Value>) -> Option<Map<String, Value>> {
    let mut read = Map::new();
    let mut is_valid = true;
    for (name, value) in given {
        let Some(field) = field(fields, name) else { continue };
        match check.within(field.name, |check| read_value(check, field.kind, value)) {
            Some(value) => {
                read.insert(name.clone(), value);
            }
            None => is_valid = false,
        }
    }
    is_valid.then_some(read)
}

/// Reads an object of declared fields, or null.
pub fn read_object(check: &mut Checker, fields: &'static [Field], value: &Value) -> Option<Value> {
    match value {
        Value::Null => Some(Value::Null),
        Value::Object(given) => read(check, fields, given).map(Value::Object),
        _ => report_no_object(check),
    }
}

/// The value is not shown: an object may contain secrets, so may what was sent in its place.
fn report_no_object<T>(check: &mut Checker) -> Option<T> {
    check.report("dict_type", "Input should be a valid dictionary", MASK.into(), None);
    None
}

fn read_value(check: &mut Checker, kind: Kind, value: &Value) -> Option<Value> {
    if value.is_null() {
        return Some(Value::Null);
    }
    match kind {
        Kind::Text => validation::string_up_to(MAX_TEXT, check, value).map(Value::from),
        Kind::Secret => secret::value(check, value).map(|text| text.trim().into()),
        Kind::Flag => validation::boolean(check, value).map(Value::from),
        Kind::Integer(least) => {
            let integer = validation::integer(check, value)?;
            within(check, value, integer >= least, "greater_than_equal", "greater than", "ge", least.into())?;
            Some(integer.into())
        }
        Kind::Number(least, most) => {
            let number = validation::float(check, value)?;
            within(check, value, number >= least, "greater_than_equal", "greater than", "ge", limit(least))?;
            within(check, value, number <= most, "less_than_equal", "less than", "le", limit(most))?;
            Some(number.into())
        }
        Kind::Choice(choices) => {
            let chosen = value.as_str().and_then(|text| choices.iter().find(|choice| **choice == text));
            if chosen.is_none() {
                validation::report_not_one_of("literal_error", choices.iter().copied(), check, value.clone());
            }
            chosen.map(|choice| (*choice).into())
        }
        Kind::Texts => {
            let texts = validation::list(check, value, |check, text| validation::string_up_to(MAX_TEXT, check, text))?;
            bounded(check, "List", texts.len())?;
            Some(texts.into())
        }
        Kind::List => {
            let Value::Array(items) = value else {
                check.report("list_type", "Input should be a valid list", MASK.into(), None);
                return None;
            };
            bounded(check, "List", items.len())?;
            Some(value.clone())
        }
        Kind::Secrets => {
            let Value::Object(entries) = value else { return report_no_object(check) };
            bounded(check, "Dictionary", entries.len())?;
            let mut read = Map::new();
            let mut is_valid = true;
            for (name, value) in entries {
                match check.within(name.clone(), |check| read_value(check, Kind::Secret, value)) {
                    Some(value) => {
                        read.insert(name.clone(), value);
                    }
                    None => is_valid = false,
                }
            }
            is_valid.then(|| read.into())
        }
        Kind::Open => {
            let Value::Object(entries) = value else { return report_no_object(check) };
            bounded(check, "Dictionary", entries.len())?;
            Some(value.clone())
        }
        Kind::Object(fields) => read_object(check, fields, value),
    }
}

/// A limit as pydantic writes it.
fn limit(limit: f64) -> Value {
    #[expect(clippy::cast_possible_truncation, reason = "small and whole")]
    if limit.fract() == 0.0 && limit.abs() < 1e6 { (limit as i64).into() } else { limit.into() }
}

fn within(
    check: &mut Checker,
    value: &Value,
    holds: bool,
    kind: &'static str,
    words: &str,
    name: &str,
    limit: Value,
) -> Option<()> {
    if !holds {
        let msg = format!("Input should be {words} or equal to {limit}");
        let ctx = Map::from_iter([(name.to_owned(), limit)]);
        check.report(kind, msg, value.clone(), Some(ctx.into()));
    }
    holds.then_some(())
}

fn bounded(check: &mut Checker, what: &str, length: usize) -> Option<()> {
    if length > MAX_ENTRIES {
        secret::report_too_long(check, what, MAX_ENTRIES, length);
    }
    (length <= MAX_ENTRIES).then_some(())
}

/// Merges a patch that [`read`] has checked into a stored object: null removes a field, an object is merged, and any other value replaces
/// the stored one. The mask leaves a secret unchanged; a blank secret is removed.
pub fn merge(fields: &'static [Field], stored: &mut Map<String, Value>, patch: &Map<String, Value>) {
    for (name, value) in patch {
        let Some(field) = field(fields, name) else { continue };
        match (field.kind, value) {
            (_, Value::Null) => {
                stored.shift_remove(name);
            }
            (Kind::Secret, _) => merge_secret(stored, name, value),
            (Kind::Object(fields), Value::Object(patch)) => {
                with_object(stored, name, |object| merge(fields, object, patch));
            }
            (Kind::Secrets, Value::Object(patch)) => {
                with_object(stored, name, |object| {
                    for (name, value) in patch {
                        merge_secret(object, name, value);
                    }
                });
            }
            (Kind::Open, Value::Object(patch)) => with_object(stored, name, |object| merge_open(object, patch)),
            _ => put(stored, field, value.clone()),
        }
    }
}

fn merge_secret(stored: &mut Map<String, Value>, name: &str, value: &Value) {
    match value.as_str() {
        Some(MASK) => {}
        None | Some("") => {
            stored.shift_remove(name);
        }
        Some(secret) => {
            stored.insert(name.to_owned(), secret.into());
        }
    }
}

fn merge_open(stored: &mut Map<String, Value>, patch: &Map<String, Value>) {
    for (name, value) in patch {
        match value {
            Value::Null => {
                stored.shift_remove(name);
            }
            Value::Object(patch) => with_object(stored, name, |object| merge_open(object, patch)),
            value => {
                stored.insert(name.clone(), value.clone());
            }
        }
    }
}

/// Changes an object in its place; one that becomes empty is removed.
fn with_object(stored: &mut Map<String, Value>, name: &str, change: impl FnOnce(&mut Map<String, Value>)) {
    let mut object = match stored.get_mut(name) {
        Some(Value::Object(object)) => std::mem::take(object),
        _ => Map::new(),
    };
    change(&mut object);
    if object.is_empty() {
        stored.shift_remove(name);
    } else {
        stored.insert(name.to_owned(), object.into());
    }
}

/// Stores a value unless it is the default. Of a text without a default, a blank is none.
fn put(stored: &mut Map<String, Value>, field: &Field, value: Value) {
    let is_blank = matches!((field.kind, field.default), (Kind::Text, Preset::Null))
        && value.as_str().is_some_and(|text| text.trim().is_empty());
    if is_blank || value == field.default.value() {
        stored.shift_remove(field.name);
    } else {
        stored.insert(field.name.to_owned(), value);
    }
}

/// An object that replaces the stored one whole. Of the stored object remain only secrets: those for which the mask was sent, and those that
/// are not named at all. Null is kept where it is a value of its own.
#[must_use]
pub fn replaced(
    fields: &'static [Field],
    stored: Option<&Map<String, Value>>,
    given: &Map<String, Value>,
) -> Map<String, Value> {
    let mut next = Map::new();
    for field in fields {
        let stored = stored.and_then(|stored| stored.get(field.name));
        match (field.kind, given.get(field.name)) {
            (Kind::Secret, None) => {
                if let Some(secret) = stored {
                    next.insert(field.name.to_owned(), secret.clone());
                }
            }
            (_, None) => {}
            (Kind::Secret, Some(value)) => {
                if let Some(secret) = stored.filter(|_| value == MASK) {
                    next.insert(field.name.to_owned(), secret.clone());
                }
                merge_secret(&mut next, field.name, value);
            }
            (Kind::Secrets, Some(Value::Object(given))) => {
                let stored = stored.and_then(Value::as_object);
                let mut secrets = Map::new();
                for (name, value) in given {
                    if let Some(secret) = stored.and_then(|stored| stored.get(name)).filter(|_| value == MASK) {
                        secrets.insert(name.clone(), secret.clone());
                    }
                    merge_secret(&mut secrets, name, value);
                }
                if !secrets.is_empty() {
                    next.insert(field.name.to_owned(), secrets.into());
                }
            }
            (Kind::Object(fields), Some(Value::Object(given))) => {
                let object = replaced(fields, stored.and_then(Value::as_object), given);
                if !object.is_empty() {
                    next.insert(field.name.to_owned(), object.into());
                }
            }
            (_, Some(Value::Null)) if !field.nullable => {}
            (_, Some(value)) => put(&mut next, field, value.clone()),
        }
    }
    next
}

/// Removes every secret of an object.
pub fn remove_secrets(fields: &'static [Field], stored: &mut Map<String, Value>) {
    for field in fields {
        match field.kind {
            Kind::Secret | Kind::Secrets => {
                stored.shift_remove(field.name);
            }
            Kind::Object(fields) => {
                if let Some(Value::Object(object)) = stored.get_mut(field.name) {
                    remove_secrets(fields, object);
                }
            }
            _ => {}
        }
    }
}

/// Every declared field in the order of the table, with its value or default.
#[must_use]
pub fn shown(fields: &'static [Field], stored: &Map<String, Value>, secrets: Secrets) -> Map<String, Value> {
    let mask = |value: &Value| if secrets == Secrets::Clear { value.clone() } else { MASK.into() };
    let show = |field: &Field| {
        let stored = stored.get(field.name);
        match (field.kind, stored) {
            (Kind::Object(fields), _) => {
                let empty = Map::new();
                shown(fields, stored.and_then(Value::as_object).unwrap_or(&empty), secrets).into()
            }
            (_, None) => field.default.value(),
            (Kind::Secret, Some(_)) if secrets == Secrets::Hidden => Value::Null,
            (Kind::Secret, Some(value)) => mask(value),
            (Kind::Secrets, Some(Value::Object(entries))) => {
                entries.iter().map(|(name, value)| (name.clone(), mask(value))).collect::<Map<_, _>>().into()
            }
            (_, Some(value)) => value.clone(),
        }
    };
    fields.iter().map(|field| (field.name.to_owned(), show(field))).collect()
}

/// A stored object without what this version does not accept: unknown fields, fields with invalid values, and masks without a secret. Fields
/// with their default are removed, too.
#[must_use]
pub fn sparse(fields: &'static [Field], stored: &Map<String, Value>) -> Map<String, Value> {
    let mut valid = Map::new();
    for (name, value) in stored {
        let Some(field) = field(fields, name) else { continue };
        if let (Kind::Object(fields), Value::Object(object)) = (field.kind, value) {
            valid.insert(name.clone(), sparse(fields, object).into());
            continue;
        }
        let mut check = Checker::new("body");
        if let Some(value) = read_value(&mut check, field.kind, value) {
            valid.insert(name.clone(), value);
        }
    }
    replaced(fields, None, &valid)
}

/// Schemas of shown objects in the OpenAPI document.
#[cfg(feature = "openapi")]
pub mod schema {
    use utoipa::openapi::schema::{SchemaType, Type};
    use utoipa::openapi::{ObjectBuilder, RefOr, Schema};

    use super::{Field, Kind};

    /// The schema of an object with declared fields and with others of these JSON types.
    #[must_use]
    pub fn of(fields: &[Field], others: &[(&str, &str)]) -> RefOr<Schema> {
        let mut object = ObjectBuilder::new().schema_type(SchemaType::Type(Type::Object));
        for (name, kind) in others {
            let kind = match *kind {
                "integer" => Type::Integer,
                "boolean" => Type::Boolean,
                "object" => Type::Object,
                _ => Type::String,
            };
            object = object.property(*name, ObjectBuilder::new().schema_type(SchemaType::Type(kind))).required(*name);
        }
        for field in fields {
            object = object.property(field.name, of_field(field)).required(field.name);
        }
        object.into()
    }

    fn of_field(field: &Field) -> RefOr<Schema> {
        let kind = match field.kind {
            Kind::Object(fields) => return of(fields, &[]),
            Kind::Text | Kind::Secret | Kind::Choice(_) => Type::String,
            Kind::Flag => Type::Boolean,
            Kind::Integer(_) => Type::Integer,
            Kind::Number(..) => Type::Number,
            Kind::Texts | Kind::List => Type::Array,
            Kind::Secrets | Kind::Open => Type::Object,
        };
        let is_nullable = field.nullable || matches!(field.kind, Kind::Secret);
        let schema_type = match is_nullable {
            true => SchemaType::from_iter([kind, Type::Null]),
            false => SchemaType::Type(kind),
        };
        ObjectBuilder::new().schema_type(schema_type).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INNER: &[Field] =
        &[Field::optional("key", Kind::Secret), Field::with("size", Kind::Integer(20), Preset::Integer(240))];
    const FIELDS: &[Field] = &[
        Field::optional("name", Kind::Text),
        Field::optional("key", Kind::Secret),
        Field::optional("headers", Kind::Secrets),
        Field::nullable("effort", Kind::Choice(&["low", "high"]), Preset::Text("high")),
        Field::optional("share", Kind::Number(0.0, 1.0)),
        Field::with("body", Kind::Open, Preset::Object),
        Field::with("words", Kind::Texts, Preset::List),
        Field::with("inner", Kind::Object(INNER), Preset::Object),
    ];

    fn object(value: &Value) -> Map<String, Value> {
        value.as_object().expect("an object").clone()
    }

    fn given(value: &Value) -> Map<String, Value> {
        let mut check = Checker::new("body");
        let read = read(&mut check, FIELDS, &object(value));
        check.finish(read).expect("valid")
    }

    #[test]
    fn a_patch_merges_and_null_removes() {
        let mut stored = Map::new();
        let steps = [
            (
                json!({"name": "a", "key": " k ", "effort": "low", "unknown": 1, "inner": {"size": 100, "key": "i"}}),
                json!({"name": "a", "key": "k", "effort": "low", "inner": {"size": 100, "key": "i"}}),
            ),
            (
                json!({"name": "b", "key": MASK, "effort": "high", "inner": {"size": null, "key": MASK}}),
                json!({"name": "b", "key": "k", "inner": {"key": "i"}}),
            ),
            (json!({"key": "", "inner": {"key": null}, "words": ["x"]}), json!({"name": "b", "words": ["x"]})),
            (
                json!({"words": null, "headers": {"A": "1", "B": "2"}, "body": {"a": {"b": 1, "c": 2}}}),
                json!({"name": "b", "headers": {"A": "1", "B": "2"}, "body": {"a": {"b": 1, "c": 2}}}),
            ),
            (
                json!({"headers": {"A": MASK, "B": null}, "body": {"a": {"b": null}}}),
                json!({"name": "b", "headers": {"A": "1"}, "body": {"a": {"c": 2}}}),
            ),
            (json!({"name": null, "headers": null, "body": null}), json!({})),
        ];
        for (patch, expected) in steps {
            merge(FIELDS, &mut stored, &given(&patch));
            assert_eq!(Value::Object(stored.clone()), expected, "{patch}");
        }
    }

    #[test]
    fn a_replacement_keeps_only_secrets_that_are_masked_or_not_named() {
        let stored = object(&json!({"name": "a", "key": "k", "headers": {"A": "1", "B": "2"}, "share": 0.5}));
        let next = |value: Value| Value::Object(replaced(FIELDS, Some(&stored), &given(&value)));
        assert_eq!(
            next(json!({"name": "b", "headers": {"A": MASK}})),
            json!({"name": "b", "key": "k", "headers": {"A": "1"}})
        );
        assert_eq!(next(json!({"key": MASK, "effort": null})), json!({"key": "k", "effort": null}));
        assert_eq!(next(json!({"key": null, "headers": {"C": MASK}})), json!({}));
        assert_eq!(next(json!({"key": "new", "share": 1})), json!({"key": "new", "share": 1.0}));
    }

    #[test]
    fn violations_show_no_secret() {
        for (value, kind, place) in [
            (json!({"key": ["canary"]}), "string_type", json!(["body", "key"])),
            (json!({"headers": "canary"}), "dict_type", json!(["body", "headers"])),
            (json!({"headers": {"A": 5}}), "string_type", json!(["body", "headers", "A"])),
            (json!({"inner": "canary"}), "dict_type", json!(["body", "inner"])),
            (json!({"inner": {"size": 5}}), "greater_than_equal", json!(["body", "inner", "size"])),
            (json!({"share": 1.5}), "less_than_equal", json!(["body", "share"])),
            (json!({"effort": "most"}), "literal_error", json!(["body", "effort"])),
            (json!({"name": 5}), "string_type", json!(["body", "name"])),
        ] {
            let mut check = Checker::new("body");
            let read = read(&mut check, FIELDS, &object(&value));
            let violations = serde_json::to_value(check.finish(read).expect_err("not valid")).expect("JSON");
            assert_eq!((&violations[0]["type"], &violations[0]["loc"]), (&json!(kind), &place), "{violations}");
            assert!(!violations.to_string().contains("canary"), "{violations}");
        }
    }

    #[test]
    fn every_field_is_shown_and_secrets_are_not() {
        let stored = object(&json!({"key": "k", "headers": {"A": "1"}, "inner": {"key": "i"}}));
        let show = |secrets| Value::Object(shown(FIELDS, &stored, secrets));
        let masked = json!({"name": null, "key": MASK, "headers": {"A": MASK}, "effort": "high", "share": null, "body": {},
            "words": [], "inner": {"key": MASK, "size": 240}});
        assert_eq!(show(Secrets::Masked), masked);
        let hidden = show(Secrets::Hidden);
        assert_eq!(
            (&hidden["key"], &hidden["inner"]["key"], &hidden["headers"]["A"]),
            (&json!(null), &json!(null), &json!(MASK))
        );
        let clear = show(Secrets::Clear);
        assert_eq!(
            (&clear["key"], &clear["inner"]["key"], &clear["headers"]["A"]),
            (&json!("k"), &json!("i"), &json!("1"))
        );
        let mut without = stored.clone();
        remove_secrets(FIELDS, &mut without);
        assert_eq!(Value::Object(without), json!({"inner": {}}));
    }

    #[test]
    fn what_cannot_be_read_is_dropped_and_the_rest_stays() {
        let stored = json!({"name": 5, "key": MASK, "effort": null, "share": 0.5, "other": 1, "inner": {"size": 3, "key": "i"},
            "words": []});
        assert_eq!(
            Value::Object(sparse(FIELDS, &object(&stored))),
            json!({"effort": null, "share": 0.5, "inner": {"key": "i"}})
        );
    }
}
