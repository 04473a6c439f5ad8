"""The command line of `python -m ludic.compare`."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from ludic.compare.evaluations import Evaluations, compare_evaluations
from ludic.compare.paired import Paired
from ludic.compare.runs import Run, Runs, compare_runs, is_run, read_run
from ludic.completion import add_completion_argument
from ludic.storage.inert import inert
from ludic.versions import add_version_argument


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ludic.compare",
        description="Says which of two is better, by how much, and whether that is more than chance.",
        epilog="A and B are either records of evaluations (gsm8k_eval.jsonl), compared problem by problem, or --out-dir "
        "folders of finished training runs, compared seed by seed.",
    )
    parser.add_argument(
        "a",
        metavar="A",
        help="the baseline: a records file, or --out-dir folders with commas between them, one per seed",
    )
    parser.add_argument("b", metavar="B", help="the candidate, of the same kind")
    add_completion_argument(parser)
    add_version_argument(parser)
    group = parser.add_argument_group("comparison")
    group.add_argument("--rule", help="of two evaluations: the rule of the verdict (default: the environment's first)")
    group.add_argument(
        "--accuracy",
        type=float,
        help="for runs: the accuracy to which seconds and rollouts are counted (default: the lower final accuracy)",
    )
    group.add_argument("--json", action="store_true", help="print one JSON object in place of the tables")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """0 where a comparison was made; 2, with one line, where it could not be."""
    args = build_parser().parse_args(argv)
    paths_a, paths_b = ([Path(name).expanduser() for name in side.split(",")] for side in (args.a, args.b))
    console = Console(highlight=False, markup=False)
    try:
        if all(is_run(path) for path in [*paths_a, *paths_b]):
            _compare_runs(console, [read_run(path) for path in paths_a], [read_run(path) for path in paths_b], args)
        else:
            _compare_evaluations(console, _one_file(paths_a), _one_file(paths_b), args)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"python -m ludic.compare: error: {inert(str(error))}\n")
        return 2
    return 0


def _one_file(paths: Sequence[Path]) -> Path:
    if len(paths) > 1 or not paths[0].is_file():
        names = ",".join(map(str, paths))
        raise ValueError(f"{names}: name one records file of an evaluation, or folders of finished training runs")
    return paths[0]


# -- two evaluations -------------------------------------------------------------------------------------------------------


def _compare_evaluations(console: Console, a: Path, b: Path, args: argparse.Namespace) -> None:
    result = compare_evaluations(a, b, rule=args.rule)
    if args.json:
        sys.stdout.write(json.dumps(dataclasses.asdict(result) | {"format_gain": result.format_gain}) + "\n")
        return
    _say_sides(console, [a], [b])
    if result.num_only_in_a or result.num_only_in_b:
        console.print(
            f"left out: {result.num_only_in_a} problems that only A has, {result.num_only_in_b} that only B has"
        )
    table = Table(
        "rule",
        *(_right(name) for name in ("A", "B", "B - A", "95% CI", "won", "lost", "tied", "p")),
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name, one in result.by_rule.items():
        table.add_row(
            inert(name), _percent(one.accuracy_a), _percent(one.accuracy_b), *_difference(one),
            *map(str, (one.won, one.lost, one.tied)), _p(one.p_value),
        )  # fmt: skip
    console.print(table)
    if result.differing_sampling:
        console.print(_sampling_warning(result), soft_wrap=True)
    console.print(evaluations_verdict(result), soft_wrap=True)


def _sampling_warning(result: Evaluations) -> str:
    named = ", ".join(
        f"{name} ({inert(str(a))}, {inert(str(b))})" for name, (a, b) in result.differing_sampling.items()
    )
    return f"warning: the evaluations differ in {named}: the difference may come from that and not from the model"


def evaluations_verdict(result: Evaluations) -> str:
    """The sentence under the table."""
    rule, one = next(iter(result.by_rule.items()))
    lines = [f"By the rule {inert(rule)}, on {one.num_problems:,} problems: {_verdict(one)}"]
    if result.format_gain and (of_strict := result.by_rule["strict"].difference) != 0:
        of_format, of_reasoning = _points(result.format_gain), _points(of_strict - result.format_gain)
        lines.append(
            f"Of the strict rule's {_points(of_strict)}, {of_format} are format (whether the answer is where it was asked for) "
            f"and {of_reasoning} are reasoning (by the flexible rule)."
        )
    return "\n".join(lines)


def _verdict(one: Paired) -> str:
    if one.num_more_problems == 0:
        better = "B is better" if one.difference > 0 else "A is better"
        return f"{better} by {abs(one.difference) * 100:.1f} points (p {_p(one.p_value)})."
    if one.num_more_problems is None:
        return "no difference was seen."
    more = f"about {one.num_more_problems:,} more problems would tell, if the true difference equals the observed one"
    return f"not yet distinguishable: {more}."


# -- two sets of training runs ---------------------------------------------------------------------------------------------


def _compare_runs(console: Console, a: Sequence[Run], b: Sequence[Run], args: argparse.Namespace) -> None:
    result = compare_runs(a, b)
    accuracy = min(result.accuracy_a, result.accuracy_b) if args.accuracy is None else args.accuracy
    if args.json:
        reached = {name: [_reached(run, accuracy) for run in side] for name, side in (("a", a), ("b", b))}
        sys.stdout.write(json.dumps(dataclasses.asdict(result) | {"accuracy": accuracy, "reached": reached}) + "\n")
        return
    _say_sides(console, [run.path for run in a], [run.path for run in b])
    headers = ("seeds", "final accuracy", f"seconds to {_percent(accuracy)}", f"rollouts to {_percent(accuracy)}")
    table = Table("", *map(_right, headers), box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name, side in (("A", a), ("B", b)):
        finals = ", ".join(_percent(run.final.accuracy) for run in side)
        table.add_row(name, str(len(side)), finals, *_cost(side, accuracy))
    console.print(table)
    console.print(runs_verdict(result, num_seeds=min(len(a), len(b))), soft_wrap=True)


def _cost(side: Sequence[Run], accuracy: float) -> tuple[str, str]:
    """Seconds and rollouts to `accuracy`, means over the seeds, all of which must have reached it."""
    first = [one for run in side if (one := run.reached(accuracy)) is not None]
    if len(first) < len(side):
        return "not reached", "not reached"
    return f"{fmean(one.seconds for one in first):,.1f}", f"{fmean(one.rollouts for one in first):,.0f}"


def _reached(run: Run, accuracy: float) -> dict[str, float] | None:
    one = run.reached(accuracy)
    return None if one is None else dataclasses.asdict(one)


def runs_verdict(result: Runs, *, num_seeds: int) -> str:
    """The sentences under the table."""
    low, high = result.difference_ci95
    first = f"B - A: {_points(result.difference)} ({low * 100:+.1f} to {high * 100:+.1f})"
    if result.p_value is None:
        why = "one seed says nothing of the spread over seeds" if num_seeds < 2 else "the seeds do not differ at all"
        return (
            f"{first}, an interval over problems alone: {why}. Train more seeds, or evaluate both last checkpoints and compare "
            "the records, which pairs the problems."
        )
    first += f", p {_p(result.p_value)} by Welch's t-test over seeds."
    if result.num_more_seeds == 0:
        return f"{first} {'B' if result.difference > 0 else 'A'} is better."
    if result.num_more_seeds is None:
        return f"{first} No difference was seen."
    return f"{first} Not yet distinguishable: about {result.num_more_seeds:,} more seeds of each would tell."


# -- words -----------------------------------------------------------------------------------------------------------------


def _say_sides(console: Console, a: Sequence[Path], b: Sequence[Path]) -> None:
    for name, paths in (("A", a), ("B", b)):
        console.print(f"{name}: {inert(', '.join(map(str, paths)))}", soft_wrap=True)


def _right(name: str) -> Column:
    return Column(name, justify="right")


def _percent(rate: float) -> str:
    return f"{rate:.1%}"


def _points(difference: float) -> str:
    return f"{difference * 100:+.1f} points"


def _difference(one: Paired) -> tuple[str, str]:
    low, high = one.difference_ci95
    return f"{one.difference * 100:+.1f}", f"{low * 100:+.1f} to {high * 100:+.1f}"


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-4 else "< 0.0001"


if __name__ == "__main__":
    sys.exit(main())
