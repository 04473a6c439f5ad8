"""The checks of this machine: versions, GPUs, network, disk, memory, data, grader. None of them needs a server."""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ludic.cli import server_url
from ludic.doctor.findings import Check, Finding, failed, ok, warning
from ludic.training.checkpoint import list_checkpoints
from ludic.training.config import GRPOConfig, RunPaths

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SUPPORTED = {"torch": ((2, 11), None), "transformers": ((5, 10), None), "vllm": ((0, 26), (0, 32))}
"""Lowest and highest version, of the two first numbers; None: no highest."""
STATIC_BYTES_GPU = 18
"""Of a parameter while training on a GPU: float32 master, gradient and two moments of AdamW, and the bf16 copy."""
STATIC_BYTES_CPU = 20
"""On the CPU: float32 weights, gradient and moments, and the copy of the local engine."""
ACTIVATION_BYTES = 36
"""Of a token of the micro-batch, a layer and a unit of the hidden size: measured with compiled layers at the 0.5B shape,
11.5 GiB at 16,384 tokens. Without compiling it is about twice that."""
CHECKPOINT_BYTES = 12
"""Of a parameter: float32 weights and two moments."""
HUB_TIMEOUT_S = 5.0


def local_checks(args: argparse.Namespace, config: GRPOConfig) -> list[tuple[str, Check]]:
    """All of them, in the order in which they are worth reading."""
    return [
        *quick_local_checks(args, config),
        ("network", lambda: check_proxies(args)),
        ("hub", lambda: check_hub(args)),
        ("data", lambda: check_data(args)),
        ("grader", check_grader),
    ]


def quick_local_checks(args: argparse.Namespace, config: GRPOConfig) -> list[tuple[str, Check]]:
    """Those that take no time, which every training run makes."""
    return [
        ("versions", check_versions),
        ("GPUs", lambda: check_gpus(args)),
        ("memory", lambda: check_memory(args, config)),
        ("disk", lambda: check_disk(args, config)),
    ]


def check_versions() -> list[Finding]:
    """Are Python, torch, transformers and vLLM of versions that ludic is made for?"""
    findings = []
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        findings.append(
            failed("versions", f"Python {sys.version_info[0]}.{sys.version_info[1]}", "use Python 3.11 to 3.13")
        )
    found = []
    for name, (low, high) in SUPPORTED.items():
        version = _installed(name)
        if version is None:
            if name == "vllm":
                found.append("no vLLM here (a server may have its own environment)")
            else:
                findings.append(failed("versions", f"{name} is not installed", "run uv sync"))
            continue
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
        if numbers < low or (high is not None and numbers > high):
            span = f"{_dotted(low)} to {_dotted(high)}" if high else f"{_dotted(low)} or later"
            findings.append(failed("versions", f"{name} {version}", f"ludic is made for {span}: run uv sync"))
        else:
            found.append(f"{name} {version}")
    return findings or [ok("versions", f"Python {sys.version.split()[0]}, " + ", ".join(found))]


def _installed(name: str) -> str | None:
    for distribution in (name, f"{name}-cpu"):  # vLLM's CPU build has that name
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def check_gpus(args: argparse.Namespace) -> Finding:
    """Which GPUs does the trainer see, and is one left for a server that is started?"""
    import torch

    if not torch.cuda.is_available():
        if args.engine == "local":
            return ok("GPUs", "none; training and generation on the CPU")
        return warning(
            "GPUs",
            "the trainer sees none, and would train on the CPU",
            "check the driver (nvidia-smi), CUDA_VISIBLE_DEVICES and the torch build, unless that is meant",
        )
    count = torch.cuda.device_count()
    names = ", ".join(torch.cuda.get_device_name(number) for number in range(count))
    if args.start_server and count == 1:
        return warning(
            "GPUs",
            f"one ({names}), for the server and the trainer",
            "leave room with --server-args '--gpu-memory-utilization 0.4', or make two GPUs visible",
        )
    return ok("GPUs", f"{count} ({names}), CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}")


def check_proxies(args: argparse.Namespace) -> Finding:
    """Do proxy variables stand between the two sides? ludic's own requests ignore them, other clients do not."""
    names = [name for name in ("http_proxy", "https_proxy", "all_proxy") if os.environ.get(name) or
             os.environ.get(name.upper())]  # fmt: skip
    if not names:
        return ok("network", "no proxy variables")
    exempt = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")
    host = urlsplit(server_url(args)).hostname or args.host
    if host in (part.strip() for part in exempt):
        return ok("network", f"proxy variables are set, and {host} is exempt")
    return warning(
        "network",
        f"{', '.join(names)} set; ludic goes to {host} directly all the same, curl and others do not",
        f"export NO_PROXY={host}",
    )


