//! `template.yaml` and the files that are generated for it describe what is built and tested here: the tables of infra/schema, the route
//! table of infra/routes, and a policy for each function that grants what it needs and nothing more.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use ::routes::Authentication;
use aws_sdk_dynamodb::types::AttributeValue;
use regex_lite::Regex;
use serde_json::{Value, json};
use shared::aws::Aws;
use shared::config::SandboxConfig;
use shared::sandbox::spec::{AGENT_SERVER_VERSION, published_image};
use shared::user::UserId;
use shared::user::api_key::ApiKeyStore;
use tempfile::TempDir;
use uuid::Uuid;

use crate::support::api::{Api, PREFIX};
use crate::support::engines::Engines;
use crate::support::iam_proxy::{Call, IamProxy, Policies, Statement, allows};
use crate::support::kms;
use crate::tenants::{furnish, request, routes};

/// API Gateway's definition, as `template.yaml` names it.
const DEFINITION: &str = "infra/api-gateway.yaml";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn yaml(path: &str) -> Value {
    let text = fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    serde_yaml_ng::from_str(&text).expect("YAML")
}

/// The template with API Gateway's definition in the place where `AWS::Include` inserts it.
pub fn template() -> Value {
    let mut template = yaml("template.yaml");
    let body = &mut template["Resources"]["Api"]["Properties"]["DefinitionBody"];
    let include = json!({"Fn::Transform": {"Name": "AWS::Include", "Parameters": {"Location": DEFINITION}}});
    assert_eq!(*body, include);
    *body = yaml(DEFINITION);
    template
}

#[test]
fn generated_files_are_current() {
    for output in generate::outputs(&root()).expect("they are generated") {
        assert!(
            output.is_current(&root()),
            "{} differs from the route table; run `cargo run -p generate`",
            output.path
        );
    }
}

/// The resources of a type, by logical id.
fn of_type<'a>(template: &'a Value, kind: &str) -> BTreeMap<&'a str, &'a Value> {
    let resources = template["Resources"].as_object().expect("resources");
    let found = resources.iter().filter(|(_, resource)| resource["Type"] == kind);
    found.map(|(id, resource)| (id.as_str(), resource)).collect()
}

/// `${AWS::StackName}-name` without its beginning.
fn own_name(value: &Value) -> &str {
    let text = value["Fn::Sub"].as_str().expect("a name with the stack's");
    text.strip_prefix("${AWS::StackName}-").expect("a name with the stack's")
}

/// Functions by name.
fn functions(template: &Value) -> BTreeMap<&str, &Value> {
    let found = of_type(template, "AWS::Serverless::Function").into_values();
    found.map(|function| (own_name(&function["Properties"]["FunctionName"]), &function["Properties"])).collect()
}

