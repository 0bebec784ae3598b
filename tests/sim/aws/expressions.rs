//! DynamoDB's expressions: parsed, and evaluated on items in DynamoDB's JSON. The rules are those of the developer guide's pages on
//! condition, update and projection expressions. Binary values are only compared for equality, and there are no sets of them: the
//! product needs no more.

use std::cmp::Ordering;
use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

/// Attributes by their names.
pub type Item = Map<String, Value>;

/// The message of a `ValidationException`.
pub type Invalid = String;

/// The attribute in which a value is, and the steps from it to the value.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Path {
    attribute: String,
    steps: Vec<Step>,
}

/// A step into a map or into a list. Names may be placeholders.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Member(String),
    Index(usize),
}

#[derive(Clone, Debug, PartialEq)]
pub enum Operand {
    Path(Path),
    /// The name of a value, with its colon.
    Value(String),
    Size(Path),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Condition {
    And(Box<Condition>, Box<Condition>),
    Or(Box<Condition>, Box<Condition>),
    Not(Box<Condition>),
    Compare(Operand, Comparison, Operand),
    Between(Operand, Operand, Operand),
    In(Operand, Vec<Operand>),
    Exists(Path),
    NotExists(Path),
    BeginsWith(Operand, Operand),
    Contains(Operand, Operand),
}

#[derive(Clone, Debug, PartialEq)]
enum Assigned {
    Operand(Operand),
    IfNotExists(Path, Box<Assigned>),
    ListAppend(Box<Assigned>, Box<Assigned>),
    Sum(Box<Assigned>, Box<Assigned>),
    Difference(Box<Assigned>, Box<Assigned>),
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Update {
    set: Vec<(Path, Assigned)>,
    remove: Vec<Path>,
    add: Vec<(Path, String)>,
    delete: Vec<(Path, String)>,
}

/// An expression, and the placeholders that it uses.
#[derive(Clone, Debug)]
pub struct Parsed<T> {
    pub expression: T,
    pub placeholders: BTreeSet<String>,
}

pub type Projection = Vec<Path>;

/// What the placeholders of a request stand for.
#[derive(Clone, Copy, Debug)]
pub struct Placeholders<'a> {
    pub names: &'a Value,
    pub values: &'a Value,
}

impl<'a> Placeholders<'a> {
    pub fn of(request: &'a Value) -> Self {
        Self { names: &request["ExpressionAttributeNames"], values: &request["ExpressionAttributeValues"] }
    }

    pub fn name(&self, name: &'a str) -> &'a str {
        if name.starts_with('#') { self.names[name].as_str().unwrap_or_default() } else { name }
    }

    /// Refuses placeholders that are used but not given, or given but not used.
    pub fn check(&self, used: &[&BTreeSet<String>]) -> Result<(), Invalid> {
        let is_given = |name: &String| {
            let given = if name.starts_with('#') { self.names } else { self.values };
            given.get(name).is_some()
        };
        if let Some(missing) = used.iter().flat_map(|names| names.iter()).find(|name| !is_given(name)) {
            return Err(format!("An expression attribute used in expression is not defined; attribute: {missing}"));
        }
        let given = [self.names, self.values].into_iter().filter_map(Value::as_object).flat_map(Map::keys);
        match given.into_iter().find(|name| !used.iter().any(|names| names.contains(*name))) {
            Some(unused) => Err(format!("Value provided in ExpressionAttributes unused in expressions: {unused}")),
            None => Ok(()),
        }
    }
}

pub fn parse_condition(text: &str) -> Result<Parsed<Condition>, Invalid> {
    parse(text, Parser::condition)
}

pub fn parse_update(text: &str) -> Result<Parsed<Update>, Invalid> {
    parse(text, Parser::update)
}

pub fn parse_projection(text: &str) -> Result<Parsed<Projection>, Invalid> {
    parse(text, |parser| parser.list(Parser::path))
}

fn parse<T>(text: &str, read: impl FnOnce(&mut Parser) -> Result<T, Invalid>) -> Result<Parsed<T>, Invalid> {
    let mut parser = Parser { tokens: tokens(text)?, position: 0 };
    let expression = read(&mut parser)?;
    match parser.peek() {
        Some(token) => Err(format!("Syntax error; token: {token:?} in {text:?}")),
        None => {
            let is_placeholder = |token: &String| token.starts_with(['#', ':']);
            Ok(Parsed { expression, placeholders: parser.tokens.into_iter().filter(is_placeholder).collect() })
        }
    }
}

fn tokens(text: &str) -> Result<Vec<String>, Invalid> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '#' | ':');
    let mut tokens = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let length = match first {
            c if is_word(c) => rest.find(|c| !is_word(c)).unwrap_or(rest.len()),
            '<' | '>' if matches!(rest.get(..2), Some("<=" | ">=" | "<>")) => 2,
            '<' | '>' | '=' | '(' | ')' | '[' | ']' | ',' | '.' | '+' | '-' => 1,
            other => return Err(format!("Syntax error; token: {other:?} in {text:?}")),
        };
        tokens.push(rest[..length].to_owned());
        rest = rest[length..].trim_start();
    }
    Ok(tokens)
}

