"""Metrics reach every logger, and JSON lines files survive kills, full disks and odd text."""

import contextlib
import errno
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any, cast

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from ludic.rollout.evaluation import summarise
from ludic.rollout.problems import ProblemRecord
from ludic.storage.jsonl import JsonlWriter, drop_steps_after, encode_line, read_jsonl
from ludic.telemetry.formatting import format_metric, format_step_line
from ludic.telemetry.loggers import make_logger, parse_logger_names
from ludic.telemetry.progress import EvaluationDisplay, StatusLine
from ludic.telemetry.report import comparison_table, evaluation_table, reward_curve_text, save_reward_curve, smoothed

ESCAPE = "\x1b"
STEP = {
    "reward_mean": 0.25,
    "correct_rate": 0.2,
    "avg_completion_length": 101.4,
    "loss": -0.0123,
    "grad_norm": 0.8712,
    "logprob_gap": 0.00213,
    "tokens_per_s": 12345.6,
    "generation_s": 1.34,
    "train_s": 62.0,
    "sync_s": 0.15,
    "learning_rate": 1e-6,
}


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


# -- JSON lines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["\ud800 alone", "a\x00b\x1b\x07", "two\nlines\u2028and\r\nmore", "\x7f\x9b\u202e", 'quote " \\', "🐍"]
)
def test_odd_text_survives_a_round_trip_as_one_ascii_line(tmp_path: Path, text: str) -> None:
    with JsonlWriter(tmp_path / "a.jsonl") as writer:
        writer.write({"text": text})
    raw = (tmp_path / "a.jsonl").read_bytes()
    assert raw.isascii() and raw.count(b"\n") == 1 and len(raw.splitlines()) == 1
    assert read_jsonl(tmp_path / "a.jsonl") == [{"text": text}]


def test_nan_and_infinities_become_null_wherever_they_are() -> None:
    line = encode_line({"a": math.nan, "b": [1.5, math.inf], "c": {"d": (-math.inf,)}})
    assert line == b'{"a": null, "b": [1.5, null], "c": {"d": [null]}}\n'


def test_a_writer_keeps_the_order_and_appends_to_what_is_there(tmp_path: Path) -> None:
    for start in (0, 100):
        with JsonlWriter(tmp_path / "deep" / "a.jsonl", queue_length=3) as writer:
            for number in range(start, start + 100):
                writer.write({"n": number})
    assert [record["n"] for record in read_jsonl(tmp_path / "deep" / "a.jsonl")] == list(range(200))


def test_after_flush_the_lines_are_in_the_file(tmp_path: Path) -> None:
    with JsonlWriter(tmp_path / "a.jsonl") as writer:
        writer.write({"n": 1})
        writer.flush()
        assert (tmp_path / "a.jsonl").read_bytes() == b'{"n": 1}\n'


def test_a_full_disk_is_an_error_of_flush_in_one_line_with_the_path() -> None:
    writer = JsonlWriter("/dev/full")
    writer.write({"n": 1})
    with pytest.raises(OSError, match="cannot write /dev/full: No space left on device") as caught:
        writer.flush()
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        writer.write({"n": 2})
    with pytest.raises(OSError, match="No space left"):
        writer.close()


LIMITED_WRITER = """
import resource, signal, sys
from ludic.storage.jsonl import JsonlFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # no file of this process may grow beyond 100 bytes
file = JsonlFile(sys.argv[1])
file.append({"n": "x" * 40})
try:
    file.append({"n": "y" * 100})
except OSError as error:
    said = str(error)
file.append({"n": "z"})
file.close()
sys.stderr.write(said)
"""


def test_a_line_that_fits_only_in_part_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    # In a process of its own: the limit would meet this one's output as well.
    child = subprocess.run(
        [sys.executable, "-c", LIMITED_WRITER, str(path)], capture_output=True, text=True, check=True
    )
    assert f"cannot write {path}: File too large" in child.stderr
    assert read_jsonl(path) == [{"n": "x" * 40}, {"n": "z"}]


