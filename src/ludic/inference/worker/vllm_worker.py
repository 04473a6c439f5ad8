"""What ludic adds inside vLLM's worker processes: its weight transports, digests of what is held, recorded log-probs.

vLLM imports this module in every worker because `--worker-extension-cls` names `LudicWorkerExtension`; importing it
registers the transports: `ludic_nccl` of `vllm_nccl`, and the one here.

The transport `ludic_shm` takes a whole policy from a safetensors file on a directory that trainer and server share
(`/dev/shm`, or any disk), for the CPU backend and for the first sync on one GPU, where `vllm_ipc` goes on. Every check of the
file happens before the model is touched, so a file that is refused leaves the old weights serving. It never deletes files:
they are the trainer's.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import vllm
from safetensors import SafetensorError, safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.logger import init_logger

from ludic.inference.weights.digest import digest_hex, tensor_digest, tensor_digests
from ludic.inference.wire import UNTOUCHED
from ludic.inference.worker import vllm_ipc
from ludic.inference.worker.vllm_logprobs import LogprobRecorder, recording_problem, start_recording, warm_up
from ludic.inference.worker.vllm_lora import adapter_views, are_adapters, open_adapter, slot_tensors, write_adapter
from ludic.inference.worker.vllm_model import (
    check_complete,
    checkpoint_views,
    finish_reload,
    in_place_problem,
    reload_policy,
)
from ludic.inference.worker.vllm_nccl import BucketWeightTransferEngine
from ludic.inference.worker.vllm_packed import PackedWeights, packed_layers, read_weight

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger: workers have no other handler

NOT_HELD = "-" * 16
"""In the place of a digest."""


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
            check_complete(self.model, tensors)
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
        return tensors

    def receive_adapter(self, update_info: dict[str, object]) -> None:
        """Take one version of the trainer's adapter, outside of vLLM's weight updates, at whose end vLLM drops all adapters."""
        try:
            tensors = self._checked_tensors(self.parse_update_info(update_info))
        except ValueError as error:
            raise ValueError(f"{error}; {UNTOUCHED}") from error
        write_adapter(self.model, {name: tensor.shape for name, tensor in tensors.items()}, tensors.items())
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

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


class LudicWorkerExtension:
    """Methods that `POST /collective_rpc` can call on every worker. vLLM mixes this class into its own worker."""

    if TYPE_CHECKING:
        vllm_config: VllmConfig
        model_runner: GPUModelRunner
        device: torch.device
        _weight_update_active: bool
        weight_transfer_engine: "SharedMemoryWeightTransferEngine | BucketWeightTransferEngine"
        _ludic_dtype: torch.dtype
        _ludic_packed: PackedWeights

    _ludic_shapes: Mapping[str, list[int]] | None = None
    _ludic_in_place_problem = ""
    _ludic_recorder: LogprobRecorder | None = None

    def ludic_server_info(self) -> dict[str, str | int | bool]:
        """What a trainer must know before it sends weights: their dtype, where they live, how they travel."""
        config = self.vllm_config
        transfer, lora = config.weight_transfer_config, config.lora_config
        on_gpu = self.device.type == "cuda"
        return {
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "head_dtype": str(config.model_config.head_dtype).removeprefix("torch."),
            "device": self.device.type,
            "transfer_backend": transfer.backend if transfer is not None else "",
            "vllm_version": vllm.__version__,
            "model": config.model_config.model,
            "logprobs_mode": str(config.model_config.logprobs_mode),
            "generation_config": str(config.model_config.generation_config),
            # Names the GPU, whatever number each process gives it.
            "device_uuid": str(torch.cuda.get_device_properties(self.device).uuid) if on_gpu else "",
            "tp_size": config.parallel_config.tensor_parallel_size,
            "max_lora_rank": 0 if lora is None else lora.max_lora_rank,
        }

    def ludic_expect_weights(self, specs_json: str) -> dict[str, str]:
        """Agree on the tensors that `ludic_held_digests` is about, by checkpoint (HF) name and in order.

        `specs_json` is `{name: {"dtype": "bfloat16", "shape": [...]}}`, a string because vLLM's route passes only strings.
        The answer's `in_place_problem` says why they could not be written straight into this worker's model, "" if they can.
        """
        specs = json.loads(specs_json)
        (dtype_name,) = {spec["dtype"] for spec in specs.values()}  # weights are sent in one
        model, shapes = self.model_runner.get_model(), {name: spec["shape"] for name, spec in specs.items()}
        self._ludic_shapes, self._ludic_dtype = shapes, getattr(torch, dtype_name)
        if are_adapters(shapes):
            return {"in_place_problem": ""}
        self._ludic_packed = PackedWeights(model)
        problem = in_place_problem(model, self.vllm_config.parallel_config, shapes, self._ludic_dtype)
        self._ludic_in_place_problem = problem
        return {"in_place_problem": problem}

    def ludic_ipc_problem(self, request_json: str) -> str:
        """Why weights cannot come over CUDA IPC (`vllm_ipc.Request` in JSON), "" if they can."""
        return vllm_ipc.ipc_problem(vllm_ipc.Request.of(request_json), self.device)

    def ludic_receive_over_ipc(self, request_json: str) -> dict[str, str | bool]:
        """Copy all agreed weights from the trainer's memory on this GPU; `ludic_held_digests` of what the model then holds.

        `problem` says why they were not taken, "" if they were; `touched` whether weights may have been replaced. Between two
        steps of the model, as every call: no step sees a part of them.
        """
        shapes, problem = self._ludic_shapes, self._ludic_in_place_problem
        if shapes is None or problem:
            return {"problem": problem or "nothing was agreed on: call ludic_expect_weights first", "touched": False}
        model, request = self._ludic_whole_model(), vllm_ipc.Request.of(request_json)
        problem, touched = vllm_ipc.receive(model, shapes, self._ludic_dtype, self.device, request)
        answer: dict[str, str | bool] = {"problem": problem, "touched": touched}
        return answer if problem else answer | self.ludic_held_digests()

    def _ludic_whole_model(self) -> torch.nn.Module:
        """Raises ValueError while not all of its weights are in place."""
        model: torch.nn.Module = self.model_runner.get_model()
        if self._weight_update_active or any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError("a weight update was begun and not finished: what it carried is not in place")
        return model

    def ludic_held_digests(self) -> dict[str, str | bool]:
        """Digests of what the model holds now, as strings of 16 characters a tensor, 16 dashes where there is none.

        `digests` are of the model's memory, `packed` of what packed layers multiply with (`vllm_packed`), of canonical values;
        a tensor can have both, and then both must be right. `flushes` says that those take subnormal numbers for zeros,
        `inexact` names a layer that cannot be read back exactly, "" for none.
        """
        shapes = self._ludic_shapes
        if shapes is None:
            raise ValueError("nothing was agreed on: call ludic_expect_weights first (was the server restarted?)")
        model = self._ludic_whole_model()
        is_adapter = are_adapters(shapes)
        packed = {} if is_adapter else self._ludic_packed.digests(shapes)
        views = adapter_views(model.lora_manager, shapes) if is_adapter else checkpoint_views(model, shapes)
        digests = tensor_digests([_held_as(view, self._ludic_dtype) for view in views.values()])
        # What a layer that rounds multiplies with is not known: the memory beside it proves nothing.
        held = {name: digest_hex(one) for name, one in zip(views, digests, strict=True) if packed.get(name) != ""}
        return {
            "digests": "".join(held.get(name, NOT_HELD) for name in shapes),
            "packed": "".join(packed.get(name) or NOT_HELD for name in shapes),
            "flushes": not is_adapter and self._ludic_packed.flushes,
            "inexact": "" if is_adapter else self._ludic_packed.inexact,
        }

    def ludic_open_adapter(self, specs_json: str) -> str:
        """`open_adapter` of `vllm_lora`."""
        return open_adapter(self.model_runner, self.vllm_config, specs_json)

    def ludic_receive_adapter(self, update_info_json: str) -> str:
        """Let the transport take a new version of the adapter; why it did not, "" where it did.

        One call, between two steps: vLLM's own updates, of three calls, drop all adapters when they end.
        """
        try:
            self.weight_transfer_engine.receive_adapter(json.loads(update_info_json))
        except ValueError as error:  # the text of an exception does not reach the caller of this route
            return str(error) or type(error).__name__
        return ""

    def ludic_weights_digest(self) -> str:
        """One digest of all that this worker's model multiplies with, in the form in which it holds it.

        The same weights in another dtype, on another kind of device or in other shards have another digest.
        """
        model = self._ludic_whole_model()
        tensors = dict(sorted(model.named_parameters()))
        digests = list(zip(tensors, tensor_digests(list(tensors.values())), strict=True))
        for names, layer in packed_layers(model):  # on the CPU, where the parameter is empty
            digests.append((names[0], tensor_digest(read_weight(layer))))
        if self.vllm_config.lora_config is not None:
            digests += [(name, tensor_digest(held)) for name, held in slot_tensors(model.lora_manager)]
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]

    def ludic_record_logprobs(self) -> str:
        """From now on record the log-probs of the requests marked for it. The answer says why not, "" if it does."""
        if self._ludic_recorder is not None:  # another front end has asked
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
        assert self._ludic_recorder is not None, "ludic_record_logprobs comes first"
        for other in abandoned:
            self._ludic_recorder.forget(other)
        return self._ludic_recorder.take(key, prompt_length, lengths)

    def ludic_recorder_sizes(self) -> dict[str, int]:
        """What the recorder of log-probs holds; empty if it was never started."""
        return {} if self._ludic_recorder is None else self._ludic_recorder.sizes()


def _held_as(held: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The held tensor in the asked dtype where its values fit that exactly, else as it is (its digest then differs)."""
    if dtype == held.dtype:
        return held
    cast = held.to(dtype)
    return cast if torch.equal(cast.to(held.dtype), held) else held


