"""What others wrote stays data: a model's folder runs no code, and no name in a file becomes a path of our own."""

import argparse
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import pytest
import torch
from rich.console import Console

from ludic.rollout.evaluation import EvaluationProgress, EvaluationResult, summarise
from ludic.rollout.problems import CompletionRecord, ProblemRecord
from ludic.run.evaluation import check_same_settings, earlier_settings
from ludic.storage.inert import InertFormatter, inert, inert_lines
from ludic.task.pretrained import load_config, load_model
from ludic.task.prompts import encode_prompt, load_tokenizer
from ludic.telemetry.progress import EvaluationDisplay
from ludic.telemetry.report import comparison_table, evaluation_table
from tests.fake_vllm import FakeServer, serving
from tests.vllm_helpers import CHAT_TEMPLATE

CODE = """
from pathlib import Path
Path({marker!r}).write_text("executed")
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

class OwnConfig(Qwen2Config):
    model_type = "own"

class OwnModel(Qwen2ForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(autouse=True)
def modules_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers copies a folder's code to and imports it from, and a standard input that answers nobody."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "stdin", _NobodyThere())


class _NobodyThere:
    """A terminal that says it is one; a question to it is a failure."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError("no descriptor")

    def readline(self, _: int = -1) -> str:
        raise AssertionError("somebody waits for an answer on the terminal")


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be made hostile."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def with_code(folder: Path, marker: Path, *, model_type: str) -> None:
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change(folder / "config.json", model_type=model_type, auto_map=auto_map)


def with_tokenizer_code(folder: Path, marker: Path) -> None:
    with_code(folder, marker, model_type="own")  # of a model that it knows, transformers takes its own tokenizer
    auto_map = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    change(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto_map)


@pytest.mark.parametrize("load", [load_config, load_model])
def test_the_code_in_a_models_folder_is_refused_in_one_line_and_runs_only_with_the_flag(
    folder: Path, marker: Path, load: Callable[..., Any]
) -> None:
    with_code(folder, marker, model_type="own")
    with pytest.raises(ValueError, match=r"brings Python code of its own: .* --trust-remote-code") as caught:
        load(folder)
    assert "\n" not in str(caught.value) and not marker.exists()
    assert type(load(folder, trust_remote_code=True)).__name__ in ("OwnConfig", "OwnModel")
    assert marker.exists()


def test_the_code_of_a_tokenizer_is_refused_in_one_line_and_runs_only_with_the_flag(folder: Path, marker: Path) -> None:
    with_tokenizer_code(folder, marker)
    with pytest.raises(ValueError, match=r"brings Python code of its own: .* --trust-remote-code") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value) and not marker.exists()
    assert type(load_tokenizer(folder, trust_remote_code=True)).__name__ == "OwnTokenizer"
    assert marker.exists()


def test_a_model_that_transformers_knows_itself_loads_without_the_code_beside_it(folder: Path, marker: Path) -> None:
    with_code(folder, marker, model_type="qwen2")
    assert type(load_model(folder)).__name__ == "Qwen2ForCausalLM"
    assert not marker.exists()


@pytest.mark.parametrize("value", ["someone/kernels", "someone/kernels:attention", {"": "someone/kernels@v1"}])
def test_attention_that_config_json_would_fetch_from_elsewhere_is_refused(folder: Path, value: object) -> None:
    change(folder / "config.json", _attn_implementation=value)
    with pytest.raises(ValueError, match=r"attention from 'someone/kernels.*code from elsewhere.*--trust-remote-code"):
        load_model(folder)


class _Payload:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[..., IO[Any]], tuple[str, str]]:
        return open, (str(self._marker), "w")


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_weights_in_a_pickle_are_refused_and_not_unpickled(folder: Path, marker: Path, trust_remote_code: bool) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": _Payload(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"no model could be loaded .*safetensors.*pickles, which can run code"
    ) as caught:
        load_model(folder, trust_remote_code=trust_remote_code)
    assert "\n" not in str(caught.value) and not marker.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").write_text("[" * 100_000),
        lambda folder: (folder / "config.json").write_text("[]"),
        lambda folder: change(folder / "config.json", hidden_size="../../etc"),
        lambda folder: change(folder / "config.json", num_attention_heads=0),
        lambda folder: change(folder / "config.json", vocab_size=-1),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100),
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000]),
    ],
)
def test_a_damaged_model_is_refused_in_one_line(folder: Path, damage: Callable[[Path], object]) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=r"no (model|configuration) could be loaded for") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% include '/etc/hostname' %}",
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch executed') }}",
        "{{ 1 + 'a' }}",
        "{{ 1 / 0 }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ messages.append(1) }}",
        "{% for number in range(10 ** 9) %}x{% endfor %}",
    ],
)
def test_a_chat_template_that_reaches_for_more_than_its_messages_is_refused_in_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / "chat_template.jinja").write_text(template + CHAT_TEMPLATE)
    with pytest.raises(ValueError, match=r"the chat template of .* is broken"):
        load_tokenizer(folder)
    assert not (tmp_path / "executed").exists()


