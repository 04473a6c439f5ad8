"""train_gsm8k.py as a user runs it: its files, its end, and what it says of input that is wrong.

Runs are real subprocesses with the in-process engine. Bad input is put to the script's own `main` in this process, since
starting Python takes longer than refusing a flag; a few go through a subprocess too.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config

from environments.gsm8k import DEFAULT_SYSTEM_PROMPT
from ludic.cli import expand_home, run_script
from ludic.config import from_arguments
from ludic.flags import check_evaluation_arguments
from ludic.run.ending import compare
from ludic.run.policy import load_policy
from ludic.run.training import keep_compiled
from ludic.storage.manifest import write_manifest
from ludic.train.checkpoint import TrainerState, latest_checkpoint, list_checkpoints, read_state, save_checkpoint
from ludic.train.summary import TrainingSummary
from tests.conftest import write_digit_problems
from tests.printed import printed_command
from tests.vllm_helpers import make_tiny_model, make_tiny_tokenizer, tiny_config

SCRIPT = Path(__file__).parent.parent / "examples" / "gsm8k" / "train_gsm8k.py"
SMALL = [
    *("--engine", "local", "--rollouts-per-update", "16", "--group-size", "8", "--max-seq-len", "160"),
    *("--micro-token-budget", "640", "--max-tokens", "12", "--lr", "3e-3", "--warmup-steps", "0", "--eval-limit", "8"),
    *("--logger", "print"),
]
MISSION_FLAGS = [
    *("--model", "--host", "--port", "--rollouts-per-update", "--concurrency", "--limit", "--train-steps"),
    *("--micro-token-budget", "--max-seq-len", "--group-size", "--eval-every", "--eval-limit", "--eval-temperature"),
    *("--logger", "--system-prompt", "--engine", "--dataset", "--seed", "--start-server", "--resume", "--demo"),
]
SUMMARY_KEYS = {
    "accuracy_before", "accuracy_after", "eval_problems", "updates", "seconds", "rollouts", "completion_tokens",
}  # fmt: skip


def command(policy: Path, problems: Path, out_dir: Path, *flags: str) -> list[str]:
    given = ["--model", str(policy), "--dataset", str(problems), "--out-dir", str(out_dir), *flags]
    return [sys.executable, str(SCRIPT), *SMALL, *given]


def run(*words: str, timeout_s: float = 200) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout_s)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def updates(out_dir: Path) -> list[dict[str, Any]]:
    path = out_dir / "gsm8k_train_metrics.jsonl"
    return [row for row in read_jsonl(path) if "reward_mean" in row] if path.exists() else []


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(
    digit_policy_dir: Path, digit_problems: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The folder of a run of two updates, and what the run printed."""
    out_dir = tmp_path_factory.mktemp("finished")
    done = run(*command(digit_policy_dir, digit_problems, out_dir, "--train-steps", "2", "--verbose"))
    assert done.returncode == 0, done.stderr
    return out_dir, done.stdout + done.stderr


