"""What a trainer is given, checked before anything is computed with it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ludic.config import GRPOConfig
from ludic.task.environment import Environment
from ludic.task.prompts import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SampleT = TypeVar("SampleT")


def prompt_token_ids(
    config: GRPOConfig,
    samples: Sequence[SampleT],
    given: Sequence[list[int]] | None,
    environment: Environment[SampleT],
    tokenizer: "PreTrainedTokenizerBase",
) -> list[list[int]]:
    """Every prompt's token ids, once for the whole run, or those that were `given`.

    Raises:
        ValueError: one of them leaves no room for an answer.
    """
    if given is not None and len(given) != len(samples):
        raise ValueError(f"train_prompts holds {len(given)} prompts, train_samples {len(samples)} samples")
    token_ids = []
    for index, sample in enumerate(samples):
        ids = encode_prompt(tokenizer, environment.messages(sample)) if given is None else given[index]
        if len(ids) > config.max_prompt_len:
            raise ValueError(
                f"the prompt of training sample {index} is {len(ids)} tokens, more than --max-seq-len "
                f"{config.max_seq_len} allows with one token for an answer"
            )
        token_ids.append(ids)
    return token_ids


def check_task(task: Mapping[str, Any], config: GRPOConfig) -> None:
    """A task's settings stand beside the run's, and are kept in checkpoints.

    Raises:
        ValueError: one of them has the name of a setting of the run, or cannot be written as JSON.
    """
    taken = dataclasses.asdict(config)
    for name, value in task.items():
        if name in taken:
            raise ValueError(f"the task has a setting {name!r}, and so has GRPOConfig: give the task's another name")
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the task's setting {name!r} cannot be kept in a checkpoint: {error}") from error
