"""What a training script brings to a run, beside its flags."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from ludic.config import GRPOConfig
from ludic.task.environment import Environment

SampleT = TypeVar("SampleT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples(Generic[SampleT]):
    """The problems of a run.

    Example:
        Samples(train=sums[50:], evaluation=sums[:50], settings={"largest": 40})
    """

    train: Sequence[SampleT]
    evaluation: Sequence[SampleT] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What says which problems these are, and how they are put: kept in checkpoints, and compared by `--resume`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(Generic[SampleT]):
    """What is trained on, and how its files are called. The script closes the environment, where that needs closing."""

    environment: Environment[SampleT]
    load_samples: Callable[[argparse.Namespace, GRPOConfig], Samples[SampleT]]
    """Called once the model is known to be one, and before anything is spent."""
    name: str = ""
    """Begins the names of the run's files; by default the environment's class in lower case."""
    hub_dataset: str | None = None
    """What `load_samples` takes from the hub: where that is out of reach, its cache is used, and said to be."""
    plain_template: Path | None = None
    """A chat template without a system turn of its own, to recommend; see `task.template_checks`."""
    make_policy: Callable[[argparse.Namespace, GRPOConfig, Path], None] | None = None
    """Makes the policy in the run's folder, and points `--model` at it. Such a run needs no hub and is not resumed."""

    @property
    def file_name(self) -> str:
        """The start of the names of the run's files."""
        return self.name or type(self.environment).__name__.lower()
