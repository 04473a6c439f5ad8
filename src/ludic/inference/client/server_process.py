"""Runs ludic's vLLM server as a child process: start it, wait until it is healthy, start it again, and leave nothing behind.

`ServerProcess` is the parent's half; `end_with_parent` is the server's, which `vllm_server` calls first thing. Nothing here
imports vLLM or torch. Left out: deciding when a server is to be started again, which is `survival.recovery`'s; and several
servers at once, which are `vllm_engines`' and, for a trainer that starts them, `run.engine`'s.
"""

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from ludic.inference import cleanup
from ludic.rollout.errors import EngineError, ServerLostError

PARENT_PID_VARIABLE = "LUDIC_SERVER_PARENT_PID"
SHUTDOWN_GRACE_S = 10.0
KILL_WAIT_S = 10.0
PORT_WAIT_S = 30.0
ORPHAN_GRACE_S = 5
POLL_S = 0.25
PROGRESS_S = 1.0
ERROR_LINES = 10
ENDING_WAIT_S = 5.0
"""For the process of a server that cut its connections: it may take a moment to end."""
LOG_TAIL_BYTES = 1 << 20

# What torchrun tells its children about their process group; vLLM would take it for its own.
_TORCHRUN_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


class ServerStartError(EngineError):
    """The server did not come up. The message ends with its own last error lines and the path of its log."""


