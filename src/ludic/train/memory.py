"""Finds out before the first update whether its micro-batches fit the GPU, by running the worst one.

A run that dies of memory in its second hour has cost two hours. The worst micro-batch is known in advance: full to the
token budget, of sequences as long as allowed, nearly all of it trained on. It is forwarded and backwarded once with
advantages of 0, which also compiles what is to be compiled, while the first rollouts are being generated. The optimizer's
state, which comes with the first step, is added to what was measured.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ludic.config import GRPOConfig
from ludic.train.learner import ROW_MULTIPLE, Learner
from ludic.types import TrainingSample

logger = logging.getLogger(__name__)

MAX_AUTO_BUDGET = 65_536
"""Tokens. `auto` goes no further: the largest kernels are long full, and the memory may be wanted by others."""
CPU_BUDGET = 16_384
_MARGIN = 0.95
"""The share of the device's memory that a trial may need: fragmentation and the longest prompts come on top."""
_ROUND_TO = 1024


class BudgetError(ValueError):
    """The micro-batches do not fit; the message has the need, what is there, and the budget that would fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What a trial found out."""

    token_budget: int
    need_bytes: int
    """Peak of the worst micro-batch with weights, gradients and optimizer state; 0 on the CPU, where nothing is measured."""
    capacity_bytes: int


def fit_budget(learner: Learner) -> Fit:
    """Prove that the learner's token budget fits its GPU, or with `auto` set the largest that does.

    On the CPU nothing is tried; `auto` is 16,384 there, or one sequence if that is longer.

    Raises:
        BudgetError: it does not fit.
    """
    config = learner.config
    if learner.device.type != "cuda":
        learner.token_budget = config.micro_token_budget or max(CPU_BUDGET, config.max_seq_len)
        return Fit(token_budget=learner.token_budget, need_bytes=0, capacity_bytes=0)
    free, _ = torch.cuda.mem_get_info(learner.device)
    capacity = free + torch.cuda.memory_reserved(learner.device)
    fit = choose_budget(
        lambda budget: _need(learner, budget),
        requested=config.micro_token_budget or 0,
        minimum=smallest_budget(config),
        capacity=capacity,
    )
    learner.token_budget = fit.token_budget
    # The compiler specialises kernels to ranges of lengths: let it meet a short row now, not in the second update.
    learner.accumulate(worst_samples(config, smallest_budget(config)))
    learner.discard()
    logger.info(
        "micro-batches of %d tokens need %.1f of %.1f GiB", fit.token_budget, _gib(fit.need_bytes), _gib(capacity)
    )
    return fit


def smallest_budget(config: GRPOConfig) -> int:
    """A budget must hold the longest sequence in rows of the learner's multiple, and be worth the trouble."""
    return -(-max(config.max_seq_len, _ROUND_TO) // ROW_MULTIPLE) * ROW_MULTIPLE


def choose_budget(
    measure: Callable[[int], int | None], *, requested: int, minimum: int, capacity: int, limit: int = MAX_AUTO_BUDGET
) -> Fit:
    """The budget to train with, from trials.

    Args:
        measure: bytes that a micro-batch of so many tokens needs at its peak, or None if it ran out of memory.
        requested: what the user wants; 0 for the largest that fits, up to `limit`.
        minimum: no smaller budget is worth trying.
        capacity: bytes that there are.

    Raises:
        BudgetError: `requested` does not fit, or nothing does.
    """
    usable = int(capacity * _MARGIN)
    if requested:
        need = measure(requested)
        if need is not None and need <= usable:
            return Fit(token_budget=requested, need_bytes=need, capacity_bytes=capacity)
    small, large = minimum, 2 * minimum
    small_need, large_need = measure(small), measure(large)
    if small_need is None or small_need > usable:
        raise BudgetError(
            f"not even micro-batches of {small} tokens fit the trainer's GPU of {_gib(capacity):.0f} GiB"
            + (f" (they need {_gib(small_need):.0f})" if small_need is not None else "")
            + ": switch --gradient-checkpointing on, lower --max-seq-len, or take a smaller model"
        )
    fitting = small
    if large_need is not None and large_need <= usable:
        per_token = max(1.0, (large_need - small_need) / (large - small))
        fitting = int(large + (usable - large_need) / per_token) // _ROUND_TO * _ROUND_TO
        fitting = max(large, fitting)
        if requested:
            raise BudgetError(
                f"--micro-token-budget {requested} needs about {_gib(large_need + per_token * (requested - large)):.0f} GiB of "
                f"the {_gib(capacity):.0f} GiB that the trainer's GPU has free: {min(fitting, requested - 1)} would fit "
                "(or auto)"
            )
    if requested:
        raise BudgetError(
            f"--micro-token-budget {requested} does not fit the {_gib(capacity):.0f} GiB that the trainer's GPU has free: "
            f"{fitting} would (or auto), and more with --gradient-checkpointing"
        )
    return _largest(measure, min(fitting, max(limit, minimum)), small, small_need, capacity)


def _largest(measure: Callable[[int], int | None], budget: int, small: int, small_need: int, capacity: int) -> Fit:
    """Try the budget that should fit, and less as long as it does not."""
    while budget > small:
        need = measure(budget)
        if need is not None and need <= capacity * _MARGIN:
            return Fit(token_budget=budget, need_bytes=need, capacity_bytes=capacity)
        budget = int(budget * 0.85) // _ROUND_TO * _ROUND_TO
    return Fit(token_budget=small, need_bytes=small_need, capacity_bytes=capacity)


def _need(learner: Learner, token_budget: int) -> int | None:
    """Peak bytes of the worst micro-batch of such a budget, with the optimizer's state; None if it ran out of memory."""
    before = learner.token_budget
    learner.token_budget = token_budget
    try:
        for master in learner.masters.parameters:  # there from the second micro-batch of an update on
            master.grad = torch.zeros_like(master)
        torch.cuda.reset_peak_memory_stats(learner.device)
        learner.accumulate(worst_samples(learner.config, token_budget))
        torch.cuda.synchronize(learner.device)
    except (MemoryError, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return None
    finally:
        learner.discard()
        learner.token_budget = before
    need = torch.cuda.max_memory_allocated(learner.device)
    if not learner.optimizer.state:  # AdamW's two fp32 moments come with the first step
        need += sum(2 * 4 * parameter.numel() for parameter in learner.masters.parameters)
    return need


def worst_samples(config: GRPOConfig, token_budget: int) -> list[TrainingSample]:
    """Sequences as long as allowed, seven eighths of them trained on, that fill one micro-batch; the last one is cut to fit."""
    prompt_len = max(1, config.max_seq_len // 8)
    samples: list[TrainingSample] = []
    room = token_budget
    while True:
        new_prompt = not config.share_prompts or len(samples) % config.group_size == 0
        room -= prompt_len * new_prompt
        completion_len = min(config.max_seq_len - prompt_len, room)
        if completion_len < 1:
            return samples
        room -= completion_len
        group = len(samples) // config.group_size
        samples.append(
            TrainingSample(
                # A prompt of its own for each group; 2 and 3 are in every vocabulary.
                token_ids=[2 + (group >> bit & 1) for bit in range(prompt_len)] + [2] * completion_len,
                loss_mask=[False] * prompt_len + [True] * completion_len,
                rollout_logprobs=[0.0] * (prompt_len + completion_len) if config.importance_cap is not None else None,
                advantage=0.0,
            )
        )


def _gib(num_bytes: float) -> float:
    return num_bytes / 2**30
