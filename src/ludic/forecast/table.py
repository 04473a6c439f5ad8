"""A forecast as people read it: before the run alone, after the run beside what came true."""

from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table

from ludic.config import GRPOConfig
from ludic.forecast.figures import Forecast, Interval, num_checkpoints, num_evaluations, sampling_factor
from ludic.forecast.outcome import COMPARED, Outcome
from ludic.telemetry.formatting import count, percent, seconds

_BAR = 40
"""Characters of a bar of all groups."""
_BINS = (("none", 0.0), ("up to 25%", 0.25), ("up to 50%", 0.5), ("up to 75%", 0.75), ("most", 1 - 1e-9), ("all", 1.0))


_LABELS = {
    "correct_rate": "correct",
    "flat_share": "groups without variance",
    "truncation_rate": "truncated",
    "mean_length": "tokens each",
    "generation_s": "an update: generation",
    "grading_s": "grading after it",
    "training_s": "training",
    "sync_s": "weight sync",
    "update_s": "an update in all",
}
_SHOWN: dict[str, Callable[[float], str]] = {
    "correct_rate": percent,
    "flat_share": percent,
    "truncation_rate": percent,
    "mean_length": "{:.1f}".format,
}
"""How what is no number of seconds is shown."""


def histogram(solve_rates: Sequence[float]) -> list[str]:
    """One line for each range of solve rates, with a bar for its groups.

    Example:
        >>> print(*histogram([0.0, 0.125, 0.25, 1.0]), sep="\\n")
        none       ########## 1
        up to 25%  #################### 2
        up to 50%  0
        up to 75%  0
        most       0
        all        ########## 1
    """
    counts = [0] * len(_BINS)
    for rate in solve_rates:
        counts[next(place for place, (_, limit) in enumerate(_BINS) if rate <= limit)] += 1
    widths = [round(_BAR * number / len(solve_rates)) for number in counts]
    return [
        f"{label:<10} {'#' * width}{' ' if width else ''}{number}"
        for (label, _), width, number in zip(_BINS, widths, counts, strict=True)
    ]


def forecast_table(found: Forecast, config: GRPOConfig) -> Table:
    """The figures with their intervals, to be printed with a rich `Console`."""
    table = _table("forecast", "95% interval, or range", title=f"forecast of {config.train_steps} updates")
    for name, interval in (
        ("correct_rate", found.correct_ci95),
        ("flat_share", found.flat_ci95),
        ("truncation_rate", found.truncation_ci95),
    ):
        table.add_row(_LABELS[name], percent(getattr(found, name)), _percents(interval))
    lengths = f"median {found.median_length:.0f}, 95% up to {found.p95_length:.0f}, longest {found.longest}"
    table.add_row(_LABELS["mean_length"], f"{found.mean_length:.1f}", lengths)
    table.add_section()
    ranges = {
        "generation_s": found.generation_range_s,
        "training_s": found.training_range_s,
        "update_s": found.update_range_s,
    }
    for name in ("generation_s", "grading_s", "training_s", "sync_s", "update_s"):
        table.add_row(_LABELS[name], seconds(getattr(found, name)), _seconds(ranges[name]) if name in ranges else "")
    evaluations = num_evaluations(config) if found.evaluation_s else 0
    if evaluations:
        table.add_row("an evaluation", seconds(found.evaluation_s), "")
    table.add_section()
    table.add_row(_memory_of(found), size(found.memory_bytes), "")
    checkpoints = num_checkpoints(config)
    table.add_row("disk at the end", size(found.disk_bytes(config.train_steps, checkpoints)), "")
    table.add_row("each checkpoint", size(found.checkpoint_bytes), f"{checkpoints} stay, 1 more while it is written")
    files = "rollouts, metrics and log-prob gaps" if config.record_token_logprobs else "rollouts and metrics"
    table.add_row("each update's files", size(found.update_bytes), files)
    table.add_section()
    spread = [
        hours(found.total_seconds(config.train_steps, evaluations) + config.train_steps * (bound - found.update_s))
        for bound in found.update_range_s
    ]
    table.add_row(
        "hours in all", hours(found.total_seconds(config.train_steps, evaluations)), f"{spread[0]} to {spread[1]}"
    )
    return table


