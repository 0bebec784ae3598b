//! `template.yaml`: what is deployed is what is built and tested here. Tables as in infra/schema, every route of every function,
//! each function with its own policy and nothing more.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use shared::config::SandboxConfig;
use shared::user::UserId;
use tempfile::TempDir;

use crate::support::api::{Api, PREFIX};
use crate::support::guard::{Guard, Permission};
use crate::tenants::{By, furnish, request, routes};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

pub fn template() -> Value {
    let text = fs::read_to_string(root().join("template.yaml")).expect("a template");
    serde_yaml_ng::from_str(&text).expect("YAML")
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
                    schema::Projected::KeysAnd(attribute) => {
                        json!({"ProjectionType": "INCLUDE", "NonKeyAttributes": [attribute]})
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

    let queue = &template["Resources"]["StartQueue"]["Properties"];
    let start = schema::START_QUEUE;
    assert_eq!(own_name(&queue["QueueName"]), start.name);
    assert_eq!(queue["VisibilityTimeout"], start.visibility_timeout.as_secs());
    assert_eq!(queue["RedrivePolicy"]["maxReceiveCount"], start.max_receive_count);
    assert_eq!(queue["RedrivePolicy"]["deadLetterTargetArn"], json!({"Fn::GetAtt": ["DeadLetterQueue", "Arn"]}));
    let dead = own_name(&template["Resources"]["DeadLetterQueue"]["Properties"]["QueueName"]);
    assert_eq!(dead, format!("{}{}", start.name, shared::start::queue::DEAD_LETTER_SUFFIX));
    let functions = functions(&template);
    let worker = functions["start-worker"];
    assert_eq!(worker["Timeout"], schema::WORKER_TIMEOUT.as_secs());
    for (source, queue) in [("Starts", "StartQueue"), ("DeadLetters", "DeadLetterQueue")] {
        let source = &worker["Events"][source]["Properties"];
        assert_eq!(source["Queue"], json!({"Fn::GetAtt": [queue, "Arn"]}));
        assert_eq!(source["FunctionResponseTypes"], json!(["ReportBatchItemFailures"]));
    }
    assert_eq!(worker["Events"]["Sweep"]["Type"], "Schedule");
    let logs = of_type(&template, "AWS::Logs::LogGroup");
    assert_eq!(logs.len(), functions.len());
    assert!(logs.values().all(|log| log["Properties"]["RetentionInDays"] == json!({"Ref": "LogRetentionDays"})));
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

/// Which function has a route, by the table of `cargo lambda watch`.
pub fn function_of(manifest: &str, path: &str, method: &str) -> String {
    let (_, line) = manifest.split_once(&format!("\n\"{path}\" = ")).unwrap_or_else(|| panic!("{path} is no route"));
    let entry = if line.starts_with('[') {
        line.split_once(']').expect("a list").0
    } else {
        line.lines().next().expect("a line")
    };
    let entry = match entry.lines().find(|line| line.contains(&format!("method = \"{method}\""))) {
        Some(line) => line.split_once("function = ").expect("a function").1,
        None => entry,
    };
    entry.split('"').nth(1).expect("a name").to_owned()
}

#[test]
fn every_route_is_in_the_api_and_asks_who_calls() {
    let template = template();
    let paths = template["Resources"]["Api"]["Properties"]["DefinitionBody"]["paths"].as_object().expect("paths");
    let manifest = fs::read_to_string(root().join("Cargo.toml")).expect("a manifest");
    let mut expected: BTreeMap<(String, String), bool> = BTreeMap::new();
    for route in routes() {
        let is_open = route.by != By::Caller || function_of(&manifest, route.path, route.method) == "web-client";
        expected.insert((route.path.to_owned(), route.method.to_lowercase()), is_open);
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
            if path != "/{proxy+}" && method != "x-amazon-apigateway-any-method" {
                assert_eq!(function, function_of(&manifest, path, &method.to_uppercase()), "{method} {path}");
            }
            assert_eq!(streamed, function == "stream-start", "{method} {path}");
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
        let end = if name == "authorizer" { "${Api}/authorizers/*" } else { "${Api}/*" };
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
    assert!(all.remove("authorizer") && all.remove("start-worker"));
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
    assert_eq!(of_ui, ["WebUi", "WebUiAccess", "WebUiBucket", "WebUiBucketPolicy", "WebUiPages"].into());
    assert_eq!(template["Parameters"]["HostWebUi"]["Default"], "no");
    let private =
        resources["WebUiBucket"]["Properties"]["PublicAccessBlockConfiguration"].as_object().expect("a block");
    assert!(private.len() == 4 && private.values().all(|value| *value == true));
    let readers = &resources["WebUiBucketPolicy"]["Properties"]["PolicyDocument"]["Statement"][0];
    assert_eq!(
        (&readers["Principal"]["Service"], &readers["Action"]),
        (&json!("cloudfront.amazonaws.com"), &json!("s3:GetObject"))
    );
    assert!(
        readers["Condition"]["StringEquals"]["AWS:SourceArn"]["Fn::Sub"].as_str().expect("one").ends_with("${WebUi}")
    );
    let distribution = &resources["WebUi"]["Properties"]["DistributionConfig"];
    let api = &distribution["CacheBehaviors"][0];
    assert_eq!((&api["PathPattern"], &api["TargetOriginId"]), (&json!("/api/*"), &json!("api")));
    assert_eq!(api["CachePolicyId"], "4135ea2d-6df8-44a3-9df3-4b5a84be39ad", "AWS's policy that caches nothing");
    assert_eq!(api["AllowedMethods"].as_array().map(Vec::len), Some(7));
    assert_eq!(
        distribution["Origins"][1]["OriginPath"],
        format!("/{}", resources["Api"]["Properties"]["StageName"].as_str().expect("v1"))
    );
    // Agent servers, and links to zips, let its pages in.
    let origins = &template["Globals"]["Function"]["Environment"]["Variables"]["PERMITTED_CORS_ORIGINS"]["Fn::If"];
    assert_eq!(origins[0], "HasWebUi");
    assert!(origins[1]["Fn::Sub"][0].as_str().expect("a list").starts_with("https://${WebUi.DomainName},"));
}

/// What a function's policy allows, one line each: `function action resource`, with the condition where there is one.
fn policy(template: &Value, function: &Value) -> BTreeSet<Permission> {
    let table = |id: &str| own_name(&template["Resources"][id]["Properties"]["TableName"]).to_owned();
    let resource = |resource: &Value| {
        if let Some(id) = resource["Fn::GetAtt"][0].as_str() {
            return match id {
                "StartQueue" => "queue".to_owned(),
                "Key" => "key".to_owned(),
                "Bucket" => "bucket".to_owned(),
                table_id => table(table_id),
            };
        }
        let text = resource["Fn::Sub"].as_str().expect("a resource of this template");
        if let Some(prefix) = text.strip_prefix("${Bucket.Arn}/") {
            return prefix.strip_suffix('*').expect("a prefix").to_owned();
        }
        let (id, index) = text.strip_prefix("${").and_then(|text| text.split_once(".Arn}")).expect("an index");
        format!("{}{index}", table(id))
    };
    let mut allowed = BTreeSet::new();
    for policy in function["Policies"].as_array().expect("policies") {
        for statement in policy["Statement"].as_array().expect("statements") {
            assert_eq!(statement["Effect"], "Allow");
            for action in statement["Action"].as_array().expect("actions") {
                let action = action.as_str().expect("an action");
                assert!(!action.contains('*'), "{action}");
                for one in statement["Resource"].as_array().expect("resources") {
                    let condition = statement.get("Condition").map(|condition| format!(" if {condition}"));
                    let line = format!("{action} {}{}", resource(one), condition.unwrap_or_default());
                    allowed.insert(line);
                }
            }
        }
    }
    allowed
}

/// What each function may do.
pub fn policies(template: &Value) -> BTreeMap<String, BTreeSet<Permission>> {
    functions(template).into_iter().map(|(name, function)| (name.to_owned(), policy(template, function))).collect()
}

#[test]
fn every_policy_is_the_one_that_was_looked_at() {
    let found: String = policies(&template())
        .into_iter()
        .flat_map(|(function, allowed)| allowed.into_iter().map(move |one| format!("{function} {one}\n")))
        .collect();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/policies.txt");
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(found, expected, "what functions may do has changed: look at it, and change {}", path.display());
}

/// All routes, and what the worker does behind them, with each function held to its policy.
#[tokio::test(flavor = "multi_thread")]
async fn functions_get_along_with_their_policies() {
    let folder = TempDir::new().expect("a folder");
    let mut api = Api::at(folder.path(), SandboxConfig::None).await;
    let (user, other) = (UserId::new("u"), UserId::new("other"));
    furnish(&api, &user).await;
    let guard = Guard::new(policies(&template()), PREFIX);
    let _ways = api.guard(&guard).await;
    for route in routes() {
        for user in [&user, &other] {
            let (status, answer) = request(&api, user, &route).await;
            assert!(status != 500, "{} {} {answer}", route.method, route.path);
        }
    }
    assert_eq!(guard.refused(), BTreeSet::new());
    drop(api);
}
