"""Every command in every document is run by a test, as it is printed, or says what it needs that tests do not have.

A command stands in a block of ```bash or in an indented block. What needs a GPU or a network says so where people read it: by
`CUDA_VISIBLE_DEVICES=N` before the command, or by a comment `# needs a GPU` behind it or at the head of its block. Every other
command has a line in `RUN_BY`. The tests below run those that no other test runs, in a folder where the names that stand for
files (`FOLDER`, `PATH_OF_A_SMALL_MODEL`) are files.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from scripts import write_docs

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith((".", "site")) for part in path.relative_to(ROOT).parts)
)
NEEDS = re.compile(r"#.*\bneeds\b.*\b(GPUs?|network)\b")
ASSIGNS_GPU = re.compile(r"CUDA_VISIBLE_DEVICES=\d")
PROGRAM = re.compile(r"(?:\w+=\S+ )*(?:uv |python |\.venv|\.ci/|scripts/|benchmarks/|bash |make_policy\.py)")

GATE = ".ci/run"
HERE = "tests/test_docs_commands.py::"
RUN_BY = {
    "uv sync": GATE,
    "bash .ci/run": GATE,
    "uv run ruff check .": GATE,
    "uv run ruff format --check .": GATE,
    "uv run mypy": GATE,
    ".ci/audit": GATE,
    "uv run pytest": GATE,
    "uv run pytest tests/test_packing.py": GATE,
    "scripts/make_vllm_cpu_env.sh": GATE,
    "uv run python scripts/write_docs.py": HERE + "test_the_documents_are_written_from_the_code",
    "uv run python examples/gsm8k/train_gsm8k.py --demo": HERE + "test_the_demo_learns",
    "uv run python examples/gsm8k/train_gsm8k.py --engine local --model PATH_OF_A_SMALL_MODEL --dataset FOLDER "
    "--train-steps 3 --rollouts-per-update 32": HERE + "test_a_small_model_is_trained_evaluated_and_looked_at",
    "uv run python examples/gsm8k/eval_gsm8k_vllm.py --engine local --model checkpoints_gsm8k/step_3 --dataset FOLDER "
    "--limit 32": HERE + "test_a_small_model_is_trained_evaluated_and_looked_at",
    "uv run python examples/gsm8k/train_gsm8k.py --demo --train-steps 20 --forecast": HERE
    + "test_a_demo_is_forecast_trained_and_repeated_from_its_file",
    "uv run python examples/gsm8k/train_gsm8k.py --demo --train-steps 20": HERE
    + "test_a_demo_is_forecast_trained_and_repeated_from_its_file",
    "uv run python examples/gsm8k/train_gsm8k.py --config gsm8k_train_config.toml --out-dir again": HERE
    + "test_a_demo_is_forecast_trained_and_repeated_from_its_file",
    "uv run torchrun --standalone --nproc_per_node 2 examples/gsm8k/train_gsm8k.py --engine local "
    "--model PATH_OF_A_SMALL_MODEL --dataset FOLDER --train-steps 3 --rollouts-per-update 32": "tests/test_ranks.py::"
    "test_torchrun_starts_a_run_of_two_ranks",
    "uv run python examples/gsm8k/train_gsm8k.py --print-completion bash > ~/.ludic-completion.bash": HERE
    + "test_the_completion_of_two_commands_is_one_file_that_bash_reads",
    "uv run python -m ludic.report --print-completion bash >> ~/.ludic-completion.bash": HERE
    + "test_the_completion_of_two_commands_is_one_file_that_bash_reads",
    "uv run python examples/lm_eval_files.py gsm8k_eval.jsonl --out-dir lm_eval": HERE
    + "test_a_small_model_is_trained_evaluated_and_looked_at",
    "uv run python -m ludic.doctor --config gsm8k_train_config.toml": HERE
    + "test_a_small_model_is_trained_evaluated_and_looked_at",
    "uv run python -m ludic.report OUT_DIR": HERE + "test_a_small_model_is_trained_evaluated_and_looked_at",
    "uv run python -m ludic.report OUT_DIR OTHER --out both.html": HERE
    + "test_a_small_model_is_trained_evaluated_and_looked_at",
    "uv run python -m ludic.report gsm8k_eval.jsonl --png": HERE
    + "test_a_small_model_is_trained_evaluated_and_looked_at",
    "python -m ludic.compare before.jsonl after.jsonl": HERE + "test_a_small_model_is_trained_evaluated_and_looked_at",
    "python -m ludic.compare run_a0,run_a1,run_a2 run_b0,run_b1,run_b2": "tests/test_compare.py::"
    "test_seeds_are_compared_by_welchs_test",
    "uv run python examples/eval_sums.py --model checkpoints_sums/step_20 --engine local --max-tokens 16": HERE
    + "test_a_small_model_is_trained_evaluated_and_looked_at",
    **{
        f"uv run python -m ludic.capacity {flags}": "tests/test_capacity.py::test_the_page_is_what_its_commands_print"
        for flags in write_docs.CAPACITY.values()
    },
    "uv run python examples/guessing.py --out-dir out_guessing": HERE
    + "test_a_game_and_a_tool_of_several_turns_are_learnt",
    "uv run python examples/gsm8k/calculator.py --demo --out-dir out_calculator": HERE
    + "test_a_game_and_a_tool_of_several_turns_are_learnt",
    "uv run --group docs mkdocs build --strict": "tests/test_site.py::"
    "test_the_site_is_built_strictly_and_has_every_page_of_docs_and_the_readme",
    "OMP_NUM_THREADS=1 python benchmarks/choosing.py --updates 30 --out OUT": "tests/test_benchmark_choosing.py::"
    "test_a_tiny_run_compares_each_seed_with_its_own_demo_and_is_not_made_twice",
    ".venv-vllm-cpu/bin/python -m ludic.inference.vllm_server --model PATH_OF_A_SMALL_MODEL": "tests/"
    "test_vllm_printed_commands.py::"
    "test_the_commands_that_a_training_prints_start_its_server_start_it_again_and_evaluate_its_checkpoint",
    ".venv-vllm-cpu/bin/python examples/gsm8k/train_gsm8k.py --start-server --model PATH_OF_A_SMALL_MODEL --dataset FOLDER "
    "--max-seq-len 1024": "tests/test_vllm_integration.py::"
    "test_the_training_script_starts_its_own_server_without_a_flag_for_it_and_ends_it",
    "uv run python examples/gsm8k/train_gsm8k.py --lora-rank 16 --lr 1e-5 --engine local --model PATH_OF_A_SMALL_MODEL "
    "--dataset FOLDER --train-steps 3 --rollouts-per-update 32": "tests/test_lora_script.py::"
    "test_the_commands_of_the_page_on_lora_train_resume_and_evaluate",
    "uv run python examples/gsm8k/train_gsm8k.py --lora-rank 16 --lr 1e-5 --engine local --model PATH_OF_A_SMALL_MODEL "
    "--dataset FOLDER --train-steps 4 --rollouts-per-update 32 --resume": "tests/test_lora_script.py::"
    "test_the_commands_of_the_page_on_lora_train_resume_and_evaluate",
    "uv run python examples/gsm8k/eval_gsm8k_vllm.py --model checkpoints_gsm8k/step_4 --engine local --dataset FOLDER "
    "--limit 32": "tests/test_lora_script.py::test_the_commands_of_the_page_on_lora_train_resume_and_evaluate",
}
"""What runs each command that needs neither a GPU nor a network: a test, or the gate itself."""
WHOLE_PAGES = {
    "docs/tutorial.md": "tests/test_tutorial.py::test_whoever_follows_the_tutorial_gets_a_better_policy_and_a_report"
}
"""Pages of which one test runs all commands."""


class Command(NamedTuple):
    page: str
    text: str
    """without its comment, on one line"""
    needs: bool
    """whether it is said to need a GPU or a network"""


def blocks(text: str) -> Iterator[str]:
    """The blocks of commands of a page."""
    yield from re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from (
        re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in re.findall(r"\n\n((?:    \S.*\n)+)", prose)
    )


def commands(page: Path) -> Iterator[Command]:
    name, text = page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8")
    for block in blocks(text):
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        whole_block = bool(lines) and lines[0].startswith("#") and NEEDS.search(lines[0]) is not None
        for line in lines:
            text_of_it = re.split(r"\s+#|\s{3,}|^#", line)[0].strip()
            if text_of_it:
                needs = whole_block or NEEDS.search(line) is not None or ASSIGNS_GPU.match(text_of_it) is not None
                yield Command(name, text_of_it, needs)


ALL = [command for page in DOCUMENTS for command in commands(page)]


def benchmark(text: str) -> str | None:
    """The program among the benchmarks that a command starts, as `benchmarks/README.md` calls it."""
    found = re.search(r"benchmarks/(\w+\.(?:py|sh))|(-m benchmarks\.[\w.]+)|^(make_policy\.py)", text)
    return next(filter(None, found.groups())) if found else None


@functools.cache
def benchmarks_that_are_held() -> frozenset[str]:
    """The rows of the table in benchmarks/README.md: `tests/test_benchmark_commands.py` runs each or says why not."""
    table = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    others = {"run_all.sh", "make_policy.py", "-m benchmarks.ludic_updates"}  # run by tests/test_benchmark*.py as well
    return frozenset(re.findall(r"^\| `([^`]+)`", table, flags=re.MULTILINE)) | others


def measured_on_gpus(command: Command) -> bool:
    """Whether the section of RESULTS.md that a command stands in says that its figures are from GPUs."""
    if command.page != "benchmarks/RESULTS.md":
        return False
    sections = (ROOT / command.page).read_text(encoding="utf-8").split("\n## ")
    return any("H200" in section for section in sections if command.text.split(" --")[0] in section)


def held(command: Command) -> bool:
    """Whether something runs the command. RESULTS.md is a log: its commands were run on the day that it names, with settings
    of that day, so there it is their programs that are held."""
    if command.page in WHOLE_PAGES or command.text in RUN_BY:
        return True
    if command.page == "benchmarks/RESULTS.md" and "examples/gsm8k/train_gsm8k.py" in command.text:
        return True
    return benchmark(command.text) in benchmarks_that_are_held()


def test_every_command_in_every_document_is_run_by_a_test_or_says_that_it_needs_a_gpu_or_a_network() -> None:
    assert len(ALL) > 50
    loose = [c for c in ALL if not (held(c) or c.needs or measured_on_gpus(c))]
    assert [f"{command.page}: {command.text}" for command in loose] == []


def test_what_stands_in_a_block_of_commands_is_a_command() -> None:
    indented = [c for c in ALL if c.page not in WHOLE_PAGES and not PROGRAM.match(c.text)]
    assert [f"{command.page}: {command.text}" for command in indented] == []


def test_no_command_that_is_run_without_a_gpu_is_said_to_need_one() -> None:
    assert [command for command in ALL if command.needs and command.text in RUN_BY] == []


def test_the_tests_that_are_said_to_run_the_commands_exist_and_every_line_of_the_table_is_used() -> None:
    for place in {*RUN_BY.values(), *WHOLE_PAGES.values()} - {GATE}:
        path, _, name = place.partition("::")
        assert re.search(rf"def {name}\(", (ROOT / path).read_text(encoding="utf-8")), place
    gate = (ROOT / GATE).read_text(encoding="utf-8")
    for text in (text for text, place in RUN_BY.items() if place == GATE and text != f"bash {GATE}"):
        words = text.removeprefix("uv run ").removesuffix(" tests/test_packing.py")
        assert re.search(rf"^[^#]*{re.escape(words)}", gate, flags=re.MULTILINE), f"{GATE} does not run {text}"
    printed = {command.text for command in ALL}
    assert [text for text in RUN_BY if text not in printed] == []


# --- run as they are printed --------------------------------------------------------------------------------------------


def run(text: str, folder: Path, *, timeout: float = 600) -> str:
    """What a printed command prints in `folder`; this Python stands in for `uv run python`."""
    assert text in RUN_BY
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        "HF_HUB_OFFLINE": "1",
    }
    program = 'uv() { shift 2; "$PYTHON" "$@"; }; python() { "$PYTHON" "$@"; }; ' + text
    done = subprocess.run(
        ["bash", "-c", program],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}"
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Stands in for a clone."""
    for name in ("examples", "environments"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def printed(*beginnings: str) -> list[str]:
    """The commands of the table that begin so, in its order."""
    return [text for text in RUN_BY if text.removeprefix("uv run ").startswith(beginnings)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_learns(folder: Path) -> None:
    (command,) = (text for text in RUN_BY if text.endswith("--demo"))
    output = run(command, folder)
    summary = json.loads((folder / "gsm8k_train_summary.json").read_text())
    assert summary["accuracy_after"] > summary["accuracy_before"] + 0.2, output[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_game_and_a_tool_of_several_turns_are_learnt(folder: Path) -> None:
    for command in (text for text in RUN_BY if "guessing.py" in text or "calculator.py" in text):
        output = run(command, folder)
        (summary,) = (folder / command.rpartition(" ")[2]).glob("*_summary.json")
        figures = json.loads(summary.read_text())
        assert figures["accuracy_after"] > figures["accuracy_before"] + 0.2, output[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_demo_is_forecast_trained_and_repeated_from_its_file(folder: Path) -> None:
    forecast, training = printed("python examples/gsm8k/train_gsm8k.py --demo --train-steps 20")
    (again,) = printed("python examples/gsm8k/train_gsm8k.py --config")
    assert "forecast of 20 updates" in run(forecast, folder)
    assert "the forecast, and what came true" in run(training, folder)
    run(again, folder)
    rollouts = [(folder / place / "gsm8k_train_rollouts.jsonl").read_bytes() for place in ("", "again")]
    assert rollouts[0] == rollouts[1] != b""


def test_the_completion_of_two_commands_is_one_file_that_bash_reads(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    for command in (text for text in RUN_BY if "--print-completion" in text):
        run(command, folder)
    script = folder / ".ludic-completion.bash"
    assert "--max-rollouts" in script.read_text() and "--train-steps" in script.read_text()
    assert subprocess.run(["bash", "-c", f"source {script}"], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_model_is_trained_evaluated_and_looked_at(
    folder: Path, digit_policy_dir: Path, digit_problems: Path
) -> None:
    (folder / "PATH_OF_A_SMALL_MODEL").symlink_to(digit_policy_dir)
    (folder / "FOLDER").symlink_to(digit_problems)
    train, evaluate = printed(
        "python examples/gsm8k/train_gsm8k.py --engine", "python examples/gsm8k/eval_gsm8k_vllm.py --engine"
    )
    run(train, folder)
    assert (folder / "checkpoints_gsm8k" / "step_3" / "model.safetensors").is_file()
    (doctor,) = printed("python -m ludic.doctor --config")
    assert ", 0 failed" in run(doctor, folder)
    assert "accuracy" in run(evaluate, folder)
    (lm_eval,) = printed("python examples/lm_eval_files.py")
    run(lm_eval, folder)
    assert list(folder.glob("lm_eval/*/samples_gsm8k_*.jsonl"))

    for name in ("OUT_DIR", "OTHER"):
        (folder / name).mkdir()
        for path in folder.glob("gsm8k_train_*.json*"):
            shutil.copy(path, folder / name)
    for command in (text for text in printed("python -m ludic.report") if "--print-completion" not in text):
        written = re.findall(r"written: (\S+)", run(command, folder))
        assert written and all((folder / path).is_file() for path in written), (command, written)

    for name in ("before", "after"):
        for path in folder.glob("gsm8k_eval.jsonl*"):
            shutil.copy(path, folder / path.name.replace("gsm8k_eval", name))
    compare, _ = printed("python -m ludic.compare")
    assert "By the rule flexible, on 32 problems" in run(compare, folder)

    (folder / "checkpoints_sums").mkdir()
    (folder / "checkpoints_sums" / "step_20").symlink_to(digit_policy_dir)
    (sums,) = printed("python examples/eval_sums.py")
    assert "320" in run(sums, folder)  # a fifth of 40 x 40 sums


@pytest.mark.slow
def test_the_documents_are_written_from_the_code(tmp_path: Path) -> None:
    for name in ("scripts", "docs", "examples", "environments"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    flags = tmp_path / "docs" / "flags.md"
    flags.write_text(flags.read_text().replace("| `--group-size", "| `--grown-size", 1))
    (command,) = printed("python scripts/write_docs.py")
    run(command, tmp_path)
    assert flags.read_text() == (ROOT / "docs" / "flags.md").read_text()
