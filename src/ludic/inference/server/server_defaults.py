"""What ludic's server changes from vLLM's defaults: one table, from which its parser, `--help` and docs/server.md are made.

Whatever the user gives, on the command line or by `--config`, overrides a row. Nothing here imports vLLM.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ludic.config import DEFAULT_MODEL
from ludic.inference.server.engines_route import ENGINES_VARIABLE
from ludic.inference.server.generate_route import WORKER_EXTENSION

DEV_MODE_VARIABLE = "VLLM_SERVER_DEV_MODE"
GENERATE_ROUTE = "ludic.inference.server.generate_route.GenerateRoute"
ADAPTER_ROUTE = "ludic.inference.server.adapter_route.AdapterRoute"
SERVER_GUARD = "ludic.inference.server.server_guard.ServerGuard"
ENGINES_ROUTE = "ludic.inference.server.engines_route.EnginesRoute"
REQUIRE_API_KEY = "ludic.inference.vllm_server.RequireApiKey"

MIN_KV_CACHE_BYTES, MAX_KV_CACHE_BYTES = 256 * 2**20, 2 * 2**30
KV_CACHE_SHARE = 8
"""One part in this many of the free memory: the weights, three processes with vLLM in them (2 GiB) and, with
--start-server, the trainer need the rest. 2 GiB are 128 sequences (what vLLM runs at once on a CPU) of 1,300 tokens of a
0.5B model in bfloat16."""

When = Literal["always", "training", "cpu"]
HEADINGS: dict[When, str] = {
    "always": "always",
    "training": "for training, so not with --no-training",
    "cpu": "with vLLM's CPU build",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the defaults depend on beside the flags."""

    is_cpu: bool
    free_bytes: int = 0
    """Memory that is free; only asked for where vLLM computes on the CPU."""
    num_engines: int = 1
    """That share it, this one included."""
    transfer_backend: str = "ludic_shm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Default:
    """One setting of vLLM whose default ludic changes, in words and as a value.

    Example:
        >>> Default(setting="--host", vllm="all addresses", ludic="127.0.0.1", why="safe").dest
        'host'
    """

    setting: str
    """As the user writes it: a flag, or an environment variable."""
    vllm: str
    ludic: str
    value: Callable[[argparse.Namespace, Machine], object] | None = None
    """From what the command line asks for under vLLM's own defaults, and the machine; None takes the text of `ludic`."""
    when: When = "always"
    unless: str = ""
    """Another setting, by its name in the namespace, which decides the same: if the user changes it, vLLM's default stays."""
    why: str

    @property
    def dest(self) -> str:
        """Its name in the namespace of vLLM's parser; "" for a variable."""
        return self.setting.removeprefix("--").replace("-", "_") if self.setting.startswith("--") else ""