#[test]
fn tables_bucket_and_queues_are_those_of_the_schema() {
    let template = template();
    let tables = of_type(&template, "AWS::DynamoDB::Table");
    assert_eq!(tables.len(), schema::TABLES.len());
    for table in schema::TABLES {
        let found = tables.values().find(|found| own_name(&found["Properties"]["TableName"]) == table.name);
        let found = found.unwrap_or_else(|| panic!("{} is missing", table.name));
        assert_eq!((&found["DeletionPolicy"], &found["UpdateReplacePolicy"]), (&json!("Retain"), &json!("Retain")));
        let found = &found["Properties"];
        assert_eq!(found["PointInTimeRecoverySpecification"]["PointInTimeRecoveryEnabled"], true, "{}", table.name);
        assert_eq!(found["BillingMode"], "PAY_PER_REQUEST");
        assert_eq!(found["SSESpecification"]["SSEEnabled"], true);
        let keys = |partition: &str, sort: Option<&str>| {
            let mut keys = vec![json!({"AttributeName": partition, "KeyType": "HASH"})];
            keys.extend(sort.map(|sort| json!({"AttributeName": sort, "KeyType": "RANGE"})));
            Value::Array(keys)
        };
        assert_eq!(found["KeySchema"], keys(table.partition_key, Some(table.sort_key)));
        let mut attributes: BTreeSet<&str> = [table.partition_key, table.sort_key].into();
        let indexes: Vec<Value> = table
            .indexes
            .iter()
            .map(|index| {
                attributes.insert(index.partition_key);
                attributes.extend(index.sort_key);
                let projection = match index.projected {
                    schema::Projected::All => json!({"ProjectionType": "ALL"}),
                    schema::Projected::Keys => json!({"ProjectionType": "KEYS_ONLY"}),
                    schema::Projected::KeysAnd(attributes) => {
                        json!({"ProjectionType": "INCLUDE", "NonKeyAttributes": attributes})
                    }
                };
                let keys = keys(index.partition_key, index.sort_key);
                json!({"IndexName": index.name, "KeySchema": keys, "Projection": projection})
            })
            .collect();
        assert_eq!(found["GlobalSecondaryIndexes"], Value::Array(indexes), "{}", table.name);
        let defined = found["AttributeDefinitions"].as_array().expect("attributes");
        assert!(defined.iter().all(|attribute| attribute["AttributeType"] == "S"));
        let defined: BTreeSet<&str> =
            defined.iter().filter_map(|attribute| attribute["AttributeName"].as_str()).collect();
        assert_eq!(defined, attributes, "{}", table.name);
    }

    let bucket = &template["Resources"]["Bucket"]["Properties"];
    let expiry = schema::EXPORTS_EXPIRE;
    assert_eq!(
        bucket["LifecycleConfiguration"]["Rules"],
        json!([{"Id": "exports", "Status": "Enabled", "Prefix": expiry.prefix, "ExpirationInDays": expiry.days,
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": expiry.incomplete_upload_days}}])
    );
    let private = bucket["PublicAccessBlockConfiguration"].as_object().expect("a block");
    assert!(private.len() == 4 && private.values().all(|value| *value == true));
    assert!(bucket["BucketEncryption"].is_object());

    let functions = functions(&template);
    for (function, timeout, schema, sources) in [
        (
            "worker",
            schema::WORKER_TIMEOUT,
            schema::JOB_QUEUE,
            [("Starts", "JobQueue"), ("DeadLetters", "DeadLetterQueue")],
        ),
        (
            "exports",
            schema::EXPORT_TIMEOUT,
            schema::EXPORT_QUEUE,
            [("Exports", "ExportQueue"), ("DeadLetters", "ExportDeadLetterQueue")],
        ),
    ] {
        let [(_, queue_id), (_, dead_id)] = sources;
        let [queue, dead] = [queue_id, dead_id].map(|id| &template["Resources"][id]["Properties"]);
        assert_eq!(own_name(&queue["QueueName"]), schema.name);
        assert_eq!(queue["VisibilityTimeout"], schema.visibility_timeout.as_secs());
        // SQS hides a message for 12 hours at most.
        assert!(schema.visibility_timeout >= 6 * timeout && schema.visibility_timeout.as_secs() <= 12 * 3600);
        assert_eq!(queue["RedrivePolicy"]["maxReceiveCount"], schema.max_receive_count);
        assert_eq!(queue["RedrivePolicy"]["deadLetterTargetArn"], json!({"Fn::GetAtt": [dead_id, "Arn"]}));
        let suffix = shared::jobs::queue::DEAD_LETTER_SUFFIX;
        assert_eq!(own_name(&dead["QueueName"]), format!("{}{suffix}", schema.name));
        let function = functions[function];
        assert_eq!(function["Timeout"], timeout.as_secs());
        for (source, queue) in sources {
            let source = &function["Events"][source]["Properties"];
            assert_eq!(source["Queue"], json!({"Fn::GetAtt": [queue, "Arn"]}));
            assert_eq!(source["FunctionResponseTypes"], json!(["ReportBatchItemFailures"]));
            // A process that crashes takes one message with it.
            assert_eq!(source["BatchSize"], 1);
        }
    }
    let worker = functions["worker"];
    assert_eq!(worker["Events"]["Sweep"]["Type"], "Schedule");
}

/// One stage, with all that a stage can have.
#[test]
fn there_is_one_stage() {
    let template = template();
    let apis = of_type(&template, "AWS::Serverless::Api");
    assert_eq!(apis.keys().collect::<Vec<_>>(), [&"Api"]);
    for kind in ["AWS::ApiGateway::Stage", "AWS::ApiGateway::Deployment", "AWS::ApiGateway::RestApi"] {
        assert!(of_type(&template, kind).is_empty(), "{kind}");
    }
    let api = &apis["Api"]["Properties"];
    assert_eq!(api["OpenApiVersion"], "3.0.1", "without it SAM makes a second stage");
    assert_eq!(api["StageName"], "v1");
    assert_eq!(api.get("BinaryMediaTypes"), None, "requests' bodies would be sent to functions in base64");
    assert_eq!(api["DefinitionBody"].get("x-amazon-apigateway-binary-media-types"), None);
    assert_eq!(api["TracingEnabled"], true);
    let settings = &api["MethodSettings"][0];
    assert_eq!((&settings["ResourcePath"], &settings["HttpMethod"]), (&json!("/*"), &json!("*")));
    assert_eq!(settings["MetricsEnabled"], true);
    assert!(settings["ThrottlingRateLimit"].is_u64() && settings["ThrottlingBurstLimit"].is_u64(), "{settings}");
    assert_eq!(
        api["DisableExecuteApiEndpoint"],
        json!({"Fn::If": ["IsCustomDomainOnly", true, false]}),
        "an API without its own address is an option"
    );
    let web_acl = &of_type(&template, "AWS::WAFv2::WebACLAssociation")["WebAcl"];
    assert_eq!(web_acl["Condition"], "HasWebAcl");
    let stage = web_acl["Properties"]["ResourceArn"]["Fn::Sub"].as_str().expect("an ARN");
    assert!(stage.ends_with("::/restapis/${Api}/stages/${Api.Stage}"), "{stage}");
}

/// What one caller, or a burst of work, can take of the account's concurrent executions.
#[test]
fn concurrency_is_bounded() {
    let template = template();
    let functions = functions(&template);
    let sources = &functions["worker"]["Events"];
    let starts = &sources["Starts"]["Properties"]["ScalingConfig"];
    assert_eq!(*starts, json!({"MaximumConcurrency": {"Ref": "WorkerConcurrency"}}));
    let concurrency = &template["Parameters"]["WorkerConcurrency"];
    // What Lambda accepts, and what leaves room for requests among the ten executions of a new account.
    assert_eq!((&concurrency["MinValue"], &concurrency["MaxValue"]), (&json!(2), &json!(1000)));
    let dead = sources["DeadLetters"]["Properties"]["ScalingConfig"]["MaximumConcurrency"].as_u64().expect("a number");
    let sources = &functions["exports"]["Events"];
    assert_eq!(
        sources["Exports"]["Properties"]["ScalingConfig"],
        json!({"MaximumConcurrency": {"Ref": "ExportConcurrency"}})
    );
    assert_eq!(sources["DeadLetters"]["Properties"]["ScalingConfig"], json!({"MaximumConcurrency": 2}));
    let exports = &template["Parameters"]["ExportConcurrency"];
    assert_eq!((&exports["MinValue"], &exports["MaxValue"]), (&json!(2), &json!(1000)));
    let defaults = [concurrency, exports].map(|parameter| parameter["Default"].as_u64().expect("a number"));
    // Hardly ever are there dead letters in both queues.
    assert!(dead >= 2 && defaults.iter().sum::<u64>() + dead < 10);
    for (name, function) in &functions {
        let condition = match *name {
            "worker" => ("ReservesWorker", "WorkerReservedConcurrency"),
            "stream-start" => ("ReservesStreamStart", "StreamStartReservedConcurrency"),
            _ => {
                assert_eq!(function.get("ReservedConcurrentExecutions"), None, "{name}");
                continue;
            }
        };
        let (condition, parameter) = condition;
        let reserved = json!({"Fn::If": [condition, {"Ref": parameter}, {"Ref": "AWS::NoValue"}]});
        assert_eq!(function["ReservedConcurrentExecutions"], reserved, "{name}");
        // A new account can reserve none.
        assert_eq!(template["Parameters"][parameter]["Default"], 0);
        let unless_zero = json!({"Fn::Not": [{"Fn::Equals": [{"Ref": parameter}, "0"]}]});
        assert_eq!(template["Conditions"][condition], unless_zero);
    }
}

/// Streams: which, for how long, and from which size on there is a link instead.
#[test]
fn streams_have_the_time_they_need() {
    let template = template();
    let functions = functions(&template);
    let definition = &template["Resources"]["Api"]["Properties"]["DefinitionBody"];
    let mut streamed = BTreeMap::new();
    for (path, methods) in definition["paths"].as_object().expect("paths") {
        for method in methods.as_object().expect("methods").values() {
            let (function, is_streamed) = integration(method);
            let timeout = method["x-amazon-apigateway-integration"].get("timeoutInMillis");
            // 29 s is the limit of API Gateway for what is not streamed, 15 min for what is.
            assert_eq!(is_streamed, timeout.is_some(), "{path}");
            if let Some(timeout) = timeout.and_then(Value::as_u64) {
                let own = functions[function.as_str()]["Timeout"].as_u64().expect("a timeout");
                assert_eq!(timeout, own * 1000, "{path}: the gateway waits as long as the function runs");
                assert!(timeout <= 900_000);
                streamed.insert(path.as_str(), function);
            }
        }
    }
    let expected = [
        ("/api/v1/app-conversations/stream-start", "stream-start"),
        ("/api/v1/app-conversations/{conversation_id}/download", "download"),
    ];
    assert_eq!(streamed, expected.map(|(path, function)| (path, function.to_owned())).into());
    // Lambda streams 2 MB/s beyond the first 6 MB, and 200 MB at most.
    let limit = &template["Parameters"]["InlineDownloadLimit"];
    assert_eq!(limit["MaxValue"], 200_000_000);
    let export = shared::config::ExportConfig::default();
    assert_eq!(limit["Default"], export.inline_limit);
    let build = export.budget.as_secs();
    assert!(build + 200 / 2 < functions["download"]["Timeout"].as_u64().expect("seconds"));
    // A build outside of a request ends itself before Lambda does, and has the time to record that.
    assert!(export.build_budget + std::time::Duration::from_secs(60) <= schema::EXPORT_TIMEOUT);
}

/// The right ones, and none that would send a key in clear or never match.
#[test]
fn parameters_take_what_is_meant_and_nothing_else() {
    let template = template();
    let parameters = template["Parameters"].as_object().expect("parameters");
    let url = (
        vec!["", "https://a.example.com", "https://a.example.com:8443", "https://a.example.com/base/v1", "https://a"],
        vec![
            "http://a.example.com",
            "https://a.example.com/",
            "https://a.example.com/base/",
            "https://a.example.com?x=1",
            "https://a.example.com#x",
            "https://user:secret@a.example.com",
            "https://a.example.com/x y",
            "https://",
            "a.example.com",
            " https://a.example.com",
            "https://a.example.com\nhttps://b.example.com",
            "HTTPS://a.example.com",
        ],
    );
    let cases: BTreeMap<&str, (Vec<&str>, Vec<&str>)> = [
        ("RuntimeApiUrl", url.clone()),
        ("WebUrl", url),
        (
            "OidcIssuer",
            (
                vec![
                    "",
                    "https://accounts.example.com",
                    "https://tenant.example.com/",
                    "https://a.example.com/realms/r",
                ],
                vec!["http://accounts.example.com", "accounts.example.com", "https://a.example.com?x", "https://"],
            ),
        ),
        ("OidcAudience", (vec!["", "api://default", "a-client"], vec!["two words", " "])),
        (
            "CorsOrigins",
            (
                vec!["", "https://app.example.com", "https://app.example.com:8443"],
                vec![
                    "http://app.example.com",
                    "https://app.example.com/",
                    "https://App.example.com",
                    "https://app.example.com/page",
                    "*",
                    "null",
                    "https://*.example.com",
                ],
            ),
        ),
        (
            "AgentServerImageRepository",
            (
                vec!["ghcr.io/openhands/agent-server", "registry.example.com:5000/team/agent_server", "agent"],
                vec![
                    "",
                    "https://",
                    "host/agent:1",
                    "agent:latest",
                    "Registry.example.com/agent",
                    "agent server",
                    "/agent",
                    "agent@sha256",
                ],
            ),
        ),
        (
            "AgentServerImageTag",
            (vec!["1.58.2-python", "latest", "_1"], vec!["", "-python", ".1", "a b", "a:b", "1.58.2+python"]),
        ),
        (
            "SandboxImage",
            (
                vec!["", "arn:aws:lambda:us-east-1:123456789012:microvm-image:mine-sandbox"],
                vec![
                    "mine-sandbox",
                    "arn:aws:lambda:us-east-1:123456789012:function:mine",
                    "arn:aws:lambda:us-east-1:123456789012:microvm-image:*",
                ],
            ),
        ),
        (
            "AlarmEmail",
            (vec!["", "ops@example.com"], vec!["ops", "ops@example", "a@example.com,b@example.com", "a b@example.com"]),
        ),
        (
            "WebAclArn",
            (
                vec![
                    "",
                    "arn:aws:wafv2:eu-central-1:123456789012:regional/webacl/mine/01234567-89ab-cdef-0123-456789abcdef",
                ],
                vec![
                    "arn:aws:wafv2:us-east-1:123456789012:global/webacl/mine/01234567-89ab-cdef-0123-456789abcdef",
                    "mine",
                ],
            ),
        ),
    ]
    .into();
    for (name, (accepted, refused)) in &cases {
        let pattern = parameters[*name]["AllowedPattern"].as_str().expect("a pattern");
        assert!(pattern.starts_with('^') && pattern.ends_with('$'), "{name}: {pattern}");
        assert!(parameters[*name]["ConstraintDescription"].is_string(), "{name} says nothing to those it refuses");
        let pattern = Regex::new(pattern).expect("a pattern");
        for value in accepted {
            assert!(pattern.is_match(value), "{name} refuses {value:?}");
        }
        for value in refused {
            assert!(!pattern.is_match(value), "{name} accepts {value:?}");
        }
        let default = parameters[*name]["Default"].as_str().expect("a default");
        assert!(pattern.is_match(default), "{name}: the default");
    }
    let image = ["Repository", "Tag"].map(|part| &parameters[&format!("AgentServerImage{part}")]["Default"]);
    let image = image.map(|default| default.as_str().expect("a default")).join(":");
    assert_eq!(image, published_image(AGENT_SERVER_VERSION), "a stack runs the version that is tested");
    for (name, parameter) in parameters {
        let bounded =
            ["AllowedPattern", "AllowedValues", "MinValue"].iter().any(|bound| parameter.get(bound).is_some());
        assert!(bounded || name == "RuntimeApiKey", "{name} takes anything");
        assert_eq!(bounded && parameter.get("AllowedPattern").is_some(), cases.contains_key(name.as_str()), "{name}");
    }
    let grouped: BTreeSet<&str> = template["Metadata"]["AWS::CloudFormation::Interface"]["ParameterGroups"]
        .as_array()
        .expect("groups")
        .iter()
        .flat_map(|group| group["Parameters"].as_array().expect("parameters"))
        .filter_map(Value::as_str)
        .collect();
    assert_eq!(grouped, parameters.keys().map(String::as_str).collect());
    let operations = fs::read_to_string(root().join("docs/operations.md")).expect("a document");
    for name in parameters.keys() {
        assert!(operations.contains(&format!("`{name}`")), "docs/operations.md does not name {name}");
    }
}

/// docs/operations.md names every variable of the configuration in a table, general ones with their defaults in the second column.
#[test]
fn variables_are_documented_with_their_defaults() {
    let operations = fs::read_to_string(root().join("docs/operations.md")).expect("a document");
    let name = Regex::new("`([A-Z][A-Z0-9_]+)`").expect("a pattern");
    let names = |text: &str| name.captures_iter(text).map(|found| found[1].to_owned()).collect::<Vec<_>>();
    let value = Regex::new(r"[0-9]+|\btrue\b|\bfalse\b").expect("a pattern");
    let elsewhere = Regex::new(r"\([^)]*\)").expect("a pattern");
    let values = |text: &str| {
        let text = elsewhere.replace_all(text, "");
        value.find_iter(&text).map(|found| found.as_str().to_owned()).collect::<Vec<_>>()
    };
    let rows: Vec<Vec<&str>> = operations.lines().map(|line| line.split(" | ").collect()).collect();
    let declared = Regex::new(r"\(`([A-Z][A-Z0-9_]+)`(?:, (?:seconds, )?([0-9]+|true|false)[);])?").expect("a pattern");
    let mut with_default = 0;
    for file in ["shared/src/config.rs", "shared/src/sandbox/config.rs"] {
        let source = fs::read_to_string(root().join(file)).expect("a source file");
        for found in declared.captures_iter(&source) {
            let variable = &found[1];
            let mut cells = rows.iter().flat_map(|row| row.iter().zip(row.iter().skip(1).chain([&""])));
            let row = cells.find(|(cell, _)| names(cell).iter().any(|one| one == variable));
            let Some((of_row, defaults)) = row.map(|(cell, next)| (names(cell), *next)) else {
                panic!("docs/operations.md does not name {variable}")
            };
            let Some(default) = found.get(2).filter(|_| file == "shared/src/config.rs") else { continue };
            with_default += 1;
            let position = of_row.iter().position(|one| one == variable).expect("its name");
            let documented = if of_row.len() == 1 {
                values(defaults).into_iter().next()
            } else {
                values(defaults).get(position).cloned()
            };
            assert_eq!(documented.as_deref(), Some(default.as_str()), "{variable} in docs/operations.md");
        }
    }
    assert!(with_default > 15, "{with_default}");
}

/// The redirect from the API to the bucket makes browsers say `Origin: null`.
#[test]
fn links_to_zips_work_from_every_page() {
    let template = template();
    let cors = &template["Resources"]["Bucket"]["Properties"]["CorsConfiguration"]["CorsRules"];
    assert_eq!(cors.as_array().map(Vec::len), Some(1));
    assert_eq!((&cors[0]["AllowedOrigins"], &cors[0]["AllowedMethods"]), (&json!(["*"]), &json!(["GET", "HEAD"])));
    assert_eq!(cors[0]["ExposedHeaders"], json!(["Content-Disposition", "Content-Length"]));
}

/// Every log has an end; every request is in one, with its address, and without what its caller wrote.
#[test]
fn requests_are_logged_with_their_address_and_without_secrets() {
    let template = template();
    let logs = of_type(&template, "AWS::Logs::LogGroup");
    assert_eq!(logs.len(), functions(&template).len() + 1);
    assert!(logs.values().all(|log| log["Properties"]["RetentionInDays"] == json!({"Ref": "LogRetentionDays"})));
    let setting = &template["Resources"]["Api"]["Properties"]["AccessLogSetting"]["Fn::If"];
    assert_eq!((&setting[0], &setting[2]), (&json!("LogsApiAccess"), &json!({"Ref": "AWS::NoValue"})));
    let destination = setting[1]["DestinationArn"]["Fn::Sub"].as_str().expect("an ARN");
    assert!(destination.ends_with(":log-group:${ApiAccessLog}"), "{destination}");
    let format: Value = serde_json::from_str(setting[1]["Format"].as_str().expect("a format")).expect("JSON");
    let fields: BTreeMap<&str, &str> = format
        .as_object()
        .expect("fields")
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str().expect("a variable")))
        .collect();
    // None of these is text of the caller's: no path, query, header, user agent or error message that repeats one.
    let expected = [
        ("request_id", "$context.requestId"),
        ("function_request_id", "$context.integration.requestId"),
        ("time", "$context.requestTime"),
        ("ip", "$context.identity.sourceIp"),
        ("method", "$context.httpMethod"),
        ("route", "$context.resourcePath"),
        ("status", "$context.status"),
        ("response_type", "$context.error.responseType"),
        ("authorizer_status", "$context.authorizer.status"),
        ("authorizer_error", "$context.authorizer.error"),
        ("authorizer_request_id", "$context.authorizer.requestId"),
        ("integration_status", "$context.integration.status"),
        ("response_bytes", "$context.responseLength"),
        ("latency_ms", "$context.responseLatency"),
    ];
    assert_eq!(fields, expected.into());
    // The role is the account's: it is there before the stage, and after the stack.
    let api = &template["Resources"]["Api"];
    let role = json!({"Fn::If": ["CreatesApiGatewayLogRole", {"Ref": "ApiGatewayAccount"}, "existing"]});
    assert_eq!(api["Metadata"]["LogRole"], role);
    for (id, resource) in template["Resources"].as_object().expect("resources") {
        for other in resource["DependsOn"]
            .as_str()
            .into_iter()
            .chain(resource["DependsOn"].as_array().into_iter().flatten().filter_map(Value::as_str))
        {
            let condition = &template["Resources"][other]["Condition"];
            assert!(
                condition.is_null() || *condition == resource["Condition"],
                "{id} depends on {other}, which may not be there"
            );
        }
    }
    for id in ["ApiGatewayAccount", "ApiGatewayLogRoleResource"] {
        let resource = &template["Resources"][id];
        assert_eq!(resource["Condition"], "CreatesApiGatewayLogRole");
        assert_eq!(
            (&resource["DeletionPolicy"], &resource["UpdateReplacePolicy"]),
            (&json!("Retain"), &json!("Retain"))
        );
    }
}

/// Which function an integration invokes, and whether its answer is streamed.
fn integration(method: &Value) -> (String, bool) {
    let integration = &method["x-amazon-apigateway-integration"];
    let uri = integration["uri"]["Fn::Sub"].as_str().expect("a uri");
    let (_, name) = uri.split_once(":function:${AWS::StackName}-").expect("a function's uri");
    let (name, end) = name.split_once('/').expect("an invocation");
    let streamed = integration["responseTransferMode"] == "STREAM";
    let path = if streamed { "2021-11-15" } else { "2015-03-31" };
    assert_eq!(end, if streamed { "response-streaming-invocations" } else { "invocations" });
    assert!(uri.contains(&format!(":lambda:path/{path}/functions/")), "{uri}");
    assert_eq!((&integration["type"], &integration["httpMethod"]), (&json!("aws_proxy"), &json!("POST")));
    (name.to_owned(), streamed)
}

#[test]
fn every_route_is_in_the_api_and_asks_who_calls() {
    let template = template();
    let paths = template["Resources"]["Api"]["Properties"]["DefinitionBody"]["paths"].as_object().expect("paths");
    let mut expected: BTreeMap<(String, String), bool> = BTreeMap::new();
    for route in ::routes::routes() {
        let is_open = route.authentication != Authentication::Caller;
        expected.insert((route.path.to_owned(), route.method.as_str().to_lowercase()), is_open);
        expected.insert((route.path.to_owned(), "x-amazon-apigateway-any-method".to_owned()), true);
    }
    expected.insert(("/{proxy+}".to_owned(), "x-amazon-apigateway-any-method".to_owned()), true);
    let mut found = BTreeMap::new();
    let mut invoked = BTreeSet::new();
    for (path, methods) in paths {
        for (method, definition) in methods.as_object().expect("methods") {
            let is_open = match definition.get("security") {
                None => true,
                Some(security) => {
                    assert_eq!(*security, json!([{"caller": []}]), "{method} {path}");
                    false
                }
            };
            found.insert((path.clone(), method.clone()), is_open);
            let (function, streamed) = integration(definition);
            if let Some(route) = ::routes::find(&method.to_uppercase(), path) {
                assert_eq!((function.as_str(), streamed), (route.function, route.is_streamed), "{method} {path}");
            }
            assert_eq!(streamed, ["stream-start", "download"].contains(&function.as_str()), "{method} {path}");
            invoked.insert(function);
            let parameters: Vec<_> =
                definition["parameters"].as_array().into_iter().flatten().map(|one| one["name"].as_str()).collect();
            assert_eq!(parameters.len(), path.matches('{').count(), "{path}");
        }
    }
    assert_eq!(found, expected);

    // Whom the gateway invokes, it may invoke; and that is all of them but the worker.
    let mut permitted: BTreeSet<String> = BTreeSet::new();
    for permission in of_type(&template, "AWS::Lambda::Permission").into_values() {
        let permission = &permission["Properties"];
        let function = permission["FunctionName"]["Ref"].as_str().expect("a function");
        let name = own_name(&template["Resources"][function]["Properties"]["FunctionName"]);
        let source = permission["SourceArn"]["Fn::Sub"].as_str().expect("a source");
        let end = if name == "authorizer" { "${Api}/authorizers/*" } else { "${Api}/v1/*" };
        assert!(source.ends_with(end), "{source}");
        permitted.insert(name.to_owned());
    }
    assert!(permitted.remove("authorizer"));
    assert_eq!(permitted, invoked);
    let mut all: BTreeSet<String> = fs::read_dir(root().join("functions"))
        .expect("functions")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .collect();
    assert_eq!(functions(&template).keys().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>(), all);
    assert!(all.remove("authorizer") && all.remove("worker") && all.remove("exports"));
    assert_eq!(all, invoked);

    let authorizer = &template["Resources"]["Api"]["Properties"]["DefinitionBody"]["components"]["securitySchemes"]["caller"]
        ["x-amazon-apigateway-authorizer"];
    assert_eq!((&authorizer["authorizerResultTtlInSeconds"], &authorizer["type"]), (&json!(0), &json!("request")));
    assert_eq!(authorizer.get("identitySource"), None, "there are several headers that credentials may be in");
    let refusals =
        &template["Resources"]["Api"]["Properties"]["DefinitionBody"]["x-amazon-apigateway-gateway-responses"];
    for (kind, refusal) in refusals.as_object().expect("gateway responses") {
        let body = refusal["responseTemplates"]["application/json"].as_str().expect("a body");
        let body: Value = serde_json::from_str(body).expect("JSON");
        assert!(body["detail"].is_string(), "{kind}: {body}");
        // As functions answer.
        let headers = &refusal["responseParameters"];
        assert_eq!(headers["gatewayresponse.header.Strict-Transport-Security"], "'max-age=31536000'", "{kind}");
        assert_eq!(headers["gatewayresponse.header.X-Content-Type-Options"], "'nosniff'", "{kind}");
    }
    assert_eq!(
        (&refusals["UNAUTHORIZED"]["statusCode"], &refusals["ACCESS_DENIED"]["statusCode"]),
        (&json!(401), &json!(403))
    );
}

/// The web UI is there only for who asks for it, its bucket is not public, and what is below /api/ is never cached.
#[test]
fn a_hosted_web_ui_is_an_option() {
    let template = template();
    let resources = template["Resources"].as_object().expect("resources");
    let of_ui: BTreeSet<&str> =
        resources.iter().filter(|(_, one)| one["Condition"] == "HasWebUi").map(|(id, _)| id.as_str()).collect();
    let expected = [
        "WebUi",
        "WebUiAccess",
        "WebUiBucket",
        "WebUiBucketPolicy",
        "WebUiLogBucket",
        "WebUiLogBucketPolicy",
        "WebUiPages",
    ];
    assert_eq!(of_ui, expected.into());
    assert_eq!(template["Parameters"]["HostWebUi"]["Default"], "no");
    for bucket in ["WebUiBucket", "WebUiLogBucket"] {
        let private = resources[bucket]["Properties"]["PublicAccessBlockConfiguration"].as_object().expect("a block");
        assert!(private.len() == 4 && private.values().all(|value| *value == true));
    }
    let statements = &resources["WebUiBucketPolicy"]["Properties"]["PolicyDocument"]["Statement"];
    // The second one makes a missing file a 404.
    for (readers, action) in statements.as_array().expect("statements").iter().zip(["s3:GetObject", "s3:ListBucket"]) {
        assert_eq!(
            (&readers["Effect"], &readers["Principal"]["Service"], &readers["Action"]),
            (&json!("Allow"), &json!("cloudfront.amazonaws.com"), &json!(action))
        );
        let source = readers["Condition"]["StringEquals"]["AWS:SourceArn"]["Fn::Sub"].as_str().expect("one");
        assert!(source.ends_with("${WebUi}"), "{source}");
    }
    let distribution = &resources["WebUi"]["Properties"]["DistributionConfig"];
    let api = &distribution["CacheBehaviors"][0];
    assert_eq!((&api["PathPattern"], &api["TargetOriginId"]), (&json!("/api/*"), &json!("api")));
    assert_eq!(api["CachePolicyId"], "4135ea2d-6df8-44a3-9df3-4b5a84be39ad", "AWS's policy that caches nothing");
    assert_eq!(api["AllowedMethods"].as_array().map(Vec::len), Some(7));
    assert_eq!(
        distribution["Origins"][1]["OriginPath"],
        format!("/{}", resources["Api"]["Properties"]["StageName"].as_str().expect("v1"))
    );
    // HSTS, nosniff, and no frames of other sites: the UI keeps its API key in the browser.
    let security_headers = "67f7725c-6f97-4210-82d7-5512b31e9d03";
    for behavior in [&distribution["DefaultCacheBehavior"], api] {
        assert_eq!(behavior["ResponseHeadersPolicyId"], security_headers, "AWS's SecurityHeadersPolicy");
    }
    // Longer than a stream is ever silent, and than an export is built within its request.
    let read_timeout = distribution["Origins"][1]["CustomOriginConfig"]["OriginReadTimeout"].as_u64().expect("seconds");
    assert!(read_timeout > shared::config::ExportConfig::default().budget.as_secs() + 10);
    assert_eq!(distribution["Logging"]["Bucket"], json!({"Fn::GetAtt": ["WebUiLogBucket", "RegionalDomainName"]}));
    assert_eq!(distribution["Logging"]["IncludeCookies"], false);
    let logs = &resources["WebUiLogBucket"]["Properties"];
    // CloudFront writes its logs by ACL.
    assert_eq!(logs["OwnershipControls"]["Rules"][0]["ObjectOwnership"], "BucketOwnerPreferred");
    assert_eq!(logs["LifecycleConfiguration"]["Rules"][0]["ExpirationInDays"], json!({"Ref": "LogRetentionDays"}));
    // Agent servers let its pages in.
    let origins = &template["Globals"]["Function"]["Environment"]["Variables"]["PERMITTED_CORS_ORIGINS"]["Fn::If"];
    assert_eq!(origins[0], "HasWebUi");
    assert!(origins[1]["Fn::Sub"][0].as_str().expect("a list").starts_with("https://${WebUi.DomainName},"));
}

/// Without `Sandboxes=microvm` there is no front door and no permission for MicroVMs; with it, the front door runs the function that is tested.
#[test]
fn microvms_are_an_option() {
    let template = template();
    assert_eq!(template["Conditions"]["HasMicrovms"], json!({"Fn::Equals": [{"Ref": "Sandboxes"}, "microvm"]}));
    assert_eq!(template["Parameters"]["Sandboxes"]["Default"], "none");
    let resources = template["Resources"].as_object().expect("resources");
    let optional: BTreeSet<&str> =
        resources.iter().filter(|(_, one)| one["Condition"] == "HasMicrovms").map(|(id, _)| id.as_str()).collect();
    let expected = ["SandboxFrontDoor", "SandboxFrontDoorFunction", "SandboxFrontDoorHeaders", "SandboxRoutes"];
    assert_eq!(optional, expected.into());
    // Nothing refers to them but themselves, and what has the same condition.
    for (id, resource) in resources.iter().filter(|(id, _)| !optional.contains(id.as_str())) {
        assert_no_reference_without_condition(resource, &optional, id);
    }
    assert_no_reference_without_condition(&template["Globals"], &optional, "Globals");
    for (id, output) in template["Outputs"].as_object().expect("outputs") {
        if output["Condition"] != "HasMicrovms" {
            assert_no_reference_without_condition(output, &optional, id);
        }
    }
    // Each function has the permissions on MicroVMs of what it contains: the provider, or the viewer.
    for (name, statements) in policies(&template) {
        let actions: BTreeSet<&str> = statements
            .iter()
            .flat_map(|one| &one.actions)
            .map(String::as_str)
            .filter(|one| one.contains("Microvm"))
            .collect();
        let change = [
            "lambda:CreateMicrovmAuthToken",
            "lambda:GetMicrovm",
            "lambda:ResumeMicrovm",
            "lambda:RunMicrovm",
            "lambda:SuspendMicrovm",
            "lambda:TerminateMicrovm",
        ];
        let expected: BTreeSet<&str> = match name.as_str() {
            "worker" => change.into_iter().chain(["lambda:ListMicrovms"]).collect(),
            "sandboxes" => change.into(),
            "conversations" | "download" | "skills" => ["lambda:GetMicrovm"].into(),
            _ => BTreeSet::new(),
        };
        assert_eq!(actions, expected, "{name}");
    }
    let rule = &template["Rules"]["MicrovmsHaveAnImage"];
    assert_eq!(rule["RuleCondition"], template["Conditions"]["HasMicrovms"]);
    let variables = &template["Globals"]["Function"]["Environment"]["Variables"];
    assert_eq!(
        variables["SANDBOX_KIND"],
        json!({"Fn::If": ["HasMicrovms", "microvm", {"Fn::If": ["HasRuntimeApi", "remote", "none"]}]})
    );

    let function = &resources["SandboxFrontDoorFunction"]["Properties"];
    let code = function["FunctionCode"]["Fn::Sub"].as_str().expect("a text");
    assert_eq!(code, fs::read_to_string(root().join("infra/front-door.js")).expect("a file"), "they are the same");
    // CloudFormation replaces the region, and must find nothing else to replace. CloudFront permits 10 KB.
    assert_eq!(code.matches("${").count(), code.matches("${AWS::Region}").count());
    assert!(code.len() < 10_000);
    assert_eq!(function["FunctionConfig"]["Runtime"], "cloudfront-js-2.0", "the older one has no KeyValueStore");
    let distribution = &resources["SandboxFrontDoor"]["Properties"]["DistributionConfig"];
    assert_eq!(distribution.get("Logging"), None, "session keys are in the query strings of websockets");
    let behavior = &distribution["DefaultCacheBehavior"];
    assert_eq!(behavior["CachePolicyId"], "4135ea2d-6df8-44a3-9df3-4b5a84be39ad", "AWS's policy that caches nothing");
    assert_eq!(
        behavior["OriginRequestPolicyId"], "b689b0a8-53d0-40ab-baf2-68738e2966ac",
        "AWS's policy that forwards all but the host: the endpoint's host is that of the MicroVM"
    );
    assert_eq!(behavior["ViewerProtocolPolicy"], "https-only");
    assert_eq!(behavior["AllowedMethods"].as_array().map(Vec::len), Some(7));
}

/// Without the condition, CloudFormation refuses a reference to a resource that is not created.
fn assert_no_reference_without_condition(value: &Value, optional: &BTreeSet<&str>, place: &str) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let choice = if name == "Fn::If" && value[0] == "HasMicrovms" { &value[2] } else { value };
                assert_no_reference_without_condition(choice, optional, place);
            }
        }
        Value::Array(values) => {
            for value in values {
                assert_no_reference_without_condition(value, optional, place);
            }
        }
        Value::String(text) => {
            let is_reference = optional.iter().any(|id| text == id || text.contains(&format!("${{{id}")));
            assert!(!is_reference, "{place} refers to {text}");
        }
        _ => {}
    }
}

