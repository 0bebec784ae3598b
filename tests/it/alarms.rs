//! Alarms of `template.yaml`: each watches an existing metric of this stack, and errors that only callers cause do not
//! trigger one.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex};

use axum::response::IntoResponse as _;
use serde_json::{Value, json};
use shared::error::{Error, ErrorClass, StoreError, StoreErrorKind};
use shared::http::pydantic::validation::Choice as _;
use shared::metrics::{Age, METRICS, Outcome};
use shared::start::task::StartStatus;
use tracing::subscriber::DefaultGuard;
use uuid::Uuid;

use crate::support::log::log_to;
use crate::support::stand_in_agent::{Fault, Kind, Nth};
use crate::support::worker_harness::{WorkerHarness, quick};
use crate::template::template;

/// Metrics that AWS publishes: namespace, name, and the sets of dimensions that they have.
/// <https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-available-cloudwatch-metrics.html>,
/// <https://docs.aws.amazon.com/apigateway/latest/developerguide/api-gateway-metrics-and-dimensions.html> and
/// <https://docs.aws.amazon.com/lambda/latest/dg/monitoring-metrics-types.html>
const SQS: [&str; 9] = [
    "ApproximateAgeOfOldestMessage",
    "ApproximateNumberOfMessagesDelayed",
    "ApproximateNumberOfMessagesNotVisible",
    "ApproximateNumberOfMessagesVisible",
    "NumberOfEmptyReceives",
    "NumberOfMessagesDeleted",
    "NumberOfMessagesReceived",
    "NumberOfMessagesSent",
    "SentMessageSize",
];
const API_GATEWAY: [&str; 7] =
    ["4XXError", "5XXError", "CacheHitCount", "CacheMissCount", "Count", "IntegrationLatency", "Latency"];
const LAMBDA: [&str; 5] = ["ConcurrentExecutions", "Duration", "Errors", "Invocations", "Throttles"];

/// A metric that an alarm watches.
struct Watched {
    namespace: Value,
    name: String,
    dimensions: BTreeMap<String, Value>,
}

fn watched(alarm: &Value) -> Vec<Watched> {
    let metric = |metric: &Value| Watched {
        namespace: metric["Namespace"].clone(),
        name: metric["MetricName"].as_str().expect("a name").to_owned(),
        dimensions: metric["Dimensions"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|one| (one["Name"].as_str().expect("a name").to_owned(), one["Value"].clone()))
            .collect(),
    };
    match alarm.get("Metrics") {
        None => vec![metric(alarm)],
        Some(metrics) => metrics
            .as_array()
            .expect("metrics")
            .iter()
            .filter(|one| one.get("Expression").is_none())
            .map(|one| metric(&one["MetricStat"]["Metric"]))
            .collect(),
    }
}

fn of_type<'a>(template: &'a Value, kind: &str) -> BTreeMap<&'a str, &'a Value> {
    let resources = template["Resources"].as_object().expect("resources").iter();
    resources.filter(|(_, one)| one["Type"] == kind).map(|(id, one)| (id.as_str(), &one["Properties"])).collect()
}

