"""Between chat messages and token ids: the tokenizer, its chat template, and the two crossings.

A prompt is turned into ids once, here, by the trainer's own tokenizer; the engine gets ids. A completion is turned into
text once, for the scorer, and never back. A template that renders the date renders one date for as long as a tokenizer lives.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import jinja2

from ludic.task.pretrained import check_folder, loading, place
from ludic.types import ChatMessage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RecursionError,
)
"""What a chat template can raise. transformers renders it in jinja2's sandbox."""

_USER_TURN: ChatMessage = {"role": "user", "content": "1 + 1"}
_ANSWER = "That-makes-2"
_CHATS: list[list[ChatMessage]] = [[{"role": "system", "content": "Be brief."}, _USER_TURN], [_USER_TURN]]

_PLAIN_TEXT = "{% for message in messages %}{{ message.content }}{% endfor %}"

_MOMENTS: "WeakKeyDictionary[PreTrainedTokenizerBase, datetime]" = WeakKeyDictionary()
"""The time at which each tokenizer's chat template renders."""


def load_tokenizer(
    model: str | os.PathLike[str],
    chat_template_path: str | os.PathLike[str] | None = None,
    *,
    trust_remote_code: bool = False,
    moment: datetime | None = None,
    plain_text: bool = False,
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder or hub name, with its own chat template or the one in a Jinja file.

    With `plain_text` a prompt is the text of its messages and nothing else, as for a base model: after the token that this
    tokenizer begins every text with, where it has one.

    A template that renders the date or the time renders that of `moment`, by default of now. Of several templates in the
    folder the default one is kept: the names of the others become file names when the tokenizer is saved.

    Raises:
        ValueError: no such folder, no tokenizer in it, one that brings code which is not trusted, or a chat template that is
            missing or broken; one line.
    """
    name = os.fspath(model)
    check_folder(name)
    from transformers import AutoTokenizer  # takes seconds, so a wrong folder is refused first

    with loading(name, "tokenizer"):
        loaded = AutoTokenizer.from_pretrained(place(name), trust_remote_code=trust_remote_code)
    tokenizer = cast("PreTrainedTokenizerBase", loaded)
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if chat_template_path is not None:
        tokenizer.chat_template = _read_template(Path(chat_template_path))
    if plain_text:
        begins = tokenizer("1")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = "{{ bos_token }}" * begins + _PLAIN_TEXT
    if tokenizer.chat_template is None:
        raise ValueError(_no_template(name))
    if moment is not None:
        _MOMENTS[tokenizer] = moment
    _try_template(tokenizer, name if chat_template_path is None else os.fspath(chat_template_path))
    return tokenizer


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[ChatMessage], *, moment: datetime | None = None
) -> list[int]:
    """The token ids of a chat with the start of the model's turn at its end: [P].

    A date in the template is that of `moment`, by default the one of all of this tokenizer's prompts.

    Raises:
        ValueError: the tokenizer has no chat template, or its template refuses these messages; one line.
    """
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    return cast("list[int]", _apply_template(tokenizer, messages, moment, options))


def encode_prompts(tokenizer: "PreTrainedTokenizerBase", chats: Iterable[Sequence[ChatMessage]]) -> list[list[int]]:
    """`encode_prompt` of each chat, in a little more than half the time; raises what it raises."""
    texts = [render(tokenizer, messages) for messages in chats]
    # The template writes the special tokens, as transformers has it where it tokenizes what it rendered.
    return cast("list[list[int]]", tokenizer(texts, add_special_tokens=False)["input_ids"]) if texts else []


def encode_turn(tokenizer: "PreTrainedTokenizerBase", message: ChatMessage, *, after: int) -> list[int]:
    """The token ids that put `message` behind a turn of the model that ended with the token `after`, with the start of the
    model's next turn at their end.

    They are what the chat template renders behind an assistant's turn; its stop token is not among them where the model has
    sampled it, but what templates write behind that is, as ChatML's newline: no model samples that. A special token that
    `message` spells out stays text, so that a tool which echoes the model cannot end its own turn, or begin another.

    Raises:
        ValueError: the template refuses such a turn, or leaves out its content or the assistant's turn before it, or the
            tokenizer has no text for a special token that the content spells out; one line.

    Example: ChatML, a model that ended with <|im_end|>, and the message {"role": "user", "content": "higher"}.

        "\\n<|im_start|>user\\nhigher<|im_end|>\\n<|im_start|>assistant\\n"
    """
    role, content = message["role"], message["content"]
    specials = _special_texts(tokenizer)
    spelled = [special for special in specials if special in content]
    # Characters for private use stand for what is spelled out until the template's own special tokens are told apart.
    marks = dict(zip((chr(one) for one in range(0xE000, 0xF900) if chr(one) not in content), spelled, strict=False))
    for mark, special in marks.items():
        content = content.replace(special, mark)
    behind = _behind_answer(tokenizer, [ChatMessage(role=role, content=content)], role)
    if behind == _behind_answer(tokenizer, [], role) or not _shows(behind, content):
        raise ValueError(
            f"the chat template leaves out what the environment says in the role {role}: let next_turn answer in another role "
            "(a plain text is the user's), or give another template (--chat-template FILE)"
        )
    if marks:
        token_ids = _encode_marked(tokenizer, behind, marks, specials)
    else:
        token_ids = cast("list[int]", tokenizer(behind, add_special_tokens=False)["input_ids"])
    return token_ids[1:] if token_ids[:1] == [after] else token_ids


def _behind_answer(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[ChatMessage], role: str) -> str:
    """What the template renders of `messages` behind an assistant's turn, with the start of the next one."""
    # A short stand-in for the chat: templates render a turn alike wherever it stands, and the whole would take longer each turn.
    answered = [_USER_TURN, ChatMessage(role="assistant", content=_ANSWER), *messages]
    _, found, behind = render(tokenizer, answered).partition(_ANSWER)
    if not found:
        raise ValueError(
            f"the chat template leaves out the assistant's turn before one of the {role}: several turns need another "
            "template (--chat-template FILE)"
        )
    return behind


def _shows(text: str, content: str) -> bool:
    """Whether `content` is in `text` but for white space, as it is or as JSON, as Llama 3.1 renders a tool's."""
    shown = "".join(text.split())
    return any("".join(form.split()) in shown for form in (content, json.dumps(content, ensure_ascii=False)[1:-1]))


def _special_texts(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The texts of all special tokens, the longest first; models have more than the named ones, as Llama's <|eot_id|>."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return sorted({*added, *tokenizer.all_special_tokens}, key=lambda text: (-len(text), text))


def _encode_marked(
    tokenizer: "PreTrainedTokenizerBase", text: str, marks: Mapping[str, str], specials: Sequence[str]
) -> list[int]:
    """The token ids of `text`, in which each mark is the special token's text and nothing else of it."""
    forged = {tokenizer.convert_tokens_to_ids(special) for special in marks.values()} - {tokenizer.unk_token_id}
    token_ids: list[int] = []
    for part in re.split(f"({'|'.join(map(re.escape, specials))})", text):
        spelled = part
        for mark, special in marks.items():
            spelled = spelled.replace(mark, special)
        as_text = spelled != part
        ids = tokenizer(spelled, add_special_tokens=False, split_special_tokens=as_text)["input_ids"] if spelled else []
        if as_text and forged & set(ids):
            raise ValueError(
                f"the environment's turn spells out a special token ({', '.join(marks.values())}), for which this tokenizer has "
                "no other tokens: leave it out of what next_turn returns"
            )
        token_ids += ids
    return token_ids


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[ChatMessage],
    *,
    add_generation_prompt: bool = True,
    template: str | None = None,
) -> str:
    """The text that `encode_prompt` gives the ids of, by the tokenizer's template or another; raises what it raises."""
    options = {"add_generation_prompt": add_generation_prompt, "tokenize": False, "chat_template": template}
    return cast(str, _apply_template(tokenizer, messages, None, options))


def _apply_template(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[ChatMessage],
    moment: datetime | None,
    options: Mapping[str, Any],
) -> object:
    if tokenizer.chat_template is None:
        raise ValueError(_no_template(tokenizer.name_or_path))
    try:
        return tokenizer.apply_chat_template(_plain(messages), **options, **_date_for(tokenizer, moment))
    except _TEMPLATE_ERRORS as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the chat template refuses the messages ({roles}): {error}; {_way_out(messages)}") from error


def _way_out(messages: Sequence[ChatMessage]) -> str:
    """What to do where a template refuses `messages`, by the role that few templates know."""
    later = [message["role"] for message in messages[1:] if message["role"] not in ("user", "assistant")]
    if later:
        return f"where it knows no {later[0]} turn behind another, give a template that does with --chat-template FILE"
    return "where it knows no system turn, pass --system-prompt ''"


def example_turns(solved: Sequence[tuple[str, str]]) -> list[ChatMessage]:
    """Few-shot examples, (question, worked answer) each, as turns of the user and the assistant."""
    return [
        turn
        for question, answer in solved
        for turn in (ChatMessage(role="user", content=question), ChatMessage(role="assistant", content=answer))
    ]


def is_plain_text(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether prompts are plain text; see `load_tokenizer`."""
    return str(tokenizer.chat_template).endswith(_PLAIN_TEXT)


def stop_ids(tokenizer: "PreTrainedTokenizerBase", stops: Sequence[str]) -> list[int]:
    """The ids of those texts that are one special token each, which no decoded completion shows."""
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    return sorted(vocabulary[stop] for stop in stops if vocabulary.get(stop) in special)


def decode_completion(tokenizer: "PreTrainedTokenizerBase", token_ids: Sequence[int]) -> str:
    """A completion's text, as scorers see it: without special tokens, and otherwise as the tokens spell it."""
    return cast(str, tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def chat_template_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Sixteen hexadecimal digits that differ where the chat template differs; `none` where there is no template."""
    return "none" if tokenizer.chat_template is None else _fingerprint(tokenizer.chat_template)


def _fingerprint(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def renders_date(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the chat template asks for the date or the time, for which transformers gives it one function."""
    return "strftime_now" in str(tokenizer.chat_template)


def rendering(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """What a run records of its prompts' form, to compare when it is resumed.

    `rendered_chat` is the text of two fixed chats, with a system turn and without, `rendered_ids` a fingerprint of its token
    ids; `rendered_at` the time that it renders, in ISO format, where the template renders one.
    """
    texts, ids = [], []
    for chat in _CHATS:
        try:
            ids.append(encode_prompt(tokenizer, chat))
        except ValueError as error:  # many templates know no system turn
            texts.append(f"refused: {error.__cause__}")
        else:
            texts.append(render(tokenizer, chat))
    record = {"rendered_chat": "\n".join(texts), "rendered_ids": _fingerprint(ids)}
    if renders_date(tokenizer):
        record["rendered_at"] = _moment_of(tokenizer).isoformat()
    return record


def recorded_moment(record: Mapping[str, Any]) -> datetime | None:
    """The time that the prompts of `record` were rendered at (see `rendering`); None where it has none.

    Raises:
        ValueError: it is no time; one line.
    """
    text = record.get("rendered_at")
    try:
        return None if text is None else datetime.fromisoformat(text)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the recorded time of the prompts, {text!r:.80}, is not in ISO format") from error


def _moment_of(tokenizer: "PreTrainedTokenizerBase") -> datetime:
    return _MOMENTS.setdefault(tokenizer, datetime.now().replace(microsecond=0))


def _date_for(tokenizer: "PreTrainedTokenizerBase", moment: datetime | None = None) -> dict[str, Any]:
    """What a template that renders the date is given in place of transformers' function of the same name."""
    return {"strftime_now": (moment or _moment_of(tokenizer)).strftime} if renders_date(tokenizer) else {}


def _plain(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _no_template(name: str) -> str:
    return f"the tokenizer of {name} has no chat template: give one with --chat-template FILE"


def _read_template(path: Path) -> str:
    try:
        template = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"chat template {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"chat template {path} is no UTF-8 text: {error}") from error
    if not template.strip():
        raise ValueError(f"chat template {path} is empty: it must be a Jinja template of a chat")
    return template


def _try_template(tokenizer: "PreTrainedTokenizerBase", source: str) -> None:
    """Render one short chat, so that a broken template is found before anything else is loaded."""
    try:
        with_question = tokenizer.apply_chat_template(_plain([_USER_TURN]), tokenize=False, **_date_for(tokenizer))
    except _TEMPLATE_ERRORS as error:
        line = f" line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise ValueError(f"the chat template of {source} is broken{line}: {error}") from error
    if _USER_TURN["content"] not in str(with_question):
        raise ValueError(f"the chat template of {source} leaves out the user's message")
