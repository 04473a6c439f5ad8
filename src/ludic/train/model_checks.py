"""Proven of a prepared model before it trains, with small forward passes: that what is trained is the policy that sampled.

- `check_isolation`: a packed sequence is what it is alone, at lengths where windows and RoPE scaling act too.
- `check_head`: the logits here are the model's own.
- `check_mode`: the mode that trains computes what evaluation computes, and the same each time.

Each is a property of the architecture and its settings, so once a run is enough.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from ludic.task.architectures import OTHER_FAMILY
from ludic.train.attention import packed_attention_kwargs
from ludic.train.logprobs import output_layer, token_logprobs
from ludic.train.packing import pack
from ludic.types import MicroBatch, TrainingSample

_SHORT = 5
_MIXES_POSITIONS = (
    f"its architecture mixes positions outside of attention, so it cannot be trained on packed rows; {OTHER_FAMILY}"
)


def check_isolation(model: PreTrainedModel, *, max_seq_len: int) -> None:
    """Prove that a packed sequence sees neither the one before it nor one that shares its prompt, and sees that prompt as
    its own; once with short sequences, and for a model with a window or a RoPE that changes with length once more with one
    sequence that is long enough for it.

    The rows are hardly longer than `max_seq_len`, which a micro-batch holds in any case.

    Raises:
        ValueError: if a sequence behind another, or with a shared prompt, is not what it is alone.
    """
    _check_lengths(model, _SHORT, _SHORT, _MIXES_POSITIONS)
    limits = [limit for limit in _length_limits(model) if limit < max_seq_len]
    if limits:
        long = min(max(limits) + _SHORT, max_seq_len)
        way_out = (
            "its RoPE or its window depends on the other sequences in the row; "
            f"up to --max-seq-len {min(limits)} it does not"
        )
        _check_lengths(model, long, _SHORT, way_out)
        _check_lengths(model, _SHORT, long, way_out)


def _length_limits(model: PreTrainedModel) -> list[int]:
    """Lengths in tokens beyond which the model may compute something else: windows, and the contexts that RoPE grew from."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    places = [config.to_dict(), rope, *(one for one in rope.values() if isinstance(one, dict))]
    names = ("sliding_window", "original_max_position_embeddings")
    found = [place[name] for place in places for name in names if isinstance(place.get(name), int)]
    return [length for length in found if length > 0]


@torch.no_grad()
def _check_lengths(model: PreTrainedModel, neighbour: int, length: int, reason: str) -> None:
    vocabulary: int = model.config.get_text_config().vocab_size
    first, other = ([(start + i) % vocabulary for i in range(neighbour)] for start in (1, 11))
    second = [(21 + i) % vocabulary for i in range(length)]
    prompt = length // 2
    branch = [*second[:prompt], *other[: max(1, neighbour - prompt)]]
    alone = _last_states(model, [second], prompt)
    # A leak may touch one token only. Kernels round differently for another shape: in bf16 by well under a percent.
    leaks = {
        "lets packed sequences see each other": [
            _last_states(model, [before, second], prompt) - alone for before in (first, other)
        ],
        "does not see a shared prompt as it sees its own": [_last_states(model, [branch, second], prompt) - alone],
    }
    for what, differences in leaks.items():
        gap = float((torch.stack(differences).norm(dim=-1) / alone.norm(dim=-1)).max())
        if not gap < 0.03:
            raise ValueError(
                f"{type(model).__name__} {what} (relative difference {gap:.2g} at {max(neighbour, length)} tokens): {reason}"
            )


def _last_states(model: PreTrainedModel, sequences: list[list[int]], prompt: int) -> torch.Tensor:
    """[L, H]: the last sequence's hidden states from one row; prompts of `prompt` tokens are shared where they are equal."""
    row = _row(model, sequences, prompt)
    states: torch.Tensor = model.base_model(**_arguments(row)).last_hidden_state[0]
    if row.key_indices is not None:
        states = states.index_select(0, row.key_indices)
    return states[-len(sequences[-1]) :].float()


def _arguments(row: MicroBatch) -> dict[str, Any]:
    return {
        "input_ids": row.input_ids.unsqueeze(0),
        "position_ids": row.position_ids.unsqueeze(0),
        "use_cache": False,
        **packed_attention_kwargs(row),
    }


def _row(model: PreTrainedModel, sequences: list[list[int]], prompt: int) -> MicroBatch:
    samples = [
        TrainingSample(
            token_ids=ids,
            loss_mask=[i >= min(prompt, len(ids) - 1) for i in range(len(ids))],
            rollout_logprobs=None,
            advantage=0.0,
        )
        for ids in sequences
    ]
    (row,) = pack(samples, token_budget=sum(map(len, sequences)), normalisation="token_mean")
    return row.to(model.device)


def check_head(model: PreTrainedModel) -> None:
    """Prove that the logits here are those of the model itself: an architecture may scale or shift its logits in a way
    unknown here.

    Raises:
        ValueError: if they differ.
    """
    head = output_layer(model)
    row = _row(model, [[token % head.weight.shape[0] for token in range(1, 9)]], 1)
    with torch.no_grad():
        theirs = model(**_arguments(row)).logits[0].float()
        ours = head.logits(model.base_model(**_arguments(row)).last_hidden_state[0])
    gap = (ours - theirs).abs().max().item()
    if not gap <= 1e-2 * max(1.0, theirs.abs().max().item()):
        raise ValueError(
            f"{type(model).__name__} changes its logits after the LM head in a way that is not supported "
            f"(largest difference {gap:.2g}), so its log-probs would be wrong; {OTHER_FAMILY}"
        )


def check_mode(model: PreTrainedModel) -> None:
    """Prove that the model, as it will train, gives one packed row the same log-probs twice, and those of plain `eval()`.

    Raises:
        ValueError: if they differ by more than rounding: dropout, noise in a router, or a state that a forward pass leaves.
    """
    vocabulary: int = model.config.get_text_config().vocab_size
    sequences = [[*range(1, 9), *range(start, start + 24)] for start in (11, 47)]
    row = _row(model, [[token % vocabulary for token in tokens] for tokens in sequences], 8)

    def logprobs() -> torch.Tensor:
        return token_logprobs(model, row, temperature=1.0).logprobs.detach()

    with torch.enable_grad():
        trained = [logprobs(), logprobs()]
    training = [module for module in model.modules() if module.training]
    model.eval()
    with torch.no_grad():
        evaluated = logprobs()
    for module in training:
        module.training = True
    gap = float((torch.stack(trained) - evaluated).abs().max())
    if not gap <= (1e-5 if model.dtype == torch.float32 else 1e-2):
        raise ValueError(
            f"{type(model).__name__} gives the same row other log-probs when it trains (largest difference {gap:.2g} nats): "
            "it drops out or adds noise that evaluation mode leaves on, so it would not train the policy that sampled; "
            f"{OTHER_FAMILY}"
        )
