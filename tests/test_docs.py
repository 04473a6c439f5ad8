"""The documentation says what is so: its tables, fields, commands, links and its example are held against the code."""

import ast
import dataclasses
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM

import pytest

from environments.gsm8k import GSM8K
from ludic.config import RunPaths, from_arguments
from ludic.rollout.evaluation import summarise
from ludic.rollout.problems import Problem, ProblemRecord
from ludic.survival.signals import SIGNALS
from ludic.telemetry import alarms
from ludic.telemetry.alarms import ALARM_NAMES
from ludic.train.summary import TrainingSummary
from ludic.types import Completion, ParseResult, Score
from scripts import write_docs

ROOT = write_docs.ROOT
DOCS = sorted((ROOT / "docs").glob("*.md"))
NAMES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "AGENTS.md", "SECURITY.md", "examples/gsm8k/README.md")
PAGES = [*(ROOT / name for name in NAMES), *DOCS]
EVERY_PAGE = sorted(
    {*PAGES, *(ROOT / "benchmarks").glob("*.md"), *(ROOT / "tests").rglob("*.md"), *(ROOT / "examples").rglob("*.md")}
)


def _page(name: str) -> str:
    """The text of a page of docs/, by the name of its file without the ending."""
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def _section(name: str, title: str) -> str:
    """The text of a page between a heading and the next one."""
    _, found, rest = _page(name).partition(title)
    assert found, f"docs/{name}.md has no {title!r}"
    return rest.split("\n## ", 1)[0]


def _first_cells(text: str) -> list[tuple[str, str]]:
    """(backquoted words of the first cell, the rest of the row) of each table row."""
    rows = [line.strip("| ").split(" | ", 1) for line in text.splitlines() if line.startswith("| ")]
    return [(name, rest) for first, rest in rows for name in re.findall(r"`([^`]+)`", first)]


def _code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@dataclasses.dataclass(frozen=True)
class ExampleRun:
    """What the task of docs/api.md wrote."""

    output: str
    metrics: list[dict[str, object]]
    rollouts: list[dict[str, object]]
    checkpoint: Path


