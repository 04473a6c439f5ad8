"""The live view fits every terminal, shows what a run does, keeps what a model wrote inert, and leaves a clean scroll-back."""

import io
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from ludic.rollout.engine import Policy, WeightSyncReport
from ludic.storage.inert import InertFormatter, StandardErrorHandler
from ludic.telemetry.activity import Activity, WatchedEngine, watched
from ludic.telemetry.formatting import format_step_line
from ludic.telemetry.live import LiveView, sparkline
from ludic.telemetry.screen import Screen
from ludic.types import ChatMessage, Completion, ParseResult, SamplingParams, Score
from tests.terminal import Session, Terminal

STEP = {
    "reward_mean": 0.25, "correct_rate": 0.2, "avg_completion_length": 101.4, "entropy": 0.4, "logprob_gap": 0.0021,
    "tokens_per_s": 12345.6, "generation_s": 1.34, "grading_s": 0.02, "train_s": 62.0, "sync_s": 0.15, "step_s": 64.0,
    "trained_tokens": 800, "total_completion_tokens": 900, "prompt_tokens": 100,
}  # fmt: skip
ALARM = "alarm entropy: " + "the mean of 5 updates fell to a fifth, and little is left to explore; raise --lr " * 3
HOSTILE = (
    "\x1b]0;owned\x07\x1b[2J\x1b[9A\x9b31m\r\nstep 99/99\u202egnp\x08\u200d\ud800[red]x[/red] 全角文字" + "长" * 300
)
SIZES = [(w, h) for w in (1, 20, 40, 60, 79, 80, 100, 120, 250) for h in (-1, 0, 1, 2, 5, 8, 12, 17, 22, 38, 60)]


def full_view(*, text: str = HOSTILE, ascii_only: bool = False) -> tuple[LiveView, Activity]:
    """A view with something to show in every row: the third update of ten, in the middle of its rollouts."""
    activity = Activity(rollouts_per_update=4, num_eval_problems=8)
    view = LiveView("GRPO Qwen2.5 [x]", 10, activity, ascii_only=ascii_only)
    for _ in range(6):
        activity.ask(2)
    for step in (1, 2):
        view.log(step, {**STEP, "reward_mean": 0.25 * step})
        view.log(step, {"eval/accuracy": 0.3 * step})
    activity.updates[3].add(50, [completion(20), completion(30)])
    activity.ask(1)
    activity.sync_started_s = time.monotonic()
    activity.trained_tokens = lambda: 75
    activity.show(text, text, text, Score(reward=0.5, correct=False, parse=ParseResult(answer=text)))
    view.event(2, ALARM)
    return view, activity


def completion(length: int) -> Completion:
    return Completion(token_ids=[1] * length, logprobs=None, finish_reason="stop", policy_version=0)


# -- what it shows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_view_is_never_wider_or_taller_than_the_room_that_it_is_given(
    width: int, height: int, ascii_only: bool
) -> None:
    view, _ = full_view(ascii_only=ascii_only)
    rows = [row.plain for row in view.rows(width, height)]
    assert len(rows) <= max(0, height)
    assert [row for row in rows if cell_len(row) > width] == []
    assert not ascii_only or all(row.isascii() for row in rows)


