//! The tables of the model of DynamoDB: items in memory, conditions, updates, transactions, queries and the units that they consume.
//! Everything is current, nothing fails; `dynamodb` adds that. A test compares it with the embedded engine of `cargo local`, which is
//! much slower: `cost_of_calls` in `tests.rs` prints the time of a call on both.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::dynamodb::{Key, Refusal, key_of, size_of, text, value_text};
use super::expressions::{
    Comparison, Condition, Item, Operand, Parsed, Placeholders, Projection, Update, parse_condition, parse_projection,
    parse_update, project,
};

/// What DynamoDB allows of an item, in bytes.
const MAX_ITEM: usize = 400 * 1024;
/// What DynamoDB evaluates for a page of a query or of a scan, in bytes.
const MAX_PAGE: usize = 1024 * 1024;
const MAX_TRANSACTION: usize = 100;
const MAX_TRANSACTION_SIZE: usize = 4 * 1024 * 1024;
const MAX_BATCH_GET: usize = 100;
const MAX_BATCH_WRITE: usize = 25;
const MAX_EXPRESSION: usize = 4096;

/// A table, or a copy of one in the order of an index.
#[derive(Debug, Default)]
struct Table {
    /// The names of the key's attributes.
    key: Vec<String>,
    /// The names of the index's key, if the items are in its order.
    index_key: Option<Vec<String>>,
    items: BTreeMap<Key, Arc<Value>>,
    /// The keys of the items in the order of the index: its key, then that of the table.
    sorted: BTreeMap<(Key, Key), Arc<Value>>,
}

/// The response to a call without the consumed capacity, the consumed units, and the items that the call wrote.
#[derive(Debug)]
pub(super) struct Done {
    pub answer: Value,
    pub units: f64,
    pub written: Vec<Written>,
}

/// An item that was written.
#[derive(Debug)]
pub(super) struct Written {
    pub table: String,
    pub key: Key,
    /// `None` if it was deleted.
    pub item: Option<Arc<Value>>,
}

/// Tables by their names.
#[derive(Debug, Default)]
pub(super) struct Engine {
    tables: BTreeMap<String, Table>,
    conditions: HashMap<String, Arc<Parsed<Condition>>>,
    updates: HashMap<String, Arc<Parsed<Update>>>,
    projections: HashMap<String, Arc<Parsed<Projection>>>,
}

type Answer = Result<Done, Refusal>;

fn invalid(message: impl AsRef<str>) -> Refusal {
    Refusal::new(400, "ValidationException", message.as_ref())
}

/// A write of one item, checked and ready to be applied.
struct Prepared {
    table: String,
    key: Key,
    before: Option<Arc<Value>>,
    after: Option<Arc<Value>>,
    /// `false` for a check alone.
    is_write: bool,
    /// The attributes that an update concerns.
    updated: Vec<String>,
}

/// Why a write was not prepared.
enum NotPrepared {
    /// The condition does not hold for this item.
    Condition(Option<Arc<Value>>),
    /// The write is not possible for this item.
    Invalid(String),
    Refused(Refusal),
}

impl From<Refusal> for NotPrepared {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl Prepared {
    fn units(&self) -> f64 {
        let size = |item: &Option<Arc<Value>>| item.as_ref().map_or(0, |item| size_of(item));
        write_units(size(&self.before).max(size(&self.after)))
    }
}

/// Of a write of an item of this size in bytes.
#[allow(clippy::cast_precision_loss, reason = "an item has 400 KiB at most")]
fn write_units(size: usize) -> f64 {
    size.div_ceil(1024).max(1) as f64
}

#[allow(clippy::cast_precision_loss, reason = "a page has 1 MiB at most")]
fn read_units(size: usize, is_consistent: bool) -> f64 {
    let units = size.div_ceil(4096).max(1) as f64;
    if is_consistent { units } else { units / 2.0 }
}

impl Engine {
    /// Creates a table with this key, whose items are in the order of an index if it has one.
    pub(super) fn create(&mut self, name: &str, key: &[String], index_key: Option<&[String]>) {
        let table = Table { key: key.to_vec(), index_key: index_key.map(<[_]>::to_vec), ..Table::default() };
        self.tables.insert(name.to_owned(), table);
    }

