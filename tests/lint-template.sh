#!/usr/bin/env bash
# Lints template.yaml with cfn-lint and the SAM CLI, and checks SAM's output. The first run installs the tools into target/template-lint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools=target/template-lint
tests/python-tools.sh "$tools" 'cfn-lint and sam validate' cfn-lint==1.58.0 aws-sam-cli==1.170.0
[ -e "$tools/installed" ] || exit 0

export SAM_CLI_TELEMETRY=0 AWS_DEFAULT_REGION=eu-central-1
# Lints the template as deployed, and with the included API definition inlined, because the linters do not read included files.
inlined=target/template-inlined.yaml
"$tools/bin/python" tests/inline-includes.py template.yaml "$inlined"
for template in template.yaml "$inlined"; do
    "$tools/bin/cfn-lint" --regions eu-central-1 us-east-1 -- "$template"
    "$tools/bin/sam" validate --lint --template "$template"
done
"$tools/bin/python" tests/check-translated-template.py "$inlined"