def test_on_80_columns_and_24_rows_everything_is_there() -> None:
    view, _ = full_view(text="2*6=12\n\\boxed{12}")
    rows = [row.plain for row in view.rows(80, 22)]
    (bar,) = (re.findall("[━─]+", row)[0] for row in rows if row.startswith("generation"))
    assert bar == "━" * (len(bar) // 2) + "─" * (len(bar) // 2)  # 2 of 4
    text = "\n".join(" ".join(re.sub("[━─]", "", row).split()) for row in rows)
    for part in (
        "step 2/10 12,346 tokens/s left",
        "generation update 3 2/4",
        "training update 3 75 tokens",
        "sync 0.00s",
        "evaluation 0/8 0s",
        "seconds update 1m04s gen 1.34s grading 0.02s train 1m02s sync 0.15s",
        "reward 0.5 ▁█ 0.25 to 0.5",
        "correct 20.0%",
        "length 101.4",
        "entropy 0.4",
        "logp gap 0.0021",
        "alarm step 2: entropy: the mean of 5 updates fell",
        "completion reward 0.5 wrong",
        "2*6=12 ↵ \\boxed{12}",
    ):
        assert part in text
    assert all(cell_len(row) <= 80 for row in rows) and len(rows) <= 22


def test_where_rows_are_few_the_phases_stay_longest_and_the_step_to_the_last() -> None:
    view, _ = full_view()
    assert view.rows(80, 1)[0].plain.startswith("step ")
    assert [row.plain.split()[0] for row in view.rows(80, 3)] == ["step", "generation", "training"]
    assert not any("reward" in row.plain for row in view.rows(80, 5))


def test_a_long_completion_shows_its_beginning_and_its_end() -> None:
    view, _ = full_view(text="Begin " + "and so on " * 5_000 + "\\boxed{7}")
    rows = [row.plain for row in view.rows(80, 22)]
    assert any(row.startswith("  Begin and so on") for row in rows) and rows[-1].endswith("\\boxed{7}")


def test_a_run_that_goes_on_shows_what_was_logged_before() -> None:
    view = LiveView("r", 10, Activity())
    for record in ({"step": 1, **STEP}, {"step": 1, "event": ALARM}, {"step": 1, "eval/accuracy": 0.5}, {"step": None}):
        view.take(record)
    text = "\n".join(row.plain for row in view.rows(80, 22))
    assert "1/10" in text and "step 1: entropy" in text and "accuracy 50.0% at 1" in text and "  left " not in text


@pytest.mark.parametrize(
    ("values", "width", "drawn"),
    [
        ([], 5, ""),
        ([1.0], 5, "▁"),
        ([2.0, 2.0], 5, "▁▁"),
        ([0, 1, 2, 3], 2, "▁█"),
        ([0, 7, 3], 9, "▁█▄"),
        ([1.0], 0, ""),
    ],
)
def test_a_sparkline_goes_from_the_lowest_to_the_highest_in_the_room_that_there_is(
    values: list[float], width: int, drawn: str
) -> None:
    assert sparkline(values, width) == drawn


# -- what it is told -------------------------------------------------------------------------------------------------


class Engine:
    """Answers each request with completions of three tokens."""

    policy_version = 4
    overlaps_training = True
    closed = False

    async def generate(
        self, prompt_token_ids: Sequence[int], *, num_completions: int, sampling: SamplingParams
    ) -> list[Completion]:
        return [completion(3)] * num_completions

    async def update_weights(self, policy: Policy) -> WeightSyncReport:
        raise OSError("lost")

    def counts(self) -> dict[str, float]:
        return {"request_retries": 2}

    async def aclose(self) -> None:
        self.closed = True


class Task:
    rules = ("exact", "near")

    def messages(self, sample: int) -> list[ChatMessage]:
        return [ChatMessage(role="user", content=f"What is {sample}?")]

    def target(self, sample: int) -> str:
        return str(sample)

    async def score(self, sample: int, text: str) -> Score:
        return Score(reward=1.0, correct=text == str(sample), parse=ParseResult(answer=text))


async def test_requests_are_counted_with_their_update_or_evaluation_and_scores_with_their_requests() -> None:
    activity = Activity(rollouts_per_update=4, num_eval_problems=2, started_from=7)
    engine, environment = watched(activity, Engine(), Task())
    for _ in range(3):
        await engine.generate([1, 2], num_completions=2, sampling=SamplingParams())
    await environment.score(5, "5")
    assert {update: batch.num_done for update, batch in activity.updates.items()} == {8: 4, 9: 2}
    assert activity.updates[8].num_sequence_tokens == 4 * (2 + 3) and activity.updates[9].num_correct == 1
    for answer in ("5", "6"):
        await engine.generate([1], num_completions=1, sampling=SamplingParams())
        await environment.score(5, answer)
    first = activity.evaluation
    assert first is not None and first.is_complete and (first.num_scored, first.num_correct) == (2, 1)
    await engine.generate([1], num_completions=1, sampling=SamplingParams())
    assert activity.evaluation is not first
    assert activity.completion is not None and activity.completion.question == "What is 5?"


async def test_a_watched_engine_and_environment_are_what_they_wrap_in_everything_else() -> None:
    activity, inner = Activity(), Engine()
    engine, environment = watched(activity, inner, Task())
    assert (engine.policy_version, engine.overlaps_training, engine.counts()) == (4, True, {"request_retries": 2})
    assert (environment.target(3), environment.messages(3)) == ("3", Task().messages(3))
    assert getattr(environment, "rules", None) == ("exact", "near")
    with pytest.raises(OSError, match="lost"):
        await engine.update_weights(None)  # type: ignore[arg-type]
    assert activity.sync_started_s is None and activity.last_sync is None
    await engine.aclose()
    assert inner.closed


def test_without_a_live_view_nothing_is_wrapped() -> None:
    engine, environment = Engine(), Task()
    assert watched(None, engine, environment) == (engine, environment)
    assert isinstance(watched(Activity(), engine, environment)[0], WatchedEngine)


# -- on a terminal ---------------------------------------------------------------------------------------------------


class Screenful(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (40, 10), (20, 3), (10, 2), (80, 1)])
def test_a_hostile_completion_is_inert_on_a_terminal_of_any_size(width: int, height: int) -> None:
    stream, terminal = Screenful(), Terminal(width, height)
    view, _ = full_view()
    screen = Screen(Console(file=stream, force_terminal=True, width=width, height=height), view.rows)
    screen.start()
    screen.stop()
    written = stream.getvalue().replace("\ud800", "?")
    terminal.feed(written[: written.rindex("\r\x1b[J")])  # fails on what acts on a terminal, and is not the view's own
    assert "owned" in "".join(terminal.screen) or height < 24
    assert len(terminal.rows) < height or height < 3
    terminal.feed("\r\x1b[J")
    assert terminal.lines == [""]