def test_a_run_leaves_the_files_that_the_readme_names(finished: tuple[Path, str]) -> None:
    out_dir, _ = finished
    assert {path.name for path in out_dir.iterdir()} == {
        "checkpoints_gsm8k",
        "gsm8k_train_metrics.jsonl",
        "gsm8k_train_prompt.json",
        "gsm8k_train_report.html",
        "gsm8k_train_reward.png",
        "gsm8k_train_rollouts.jsonl",
        "gsm8k_train_start.json",
        "gsm8k_train_config.toml",
        "gsm8k_train_summary.json",
        "run.lock",
    }
    assert [path.name for path in (out_dir / "checkpoints_gsm8k").iterdir()] == ["step_2"]
    assert (out_dir / "gsm8k_train_reward.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_file_that_a_run_left_gives_the_same_run_again(finished: tuple[Path, str], tmp_path: Path) -> None:
    config = finished[0] / "gsm8k_train_config.toml"
    again = run(sys.executable, str(SCRIPT), "--config", str(config), "--out-dir", str(tmp_path))
    assert again.returncode == 0, again.stderr
    first, second = ((folder / "gsm8k_train_rollouts.jsonl").read_bytes() for folder in (finished[0], tmp_path))
    assert first == second
    before, after = ((folder / config.name).read_text().splitlines() for folder in (finished[0], tmp_path))
    assert {*before[1:]} ^ {*after[1:]} == {f'out_dir = "{folder}"' for folder in (finished[0], tmp_path)}


def test_the_first_prompt_is_said_and_recorded_as_it_was_rendered(
    finished: tuple[Path, str], digit_problems: Path
) -> None:
    out_dir, said = finished
    question = read_jsonl(digit_problems / "train.jsonl")[0]["question"]
    prompt = f"<|system|>{DEFAULT_SYSTEM_PROMPT}<|end|><|user|>{question}<|end|><|assistant|>"
    assert json.loads((out_dir / "gsm8k_train_prompt.json").read_text())["text"] == prompt
    assert f"the first prompt, as it is rendered: '{prompt}'" in said and "warning: the chat template" not in said
    assert f"train: 12 problems in {digit_problems / 'train.jsonl'}" in said


def test_every_rollout_is_a_line_with_all_its_fields(finished: tuple[Path, str], digit_policy_dir: Path) -> None:
    rows = read_jsonl(finished[0] / "gsm8k_train_rollouts.jsonl")
    assert sorted((row["step"], row["group"], row["rollout"]) for row in rows) == [
        (step, group, member) for step in (1, 2) for group in (2 * step - 2, 2 * step - 1) for member in range(8)
    ]
    tokenizer = AutoTokenizer.from_pretrained(digit_policy_dir)
    for row in rows:
        text = tokenizer.decode(row["completion_token_ids"], skip_special_tokens=True)
        assert row["completion"] == text and re.match(r"Question \d+: which one\?", row["prompt"])
        assert row["target"] == "7" and row["reward"] == float(row["answer"] == "7") == row["reward_parts"]["strict"]
        assert set(row["reward_parts"]) == {"strict", "flexible", "qwen", "grader_failed", "grader_timeout"}
        assert row["policy_version"] == row["step"] - 1
        assert row["completion_tokens"] == len(row["completion_token_ids"])
        assert row["prompt_tokens"] > len(DEFAULT_SYSTEM_PROMPT)  # a byte is a token
        assert (row["finish_reason"] == "stop") == (row["completion_token_ids"][-1] == tokenizer.eos_token_id)
    assert len({row["completion"] for row in rows}) > 3
    assert {row["reward"] for row in rows} == {0.0, 1.0}


def test_the_summary_and_the_metrics_agree_with_the_rollouts(finished: tuple[Path, str]) -> None:
    out_dir, _ = finished
    rollouts = read_jsonl(out_dir / "gsm8k_train_rollouts.jsonl")
    summary = json.loads((out_dir / "gsm8k_train_summary.json").read_text())
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["updates"] == 2 and summary["rollouts"] == 32 and summary["eval_problems"] == 8
    assert summary["completion_tokens"] == sum(row["completion_tokens"] for row in rollouts)
    assert summary["accuracy_before"] == 0.0 and 0.0 <= summary["accuracy_after"] <= 1.0 and summary["seconds"] > 0
    metrics = read_jsonl(out_dir / "gsm8k_train_metrics.jsonl")
    for row in updates(out_dir):
        rewards = [rollout["reward"] for rollout in rollouts if rollout["step"] == row["step"]]
        assert row["reward_mean"] == pytest.approx(sum(rewards) / 16)
    assert [row["step"] for row in metrics if "eval/accuracy" in row] == [0, 2]


def test_the_checkpoint_is_a_model_that_was_trained(finished: tuple[Path, str], digit_policy_dir: Path) -> None:
    checkpoint = finished[0] / "checkpoints_gsm8k" / "step_2"
    trained = AutoModelForCausalLM.from_pretrained(checkpoint)
    before = AutoModelForCausalLM.from_pretrained(digit_policy_dir)
    embeddings = [model.get_parameter("model.embed_tokens.weight") for model in (trained, before)]
    assert not torch.equal(*embeddings)
    assert AutoTokenizer.from_pretrained(checkpoint).chat_template is not None
    assert read_state(checkpoint).model == str(digit_policy_dir)


def test_a_run_says_each_step_and_sync_and_ends_with_the_next_command(finished: tuple[Path, str]) -> None:
    out_dir, printed = finished
    lines = printed.splitlines()
    assert sum(bool(re.search(r"\b[12]/2\b", line)) for line in lines) >= 2
    assert len([line for line in lines if "weight sync" in line and "0 differ" in line]) == 3
    assert "2 updates, 32 rollouts" in printed and "strict accuracy" in printed
    assert "next, to evaluate the checkpoint:" in lines
    words = printed_command(printed)
    assert words[1].endswith("eval_gsm8k_vllm.py") and str(out_dir / "checkpoints_gsm8k" / "step_2") in words


def test_the_next_command_that_a_run_prints_works_as_it_stands(finished: tuple[Path, str], tmp_path: Path) -> None:
    words = [*printed_command(finished[1]), "--out-dir", str(tmp_path)]  # the folder of the run is for other tests too
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "gsm8k_eval_step_2.jsonl.summary.json").read_text())
    assert summary["num_problems"] == 8


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--engine", "local"], ["--engine", "local"]),
        ([], ["--start-server", "--port", "8001"]),
        (["--port", "8001"], ["--start-server", "--port", "8000"]),
        (["--start-server", "--server-args=--dtype=half"], ["--server-args=--dtype=half"]),
        (["--start-server", "--server-gpu", "1"], ["--server-gpu", "1"]),
        (["--system-prompt=-x 'y'"], ["--system-prompt=-x 'y'"]),
        (["--chat-template", "chat.jinja", "--trust-remote-code"], ["--chat-template", "chat.jinja"]),
        (["--eval-dataset", "other.jsonl"], ["--dataset", "other.jsonl"]),
    ],
    ids=str,
)
def test_the_command_that_evaluates_has_what_the_run_was_given(
    script: ModuleType, given: list[str], wanted: list[str], tmp_path: Path
) -> None:
    import eval_gsm8k_vllm
    from next_commands import evaluation_advice

    args = script.build_parser().parse_args(["--dataset", str(tmp_path), *given])
    checkpoint = str(tmp_path / "step 4")
    _, line = evaluation_advice(args, from_arguments(args), checkpoint, tmp_path)
    words = printed_command(line)[2:]
    assert any(words[at : at + len(wanted)] == wanted for at in range(len(words)))
    evaluated = eval_gsm8k_vllm.build_parser().parse_args(words)
    check_evaluation_arguments(evaluated)
    assert (evaluated.model, evaluated.system_prompt, evaluated.trust_remote_code) == (
        checkpoint, args.system_prompt, args.trust_remote_code
    )  # fmt: skip


