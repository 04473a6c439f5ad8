"""Finds out before the first update whether its micro-batches fit the GPU, by running the worst one.

The worst micro-batch is full to the token budget, of sequences as long as allowed, nearly all of it trained on. It is
forwarded and backwarded once with advantages of 0, which also compiles what is to be compiled, while the first rollouts are
being generated.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from ludic.config import GRPOConfig
from ludic.train.footprint import MOMENTS_BYTES, USABLE_SHARE
from ludic.train.learner import ROW_MULTIPLE, Learner
from ludic.types import TrainingSample

logger = logging.getLogger(__name__)

MAX_AUTO_BUDGET = 65_536
"""Tokens. `auto` goes no further: the largest kernels are long full, and the memory may be wanted by others."""
CPU_BUDGET = 16_384
_ROUND_TO = 1024
_GIB = 2**30


class BudgetError(ValueError):
    """The micro-batches do not fit; the message has the need, what is there, and the budget that would fit."""


class Fit(NamedTuple):
    """What a trial found out."""

    token_budget: int
    need_bytes: int
    """Peak of the worst micro-batch with weights, gradients and optimizer state."""


def fit_budget(learner: Learner) -> None:
    """Prove that the learner's token budget fits its GPU, or with `auto` set the largest that does.

    On the CPU nothing is tried; `auto` is 16,384 there, or one sequence if that is longer.

    Raises:
        BudgetError: it does not fit.
    """
    config = learner.config
    if learner.device.type != "cuda":
        learner.token_budget = config.micro_token_budget or max(CPU_BUDGET, config.max_seq_len)
        return
    free, _ = torch.cuda.mem_get_info(learner.device)
    capacity, minimum = free + torch.cuda.memory_reserved(learner.device), smallest_budget(config)
    budget, need = choose_budget(
        lambda budget: _need(learner, budget),
        requested=config.micro_token_budget or 0,
        minimum=minimum,
        capacity=capacity,
    )
    learner.token_budget = budget
    # The compiler specialises kernels to ranges of lengths: let it meet a short row now, not in the second update.
    learner.add_up(worst_samples(config, minimum) * learner.num_ranks)
    learner.discard()
    logger.info("micro-batches of %d tokens need %.1f of %.1f GiB", budget, need / _GIB, capacity / _GIB)


def smallest_budget(config: GRPOConfig) -> int:
    """A budget must hold the longest sequence in rows of the learner's multiple, and be worth the trouble."""
    return -(-max(config.max_seq_len, _ROUND_TO) // ROW_MULTIPLE) * ROW_MULTIPLE


def choose_budget(measure: Callable[[int], int | None], *, requested: int, minimum: int, capacity: int) -> Fit:
    """The budget to train with, from trials.

    Args:
        measure: bytes that a micro-batch of so many tokens needs at its peak, or None if it ran out of memory.
        requested: what the user wants; 0 for the largest that fits, up to `MAX_AUTO_BUDGET`.
        minimum: no smaller budget is worth trying.
        capacity: bytes that there are.

    Raises:
        BudgetError: `requested` does not fit, or nothing does.
    """
    usable = int(capacity * USABLE_SHARE)
    if requested and (need := measure(requested)) is not None and need <= usable:
        return Fit(requested, need)
    small, large = minimum, 2 * minimum
    small_need, large_need = measure(small), measure(large)
    if small_need is None or small_need > usable:
        raise BudgetError(
            f"not even micro-batches of {small} tokens fit the trainer's GPU of {capacity / _GIB:.0f} GiB"
            + (f" (they need {small_need / _GIB:.0f})" if small_need is not None else "")
            + ": switch --gradient-checkpointing on, lower --max-seq-len, or take a smaller model"
        )
    fitting, needs = small, "does not fit"
    if large_need is not None and large_need <= usable:  # a line through both trials
        per_token = max(1.0, (large_need - small_need) / (large - small))
        fitting = max(large, int(large + (usable - large_need) / per_token) // _ROUND_TO * _ROUND_TO)
        needs = f"needs about {(large_need + per_token * (requested - large)) / _GIB:.0f} GiB of"
    if requested:
        raise BudgetError(
            f"--micro-token-budget {requested} {needs} the {capacity / _GIB:.0f} GiB that the trainer's GPU has free: "
            f"{min(fitting, max(small, requested - 1))} would fit (or auto), and more with --gradient-checkpointing"
        )
    budget = min(fitting, max(MAX_AUTO_BUDGET, minimum))
    while budget > small:  # less than the line promised, as long as that does not fit
        need = measure(budget)
        if need is not None and need <= usable:
            return Fit(budget, need)
        budget = int(budget * 0.85) // _ROUND_TO * _ROUND_TO
    return Fit(small, small_need)


def _need(learner: Learner, token_budget: int) -> int | None:
    """Peak bytes of the worst micro-batch of such a budget, with the optimizer's state; None if it ran out of memory."""
    before = learner.token_budget
    learner.token_budget = token_budget
    fits = True
    try:
        trained = [master for master in learner.masters.parameters if master.requires_grad]
        for master in (
            [] if learner.masters.holds_gradients else trained
        ):  # there from an update's second micro-batch on
            master.grad = torch.zeros_like(master)
        torch.cuda.reset_peak_memory_stats(learner.device)
        learner.add_up(worst_samples(learner.config, token_budget) * learner.num_ranks)
        torch.cuda.synchronize(learner.device)
    except (MemoryError, torch.OutOfMemoryError):
        if learner.num_ranks > 1:  # the others are in the middle of it, and end with this one
            raise
        fits = False
    finally:
        learner.token_budget = before
    # Not within `except`: its traceback holds activations, which nothing could give back there.
    learner.discard()
    if not fits:
        torch.cuda.empty_cache()
        return None
    need = torch.cuda.max_memory_allocated(learner.device)
    if not learner.optimizer.state:  # AdamW's two fp32 moments come with the first step
        need += sum(MOMENTS_BYTES * master.numel() for master in trained)
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
                rollout_logprobs=[0.0] * (prompt_len + completion_len) if config.needs_logprobs else None,
                advantage=0.0,
                rollout=(group, len(samples) % config.group_size),
            )
        )