class ServerProcess:
    """`python -m ludic.inference.vllm_server` as a child process, which can be started again with the same flags and port.

    As a context manager it is up for the length of the block.

    `start`, `stop` and `restart` block; call them in a thread where there is an event loop. `stop` and `close` may be called
    from any thread, also while another one is in `start`, which then raises.

    Args:
        model: a model folder, or a name on the hub.
        port: None takes a free one, and keeps it.
        gpu: which of the GPUs that this process may use; None leaves the choice to vLLM.
        api_key: handed over in the environment, so it shows in no process list.
        extra_args: further flags of the server, as on its command line.
        log_path: everything that the server prints; overwritten by the first start, appended to by restarts.
        timeout_s: how long it may take to become healthy, in seconds.
        on_progress: called about once a second while it loads, with the seconds so far and the words of its last log
            line. What it raises ends the start.
        env: variables to set for the server beside this process's own.
    """

    def __init__(
        self,
        model: str,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        gpu: int | None = None,
        api_key: str | None = None,
        extra_args: Sequence[str] = (),
        log_path: str | Path = "vllm_server.log",
        timeout_s: float = 900.0,
        on_progress: Callable[[float, str], None] | None = None,
        python: str = sys.executable,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.host = host
        self.port = free_port(host) if port is None else port
        self.base_url = f"http://{reachable(host)}:{self.port}"
        self.log_path = Path(log_path).absolute()
        self.num_restarts = 0
        self._command = [python, "-m", "ludic.inference.vllm_server", "--model", model, "--host", host]
        self._command += ["--port", str(self.port), *extra_args]
        self._env = child_environment({**os.environ, **(env or {})}, host=host, gpu=gpu, api_key=api_key)
        self._timeout_s = timeout_s
        self._on_progress = on_progress
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._lock = threading.Lock()
        self._interrupted = False
        self._closed = False

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        """The child process of the last start."""
        if self._process is None:
            raise RuntimeError("the server was not started yet: call start()")
        return self._process

    @property
    def pid(self) -> int:
        """Its process id, which is also that of its process group."""
        return self.process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process exists. It may still be stopped, or hang: only an answer says that it works."""
        return self._process is not None and self._process.poll() is None

    def ending(self, wait_s: float = 0.0) -> str | None:
        """How it ended, the last of its log and where that is, in one line; None while it runs, after `wait_s` seconds."""
        if self._process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=wait_s)
        if self._process.returncode is None:
            return None
        words = " | ".join(line.strip() for line in self.last_words(3).splitlines())
        return f"the vLLM server {how_it_ended(self._process.returncode)}; it said: {words} (its whole log: {self.log_path})"

    def __enter__(self) -> Self:
        """Start it. Within the block an error of a lost server says how this one ended."""
        self.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.explain_loss(kind, error, trace)
        finally:
            self.close()

    def explain_loss(self, kind: object, error: BaseException | None, trace: object) -> None:
        """As the end of a block: in place of the error of a lost server, raise one that says how this one ended, if it did."""
        if isinstance(error, ServerLostError) and (ending := self.ending(wait_s=ENDING_WAIT_S)) is not None:
            raise type(error)(ending) from error

    def last_words(self, limit: int = ERROR_LINES) -> str:
        """The lines that say what went wrong since the last start, by `last_error_lines`."""
        try:
            return last_error_lines(self._end_of_log(), limit)
        except OSError as error:
            return f"(its log cannot be read: {error.strerror})"

    def _end_of_log(self) -> str:
        with self.log_path.open("rb") as log:
            log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            return log.read().decode(errors="replace")

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            ServerStartError: the port is taken, the server ended, was not healthy in time, or `stop` was called meanwhile.
        """
        require_free_port(self.host, self.port)
        self._start("wb", b"")

    def restart(self, reason: str) -> None:
        """End what is left of it, also when it hangs or is stopped, and start it again with the same flags and port.

        The log goes on, after a line with the date and the `reason`.

        Raises:
            ServerStartError: as `start`; also when the old process, or its port, did not go.
        """
        self.stop()
        if self.is_running:
            raise ServerStartError(
                f"the server's process {self.pid} does not end, not even by SIGKILL: it hangs in the kernel, most likely in "
                "the GPU's driver. Look at dmesg and nvidia-smi; the machine may have to be restarted"
            )
        require_free_port(self.host, self.port, wait_s=PORT_WAIT_S)
        self.num_restarts += 1
        now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        line = f"\n--- {now}: start {self.num_restarts + 1} of this server, {' '.join(reason.split())} ---\n"
        self._start("ab", line.encode(errors="replace"))

    def stop(self) -> None:
        """End the server, politely at first, and then whatever is left of its process group. Safe to call twice."""
        with self._lock:
            self._interrupted = True
            process = self._process
        if process is None:
            return
        end_process(process)

    def close(self) -> None:
        """`stop`, for good: a start in another thread ends, and there is no further one."""
        with self._lock:
            self._closed = True
        self.stop()

    def _start(self, mode: str, first_line: bytes) -> None:
        with self.log_path.open(mode) as log, self._lock:
            if self._closed:
                raise ServerStartError("the server is not started: this run is ending")
            log.write(first_line)
            log.flush()
            self._log_start = log.tell()
            self._interrupted = False
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                # Ctrl-C in the terminal reaches the parent alone, and the whole tree is one process group.
                start_new_session=True,
            )
        try:
            self._wait_until_healthy(self._process)
        except BaseException:
            self.stop()
            raise

    def _wait_until_healthy(self, process: "subprocess.Popen[bytes]") -> None:
        started = time.monotonic()
        next_progress_s = PROGRESS_S
        while not is_healthy(self.base_url):
            seconds = time.monotonic() - started
            if self._interrupted:
                raise ServerStartError("the start of the server was interrupted")
            if process.poll() is not None:
                raise self._failure(how_it_ended(process.returncode))
            if seconds > self._timeout_s:
                raise self._failure(f"was not healthy after {self._timeout_s:.0f} s")
            if self._on_progress is not None and seconds >= next_progress_s:
                self._on_progress(seconds, next(filter(None, reversed(_plain_lines(self._end_of_log()))), ""))
                next_progress_s = seconds + PROGRESS_S
            time.sleep(POLL_S)

    def _failure(self, what: str) -> ServerStartError:
        return ServerStartError(
            f"the vLLM server {what}; it said:\n{self.last_words()}\n(its whole log: {self.log_path})"
        )


start_server = ServerProcess
"""`with start_server(model) as server:` reads as what it does."""


def end_process(process: "subprocess.Popen[bytes]") -> None:
    """End a process that leads its group, politely at first, and then whatever is left of the group."""
    if process.poll() is None:
        cleanup.end_group_politely(process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=SHUTDOWN_GRACE_S)
    cleanup.kill_group(process.pid)
    with contextlib.suppress(subprocess.TimeoutExpired):  # what hangs in the kernel cannot be waited for
        process.wait(timeout=KILL_WAIT_S)


def free_port(host: str) -> int:
    """A TCP port on `host` that is free now."""
    with _socket_for(host) as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])