struct Parser {
    tokens: Vec<String>,
    position: usize,
}

impl Parser {
    fn peek(&self) -> Option<&str> {
        self.tokens.get(self.position).map(String::as_str)
    }

    /// Whether the next token is this one, which is then taken. Keywords may be in any case.
    fn take(&mut self, token: &str) -> bool {
        let is_next = self.peek().is_some_and(|next| next.eq_ignore_ascii_case(token));
        self.position += usize::from(is_next);
        is_next
    }

    fn expect(&mut self, token: &str) -> Result<(), Invalid> {
        if self.take(token) { Ok(()) } else { Err(format!("Syntax error; {token:?} is missing in {:?}", self.tokens)) }
    }

    fn word(&mut self) -> Result<String, Invalid> {
        let word =
            self.peek().filter(|token| !token.starts_with(|c: char| c.is_ascii_punctuation() && !"_#:".contains(c)));
        let word = word.map(ToOwned::to_owned).ok_or_else(|| format!("Syntax error in {:?}", self.tokens))?;
        self.position += 1;
        Ok(word)
    }

    fn list<T>(&mut self, read: impl Fn(&mut Self) -> Result<T, Invalid>) -> Result<Vec<T>, Invalid> {
        let mut all = vec![read(self)?];
        while self.take(",") {
            all.push(read(self)?);
        }
        Ok(all)
    }

    fn path(&mut self) -> Result<Path, Invalid> {
        let attribute = self.word()?;
        if attribute.starts_with(':') {
            return Err(format!("Syntax error; a path begins with {attribute}"));
        }
        let mut steps = Vec::new();
        loop {
            if self.take(".") {
                steps.push(Step::Member(self.word()?));
            } else if self.take("[") {
                let index = self.word()?.parse().map_err(|_| format!("Syntax error; an index in {:?}", self.tokens))?;
                self.expect("]")?;
                steps.push(Step::Index(index));
            } else {
                return Ok(Path { attribute, steps });
            }
        }
    }

    /// A function's name and its opening parenthesis.
    fn function(&mut self, name: &str) -> bool {
        let is_call = self.tokens.get(self.position + 1).is_some_and(|token| token == "(");
        is_call && self.take(name) && self.take("(")
    }

    fn operand(&mut self) -> Result<Operand, Invalid> {
        if self.function("size") {
            let path = self.path()?;
            self.expect(")")?;
            return Ok(Operand::Size(path));
        }
        match self.peek() {
            Some(token) if token.starts_with(':') => Ok(Operand::Value(self.word()?)),
            _ => Ok(Operand::Path(self.path()?)),
        }
    }

    fn condition(&mut self) -> Result<Condition, Invalid> {
        let mut left = self.conjunction()?;
        while self.take("OR") {
            left = Condition::Or(left.into(), self.conjunction()?.into());
        }
        Ok(left)
    }

    fn conjunction(&mut self) -> Result<Condition, Invalid> {
        let mut left = self.negation()?;
        while self.take("AND") {
            left = Condition::And(left.into(), self.negation()?.into());
        }
        Ok(left)
    }

