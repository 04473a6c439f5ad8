"""The trainer on several ranks against one process: tokens a second on the same updates, and the ratio of the two.

    PYTHONPATH=src:. python benchmarks/ranks.py --ranks 2 --shape 0.5b                          two GPUs; the CPU without one

Random weights and random tokens, drawn from one seed, in the lengths of `trainer.GSM8K_LIKE`; neither changes the time. Each
side is processes of its own, started one after the other: one with `Learner`, the ranks with `ShardedLearner` under torchrun.
Every update is packed, forwarded, backwarded, stepped, and gathered for a server; the first one is not timed. Ideal for N
ranks is a ratio of N.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

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
    parser.add_argument("--sequences", type=int, default=256, metavar="N", help="of an update (default: 256)")
    parser.add_argument("--updates", type=int, default=5, metavar="N", help="that are timed (default: 5)")
    parser.add_argument("--budget", type=int, default=16384, metavar="N", help="tokens of a row (default: 16384)")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    return parser


def settings(args: argparse.Namespace) -> GRPOConfig:
    return GRPOConfig(micro_token_budget=args.budget, rollouts_per_update=args.sequences)


def tokens_a_second(args: argparse.Namespace, learner: Learner, samples: list[TrainingSample]) -> float:
    """Of the sequences of an update, a shared prompt with each; the median of the timed updates."""
    import torch

    tokens, rates = sum(len(sample.token_ids) for sample in samples), []
    for _ in range(args.updates + 1):
        began = time.perf_counter()
        learner.accumulate(samples)
        learner.step(learning_rate=1e-6)
        if learner.device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(tokens / (time.perf_counter() - began))
    return statistics.median(rates[1:])


def one_side(args: argparse.Namespace) -> None:
    """In the only process, or in each rank: measure, and print the figure as JSON from one of them."""
    import torch

    from ludic.train.learner import Learner
    from ludic.train.ranks import Ranks
    from ludic.train.sharded import ShardedLearner

    lengths = Lengths(prompt=(98, 25), completion=(100, 45), num_sequences=args.sequences)
    if launched_ranks() == 1:
        model = build_model(args.shape, "cuda" if torch.cuda.is_available() else "cpu")
        samples = update_samples(lengths, model.config.vocab_size)
        print(json.dumps(tokens_a_second(args, Learner(settings(args), model), samples)))
        return
    ranks = Ranks(leave=lambda line: (sys.stderr.write(line + "\n"), os._exit(1)))
    model = build_model(args.shape, "cpu")
    learner = ShardedLearner(settings(args), model, ranks=ranks)
    if ranks.rank:
        learner.follow()
    else:
        print(json.dumps(tokens_a_second(args, learner, update_samples(lengths, model.config.vocab_size))), flush=True)
        ranks.tell([("end", ())] * ranks.size)
    ranks.close()


def measure(words: list[str], ranks: int) -> float:
    """What one side printed, started as so many ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(Path(__file__)), *words, "--side"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    words = sys.argv[1:]
    args = build_parser().parse_args(words)
    if args.side:
        one_side(args)
        return
    one, several = measure(words, 1), measure(words, args.ranks)
    print("| ranks | tokens a second | ratio |\n| --- | --- | --- |")
    print(f"| 1 | {one:,.0f} | 1.00 |\n| {args.ranks} | {several:,.0f} | {several / one:.2f} |")


if __name__ == "__main__":
    main()
