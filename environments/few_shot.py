"""The training problems that worked examples are taken from: never one that is evaluated."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ludic.task.datafiles import QuestionWithTarget

SampleT = TypeVar("SampleT", bound=QuestionWithTarget)


def training_problems(
    load: Callable[..., list[SampleT]], evaluated: Sequence[SampleT], *, at_least: int, dataset: str | Path | None
) -> list[SampleT]:
    """Those of the split `train` whose question is not among the evaluated ones, in their order; none are read for 0.

    Raises:
        ValueError: there are fewer than `at_least`, or the split cannot be had; one line.
    """
    asked = {sample.question for sample in evaluated}
    found = [sample for sample in load("train", dataset=dataset) if sample.question not in asked] if at_least else []
    if len(found) < at_least:
        raise ValueError(
            f"--few-shot {at_least} needs as many training problems that are not evaluated, and there are {len(found)}: "
            "give a folder with train and test to --dataset, or a smaller number"
        )
    return found
