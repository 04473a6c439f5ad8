"""A chat template that renders the date: prompts are the same token ids on every day of a run, and of an evaluation.

Days go by on a clock that is put in the place of ours, and of transformers', which a server renders with.
"""

import copy
import datetime
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from transformers import PreTrainedTokenizerFast

from environments.gsm8k import GSM8K
from ludic.config import RunPaths, from_arguments
from ludic.inference.client.handshake import check_chat_template
from ludic.rollout.errors import ServerMismatchError
from ludic.rollout.problems import read_records
from ludic.run.preparation import prepare
from ludic.survival.changed_settings import changed_settings
from ludic.task.prompts import encode_prompt, load_tokenizer, recorded_moment, rendering
from ludic.train.checkpoint import read_state
from ludic.types import ChatMessage
from tests.vllm_helpers import CHAT_TEMPLATE, make_tiny_model, make_tiny_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples" / "gsm8k"
CHAT: list[ChatMessage] = [{"role": "user", "content": "2 + 2?"}]
DAY = "<|system|>It is {{ strftime_now('%A, %d %B %Y') }}.<|end|>"
DATED = {
    "a day": DAY + CHAT_TEMPLATE,
    "a minute": DAY.replace("%Y", "%Y, %H:%M:%S.%f") + CHAT_TEMPLATE,
    "a default that can be given": "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "<|system|>Today Date: {{ date_string }}<|end|>" + CHAT_TEMPLATE,
    "in a macro": "{% macro head(format) %}<|system|>{{ strftime_now(format) }}<|end|>{% endmacro %}{{ head('%y%m%d') }}"
    + CHAT_TEMPLATE,
    "with a system turn only": "{% if messages[0].role == 'system' %}{{ strftime_now('%x') }}{% endif %}"
    + CHAT_TEMPLATE,
}
UNDATED = {
    "none": CHAT_TEMPLATE,
    "a fixed one": "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "<|system|>{{ date_string }}<|end|>" + CHAT_TEMPLATE,
}


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets this process's clock, and that of a server."""

    def set_clocks(ours: str, servers: str | None = None) -> None:
        for module, text in (
            ("ludic.task.prompts", ours),
            ("ludic.inference.client.handshake", ours),
            ("transformers.utils.chat_template_utils", servers or ours),
        ):

            class Clock(datetime.datetime):
                moment = datetime.datetime.fromisoformat(text)

                @classmethod
                def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
                    return cls.moment

            monkeypatch.setattr(f"{module}.datetime", Clock)

    return set_clocks


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def saved(folder: Path, template: str) -> Path:
    tokenizer_with(template).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("template", DATED.values(), ids=DATED)
def test_a_date_stays_that_of_the_first_prompt_and_is_that_of_the_record_in_another_process(
    at: Callable[..., None], tmp_path: Path, template: str
) -> None:
    chat: list[ChatMessage] = [{"role": "system", "content": "Think."}, *CHAT]
    folder = saved(tmp_path, template)
    at("2031-05-06T23:59:59.250")
    tokenizer = load_tokenizer(folder)
    first, record = encode_prompt(tokenizer, chat), rendering(tokenizer)
    at("2032-11-17T00:00:01")
    assert encode_prompt(tokenizer, chat) == first and rendering(tokenizer) == record
    assert encode_prompt(load_tokenizer(folder), chat) != first
    again = load_tokenizer(folder, moment=recorded_moment(json.loads(json.dumps(record))))
    assert encode_prompt(again, chat) == first and rendering(again) == record
    assert record["rendered_at"] == "2031-05-06T23:59:59"


@pytest.mark.parametrize("template", UNDATED.values(), ids=UNDATED)
def test_without_a_date_there_is_none_in_the_record(at: Callable[..., None], template: str) -> None:
    at("2031-05-06")
    record = rendering(tokenizer_with(template))
    assert record.keys() == {"rendered_chat", "rendered_ids"}
    at("2032-05-06")
    assert rendering(tokenizer_with(template)) == record


