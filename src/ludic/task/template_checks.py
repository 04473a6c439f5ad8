"""What a chat template makes of a run's messages: its text, and what a user would not expect of it.

Templates are programs, so they are tried and not read: each check renders a few chats and compares the texts. A template
that refuses one of them is left alone; one that refuses the run's own messages is an error of `encode_prompt`.
"""

from collections.abc import Sequence
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING

from ludic.storage.inert import inert
from ludic.task.prompts import render
from ludic.types import ChatMessage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIRST, _ANSWER, _SECOND = "the first question", "the first answer", "the second question"
_REASONS = "the first reasons"


def describe_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[ChatMessage],
    *,
    plain_template: Path | None = None,
    several_turns: bool = False,
) -> list[str]:
    """What to say at the start of a run: the text of its first prompt, `template_warnings`, and with `several_turns`
    `turn_warnings`."""
    warnings = template_warnings(tokenizer, messages, plain_template=plain_template)
    warnings += turn_warnings(tokenizer) if several_turns else []
    first = f"the first prompt, as it is rendered: '{inert(render(tokenizer, messages))}'"
    return [first, *(f"warning: {line}" for line in warnings)]


def template_warnings(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[ChatMessage], *, plain_template: Path | None = None
) -> list[str]:
    """A line for each surprise in a prompt of these `messages`; [] for a template that renders them and nothing else.

    `plain_template`, a file, is recommended where it renders the same but for a system turn of the tokenizer's own template.

    Raises:
        ValueError: the template refuses the messages; one line.
    """
    text = render(tokenizer, messages)
    lines = [
        f"the chat template leaves out the {message['role']} turn '{inert(message['content'], 60)}': "
        "the model never sees it; give another with --chat-template FILE"
        for message in messages
        if "".join(message["content"].split()) not in "".join(text.split())
    ]
    if header := _missing_generation_prompt(tokenizer, messages, text):
        lines.append(
            f"the chat template renders no generation prompt: the model has to write '{inert(header, 60)}' itself before its "
            "answer; give a template that heeds add_generation_prompt with --chat-template FILE"
        )
    own_turn = own_system_turn(tokenizer)
    if own_turn and messages[0]["role"] != "system":
        way_out = "a template without it can be given with --chat-template FILE"
        if plain_template is not None:
            try:
                plain = render(tokenizer, messages, template=plain_template.read_text(encoding="utf-8"))
            except ValueError:
                plain = text
            if plain != text and text.endswith(plain):
                way_out = f"for none, give --chat-template {plain_template}, also to a server that you start yourself"
        lines.append(f"the chat template adds a system turn of its own, '{inert(own_turn, 300)}': {way_out}")
    return lines


def turn_warnings(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """A line where a longer chat does not begin with what the model saw and wrote in a shorter one; [] where it does.

    Templates of reasoning models leave out what the model thought in earlier turns. A conversation of a run keeps every turn
    as it was sampled (`ludic.rollout.turns`), whatever the template makes of it.

    Raises:
        ValueError: the template refuses a chat of several turns; one line.
    """
    first, second = ChatMessage(role="user", content=_FIRST), ChatMessage(role="user", content=_SECOND)
    for answer, what in (
        (_ANSWER, "an earlier turn"),
        (f"<think>\n{_REASONS}\n</think>\n\n{_ANSWER}", "earlier reasoning"),
    ):
        later = render(tokenizer, [first, ChatMessage(role="assistant", content=answer), second])
        if not later.startswith(render(tokenizer, [first]) + answer):
            return [
                f"the chat template changes or drops {what} of the model when the chat goes on: here each turn stays as it was "
                "sampled, so that the model sees more than a chat server would show it"
            ]
    return []


def own_system_turn(tokenizer: "PreTrainedTokenizerBase") -> str:
    """What the template writes before the user's first turn where there is no system message; "" for special tokens alone."""
    # The user's turn begins alike at the start of a chat and between its first answer and its second question.
    first = ChatMessage(role="user", content=_FIRST)
    more = [ChatMessage(role="assistant", content=_ANSWER), ChatMessage(role="user", content=_SECOND)]
    try:
        start = render(tokenizer, [first]).partition(_FIRST)[0]
        later = render(tokenizer, [first, *more]).partition(_SECOND)[0].rpartition(_ANSWER)[2]
    except ValueError:
        return ""
    own = _before_shared_end(start, later)
    for token in tokenizer.all_special_tokens:
        start, later = start.replace(token, ""), later.replace(token, "")
    return own.strip() if _before_shared_end(start, later).strip() else ""


def _before_shared_end(text: str, other: str) -> str:
    shared = commonprefix([text[::-1], other[::-1]])  # noqa: RUF071 - of texts, character by character
    return text[: len(text) - len(shared)]


def _missing_generation_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[ChatMessage], text: str) -> str:
    """The start of the model's turn, where the prompt `text` ends before it; "" where it does not.

    Some formats have none, as [INST] ... [/INST]: there an answer follows the prompt at once.
    """
    try:
        if render(tokenizer, messages, add_generation_prompt=False) != text:
            return ""
        answered = render(tokenizer, [*messages, ChatMessage(role="assistant", content=_ANSWER)])
    except ValueError:
        return ""
    before = answered.partition(_ANSWER)[0]
    return before.removeprefix(text).strip() if before.startswith(text) else ""
