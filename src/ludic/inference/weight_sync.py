"""Hands the trainer's weights to a vLLM server, and proves that they arrived.

The protocol is vLLM's own weight-transfer API: pause, start, update, finish, resume. Only the way of the bytes differs:

- `NCCLTransport`: vLLM's packed NCCL broadcast, GPU to GPU. Its trainer-side API changed at vLLM 0.28; both are used here.
- `SharedMemoryTransport`: a safetensors file in shared memory, for a server without NCCL on the same machine. The server's
  half is `vllm_worker.SharedMemoryWeightTransferEngine`.

A sync that did not take is an error. Two things are compared after every sync: digests of the tensors that the server
holds with digests of what was sent, wherever the server still holds a tensor in comparable form; and the log-probs of a
fixed prompt with the trainer's own, which also sees what the first cannot (a stale output head, weights packed by a
kernel). Everything has a deadline, and the server's own words are in the error.

Left out: sharded trainers and servers whose weights are quantised or split (their digests come back empty, and the
log-prob proof stands alone).
"""

import contextlib
import json
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import requests
import torch

from ludic.inference.digest import digest_hex, tensor_digest
from ludic.inference.engine import WeightSyncReport
from ludic.inference.errors import EngineError, ServerUnauthorizedError, ServerUnreachableError, WeightSyncError
from ludic.training.losses import token_logprobs
from ludic.training.packing import pack
from ludic.types import TrainingSample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

PROBE_GAP_LIMIT = 0.15
"""Nats. Mean log-prob difference on the probe above which a sync has failed. Measured: 1e-6 for fp32 on both sides, 0.008
to 0.02 for bf16 against fp32 masters, 0.9 for a stale output head (CPU backend of vLLM 0.32)."""