    /// The current item.
    pub(super) fn item(&self, table: &str, key: &Key) -> Option<Arc<Value>> {
        self.tables.get(table)?.items.get(key).cloned()
    }

    /// All items in the order of their keys.
    pub(super) fn items(&self, table: &str) -> impl Iterator<Item = &Arc<Value>> {
        self.tables[table].items.values()
    }

    /// The items of a partition in the order of their keys.
    pub(super) fn partition(&self, table: &str, partition: &str) -> impl Iterator<Item = &Arc<Value>> {
        let first = [partition.to_owned(), String::new()];
        let next = [format!("{partition}\0"), String::new()];
        self.tables[table].items.range(first..next).map(|(_, item)| item)
    }

    /// Puts an item or deletes it, without conditions.
    pub(super) fn store(&mut self, table: &str, key: Key, item: Option<Arc<Value>>) {
        self.tables.get_mut(table).expect("a table").store(key, item);
    }

    pub(super) fn execute(&mut self, operation: &str, request: &Value) -> Answer {
        match operation {
            "GetItem" => self.get(request),
            "BatchGetItem" => self.batch_get(request),
            "Query" | "Scan" => self.read_page(operation == "Scan", request),
            "PutItem" | "UpdateItem" | "DeleteItem" => self.write(operation, request),
            "BatchWriteItem" => self.batch_write(request),
            "TransactWriteItems" => self.transact(request),
            other => panic!("the model of DynamoDB has no {other}"),
        }
    }

    fn table(&self, name: &str) -> Result<&Table, Refusal> {
        let missing = || Refusal::new(400, "ResourceNotFoundException", "Requested resource not found");
        self.tables.get(name).ok_or_else(missing)
    }

    fn condition(&mut self, expression: &Value) -> Result<Option<Arc<Parsed<Condition>>>, Refusal> {
        cached(&mut self.conditions, expression, parse_condition)
    }

    fn projection(&mut self, request: &Value) -> Result<Option<Arc<Parsed<Projection>>>, Refusal> {
        cached(&mut self.projections, &request["ProjectionExpression"], parse_projection)
    }

    fn get(&mut self, request: &Value) -> Answer {
        let projection = self.projection(request)?;
        let placeholders = Placeholders::of(request);
        placeholders.check(&used([projection.as_deref().map(|one| &one.placeholders)])).map_err(invalid)?;
        let name = text(&request["TableName"]);
        let table = self.table(&name)?;
        let item = table.items.get(&table.key_in(&request["Key"])?);
        let units = read_units(item.map_or(0, |item| size_of(item)), request["ConsistentRead"] == true);
        let mut answer = json!({});
        if let Some(item) = item {
            answer["Item"] = shown(item, projection.as_deref(), &placeholders);
        }
        Ok(Done { answer, units, written: Vec::new() })
    }

    fn batch_get(&mut self, request: &Value) -> Answer {
        let mut responses = Map::new();
        let (mut units, mut count) = (0.0, 0);
        for (name, part) in request["RequestItems"].as_object().into_iter().flatten() {
            let projection = self.projection(part)?;
            let placeholders = Placeholders::of(part);
            placeholders.check(&used([projection.as_deref().map(|one| &one.placeholders)])).map_err(invalid)?;
            let table = self.table(name)?;
            let (mut found, mut seen) = (Vec::new(), BTreeSet::new());
            for key in part["Keys"].as_array().into_iter().flatten() {
                count += 1;
                let key = table.key_in(key)?;
                let item = table.items.get(&key);
                if !seen.insert(key) {
                    return Err(invalid("Provided list of item keys contains duplicates"));
                }
                units += read_units(item.map_or(0, |item| size_of(item)), part["ConsistentRead"] == true);
                found.extend(item.map(|item| shown(item, projection.as_deref(), &placeholders)));
            }
            responses.insert(name.clone(), found.into());
        }
        if count == 0 || count > MAX_BATCH_GET {
            return Err(invalid(format!("{count} keys in a batch")));
        }
        let answer = json!({ "Responses": responses, "UnprocessedKeys": {} });
        Ok(Done { answer, units, written: Vec::new() })
    }

