"""The checks of this machine and this model, which need no server.

torch and transformers take seconds to import, so that is left to the checks that need them: `--help` must not wait for it.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ludic.config import GRPOConfig
from ludic.doctor.dry_run import check_architecture, check_saving, check_token_ids
from ludic.doctor.findings import Check, Finding, failed, ok, warning
from ludic.doctor.memory import choose_share, given_share, shares_gpu, training_need
from ludic.inference.server.server_help import VLLM_RANGE
from ludic.storage.inert import inert
from ludic.task.datafiles import read_rows, split_files
from ludic.task.hub import endpoint, is_offline, why_unreachable
from ludic.types import ChatMessage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUPPORTED = {
    "Python": ((3, 11), (3, 13)),
    "torch": ((2, 11), None),
    "transformers": ((5, 10), None),
    "vllm": VLLM_RANGE,
}
"""Lowest and highest version, of the two first numbers; None: no highest."""
CHECKPOINT_BYTES = 12
"""Of a parameter: float32 masters and two moments. The model in its own dtype comes on top, where that is not float32."""


def local_checks(args: argparse.Namespace, config: GRPOConfig) -> list[tuple[str, Check]]:
    """All of them, in the order in which they are worth reading."""
    tokenizer = cache(lambda: tokenizer_of(args))
    return [
        *quick_checks(args, config, tokenizer),
        ("chat template", lambda: check_chat_template(tokenizer())),
        ("token ids", lambda: check_template_ids(args, tokenizer())),
        ("hub", lambda: check_hub(args)),
        ("data", lambda: check_data(args)),
        ("grader", check_grader),
    ]


def quick_checks(
    args: argparse.Namespace,
    config: GRPOConfig,
    tokenizer: "Callable[[], PreTrainedTokenizerBase]",
    *,
    num_checkpoints: int = 0,
) -> list[tuple[str, Check]]:
    """What every training run looks at before it loads its model; a resumed one has `num_checkpoints` already."""
    return [
        ("versions", check_versions),
        ("GPUs", lambda: check_gpus(args)),
        ("memory", lambda: check_memory(args, config)),
        ("disk", lambda: check_disk(args, config, num_checkpoints)),
        ("architecture", lambda: check_architecture(args, config)),
        ("saving", lambda: check_saving(args, config, tokenizer())),
    ]


def tokenizer_of(args: argparse.Namespace) -> "PreTrainedTokenizerBase":
    from ludic.task.prompts import load_tokenizer

    return load_tokenizer(args.model, args.chat_template, trust_remote_code=args.trust_remote_code)


_CHAT: list[ChatMessage] = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "What is 2 + 2?"},
]


def check_chat_template(tokenizer: "PreTrainedTokenizerBase") -> list[Finding]:
    """Does the template keep the turns of a chat, and begin the answer? A run looks at its own first prompt in the same way."""
    from ludic.task.template_checks import own_system_turn, template_warnings

    try:
        lines = template_warnings(tokenizer, _CHAT)
    except ValueError as error:  # many templates know no system turn
        lines = [str(error), *template_warnings(tokenizer, _CHAT[1:])]
    if lines:
        return [warning("chat template", line, "") for line in lines]
    own = own_system_turn(tokenizer)
    added = f"; to a chat without a system turn it adds '{inert(own, 80)}'" if own else ""
    return [ok("chat template", f"it keeps a system turn and a question, and begins the answer{added}")]


def check_template_ids(args: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase") -> Finding:
    """`check_token_ids` for what the chat template adds; a training run holds all of its prompts."""
    from ludic.task.prompts import encode_prompt

    try:
        prompt = encode_prompt(tokenizer, _CHAT)
    except ValueError:  # a template without system turns
        prompt = encode_prompt(tokenizer, _CHAT[1:])
    return check_token_ids(args, tokenizer, prompt)


def check_versions() -> list[Finding]:
    """Are Python, torch, transformers and vLLM of versions that ludic is made for?"""
    found, wrong = [], []
    for name, (low, high) in SUPPORTED.items():
        version = platform.python_version() if name == "Python" else installed(name)
        if version is None and name == "vllm":
            found.append("no vLLM here (a server may have its own environment)")
        elif version is None:
            wrong.append(failed("versions", f"{name} is not installed", "run uv sync"))
        elif low <= (numbers := tuple(map(int, re.findall(r"\d+", version)[:2]))) <= (high or numbers):
            found.append(f"{name} {version}")
        else:
            bounds = [".".join(map(str, bound)) for bound in (low, high) if bound]
            span = " to ".join(bounds) if high else f"{bounds[0]} or later"
            wrong.append(failed("versions", f"{name} {version}", f"ludic is made for {span}: run uv sync"))
    return wrong or [ok("versions", ", ".join(found))]


def installed(name: str) -> str | None:
    """The version of a package in this environment."""
    for distribution in (name, f"{name}-cpu"):  # vLLM's CPU build has that name
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def check_gpus(args: argparse.Namespace) -> Finding:
    """Which GPUs does the trainer see, and is one left for a server that is started?"""
    import torch

    if not torch.cuda.is_available():
        if args.engine == "local":
            return ok("GPUs", "none; training and generation on the CPU")
        fix = "check the driver (nvidia-smi), CUDA_VISIBLE_DEVICES and the torch build, unless that is meant"
        return warning("GPUs", "the trainer sees none, and would train on the CPU", fix)
    count = torch.cuda.device_count()
    names = ", ".join(torch.cuda.get_device_name(number) for number in range(count))
    if shares_gpu(args):
        return ok("GPUs", f"one ({names}), which the server and the trainer share")
    return ok("GPUs", f"{count} ({names}), CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}")


def check_hub(args: argparse.Namespace) -> Finding:
    """Can the model be had: from a folder, from the Hugging Face hub, or from the hub's cache?"""
    if Path(args.model).expanduser().exists():
        return ok("hub", "not needed: the model is on this machine")
    if not (why := hub_problem()):
        return ok("hub", f"{endpoint()} answers")
    if model_in_cache(args.model):
        fix = "set HF_HUB_OFFLINE=1 to use the cache without waiting, if it is not"
        return warning("hub", f"{why}; the model is in the cache", fix)
    fix = "name a folder with --model, or download it where there is a network"
    return failed("hub", f"{why}, and the cache has no complete copy of the model", fix)


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
        shards = {"model.safetensors"}
        if index := cached("model.safetensors.index.json"):
            shards = set(json.loads(Path(index).read_text())["weight_map"].values())
        has_tokenizer = cached("tokenizer.json") or cached("tokenizer_config.json")
        return bool(has_tokenizer and all(map(cached, {"config.json", *shards})))
    except HFValidationError:  # no name of a model, but a folder that is not there
        return False


