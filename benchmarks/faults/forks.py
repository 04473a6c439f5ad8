"""Runs of the training script as forks of one process that has imported everything: an import takes longer than a run.

`ForkServer.run` starts one run, kills it where a `Kill` says so, and returns what became of it. The server forks before
torch has started a thread, and the fork is the script's process in all that matters: its own session, its own standard
streams, `run_script` and the script's own `main`; `phases` has what happens in it.

    python -m benchmarks.faults.forks         is the server's side: JSON lines in, JSON lines out
"""

import contextlib
import importlib
import importlib.util
import json
import mmap
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from benchmarks.faults.phases import PHASES, ROOT, SCRIPT, Kill, Run, Surroundings, be_the_script

RUN_LIMIT_S = 180.0
AGAIN_S = 1.5
WORKERS_END_S = 8.0
"""What a grading worker whose parent is gone may take to end."""


class ForkServer:
    """A process that forks runs, for the length of a `with` block.

    Args:
        folder: for what the runs print, `runs.log`, and the server's own files.
        env: variables set for the server beside this process's own.
    """

    def __init__(self, folder: Path, env: Mapping[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "runs.log"
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        # One thread: torch's results must not depend on the number of cores, and a fork takes no thread along.
        fixed = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        fixed |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "PYTHONPATH": path}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.faults.forks", str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, **fixed, **(env or {})},
                text=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def run(self, flags: Sequence[str], *, kill: Kill | None = None, surroundings: Surroundings | None = None) -> Run:
        """Run the training script with `flags`, and wait for its end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        around = asdict(surroundings or Surroundings())
        request = {"flags": list(flags), "kill": asdict(kill) if kill else None, "surroundings": around}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply = self._process.stdout.readline()
        if not reply:
            raise RuntimeError(f"the fork server ended with {self._process.wait()}; see {self.log}")
        return Run(**json.loads(reply))


# --- the server's side ------------------------------------------------------------------------------------------------


def serve(folder: Path) -> None:
    """Answer requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the runs print goes to the log
    script = _import_everything()
    with (folder / "phase").open("w+b") as file:
        file.write(bytes(mmap.PAGESIZE))
        file.flush()
        with mmap.mmap(file.fileno(), mmap.PAGESIZE) as shared:
            for line in sys.stdin:
                replies.write(json.dumps(asdict(_run(script, json.loads(line), shared, folder))) + "\n")
                replies.flush()


def _import_everything() -> ModuleType:
    for name in ("matplotlib.pyplot", "transformers.models.qwen2.modeling_qwen2", "ludic.run.training", "ludic.rollout.local",
                 "ludic.train.trainer"):  # fmt: skip
        importlib.import_module(name)
    spec = importlib.util.spec_from_file_location("train_gsm8k", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(SCRIPT.parent))
    spec.loader.exec_module(script)
    return script


def _run(script: ModuleType, request: dict[str, Any], shared: mmap.mmap, folder: Path) -> Run:
    kill = Kill(**request["kill"]) if request["kill"] else None
    shared[0] = 0
    around = Surroundings(**request["surroundings"])
    ours, theirs = os.pipe()
    needs_terminal = around.streams == "terminal" or (kill is not None and kill.how == "terminal closed")
    terminal = pty.openpty() if needs_terminal else None
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        be_the_script(script, request["flags"], around, kill, shared, folder, theirs, terminal)
    os.close(theirs)
    master = None
    if terminal is not None:
        master = terminal[0]
        os.close(terminal[1])
    status, struck, ended = _attend(pid, ours, master, kill, started + RUN_LIMIT_S)
    phase, seconds = PHASES[shared[0]], time.monotonic() - started
    path = folder / "phases.json"
    phases = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    path.unlink(missing_ok=True)
    left = _left_of(pid)
    code = os.waitstatus_to_exitcode(status)
    ended_s = ended - struck[-1] if struck else None
    return Run(
        returncode=code,
        phase=phase,
        seconds=seconds,
        ended_s=ended_s,
        num_signals=len(struck),
        left=left,
        phases=phases,
    )


def _attend(
    pid: int, ready: int, master: int | None, kill: Kill | None, until: float
) -> tuple[int, list[float], float]:
    """Read what a run writes to its terminal, kill it when it is time, wait for its end; its status and the moments."""
    process = os.pidfd_open(pid)
    watched = {process, ready} if master is None else {process, ready, master}
    moments = [until]  # of the next signals, and last of the end of all patience
    struck: list[float] = []
    try:
        while True:
            found, _, _ = select.select(watched, [], [], max(0.0, moments[0] - time.monotonic()))
            if master in found and not _read_some(master):
                watched.discard(master)
            if ready in found:
                watched.discard(ready)
                if kill is not None and os.read(ready, 1):
                    first = time.monotonic() + kill.delay_s
                    moments = [first, first + AGAIN_S, until] if kill.stuck else [first, until]
            if process in found:
                return os.waitpid(pid, 0)[1], struck, time.monotonic()
            if time.monotonic() < moments[0]:
                continue
            moments.pop(0)
            if kill is None or not moments:
                os.kill(pid, signal.SIGALRM)  # told apart from a kill on purpose
                moments = [time.monotonic() + 10.0]
                continue
            if kill.how == "terminal closed" and master is not None:
                watched.discard(master)
                os.close(master)
                master = None
            else:
                os.kill(pid, signal.SIGHUP if kill.how == "terminal closed" else signal.Signals[kill.how])
            struck.append(time.monotonic())
    finally:
        for descriptor in (process, ready, master):
            if descriptor is not None:
                os.close(descriptor)


def _read_some(master: int | None) -> bool:
    """What somebody at the terminal does; one whose other side is gone gives EIO."""
    assert master is not None
    try:
        return bool(os.read(master, 65536))
    except OSError:
        return False


def _left_of(session: int) -> int:
    deadline = time.monotonic() + WORKERS_END_S
    while left := len(_session_members(session)):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return left


def _session_members(session: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, _, its_session, *_ = path.read_text(errors="replace").rpartition(")")[2].split()
            if int(its_session) == session and state not in "ZX":
                found.append(int(path.parent.name))
    return found


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
