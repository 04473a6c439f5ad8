r"""What it takes to reach an accuracy when most groups teach nothing: plain sampling against the settings for prompts.

    OMP_NUM_THREADS=1 python benchmarks/data_that_teaches.py --out OUT

The demo's policy and environment, on a mix of problems that is made so that most groups have no variance: a share whose stored
answer no completion can give (as data that is too hard, or labelled wrongly), a share of one-step problems that the policy nearly
always solves, and the demo's problems of several steps. One warm-started policy is shared by all runs; a seed is another order
of the data and other samples. A run ends at the first evaluation at or above `--target`, or after `--max-rollouts`.

Rollouts count every completion that was generated for training, replaced groups included. Seconds are the sum of `step_s`, the
wall clock of the updates without evaluations; the CPU seconds of the process hold evaluations too, and do not depend on what else
the machine does. What stays out: other mixes, and any claim about other models.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Record, Records, machine, markdown_table, numbers, run_or_table, say, write_report
from environments.gsm8k import GSM8K, load
from ludic.config import GRPOConfig, RunPaths, add_arguments, from_arguments
from ludic.task.prompts import load_tokenizer

sys.path.insert(0, str(ROOT / "examples" / "gsm8k"))  # no package: the demo's script is run from its folder
from demo import DEMO_FLAGS, NUM_THREADS, build_demo

ARMS: dict[str, tuple[str, dict[str, str]]] = {
    "plain": ("plain sampling", {}),
    "dynamic": ("--dynamic-sampling", {"--dynamic-sampling": ""}),
    "curriculum": ("--drop-solved 2 --curriculum", {"--drop-solved": "2", "--curriculum": ""}),
    "all": ("all three", {"--dynamic-sampling": "", "--drop-solved": "2", "--curriculum": ""}),
}
"""Each arm's name in the table and its flags."""
BASE = "plain"
IMPOSSIBLE = 100_000
"""Added to an answer, which then has more digits than any number of the demo."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench_out"), help="folder for policy, records and table")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], metavar="N,N", help="default: 0,1,2")
    parser.add_argument("--arms", default=",".join(ARMS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--rollouts", type=int, default=128, help="of an update (default: 128)")
    parser.add_argument("--max-rollouts", type=int, default=5120, help="of a run (default: 5120)")
    parser.add_argument("--eval-rollouts", type=int, default=512, help="evaluate every so many (default: 512)")
    parser.add_argument("--target", type=float, default=0.42, help="accuracy that ends a run (default: 0.42)")
    parser.add_argument("--train-problems", type=int, default=480, help="default: %(default)s")
    parser.add_argument("--impossible", type=float, default=0.5, help="share of them (default: 0.5)")
    parser.add_argument("--easy", type=float, default=0.25, help="share of them (default: 0.25)")
    parser.add_argument("--test-problems", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--warm-start", type=int, default=16_000, help="solutions (default: 16000)")
    parser.add_argument("--table", action="store_true", help="only write the table of the records that OUT holds")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError where a comparison cannot be made."""
    unknown = [arm for arm in args.arms.split(",") if arm not in ARMS]
    if unknown:
        raise ValueError(f"--arms {unknown[0]} is not one of {', '.join(ARMS)}")
    if BASE not in args.arms.split(","):
        raise ValueError(f"--arms {args.arms} lacks {BASE}, which the others are compared with")
    if not 0 <= args.impossible + args.easy < 1:
        raise ValueError(f"--impossible {args.impossible} and --easy {args.easy} leave no problems to learn from")


# -- the data --------------------------------------------------------------------------------------------------------------


def mixed(rows: Sequence[Mapping[str, str]], *, count: int, impossible: float, easy: float) -> list[dict[str, str]]:
    """`count` rows in GSM8K's format with these shares, in a fixed random order.

    Raises:
        ValueError: there are not enough of a kind.
    """
    steps = {True: [row for row in rows if row["answer"].count("\n") == 1], False: []}
    steps[False] = [row for row in rows if row not in steps[True]]
    num_impossible, num_easy = round(count * impossible), round(count * easy)
    wanted = [(False, num_impossible), (True, num_easy), (False, count - num_impossible - num_easy)]
    parts = []
    for one_step, number in wanted:
        if len(steps[one_step]) < number:
            raise ValueError(f"{number} problems of a kind are needed, and {len(steps[one_step])} are there")
        parts.append(steps[one_step][:number])
        steps[one_step] = steps[one_step][number:]
    mix = [without_solution(row) for row in parts[0]] + [dict(row) for row in parts[1] + parts[2]]
    random.Random("data that teaches").shuffle(mix)
    return mix


