"""What the training and the evaluation script share: the engine's flags, and errors as exit codes.

A user's mistake is one line on standard error and exit code 2; Ctrl-C is 130. Anything else is a bug and keeps its trace.
"""

import argparse
import asyncio
import os
import shlex
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from ludic.inference.client.server_process import ServerStartError
from ludic.inference.server.server_help import engines_problem, quick_arguments
from ludic.rollout.errors import EngineError
from ludic.storage.inert import inert_lines
from ludic.survival.signals import Interrupts, keep_standard_streams

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000
_ERROR_LIMIT = 2_000
USER_ERRORS: tuple[type[Exception], ...] = (ValueError, EngineError, OSError, FloatingPointError, MemoryError)


def add_engine_arguments(parser: argparse.ArgumentParser, *, trains: bool = True) -> None:
    """The flags that say who generates, and where. An evaluation (not `trains`) has one server, and ends when that is lost."""
    group = parser.add_argument_group("engine")
    group.add_argument("--engine", choices=("vllm", "local"), default="vllm",
                       help="vllm: a server; local: this process, with transformers (default: vllm)")  # fmt: skip
    group.add_argument("--host", default=DEFAULT_HOST, help=f"the server's host (default: {DEFAULT_HOST})")
    group.add_argument("--port", type=int, default=DEFAULT_PORT, help=f"the server's port (default: {DEFAULT_PORT})")
    group.add_argument("--base-url", default=None, metavar="URL",
                       help="the server's address in place of --host and --port, e.g. https://gpu.example.org/vllm")  # fmt: skip
    group.add_argument("--server", action="append", metavar="URL",
                       help="as --base-url; once for each of several servers that training generates with" if trains
                       else "as --base-url; an evaluation generates with one server")  # fmt: skip
    group.add_argument("--api-key-file", default=None, metavar="FILE",
                       help="file with the server's key, the first of several; else LUDIC_API_KEY or VLLM_API_KEY")  # fmt: skip
    group.add_argument(
        "--concurrency", type=int, default=1024, help="completions in flight at once, on each server (default: 1024)"
    )
    group.add_argument("--seed-requests", action="store_true",
                       help="send a seed with each request; slower, and repeatable only as far as the server is")  # fmt: skip
    group.add_argument(
        "--chat-template", default=None, metavar="FILE", help="a Jinja chat template in place of the model's"
    )
    group.add_argument("--trust-remote-code", action="store_true",
                       help="run Python code that the model's folder brings along, here and in a started server")  # fmt: skip
    group.add_argument("--start-server", action="store_true",
                       help="start the server as a child, start it again if it dies, and end it at the end" if trains
                       else "start the server as a child, and end it at the end; --resume-eval goes on if it dies")  # fmt: skip
    group.add_argument("--server-wait", type=float, default=1800.0, metavar="S",
                       help="seconds that training waits for a lost server to come back (default: 1800)" if trains
                       else "no effect here: an evaluation does not wait for a lost server (default: 1800)")  # fmt: skip
    group.add_argument("--server-gpu", type=int, default=None, metavar="N",
                       help="GPU of a started server, counted among those visible here (default: 0)")  # fmt: skip
    group.add_argument("--server-memory-share", type=float, default=None, metavar="X",
                       help="part of its GPU's memory that a started server takes (default: on the GPU that trains what the "
                       "estimate of training leaves, at most 0.5; on another 0.92)" if trains
                       else "part of its GPU's memory that a started server takes (default: 0.92)")  # fmt: skip
    group.add_argument(
        "--server-args",
        default="",
        metavar="'...'",
        help="more vLLM flags for a started server, in one string (default: none)",
    )
    group.add_argument("--server-log", default=None, metavar="FILE",
                       help="log of a started server (default: vllm_server.log in --out-dir)")  # fmt: skip


