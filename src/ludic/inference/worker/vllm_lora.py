"""The one adapter of a trainer inside a vLLM worker: opened once, then rewritten in place at each sync.

A server that was started with `--enable-lora` keeps the adapters that it computes with in stacked buffers, one slot for each.
`open_adapter` gives the trainer's adapter a slot, all zeros, and pins it there, so that vLLM neither moves nor drops it.
`write_adapter` copies a new version into the slot. No address changes, so CUDA graphs stay valid, and no request has to be
given another adapter: running ones go on with the new version, as they do when whole models are sent.

vLLM multiplies an adapter's scale alpha / r into B when it loads one; a trainer sends B with the scale in it. Left out: tensor
and pipeline parallel servers, which split the buffers; mixtures of experts; adapters of embeddings and of the output layer.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ludic.inference.wire import ADAPTER_ID, ADAPTER_NAME

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest

_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
"""As peft writes it."""
_RESTART = "restart the server without it, or train with --lora-sync merged"


def are_adapters(names: Iterable[str]) -> bool:
    """Whether these are names of an adapter's tensors and not of a model's."""
    return all(_NAME.fullmatch(name) for name in names)


def request_of_adapter() -> "LoRARequest":
    """What vLLM knows the adapter by. There is no such path: the worker has the adapter before any request names it."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=ADAPTER_NAME, lora_int_id=ADAPTER_ID, lora_path=ADAPTER_NAME)


def open_adapter(runner: Any, vllm_config: "VllmConfig", specs_json: str) -> str:
    """Give the trainer's adapter a slot, with zeros in it; why this worker cannot serve it, "" where it can.

    `specs_json` is `{"rank": r, "dtype": "bfloat16", "shapes": {name: [...]}}`, the names as peft writes them.
    """
    specs = json.loads(specs_json)
    lora, parallel = vllm_config.lora_config, vllm_config.parallel_config
    if lora is None:
        return "the server was started without --enable-lora"
    if specs["rank"] > lora.max_lora_rank:
        return f"the adapter's rank is {specs['rank']}, and the server was started with --max-lora-rank {lora.max_lora_rank}"
    if (size := parallel.tensor_parallel_size * parallel.pipeline_parallel_size) > 1:
        return f"the server splits the model over {size} GPUs, and with it the adapter: train with --lora-sync merged"
    workers, manager = runner.lora_manager, runner.get_model().lora_manager
    if others := workers.list_adapters() - {ADAPTER_ID}:
        return f"the server has {len(others)} other adapters (--lora-modules), which would take the place: {_RESTART}"
    # Zeros of rank 1 in every layer; the slot has room for the server's largest rank.
    workers.add_dummy_lora(request_of_adapter(), rank=1)
    workers.pin_adapter(ADAPTER_ID)  # and activates it
    slot = manager.lora_index_to_id.index(ADAPTER_ID)
    for module in manager.modules.values():  # those of an earlier trainer
        module.reset_lora(slot)
    return _misfit(adapter_views(manager, specs["shapes"]), specs)


def _misfit(views: Mapping[str, torch.Tensor], specs: Mapping[str, Any]) -> str:
    for name in specs["shapes"]:
        if name not in views:
            return (
                f"vLLM has no place for {name}: leave that layer out of --lora-target, or train with --lora-sync merged"
            )
        if (held := str(views[name].dtype).removeprefix("torch.")) != specs["dtype"]:
            return f"the server holds adapters in {held} and the model in {specs['dtype']}: leave out --lora-dtype"
    return ""


def adapter_views(manager: Any, shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """Views into the slot of the trainer's adapter for the tensors named in `shapes`, leaving out what has no place there.

    `manager` is vLLM's `LoRAModelManager`. Layers that vLLM fuses (q, k and v into qkv) have a buffer for each part.

    Raises:
        ValueError: the adapter is not there.
    """
    if ADAPTER_ID not in manager.lora_index_to_id:
        raise ValueError("the adapter is not in the server: POST /ludic/v1/adapter first")
    slot = manager.lora_index_to_id.index(ADAPTER_ID)
    # A fused layer has as many buffers as parts; else which of them belongs to a part is not known here.
    places = {
        part: (manager.modules[whole], number, len(parts))
        for whole, parts in manager.packed_modules.items()
        for number, part in enumerate(parts)
    }
    views = {}
    for name, shape in shapes.items():
        match = _NAME.fullmatch(name)
        assert match is not None, name
        layer, letter = match.groups()
        module, number, count = places.get(layer) or (manager.modules.get(layer), 0, 1)
        stacked = getattr(module, f"lora_{letter.lower()}_stacked", ())
        if len(stacked) != count:
            continue
        held = stacked[number][slot]
        if held.dim() == 3 and held.shape[0] == 1 and _fits(held.shape[1:], shape, letter):
            views[name] = held[0, : shape[0], : shape[1]]
    return views


def slot_tensors(manager: Any) -> list[tuple[str, torch.Tensor]]:
    """What each layer adds for requests that name the trainer's adapter; nothing where no trainer has opened it."""
    if ADAPTER_ID not in manager.lora_index_to_id:
        return []
    slot = manager.lora_index_to_id.index(ADAPTER_ID)
    return [
        (f"{name}.lora_{letter}.{number}", held[slot])
        for name, module in sorted(manager.modules.items())
        for letter in "ab"
        for number, held in enumerate(getattr(module, f"lora_{letter}_stacked", ()))
    ]


def _fits(room: Sequence[int], shape: Sequence[int], letter: str) -> bool:
    """A is [r, in] in a buffer of [largest r, in], B is [out, r] in one of [out, largest r]."""
    exact, rank = (1, 0) if letter == "A" else (0, 1)
    return len(shape) == 2 and shape[exact] == room[exact] and shape[rank] <= room[rank]


@torch.no_grad()
def write_adapter(
    model: torch.nn.Module, shapes: Mapping[str, Sequence[int]], tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Copy a version of the adapter into its slot: `tensors` are all of `shapes`. Raises ValueError."""
    views = adapter_views(model.lora_manager, shapes)
    if missing := [name for name in shapes if name not in views]:
        raise ValueError(f"the server has no place for {missing[0]} of the adapter")
    device = next(iter(views.values())).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # a step may still be running on another stream, and nothing may change under it
    for name, tensor in tensors:
        views[name].copy_(tensor)