/// A function's policy, statement by statement.
fn policy(template: &Value, function: &Value) -> Vec<Statement> {
    let table = |id: &str| own_name(&template["Resources"][id]["Properties"]["TableName"]).to_owned();
    let resource = |resource: &Value| {
        if resource == "*" {
            return "*".to_owned();
        }
        if resource["Ref"] == "SandboxImage" {
            return "sandbox-image".to_owned();
        }
        if let Some(id) = resource["Fn::GetAtt"][0].as_str() {
            return match id {
                "JobQueue" => "queue".to_owned(),
                "ExportQueue" => "export-queue".to_owned(),
                "Key" => "key".to_owned(),
                "Bucket" => "bucket".to_owned(),
                "SandboxRoutes" => "sandbox-routes".to_owned(),
                table_id => table(table_id),
            };
        }
        let text = resource["Fn::Sub"].as_str().expect("a resource of this template");
        if let Some(prefix) = text.strip_prefix("${Bucket.Arn}/") {
            return prefix.strip_suffix('*').expect("a prefix").to_owned();
        }
        let connectors = "arn:${AWS::Partition}:lambda:${AWS::Region}:aws:network-connector:aws-network-connector:";
        if let Some(name) = text.strip_prefix(connectors) {
            return format!("connector/{name}");
        }
        let (id, index) = text.strip_prefix("${").and_then(|text| text.split_once(".Arn}")).expect("an index");
        format!("{}{index}", table(id))
    };
    let Some(policies) = function.get("Policies") else { return Vec::new() };
    let statements = policies.as_array().expect("policies").iter().flat_map(|policy| {
        assert_eq!(policy["Version"], "2012-10-17");
        policy["Statement"].as_array().expect("statements")
    });
    statements
        .map(|statement| {
            // The permissions with all options on.
            let statement = statement.get("Fn::If").map_or(statement, |choice| {
                assert_eq!(
                    (&choice[0], &choice[2]),
                    (&json!("HasMicrovms"), &json!({"Ref": "AWS::NoValue"})),
                    "{statement}"
                );
                &choice[1]
            });
            let known = ["Effect", "Action", "Resource", "Condition"];
            let unknown: Vec<_> = statement
                .as_object()
                .expect("a statement")
                .keys()
                .filter(|key| !known.contains(&key.as_str()))
                .collect();
            assert!(unknown.is_empty(), "{unknown:?}: the proxy of the tests does not know it");
            let actions = statement["Action"].as_array().expect("actions").iter();
            let actions: Vec<String> = actions.map(|action| action.as_str().expect("an action").to_owned()).collect();
            assert!(actions.iter().all(|action| !action.contains('*')), "{actions:?}");
            Statement {
                denies: match statement["Effect"].as_str() {
                    Some("Allow") => false,
                    Some("Deny") => true,
                    other => panic!("{other:?} is no effect"),
                },
                actions,
                resources: statement["Resource"].as_array().expect("resources").iter().map(resource).collect(),
                condition: statement.get("Condition").cloned(),
            }
        })
        .collect()
}

