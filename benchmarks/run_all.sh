#!/usr/bin/env bash
# Every table, one after the other, on a machine with two GPUs. A table whose command fails does not stop the others.
#   usage: benchmarks/run_all.sh DATASET OUT [TABLE...]      tables: update generation sync growth trainer (default: these) learning
# DATASET is a folder with GSM8K's train.jsonl. PYTHON names the interpreter (default: uv run python). OUT gets the policies,
# the logs, and for each table a Markdown file and its raw figures in JSON lines; all tables use the policy in OUT/policy.
set -uo pipefail
dataset=${1:?usage: benchmarks/run_all.sh DATASET OUT [TABLE...]}
out=${2:?usage: benchmarks/run_all.sh DATASET OUT [TABLE...]}
shift 2
tables=("$@")
[ ${#tables[@]} -gt 0 ] || tables=(update generation sync growth trainer)
python=${PYTHON:-uv run python}
cd "$(dirname "$0")/.."
export PYTHONPATH="src:.${PYTHONPATH:+:$PYTHONPATH}"
failed=()
for table in "${tables[@]}"; do
  echo "== $table ($SECONDS s)"
  data=(--dataset "$dataset")
  [ "$table" != learning ] || data=() # it makes its own problems
  $python "benchmarks/$table.py" "${data[@]}" --out "$out" || failed+=("$table")
done
cat "$out"/*.md
[ ${#failed[@]} -eq 0 ] || { echo "not complete: ${failed[*]}"; exit 1; }
