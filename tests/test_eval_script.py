"""`eval_gsm8k_vllm.py` on a tiny random model with the local engine: its files, its exit codes, and resuming."""

import argparse
import asyncio
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ludic.cli import check_engine_arguments, run_script
from ludic.config import from_arguments
from ludic.inference.client import handshake
from ludic.inference.client.server_control import ServerControl
from ludic.inference.client.weights_in_use import WeightsInUse
from ludic.rollout.problems import read_records
from ludic.run import evaluation
from tests.fake_vllm import FakeServer, serving
from tests.printed import printed_command
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


def run_as_printed(text: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(printed_command(text), capture_output=True, text=True, timeout=120, env=ENVIRONMENT)


async def run(script: ModuleType, arguments: list[str]) -> int:
    """The script in this process: quicker, and its errors come out as they are."""
    code: int = await script.run(script.build_parser().parse_args(arguments))
    return code


def test_an_evaluation_that_is_piped_writes_plain_lines_a_table_and_its_files(
    script: ModuleType, model: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = script.build_parser().parse_args(flags(model, dataset, tmp_path, "--limit", "12"))
    with pytest.raises(SystemExit) as left:
        run_script(script.NAME, lambda: script.run(arguments))
    assert left.value.code == 0
    stdout = capsys.readouterr().out
    assert "\x1b" not in stdout
    assert re.search(r"GSM8K test  12/12  accuracy \d", stdout)
    assert "accuracy, strict" in stdout and "95% interval" in stdout
    assert f"weights: those of {model}" in stdout
    records = read_records(tmp_path / "gsm8k_eval.jsonl")
    assert sorted(record["index"] for record in records) == list(range(12))
    assert all(record["target"] == str(2 * record["index"]) for record in records)
    summary = json.loads((tmp_path / "gsm8k_eval.jsonl.summary.json").read_text())
    assert summary["num_problems"] == 12 and summary["model"] == str(model)
    tokens = sum(completion["num_tokens"] for record in records for completion in record["completions"])
    assert summary["total_completion_tokens"] == tokens > 0
    assert summary["settings"] == json.loads((tmp_path / "gsm8k_eval.jsonl.settings.json").read_text())
    page = tmp_path / "gsm8k_eval.jsonl.report.html"
    assert page.read_text().startswith("<!doctype html>") and str(page) in stdout
    again = script.build_parser().parse_args(["--config", str(tmp_path / "gsm8k_eval.jsonl.config.toml")])
    assert again.resolved == arguments.resolved


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
    assert out.with_name("gsm8k_eval.jsonl.report.html").stat().st_size > 100_000  # of what is done
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
    assert process.returncode == 2 and stdout == ""  # refused before a problem is read
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


async def test_a_system_turn_of_the_templates_own_is_said_and_recorded_and_gone_with_the_template_that_is_named(
    script: ModuleType, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tiny_model(tmp_path / "model", tie_word_embeddings=True)
    own = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Lud.<|im_end|>\n{% endif %}"
    chatml = SCRIPT.with_name("chatml.jinja").read_text()
    (tmp_path / "model" / "chat_template.jinja").write_text(own + chatml)
    arguments = [*flags(tmp_path / "model", dataset, tmp_path, "--limit", "2", "--overwrite"), "--system-prompt", ""]
    asked = "<|im_start|>user\nWhat is 0 + 0?<|im_end|>\n<|im_start|>assistant\n"
    recorded = tmp_path / "gsm8k_eval.jsonl.prompt.json"
    assert await run(script, arguments) == 0
    (line,) = re.findall("^warning: .*$", capsys.readouterr().out, re.MULTILINE)
    assert "adds a system turn of its own, '<|im_start|>system\\nYou are Lud.': for none, give --chat-template" in line
    assert json.loads(recorded.read_text())["text"] == "<|im_start|>system\nYou are Lud.<|im_end|>\n" + asked
    template = line.partition("--chat-template ")[2].partition(",")[0]
    assert await run(script, [*arguments, "--chat-template", template]) == 0
    said = capsys.readouterr().out
    assert "warning" not in said and "the first prompt, as it is rendered: '<|im_start|>user\\nWhat is 0" in said
    assert json.loads(recorded.read_text())["text"] == asked
    assert [record["prompt_tokens"] for record in read_records(tmp_path / "gsm8k_eval.jsonl")] == [len(asked)] * 2


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


async def test_records_of_other_weights_in_the_same_folder_are_not_taken_up(
    script: ModuleType, dataset: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "policy"
    make_tiny_model(folder, tie_word_embeddings=True, seed=1)
    arguments = flags(folder, dataset, tmp_path, "--limit", "3")
    assert await run(script, arguments) == 0
    assert await run(script, [*arguments, "--resume-eval"]) == 0
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("gsm8k_eval*")}
    make_tiny_model(folder, tie_word_embeddings=True, seed=2)
    with pytest.raises(
        ValueError, match=r"other settings: weights 'files \w{16}', now 'files \w{16}'; use another --out"
    ):
        await run(script, [*arguments, "--resume-eval"])
    assert {path.name: path.read_bytes() for path in tmp_path.glob("gsm8k_eval*")} == kept


def test_a_smaller_limit_deletes_nothing_and_is_answered_with_a_command_that_works(
    model: Path, dataset: Path, tmp_path: Path
) -> None:
    arguments = flags(model, dataset, tmp_path)
    first = start([*arguments, "--limit", "5"])
    first.communicate(timeout=120)
    assert first.returncode == 0
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("gsm8k_eval*")}
    process = start([*arguments, "--limit", "2", "--resume-eval"])
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and stderr.count("\n") == 1
    assert "the records reach to problem 4, and only 2 problems are asked for: use another --out" in stderr
    assert {path.name: path.read_bytes() for path in tmp_path.glob("gsm8k_eval*")} == kept
    assert run_as_printed(re.findall("`(.*)`", stderr)[0]).returncode == 0
    assert len(read_records(tmp_path / "gsm8k_eval.jsonl")) == 5


async def test_requests_have_seeds_where_something_is_drawn_so_that_an_evaluation_repeats(
    script: ModuleType, model: Path, dataset: Path, tmp_path: Path
) -> None:
    def texts(name: str) -> list[list[str]]:
        records = sorted(read_records(tmp_path / name / "gsm8k_eval.jsonl"), key=lambda record: record["index"])
        return [[one["text"] for one in record["completions"]] for record in records]

    hot = ["--limit", "3", "--samples", "2", "--temperature", "1"]
    for name, more in (("a", []), ("b", []), ("c", ["--seed", "1"]), ("d", ["--no-seed-requests"])):
        assert await run(script, flags(model, dataset, tmp_path / name, *hot, *more)) == 0
    assert texts("a") == texts("b")
    assert texts("a") != texts("c") and texts("a") != texts("d")
    seeded = {name: json.loads((tmp_path / name / "gsm8k_eval.jsonl.settings.json").read_text()) for name in "acd"}
    assert [seeded[name]["seeded"] for name in "acd"] == [True, True, False]


@pytest.mark.parametrize("rl_routes", [False, True], ids=["plain", "ours"])
async def test_a_server_is_told_every_sampling_value_and_what_it_says_of_its_weights_is_recorded(
    script: ModuleType, model: Path, dataset: Path, tmp_path: Path, rl_routes: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeServer(tokenizer=make_tiny_tokenizer(), model="policy", rl_routes=rl_routes, generate_route=rl_routes)
    fake.start = "b007" * 8 if rl_routes else None
    fake.server_info |= {"model": "/models/first", "device": "cuda"}
    more = ["--engine", "vllm", "--model", "policy", "--tokenizer", str(model), "--limit", "2", "--samples", "2"]
    more += ["--temperature", "0.5", "--seed", "3"]
    async with serving(fake) as server:
        url = ["--base-url", server.base_url]
        if rl_routes:
            control = ServerControl(server.base_url)
            await asyncio.to_thread(handshake.claim, control, {"out_dir": "/runs/a"})
            await asyncio.to_thread(control.note_weights, 37)
            await asyncio.to_thread(handshake.release, control)
        assert await run(script, [*flags(model, dataset, tmp_path), *more, *url]) == 0
        server.weights_digest = "of other weights"
        resumed = [*flags(model, dataset, tmp_path), *more, *url, "--limit", "4", "--resume-eval"]
        if rl_routes:
            with pytest.raises(ValueError, match="weights 'held 0123456789abcdef', now 'held of other weights'"):
                await run(script, resumed)
        else:  # nothing to see it by
            assert await run(script, resumed) == 0
    assert all(request["seed"] is not None for request in server.requests)
    sent = {"temperature": 0.5, "top_p": 1.0, "stop_token_ids": [1], "max_tokens": 8}
    neutral = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert all(request.items() >= (sent if rl_routes else sent | neutral).items() for request in server.requests)
    summary = json.loads((tmp_path / "gsm8k_eval.jsonl.summary.json").read_text())
    assert summary["settings"].items() >= (sent | neutral | {"seed": 3, "seeded": True}).items()
    records = read_records(tmp_path / "gsm8k_eval.jsonl")
    versions = {one["policy_version"] for record in records for one in record["completions"]}
    said = "update 37 of the run in /runs/a (not those of /models/first)"
    assert versions == ({37} if rl_routes else {0})
    assert (summary["weights"]["description"] == said) is rl_routes
    printed = capsys.readouterr().out
    assert (f"weights: {said}" in printed) is rl_routes
    assert ("these weights are on the server, and in no checkpoint" in printed) is rl_routes


def test_weights_that_change_while_they_are_scored_are_said_and_recorded(
    script: ModuleType, model: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states = iter("ab")
    honest = evaluation.weights_in_use

    def changing(args: argparse.Namespace) -> object:
        return dataclasses.replace(honest(args), fingerprint=f"held {next(states)}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "weights_in_use", changing)
        assert asyncio.run(run(script, flags(model, dataset, tmp_path, "--limit", "2"))) == 0
    assert "THE WEIGHTS CHANGED while they were scored" in capsys.readouterr().out
    summary = json.loads((tmp_path / "gsm8k_eval.jsonl.summary.json").read_text())
    assert (summary["weights"]["fingerprint"], summary["weights_at_the_end"]["fingerprint"]) == ("held a", "held b")


# --- the command that trains on ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("given", ["folder", "file"])
def test_the_command_that_trains_on_works_as_printed_with_the_local_engine(
    model: Path, dataset: Path, tmp_path: Path, given: str
) -> None:
    problems, template = tmp_path / "problems", tmp_path / "a template.jinja"
    problems.mkdir()
    rows = "".join(dataset.read_text().splitlines(keepends=True)[:40])
    (problems / "test.jsonl").write_text(rows)
    if given == "folder":
        (problems / "train.jsonl").write_text(rows)
    template.write_text("{% for message in messages %}{{ message.content }}\n{% endfor %}")
    out_dir = tmp_path / "runs of mine"
    checkpoint = out_dir / "checkpoints_gsm8k" / "step_3"  # whose folder a run in --out-dir would move aside
    shutil.copytree(model, checkpoint)
    more = ["--limit", "4", "--system-prompt", "Say 'it'.", "--chat-template", str(template)]
    scored = start(flags(checkpoint, problems, out_dir, *more))
    stdout, stderr = scored.communicate(timeout=120)
    assert scored.returncode == 0, stderr
    assert ("trains on the problems that were scored" in stdout) is (given == "file")
    words = printed_command(stdout)
    metrics = Path(words[words.index("--out-dir") + 1]) / "gsm8k_train_metrics.jsonl"
    with (tmp_path / "training.txt").open("w") as log:
        training = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT)
    deadline = time.monotonic() + 200
    while not (metrics.exists() and '"reward_mean"' in metrics.read_text()):  # until the first update
        assert training.poll() is None and time.monotonic() < deadline, (tmp_path / "training.txt").read_text()
        time.sleep(0.2)
    training.send_signal(signal.SIGINT)
    assert training.wait(timeout=60) == 130


@pytest.mark.parametrize(
    ("given", "weights", "wanted"),
    [
        ([], {"is_ours": True}, []),
        (["--host", "node-3", "--port", "8004"], {"is_ours": True}, ["--host", "node-3", "--port", "8004"]),
        (["--base-url", "https://h/vllm"], {"is_ours": True}, ["--base-url", "https://h/vllm"]),
        (["--server", "https://h/vllm"], {"is_ours": True}, ["--server", "https://h/vllm"]),
        (["--api-key-file", "KEY"], {"is_ours": True}, ["--api-key-file", "KEY"]),
        ([], {}, ["--start-server", "--port", "8001"]),
        (["--port", "8001"], {}, ["--start-server", "--port", "8000"]),
        (["--tokenizer", "MODEL"], {"is_ours": True}, ["--start-server", "--port", "8001"]),
        (
            ["--start-server", "--port", "8004", "--server-args=--dtype=float32"],
            {"is_ours": True},
            ["--start-server", "--port", "8004", "--server-args=--dtype=float32"],
        ),
        (["--system-prompt=-- be brief --"], {"is_ours": True}, ["--system-prompt=-- be brief --"]),
        (["--trust-remote-code"], {"is_ours": True}, ["--trust-remote-code"]),
        (["--max-tokens", "600"], {"is_ours": True, "max_model_len": 512}, ["--max-seq-len", "512"]),
    ],
    ids=str,
)
def test_the_command_that_trains_on_has_the_engine_of_the_evaluation_or_starts_one_that_it_can_train_with(
    script: ModuleType, model: Path, tmp_path: Path, given: list[str], weights: dict[str, Any], wanted: list[str]
) -> None:
    from next_commands import training_advice
    from train_gsm8k import parse_arguments

    (tmp_path / "train.jsonl").write_text('{"question": "1?", "answer": "#### 1"}\n')
    base = ["--model", "NAME" if "--tokenizer" in given else str(model), "--dataset", str(tmp_path)]
    args = script.build_parser().parse_args([*base, *(str(model) if word == "MODEL" else word for word in given)])
    found = WeightsInUse(description="", fingerprint="", **weights)
    *_, line = training_advice(args, found, longest=40)
    words = printed_command(line)[2:]
    assert words[:2] == ["--model", str(model)]
    assert any(words[at : at + len(wanted)] == wanted for at in range(len(words)))
    assert ("--start-server" in words) is ("--start-server" in wanted)
    trained = parse_arguments(words)
    check_engine_arguments(trained)
    config = from_arguments(trained)
    assert (trained.dataset, trained.system_prompt) == (str(tmp_path), args.system_prompt)
    assert config.eval_limit == 0  # no test.jsonl
    assert config.max_completion_len == min(args.max_tokens, config.max_seq_len - 1)


def test_weights_of_a_run_are_trained_on_from_its_checkpoint(script: ModuleType, model: Path, tmp_path: Path) -> None:
    from next_commands import training_advice

    args = script.build_parser().parse_args(["--model", str(model)])
    weights = WeightsInUse(
        description="", fingerprint="", is_ours=True, from_run=True, policy_version=37, out_dir=str(tmp_path)
    )
    (only,) = training_advice(args, weights, longest=40)
    assert "in no checkpoint of their run" in only
    (checkpoint := tmp_path / "checkpoints_gsm8k" / "step_37").mkdir(parents=True)
    *_, line = training_advice(args, weights, longest=40)
    words = shlex.split(line)
    assert words[words.index("--model") + 1] == str(checkpoint) and "--start-server" in words


def test_a_folder_without_problems_to_train_on_is_said(script: ModuleType, model: Path, tmp_path: Path) -> None:
    from next_commands import training_advice

    args = script.build_parser().parse_args(["--model", str(model), "--dataset", str(tmp_path)])
    (only,) = training_advice(args, WeightsInUse(description="", fingerprint=""), longest=4)
    assert only == f"no command trains on from here: {tmp_path} holds no problems to train on"


def test_the_resume_command_leaves_out_what_contradicts_it_however_it_was_abbreviated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["x y.py", "--overw", "--system-prompt", "a 'b'", "--resume-e", "--limit", "3"])
    assert (
        evaluation.resume_command().split("python ", 1)[1]
        == "'x y.py' --system-prompt 'a '\"'\"'b'\"'\"'' --limit 3 --resume-eval"
    )


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