    fn read_page(&mut self, is_scan: bool, request: &Value) -> Answer {
        let conditions = self.condition(&request["KeyConditionExpression"])?;
        let filter = self.condition(&request["FilterExpression"])?;
        let projection = self.projection(request)?;
        let placeholders = Placeholders::of(request);
        let placeholders_of = [
            conditions.as_deref().map(|one| &one.placeholders),
            filter.as_deref().map(|one| &one.placeholders),
            projection.as_deref().map(|one| &one.placeholders),
        ];
        placeholders.check(&used(placeholders_of)).map_err(invalid)?;
        let name = text(&request["TableName"]);
        let table = self.table(&name)?;
        let range = match (&conditions, is_scan) {
            (None, true) => KeyRange::default(),
            (Some(conditions), false) => {
                KeyRange::of(&conditions.expression, table.index_key.as_ref().unwrap_or(&table.key), &placeholders)?
            }
            _ => return Err(invalid("A query has a KeyConditionExpression, a scan has none")),
        };
        let limit = match request["Limit"].as_u64() {
            Some(0) => return Err(invalid("Limit must be at least 1")),
            Some(limit) => usize::try_from(limit).expect("a small number"),
            None => usize::MAX,
        };
        let after = match &request["ExclusiveStartKey"] {
            Value::Null => None,
            key => Some((table.index_key_of(key), table.key_in(key)?)),
        };
        let mut page = Page {
            items: Vec::new(),
            scanned: 0,
            size: 0,
            last: None,
            is_cut: false,
            limit,
            is_counted: request["Select"] == "COUNT",
            count: 0,
        };
        let accept = |item: &Item| filter.as_deref().is_none_or(|filter| filter.expression.holds(item, &placeholders));
        let show = |item: &Value| shown(item, projection.as_deref(), &placeholders);
        let is_forward = request["ScanIndexForward"] != false;
        table.visit(&range, after, is_forward, |item| page.add(item, accept, show));
        let units = read_units(page.size, request["ConsistentRead"] == true);
        let mut answer = json!({ "Count": page.count, "ScannedCount": page.scanned });
        if !page.is_counted {
            answer["Items"] = page.items.into();
        }
        if let Some(last) = page.last.filter(|_| page.is_cut) {
            let names = table.index_key.iter().flatten().chain(&table.key);
            let key: Item = names.map(|name| (name.clone(), last[name].clone())).collect();
            answer["LastEvaluatedKey"] = key.into();
        }
        Ok(Done { answer, units, written: Vec::new() })
    }

