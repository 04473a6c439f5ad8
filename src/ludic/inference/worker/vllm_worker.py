"""What ludic adds inside vLLM's worker processes: its weight transports, digests of what is held, recorded log-probs.

vLLM imports this module in every worker because `--worker-extension-cls` names `LudicWorkerExtension`; importing it
registers the transports: `ludic_nccl` of `vllm_nccl`, and the one here. These, `vllm_model` and `vllm_packed` are the modules
that import vLLM at the top; nothing else imports them.

The transport `ludic_shm` takes a whole policy from a safetensors file on a directory that trainer and server share
(`/dev/shm`, or any disk), for the CPU backend and for machines with one GPU. Every check of the file happens before the
model is touched, so a file that is refused leaves the old weights serving. It never deletes files: they are the trainer's.
"""

import hashlib
import inspect
import json
import os
import stat
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import torch
import vllm
from safetensors import SafetensorError, safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.logger import init_logger
from vllm.v1.request import Request

from ludic.inference.weights.digest import digest_hex, tensor_digest, tensor_digests
from ludic.inference.wire import UNTOUCHED
from ludic.inference.worker.vllm_logprobs import LogprobRecorder, recording_problem, start_recording, warm_up
from ludic.inference.worker.vllm_model import (
    check_complete,
    checkpoint_views,
    finish_reload,
    in_place_problem,
    reload_policy,
)
from ludic.inference.worker.vllm_nccl import NCCL_BACKEND, BucketWeightTransferEngine
from ludic.inference.worker.vllm_packed import PackedWeights, packed_layers, read_weight

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger: workers have no other handler

SHARED_MEMORY_BACKEND = "ludic_shm"
NOT_HELD = "-" * 16


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """`init_info` of `ludic_shm`: the directory that weight files must lie in."""

    directory: str


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """`update_info` of `ludic_shm`: one file with the whole policy, under checkpoint (HF) tensor names."""

    path: str
    names: list[str]
    digests: dict[str, str]
    """`digest_hex(tensor_digest(tensor))` of each tensor as it is in the file"""


class SharedMemoryWeightTransferEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """Loads a policy from a safetensors file that a trainer on the same machine wrote, through vLLM's layerwise reload.

    One `update_weights` between `start_weight_update` and `finish_weight_update`. All errors are ValueErrors in one line
    that name the tensor or the file; vLLM hands their text to the caller of the route.
    """

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo
    supports_draft_weight_update = False

    _directory: str | None = None
    _loaded = False

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Agree on the directory. Raises ValueError unless it is an absolute path of a directory."""
        if not os.path.isabs(init_info.directory) or not os.path.isdir(init_info.directory):
            raise ValueError(f"init_info.directory must be an existing absolute directory, not {init_info.directory!r}")
        self._directory = os.path.realpath(init_info.directory)

    def start_weight_update(self) -> None:
        """Nothing yet: layerwise reload empties the model, and that waits until the file is known to be good."""
        self._loaded = False

    def update_weights(self, update_info: dict[str, object]) -> None:
        """Check the file, then load it (the base class would wait for an accelerator, which the CPU has not)."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        """Verify every tensor of the file against its digest, then load all of them into the model."""
        if self._loaded:
            raise ValueError("ludic_shm takes the whole policy in one update_weights; a second came before the finish")
        try:
            tensors = self._checked_tensors(update_info)
        except ValueError as error:
            raise ValueError(f"{error}; {UNTOUCHED}") from error
        reload_policy(self.model, self.model_config, iter(tensors.items()))
        self._loaded = True

    def _checked_tensors(self, update_info: SharedMemoryUpdateInfo) -> dict[str, torch.Tensor]:
        path = _checked_path(update_info.path, self._directory)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
        _check_file(path, tensors, update_info)
        check_complete(self.model, tensors)
        return tensors

    def finish_weight_update(self) -> None:
        """Put the loaded layers in place, and rebuild what the reload leaves stale.

        Without an update before it, it changes nothing and warns. To raise would leave vLLM's session open for good, and
        a finish is how a new trainer closes the session of one that died.
        """
        if not self._loaded:
            logger.warning("finish_weight_update came without an update_weights: the weights are those from before")
            return
        self._loaded = False
        finish_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Forget the directory."""
        self._directory = None

    @staticmethod
    def trainer_send_weights(iterator: Iterator[object], trainer_args: object) -> None:
        """Abstract until vLLM 0.27, so it must exist; ludic's sender is in `ludic.inference.weights.weight_transport`."""
        raise NotImplementedError("ludic_shm is sent by ludic.inference.weights.weight_transport")


class TensorSpec(TypedDict):
    """What a caller of `ludic_weight_digests` expects of one tensor."""

    dtype: str
    shape: list[int]


