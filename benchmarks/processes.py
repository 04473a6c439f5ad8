"""Child processes of a benchmark: groups of them, and servers; each on a chosen GPU, with a log. `parts` talks to them.

Each is a process group of its own that is gone when its `with` block or its call ends. The server of ludic also ends with
this process however that ends; for the others, `end_on_sigterm` is what makes a benchmark that is told to stop clean up.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.harness import ROOT, records_of, say, versions
from ludic.inference.client.server_process import PARENT_PID_VARIABLE, free_port, is_healthy, last_error_lines
from ludic.rollout.errors import EngineError

END_GRACE_S = 10.0
# Without VLLM_HOST_IP vLLM looks for the way to the internet, which a machine for measurements may not have.
VLLM_ENV = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1"}
POLICY_START_S = 300.0
"""What making a policy may take beside its training."""


class PartError(RuntimeError):
    """A part did not do what it should; one line, and the last lines of its log."""


def end_on_sigterm() -> None:
    """Turn SIGTERM into SystemExit, so that every `finally` runs and nothing is left on the GPU."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


# -- child processes -------------------------------------------------------------------------------------------------------


def child_environment(gpu: int | None, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with the repository on the path, one GPU, and no proxy before this machine."""
    path = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    env["NO_PROXY"] = env["no_proxy"] = "127.0.0.1,localhost"
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    return {**env, **(extra or {})}


@contextlib.contextmanager
def process_group(
    command: Sequence[str],
    *,
    log_path: Path,
    gpu: int | None = None,
    env: Mapping[str, str] | None = None,
    pipes: bool = False,
) -> Iterator["subprocess.Popen[str]"]:
    """Run `command` as a process group of its own, which is gone at the end of the block, children and all.

    Standard error goes to the log, and standard output too unless there are `pipes`: then standard input is one, and standard
    output is another that belongs to a `parts.JSONLines`.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("w") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipes else log,
            stderr=log if pipes else subprocess.STDOUT,
            env=child_environment(gpu, env),
            start_new_session=True,
            text=True,
        )
    try:
        yield process
    finally:
        _end_group(process)


def _end_group(process: "subprocess.Popen[str]") -> None:
    """Politely at first, so that GPU memory and shared memory are given back; then by force, whatever is left."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):  # what was not yet sent to a process that has ended
            process.stdin.close()
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=END_GRACE_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_words(log_path: Path) -> str:
    """The last error lines of a log, on one line, and where the rest is."""
    lines = last_error_lines(log_path.read_text(errors="replace"), limit=3).splitlines()
    return f"{' | '.join(line[:300] for line in lines)} ({log_path})"


def ensure_policy(args: argparse.Namespace, *, random: bool = False, gpu: int | None = None) -> Path:
    """The folder of the policy: the one given, or one that `make_policy.py` makes in OUT, trained or with random weights.

    Raises:
        PartError: it could not be made.
    """
    if args.policy is not None:
        return Path(args.policy)
    folder = Path(args.out) / ("policy_random" if random else "policy") / str(args.shape)
    if (folder / "tokenizer.json").is_file():  # what is saved last
        return folder
    how = ["--random"] if random else ["--seconds", str(args.policy_seconds)]
    command = [sys.executable, str(ROOT / "benchmarks" / "make_policy.py"), "--dataset", str(args.dataset)]
    say(f"making a policy of the shape {args.shape} in {folder}")
    log_path = Path(args.out) / f"make_policy_{args.shape}.log"
    with process_group(
        [*command, "--out", str(folder), "--shape", args.shape, *how], log_path=log_path, gpu=gpu
    ) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=args.policy_seconds + POLICY_START_S)
        if process.returncode != 0:
            raise PartError(f"the policy could not be made: {last_words(log_path)}")
    return folder


def gpus_for(device: str) -> tuple[int | None, int | None]:
    """Which GPU serves and which one trains: two where there are two, else the same; None on a CPU."""
    import torch

    if device == "cpu":
        return None, None
    return 0, min(1, max(0, torch.cuda.device_count() - 1))  # counting does not touch them


# -- servers ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """A server to be started: its command without host and port, and where it may run."""

    name: str
    command: tuple[str, ...]
    gpu: int | None
    env: Mapping[str, str] = field(default_factory=dict)


def vllm_settings(
    *, device: str, max_model_len: int, gpu_share: float, kv_cache_gib: float | None = None
) -> dict[str, Any]:
    """vLLM's settings that whatever is compared has in common, named as `LLM` takes them.

    A fixed KV cache (in GiB) lets several start on one GPU at the same time: by itself vLLM measures the free memory, and
    takes the other one's start for its own use.
    """
    if device == "cpu":
        return {"max_model_len": max_model_len, "enforce_eager": True, "dtype": "float32", "max_num_seqs": 32}
    settings = {"max_model_len": max_model_len, "gpu_memory_utilization": gpu_share, "max_num_seqs": 1024}
    return settings if kv_cache_gib is None else {**settings, "kv_cache_memory_bytes": int(kv_cache_gib * 2**30)}


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """The same for a server's command line."""
    flags = []
    for name, value in settings.items():
        flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return flags


