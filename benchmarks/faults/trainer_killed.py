"""The trainer killed with SIGKILL at random instants: resumed, it must end as the run that was never killed.

A run of `train_gsm8k.py --engine local` on a tiny policy is killed in a chosen phase (see `phases.PHASES`), resumed with
`--resume`, mostly killed again, and in the end left to finish. Then everything is compared with the uninterrupted run:
metrics apart from times, rollouts line by line, and the last checkpoint file by file, which is bit for bit. After every kill
the checkpoints that are there must verify, and every line of the logs but a torn last one must be JSON.

    python -m benchmarks.faults.trainer_killed --count 60 --out runs/killed
"""

import argparse
import contextlib
import itertools
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.faults.forks import ForkServer
from benchmarks.faults.outcome import Injection
from benchmarks.faults.phases import PHASES, Kill, Run, random_kill
from ludic.train.checkpoint import CheckpointError, list_checkpoints, read_state, verify_checkpoint

ROW = "trainer killed"
MAX_KILLS = 3
"""Of one run."""
UPDATES = 6
FLAGS = [
    *("--engine", "local", "--rollouts-per-update", "16", "--group-size", "8", "--max-seq-len", "160"),
    *("--micro-token-budget", "640", "--max-tokens", "12", "--lr", "3e-3", "--warmup-steps", "2", "--eval-limit", "8"),
    *("--eval-every", "2", "--logger", "none", "--train-steps", str(UPDATES)),
]
METRICS, ROLLOUTS, CHECKPOINTS = "gsm8k_train_metrics.jsonl", "gsm8k_train_rollouts.jsonl", "checkpoints_gsm8k"
_TIMED = re.compile(r"time|.*(_s|seconds)")
_NOT_COMPARED = {"manifest.json", "trainer_state.json"}  # the state's `seconds` differ, and with them the manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainRun:
    """A run that nothing happened to, which the others are compared with, and the server that it ran on."""

    server: ForkServer
    flags: list[str]
    """All but --out-dir."""
    out_dir: Path
    profile: Run


@contextlib.contextmanager
def plain_run(
    folder: Path, policy: Path, problems: Path, *, max_staleness: int = 0, save_every: int = 1
) -> Iterator[PlainRun]:
    """Start a fork server in `folder` and let it make the plain run.

    Args:
        policy, problems: a model folder, and one with train.jsonl and test.jsonl.

    Raises:
        RuntimeError: the run failed; see the log that it names.
    """
    flags = ["--model", str(policy), "--dataset", str(problems), *FLAGS]
    flags += ["--max-staleness", str(max_staleness), "--save-every", str(save_every)]
    out_dir = folder / "plain"
    with ForkServer(folder) as server:
        profile = server.run([*flags, "--out-dir", str(out_dir)])
        if profile.returncode != 0:
            raise RuntimeError(f"the run that nothing happens to ended with {profile.returncode}; see {server.log}")
        yield PlainRun(server=server, flags=flags, out_dir=out_dir, profile=profile)


def inject(
    count: int,
    *,
    seed: int,
    folder: Path,
    policy: Path,
    problems: Path,
    max_staleness: int = 0,
    save_every: int = 1,
    phases: Sequence[str] = PHASES,
    plain: PlainRun | None = None,
) -> list[Injection]:
    """Kill runs `count` times in all, in the phases in turn; one injection a kill, named after the phase it met.

    Args:
        folder: removed first.
        policy, problems: as in `plain_run`.
        plain: one that there is already, with its staleness and frequency of saving.
    """
    rng = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    injections: list[Injection] = []
    with contextlib.ExitStack() as stack:
        if plain is None:
            made = plain_run(folder, policy, problems, max_staleness=max_staleness, save_every=save_every)
            plain = stack.enter_context(made)
        turn = in_turn(rng, phases)
        for number in itertools.count():
            if len(injections) >= count:
                break
            out_dir = folder / f"run_{number}"
            kills = min(rng.randint(1, MAX_KILLS), count - len(injections))
            met = _one_run(plain, out_dir, rng, [next(turn) for _ in range(kills)])
            injections += met
            if all(each.ok for each in met):  # what failed stays to be looked at
                shutil.rmtree(out_dir, ignore_errors=True)
    return injections


def in_turn(rng: random.Random, phases: Sequence[str]) -> Iterator[str]:
    while True:
        yield from rng.sample(list(phases), len(phases))


def _one_run(plain: PlainRun, out_dir: Path, rng: random.Random, phases: list[str]) -> list[Injection]:
    """Kill a run in each of `phases` and let it finish; an injection for each kill that met it."""
    flags = [*plain.flags, "--out-dir", str(out_dir)]
    met: list[str] = []
    problems: list[str] = []
    started = time.monotonic()
    for phase in phases:
        run = plain.server.run(
            resumed(flags, out_dir), kill=_early(random_kill(rng, plain.profile, phase), again=bool(met))
        )
        if run.returncode != -9:
            if run.returncode != 0:
                problems.append(f"a resumed run ended with {run.returncode}")
            break  # a resumed run has less to do, and may end before it meets its kill
        met.append(run.phase)
        problems += [f"after a kill in {run.phase}: {problem}" for problem in damage(out_dir)]
    else:
        run = plain.server.run(resumed(flags, out_dir))
        if run.returncode != 0:
            problems.append(f"the last run ended with {run.returncode}")
    problems += differences(plain.out_dir, out_dir) if not problems else []
    outcome = "; ".join(problems) or "resumed, equal to the run that was not killed, bit for bit"
    seconds = (time.monotonic() - started) / max(len(met), 1)
    return [
        Injection(row=ROW, fault=f"SIGKILL in: {phase}", outcome=outcome, ok=not problems, seconds=seconds)
        for phase in met
    ]


