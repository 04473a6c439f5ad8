"""`python -m ludic.inference.vllm_server`: vLLM's own server, with the settings that reinforcement learning needs.

It is a wrapper and not a fork: every flag is vLLM's, parsed by vLLM's parser (with `_` or `-`, from `--config` too) and
handed to what `vllm serve` runs. Only defaults are added, which the command line overrides: the routes that pause the
server and take weights, log-probs of the distribution that was sampled, a generation_config that is ignored, ludic's
worker extension, and its route for rollouts (`generate_route`). The one flag of ludic's own is --enable-log-stats. vLLM
0.26 to 0.32, and the CPU build too, whose distribution has another name than `vllm`.

The RL routes are a remote control of the server. So it listens on loopback, or wants an API key, and then for every route
but /health; vLLM by itself guards only some prefixes. Left out: TLS and users, which belong to a proxy in front of it.

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
import sys
from collections.abc import Sequence
from typing import NoReturn

from ludic.inference.generate_route import ASGIApp, Receive, Scope, Send, request_path
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
API_KEYS_VARIABLE = "LUDIC_SERVER_API_KEYS"
MIN_VLLM, MAX_VLLM = (0, 26), (0, 32)
PROG = "python -m ludic.inference.vllm_server"
INSTALL = "install it with `uv sync --extra examples` (GPU) or scripts/make_vllm_cpu_env.sh (CPU)"
USAGE = f"{PROG} [MODEL] [any flag of vLLM]"
PREFACE = f"""vLLM's own server with settings for reinforcement learning; every flag is vLLM's.

Defaults of ludic: --model {DEFAULT_MODEL} --host 127.0.0.1 --port 8000
--logprobs-mode processed_logprobs --generation-config vllm, a --weight-transfer-config for the
hardware (ludic_nccl where there are two GPUs, else ludic_shm), the RL routes (VLLM_SERVER_DEV_MODE=1), and
no statistics and no access log (--enable-log-stats, --no-disable-uvicorn-access-log turn them on).
Another host than loopback needs --api-key or VLLM_API_KEY. --help=all lists all flags, --help=KEYWORD searches.
"""

REQUIRE_API_KEY = "ludic.inference.vllm_server.RequireApiKey"
GENERATE_ROUTE = "ludic.inference.generate_route.GenerateRoute"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse vLLM's flags, check what ludic must check, and serve until a signal. Exits with 2 on a bad setting."""
    end_with_parent()
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    check_vllm_version()
    args = parse_arguments(list(sys.argv[1:] if argv is None else argv))
    keys = api_keys(args)
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
    # The middleware is constructed without arguments, perhaps in another process: the environment reaches it.
    os.environ[API_KEYS_VARIABLE] = json.dumps(keys)
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
    apply_defaults(parser, weight_transfer_backend(cuda=current_platform.is_cuda_alike()))
    # vLLM reads a file given as "--config FILE" and silently ignores "--config=FILE".
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    args: argparse.Namespace = parser.parse_args(argv)
    if args.model_tag is not None:  # the model as first word, as with `vllm serve`
        args.model = args.model_tag
    if not args.served_model_name:
        args.served_model_name = [args.model]
    # What vLLM adds last is outermost: nothing, and no middleware of the user's, sees a request before its key was checked.
    args.middleware = [GENERATE_ROUTE, *(name for name in args.middleware if name != REQUIRE_API_KEY), REQUIRE_API_KEY]
    return args


def apply_defaults(parser: argparse.ArgumentParser, backend: str) -> None:
    """Give vLLM's parser ludic's defaults. What the user gives, on the command line or by `--config`, overrides them."""
    parser.set_defaults(
        model=DEFAULT_MODEL,
        host="127.0.0.1",
        port=8000,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        weight_transfer_config=json.dumps({"backend": backend}),
        worker_extension_cls="ludic.inference.vllm_worker.LudicWorkerExtension",
        # LLM.generate leaves statistics out by default as well. They are more than a third of the Python that runs in the
        # front end for each token (9 of 22 microseconds on a slow CPU), and at many hundred sequences that sets the pace.
        disable_log_stats=True,
        # A line for each rollout request, which nobody reads and the server's log grows by.
        disable_uvicorn_access_log=True,
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


def api_keys(args: argparse.Namespace) -> list[str]:
    """The keys that the server accepts: those of --api-key, else VLLM_API_KEY, as in vLLM."""
    return [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]


def listens(args: argparse.Namespace) -> bool:
    """Whether this process opens a TCP port (a Unix socket and a headless node do not)."""
    return not args.uds and not args.headless


def unsafe_setting(args: argparse.Namespace, keys: Sequence[str]) -> str:
    """Why the server must not start like this, in one line; "" if it may."""
    rust = os.environ.get("VLLM_USE_RUST_FRONTEND", "0") == "1" or os.environ.get("VLLM_RUST_FRONTEND_PATH")
    if args.grpc or rust:
        return "the gRPC server and the Rust front end have no RL routes: leave out --grpc and VLLM_*RUST_FRONTEND*"
    if args.data_parallel_size > 1:
        return (
            f"--data-parallel-size {args.data_parallel_size}: what vLLM's routes answer comes from the first engine alone, so a "
            "weight sync could not be proven on the others: use --tensor-parallel-size, or leave it at 1"
        )
    if listens(args) and not keys and not is_loopback(args.host):
        return (
            f"--host {args.host or '(all addresses)'} is not loopback, and the RL routes let whoever reaches them control "
            "the server and replace its weights: give --api-key KEY (or VLLM_API_KEY), or --host 127.0.0.1"
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
        keys: list[str] = json.loads(os.environ.get(API_KEYS_VARIABLE, "[]"))
        self._keys = [_fingerprint(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401 (close a websocket with 1008, policy violation)."""
        if scope["type"] not in ("http", "websocket") or self._may_pass(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "API key missing or wrong"})
        else:
            body = json.dumps({"error": "Unauthorized: this server needs `Authorization: Bearer <its --api-key>`"})
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body.encode()})

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
