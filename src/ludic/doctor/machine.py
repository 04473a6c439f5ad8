"""The checks of this machine and this model: versions, GPUs, network, disk, memory, a dry run, data, grader. None of them
needs a server.

torch and transformers take seconds to import, so that is left to the checks that need them: `--help` must not wait for it.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ludic.cli import server_url
from ludic.config import GRPOConfig
from ludic.doctor.dry_run import check_architecture, check_saving, check_token_ids
from ludic.doctor.findings import Check, Finding, failed, ok, warning
from ludic.inference.server.server_help import VLLM_RANGE
from ludic.task.datafiles import read_rows, split_files
from ludic.task.hub import endpoint, is_offline, why_unreachable
from ludic.types import ChatMessage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUPPORTED = {"torch": ((2, 11), None), "transformers": ((5, 10), None), "vllm": VLLM_RANGE}
"""Lowest and highest version, of the two first numbers; None: no highest."""
STATIC_BYTES_GPU = 18
"""Of a parameter while training on a GPU: float32 master, gradient and two moments of AdamW, and the bf16 copy."""
STATIC_BYTES_CPU = 20
"""On the CPU: float32 weights, gradient and moments, and the copy of the local engine."""
ACTIVATION_BYTES = 36
"""Of a token of the micro-batch, a layer and a unit of the hidden size: measured with compiled layers at the 0.5B shape,
11.5 GiB at 16,384 tokens. Without compiling it is about twice that."""
CHECKPOINT_BYTES = 12
"""Of a parameter: float32 masters and two moments. The model in its own dtype comes on top, where that is not float32."""


def local_checks(args: argparse.Namespace, config: GRPOConfig) -> list[tuple[str, Check]]:
    """All of them, in the order in which they are worth reading."""
    tokenizer = cache(lambda: _load_tokenizer(args))
    return [
        *quick_local_checks(args, config, tokenizer),
        ("token ids", lambda: check_template_ids(args, tokenizer())),
        ("network", lambda: check_proxies(args)),
        ("hub", lambda: check_hub(args)),
        ("data", lambda: check_data(args)),
        ("grader", check_grader),
    ]


def quick_local_checks(
    args: argparse.Namespace,
    config: GRPOConfig,
    tokenizer: "Callable[[], PreTrainedTokenizerBase]",
    *,
    num_checkpoints: int = 0,
) -> list[tuple[str, Check]]:
    """Those that take seconds at most, which every training run makes."""
    return [
        ("versions", check_versions),
        ("GPUs", lambda: check_gpus(args)),
        ("memory", lambda: check_memory(args, config)),
        ("disk", lambda: check_disk(args, config, num_checkpoints)),
        ("architecture", lambda: check_architecture(args, config)),
        ("saving", lambda: check_saving(args, config, tokenizer())),
    ]


def _load_tokenizer(args: argparse.Namespace) -> "PreTrainedTokenizerBase":
    from ludic.task.prompts import load_tokenizer

    return load_tokenizer(args.model, args.chat_template, trust_remote_code=args.trust_remote_code)


def check_template_ids(args: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase") -> list[Finding]:
    """`check_token_ids` for what the chat template adds; a training run holds all of its prompts."""
    from ludic.task.prompts import encode_prompt

    question: ChatMessage = {"role": "user", "content": "What is 2 + 2?"}
    try:
        prompt = encode_prompt(tokenizer, [{"role": "system", "content": "Answer briefly."}, question])
    except ValueError:  # a template without system turns
        prompt = encode_prompt(tokenizer, [question])
    return check_token_ids(args, tokenizer, prompt)


def check_versions() -> list[Finding]:
    """Are Python, torch, transformers and vLLM of versions that ludic is made for?"""
    findings = []
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        findings.append(
            failed("versions", f"Python {sys.version_info[0]}.{sys.version_info[1]}", "use Python 3.11 to 3.13")
        )
    found = []
    for name, (low, high) in SUPPORTED.items():
        version = installed(name)
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


def installed(name: str) -> str | None:
    """The version of a package in this environment."""
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
    """Can the Hugging Face hub be reached, where something has to come from it, or is that in the cache?"""
    needed = {}
    if not Path(args.model).expanduser().exists():
        needed["the model"] = model_in_cache(args.model)
    if args.dataset is None:
        needed["the data set"] = dataset_in_cache() is not None
    if not needed:
        return ok("hub", "not needed: model and data set are on this machine")
    why = hub_problem()
    if why is None:
        return ok("hub", f"{endpoint()} answers")
    missing = [what for what, cached in needed.items() if not cached]
    if missing:
        return failed(
            "hub",
            f"{why}, and the cache has no complete copy of {' and '.join(missing)}",
            "name folders with --model and --dataset, or download them where there is a network",
        )
    return warning(
        "hub",
        f"{why}; {' and '.join(needed)} are in the cache",
        "set HF_HUB_OFFLINE=1 to use the cache without waiting, if it is not",
    )


@cache
def hub_problem() -> str | None:
    """What keeps the hub from being asked; None if it answers."""
    if is_offline():
        return "HF_HUB_OFFLINE=1"
    reason = why_unreachable()
    return reason and f"{endpoint()} cannot be reached ({reason})"


def ask_hub_once(args: argparse.Namespace) -> None:
    """Where the hub is needed and cannot be reached, its libraries use their cache alone: they would say each of their tries."""
    if (args.dataset is None or not Path(args.model).expanduser().exists()) and hub_problem():
        os.environ["HF_HUB_OFFLINE"] = "1"


def model_in_cache(model: str) -> bool:
    """Whether the hub's cache has the configuration, a tokenizer and all the weights of a model."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    def cached(name: str) -> str | None:
        found = try_to_load_from_cache(model, name)
        return found if isinstance(found, str) else None  # else it is known not to exist, or not known

    try:
        if cached("config.json") is None or not (cached("tokenizer.json") or cached("tokenizer_config.json")):
            return False
        index = cached("model.safetensors.index.json")
        if index is None:
            return cached("model.safetensors") is not None
        return all(cached(shard) for shard in set(json.loads(Path(index).read_text())["weight_map"].values()))
    except HFValidationError:  # no name of a model, but a folder that is not there
        return False


