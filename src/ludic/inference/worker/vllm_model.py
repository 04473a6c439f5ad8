"""What ludic knows of a model inside a vLLM worker: where checkpoint tensors lie in it, and the two ways to replace them.

- `reload_policy` and `finish_reload` hand a policy to vLLM's own layerwise reload, which is right for every model.
- `checkpoint_views` finds the memory that holds a checkpoint tensor. Where `in_place_problem` finds nothing against it, a
  new policy can be copied straight there: one pass at memory speed, and no address changes, so CUDA graphs stay valid.

Whether a checkpoint's values lie there unchanged cannot be read off a model; `nccl_transport` writes in place only after a
sync through vLLM's reload whose digests agreed at exactly these places.
"""

import bisect
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.config.parallel import ParallelConfig

_CONV1D = dict.fromkeys(("c_attn", "c_fc", "c_proj"), "GPT2Model")
"""Modules whose checkpoints hold weights as [inputs, outputs], with the class of vLLM's that they are part of."""
_PLAIN_METHODS = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


def checkpoint_views(
    model: torch.nn.Module,
    shapes: Mapping[str, Sequence[int]],
    parameters: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Views into `model`'s parameters for the checkpoint tensors named in `shapes`, leaving out what has no view.

    vLLM fuses some checkpoint tensors along dimension 0 (q, k and v into qkv), as `packed_modules_mapping` says, and pads
    the vocabulary; a view is the slice that holds the tensor. Sizes must add up exactly, else the layout is not the plain
    one (tensor-parallel shards, packed or quantised weights) and there is no view. `parameters`, by their names in the
    model, take the place of its own.
    """
    if parameters is None:
        # remove_duplicate=False: a tied lm_head is then found under its own name too.
        parameters = {checkpoint_name(name): one for name, one in model.named_parameters(remove_duplicate=False)}
    packed = _packed_modules(model)
    fused = {part: (whole, parts) for whole, parts in packed.items() for part in parts if part != whole}
    views: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        view = None
        if name in parameters:
            held = parameters[name]
            # A square one would fit either way.
            view = _leading_rows(held.t() if held.dim() == 2 and _is_transposed(model, last) else held, shape)
        elif last in fused:
            whole, parts = fused[last]
            siblings = [f"{parent}.{part}.{leaf}" for part in parts]
            view = _fused_slice(parameters.get(f"{parent}.{whole}.{leaf}"), siblings, name, shapes)
        # Falcon, Bloom and GPT-NeoX checkpoints interleave the heads of q, k and v, and vLLM reorders them.
        if view is not None and last != "query_key_value":
            views[name] = view
    return views


def checkpoint_name(name: str) -> str:
    """Of a parameter; with `--enable-lora` vLLM wraps layers, whose own parameters are then one name deeper."""
    return name.replace(".base_layer.", ".")


def _packed_modules(model: torch.nn.Module) -> dict[str, list[str]]:
    mapping = getattr(model, "packed_modules_mapping", None)
    return mapping if isinstance(mapping, dict) else {}


def _is_transposed(model: torch.nn.Module, last: str) -> bool:
    return last in _CONV1D and any(type(module).__name__ == _CONV1D[last] for module in model.modules())


def _leading_rows(parameter: torch.Tensor, shape: Sequence[int]) -> torch.Tensor | None:
    """The first shape[0] rows: vLLM pads the vocabulary to a multiple of 64 behind the real rows."""
    if parameter.shape == torch.Size(shape):
        return parameter
    same_rows = parameter.dim() == 2 and parameter.shape[1:] == torch.Size(shape[1:])
    return parameter[: shape[0]] if same_rows and 0 < parameter.shape[0] - shape[0] < 64 else None


def _fused_slice(
    parameter: torch.Tensor | None, siblings: list[str], name: str, shapes: Mapping[str, Sequence[int]]
) -> torch.Tensor | None:
    """The rows of `name` in a parameter that stacks `siblings` along dimension 0."""
    if parameter is None or any(sibling not in shapes for sibling in siblings):
        return None
    rows = [shapes[sibling][0] for sibling in siblings]
    if parameter.shape != torch.Size([sum(rows), *shapes[name][1:]]):
        return None
    place = siblings.index(name)
    return parameter.narrow(0, sum(rows[:place]), rows[place])


def in_place_problem(
    model: torch.nn.Module,
    parallel_config: "ParallelConfig",
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
) -> str:
    """Why the checkpoint tensors named in `shapes` cannot be copied straight into `model`; "" where they can."""
    tensor, pipeline = parallel_config.tensor_parallel_size, parallel_config.pipeline_parallel_size
    if (tensor, pipeline) != (1, 1):
        return f"the server splits the model (tensor parallel {tensor}, pipeline parallel {pipeline})"
    for name, module in model.named_modules():
        if problem := _derived_weights(module):
            return f"{name or 'the model'} {problem}"
    views = checkpoint_views(model, shapes)
    for name in shapes:
        view = views.get(name)
        if view is None:
            return f"the served model holds {name} in another layout"
        if view.dtype != dtype or not view.is_contiguous():
            return f"the served model holds {name} as {view.dtype} with strides {view.stride()}"
    return _misfit(model, views)


def in_place_targets(
    model: torch.nn.Module, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Where the checkpoint tensors named in `shapes` are written in place, in that order.

    Found anew each time: a reload, or sleep mode, may have put other parameters in place.

    Raises:
        ValueError: a tensor has no such place.
    """
    views = checkpoint_views(model, shapes)
    fit = {name: view for name, view in views.items() if view.dtype == dtype and view.is_contiguous()}
    unfit = next((name for name in shapes if name not in fit), None)
    if unfit is not None:
        raise ValueError(f"the weights cannot be written in place: {unfit}")
    return [fit[name] for name in shapes]


def _derived_weights(module: torch.nn.Module) -> str:
    """What of the module's is computed from its weights when they are loaded, and so would go stale; "" if nothing.

    vLLM marks it by a layer's `quant_method`, or by a `process_weights_after_loading` of the module's own (MLA, fused kernels).
    """
    method = getattr(module, "quant_method", None)
    if isinstance(method, QuantizeMethodBase) and type(method) not in _PLAIN_METHODS:
        return f"is loaded by {type(method).__name__}"
    if hasattr(module, "cpu_linear"):
        return "multiplies with a packed copy of its weights"
    if isinstance(module, Attention):
        sinks = [getattr(module.impl, name, None) for name in ("sinks", "_sinks_source")]
        return "has attention sinks" if any(sink is not None for sink in sinks) else ""
    if hasattr(module, "process_weights_after_loading"):
        return f"({type(module).__name__}) processes its weights after loading"
    return ""


def _misfit(model: torch.nn.Module, views: Mapping[str, torch.Tensor]) -> str:
    """Two tensors in one place, or a parameter that no tensor fills; "" where neither is found."""
    ranges = sorted((view.data_ptr(), view.data_ptr() + view.nbytes, name) for name, view in views.items())
    for (_, end, first), (begin, _, second) in itertools.pairwise(ranges):
        if begin < end:
            return f"the served model holds {first} and {second} in one place"
    starts = [begin for begin, _, _ in ranges]
    for name, parameter in model.named_parameters():
        begin = parameter.data_ptr()
        following = bisect.bisect_left(starts, begin)
        if following == len(starts) or starts[following] >= begin + parameter.nbytes:
            return f"nothing that is sent fills {name}"
    return ""


def reload_policy(
    model: torch.nn.Module, model_config: "ModelConfig", tensors: Iterator[tuple[str, torch.Tensor]]
) -> None:
    """Hand a whole policy to vLLM's layerwise reload; `finish_reload` must follow unless this raises ValueError.

    The error is one line that names the tensor. What was loaded until then stays.
    """
    current, shape = "", torch.Size()

    def one_by_one() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal current, shape
        for name, tensor in tensors:
            current, shape = name, tensor.shape
            yield name, tensor

    parameters = {name for name, _ in model.named_parameters()}
    _let_experts_pack_anew(model)
    initialize_layerwise_reload(model)
    problem = ""
    try:
        loaded = model.load_weights(one_by_one())  # type: ignore[operator]
    except (AssertionError, KeyError, RuntimeError, ValueError) as error:
        problem = f"the served model refused tensor {current!r} of shape {list(shape)}: {error}"
    else:
        # Some models report nothing (None); the others report the parameters that they filled.
        missing = sorted(parameters - loaded) if loaded else []
        if missing:
            problem = f"the update is partial: nothing in it fills {len(missing)} parameters, e.g. {missing[0]!r}"
    if problem:
        # Ends the reload, so that the next update starts clean; what was loaded until here stays.
        finalize_layerwise_reload(model, model_config)
        raise ValueError(f"{problem}; the server now holds a mixture: send a whole policy that fits it, or restart it")


def finish_reload(model: torch.nn.Module, model_config: "ModelConfig") -> None:
    """Put the reloaded layers in place, and rebuild what the reload leaves stale."""
    finalize_layerwise_reload(model, model_config)
    _rebuild_tied_cpu_heads(model)


def _let_experts_pack_anew(model: torch.nn.Module) -> None:
    """Let the CPU backend pack the experts of a mixture when they are loaded again, and not only when their kernel is made.

    vLLM makes it at the first load only, because a GPU's graphs hold its addresses.
    """
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod) and method.unquantized_backend is UnquantizedMoeBackend.CPU:
            method.moe_kernel = None


