"""What chat templates of several kinds make of a run's messages, and what is said of it."""

import re
from pathlib import Path

import pytest

from ludic.task.prompts import encode_prompt, render
from ludic.task.template_checks import describe_prompt, own_system_turn, template_warnings
from ludic.types import ChatMessage
from tests.vllm_helpers import CHAT_TEMPLATE, make_tiny_tokenizer

CHATML = Path(__file__).parents[1] / "examples" / "gsm8k" / "chatml.jinja"
QUESTION: ChatMessage = {"role": "user", "content": "How many boats are there?"}
SYSTEM: ChatMessage = {"role": "system", "content": "Answer\n in a box."}

START = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
DEFAULT = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are Lud.<|im_end|>\\n' }}{% endif %}"
IN_THE_LOOP = TURNS.replace("%}{{", "%}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are "
                            "Lud.<|im_end|>\n{% endif %}{{", 1)  # fmt: skip
INST = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\\n\\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}"
    "{% if m.role == 'user' %}[INST] {{ (s if loop.first else '') + m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
PREAMBLE = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set rest = messages[1:] %}{% else %}"
    "A chat between a boatman and a machine.{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if m.role == 'user' %} USER: {{ m.content }}{% else %} ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
HEADERS = (  # a system turn is always there, for the date
    "{{ bos_token }}{% set given = messages[0].role == 'system' %}<|h|>system<|/h|>\nToday is Monday.\n"
    "{{ messages[0].content if given }}<|eot|>{% for m in (messages[1:] if given else messages) %}"
    "<|h|>{{ m.role }}<|/h|>\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|h|>assistant<|/h|>\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
ONE_TURN = "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}Q: {{ messages[0].content }}\nA:"
THINKING = (
    "{% for m in messages %}{{ '<u>' if m.role == 'user' else '<a><think></think>' }}{{ m.content }}{% endfor %}"
    "{{ '<a>' if add_generation_prompt }}"
)
DROPS = CHAT_TEMPLATE.replace("in messages", "in messages if message['role'] != 'system'")


@pytest.mark.parametrize(
    ("template", "own"),
    [
        (CHAT_TEMPLATE, ""),
        (TURNS + START, ""),
        (DEFAULT + TURNS + START, "<|im_start|>system\nYou are Lud."),
        (IN_THE_LOOP + START, "<|im_start|>system\nYou are Lud."),
        (INST, ""),
        (PREAMBLE, "A chat between a boatman and a machine."),
        (HEADERS, "<s><|h|>system<|/h|>\nToday is Monday."),
        ("<|system|>" + CHAT_TEMPLATE, ""),  # a special token alone says nothing
        (NO_SYSTEM + DEFAULT + TURNS + START, "<|im_start|>system\nYou are Lud."),
        (ONE_TURN, ""),
        (THINKING, ""),
        (DROPS, ""),
    ],
)
def test_a_system_turn_of_the_templates_own_is_found_and_said_only_where_none_is_given(template: str, own: str) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = template
    assert own_system_turn(tokenizer) == own
    assert len(template_warnings(tokenizer, [QUESTION])) == bool(own)
    if template in (NO_SYSTEM + DEFAULT + TURNS + START, ONE_TURN):
        with pytest.raises(ValueError, match=r"refuses the messages \(system, user\)"):
            template_warnings(tokenizer, [SYSTEM, QUESTION])
    elif template not in (THINKING, DROPS):
        assert template_warnings(tokenizer, [SYSTEM, QUESTION]) == []


@pytest.mark.parametrize(
    ("template", "recommended"),
    [(DEFAULT + TURNS + START, True), (IN_THE_LOOP + START, True), (PREAMBLE, False), (HEADERS, False),
     (DEFAULT + TURNS + START.replace("assistant", "model"), False)],
)  # fmt: skip
def test_the_template_that_is_shipped_is_recommended_where_it_differs_by_that_turn_alone(
    template: str, recommended: bool
) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = template
    first, line = describe_prompt(tokenizer, [QUESTION], plain_template=CHATML)
    assert first.startswith("the first prompt, as it is rendered: '") and "boats are there?" in first
    assert line.startswith("warning: the chat template adds a system turn of its own, '") and "\n" not in line
    assert (f"--chat-template {CHATML}" in line) == recommended
    with_default = encode_prompt(tokenizer, [QUESTION])
    if recommended:
        tokenizer.chat_template = CHATML.read_text()
        assert template_warnings(tokenizer, [QUESTION]) == template_warnings(tokenizer, [SYSTEM, QUESTION]) == []
        ids = encode_prompt(tokenizer, [QUESTION])
        assert ids == with_default[-len(ids) :] and len(ids) < len(with_default)
        assert tokenizer.decode(ids) == render(tokenizer, [QUESTION])
        assert "system" not in tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (DROPS, r"leaves out the system turn 'Answer\\n in a box\.': the model never sees it"),
        (TURNS, r"renders no generation prompt: the model has to write '<\|im_start\|>assistant' itself"),
        (
            PREAMBLE.partition("{% if add")[0],
            "renders no generation prompt: the model has to write 'ASSISTANT:' itself",
        ),
        (THINKING.partition("{{ '<a>' if add")[0], "renders no generation prompt"),
    ],
)
def test_a_turn_that_is_dropped_and_a_missing_generation_prompt_are_one_line_each(template: str, reason: str) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = template
    (line,) = template_warnings(tokenizer, [SYSTEM, QUESTION])
    assert "\n" not in line and "--chat-template FILE" in line
    assert re.search(reason, line)


@pytest.mark.parametrize("template", [INST, TURNS + "<|im_start|>assistant\n", THINKING])
def test_a_format_whose_answer_follows_the_prompt_at_once_needs_no_generation_prompt(template: str) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = template
    assert template_warnings(tokenizer, [QUESTION]) == []
