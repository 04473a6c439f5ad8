"""What ludic adds inside vLLM's worker processes: a weight transport that needs no NCCL, and digests of what is held.

vLLM imports this module in every worker because `--worker-extension-cls` names `LudicWorkerExtension`; importing it
registers the transport. It is therefore the one module here that imports vLLM at the top; nothing else imports it.

The transport, `ludic_shm`, takes a whole policy from a safetensors file on a directory that trainer and server share
(`/dev/shm`, or any disk), for the CPU backend and for machines with one GPU. Every check of the file happens before the
model is touched, so a file that is refused leaves the old weights serving. It never deletes files: they are the trainer's.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping
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
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from ludic.inference.digest import digest_hex, tensor_digest

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger: workers have no other handler

SHARED_MEMORY_BACKEND = "ludic_shm"


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
        path = _checked_path(update_info.path, self._directory)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
        _check_file(path, tensors, update_info)
        _check_complete(self.model, tensors)
        self._load(tensors)
        self._loaded = True

    def finish_weight_update(self) -> None:
        """Put the loaded layers in place, and rebuild what the reload leaves stale.

        Without an update before it, it changes nothing and warns. To raise would leave vLLM's session open for good, and
        a finish is how a new trainer closes the session of one that died.
        """
        if not self._loaded:
            logger.warning("finish_weight_update came without an update_weights: the weights are those from before")
            return
        self._loaded = False
        finalize_layerwise_reload(self.model, self.model_config)
        _rebuild_tied_cpu_heads(self.model)

    def shutdown(self) -> None:
        """Forget the directory."""
        self._directory = None

    @staticmethod
    def trainer_send_weights(iterator: Iterator[object], trainer_args: object) -> None:
        """Abstract until vLLM 0.27, so it must exist; ludic's sender is in `ludic.inference.weight_transport`."""
        raise NotImplementedError("ludic_shm is sent by ludic.inference.weight_transport")

    def _load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        current = ""

        def one_by_one() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal current
            for name, tensor in tensors.items():
                current = name
                yield name, tensor

        parameters = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)
        problem = ""
        try:
            loaded = self.model.load_weights(one_by_one())
        except (AssertionError, KeyError, RuntimeError, ValueError) as error:
            problem = f"the served model refused tensor {current!r} of shape {list(tensors[current].shape)}: {error}"
        else:
            # Some models report nothing (None); the others report the parameters that they filled.
            missing = sorted(parameters - loaded) if loaded else []
            if missing:
                problem = f"the update is partial: nothing in it fills {len(missing)} parameters, e.g. {missing[0]!r}"
        if problem:
            # Ends the reload, so that the next update starts clean; what was loaded until here stays.
            finalize_layerwise_reload(self.model, self.model_config)
            raise ValueError(
                f"{problem}; the server now holds a mixture: send a whole policy that fits it, or restart it"
            )


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

    def ludic_server_info(self) -> dict[str, str | int]:
        """What a trainer must know before it sends weights: their dtype, where they live, how they travel."""
        config = self.vllm_config
        transfer = config.weight_transfer_config
        return {
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "device": self.device.type,
            "transfer_backend": transfer.backend if transfer is not None else "",
            "vllm_version": vllm.__version__,
            "model": config.model_config.model,
            "logprobs_mode": str(config.model_config.logprobs_mode),
            "tp_size": config.parallel_config.tensor_parallel_size,
            "pp_size": config.parallel_config.pipeline_parallel_size,
            "rank": self.rank,
        }

    def ludic_weight_digests(self, specs_json: str) -> dict[str, str]:
        """Digests of the weights that the model holds now, by checkpoint (HF) name.

        `specs_json` is `{name: {"dtype": "bfloat16", "shape": [...]}}`, a string because vLLM's route passes only strings.
        The answer has every name; "" means that this worker does not hold the tensor in a form that can be compared:
        packed for the CPU, quantised, a tensor-parallel shard, another pipeline stage.
        """
        specs: dict[str, TensorSpec] = json.loads(specs_json)
        held = checkpoint_views(self.model_runner.get_model(), {name: spec["shape"] for name, spec in specs.items()})
        return {name: _digest_as(held.get(name), spec["dtype"]) for name, spec in specs.items()}


def checkpoint_views(model: torch.nn.Module, shapes: Mapping[str, list[int]]) -> dict[str, torch.Tensor]:
    """Views into `model`'s parameters for the checkpoint tensors named in `shapes`, leaving out what has no view.

    vLLM fuses some checkpoint tensors along dimension 0 (q, k and v into qkv), as `packed_modules_mapping` says, and pads
    the vocabulary; a view is the slice that holds the tensor. Sizes must add up exactly, else the layout is not the plain
    one (tensor-parallel shards, packed or quantised weights) and there is no view.
    """
    # remove_duplicate=False: a tied lm_head is then found under its own name too.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    fused = {part: (whole, parts) for whole, parts in _packed_modules(model).items() for part in parts if part != whole}
    views: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if name in parameters:
            view = _leading_rows(parameters[name], shape)
        elif last in fused:
            whole, parts = fused[last]
            siblings = [f"{parent}.{part}.{leaf}" for part in parts]
            view = _fused_slice(parameters.get(f"{parent}.{whole}.{leaf}"), siblings, name, shapes)
        else:
            view = None
        # Falcon, Bloom and GPT-NeoX checkpoints interleave the heads of q, k and v, and vLLM reorders them.
        if view is not None and last != "query_key_value":
            views[name] = view
    return views


