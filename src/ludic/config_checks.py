"""What the settings of a run have to be, each by itself and together; every refusal is one line that names the flag."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

_LIMITS: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (
        ("rollouts_per_update", "max_seq_len", "max_sampling_factor", "train_steps", "epochs_per_update", "mini_batches",
         "logprob_chunk", "keep_checkpoints"),
        lambda value: value >= 1,
        "must be at least 1, not {}",
    ),
    (("micro_token_budget",), lambda value: value >= 1, "must be at least 1, or auto, not {}"),
    (("group_size",), lambda value: value >= 2, "must be at least 2, not {}: GRPO compares completions of one prompt"),
    (
        ("max_completion_len", "max_staleness", "drop_solved", "warmup_steps", "weight_decay", "max_grad_norm", "kl_coef",
         "tis_cap", "clip_high", "mask_low", "overlong_buffer", "lora_rank", "eval_every", "eval_limit", "eval_temperature",
         "save_every"),
        lambda value: value >= 0,
        "must not be negative, but is {}",
    ),
    (("temperature",), lambda value: value > 0, "must be above 0 for training, not {}: greedy groups are all alike"),
    (("learning_rate", "lora_alpha"), lambda value: value > 0, "must be above 0, not {}"),
    (("logprob_share",), lambda value: 0 <= value <= 1, "must be in 0 to 1, not {}"),
    (("dual_clip",), lambda value: value == 0 or value > 1, "must be above 1, or 0 for none, not {}"),
    (("clip_low",), lambda value: 0 <= value <= 1, "must be in 0 to 1 (1 is no lower clip), not {}"),
    (("adam_beta1", "adam_beta2"), lambda value: 0 <= value < 1, "must be at least 0 and below 1, not {}"),
)  # fmt: skip
"""Which settings have which range, and how it is said."""
_CONTRADICTIONS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (
        lambda c: c.mini_batches > c.groups_per_update,
        "--mini-batches {0.mini_batches} is more than the {0.groups_per_update} groups of an update: a mini-batch has whole "
        "groups; lower it, or raise --rollouts-per-update",
    ),
    (
        lambda c: c.ratio_to == "sampler" and bool(c.tis_cap),
        "--tis-cap {0.tis_cap} with --ratio-to sampler would correct twice: that ratio is the importance weight; leave one out",
    ),
    (
        lambda c: c.importance_mask in ("token", "sequence") and bool(c.tis_cap),
        "--tis-cap {0.tis_cap} with --importance-mask {0.importance_mask} would correct twice: that mask weighs what it lets "
        "through; leave one out",
    ),
    (
        lambda c: c.importance_mask == "none" and (c.mask_low is not None or c.mask_high is not None),
        "--mask-low and --mask-high are the band of an --importance-mask, and none is set: choose one, or leave them out",
    ),
    (
        lambda c: c.mask_band[0] >= c.mask_band[1],
        "the band of --importance-mask {0.importance_mask} is empty: {0.mask_band[0]} is not below {0.mask_band[1]}; lower "
        "--mask-low or raise --mask-high",
    ),
    (
        lambda c: bool(c.dual_clip) and c.loss == "cispo",
        "--dual-clip {0.dual_clip} has nothing to bound with --loss cispo, whose ratio is clipped on every token; leave it out",
    ),
    (
        lambda c: c.advantage_std == "batch" and c.scale_rewards is False,
        "--advantage-std batch divides nothing with --no-scale-rewards; leave one of them out",
    ),
    (
        lambda c: c.advantage_std == "batch" and c.kl_coef > 0,
        "--advantage-std batch is known only when all groups are there and divides the summed gradient, the part of "
        "--kl-coef {0.kl_coef} too; take --advantage-std group, or --kl-coef 0",
    ),
    (
        lambda c: c.lora_sync == "adapter" and not c.lora_rank,
        "--lora-sync adapter sends the adapter of --lora-rank N, and all weights are trained: give --lora-rank, or leave it out",
    ),
    (
        lambda c: c.lora_sync == "adapter" and c.lora_rank > 512,
        "--lora-rank {0.lora_rank} is more than the 512 that vLLM takes: lower it, or leave out --lora-sync adapter",
    ),
    (
        lambda c: bool(c.overlong_buffer) and not c.max_completion_len,
        "--overlong-buffer {0.overlong_buffer} lies before the longest completion, and without --max-tokens that depends on the "
        "prompt: give --max-tokens, or leave it out",
    ),
    (
        lambda c: 0 < c.max_completion_len <= c.overlong_buffer,
        "--overlong-buffer {0.overlong_buffer} must be smaller than --max-tokens {0.max_completion_len}; lower it",
    ),
)
"""Settings that are right by themselves and not together, and how it is said of a config `{0}`."""


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_settings(config: Any) -> None:
    """Of a `GRPOConfig`, which imports this module: raises ValueError for a value out of range, or for two that contradict each
    other."""
    for setting in dataclasses.fields(config):
        value, choices = getattr(config, setting.name), setting.metadata["choices"]
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{flag_of(setting.name)} must be a finite number, not {value}")
        if choices and value is not None and value not in choices:
            raise ValueError(f"{flag_of(setting.name)} {value} is not one of {', '.join(choices)}")
    for names, fits, said in _LIMITS:
        for name in names:
            value = getattr(config, name)
            if value is not None and not fits(value):
                raise ValueError(f"{flag_of(name)} {said.format(value)}")
    if not all(name.strip() for name in config.lora_target.split(",")):
        raise ValueError(
            f"--lora-target {config.lora_target!r} has an empty name: give names like q_proj,v_proj, or all-linear"
        )
    if config.rollouts_per_update % config.group_size:
        raise ValueError(
            f"--rollouts-per-update {config.rollouts_per_update} is not a multiple of --group-size {config.group_size}"
        )
    if config.micro_token_budget is not None and config.micro_token_budget < config.max_seq_len:
        raise ValueError(
            f"--micro-token-budget {config.micro_token_budget} is smaller than --max-seq-len {config.max_seq_len}: "
            "no sequence is split, so the budget must hold the longest one"
        )
    if config.max_completion_len >= config.max_seq_len:
        raise ValueError(
            f"--max-completion-len {config.max_completion_len} leaves no room for a prompt in --max-seq-len {config.max_seq_len}"
        )
    for contradicts, said in _CONTRADICTIONS:
        if contradicts(config):
            raise ValueError(said.format(config))