def test_no_command_evaluates_on_what_was_trained_on(script: ModuleType, tmp_path: Path) -> None:
    from next_commands import evaluation_advice

    args = script.build_parser().parse_args(["--dataset", str(tmp_path / "all.jsonl")])
    (line,) = evaluation_advice(args, from_arguments(args), "step_4", tmp_path)
    assert "all.jsonl was trained on" in line and "--eval-dataset" in line


def lay_out_in_the_old_form(checkpoint: Path) -> None:
    """Everything side by side, as earlier versions wrote it."""
    for path in (checkpoint / "training").iterdir():
        path.rename(checkpoint / path.name)
    (checkpoint / "training").rmdir()
    write_manifest(checkpoint)


@pytest.mark.parametrize("form", ["as it is", "of the old form"])
def test_resume_goes_on_where_the_run_ended(
    finished: tuple[Path, str], digit_policy_dir: Path, digit_problems: Path, tmp_path: Path, form: str
) -> None:
    out_dir = tmp_path / "resumed"
    shutil.copytree(finished[0], out_dir)
    if form == "of the old form":
        lay_out_in_the_old_form(out_dir / "checkpoints_gsm8k" / "step_2")
    for name in ("rollouts", "metrics"):  # as a kill in the third update leaves them
        with (out_dir / f"gsm8k_train_{name}.jsonl").open("a") as file:
            file.write('{"step": 3, "group": 4, "rollout": 0, "reward_mean": 9.0}\n{"step": 3, "gro')
    resumed = run(*command(digit_policy_dir, digit_problems, out_dir, "--train-steps", "3", "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert f"continuing from {out_dir / 'checkpoints_gsm8k' / 'step_2'} (update 2)" in resumed.stdout
    before, after = (read_jsonl(folder / "gsm8k_train_rollouts.jsonl") for folder in (finished[0], out_dir))
    assert after[:32] == before and len(after) == 48
    assert {(row["step"], row["group"], row["policy_version"]) for row in after[32:]} == {(3, 4, 2), (3, 5, 2)}
    assert [row["step"] for row in updates(out_dir)] == [1, 2, 3]
    assert max(row["reward_mean"] for row in updates(out_dir)) <= 1.0
    summary = json.loads((out_dir / "gsm8k_train_summary.json").read_text())
    assert summary["updates"] == 3 and summary["rollouts"] == 48 and summary["accuracy_before"] == 0.0
    own = summary["this_process"]
    assert own["wall_seconds"] > 0
    tokens = sum(row["completion_tokens"] for row in after[32:])
    assert {**own, "wall_seconds": 0} == {
        **{"started_from": 2, "updates": 1, "rollouts": 16, "completion_tokens": tokens, "wall_seconds": 0}
    }
    last = [line for line in resumed.stdout.splitlines() if " updates, " in line]
    assert last[0].startswith(f"1 updates, 16 rollouts, {tokens} completion tokens in ")
    assert last[0].endswith(", after update 2")
    assert last[1].startswith(
        f"the whole run: 3 updates, 48 rollouts, {summary['completion_tokens']} completion tokens in "
    )
    assert [path.name for path in list_checkpoints(out_dir / "checkpoints_gsm8k")] == ["step_2", "step_3"]
    assert not (out_dir / "earlier_runs").exists()


def test_a_resumed_run_loads_the_masters_and_a_new_one_what_is_served(script: ModuleType, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "source", tie_word_embeddings=True)
    checkpoint = save_checkpoint(
        tmp_path,
        model=model,
        weights=model.state_dict(),
        tokenizer=make_tiny_tokenizer(),
        optimizer=torch.optim.AdamW(model.parameters()),
        state=TrainerState(step=1, policy_version=1, model="tiny", config={}),
        model_dtype=torch.bfloat16,
        source_files={},
        keep=1,
    )
    args = script.build_parser().parse_args([])
    masters = model.get_parameter("model.norm.weight"), model.get_parameter("model.embed_tokens.weight")
    for resumes in (True, False):
        policy, dtype = load_policy(str(checkpoint), torch.device("cpu"), args, resumes)
        loaded = policy.get_parameter("model.norm.weight"), policy.get_parameter("model.embed_tokens.weight")
        assert dtype == torch.bfloat16 and {tensor.dtype for tensor in loaded} == {torch.float32}
        for tensor, master in zip(loaded, masters, strict=True):
            assert torch.equal(tensor, master if resumes else master.to(torch.bfloat16).float())


def test_ctrl_c_saves_a_checkpoint_and_exits_130_and_an_earlier_run_was_set_aside_whole(
    finished: tuple[Path, str], digit_policy_dir: Path, digit_problems: Path, tmp_path: Path
) -> None:
    out_dir = tmp_path / "interrupted"
    shutil.copytree(finished[0], out_dir)
    before = snapshot(out_dir)
    flags = ["--train-steps", "100000", "--eval-limit", "0", f"--seed={-(2**70)}"]  # any whole number is a seed
    words = command(digit_policy_dir, digit_problems, out_dir, *flags)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: (out_dir / "earlier_runs").exists() and len(updates(out_dir)) >= 3, process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "Traceback" not in errors and "interrupted" in errors
    checkpoint = latest_checkpoint(out_dir / "checkpoints_gsm8k")
    assert checkpoint is not None
    state = read_state(checkpoint)
    assert (
        out_dir / "gsm8k_train_report.html"
    ).stat().st_mtime >= checkpoint.stat().st_mtime  # first what is to be kept
    assert state.step >= 3 and AutoModelForCausalLM.from_pretrained(checkpoint) is not None
    assert max(row["step"] for row in read_jsonl(out_dir / "gsm8k_train_rollouts.jsonl")) >= state.step
    (aside,) = (out_dir / "earlier_runs").iterdir()
    assert snapshot(aside) == before
    resume = [*printed_command(errors), "--train-steps", str(state.step + 1)]
    resumed = subprocess.run(resume, capture_output=True, text=True, timeout=120)
    assert resumed.returncode == 0, resumed.stderr
    assert f"continuing from {checkpoint} (update {state.step})" in resumed.stdout


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str]", timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "run.lock"
    }


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("train_gsm8k", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))  # as when the script is run: demo.py lies beside it
        yield module