def _early(kill: Kill, *, again: bool) -> Kill:
    """A kill that a resumed run, which goes through fewer phases, is likely to meet."""
    return replace(kill, occurrence=kill.occurrence // 4) if again else kill


def resumed(flags: list[str], out_dir: Path) -> list[str]:
    names = [path.parent.name for path in (out_dir / CHECKPOINTS).glob("*/manifest.json")]
    found = any(re.fullmatch(r"step_\d+|\.step_\d+\.replaced", name) for name in names)
    return [*flags, "--resume"] if found else flags


def damage(out_dir: Path) -> list[str]:
    """What a kill must not leave behind."""
    found = []
    for checkpoint in list_checkpoints(out_dir / CHECKPOINTS):
        try:
            verify_checkpoint(checkpoint)
        except CheckpointError as error:
            found.append(str(error))
    for name in (METRICS, ROLLOUTS):
        path = out_dir / name
        *lines, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
        found += [f"{name}: line {number} is not JSON" for number, line in enumerate(lines, 1) if not _is_json(line)]
    return found


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def differences(reference: Path, out_dir: Path) -> list[str]:
    """In what a finished run differs from the reference, apart from times; [] if in nothing."""
    found = []
    for name in (METRICS, ROLLOUTS):
        ours, theirs = (_without_times(folder / name) for folder in (out_dir, reference))
        if ours != theirs:
            first = next(
                (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False), 1) if a != b), "past the end of one"
            )
            found.append(f"{name} differs, first in line {first} ({len(ours)} lines, {len(theirs)} of the reference)")
    ours, theirs = ([path.name for path in list_checkpoints(folder / CHECKPOINTS)] for folder in (out_dir, reference))
    if ours[-len(theirs) :] != theirs:  # a run that was killed before it removed an older one leaves that
        return [*found, f"the checkpoints are {ours}, not {theirs}"]
    for checkpoint in theirs:
        found += _differing_files(reference / CHECKPOINTS / checkpoint, out_dir / CHECKPOINTS / checkpoint)
    return [*found, *damage(out_dir)]


def _differing_files(theirs: Path, ours: Path) -> list[str]:
    paths = {
        path.relative_to(folder)
        for folder in (theirs, ours)
        for path in folder.rglob("*")
        if path.is_file() and path.name not in _NOT_COMPARED
    }
    found = [
        f"{ours.name}/{path} differs" for path in sorted(paths) if _content(ours / path) != _content(theirs / path)
    ]
    if _untimed(asdict(read_state(ours))) != _untimed(asdict(read_state(theirs))):
        found.append(f"the trainer's state in {ours.name} differs")
    return found


def _content(path: Path) -> Any:
    """What is compared of a file: all of it, but for the order in which safetensors happens to write its metadata."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        end = 8 + int.from_bytes(content[:8], "little")
        return json.loads(content[8:end]), content[end:]
    return content


def _without_times(path: Path) -> list[Any]:
    """The lines of a log, but for times, and for the event that tells of a terminal that was closed."""
    records = [_untimed(json.loads(line)) for line in path.read_bytes().splitlines()]
    return [
        record for record in records if not str(record.get("event", "")).startswith("the log on standard output failed")
    ]


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(item) for key, item in value.items() if not _TIMED.fullmatch(key)}
    return [_untimed(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    """Make a policy, inject, print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="a folder of its own (default: a temporary one)")
    parser.add_argument("--max-staleness", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=1)
    parser.add_argument("--phases", nargs="*", default=PHASES, choices=PHASES)
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="ludic-killed-"))
    policy, problems = make_task(out / "task")
    injections = inject(
        args.count,
        seed=args.seed,
        folder=out / "runs",
        policy=policy,
        problems=problems,
        max_staleness=args.max_staleness,
        save_every=args.save_every,
        phases=args.phases,
    )
    for (fault, outcome), times in sorted(Counter((each.fault, each.outcome) for each in injections).items()):
        sys.stdout.write(f"{times:4d}  {fault:<30} {outcome}\n")
    kept = sum(each.ok for each in injections)
    seconds = sum(each.seconds or 0.0 for each in injections)
    sys.stdout.write(f"{kept} of {len(injections)} as promised, {seconds:.0f} s\n")
    sys.exit(kept < len(injections))


def make_task(folder: Path) -> tuple[Path, Path]:
    """The digit policy of the tests, and its problems."""
    from tests.conftest import make_digit_policy, write_digit_problems

    folder.mkdir(parents=True, exist_ok=True)
    write_digit_problems(folder / "train.jsonl", 12)
    write_digit_problems(folder / "test.jsonl", 32)
    return make_digit_policy(folder / "model", tie_word_embeddings=True), folder


if __name__ == "__main__":
    main()
