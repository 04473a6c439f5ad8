"""The trainer on several ranks against one process: tokens a second on the same updates, and where the time goes.

    PYTHONPATH=src:. python benchmarks/ranks.py --ranks 2 --shape 0.5b                          two GPUs; the CPU without one

Random weights and random tokens, drawn from one seed, in the lengths of `trainer.GSM8K_LIKE`; neither changes the time. Each
side is processes of its own, started one after the other: one with `Learner`, the ranks with `ReplicatedLearner` (with
`--shard-weights` `ShardedLearner`) under torchrun, as often as `--turns` says. Every update is packed, forwarded, backwarded
and stepped until the weights are as a server is sent them; the first two are not timed. Ideal for N ranks is a ratio of N.

A second series of updates waits for the device after each part, of rank 0: `pack` is packing, `rows` forward and backward,
`reduce` the sum over the ranks, `figures` what is fetched, `step` AdamW, `publish` rounding and the way back to all ranks. What
is left of `all parts` is dealing, messages and waiting. Waiting costs time, so all parts take longer than an update.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from benchmarks.make_policy import SHAPES
from benchmarks.trainer import Lengths, build_model, update_samples
from ludic.config import GRPOConfig
from ludic.run.ranks import launched_ranks
from ludic.types import TrainingSample

if TYPE_CHECKING:
    from ludic.train.learner import Learner


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes of the second side (default: 2)")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.5b", help="of the model (default: 0.5b)")
    parser.add_argument(
        "--sequences", type=int, nargs="+", default=[256, 1024], metavar="N", help="of an update (default: 256 1024)"
    )
    parser.add_argument(
        "--shard-weights", action="store_true", help="the ranks with FSDP2 (default: whole weights on each)"
    )
    parser.add_argument("--turns", type=int, default=1, metavar="N", help="of both sides (default: 1)")
    parser.add_argument("--updates", type=int, default=8, metavar="N", help="that are timed (default: 8)")
    parser.add_argument("--budget", type=int, default=16384, metavar="N", help="tokens of a row (default: 16384)")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    return parser


PARTS = {
    "pack": ("_pack",),
    "rows": ("_add_rows",),
    "reduce": ("_gradients",),
    "figures": ("_total_norm", "_fetch"),
    "step": ("optimizer.step",),
    "publish": ("_publish", "_after_steps"),
}
"""The methods of a learner that make up each part of an update."""


def settings(args: argparse.Namespace) -> GRPOConfig:
    return GRPOConfig(
        micro_token_budget=args.budget,
        rollouts_per_update=max(args.sequences),
        shard_weights=args.shard_weights and launched_ranks() > 1,
    )


def figures(args: argparse.Namespace, learner: Learner, samples: list[TrainingSample]) -> dict[str, float]:
    """Tokens a second of the sequences of an update, a shared prompt with each, and the seconds of an update and its parts;
    medians."""
    import torch

    def wait() -> None:
        if learner.device.type == "cuda":
            torch.cuda.synchronize()

    def update_s() -> float:
        began = time.perf_counter()
        learner.accumulate(samples)
        learner.step(learning_rate=1e-6)
        wait()
        return time.perf_counter() - began

    seconds = statistics.median([update_s() for _ in range(args.updates + 2)][2:])
    spent: list[dict[str, float]] = []
    with contextlib.ExitStack() as timed:
        for name, paths in PARTS.items():
            for path in paths:
                timed.enter_context(_timed(learner, path, functools.partial(_add, spent, name), wait))
        for _ in range(4):
            spent.append(dict.fromkeys(PARTS, 0.0))
            spent[-1]["all parts"] = update_s()
    parts = {name: statistics.median(one[name] for one in spent[1:]) for name in ("all parts", *PARTS)}
    return {"tokens_per_s": sum(len(sample.token_ids) for sample in samples) / seconds, "update": seconds, **parts}


def _add(spent: list[dict[str, float]], name: str, seconds: float) -> None:
    spent[-1][name] += seconds


@contextlib.contextmanager
def _timed(learner: Learner, path: str, took: Callable[[float], None], wait: Callable[[], None]) -> Iterator[None]:
    """Within the block, give `took` the seconds of each call of the learner's method; it may lack it."""
    *owners, method = path.split(".")
    owner = functools.reduce(getattr, owners, learner)
    inner = getattr(owner, method, None)
    if inner is None:
        yield
        return

    def call(*positional: Any, **named: Any) -> Any:
        wait()
        began = time.perf_counter()
        result = inner(*positional, **named)
        wait()
        took(time.perf_counter() - began)
        return result

    with mock.patch.object(owner, method, call):
        yield


def one_side(args: argparse.Namespace) -> None:
    """In the only process, or in each rank: measure, and print the figures of each number of sequences as JSON from one."""
    import torch

    from ludic.train.learner import Learner
    from ludic.train.ranks import Ranks
    from ludic.train.replicated import ReplicatedLearner
    from ludic.train.sharded import ShardedLearner

    def measured(learner: Learner) -> None:
        found = []
        for number in args.sequences:
            lengths = Lengths(prompt=(98, 25), completion=(100, 45), num_sequences=number)
            found.append(figures(args, learner, update_samples(lengths, learner.model.config.vocab_size)))
        print(json.dumps(found), flush=True)

    if launched_ranks() == 1:
        measured(Learner(settings(args), build_model(args.shape, "cuda" if torch.cuda.is_available() else "cpu")))
        return
    ranks = Ranks(leave=lambda line: (sys.stderr.write(line + "\n"), os._exit(1)))
    kind = ShardedLearner if args.shard_weights else ReplicatedLearner
    learner = kind(settings(args), build_model(args.shape, "cpu"), ranks=ranks)
    if ranks.rank:
        learner.follow()
    else:
        measured(learner)
        ranks.tell([("end", ())] * ranks.size)
    ranks.leave_groups()
    ranks.close()


def measure(words: list[str], ranks: int) -> list[dict[str, float]]:
    """What one side printed, started as so many ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(Path(__file__)), *words, "--side"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    words = sys.argv[1:]
    args = build_parser().parse_args(words)
    if args.side:
        one_side(args)
        return
    turns = [[measure(words, number) for number in (1, args.ranks)] for _ in range(args.turns)]
    names = ("update", "all parts", *PARTS)
    print(f"| sequences | ranks | tokens a second | ratio | {' | '.join(f'{name}, s' for name in names)} |")
    print(f"|{' --- |' * (4 + len(names))}")
    for place, number in enumerate(args.sequences):
        one, several = (_median([turn[side][place] for turn in turns]) for side in (0, 1))
        for ranks, side in ((1, one), (args.ranks, several)):
            ratio = side["tokens_per_s"] / one["tokens_per_s"]
            parts = " | ".join(f"{side[name]:.4f}" for name in names)
            print(f"| {number} | {ranks} | {side['tokens_per_s']:,.0f} | {ratio:.2f} | {parts} |")


def _median(turns: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}


if __name__ == "__main__":
    main()
