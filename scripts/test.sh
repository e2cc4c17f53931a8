#!/usr/bin/env bash
# Installs the test extra and runs every test: bash scripts/test.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
setup_venv "${LM_TEST_EXTRAS:-test}"
exec python -m pytest -n 2 "$@"
