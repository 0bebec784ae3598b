//! Builds update expressions and conditions. Attributes are addressed by paths such as `metrics.cost` or `messages[0]`; every name is a
//! placeholder in the expression, so that DynamoDB's reserved words cause no conflict.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;

use aws_sdk_dynamodb::types::{self, AttributeValue, TransactWriteItem};

use super::{Item, number};
use crate::error::{Error, Result};

/// A condition on an item.
#[derive(Clone, Debug, PartialEq)]
pub enum Condition {
    /// The item has this attribute.
    Exists(&'static str),
    /// The item lacks this attribute.
    Missing(&'static str),
    /// The attribute compares with the value by `=`, `<>`, `<`, `<=`, `>` or `>=`.
    Compare(&'static str, &'static str, AttributeValue),
    /// The attribute has one of these values.
    In(&'static str, Vec<AttributeValue>),
    /// The attribute is a set or a list that contains this text.
    Contains(&'static str, AttributeValue),
    /// The item lacks the attribute, or the attribute does not contain this text.
    Lacks(&'static str, AttributeValue),
    /// The size of the attribute (members of a list, bytes of a text) compares with the number by an operator.
    Size(&'static str, &'static str, u32),
    /// All of these hold.
    All(Vec<Condition>),
    /// At least one of these holds.
    Any(Vec<Condition>),
}

impl Condition {
    /// The attribute has this value.
    #[must_use]
    pub fn equal(path: &'static str, value: AttributeValue) -> Self {
        Self::Compare(path, "=", value)
    }

    /// The attribute has this value, or the item lacks it where there is no value.
    #[must_use]
    pub fn unchanged(path: &'static str, value: Option<AttributeValue>) -> Self {
        value.map_or(Self::Missing(path), |value| Self::equal(path, value))
    }

    /// The item lacks the attribute, or has another value of it.
    #[must_use]
    pub fn not_equal(path: &'static str, value: AttributeValue) -> Self {
        Self::Any(vec![Self::Missing(path), Self::Compare(path, "<>", value)])
    }

    fn write_to(&self, text: &mut Expression) -> String {
        let joined = |text: &mut Expression, conditions: &[Self], operator: &str| {
            let parts: Vec<String> = conditions.iter().map(|condition| condition.write_to(text)).collect();
            if parts.len() == 1 { parts.concat() } else { format!("({})", parts.join(operator)) }
        };
        match self {
            Self::Exists(path) => format!("attribute_exists({})", text.path(path)),
            Self::Missing(path) => format!("attribute_not_exists({})", text.path(path)),
            Self::Compare(path, operator, value) => {
                format!("{} {operator} {}", text.path(path), text.value(value.clone()))
            }
            Self::In(path, values) => {
                let values: Vec<String> = values.iter().map(|value| text.value(value.clone())).collect();
                format!("{} IN ({})", text.path(path), values.join(", "))
            }
            Self::Contains(path, value) => {
                format!("contains({}, {})", text.path(path), text.value(value.clone()))
            }
            Self::Lacks(path, value) => {
                let path = text.path(path);
                format!("(attribute_not_exists({path}) OR NOT contains({path}, {}))", text.value(value.clone()))
            }
            Self::Size(path, operator, size) => {
                format!("size({}) {operator} {}", text.path(path), text.value(number(*size)))
            }
            Self::All(conditions) => joined(text, conditions, " AND "),
            Self::Any(conditions) => joined(text, conditions, " OR "),
        }
    }
}

/// The names and values of an expression's placeholders.
#[derive(Clone, Debug, Default)]
pub(super) struct Expression {
    pub(super) names: HashMap<String, String>,
    pub(super) values: HashMap<String, AttributeValue>,
    placeholders: HashMap<String, String>,
}

impl Expression {
    /// The expression of a condition alone, for a write that is not an update.
    pub(super) fn of(condition: &Condition) -> (String, Self) {
        let mut expression = Self::default();
        (condition.write_to(&mut expression), expression)
    }

    /// The attributes' names; `None` if there are none, because DynamoDB refuses an empty map.
    pub(super) fn names(&self) -> Option<HashMap<String, String>> {
        (!self.names.is_empty()).then(|| self.names.clone())
    }

    /// The attributes' values; `None` if there are none.
    pub(super) fn values(&self) -> Option<HashMap<String, AttributeValue>> {
        (!self.values.is_empty()).then(|| self.values.clone())
    }

    fn path(&mut self, path: &str) -> String {
        let mut written = String::new();
        for (index, step) in path.split('.').enumerate() {
            let (name, element) = step.split_at(step.find('[').unwrap_or(step.len()));
            let next = format!("#n{}", self.placeholders.len());
            let placeholder = self.placeholders.entry(name.to_owned()).or_insert(next);
            self.names.insert(placeholder.clone(), name.to_owned());
            let dot = if index == 0 { "" } else { "." };
            // Writing to a `String` does not fail.
            let _ = write!(written, "{dot}{placeholder}{element}");
        }
        written
    }

    fn value(&mut self, value: AttributeValue) -> String {
        let placeholder = format!(":v{}", self.values.len());
        self.values.insert(placeholder.clone(), value);
        placeholder
    }
}

/// A conditional update of one item, for `UpdateItem` ([`super::Table::update`]) or as part of a transaction.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct Update {
    expression: Expression,
    set: Vec<String>,
    remove: Vec<String>,
    add: Vec<String>,
    delete: Vec<String>,
    append: Vec<(&'static str, Vec<AttributeValue>)>,
    conditions: Vec<Condition>,
}

impl Update {
    /// An empty update.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether the update changes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let clauses = [&self.set, &self.remove, &self.add, &self.delete];
        clauses.iter().all(|clause| clause.is_empty()) && self.append.is_empty()
    }

    pub fn set(mut self, path: &str, value: AttributeValue) -> Self {
        let (path, value) = (self.expression.path(path), self.expression.value(value));
        self.set.push(format!("{path} = {value}"));
        self
    }

    /// Sets an attribute, or removes it if there is no value.
    pub fn set_or_remove(self, path: &str, value: Option<AttributeValue>) -> Self {
        match value {
            Some(value) => self.set(path, value),
            None => self.remove(path),
        }
    }

    /// Sets an attribute unless the item has it.
    pub fn set_if_missing(mut self, path: &str, value: AttributeValue) -> Self {
        let (path, value) = (self.expression.path(path), self.expression.value(value));
        self.set.push(format!("{path} = if_not_exists({path}, {value})"));
        self
    }

    /// Sets all attributes of an item, in the order of their names.
    pub fn set_all(self, item: Item) -> Self {
        let attributes: BTreeMap<String, AttributeValue> = item.into_iter().collect();
        attributes.into_iter().fold(self, |update, (name, value)| update.set(&name, value))
    }

    /// Appends values to a list, which is created if missing. Several appends to one list are combined, because an expression may contain a
    /// path only once.
    ///
    /// An append is not idempotent: send it with [`super::Table::update_once`], in a transaction, or under a condition that the append
    /// invalidates.
    pub fn append(mut self, path: &'static str, values: impl IntoIterator<Item = AttributeValue>) -> Self {
        match self.append.iter_mut().find(|(known, _)| *known == path) {
            Some((_, list)) => list.extend(values),
            None => self.append.push((path, values.into_iter().collect())),
        }
        self
    }

    /// Adds to a number, which is created if missing. Like [`Update::append`], it is not idempotent.
    pub fn add(mut self, path: &str, value: i64) -> Self {
        let value = AttributeValue::N(value.to_string());
        let (path, value) = (self.expression.path(path), self.expression.value(value));
        self.add.push(format!("{path} {value}"));
        self
    }

    /// Adds a text to a set, which is created if missing. Idempotent.
    pub fn add_to_set(mut self, path: &str, value: &str) -> Self {
        let value = AttributeValue::Ss(vec![value.to_owned()]);
        let (path, value) = (self.expression.path(path), self.expression.value(value));
        self.add.push(format!("{path} {value}"));
        self
    }

    /// Removes a text from a set. An item has no empty set: the attribute goes with its last member. Idempotent.
    pub fn remove_from_set(mut self, path: &str, value: &str) -> Self {
        let value = AttributeValue::Ss(vec![value.to_owned()]);
        let (path, value) = (self.expression.path(path), self.expression.value(value));
        self.delete.push(format!("{path} {value}"));
        self
    }

    pub fn remove(mut self, path: &str) -> Self {
        let path = self.expression.path(path);
        self.remove.push(path);
        self
    }

    pub fn remove_all(self, paths: &[&str]) -> Self {
        paths.iter().fold(self, |update, path| update.remove(path))
    }

    /// Adds a condition to the update.
    pub fn condition(mut self, condition: Condition) -> Self {
        self.conditions.push(condition);
        self
    }

    /// The update as part of a transaction.
    ///
    /// # Errors
    /// [`Error::Internal`] when it changes nothing.
    pub fn in_transaction(self, table: &str, key: Item) -> Result<TransactWriteItem> {
        let (update, condition, expression) = self.expressions();
        let update = types::Update::builder()
            .table_name(table)
            .set_key(Some(key))
            .set_update_expression(update)
            .set_condition_expression(condition)
            .set_expression_attribute_names(expression.names())
            .set_expression_attribute_values(expression.values())
            .build()
            .map_err(Error::internal)?;
        Ok(TransactWriteItem::builder().update(update).build())
    }

    /// The update expression, the condition expression, and their placeholders.
    pub(super) fn expressions(mut self) -> (Option<String>, Option<String>, Expression) {
        for (path, values) in std::mem::take(&mut self.append) {
            let path = self.expression.path(path);
            let empty = self.expression.value(AttributeValue::L(Vec::new()));
            let values = self.expression.value(AttributeValue::L(values));
            self.set.push(format!("{path} = list_append(if_not_exists({path}, {empty}), {values})"));
        }
        let clauses = [("SET", self.set), ("REMOVE", self.remove), ("ADD", self.add), ("DELETE", self.delete)];
        let clauses: Vec<String> = clauses
            .into_iter()
            .filter(|(_, parts)| !parts.is_empty())
            .map(|(clause, parts)| format!("{clause} {}", parts.join(", ")))
            .collect();
        let mut expression = self.expression;
        let conditions: Vec<String> =
            self.conditions.iter().map(|condition| condition.write_to(&mut expression)).collect();
        let some = |parts: Vec<String>, operator: &str| (!parts.is_empty()).then(|| parts.join(operator));
        (some(clauses, " "), some(conditions, " AND "), expression)
    }
}

/// The result of a conditional update.
#[derive(Clone, Debug, PartialEq)]
#[must_use]
pub enum Outcome {
    /// The updated item.
    Applied(Item),
    /// A condition does not hold. Contains the current item, if there is one.
    ConditionFailed(Option<Item>),
}

impl Outcome {
    /// Whether the update was applied.
    #[must_use]
    pub fn is_applied(&self) -> bool {
        matches!(self, Self::Applied(_))
    }

    /// The item after the update, `None` when a condition does not hold.
    #[must_use]
    pub fn applied(self) -> Option<Item> {
        match self {
            Self::Applied(item) => Some(item),
            Self::ConditionFailed(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dynamo::text;

    #[test]
    fn clauses_share_names_and_conditions_are_joined() {
        let update = Update::new()
            .set("status", text("READY"))
            .set("metrics.cost", number(1))
            .set_or_remove("title", None)
            .set_if_missing("due_at", text("t"))
            .remove("messages[0]")
            .add("open_claims", -1)
            .append("notes", [text("a")])
            .append("notes", [text("b")])
            .condition(Condition::Exists("id"))
            .condition(Condition::Any(vec![
                Condition::equal("status", text("WORKING")),
                Condition::All(vec![Condition::Missing("status"), Condition::Size("messages", "<", 10)]),
            ]))
            .condition(Condition::In("messages[0].id", vec![text("1"), text("2")]));
        let (update, condition, expression) = update.expressions();
        assert_eq!(
            update.expect("an update"),
            "SET #n0 = :v0, #n1.#n2 = :v1, #n4 = if_not_exists(#n4, :v2), #n7 = list_append(if_not_exists(#n7, :v4), :v5) \
             REMOVE #n3, #n5[0] ADD #n6 :v3"
        );
        assert_eq!(
            condition.expect("a condition"),
            "attribute_exists(#n8) AND (#n0 = :v6 OR (attribute_not_exists(#n0) AND size(#n5) < :v7)) \
             AND #n5[0].#n8 IN (:v8, :v9)"
        );
        let mut names: Vec<_> = expression.names.iter().map(|(key, name)| format!("{key}={name}")).collect();
        names.sort();
        assert_eq!(
            names.join(" "),
            "#n0=status #n1=metrics #n2=cost #n3=title #n4=due_at #n5=messages #n6=open_claims #n7=notes #n8=id"
        );
        assert_eq!(expression.values[":v5"], AttributeValue::L(vec![text("a"), text("b")]));
        assert_eq!(expression.values[":v3"], AttributeValue::N("-1".into()));
    }

    #[test]
    fn sets_have_clauses_of_their_own() {
        let update = Update::new()
            .add_to_set("conversations", "c")
            .remove_from_set("starts", "t")
            .condition(Condition::Contains("starts", text("t")));
        assert!(!update.is_empty() && !Update::new().remove_from_set("starts", "t").is_empty());
        let (update, condition, expression) = update.expressions();
        assert_eq!(update.as_deref(), Some("ADD #n0 :v0 DELETE #n1 :v1"));
        assert_eq!(condition.as_deref(), Some("contains(#n1, :v2)"));
        assert_eq!(expression.values[":v1"], AttributeValue::Ss(vec!["t".into()]));
        assert_eq!(expression.values[":v2"], text("t"));
    }

    #[test]
    fn what_is_not_needed_is_left_out() {
        let (update, condition, expression) = Update::new().remove("lease_owner").expressions();
        assert_eq!((update.as_deref(), condition), (Some("REMOVE #n0"), None));
        assert_eq!(expression.values(), None);
        assert!(Update::new().is_empty());
        assert!(Update::new().in_transaction("t", Item::new()).is_err());
        let (condition, expression) = Expression::of(&Condition::Any(vec![Condition::Missing("user")]));
        assert_eq!(condition, "attribute_not_exists(#n0)");
        assert_eq!(expression.names().expect("names")["#n0"], "user");
    }
}
