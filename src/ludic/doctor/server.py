"""The checks of the server: is it there, whose is it, does it fit this run, does it generate, does it take weights?"""

import argparse
import asyncio
import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ludic.cli import server_urls, started_settings
from ludic.config import GRPOConfig
from ludic.doctor.findings import Check, Finding, failed, ok, warning
from ludic.doctor.machine import installed, tokenizer_of, trainer_device
from ludic.inference.client import handshake
from ludic.inference.client.server_control import ServerControl
from ludic.inference.client.server_process import require_free_port
from ludic.rollout.errors import EngineError, ServerUnreachableError
from ludic.storage.identity import describe, identity
from ludic.storage.keys import read_api_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYNC_DEADLINE_S = 45.0
PROBE_DEADLINE_S = 60.0
LOOPBACK = ("127.0.0.1", "localhost")

# A process of its own: the import takes some ten seconds, and what it does to logging and to CUDA stays there.
_VLLM_PROBE = """
import vllm, vllm._custom_ops
from vllm.platforms import current_platform
print("ludic:", vllm.__version__, current_platform.device_type or "none")
"""


def server_checks(args: argparse.Namespace, config: GRPOConfig) -> list[tuple[str, Check]]:
    """The checks of each server that runs, or of the port of one that is to be started."""
    if args.start_server:
        return [("port", lambda: check_free_port(args)), ("vLLM", check_vllm)]
    urls = [url for base_url in server_urls(args) for url in _engines_behind(base_url, args)]
    if len(urls) == 1:
        return _checks_of(ServerChecks(args, config, urls[0]))
    return [
        (f"{name} of {url}", _named_after(url, check))
        for url in urls
        for name, check in _checks_of(ServerChecks(args, config, url))
    ]


def _engines_behind(base_url: str, args: argparse.Namespace) -> list[str]:
    """The server's own address alone where it cannot be asked: its checks say why."""
    with contextlib.closing(
        ServerControl(base_url, api_key=read_api_key(args.api_key_file), timeout_s=30.0)
    ) as control:
        try:
            return handshake.engines_behind(control)
        except EngineError:
            return [base_url]


def _named_after(url: str, check: Check) -> Check:
    """`check`, whose findings say of which server they are."""

    def named() -> list[Finding]:
        found = check()
        findings = found if isinstance(found, list) else [found]
        return [dataclasses.replace(finding, name=f"{finding.name} of {url}") for finding in findings]

    return named


def _checks_of(checks: "ServerChecks") -> list[tuple[str, Check]]:
    return [
        ("server", checks.reachable),
        ("tokenizer", checks.tokenizer),
        ("settings", checks.settings),
        ("same GPU", checks.gpus),
        ("holder", checks.holder),
        ("generation", checks.generation),
        ("weight sync", checks.weight_sync),
    ]


def check_free_port(args: argparse.Namespace) -> Finding:
    """Is the port free on which a server is to be started, and that of each of its engines?"""
    ports = range(args.port, args.port + started_settings(args).server_engines)
    for port in ports:
        require_free_port(args.host, port)
    if len(ports) == 1:
        return ok("port", f"{args.host}:{args.port} is free for the server")
    return ok("port", f"{args.host}:{ports[0]} to {ports[-1]} are free for the server's {len(ports)} engines")


def check_vllm() -> Finding:
    """Does vLLM import here, with its kernels, and find a device that it was built for?

    An installed version does not say so: a build for CUDA without a driver, or one that misses a library, ends only when a
    server is started.
    """
    words = [sys.executable, "-c", _VLLM_PROBE]
    try:
        probe = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=PROBE_DEADLINE_S)
    except subprocess.TimeoutExpired:
        said = f"its import was not done after {PROBE_DEADLINE_S:.0f} s"
        return warning("vLLM", said, "look again on a quieter machine")
    lines = [line.strip() for line in f"{probe.stdout}\n{probe.stderr}".splitlines() if line.strip()]
    answer = next((line.split() for line in lines if line.startswith("ludic:")), None)
    if answer is None:
        last = lines[-1] if lines else f"exit code {probe.returncode}"
        fix = "run uv sync --extra examples, or --engine local"
        return failed("vLLM", f"it cannot be imported here: {last:.300}", fix)
    _, version, device = answer
    if device == "none":
        fix = "use a machine with a GPU and driver (nvidia-smi), the CPU build of scripts/make_vllm_cpu_env.sh, or --engine local"
        return failed("vLLM", f"{version} finds no device here that it was built for", fix)
    if missing := next((line for line in lines if "Failed to import from vllm." in line), ""):
        return failed("vLLM", f"{version} is without its kernels: {missing:.300}", "run uv sync --extra examples")
    return ok("vLLM", f"{version} can start here, on {device}")