def check_complete(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse an update that lacks some of the model's tensors: vLLM would keep the old ones with no more than a warning.

    Only where the checkpoint's names are the model's own (but for fused ones); where load_weights renames them, names
    cannot be compared before loading, and `reload_policy` compares what vLLM says it loaded.
    """
    packed = _packed_modules(model)
    parameters = {name for name, _ in model.named_parameters()}  # a tied head is left out here, as in checkpoints
    expected = {part for name in parameters for part in _checkpoint_names(name, packed)}
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    # Some checkpoints hold fused what others of the same class of vLLM's hold in parts.
    needed = {part for name in parameters - tensors.keys() for part in _checkpoint_names(name, packed)}
    missing = sorted(needed - tensors.keys())
    if missing and tensors.keys() <= expected | aliases:
        raise ValueError(
            f"the update is partial: tensor {missing[0]!r} is missing ({len(missing)} of {len(expected)} are)"
        )


def _checkpoint_names(parameter: str, packed: Mapping[str, list[str]]) -> list[str]:
    module, _, leaf = parameter.rpartition(".")
    parent, _, last = module.rpartition(".")
    return [f"{parent}.{part}.{leaf}" for part in packed[last]] if last in packed else [parameter]


def _rebuild_tied_cpu_heads(model: torch.nn.Module) -> None:
    """Repack the weights that two layers share, where the CPU backend packs them.

    On the CPU, vLLM multiplies with a packed copy of a layer's weight, made when the layer is loaded. A reload loads a
    tied weight through the embedding alone, so that the output head would go on with its copy of the old one.
    """
    layers_by_weight = defaultdict[int, list[torch.nn.Module]](list)
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        if weight is not None and weight.numel() and hasattr(layer, "cpu_linear"):
            layers_by_weight[id(weight)].append(layer)
    for layers in layers_by_weight.values():
        for layer in layers if len(layers) > 1 else ():
            quant_method = getattr(layer, "quant_method")  # noqa: B009 (nn.Module types attributes as tensors)
            with torch.no_grad():
                quant_method.process_weights_after_loading(layer)
