"""Opens the engine that the flags of `cli.add_engine_arguments` ask for, and starts a server where they ask for one.

What trains gets an engine that survives its server (`inference.recovery`); an evaluation ends with the server, and is
continued with `--resume-eval`.
"""

import argparse
import asyncio
import contextlib
import shlex
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ludic.cli import server_urls, started_settings
from ludic.config import GRPOConfig
from ludic.inference.client.server_process import ServerProcess, require_free_port
from ludic.inference.vllm_engines import ENGINE_VARIABLE, start_order
from ludic.storage.inert import inert
from ludic.storage.keys import read_api_key
from ludic.survival.signals import at_once
from ludic.telemetry.progress import StatusLine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ludic.inference.client.vllm_client import VLLMEngine
    from ludic.rollout.engine import InferenceEngine


CONNECT_S = 5.0


def require_server(args: argparse.Namespace) -> None:
    """Refuse a run whose server is missing before libraries, data and tokenizer are loaded for it.

    Raises:
        ServerUnreachableError: the flags name a server that runs, and nothing listens there.
    """
    if args.engine == "local" or args.start_server:
        return
    for base_url in server_urls(args):
        address = urlsplit(base_url)
        port = address.port or (443 if address.scheme == "https" else 80)
        try:
            socket.create_connection((address.hostname or "", port), timeout=CONNECT_S).close()
        except OSError as error:
            from ludic.inference.client.handshake import nothing_listens  # brings an HTTP client

            raise nothing_listens(base_url, args.model) from error


def name_engines(args: argparse.Namespace) -> None:
    """Let `args` name every engine of a server that runs and has several (`--server-engines`), as if each had been given.

    Raises:
        EngineError: the server does not answer, or some of its engines still load.
    """
    if args.engine == "local" or args.start_server:
        return
    urls = [url for base_url in server_urls(args) for url in _engines_behind(base_url, args)]
    if len(urls) > len(server_urls(args)):
        args.server, args.base_url = list(dict.fromkeys(urls)), None


def _engines_behind(base_url: str, args: argparse.Namespace) -> list[str]:
    from ludic.inference.client.handshake import engines_behind
    from ludic.inference.client.server_control import ServerControl

    with contextlib.closing(ServerControl(base_url, api_key=read_api_key(args.api_key_file))) as control:
        return engines_behind(control)


def check_adapter_arguments(args: argparse.Namespace, config: GRPOConfig) -> None:
    """Raises ValueError where an adapter is to be sent, and there is no server for it."""
    if config.lora_sync == "adapter" and args.engine == "local":
        raise ValueError(
            "--lora-sync adapter sends to a server, and --engine local generates in this process: leave out one of them"
        )


@contextlib.asynccontextmanager
async def open_engine(
    args: argparse.Namespace,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    out_dir: Path,
    max_seq_len: int,
    say: Callable[[str], None],
    probe: Sequence[int] | None = None,
    files: str | None = None,
    fp32_head: bool | None = None,
    adapter_rank: int = 0,
    stop_ids: Sequence[int] = (),
) -> "AsyncIterator[InferenceEngine]":
    """The engine that the flags ask for, checked against this run; closed, and its server ended, on the way out.

    A run that trains gives a `probe`, the token ids of a prompt by whose log-probs weight syncs are proven: it has the
    server to itself, recovers it when it is lost, and can send it weights. A server that a killed trainer left paused is
    an error for all others; the first sync sets it right. `files` is a folder or hub name that has the model's config where
    `--model` is only the name that a server gives it. `fp32_head` is whether a run keeps logits in fp32: a server that is
    started does the same, another's is compared. With `adapter_rank` a run sends an adapter of that rank, not whole models.
    `stop_ids` end a completion in place of the ids that the model names.

    Raises:
        EngineError: the server is not there, not the right one, or leased to another trainer.
    """
    if args.engine == "local":
        with at_once():
            engine = _local_engine(args, max_seq_len, stop_ids)
        async with contextlib.aclosing(engine):
            yield engine
        return
    from ludic.task.pretrained import load_config

    files = files or args.model
    model_config = load_config(files, trust_remote_code=args.trust_remote_code)  # before a server is started for it
    async with contextlib.AsyncExitStack() as stack:
        servers: list[ServerProcess] = []
        if args.start_server:
            flags = _server_flags(args, max_seq_len, fp32_head, adapter_rank)
            servers = await _start_servers(stack, args, out_dir, flags, say)
        if len(servers) == 1:  # else the error names the one that was lost
            stack.push(servers[0].explain_loss)
        urls = [server.base_url for server in servers] or server_urls(args)
        clients = [
            _client(
                args,
                tokenizer,
                url,
                files,
                model_config,
                trains=probe is not None,
                fp32_head=fp32_head,
                adapter_rank=adapter_rank,
                stop_ids=stop_ids,
            )
            for url in urls
        ]
        recovery = {"out_dir": out_dir, "wait_s": args.server_wait, "say": say}
        yield await stack.enter_async_context(
            connected(clients, tokenizer, probe=probe, max_seq_len=max_seq_len, servers=servers, **recovery)
        )


