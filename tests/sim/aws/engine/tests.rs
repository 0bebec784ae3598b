//! The engine responds as the embedded engine of `cargo local` does, to random calls that the product could make.

use std::collections::BTreeMap;

use fastrand::Rng;
use local::engines::InMemoryDynamoDb;
use serde_json::{Value, json};

use super::Engine;

const TABLE: &str = "items";
/// The table in the order of its index, as the model keeps it.
const INDEX: &str = "items.by-sort";

/// Small, so that calls meet each other's items.
const USERS: usize = 3;
const IDS: usize = 6;
const TEXTS: [&str; 5] = ["", "a", "ab", "b", "ba"];

fn text(rng: &mut Rng) -> Value {
    json!({ "S": rng.choice(TEXTS) })
}

fn number(rng: &mut Rng) -> Value {
    json!({ "N": rng.choice(["-3", "0", "1", "2", "10", "2.5"]) })
}

fn key(rng: &mut Rng) -> Value {
    json!({ "user": { "S": format!("u{}", rng.usize(..USERS)) }, "id": { "S": format!("i{}", rng.usize(..IDS)) } })
}

/// A value of an attribute that an update may set.
fn value(rng: &mut Rng) -> Value {
    match rng.u8(..6) {
        0 => number(rng),
        1 => json!({ "L": [text(rng), number(rng)] }),
        2 => json!({ "M": { "inner": text(rng), "count": number(rng) } }),
        3 => json!({ "SS": ["a", "b"] }),
        4 => json!({ "BOOL": rng.bool() }),
        _ => text(rng),
    }
}

fn item(rng: &mut Rng) -> Value {
    let mut item = key(rng);
    item["sort"] = json!({ "S": rng.choice(["1", "2", "3"]) });
    for name in ["text", "count", "list", "map", "set"] {
        if rng.bool() {
            item[name] = match name {
                "count" => number(rng),
                "list" => json!({ "L": [text(rng), text(rng)] }),
                "map" => json!({ "M": { "inner": text(rng) } }),
                "set" => json!({ "SS": ["a", "c"] }),
                _ => text(rng),
            };
        }
    }
    item
}

/// The placeholders of a request that is being made.
#[derive(Default)]
struct Placeholders {
    names: BTreeMap<String, Value>,
    values: BTreeMap<String, Value>,
}

impl Placeholders {
    fn name(&mut self, name: &str) -> String {
        let placeholder = format!("#{}", self.names.len());
        self.names.insert(placeholder.clone(), name.into());
        placeholder
    }

    fn value(&mut self, value: Value) -> String {
        let placeholder = format!(":{}", self.values.len());
        self.values.insert(placeholder.clone(), value);
        placeholder
    }

    fn add_to(self, request: &mut Value) {
        if !self.names.is_empty() {
            request["ExpressionAttributeNames"] = json!(self.names);
        }
        if !self.values.is_empty() {
            request["ExpressionAttributeValues"] = json!(self.values);
        }
    }

    fn path(&mut self, rng: &mut Rng) -> String {
        let attribute = self.name(rng.choice(["text", "count", "list", "map", "set"]).expect("one"));
        match rng.u8(..6) {
            0 => format!("{attribute}.{}", self.name("inner")),
            1 => format!("{attribute}[{}]", rng.u8(..3)),
            _ => attribute,
        }
    }