@pytest.fixture(scope="module")
def example_run(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[ExampleRun]:
    (program,) = _code_blocks(_section("api", "## A task of your own"), "python")
    folder = tmp_path_factory.mktemp("sums")
    script = folder / "sums.py"
    script.write_text(program, encoding="utf-8")
    output = folder / "output.txt"
    with pytest.MonkeyPatch.context() as patch, output.open("w", encoding="utf-8") as stream:
        patch.setattr(sys, "argv", [str(script), str(tiny_model_dir)])
        patch.setattr(sys, "stdout", stream)
        patch.chdir(folder)
        runpy.run_path(str(script), run_name="__main__")
    paths = RunPaths(out_dir=folder, name="sums")
    yield ExampleRun(
        output=output.read_text(encoding="utf-8"),
        metrics=[json.loads(line) for line in paths.metrics.read_text(encoding="utf-8").splitlines()],
        rollouts=[json.loads(line) for line in paths.rollouts.read_text(encoding="utf-8").splitlines()],
        checkpoint=paths.checkpoints / "step_2",
    )


def test_the_example_task_trains_two_updates_and_leaves_a_checkpoint(example_run: ExampleRun) -> None:
    assert "right before: 0.0, after: 0.0" in example_run.output
    assert f"checkpoints_sums/{example_run.checkpoint.name}" in example_run.output
    assert (example_run.checkpoint / "model.safetensors").is_file()
    assert [row["step"] for row in example_run.metrics if "reward_mean" in row] == [1, 2]


def test_the_warm_start_of_the_example_makes_its_policy_answer_so_that_there_is_something_to_learn(
    example_run: ExampleRun,
) -> None:
    rewards = [float(str(row["reward_mean"])) for row in example_run.metrics if "reward_mean" in row]
    assert min(rewards) > 0.05  # 0.1 for a number; random weights write none


def test_every_logged_metric_is_explained_and_every_explained_metric_is_logged(example_run: ExampleRun) -> None:
    logged = {name for row in example_run.metrics for name in row if name not in ("step", "time", "event")}
    logged = {re.sub(r"^sync/\w+_s$", "sync/PHASE_s", name) for name in logged}
    explained = dict(_first_cells(_section("metrics", "## Metrics\n")))
    conditional = {name for name, meaning in explained.items() if "only with" in meaning}
    assert logged - explained.keys() == set()
    assert explained.keys() - conditional - logged == set()


def test_the_fields_of_a_rollout_are_the_documented_ones(example_run: ExampleRun) -> None:
    documented = [name for name, _ in _first_cells(_section("files", "Fields of `gsm8k_train_rollouts.jsonl`"))]
    assert len(example_run.rollouts) == 64
    assert all(sorted(row) == sorted(documented) for row in example_run.rollouts)


def test_the_fields_of_the_training_summary_are_the_documented_ones() -> None:
    documented = {name for name, _ in _first_cells(_section("files", "Fields of `gsm8k_train_summary.json`"))}
    assert documented == {field.name for field in dataclasses.fields(TrainingSummary)} | {"this_process", "model"}


def test_the_fields_of_an_evaluation_record_are_the_documented_ones() -> None:
    documented = {name for name, _ in _first_cells(_section("files", "Fields of `gsm8k_eval.jsonl`\n"))}
    record = _evaluation_record()
    assert documented == {*record, *record["completions"][0]}


def _evaluation_record() -> ProblemRecord:
    """A problem of GSM8K with two answers."""
    problem = Problem(index=0, question_id="", messages=[], prompt_token_ids=[1, 2, 3], target="1")
    completion = Completion(token_ids=[1, 2], logprobs=None, finish_reason="stop", policy_version=0)
    parts = dict.fromkeys(GSM8K.rules, 1.0)
    score = Score(reward=1.0, correct=True, parse=ParseResult(answer="1"), parts=parts)
    return problem.record([(completion, "1", score)] * 2, GSM8K.rules)


def test_the_fields_of_an_evaluation_summary_are_the_documented_ones() -> None:
    summary = summarise([_evaluation_record()], rules=GSM8K.rules, seconds=1.0).to_summary(model="m", settings={})
    documented = {name for name, _ in _first_cells(_section("files", "Fields of `gsm8k_eval.jsonl.summary.json`"))}
    of_k = {f"{name}@{k}" for name in ("pass", "maj") for k in (1, 2, "K")}
    assert documented - of_k == summary.keys() - of_k and len(summary.keys() & of_k) == len(documented & of_k) == 4


def test_every_file_of_a_run_is_in_the_table_of_files() -> None:
    documented = {name.rstrip("/") for name, _ in _first_cells(_section("files", "## Files that a run writes"))}
    paths = RunPaths(out_dir=Path(), name="gsm8k")
    named = {paths.rollouts, paths.start, paths.config, paths.metrics, paths.summary, paths.curve, paths.report}
    assert {str(path) for path in named | {paths.forecast}} <= documented
    assert {f"{paths.checkpoints}/step_N", str(paths.tensorboard)} <= documented


@pytest.mark.parametrize("page", write_docs.DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_generated_tables_are_those_of_the_code(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert write_docs.rendered(text) == text, "run `uv run python scripts/write_docs.py`"


def test_every_generated_table_stands_on_one_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in write_docs.DOCUMENTS)
    assert [part for part in write_docs.PARTS if text.count(f"<!-- {part}:begin -->") != 1] == []


def test_the_readme_leads_to_every_page_of_docs() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(DOCS) >= 9
    assert [page.name for page in DOCS if f"](docs/{page.name})" not in readme] == []


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_a_page_opens_with_what_it_is_for(page: Path) -> None:
    title, opening, *_ = page.read_text(encoding="utf-8").split("\n\n")
    assert re.fullmatch(r"# [^\n]+", title)
    assert re.match(r"[A-Z]", opening) and opening.endswith(".") and len(re.findall(r"\.(?:\s|$)", opening)) <= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_documentation_are_accepted_by_the_scripts(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, evaluation = write_docs.train_parser(), write_docs.eval_parser()
    text = page.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"--config (\S+\.toml)", text):
        Path(name).write_text("".join(_code_blocks(text, "toml")), encoding="utf-8")
    for line in "".join(_code_blocks(text, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if "--print-completion" in words:  # ends the parser, as --help does; tests/test_help.py has it
            continue
        if "examples/gsm8k/train_gsm8k.py" in words:
            from_arguments(train.parse_args(words[words.index("examples/gsm8k/train_gsm8k.py") + 1 :]))
        if "examples/gsm8k/eval_gsm8k_vllm.py" in words:
            evaluation.parse_args(words[words.index("examples/gsm8k/eval_gsm8k_vllm.py") + 1 :])


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                target
            )


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:src|tests|environments|examples|scripts|benchmarks|docs)/[\w/.]+)`", text)
    assert [path for path in named if path.endswith((".py", "/")) and not (ROOT / path).exists()] == []


def test_the_functions_on_a_samples_way_are_in_the_files_that_are_named() -> None:
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \| ([^|]+) \|$", _page("walk"), flags=re.MULTILINE)
    rows = [(functions, links) for functions, links in rows if "`" in functions]
    assert len(rows) >= 15
    for functions, links in rows:
        text = "".join(
            (ROOT / "docs" / link).read_text(encoding="utf-8") for link in re.findall(r"\]\(([^)]+)\)", links)
        )
        for function in re.findall(r"`(\w+)`", functions):
            assert re.search(rf"def {function}\b", text), f"{function} is not in {links}"


def test_every_alarm_is_in_the_table_of_alarms_with_metrics_and_flags_that_exist() -> None:
    rows = [line.strip("| ").split(" | ") for line in _section("metrics", "## Why isn't it learning?").splitlines()]
    rows = [row for row in rows if len(row) == 5 and row[0].startswith("`")]
    assert [row[0].strip("`") for row in rows] == list(ALARM_NAMES)
    explained = dict(_first_cells(_section("metrics", "## Metrics\n")))
    assert {row[1].strip("`") for row in rows} <= explained.keys()
    flags = {flag for row in rows for flag in re.findall(r"`(--[a-z-]+)", row[4])}
    assert len(flags) >= 10 and flags <= write_docs.train_parser()._option_string_actions.keys()


def test_the_thresholds_in_the_table_of_alarms_are_those_of_the_code() -> None:
    rows = {name: rest.split(" | ")[1] for name, rest in _first_cells(_section("metrics", "## Why isn't it learning?"))}
    said = {
        "truncated": [alarms.WINDOW, alarms.TRUNCATED_SHARE],
        "zero_variance": [alarms.WINDOW, alarms.ZERO_VARIANCE_SHARE],
        "parse_rate": [alarms.WINDOW, alarms.PARSE_RATE_FALL, 2],
        "entropy": [alarms.WINDOW, alarms.WINDOW],
        "logprob_gap": [alarms.WINDOW, alarms.LOGPROB_GAP_RISE, alarms.WINDOW, alarms.LOGPROB_GAP_NATS],
        "changed_weights": [alarms.WINDOW, alarms.CHANGED_WEIGHTS_SHARE],
        "reward_flat": [alarms.FLAT_UPDATES, alarms.SOLVED_RATE],
        "clipping": [alarms.CLIPPED_UPDATES],
        "grader": [100 * alarms.GRADER_FAILURE_SHARE, alarms.WINDOW, alarms.GRADER_FAILURES],
        "queue": [alarms.QUEUE_UPDATES, alarms.GENERATION_SLOWDOWN, alarms.GENERATION_SLOWDOWN_S],
    }
    found = {name: [float(figure) for figure in re.findall(r"\d+(?:\.\d+)?", rows[name])] for name in said}
    assert found == said and "a fifth" in rows["entropy"] and alarms.ENTROPY_SHARE == 1 / 5


def test_the_exit_codes_of_signals_are_those_of_the_code() -> None:
    codes = ", ".join(str(128 + number) for number in (SIGINT, SIGTERM, SIGHUP))
    assert {SIGINT, SIGTERM, SIGHUP} == set(SIGNALS)
    assert f"| {codes} | ended by SIGINT (Ctrl-C), SIGTERM, SIGHUP |" in _section("promises", "## Exit codes")


def test_what_the_page_of_promises_quotes_is_said_by_the_code() -> None:
    text = _page("promises")
    quoted = ["continuing from", "the server was lost:", "changed since the checkpoint, so this is not the run"]
    strings = _strings_of_the_code()
    assert all(words in text and any(words in string for string in strings) for words in quoted)
    counted = {
        "server_recoveries",
        "request_retries",
        "bad_replies",
        "grader_failures",
        "grader_timeouts",
        "skipped_update",
    }
    assert counted <= set(re.findall(r"`(\w+)`", text)) & dict(_first_cells(_section("metrics", "## Metrics\n"))).keys()


def _strings_of_the_code() -> list[str]:
    files = [path for folder in ("src", "environments", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_the_messages_under_troubleshooting_are_messages_of_the_code() -> None:
    messages = [name for name, _ in _first_cells(_page("troubleshooting")) if " " in name]
    strings = _strings_of_the_code()
    assert len(messages) >= 10
    assert [message for message in messages if not any(message in string for string in strings)] == []
