"""Draw docs/pictures/terminal.svg: the live view of a real run of the demo, as it stands on a terminal in the middle of it.

uv run python scripts/picture_terminal.py                      # makes the demo's policy first, which takes a minute
uv run python scripts/picture_terminal.py --demo-dir FOLDER --width 120 --height 40 --out wide.svg
"""

import argparse
import asyncio
import io
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "gsm8k")]

from demo import DEMO_FLAGS, build_demo  # noqa: E402
from train_gsm8k import parse_arguments  # noqa: E402

from environments.gsm8k import GSM8K, load  # noqa: E402
from ludic.config import RunPaths, from_arguments  # noqa: E402
from ludic.rollout.local import LocalEngine  # noqa: E402
from ludic.task.pretrained import load_model  # noqa: E402
from ludic.telemetry.activity import Activity, watched  # noqa: E402
from ludic.telemetry.console import WIDE  # noqa: E402
from ludic.telemetry.formatting import format_step_line  # noqa: E402
from ludic.telemetry.live import LiveView  # noqa: E402
from ludic.train.trainer import GRPOTrainer  # noqa: E402


class Recorder:
    """A `MetricLogger` that keeps the lines and hands the figures to the view."""

    def __init__(self, view: LiveView, total_steps: int) -> None:
        self.view = view
        self.step = 0
        self.lines: dict[bool, list[str]] = {True: [], False: []}
        """Those for a narrow terminal, and whole ones."""
        self._total_steps = total_steps

    def log(self, step: int, metrics: Mapping[str, float], /) -> None:
        self.view.log(step, metrics)
        self.step = step
        for brief, lines in self.lines.items():
            lines.append(format_step_line(step, self._total_steps, metrics, brief=brief))

    def event(self, step: int, message: str, /) -> None:
        self.view.event(step, message)

    def close(self) -> None:
        pass


def drawn(recorder: Recorder, width: int, height: int) -> str:
    """The screen as an SVG, without the fonts that rich would have a reader fetch."""
    view = recorder.view.rows(width, height - 2)
    console = Console(record=True, width=width, height=height, file=io.StringIO(), force_terminal=True)
    above = [row for line in recorder.lines[width < WIDE][-height:] for row in Text(line).wrap(console, width)]
    for row in [*above[-(height - 1 - len(view)) :], Text(), *view]:
        console.print(row, soft_wrap=True)
    svg = console.export_svg(title="train_gsm8k.py --demo")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


async def picture(args: argparse.Namespace, folder: Path) -> None:
    """Train until the step, and draw while its update is being trained."""
    if not (folder / "model").is_dir():
        build_demo(folder)
    config = from_arguments(parse_arguments(["--demo"]))
    activity = Activity(rollouts_per_update=config.rollouts_per_update, num_eval_problems=config.eval_limit)
    recorder = Recorder(LiveView("GRPO demo", config.train_steps, activity), config.train_steps)
    engine, environment = watched(
        activity, LocalEngine.from_pretrained(folder / "model"), GSM8K(system_prompt=DEMO_FLAGS["--system-prompt"])
    )
    with tempfile.TemporaryDirectory() as out_dir:
        trainer = GRPOTrainer(
            config=config,
            model=load_model(str(folder / "model")),
            model_name=str(folder / "model"),
            engine=engine,
            environment=environment,
            train_samples=load("train", dataset=folder),
            eval_samples=load("test", dataset=folder),
            metric_logger=recorder,
            paths=RunPaths(out_dir=Path(out_dir), name="demo"),
        )
        activity.trained_tokens = lambda: trainer.learner.num_accumulated_tokens
        run = asyncio.create_task(trainer.run())
        while recorder.step < args.step or not activity.trained_tokens():
            await asyncio.sleep(0.02)
            if run.done():
                await run
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(drawn(recorder, args.width, args.height), encoding="utf-8")
        if args.wide:
            args.wide.write_text(drawn(recorder, 120, 40), encoding="utf-8")
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        await engine.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the live view of a run of the demo.")
    parser.add_argument("--demo-dir", type=Path, help="a gsm8k_demo folder that a demo has made (default: a new one)")
    parser.add_argument("--step", type=int, default=20, help="after this update (default: 20)")
    parser.add_argument("--width", type=int, default=80)
    parser.add_argument("--height", type=int, default=24)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures" / "terminal.svg")
    parser.add_argument("--wide", type=Path, help="also draw 120 x 40 here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        asyncio.run(picture(args, args.demo_dir or Path(made)))


if __name__ == "__main__":
    main()