def test_a_view_that_fails_costs_no_line_and_is_there_again_when_it_can_be_drawn() -> None:
    broken = True

    def view(width: int, height: int) -> list[Text]:
        if broken:
            raise ValueError("no room")
        return [Text("the view")]

    stream, terminal = Screenful(), Terminal(80, 24)
    screen = Screen(Console(file=stream, force_terminal=True, width=80, height=24), view)
    screen.start()
    screen.write_line(Text("first"))
    broken = False
    screen.write_line(Text("second"))
    terminal.feed(stream.getvalue())
    screen.stop()
    assert terminal.lines == ["first", "second", "", "the view"]


def test_what_two_threads_print_at_once_is_there_whole_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Screenful()
    monkeypatch.setattr(sys, "stdout", stream)
    screen = Screen(Console(file=stream, force_terminal=True, width=80, height=24), lambda width, height: [])
    screen.start()
    try:
        other = threading.Thread(target=sys.stdout.write, args=("other ",))

        class Slow(str):
            def __radd__(self, begun: str) -> str:
                """Called when `begun` has been read; the other thread has time to write meanwhile."""
                other.start()
                other.join(0.3)
                return begun + str(self)

        sys.stdout.write(Slow("one "))
        other.join()
        sys.stdout.write("\n")
    finally:
        screen.stop()
    assert "one other \n" in stream.getvalue()


def test_a_log_line_goes_to_what_standard_error_is_at_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = StandardErrorHandler()
    handler.setFormatter(InertFormatter("%(message)s"))
    streams = [io.StringIO(), io.StringIO()]
    for number, stream in enumerate(streams):
        monkeypatch.setattr(sys, "stderr", stream)
        handler.emit(logging.makeLogRecord({"msg": f"line {number}"}))
    assert [stream.getvalue() for stream in streams] == ["line 0\n", "line 1\n"]


SCRIPT = """
import asyncio, logging, os, sys, time
from pathlib import Path
from ludic.cli import run_script, say
from ludic.storage.inert import StandardErrorHandler
from ludic.telemetry.activity import Activity
from ludic.telemetry.loggers import make_logger
from ludic.types import ParseResult, Score

STEP = {"reward_mean": 0.25, "correct_rate": 0.2, "tokens_per_s": 9, "generation_s": 1, "train_s": 1, "step_s": 2}

async def main():
    logging.basicConfig(format="%(message)s", handlers=[StandardErrorHandler()])
    activity = Activity()
    activity.show("?", "wide " * 99, "7", Score(reward=0, correct=False, parse=ParseResult(answer="7")))
    logger = make_logger("rich", metrics_path="m.jsonl", run_name="run", config={}, total_steps=9, activity=activity)
    try:
        for step in range(1, 10):
            logger.log(step, STEP)
            say(f"said after {step}")
            logging.warning("warned after %d", step)
            while len(list(Path().glob("go*"))) < step:
                await asyncio.sleep(0.02)
            if step == 4 and sys.argv[1] == "error":
                raise ValueError("no good")
    finally:
        logger.close()
    return 0

run_script("script", main)
"""


def session(
    tmp_path: Path, ending: str, width: int = 80, height: int = 24, env: Mapping[str, str] | None = None
) -> Session:
    (tmp_path / "script.py").write_text(SCRIPT)
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    words = [sys.executable, "script.py", ending]
    return Session(
        words, width=width, height=height, cwd=tmp_path, env={**kept, "TERM": "xterm-256color", **(env or {})}
    )


