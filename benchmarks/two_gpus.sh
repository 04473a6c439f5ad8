#!/usr/bin/env bash
# The README's three commands on two GPUs, with a policy made from nothing (no hub is needed): a server on GPU 0, a few
# updates of 256 rollouts on GPU 1 with weight syncs over NCCL, and the evaluation of what the server then holds.
#   usage: benchmarks/two_gpus.sh DATASET OUT [UPDATES]      (DATASET: a folder with GSM8K's train.jsonl and test.jsonl)
# PYTHON names the interpreter (default: uv run python); SERVER_ARGS are more flags of the server, such as '--server-engines 4',
# and START_S how long it may take to come up (default: 300). Prints the seconds of each step by phase, last.
set -euo pipefail
dataset=${1:?usage: benchmarks/two_gpus.sh DATASET OUT [UPDATES]}
out=${2:?usage: benchmarks/two_gpus.sh DATASET OUT [UPDATES]}
updates=${3:-5}
python=${PYTHON:-uv run python}
export PYTHONPATH="src:.${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"

[ -f "$out/policy/config.json" ] ||
  CUDA_VISIBLE_DEVICES=1 $python benchmarks/make_policy.py --dataset "$dataset" --out "$out/policy" --seconds "${POLICY_SECONDS:-90}"

CUDA_VISIBLE_DEVICES=0 setsid $python -m ludic.inference.vllm_server --model "$out/policy" --max-model-len 2048 ${SERVER_ARGS:-} \
  >"$out/vllm_server.log" 2>&1 &
server=$!
trap 'kill -- -$server 2>/dev/null || true' EXIT
started=$SECONDS
until curl -fs http://127.0.0.1:8000/health >/dev/null 2>&1; do
  kill -0 "$server" 2>/dev/null || { tail -n 30 "$out/vllm_server.log"; exit 1; }
  [ $((SECONDS - started)) -lt "${START_S:-300}" ] || { echo "the server did not come up in ${START_S:-300} s"; exit 1; }
  sleep 1
done
echo "server up after $((SECONDS - started)) s"

CUDA_VISIBLE_DEVICES=1 $python examples/gsm8k/train_gsm8k.py --model "$out/policy" --dataset "$dataset" \
  --micro-token-budget 16384 --max-seq-len 1024 --max-tokens 512 --rollouts-per-update 256 --group-size 8 \
  --train-steps "$updates" --eval-limit 0 --save-every 0 --logger print --verbose --out-dir "$out/run"

# Three updates more: the run continues from its checkpoint, and this time every request carries a seed.
CUDA_VISIBLE_DEVICES=1 $python examples/gsm8k/train_gsm8k.py --model "$out/policy" --dataset "$dataset" \
  --micro-token-budget 16384 --max-seq-len 1024 --max-tokens 512 --rollouts-per-update 256 --group-size 8 \
  --train-steps "$((updates + 3))" --eval-limit 0 --save-every 0 --logger print --out-dir "$out/run" --resume --seed-requests

$python examples/gsm8k/eval_gsm8k_vllm.py --model "$out/policy" --dataset "$dataset" --split test --limit 250 \
  --temperature 0.0 --max-tokens 512 --system-prompt 'First, think step by step. Then put your final answer inside \boxed{...}.' \
  --out "$out/gsm8k_eval.jsonl" --overwrite

$python - "$out/run/gsm8k_train_metrics.jsonl" <<'PY'
import json, sys

import torch, transformers, vllm

print(f"{torch.cuda.get_device_name(0)} x {torch.cuda.device_count()}, vllm {vllm.__version__}, torch {torch.__version__}, "
      f"transformers {transformers.__version__}")
rows = [json.loads(line) for line in open(sys.argv[1])]
names = ["generation_s", "grading_s", "wait_s", "train_s", "sync_s", "step_s", "total_completion_tokens", "tokens_per_s",
         "logprob_gap", "reward_mean", "parse_err_rate", "truncation_rate", "trained_sequences"]
names += sorted({name for row in rows for name in row if name.startswith("sync/")})
print("step " + " ".join(f"{name:>12.12}" for name in names))
for row in rows:
    if "step_s" in row:
        print(f"{row['step']:>4} " + " ".join(f"{row.get(name, float('nan')) or 0:>12.4g}" for name in names))
PY
