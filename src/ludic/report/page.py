"""The page itself: data, charts, styles and scripts in one HTML file that makes no network requests.

What models and data sets wrote is in it as compressed data, which no parser of HTML sees, and the page shows it as text. The
page's content policy allows the very scripts that are written here, by their digests, and no request to anywhere.
"""

import base64
import datetime
import hashlib
import html
import importlib.util
import os
import secrets
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ludic.report import evaluations, timings
from ludic.report.rollouts import Source, compressed, evaluation_source, packed, training_source
from ludic.report.runs import Row, Run, find_runs

MAX_ROLLOUTS = 50_000
"""Completions of one run that go onto the page, by default."""
_SCRIPTS = (
    "data.js",
    "charts.js",
    "curves.js",
    "times.js",
    "rollouts.js",
    "filters.js",
    "group.js",
    "shading.js",
    "evaluations.js",
    "settings.js",
    "page.js",
)
"""In the order in which they are read."""


def write_report(paths: Sequence[Path], out: Path, *, max_rollouts: int = MAX_ROLLOUTS) -> list[Run]:
    """Write the page of the runs at `paths` to `out`, whole or not at all; returns the runs that are on it.

    Args:
        paths: the folders of trainings or evaluations, or their JSON lines files; finished, cut short, or going on.
        max_rollouts: of a run with more completions, those of evenly spread updates are on the page.

    Raises:
        ValueError: there is no run at a path, a file of it is damaged, or Bokeh is not installed; one line.
        OSError: a file cannot be read, or the page not be written.
    """
    if importlib.util.find_spec("bokeh") is None:
        raise ValueError("the report page needs the package bokeh: install it with `uv sync --extra report`")
    runs = find_runs(list(paths))
    sources, evaluated = _read_completions(runs, max_rollouts)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.write_text(page(runs, sources, evaluated), encoding="utf-8")
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return runs


def page(runs: Sequence[Run], sources: Sequence[Source], evaluated: Sequence[Row]) -> str:
    """The HTML text."""
    from ludic.report import charts

    main = {
        "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "runs": [
            _run_data(run, colour) for run, colour in zip(runs, _colours(charts.RUN_COLOURS, len(runs)), strict=True)
        ],
        "curves": [list(curve) for curve in charts.CURVES],
        "partColours": charts.PART_COLOURS,
        "sources": [source.index() for source in sources],
        "evaluations": list(evaluated),
    }
    documents = {
        "curves": charts.curves(runs),
        "time": charts.times(runs),
        "evaluations": charts.evaluations(evaluated),
    }
    script, style = _joined(_SCRIPTS), _joined(("page.css",))
    bokeh = _bokeh_script()
    data = {"main": packed(main), "bokeh": compressed(bokeh.encode())}
    data |= {f"charts-{name}": packed(document) for name, document in documents.items()}
    for place, source in enumerate(sources):
        data |= {f"text-{place}-{number}": chunk for number, chunk in enumerate(source.chunks)}
    nonce = secrets.token_urlsafe(16)  # of the style elements that Bokeh makes; scripts have digests
    policy = (
        f"default-src 'none'; script-src {_digest(script)} {_digest(bokeh)}; "
        f"style-src {_digest(style)} 'nonce-{nonce}'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    return _filled(
        _read("page.html"),
        title=html.escape(f"{', '.join(run.name for run in runs)} - ludic report"),
        policy=policy,
        style=style,
        nonce=nonce,
        data="\n".join(_element(name, text) for name, text in data.items()),
        script=script,
    )


def _element(name: str, text: str) -> str:
    return f'<script type="application/octet-stream" id="data-{name}">{text}</script>'


def _read_completions(runs: Sequence[Run], limit: int) -> tuple[list[Source], list[Row]]:
    sources, evaluated = [], []
    for place, run in enumerate(runs):
        if run.rollouts is not None:
            scale = run.settings.get("scale_rewards")
            source = training_source(
                run.rollouts,
                name=f"{run.name}: training",
                run=place,
                limit=limit,
                scale_rewards=run.settings.get("loss") != "dr_grpo" if scale is None else bool(scale),
                token_gaps=run.token_gaps,
            )
            if source.total:
                sources.append(source)
        for path in run.evaluation_files:
            records = evaluations.read_records(path)
            figures = evaluations.analysed(records, path)
            evaluated.append({**figures, "run": place, "source": len(sources)})
            sources.append(evaluation_source(records, name=f"{run.name}: {path.name}", run=place))
    return sources, evaluated


def _run_data(run: Run, colour: str) -> Row:
    names = sorted({name for row in run.updates for name in row} - {"step", "time"})
    return {
        "name": run.name,
        "colour": colour,
        "finished": bool(run.summary),
        "steps": [row["step"] for row in run.updates],
        "metrics": {name: [_rounded(row.get(name)) for row in run.updates] for name in names},
        "evaluations": run.evaluations,
        "events": run.events,
        "settings": run.settings,
        "start": {name: value for name, value in run.start.items() if name != "settings"},
        "summary": {name: value for name, value in run.summary.items() if name != "evaluations"},
        "seconds": timings.table(run),
        "ahead": timings.generates_ahead(run),
        "onTimeline": min(len(run.updates), timings.SHOWN),
        "syncs": _syncs(run),
    }


def _syncs(run: Run) -> Row:
    """What the metrics say about the proofs: an update has `sync_s` once the sync of its weights is proven."""
    gaps = [row["sync/logprob_gap"] for row in run.updates if row.get("sync/logprob_gap") is not None]
    last = run.updates[-1] if run.updates else {}
    return {
        "updates": len(run.updates),
        "proven": sum(row.get("sync_s") is not None for row in run.updates),
        "probes": len(gaps),
        "largest_gap": max(gaps, default=None),
        "version": last.get("policy_version"),
        "recoveries": last.get("server_recoveries"),
    }


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _colours(palette: Sequence[str], count: int) -> list[str]:
    return [palette[place % len(palette)] for place in range(count)]


def _bokeh_script() -> str:
    from bokeh.resources import Resources

    return "\n".join(Resources(mode="inline", components=["bokeh"], log_level="warn").js_raw)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


def _joined(names: Sequence[str]) -> str:
    return "\n".join(map(_read, names))


def _read(name: str) -> str:
    return (files("ludic.report") / "assets" / name).read_text(encoding="utf-8")


def _filled(template: str, **parts: str) -> str:
    """`template` with each `{{name}}` replaced; what is put in is not looked at again."""
    pieces = template.split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        filled += [parts[name], rest]
    return "".join(filled)
