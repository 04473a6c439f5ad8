"""TensorBoard and the real W&B, offline: what a run leaves there is read back as these tools read it."""

import argparse
import contextlib
import html.parser
import json
import os
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ludic.run.artifacts import check_artifacts
from ludic.storage.jsonl import JsonlWriter, encode_line, read_jsonl
from ludic.telemetry.loggers import make_logger
from ludic.telemetry.metric_names import METRICS
from ludic.telemetry.sampled_rollouts import EVERY, NUM_ROLLOUTS, TEXT_LIMIT, SampledRollouts
from tests.test_telemetry import ACTING

HOSTILE = (
    "<script>alert(1)</script>\n\n</pre><img src=http://x/y>\n```\n~~~\n# head\n[a](javascript:alert(1)) ![i](http://t/b.png)\n"
    "<!--\n<?php\n&lt;b&gt;\x00\r\n\n[x]: http://evil\n| a | b |\n|---|---|\n    deep\n\x0b<a href='http://x'>y</a>\u2028\x1b[2J"
)


def rollout(step: int, member: int, **fields: Any) -> dict[str, Any]:
    """One line of a rollouts file."""
    record = {
        "step": step, "group": step, "rollout": member, "prompt": f"Q{step}", "completion": f"A{member}",
        "completion_token_ids": [1, 2], "answer": "7", "parse_error": None, "target": "7", "reward": 1.0,
        "reward_parts": {}, "correct": True, "finish_reason": "stop", "policy_version": step - 1, "prompt_tokens": 3,
        "completion_tokens": 2,
    }  # fmt: skip
    return record | fields


def write_rollouts(path: Path, steps: range, count: int = 3, **fields: Any) -> None:
    with JsonlWriter(path) as writer:
        for step in steps:
            for member in range(count):
                writer.write(rollout(step, member, **fields))


# -- sampled rollouts ------------------------------------------------------------------------------------------------


