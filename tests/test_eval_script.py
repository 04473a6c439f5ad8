"""`eval_gsm8k_vllm.py` on a tiny random model with the local engine: its files, its exit codes, and resuming."""

import argparse
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from ludic.cli import run_script
from ludic.evaluation import read_records
from tests.vllm_helpers import make_tiny_model, make_tiny_tokenizer

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
SCRIPT = Path(__file__).parents[1] / "examples" / "gsm8k" / "eval_gsm8k_vllm.py"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPT.parent))  # as Python does for a script
    spec = importlib.util.spec_from_file_location("eval_gsm8k_vllm", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "model"
    make_tiny_model(folder, tie_word_embeddings=True)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    rows = [{"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(400)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(model: Path, dataset: Path, out_dir: Path, *more: str) -> list[str]:
    start = ["--model", str(model), "--dataset", str(dataset), "--out-dir", str(out_dir), "--engine", "local"]
    return [*start, "--max-tokens", "8", *more]


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def as_printed(text: str) -> list[str]:
    """The command that a program has printed on a line of its own, with this Python in the place of uv's."""
    (line,) = (line for line in text.splitlines() if line.strip().startswith("uv run python "))
    return [sys.executable, *shlex.split(line)[3:]]


def run_as_printed(text: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(as_printed(text), capture_output=True, text=True, timeout=120, env=ENVIRONMENT)


async def run(script: ModuleType, arguments: list[str]) -> int:
    """The script in this process: quicker, and its errors come out as they are."""
    code: int = await script.run(script.build_parser().parse_args(arguments))
    return code


def test_an_evaluation_that_is_piped_writes_plain_lines_a_table_and_three_files(
    script: ModuleType, model: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = script.build_parser().parse_args(flags(model, dataset, tmp_path, "--limit", "12"))
    with pytest.raises(SystemExit) as left:
        run_script(script.NAME, lambda: script.run(arguments))
    assert left.value.code == 0
    stdout = capsys.readouterr().out
    assert "\x1b" not in stdout
    assert re.search(r"GSM8K test  12/12  accuracy \d", stdout)
    assert "accuracy, strict (boxed only)" in stdout and "95% interval" in stdout
    assert f"weights: those of {model}" in stdout
    records = read_records(tmp_path / "gsm8k_eval.jsonl")
    assert sorted(record["index"] for record in records) == list(range(12))
    assert all(record["target"] == str(2 * record["index"]) for record in records)
    summary = json.loads((tmp_path / "gsm8k_eval.jsonl.summary.json").read_text())
    assert summary["num_problems"] == 12 and summary["model"] == str(model)
    tokens = sum(completion["num_tokens"] for record in records for completion in record["completions"])
    assert summary["total_completion_tokens"] == tokens > 0
    assert summary["settings"] == json.loads((tmp_path / "gsm8k_eval.jsonl.settings.json").read_text())


async def test_ctrl_c_ends_with_130_keeps_the_records_and_the_printed_command_finishes_them(
    script: ModuleType, model: Path, dataset: Path, tmp_path: Path
) -> None:
    arguments = flags(model, dataset, tmp_path / "cut", "--concurrency", "1")
    process = start(arguments)
    out = tmp_path / "cut" / "gsm8k_eval.jsonl"
    assert process.stdout is not None
    while not process.stdout.readline().startswith("GSM8K"):  # the first progress line: some are done, most are not
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    num_done = len(read_records(out))
    assert 0 < num_done < 400
    assert "Traceback" not in stderr
    assert f"what is done is kept in {out}" in stderr
    assert run_as_printed(stderr).returncode == 0
    await run(script, flags(model, dataset, tmp_path / "whole", "--concurrency", "256"))
    one, other = (
        json.loads((tmp_path / name / "gsm8k_eval.jsonl.summary.json").read_text()) for name in ("cut", "whole")
    )
    assert (one["num_taken_over"], other["num_taken_over"]) == (num_done, 0)
    for key in ("num_problems", "accuracy", "accuracy_ci95", "qwen_accuracy", "correct_rate", "prompt_tokens"):
        assert one[key] == other[key]
    assert len(read_records(out)) == 400


def test_bad_input_is_one_line_on_standard_error_and_exit_code_2(dataset: Path, tmp_path: Path) -> None:
    process = start(flags(tmp_path / "nowhere", dataset, tmp_path))
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and stdout == ""
    assert re.fullmatch(r"eval_gsm8k_vllm\.py: error: model folder \S+nowhere does not exist: .*\n", stderr)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--samples", "4"], "--samples 4 at --temperature 0 would be 4 times the same greedy answer"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--max-seq-len", "-1"], "--max-seq-len must be at least 1"),
        (["--max-tokens", "0"], "max_tokens must be at least 1"),
        (["--temperature", "-0.1"], "temperature must be at least 0"),
        (["--top-p", "0"], r"top_p must be in \(0, 1\]"),
        (["--resume-eval", "--overwrite"], "choose one"),
        (["--concurrency", "0"], "--concurrency must be at least 1"),
        (["--start-server"], "contradicts --start-server"),
        (["--dataset", "/nowhere.jsonl"], r"/nowhere\.jsonl does not exist"),
        (["--chat-template", "/nowhere.jinja"], r"/nowhere\.jinja cannot be read"),
        (["--max-seq-len", "10"], r"the prompt of problem 0 has \d+ tokens.*raise --max-seq-len"),
        (["--out", "."], "is a folder: name a file"),
    ],
)
async def test_bad_flags_and_files_are_refused_in_one_line_before_a_record_is_made(
    script: ModuleType, model: Path, dataset: Path, tmp_path: Path, more: list[str], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        await run(script, flags(model, dataset, tmp_path, *more))
    assert "\n" not in str(caught.value)
    assert not any(path.stat().st_size for path in tmp_path.glob("gsm8k_eval.jsonl"))


async def test_a_model_without_a_chat_template_is_refused_and_runs_with_one_given(
    script: ModuleType, model: Path, dataset: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    make_tiny_model(bare, tie_word_embeddings=True)
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    for leftover in ("chat_template.jinja", "tokenizer_config.json"):
        (bare / leftover).unlink(missing_ok=True)
    tokenizer.save_pretrained(bare)
    arguments = flags(bare, dataset, tmp_path, "--limit", "2")
    with pytest.raises(ValueError, match="has no chat template: give one with --chat-template FILE"):
        await run(script, arguments)
    (tmp_path / "chat.jinja").write_text("{% for message in messages %}{{ message.content }}\n{% endfor %}")
    assert await run(script, [*arguments, "--chat-template", str(tmp_path / "chat.jinja")]) == 0


async def test_records_that_are_there_are_neither_lost_nor_mixed(
    script: ModuleType, model: Path, dataset: Path, tmp_path: Path
) -> None:
    arguments = flags(model, dataset, tmp_path, "--limit", "3")
    out = tmp_path / "gsm8k_eval.jsonl"
    assert await run(script, arguments) == 0
    before = out.read_bytes()
    with pytest.raises(ValueError, match="is there already: finish it with --resume-eval, or replace it"):
        await run(script, arguments)
    with pytest.raises(ValueError, match=r"other settings: seed 0, now 1; temperature|temperature 0\.0, now 0\.5"):
        await run(script, [*arguments, "--resume-eval", "--temperature", "0.5"])
    assert out.read_bytes() == before
    assert await run(script, [*arguments, "--resume-eval", "--limit", "5"]) == 0  # more problems are welcome
    assert out.read_bytes().startswith(before) and len(read_records(out)) == 5
    Path(f"{out}.settings.json").unlink()
    with pytest.raises(ValueError, match=r"settings\.json is missing"):
        await run(script, [*arguments, "--resume-eval"])
    assert await run(script, [*arguments, "--overwrite", "--temperature", "0.5", "--samples", "2"]) == 0
    records = read_records(out)
    assert len(records) == 3 and all(len(record["completions"]) == 2 for record in records)
    assert "pass@2" in json.loads(Path(f"{out}.summary.json").read_text())


def test_help_names_every_flag_with_an_explanation(script: ModuleType) -> None:
    parser: argparse.ArgumentParser = script.build_parser()
    actions = [action for action in parser._actions if action.option_strings]
    assert all(action.help for action in actions)
    wanted = (
        "model split limit temperature max-tokens system-prompt out host port concurrency dataset samples seed top-p"
    )
    wanted += (
        " api-key-file trust-remote-code start-server server-args server-gpu server-log engine resume-eval out-dir"
    )
    wanted += " chat-template"
    assert {f"--{name}" for name in wanted.split()} <= {flag for action in actions for flag in action.option_strings}
    defaults = parser.parse_args([])
    assert (defaults.temperature, defaults.system_prompt, defaults.max_tokens) == (0.0, "", 512)
    assert (defaults.split, defaults.out, defaults.engine) == ("test", "gsm8k_eval.jsonl", "vllm")
