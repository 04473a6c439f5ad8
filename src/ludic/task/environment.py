"""What a task is to ludic: how a sample is put to the model, and how an answer is scored.

A task is one module like `environments/gsm8k.py`. The trainer and the evaluation use the same object, so that a prompt,
a parser or a rule can never differ between them. The data set is an ordinary sequence of samples; an environment does
not own it.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, cast

from ludic.types import ChatMessage, Score

SampleT_contra = TypeVar("SampleT_contra", contravariant=True)


class Environment(Protocol[SampleT_contra]):
    """One task with verifiable answers. With these three methods the model has one turn; see `SeveralTurns` for more.

    It may name the rules by which an evaluation judges a completion, the headline first: `rules = ("flexible", "strict")`.
    `Score.parts` then has the verdict of each, 0 or 1. Without `rules` the verdict is `Score.correct`.
    """

    def messages(self, sample: SampleT_contra, /) -> list[ChatMessage]:
        """The chat that is put to the model; the model's turn comes next."""
        ...

    def target(self, sample: SampleT_contra, /) -> str:
        """The right answer, as it is written to logs."""
        ...

    async def score(self, sample: SampleT_contra, text: str, /) -> Score:
        """Score one completion's text. Slow or unsafe work belongs in another process (`ludic.task.grading.Grader`)."""
        ...


class SeveralTurns(Environment[SampleT_contra], Protocol[SampleT_contra]):
    """A task in which the environment answers the model: a tool, a game, a second attempt.

    Many conversations are under way at the same time, so that what a turn depends on is in `sample` and `turns`, never in the
    environment. `turns` is the chat after the prompt: the model's turns (`assistant`) and between them the environment's.
    """

    async def next_turn(self, sample: SampleT_contra, turns: Sequence[ChatMessage], /) -> str | ChatMessage | None:
        """What is said to the model after the last of `turns`, its own: a user's turn, a message of another role, or None,
        which ends the conversation.

        Called after every turn that the model ended itself. How many turns there may be is for this method to say; a
        conversation without an end is cut off where the longest completion is.
        """
        ...

    async def score(self, sample: SampleT_contra, text: str, turns: Sequence[ChatMessage] = (), /) -> Score:
        """Score one conversation. `text` is the model's last turn, often the answer; `turns` are all, that one included."""
        ...


def several_turns(environment: Environment[Any]) -> SeveralTurns[Any] | None:
    """The environment as one of several turns; None where the model has one turn, since three methods are enough for a task.

    Raises:
        ValueError: it has `next_turn`, but its `score` does not take the turns; one line.
    """
    if getattr(environment, "next_turn", None) is None:
        return None
    try:
        inspect.signature(environment.score).bind(None, "", ())
    except TypeError as error:  # a run would find out after its first completions
        raise ValueError(
            f"{type(environment).__name__} has next_turn, so its score is given the conversation too: make it "
            "score(self, sample, text, turns=())"
        ) from error
    return cast("SeveralTurns[Any]", environment)