def test_rollouts_of_the_first_every_tenth_and_the_last_update_are_handed_out_once(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    sampled = SampledRollouts(path, total_steps=25)
    assert sampled.before(1) == {}  # there is no file yet
    found = []
    for step in range(1, 26):
        write_rollouts(path, range(step, step + 1), count=20)
        found += [(step, at, len(rows)) for at, rows in sampled.before(step).items()]
    assert found == [(2, 1, NUM_ROLLOUTS), (EVERY + 2, EVERY + 1, NUM_ROLLOUTS), (22, 21, NUM_ROLLOUTS)]
    assert list(sampled.before()) == [25] and sampled.before() == {}


def test_rollouts_of_an_earlier_process_and_a_torn_line_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write_rollouts(path, range(1, 2))
    path.write_bytes(path.read_bytes() + b'{"step": 2, "to')
    sampled = SampledRollouts(path, total_steps=2)
    write_rollouts(path, range(2, 3))  # cuts the torn line off, as a resumed run does
    path.write_bytes(path.read_bytes() + encode_line(rollout(2, 3))[:-1])
    assert [(at, len(rows)) for at, rows in sampled.before().items()] == [(2, 3)]


def test_the_same_rollouts_are_sampled_each_time_and_from_the_whole_update(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write_rollouts(path, range(0))
    one, other = SampledRollouts(path), SampledRollouts(path)
    write_rollouts(path, range(1, 2), count=100)
    members = [row["rollout"] for row in one.before()[1]]
    assert members == [row["rollout"] for row in other.before()[1]] == sorted(set(members))
    assert max(members) > 50


def test_a_long_or_hostile_text_is_cut_and_inert(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    sampled = SampledRollouts(path)
    write_rollouts(path, range(1, 2), count=1, prompt="\x1b" * 3 * TEXT_LIMIT, completion=HOSTILE, answer=None)
    (row,) = sampled.before()[1]
    assert row["prompt"] == r"\x1b" * TEXT_LIMIT + " ..." and row["answer"] == ""
    assert not ACTING.search(row["completion"]) and "</pre><img src=http://x/y>" in row["completion"]


def test_a_file_that_is_no_rollouts_file_is_named(tmp_path: Path) -> None:
    sampled = SampledRollouts(tmp_path / "r.jsonl")
    (tmp_path / "r.jsonl").write_text('{"prompt": 1}\n')
    with pytest.raises(ValueError, match=r"r\.jsonl: a line begins with b'\{\"prompt\": 1"):
        sampled.before()


# -- TensorBoard -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def logging_to(tmp_path: Path, *, started_from: int = 0, steps: range = range(1, 1), **fields: Any) -> Iterator[Any]:
    """A logger at TensorBoard, which has logged the updates of `steps` as the training loop does."""
    pytest.importorskip("tensorboard")
    rollouts = tmp_path / "rollouts.jsonl"
    logger = make_logger(
        "tensorboard", metrics_path=tmp_path / "m.jsonl", run_name="r", config={"lr": 1e-6, "prompt": HOSTILE},
        total_steps=4, started_from=started_from, rollouts_path=rollouts, tensorboard_dir=tmp_path / "tb",
    )  # fmt: skip
    with contextlib.closing(logger):
        for step in steps:
            write_rollouts(rollouts, range(step, step + 1), **fields)
            logger.log(step, {"loss": step + started_from / 10, "reward_mean": 0.5})
        yield logger


def read_tensorboard(tmp_path: Path) -> Any:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = events.EventAccumulator(str(tmp_path / "tb"), size_guidance={"tensors": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def texts(accumulator: Any, name: str) -> list[tuple[int, str]]:
    events = accumulator.Tensors(f"{name}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events]


def test_tensorboard_has_metrics_evaluations_events_settings_and_rollouts_at_their_updates(tmp_path: Path) -> None:
    with logging_to(tmp_path, steps=range(1, 5)) as logger:
        logger.log(4, {"eval/accuracy": 0.5})
        logger.event(3, "update 3 was skipped")
        logger.event(4, "alarm entropy: it fell")
        logger.event(4, "alarm clipping: each time")
    read = read_tensorboard(tmp_path)
    assert set(read.Tags()["scalars"]) == {"loss", "reward_mean", "eval/accuracy"}
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert [(event.step, event.value) for event in read.Scalars("eval/accuracy")] == [(4, 0.5)]
    both = "<pre>alarm entropy: it fell</pre>\n\n<pre>alarm clipping: each time</pre>"
    assert dict(texts(read, "events")) == {3: "<pre>update 3 was skipped</pre>", 4: both}  # of a step the last is shown
    ((step, settings),) = texts(read, "settings")
    assert step == 0 and settings.startswith("<pre>lr: 1e-06\n")
    ((_, metrics),) = texts(read, "metrics")
    assert all(f"| `{metric.name}` | {metric.unit} |" in metrics for group in METRICS.values() for metric in group)
    shown = texts(read, "rollouts")
    assert [step for step, _ in shown] == [1, 4]
    assert shown[1][1].count("<pre>") == 3 and "prompt: Q4\ncompletion: A2\nanswer: 7\n" in shown[1][1]
    plugins = read.SummaryMetadata("_hparams_/session_start_info").plugin_data
    assert plugins.plugin_name == "hparams" and b"lr" in plugins.content


def test_a_resumed_run_goes_on_in_the_folder_and_shows_no_update_twice(tmp_path: Path) -> None:
    with logging_to(tmp_path, steps=range(1, 4)) as logger:
        logger.log(3, {"eval/accuracy": 0.25})
    with logging_to(tmp_path, started_from=2, steps=range(3, 5)):
        pass
    read = read_tensorboard(tmp_path)
    assert [(event.step, round(event.value, 3)) for event in read.Scalars("loss")] == [
        (1, 1),
        (2, 2),
        (3, 3.2),
        (4, 4.2),
    ]
    assert read.Scalars("eval/accuracy") == []
    assert len(list((tmp_path / "tb").iterdir())) == 2
    assert [step for step, _ in texts(read, "settings")] == [0, 2]


class Tags(html.parser.HTMLParser):
    """The tags of a page and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        assert attrs == []

    def handle_data(self, data: str) -> None:
        self.text += data


def test_tensorboard_shows_a_hostile_completion_setting_or_event_as_the_text_that_it_is(tmp_path: Path) -> None:
    with logging_to(tmp_path, steps=range(1, 2), prompt=HOSTILE, completion=HOSTILE, target=HOSTILE) as logger:
        logger.event(1, HOSTILE)
    read = read_tensorboard(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a library within TensorBoard's own copy of bleach deprecates itself
        plugin = pytest.importorskip("tensorboard.plugins.text.text_plugin")
        tensors = pytest.importorskip("tensorboard.util.tensor_util")
    for name in ("rollouts", "events", "settings"):
        for event in read.Tensors(f"{name}/text_summary"):
            page = Tags(plugin.text_array_to_html(tensors.make_ndarray(event.tensor_proto), True))
            assert page.names <= {"table", "tbody", "tr", "td", "pre"}
            assert "</pre><img src=http://x/y>" in page.text and not ACTING.search(page.text)
            assert "\n```\n~~~\n# head\n" in page.text.replace(r"\n", "\n")
            assert "[a](javascript:alert(1)) ![i](http://t/b.png)" in page.text and "&lt;b&gt;" in page.text


def test_tensorboard_that_cannot_be_written_is_an_error_with_its_folder(tmp_path: Path) -> None:
    (tmp_path / "tb").touch()
    with pytest.raises(OSError, match="tb"), logging_to(tmp_path):
        pytest.fail("the folder is a file")


def test_a_tensorboard_log_that_fails_is_switched_off_and_the_run_goes_on(tmp_path: Path) -> None:
    with logging_to(tmp_path) as logger:
        (tmp_path / "rollouts.jsonl").mkdir()
        for step in (1, 2):
            logger.log(step, {"loss": 1.0})
    events = [record.get("event") for record in read_jsonl(tmp_path / "m.jsonl")]
    assert events[0] is None and "the log at TensorBoard failed (IsADirectoryError" in str(events[1])
    assert events[2:] == [None]


# -- W&B, offline ----------------------------------------------------------------------------------------------------


WANDB_RUN = """
import sys
from ludic.storage.jsonl import JsonlWriter
from ludic.telemetry.loggers import make_logger
from tests.test_loggers import HOSTILE, write_rollouts
for started_from, updates in ((0, (1, 2, 3)), (1, (2, 3, 4))):
    logger = make_logger("wandb", metrics_path="m.jsonl", run_name="r", config={"lr": started_from}, total_steps=4,
                         run_id=None if not started_from else run_id, started_from=started_from, rollouts_path="r.jsonl")
    run_id = logger.run_id
    for update in updates:
        write_rollouts("r.jsonl", range(update, update + 1), completion=HOSTILE)
        logger.log(update, {"loss": update / 2})
        logger.log(update, {"eval/accuracy": 0.5})
    logger.event(update, "\x1b[31mred [red]")
    logger.close()
"""


def run_offline(folder: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    """Python with W&B offline, all whose files are in `folder`."""
    folders = dict.fromkeys(("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"), str(folder))
    quiet = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off", **folders}
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(root / "src"), str(root)])
    environment = {**os.environ, **quiet, "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


def wandb_records(path: Path) -> list[Any]:
    """All that was logged offline, as W&B will read it: a log of blocks of 32 KiB, as LevelDB has it."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, records, begun = path.read_bytes(), 7, [], b""
    while place + 7 <= len(data):
        if (left := -place % 32_768) and left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        begun += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(Record())
            records[-1].ParseFromString(begun)
            begun = b""
    return records


def wandb_rows(records: list[Any]) -> list[dict[str, Any]]:
    """The history: what was logged, a dict for each call."""
    rows = []
    for record in records:
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        rows += [{key: value for key, value in items.items() if not key.startswith("_")}] if items else []
    return rows


@pytest.fixture(scope="module")
def wandb_pieces(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, list[Any]]]:
    """A run of three updates, and one that resumed it after the first: the folder of each process and its records."""
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("wandb")
    run_offline(folder, "-c", WANDB_RUN)
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len({path.name for path in files}) == 1 and len(files) == 2  # two pieces of one run
    assert {record.get("event") for record in read_jsonl(folder / "m.jsonl")} == {None, "\x1b[31mred [red]"}
    return [(path.parent, wandb_records(path)) for path in files]


@pytest.mark.slow
def test_the_real_wandb_keeps_every_update_of_a_run_that_was_resumed_from_an_earlier_one(
    wandb_pieces: list[tuple[Path, list[Any]]],
) -> None:
    for (_, records), started_from in zip(wandb_pieces, (0, 1), strict=True):
        rows = [row for row in wandb_rows(records) if not any(name.startswith("rollouts") for name in row)]
        updates = range(started_from + 1, started_from + 4)
        assert [(row["update"], row["started_from"], row.get("loss")) for row in rows] == [
            (u, started_from, loss) for u in updates for loss in (u / 2, None)
        ]


@pytest.mark.slow
def test_the_real_wandb_has_the_settings_the_axis_and_the_alerts(wandb_pieces: list[tuple[Path, list[Any]]]) -> None:
    for (_, records), rate in zip(wandb_pieces, (0, 1), strict=True):
        (run,) = [record.run for record in records if record.HasField("run")]
        settings = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert settings["lr"] == rate and run.display_name == "r"
        metrics = [record.metric for record in records if record.HasField("metric")]
        axes = {metric.name or metric.glob_name: metric.step_metric for metric in metrics}
        assert axes == {"update": "", "*": "update"}
        (alert,) = [record.alert for record in records if record.HasField("alert")]
        assert (alert.title, alert.text) == (f"step {3 + rate}", r"\x1b[31mred [red]")


@pytest.mark.slow
def test_the_real_wandb_has_a_table_of_sampled_rollouts_at_their_update(
    wandb_pieces: list[tuple[Path, list[Any]]],
) -> None:
    found = []
    for folder, records in wandb_pieces:
        for row in wandb_rows(records):
            if "rollouts/path" in row:
                table = json.loads((folder / "files" / row["rollouts/path"]).read_text())
                found.append((row["update"], row["started_from"], len(table["data"])))
                first = dict(zip(table["columns"], table["data"][0], strict=True))
                assert first["update"] == row["update"] and first["prompt"] == f"Q{row['update']}"
                assert (first["answer"], first["target"], first["reward"], first["correct"]) == ("7", "7", 1.0, True)
                assert not ACTING.search(first["completion"]) and "<img src=http://x/y>" in first["completion"]
    assert found == [(1, 0, 3), (4, 1, 3)]


@pytest.mark.slow
def test_wandb_artifacts_are_the_finished_report_page_and_the_model_of_the_last_checkpoint(
    digit_policy_dir: Path, digit_problems: Path, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    words = [
        str(Path(__file__).parents[1] / "examples/gsm8k/train_gsm8k.py"),
        *("--model", str(digit_policy_dir), "--dataset", str(digit_problems), "--out-dir", str(tmp_path / "run")),
        *("--engine", "local", "--rollouts-per-update", "8", "--group-size", "8", "--max-seq-len", "160"),
        *("--micro-token-budget", "640", "--max-tokens", "12", "--train-steps", "2", "--eval-limit", "2"),
        *("--logger", "print,tensorboard,wandb", "--wandb-artifacts"),
    ]
    done = run_offline(tmp_path, *words)
    checkpoint = tmp_path / "run/checkpoints_gsm8k/step_2"
    assert f"\nsent to W&B: 1 report page, 6 files of {checkpoint}\n" in done.stdout, done.stdout
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len({path.name for path in files}) == 1 and len(files) == 2
    artifacts = [record.artifact for record in wandb_records(files[1]) if record.HasField("artifact")]
    sent = {artifact.type: {entry.path: entry for entry in artifact.manifest.contents} for artifact in artifacts}
    assert {artifact.name for artifact in artifacts} == {f"{kind}-{artifacts[0].run_id}" for kind in sent}
    assert sent["report"].keys() == {"gsm8k_train_report.html"}
    files_of_model = {path.name for path in checkpoint.iterdir() if path.is_file()} - {"manifest.json"}
    assert sent["model"].keys() == files_of_model >= {"config.json", "model.safetensors", "tokenizer_config.json"}
    assert sent["model"]["model.safetensors"].local_path == str(checkpoint / "model.safetensors")  # no second copy
    assert "update-2" in artifacts[0].aliases
    assert len(list((tmp_path / "run/gsm8k_tensorboard").iterdir())) == 1
    rollouts = [row for path in files for row in wandb_rows(wandb_records(path)) if "rollouts/path" in row]
    assert [row["update"] for row in rollouts] == [1, 2]


def test_wandb_artifacts_without_wandb_are_refused_in_one_line() -> None:
    args = argparse.Namespace(wandb_artifacts=True, logger="print")
    with pytest.raises(ValueError, match="--wandb-artifacts needs W&B, and --logger is print: add wandb to it"):
        check_artifacts(args, ("print",))
    check_artifacts(args, ("print", "wandb"))
