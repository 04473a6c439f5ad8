"""A run of the training script from the inside: in which phase it is, where it dies, and what it finds around it.

`be_the_script` is what a fork of `forks` becomes. The hooks are put in here, in the run's own process, so that the code that
is shipped knows nothing of them: they tell the phase through a byte of shared memory, and kill the process where the instant
cannot be met from outside: between two changes of the file system, at a call of a function, in the middle of a log line.
"""

import asyncio
import contextlib
import fcntl
import functools
import itertools
import json
import mmap
import os
import random
import signal
import sys
import termios
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, Literal

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "gsm8k" / "train_gsm8k.py"

PHASES = (
    "elsewhere",
    "generation",
    "backward",
    "optimizer step",
    "sync",
    "evaluation",
    "checkpoint",
    "log line",
    "end",
)
"""What the training process is in; the innermost one counts. `elsewhere` is around all others: the start, tidying up after
an earlier kill, and between the rest. A random instant in it is one of the whole run."""


SHORT = ("optimizer step", "sync")
"""Over before a signal from outside arrives: in these, the process kills itself, at a call of a function."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """Where a run is killed: in the `occurrence`-th time (from 0) that it is in `phase`, by SIGKILL if not said otherwise.

    There, `delay_s` after it began; or before its `event`-th change of the file system, in a short phase its `event`-th call
    of a function; or with `torn` of a log line
    written, which is a fraction of 1.
    """

    phase: str
    occurrence: int = 0
    delay_s: float = 0.0
    event: int | None = None
    torn: float | None = None
    how: Literal["SIGKILL", "SIGINT", "SIGTERM", "SIGHUP", "terminal closed"] = "SIGKILL"
    stuck: bool = False
    """From the signal on every save takes for ever, and the signal comes again `forks.AGAIN_S` later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a run finds around it, where that is not as usual."""

    streams: Literal["log", "closed", "terminal", "broken pipe"] = "log"
    umask: int = 0o022
    env: dict[str, str] = field(default_factory=dict)
    """Set in the run, after the imports; `TZ` counts."""
    cwd: str = str(ROOT)
    clock: Literal["", "forward", "backward", "to and fro"] = ""
    """How `time.time` jumps by three days in the middle of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What became of one run."""

    returncode: int
    """-9: killed."""
    phase: str
    """That it was in at its end."""
    seconds: float
    ended_s: float | None = None
    """From the last signal to the end."""
    num_signals: int = 0
    left: int = 0
    """Processes of the run's session that were there after it, `forks.WORKERS_END_S` later."""
    phases: list[tuple[str, float, int]] = field(default_factory=list)
    """For a run that ended by itself: each phase with its length in seconds and the number of its events, as in `Kill`."""


def random_kill(rng: random.Random, profile: Run, phase: str) -> Kill:
    """A random instant in a random occurrence of `phase`, as a run that was not killed went through it."""
    lengths = [(seconds, events) for name, seconds, events in profile.phases if name == phase]
    occurrence = rng.randrange(len(lengths))
    seconds, events = lengths[occurrence]
    if phase == "log line":
        return Kill(phase=phase, occurrence=occurrence, torn=rng.random())
    if phase in SHORT or (phase == "checkpoint" and rng.random() < 0.7):
        return Kill(phase=phase, occurrence=occurrence, event=rng.randrange(events))
    return Kill(phase=phase, occurrence=occurrence, delay_s=rng.uniform(0.0, seconds))


def be_the_script(
    script: ModuleType,
    flags: list[str],
    around: Surroundings,
    kill: Kill | None,
    shared: mmap.mmap,
    folder: Path,
    ready: int,
    terminal: tuple[int, int] | None,
) -> None:
    """Never returns."""
    code = 1
    try:
        os.setsid()
        _surround(around, terminal)
        # As the system hands them over: bytes in UTF-8, whatever this interpreter takes them for.
        sys.argv = [str(SCRIPT), *(os.fsdecode(flag.encode()) for flag in flags)]
        phases = _Phases(kill, shared, ready)
        _put_hooks_in(phases)
        if kill is not None and kill.how != "SIGKILL":
            _start_a_grading_worker()
        from ludic.cli import run_script

        try:
            with phases("elsewhere"):
                run_script("train_gsm8k.py", script.main)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        text = json.dumps(phases.seen)
        (folder / "phases.json").write_text(text, encoding="utf-8")
    except BaseException:
        traceback.print_exc()  # nobody else will
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(code)