    fn negation(&mut self) -> Result<Condition, Invalid> {
        if self.take("NOT") {
            return Ok(Condition::Not(self.negation()?.into()));
        }
        if self.take("(") {
            let inner = self.condition()?;
            self.expect(")")?;
            return Ok(inner);
        }
        for (name, make) in [
            ("attribute_exists", Condition::Exists as fn(Path) -> Condition),
            ("attribute_not_exists", Condition::NotExists),
        ] {
            if self.function(name) {
                let path = self.path()?;
                self.expect(")")?;
                return Ok(make(path));
            }
        }
        for (name, make) in [
            ("begins_with", Condition::BeginsWith as fn(Operand, Operand) -> Condition),
            ("contains", Condition::Contains),
        ] {
            if self.function(name) {
                let first = self.operand()?;
                self.expect(",")?;
                let second = self.operand()?;
                self.expect(")")?;
                return Ok(make(first, second));
            }
        }
        let left = self.operand()?;
        if self.take("BETWEEN") {
            let low = self.operand()?;
            self.expect("AND")?;
            return Ok(Condition::Between(left, low, self.operand()?));
        }
        if self.take("IN") {
            self.expect("(")?;
            let all = self.list(Self::operand)?;
            self.expect(")")?;
            return Ok(Condition::In(left, all));
        }
        let comparison = match self.peek() {
            Some("=") => Comparison::Equal,
            Some("<>") => Comparison::NotEqual,
            Some("<") => Comparison::Less,
            Some("<=") => Comparison::LessOrEqual,
            Some(">") => Comparison::Greater,
            Some(">=") => Comparison::GreaterOrEqual,
            _ => return Err(format!("Syntax error; a comparison is missing in {:?}", self.tokens)),
        };
        self.position += 1;
        Ok(Condition::Compare(left, comparison, self.operand()?))
    }

    fn update(&mut self) -> Result<Update, Invalid> {
        let mut update = Update::default();
        while self.peek().is_some() {
            if self.take("SET") {
                update.set.extend(self.list(|parser| {
                    let path = parser.path()?;
                    parser.expect("=")?;
                    Ok((path, parser.assigned()?))
                })?);
            } else if self.take("REMOVE") {
                update.remove.extend(self.list(Self::path)?);
            } else if self.take("ADD") {
                update.add.extend(self.list(|parser| Ok((parser.path()?, parser.word()?)))?);
            } else {
                self.expect("DELETE")?;
                update.delete.extend(self.list(|parser| Ok((parser.path()?, parser.word()?)))?);
            }
        }
        Ok(update)
    }

    fn assigned(&mut self) -> Result<Assigned, Invalid> {
        let left = self.term()?;
        if self.take("+") {
            return Ok(Assigned::Sum(left.into(), self.term()?.into()));
        }
        if self.take("-") {
            return Ok(Assigned::Difference(left.into(), self.term()?.into()));
        }
        Ok(left)
    }

    fn term(&mut self) -> Result<Assigned, Invalid> {
        if self.function("if_not_exists") {
            let path = self.path()?;
            self.expect(",")?;
            let other = self.term()?;
            self.expect(")")?;
            return Ok(Assigned::IfNotExists(path, other.into()));
        }
        if self.function("list_append") {
            let first = self.term()?;
            self.expect(",")?;
            let second = self.term()?;
            self.expect(")")?;
            return Ok(Assigned::ListAppend(first.into(), second.into()));
        }
        Ok(Assigned::Operand(self.operand()?))
    }
}

