"""Ctrl-C, a cluster's notice, a lost connection: the trainer stops in good order, or keeps what it has.

A run of `train_gsm8k.py --engine local` gets SIGINT, SIGTERM or SIGHUP, or loses its terminal, at a random instant of a
chosen phase. It has to end within 10 s with 128 plus the signal's number, leave a checkpoint of its last finished update and
no process, and resumed it has to end as the run that was never touched. In half of the runs every save hangs, as on a disk
that does not answer: then a second signal has to end it at once, and the last checkpoint has to be whole.

    python -m benchmarks.faults.signals --count 40 --out runs/signals
"""

import argparse
import contextlib
import json
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from benchmarks.faults.outcome import Injection
from benchmarks.faults.phases import Kill, Run, random_kill
from benchmarks.faults.trainer_killed import (
    CHECKPOINTS,
    METRICS,
    PlainRun,
    damage,
    differences,
    make_task,
    plain_run,
    resumed,
)
from ludic.train.checkpoint import checkpoint_step, latest_checkpoint

ROW = "signals and terminal"
LIMIT_S = 10.0
AT_ONCE_S = 2.0
"""What leaving at once may take on a machine with other work."""

How = Literal["SIGINT", "SIGTERM", "SIGHUP", "terminal closed"]
HOWS: tuple[How, ...] = get_args(How)
PHASES = ("generation", "backward", "optimizer step", "sync", "evaluation", "checkpoint", "elsewhere")


def inject(
    count: int, *, seed: int, folder: Path, policy: Path, problems: Path, plain: PlainRun | None = None
) -> list[Injection]:
    """Interrupt `count` runs, each once or, if its saves hang, twice.

    Args:
        folder: removed first.
        policy, problems, plain: as in `trainer_killed.inject`.
    """
    rng = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    injections = []
    with contextlib.ExitStack() as stack:
        plain = plain or stack.enter_context(plain_run(folder, policy, problems))
        for number in range(count):
            how, stuck = HOWS[number % len(HOWS)], number % 2 == number // len(HOWS) % 2
            kill = random_kill(rng, plain.profile, PHASES[number % len(PHASES)])
            kill = replace(kill, how=how, stuck=stuck, event=None, torn=None)
            out_dir = folder / f"run_{number}"
            injections.append(_one_run(plain, out_dir, kill))
            if injections[-1].ok:
                shutil.rmtree(out_dir, ignore_errors=True)
    return injections


def _one_run(plain: PlainRun, out_dir: Path, kill: Kill) -> Injection:
    flags = [*plain.flags, "--logger", "print", "--out-dir", str(out_dir)]
    run = plain.server.run(flags, kill=kill)
    problems = damage(out_dir) + _broken_promises(run, kill, out_dir)
    if not problems:
        again = plain.server.run(resumed(flags, out_dir))
        ended = again.returncode
        problems = [f"resumed, it ended with {ended}"] if ended else differences(plain.out_dir, out_dir)
    fault = f"{kill.how}, twice, while every save hangs" if kill.stuck else f"{kill.how} in: {kill.phase}"
    promised = "left at once, last checkpoint whole" if kill.stuck else "saved its last update, ended in time"
    outcome = "; ".join(problems) or f"{promised}; resumed, bit for bit"
    return Injection(row=ROW, fault=fault, outcome=outcome, ok=not problems, seconds=run.ended_s)


def _broken_promises(run: Run, kill: Kill, out_dir: Path) -> list[str]:
    if run.ended_s is None:
        return [] if run.returncode == 0 else [f"ended with {run.returncode} before the signal"]
    found = []
    number = signal.SIGHUP if kill.how == "terminal closed" else signal.Signals[kill.how]
    if run.returncode != 128 + number and not (run.returncode == 0 and run.num_signals == 1):  # just done
        found.append(f"ended with {run.returncode}, not with {128 + number}")
    limit_s = AT_ONCE_S if run.num_signals > 1 else LIMIT_S
    if run.ended_s > limit_s:
        found.append(f"took {run.ended_s:.1f} s to end, more than {limit_s:.0f} s")
    if run.left:
        found.append(f"left {run.left} processes")
    if not kill.stuck and _saved(out_dir) != _finished(out_dir):
        found.append(f"update {_finished(out_dir)} was finished, {_saved(out_dir)} is saved")
    return found


def _finished(out_dir: Path) -> int:
    path = out_dir / METRICS
    rows = [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    return max((row["step"] for row in rows if "reward_mean" in row), default=0)


def _saved(out_dir: Path) -> int:
    checkpoint = latest_checkpoint(out_dir / CHECKPOINTS)
    return 0 if checkpoint is None else checkpoint_step(checkpoint) or 0


def main() -> None:
    """Make a policy, inject, print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="a folder of its own (default: a temporary one)")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="ludic-signals-"))
    policy, problems = make_task(out / "task")
    injections = inject(args.count, seed=args.seed, folder=out / "runs", policy=policy, problems=problems)
    for (fault, outcome), times in sorted(Counter((each.fault, each.outcome) for each in injections).items()):
        slowest = max(each.seconds or 0.0 for each in injections if (each.fault, each.outcome) == (fault, outcome))
        sys.stdout.write(f"{times:4d}  {fault:<45} {outcome} (slowest {slowest:.2f} s)\n")
    kept = sum(each.ok for each in injections)
    sys.stdout.write(f"{kept} of {len(injections)} as promised\n")
    sys.exit(kept < len(injections))


if __name__ == "__main__":
    main()
