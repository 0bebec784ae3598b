#!/usr/bin/env bash
# Lints template.yaml with cfn-lint and the SAM CLI, which are installed into target/template-lint on first use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools=target/template-lint
wanted='cfn-lint==1.58.0 aws-sam-cli==1.170.0'
if [ "$(cat "$tools/installed" 2> /dev/null)" != "$wanted" ]; then
    python=
    for candidate in python3.13 python3.12 python3 "$HOME"/.pyenv/versions/3.1[2-9]*/bin/python; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' 2> /dev/null; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "not run: cfn-lint and sam validate (there is no Python 3.12 or newer)"
        exit 0
    fi
    rm -rf "$tools"
    "$python" -m venv "$tools"
    # shellcheck disable=SC2086 # two words
    if ! "$tools/bin/pip" install --quiet --disable-pip-version-check $wanted; then
        echo "not run: cfn-lint and sam validate (they could not be installed)"
        exit 0
    fi
    echo "$wanted" > "$tools/installed"
fi

"$tools/bin/cfn-lint" --regions eu-central-1 us-east-1 -- template.yaml
SAM_CLI_TELEMETRY=0 AWS_DEFAULT_REGION=eu-central-1 "$tools/bin/sam" validate --lint --template template.yaml