def dataset_in_cache() -> Path | None:
    """Where the cache of the package datasets has GSM8K, prepared; None where it has not."""
    from huggingface_hub.constants import HF_HOME

    cache_folder = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets")
    for folder in (cache_folder / "openai___gsm8k" / "main").glob("*/*"):
        if all(any(folder.glob(f"*-{split}*.arrow")) for split in ("train", "test")):
            return folder
    return None


def check_data(args: argparse.Namespace) -> Finding:
    """Is the data set there, and can it be read? Its rows are checked when they are loaded."""
    if args.dataset is not None:
        try:
            files = split_files("train", Path(args.dataset))
            for place, row in itertools.islice(read_rows(files), 100):
                if not isinstance(row, dict):
                    return failed("data", f"{place}: not a JSON object", "mend the file")
        except ValueError as error:
            return failed("data", str(error), "mend it, or name another --dataset")
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        return ok("data", f"{files[0]}{more} can be read")
    if importlib.util.find_spec("datasets") is None:
        fix = "run uv sync --extra examples, or name a --dataset"
        return failed("data", "the package datasets is not installed", fix)
    if folder := dataset_in_cache():
        return ok("data", f"the hub's GSM8K is in the cache, {folder}")
    if why := hub_problem():
        return failed("data", f"the hub's GSM8K is not in the cache, and {why}", "name a folder with --dataset")
    return ok("data", "the hub's GSM8K is not in the cache; it is downloaded when a run starts")


def check_grader() -> Finding:
    """Does a worker of math-verify come up and give the right answers?"""
    from ludic.task.grading import Grader

    with contextlib.closing(Grader(num_workers=1)) as grader:
        right = grader.match_sync(r"\sqrt{8}", r"2\sqrt{2}")  # no rule of ours decides it
        wrong = grader.match_sync("17", "18")
    if right.failure or not right.matched or wrong.matched:
        return failed("grader", f"it judged wrongly ({right}, {wrong})", "reinstall math-verify: run uv sync")
    return ok("grader", "math-verify answers")


def check_memory(args: argparse.Namespace, config: GRPOConfig) -> Finding:
    """What training needs, by the shape of the model and the token budget, against what the device has free."""
    import torch

    on_gpu = torch.cuda.is_available()
    need = training_need(args, config, on_gpu=on_gpu)
    said = f"about {_gib(need.total)} needed ({need.parameters / 1e9:.2f}B parameters, {need.budget} tokens at once), "
    free, total = torch.cuda.mem_get_info(trainer_device(args)) if on_gpu else (_free_memory(), 0)
    said += f"{_gib(free)} free"
    if shares_gpu(args):
        share = given_share(args)
        if share is None:
            share = choose_share(args, config, free=free, total=total)
        free -= int(share * total)
        said += f", of which the server on the same GPU takes {_gib(share * total)} (--server-memory-share {share:g})"
    if need.static > free:
        fix = "weights and optimizer alone do not fit: train a smaller model, or free the device"
        return failed("memory", said, fix)
    if need.total > free:
        return warning("memory", said, "--micro-token-budget auto takes what fits; --gradient-checkpointing needs less")
    return ok("memory", said)


def trainer_device(args: argparse.Namespace) -> int:
    """The number of the GPU that trains: not the one of a server that is started, where there are two."""
    import torch

    return 1 if args.start_server and not args.server_gpu and torch.cuda.device_count() > 1 else 0


def _free_memory() -> int:
    """Of the machine, in bytes: what Linux calls available, else all that there is."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
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
    if config.lora_rank:  # the merged model; the adapter with its moments is small beside it
        size = dtype.itemsize
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
