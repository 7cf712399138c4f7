#!/usr/bin/env bash
# All steps of benchmarks/gpu.py, each a process with a time limit: nine minutes on one H100.
#   OUT=DIR PYTHON=python3 bash benchmarks/gpu.sh [--tiny]      wheels in .wheels/ are put on the path first
set -u
PYTHON=${PYTHON:-python3} OUT=${OUT:-gpu-results} LIMIT=${LIMIT:-540}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PAREWELL_QUIET=1
if ls .wheels/*.whl >/dev/null 2>&1; then
  "$PYTHON" -m pip install -q --no-index --no-deps --target .site .wheels/*.whl && export PYTHONPATH=$PWD/.site
fi
for pair in environment:60 gradients:60 jobs:90 ensembles:30 large:170 distilling:80 peers:80 tests:150; do
  left=$((LIMIT - SECONDS)) most=${pair##*:}
  [ "$left" -gt 5 ] || { echo "no time left for ${pair%%:*}"; continue; }
  timeout -k 5 $((most < left ? most : left)) "$PYTHON" -m benchmarks.gpu "${pair%%:*}" --out "$OUT" "$@" || echo "${pair%%:*}: status $?"
done
"$PYTHON" -m benchmarks.gpu report --out "$OUT"
