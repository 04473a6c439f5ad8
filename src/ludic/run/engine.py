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
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ludic.cli import server_urls
from ludic.config import GRPOConfig
from ludic.inference.client.server_process import ServerProcess
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
        server = None
        if args.start_server:
            flags = _server_flags(args, max_seq_len, fp32_head, adapter_rank)
            server = await _start_server(stack, args, out_dir, flags, say)
        if server is not None:
            stack.push(server.explain_loss)
        urls = server_urls(args) if server is None else [server.base_url]
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
        recovery = {"server": server, "out_dir": out_dir, "wait_s": args.server_wait, "say": say}
        yield await stack.enter_async_context(
            connected(clients, tokenizer, probe=probe, max_seq_len=max_seq_len, **recovery)
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
    **recovery: Any,
) -> "AsyncIterator[InferenceEngine]":
    """One client, connected; with a `probe`, the clients of one or several servers as the engine that a run trains with.

    `recovery` are the settings of `RecoveringEngine`.
    """
    if probe is None:
        (client,) = clients
        async with contextlib.aclosing(client):
            await client.connect(tokenizer, max_seq_len=max_seq_len)
            yield client
        return
    from ludic.survival.recovery import RecoveringEngine
    from ludic.survival.several_servers import SeveralServers

    async with contextlib.AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(contextlib.aclosing(RecoveringEngine(one, **recovery))) for one in clients
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


async def _start_server(
    stack: contextlib.AsyncExitStack,
    args: argparse.Namespace,
    out_dir: Path,
    flags: Sequence[str],
    say: Callable[[str], None],
) -> ServerProcess:
    status = StatusLine(say)
    log_path = Path(args.server_log) if args.server_log else out_dir / "vllm_server.log"
    server = ServerProcess(
        args.model,
        host=args.host,
        port=args.port,
        gpu=args.server_gpu,
        api_key=read_api_key(args.api_key_file),
        extra_args=flags,
        log_path=log_path,
        on_progress=lambda seconds, line: status.show(f"server loading, {seconds:.0f} s: {inert(line)}"),
    )
    stack.push_async_callback(asyncio.to_thread, server.close)
    say(f"starting the server; its log is {log_path}")
    with status:
        await asyncio.to_thread(server.start)
    say(f"the server is up at {server.base_url}")
    return server


def _server_flags(args: argparse.Namespace, max_seq_len: int, fp32_head: bool | None, adapter_rank: int) -> list[str]:
    flags = shlex.split(args.server_args)
    given = [flag.replace("_", "-").partition("=")[0] for flag in flags]
    if "--max-model-len" not in given:
        flags += ["--max-model-len", str(max_seq_len)]
    if fp32_head and "--hf-overrides" not in given:
        flags += ["--hf-overrides", '{"head_dtype": "float32"}']
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
