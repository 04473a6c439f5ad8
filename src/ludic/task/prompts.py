"""Between chat messages and token ids: the tokenizer, its chat template, and the two crossings.

A prompt is turned into ids once, here, by the trainer's own tokenizer; the engine gets ids. A completion is turned into
text once, for the scorer, and never back. Training and evaluation use the same functions.

A template that renders the date renders one date for as long as a tokenizer lives, and the one that is given to
`load_tokenizer` where a run is resumed: prompts are the same ids on every day.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import jinja2

from ludic.task.pretrained import check_folder, loading
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
_CHATS: list[list[ChatMessage]] = [[{"role": "system", "content": "Be brief."}, _USER_TURN], [_USER_TURN]]

_MOMENTS: "WeakKeyDictionary[PreTrainedTokenizerBase, datetime]" = WeakKeyDictionary()
"""The time at which each tokenizer's chat template renders."""


def load_tokenizer(
    model: str | os.PathLike[str],
    chat_template_path: str | os.PathLike[str] | None = None,
    *,
    trust_remote_code: bool = False,
    moment: datetime | None = None,
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder or hub name, with its own chat template or the one in a Jinja file.

    A template that renders the date or the time renders that of `moment`, by default of now.

    Of several templates in the folder the default one is kept: the names of the others become file names when the
    tokenizer is saved.

    Raises:
        ValueError: no such folder, no tokenizer in it, one that brings code which is not trusted, or a chat template that is
            missing or broken; one line.
    """
    name = os.fspath(model)
    check_folder(name)
    from transformers import AutoTokenizer  # takes seconds, so a wrong folder is refused first

    location = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    with loading(name, "tokenizer"):
        tokenizer = cast(
            "PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
        )
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if chat_template_path is not None:
        tokenizer.chat_template = _read_template(Path(chat_template_path))
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
    return cast("list[int]", _apply_template(tokenizer, messages, moment=moment, tokenize=True, return_dict=False))


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[ChatMessage],
    *,
    add_generation_prompt: bool = True,
    template: str | None = None,
) -> str:
    """The text that `encode_prompt` gives the ids of, by the tokenizer's template or another.

    Raises:
        ValueError: as `encode_prompt`.
    """
    return cast(
        str,
        _apply_template(
            tokenizer, messages, tokenize=False, add_generation_prompt=add_generation_prompt, chat_template=template
        ),
    )


def _apply_template(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[ChatMessage],
    *,
    add_generation_prompt: bool = True,
    moment: datetime | None = None,
    **options: Any,
) -> object:
    if tokenizer.chat_template is None:
        raise ValueError(_no_template(tokenizer.name_or_path))
    try:
        return tokenizer.apply_chat_template(
            _plain(messages),
            add_generation_prompt=add_generation_prompt,
            **options,
            **_date_for(tokenizer, moment),
        )
    except _TEMPLATE_ERRORS as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"the chat template refuses the messages ({roles}): {error}; where it knows no system turn, "
            "pass --system-prompt ''"
        ) from error


def decode_completion(tokenizer: "PreTrainedTokenizerBase", token_ids: Sequence[int]) -> str:
    """A completion's text, as scorers see it: without special tokens, and otherwise as the tokens spell it."""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return cast(str, text)


def chat_template_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Sixteen hexadecimal digits that differ where the chat template differs; `none` where there is no template."""
    template = tokenizer.chat_template
    if template is None:
        return "none"
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:16]


def renders_date(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the chat template asks for the date or the time, for which transformers gives it one function."""
    return "strftime_now" in str(tokenizer.chat_template)


def rendering(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    """What a run records of its prompts' form, to compare when it is resumed.

    `rendered_chat` is the text that the template makes of two fixed chats, with a system turn and without, `rendered_ids` a
    fingerprint of its token ids; `rendered_at` the time that it renders, in ISO format, where the template renders one.
    """
    texts, ids = [], []
    for chat in _CHATS:
        try:
            ids.append(encode_prompt(tokenizer, chat))
        except ValueError as error:  # many templates know no system turn
            texts.append(f"refused: {error.__cause__}")
        else:
            texts.append(render(tokenizer, chat))
    record = {
        "rendered_chat": "\n".join(texts),
        "rendered_ids": hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16],
    }
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
        raise ValueError(f"the recorded time of the prompts, {text!r:.80}, is none in ISO format") from error


def _moment_of(tokenizer: "PreTrainedTokenizerBase") -> datetime:
    return _MOMENTS.setdefault(tokenizer, datetime.now().replace(microsecond=0))


def _date_for(tokenizer: "PreTrainedTokenizerBase", moment: datetime | None = None) -> dict[str, Any]:
    """What a template that renders the date is given in place of transformers' function of the same name."""
    if not renders_date(tokenizer):
        return {}
    return {"strftime_now": (moment or _moment_of(tokenizer)).strftime}


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