def check_engine_arguments(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, before anything is loaded.

    Raises:
        ValueError: one line that names both.
    """
    if args.concurrency < 1:
        raise ValueError(f"--concurrency must be at least 1, not {args.concurrency}")
    if ":" in args.host:
        raise ValueError(f"--host {args.host}: give a name or an IPv4 address; IPv6 addresses are not supported")
    if not 0 < args.port < 65536:
        raise ValueError(f"--port must be in 1 to 65535, not {args.port}")
    started = started_settings(args)
    if args.start_server and (problem := engines_problem(started)):
        raise ValueError(f"--server-args: {problem}")
    _check_server_urls(args)
    if args.engine == "local" and args.start_server:
        raise ValueError("--engine local generates in this process: it contradicts --start-server")
    if not args.server_wait >= 0:
        raise ValueError(f"--server-wait must not be negative, but is {args.server_wait:g}")
    if args.server_memory_share is not None and not 0 < args.server_memory_share < 1:
        raise ValueError(f"--server-memory-share must be above 0 and below 1, not {args.server_memory_share:g}")
    for flag in ("server_gpu", "server_memory_share", "server_args", "server_log"):
        if getattr(args, flag) not in (None, "") and not args.start_server:
            raise ValueError(f"--{flag.replace('_', '-')} is for --start-server, which was not given")


def _check_server_urls(args: argparse.Namespace) -> None:
    if args.base_url is not None and args.server:
        raise ValueError(f"--base-url {args.base_url} contradicts --server: give each server with --server")
    given = (
        [("--base-url", args.base_url)]
        if args.base_url is not None
        else [("--server", url) for url in args.server or ()]
    )
    for flag, url in given:
        if (args.host, args.port) != (DEFAULT_HOST, DEFAULT_PORT):
            raise ValueError(f"{flag} {url} is the whole address: it contradicts --host and --port")
        if args.start_server or args.engine == "local":
            other = "--start-server" if args.start_server else "--engine local"
            raise ValueError(f"{flag} {url} is of a server that runs: it contradicts {other}")
        _check_url(flag, url)
    urls = server_urls(args)
    if twice := [url for index, url in enumerate(urls) if url in urls[:index]]:
        raise ValueError(f"--server {twice[0]} is given twice")


def _check_url(flag: str, url: str) -> None:
    try:
        address = urlsplit(url)
        fits = address.scheme in ("http", "https") and address.hostname and (address.port or 1) > 0
        fits = fits and not (address.query or address.fragment or address.username or url.split() != [url])
    except ValueError:  # a port that is no number
        fits = False
    if not fits:
        raise ValueError(f"{flag} {url}: give http://HOST:PORT or https://HOST, with a path if there is one")
    if url.rstrip("/").endswith("/v1"):
        raise ValueError(f"{flag} {url}: leave out /v1, which the routes have themselves")


def server_urls(args: argparse.Namespace) -> list[str]:
    """The addresses of the servers that the flags name, at least one; of a started server, those of its engines."""
    ports = range(args.port, args.port + started_settings(args).server_engines)
    urls = args.server or ([args.base_url] if args.base_url else [f"http://{args.host}:{port}" for port in ports])
    return [str(url).rstrip("/") for url in urls]


def started_settings(args: argparse.Namespace) -> argparse.Namespace:
    """What `--server-args` say of the server that `--start-server` starts, `server_engines` among it, as far as it is known
    without vLLM; of one that is not started, the defaults."""
    settings = quick_arguments(shlex.split(args.server_args) if args.start_server else [])
    settings.host, settings.port = args.host, args.port
    return settings


def total_concurrency(args: argparse.Namespace) -> int:
    """The most completions in flight over all servers: `--concurrency` is for each."""
    return int(args.concurrency) * len(server_urls(args))


PATH_FLAGS = (
    "model", "tokenizer", "dataset", "eval_dataset", "out_dir", "out", "resume", "chat_template", "api_key_file", "server_log",
    "checkpoints",
)  # fmt: skip


def expand_home(args: argparse.Namespace) -> argparse.Namespace:
    """`args`, with `~` at the start of a path expanded in place: a shell leaves it alone in `--out-dir=~/run`."""
    for name in PATH_FLAGS:
        value = getattr(args, name, None)
        if isinstance(value, str):
            setattr(args, name, os.path.expanduser(value))
        elif value is not None:  # a flag with several values
            setattr(args, name, [os.path.expanduser(one) for one in value])
    return args


def prepare_out_dir(path: str) -> Path:
    """The folder for a run's files, made and proven writable.

    Raises:
        ValueError: it cannot be written; one line with the reason.
    """
    try:
        path.encode(sys.getfilesystemencoding())
    except UnicodeEncodeError:
        raise ValueError(
            f"--out-dir {path!a} has characters outside this locale's encoding: set PYTHONUTF8=1"
        ) from None
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".ludic-write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out-dir {path} cannot be written: {error.strerror}") from error
    return folder


def say(line: str) -> None:
    """A line of a script's own on standard output, at once even through a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def hide_loading_bars() -> None:
    """No bars of transformers' own while it loads and saves: they write over our display, also when piped."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def run_script(name: str, main: Callable[[], Coroutine[Any, Any, int]]) -> NoReturn:
    """Run a script's main coroutine and leave with its exit code, or with 2, 130, 143 or 129; see `ludic.survival.signals`."""
    keep_standard_streams()
    with Interrupts(name) as interrupts:
        try:
            code = asyncio.run(interrupts.run(main))
        except (KeyboardInterrupt, asyncio.CancelledError) as error:
            if interrupts.caught is None and isinstance(error, asyncio.CancelledError):
                raise
            by = f" by {interrupts.caught.name}" if interrupts.caught is not None else ""
            sys.stderr.write(f"{name}: interrupted{by}\n")
            code = interrupts.exit_code
        except BaseExceptionGroup as group:
            first: Exception | None = group.subgroup(USER_ERRORS)
            if first is None:
                raise
            while isinstance(first, ExceptionGroup):
                first = first.exceptions[0]
            code = _complain(name, first)
        except USER_ERRORS as error:
            code = _complain(name, error)
        sys.stdout.flush()
    sys.exit(interrupts.exit_code if code == 2 and interrupts.caught is not None else code)


def _complain(name: str, error: Exception) -> int:
    if os.environ.get("LUDIC_TRACEBACK"):
        raise error
    # A server that did not start speaks in its own lines; everything of ours is one.
    lines = str(error) if isinstance(error, ServerStartError) else " ".join(str(error).split())
    text = inert_lines(lines, _ERROR_LIMIT)  # it may hold what a server, a file or a model said
    sys.stderr.write(f"{name}: error: {text}\n")
    return 2