    fn condition(&mut self, rng: &mut Rng, depth: u8) -> String {
        if depth > 0 && rng.u8(..3) == 0 {
            let (left, right) = (self.condition(rng, depth - 1), self.condition(rng, depth - 1));
            return match rng.u8(..3) {
                0 => format!("({left}) AND ({right})"),
                1 => format!("({left}) OR {right}"),
                _ => format!("NOT ({left}) AND {right}"),
            };
        }
        let path = self.path(rng);
        match rng.u8(..9) {
            0 => format!("attribute_exists({path})"),
            1 => format!("attribute_not_exists({path})"),
            2 => format!("begins_with({path}, {})", self.value(json!({ "S": "a" }))),
            3 => format!("contains({path}, {})", self.value(json!({ "S": "a" }))),
            4 => format!("size({path}) > {}", self.value(json!({ "N": "1" }))),
            5 => {
                let (low, high) = (self.value(json!({ "S": "a" })), self.value(json!({ "S": "b" })));
                format!("{path} BETWEEN {low} AND {high}")
            }
            6 => format!("{path} IN ({}, {})", self.value(text(rng)), self.value(number(rng))),
            _ => {
                let comparison = rng.choice(["=", "<>", "<", "<=", ">", ">="]).expect("one");
                format!("{path} {comparison} {}", self.value(if rng.bool() { text(rng) } else { number(rng) }))
            }
        }
    }

    fn update(&mut self, rng: &mut Rng) -> String {
        let mut parts = Vec::new();
        let mut set = Vec::new();
        if rng.bool() {
            set.push(format!("{} = {}", self.name("text"), self.value(value(rng))));
        }
        if rng.bool() {
            let (count, least) = (self.name("count"), self.value(json!({ "N": "7" })));
            set.push(format!("{count} = if_not_exists({count}, {least})"));
        }
        if rng.bool() {
            let (list, empty) = (self.name("list"), self.value(json!({ "L": [] })));
            let more = self.value(json!({ "L": [text(rng)] }));
            set.push(format!("{list} = list_append(if_not_exists({list}, {empty}), {more})"));
        }
        if !set.is_empty() {
            parts.push(format!("SET {}", set.join(", ")));
        }
        match rng.u8(..4) {
            0 => parts.push(format!("REMOVE {}.{}", self.name("map"), self.name("inner"))),
            1 => parts.push(format!("REMOVE {}", self.name("map"))),
            _ => {}
        }
        match rng.u8(..3) {
            0 => parts.push(format!("ADD {} {}", self.name("sum"), self.value(number(rng)))),
            1 => parts.push(format!("ADD {} {}", self.name("set"), self.value(json!({ "SS": ["c", "d"] })))),
            _ => {}
        }
        if parts.is_empty() {
            parts.push(format!("REMOVE {}", self.name("text")));
        }
        parts.join(" ")
    }
}

/// A write of one item, as in a transaction, with its kind.
fn write(rng: &mut Rng) -> (&'static str, Value) {
    let mut placeholders = Placeholders::default();
    let kind = *rng.choice(["Put", "Update", "Update", "Delete", "ConditionCheck"].iter()).expect("one");
    let mut request = json!({ "TableName": TABLE });
    request[if kind == "Put" { "Item" } else { "Key" }] = if kind == "Put" { item(rng) } else { key(rng) };
    if kind == "Update" {
        request["UpdateExpression"] = placeholders.update(rng).into();
    }
    if kind == "ConditionCheck" || rng.bool() {
        request["ConditionExpression"] = placeholders.condition(rng, 2).into();
        request["ReturnValuesOnConditionCheckFailure"] = "ALL_OLD".into();
    }
    placeholders.add_to(&mut request);
    (kind, request)
}

/// A call, with its operation.
fn call(rng: &mut Rng) -> (&'static str, Value) {
    match rng.u8(..10) {
        0 => ("GetItem", json!({ "TableName": TABLE, "Key": key(rng), "ConsistentRead": rng.bool() })),
        1 => {
            let keys: Vec<Value> =
                (0..3).map(|number| json!({ "user": { "S": "u0" }, "id": { "S": format!("i{number}") } })).collect();
            ("BatchGetItem", json!({ "RequestItems": { TABLE: { "Keys": keys } } }))
        }
        2 | 3 => ("Query", query(rng)),
        4 => {
            let actions: Vec<Value> =
                (0..rng.usize(1..4)).map(|_| write(rng)).map(|(kind, write)| json!({ kind: write })).collect();
            ("TransactWriteItems", json!({ "TransactItems": actions }))
        }
        5 => {
            let put = json!({ "PutRequest": { "Item": item(rng) } });
            let delete = json!({ "DeleteRequest": { "Key": key(rng) } });
            ("BatchWriteItem", json!({ "RequestItems": { TABLE: [put, delete] } }))
        }
        _ => {
            let (operation, mut request) = loop {
                match write(rng) {
                    ("Put", request) => break ("PutItem", request),
                    ("Update", request) => break ("UpdateItem", request),
                    ("Delete", request) => break ("DeleteItem", request),
                    _ => {}
                }
            };
            // What an update of a missing item returns for ALL_OLD is not documented.
            let returned = if operation == "UpdateItem" { "ALL_NEW" } else { "ALL_OLD" };
            request["ReturnValues"] = if rng.bool() { returned } else { "NONE" }.into();
            (operation, request)
        }
    }
}