def test_what_json_cannot_hold_is_an_error_of_the_caller_and_not_a_hang(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "a.jsonl", queue_length=1)
    writer.write({"n": object()})
    with pytest.raises(TypeError, match="object is not JSON serializable"):
        for _ in range(5):
            writer.write({"n": 1})
            writer.flush()
    with pytest.raises(TypeError):
        writer.close()


def test_a_closed_writer_refuses_to_write(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "a.jsonl")
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="is closed"):
        writer.write({})


def test_a_torn_last_line_is_cut_off_when_the_file_is_opened_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": 2, "text": "' + b"long " * 40_000)
    with JsonlWriter(path) as writer:
        writer.write({"n": 3})
    assert read_jsonl(path) == [{"n": 1}, {"n": 3}]
    assert "cut off a torn last line of 200018 bytes" in caplog.text


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": 2}')
    with JsonlWriter(path) as writer:
        writer.write({"n": 3})
    assert [record["n"] for record in read_jsonl(path)] == [1, 2, 3]


def test_a_file_that_is_no_json_lines_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "thesis.txt"
    path.write_bytes(b"chapter one\nnot finished")
    with pytest.raises(ValueError, match=r"thesis\.txt is no JSON lines file"):
        JsonlWriter(path)
    assert path.read_bytes() == b"chapter one\nnot finished"


