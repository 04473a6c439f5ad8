"""Learning per rollout: rollouts that are one update old, with and without correction, against strictly on-policy ones.

    OMP_NUM_THREADS=1 python benchmarks/learning.py --out OUT          about 10 minutes on one CPU core, without a GPU

The demo's policy and problems, several seeds. For each seed a policy is warm-started once and every arm trains a copy of it
on the same prompts in the same order with the same number of rollouts; all that differs is the age of the rollouts, and
what is done about it. The in-process engine serves calls in their order, so the rollouts of an arm with `max_staleness` 1
are exactly one update old from the second update on, which is the worst that a server would give.

Seeds are compared in pairs: the interval is Student's, over the seeds' own differences. With three seeds it is wide, and an
interval that holds 0 says that no difference was seen and not that there is none. What stays out: seconds, which
`benchmarks/update.py` measures on GPUs.
"""

import argparse
import asyncio
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Record, Records, machine, markdown_table, numbers, run_or_table, say, write_report
from environments.gsm8k import GSM8K, load
from ludic.config import GRPOConfig, RunPaths, add_arguments, from_arguments
from ludic.task.prompts import load_tokenizer

sys.path.insert(0, str(ROOT / "examples" / "gsm8k"))  # no package: the demo's script is run from its folder
from demo import (
    DEMO_FLAGS,
    NUM_TEST_PROBLEMS,
    NUM_THREADS,
    NUM_TRAIN_PROBLEMS,
    NUM_WARM_START_PROBLEMS,
    build_demo,
)

ARMS: dict[str, tuple[str, dict[str, float]]] = {
    "on_policy": ("strictly on-policy", {"max_staleness": 0}),
    "stale": ("staleness 1, corrected", {"max_staleness": 1}),
    "stale_plain": ("staleness 1, uncorrected", {"max_staleness": 1, "tis_cap": 0.0}),
    "lora": ("LoRA, rank 16, 4 times the rate", {"lora_rank": 16, "learning_rate": 2e-3}),
    "lora_10x": ("LoRA, rank 16, 10 times the rate", {"lora_rank": 16, "learning_rate": 5e-3}),
}
"""Each arm's name in the table and its settings. The correction is the trainer's default for stale rollouts; an adapter's rate is
so many times the demo's own."""
DEFAULT_ARMS = "on_policy,stale,stale_plain"
BASE = "on_policy"
NUM_PARTS = 10
_STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The two-sided 95% quantiles of Student's t with 1 to 9 degrees of freedom."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench_out"), help="folder for policies, records and table")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], metavar="N,N", help="2 to 10 (default: 0,1,2)")
    parser.add_argument(
        "--arms", default=DEFAULT_ARMS, help=f"comma-separated, of {', '.join(ARMS)} (default: %(default)s)"
    )
    parser.add_argument("--updates", type=int, default=50, help="of each run (default: 50, as in the demo)")
    parser.add_argument("--rollouts", type=int, default=256, help="of an update (default: 256)")
    parser.add_argument("--train-problems", type=int, default=NUM_TRAIN_PROBLEMS, help="default: %(default)s")
    parser.add_argument("--test-problems", type=int, default=NUM_TEST_PROBLEMS, help="default: %(default)s")
    parser.add_argument(
        "--warm-start", type=int, default=NUM_WARM_START_PROBLEMS, help="solutions (default: %(default)s)"
    )
    parser.add_argument("--table", action="store_true", help="only write the table of the records that OUT holds")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError where a comparison cannot be made."""
    unknown = [arm for arm in args.arms.split(",") if arm not in ARMS]
    if unknown:
        raise ValueError(f"--arms {unknown[0]} is not one of {', '.join(ARMS)}")
    if BASE not in args.arms.split(","):
        raise ValueError(f"--arms {args.arms} lacks {BASE}, which the others are compared with")
    if not 2 <= len(set(args.seeds)) == len(args.seeds) <= len(_STUDENT_T) + 1:
        raise ValueError(
            f"--seeds needs 2 to {len(_STUDENT_T) + 1} different numbers for an interval, not {len(set(args.seeds))}"
        )
    if args.updates < 2:
        raise ValueError(f"--updates must be at least 2, or no rollout can be stale, not {args.updates}")


# -- the runs --------------------------------------------------------------------------------------------------------------


class CurveLogger:
    """Keeps the figures of every update in memory."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def log(self, step: int, metrics: Mapping[str, float], /) -> None:
        self.rows.setdefault(step, {}).update(metrics)

    def event(self, step: int, message: str, /) -> None:
        say(f"update {step}: {message}")

    def close(self) -> None:
        pass

    def curve(self, name: str) -> list[float]:
        """One figure of every update that logged it, in order."""
        return [row[name] for step, row in sorted(self.rows.items()) if step and name in row]