/// What each function may do.
pub fn policies(template: &Value) -> Policies {
    functions(template).into_iter().map(|(name, function)| (name.to_owned(), policy(template, function))).collect()
}

#[test]
fn every_policy_is_the_one_that_was_looked_at() {
    let mut lines = BTreeSet::new();
    for (function, statements) in policies(&template()) {
        for statement in statements {
            let effect = if statement.denies { "never " } else { "" };
            let condition = statement.condition.map(|condition| format!(" if {condition}")).unwrap_or_default();
            for action in &statement.actions {
                for resource in &statement.resources {
                    lines.insert(format!("{function} {effect}{action} {resource}{condition}\n"));
                }
            }
        }
    }
    let found: String = lines.into_iter().collect();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/policies.txt");
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(found, expected, "what functions may do has changed: look at it, and change {}", path.display());
}

/// The rules that the list of policies follows, so that a new statement follows them, too.
#[test]
fn policies_grant_no_more_than_they_must() {
    let template = template();
    for (name, statements) in policies(&template) {
        let of = |action: &str| {
            let found: Vec<&Statement> =
                statements.iter().filter(|one| !one.denies && one.actions.iter().any(|own| own == action)).collect();
            found
        };
        // KMS encrypts and decrypts for the purpose of this product alone.
        for action in ["kms:Decrypt", "kms:GenerateDataKey"] {
            for statement in of(action) {
                let purpose = json!({"StringEquals": {"kms:EncryptionContext:purpose": kms::PURPOSE}});
                assert_eq!(statement.condition.as_ref(), Some(&purpose), "{name}");
            }
        }
        // Variables are decrypted by Lambda, with a grant of its own: a function that seals and opens nothing has no use for the key.
        let may_decrypt = !of("kms:Decrypt").is_empty();
        assert_eq!(
            may_decrypt,
            !["authorizer", "exports", "start-tasks", "web-client"].contains(&name.as_str()),
            "{name}"
        );
        // A function that reads objects may learn that one is missing. A function that deletes objects lists them. Nothing else is listed.
        let deleted: BTreeSet<String> = of("s3:DeleteObject")
            .into_iter()
            .flat_map(|one| one.resources.clone())
            .map(|prefix| prefix + "*")
            .collect();
        let mut read: BTreeSet<String> =
            of("s3:GetObject").into_iter().flat_map(|one| one.resources.clone()).map(|prefix| prefix + "*").collect();
        for statement in of("s3:ListBucket") {
            let prefixes = statement.condition.as_ref().expect("a condition")["StringLike"]["s3:prefix"].clone();
            for prefix in prefixes.as_array().expect("prefixes") {
                let prefix = prefix.as_str().expect("a prefix");
                assert!(
                    read.remove(prefix) || deleted.contains(prefix),
                    "{name} lists {prefix}, which it neither reads nor deletes"
                );
            }
        }
        assert_eq!(read, BTreeSet::new(), "{name}: S3 answers 403 for an object that is missing there");
        // No function writes items that belong to no user: the data key, once it exists, and API keys.
        for action in ["PutItem", "UpdateItem", "DeleteItem"].map(|action| format!("dynamodb:{action}")) {
            for (key, is_first) in [("#deployment", action == "dynamodb:PutItem"), ("api-key#0a", false)] {
                let call = Call {
                    action: action.clone(),
                    resource: "users".to_owned(),
                    context: [("dynamodb:LeadingKeys", Some(vec![key.to_owned()]))].into(),
                };
                assert_eq!(allows(&statements, &call), is_first && may_decrypt, "{name} {action} {key}");
            }
        }
    }
    let key = &template["Resources"]["Key"]["Properties"]["KeyPolicy"]["Statement"];
    for statement in key.as_array().expect("statements") {
        if statement["Principal"].get("Service").is_some() {
            let condition = &statement["Condition"];
            assert_eq!(condition["StringEquals"], json!({"aws:SourceAccount": {"Ref": "AWS::AccountId"}}));
            let source = condition["ArnLike"]["aws:SourceArn"]["Fn::Sub"].as_str().expect("a source");
            assert!(source.ends_with(":${AWS::AccountId}:alarm:${AWS::StackName}-*"), "{source}");
        }
    }
}