class ServerChecks:
    """The checks of one running server; what the first finds out, the others go by."""

    def __init__(self, args: argparse.Namespace, config: GRPOConfig, url: str) -> None:
        self._args, self._config = args, config
        self._key = read_api_key(args.api_key_file)
        self._url = url
        self._control = ServerControl(self._url, api_key=self._key, timeout_s=30.0)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._up = False
        self._is_leased = False
        self._info: Mapping[str, Any] = {}

    def reachable(self) -> Finding | list[Finding]:
        """Does it answer, serve this model, and in a context that is long enough? If not, can one be started here?"""
        from ludic.task.pretrained import load_config
        from ludic.task.rope import longrope_switch

        try:
            served = handshake.served_model(self._control, self._args.model)
        except ServerUnreachableError as error:
            unreachable = failed("server", str(error), "")
            here = self._args.host in LOOPBACK and installed("vllm") is not None
            return [unreachable, check_vllm()] if here else unreachable
        self._up = True
        config = load_config(self._args.model, trust_remote_code=self._args.trust_remote_code)
        handshake.check_context(served, self._config.max_seq_len, longrope_switch(config))
        return ok("server", f"{self._url} serves {self._args.model}, context {served.get('max_model_len')} tokens")

    def tokenizer(self) -> Finding:
        """Do both sides make the same ids of a text and of a chat?"""
        if not self._up:
            return _skipped("tokenizer")
        self._tokenizer = tokenizer_of(self._args)
        handshake.check_tokenizer(self._control, self._args.model, self._tokenizer)
        handshake.check_chat_template(self._control, self._args.model, self._tokenizer)
        return ok("tokenizer", "the server's ids of a text and of a chat are the trainer's")

    def settings(self) -> list[Finding]:
        """Log-prob mode, weight transfer, version."""
        if not self._up:
            return [_skipped("settings")]
        self._info = info = handshake.weight_sync_info(self._control, self._args.model)
        said = f"vLLM {info['vllm_version']}, {info['dtype']}, processed log-probs, weights over {info['transfer_backend']}"
        findings = [ok("settings", said)]
        if not handshake.has_generate_route(self._control):
            said = "the server has no ludic route for rollouts, or another version's"
            fix = "start it with this version's `python -m ludic.inference.vllm_server`"
            findings.append(warning("route", said, fix))
        return findings

    def gpus(self) -> Finding:
        """Is the server's GPU another one than the trainer's?"""
        import torch

        if not self._info:
            return _skipped("same GPU")
        theirs = self._info.get("device_uuid")
        if not theirs or not torch.cuda.is_available():
            return ok("same GPU", "nothing to compare: at least one side is on the CPU, or does not say")
        ours = str(torch.cuda.get_device_properties(trainer_device(self._args)).uuid)
        if ours != theirs:
            return ok("same GPU", "no: server and trainer have one each")
        if "nccl" in str(self._info.get("transfer_backend")):
            fix = (
                "give the two sides different CUDA_VISIBLE_DEVICES, or start the server with --weight-transfer-config "
            )
            return failed(
                "same GPU", "yes, and NCCL does not join a GPU with itself", fix + """'{"backend": "ludic_shm"}'"""
            )
        return ok("same GPU", "yes: both share its memory and its time, and weights are copied within it (CUDA IPC)")

    def holder(self) -> Finding:
        """Has another trainer the server?"""
        if not self._up:
            return _skipped("holder")
        other = handshake.holder(self._control)
        if other is None:
            return ok("holder", "no trainer has the server")
        self._is_leased = True
        said = f"another trainer has it ({describe(other['identity'])}), so no weights are sent here"
        return warning("holder", said, "wait for it, stop it, or start another server")

    def generation(self) -> Finding:
        """Does one completion come back, with log-probs?"""
        return _skipped("generation") if self._tokenizer is None else asyncio.run(self._generate(self._tokenizer))

    async def _generate(self, tokenizer: "PreTrainedTokenizerBase") -> Finding:
        from ludic.inference.client.vllm_client import VLLMEngine
        from ludic.types import SamplingParams

        if handshake.stays_paused(self._control):
            fix = "the first sync of a run sets that right; or restart it"
            return warning("generation", "the server is paused", fix)
        engine = VLLMEngine(self._url, model=self._args.model, api_key=self._key)
        prompt = tokenizer.encode("What is 2 + 2?", add_special_tokens=False)
        sampling = SamplingParams(temperature=1.0, max_tokens=8)
        try:
            await engine.connect(tokenizer)
            async with asyncio.timeout(30):
                (completion,) = await engine.generate(prompt, num_completions=1, sampling=sampling)
        except TimeoutError:
            return failed("generation", "8 tokens were not there after 30 s", "read the server's log")
        finally:
            await engine.aclose()
        if completion.logprobs is None:
            return warning("generation", "the completion has no log-probs", "read the server's log for the reason")
        return ok("generation", f"{len(completion.token_ids)} tokens with their log-probs")

    def weight_sync(self) -> Finding:
        """Do the model's weights get there, proven as in training?"""
        if not self._info or self._tokenizer is None or self._is_leased:
            return _skipped("weight sync")
        handshake.check_adapters(self._control, self._info, self._config.sent_rank)
        if self._config.sent_rank:
            return ok(
                "weight sync", "the server takes such an adapter; a run compares the base and proves each version"
            )
        import torch

        from ludic.inference.weights.weight_sync import WeightSync
        from ludic.task.pretrained import load_model

        device = torch.device("cuda", trainer_device(self._args)) if torch.cuda.is_available() else torch.device("cpu")
        model = load_model(self._args.model, dtype=torch.float32, trust_remote_code=self._args.trust_remote_code)
        torch.nn.Module.to(model, device)
        probe = self._tokenizer.encode("Tom has 3 boxes of 12 eggs. How many eggs has he?", add_special_tokens=False)
        handshake.claim(self._control, identity(Path(self._args.out_dir)))
        sync = WeightSync(
            self._control,
            transport=self._info["transfer_backend"],
            served_model=self._args.model,
            dtype=getattr(torch, self._info["dtype"]),
            probe_token_ids=probe[:64],
            deadline_s=SYNC_DEADLINE_S,
        )
        try:
            report = sync.sync(model, 0)
        finally:
            sync.close()
            handshake.release(self._control)
        return ok("weight sync", f"{report.seconds:.2f} s; {report.proof}")


def _skipped(name: str) -> Finding:
    return warning(name, "not looked at, since a check before it failed or forbade it", "mend that first")
