"""Which settings of a resumed run differ from its checkpoint's in a way that changes the run.

A setting alters a run if it changes what is sampled, the loss, an optimizer step, or what its evaluations are compared
with. Settings that do not are listed here with the reason; a setting that is not listed counts as altering the run.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from ludic.storage.inert import inert

_HARMLESS = {
    # The gradient is a sum over the update that does not depend on how it is cut and computed, beyond rounding.
    "micro_token_budget": "how an update is cut into micro-batches",
    "share_prompts": "whether a prompt is forwarded once or once a completion",
    "gradient_checkpointing": "activations are kept or computed again",
    "cpu_offload": "where masters and moments lie",
    "shard_weights": "which rank holds what",
    "compile": "the same operations, fused or not",
    "logprob_chunk": "how many tokens meet the vocabulary at once",
    # When something is looked at or written.
    "eval_every": "evaluation draws from seeds of its own and trains nothing",
    "save_every": "only when a checkpoint is written",
    "keep_checkpoints": "only how many stay",
    "record_token_logprobs": "only what is written of the log-probs that were asked for",
    "logprob_share": "compared, not trained on: where log-probs correct, all are asked for",
    # Where it happens.
    "concurrency": "every request has a seed of its own",
    "servers": "a group's completions are drawn with its own seed, whichever server it is on",
    "out_dir": "where the files are",
    "logger": "where the figures go",
    "verbose": "what is said",
}
_AS_BEFORE: dict[str, Any] = {
    "lora_sync": "merged",
    "dynamic_sampling": False,
    "max_sampling_factor": 8,
    "drop_solved": 0,
    "curriculum": False,
    "ratio_to": "update",
    "mini_batches": 1,
    "dual_clip": 0.0,
    "normalisation": None,
    "overlong_buffer": 0,
    "baseline": "mean",
    "advantage_std": "group",
    "importance_mask": "none",
    "mask_low": None,
    "mask_high": None,
}
"""Settings that checkpoints of earlier versions lack, and the value with which a run goes on as it was."""
_SHOWN = 60
_NAMES = {
    "num_train_samples": "the number of training samples",
    "rendered_chat": "what the chat template renders",
    "rendered_ids": "the fingerprint of the token ids of what the chat template renders",
    "rendered_at": "the date in the prompts",
}


def changed_settings(stored: Mapping[str, Any], given: Mapping[str, Any], *, step: int = 0) -> list[str]:
    """One line for each setting that differs and alters the run, in the spelling of the command line.

    Args:
        stored: of the checkpoint, `TrainerState.config` and `task` together.
        given: of this run.
        step: updates done; a warm-up that is over no longer matters.

    Example:
        >>> changed_settings({"learning_rate": 1e-6, "save_every": 50}, {"learning_rate": 2e-6, "save_every": 10})
        ['--learning-rate was 1e-06, is 2e-06']
    """
    lines = []
    for name in sorted(stored.keys() | given.keys()):
        if not _alters(name, stored, given, step):
            continue
        flag = _NAMES.get(name, "--" + name.replace("_", "-"))
        if name not in stored:
            lines.append(f"{flag} is {_shown(given[name])}, the checkpoint was made without it")
        elif name not in given:
            lines.append(f"{flag} was {_shown(stored[name])}, this version does not have it")
        elif _plain(stored[name]) != _plain(given[name]):
            before, now = shown_apart(stored[name], given[name])
            lines.append(f"{flag} was {before}, is {now}")
    return [inert(line) for line in lines]


def _alters(name: str, stored: Mapping[str, Any], given: Mapping[str, Any], step: int) -> bool:
    constant = all(settings.get("lr_schedule", "constant") == "constant" for settings in (stored, given))
    if name == "train_steps":  # how long a decay takes; a constant rate just goes on
        return not constant
    if name == "warmup_steps":  # where a decay begins, and the rate of the updates before
        longest = max(settings.get(name, 0) for settings in (stored, given))
        return not constant or step < longest
    if (
        name.startswith("lora_") and name not in _AS_BEFORE
    ):  # they say nothing without an adapter, and earlier versions did not record them
        return bool(stored.get("lora_rank") or given.get("lora_rank"))
    if name in ("rendered_chat", "rendered_ids"):  # earlier versions did not record them
        return name in stored and name in given
    if name in _AS_BEFORE and stored.get(name, _AS_BEFORE[name]) == given.get(name, _AS_BEFORE[name]):
        return False
    if name == "rendered_at":  # a template without a date is another template, which is a line of its own
        return name in given
    return name not in _HARMLESS


def _plain(value: Any) -> Any:
    """A value as JSON returns it, tagged so that equal values of different types (1 and True) stay different."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return ("switch", value) if isinstance(value, bool) else value


def shown_apart(before: Any, now: Any) -> tuple[str, str]:
    """Both values; of long texts what follows the beginning that they share."""
    if isinstance(before, str) and isinstance(now, str) and max(len(before), len(now)) > _SHOWN:
        shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, now, strict=False))))
        if shared > _SHOWN // 2:
            cut = shared - _SHOWN // 4
            return "..." + _shown(before[cut:]), "..." + _shown(now[cut:])
    return _shown(before), _shown(now)


def _shown(value: Any) -> str:
    if value is None:
        return "the default"
    if isinstance(value, bool):
        return "on" if value else "off"
    text = repr(value) if isinstance(value, str) and not value.isidentifier() else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"
