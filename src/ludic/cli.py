"""What the training and the evaluation script share: the engine's flags, opening an engine, and errors as exit codes.

A user's mistake is one line on standard error and exit code 2; Ctrl-C is 130. Anything else is a bug and keeps its trace.
"""

import argparse
import asyncio
import contextlib
import os
import shlex
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ludic.inference.errors import EngineError
from ludic.inference.server_process import ServerStartError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ludic.inference.engine import InferenceEngine

USER_ERRORS: tuple[type[Exception], ...] = (ValueError, EngineError, OSError, FloatingPointError, MemoryError)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say who generates, and where."""
    group = parser.add_argument_group("engine")
    group.add_argument("--engine", choices=("vllm", "local"), default="vllm",
                       help="vllm: a server; local: this process, with transformers (default: vllm)")  # fmt: skip
    group.add_argument("--host", default="127.0.0.1", help="the server's host (default: 127.0.0.1)")
    group.add_argument("--port", type=int, default=8000, help="the server's port (default: 8000)")
    group.add_argument("--api-key", default=None,
                       help="the server's key; better in LUDIC_API_KEY or VLLM_API_KEY than on the command line")  # fmt: skip
    group.add_argument("--concurrency", type=int, default=1024, help="completions in flight at once (default: 1024)")
    group.add_argument("--seed-requests", action="store_true",
                       help="send a seed with each request; slower, and repeatable only as far as the server is")  # fmt: skip
    group.add_argument(
        "--chat-template", default=None, metavar="FILE", help="a Jinja chat template in place of the model's"
    )
    group.add_argument("--start-server", action="store_true", help="start the server as a child, and end it at the end")
    group.add_argument("--server-gpu", type=int, default=None, metavar="N",
                       help="GPU of a started server, counted among those visible here (default: 0)")  # fmt: skip
    group.add_argument(
        "--server-args", default="", metavar="'...'", help="more vLLM flags for a started server, in one string"
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
    if args.engine == "local" and args.start_server:
        raise ValueError("--engine local generates in this process: it contradicts --start-server")
    for flag in ("server_gpu", "server_args", "server_log"):
        if getattr(args, flag) not in (None, "") and not args.start_server:
            raise ValueError(f"--{flag.replace('_', '-')} is for --start-server, which was not given")


def api_key(args: argparse.Namespace) -> str | None:
    key: str | None = args.api_key or os.environ.get("LUDIC_API_KEY") or os.environ.get("VLLM_API_KEY")
    return key


@contextlib.asynccontextmanager
async def open_engine(
    args: argparse.Namespace,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    out_dir: Path,
    max_seq_len: int,
    say: Callable[[str], None],
    trains: bool = False,
) -> "AsyncIterator[InferenceEngine]":
    """The engine that the flags ask for, checked against this run; closed, and its server ended, on the way out.

    A server that a killed trainer left paused is an error, unless this run `trains`: then its first sync sets it right.
    """
    if args.engine == "local":
        engine = await asyncio.to_thread(_local_engine, args.model)
        try:
            yield engine
        finally:
            await engine.aclose()
        return
    from ludic.inference.vllm_client import VLLMEngine, stop_token_ids

    with contextlib.ExitStack() as stack:
        base_url = f"http://{args.host}:{args.port}"
        if args.start_server:
            stop = threading.Event()  # a cancelled start must not go on loading in its thread
            stack.callback(stop.set)
            base_url = await asyncio.to_thread(_start_server, stack, args, out_dir, max_seq_len, say, stop)
        engine = VLLMEngine(
            base_url,
            model=args.model,
            api_key=api_key(args),
            concurrency=args.concurrency,
            stop_token_ids=stop_token_ids(args.model, tokenizer),
            seed_requests=args.seed_requests,
        )
        try:
            await engine.connect(tokenizer, max_seq_len=max_seq_len, may_be_paused=trains)
            yield engine
        finally:
            await engine.aclose()


def _local_engine(model: str) -> Any:
    import torch

    from ludic.inference.local import LocalEngine

    return LocalEngine.from_pretrained(model, device="cuda" if torch.cuda.is_available() else "cpu")


def _only_one_gpu() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.device_count() == 1


def _start_server(
    stack: contextlib.ExitStack,
    args: argparse.Namespace,
    out_dir: Path,
    max_seq_len: int,
    say: Callable[[str], None],
    stop: threading.Event,
) -> str:
    from ludic.inference.vllm_server import start_server

    extra = shlex.split(args.server_args)
    if not any(flag.replace("_", "-").startswith("--max-model-len") for flag in extra):
        extra += ["--max-model-len", str(max_seq_len)]
    if _only_one_gpu() and not any(flag.replace("_", "-").startswith("--weight-transfer-config") for flag in extra):
        extra += ["--weight-transfer-config", '{"backend": "ludic_shm"}']  # NCCL does not join a GPU with itself
    if args.chat_template:
        extra += ["--chat-template", args.chat_template]
    last_said = [time.monotonic()]

    def on_progress(seconds: float, line: str) -> None:
        if stop.is_set():
            raise EngineError("the start of the server was interrupted")
        if sys.stdout.isatty() or time.monotonic() - last_said[0] >= 10:
            last_said[0] = time.monotonic()
            say(f"server loading, {seconds:.0f} s: {line[-100:]}")

    log_path = Path(args.server_log) if args.server_log else out_dir / "vllm_server.log"
    say(f"starting the server; its log is {log_path}")
    server = stack.enter_context(
        start_server(
            args.model,
            host=args.host,
            port=args.port,
            gpu=args.server_gpu,
            api_key=api_key(args),
            extra_args=extra,
            log_path=log_path,
            on_progress=on_progress,
        )
    )
    base_url: str = server.base_url
    say(f"the server is up at {base_url}")
    return base_url


def prepare_out_dir(path: str) -> Path:
    """The folder for a run's files, made and proven writable.

    Raises:
        ValueError: it cannot be written; one line with the reason.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".ludic-write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out-dir {path} cannot be written: {error.strerror}") from error
    return folder


def hide_loading_bars() -> None:
    """No bars of transformers' own while it loads and saves: they write over our display, also when piped."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def run_script(name: str, main: Callable[[], Coroutine[Any, Any, int]]) -> NoReturn:
    """Run a script's main coroutine and leave with its exit code, or with 2 or 130."""
    try:
        code = asyncio.run(main())
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: interrupted\n")
        code = 130
    except BaseExceptionGroup as group:
        error = _first_user_error(group)
        if error is None:
            raise
        code = _complain(name, error)
    except USER_ERRORS as error:
        code = _complain(name, error)
    sys.stdout.flush()
    sys.exit(code)


def _first_user_error(group: BaseExceptionGroup[Any]) -> Exception | None:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            found = _first_user_error(error)
            if found is not None:
                return found
        elif isinstance(error, USER_ERRORS):
            return error
    return None


def _complain(name: str, error: Exception) -> int:
    if os.environ.get("LUDIC_TRACEBACK"):
        raise error
    # A server that did not start speaks in its own lines; everything of ours is one.
    text = str(error) if isinstance(error, ServerStartError) else " ".join(str(error).split())
    sys.stderr.write(f"{name}: error: {text}\n")
    return 2
