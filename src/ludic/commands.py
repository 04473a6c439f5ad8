"""Commands that a program prints for a person to type: each works as it is printed, in the folder where it was printed.

They name the Python that runs now, so that a run in the environment of `scripts/make_vllm_cpu_env.sh` does not send people to
another one, and the GPUs that were chosen for it.
"""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

_PROJECT = Path(__file__).resolve().parents[2]


def python_command(*words: str) -> str:
    """`words` behind this Python, quoted for a shell.

    Example:
        >>> python_command("-m", "ludic.doctor", "--model", "my model")  # in the project's own environment
        "uv run python -m ludic.doctor --model 'my model'"
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = "" if chosen is None else f"CUDA_VISIBLE_DEVICES={shlex.quote(chosen)} "
    return gpus + shlex.join([*_python(), *words])


def flag(name: str, value: str) -> list[str]:
    """A flag with its value, also where the value looks like a flag.

    Example:
        >>> flag("--server-args", "--gpu-memory-utilization 0.3")
        ['--server-args=--gpu-memory-utilization 0.3']
    """
    return [f"{name}={value}"] if value.startswith("-") else [name, value]


def given_command(*more: str, without: Sequence[str]) -> str:
    """The command that this program was started with, and `more`; the flags in `without` (`--resume`) are left out."""
    return python_command(*_launcher(), sys.argv[0], *left_out(sys.argv[1:], without), *more)


def _launcher() -> list[str]:
    """torchrun, where it started this process among others. Where its nodes meet is not known here: HOST has to be filled in."""
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return []
    nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
    per_node = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    return [
        "-m",
        "torch.distributed.run",
        *(["--standalone"] if nodes == "1" else ["--nnodes", nodes, *_meeting()]),
        "--nproc_per_node",
        per_node,
    ]


def _meeting() -> list[str]:
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    name = "NAME" if name in ("", "none") else name
    return ["--rdzv_backend", "c10d", "--rdzv_endpoint", "HOST:29500", "--rdzv_id", name]


def left_out(words: Sequence[str], without: Sequence[str]) -> list[str]:
    """`words` of a command line but for these flags and what was given with them.

    Example:
        >>> left_out(["--resume", "run/step_4", "--lr", "1e-6"], ["--resume"])
        ['--lr', '1e-6']
    """
    hidden = argparse.ArgumentParser(add_help=False)  # abbreviations too, as they were given
    for flag in without:
        hidden.add_argument(flag, nargs="?")
    return hidden.parse_known_args(words)[1]


def server_command(model: str, *, host: str = "127.0.0.1", port: int = 8000) -> str:
    """What starts the server of `model`. No GPUs: those of the process that prints it are another's."""
    words = ["-m", "ludic.inference.vllm_server", "--model", model]
    words += ["--host", host] if host not in ("127.0.0.1", "localhost") else []
    words += ["--port", str(port)] if port != 8000 else []
    return shlex.join([*_python(), *words])


def _python() -> list[str]:
    if Path(sys.prefix).resolve() == _PROJECT / ".venv":
        return ["uv", "run", "python"]
    on_path = shutil.which("python")
    if on_path is not None and os.path.abspath(on_path) == os.path.abspath(sys.executable):
        return ["python"]
    relative = os.path.relpath(sys.executable)
    return [sys.executable if relative.startswith("..") else relative]