def _client(
    args: argparse.Namespace,
    tokenizer: "PreTrainedTokenizerBase",
    base_url: str,
    files: str,
    model_config: Any,
    *,
    trains: bool,
    fp32_head: bool | None,
    adapter_rank: int,
    stop_ids: Sequence[int],
) -> "VLLMEngine":
    from ludic.inference.client.vllm_client import VLLMEngine, stop_token_ids
    from ludic.task.rope import longrope_switch

    return VLLMEngine(
        base_url,
        model=args.model,
        api_key=read_api_key(args.api_key_file),
        concurrency=args.concurrency,
        stop_token_ids=stop_ids or stop_token_ids(files, tokenizer, model_config),
        seed_requests=args.seed_requests,
        vocab_size=model_config.get_text_config().vocab_size,
        longrope_switch=longrope_switch(model_config) if trains else None,
        fp32_head=fp32_head,
        adapter_rank=adapter_rank,
    )


@contextlib.asynccontextmanager
async def connected(
    clients: "Sequence[VLLMEngine]",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    probe: Sequence[int] | None,
    max_seq_len: int | None = None,
    servers: Sequence[ServerProcess] = (),
    **recovery: Any,
) -> "AsyncIterator[InferenceEngine]":
    """The clients of one or several servers as one engine, connected; with a `probe`, the one that a run trains with.

    `servers` are those that this run started, one a client, else none; `recovery` are further settings of `RecoveringEngine`.
    """
    if probe is None:
        from ludic.inference.client.least_loaded import LeastLoaded

        async with contextlib.aclosing(clients[0] if len(clients) == 1 else LeastLoaded(clients)) as evaluated:
            for client in clients:
                await client.connect(tokenizer, max_seq_len=max_seq_len)
            yield evaluated
        return
    from ludic.survival.recovery import RecoveringEngine
    from ludic.survival.several_servers import SeveralServers

    async with contextlib.AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(contextlib.aclosing(RecoveringEngine(one, server=server, **recovery)))
            for one, server in zip_longest(clients, servers)
        ]
        for engine in engines:
            await engine.connect(tokenizer, max_seq_len=max_seq_len)
            await engine.enable_weight_sync(list(probe))
        if len(engines) == 1:
            yield engines[0]
        else:
            yield await stack.enter_async_context(contextlib.aclosing(SeveralServers(engines, say=recovery["say"])))


def _local_engine(args: argparse.Namespace, max_seq_len: int, stop_ids: Sequence[int]) -> Any:
    import torch

    from ludic.rollout.local import LocalEngine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LocalEngine.from_pretrained(
        args.model,
        eos_token_ids=stop_ids or None,
        device=device,
        trust_remote_code=args.trust_remote_code,
        context_len=max_seq_len,
    )


async def _start_servers(
    stack: contextlib.AsyncExitStack,
    args: argparse.Namespace,
    out_dir: Path,
    flags: Sequence[str],
    say: Callable[[str], None],
) -> list[ServerProcess]:
    """The server; of one with several engines each, so that each can be started again by itself."""
    started = started_settings(args)
    status = StatusLine(say)
    path = Path(args.server_log) if args.server_log else out_dir / "vllm_server.log"
    servers = []
    for index in range(started.server_engines):
        name = f"engine {index + 1}" if started.server_engines > 1 else "server"
        server = ServerProcess(
            args.model,
            host=args.host,
            port=args.port + index,
            gpu=args.server_gpu,
            api_key=read_api_key(args.api_key_file),
            extra_args=flags,
            log_path=path if index == 0 else path.with_stem(f"{path.stem}_{index + 1}"),
            on_progress=partial(_show_loading, status, name),
            env={ENGINE_VARIABLE: "1"} if started.server_engines > 1 else {},
        )
        stack.push_async_callback(asyncio.to_thread, server.close)
        servers.append(server)
        require_free_port(args.host, server.port)
    logs = ", ".join(str(path.with_name(server.log_path.name)) for server in servers)
    what = "the server; its log is" if len(servers) == 1 else f"the server's {len(servers)} engines; their logs are"
    say(f"starting {what} {logs}")
    with status:
        for wave in start_order(started):
            await asyncio.gather(*(asyncio.to_thread(servers[index].start) for index in wave))
    say(f"the server is up at {servers[0].base_url}")
    return servers


def _show_loading(status: StatusLine, name: str, seconds: float, line: str) -> None:
    status.show(f"{name} loading, {seconds:.0f} s: {inert(line)}")


def _server_flags(args: argparse.Namespace, max_seq_len: int, fp32_head: bool | None, adapter_rank: int) -> list[str]:
    from ludic.doctor.memory import given_share  # takes the counting of memory with it

    given_share(args)  # refuses two flags that say it
    flags = shlex.split(args.server_args)
    given = [flag.replace("_", "-").partition("=")[0] for flag in flags]
    if "--max-model-len" not in given:
        flags += ["--max-model-len", str(max_seq_len)]
    if fp32_head and "--hf-overrides" not in given:
        flags += ["--hf-overrides", '{"head_dtype": "float32"}']
    if args.server_memory_share is not None and "--gpu-memory-utilization" not in given:
        flags += ["--gpu-memory-utilization", f"{args.server_memory_share:g}"]
    if "--weight-transfer-config" not in given and _only_one_gpu():
        flags += ["--weight-transfer-config", '{"backend": "ludic_shm"}']  # NCCL does not join a GPU with itself
    if adapter_rank:
        from ludic.inference.client.handshake import largest_rank  # brings an HTTP client

        flags += ["--enable-lora"] if "--enable-lora" not in given else []
        flags += ["--max-lora-rank", str(largest_rank(adapter_rank))] if "--max-lora-rank" not in given else []
    if args.chat_template:
        flags += ["--chat-template", args.chat_template]
    if args.trust_remote_code:
        flags += ["--trust-remote-code"]
    return flags


def _only_one_gpu() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.device_count() == 1
