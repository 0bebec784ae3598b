#!/usr/bin/env bash
# Installs ministack into a folder: install-ministack.sh FOLDER. FOLDER/installed is there afterwards, or it was said why not.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/python-tools.sh" "$1" 'tests on ministack' ministack==1.5.33