    fn write(&mut self, operation: &str, request: &Value) -> Answer {
        let kind = operation.trim_end_matches("Item");
        let prepared = match self.prepare(kind, request) {
            Ok(prepared) => prepared,
            Err(NotPrepared::Refused(refusal)) => return Err(refusal),
            Err(NotPrepared::Invalid(message)) => return Err(invalid(message)),
            Err(NotPrepared::Condition(item)) => {
                let is_wanted = request["ReturnValuesOnConditionCheckFailure"] == "ALL_OLD";
                return Err(Refusal::condition_failed(item.as_deref(), is_wanted));
            }
        };
        let units = prepared.units();
        let only_updated = |item: &Option<Arc<Value>>| {
            let members = item.as_ref().and_then(|item| item.as_object()).into_iter().flatten();
            let updated = members.filter(|(name, _)| prepared.updated.contains(name));
            Some(Value::Object(updated.map(|(name, value)| (name.clone(), value.clone())).collect()))
        };
        let whole = |item: &Option<Arc<Value>>| item.as_deref().cloned();
        let returned = match &*text(&request["ReturnValues"]) {
            "" | "NONE" => None,
            "ALL_OLD" => whole(&prepared.before),
            "ALL_NEW" if operation == "UpdateItem" => whole(&prepared.after),
            "UPDATED_OLD" if operation == "UpdateItem" => only_updated(&prepared.before),
            "UPDATED_NEW" if operation == "UpdateItem" => only_updated(&prepared.after),
            other => return Err(invalid(format!("{operation} does not return {other}"))),
        };
        let answer = returned.map_or_else(|| json!({}), |attributes| json!({ "Attributes": attributes }));
        let written = vec![self.apply(prepared)];
        Ok(Done { answer, units, written })
    }

    fn batch_write(&mut self, request: &Value) -> Answer {
        let mut prepared: Vec<Prepared> = Vec::new();
        for (table, writes) in request["RequestItems"].as_object().into_iter().flatten() {
            for write in writes.as_array().into_iter().flatten() {
                let (kind, content) = write.as_object().and_then(|write| write.iter().next()).expect("a write");
                let mut single = content.clone();
                single["TableName"] = table.as_str().into();
                match self.prepare(kind.trim_end_matches("Request"), &single) {
                    Ok(write) => prepared.push(write),
                    Err(NotPrepared::Refused(refusal)) => return Err(refusal),
                    Err(NotPrepared::Invalid(message)) => return Err(invalid(message)),
                    Err(NotPrepared::Condition(_)) => return Err(invalid("A batch has no conditions")),
                }
            }
        }
        if prepared.is_empty() || prepared.len() > MAX_BATCH_WRITE {
            return Err(invalid(format!("{} writes in a batch", prepared.len())));
        }
        let distinct: BTreeSet<(&str, &Key)> = prepared.iter().map(|write| (&*write.table, &write.key)).collect();
        if distinct.len() < prepared.len() {
            return Err(invalid("Provided list of item keys contains duplicates"));
        }
        let units = prepared.iter().map(Prepared::units).sum();
        let written = prepared.into_iter().map(|write| self.apply(write)).collect();
        Ok(Done { answer: json!({ "UnprocessedItems": {} }), units, written })
    }

    fn transact(&mut self, request: &Value) -> Answer {
        let actions = request["TransactItems"].as_array().map(Vec::as_slice).unwrap_or_default();
        if actions.is_empty() || actions.len() > MAX_TRANSACTION {
            return Err(invalid(format!("{} actions in a transaction", actions.len())));
        }
        let mut keys = BTreeSet::new();
        for action in actions {
            let (kind, action) = action.as_object().and_then(|action| action.iter().next()).expect("an action");
            let name = text(&action["TableName"]);
            let key = self.table(&name)?.key_in(&action[if kind == "Put" { "Item" } else { "Key" }])?;
            if !keys.insert((name, key)) {
                return Err(invalid("Transaction request cannot include multiple operations on one item"));
            }
        }
        let (mut prepared, mut reasons) = (Vec::new(), Vec::new());
        for action in actions {
            let (kind, action) = action.as_object().and_then(|action| action.iter().next()).expect("an action");
            match self.prepare(kind, action) {
                Ok(write) => {
                    prepared.push(write);
                    reasons.push(json!({ "Code": "None" }));
                }
                Err(NotPrepared::Refused(refusal)) => return Err(refusal),
                Err(NotPrepared::Invalid(message)) => {
                    reasons.push(json!({ "Code": "ValidationError", "Message": message }));
                }
                Err(NotPrepared::Condition(item)) => {
                    let mut reason =
                        json!({ "Code": "ConditionalCheckFailed", "Message": "The conditional request failed" });
                    if action["ReturnValuesOnConditionCheckFailure"] == "ALL_OLD"
                        && let Some(item) = item
                    {
                        reason["Item"] = (*item).clone();
                    }
                    reasons.push(reason);
                }
            }
        }
        if prepared.len() < actions.len() {
            return Err(Refusal::cancelled_for(reasons));
        }
        let size: usize = prepared.iter().filter_map(|write| write.after.as_ref()).map(|item| size_of(item)).sum();
        if size > MAX_TRANSACTION_SIZE {
            return Err(invalid("The items of a transaction are larger than 4 MB"));
        }
        let units = prepared.iter().map(|write| 2.0 * write.units()).sum();
        let writes = prepared.into_iter().filter(|write| write.is_write);
        let written = writes.collect::<Vec<_>>().into_iter().map(|write| self.apply(write)).collect();
        Ok(Done { answer: json!({}), units, written })
    }