def without_solution(row: Mapping[str, str]) -> dict[str, str]:
    """The same problem with an answer that the policy never gives."""
    worked, _, answer = row["answer"].rpartition("#### ")
    return {"question": row["question"], "answer": f"{worked}#### {int(answer) + IMPOSSIBLE}"}


def build_data(args: argparse.Namespace, folder: Path) -> None:
    """The policy and the problems of all runs, where they are not there yet."""
    if (folder / "mixed").is_dir():
        return
    build_demo(
        folder,
        seed=0,
        num_train=4 * args.train_problems,
        num_test=args.test_problems,
        num_warm_start=args.warm_start,
    )
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    mix = mixed(rows, count=args.train_problems, impossible=args.impossible, easy=args.easy)
    (folder / "mixed").mkdir()
    (folder / "mixed" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mix))
    (folder / "mixed" / "test.jsonl").write_text((folder / "test.jsonl").read_text())


# -- the runs --------------------------------------------------------------------------------------------------------------


class UntilTarget:
    """Keeps the figures of every update, and ends the run at the accuracy or after the rollouts that were asked for."""

    def __init__(self, args: argparse.Namespace, task: "asyncio.Task[Any]", group_size: int) -> None:
        self._args, self._task, self._group_size = args, task, group_size
        self.rollouts, self.updates, self.seconds = 0, 0, 0.0
        self.curve: list[tuple[int, float]] = []
        """Rollouts and accuracy at each evaluation."""
        self.flat: list[float] = []
        self.reached = self.ended = False

    def log(self, step: int, metrics: Mapping[str, float], /) -> None:
        if "step_s" in metrics:
            groups = metrics.get("generated_groups", self._args.rollouts // self._group_size)
            self.rollouts += round(groups) * self._group_size
            self.updates, self.seconds = step, self.seconds + metrics["step_s"]
            self.flat.append(metrics["zero_variance_share"])
        if "eval/accuracy" in metrics:
            self.curve.append((self.rollouts, metrics["eval/accuracy"]))
            self.reached = metrics["eval/accuracy"] >= self._args.target
        if self.reached or ("eval/accuracy" in metrics and self.rollouts >= self._args.max_rollouts):
            self.ended = True
            self._task.cancel()

    def event(self, step: int, message: str, /) -> None:
        say(f"update {step}: {message}")

    def close(self) -> None:
        pass


def config_of(args: argparse.Namespace, *, seed: int, arm: str) -> GRPOConfig:
    """The demo's settings but for the size of an update, a constant learning rate, and the arm's flags."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    every = max(1, args.eval_rollouts // args.rollouts)
    if "--dynamic-sampling" in ARMS[arm][1]:  # an update generates about as many groups more as have no variance
        every = max(1, round(every * (1 - args.impossible - args.easy)))
    flags = {**DEMO_FLAGS, "--lr-schedule": "constant", "--rollouts-per-update": str(args.rollouts),
             "--train-steps": str(args.max_rollouts // args.rollouts + every), "--eval-every": str(every),
             "--eval-limit": str(args.test_problems), "--save-every": "0", "--seed": str(seed), **ARMS[arm][1]}  # fmt: skip
    known, _ = parser.parse_known_args(
        [word for flag in flags.items() for word in flag if word or flag[0] == "--system-prompt"]
    )
    return from_arguments(known)


async def train(args: argparse.Namespace, folder: Path, *, seed: int, arm: str) -> Record:
    """One run from the shared policy."""
    import torch
    from transformers import AutoModelForCausalLM

    from ludic.rollout.local import LocalEngine
    from ludic.train.trainer import GRPOTrainer

    config = config_of(args, seed=seed, arm=arm)
    environment = GSM8K(system_prompt=DEMO_FLAGS["--system-prompt"])
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    engine = LocalEngine.from_pretrained(folder / "model")
    task = asyncio.current_task()
    assert task is not None
    watched, started = UntilTarget(args, task, config.group_size), time.process_time()
    try:
        trainer = GRPOTrainer(
            config=config,
            model=model,
            model_name=str(folder / "model"),
            tokenizer=load_tokenizer(folder / "model"),
            engine=engine,
            environment=environment,
            train_samples=load("train", dataset=folder / "mixed"),
            eval_samples=load("test", dataset=folder / "mixed"),
            metric_logger=watched,
            paths=RunPaths(out_dir=folder / f"{arm}_{seed}", name="gsm8k"),
        )
        await trainer.run()
    except asyncio.CancelledError:
        if not watched.ended:  # a person did it
            raise
        task.uncancel()
    finally:
        await engine.aclose()
        await environment.aclose()
    return {
        "arm": arm,
        "seed": seed,
        "reached": watched.reached,
        "rollouts": watched.rollouts,
        "updates": watched.updates,
        "seconds": watched.seconds,
        "cpu_s": time.process_time() - started,
        "curve": watched.curve,
        "flat": watched.flat,
    }


def settings_of(args: argparse.Namespace) -> Record:
    """What must be equal for two runs to be compared."""
    apart = {"out", "seeds", "arms", "table"}
    return {name: value for name, value in vars(args).items() if name not in apart}


def run_all(args: argparse.Namespace, records: Records) -> None:
    """Every seed and arm that the records do not hold yet, one after the other."""
    import torch

    torch.set_num_threads(NUM_THREADS)
    settings = settings_of(args)
    done = {(run["arm"], run["seed"]) for run in runs_of(records, settings)}
    records.add("machine", **machine())
    folder = args.out / "data_that_teaches"
    build_data(args, folder)
    for seed in args.seeds:
        for arm in args.arms.split(","):
            if (arm, seed) not in done:
                run = asyncio.run(train(args, folder, seed=seed, arm=arm))
                records.add("run", settings=settings, **run)
                end = f"{run['curve'][-1][1]:.1%} after {run['rollouts']} rollouts, {run['seconds']:.0f} s"
                say(f"seed {seed}, {ARMS[arm][0]}: {end}")


# -- the table -------------------------------------------------------------------------------------------------------------


def runs_of(records: Records, settings: Record) -> list[Record]:
    """The runs with these settings; the last one of an arm and a seed counts."""
    found = {(r["arm"], r["seed"]): r for r in records.all() if r["part"] == "run" and r["settings"] == settings}
    return [found[key] for key in sorted(found)]


def table(runs: Sequence[Record], arms: Sequence[str], seeds: Sequence[int]) -> str:
    """One row an arm: what it took to reach the target, and the same as a share of plain sampling with the same seed.

    A run that did not reach it counts with what it had when it was ended, and is marked: its figures are lower bounds.

    Raises:
        ValueError: a run is missing.
    """
    by_place = {(run["arm"], run["seed"]): run for run in runs}
    for arm in arms:
        for seed in seeds:
            if (arm, seed) not in by_place:
                raise ValueError(f"there is no run of {arm} with seed {seed}: leave --table out to make it")
    rows = []
    for arm in arms:
        own, base = ([by_place[name, seed] for seed in seeds] for name in (arm, BASE))
        cells: list[Any] = [ARMS[arm][0], f"{sum(run['reached'] for run in own)} of {len(own)}"]
        cells.append(f"{statistics.fmean(run['curve'][-1][1] for run in own):.1%}")
        cells.append(f"{statistics.fmean(share for run in own for share in run['flat']):.0%}")
        for name in ("updates", "rollouts", "seconds", "cpu_s"):
            cells.append(f"{statistics.fmean(run[name] for run in own):.0f}")
        for name in ("rollouts", "cpu_s"):
            ratios = [run[name] / plain[name] for run, plain in zip(own, base, strict=True)]
            cells.append(f"{statistics.fmean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        rows.append(cells)
    headings = ["", "reached", "accuracy at the end", "groups without variance", "updates", "rollouts", "seconds", "CPU seconds",
                "rollouts / plain", "CPU seconds / plain"]  # fmt: skip
    return markdown_table(headings, rows)


def write_table(args: argparse.Namespace, records: Records) -> None:
    """`data_that_teaches.md` and, with every curve, `data_that_teaches.json`."""
    runs = runs_of(records, settings_of(args))
    arms = [arm for arm in ARMS if arm in args.arms.split(",")]
    result = table(runs, arms, args.seeds)
    words = (
        f"Until a greedy accuracy of {args.target:.0%} on {args.test_problems} held-out problems, or {args.max_rollouts} "
        f"rollouts; means over {len(args.seeds)} seeds, ratios with the smallest and the largest. A run that did not reach it "
        f"counts with what it took until it was ended. Of {args.train_problems} training problems, {args.impossible:.0%} cannot "
        f"be solved and {args.easy:.0%} take one step; {args.rollouts} rollouts an update in groups of "
        f"{DEMO_FLAGS['--group-size']}. "
        f"The policy of all runs starts at {runs[0]['curve'][0][1]:.1%}."
    )
    on = records.last()["machine"]
    write_report(args.out / "data_that_teaches.md", "Data that teaches", on, [words, result])
    everything = {**on, "settings": settings_of(args), "runs": runs}
    (args.out / "data_that_teaches.json").write_text(json.dumps(everything) + "\n")


def main() -> None:
    args = build_parser().parse_args()
    try:
        check_arguments(args)
        run_or_table("data_that_teaches", args, run_all, write_table)
    except ValueError as error:
        raise SystemExit(f"data_that_teaches.py: {error}") from error


if __name__ == "__main__":
    main()
