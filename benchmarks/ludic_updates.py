"""A GRPO run of ludic as the training script makes it, with one JSON line an update: ludic's counterpart of `peers/`.

    python benchmarks/ludic_updates.py --model POLICY --dataset DIR --port PORT --train-steps 12 [any flag of the trainer]

The reward is `hash_reward`. Nothing is evaluated and no checkpoint is written; everything else that a run does is done.
A line holds `step`, `seconds` (by the wall clock since the update before; the first since the trainer was built), `parts`
(the trainer's own seconds), `completion_tokens`, `peak_gib`, `rss_gib`, `open_fds` and `metrics`; the last one `versions`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import HashRewardGSM8K, Record, emit, numbers, versions
from benchmarks.parts import Pauses
from environments.gsm8k import GSM8KSample, load
from ludic.cli import add_engine_arguments, check_engine_arguments, hide_loading_bars, run_script
from ludic.config import GRPOConfig, RunPaths, add_arguments, from_arguments
from ludic.rollout.engine import InferenceEngine
from ludic.run.engine import name_engines, open_engine
from ludic.task.prompts import encode_prompt, load_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ludic.train.trainer import GRPOTrainer

GIB = 2**30


class UpdateRecorder:
    """A metric logger that hands each update on as a record, with what the process holds by then."""

    def __init__(self, emit: Callable[[Record], None]) -> None:
        self._emit = emit
        self.restart()

    def restart(self) -> None:
        """Time the next update from now on."""
        self._last = time.perf_counter()

    def log(self, step: int, metrics: Mapping[str, float], /) -> None:
        if "reward_mean" not in metrics:  # an evaluation, or figures between two updates
            return
        now = time.perf_counter()
        self._emit(
            {
                "step": step,
                "seconds": now - self._last,
                "parts": {
                    name: value for name, value in metrics.items() if name.endswith("_s") and "per_s" not in name
                },
                "completion_tokens": metrics["total_completion_tokens"],
                "peak_gib": _peak_gib(),
                "rss_gib": _rss_gib(),
                "open_fds": len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0,
                "metrics": dict(metrics),
            }
        )
        self.restart()

    def event(self, step: int, message: str, /) -> None:
        sys.stderr.write(f"update {step}: {message}\n")

    def close(self) -> None:
        pass


def _peak_gib() -> float:
    """The most GPU memory that tensors took since the last call, in GiB; 0 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    peak = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.reset_peak_memory_stats()
    return peak


def _rss_gib() -> float:
    """What the process holds of the machine's memory now, in GiB; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / GIB if statm.exists() else 0.0


def load_policy(model: str, device: torch.device) -> PreTrainedModel:
    """The policy with float32 masters on `device`."""
    import torch
    from transformers import AutoModelForCausalLM

    policy: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return torch.nn.Module.to(policy, device)


def build_trainer(
    config: GRPOConfig,
    *,
    policy: PreTrainedModel,
    model_name: str,
    tokenizer: PreTrainedTokenizerBase,
    engine: InferenceEngine,
    samples: Sequence[GSM8KSample],
    emit: Callable[[Record], None],
    out_dir: Path,
    pauses: Pauses | None = None,
) -> GRPOTrainer[GSM8KSample]:
    """A trainer as the training script builds it, on the task with the checksum for a reward."""
    from ludic.train.trainer import GRPOTrainer

    recorder = UpdateRecorder(emit)  # its clock starts here, after the imports

    class BenchmarkTrainer(GRPOTrainer[GSM8KSample]):
        """The trainer without its checkpoints: 6 GB written at the end of each run measure a disk."""

        async def save(self) -> Path:
            if pauses is not None and pauses.due(self.state.step):
                await self._rollouts.settled()  # what is generated ahead would slow down whoever comes next
                await asyncio.to_thread(pauses.wait, self.state.step)  # the lease of the server is kept meanwhile
                recorder.restart()
            return self.paths.checkpoints

    return BenchmarkTrainer(
        config=config,
        model=policy,
        model_name=model_name,
        tokenizer=tokenizer,
        engine=engine,
        environment=HashRewardGSM8K(),
        train_samples=samples,
        eval_samples=[],
        metric_logger=recorder,
        paths=RunPaths(out_dir=out_dir, name="gsm8k"),
    )


def probe_of(tokenizer: PreTrainedTokenizerBase, sample: GSM8KSample) -> list[int]:
    """The prompt by whose log-probs weight syncs are proven."""
    return encode_prompt(tokenizer, HashRewardGSM8K().messages(sample))[:64]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the policy")
    parser.add_argument("--dataset", required=True, help="folder with train.jsonl")
    parser.add_argument("--limit", type=int, default=None, help="train on the first N problems only (default: all)")
    parser.add_argument("--pause-after", type=numbers, default=[], metavar="N,N",
                        help="updates after which to wait for a line on standard input (default: none)")  # fmt: skip
    add_engine_arguments(parser)
    add_arguments(parser)
    return parser


async def main() -> int:
    args = build_parser().parse_args()
    check_engine_arguments(args)
    name_engines(args)
    config = from_arguments(args)
    if args.pause_after:
        config = dataclasses.replace(config, save_every=1)  # it pauses where others save
    import torch  # --help and wrong flags answer without it

    hide_loading_bars()
    tokenizer = load_tokenizer(args.model)
    samples = load("train", dataset=args.dataset, limit=args.limit)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def say(text: str) -> None:
        sys.stderr.write(text + "\n")

    with tempfile.TemporaryDirectory() as folder:
        out_dir = Path(folder)
        probe = probe_of(tokenizer, samples[0])
        async with open_engine(
            args, tokenizer, out_dir=out_dir, max_seq_len=config.max_seq_len, say=say, probe=probe
        ) as engine:
            policy = load_policy(args.model, device)
            trainer = build_trainer(
                config,
                policy=policy,
                model_name=args.model,
                tokenizer=tokenizer,
                engine=engine,
                samples=samples,
                emit=emit,
                out_dir=out_dir,
                pauses=Pauses(args.pause_after),
            )
            await trainer.run()
    emit({"versions": versions()})
    return 0


if __name__ == "__main__":
    run_script("ludic_updates.py", main)
