"""Writes a template with every `AWS::Include` of a local file replaced by the file's contents, as CloudFormation does it.

Linters do not look into included files. Run by tests/lint-template.sh: inline-includes.py template.yaml OUTPUT
"""

import sys

import yaml


def inlined(node):
    if isinstance(node, list):
        return [inlined(item) for item in node]
    if not isinstance(node, dict):
        return node
    transform = node.get("Fn::Transform")
    if transform is None:
        return {name: inlined(value) for name, value in node.items()}
    if len(node) != 1 or transform["Name"] != "AWS::Include":
        sys.exit(f"failed: unknown transform {node!r}")
    with open(transform["Parameters"]["Location"], encoding="utf-8") as file:
        # CloudFormation does not accept short forms of intrinsic functions in included files; neither does the safe loader.
        return inlined(yaml.safe_load(file))


with open(sys.argv[1], encoding="utf-8") as file:
    template = yaml.safe_load(file)
with open(sys.argv[2], "w", encoding="utf-8") as file:
    yaml.safe_dump(inlined(template), file, sort_keys=False, width=1000)
