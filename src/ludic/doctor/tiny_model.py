"""A model of the same architecture, small enough to train for one update on a CPU in a second.

What decides whether a family can be trained is kept: every kind of layer that the model has, the size of its heads, whether
they are grouped, its positions, windows and caps. What only makes it large is cut: layers that repeat, the vocabulary, the
width of its MLPs, experts, and the number of heads. Where transformers cannot run the result, less is cut.
"""

import copy
import math
import re
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import StrictDataclassError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

VOCABULARY = 512
MLP_WIDTH = 64
MAX_PARAMETERS = 100_000_000
"""Of the small model: 0.4 GB and about two seconds. What is left larger than that is not built."""

_MLP_WIDTHS = r"intermediate_size|intermediate_dim|ffn_dim|ffn_hidden_size|n_inner"
_EXPERTS = r"^(num|n)_(local_|routed_)?experts$"
_LAYER_NUMBER = re.compile(r"layer_(idx|id|number|index)")
DOES_NOT_RUN = (
    *(ValueError, TypeError, AttributeError, LookupError, RuntimeError, ArithmeticError, AssertionError, ImportError),
    StrictDataclassError,
)
"""What a constructor or a forward of transformers may raise for a configuration that was cut in the wrong place."""


def tiny_model(config: "PretrainedConfig", full: "PreTrainedModel") -> "PreTrainedModel | None":
    """A small float32 model on the CPU, with random weights; None where none can be built.

    Args:
        config: the model's own; it is not changed.
        full: the model on the meta device.
    """
    from transformers import AutoModelForCausalLM, PretrainedConfig

    cuts = (_cut_layers, _cut_mlps, _cut_experts, _cut_heads)
    for number in range(len(cuts), 0, -1):
        smaller = copy.deepcopy(config)
        inner = [value for value in vars(smaller).values() if isinstance(value, PretrainedConfig)]  # of text, of images
        try:
            for part in [smaller, *inner]:
                for cut in cuts[:number]:
                    cut(part, full)
            type(smaller).from_dict(smaller.to_dict())  # checks what belongs together
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(smaller)
            if sum(parameter.numel() for parameter in empty.parameters()) > MAX_PARAMETERS:
                continue
            with torch.random.fork_rng(devices=[]), torch.no_grad():  # the run's own draws stay what they are
                torch.manual_seed(0)
                model: PreTrainedModel = AutoModelForCausalLM.from_config(smaller, dtype=torch.float32)
                for parameter in model.parameters():
                    if parameter.dim() >= 2:
                        # As large as after training, so that a layer that mixes sequences shows in what comes out.
                        parameter.normal_(std=1.5 / math.sqrt(parameter.shape[-1]))
                model.eval()(input_ids=torch.arange(2, 10).unsqueeze(0))  # as transformers runs it
        except DOES_NOT_RUN:
            continue
        return model
    return None


def _cut_layers(part: "PretrainedConfig", full: "PreTrainedModel") -> None:
    """As few of the first layers as hold one of each kind, at least two; and the vocabulary."""
    total = getattr(part, "num_hidden_layers", None)
    if isinstance(total, int):
        kept = min(total, max(2, _layers_of_each_kind(full, total)))
        for name, value in list(vars(part).items()):
            if isinstance(value, list | tuple) and len(value) == total:
                setattr(part, name, value[:kept])
        part.num_hidden_layers = kept
    _cap(part, "vocab_size", VOCABULARY)
    _cap(part, "^pad_token_id$", VOCABULARY - 1)


def _cap(part: "PretrainedConfig", names: str, limit: int) -> None:
    """Lower each whole number with such a name to `limit`, also where there is one for each layer."""
    for name, value in list(vars(part).items()):
        if re.search(names, name) and isinstance(value, int):
            setattr(part, name, min(value, limit))
        elif re.search(names, name) and isinstance(value, list):
            setattr(part, name, [min(one, limit) for one in value])


def _layers_of_each_kind(full: "PreTrainedModel", total: int) -> int:
    """How many of the first layers hold one of each kind. Two are of one kind if their modules and settings agree."""
    count = 1
    for module in full.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == total:
            kinds = [_kind(layer) for layer in module]
            count = max(count, *(kinds.index(kind) + 1 for kind in kinds))
    return count


def _kind(layer: torch.nn.Module) -> list[object]:
    def settings(module: torch.nn.Module) -> dict[str, object]:
        kept = {name: value for name, value in vars(module).items() if not _LAYER_NUMBER.fullmatch(name)}
        return {name: value for name, value in kept.items() if isinstance(value, int | float | str | None)}

    return [(name, type(module), settings(module)) for name, module in layer.named_modules()]


def _cut_mlps(part: "PretrainedConfig", full: "PreTrainedModel") -> None:
    _cap(part, _MLP_WIDTHS, MLP_WIDTH)


def _cut_experts(part: "PretrainedConfig", full: "PreTrainedModel") -> None:
    """Twice as many as a token takes, so that the router still chooses."""
    taken = getattr(part, "num_experts_per_tok", None)
    if isinstance(taken, int):
        _cap(part, _EXPERTS, 2 * taken)


def _cut_heads(part: "PretrainedConfig", full: "PreTrainedModel") -> None:
    """Four heads or fewer, grouped if they were, of the same size; the hidden size in proportion."""
    heads, hidden = getattr(part, "num_attention_heads", None), getattr(part, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return
    key_heads = getattr(part, "num_key_value_heads", None)
    groups = key_heads if isinstance(key_heads, int) else heads
    kept_groups = math.gcd(groups, 2)
    sharing = heads // groups  # query heads of each key head
    kept = kept_groups * next((n for n in range(2, sharing) if sharing % n == 0), sharing)
    if heads % groups or kept >= heads or hidden * kept % heads:
        return
    for name, value in list(vars(part).items()):  # a projection of the hidden size to itself stays one
        if type(value) is int and value == hidden and not name.startswith("max_"):
            setattr(part, name, hidden * kept // heads)
    part.hidden_size = hidden * kept // heads
    part.num_attention_heads = kept
    if isinstance(key_heads, int):
        part.num_key_value_heads = kept_groups