def _surround(around: Surroundings, terminal: tuple[int, int] | None) -> None:
    os.chdir(around.cwd)
    os.umask(around.umask)
    os.environ.update(around.env)
    time.tzset()
    if terminal is not None:
        fcntl.ioctl(terminal[1], termios.TIOCSCTTY, 0)
        for descriptor in (0, 1, 2):
            os.dup2(terminal[1], descriptor)
        os.close(terminal[0])
        os.close(terminal[1])
    elif around.streams == "broken pipe":
        read, write = os.pipe()
        os.dup2(write, 1)
        os.close(read)
        os.close(write)
    elif around.streams == "closed":
        sys.stdin = sys.stdout = None  # as Python finds them then
        os.close(0)
        os.close(1)
    if around.clock:
        _bend_clock(around.clock)


def _bend_clock(how: str) -> None:
    """From the 40th look at the clock on it is three days later, or earlier, or both in turn."""
    right, looks = time.time, itertools.count()

    def bent() -> float:
        look = next(looks)
        days = {"forward": 3, "backward": -3, "to and fro": 3 if look // 10 % 2 else -3}[how]
        return right() + (days * 86_400 if look >= 40 else 0)

    time.time = bent


def _was_interrupted() -> bool:
    from ludic.survival import signals

    return any(interrupts.caught is not None for interrupts in signals._catching)


def _start_a_grading_worker() -> None:
    from ludic.task.grading import answers_match

    assert answers_match("x + 1", "1 + x")  # takes algebra


class _Phases:
    """Tells the server which phase the process is in, and when the one to be killed in has begun."""

    def __init__(self, kill: Kill | None, shared: mmap.mmap, ready: int) -> None:
        self.seen: list[tuple[str, float, int]] = []
        self._kill, self._shared, self._ready = kill, shared, ready
        self._count = dict.fromkeys(PHASES, 0)
        self._events = 0
        self._armed = False
        sys.addaudithook(self._audit)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        kill, outer = self._kill, self._shared[0]
        self._shared[0] = PHASES.index(name)
        started, events = time.perf_counter(), self._events
        target = kill is not None and kill.phase == name and self._count[name] == kill.occurrence
        self._count[name] += 1
        if kill is not None and target:
            if kill.event is None and kill.torn is None:
                os.write(self._ready, b"!")
            self._armed, self._events, events = True, 0, 0
        if name in SHORT:
            sys.setprofile(self._call)
        try:
            if name == "checkpoint" and kill is not None and kill.stuck and _was_interrupted():
                time.sleep(600)
            yield
        finally:
            if name in SHORT:
                sys.setprofile(None)
            if target:
                self._armed = False
            self.seen.append((name, time.perf_counter() - started, self._events - events))
            self._shared[0] = outer

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not writes and event not in (
            "os.rename",
            "os.mkdir",
            "os.remove",
            "os.rmdir",
            "shutil.rmtree",
            "os.truncate",
        ):
            return
        self._event()

    def _call(self, frame: FrameType, what: str, argument: object) -> None:
        if what.endswith("call"):
            self._event()

    def _event(self) -> None:
        if self._armed and self._kill is not None and self._kill.event == self._events:
            os.kill(os.getpid(), signal.SIGKILL)
        self._events += 1

    def tear(self, descriptor: int, line: bytes) -> None:
        """Write a part of a log line and die, if that is what is to happen here."""
        if self._armed and self._kill is not None and self._kill.torn is not None:
            os.write(descriptor, line[: round(self._kill.torn * len(line))])
            os.kill(os.getpid(), signal.SIGKILL)


def _put_hooks_in(phases: _Phases) -> None:
    from ludic.rollout import local
    from ludic.run import ending, training
    from ludic.storage import jsonl
    from ludic.train import trainer
    from ludic.train.learner import Learner

    def wrap(owner: Any, name: str, phase: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)
        if asyncio.iscoroutinefunction(inner):

            @functools.wraps(inner)
            async def outer_async(*args: Any, **kwargs: Any) -> Any:
                with phases(phase):
                    return await inner(*args, **kwargs)

            setattr(owner, name, outer_async)
            return

        @functools.wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            with phases(phase):
                return inner(*args, **kwargs)

        setattr(owner, name, outer)

    wrap(local.LocalEngine, "_decode_rows", "generation")
    wrap(Learner, "accumulate", "backward")
    wrap(Learner, "step", "optimizer step")
    wrap(local, "_hand_over", "sync")
    wrap(trainer.GRPOTrainer, "_evaluate", "evaluation")
    wrap(trainer, "save_checkpoint", "checkpoint")
    wrap(training, "finish", "end")
    ending.save_reward_curve = lambda *args, **kwargs: None  # type: ignore[attr-defined]  # a picture takes two seconds
    append = jsonl.JsonlFile.append

    def append_or_tear(self: jsonl.JsonlFile, record: Mapping[str, object]) -> None:
        with phases("log line"):
            phases.tear(self._descriptor, jsonl.encode_line(record))
            append(self, record)

    jsonl.JsonlFile.append = append_or_tear  # type: ignore[method-assign]