impl Path {
    fn resolve<'a>(&self, item: &'a Item, placeholders: &Placeholders) -> Option<&'a Value> {
        let first = item.get(placeholders.name(&self.attribute))?;
        self.steps.iter().try_fold(first, |value, step| match step {
            Step::Member(name) => value.get("M")?.get(placeholders.name(name)),
            Step::Index(index) => value.get("L")?.get(index),
        })
    }

    /// The attribute in which the path begins.
    pub fn attribute<'a>(&'a self, placeholders: &Placeholders<'a>) -> &'a str {
        placeholders.name(&self.attribute)
    }

    /// Changes the value, which may be missing. What remains missing is removed.
    fn change(
        &self,
        item: &mut Item,
        placeholders: &Placeholders,
        change: impl FnOnce(Option<&Value>) -> Result<Option<Value>, Invalid>,
    ) -> Result<(), Invalid> {
        let attribute = placeholders.name(&self.attribute);
        let Some((last, steps)) = self.steps.split_last() else {
            match change(item.get(attribute))? {
                Some(value) => drop(item.insert(attribute.to_owned(), value)),
                None => drop(item.remove(attribute)),
            }
            return Ok(());
        };
        let inner = steps.iter().try_fold(item.get_mut(attribute), |value, step| match step {
            Step::Member(name) => Some(value?.get_mut("M")?.get_mut(placeholders.name(name))),
            Step::Index(index) => Some(value?.get_mut("L")?.get_mut(*index)),
        });
        let invalid = || "The document path provided in the update expression is invalid for update".to_owned();
        let inner = inner.flatten().ok_or_else(invalid)?;
        match last {
            Step::Member(name) => {
                let map = inner.get_mut("M").and_then(Value::as_object_mut).ok_or_else(invalid)?;
                let name = placeholders.name(name);
                match change(map.get(name))? {
                    Some(value) => drop(map.insert(name.to_owned(), value)),
                    None => drop(map.remove(name)),
                }
            }
            Step::Index(index) => {
                let values = inner.get_mut("L").and_then(Value::as_array_mut).ok_or_else(invalid)?;
                match change(values.get(*index))? {
                    Some(value) if *index < values.len() => values[*index] = value,
                    // Beyond the end it is appended.
                    Some(value) => values.push(value),
                    None if *index < values.len() => drop(values.remove(*index)),
                    None => {}
                }
            }
        }
        Ok(())
    }
}

impl Operand {
    fn value(&self, item: &Item, placeholders: &Placeholders) -> Option<Value> {
        match self {
            Self::Path(path) => path.resolve(item, placeholders).cloned(),
            Self::Value(name) => placeholders.values.get(name).cloned(),
            Self::Size(path) => {
                let value = path.resolve(item, placeholders)?;
                let (kind, content) = typed(value)?;
                let size = match (kind, content) {
                    ("S", Value::String(text)) => text.len(),
                    (_, Value::Array(values)) => values.len(),
                    ("M", Value::Object(members)) => members.len(),
                    _ => return None,
                };
                Some(json!({ "N": size.to_string() }))
            }
        }
    }

    pub fn as_path(&self) -> Option<&Path> {
        match self {
            Self::Path(path) => Some(path),
            _ => None,
        }
    }
}

impl Comparison {
    fn holds(self, left: &Value, right: &Value) -> bool {
        let order = || compare(left, right);
        match self {
            Self::Equal => is_equal(left, right),
            Self::NotEqual => !is_equal(left, right),
            Self::Less => order().is_some_and(Ordering::is_lt),
            Self::LessOrEqual => order().is_some_and(Ordering::is_le),
            Self::Greater => order().is_some_and(Ordering::is_gt),
            Self::GreaterOrEqual => order().is_some_and(Ordering::is_ge),
        }
    }
}

impl Condition {
    /// Whether the condition holds. What does not exist satisfies no comparison but `<>`.
    pub fn holds(&self, item: &Item, placeholders: &Placeholders) -> bool {
        let value = |operand: &Operand| operand.value(item, placeholders);
        match self {
            Self::And(left, right) => left.holds(item, placeholders) && right.holds(item, placeholders),
            Self::Or(left, right) => left.holds(item, placeholders) || right.holds(item, placeholders),
            Self::Not(inner) => !inner.holds(item, placeholders),
            Self::Exists(path) => path.resolve(item, placeholders).is_some(),
            Self::NotExists(path) => path.resolve(item, placeholders).is_none(),
            Self::Compare(left, comparison, right) => match (value(left), value(right)) {
                (Some(left), Some(right)) => comparison.holds(&left, &right),
                (None, None) => false,
                _ => *comparison == Comparison::NotEqual,
            },
            Self::Between(operand, low, high) => match (value(operand), value(low), value(high)) {
                (Some(operand), Some(low), Some(high)) => {
                    Comparison::GreaterOrEqual.holds(&operand, &low) && Comparison::LessOrEqual.holds(&operand, &high)
                }
                _ => false,
            },
            Self::In(operand, all) => {
                value(operand).is_some_and(|operand| all.iter().filter_map(&value).any(|one| is_equal(&operand, &one)))
            }
            Self::BeginsWith(operand, prefix) => match (value(operand), value(prefix)) {
                (Some(operand), Some(prefix)) => match (operand["S"].as_str(), prefix["S"].as_str()) {
                    (Some(text), Some(prefix)) => text.starts_with(prefix),
                    _ => false,
                },
                _ => false,
            },
            Self::Contains(operand, part) => match (value(operand), value(part)) {
                (Some(operand), Some(part)) => contains(&operand, &part),
                _ => false,
            },
        }
    }

