"""What the peers share: prompts, reward, JSON lines, and an end that always comes.

Each peer prints one JSON line per update (`kind: update`), a last one with its settings and versions (`kind: summary`),
and, when it fails, one with the reason (`kind: error`) before it ends. Nothing here imports a peer.

The reward is `benchmarks.harness.hash_reward`, as for ludic: a trainer that skips groups without variance is not measured
on less work.
"""

import json
import os
import platform
import shlex
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import active_children
from pathlib import Path
from typing import NoReturn

from benchmarks.harness import hash_reward
from environments.gsm8k import GSM8K, load
from ludic.inference.client.server_process import is_healthy
from ludic.types import ChatMessage

JSONValue = str | int | float | bool | None | Mapping[str, "JSONValue"] | Sequence["JSONValue"]

WARMUP_UPDATES = 2
"""Printed, but marked: kernels are chosen, the allocator grows, and in an asynchronous trainer a process comes up."""

HEALTH_INTERVAL_S = 5.0
HEALTH_FAILURES = 3
"""A server at work can be late with one answer, not with three."""

PACKAGES = ("torch", "transformers", "trl", "vllm", "accelerate", "datasets", "liger-kernel")


def conversation_reward(completions: Sequence[Sequence[Mapping[str, str]]], **_unused: object) -> list[float]:
    """`hash_reward` as a reward function of TRL: one conversation a completion, the model's turn first."""
    return [hash_reward(turns[0]["content"]) for turns in completions]


def gsm8k_prompts(dataset: str | Path, limit: int) -> list[list[ChatMessage]]:
    """The first `limit` problems of GSM8K's training split, in the order of the file, as the trainer of ludic asks them."""
    environment = GSM8K()
    return [environment.messages(sample) for sample in load("train", dataset=dataset, limit=limit)]


def installed_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def machine_name() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"CPU, {os.cpu_count()} cores"
    return torch.cuda.get_device_name(0)


class JSONLines:
    """Records as JSON lines on standard output and, because libraries print there too, in a file of their own."""

    def __init__(self, peer: str, out: Path | None = None) -> None:
        self.peer = peer
        self.updates: list[Mapping[str, JSONValue]] = []
        self._out = out
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text("")

    def update(self, record: Mapping[str, JSONValue]) -> None:
        """One update. `warmup` is added: true for the first `WARMUP_UPDATES`."""
        record = {"warmup": len(self.updates) < WARMUP_UPDATES, **record}
        self.updates.append(record)
        self._write("update", record)

    def summary(self, settings: Mapping[str, JSONValue]) -> None:
        """The last line: settings, versions, machine, and the median of each figure over the updates after the warm-up."""
        measured = [record for record in self.updates if not record["warmup"]]
        figures: dict[str, list[float]] = {}
        for record in measured:
            for name, value in record.items():
                if isinstance(value, int | float) and name not in ("warmup", "step"):
                    figures.setdefault(name, []).append(value)
        self._write(
            "summary",
            {
                "updates_measured": len(measured),
                "medians": {name: statistics.median(values) for name, values in figures.items()},
                "settings": settings,
                "versions": installed_versions(),
                "machine": machine_name(),
                "command": shlex.join(["python", *sys.argv]),
            },
        )

    def error(self, reason: str) -> None:
        self._write("error", {"reason": reason, "updates_done": len(self.updates), "versions": installed_versions()})

    def _write(self, kind: str, record: Mapping[str, JSONValue]) -> None:
        line = json.dumps({"kind": kind, "peer": self.peer, **record}) + "\n"
        sys.stdout.write(line)
        sys.stdout.flush()
        if self._out is not None:
            with self._out.open("a") as file:
                file.write(line)


def run_to_the_end(
    main: Callable[[], None], lines: JSONLines, *, max_seconds: float, server: str | None = None
) -> NoReturn:
    """Run `main` and leave the process: status 0; 1 with the reason printed; 3 after `max_seconds` or without a server.

    A trainer that hangs, hangs in a collective or in an HTTP request which no exception reaches (one of them asks a server
    that has died for most of an hour), and a trainer that fails leaves threads waiting in them. So a thread watches the
    time and the health of `server`, and the process is left by `os._exit`, after its child processes have been ended.
    """
    leaving = threading.Lock()

    def watch() -> None:
        reason = _wait_for_trouble(server, deadline=time.monotonic() + max_seconds)
        if leaving.acquire(blocking=False):
            lines.error(f"{reason or f'not done after {max_seconds:g} s'}; the stacks are on standard error")
            _print_stacks()
            leave(3)

    threading.Thread(target=watch, name="watch", daemon=True).start()
    try:
        main()
        status = 0
    except KeyboardInterrupt:
        lines.error("interrupted")
        status = 130
    except Exception as error:
        # Everything: the machine is lent for minutes, and a failure must say what it was and give the machine back.
        traceback.print_exc()
        lines.error(describe(error))
        status = 1
    leaving.acquire()  # never given back: when the watch came first, it is leaving
    leave(status)


def _wait_for_trouble(server: str | None, *, deadline: float) -> str | None:
    """Return None at the deadline, or before it the reason why nothing more will come: the server was up, and is not."""
    failures, was_healthy = 0, False
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, HEALTH_INTERVAL_S))
        if server is None:
            continue
        healthy = is_healthy(server)
        was_healthy = was_healthy or healthy
        failures = 0 if healthy or not was_healthy else failures + 1
        if failures == HEALTH_FAILURES:
            return f"the server at {server} is not healthy any more"
    return None


def describe(error: BaseException) -> str:
    """An exception with its causes on one line: `RuntimeError: outer <- ValueError: inner`."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None and len(parts) < 5:
        parts.append(f"{type(current).__name__}: {' '.join(str(current).split())[:500]}")
        current = current.__cause__ or current.__context__
    return " <- ".join(parts)


def _print_stacks() -> None:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        sys.stderr.write(f"--- thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}")
    sys.stderr.flush()


def leave(status: int) -> NoReturn:
    """End this process and its children now, whatever their threads wait for."""
    for child in active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
