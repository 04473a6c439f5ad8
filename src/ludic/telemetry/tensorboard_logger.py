"""Metrics, settings, events and sampled rollouts as TensorBoard event files.

TensorBoard renders text as Markdown with HTML in it. What others wrote (a model, a data set, a server) stands in a
`<pre>` block with every character of HTML escaped, where Markdown does nothing either.
"""

import contextlib
import html
import os
from collections.abc import Iterable, Mapping
from typing import Any, cast

from ludic.storage.inert import inert
from ludic.telemetry.metric_names import metric_tables
from ludic.telemetry.sampled_rollouts import Row, SampledRollouts

_FLUSH_S = 10
"""A killed run loses what was logged since; TensorBoard itself would wait for two minutes."""
_EVENT_LIMIT = 2_000


class TensorboardLogger:
    """Scalars under their own names, the axis is the update. Texts: `settings`, `metrics`, `events`, `rollouts`.

    A resumed run goes on in the same folder, and hides the scalars of the updates that it makes again.

    Args:
        folder: of the event files.
        config: the run's settings.
        rollouts: what is shown of the rollouts.
        started_from: updates done before this process began.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: Mapping[str, object],
        *,
        rollouts: SampledRollouts,
        started_from: int = 0,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # torch takes seconds
        from torch.utils.tensorboard.summary import hparams

        self._rollouts = rollouts
        self._events = (started_from, "")
        purged = started_from + 1 if started_from else None
        self._writer = SummaryWriter(os.fspath(folder), purge_step=purged, flush_secs=_FLUSH_S)
        settings = {name: str(value) for name, value in config.items()}
        for summary in hparams(settings, {"reward_mean": 0, "eval/accuracy": 0}):  # what the table of runs compares
            cast(Any, self._writer).file_writer.add_summary(summary)
        lines = "\n".join(f"{name}: {inert(value)}" for name, value in settings.items())
        self._writer.add_text("settings", verbatim(lines), started_from)
        self._writer.add_text("metrics", metric_tables(), started_from)

    def __repr__(self) -> str:
        return "the log at TensorBoard"

    def log(self, step: int, metrics: Mapping[str, float], /) -> None:
        """Write the metrics of update `step`, and sampled rollouts of those before it.

        Raises:
            OSError: the event file or the rollouts file failed.
        """
        self._write_rollouts(self._rollouts.before(step))
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def event(self, step: int, message: str, /) -> None:
        """Write the message as text, after those of the same step: TensorBoard shows one text a step, the last."""
        last_step, before = self._events
        text = verbatim(inert(message, _EVENT_LIMIT))
        self._events = (step, f"{before}\n\n{text}" if step == last_step and before else text)
        self._writer.add_text("events", self._events[1], step)

    def close(self) -> None:
        """Write what is left, and close the event file. Safe to call twice."""
        with contextlib.closing(self._writer):
            self._write_rollouts(self._rollouts.before())

    def _write_rollouts(self, updates: Mapping[int, Iterable[Row]]) -> None:
        for step, rows in updates.items():
            texts = ("\n".join(f"{name}: {value}" for name, value in row.items()) for row in rows)
            self._writer.add_text("rollouts", "\n\n".join(map(verbatim, texts)), step)


def verbatim(text: str) -> str:
    """Markdown that shows `text`, which is inert, as it is: no markup, link, image or tag of it is one.

    Example:
        >>> verbatim("<img src=x> **7**")
        '<pre>&lt;img src=x&gt; **7**</pre>'
    """
    fenceless = html.escape(text).replace("`", "&#96;").replace("~", "&#126;")  # fences are looked for before tags are
    return f"<pre>{fenceless}</pre>"
