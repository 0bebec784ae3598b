#!/usr/bin/env bash
# Installs Python packages into a virtual environment unless they exist: python-tools.sh FOLDER WHAT [PIP-OPTION...] PACKAGE==VERSION...
# Afterwards FOLDER/installed exists, or the script has printed that WHAT is not run, and why.
set -euo pipefail

folder=$1 what=$2 wanted=${*:3}
[ "$(cat "$folder/installed" 2> /dev/null)" != "$wanted" ] || exit 0

python=
for candidate in python3.13 python3.12 python3 "$HOME"/.pyenv/versions/3.1[2-9]*/bin/python; do
    if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' 2> /dev/null; then
        python=$candidate
        break
    fi
done
rm -rf "$folder"
if [ -z "$python" ]; then
    echo "not run: $what (there is no Python 3.12 or newer)"
elif "$python" -m venv "$folder" && "$folder/bin/pip" install --quiet --disable-pip-version-check "${@:3}"; then
    echo "$wanted" > "$folder/installed"
else
    echo "not run: $what (it could not be installed)"
fi