def demo_config(args: argparse.Namespace, *, seed: int, settings: Mapping[str, float | str]) -> GRPOConfig:
    """The demo's own settings, at this seed, but for the settings of an arm."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    flags = {**DEMO_FLAGS, "--rollouts-per-update": str(args.rollouts), "--train-steps": str(args.updates),
             "--eval-limit": str(args.test_problems), "--save-every": "0", "--seed": str(seed)}  # fmt: skip
    for name, value in settings.items():
        flags[f"--{name.replace('_', '-')}"] = str(value)
    known, _ = parser.parse_known_args([word for flag in flags.items() for word in flag])
    return from_arguments(known)


async def train(
    args: argparse.Namespace, demo_dir: Path, *, seed: int, arm: str, settings: Mapping[str, float | str]
) -> Record:
    """One run of the demo from the policy in `demo_dir`: its reward curve, and greedy accuracy before and after."""
    import torch
    from transformers import AutoModelForCausalLM

    from ludic.rollout.local import LocalEngine
    from ludic.train.trainer import GRPOTrainer

    started = time.perf_counter()
    tokenizer = load_tokenizer(demo_dir / "model")
    model = AutoModelForCausalLM.from_pretrained(demo_dir / "model", dtype=torch.float32)
    environment, curves = GSM8K(system_prompt=DEMO_FLAGS["--system-prompt"]), CurveLogger()
    engine = LocalEngine.from_pretrained(demo_dir / "model")
    try:
        trainer = GRPOTrainer(
            config=demo_config(args, seed=seed, settings=settings),
            model=model,
            model_name=str(demo_dir / "model"),
            tokenizer=tokenizer,
            engine=engine,
            environment=environment,
            train_samples=load("train", dataset=demo_dir),
            eval_samples=load("test", dataset=demo_dir),
            metric_logger=curves,
            paths=RunPaths(out_dir=demo_dir / arm, name="gsm8k"),
        )
        summary = await trainer.run()
    finally:
        await engine.aclose()
        await environment.aclose()
    return {
        "arm": arm,
        "seed": seed,
        "rollouts": summary.rollouts,
        "reward": curves.curve("reward_mean"),
        "zero_variance": curves.curve("zero_variance_share"),
        "truncated": curves.curve("truncation_rate"),
        "staleness": curves.curve("staleness"),
        "accuracy_before": summary.accuracy_before,
        "accuracy_after": summary.accuracy_after,
        "seconds": time.perf_counter() - started,
    }


def settings_of(args: argparse.Namespace) -> Record:
    """What must be equal for two runs to be compared."""
    names = ("updates", "rollouts", "train_problems", "test_problems", "warm_start")
    return {name: getattr(args, name) for name in names}


def run_all(args: argparse.Namespace, records: Records) -> None:
    """Every seed and arm that the records do not hold yet, one after the other."""
    import torch

    torch.set_num_threads(NUM_THREADS)
    settings = settings_of(args)
    done = {(run["arm"], run["seed"]) for run in runs_of(records, settings)}
    records.add("machine", **machine())
    for seed in args.seeds:
        missing = [arm for arm in args.arms.split(",") if (arm, seed) not in done]
        if not missing:
            continue
        demo_dir = args.out / f"learning_seed_{seed}"
        say(f"seed {seed}: warm start of the policy that {len(missing)} arms share")
        build_demo(
            demo_dir,
            seed=seed,
            num_train=args.train_problems,
            num_test=args.test_problems,
            num_warm_start=args.warm_start,
        )
        for arm in missing:
            run = asyncio.run(train(args, demo_dir, seed=seed, arm=arm, settings=ARMS[arm][1]))
            records.add("run", settings=settings, **run)
            say(f"seed {seed}, {ARMS[arm][0]}: {shown(run['accuracy_after'])} after {run['seconds']:.0f} s")


# -- the table -------------------------------------------------------------------------------------------------------------


def runs_of(records: Records, settings: Record) -> list[Record]:
    """The runs with these settings; the last one of an arm and a seed counts."""
    found = {(r["arm"], r["seed"]): r for r in records.all() if r["part"] == "run" and r["settings"] == settings}
    return [found[key] for key in sorted(found)]


def stretches(length: int, count: int = NUM_PARTS) -> list[tuple[int, int]]:
    """`length` updates cut into `count` stretches of equal length as nearly as can be; fewer where there are not as many.

    Example:
        >>> stretches(5, count=2)
        [(0, 2), (2, 5)]
    """
    count = min(count, length)
    return list(itertools.pairwise(length * index // count for index in range(count + 1)))


def parts(curve: Sequence[float]) -> list[float]:
    """The mean of each stretch of a curve."""
    return [statistics.fmean(curve[first:last]) for first, last in stretches(len(curve))]


def by_version(run: Record) -> list[float]:
    """The mean reward of what each version of the policy sampled, but for the last, which stale rollouts do not have.

    Version v has been trained on the rollouts of v updates, whatever their age, so this is learning per rollout without
    the delay by which stale rollouts show it.
    """
    sampled = {
        round(update - age): reward
        for update, (reward, age) in enumerate(zip(run["reward"], run["staleness"], strict=True))
    }
    return [sampled[version] for version in range(len(run["reward"]) - 1)]


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """The two-sided 95% interval of the mean of paired differences, by Student's t."""
    half = _STUDENT_T[len(differences) - 2] * statistics.stdev(differences) / math.sqrt(len(differences))
    mean = statistics.fmean(differences)
    return mean - half, mean + half