def evaluated(step: int, accuracy: float, **settings: object) -> dict[str, Any]:
    figures = ("strict_accuracy", "parse_err_rate", "truncation_rate", "avg_completion_length")
    given = {"temperature": 0.0, **settings}
    return {"step": step, "num_problems": 8, "accuracy": accuracy, **dict.fromkeys(figures, 0.5), "settings": given}


@pytest.mark.parametrize(
    ("evaluations", "shown", "said"),
    [
        ([evaluated(0, 0.1), evaluated(2, 0.2), evaluated(4, 0.4)], ["before", "10.0%", "after", "40.0%"], False),
        (
            [evaluated(0, 0.1), evaluated(2, 0.2, problems="b"), evaluated(4, 0.4, problems="b")],
            ["update 2", "20.0%", "after", "40.0%"],
            True,
        ),
        ([evaluated(1, 0.1), evaluated(2, 0.2)], ["update 1", "10.0%", "update 2", "20.0%"], False),
        ([evaluated(0, 0.1), evaluated(4, 0.4, problems="b")], [], True),
        ([evaluated(4, 0.4)], [], False),
    ],
    ids=["the first with the last", "the same prompt only", "of the middle", "nothing comparable", "one"],
)
def test_the_end_of_a_run_compares_evaluations_that_measured_the_same_and_says_of_which_updates(
    capsys: pytest.CaptureFixture[str],
    evaluations: list[dict[str, Any]],
    shown: list[str],
    said: bool,
) -> None:
    summary = TrainingSummary(
        accuracy_before=None,
        accuracy_after=None,
        eval_problems=8,
        updates=4,
        seconds=1.0,
        rollouts=1,
        completion_tokens=1,
        last_checkpoint=None,
        evaluations=evaluations,
    )
    compare(summary)
    printed = capsys.readouterr().out
    assert all(piece in printed for piece in shown) and bool(shown) == ("strict accuracy" in printed)
    assert ("not compared: 1" in printed) == said