def require_free_port(host: str, port: int, *, wait_s: float = 0.0) -> None:
    """Raise ServerStartError in one line if, after `wait_s` seconds, something listens on `port`, or there is no such address."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            with _socket_for(host) as sock:
                sock.setsockopt(
                    socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
                )  # as the server: old connections do not count
                sock.bind((host, port))
                return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ServerStartError(
                    f"cannot listen on {host}:{port} ({error.strerror}): stop what runs there, or choose another --port"
                ) from error
        time.sleep(POLL_S)


def last_error_lines(log: str, limit: int = ERROR_LINES) -> str:
    """The lines of a vLLM log that say what went wrong: each exception's message, without tracebacks and prefixes.

    The cause stands before what followed from it. Where there is no exception, the last lines of the log.
    """
    lines = _plain_lines(log)
    found: list[str] = []
    for index, line in enumerate(lines):
        if not _EXCEPTION.match(line) and not _ERROR.search(line):
            continue
        # A message may go on over indented lines (pydantic's do).
        block = [line]
        for following in lines[index + 1 : index + 4]:
            if not following.startswith(" ") or following.lstrip().startswith(("File ", "^", "~")):
                break
            block.append(following)
        found += [part for part in block if part not in found]
    return "\n".join((found or [line for line in lines if line])[-limit:])


# "(EngineCore pid=12) ERROR 11-22 20:58:38 [core.py:1150] " before each line of a process's log.
_PREFIX = re.compile(r"^(\([^)]*pid=\d+\) ?)?((DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\] ?)?")
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit|Failure)(:|$)")
_ERROR = re.compile(r"\berror: |Segmentation fault|^Killed\b|out of memory", re.IGNORECASE)


def _plain_lines(log: str) -> list[str]:
    """The lines without their prefixes. Empty ones stay: they end a message, and what is indented behind them is not of it."""
    return [_PREFIX.sub("", line).rstrip() for line in log.splitlines()]


def how_it_ended(returncode: int) -> str:
    """Of a process, in words."""
    if returncode >= 0:
        return f"ended with code {returncode}"
    name = next((number.name for number in signal.Signals if number == -returncode), f"signal {-returncode}")
    return f"was ended by {name}" + (" (the kernel sends it where memory runs out)" if name == "SIGKILL" else "")


def end_with_parent() -> None:
    """In a server that `ServerProcess` made: when the parent is gone, end this process group, children and all.

    First as SIGTERM does, so that vLLM frees its shared memory, then by force. Elsewhere it does nothing.
    """
    parent_pid = os.environ.pop(PARENT_PID_VARIABLE, None)
    if parent_pid is None:
        return
    # A process and not a thread: a server that is stopped, or hangs in C code, has no thread that runs.
    reaper = subprocess.Popen(
        [sys.executable, "-I", "-S", cleanup.__file__, parent_pid, str(os.getpgrp()), str(ORPHAN_GRACE_S)],
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # outside the group that it ends
    )
    _reapers.append(reaper)


_reapers: "list[subprocess.Popen[bytes]]" = []  # kept: a Popen that is dropped while its process runs is warned of


def is_healthy(base_url: str, path: str = "/health") -> bool:
    """Whether the server answers 200 there."""
    # No proxies: a proxy variable must not stand between the trainer and its own server.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{base_url}{path}", timeout=5) as response:
            return bool(response.status == 200)
    # What answers may be no HTTP server, and even this very call: a connection to a port of the range that callers get theirs
    # from, on which nothing listens yet, can be joined to itself, and then reads its own request.
    except (OSError, http.client.HTTPException):
        return False


def child_environment(
    inherited: Mapping[str, str], *, host: str, gpu: int | None, api_key: str | None
) -> dict[str, str]:
    """The environment of a server that this process starts, and that ends with it."""
    env = {name: value for name, value in inherited.items() if name not in _TORCHRUN_VARIABLES}
    env[PARENT_PID_VARIABLE] = str(os.getpid())
    env["PYTHONUNBUFFERED"] = "1"
    for name in ("NO_PROXY", "no_proxy"):
        env[name] = ",".join(filter(None, [env.get(name, ""), "127.0.0.1", "localhost", "::1", host]))
    if api_key is not None:
        env["VLLM_API_KEY"] = api_key
    if gpu is not None:
        env["CUDA_VISIBLE_DEVICES"] = _visible_gpu(gpu, env.get("CUDA_VISIBLE_DEVICES"))
    return env


def _visible_gpu(gpu: int, visible: str | None) -> str:
    """The entry of CUDA_VISIBLE_DEVICES for the GPU that this process knows as number `gpu`."""
    if visible is None:
        return str(gpu)
    devices = [device.strip() for device in visible.split(",") if device.strip()]
    if gpu >= len(devices):
        raise ValueError(f"gpu {gpu} does not exist here: CUDA_VISIBLE_DEVICES is {visible!r}, {len(devices)} in all")
    return devices[gpu]


def _socket_for(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)


def reachable(host: str) -> str:
    """The address to call a server that listens on `host`, as it is written in a URL."""
    address = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{address}]" if ":" in address else address