def assumptions(found: Forecast, config: GRPOConfig, *, overlaps: bool) -> list[str]:
    """What the figures rest on, in words."""
    rollouts = found.num_groups * found.group_size
    said = [
        f"generation: {rollouts} probe rollouts in two bursts gave the cost of a decoding step and of a token; an update is "
        f"{config.rollouts_per_update} rollouts of the same lengths, {found.in_flight} at once. The range is from a cost of "
        "steps alone (the engine takes more at once as quickly) to a cost of tokens alone (the probes filled it).",
        *_of_dynamic_sampling(found, config),
        "training: in proportion to the tokens of groups with variance; "
        + (
            "it runs while later groups are generated, as they came in here."
            if overlaps
            else "it waits for the generation, on the same device."
        ),
        f"hours: {found.start_s:.0f} s to start, {config.train_steps} updates, "
        f"{num_evaluations(config) if found.evaluation_s else 0} evaluations. The writing of checkpoints is not in it, and "
        "lengths and solve rates are those of the policy as it is now.",
    ]
    if not found.on_gpu:
        said.append("memory: of this process with the probes alone; an update of more rollouts may need more.")
    return said


def _of_dynamic_sampling(found: Forecast, config: GRPOConfig) -> list[str]:
    if not config.dynamic_sampling:
        return []
    groups = round(config.groups_per_update * sampling_factor(config, found.flat_share))
    return [
        f"dynamic sampling: {groups} groups are generated for the {config.groups_per_update} of an update, in proportion to the "
        "groups without variance; that a replacement starts later than the group before it is not in the seconds."
    ]


def outcome_table(found: Forecast, came: Outcome) -> Table:
    """The forecast beside the first update, whose policy it was made for, and beside the whole run."""
    table = _table("forecast", "update 1", "whole run", title="the forecast, and what came true")
    for place, (name, metric) in enumerate(COMPARED.items()):
        show = _SHOWN.get(name, seconds)
        table.add_row(_LABELS[name], show(getattr(found, name)), show(came.first(metric)), show(came.mean(metric)))
        if place == len(_SHOWN) - 1:
            table.add_section()
    updates, evaluations = len(came.updates), len(came.evaluation_s)
    if evaluations:
        table.add_row("an evaluation", seconds(found.evaluation_s), "", seconds(sum(came.evaluation_s) / evaluations))
    table.add_section()
    table.add_row(_memory_of(found), size(found.memory_bytes), "", size(came.memory_bytes))
    table.add_row("disk at the end", size(found.disk_bytes(updates, came.num_checkpoints)), "", size(came.disk_bytes))
    total = hours(found.total_seconds(updates, evaluations))
    table.add_row("hours in all", total, "", "not known" if came.seconds is None else hours(came.seconds))
    return table


def _table(*headings: str, title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_style="bold", title_justify="left")
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _memory_of(found: Forecast) -> str:
    return "peak memory of the trainer's GPU" if found.on_gpu else "peak memory of the process"


def _percents(interval: Interval) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _seconds(interval: Interval) -> str:
    return f"{seconds(interval[0])} to {seconds(interval[1])}"


def hours(value: float) -> str:
    """Seconds as hours.

    Example:
        >>> hours(5400), hours(36)
        ('1.50', '0.010')
    """
    return f"{value / 3600:.3f}" if value < 360 else f"{value / 3600:.2f}"


def size(number: float) -> str:
    """Bytes in the largest unit of which there is one.

    Example:
        >>> size(1536), size(3 * 2**30), size(12)
        ('1.5 KiB', '3.0 GiB', '12 B')
    """
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            return f"{number / 1024**power:.1f} {unit}"
    return f"{count(number)} B"
