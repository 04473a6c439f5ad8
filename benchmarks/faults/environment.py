"""A run must not depend on what is around it: clock, locale, terminal, hash seed, folder, or how its process was started.

The same seeded run of `train_gsm8k.py --engine local` under each of them, compared with a plain one as `trainer_killed`
compares: metrics apart from times, rollouts, and the checkpoint bit for bit. What the interpreter reads once, at its start
(locale, hash seed, UTF-8 mode), is set for a fork server each; the rest for each of its runs.

Left out: a jump of the machine's own clock, which takes a machine of one's own. `time.time` is made to jump instead; every
deadline and duration is to be taken from `time.monotonic` or `time.perf_counter`, which do not. And a folder whose name the
locale's encoding does not have: safetensors does not write there.

    python -m benchmarks.faults.environment --out runs/environment
"""

import argparse
import contextlib
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.forks import ForkServer
from benchmarks.faults.outcome import Injection
from benchmarks.faults.phases import ROOT, SCRIPT, Surroundings
from benchmarks.faults.trainer_killed import PlainRun, differences, make_task, plain_run

ROW = "clock, locale, terminal, hash seed, start method"

_NO_UTF8 = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
INTERPRETERS: dict[str, dict[str, str]] = {
    "as in the plain run": {},  # on its server
    "LC_ALL=C without UTF-8 mode, PYTHONHASHSEED=1": {**_NO_UTF8, "LC_ALL": "C", "PYTHONHASHSEED": "1"},
    "PYTHONHASHSEED=0": {"PYTHONHASHSEED": "0"},
    "PYTHONHASHSEED=random": {"PYTHONHASHSEED": "random"},
    "LC_ALL=C.UTF-8": {"LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "2"},
    "LC_ALL=tr_TR.UTF-8": {**_NO_UTF8, "LC_ALL": "tr_TR.UTF-8", "LANGUAGE": "tr"},
    "PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1": {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"},
}
SURROUNDINGS: dict[str, Surroundings] = {
    "everything at once": Surroundings(
        streams="closed", umask=0o077, env={"TZ": "Asia/Kathmandu", "TERM": "dumb"}, clock="to and fro"
    ),
    "a clock that jumps forward": Surroundings(clock="forward"),
    "a clock that jumps backward": Surroundings(clock="backward"),
    "a clock that jumps to and fro": Surroundings(clock="to and fro"),
    "TZ=Asia/Kathmandu": Surroundings(env={"TZ": "Asia/Kathmandu"}),
    "a terminal": Surroundings(streams="terminal", env={"TERM": "xterm-256color"}),
    "a terminal of 20 columns": Surroundings(streams="terminal", env={"TERM": "xterm", "COLUMNS": "20", "LINES": "5"}),
    "a dumb terminal": Surroundings(streams="terminal", env={"TERM": "dumb"}),
    "no reader of standard output": Surroundings(streams="broken pipe"),
    "standard input and output closed": Surroundings(streams="closed"),
    "umask 077": Surroundings(umask=0o077),
    "another working directory": Surroundings(cwd="/"),
}
START_METHODS = ("fork", "spawn", "forkserver")
AWKWARD_NAME = "a run, and 100 % of it"
FOREIGN_NAME = f"{AWKWARD_NAME}: ğ İ ş 模型 🙂"

# A file, since spawn and forkserver import the main module again.
_STARTER = """\
import multiprocessing
import runpy
import sys


def go(script, flags):
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    process = multiprocessing.get_context(sys.argv[1]).Process(target=go, args=(sys.argv[2], sys.argv[3:]))
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


def inject(
    count: int, *, seed: int, folder: Path, policy: Path, problems: Path, plain: PlainRun | None = None
) -> list[Injection]:
    """The first `count` of all combinations of interpreter and surroundings, and then of the start methods.

    Args:
        folder: removed first.
        policy, problems, plain: as in `trainer_killed.inject`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    injections = []
    with contextlib.ExitStack() as stack:
        plain = plain or stack.enter_context(plain_run(folder, policy, problems))
        flags = [*plain.flags, "--logger", "rich"]
        started = time.monotonic()
        for fault, problem in _runs(count, random.Random(seed), folder, flags, plain):
            outcome = problem or "equal to the plain run, bit for bit"
            now = time.monotonic()
            injections.append(Injection(row=ROW, fault=fault, outcome=outcome, ok=not problem, seconds=now - started))
            started = now
    return injections


def _runs(count: int, rng: random.Random, folder: Path, flags: list[str], plain: PlainRun) -> Iterator[tuple[str, str]]:
    """What was around each run, and in what it differed, "" if in nothing."""
    methods = START_METHODS if count > len(START_METHODS) else ()
    around = list(itertools.product(INTERPRETERS, SURROUNDINGS))[: count - len(methods)]
    for name, group in itertools.groupby(around, key=lambda pair: pair[0]):
        env = INTERPRETERS[name]
        with ForkServer(folder / "interpreter", env) if env else contextlib.nullcontext(plain.server) as server:
            for _, what in group:
                # Half of the runs in a folder whose name every layer has to take.
                names = [AWKWARD_NAME if "PYTHONUTF8" in env else FOREIGN_NAME, "usual"]
                out_dir = folder / names[what != "everything at once" and rng.random() < 0.5]
                run = server.run([*flags, "--out-dir", str(out_dir)], surroundings=SURROUNDINGS[what])
                ended = "" if run.returncode == 0 else f"ended with {run.returncode}"
                yield f"{name}; {what}", ended or "; ".join(differences(plain.out_dir, out_dir))
                shutil.rmtree(out_dir, ignore_errors=True)
    for method in methods:
        yield f"started by {method}", _started_by(method, folder, flags, plain.out_dir)


def _started_by(method: str, folder: Path, flags: list[str], reference: Path) -> str:
    starter, out_dir = folder / "starter.py", folder / method
    starter.write_text(_STARTER, encoding="utf-8")
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    fixed = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    command = [sys.executable, str(starter), method, str(SCRIPT), *flags, "--out-dir", str(out_dir)]
    done = subprocess.run(command, env={**os.environ, **fixed}, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        return f"ended with {done.returncode}: {done.stderr[-300:]}"
    return "; ".join(differences(reference, out_dir))


def main() -> None:
    """Make a policy, run it everywhere, print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=87)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="a folder of its own (default: a temporary one)")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="ludic-environment-"))
    policy, problems = make_task(out / "task")
    injections = inject(args.count, seed=args.seed, folder=out / "runs", policy=policy, problems=problems)
    for (fault, outcome), times in Counter((each.fault, each.outcome) for each in injections).items():
        sys.stdout.write(f"{times:4d}  {fault:<80} {outcome}\n")
    kept = sum(each.ok for each in injections)
    sys.stdout.write(f"{kept} of {len(injections)} as promised\n")
    sys.exit(kept < len(injections))


if __name__ == "__main__":
    main()
