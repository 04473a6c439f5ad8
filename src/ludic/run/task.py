"""What a script brings to a run, beside its flags. A training and an evaluation take the same."""

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

    train: Sequence[SampleT] = ()
    """An evaluation does not look at them."""
    evaluation: Sequence[SampleT] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What says which problems these are, and how they are put: kept with the results, and compared when a run is resumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(Generic[SampleT]):
    """What is trained on or evaluated, and how it is called. The script closes the environment, where that needs closing."""

    environment: Environment[SampleT]
    load_samples: Callable[[argparse.Namespace], Samples[SampleT]]
    """Called once the model is known to be one, and before anything is spent."""
    name: str = ""
    """Begins the names of a training's files; by default the environment's class in lower case."""
    title: str = ""
    """Heads the figures of an evaluation; by default the name of the environment's class."""
    hub_dataset: str | None = None
    """What `load_samples` takes from the hub: where that is out of reach, its cache is used, and said to be."""
    plain_template: Path | None = None
    """A chat template without a system turn of its own, to recommend; see `task.template_checks`."""
    plain_text: bool = False
    """Of an evaluation: prompts without a chat template, the messages' text alone, as base models are asked."""
    stops: tuple[str, ...] = ()
    """Of an evaluation: texts that end a completion where they are one token. Where they are not, `score` has to cut there."""
    make_policy: Callable[[argparse.Namespace, GRPOConfig, Path], None] | None = None
    """Makes the policy of a training in its folder, and points `--model` at it. Such a run needs no hub and is not resumed."""

    @property
    def file_name(self) -> str:
        """The start of the names of a training's files."""
        return self.name or type(self.environment).__name__.lower()

    @property
    def heading(self) -> str:
        return self.title or type(self.environment).__name__