    /// Checks a write.
    fn prepare(&mut self, kind: &str, request: &Value) -> Result<Prepared, NotPrepared> {
        let condition = self.condition(&request["ConditionExpression"])?;
        let update = cached(&mut self.updates, &request["UpdateExpression"], parse_update)?;
        let placeholders = Placeholders::of(request);
        let placeholders_of =
            [condition.as_deref().map(|one| &one.placeholders), update.as_deref().map(|one| &one.placeholders)];
        placeholders.check(&used(placeholders_of)).map_err(invalid)?;
        let name = text(&request["TableName"]);
        let table = self.table(&name)?;
        let key = table.key_in(&request[if kind == "Put" { "Item" } else { "Key" }])?;
        let before = table.items.get(&key).cloned();
        let nothing = Item::new();
        let present = before.as_ref().and_then(|item| item.as_object()).unwrap_or(&nothing);
        if condition.is_some_and(|condition| !condition.expression.holds(present, &placeholders)) {
            return Err(NotPrepared::Condition(before));
        }
        let mut updated = Vec::new();
        let after = match kind {
            "Put" => Some(Arc::new(request["Item"].clone())),
            "Delete" => None,
            "ConditionCheck" => before.clone(),
            _ => {
                let key_of_item = request["Key"].as_object().expect("a key");
                let item = if before.is_some() { present } else { key_of_item };
                let after = match &update {
                    Some(update) => update.expression.apply(item, &placeholders).map_err(NotPrepared::Invalid)?,
                    None => item.clone(),
                };
                if key_of_item.iter().any(|(name, value)| after.get(name) != Some(value)) {
                    return Err(NotPrepared::Invalid("Cannot update an attribute of the key".to_owned()));
                }
                let concerned = update.iter().flat_map(|update| update.expression.attributes(&placeholders));
                updated.extend(concerned.map(ToOwned::to_owned));
                Some(Arc::new(Value::from(after)))
            }
        };
        if after.as_ref().is_some_and(|item| size_of(item) > MAX_ITEM) {
            return Err(NotPrepared::Invalid("Item size has exceeded the maximum allowed size".to_owned()));
        }
        Ok(Prepared { table: name, key, before, after, is_write: kind != "ConditionCheck", updated })
    }

    fn apply(&mut self, write: Prepared) -> Written {
        let Prepared { table, key, after, .. } = write;
        self.store(&table, key.clone(), after.clone());
        Written { table, key, item: after }
    }
}

impl Table {
    fn store(&mut self, key: Key, item: Option<Arc<Value>>) {
        let before = match item.clone() {
            Some(item) => self.items.insert(key.clone(), item),
            None => self.items.remove(&key),
        };
        if self.index_key.is_none() {
            return;
        }
        if let Some(before) = before {
            self.sorted.remove(&(self.index_key_of(&before), key.clone()));
        }
        if let Some(item) = item {
            self.sorted.insert((self.index_key_of(&item), key), item);
        }
    }