class LudicWorkerExtension:
    """Methods that `POST /collective_rpc` can call on every worker. vLLM mixes this class into its own worker."""

    if TYPE_CHECKING:
        vllm_config: VllmConfig
        model_runner: GPUModelRunner
        device: torch.device
        rank: int
        _weight_update_active: bool
        _ludic_specs: dict[str, "TensorSpec"]
        _ludic_packed: PackedWeights
        _ludic_recorder: LogprobRecorder

    def ludic_server_info(self) -> dict[str, str | int | bool]:
        """What a trainer must know before it sends weights: their dtype, where they live, how they travel."""
        config = self.vllm_config
        transfer = config.weight_transfer_config
        return {
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "head_dtype": str(config.model_config.head_dtype).removeprefix("torch."),
            "device": self.device.type,
            "transfer_backend": transfer.backend if transfer is not None else "",
            "vllm_version": vllm.__version__,
            "model": config.model_config.model,
            "logprobs_mode": str(config.model_config.logprobs_mode),
            "generation_config": str(config.model_config.generation_config),
            "device_uuid": _device_uuid(self.device),
            "tp_size": config.parallel_config.tensor_parallel_size,
            "pp_size": config.parallel_config.pipeline_parallel_size,
            "rank": self.rank,
            "cache_salt": "cache_salt" in inspect.signature(Request.__init__).parameters,
        }

    def ludic_expect_weights(self, specs_json: str) -> dict[str, str]:
        """Agree on the tensors that `ludic_held_digests` is about, in order; `specs_json` as for `ludic_weight_digests`.

        The answer's `in_place_problem` says why they could not be written straight into this worker's model, "" if they can.
        """
        specs: dict[str, TensorSpec] = json.loads(specs_json)
        self._ludic_specs = specs
        self._ludic_packed = PackedWeights(self.model_runner.get_model())
        self._ludic_packed.try_out()
        dtypes = {spec["dtype"] for spec in specs.values()}
        problem = f"it is sent in several dtypes ({', '.join(sorted(dtypes))})" if len(dtypes) > 1 else ""
        if not problem:
            problem = in_place_problem(
                self.model_runner.get_model(),
                self.vllm_config.parallel_config,
                list(specs),
                [spec["shape"] for spec in specs.values()],
                getattr(torch, next(iter(dtypes), "float32")),
            )
        return {"in_place_problem": problem}

    def ludic_held_digests(self) -> dict[str, str | bool]:
        """Digests of what the model holds now, as strings of 16 characters a tensor, 16 dashes where there is none.

        `digests` are of the model's memory, `packed` of what packed layers multiply with (`vllm_packed`), of canonical values;
        a tensor can have both, and then both must be right. `flushes` says that those take subnormal numbers for zeros,
        `inexact` names a layer that cannot be read back exactly, "" for none.
        """
        specs = getattr(self, "_ludic_specs", None)
        if specs is None:
            raise ValueError("nothing was agreed on: call ludic_expect_weights first (was the server restarted?)")
        model = self.model_runner.get_model()
        if self._weight_update_active or any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError("a weight update was begun and not finished: what it carried is not in place")
        packed = self._ludic_packed.digests({name: spec["shape"] for name, spec in specs.items()})
        in_memory = dict(zip(specs, _held_digests(model, specs), strict=True))
        unread = {name for name, digest in packed.items() if not digest}
        return {
            "digests": _row_of(in_memory, specs, unread),
            "packed": _row_of(packed, specs, unread),
            "flushes": self._ludic_packed.flushes,
            "inexact": self._ludic_packed.inexact,
        }

    def ludic_weight_digests(self, specs_json: str) -> dict[str, str]:
        """Digests of the weights that the model holds now, by checkpoint (HF) name.

        `specs_json` is `{name: {"dtype": "bfloat16", "shape": [...]}}`, a string because vLLM's route passes only strings.
        The answer has every name; "" means that this worker's memory does not hold the tensor in a form that can be compared:
        packed for the CPU, quantised, a tensor-parallel shard, another pipeline stage.
        """
        specs: dict[str, TensorSpec] = json.loads(specs_json)
        return dict(zip(specs, _held_digests(self.model_runner.get_model(), specs), strict=True))

    def ludic_weights_digest(self) -> str:
        """One digest of all that this worker's model multiplies with, in the form in which it holds it.

        The same weights in another dtype, on another kind of device or in other shards have another digest.
        """
        model = self.model_runner.get_model()
        tensors = dict(sorted(model.named_parameters()))
        if self._weight_update_active or any(tensor.is_meta for tensor in tensors.values()):
            raise ValueError("a weight update is under way: ask again when it is finished")
        digests = list(zip(tensors, tensor_digests(list(tensors.values())), strict=True))
        for names, layer in packed_layers(model):  # on the CPU, where the parameter is empty
            digests.append((names[0], tensor_digest(read_weight(layer))))
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]

    def ludic_record_logprobs(self) -> str:
        """From now on record the log-probs of the requests marked for it. The answer says why not, "" if it does."""
        if hasattr(self, "_ludic_recorder"):  # another front end has asked
            return ""
        problem = recording_problem(self.model_runner, self.vllm_config)
        if not problem:
            model_config = self.vllm_config.model_config
            warm_up(self.device, model_config.get_vocab_size(), (model_config.dtype, torch.float32))
            self._ludic_recorder = LogprobRecorder()
            start_recording(self.model_runner, self._ludic_recorder)
        return problem

    def ludic_take_logprobs(
        self, key: str, prompt_length: int, lengths: list[int], abandoned: list[str]
    ) -> list[tuple[bytes, bytes] | None]:
        """`LogprobRecorder.take` of the request `key`; what was recorded for `abandoned` requests is forgotten."""
        for other in abandoned:
            self._ludic_recorder.forget(other)
        return self._ludic_recorder.take(key, prompt_length, lengths)

    def ludic_recorder_sizes(self) -> dict[str, int]:
        """What the recorder of log-probs holds; empty if it was never started."""
        recorder = getattr(self, "_ludic_recorder", None)
        return {} if recorder is None else recorder.sizes()


