"""Grader poison: hostile answers among ordinary ones, and what became of each.

    python -m benchmarks.faults.grader [--poison 500] [--ordinary 5000]

An injection is one hostile answer; the promise is kept if the grader came back with a verdict, and no worker had to die
for it but at its deadline. The last injections are about all ordinary answers at once: the
same verdicts as without the poison, none of them a failure, and at least `TARGET_PER_S` of them a second.
"""

import argparse
import asyncio
import logging
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.grader_corpus import Pair, ordinary, poison
from benchmarks.faults.outcome import Injection
from ludic.task.grading import Grader, Verdict

ROW = "grader poison"
TARGET_PER_S = 2_000.0
TARGET = "18"


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """What became of a batch of answers that were handed over all at once."""

    verdicts: list[Verdict]
    seconds: list[float]
    """From when all were handed over to each verdict, by the clock."""


async def grade(grader: Grader, pairs: list[Pair]) -> Graded:
    """All at once, in their order."""
    start = time.perf_counter()

    async def timed(pair: Pair) -> tuple[Verdict, float]:
        verdict = await grader.match(*pair)
        return verdict, time.perf_counter() - start

    done = await asyncio.gather(*map(timed, pairs))
    return Graded(verdicts=[verdict for verdict, _ in done], seconds=[seconds for _, seconds in done])


async def _try(count: int, num_ordinary: int, seed: int, timeout_s: float) -> tuple[Graded, Graded, list[str]]:
    """(ordinary answers alone; the poison and then the ordinary answers; the kinds of poison)"""
    hostile = list(poison(count, seed))
    plain = ordinary(num_ordinary, seed)
    graded = []
    for pairs in (plain, [(answer, TARGET) for _, answer in hostile] + plain):
        grader = Grader(timeout_s=timeout_s)  # A fresh one each time: sympy remembers.
        try:
            await grader.match("(9*2)", TARGET)  # From here on its workers are up.
            graded.append(await grade(grader, pairs))
        finally:
            await grader.aclose()
    return graded[0], graded[1], [kind for kind, _ in hostile]


def inject(
    count: int, *, seed: int, folder: Path, num_ordinary: int = 5_000, timeout_s: float = 5.0
) -> list[Injection]:
    """`count` hostile answers, handed over in front of `num_ordinary` ordinary ones. `folder` stays empty.

    The two last injections are rates, and missed where the machine has other work to do.
    """
    alone, together, kinds = asyncio.run(_try(count, num_ordinary, seed, timeout_s))
    injections = []
    for kind, verdict, seconds in zip(kinds, together.verdicts, together.seconds, strict=False):
        outcome = verdict.failure or ("right, by its text" if verdict.matched else "wrong")
        injections.append(
            Injection(
                row=ROW, fault=kind, outcome=outcome.replace("_", " "), ok=verdict.failure != "crash", seconds=seconds
            )
        )
    plain, plain_seconds = together.verdicts[count:], together.seconds[count:]
    changed = sum(before != after for before, after in zip(alone.verdicts, plain, strict=True))
    failed = sum(verdict.failure is not None for verdict in plain)
    return [
        *injections,
        Injection(
            row=ROW,
            fault=f"{num_ordinary:,} ordinary answers behind the poison",
            outcome=f"{changed} other verdicts than without it, {failed} failures",
            ok=changed == failed == 0,
            seconds=max(plain_seconds),
        ),
        _rate("without poison", alone.seconds),
        _rate("behind the poison", plain_seconds),
    ]


def _rate(when: str, seconds: list[float]) -> Injection:
    rate = len(seconds) / max(seconds)
    ordered = sorted(seconds)
    p50, p99 = (ordered[int(len(ordered) * share)] for share in (0.5, 0.99))
    return Injection(
        row=ROW,
        fault=f"rate of ordinary answers {when}",
        outcome=f"{rate:,.0f} a second; p50 {p50:.2f} s, p99 {p99:.2f} s after all were handed over",
        ok=rate >= TARGET_PER_S,
        seconds=max(seconds),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--poison", type=int, default=500, help="hostile answers")
    parser.add_argument("--ordinary", type=int, default=5_000, help="ordinary answers")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.getLogger("ludic").setLevel(logging.ERROR)  # It warns of each answer that it gives up.
    injections = inject(args.poison, seed=args.seed, folder=Path(), num_ordinary=args.ordinary)
    hostile = injections[: args.poison]
    for outcome, num in Counter(injection.outcome for injection in hostile).most_common():
        kinds = Counter(injection.fault for injection in hostile if injection.outcome == outcome)
        print(f"{num:6} {outcome}: {', '.join(kind for kind, _ in kinds.most_common(6))}")
    print(
        f"{max((injection.seconds or 0.0 for injection in hostile), default=0.0):6.1f} s until the last of the poison"
    )
    for injection in injections[args.poison :]:
        print(f"{'ok' if injection.ok else 'MISSED':>6} {injection.fault}: {injection.outcome}")


if __name__ == "__main__":
    main()