def _packed_modules(model: torch.nn.Module) -> dict[str, list[str]]:
    mapping = getattr(model, "packed_modules_mapping", None)
    return mapping if isinstance(mapping, dict) else {}


def _leading_rows(parameter: torch.Tensor, shape: list[int]) -> torch.Tensor | None:
    """The first shape[0] rows: vLLM pads the vocabulary to a multiple of 64 behind the real rows."""
    padded = parameter.dim() == 2 and parameter.shape[1:] == torch.Size(shape[1:]) and parameter.shape[0] >= shape[0]
    same = list(parameter.shape) == shape
    if same:
        return parameter
    return parameter[: shape[0]] if padded and parameter.shape[0] - shape[0] < 64 else None


def _fused_slice(
    parameter: torch.Tensor | None, siblings: list[str], name: str, shapes: Mapping[str, list[int]]
) -> torch.Tensor | None:
    """The rows of `name` in a parameter that stacks `siblings` along dimension 0."""
    if parameter is None or any(sibling not in shapes for sibling in siblings):
        return None
    rows = [shapes[sibling][0] for sibling in siblings]
    if list(parameter.shape) != [sum(rows), *shapes[name][1:]]:
        return None
    place = siblings.index(name)
    return parameter.narrow(0, sum(rows[:place]), rows[place])


def _digest_as(held: torch.Tensor | None, dtype_name: str) -> str:
    """Digest in the asked dtype where the held values fit it exactly, else in the held one (which then differs)."""
    if held is None:
        return ""
    dtype = getattr(torch, dtype_name, None)
    if isinstance(dtype, torch.dtype) and dtype != held.dtype:
        cast = held.to(dtype)
        held = cast if torch.equal(cast.to(held.dtype), held) else held
    return digest_hex(tensor_digest(held))


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
    for name, tensor in tensors.items():
        if name not in announced:
            raise ValueError(f"tensor {name!r} is in {path} but was not announced in update_info.names")
        found = digest_hex(tensor_digest(tensor))
        if found != update_info.digests[name]:
            raise ValueError(
                f"tensor {name!r} arrived corrupted: its digest is {found}, the trainer sent {update_info.digests[name]}"
            )


def _check_complete(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse an update that lacks some of the model's tensors: vLLM would keep the old ones with no more than a warning.

    Only where the checkpoint's names are the model's own (but for fused ones); where load_weights renames them, names
    cannot be compared before loading, and `_load` compares what vLLM says it loaded.
    """
    packed = _packed_modules(model)
    expected = {name for name, _ in model.named_parameters()}  # a tied head is left out here, as in checkpoints
    expected = {part for name in expected for part in _checkpoint_names(name, packed)}
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = sorted(expected - tensors.keys())
    if missing and tensors.keys() <= expected | aliases:
        raise ValueError(
            f"the update is partial: tensor {missing[0]!r} is missing ({len(missing)} of {len(expected)} are)"
        )


def _checkpoint_names(parameter: str, packed: Mapping[str, list[str]]) -> list[str]:
    """The checkpoint tensors that one of the model's parameters is made of."""
    module, _, leaf = parameter.rpartition(".")
    parent, _, last = module.rpartition(".")
    return [f"{parent}.{part}.{leaf}" for part in packed[last]] if last in packed else [parameter]


def _rebuild_tied_cpu_heads(model: torch.nn.Module) -> None:
    """Repack the weights that two layers share, where the CPU backend packs them.

    On the CPU, vLLM multiplies with a packed copy of a layer's weight, made when the layer is loaded. A reload loads a
    tied weight through the embedding alone, so that the output head would go on with its copy of the old one.
    """
    layers_by_weight: dict[int, list[torch.nn.Module]] = {}
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        if weight is not None and weight.numel() and hasattr(layer, "cpu_linear"):
            layers_by_weight.setdefault(id(weight), []).append(layer)
    for layers in layers_by_weight.values():
        if len(layers) < 2:
            continue
        for layer in layers:
            quant_method = getattr(layer, "quant_method")  # noqa: B009 (nn.Module types attributes as tensors)
            with torch.no_grad():
                quant_method.process_weights_after_loading(layer)


WeightTransferEngineFactory.register_engine(SHARED_MEMORY_BACKEND, SharedMemoryWeightTransferEngine)