def check_hub(args: argparse.Namespace) -> Finding:
    """Can the Hugging Face hub be reached, where something has to come from it?"""
    import requests

    needed = [what for what, value in (("the model", args.model), ("the data set", args.dataset))
              if value is None or not Path(value).exists()]  # fmt: skip
    if not needed:
        return ok("hub", "not needed: model and data set are on this machine")
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return warning(
            "hub", f"HF_HUB_OFFLINE=1, and {' and '.join(needed)} must be in the cache", "unset it to download"
        )
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        requests.head(endpoint, timeout=HUB_TIMEOUT_S, allow_redirects=False)
    except requests.RequestException as error:
        return warning(
            "hub",
            f"{endpoint} cannot be reached ({type(error).__name__}), and {' and '.join(needed)} must be in the cache",
            "set HF_HUB_OFFLINE=1 to use the cache without waiting, or name folders with --model and --dataset",
        )
    return ok("hub", f"{endpoint} answers")


def check_data(args: argparse.Namespace) -> Finding:
    """Can the data set be read? Its rows are checked when they are loaded."""
    if args.dataset is None:
        if importlib.util.find_spec("datasets") is None:
            return failed(
                "data", "the package datasets is not installed", "run uv sync --extra examples, or name a --dataset"
            )
        return ok("data", "from the hub")
    path = Path(args.dataset)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files and any(path.iterdir()):
        return ok("data", f"{path} holds no JSONL files; it is read as parquet or CSV")
    if not files:
        return failed("data", f"{path} is empty", "name a folder with train.jsonl and test.jsonl")
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(itertools.islice(lines, 100), start=1):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    return failed("data", f"{file}:{number}: not valid JSON ({error})", "mend the file")
                if not isinstance(row, dict):
                    return failed("data", f"{file}:{number}: not a JSON object", "mend the file")
    return ok("data", f"{', '.join(file.name for file in files)} in {path} can be read")


def check_grader() -> Finding:
    """Does a worker of math-verify come up and give the right answers?"""
    from ludic.grading import Grader

    with_algebra = (r"\sqrt{8}", r"2\sqrt{2}")  # no rule of ours decides it
    grader = Grader(num_workers=1)
    try:
        right = grader.match_sync(*with_algebra)
        wrong = grader.match_sync("17", "18")
    finally:
        grader.close()
    if right.failure or not right.matched or wrong.matched:
        return failed("grader", f"it judged wrongly ({right}, {wrong})", "reinstall math-verify: run uv sync")
    return ok("grader", "math-verify answers")


@cache
def _model_shape(model: str, trust_remote_code: bool) -> "tuple[PretrainedConfig, int]":
    """The configuration, and the number of parameters: counted on the meta device, without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    from ludic.pretrained import load_config

    config = load_config(model, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return config, sum(parameter.numel() for parameter in empty.parameters())


def check_memory(args: argparse.Namespace, config: GRPOConfig) -> Finding:
    """What training needs, by the shape of the model and the token budget, against what the device has free."""
    import torch

    shape, parameters = _model_shape(args.model, args.trust_remote_code)
    text = shape.get_text_config()
    budget = config.micro_token_budget or config.max_seq_len
    on_gpu = torch.cuda.is_available()
    static = parameters * (STATIC_BYTES_GPU if on_gpu else STATIC_BYTES_CPU)
    factor = 0.3 if config.gradient_checkpointing else 1.0
    activations = factor * ACTIVATION_BYTES * budget * text.num_hidden_layers * text.hidden_size
    if config.kl_coef > 0:
        static += parameters * (2 if on_gpu else 4)
    free = torch.cuda.mem_get_info(trainer_device(args))[0] if on_gpu else _free_memory()
    said = (
        f"about {_gib(static + activations)} needed ({parameters / 1e9:.2f}B parameters, {budget} tokens at once), "
        f"{_gib(free)} free"
    )
    if static > free:
        return failed(
            "memory", said, "weights and optimizer alone do not fit: train a smaller model, or free the device"
        )
    if static + activations > free:
        return warning("memory", said, "--micro-token-budget auto takes what fits; --gradient-checkpointing needs less")
    return ok("memory", said)


def trainer_device(args: argparse.Namespace) -> int:
    """The number of the GPU that trains: not the one of a server that is started, where there are two."""
    import torch

    return 1 if args.start_server and not args.server_gpu and torch.cuda.device_count() > 1 else 0


def _free_memory() -> int:
    """Of the machine, in bytes: what Linux calls available, else all that there is."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_disk(args: argparse.Namespace, config: GRPOConfig) -> Finding:
    """Is there room for the checkpoints that stay, and the one that is being written?"""
    folder = Path(args.out_dir)
    while not folder.exists():
        folder = folder.parent
    _, parameters = _model_shape(args.model, args.trust_remote_code)
    there = len(list_checkpoints(RunPaths(out_dir=Path(args.out_dir)).checkpoints)) if vars(args).get("resume") else 0
    need = (1 + max(0, config.keep_checkpoints - there)) * CHECKPOINT_BYTES * parameters
    free = shutil.disk_usage(folder).free
    said = f"{_gib(need)} for the checkpoints that stay and the next one, {_gib(free)} free in {args.out_dir}"
    if not os.access(folder, os.W_OK):
        return failed("disk", f"{folder} cannot be written", "choose another --out-dir")
    if need > free:
        return failed("disk", said, "choose another --out-dir, or a lower --keep-checkpoints")
    return ok("disk", said)


def _gib(number: float) -> str:
    return f"{number / 2**30:.1f} GiB"