/// All routes, and the jobs that they cause, with each function held to its policy: with all objects in the bucket, and
/// with none.
#[tokio::test(flavor = "multi_thread")]
async fn functions_get_along_with_their_policies() {
    let folder = TempDir::new().expect("a folder");
    let mut api = Api::at(folder.path(), SandboxConfig::None).await;
    let (user, other) = (UserId::new("u"), UserId::new("other"));
    furnish(&api, &user).await;
    // A request that is too large for its row.
    let large =
        json!({"title": "large", "initial_message": {"content": [{"type": "text", "text": "x".repeat(100_000)}]}});
    let (status, task) = api.call(&user, "POST", "/api/v1/app-conversations", Some(&large)).await;
    assert_eq!(status, 200, "{task}");
    let guard = IamProxy::new(policies(&template()), PREFIX);
    let _ways = api.guard(&guard).await;
    // What is selected is checked against the settings.
    let patch = format!("/api/v1/app-conversations/{}", Uuid::from_u128(1));
    let starts = ["/api/v1/app-conversations", "/api/v1/app-conversations/stream-start"].map(|path| ("POST", path));
    for (method, path) in starts.into_iter().chain([("PATCH", patch.as_str())]) {
        let (status, answer) = api.call(&user, method, path, Some(&json!({"selected_repository": "none"}))).await;
        assert_eq!(status, 422, "{method} {path} {answer}");
    }
    for route in routes().into_iter().filter(|route| route.method == "GET") {
        let (status, answer) = request(&api, &user, &route).await;
        assert!(status != 500, "{} {} {answer}", route.method, route.path);
    }
    let objects = api.aws.s3.list_objects_v2().bucket(&api.names.bucket).send().await.expect("a list");
    assert!(objects.contents().iter().any(|one| one.key().is_some_and(|key| key.starts_with("start-requests/"))));
    for object in objects.contents() {
        let delete = api.aws.s3.delete_object().bucket(&api.names.bucket).set_key(object.key.clone());
        delete.send().await.expect("deleted");
    }
    for route in routes() {
        for user in [&user, &other] {
            let (status, answer) = request(&api, user, &route).await;
            assert!(status != 500, "{} {} {answer}", route.method, route.path);
        }
    }
    assert_eq!(guard.refused(), BTreeSet::new());
    drop(api);
}

