#!/usr/bin/env bash
# From a machine with Python >= 3.11 to a trained, evaluated and sampled GPT.
# Arguments go to `lm train`: --gin.FILES="'books/*.txt'" --run_dir=runs/books
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
setup_venv
source scripts/allocator.sh
exec lm train --gin_file=gin/experiments/quickstart.gin --run_dir=runs/quickstart "$@"