fn query(rng: &mut Rng) -> Value {
    let mut placeholders = Placeholders::default();
    let is_of_index = rng.bool();
    let user = format!("u{}", rng.usize(..USERS));
    let (name, value) = (placeholders.name("user"), placeholders.value(json!({ "S": user })));
    let mut condition = format!("{name} = {value}");
    let (sort, low, high) = if is_of_index { ("sort", "1", "2") } else { ("id", "i1", "i4") };
    let (low, high) = (json!({ "S": low }), json!({ "S": high }));
    condition += &match rng.u8(..6) {
        0 => String::new(),
        1 => {
            let (name, low, high) = (placeholders.name(sort), placeholders.value(low), placeholders.value(high));
            format!(" AND {name} BETWEEN {low} AND {high}")
        }
        2 => format!(" AND begins_with({}, {})", placeholders.name(sort), placeholders.value(json!({ "S": "i" }))),
        _ => {
            let comparison = rng.choice(["=", "<", "<=", ">", ">="]).expect("one");
            format!(" AND {} {comparison} {}", placeholders.name(sort), placeholders.value(high))
        }
    };
    let mut request =
        json!({ "TableName": TABLE, "KeyConditionExpression": condition, "ScanIndexForward": rng.bool() });
    if is_of_index {
        request["IndexName"] = "by-sort".into();
    }
    if rng.bool() {
        request["Limit"] = rng.u8(1..4).into();
    }
    if rng.u8(..3) == 0 {
        request["FilterExpression"] = placeholders.condition(rng, 1).into();
    }
    match rng.u8(..4) {
        0 => request["Select"] = "COUNT".into(),
        1 => {
            request["ProjectionExpression"] =
                format!("{}, {}", placeholders.name("id"), placeholders.name("text")).into();
        }
        _ => {}
    }
    placeholders.add_to(&mut request);
    request
}

/// The response to a call, without what differs: the order of sets, and the text of errors.
fn comparable(mut response: Value) -> Value {
    fn sort_sets(value: &mut Value) {
        match value {
            Value::Object(members) => {
                for (name, member) in members.iter_mut() {
                    match member {
                        Value::Array(set) if name == "SS" => set.sort_by_key(ToString::to_string),
                        _ => sort_sets(member),
                    }
                }
            }
            Value::Array(values) => values.iter_mut().for_each(sort_sets),
            _ => {}
        }
    }
    if let Some(members) = response.as_object_mut() {
        for name in ["message", "Message", "UnprocessedKeys", "UnprocessedItems", "ConsumedCapacity"] {
            members.remove(name);
        }
    }
    sort_sets(&mut response);
    response
}

fn units(capacity: &Value) -> f64 {
    match capacity {
        Value::Array(all) => all.iter().map(units).sum(),
        one => one["CapacityUnits"].as_f64().unwrap_or_default(),
    }
}

/// The units of a table alone: the model adds those of its indexes.
fn units_of_table(capacity: &Value) -> f64 {
    match capacity {
        Value::Array(all) => all.iter().map(units_of_table).sum(),
        one => one.pointer("/Table/CapacityUnits").and_then(Value::as_f64).unwrap_or_else(|| units(one)),
    }
}