    /// The conditions that a conjunction consists of.
    pub fn conjuncts(&self) -> Vec<&Self> {
        match self {
            Self::And(left, right) => [left.conjuncts(), right.conjuncts()].concat(),
            other => vec![other],
        }
    }
}

impl Assigned {
    fn value(&self, item: &Item, placeholders: &Placeholders) -> Result<Value, Invalid> {
        let missing = || "The provided expression refers to an attribute that does not exist in the item".to_owned();
        match self {
            Self::Operand(operand) => operand.value(item, placeholders).ok_or_else(missing),
            Self::IfNotExists(path, other) => match path.resolve(item, placeholders) {
                Some(value) => Ok(value.clone()),
                None => other.value(item, placeholders),
            },
            Self::ListAppend(first, second) => {
                let lists = [first.value(item, placeholders)?, second.value(item, placeholders)?];
                let mut all = Vec::new();
                for list in &lists {
                    all.extend(list["L"].as_array().ok_or("Incorrect operand type for list_append")?.iter().cloned());
                }
                Ok(json!({ "L": all }))
            }
            Self::Sum(left, right) => add(&left.value(item, placeholders)?, &right.value(item, placeholders)?, 1),
            Self::Difference(left, right) => {
                add(&left.value(item, placeholders)?, &right.value(item, placeholders)?, -1)
            }
        }
    }
}

impl Update {
    /// The item after the update. All values are those of the item before it.
    pub fn apply(&self, item: &Item, placeholders: &Placeholders) -> Result<Item, Invalid> {
        let mut updated = item.clone();
        for (path, assigned) in &self.set {
            let value = assigned.value(item, placeholders)?;
            path.change(&mut updated, placeholders, |_| Ok(Some(value)))?;
        }
        for (path, added) in &self.add {
            let added = &placeholders.values[added];
            path.change(&mut updated, placeholders, |present| match present {
                None => Ok(Some(added.clone())),
                Some(present) if added.get("N").is_some() => add(present, added, 1).map(Some),
                Some(present) => change_set(present, added, true),
            })?;
        }
        for (path, deleted) in &self.delete {
            let deleted = &placeholders.values[deleted];
            path.change(&mut updated, placeholders, |present| match present {
                None => Ok(None),
                Some(present) => change_set(present, deleted, false),
            })?;
        }
        // Indexes are those of the item before the update, so the last element of a list is removed first.
        for path in self.remove.iter().collect::<BTreeSet<_>>().into_iter().rev() {
            path.change(&mut updated, placeholders, |_| Ok(None))?;
        }
        Ok(updated)
    }

    /// The attributes that the update concerns.
    pub fn attributes<'a>(&'a self, placeholders: &Placeholders<'a>) -> BTreeSet<&'a str> {
        let set = self.set.iter().map(|(path, _)| path);
        let others = self.add.iter().chain(&self.delete).map(|(path, _)| path);
        set.chain(&self.remove).chain(others).map(|path| path.attribute(placeholders)).collect()
    }
}

/// The projected attributes of an item.
pub fn project(item: &Item, paths: &Projection, placeholders: &Placeholders) -> Item {
    let mut projected = Item::new();
    for path in paths {
        let Some(value) = path.resolve(item, placeholders) else { continue };
        let names = path.steps.iter().map(|step| match step {
            Step::Member(name) => placeholders.name(name),
            Step::Index(_) => panic!("the model projects no elements of lists"),
        });
        let mut map = &mut projected;
        let mut name = placeholders.name(&path.attribute);
        for next in names {
            let inner = map.entry(name).or_insert_with(|| json!({ "M": {} }));
            map = inner.get_mut("M").and_then(Value::as_object_mut).expect("a map");
            name = next;
        }
        map.insert(name.to_owned(), value.clone());
    }
    projected
}

