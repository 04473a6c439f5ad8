"""Supervised training before GRPO: a policy that never gives a right answer has nothing that a reward could reinforce.

The policy imitates given completions. It is trained by the learner that GRPO uses (packing, log-probs, fp32 masters), and in
place of an advantage every token has the same weight. Left out: answers of several turns, and data sets of examples.
"""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ludic.config import GRPOConfig
from ludic.task.prompts import encode_prompts
from ludic.train.learner import Learner
from ludic.train.schedule import DataOrder
from ludic.types import ChatMessage, TrainingSample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_RISING = 0.05
"""The share of the training over which the learning rate rises."""


def warm_start(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[tuple[Sequence[ChatMessage], str]],
    *,
    max_seq_len: int,
    steps: int | None = None,
    seconds: float | None = None,
    batch_size: int = 64,
    learning_rate: float = 1e-4,
    micro_token_budget: int = 16384,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train `model` in place to answer each prompt of `examples` with its completion; the loss of every update.

    The loss is the negative log-likelihood of the completions' tokens and of the stop token, in nats a token. The learning rate
    rises over the first twentieth and then falls to 0. Afterwards `model` is float32 again; a `GRPOTrainer` takes it and sends
    its weights to the engine.

    Args:
        model: float32, on the device that trains.
        examples: chat messages, as `Environment.messages` returns them, and the text of the answer.
        max_seq_len: tokens of a prompt and its completion together, as in the run that follows.
        steps: updates of `batch_size` examples each; each epoch has the examples in another order.
        seconds: to train for, in place of `steps`; such a training does not repeat exactly.
        learning_rate: the highest, of AdamW.
        on_step: is called after each update with its number, from 1, and its loss.

    Raises:
        ValueError: there are no examples, or one is too long; neither or both of `steps` and `seconds` are given.
        FloatingPointError: a loss or a gradient is not finite; the weights are those before it.

    Example:
        >>> examples = [(environment.messages(sample), f"The answer is {sample.target}.") for sample in samples]
        >>> losses = warm_start(model, tokenizer, examples, max_seq_len=96, steps=100)
    """
    length = [value for value in (steps, seconds) if value is not None]
    if len(length) != 1 or length[0] <= 0:
        raise ValueError(
            f"a warm start takes steps or seconds, one of them and above 0, not steps {steps}, seconds {seconds}"
        )
    samples = supervised_samples(tokenizer, examples, max_seq_len=max_seq_len)
    # On-policy, with an advantage of 1, CISPO's loss is -log pi, and its mean is over the update's tokens.
    config = GRPOConfig(
        loss="cispo",
        max_seq_len=max_seq_len,
        micro_token_budget=micro_token_budget,
        learning_rate=learning_rate,
        compile=False,  # compiling takes longer than most warm starts
        share_prompts=False,
        seed=seed,
    )
    attention, learner = model.config._attn_implementation, Learner(config, model)
    try:
        return _train(learner, samples, batch_size, length[0], timed=steps is None, on_step=on_step)
    finally:
        learner.masters.release()
        model.set_attn_implementation(attention)


def _train(
    learner: Learner,
    samples: Sequence[TrainingSample],
    batch_size: int,
    length: float,
    *,
    timed: bool,
    on_step: Callable[[int, float], None] | None,
) -> list[float]:
    """The loss of each update; `length` is in seconds where the training is `timed`, else in updates."""
    order, losses = DataOrder(seed=learner.config.seed, num_samples=len(samples)), list[float]()
    started = time.perf_counter()
    while (share := (time.perf_counter() - started if timed else len(losses) + 0.5) / length) < 1:
        first = len(losses) * batch_size
        learner.accumulate([samples[order.index(place)] for place in range(first, first + batch_size)])
        factor = min(share / _RISING, (1 - share) / (1 - _RISING))
        figures = learner.step(learning_rate=learner.config.learning_rate * factor)
        if figures["skipped_update"]:
            raise FloatingPointError(f"update {len(losses) + 1} of the warm start: {learner.diagnosis()}")
        losses.append(figures["loss"])
        if on_step is not None:
            on_step(len(losses), losses[-1])
    return losses


def supervised_samples(
    tokenizer: "PreTrainedTokenizerBase", examples: Sequence[tuple[Sequence[ChatMessage], str]], *, max_seq_len: int
) -> list[TrainingSample]:
    """The examples as samples whose completions are trained on, each of their tokens with an advantage of 1."""
    if not examples:
        raise ValueError("there are no examples to start from")
    prompts = encode_prompts(tokenizer, [messages for messages, _ in examples])
    answers = tokenizer([text for _, text in examples], add_special_tokens=False)["input_ids"]
    samples = []
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        completion = [*answer, tokenizer.eos_token_id]
        if len(prompt) + len(completion) > max_seq_len:
            raise ValueError(
                f"example {index} has {len(prompt)} prompt and {len(completion)} completion tokens, more than max_seq_len "
                f"{max_seq_len} together: raise it, or leave the example out"
            )
        samples.append(
            TrainingSample(
                token_ids=[*prompt, *completion],
                loss_mask=[False] * len(prompt) + [True] * len(completion),
                rollout_logprobs=None,
                advantage=1.0,
            )
        )
    return samples