class ServerControl:
    """Blocking calls to a vLLM server's control routes, each with a deadline and the server's own text in its error.

    It has the four methods of vLLM's `VLLMWeightSyncClient` protocol, so vLLM's trainer-side engine drives it directly.

    Raises:
        ServerUnreachableError: nothing answers.
        ServerUnauthorizedError: 401 or 403.
        EngineError: any other refusal, with the server's text.
    """

    def __init__(self, base_url: str, *, api_key: str | None = None, timeout_s: float = 120.0) -> None:
        self.base_url = base_url.rstrip("/")
        self.timeout_s = timeout_s
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def request(
        self,
        method: str,
        path: str,
        *,
        json_body: dict[str, Any] | None = None,
        params: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Call one route and return its decoded JSON (None for an empty answer)."""
        deadline_s = self.timeout_s if timeout_s is None else timeout_s
        try:
            with requests.Session() as session:
                session.trust_env = False  # a proxy variable must not stand between the trainer and its own server
                response = session.request(
                    method,
                    f"{self.base_url}{path}",
                    json=json_body,
                    params=params,
                    headers=self._headers,
                    timeout=(10.0, deadline_s),
                )
        except requests.Timeout as error:
            raise EngineError(f"{path} on {self.base_url} did not answer within {deadline_s:g} s") from error
        except requests.ConnectionError as error:
            raise ServerUnreachableError(
                f"nothing answers at {self.base_url} ({path}): {error.__class__.__name__}"
            ) from error
        if response.status_code in (401, 403):
            raise ServerUnauthorizedError(
                f"the server at {self.base_url} refused {path}: it wants an API key; pass --api-key or set LUDIC_API_KEY"
            )
        if not response.ok:
            raise EngineError(f"{path} on {self.base_url} answered {response.status_code}: {error_text(response.text)}")
        try:
            return response.json() if response.content else None
        except requests.JSONDecodeError as error:
            raise EngineError(
                f"{path} on {self.base_url} answered what is not JSON, so it is no vLLM server: {error_text(response.text, 80)}"
            ) from error

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.request("POST", "/init_weight_transfer_engine", json_body={"init_info": init_info})

    def start_weight_update(self) -> None:
        try:
            self.request("POST", "/start_weight_update")
        except EngineError as error:
            if "already" not in str(error):
                raise
            # A trainer that was killed in the middle of a sync left its update open: end that one, then start ours.
            self.finish_weight_update()
            self.request("POST", "/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.request("POST", "/update_weights", json_body={"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        body = None if weight_version is None else {"weight_version": weight_version}
        self.request("POST", "/finish_weight_update", json_body=body)

    def pause(self) -> None:
        """Let running requests end, hold new ones back, and drop the KV and prefix cache."""
        self.request("POST", "/pause", params={"mode": "wait", "clear_cache": "true"})

    def resume(self) -> None:
        self.request("POST", "/resume")

    def server_info(self) -> dict[str, Any]:
        """What the server's first worker says of itself: dtype, device, transfer_backend, logprobs_mode, vllm_version."""
        answer = self.request("POST", "/collective_rpc", json_body={"method": "ludic_server_info", "args": []})
        info: dict[str, Any] = answer["results"][0]
        return info

    def held_digests(self, wanted: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
        """Digests of what each worker's model holds, by checkpoint name; "" where it holds no comparable tensor.

        `wanted` is {name: {"dtype": "bfloat16", "shape": [...]}}.
        """
        answer = self.request(
            "POST", "/collective_rpc", json_body={"method": "ludic_weight_digests", "args": [json.dumps(wanted)]}
        )
        workers: list[dict[str, str]] = answer["results"]
        return workers

    def prompt_logprobs(self, model: str, token_ids: list[int]) -> list[float]:
        """The server's log-probability of each prompt token after the first, in nats: [len(token_ids) - 1]."""
        answer = self.request(
            "POST",
            "/v1/completions",
            json_body={
                "model": model,
                "prompt": token_ids,
                "max_tokens": 1,
                "temperature": 1.0,
                "prompt_logprobs": 0,
                "add_special_tokens": False,
            },
        )
        entries = answer["choices"][0]["prompt_logprobs"]
        return [entry[str(token_id)]["logprob"] for entry, token_id in zip(entries[1:], token_ids[1:], strict=True)]


def error_text(body: str, limit: int = 600) -> str:
    """The message in an error answer of vLLM or FastAPI, on one line; the body itself where it has another form."""
    try:
        decoded = json.loads(body)
    except ValueError:
        decoded = None
    if isinstance(decoded, dict):
        inner = decoded.get("error", decoded.get("detail", decoded.get("message", decoded)))
        body = str(inner.get("message", inner) if isinstance(inner, dict) else inner)
    flat = " ".join(body.split())
    return flat if len(flat) <= limit else flat[:limit] + " ..."


@dataclass(frozen=True, slots=True, kw_only=True)
class WireWeights:
    """The parameters of a model as they go over the wire: checkpoint names, in the server's dtype, tied ones once.

    Iterating casts one tensor at a time; it can be iterated again and again, and sees the masters as they are then.
    """

    model: "PreTrainedModel"
    dtype: torch.dtype

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                yield name, parameter.detach().to(self.dtype).contiguous()

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(parameter.shape) for name, parameter in self.model.named_parameters()}

    def num_bytes(self) -> int:
        return sum(p.numel() for p in self.model.parameters()) * self.dtype.itemsize

    def digests(self) -> dict[str, str]:
        return {name: digest_hex(tensor_digest(tensor)) for name, tensor in self}


class WeightTransport(Protocol):
    """Carries one whole set of weights to the server: start, update, finish. Opening it may block on the server."""

    name: str

    def open(self, weights: WireWeights) -> None: ...

    def send(self, weights: WireWeights, *, weight_version: str) -> None: ...

    def close(self) -> None: ...


class SharedMemoryTransport:
    """Writes the weights as safetensors into shared memory and tells the server where; same machine only."""

    name = "ludic_shm"

    def __init__(self, control: ServerControl) -> None:
        self._control = control
        self._directory: Path | None = None

    def open(self, weights: WireWeights) -> None:
        root = Path("/dev/shm")
        free = shutil.disk_usage(root).free if root.is_dir() else 0
        base = root if free > 2 * weights.num_bytes() and os.access(root, os.W_OK) else None
        self._directory = Path(tempfile.mkdtemp(prefix="ludic-weights-", dir=base))
        self._control.init_weight_transfer_engine({"directory": str(self._directory)})

    def send(self, weights: WireWeights, *, weight_version: str) -> None:
        from safetensors.torch import save_file

        assert self._directory is not None
        tensors = {name: tensor.cpu() for name, tensor in weights}
        path = self._directory / f"weights-{weight_version}-{time.monotonic_ns()}.safetensors"
        try:
            save_file(tensors, path)
            digests = {name: digest_hex(tensor_digest(tensor)) for name, tensor in tensors.items()}
            self._control.start_weight_update()
            self._control.update_weights({"path": str(path), "names": list(tensors), "digests": digests})
            self._control.finish_weight_update()
        finally:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None


class NCCLTransport:
    """vLLM's packed NCCL broadcast from the trainer's GPU (rank 0) to every worker of the server."""

    name = "nccl"

    def __init__(self, control: ServerControl) -> None:
        self._control = control
        self._send: Callable[[WireWeights], None] | None = None
        self._engine: Any = None

    def open(self, weights: WireWeights) -> None:
        world = self._control.request("GET", "/get_world_size")["world_size"]
        host = urlsplit(self._control.base_url).hostname or "127.0.0.1"
        master_address = _address_towards(host)
        self._send = _open_nccl(
            self._control, weights, master_address, _free_port(master_address), int(world) + 1, self
        )

    def send(self, weights: WireWeights, *, weight_version: str) -> None:
        assert self._send is not None
        self._send(weights)

    def close(self) -> None:
        if self._engine is not None and hasattr(self._engine, "shutdown"):  # vLLM 0.28 and later
            self._engine.shutdown()
        self._engine = self._send = None


def _open_nccl(
    control: ServerControl,
    weights: WireWeights,
    master_address: str,
    master_port: int,
    world_size: int,
    owner: NCCLTransport,
) -> Callable[[WireWeights], None]:
    """Join the server's workers in one NCCL group, by the trainer-side API that the installed vLLM has."""
    from vllm.distributed.weight_transfer import nccl_engine

    if hasattr(nccl_engine, "NCCLTrainerInitInfo"):  # vLLM 0.28 and later: the engine drives the whole round
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

        class Source(WeightSource):  # type: ignore[misc, unused-ignore]
            def metadata(self) -> list[Any]:
                return [ParamMeta(name, weights.dtype, tuple(shape)) for name, shape in weights.shapes().items()]

            def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
                return iter(weights)

        engine = nccl_engine.NCCLTrainerWeightTransferEngine.trainer_init(
            nccl_engine.NCCLTrainerInitInfo(
                master_address=master_address, master_port=master_port, world_size=world_size, rank=0
            ),
            client=control,
            source=Source(),
        )
        owner._engine = engine
        return lambda _weights: engine.send_weights()

    static = nccl_engine.NCCLWeightTransferEngine  # vLLM 0.26 and 0.27: static functions, the caller drives the round
    init_info = {
        "master_address": master_address,
        "master_port": master_port,
        "rank_offset": 1,
        "world_size": world_size,
    }
    with _Concurrently(lambda: control.init_weight_transfer_engine(init_info)):
        group = static.trainer_init(init_info)

    def send(current: WireWeights) -> None:
        shapes = current.shapes()
        dtype_name = str(current.dtype).removeprefix("torch.")
        update_info = {
            "names": list(shapes),
            "dtype_names": [dtype_name] * len(shapes),
            "shapes": list(shapes.values()),
            "packed": True,
        }
        control.start_weight_update()
        with _Concurrently(lambda: control.update_weights(update_info)):
            static.trainer_send_weights(iter(current), {"group": group, "packed": True})
            torch.cuda.current_stream().synchronize()
        control.finish_weight_update()

    return send


class _Concurrently:
    """Runs one call beside the body of a `with`, and raises its error at the end: both meet inside the same NCCL call."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="ludic-server-call")

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._error = error

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._thread.join()
        if self._error is not None:
            raise self._error


class WeightSync:
    """One trainer's syncs with one server: opened at the first, proven each time.

    Args:
        transport: `nccl` or `ludic_shm`; it must be the backend that the server was started with.
        served_model: the name under which the probe asks for the model.
        probe_token_ids: the fixed prompt whose log-probs are compared, 2 tokens at least.
        deadline_s: after which one sync has failed, whatever it waits for.
    """

    def __init__(
        self,
        control: ServerControl,
        *,
        transport: str,
        served_model: str,
        dtype: torch.dtype,
        probe_token_ids: list[int],
        deadline_s: float = 300.0,
    ) -> None:
        if transport not in TRANSPORTS:
            raise ValueError(
                f"the server's weight transfer backend is {transport!r}; ludic knows {', '.join(TRANSPORTS)}: "
                "start the server with `python -m ludic.inference.vllm_server`"
            )
        self._control = control
        self._transport: WeightTransport = TRANSPORTS[transport](control)
        self._served_model = served_model
        self._dtype = dtype
        self._probe = probe_token_ids
        self._deadline_s = deadline_s
        self._opened = False

    def sync(self, model: "PreTrainedModel", policy_version: int) -> WeightSyncReport:
        """Send `model`'s weights and prove them; blocking, at most `deadline_s` seconds.

        Raises:
            WeightSyncError: the server refused, did not answer in time, or does not hold what was sent.
        """
        outcome: list[WeightSyncReport | BaseException] = []
        # On a daemon thread: a broken NCCL call cannot be interrupted, and must not hold the trainer for ever.
        thread = threading.Thread(target=lambda: outcome.append(self._attempt(model, policy_version)), daemon=True)
        thread.start()
        thread.join(self._deadline_s)
        if not outcome:
            raise WeightSyncError(
                f"weight sync {policy_version} over {self._transport.name} did not end within {self._deadline_s:g} s; "
                "the server's log says where it waits"
            )
        result = outcome[0]
        if isinstance(result, WeightSyncError):
            raise result
        if isinstance(result, BaseException):
            raise WeightSyncError(
                f"weight sync {policy_version} over {self._transport.name} failed: {result}"
            ) from result
        return result

    def close(self) -> None:
        self._transport.close()

    def _attempt(self, model: "PreTrainedModel", policy_version: int) -> WeightSyncReport | BaseException:
        try:
            return self._sync(model, policy_version)
        except BaseException as error:  # handed to the caller's thread, which raises it
            return error

    def _sync(self, model: "PreTrainedModel", policy_version: int) -> WeightSyncReport:
        weights = WireWeights(model=model, dtype=self._dtype)
        marks = [time.perf_counter()]
        phases: dict[str, float] = {}

        def lap(name: str) -> None:
            marks.append(time.perf_counter())
            phases[name] = marks[-1] - marks[-2]

        if not self._opened:
            self._transport.open(weights)
            self._opened = True
            lap("open")
        try:
            self._control.pause()  # even one that times out may have paused the server: it is resumed below
            lap("pause")
            self._transport.send(weights, weight_version=str(policy_version))
            lap("send")
            proven = self._prove_digests(weights)
            lap("digests")
        except BaseException:
            with contextlib.suppress(EngineError):  # what went wrong first is what must be seen
                self._control.resume()
            raise
        self._control.resume()
        lap("resume")
        gap = self._prove_logprobs(model)
        lap("probe")
        total = len(weights.shapes())
        return WeightSyncReport(
            policy_version=policy_version,
            num_tensors=total,
            num_bytes=weights.num_bytes(),
            seconds=marks[-1] - marks[0],
            proof=f"{self._proof_words(proven, total)}; log-probs of the probe within {gap:.2g} nats",
            logprob_gap=gap,
            phases_s=phases,
        )

    def _proof_words(self, proven: int, total: int) -> str:
        if proven == total:
            return f"all {total} tensors held by the server have the digests of those sent"
        received = "digests of all tensors checked on receipt, " if self._transport.name == "ludic_shm" else ""
        return f"{received}{proven} of {total} held tensors compared (the others are packed by the backend)"

    def _prove_digests(self, weights: WireWeights) -> int:
        """Compare what the server holds with what was sent; the number of tensors that could be compared."""
        dtype_name = str(weights.dtype).removeprefix("torch.")
        workers = self._control.held_digests(
            {name: {"dtype": dtype_name, "shape": shape} for name, shape in weights.shapes().items()}
        )
        sent = weights.digests()
        held = {name: {worker.get(name, "") for worker in workers} - {""} for name in sent}
        wrong = sorted(name for name, digests in held.items() if digests - {sent[name]})
        if wrong:
            raise WeightSyncError(
                f"after the sync {len(wrong)} of {len(sent)} tensors on the server differ from those sent, "
                f"the first is {wrong[0]} (digest {'/'.join(sorted(held[wrong[0]]))}, sent {sent[wrong[0]]})"
            )
        return sum(bool(digests) for digests in held.values())

    def _prove_logprobs(self, model: "PreTrainedModel") -> float:
        """The mean |difference| in nats between the server's and the trainer's log-probs of the probe prompt."""
        served = torch.tensor(self._control.prompt_logprobs(self._served_model, self._probe))
        trained = _prompt_logprobs(model, self._probe)
        gap = (served - trained).abs().mean().item()
        if not gap <= PROBE_GAP_LIMIT:
            raise WeightSyncError(
                f"after the sync the server's log-probs of the probe prompt differ from the trainer's by {gap:.3g} nats "
                f"on average (limit {PROBE_GAP_LIMIT}): the server does not compute with the weights that it was sent"
            )
        return gap


TRANSPORTS: dict[str, Callable[[ServerControl], WeightTransport]] = {
    "nccl": NCCLTransport,
    "ludic_shm": SharedMemoryTransport,
}


@torch.no_grad()
def _prompt_logprobs(model: "PreTrainedModel", token_ids: list[int]) -> torch.Tensor:
    """[P - 1] float32 on the CPU: the model's log-probability of each token after the first, as training computes it."""
    probe = TrainingSample(
        token_ids=token_ids,
        loss_mask=[False] + [True] * (len(token_ids) - 1),
        rollout_logprobs=None,
        advantage=0.0,
        policy_version=0,
    )
    device = next(model.parameters()).device
    (row,) = pack([probe], token_budget=len(token_ids), normalisation="token_mean")
    was_training = model.training
    model.eval()
    # Eager: a compiled policy would be compiled once more for a forward without gradients.
    with (
        torch.compiler.set_stance("force_eager"),
        torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda"),
    ):
        stats = token_logprobs(model, row.to(device), temperature=1.0, with_entropy=False)
    model.train(was_training)
    return stats.logprobs[1:].float().cpu()


def _free_port(address: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind((address, 0))
        return int(sock.getsockname()[1])


def _address_towards(host: str) -> str:
    """This machine's address as `host` sees it; loopback stays loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((host, 9))  # a datagram socket: nothing is sent
        return str(sock.getsockname()[0])