#[test]
fn every_alarm_watches_a_metric_that_exists() {
    let template = template();
    let resources = &template["Resources"];
    let filtered: BTreeSet<&str> = of_type(&template, "AWS::Logs::MetricFilter")
        .values()
        .map(|filter| {
            let made = &filter["MetricTransformations"][0];
            assert_eq!(made["MetricNamespace"], json!({"Ref": "AWS::StackName"}));
            let log = filter["LogGroupName"]["Ref"].as_str().expect("a log group");
            assert_eq!(resources[log]["Type"], "AWS::Logs::LogGroup");
            made["MetricName"].as_str().expect("a name")
        })
        .collect();
    let stage = resources["Api"]["Properties"]["StageName"].clone();
    for (id, alarm) in of_type(&template, "AWS::CloudWatch::Alarm") {
        assert_eq!(alarm["AlarmActions"], json!([{"Ref": "AlarmsTopic"}]), "{id}");
        assert_eq!(alarm["TreatMissingData"], "notBreaching", "{id}: what is idle has no data");
        // The key policy allows alarms to use the topic's key only under the name that CloudFormation gives them.
        assert_eq!(alarm.get("AlarmName"), None, "{id}");
        assert!(alarm["AlarmDescription"].as_str().is_some_and(|text| text.len() > 20), "{id}");
        let metrics = watched(alarm);
        // "Alarms based on metric math expressions can have up to 10 metrics."
        assert!((1..=10).contains(&metrics.len()), "{id}");
        for Watched { namespace, name, dimensions } in metrics {
            let what = format!("{id}: {name}");
            let named: Vec<&str> = dimensions.keys().map(String::as_str).collect();
            match namespace.as_str() {
                Some("AWS/SQS") => {
                    assert!(SQS.contains(&name.as_str()), "{what}");
                    assert_eq!(named, ["QueueName"], "{what}");
                    let of = dimensions["QueueName"]["Fn::GetAtt"].as_array().expect("an attribute");
                    assert_eq!(of[1], "QueueName", "{what}");
                    assert_eq!(resources[of[0].as_str().expect("a queue")]["Type"], "AWS::SQS::Queue", "{what}");
                }
                Some("AWS/ApiGateway") => {
                    assert!(API_GATEWAY.contains(&name.as_str()), "{what}");
                    assert_eq!(dimensions["ApiName"], resources["Api"]["Properties"]["Name"], "{what}");
                    assert_eq!(dimensions["Stage"], stage, "{what}");
                    if named != ["ApiName", "Stage"] {
                        assert_eq!(named, ["ApiName", "Method", "Resource", "Stage"], "{what}");
                        let (path, method) = (&dimensions["Resource"], &dimensions["Method"]);
                        let (path, method) = (path.as_str().expect("a path"), method.as_str().expect("a method"));
                        let route = &resources["Api"]["Properties"]["DefinitionBody"]["paths"][path];
                        assert!(route.get(method.to_lowercase()).is_some(), "{what}: {method} {path} is no route");
                    }
                }
                Some("AWS/Lambda") => {
                    assert!(LAMBDA.contains(&name.as_str()), "{what}");
                    // Without this dimension the metric would cover all functions of the account.
                    assert_eq!(named, ["FunctionName"], "{what}");
                    let of = dimensions["FunctionName"]["Ref"].as_str().expect("a function");
                    assert_eq!(resources[of]["Type"], "AWS::Serverless::Function", "{what}");
                }
                _ => {
                    assert_eq!(namespace, json!({"Ref": "AWS::StackName"}), "{what}");
                    assert!(filtered.contains(name.as_str()), "{what} is made by no metric filter");
                    assert!(dimensions.is_empty(), "{what}: a metric filter with a default value has none");
                }
            }
        }
    }
}

/// The values of a dimension of this program's metrics.
pub fn values_of(dimension: &str) -> Vec<&'static str> {
    match dimension {
        "Outcome" => Outcome::ALL.map(Outcome::as_str).into(),
        "Class" => ErrorClass::ALL.map(ErrorClass::as_str).into(),
        "Age" => Age::ALL.map(Age::as_str).into(),
        "Step" => StartStatus::ALL.iter().map(|status| status.as_str()).collect(),
        other => panic!("{other} is not a dimension"),
    }
}

/// A metric of the dashboard. The stack's name is `STACK`.
struct Shown {
    namespace: String,
    name: String,
    /// In their order, with their values.
    dimensions: Vec<(String, String)>,
}