/// The type of a value and its content.
fn typed(value: &Value) -> Option<(&str, &Value)> {
    value.as_object()?.iter().next().map(|(kind, content)| (kind.as_str(), content))
}

fn is_equal(left: &Value, right: &Value) -> bool {
    let (Some((kind, left)), Some((other, right))) = (typed(left), typed(right)) else { return false };
    if kind != other {
        return false;
    }
    match kind {
        "N" => Number::of(left) == Number::of(right),
        "SS" | "NS" => members(left) == members(right),
        "L" => match (left.as_array(), right.as_array()) {
            (Some(left), Some(right)) => {
                left.len() == right.len() && left.iter().zip(right).all(|(left, right)| is_equal(left, right))
            }
            _ => false,
        },
        "M" => match (left.as_object(), right.as_object()) {
            (Some(left), Some(right)) => {
                left.len() == right.len()
                    && left.iter().all(|(name, value)| right.get(name).is_some_and(|other| is_equal(value, other)))
            }
            _ => false,
        },
        _ => left == right,
    }
}

/// The order of two values of one type that has an order.
fn compare(left: &Value, right: &Value) -> Option<Ordering> {
    match (typed(left)?, typed(right)?) {
        (("S", left), ("S", right)) => Some(left.as_str()?.cmp(right.as_str()?)),
        (("N", left), ("N", right)) => Some(Number::of(left)?.cmp(&Number::of(right)?)),
        _ => None,
    }
}

fn contains(operand: &Value, part: &Value) -> bool {
    match (typed(operand), typed(part)) {
        (Some(("S", text)), Some(("S", part))) => {
            matches!((text.as_str(), part.as_str()), (Some(text), Some(part)) if text.contains(part))
        }
        (Some(("SS", Value::Array(members))), Some(("S", part))) => members.contains(part),
        (Some(("NS", members_of)), Some(("N", part))) => {
            part.as_str().is_some_and(|part| members(members_of).contains(part))
        }
        (Some(("L", Value::Array(values))), Some(_)) => values.iter().any(|value| is_equal(value, part)),
        _ => false,
    }
}

fn members(set: &Value) -> BTreeSet<&str> {
    set.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// A set with more or with fewer members; `None` if none is left.
fn change_set(present: &Value, change: &Value, is_added: bool) -> Result<Option<Value>, Invalid> {
    let mismatch = || "An operand in the update expression has an incorrect data type".to_owned();
    let (Some((kind, present)), Some((other, change))) = (typed(present), typed(change)) else {
        return Err(mismatch());
    };
    if kind != other || !matches!(kind, "SS" | "NS") {
        return Err(mismatch());
    }
    let (mut all, change) = (members(present), members(change));
    if is_added {
        all.extend(change);
    } else {
        all.retain(|member| !change.contains(member));
    }
    Ok((!all.is_empty()).then(|| json!({ kind: all })))
}

fn add(left: &Value, right: &Value, sign: i128) -> Result<Value, Invalid> {
    match (Number::of(&left["N"]), Number::of(&right["N"])) {
        (Some(left), Some(right)) => Ok(json!({ "N": left.plus(right, sign).to_string() })),
        _ => Err("An operand in the update expression has an incorrect data type".to_owned()),
    }
}

/// A decimal number in billionths. The product stores integers and times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Number(i128);

impl Number {
    const DIGITS: usize = 9;
    const ONE: i128 = 1_000_000_000;

    fn of(content: &Value) -> Option<Self> {
        let text = content.as_str()?;
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        assert!(fraction.len() <= Self::DIGITS, "{text} has more digits than the model");
        let digits: i128 = format!("{whole}{fraction:0<width$}", width = Self::DIGITS).parse().ok()?;
        Some(Self(digits))
    }

    fn plus(self, other: Self, sign: i128) -> Self {
        Self(self.0 + sign * other.0)
    }
}

impl std::fmt::Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sign = if self.0 < 0 { "-" } else { "" };
        let (whole, fraction) = (self.0.abs() / Self::ONE, self.0.abs() % Self::ONE);
        let text = format!("{sign}{whole}.{fraction:0width$}", width = Self::DIGITS);
        f.write_str(text.trim_end_matches('0').trim_end_matches('.'))
    }
}
