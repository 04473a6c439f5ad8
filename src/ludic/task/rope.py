"""RoPE types whose frequencies depend on the longest position in a row, pinned to those that the server uses.

`longrope` takes other frequencies beyond the original context, and `dynamic` stretches them. transformers decides by the
longest position of each forward pass, so in a packed row the longest sequence would decide for all others. vLLM decides
once, by its `--max-model-len`: so does `pin_rope`, by `--max-seq-len`, and `handshake.check_context` refuses a server on the
other side of the switch. The other types in transformers (`linear`, `yarn`, `llama3`, `proportional`) do not look at
positions.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel


def longrope_switch(config: PretrainedConfig) -> int | None:
    """The context length in tokens beyond which the model's RoPE takes its long factors; None if it has no such switch."""
    switches = [
        one["original_max_position_embeddings"] for one in _parameters(config) if one["rope_type"] == "longrope"
    ]
    return min(switches, default=None)


def pin_rope(model: PreTrainedModel, context_len: int) -> None:
    """Make the model's RoPE that of a server with `context_len` tokens of context, whatever the lengths in a row.

    Raises:
        ValueError: vLLM has no positions beyond the model's own context for its `dynamic` RoPE.
    """
    config = model.config.get_text_config()
    dynamic = any("dynamic" in one["rope_type"] for one in _parameters(config))
    if dynamic and context_len > config.max_position_embeddings:
        raise ValueError(
            f"{type(model).__name__} has RoPE of the type dynamic, for which vLLM has positions up to "
            f"{config.max_position_embeddings}: lower --max-seq-len {context_len} to that"
        )
    for module in model.modules():
        given = getattr(module, "rope_type", None)
        types = given if isinstance(given, dict) else {None: given}
        for layer_type, rope_type in list(types.items()):
            if not rope_type or not ("dynamic" in rope_type or rope_type == "longrope"):
                continue
            last = torch.tensor([[context_len - 1]], device=model.device)
            which = {} if layer_type is None else {"layer_type": layer_type}
            module(torch.zeros((), device=model.device), last, **which)  # sets the frequencies by the longest position
            if layer_type is None:
                module.rope_type = "default"  # type: ignore[assignment]  # the type that is never looked at again
            else:
                types[layer_type] = "default"


def _parameters(config: PretrainedConfig) -> Iterator[dict[str, Any]]:
    """The RoPE settings of the model, or of each of its types of layers; none for a model without RoPE."""
    given = getattr(config.get_text_config(), "rope_parameters", None) or {}
    for one in [given, *given.values()]:
        if isinstance(one, dict) and "rope_type" in one:
            yield one