def test_no_name_in_a_tokenizers_files_becomes_a_path_when_it_is_saved(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    templates = [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "../../../out", "template": "hostile"}]
    change(folder / "tokenizer_config.json", chat_template=templates)
    tokenizer = load_tokenizer(folder)
    assert encode_prompt(tokenizer, [{"role": "user", "content": "1 + 1"}])
    tokenizer.save_pretrained(tmp_path / "checkpoint" / "step_1")
    written = {path for path in tmp_path.rglob("*") if path.is_file() and folder not in path.parents}
    assert written and all(path.parent == tmp_path / "checkpoint" / "step_1" for path in written)
    assert not any("out" in path.name for path in written)


def test_a_vocabulary_outside_the_models_folder_is_not_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text(json.dumps({"secret-token": 5000}))
    change(folder / "tokenizer_config.json", added_tokens_file=os.fspath(tmp_path / "secret.json"))
    assert "secret-token" not in load_tokenizer(folder).get_vocab()


# --- what is shown does nothing to a terminal -----------------------------------------------------------------------------

HOSTILE = [
    "\x1b]52;c;cm0gLXJmIH4=\x07",  # puts text into the clipboard
    "\x1b]8;;https://evil.example\x1b\\click\x1b]8;;\x1b\\",  # a link
    "\x1b]0;owned\x07\x1b]2;owned\x1b\\",  # the window's title
    "\x1b[2J\x1b[H\x1b[31mred\x1b[?1049h\x1b[6n",  # clears, moves, colours, asks for an answer on standard input
    "\x1bP+q544e\x1b\\\x1bc\x1b_Gf=100\x1b\\",  # device control, reset, graphics
    "\x9b31m\x9d0;owned\x9c\x90q\x9c\x85",  # the same in C1
    "\x07" * 5_000,
    "accuracy 3%\raccuracy 99%",
    "a\b\bB\x7f\x0b\x0c\x00",
    "\u202e\u2066gnp.exe\u2069\u200f\u061c",
    "\u200b\ufeff\u2060\U000e0041\u00ad",
    "a" + "\u0301\u0489" * 500,
    "\ud800\udfff",
    "line\nstep 40/40  reward 1.000\u2028\u2029",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_acts_on_a_terminal_is_shown_and_not_obeyed(text: str) -> None:
    shown = inert(text)
    assert shown.isprintable() and len(shown) <= 604
    shown.encode()
    assert "\n".join(shown.splitlines()) == shown
    assert re.search("[\u0300-\u036f\u0483-\u0489]{4}", shown) is None


@pytest.mark.parametrize(
    "text", ["Grüße, 你好, שלום, हिन्दी, ทั้งหมด", r"so \boxed{\frac{1}{2}} = 50\%", "[bold]x[/bold] 🙂 €", ""]
)
def test_text_that_does_nothing_stays_as_it_is(text: str) -> None:
    assert inert(text) == text


def test_a_long_text_is_cut_before_it_is_looked_at() -> None:
    assert inert("x" * 10**8, 5) == "xxxxx ..."
    assert inert("\x1b" * 10**8, 6) == r"\x1b\x ..."
    assert inert_lines("a\x07\nb" + "c" * 20, 5) == "a\\x07\nbcccc ..."


@pytest.mark.parametrize("text", HOSTILE)
def test_a_log_line_stays_one_line_that_does_nothing(text: str) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(InertFormatter("%(name)s: %(message)s"))
    logger = logging.Logger("a\x1b[1mb")
    logger.addHandler(handler)
    try:
        raise ValueError(text)
    except ValueError as error:
        logger.warning("the server said %s", error)
        logger.exception("with a trace of %s", text)
    first, second, *trace = stream.getvalue().split("\n")
    assert first.startswith(r"a\x1b[1mb: the server said") and second.startswith(r"a\x1b[1mb: with a trace of")
    assert trace[0] == "Traceback (most recent call last):"
    assert all(line.isprintable() for line in (first, second, *trace))


MARKUP = "[link=https://evil.example]me[/link] [red]x[/] [@click=app.bell]y[/] :boom: $\\alpha$ [/nothing]"


@pytest.mark.parametrize("text", [*(text[:20] for text in HOSTILE), MARKUP])
@pytest.mark.parametrize("terminal", [True, False])
def test_names_of_others_in_tables_and_progress_are_neither_markup_nor_escapes(text: str, terminal: bool) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    summary = _result().to_summary(model=text, settings={})
    console = Console(file=stream, force_terminal=terminal, width=200)
    console.print(comparison_table(summary, summary, title=text))
    console.print(evaluation_table(_result(), title=text))
    with EvaluationDisplay(text, stream=stream) as display:
        display(EvaluationProgress(num_done=4, num_problems=4, accuracy=0.5, completion_tokens=9, seconds=1.0))
    written = stream.getvalue()
    # rich's own: colours, cursor movements and the hiding of the cursor.
    plain = re.sub(r"\x1b\[[0-9;]*[mAK]|\x1b\[\?25[lh]", "", written) if terminal else written
    assert all(line.isprintable() for line in plain.replace("\r", "\n").split("\n"))
    assert plain.count(inert(text)[:12]) >= 3  # a narrow line cuts the rest


def _result() -> EvaluationResult:
    completion = CompletionRecord(
        text="7",
        num_tokens=3,
        finish_reason="stop",
        answer="7",
        parse_error=None,
        correct=True,
        grader_failed=False,
        policy_version=0,
    )
    record = ProblemRecord(index=0, question_id="q", prompt=[], prompt_tokens=5, target="7", completions=[completion])
    return summarise([record], rules=("correct",), seconds=1.0)


# --- no path from data or from a reply --------------------------------------------------------------------------------------

PATHS = [
    "../../../escaped",
    "/tmp/escaped-ludic",
    "a/../../../escaped",
    "..\\escaped",
    "~/escaped",
    "con\0escaped",
    "escaped\n/x",
]


async def test_a_problem_an_answer_or_a_name_that_looks_like_a_path_is_only_written_into_our_own_files(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation in which every string that others choose is a path, with a server that says paths too."""
    problems = tmp_path / "problems.jsonl"
    texts = [*PATHS, *HOSTILE[:-2], MARKUP]
    usable = [text for text in texts if text.strip()]
    rows = [{"question": text, "answer": f"{text}\n#### {text}", "id": text, "path": text} for text in usable]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "a" / "b" / "out"
    tokenizer = load_tokenizer(tiny_model_dir)
    server = _PathServer(tokenizer=tokenizer, model=str(tiny_model_dir), max_model_len=100_000)  # type: ignore[arg-type]
    before = set(tmp_path.rglob("*"))
    async with serving(server):
        words = ["--model", str(tiny_model_dir), "--dataset", str(problems), "--max-tokens", "4", "--out-dir", str(out)]
        words += ["--port", server.base_url.rpartition(":")[2]]
        script = _script("eval_gsm8k_vllm")
        monkeypatch.syspath_prepend(str(Path(script.__file__ or "").parent))  # as when the script is run
        assert await script.run(script.build_parser().parse_args(words)) == 0
    made = {path.relative_to(out).as_posix() for path in set(tmp_path.rglob("*")) - before if out in path.parents}
    endings = ("settings.json", "summary.json", "prompt.json", "config.toml", "report.html")
    names = {"gsm8k_eval.jsonl", *(f"gsm8k_eval.jsonl.{ending}" for ending in endings)}
    assert made == names and set(tmp_path.rglob("*")) - before == {
        out,
        out.parent,
        out.parent.parent,
        *map(out.joinpath, names),
    }
    assert not Path("/tmp/escaped-ludic").exists()
    assert len(server.requests) == len(usable)
    printed = capsys.readouterr()
    assert all(line.isprintable() for line in (printed.out + printed.err).split("\n"))
    for name in names:
        content = (out / name).read_bytes()
        assert all(32 <= byte < 127 for byte in content.replace(b"\n", b"")), name


class _PathServer(FakeServer):
    """Says more than it is asked, and all of it paths."""

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        return {**super().answer(body), "path": PATHS[0], "file": PATHS[1], "log": PATHS[2]}


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "examples" / "gsm8k" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("content", ["", "{", '{"model": "\\u001b[2J' + "x" * 10_000 + '"}'])
def test_a_damaged_or_odd_settings_file_beside_old_records_is_refused_in_one_short_line(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "records").write_text("{}\n")
    (tmp_path / "records.settings.json").write_text(content)
    args = argparse.Namespace(overwrite=False, resume_eval=True)
    with pytest.raises(ValueError, match=r"--overwrite|use another --out") as caught:
        check_same_settings(earlier_settings(args, tmp_path / "records") or {}, {"model": "m"})
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1_000