def test_the_record_holds_what_is_rendered_with_a_system_turn_and_without() -> None:
    assert rendering(make_tiny_tokenizer())["rendered_chat"] == (
        "<|system|>Be brief.<|end|><|user|>1 + 1<|end|><|assistant|>\n<|user|>1 + 1<|end|><|assistant|>"
    )
    strict = tokenizer_with(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
    )
    assert rendering(strict)["rendered_chat"] == "refused: no system\n<|user|>1 + 1<|end|><|assistant|>"


def test_the_ids_differ_where_only_the_tokenizer_does() -> None:
    other = make_tiny_tokenizer()
    other.add_tokens(["brief"])
    one, two = rendering(make_tiny_tokenizer()), rendering(other)
    assert one["rendered_chat"] == two["rendered_chat"] and one["rendered_ids"] != two["rendered_ids"]
    (line,) = changed_settings(one, two)
    assert line.startswith("the fingerprint of the token ids of what the chat template renders was ")


def test_a_resume_says_what_changed_in_the_prompts_and_keeps_quiet_about_what_was_not_recorded(
    at: Callable[..., None],
) -> None:
    at("2031-05-06")
    plain, dated = rendering(make_tiny_tokenizer()), rendering(tokenizer_with(DAY + CHAT_TEMPLATE))
    assert changed_settings({}, plain) == []
    assert changed_settings({}, dated) == [
        "the date in the prompts is '2031-05-06T00:00:00', the checkpoint was made without it"
    ]
    lines = changed_settings(dated, plain)
    assert len(lines) == 2 and lines[0].startswith(
        "what the chat template renders was '<|system|>It is Tuesday, 06 May"
    )


@pytest.mark.parametrize("text", ["yesterday", 7, ""])
def test_a_recorded_date_that_is_none_is_one_line(text: object) -> None:
    with pytest.raises(ValueError, match="is not in ISO format"):
        recorded_moment({"rendered_at": text})


# --- the server's own date --------------------------------------------------------------------------------------------