DEFAULTS: tuple[Default, ...] = (
    Default(setting="--model", vllm="Qwen/Qwen3-0.6B", ludic=DEFAULT_MODEL, why="the model of the examples"),
    Default(setting="--host", vllm="all addresses", ludic="127.0.0.1",
            why="who reaches the server can use it, and replace its weights"),
    Default(setting="--allowed-origins", vllm='["*"] in 0.26, [] in 0.32', ludic="[]", value=lambda *_: [],
            why="a web page that is open in a browser of this machine must not ask the model"),
    Default(setting="--logprobs-mode", vllm="raw_logprobs", ludic="processed_logprobs",
            why="log-probs of the distribution that was sampled from"),
    Default(setting="--generation-config", vllm="auto", ludic="vllm",
            why="the model's generation_config.json must not change temperature, top_p or top_k"),
    Default(setting="--middleware", vllm="none", ludic="API key, token-id route, lease",
            value=lambda asked, _: middleware([], training=not asked.no_training),
            why="the key for every route but /health; /ludic/v1/generate; and, for training, one trainer and its adapter"),
    Default(setting=DEV_MODE_VARIABLE, vllm="0", ludic="1", when="training",
            why="the routes that pause the server and take weights"),
    Default(setting="--weight-transfer-config", vllm="none", ludic="ludic_nccl or ludic_shm", when="training",
            value=lambda _, machine: json.dumps({"backend": machine.transfer_backend}),
            why="how weights come: NCCL where the machine has a second GPU, else shared memory (CUDA IPC on the trainer's GPU)"),
    Default(setting="--worker-extension-cls", vllm="none", ludic="LudicWorkerExtension", when="training",
            value=lambda *_: WORKER_EXTENSION, why="proves weight syncs, and records log-probs"),
    # LLM.generate leaves statistics out by default as well. They are more than a third of the Python that runs in the
    # front end for each token (9 of 22 microseconds on a slow CPU), and at many hundred sequences that sets the pace.
    Default(setting="--disable-log-stats", vllm="off", ludic="on", when="training", value=lambda *_: True,
            why="statistics cost time at every token (--enable-log-stats keeps them; without, /metrics has no engine figures)"),
    Default(setting="--disable-uvicorn-access-log", vllm="off", ludic="on", when="training", value=lambda *_: True,
            why="a line for each rollout's request (--no-disable-uvicorn-access-log writes them)"),
    Default(setting="--log-error-stack", vllm="off", ludic="on", when="training", value=lambda *_: True,
            why="a weight update that is refused leaves its trace in the log"),
    Default(setting="--kv-cache-memory-bytes", vllm="92% of the memory", ludic="1/8 of the free memory, 256M to 2G", when="cpu",
            value=lambda _, machine: kv_cache_bytes(machine.free_bytes // machine.num_engines), unless="gpu_memory_utilization",
            why="the trainer and other programs live there too (--gpu-memory-utilization or VLLM_CPU_KVCACHE_SPACE override it)"),
    Default(setting="--max-model-len", vllm="the model's context", ludic="auto", when="cpu", value=lambda *_: -1,
            why="the model's context, or as much of it as the KV cache holds"),
    Default(setting="--dtype", vllm="auto", ludic="float32 if config.json says so", when="cpu",
            value=lambda asked, _: "float32" if is_float32(asked.model_tag or asked.model) else "auto",
            why="vLLM serves it in bfloat16, while the trainer computes in float32 on a CPU"),
    Default(setting="--enforce-eager", vllm="off", ludic="on", when="cpu", value=lambda *_: True,
            why="compiling the model takes minutes on a few cores (--no-enforce-eager does it)"),
)  # fmt: skip


def apply_defaults(parser: argparse.ArgumentParser, asked: argparse.Namespace, machine: Machine) -> None:
    """Give vLLM's parser the defaults of the table; `asked` is what it parsed before, with its own."""
    applies = {"always": True, "training": not asked.no_training, "cpu": machine.is_cpu}
    for row in DEFAULTS:
        decided = row.unless and getattr(asked, row.unless) != parser.get_default(row.unless)
        if row.dest and applies[row.when] and not decided:
            parser.set_defaults(**{row.dest: row.ludic if row.value is None else row.value(asked, machine)})


def middleware(users: list[str], *, training: bool) -> list[str]:
    """ludic's middlewares around the user's own.

    What vLLM adds last is outermost: nothing, and no middleware of the user's, sees a request before its key was checked.
    """
    own = (ENGINES_ROUTE, GENERATE_ROUTE, ADAPTER_ROUTE, SERVER_GUARD, REQUIRE_API_KEY)
    users = [name for name in users if name not in own]
    engines = [ENGINES_ROUTE] if ENGINES_VARIABLE in os.environ else []
    for_training = [ADAPTER_ROUTE, SERVER_GUARD] if training else []
    return [GENERATE_ROUTE, *engines, *users, *for_training, REQUIRE_API_KEY]


def kv_cache_bytes(free_bytes: int) -> int:
    """The KV cache of a CPU server.

    Example:
        >>> kv_cache_bytes(23 * 2**30) / 2**30, kv_cache_bytes(4 * 2**30) / 2**30, kv_cache_bytes(2**40) / 2**30
        (2.0, 0.5, 2.0)
    """
    return max(MIN_KV_CACHE_BYTES, min(MAX_KV_CACHE_BYTES, free_bytes // KV_CACHE_SHARE))


def is_float32(model: str) -> bool:
    """Whether `model` is a folder whose config.json names float32; a name on the hub is left to vLLM."""
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # vLLM will say what is wrong with it
        return False
    names = [part.get("dtype") or part.get("torch_dtype") for part in (config, config.get("text_config") or {})]
    return next((name for name in names if name), None) == "float32"


def markdown_table() -> str:
    """The table as docs/server.md has it."""
    lines = ["| setting | vLLM's default | ludic's | why |", "|---|---|---|---|"]
    for when, heading in HEADINGS.items():
        lines.append(f"| **{heading}** | | | |")
        lines += [f"| `{row.setting}` | {row.vllm} | {row.ludic} | {row.why} |" for row in DEFAULTS if row.when == when]
    return "\n".join(lines)


def plain_table() -> str:
    """The table as `--help` has it."""
    width = max(len(row.setting) for row in DEFAULTS) + 2
    second = max(len(row.vllm) for row in DEFAULTS) + 2
    lines = []
    for when, heading in HEADINGS.items():
        lines.append(f"  {heading}:")
        lines += [f"    {r.setting:<{width}}{r.vllm:<{second}}{r.ludic}" for r in DEFAULTS if r.when == when]
    return "\n".join(lines)