def test_reading_leaves_out_a_torn_last_line_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": "\xf0\x9f')
    assert read_jsonl(path) == [{"n": 1}]
    assert f"{path}:2: left out a torn last line of 9 bytes" in caplog.text


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (b'{"n": ', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[1]", "a JSON object was expected, not list"),
        (b"[" * 100_000, "not valid JSON: nested too deeply"),
        (b'{"n": ' + b"9" * 5_000 + b"}", "not valid JSON"),
        (b'{"n": "\xff"}', "not valid JSON: 'utf-8'"),
    ],
)
def test_a_bad_line_in_the_middle_is_named_with_file_line_and_reason(
    tmp_path: Path, middle: bytes, reason: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n' + middle + b'\n{"n": 3}\n')
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: {reason}")):
        read_jsonl(path)


def test_a_killed_writer_leaves_whole_lines_up_to_its_last_flush(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    program = (
        "import sys; from ludic.storage.jsonl import JsonlWriter\n"
        "writer = JsonlWriter(sys.argv[1])\n"
        "for number in range(50): writer.write({'n': number})\n"
        "writer.flush(); sys.stdout.write('flushed'); sys.stdout.flush()\n"
        "while True: writer.write({'n': 'x' * 10000})\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(7) == b"flushed"
        process.kill()
    with JsonlWriter(path) as writer:
        writer.write({"n": "last"})
    records = read_jsonl(path)
    assert [record["n"] for record in records[:50]] == list(range(50))
    assert records[-1] == {"n": "last"}


# -- loggers -------------------------------------------------------------------------------------------------------


def test_the_metrics_file_is_written_whatever_logger_is_chosen(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    logger = make_logger("none", metrics_path=path, run_name="r", config={}, total_steps=3)
    logger.log(1, {"loss": 0.5, "kl": math.nan})
    first = json.loads(path.read_bytes())  # before close: a kill must not lose it
    logger.event(1, "watch out")
    logger.close()
    logger.close()
    assert {key: first[key] for key in ("step", "loss", "kl")} == {"step": 1, "loss": 0.5, "kl": None}
    assert read_jsonl(path)[1]["event"] == "watch out"


def test_the_print_logger_writes_one_plain_line_a_step(tmp_path: Path) -> None:
    stream = io.StringIO()
    logger = make_logger("print", metrics_path=tmp_path / "m", run_name="r", config={}, total_steps=20, stream=stream)
    logger.log(3, STEP)
    logger.event(3, "97% truncated")
    logger.close()
    assert stream.getvalue() == (
        "step  3/20  reward 0.250  correct 20.0%  len 101  loss -0.0123  grad 0.8712  gap 0.0021  tok/s 12,346"
        "  gen 1.34s  train 1m02s  sync 0.15s\n"
        "step  3/20  97% truncated\n"
    )


def test_rich_without_a_terminal_is_plain_lines(tmp_path: Path) -> None:
    stream = io.StringIO()
    logger = make_logger("rich", metrics_path=tmp_path / "m", run_name="r", config={}, total_steps=20, stream=stream)
    logger.log(1, STEP)
    logger.close()
    assert stream.getvalue() == format_step_line(1, 20, STEP) + "\n"


def test_rich_on_a_terminal_shows_view_and_lines_and_gives_the_cursor_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    logger = make_logger("rich", metrics_path=tmp_path / "m", run_name="[x]", config={}, total_steps=20, stream=stream)
    logger.log(1, STEP)
    logger.log(2, STEP)
    logger.event(2, "a [bold] warning")
    logger.log(2, {"eval/accuracy": 0.5})
    logger.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "[x]" in shown and "a [bold] warning" in shown  # no text is taken for markup
    assert "2/20" in shown and "generation" in shown and "accuracy 50.0% at 2" in shown
    assert stream.getvalue().rindex(f"{ESCAPE}[?25h") > stream.getvalue().rindex(f"{ESCAPE}[?25l")


class FakeRun:
    id = "a1b2c3"

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.broken = False
        self.console: str | None = None

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.calls.append(("metric", name, step_metric))

    def log(self, metrics: dict[str, float]) -> None:
        if self.broken:
            raise ConnectionResetError("Connection\x1b[2J lost")
        self.calls.append(("log", metrics))

    def alert(self, title: str, text: str) -> None:
        if self.broken:
            raise LookupError("what nobody expects")
        self.calls.append(("alert", title, text))

    def finish(self) -> None:
        if self.broken:
            raise ConnectionResetError("Connection lost")
        self.calls.append(("finish",))


def fake_wandb(monkeypatch: pytest.MonkeyPatch, run: FakeRun | None) -> None:
    module = types.ModuleType("wandb")

    class Error(Exception):
        pass

    class Settings:
        model_fields = ("finish_timeout",)

        def __init__(self, finish_timeout: float, console: str | None = None) -> None:
            self.finish_timeout, self.console = finish_timeout, console

    def init(
        name: str, config: dict[str, object], id: str | None, resume: str | None, settings: Settings, **_: object
    ) -> FakeRun:
        if run is None:
            raise Error("No API key\n  configured.")
        run.calls.append(("init", name, config, id, resume, settings.finish_timeout))
        run.console = settings.console
        return run

    vars(module).update(Error=Error, Settings=Settings, init=init, __spec__=types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "wandb", module)


@pytest.mark.parametrize(("names", "term", "console"), [
    ("rich,wandb", "xterm-256color", "off"), ("rich,wandb", "dumb", None), ("print,wandb", "xterm-256color", None),
])  # fmt: skip
def test_wandb_takes_nothing_from_a_terminal_that_a_live_view_is_drawn_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str, term: str, console: str | None
) -> None:
    run = FakeRun()
    fake_wandb(monkeypatch, run)
    monkeypatch.setenv("TERM", term)
    stream = Terminal()
    logger = make_logger(names, metrics_path=tmp_path / "m", run_name="r", config={}, total_steps=2, stream=stream)
    logger.close()
    assert run.console == console and logger.is_live == (console == "off")


def test_wandb_gets_the_name_the_settings_the_metrics_of_their_updates_and_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRun()
    fake_wandb(monkeypatch, run)
    logger = make_logger("wandb,jsonl", metrics_path=tmp_path / "m", run_name="r", config={"lr": 1}, total_steps=None)
    assert logger.run_id == "a1b2c3"
    logger.log(4, {"loss": 0.5})
    logger.event(4, "alarm\x1b[2J\r\n\u202eend")
    logger.close()
    assert run.calls == [
        ("init", "r", {"lr": 1}, None, None, 60.0),
        ("metric", "update", None),
        ("metric", "*", "update"),
        ("log", {"loss": 0.5, "update": 4, "started_from": 0}),
        ("alert", "step 4", r"alarm\x1b[2J\r\n\u202eend"),
        ("finish",),
    ]


def test_a_resumed_run_goes_on_with_its_wandb_run_and_marks_what_it_makes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRun()
    fake_wandb(monkeypatch, run)
    logger = make_logger("wandb", metrics_path=tmp_path / "m", run_name="r", config={}, total_steps=9,
                         run_id="a1b2c3", started_from=2)  # fmt: skip
    logger.log(3, {"loss": 0.5})
    logger.close()
    assert run.calls[0] == ("init", "r", {}, "a1b2c3", "allow", 60.0)
    assert run.calls[3] == ("log", {"loss": 0.5, "update": 3, "started_from": 2})


# -- a logger that fails -------------------------------------------------------------------------------------------


def test_wandb_that_fails_in_mid_run_is_switched_off_with_one_event_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, stream = FakeRun(), io.StringIO()
    fake_wandb(monkeypatch, run)
    path = tmp_path / "m.jsonl"
    logger = make_logger("wandb,print", metrics_path=path, run_name="r", config={}, total_steps=None, stream=stream)
    logger.log(1, {"loss": 0.5})
    run.broken = True
    for step in (2, 3):
        logger.log(step, {"loss": 0.5})
    logger.close()
    said = (
        r"the log at W&B failed (ConnectionResetError: Connection\x1b[2J lost); it is switched off, and the run goes on"
    )
    records = read_jsonl(path)
    assert [record.get("event") for record in records] == [None, None, said, None]
    assert [record["step"] for record in records] == [1, 2, 2, 3]
    assert stream.getvalue().splitlines() == [
        "step 1  loss 0.5000", f"step 2  {said}", "step 2  loss 0.5000", "step 3  loss 0.5000",
    ]  # fmt: skip


def test_wandb_that_fails_only_at_the_end_or_at_an_alert_costs_nothing_but_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, method in enumerate(("close", "event")):
        run = FakeRun()
        fake_wandb(monkeypatch, run)
        path = tmp_path / f"{number}.jsonl"
        logger = make_logger("wandb", metrics_path=path, run_name="r", config={}, total_steps=None)
        logger.log(7, {"loss": 0.5})
        run.broken = True
        if method == "event":
            logger.event(7, "an alarm")
        logger.close()
        events = [record["event"] for record in read_jsonl(path) if "event" in record]
        assert [event for event in events if "W&B failed" in str(event)] == events[-1:]


class Gone(Terminal):
    """A terminal that was closed: what is written to it fails from some moment on."""

    gone = False

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError(errno.EIO, "Input/output error")
        return super().write(text)

    def flush(self) -> None:
        if self.gone:
            raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("name", ["rich", "print"])
def test_a_terminal_that_is_closed_stops_no_run(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream, path = Gone(), tmp_path / "m.jsonl"
    logger = make_logger(name, metrics_path=path, run_name="r", config={}, total_steps=9, stream=stream)
    logger.log(1, STEP)
    stream.gone = True
    for step in (2, 3):
        logger.log(step, STEP)
        logger.event(step, "checkpoint written")
    logger.close()
    events = [str(record["event"]) for record in read_jsonl(path) if "event" in record]
    what = "the live view" if name == "rich" else "the log on standard output"
    assert (
        events[0] == f"{what} failed (OSError: [Errno 5] Input/output error); it is switched off, and the run goes on"
    )
    assert events[1:] == ["checkpoint written"] * 2
    assert [record["step"] for record in read_jsonl(path) if "loss" in record] == [1, 2, 3]
    assert (
        sys.stdout.write("") == 0 and capfd.readouterr().err == ""
    )  # rich gave the streams back, no thread complained


def test_loggers_that_fail_at_the_same_update_are_switched_off_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, stream, path = FakeRun(), Gone(), tmp_path / "m.jsonl"
    fake_wandb(monkeypatch, run)
    logger = make_logger("wandb,print", metrics_path=path, run_name="r", config={}, total_steps=9, stream=stream)
    run.broken = stream.gone = True
    logger.log(1, STEP)
    logger.log(2, STEP)
    logger.close()
    records = read_jsonl(path)
    assert [record["step"] for record in records if "loss" in record] == [1, 2]
    said = [str(record["event"]).partition(" failed ")[0] for record in records if "event" in record]
    assert said == ["the log at W&B", "the log on standard output"]


def test_a_pipe_whose_reader_is_gone_and_a_closed_stream_stop_no_run(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w")
    path = tmp_path / "m.jsonl"
    logger = make_logger("rich", metrics_path=path, run_name="r", config={}, total_steps=9, stream=stream)
    logger.log(1, STEP)
    logger.close()
    assert "BrokenPipeError" in str(read_jsonl(path)[1]["event"])
    with contextlib.suppress(BrokenPipeError):
        stream.close()
    logger = make_logger("print", metrics_path=path, run_name="r", config={}, total_steps=9, stream=stream)
    logger.log(2, STEP)
    logger.close()
    assert "closed file" in str(read_jsonl(path)[3]["event"])


KEEPS_ITS_STREAMS = """
import sys
from ludic.survival.signals import keep_standard_streams
from ludic.telemetry.loggers import make_logger
keep_standard_streams()
logger = make_logger(sys.argv[1], metrics_path=sys.argv[2], run_name="r", config={}, total_steps=9)
for step in (1, 2):
    logger.log(step, {"loss": 0.5})
    logger.event(step, "checkpoint written")
logger.close()
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("output", "reason"),
    [("/dev/full", "OSError: [Errno 28] No space left on device"), ("pipe", "BrokenPipeError: [Errno 32] Broken pipe")],
)
@pytest.mark.parametrize("name", ["rich", "print"])
def test_a_script_whose_output_fails_switches_it_off_with_an_event(
    tmp_path: Path, name: str, output: str, reason: str, unbuffered: str
) -> None:
    path = tmp_path / "m.jsonl"
    if output == "pipe":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open(output, os.O_WRONLY)
    command = [sys.executable, "-c", KEEPS_ITS_STREAMS, name, str(path)]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, env=environment)
    os.close(writing)
    assert done.returncode == 0 and done.stderr == ""
    failed = f"the log on standard output failed ({reason}); it is switched off, and the run goes on"
    events = [record["event"] for record in read_jsonl(path) if "event" in record]
    assert events == [failed, "checkpoint written", "checkpoint written"]
    assert [record["step"] for record in read_jsonl(path) if "loss" in record] == [1, 2]


def test_an_ascii_locale_shows_escapes_and_fails_nothing(tmp_path: Path) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    logger = make_logger("print", metrics_path=tmp_path / "m", run_name="r", config={}, total_steps=9, stream=stream)
    logger.event(1, "größer 🐍 \ud800")
    logger.close()
    assert raw.getvalue() == b"step 1/9  gr\\xf6\\xdfer \\U0001f40d \\ud800\n"
    assert len(read_jsonl(tmp_path / "m")) == 1


def test_the_metrics_file_is_the_record_and_what_it_raises_ends_the_run(tmp_path: Path) -> None:
    path = tmp_path / "out" / "m.jsonl"
    logger = make_logger("none", metrics_path=path, run_name="r", config={}, total_steps=9)
    logger.log(1, STEP)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(OSError, match=f"cannot write {re.escape(str(path))}: it was removed while the run wrote to it"):
        logger.log(2, STEP)
    logger.close()


# -- what others wrote is inert --------------------------------------------------------------------------------------

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\nstep 99/99  reward 1.000\u202egnp.exe\x08\x7f\u2028\ud800[red]x[/red][link=http://x]y[/link]"
ACTING = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.mark.parametrize("name", ["rich", "print"])
def test_hostile_text_is_inert_on_the_console_and_in_the_file(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    path = tmp_path / "m.jsonl"
    for stream in (io.StringIO(), Terminal()):
        logger = make_logger(name, metrics_path=path, run_name=HOSTILE, config={}, total_steps=9, stream=stream)
        logger.event(1, HOSTILE)
        logger.log(1, {HOSTILE: 1.0, "loss": 0.5, "eval/" + HOSTILE: 2.0})
        logger.close()
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", stream.getvalue())  # rich's own, on a terminal
        assert not ACTING.search(shown)
        assert "\nstep 99/99" not in shown and "[red]x[/red][link=http://x]" in shown.replace("\n", "")
        assert "]0;owned" in shown and "\x1b[2J" not in stream.getvalue() and "\x1b[31m" not in stream.getvalue()
    raw = path.read_bytes()
    assert not re.search(rb"[^\n\x20-\x7e]", raw) and raw.count(b"\n") == 4
    assert read_jsonl(path)[0]["event"] == HOSTILE  # nothing is lost


def test_wandb_that_does_not_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_wandb(monkeypatch, None)
    with pytest.raises(ValueError, match=r"^--logger wandb: No API key configured\.; WANDB_MODE=offline .*$"):
        make_logger("wandb", metrics_path=tmp_path / "m", run_name="r", config={}, total_steps=None)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("csv", "'csv' is not known: choose among rich, print, jsonl, tensorboard, wandb, none"),
        ("none,print", "none goes alone"),
        ("rich,print", "choose rich or print"),
        (" , ", "--logger is empty"),
    ],
)
def test_bad_logger_names_are_refused_with_the_way_out(names: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse_logger_names(names)


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_logger_whose_package_is_not_installed_is_refused_with_the_command(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"^--logger {name} needs the package {name}: .*`uv sync --extra examples`$"):
        parse_logger_names(f"print,{name}")


# -- formatting and reports ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("eval/strict_accuracy", 0.4961, "49.6%"),
        ("learning_rate", 1e-6, "1e-06"),
        ("clip_fraction", 0.001, "0.1%"),
        ("step_s", 3725.0, "1h02m"),
        ("tokens_per_s", 12345.6, "12,346"),
        ("reward_mean", math.nan, "nan"),
        ("train_s", math.inf, "inf"),
        ("correct_rate", math.nan, "nan"),
    ],
)
def test_a_metric_is_shown_in_the_unit_of_its_name(name: str, value: float, text: str) -> None:
    assert format_metric(name, value) == text


def test_smoothing_starts_at_the_first_value_and_weighs_later_ones_more() -> None:
    assert smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smoothed([0.0, 1.0])[1] == pytest.approx(0.15 / (1 - 0.85**2))


def test_the_terminal_curve_has_the_size_asked_for_no_colours_and_rises_with_the_reward() -> None:
    steps = list(range(1, 41))
    picture = reward_curve_text(steps, [step / 40 for step in steps], width=70, height=14)
    lines = picture.splitlines()
    assert ESCAPE not in picture
    assert len(lines) == 14 and max(map(len, lines)) <= 70
    first_column_of_dots = [line.find("•") for line in lines if "•" in line]
    assert first_column_of_dots == sorted(first_column_of_dots, reverse=True) and len(first_column_of_dots) > 5
    assert lines[-1].split()[0] == "1" and lines[-1].split()[-1] == "40"


@pytest.mark.parametrize("rewards", [[0.5], [0.5, 0.5], [math.nan, 1.0], [0.0, 0.0, 0.0]])
def test_short_flat_and_broken_curves_are_drawn_too(tmp_path: Path, rewards: list[float]) -> None:
    steps = list(range(len(rewards)))
    assert "┤" in reward_curve_text(steps, rewards)
    save_reward_curve(tmp_path / "c.png", steps, rewards)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_finite_reward_there_is_a_sentence_in_place_of_a_curve() -> None:
    assert reward_curve_text([1], [math.nan]) == "no finite reward was logged, so there is no curve to draw"


def test_the_png_shows_evaluations_and_leaves_pyplot_alone(tmp_path: Path) -> None:
    save_reward_curve(tmp_path / "plain.png", [1, 2, 3], [0.1, 0.2, 0.3])
    save_reward_curve(tmp_path / "deep" / "c.png", [1, 2, 3], [0.1, 0.2, 0.3], evaluations=[(0, 0.1), (3, 1.0)])
    assert (tmp_path / "deep" / "c.png").read_bytes() != (tmp_path / "plain.png").read_bytes()
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    ("rewards", "scales"),
    [([0.0, 0.5, 1.0], ["mean reward, accuracy"]), ([-0.5, 0.5, 1.5], ["mean reward", "accuracy"])],
)
def test_rewards_that_are_fractions_share_one_scale_with_the_accuracies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rewards: list[float], scales: list[str]
) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig

    def keep_and_save(figure: Figure, *args: Any, **kwargs: Any) -> None:
        drawn.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep_and_save)
    save_reward_curve(tmp_path / "c.png", [1, 2, 3], rewards, evaluations=[(0, 0.1), (3, 1.0)])
    axes = drawn[0].axes
    assert [one.get_ylabel() for one in axes] == scales
    low, high = axes[-1].get_ylim()
    assert low <= 0 and high >= 1


def test_a_status_stands_in_one_line_of_a_terminal_with_its_words_from_the_front() -> None:
    said: list[str] = []
    stream = Terminal()
    with StatusLine(said.append, stream=stream) as status:
        for seconds in range(3):
            status.show(f"server loading, {seconds} s: " + "Loading the weights of a model " * 20)
    lines = stream.getvalue().replace("\x1b[?25l", "").split("\n")
    assert not said and "server loading, 2 s: Loading the weights" in lines[0]
    assert all(len(re.sub("\x1b[^mKAlh]*[mKAlh]", "", piece)) <= 80 for line in lines for piece in line.split("\r"))
    assert not any("server loading" in line for line in lines[1:])


def test_where_there_is_no_terminal_a_status_is_a_plain_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    said: list[str] = []
    with StatusLine(said.append, stream=io.StringIO()) as status:
        for second in range(31):
            now = float(second)
            status.show(f"{second} s")
    assert said == ["10 s", "20 s", "30 s"]


ANSWER = {"num_tokens": 3, "finish_reason": "stop", "parse_error": None, "correct": True, "grader_failed": False}


def test_the_comparison_shows_two_recorded_evaluations_under_their_headings_and_changes_of_rates_in_points() -> None:
    before = {"accuracy": 0.25, "accuracy_ci95": [0.2, 0.3], "strict_accuracy": 0.2, "parse_err_rate": 0.5}
    before |= {"truncation_rate": 0.1, "avg_completion_length": 12.0}
    after = {**before, "accuracy": 0.5, "avg_completion_length": 10.5}
    stream = io.StringIO()
    Console(file=stream, width=80).print(comparison_table(before, after, headings=("update 50", "after")))
    heading, _, *rows = (" ".join(line.split()) for line in stream.getvalue().splitlines()[1:])
    assert heading == "update 50 after change"
    assert rows[:5] == [
        "accuracy 25.0% (20.0 to 30.0) 50.0% (20.0 to 30.0) +25.0 points",
        "strict accuracy 20.0% 20.0% +0.0 points",
        "no answer 50.0% 50.0% +0.0 points",
        "truncated 10.0% 10.0% +0.0 points",
        "tokens each 12 10.5 -1.5",
    ]


def test_the_name_of_a_rule_is_shown_as_it_is_and_not_read_as_markup() -> None:
    record = {"index": 0, "prompt_tokens": 5, "completions": [{"exact": True, "near [red]": True, **ANSWER}]}
    result = summarise([cast("ProblemRecord", record)], rules=("exact", "near [red]"), seconds=1.0)
    summary = result.to_summary(model="", settings={})
    stream = io.StringIO()
    console = Console(file=stream, width=100)
    console.print(evaluation_table(result), comparison_table(summary, summary))
    assert "accuracy, near [red] " in stream.getvalue() and "near [red] accuracy " in stream.getvalue()


def test_an_unwritable_png_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        save_reward_curve(tmp_path / "file" / "c.png", [1], [1.0])


def test_the_display_writes_about_ten_plain_lines_to_a_pipe_and_a_bar_to_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ludic.rollout.evaluation import EvaluationProgress

    monkeypatch.setenv("TERM", "xterm-256color")
    for stream in (io.StringIO(), Terminal()):
        with EvaluationDisplay("GSM8K [test]", stream=stream) as display:
            for done in range(101):
                display(
                    EvaluationProgress(
                        num_done=done, num_problems=100, accuracy=0.5, completion_tokens=10 * done, seconds=done / 10
                    )
                )
        text = stream.getvalue()
        if isinstance(stream, Terminal):
            assert "100/100" in text and "GSM8K [test]" in text and ESCAPE in text
        else:
            assert ESCAPE not in text and len(text.splitlines()) == 10
            assert text.splitlines()[-1] == "GSM8K [test]  100/100  accuracy 50.0%  100 tok/s  10.0s"


def test_nothing_of_telemetry_writes_through_print() -> None:
    folder = Path(__file__).parents[1] / "src" / "ludic" / "telemetry"
    sources = sorted(folder.glob("*.py"))
    assert sources
    examples = re.compile(r"^ *(>>>|\.\.\.) .*$", re.MULTILINE)
    code = {path.name: examples.sub("", path.read_text()) for path in sources}
    assert [name for name in code if re.search(r"(?<![\w.])print\(", code[name])] == []


def test_a_metrics_file_that_cannot_be_opened_is_one_line_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "m.jsonl"
    with pytest.raises(OSError, match=re.escape(f"cannot open {path}: ")):
        make_logger("none", metrics_path=path, run_name="r", config={}, total_steps=None)


def test_two_appenders_of_one_file_do_not_tear_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with JsonlWriter(path) as one, JsonlWriter(path) as other:
        for number in range(200):
            one.write({"n": number, "text": "a" * 500})
            other.write({"n": number, "text": "b" * 500})
    records = read_jsonl(path)
    for letter in "ab":
        assert [record["n"] for record in records if str(record["text"])[0] == letter] == list(range(200))


def test_a_torn_line_that_is_nested_too_deeply_is_cut_off_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": ' + b"[" * 100_000)
    with JsonlWriter(path) as writer:
        writer.write({"n": 2})
    assert read_jsonl(path) == [{"n": 1}, {"n": 2}]


def test_a_file_that_is_removed_under_a_writer_is_an_error_and_not_a_silent_loss(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    writer = JsonlWriter(path)
    writer.write({"n": 1})
    writer.flush()
    path.unlink()
    path.write_text("another file of that name")
    with pytest.raises(OSError, match="was removed while the run wrote to it"):
        writer.write({"n": 2})
        writer.flush()
    with pytest.raises(OSError, match="was removed"):
        writer.close()
    assert path.read_text() == "another file of that name"


def test_dropping_steps_on_a_full_disk_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"cannot replace {re.escape(str(path))}: No space left on device"):
        drop_steps_after(path, 1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["m.jsonl"]


def test_steps_after_a_checkpoint_are_dropped_and_the_others_keep_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2}\n{"event": "note"}\n{"step": 3}\n{"step": 3, "to')
    assert drop_steps_after(path, 2) == 1
    assert read_jsonl(path) == [{"step": 1, "loss": 0.5}, {"step": 2}, {"event": "note"}]
    assert drop_steps_after(tmp_path / "missing.jsonl", 0) == 0