def ludic_server(policy: Path, settings: Mapping[str, Any], *, gpu: int | None, name: str = "ludic") -> ServerSpec:
    """ludic's server, which also ends with this process."""
    command = (sys.executable, "-m", "ludic.inference.vllm_server", "--model", str(policy), *as_flags(settings))
    return ServerSpec(name=name, command=command, gpu=gpu, env={**VLLM_ENV, PARENT_PID_VARIABLE: str(os.getpid())})


def trl_server(policy: Path, settings: Mapping[str, Any], *, gpu: int | None, name: str = "trl") -> ServerSpec:
    """What `trl vllm-serve` of TRL 1.16 runs: vLLM's own server with its development routes and NCCL weight transfer."""
    weight_transfer = ["--weight-transfer-config", json.dumps({"backend": "nccl"})]
    logprobs = ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    scale_out = ["--enable-scale-out"] if _vllm_version() >= (0, 30) else []  # as TRL does
    main = (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(policy))
    return ServerSpec(
        name=name,
        command=(*main, *as_flags(settings), *scale_out, *weight_transfer, *logprobs),
        gpu=gpu,
        env={**VLLM_ENV, "VLLM_SERVER_DEV_MODE": "1"},
    )


def _vllm_version() -> tuple[int, ...]:
    found = versions()
    text = found.get("vllm") or found.get("vllm-cpu") or "0"
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


@contextlib.contextmanager
def serving(specs: Sequence[ServerSpec], *, log_dir: Path, deadline_s: float = 300.0) -> Iterator[dict[str, str]]:
    """Start servers at the same time and yield {name: base URL} of those that are healthy in time."""
    with contextlib.ExitStack() as stack:
        servers = Servers(stack, log_dir)
        servers.start(specs)
        yield servers.healthy(deadline_s)


class Servers:
    """Servers that are started, some earlier and some later, and end with the `stack`."""

    def __init__(self, stack: contextlib.ExitStack, log_dir: Path) -> None:
        self._stack = stack
        self._log_dir = log_dir
        self._started: dict[str, tuple[str, subprocess.Popen[str], Path]] = {}
        self._ports: set[int] = set()

    def start(self, specs: Sequence[ServerSpec]) -> None:
        """Start them, and wait for none."""
        for spec in specs:
            while (port := free_port("127.0.0.1")) in self._ports:  # the server before may not hold its port yet
                pass
            self._ports.add(port)
            log_path = self._log_dir / f"server_{spec.name}.log"
            command = [*spec.command, "--host", "127.0.0.1", "--port", str(port)]
            group = process_group(command, log_path=log_path, gpu=spec.gpu, env=spec.env)
            self._started[spec.name] = (f"http://127.0.0.1:{port}", self._stack.enter_context(group), log_path)

    def end(self) -> None:
        """Ask all of them to end, at the same time; the stack waits for each."""
        for _, process, _ in self._started.values():
            process.terminate()

    def healthy(self, deadline_s: float = 300.0) -> dict[str, str]:
        """Wait for all; {name: base URL}. One that is not healthy in time is said and left out: parts without it still run."""
        started, healthy = self._started, dict[str, str]()
        deadline = time.monotonic() + deadline_s
        while len(healthy) < len(started) and time.monotonic() < deadline:
            for name, (url, process, log_path) in list(started.items()):
                if name not in healthy and process.poll() is not None:
                    say(f"server {name} ended with code {process.returncode}: {last_words(log_path)}")
                    del started[name]
                elif name not in healthy and is_healthy(url):
                    say(f"server {name} is up at {url}")
                    healthy[name] = url
            time.sleep(0.25)
        for name in started.keys() - healthy.keys():
            say(f"server {name} is not healthy after {deadline_s:.0f} s; its log is {started[name][2]}")
        return healthy


def required(servers: Mapping[str, str], name: str) -> str:
    """The URL of a server without which there is nothing to measure."""
    if name not in servers:
        raise PartError(f"the server {name} did not come up")
    return servers[name]


def run_and_write(
    args: argparse.Namespace, measure: Callable[[], None], write_table: Callable[[argparse.Namespace], None]
) -> int:
    """A table's command: measure (unless only the table is wanted), write what there is, and say what went wrong.

    Returns the exit code: 1 where a part failed or was cut off, 2 where nothing could begin.
    """
    end_on_sigterm()
    code, before = 0, len(records_of(args).all())
    if not args.table:
        try:
            measure()
        except (ValueError, PartError, EngineError) as error:
            say(f"error: {error}")
            code = 2
    if records_of(args).last():
        write_table(args)
    failed = [record["part"] for record in records_of(args).all()[before:] if record.get("problem")]
    if failed:
        say(f"not complete: {', '.join(failed)}")
    return code or int(bool(failed))