def shown(value: float) -> str:
    """A reward or an accuracy as a percentage."""
    return f"{100 * value:.1f}%"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{shown(statistics.fmean(values))} ± {100 * statistics.stdev(values):.1f}"


def sections(runs: Sequence[Record], arms: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """The three tables.

    Raises:
        ValueError: a run is missing.
    """
    by_place = {(run["arm"], run["seed"]): run for run in runs}
    for arm in arms:
        for seed in seeds:
            if (arm, seed) not in by_place:
                raise ValueError(f"there is no run of {arm} with seed {seed}: leave --table out to make it")
    of_arm = {arm: [by_place[arm, seed] for seed in seeds] for arm in arms}
    names = [ARMS[arm][0] for arm in arms]

    curves = {arm: [parts(run["reward"]) for run in of_arm[arm]] for arm in arms}
    decile_rows: list[list[Any]] = [
        [f"{first + 1} to {last}", *(spread([curve[index] for curve in curves[arm]]) for arm in arms)]
        for index, (first, last) in enumerate(stretches(len(of_arm[BASE][0]["reward"])))
    ]
    decile_rows.append(["staleness", *(statistics.fmean(x for r in of_arm[a] for x in r["staleness"]) for a in arms)])

    final_rows: list[list[Any]] = [
        [f"seed {seed}", shown(of_arm[BASE][place]["accuracy_before"]),
         *(shown(of_arm[arm][place]["accuracy_after"]) for arm in arms)]
        for place, seed in enumerate(seeds)
    ]  # fmt: skip
    before = spread([run["accuracy_before"] for run in of_arm[BASE]])
    final_rows.append(["mean", before, *(spread([run["accuracy_after"] for run in of_arm[arm]]) for arm in arms)])

    return [
        f"Mean reward of the rollouts by stretch of updates, mean and standard deviation over {len(seeds)} seeds; at the "
        "end the mean age of the rollouts in updates:",
        markdown_table(["updates", *names], decile_rows),
        "Greedy accuracy on held-out problems:",
        markdown_table(["", "before", *names], final_rows),
        f"Difference from {ARMS[BASE][0]} in points, with its two-sided 95% interval over the pairs of equal seeds:",
        markdown_table(["", *(ARMS[arm][0] for arm in arms if arm != BASE)], difference_rows(of_arm)),
    ]


def difference_rows(of_arm: Mapping[str, Sequence[Record]]) -> list[list[str]]:
    """One row a figure: mean difference from the on-policy arm of the same seed, and the interval."""
    figures: dict[str, Callable[[Record], float]] = {
        "mean reward of all rollouts": lambda run: statistics.fmean(run["reward"]),
        "the same, of each policy version": lambda run: statistics.fmean(by_version(run)),
        "mean reward of the last tenth": lambda run: parts(run["reward"])[-1],
        "final greedy accuracy": lambda run: run["accuracy_after"],
    }
    rows = []
    for name, figure in figures.items():
        cells = [name]
        for arm, runs in of_arm.items():
            if arm != BASE:
                pairs = zip(runs, of_arm[BASE], strict=True)
                differences = [100 * (figure(run) - figure(base)) for run, base in pairs]
                low, high = interval(differences)
                cells.append(f"{statistics.fmean(differences):+.1f} ({low:+.1f} to {high:+.1f})")
        rows.append(cells)
    return rows


def write_table(args: argparse.Namespace, records: Records) -> None:
    """`learning.md` and, with every curve, `learning.json`."""
    runs = runs_of(records, settings_of(args))
    arms = [arm for arm in ARMS if arm in args.arms.split(",")]
    tables = sections(runs, arms, args.seeds)
    on = records.last()["machine"]
    size = f"{args.updates} updates of {args.rollouts} rollouts, {args.test_problems} held-out problems."
    write_report(args.out / "learning.md", "Learning per rollout", on, [size, *tables])
    (args.out / "learning.json").write_text(json.dumps({**on, "settings": settings_of(args), "runs": runs}) + "\n")


def main() -> None:
    args = build_parser().parse_args()
    try:
        check_arguments(args)
        run_or_table("learning", args, run_all, write_table)
    except ValueError as error:
        raise SystemExit(f"learning.py: {error}") from error


if __name__ == "__main__":
    main()