/// The authorizer finds an API key, and reads nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn the_authorizer_gets_along_with_its_policy() {
    let folder = TempDir::new().expect("a folder");
    let engines = Engines::start(folder.path()).await;
    let aws = Aws::new(&engines.sdk_config().await);
    let network = engines.network_sdk_config().await;
    let names = engines.names(PREFIX);
    schema::make_all(&aws, &names, PREFIX).await.expect("a schema");
    let user = UserId::new("u");
    let (_, key) = ApiKeyStore::new(aws.dynamodb, names.users.clone()).create(&user, "a key").await.expect("a key");
    let guard = IamProxy::new(policies(&template()), PREFIX);
    let way = guard.to("authorizer", &engines.dynamodb).await;
    let dynamodb = aws_sdk_dynamodb::config::Builder::from(&network).endpoint_url(way.url()).build();
    let dynamodb = aws_sdk_dynamodb::Client::from_conf(dynamodb);
    let keys = ApiKeyStore::new(dynamodb.clone(), names.users.clone());
    assert_eq!(keys.owner(&key).await.expect("the store"), Some(user.clone()));
    assert_eq!(guard.refused(), BTreeSet::new());
    let settings = dynamodb.get_item().table_name(&names.users).key("user", AttributeValue::S(user.to_string()));
    settings.key("kind", AttributeValue::S("settings".to_owned())).send().await.expect("forwarded");
    assert_eq!(guard.refused().len(), 1, "settings are not for the authorizer");
}