def dataset_in_cache() -> Path | None:
    """Where the cache of the package datasets has GSM8K, prepared; None where it has not."""
    from huggingface_hub.constants import HF_HOME

    cache_folder = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets")
    splits = ("train", "test")
    for folder in (cache_folder / "openai___gsm8k" / "main").glob("*/*"):
        if all(any(folder.glob(f"*-{split}*.arrow")) for split in splits):
            return folder
    return None


def check_data(args: argparse.Namespace) -> Finding:
    """Is the data set there, and can it be read? Its rows are checked when they are loaded."""
    if args.dataset is None:
        return _check_hub_data()
    try:
        files = split_files("train", Path(args.dataset))
        named = f"{files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else "")
        for place, row in itertools.islice(read_rows(files), 100):
            if not isinstance(row, dict):
                return failed("data", f"{place}: not a JSON object", "mend the file")
    except ValueError as error:
        return failed("data", str(error), "mend it, or name another --dataset")
    return ok("data", f"{named} can be read")


def _check_hub_data() -> Finding:
    if importlib.util.find_spec("datasets") is None:
        return failed(
            "data", "the package datasets is not installed", "run uv sync --extra examples, or name a --dataset"
        )
    folder = dataset_in_cache()
    if folder is not None:
        return ok("data", f"the hub's GSM8K is in the cache, {folder}")
    why = hub_problem()
    if why is not None:
        return failed("data", f"the hub's GSM8K is not in the cache, and {why}", "name a folder with --dataset")
    return ok("data", "the hub's GSM8K is not in the cache; it is downloaded when a run starts")


def check_grader() -> Finding:
    """Does a worker of math-verify come up and give the right answers?"""
    from ludic.task.grading import Grader

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


def check_memory(args: argparse.Namespace, config: GRPOConfig) -> Finding:
    """What training needs, by the shape of the model and the token budget, against what the device has free."""
    import torch

    from ludic.doctor.dry_run import model_shape

    shape, empty = model_shape(args.model, args.trust_remote_code)
    parameters = empty.num_parameters()
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


def check_disk(args: argparse.Namespace, config: GRPOConfig, num_checkpoints: int = 0) -> Finding:
    """Is there room for the checkpoints that stay, beside the `num_checkpoints` that are there, and the one being written?"""
    from ludic.doctor.dry_run import model_shape
    from ludic.task.pretrained import stored_dtype

    folder = Path(args.out_dir)
    while not folder.exists():
        folder = folder.parent
    shape, empty = model_shape(args.model, args.trust_remote_code)
    parameters = empty.num_parameters()
    dtype = stored_dtype(shape)
    size = CHECKPOINT_BYTES + (0 if dtype.itemsize == 4 else dtype.itemsize)
    need = (1 + max(0, config.keep_checkpoints - num_checkpoints)) * size * parameters
    free = shutil.disk_usage(folder).free
    said = f"{_gib(need)} for the checkpoints that stay and the next one, {_gib(free)} free in {args.out_dir}"
    if not os.access(folder, os.W_OK):
        return failed("disk", f"{folder} cannot be written", "choose another --out-dir")
    if need > free:
        return failed("disk", said, "choose another --out-dir, or a lower --keep-checkpoints")
    return ok("disk", said)


def _gib(number: float) -> str:
    return f"{number / 2**30:.1f} GiB"