    fn index_key_of(&self, item: &Value) -> Key {
        self.index_key.as_ref().map_or_else(Key::default, |names| key_of(names, item))
    }

    /// The key in a request.
    fn key_in(&self, item: &Value) -> Result<Key, Refusal> {
        for name in &self.key {
            if item[name]["S"].as_str().is_none_or(str::is_empty) {
                return Err(invalid(format!("One of the required keys has no value: {name}")));
            }
        }
        Ok(key_of(&self.key, item))
    }

    /// Visits the items of a range in their order, beginning behind a place, until the visitor says `false`.
    fn visit(
        &self,
        range: &KeyRange,
        after: Option<(Key, Key)>,
        is_forward: bool,
        visitor: impl FnMut(&Arc<Value>) -> bool,
    ) {
        if self.index_key.is_some() {
            let low = (range.low.clone(), Key::default());
            let end = range.end().map(|end| (end, Key::default()));
            visit(&self.sorted, low, end, after, is_forward, |(key, _)| range.contains(key), visitor);
        } else {
            let after = after.map(|(_, key)| key);
            visit(&self.items, range.low.clone(), range.end(), after, is_forward, |key| range.contains(key), visitor);
        }
    }
}

/// Visits what is between `low` and `end`, which is not visited itself.
fn visit<K: Ord>(
    items: &BTreeMap<K, Arc<Value>>,
    low: K,
    end: Option<K>,
    after: Option<K>,
    is_forward: bool,
    contains: impl Fn(&K) -> bool,
    visitor: impl FnMut(&Arc<Value>) -> bool,
) {
    let (from, until) = match (after, is_forward) {
        (Some(after), true) if after >= low => (Bound::Excluded(after), end),
        (Some(after), false) if end.as_ref().is_none_or(|end| after < *end) => (Bound::Included(low), Some(after)),
        _ => (Bound::Included(low), end),
    };
    let (Bound::Included(first) | Bound::Excluded(first)) = &from else { return };
    if until.as_ref().is_some_and(|until| until <= first) {
        return;
    }
    let range = items.range((from, until.map_or(Bound::Unbounded, Bound::Excluded)));
    let in_range = range.filter(|(key, _)| contains(key)).map(|(_, item)| item);
    let mut in_range = in_range;
    let _stopped = if is_forward { in_range.all(visitor) } else { in_range.rev().all(visitor) };
}

/// The keys that a query reads.
#[derive(Debug, Default)]
struct KeyRange {
    /// No key in the range is lower.
    low: Key,
    /// `None` for every partition.
    partition: Option<String>,
    /// The highest value of the sort key, and whether it is in the range.
    high: Option<(String, bool)>,
    /// A value of the sort key that is not in the range, though the lowest one.
    except: Option<String>,
    prefix: Option<String>,
}

impl KeyRange {
    fn of(condition: &Condition, key: &[String], placeholders: &Placeholders) -> Result<Self, Refusal> {
        let mut range = Self::default();
        let value = |operand: &Operand| match operand {
            Operand::Value(name) => Ok(value_text(&placeholders.values[name])),
            _ => Err(invalid("A key is compared with a value")),
        };
        let attribute = |operand: &Operand| operand.as_path().map(|path| path.attribute(placeholders).to_owned());
        let is_sort_key = |operand: &Operand| attribute(operand).as_ref() == key.get(1);
        for one in condition.conjuncts() {
            match one {
                Condition::Compare(name, Comparison::Equal, operand) if attribute(name).as_ref() == key.first() => {
                    range.low[0] = value(operand)?;
                    range.partition = Some(range.low[0].clone());
                }
                Condition::Compare(name, comparison, operand) if is_sort_key(name) => {
                    let bound = value(operand)?;
                    match comparison {
                        Comparison::Equal => (range.low[1], range.high) = (bound.clone(), Some((bound, true))),
                        Comparison::Less => range.high = Some((bound, false)),
                        Comparison::LessOrEqual => range.high = Some((bound, true)),
                        Comparison::GreaterOrEqual => range.low[1] = bound,
                        Comparison::Greater => (range.low[1], range.except) = (bound.clone(), Some(bound)),
                        Comparison::NotEqual => return Err(invalid("A key condition has no <>")),
                    }
                }
                Condition::Between(name, low, high) if is_sort_key(name) => {
                    (range.low[1], range.high) = (value(low)?, Some((value(high)?, true)));
                }
                Condition::BeginsWith(name, prefix) if is_sort_key(name) => {
                    range.low[1] = value(prefix)?;
                    range.prefix = Some(range.low[1].clone());
                }
                other => return Err(invalid(format!("Query condition missed key schema element: {other:?}"))),
            }
        }
        if range.partition.is_none() {
            return Err(invalid(format!("Query condition missed key schema element: {}", key[0])));
        }
        Ok(range)
    }

