"""A few rollouts of every tenth update, for the loggers that show text.

They come from the end of the run's rollouts file, which the training loop writes anyway: no logger needs a way into the loop,
and what is shown is what is recorded. An update's lines are on the disk before the next update is logged, so its rollouts
are shown then, under their own step; those of the last update when the logger closes.
"""

import json
import math
import os
import random
import re
from collections import defaultdict
from typing import Any

from ludic.storage.inert import inert_lines
from ludic.storage.jsonl import end_of_whole_lines

EVERY = 10
"""Updates from one sample to the next; the first update is sampled, and the last one where it is known."""
NUM_ROLLOUTS = 8
"""Of one update."""
TEXT_LIMIT = 4_000
"""Characters of a prompt or a completion; what is longer ends in ` ...`."""
TEXTS = ("prompt", "completion", "answer", "parse_error", "target", "finish_reason")
FIGURES = ("reward", "correct", "completion_tokens", "policy_version", "group", "rollout")
"""Fields of a line of the rollouts file, in the order shown: the texts first."""
_STEP = re.compile(rb'\{"step": (\d+),')

Row = dict[str, Any]


class SampledRollouts:
    """Reads on where it stopped. What the file holds when it is made belongs to an earlier process, and is passed over.

    Args:
        path: the rollouts file; it may come later. None has no rollouts.
        total_steps: updates that the run is to make, if that is known.
    """

    def __init__(self, path: str | os.PathLike[str] | None, *, total_steps: int | None = None) -> None:
        self._path = path
        self._total_steps = total_steps
        self._offset = 0 if path is None else end_of_whole_lines(path)

    def before(self, step: float = math.inf) -> dict[int, list[Row]]:
        """The sampled rollouts of the updates before `step`, by update, each once: their `TEXTS` and `FIGURES`.

        Raises:
            OSError: the file cannot be read.
            ValueError: a line of it is not one of a rollout.
        """
        found = defaultdict[int, list[bytes]](list)
        for at, line in self._lines(step):
            if (at - 1) % EVERY == 0 or at == self._total_steps:
                found[at].append(line)
        return {at: _sample(lines, seed=at) for at, lines in found.items()}

    def _lines(self, step: float) -> list[tuple[int, bytes]]:
        """The next whole lines of updates before `step`. Their step is read without the rest, which is long."""
        if self._path is None or not os.path.exists(self._path):
            return []
        lines = []
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                begin = _STEP.match(line)
                if begin is None:
                    raise ValueError(f"{self._path}: a line begins with {line[:40]!r} and not with its step")
                if int(begin[1]) >= step:
                    break
                self._offset += len(line)
                lines.append((int(begin[1]), line))
        return lines


def _sample(lines: list[bytes], *, seed: int) -> list[Row]:
    """`NUM_ROLLOUTS` of the lines in their order, the same ones each time."""
    places = sorted(random.Random(seed).sample(range(len(lines)), min(NUM_ROLLOUTS, len(lines))))
    records = [json.loads(lines[place]) for place in places]
    return [
        {name: _shown(one[name] or "") for name in TEXTS} | {name: one[name] for name in FIGURES} for one in records
    ]


def _shown(text: str) -> str:
    """Text of a model or a data set, made inert and cut."""
    cut = text if len(text) <= TEXT_LIMIT else text[:TEXT_LIMIT] + " ..."
    return inert_lines(cut, limit=10 * TEXT_LIMIT)  # an escape is up to ten characters