@pytest.fixture
def refuse(
    script: ModuleType,
    finished: tuple[Path, str],
    digit_policy_dir: Path,
    digit_problems: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Runs the script with these flags in the folder of a finished run; its one line of error.

    The exit code is 2, and not a byte of what was there has changed.
    """
    out_dir = finished[0]

    def call(*flags: str, bare: bool = False) -> str:
        given = flags if bare else command(digit_policy_dir, digit_problems, out_dir, *flags)[2:]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given])
        before = snapshot(out_dir)
        with pytest.raises(SystemExit) as stop:
            run_script("train_gsm8k.py", script.main)
        assert stop.value.code == 2
        assert snapshot(out_dir) == before
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train_gsm8k.py: ")]
        assert len(said) == 1, said
        return said[0].removeprefix("train_gsm8k.py: error: ")

    return call


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--group-size", "1"], "--group-size must be at least 2, not 1"),
        (["--rollouts-per-update", "12"], "--rollouts-per-update 12 is not a multiple of --group-size 8"),
        (["--micro-token-budget", "159"], "--micro-token-budget 159 is smaller than --max-seq-len 160"),
        (["--temperature", "0"], "--temperature must be above 0 for training"),
        (["--limit", "0"], "--limit must be at least 1, not 0"),
        (["--concurrency", "0"], "--concurrency must be at least 1, not 0"),
        (["--engine", "vllm", "--port", "70000"], "--port must be in 1 to 65535, not 70000"),
        (["--start-server"], "--engine local generates in this process: it contradicts --start-server"),
        (["--server-gpu", "0"], "--server-gpu is for --start-server, which was not given"),
        (["--server-args", "--dtype float32"], "--server-args is for --start-server, which was not given"),
        (["--logger", "pigeon"], "--logger 'pigeon' is not known"),
        (["--logger", "rich,print"], "would write every step twice"),
        (["--demo"], "--demo brings its own policy and problems: it contradicts --model"),
        (["--model", "/no/such/model"], "model folder /no/such/model does not exist"),
        (["--dataset", "/no/such/data"], "/no/such/data does not exist"),
        (["--chat-template", "/no/such/template"], "chat template /no/such/template cannot be read"),
        (["--resume", "/no/such/checkpoint"], "/no/such/checkpoint is not a checkpoint"),
        (["--max-seq-len", "100"], "tokens, more than --max-seq-len 100 allows"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_with_exit_code_2_and_nothing_is_lost(
    refuse: Callable[..., str], flags: list[str], said: str
) -> None:
    assert said in refuse(*flags)


@pytest.mark.parametrize(
    ("flags", "contradicted"),
    [
        (["--dataset", "x.jsonl"], "--dataset"),
        (["--start-server"], "--start-server"),
        (["--engine", "vllm"], "--engine"),
        (["--eval-dataset", "x.jsonl"], "--eval-dataset"),
    ],
)
def test_the_demo_contradicts_what_it_brings_itself(
    refuse: Callable[..., str], flags: list[str], contradicted: str
) -> None:
    assert refuse("--demo", *flags, bare=True).endswith(f"it contradicts {contradicted}")


def test_a_flag_given_with_the_demo_comes_before_the_demos_own(script: ModuleType) -> None:
    args = script.parse_arguments(["--demo", "--train-steps", "3"])
    assert args.train_steps == 3 and args.engine == "local" and args.group_size > 1


def test_a_home_that_the_shell_left_alone_is_expanded_in_paths_only(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    args = expand_home(
        script.parse_arguments(
            ["--model=~/policy", "--dataset=~/gsm8k", "--out-dir=~/run", "--resume=~/run/step_3", "--system-prompt=~/x"]
        )
    )
    assert (args.model, args.dataset, args.out_dir) == ("/home/ann/policy", "/home/ann/gsm8k", "/home/ann/run")
    assert (args.resume, args.system_prompt) == ("/home/ann/run/step_3", "~/x")
    assert expand_home(script.parse_arguments(["--model=me/~model"])).model == "me/~model"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question": "?", "answer": "no mark"}', "no `####`"),
        ('{"question": "?"}', "no `answer`"),
        ("{nonsense", "not JSON"),
    ],
)
def test_a_malformed_row_is_named_with_its_file_and_line(
    refuse: Callable[..., str], tmp_path: Path, line: str, reason: str
) -> None:
    data = tmp_path / "rows.jsonl"
    write_digit_problems(data, 2)
    data.write_text(data.read_text() + line + "\n")
    message = refuse("--dataset", str(data))
    assert f"{data}:3: " in message and reason in message


def test_a_model_without_a_chat_template_is_told_how_to_be_given_one(
    refuse: Callable[..., str], digit_policy_dir: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(digit_policy_dir, model)
    (model / "chat_template.jinja").unlink()
    assert "has no chat template: give one with --chat-template FILE" in refuse("--model", str(model))


def test_a_model_folder_without_weights_is_refused(
    refuse: Callable[..., str], digit_policy_dir: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(digit_policy_dir, model)
    (model / "model.safetensors").unlink()
    message = refuse("--model", str(model))
    assert str(model) in message and "model.safetensors" in message


def _caps_its_attention(model: Path) -> None:
    config = {key: value for key, value in tiny_config("gemma", tie_word_embeddings=True).to_dict().items()
              if key not in ("model_type", "architectures")}  # fmt: skip
    Gemma2Config(**config).save_pretrained(model)


def _cannot_be_saved(model: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.7}))


def _stops_at_no_token(model: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 4096}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_caps_its_attention, "architecture: Gemma2ForCausalLM caps its attention logits at 50.0"),
        (_cannot_be_saved, "saving: generation_config.json of"),
        (_stops_at_no_token, "(id 4096), but the embedding has 512 rows"),
    ],
)
def test_what_would_end_a_run_later_is_refused_before_a_server_is_started(
    refuse: Callable[..., str],
    digit_policy_dir: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("a server was started")

    monkeypatch.setattr("ludic.inference.client.server_process.ServerProcess.start", start)
    model = tmp_path / "model"
    shutil.copytree(digit_policy_dir, model)
    change(model)
    assert said in refuse("--model", str(model), "--engine", "vllm", "--start-server")


def test_a_prompt_that_only_its_tokens_show_to_be_too_long_is_refused(
    refuse: Callable[..., str], tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [
        {"question": "a" * 40, "answer": "#### 7"},
        {"question": "\N{SNOWMAN}" * 39, "answer": "#### 7"},  # fewer characters, but three bytes and tokens each
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert re.search(r"\d+ tokens, more than --max-seq-len 160", refuse("--dataset", str(data)))


def test_a_checkpoint_of_another_model_is_refused(
    refuse: Callable[..., str], digit_policy_dir: Path, tiny_model_dir: Path
) -> None:
    message = refuse("--model", str(tiny_model_dir), "--resume")
    assert f"belongs to {digit_policy_dir}, not to --model {tiny_model_dir}" in message


def test_a_checkpoint_of_the_run_that_would_be_moved_aside_is_no_model_for_a_new_one(
    refuse: Callable[..., str], tmp_path: Path
) -> None:
    model = tmp_path / "checkpoints_gsm8k" / "step_2"
    message = refuse("--model", str(model), "--out-dir", str(tmp_path))
    assert "is a checkpoint of the run in this folder" in message and "--resume" in message


def test_resume_without_a_checkpoint_says_where_it_looked(refuse: Callable[..., str], tmp_path: Path) -> None:
    message = refuse("--resume", "--out-dir", str(tmp_path))
    assert f"there is no checkpoint in {tmp_path / 'checkpoints_gsm8k'}" in message


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_loaded(
    refuse: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    started = time.monotonic()
    message = refuse("--out-dir", str(tmp_path / "file" / "out"))
    assert message == f"--out-dir {tmp_path / 'file' / 'out'} cannot be written: Not a directory"
    assert time.monotonic() - started < 5


def test_without_a_server_the_command_that_starts_one_is_named_and_the_earlier_run_stays_where_it_was(
    refuse: Callable[..., str], digit_policy_dir: Path
) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    message = refuse("--engine", "vllm", "--port", str(port))
    assert f"python -m ludic.inference.vllm_server --model {digit_policy_dir} --port {port}" in message


def test_a_subprocess_says_the_same_on_standard_error_and_nothing_else(
    digit_policy_dir: Path, digit_problems: Path, tmp_path: Path
) -> None:
    wrong = run(*command(digit_policy_dir, digit_problems, tmp_path, "--group-size", "1"))
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == (
        "train_gsm8k.py: error: --group-size must be at least 2, not 1: GRPO compares completions of one prompt\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_flag_of_the_documented_command(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = script.build_parser().format_help()
    for flag in MISSION_FLAGS:
        assert re.search(rf"^  {flag}[ ,\n]", shown, re.MULTILINE), flag
    for group in ("task:", "engine:", "rollouts:", "optimisation:", "memory:", "evaluation:", "checkpoints:"):
        assert f"\n{group}\n" in shown
    assert DEFAULT_SYSTEM_PROMPT in shown


def test_what_torch_compiles_is_kept_in_the_users_cache_folder_unless_it_was_given_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/caches/ludic/torchinductor"
