#!/usr/bin/env bash
# Installs ministack into a folder: install-ministack.sh FOLDER. Afterwards FOLDER/installed exists, or the script has printed the reason.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/python-tools.sh" "$1" 'tests on ministack' ministack==1.5.33
