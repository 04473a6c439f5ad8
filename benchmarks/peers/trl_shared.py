"""What both TRL trainers share: common flags and settings, the clock of an update, and a check of the prompts."""

import argparse
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import active_children
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from benchmarks.harness import numbers
from benchmarks.parts import Pauses
from benchmarks.peers.common import JSONLines, JSONValue, gsm8k_prompts
from ludic.task.prompts import encode_prompt
from ludic.types import ChatMessage

GROUP_SIZE = 8
UPDATES_FACTOR = 4
"""Prompts loaded per update, as a multiple of those trained on: an asynchronous trainer generates ahead."""

T = TypeVar("T")


def add_common_flags(parser: argparse.ArgumentParser, *, peer: str) -> None:
    parser.add_argument(
        "--model", required=True, help="model folder: both the trainer's start and what the server serves"
    )
    parser.add_argument("--dataset", required=True, help="folder with GSM8K's train.jsonl")
    parser.add_argument("--server", default="http://127.0.0.1:8001", help="the vLLM server (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=8, help="optimizer steps, two of them warm-up (default: 8)")
    parser.add_argument("--rollouts", type=int, default=256, help="completions an update, groups of 8 (default: 256)")
    parser.add_argument("--max-tokens", type=int, default=512, help="completion tokens at most (default: 512)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights and the optimizer's state; compute is bf16 either way (default: TRL's float32)",
    )
    parser.add_argument("--max-seconds", type=float, default=240.0, help="the script ends by then (default: 240)")
    parser.add_argument("--pause-after", type=numbers, default=[], metavar="N,N",
                        help="updates after which to wait for a line on standard input (default: none)")  # fmt: skip
    parser.add_argument("--out", type=Path, help=f"the JSON lines of {peer}, also in this file")
    parser.add_argument(
        "--work-dir", default="/tmp/peers", help="TRL's output_dir; nothing is saved (default: %(default)s)"
    )
    parser.add_argument("--cpu", action="store_true", help="train on the CPU: to try the script, not to measure")


def prepare_process() -> None:
    """Settings that must be in place before TRL is imported; those that are set already stay."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    # vLLM finds its own address by asking the routing table for a way out, which a machine without network has not.
    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    for name in ("NO_PROXY", "no_proxy"):
        os.environ.setdefault(name, "127.0.0.1,localhost")


def training_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of `transformers.TrainingArguments` that both peers take: fastest, nothing saved or reported."""
    return {
        "output_dir": args.work_dir,
        "max_steps": args.updates,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch" if args.cpu else "adamw_torch_fused",
        "bf16": not args.cpu,
        "use_cpu": args.cpu,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "logging_strategy": "steps",
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "seed": 0,
    }


def prompt_dataset(args: argparse.Namespace) -> Any:
    """A `datasets.Dataset` with the column `prompt`: chat messages."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    prompts = gsm8k_prompts(args.dataset, UPDATES_FACTOR * (args.updates + 1) * args.rollouts // GROUP_SIZE)
    rows = [{"prompt": [dict(message) for message in messages]} for messages in prompts]
    # With a fingerprint of its own: the one that `Dataset.from_list` computes fails where packages are not in site-packages.
    return Dataset(InMemoryTable.from_pylist(rows), fingerprint=f"gsm8k-{len(rows)}")


def require_same_prompts(
    tokenizer: PreTrainedTokenizerBase, dataset: Any, tokenize: Callable[[list[Any]], Any]
) -> None:
    """Raise ValueError unless the peer's tokenisation of the first prompts is ludic's, token for token."""
    messages: list[list[ChatMessage]] = [dataset[i]["prompt"] for i in range(min(4, len(dataset)))]
    theirs = [list(ids) for ids in tokenize(messages)]
    ours = [encode_prompt(tokenizer, turns) for turns in messages]
    if theirs != ours:
        raise ValueError(f"the peer tokenises a prompt as {theirs[0][:20]}..., ludic as {ours[0][:20]}...")


def stop_printing(trainer: Any) -> None:
    """Remove the callbacks that write metrics to standard output, where the JSON lines go."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


class Stopwatch:
    """Seconds spent in chosen methods since the last `take`, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, owner: object, method: str, name: str) -> None:
        """Count the wall-clock time of `owner.method` under `name` from now on; the method itself stays as it is."""
        original = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {}
        return taken


class UpdateClock(TrainerCallback):
    """Times updates from the end of one optimizer step to the end of the next, and prints each as a JSON line.

    `parts(seconds, metrics)` gives what else is known of an update: the trainer's own metrics arrive with its log, just
    after the step. The first update counts from the begin of training.

    In a pause the allocator gives back what it keeps for later, since the others need that memory, and no process that
    generates ahead goes on with it: it would take the server from whoever is measured, and fill a queue for nothing.
    """

    def __init__(
        self,
        lines: JSONLines,
        parts: Callable[[float, Mapping[str, float]], Mapping[str, JSONValue]],
        pauses: Pauses | None = None,
    ) -> None:
        self._pauses = pauses or Pauses()
        self._lines = lines
        self._parts = parts
        self._last = time.perf_counter()
        self._seconds: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self._now()
        self._seconds, self._last = now - self._last, now

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        if self._seconds is None or logs is None:
            return  # the log at the end of training belongs to no update
        seconds, self._seconds = self._seconds, None
        record: dict[str, JSONValue] = {"step": state.global_step, "seconds": round(seconds, 4)}
        for name, value in self._parts(seconds, logs).items():
            record[name] = round(value, 4) if isinstance(value, float) else value
        self._lines.update({**record, **gpu_memory()})
        if self._pauses.due(state.global_step):
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            with children_stopped():
                self._pauses.wait(state.global_step)
            self._last = self._now()

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


@contextlib.contextmanager
def children_stopped() -> Iterator[None]:
    """The processes that multiprocessing has started here stand still meanwhile."""
    children = [child.pid for child in active_children() if child.pid is not None]
    for pid in children:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in children:
            os.kill(pid, signal.SIGCONT)


def gpu_memory() -> dict[str, float | None]:
    """The peak of the process so far, in GiB: what tensors held, and what the allocator held for them."""
    if not torch.cuda.is_available():
        return {"peak_gpu_gib": None, "peak_reserved_gib": None}
    return {
        "peak_gpu_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
    }