    /// The lowest key behind the range, unless it has no end.
    fn end(&self) -> Option<Key> {
        let next = |text: &str| format!("{text}\0");
        let partition = self.partition.as_ref()?;
        Some(match &self.high {
            Some((high, true)) => [partition.clone(), next(high)],
            Some((high, false)) => [partition.clone(), high.clone()],
            None => [next(partition), String::new()],
        })
    }

    /// Whether a key between the ends is in the range.
    fn contains(&self, [_, sort]: &Key) -> bool {
        self.except.as_ref() != Some(sort) && self.prefix.as_ref().is_none_or(|prefix| sort.starts_with(&**prefix))
    }
}

/// A page that is being read.
struct Page {
    items: Vec<Value>,
    count: usize,
    scanned: usize,
    size: usize,
    last: Option<Arc<Value>>,
    /// Whether the page ended before the items did.
    is_cut: bool,
    limit: usize,
    is_counted: bool,
}

impl Page {
    /// Adds an item, and says whether there is space for more.
    fn add(&mut self, item: &Arc<Value>, accept: impl Fn(&Item) -> bool, show: impl Fn(&Value) -> Value) -> bool {
        let size = size_of(item);
        if self.scanned > 0 && self.size + size > MAX_PAGE {
            self.is_cut = true;
            return false;
        }
        self.scanned += 1;
        self.size += size;
        self.last = Some(item.clone());
        if item.as_object().is_some_and(accept) {
            self.count += 1;
            if !self.is_counted {
                self.items.push(show(item));
            }
        }
        // A page that is full has a continuation, even if no item follows.
        self.is_cut = self.scanned >= self.limit;
        !self.is_cut
    }
}

fn used<const N: usize>(placeholders: [Option<&BTreeSet<String>>; N]) -> Vec<&BTreeSet<String>> {
    placeholders.into_iter().flatten().collect()
}

fn shown(item: &Value, projection: Option<&Parsed<Projection>>, placeholders: &Placeholders) -> Value {
    match (projection, item.as_object()) {
        (Some(projection), Some(members)) => project(members, &projection.expression, placeholders).into(),
        _ => item.clone(),
    }
}

/// Parses an expression once.
fn cached<T>(
    parsed: &mut HashMap<String, Arc<Parsed<T>>>,
    expression: &Value,
    parse: impl FnOnce(&str) -> Result<Parsed<T>, String>,
) -> Result<Option<Arc<Parsed<T>>>, Refusal> {
    let Some(text) = expression.as_str() else { return Ok(None) };
    if let Some(known) = parsed.get(text) {
        return Ok(Some(known.clone()));
    }
    if text.len() > MAX_EXPRESSION {
        return Err(invalid("Expression size has exceeded the maximum allowed size"));
    }
    let new = Arc::new(parse(text).map_err(invalid)?);
    parsed.insert(text.to_owned(), new.clone());
    Ok(Some(new))
}
