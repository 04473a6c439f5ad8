"""Opens the engine that the flags of `cli.add_engine_arguments` ask for, and starts a server where they ask for one.

What trains gets an engine that survives its server (`inference.recovery`); an evaluation ends with the server, and is
continued with `--resume-eval`.
"""

import argparse
import asyncio
import contextlib
import shlex
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ludic.inference.server_process import ServerProcess
from ludic.keys import read_api_key
from ludic.telemetry.formatting import inert

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ludic.inference.engine import InferenceEngine


@contextlib.asynccontextmanager
async def open_engine(
    args: argparse.Namespace,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    out_dir: Path,
    max_seq_len: int,
    say: Callable[[str], None],
    trains: bool = False,
    fp32_head: bool | None = None,
) -> "AsyncIterator[InferenceEngine]":
    """The engine that the flags ask for, checked against this run; closed, and its server ended, on the way out.

    A server that a killed trainer left paused is an error, unless this run `trains`: then its first sync sets it right.
    A run that trains has the server to itself, and gets it back when it is lost. `fp32_head` is whether it keeps logits in
    fp32: a server that is started does the same, another's is compared.

    Raises:
        EngineError: the server is not there, not the right one, or held by another trainer.
    """
    if args.engine == "local":
        engine = await asyncio.to_thread(_local_engine, args, max_seq_len)
        try:
            yield engine
        finally:
            await engine.aclose()
        return
    from ludic.inference.recovery import RecoveringEngine
    from ludic.inference.vllm_client import VLLMEngine, stop_token_ids
    from ludic.pretrained import load_config
    from ludic.training.rope import longrope_switch

    model_config = load_config(args.model, trust_remote_code=args.trust_remote_code)
    async with contextlib.AsyncExitStack() as stack:
        server = await _start_server(stack, args, out_dir, max_seq_len, fp32_head, say) if args.start_server else None
        trainer = uuid.uuid4().hex if trains else None
        client = VLLMEngine(
            f"http://{args.host}:{args.port}" if server is None else server.base_url,
            model=args.model,
            api_key=read_api_key(args.api_key_file),
            concurrency=args.concurrency,
            stop_token_ids=stop_token_ids(args.model, tokenizer, model_config),
            seed_requests=args.seed_requests,
            vocab_size=model_config.get_text_config().vocab_size,
            longrope_switch=longrope_switch(model_config) if trains else None,
            fp32_head=fp32_head,
            trainer=trainer,
        )
        if trainer is None:
            stack.push_async_callback(client.aclose)
            await client.connect(tokenizer, max_seq_len=max_seq_len)
            yield client
            return
        recovering = RecoveringEngine(client, server=server, out_dir=out_dir, wait_s=args.server_wait, say=say)
        stack.push_async_callback(recovering.aclose)
        await recovering.connect(tokenizer, max_seq_len=max_seq_len)
        yield recovering


def _local_engine(args: argparse.Namespace, max_seq_len: int) -> Any:
    import torch

    from ludic.inference.local import LocalEngine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LocalEngine.from_pretrained(
        args.model, device=device, trust_remote_code=args.trust_remote_code, context_len=max_seq_len
    )


async def _start_server(
    stack: contextlib.AsyncExitStack,
    args: argparse.Namespace,
    out_dir: Path,
    max_seq_len: int,
    fp32_head: bool | None,
    say: Callable[[str], None],
) -> ServerProcess:
    last_said = [time.monotonic()]

    def on_progress(seconds: float, line: str) -> None:
        if sys.stdout.isatty() or time.monotonic() - last_said[0] >= 10:
            last_said[0] = time.monotonic()
            say(f"server loading, {seconds:.0f} s: {inert(line[-100:])}")

    log_path = Path(args.server_log) if args.server_log else out_dir / "vllm_server.log"
    server = ServerProcess(
        args.model,
        host=args.host,
        port=args.port,
        gpu=args.server_gpu,
        api_key=read_api_key(args.api_key_file),
        extra_args=_server_flags(args, max_seq_len, fp32_head),
        log_path=log_path,
        on_progress=on_progress,
    )
    stack.push_async_callback(asyncio.to_thread, server.close)
    say(f"starting the server; its log is {log_path}")
    await asyncio.to_thread(server.start)
    say(f"the server is up at {server.base_url}")
    return server


def _server_flags(args: argparse.Namespace, max_seq_len: int, fp32_head: bool | None) -> list[str]:
    flags = shlex.split(args.server_args)
    given = [flag.replace("_", "-").partition("=")[0] for flag in flags]
    if "--max-model-len" not in given:
        flags += ["--max-model-len", str(max_seq_len)]
    if fp32_head is False and "--hf-overrides" not in given:  # True is ludic's default there
        flags += ["--hf-overrides", '{"head_dtype": "model"}']
    if "--weight-transfer-config" not in given and _only_one_gpu():
        flags += ["--weight-transfer-config", '{"backend": "ludic_shm"}']  # NCCL does not join a GPU with itself
    if args.chat_template:
        flags += ["--chat-template", args.chat_template]
    if args.trust_remote_code:
        flags += ["--trust-remote-code"]
    return flags


def _only_one_gpu() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.device_count() == 1