/// Of a missing object S3 says so only to those who may list it.
#[tokio::test(flavor = "multi_thread")]
async fn without_the_right_to_list_a_missing_object_is_forbidden() {
    let folder = TempDir::new().expect("a folder");
    let engines = Engines::start(folder.path()).await;
    let aws = Aws::new(&engines.sdk_config().await);
    let network = engines.network_sdk_config().await;
    let names = engines.names(PREFIX);
    schema::make_all(&aws, &names, PREFIX).await.expect("a schema");
    let statement = |action: &str, resource: &str, condition: Option<Value>| Statement {
        denies: false,
        actions: vec![action.to_owned()],
        resources: vec![resource.to_owned()],
        condition,
    };
    let read = statement("s3:GetObject", "events/", None);
    let list = statement("s3:ListBucket", "bucket", Some(json!({"StringLike": {"s3:prefix": ["events/*"]}})));
    let other = statement("s3:ListBucket", "bucket", Some(json!({"StringLike": {"s3:prefix": ["exports/*"]}})));
    for (name, statements, status) in [
        ("reads", vec![read.clone()], 403),
        ("reads and lists", vec![read.clone(), list], 404),
        ("reads and lists others", vec![read, other], 403),
    ] {
        let guard = IamProxy::new([(name.to_owned(), statements)].into(), PREFIX);
        let way = guard.to(name, &engines.s3).await;
        let s3 = aws_sdk_s3::config::Builder::from(&network).endpoint_url(way.url()).force_path_style(true).build();
        let s3 = aws_sdk_s3::Client::from_conf(s3);
        let head = s3.head_object().bucket(&names.bucket).key("events/none").send().await.expect_err("missing");
        let get = s3.get_object().bucket(&names.bucket).key("events/none").send().await.expect_err("missing");
        let found = [head.raw_response(), get.raw_response()].map(|answer| answer.map(|one| one.status().as_u16()));
        assert_eq!(found, [Some(status); 2], "{name}");
        assert_eq!(guard.refused().is_empty(), status == 404, "{:?}", guard.refused());
    }
}