class Server:
    """Renders with its own clock, as vLLM does."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def ask(self, _method: str, _path: str, _key: str, *, json_body: dict[str, object]) -> dict[str, object]:
        messages = json_body["messages"]
        return {"tokens": self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)}  # type: ignore[arg-type]


@pytest.mark.parametrize("servers", ["2032-01-01T07:30", "2031-12-31T22:30", "2031-12-31T20:00", "2032-01-01T21:30"])
def test_a_server_may_render_its_own_date_in_its_own_time_zone(at: Callable[..., None], servers: str) -> None:
    at("2032-01-01T07:30", servers)
    for template in (DAY + CHAT_TEMPLATE, DAY.replace("%Y", "%Y, %H:%M") + CHAT_TEMPLATE):
        ours = tokenizer_with(template)
        at("1999-01-01", servers)
        encode_prompt(ours, CHAT)  # a run of long ago
        at("2032-01-01T07:30", servers)
        check_chat_template(Server(copy.deepcopy(ours)), "m", ours)  # type: ignore[arg-type]


def test_another_template_is_still_found_where_it_renders_the_date_too(at: Callable[..., None]) -> None:
    at("2032-01-01T07:30")
    ours, theirs = tokenizer_with(DAY + CHAT_TEMPLATE), tokenizer_with(DAY.replace("It is", "Now:") + CHAT_TEMPLATE)
    with pytest.raises(ServerMismatchError, match="chat template is not the trainer's"):
        check_chat_template(Server(theirs), "m", ours)  # type: ignore[arg-type]


# --- the scripts ------------------------------------------------------------------------------------------------------


def program(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec.loader.exec_module(module)
    return module


async def test_a_run_that_is_resumed_days_later_trains_on_the_prompts_of_its_first_day(
    at: Callable[..., None],
    digit_policy_dir: Path,
    digit_problems: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = program("train_gsm8k", monkeypatch)
    (tmp_path / "dated.jinja").write_text(DATED["a minute"])
    words = [
        *("--engine", "local", "--rollouts-per-update", "8", "--group-size", "4", "--max-seq-len", "256"),
        *("--micro-token-budget", "1024", "--max-tokens", "6", "--eval-limit", "0", "--logger", "none", "--no-checks"),
        *("--model", str(digit_policy_dir), "--dataset", str(digit_problems), "--out-dir", str(tmp_path / "out")),
        *("--chat-template", str(tmp_path / "dated.jinja"), "--system-prompt", "Answer."),
    ]

    async def train(*more: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train_gsm8k.py", *words, *more])
        assert await script.main() == 0

    at("2031-05-06T12:34:56")
    await train("--train-steps", "1")
    checkpoint = tmp_path / "out" / "checkpoints_gsm8k" / "step_1"
    assert read_state(checkpoint).task["rendered_at"] == "2031-05-06T12:34:56"
    at("2031-06-01T00:00:00")
    capsys.readouterr()
    await train("--train-steps", "2", "--resume")
    assert "changed since the checkpoint" not in capsys.readouterr().out
    state = read_state(tmp_path / "out" / "checkpoints_gsm8k" / "step_2")
    assert state.task == read_state(checkpoint).task

    args = script.parse_arguments([*words, "--resume"])
    task = script.task_of(args, GSM8K(system_prompt="Answer."))
    parts = prepare(args, from_arguments(args), RunPaths(out_dir=tmp_path / "out", name="gsm8k"), task)
    assert "Tuesday, 06 May 2031, 12:34:56.000000" in parts.tokenizer.decode(parts.train_prompts[0])


async def test_an_evaluation_is_finished_days_later_and_a_change_of_the_prompts_is_said_to_be_one(
    at: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = program("eval_gsm8k_vllm", monkeypatch)
    make_tiny_model(tmp_path / "model", tie_word_embeddings=True)
    rows = [{"question": f"What is {n} + {n}?", "answer": f"#### {2 * n}"} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "dated.jinja").write_text(DATED["a default that can be given"])
    words = [
        *("--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "rows.jsonl"), "--out-dir", str(tmp_path)),
        *("--engine", "local", "--max-tokens", "4", "--chat-template", str(tmp_path / "dated.jinja")),
    ]

    async def evaluate(*more: str) -> int:
        code: int = await script.run(script.build_parser().parse_args([*words, *more]))
        return code

    out, sidecar = tmp_path / "gsm8k_eval.jsonl", tmp_path / "gsm8k_eval.jsonl.settings.json"
    at("2031-05-06T12:34:56")
    assert await evaluate("--limit", "2") == 0
    at("2031-05-09T12:34:56")
    assert await evaluate("--limit", "4", "--resume-eval") == 0
    settings = json.loads(sidecar.read_text())
    assert len(read_records(out)) == 4 and settings["rendered_at"] == "2031-05-06T12:34:56"
    assert "Today Date: 06 May 2031" in settings["rendered_chat"]

    sidecar.write_text(json.dumps({key: value for key, value in settings.items() if key != "rendered_at"}))
    with pytest.raises(ValueError, match=r"rendered_chat .*06 May.*, now .*09 May.*; rendered_at 'not recorded', now"):
        await evaluate("--resume-eval")
    sidecar.write_text(json.dumps({**settings, "rendered_at": [2031]}))
    with pytest.raises(ValueError, match="is not in ISO format"):
        await evaluate("--resume-eval")
    undated = {key: value for key, value in settings.items() if not key.startswith("rendered")}
    (tmp_path / "dated.jinja").write_text(CHAT_TEMPLATE)
    sidecar.write_text(json.dumps(undated))  # of an earlier version
    with pytest.raises(
        ValueError, match=r"other settings: chat_template '?\w{16}'?, now '?\w{16}'?; use another --out"
    ):
        await evaluate("--resume-eval")