def _checked_path(path: str, directory: str | None) -> str:
    """`path`, proven to be a regular file (no link) inside the agreed directory."""
    if directory is None:
        raise ValueError("ludic_shm has no directory yet: POST /init_weight_transfer_engine first")
    real_parent = os.path.realpath(os.path.dirname(path))
    if not os.path.isabs(path) or os.path.commonpath([directory, real_parent]) != directory:
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
    announced = set(update_info.names)
    if not announced:
        raise ValueError("update_info.names is empty: an update carries the whole policy")
    if missing := announced - tensors.keys():
        raise ValueError(f"tensor {min(missing)!r} was announced but is missing from {path}")
    if missing := announced - update_info.digests.keys():
        raise ValueError(f"tensor {min(missing)!r} has no digest in update_info.digests")
    if extra := tensors.keys() - announced:
        raise ValueError(f"tensor {min(extra)!r} is in {path} but was not announced in update_info.names")
    for name, digest in zip(tensors, tensor_digests(list(tensors.values())), strict=True):
        found = digest_hex(digest)
        if found != update_info.digests[name]:
            raise ValueError(
                f"tensor {name!r} arrived corrupted: its digest is {found}, the trainer sent {update_info.digests[name]}"
            )


WeightTransferEngineFactory.register_engine("ludic_shm", SharedMemoryWeightTransferEngine)
WeightTransferEngineFactory.register_engine("ludic_nccl", BucketWeightTransferEngine)