def _row_of(digests: Mapping[str, str], names: Iterable[str], unread: Container[str]) -> str:
    return "".join((digests.get(name) if name not in unread else "") or NOT_HELD for name in names)


def _device_uuid(device: torch.device) -> str:
    """Names the GPU, whatever number each process gives it; "" on the CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _held_digests(model: torch.nn.Module, specs: Mapping[str, TensorSpec]) -> list[str]:
    """Digests of the model's own memory in the order of `specs`, "" where it holds no comparable tensor."""
    views = checkpoint_views(model, {name: spec["shape"] for name, spec in specs.items()})
    held = {name: _held_as(views[name], spec["dtype"]) for name, spec in specs.items() if name in views}
    digests = dict(zip(held, tensor_digests(list(held.values())), strict=True))
    return [digest_hex(digests[name]) if name in digests else "" for name in specs]


def _held_as(held: torch.Tensor, dtype_name: str) -> torch.Tensor:
    """The held tensor in the asked dtype where its values fit that exactly, else as it is (its digest then differs)."""
    dtype = getattr(torch, dtype_name, None)
    if isinstance(dtype, torch.dtype) and dtype != held.dtype:
        cast = held.to(dtype)
        return cast if torch.equal(cast.to(held.dtype), held) else held
    return held


def _checked_path(path: str, directory: str | None) -> str:
    """`path`, proven to be a regular file (no link) inside the agreed directory."""
    if directory is None:
        raise ValueError("ludic_shm has no directory yet: POST /init_weight_transfer_engine first")
    real_parent = os.path.realpath(os.path.dirname(path))
    inside = os.path.isabs(path) and os.path.commonpath([directory, real_parent]) == directory
    if not inside:
        raise ValueError(f"weight file {path!r} is outside {directory!r}, the directory agreed at init")
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        raise ValueError(f"weight file {path!r} is not there (written by a trainer on another machine?)") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"weight file {path!r} is not a regular file")
    return os.path.join(real_parent, os.path.basename(path))


def _check_file(path: str, tensors: Mapping[str, torch.Tensor], update_info: SharedMemoryUpdateInfo) -> None:
    """The file holds exactly the announced names, each with the announced digest."""
    if not update_info.names:
        raise ValueError("update_info.names is empty: an update carries the whole policy")
    announced = set(update_info.names)
    for name in update_info.names:
        if name not in tensors:
            raise ValueError(f"tensor {name!r} was announced but is missing from {path}")
        if name not in update_info.digests:
            raise ValueError(f"tensor {name!r} has no digest in update_info.digests")
    for name, digest in zip(tensors, tensor_digests(list(tensors.values())), strict=True):
        if name not in announced:
            raise ValueError(f"tensor {name!r} is in {path} but was not announced in update_info.names")
        found = digest_hex(digest)
        if found != update_info.digests[name]:
            raise ValueError(
                f"tensor {name!r} arrived corrupted: its digest is {found}, the trainer sent {update_info.digests[name]}"
            )


WeightTransferEngineFactory.register_engine(SHARED_MEMORY_BACKEND, SharedMemoryWeightTransferEngine)
WeightTransferEngineFactory.register_engine(NCCL_BACKEND, BucketWeightTransferEngine)
