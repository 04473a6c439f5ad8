"""`--server-engines N`: N of ludic's servers on the same GPU, started, watched and ended by one command.

With a small model, decoding is limited by one Python thread in each server, not by the GPU; N servers have N such threads.
Each engine is a whole server on a port of its own, with its share of the memory; the first is the address of all, and tells
a trainer the ports of the others (`engines_route`). This process holds no GPU, and serves nothing itself.

Left out: starting an engine again (the trainer goes on with the others), and spreading requests: the trainer has each
engine's load and must prove each engine's weights, so it talks to all of them.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import NoReturn

from ludic.inference.client.server_process import (
    child_environment,
    end_process,
    how_it_ended,
    is_healthy,
    last_error_lines,
    reachable,
)
from ludic.inference.server.engines_route import ALONE, ENGINES_VARIABLE
from ludic.inference.server.server_help import fail, is_cpu_build
from ludic.storage.keys import KEY_VARIABLES

ENGINE_VARIABLE = "LUDIC_SERVER_ENGINE"
"""Set for a server that is one of several engines: it takes its share of the memory, and starts no others."""
POLL_S = 0.25
TAIL_LINES = 400
ERROR_LINES = 3
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Engine:
    """One engine: a process group of its own, whose lines appear on standard output behind its name."""

    def __init__(self, name: str, url: str, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.name, self.url, self.is_over = name, url, False
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(env),
            start_new_session=True,  # Ctrl-C in the terminal reaches this process alone
        )
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._copying = threading.Thread(target=self._copy, daemon=True)
        self._copying.start()

    def ending(self) -> str | None:
        """How it ended, in one line; None while it runs."""
        if self.process.poll() is None:
            return None
        self._copying.join(timeout=1.0)  # the last lines
        words = last_error_lines("".join(self._tail), ERROR_LINES).splitlines()
        return f"{self.name} {how_it_ended(self.process.returncode)}; it said: {' | '.join(map(str.strip, words))}"

    def _copy(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                text = line.decode(errors="replace")
                self._tail.append(text)
                _write(self.name, text)


def serve_engines(
    argv: Sequence[str], args: argparse.Namespace, keys: Sequence[str], *, python: str = sys.executable
) -> NoReturn:
    """Start the engines, and stay until a signal or until all have ended. What is wrong with the flags was said before.

    Args:
        argv: the command line, which every engine gets, with a port of its own.
        args: what it says, by ludic's own parser or by vLLM's.
        keys: those that came in the environment are handed on in the environment.
    """
    for number in _ENDING_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, _leave)
    urls = engine_urls(args)
    env = child_environment(os.environ, host=args.host or "", gpu=None, api_key=None) | {ENGINE_VARIABLE: "1"}
    if not args.api_key_file:
        env |= dict(zip(KEY_VARIABLES, keys, strict=False))
    engines: list[_Engine] = []
    try:
        for wave in start_order(args):
            for index in wave:
                command = [python, "-m", "ludic.inference.vllm_server", *argv, "--port", str(args.port + index)]
                more = {ENGINES_VARIABLE: json.dumps(urls)} if index == 0 else {}
                engines.append(_Engine(f"engine {index + 1}", urls[index], command, env | more))
            _wait_until_healthy(engines, len(urls))
        while not is_healthy(urls[0]):  # so that the first engine has seen all of them before one may be lost
            _wait_until_healthy(engines, len(urls))
            time.sleep(POLL_S)
        _say(f"{len(urls)} engines are up; their address is {urls[0]}")
        _watch(engines)
        fail(f"none of {len(urls)} engines is left")
    finally:
        for number in _ENDING_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # what is left to do has an end of its own
        _end(engines)


def engine_urls(args: argparse.Namespace) -> list[str]:
    """The address of each engine, the first one that of all."""
    return [f"http://{reachable(args.host or '')}:{args.port + index}" for index in range(args.server_engines)]


def start_order(args: argparse.Namespace) -> list[list[int]]:
    """Which engines start at the same time, one list after the other is up.

    vLLM measures the free memory of the GPU while it starts, and takes another engine's start for its own use, unless the KV
    cache is fixed; and what the first engine compiles, the others find in the cache.
    """
    on_cpu, every = is_cpu_build(), list(range(args.server_engines))
    if not on_cpu and args.kv_cache_memory_bytes is None:
        return [[index] for index in every]
    is_eager = on_cpu if args.enforce_eager is None else args.enforce_eager
    return [every] if is_eager else [every[:1], every[1:]]


def _wait_until_healthy(engines: Sequence[_Engine], num_engines: int) -> None:
    """Until all that were started are; one that ends ends the command with one line."""
    waiting = list(engines)
    while waiting:
        for engine in engines:
            if (ending := engine.ending()) is not None:
                fail(f"of {num_engines} engines, {ending}")
        waiting = [one for one in waiting if not is_healthy(one.url, f"/health?{ALONE}")]
        time.sleep(POLL_S if waiting else 0.0)


def _watch(engines: Sequence[_Engine]) -> None:
    """Say of each engine that it has ended, until all have."""
    running = list(engines)
    while running:
        time.sleep(POLL_S)
        for engine in list(running):
            if (ending := engine.ending()) is not None:
                running.remove(engine)
                end_process(engine.process)  # what is left of its group, while the number is still its own
                engine.is_over = True
                _say(f"{ending} ({len(running)} of {len(engines)} engines are left)")


def _end(engines: Sequence[_Engine]) -> None:
    left = [engine for engine in engines if not engine.is_over]
    ending = [threading.Thread(target=end_process, args=(engine.process,)) for engine in left]
    for thread in ending:
        thread.start()
    for thread in ending:
        thread.join()


def _leave(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _say(line: str) -> None:
    _write("engines ", line + "\n")


_writing = threading.Lock()


def _write(name: str, line: str) -> None:
    """A line behind its writer's name. Where nobody reads any more, the engines are still emptied of their lines."""
    with _writing:
        try:
            sys.stdout.write(f"{name} | {line}" if line.endswith("\n") else f"{name} | {line}\n")
            sys.stdout.flush()
        except (OSError, ValueError):
            return
