"""Runs ludic's vLLM server as a child process: start it, wait until it is healthy, and leave nothing behind.

The parent's half is `start_server`; the server's half is `end_with_parent`, which `vllm_server` calls first thing, so that
a server goes even when its parent is killed without a chance to clean up. Nothing here imports vLLM or torch. Left out on
purpose: restarts and several servers. A server that dies is an error for a person to read, and its log says why.
"""

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ludic.inference.errors import EngineError

PARENT_PID_VARIABLE = "LUDIC_SERVER_PARENT_PID"
SHUTDOWN_GRACE_S = 10.0
ORPHAN_GRACE_S = 5
POLL_S = 0.25
PROGRESS_S = 1.0
ERROR_LINES = 10

# What torchrun tells its children about their process group; vLLM would take it for its own.
_TORCHRUN_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


class ServerStartError(EngineError):
    """The server did not come up. The message ends with its own last error lines and the path of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServer:
    """A server that answered /health. `process.poll()` says later whether it still lives."""

    base_url: str
    pid: int
    log_path: Path
    process: "subprocess.Popen[bytes]"


@contextlib.contextmanager
def start_server(
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
) -> Iterator[RunningServer]:
    """Run `python -m ludic.inference.vllm_server` for the length of a `with` block.

    Args:
        model: a model folder, or a name on the hub.
        port: None takes a free one.
        gpu: which of the GPUs that this process may use; None leaves the choice to vLLM.
        api_key: handed over in the environment, so it shows in no process list.
        extra_args: further flags of the server, as on its command line.
        log_path: everything that the server prints; overwritten.
        timeout_s: how long it may take to become healthy, in seconds.
        on_progress: called about once a second while it loads, with the seconds so far and its last log line.
        env: variables to set for the server beside this process's own.

    Raises:
        ServerStartError: the port is taken, the server ended, or it was not healthy in time.
    """
    port = free_port(host) if port is None else port
    require_free_port(host, port)
    log_path = Path(log_path).absolute()
    command = [python, "-m", "ludic.inference.vllm_server", "--model", model, "--host", host, "--port", str(port)]
    child_env = _child_environment({**os.environ, **(env or {})}, host=host, gpu=gpu, api_key=api_key)
    with log_path.open("wb") as log:
        # Its own session: Ctrl-C in the terminal reaches the parent alone, and the whole tree is one process group.
        process = subprocess.Popen(
            [*command, *extra_args],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=child_env,
            start_new_session=True,
        )
    try:
        base_url = f"http://{_reachable(host)}:{port}"
        _wait_until_healthy(process, base_url, log_path, timeout_s, on_progress)
        yield RunningServer(base_url=base_url, pid=process.pid, log_path=log_path, process=process)
    finally:
        _stop(process)


def free_port(host: str) -> int:
    """A TCP port on `host` that is free now."""
    with _socket_for(host) as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])


def require_free_port(host: str, port: int) -> None:
    """Raise ServerStartError in one line when something listens on `port` already, or the address cannot be had."""
    try:
        with _socket_for(host) as sock:
            sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # as the server will: old connections do not count
            sock.bind((host, port))
    except OSError as error:
        raise ServerStartError(
            f"cannot listen on {host}:{port} ({error.strerror}): stop what runs there, or choose another --port"
        ) from error


def last_error_lines(log: str, limit: int = ERROR_LINES) -> str:
    """The lines of a vLLM log that say what went wrong: each exception's message, without tracebacks and prefixes.

    The cause stands before what followed from it. Where there is no exception, the last lines of the log.
    """
    lines = [_PREFIX.sub("", line).rstrip() for line in log.splitlines()]
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


def end_with_parent() -> None:
    """In a server that `start_server` made: when the parent is gone, end this process group, children and all.

    First as SIGTERM does, so that vLLM frees its shared memory, then by force. Elsewhere it does nothing.
    """
    parent_pid = os.environ.pop(PARENT_PID_VARIABLE, None)
    if parent_pid is None:
        return

    def watch() -> None:
        _wait_for_exit(int(parent_pid))
        # From outside the group, so that it also ends what this process leaves behind when it exits in time.
        sweep = f"sleep {ORPHAN_GRACE_S}; kill -KILL -{os.getpgrp()}"
        subprocess.Popen(["/bin/sh", "-c", sweep], start_new_session=True, stderr=subprocess.DEVNULL)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="ludic-parent-watch").start()


def _wait_for_exit(pid: int) -> None:
    """Block until process `pid`, which need not be a child of this one, has ended."""
    try:
        # Linux: readable at the end of the process, even while nobody has reaped it.
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    except (AttributeError, OSError):  # another system, or a sandbox without this call
        while _exists(pid):
            time.sleep(POLL_S)
        return
    select.select([descriptor], [], [])
    os.close(descriptor)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _wait_until_healthy(
    process: "subprocess.Popen[bytes]",
    base_url: str,
    log_path: Path,
    timeout_s: float,
    on_progress: Callable[[float, str], None] | None,
) -> None:
    started = time.monotonic()
    next_progress_s = PROGRESS_S
    while not _healthy(base_url):
        seconds = time.monotonic() - started
        if process.poll() is not None:
            raise ServerStartError(_failure(f"the vLLM server ended with code {process.returncode}", log_path))
        if seconds > timeout_s:
            raise ServerStartError(_failure(f"the vLLM server was not healthy after {timeout_s:.0f} s", log_path))
        if on_progress is not None and seconds >= next_progress_s:
            on_progress(seconds, _last_line(log_path))
            next_progress_s = seconds + PROGRESS_S
        time.sleep(POLL_S)


def _healthy(base_url: str) -> bool:
    # No proxies: a proxy variable must not stand between the trainer and its own server.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{base_url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _failure(what: str, log_path: Path) -> str:
    return f"{what}; it said:\n{last_error_lines(log_path.read_text(errors='replace'))}\n(its whole log: {log_path})"


def _last_line(log_path: Path) -> str:
    with log_path.open("rb") as log:
        log.seek(0, os.SEEK_END)
        log.seek(max(0, log.tell() - 4096))
        lines = log.read().decode(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the server, politely at first, and then whatever is left of its process group."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=SHUTDOWN_GRACE_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says EPERM of a group of zombies
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _child_environment(
    inherited: Mapping[str, str], *, host: str, gpu: int | None, api_key: str | None
) -> dict[str, str]:
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


def _reachable(host: str) -> str:
    """The address to call a server that listens on `host`, as it is written in a URL."""
    address = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{address}]" if ":" in address else address
