"""Checks the resources that SAM derives from template.yaml: they are deployed, and not written there.

Run by tests/lint-template.sh with the Python that has the SAM translator, on the template with its includes inlined, because
CloudFormation inserts them before SAM translates: check-translated-template.py TEMPLATE
"""

import logging
import os
import sys

os.environ["AWS_DEFAULT_REGION"] = "eu-central-1"
logging.disable(logging.CRITICAL)

from samtranslator.translator.transform import transform  # noqa: E402
from samtranslator.yaml_helper import yaml_parse  # noqa: E402


class NoManagedPolicies:
    """Policies are written out in the template; none is referenced by the name of a managed one."""

    def load(self):
        return {}


with open(sys.argv[1], encoding="utf-8") as file:
    template = yaml_parse(file.read())
for resource in template["Resources"].values():
    if resource["Type"] == "AWS::Serverless::Function":
        # Local paths are uploaded before SAM translates.
        resource["Properties"]["CodeUri"] = "s3://bucket/key"
resources = transform(template, {}, NoManagedPolicies())["Resources"]


def of_type(kind):
    return {name: one["Properties"] for name, one in resources.items() if one["Type"] == kind}


def check(what, found, expected):
    if found != expected:
        sys.exit(f"failed: {what} is {found!r}, not {expected!r}")


check("the stages", [stage["StageName"] for stage in of_type("AWS::ApiGateway::Stage").values()], ["v1"])
for deployment in of_type("AWS::ApiGateway::Deployment").values():
    check("the stage that a deployment makes by itself", deployment.get("StageName"), None)
[stage] = of_type("AWS::ApiGateway::Stage").values()
check("tracing", stage["TracingEnabled"], True)
check("the access log's condition", stage["AccessLogSetting"]["Fn::If"][0], "LogsApiAccess")
[settings] = stage["MethodSettings"]
check("the throttled methods", (settings["ResourcePath"], settings["HttpMethod"]), ("/*", "*"))
[api] = of_type("AWS::ApiGateway::RestApi").values()
check("the API's definition is inlined", "Fn::Transform" in api["Body"], False)
check("operations", sum(len(methods) for methods in api["Body"]["paths"].values()) > 100, True)
check("binary media types", api.get("BinaryMediaTypes", api["Body"].get("x-amazon-apigateway-binary-media-types")), None)
sources = of_type("AWS::Lambda::EventSourceMapping").values()
check("the batch sizes", {source["BatchSize"] for source in sources}, {1})
check("bounded sources", [bool(source.get("ScalingConfig", {}).get("MaximumConcurrency")) for source in sources], [True] * 4)
check("the functions", len(of_type("AWS::Lambda::Function")), 13)
# One per function, and one for API Gateway's logs.
roles = of_type("AWS::IAM::Role")
check("the roles", len(roles), 13 + 1)
for name, role in roles.items():
    for policy in role.get("Policies", []):
        for statement in policy["PolicyDocument"]["Statement"]:
            # With all options on.
            statement = statement["Fn::If"][1] if "Fn::If" in statement else statement
            actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
            check(f"wildcards in {name}", [action for action in actions if "*" in action], [])
