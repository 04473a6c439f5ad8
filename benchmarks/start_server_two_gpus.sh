#!/usr/bin/env bash
# One command on two GPUs: the training script starts the server itself (GPU 0) and trains on the other one.
#   usage: benchmarks/start_server_two_gpus.sh DATASET OUT [UPDATES]
# OUT/policy is made if it is not there (see make_policy.py). PYTHON names the interpreter (default: uv run python).
set -euo pipefail
dataset=${1:?usage: benchmarks/start_server_two_gpus.sh DATASET OUT [UPDATES]}
out=${2:?usage: benchmarks/start_server_two_gpus.sh DATASET OUT [UPDATES]}
python=${PYTHON:-uv run python}
export PYTHONPATH="src:.${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
[ -f "$out/policy/config.json" ] ||
  $python benchmarks/make_policy.py --dataset "$dataset" --out "$out/policy" --seconds "${POLICY_SECONDS:-90}"
$python examples/gsm8k/train_gsm8k.py --model "$out/policy" --dataset "$dataset" --start-server --port 8077 \
  --micro-token-budget 16384 --max-seq-len 1024 --max-tokens 512 --train-steps "${3:-3}" --eval-limit 100 --save-every 0 \
  --logger print --verbose --out-dir "$out/run"