#[test]
fn it_responds_as_the_embedded_engine_does() {
    let mut counted: BTreeMap<String, u32> = BTreeMap::new();
    for seed in 0..20 {
        let mut rng = Rng::with_seed(seed);
        let theirs = InMemoryDynamoDb::new().expect("an engine");
        let element = |name: &str, kind: &str| json!({ "AttributeName": name, "KeyType": kind });
        let attribute = |name: &str| json!({ "AttributeName": name, "AttributeType": "S" });
        let table = json!({
            "TableName": TABLE, "BillingMode": "PAY_PER_REQUEST",
            "KeySchema": [element("user", "HASH"), element("id", "RANGE")],
            "AttributeDefinitions": [attribute("user"), attribute("id"), attribute("sort")],
            "GlobalSecondaryIndexes": [{
                "IndexName": "by-sort", "Projection": { "ProjectionType": "ALL" },
                "KeySchema": [element("user", "HASH"), element("sort", "RANGE")],
            }],
        });
        theirs.execute("CreateTable", &table).expect("a table");
        let (table_key, index_key) = (["user".to_owned(), "id".to_owned()], ["user".to_owned(), "sort".to_owned()]);
        let mut ours = Engine::default();
        ours.create(TABLE, &table_key, None);
        ours.create(INDEX, &table_key, Some(&index_key));
        let mut continued = None;
        for number in 0..400 {
            let (operation, mut request) = continued.take().unwrap_or_else(|| call(&mut rng));
            request["ReturnConsumedCapacity"] = "INDEXES".into();
            let expected = theirs.execute(operation, &request);
            let mut own_request = request.clone();
            if request.get("IndexName").is_some() {
                own_request["TableName"] = INDEX.into();
            }
            let answered = ours.execute(operation, &own_request);
            let case = format!("seed {seed}, call {number}: {operation} {request}");
            match (expected, answered) {
                (Ok(expected), Ok(done)) => {
                    let is_read = done.written.is_empty();
                    let capacity = &expected["ConsumedCapacity"];
                    let charged = if is_read { units(capacity) } else { units_of_table(capacity) };
                    assert!((charged - done.units).abs() < 0.01, "{case}: {charged} and {} units", done.units);
                    if let Some(last) = expected.get("LastEvaluatedKey") {
                        let mut next = request.clone();
                        next["ExclusiveStartKey"] = last.clone();
                        continued = Some((operation, next));
                    }
                    for written in done.written {
                        // An item without the index's key is not in it.
                        let entry = written.item.filter(|item| item.get("sort").is_some());
                        ours.store(INDEX, written.key, entry);
                    }
                    assert_eq!(comparable(done.answer), comparable(expected), "{case}");
                    *counted.entry(operation.to_owned()).or_default() += 1;
                }
                (Err((status, body)), Err(refusal)) => {
                    let expected: Value = serde_json::from_str(&body).expect("JSON");
                    let own: Value = serde_json::from_str(&refusal.body).expect("JSON");
                    let kind = |error: &Value| {
                        error["__type"].as_str().and_then(|kind| kind.rsplit('#').next()).map(str::to_owned)
                    };
                    assert_eq!((refusal.status, kind(&own)), (status, kind(&expected)), "{case}: {own} and {expected}");
                    if kind(&own).as_deref() != Some("ValidationException") {
                        assert_eq!(comparable(own.clone())["Item"], comparable(expected.clone())["Item"], "{case}");
                    }
                    *counted.entry(kind(&own).unwrap_or_default()).or_default() += 1;
                }
                (expected, answered) => panic!("{case}: {expected:?} and {answered:?}"),
            }
        }
    }
    // Each kind of call and of refusal has been compared.
    for kind in [
        "GetItem",
        "BatchGetItem",
        "Query",
        "PutItem",
        "UpdateItem",
        "DeleteItem",
        "BatchWriteItem",
        "TransactWriteItems",
        "ConditionalCheckFailedException",
        "TransactionCanceledException",
        "ValidationException",
    ] {
        assert!(counted.get(kind).is_some_and(|count| *count >= 20), "{kind}: {counted:?}");
    }
}
