#!/usr/bin/env bash
# Coverage-guided fuzzing of what reads other people's bytes; tests/fuzz/README.md says what each harness holds.
#   usage: scripts/fuzz.sh [MINUTES [NAME ...]]     10 minutes each of all of them, one after another
# It makes .venv-fuzz: the locked environment, and atheris (CPython 3.11 to 3.13 on Linux). A finding ends that harness with
# an error; its input is in .fuzz/, and `.venv-fuzz/bin/python tests/fuzz/fuzz_NAME.py FILE` tries it again.
set -euo pipefail
cd "$(dirname "$0")/.."
minutes=${1:-10}
case $minutes in '' | *[!0-9]*) printf 'usage: scripts/fuzz.sh [MINUTES [NAME ...]]\n' >&2; exit 2 ;; esac
names=("${@:2}")
if [ ${#names[@]} -eq 0 ]; then
  for program in tests/fuzz/fuzz_*.py; do names+=("$(basename "$program" .py | sed s/^fuzz_//)"); done
fi
for name in "${names[@]}"; do
  [ -f "tests/fuzz/fuzz_$name.py" ] || { printf 'scripts/fuzz.sh: there is no tests/fuzz/fuzz_%s.py\n' "$name" >&2; exit 2; }
done

export UV_PROJECT_ENVIRONMENT=.venv-fuzz OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
uv sync --locked --inexact --quiet --python 3.11
.venv-fuzz/bin/python -c 'import atheris' 2>/dev/null || uv pip install --quiet --python .venv-fuzz/bin/python 'atheris==3.0.0'
mkdir -p .fuzz
status=0
for name in "${names[@]}"; do
  log=.fuzz/$name.log
  printf '== %s, %d minutes\n' "$name" "$minutes"
  if ! nice .venv-fuzz/bin/python "tests/fuzz/fuzz_$name.py" -max_total_time=$((60 * minutes)) -max_len=4096 -timeout=60 \
    -rss_limit_mb=4096 -print_final_stats=1 -artifact_prefix=".fuzz/$name-" >"$log" 2>&1; then
    printf 'FINDING, see %s:\n' "$log"
    grep -A 20 'Uncaught Python exception\|ERROR: libFuzzer' "$log" | tail -n 25
    status=1
  fi
  grep -o 'cov: [0-9]* ft: [0-9]*' "$log" | tail -n 1
  grep 'number_of_executed_units' "$log" || true
done
exit $status
