#!/usr/bin/env bash
# Lints template.yaml with cfn-lint and the SAM CLI, and checks what SAM makes of it. The tools are installed into
# target/template-lint on first use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools=target/template-lint
tests/python-tools.sh "$tools" 'cfn-lint and sam validate' cfn-lint==1.58.0 aws-sam-cli==1.170.0
[ -e "$tools/installed" ] || exit 0

export SAM_CLI_TELEMETRY=0 AWS_DEFAULT_REGION=eu-central-1
# As it is deployed, and with the included definition of the API in its place, into which the linters do not look.
inlined=target/template-inlined.yaml
"$tools/bin/python" tests/inline-includes.py template.yaml "$inlined"
for template in template.yaml "$inlined"; do
    "$tools/bin/cfn-lint" --regions eu-central-1 us-east-1 -- "$template"
    "$tools/bin/sam" validate --lint --template "$template"
done
"$tools/bin/python" tests/check-translated-template.py "$inlined"