/// The metrics of the dashboard.
fn shown(template: &Value) -> Vec<Shown> {
    let body = template["Resources"]["Dashboard"]["Properties"]["DashboardBody"]["Fn::Sub"].as_str().expect("a body");
    let body = body.replace("${AWS::StackName}", "STACK").replace("${AWS::Region}", "eu-central-1");
    assert!(!body.contains("${"), "{body}");
    let body: Value = serde_json::from_str(&body).expect("JSON");
    let mut shown = Vec::new();
    for widget in body["widgets"].as_array().expect("widgets").iter().filter(|widget| widget["type"] == "metric") {
        let mut before: Vec<String> = Vec::new();
        for metric in widget["properties"]["metrics"].as_array().expect("metrics") {
            let given: Vec<&str> = metric.as_array().expect("a metric").iter().filter_map(Value::as_str).collect();
            // "..." repeats what the metric before has in these places, "." one of them.
            let whole: Vec<String> = match given.split_first() {
                Some((&"...", last)) => {
                    let kept = before.len().checked_sub(last.len()).expect("enough before");
                    before[..kept].iter().cloned().chain(last.iter().map(|one| (*one).to_owned())).collect()
                }
                _ => {
                    let one = |(place, text): (usize, &&str)| {
                        if *text == "." { before[place].clone() } else { (*text).into() }
                    };
                    given.iter().enumerate().map(one).collect()
                }
            };
            let dimensions = whole[2..].chunks(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect();
            shown.push(Shown { namespace: whole[0].clone(), name: whole[1].clone(), dimensions });
            before = whole;
        }
    }
    shown
}

#[test]
fn the_dashboard_shows_metrics_that_exist() {
    let template = template();
    let names = |kind: &str, attribute: &str| -> BTreeSet<String> {
        let all = of_type(&template, kind).into_values();
        all.filter_map(|one| one[attribute]["Fn::Sub"].as_str())
            .map(|name| name.replace("${AWS::StackName}", "STACK"))
            .collect()
    };
    let (functions, queues) =
        (names("AWS::Serverless::Function", "FunctionName"), names("AWS::SQS::Queue", "QueueName"));
    let filtered: BTreeSet<&str> = of_type(&template, "AWS::Logs::MetricFilter")
        .values()
        .filter_map(|filter| filter["MetricTransformations"][0]["MetricName"].as_str())
        .collect();
    let mut own: BTreeMap<String, BTreeSet<Option<String>>> = BTreeMap::new();
    for Shown { namespace, name, dimensions } in shown(&template) {
        let what = format!("{namespace} {name} {dimensions:?}");
        let keys: Vec<&str> = dimensions.iter().map(|(name, _)| name.as_str()).collect();
        match namespace.as_str() {
            "AWS/SQS" => {
                assert!(SQS.contains(&name.as_str()) && keys == ["QueueName"], "{what}");
                assert!(queues.contains(&dimensions[0].1), "{what}: {queues:?}");
            }
            "AWS/Lambda" => {
                assert!(LAMBDA.contains(&name.as_str()) && keys == ["FunctionName"], "{what}");
                assert!(functions.contains(&dimensions[0].1), "{what}: {functions:?}");
            }
            "AWS/ApiGateway" => {
                assert!(API_GATEWAY.contains(&name.as_str()) && keys == ["ApiName", "Stage"], "{what}");
            }
            "STACK" if dimensions.is_empty() => assert!(filtered.contains(name.as_str()), "{what}: no filter makes it"),
            "STACK" => {
                let metric = METRICS.iter().find(|metric| metric.name == name);
                let metric = metric.unwrap_or_else(|| panic!("{what}: the code has no such metric"));
                let expected: Vec<&str> = ["Function"].into_iter().chain(metric.dimension).collect();
                assert_eq!(keys, expected, "{what}");
                assert!(functions.contains(&dimensions[0].1), "{what}: {functions:?}");
                if let Some((name, value)) = dimensions.get(1) {
                    assert!(values_of(name).contains(&value.as_str()), "{what}");
                }
                own.entry(name).or_default().insert(dimensions.get(1).map(|(_, value)| value.clone()));
            }
            _ => panic!("{what}: an unknown namespace"),
        }
    }
    // A start's errors and the gauges are shown with every value; otherwise a graph that shows nothing proves nothing.
    for name in ["StartDuration", "StartErrors", "JobsPerStart", "UnfinishedStarts", "SandboxesWithoutMembers"] {
        let metric = METRICS.iter().find(|metric| metric.name == name).unwrap_or_else(|| panic!("{name} is gone"));
        let shown = own.get(name).unwrap_or_else(|| panic!("{name} is not shown"));
        let expected: BTreeSet<Option<String>> = match metric.dimension {
            // The function that cancels starts is another one, and their duration says nothing.
            Some("Outcome") => ["READY", "ERROR"].map(|value| Some(value.to_owned())).into(),
            Some(dimension) => values_of(dimension).into_iter().map(|value| Some(value.to_owned())).collect(),
            None => BTreeSet::from([None]),
        };
        assert_eq!(*shown, expected, "{name}");
    }
    let operations = include_str!("../../docs/operations.md");
    for metric in METRICS {
        assert!(operations.contains(&format!("`{}`", metric.name)), "{} is not documented", metric.name);
    }
}

/// Conditions that no one would notice without an alarm.
#[test]
fn every_condition_that_operators_must_know_has_an_alarm() {
    let template = template();
    let alarms = of_type(&template, "AWS::CloudWatch::Alarm");
    for (alarm, queue) in [("DeadLettersAlarm", "DeadLetterQueue"), ("ExportDeadLettersAlarm", "ExportDeadLetterQueue")]
    {
        let dead_letters = &watched(alarms[alarm])[0];
        // The consumer removes dead letters within a second, and SQS does not count messages as sent that it moves to a
        // dead-letter queue itself.
        assert_eq!(dead_letters.name, "NumberOfMessagesReceived");
        assert_eq!(dead_letters.dimensions["QueueName"]["Fn::GetAtt"][0], queue);
        let one = alarms[alarm];
        assert_eq!(
            (&one["Threshold"], &one["EvaluationPeriods"], &one["Statistic"]),
            (&json!(0), &json!(1), &json!("Sum"))
        );
    }
    for (alarm, queue) in [("OldestMessageAlarm", "JobQueue"), ("OldestExportAlarm", "ExportQueue")] {
        let oldest = &watched(alarms[alarm])[0];
        assert_eq!(oldest.dimensions["QueueName"]["Fn::GetAtt"][0], queue);
    }
    let abandoned = of_type(&template, "AWS::Logs::MetricFilter")["ExportsAbandoned"];
    assert_eq!(abandoned["FilterPattern"], r#"{ $.message = "export.abandoned" }"#);
    assert_eq!(alarms["ExportsAbandonedAlarm"]["Threshold"], 1);
    let not_deleted = of_type(&template, "AWS::Logs::MetricFilter")["SandboxesNotDeleted"];
    assert_eq!(not_deleted["FilterPattern"], r#"{ $.message = "sandbox.deletion_keeps_failing" }"#);
    assert_eq!(alarms["SandboxesNotDeletedAlarm"]["Threshold"], 1);
    let unknown = of_type(&template, "AWS::Logs::MetricFilter")["SandboxesUnknown"];
    assert_eq!(unknown["FilterPattern"], r#"{ $.message = "sandbox.unknown_at_provider" }"#);
    assert_eq!(unknown["MetricTransformations"][0]["MetricValue"], "$.count");
    assert_eq!(alarms["SandboxesUnknownAlarm"]["Threshold"], 1);
    assert_eq!(template["Resources"]["SandboxesUnknownAlarm"]["Condition"], "HasOwnRuntimeApiKey");
    let opened = of_type(&template, "AWS::Logs::MetricFilter")["CircuitOpened"];
    assert_eq!(opened["FilterPattern"], r#"{ $.message = "provider.circuit_opened" }"#);
    assert_eq!(alarms["ProviderNotRespondingAlarm"]["MetricName"], opened["MetricTransformations"][0]["MetricName"]);
    // Every function that crashes or times out.
    let with_errors: BTreeSet<String> = ["FunctionErrorsAlarm", "WorkerErrorsAlarm"]
        .into_iter()
        .flat_map(|alarm| watched(alarms[alarm]))
        .filter(|metric| metric.name == "Errors")
        .map(|metric| metric.dimensions["FunctionName"]["Ref"].as_str().expect("a function").to_owned())
        .collect();
    let functions: BTreeSet<String> =
        of_type(&template, "AWS::Serverless::Function").keys().map(|id| (*id).to_owned()).collect();
    assert_eq!(with_errors, functions);
    // Throttling matters most for the functions in front of all others, and for those with a concurrency limit of their
    // own.
    let throttled: BTreeSet<String> = watched(alarms["ThrottlesAlarm"])
        .into_iter()
        .map(|metric| metric.dimensions["FunctionName"]["Ref"].as_str().expect("a function").to_owned())
        .collect();
    let expected = ["AuthorizerFunction", "EventsFunction", "WorkerFunction", "ExportsFunction", "StreamStartFunction"];
    assert_eq!(throttled, expected.map(str::to_owned).into());
    // A metric filter searches the log of every function that can fail through the server's fault.
    let logs: BTreeSet<&str> = of_type(&template, "AWS::Logs::MetricFilter")
        .values()
        .map(|filter| filter["LogGroupName"]["Ref"].as_str().expect("a log group"))
        .collect();
    let of_functions: BTreeSet<String> = functions.iter().map(|id| id.replace("Function", "Log")).collect();
    let without: Vec<_> = of_functions.iter().filter(|log| !logs.contains(log.as_str())).collect();
    assert_eq!(without, ["WebClientLog"], "WebClient has no store that could fail");
    let budget = &of_type(&template, "AWS::Budgets::Budget")["Budget"];
    assert_eq!(template["Resources"]["Budget"]["Condition"], "HasBudget");
    assert_eq!(budget["Budget"]["BudgetLimit"]["Amount"], json!({"Ref": "MonthlyBudget"}));
    for notification in budget["NotificationsWithSubscribers"].as_array().expect("notifications") {
        assert_eq!(notification["Subscribers"][0]["Address"], json!({"Ref": "AlarmEmail"}));
    }
}

/// Evaluates CloudWatch's filter patterns for JSON, as far as the template uses them: comparisons of fields with texts,
/// `&&`, `||` and parentheses.
mod pattern {
    use serde_json::Value;

    pub fn matches(pattern: &str, line: &Value) -> bool {
        let inner = pattern.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')).expect("a pattern for JSON");
        let tokens = tokens(inner);
        let mut rest = tokens.as_slice();
        let matches = any(&mut rest, line);
        assert!(rest.is_empty(), "{pattern}: {rest:?} was not understood");
        matches
    }

    fn tokens(text: &str) -> Vec<String> {
        let mut tokens = Vec::new();
        let mut rest = text.trim_start();
        while let Some(first) = rest.chars().next() {
            let length = match first {
                '(' | ')' | '=' => 1,
                '&' | '|' => 2,
                '"' => rest[1..].find('"').expect("an end of the text") + 2,
                '$' => rest.find(|one: char| one == '=' || one.is_whitespace()).expect("a comparison"),
                other => panic!("{other} is not supported"),
            };
            tokens.push(rest[..length].to_owned());
            rest = rest[length..].trim_start();
        }
        tokens
    }

    fn any(rest: &mut &[String], line: &Value) -> bool {
        let mut matches = all(rest, line);
        while take(rest, "||") {
            matches |= all(rest, line);
        }
        matches
    }

    fn all(rest: &mut &[String], line: &Value) -> bool {
        let mut matches = one(rest, line);
        while take(rest, "&&") {
            matches &= one(rest, line);
        }
        matches
    }

    fn one(rest: &mut &[String], line: &Value) -> bool {
        if take(rest, "(") {
            let matches = any(rest, line);
            assert!(take(rest, ")"), "a closing parenthesis is missing");
            return matches;
        }
        let [field, equals, text, ..] = *rest else { panic!("{rest:?} is not a comparison") };
        assert_eq!(equals, "=");
        let field = field.strip_prefix("$.").expect("a field");
        let matches = line[field].as_str() == Some(text.trim_matches('"'));
        *rest = &rest[3..];
        matches
    }

    fn take(rest: &mut &[String], token: &str) -> bool {
        let is_next = rest.first().is_some_and(|first| first == token);
        if is_next {
            *rest = &rest[1..];
        }
        is_next
    }

    #[test]
    fn filter_patterns_are_parsed() {
        let line = serde_json::json!({"message": "a", "fault": "server"});
        for (pattern, expected) in [
            (r#"{ $.message = "a" }"#, true),
            (r#"{ $.message = "b" }"#, false),
            (r#"{ $.other = "a" }"#, false),
            (r#"{ ($.message = "a" && $.fault = "user") || $.message = "c" }"#, false),
            (r#"{ ($.message = "b" && $.fault = "server") || $.message = "a" }"#, true),
            (r#"{ $.message = "a" && ($.fault = "user" || $.fault = "server") }"#, true),
        ] {
            assert_eq!(matches(pattern, &line), expected, "{pattern}");
        }
    }
}

/// Captures what this thread logs, line by line, in the functions' log format.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("unpoisoned").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    pub fn begin() -> (Self, DefaultGuard) {
        Self::of("shared=info")
    }

    /// With the levels of these targets.
    pub fn of(targets: &str) -> (Self, DefaultGuard) {
        let log = Self::default();
        let to = log.clone();
        let layer = tracing_subscriber::fmt().json().flatten_event(true).with_span_list(false);
        let subscriber = layer.with_env_filter(targets).with_writer(move || to.clone()).finish();
        (log, log_to(subscriber))
    }

    /// The lines since the last call.
    pub fn take(&self) -> Vec<Value> {
        let bytes = std::mem::take(&mut *self.0.lock().expect("unpoisoned"));
        let text = String::from_utf8(bytes).expect("text");
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }
}

/// The number of lines that a metric filter of the template counts.
fn counted(filter: &str, lines: &[Value]) -> usize {
    let template = template();
    let pattern = template["Resources"][filter]["Properties"]["FilterPattern"].as_str().expect("a pattern");
    lines.iter().filter(|line| pattern::matches(pattern, line)).count()
}

/// Only errors that the operator can fix are counted: each start fails, because of its user or because of the server.
#[tokio::test]
async fn a_failed_start_counts_only_if_it_is_the_servers_fault() {
    let (log, _logging) = Log::begin();
    let message = json!({"initial_message": {"content": [{"type": "text", "text": "Hello"}]}});
    let broken = || Fault::new("POST /api/conversations", Nth::Always, Kind::Status(422, r#"{"detail":"no"}"#.into()));
    let with = |field: &str, value: &str| {
        let mut body = message.clone();
        body[field] = value.into();
        body
    };
    let cases = [
        ("no model", message.clone(), json!({}), None, ErrorClass::User),
        ("no such sandbox", with("sandbox_id", "none"), json!({"llm_model": "openai/x"}), None, ErrorClass::User),
        (
            "an agent server that refuses",
            message.clone(),
            json!({"llm_model": "openai/x"}),
            Some(broken()),
            ErrorClass::AgentServer,
        ),
    ];
    for (case, body, settings, fault, class) in cases {
        let expected = class.fault().as_str();
        let harness = WorkerHarness::start(quick()).await;
        harness.set_settings(settings).await;
        if let Some(fault) = fault {
            harness.agent.inject(fault);
        }
        let task = harness.begin(&body).await;
        let ended = harness.drive(task.id).await;
        assert_eq!(ended.now.status, StartStatus::Error, "{case}: {:?}", ended.now.detail);
        let lines = log.take();
        let failed: Vec<&Value> = lines.iter().filter(|line| line["message"] == "start.failed").collect();
        assert_eq!(failed.len(), 1, "{case}: {lines:?}");
        assert_eq!(failed[0]["fault"], expected, "{case}: {}", failed[0]);
        assert_eq!(failed[0]["class"], class.as_str(), "{case}: {}", failed[0]);
        assert_eq!(counted("StartsInError", &lines), usize::from(expected == "server"), "{case}");
        harness.finish().await;
    }
    let harness = WorkerHarness::start(quick()).await;
    let task = harness.begin(&message).await;
    harness.context.saga.give_up(&harness.user, task.id).await.expect("given up");
    assert_eq!(counted("StartsInError", &log.take()), 1, "an abandoned start");
    harness.finish().await;
}

/// The same for requests.
#[test]
fn a_failed_request_counts_only_if_it_is_the_servers_fault() {
    let (log, _logging) = Log::begin();
    let store = StoreError::new(StoreErrorKind::Other, "PutItem: the store");
    let cases = [
        (Error::Store(store), 503, 1),
        (Error::internal("a bug"), 500, 1),
        (Error::Upstream { message: "The sandbox".to_owned(), context: "it is broken".to_owned() }, 502, 0),
        (Error::Unavailable("The export is being built".to_owned()), 503, 0),
        (Error::NotFound(Uuid::nil().to_string()), 404, 0),
    ];
    let filters: Vec<String> = of_type(&template(), "AWS::Logs::MetricFilter")
        .into_iter()
        .filter(|(id, _)| id.ends_with("Faults") && *id != "AuthorizerFaults")
        .map(|(id, _)| id.to_owned())
        .collect();
    assert_eq!(filters.len(), 9);
    for (error, status, expected) in cases {
        let what = format!("{error:?}");
        assert_eq!(error.into_response().status().as_u16(), status, "{what}");
        let lines = log.take();
        for filter in &filters {
            assert_eq!(counted(filter, &lines), expected, "{what} {filter}: {lines:?}");
        }
    }
    let refused = json!({"level": "ERROR", "message": "authorizer.failed", "error": "x"});
    assert_eq!(counted("AuthorizerFaults", &[refused]), 1);
}