def steps(one: Session, tmp_path: Path, numbers: range) -> None:
    """Let the run go on, update after update, each of them seen on the screen."""
    for number in numbers:
        one.until(lambda n=number: any(f" {n}/9" in row for row in one.terminal.screen[-20:]))  # type: ignore[misc]
        (tmp_path / f"go{number}").touch()


def without_view(one: Session) -> None:
    """Nothing of the view stands anywhere, and every line of the run stands there once and whole."""
    lines = one.terminal.lines
    assert [line for line in lines if re.match("──|generation|training|sync|evaluation|alarm|completion", line)] == []
    assert [line for line in lines if "█" in line or "━" in line or "wide" in line] == []
    assert one.terminal.cursor_shown and one.terminal.wraps
    told = [line for line in lines if line.startswith("step ")]
    assert [line[: len("step 1/9  reward 0.250")] for line in told] == [
        f"step {n}/9  reward 0.250" for n in range(1, len(told) + 1)
    ]
    assert [line for line in lines if line.startswith(("said", "ludic", "warned"))] == [
        f"{word} after {n}" for n in range(1, len(told) + 1) for word in ("said", "warned")
    ]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (50, 9)])
def test_a_run_leaves_its_lines_and_nothing_of_the_view(tmp_path: Path, width: int, height: int) -> None:
    one = session(tmp_path, "end", width, height)
    steps(one, tmp_path, range(1, 10))
    assert one.end() == 0
    without_view(one)
    assert 5 <= one.terminal.tallest < height


def test_a_terminal_that_is_resized_is_drawn_anew_and_left_clean(tmp_path: Path) -> None:
    one = session(tmp_path, "end", 120, 40)
    for number, (width, height) in enumerate([(80, 24), (120, 30), (60, 24), (100, 40)], start=1):
        steps(one, tmp_path, range(number, number + 1))
        one.resize(width, height)
        one.terminal.tallest = 0
    steps(one, tmp_path, range(5, 10))
    assert one.end() == 0
    without_view(one)


def test_ctrl_c_leaves_the_lines_the_message_and_nothing_of_the_view(tmp_path: Path) -> None:
    one = session(tmp_path, "end")
    steps(one, tmp_path, range(1, 3))
    one.until(lambda: any(" 3/9" in row for row in one.terminal.screen))
    one.process.send_signal(signal.SIGINT)
    assert one.end() == 130
    without_view(one)
    assert "script: interrupted by SIGINT" in one.terminal.lines
    (caught,) = (line for line in one.terminal.lines if line.startswith("script: caught SIGINT: "))
    assert caught.endswith("; a second signal leaves at once")  # and nothing of the view behind it


def test_an_error_leaves_the_lines_its_own_and_nothing_of_the_view(tmp_path: Path) -> None:
    one = session(tmp_path, "error")
    steps(one, tmp_path, range(1, 5))
    assert one.end() == 2
    without_view(one)
    assert "script: error: no good" in one.terminal.lines


def test_no_color_is_obeyed_and_colours_are_there_without_it(tmp_path: Path) -> None:
    for folder, env in ((tmp_path / "plain", {"NO_COLOR": "1"}), (tmp_path / "coloured", {})):
        folder.mkdir()
        one = session(folder, "error", env=env)
        steps(one, folder, range(1, 5))
        one.end()
        coloured = re.search(r"\x1b\[(\d+;)*(3[0-8]|9[0-7])m", one.raw) is not None
        assert coloured == (not env)


@pytest.mark.parametrize("env", [{}, {"FORCE_COLOR": "1"}])
def test_through_a_pipe_lines_are_plain_and_nothing_is_drawn(tmp_path: Path, env: dict[str, str]) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    for number in range(1, 10):
        (tmp_path / f"go{number}").touch()
    done = subprocess.run(
        [sys.executable, "script.py", "end"], cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr
    expected = [
        line
        for n in range(1, 10)
        for line in (f"step {n}/9  reward 0.250  correct 20.0%  tok/s 9  gen 1.00s  train 1.00s", f"said after {n}")
    ]
    assert done.stdout.splitlines() == expected


def test_the_line_of_a_step_fits_a_narrow_terminal() -> None:
    metrics = {
        "reward_mean": 0.5, "correct_rate": 0.5, "avg_completion_length": 512, "loss": -0.1234, "grad_norm": 0.1234,
        "logprob_gap": 2.1e-7, "tokens_per_s": 12_345, "generation_s": 12.34, "train_s": 12.34, "sync_s": 0.05,
    }  # fmt: skip
    whole, brief = (format_step_line(14, 50, metrics, brief=brief) for brief in (False, True))
    assert len(brief) <= 80 < len(whole) and "tok/s 12,345" in brief and "sync 0.05s" in whole
