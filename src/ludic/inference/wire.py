"""What both ends of the wire agree on: names, limits, and the two formats of a generation behind one request and one reply.

Of the two formats, one is ludic's own, which `generate_route` serves; the other is that of `/v1/completions`. In ludic's own,
an array travels as base64 of little-endian int32 or float32: lossless, since the engine's log-probs are float32, and several
times cheaper to write and to read than a JSON list.

    request   {"model": "m", "prompt_token_ids": [3, 40], "n": 2, "max_tokens": 8, "temperature": 1.0, "top_p": 1.0,
               "stop_token_ids": [1], "logprobs": true, "seed": null, "cache_salt": "a-0", "request_id": "5f0c"}
    reply     {"request_id": "5f0c", "n": 2, "prompt_tokens": 2, "completions": [
               {"token_ids": "KAAAAAEAAAA=", "logprobs": "AACAvgAAAL8=", "finish_reason": "stop"}, ...]}

Nothing in HTTP says which request a reply answers but its place on a connection, and a reply that was sent twice, or to a
request that was given up, has another's place. So each attempt has an id of its own, and a reply repeats it: what does not
match the request in every respect is refused.

Left out: streaming, text, stop strings, penalties; a checksum, since TCP has one, and a proxy that rewrites a reply's
tokens would rewrite that too. This module imports neither vLLM nor torch.
"""

import array
import base64
import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

PATH = "/ludic/v1/generate"
PROTOCOL = 3
"""Both of ludic's routes say it. A trainer and a server of different protocols are an error (`handshake.server_state`)."""
COMPLETIONS_PATH = "/v1/completions"
TRAINER_PATH = "/ludic/v1/trainer"
"""Claims, keeps and releases the lease of the server (`server_guard`). Not renamed since protocol 2, whose trainers would take
a server without this path for plain vLLM, and train on it without a lease."""
ENGINES_PATH = "/ludic/v1/engines"
"""Of the first of several engines (`engines_route`): the ports of all."""
ADAPTER_PATH = "/ludic/v1/adapter"
"""Makes room for the adapter of the trainer that has the lease (`adapter_route`)."""
ADAPTER_NAME, ADAPTER_ID = "ludic-adapter", 1_000_003
"""The model that a request names for the trainer's adapter, and vLLM's number of it; vLLM counts others from 1."""
LEASE_HEADER = "x-ludic-lease"
"""In a request the token that the server gave to its caller, `START-NUMBER` with a lease and `START` without one; in the reply
the same. A server knows no token of another start, so what repeats it comes from the start that was asked."""
LEASE_S = 60.0
"""A trainer's lease of the server ends this long after it was last kept. A trainer keeps it several times in that time."""
UNTOUCHED = "the model was not touched"
"""In the worker's refusal of a weight update, where no weight was changed yet."""
NEUTRAL_SAMPLING: dict[str, float | int] = {
    "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
}  # fmt: skip
"""What vLLM takes from the model's generation_config.json unless the request names it, beside temperature, top_p and
max_tokens (`ModelConfig.get_diff_sampling_param`, 0.26 to 0.33): here at the values that change nothing."""
RECORDED_PREFIX = "ludic-lp-"
"""Begins the engine's ids of the requests whose log-probs the worker records (`vllm_logprobs`)."""
MAX_TOKEN_ID = 2**31 - 1
MAX_SEED = 2**63 - 2**20
"""vLLM adds a member's number to the seed, and the sum must stay a signed 64-bit number."""
MAX_COMPLETIONS = 2**14
"""Of one request: vLLM makes an object of each before the first token."""
MAX_LOGPROB = 1e-3
"""A log-probability is at most 0, but for the rounding of float32 where logits are in the thousands."""

_REQUEST_ID = re.compile("[0-9A-Za-z_-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """Completions of one prompt. Every field is required, so that no default of the server's can slip in."""

    model: str
    prompt_token_ids: list[int]
    """[P]"""
    n: int
    max_tokens: int
    temperature: float
    top_p: float
    stop_token_ids: list[int]
    """End a completion, beside the model's end-of-sequence token; they are part of it, as its last token."""
    logprobs: bool
    seed: int | None
    """Member i of the request draws with `seed + i`."""
    cache_salt: str | None
    """Requests share prefix-cache blocks only with requests of the same salt."""
    request_id: str
    """Names one attempt, and no other: 1 to 64 letters, digits, dashes and underscores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One completion as the server returned it."""

    token_ids: list[int]
    """[C]"""
    logprobs: list[float] | None
    """[C], or None where none were asked for, or they are not known for sure"""
    finish_reason: str


class RequestRefusedError(ValueError):
    """What is wrong with a request, and the HTTP status that says whose fault it is."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class BadReplyError(ValueError):
    """What came is not the reply to this request: cut off, damaged, another's, or not what was asked for."""


def encode_request(request: GenerateRequest) -> bytes:
    return json.dumps(dataclasses.asdict(request), separators=(",", ":")).encode()


def decode_request(body: bytes) -> GenerateRequest:
    """Read and check a request's body.

    Raises:
        RequestRefusedError: it is not JSON, or a field is missing, unknown, of a wrong type or out of its range.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestRefusedError(f"the body is not JSON: {error}") from error
    names = [field.name for field in dataclasses.fields(GenerateRequest)]
    if not isinstance(fields, dict) or sorted(fields) != sorted(names):
        given = ", ".join(sorted(fields)) if isinstance(fields, dict) else type(fields).__name__
        raise RequestRefusedError(f"the body must have exactly the fields {', '.join(names)}, not {given:.200}")
    _check_token_ids("prompt_token_ids", fields)
    _check_token_ids("stop_token_ids", fields)
    if not fields["prompt_token_ids"]:
        raise RequestRefusedError("prompt_token_ids must hold at least one token")
    for name, top in (("n", MAX_COMPLETIONS), ("max_tokens", MAX_TOKEN_ID), ("seed", MAX_SEED)):
        value, low = fields[name], 0 if name == "seed" else 1
        if not (name == "seed" and value is None) and not (type(value) is int and low <= value <= top):
            raise RequestRefusedError(f"{name} must be a whole number from {low} to {top}, not {value!r:.80}")
    for name in ("temperature", "top_p"):
        if not _is_finite(fields[name]):
            raise RequestRefusedError(f"{name} must be a finite number, not {fields[name]!r:.80}")
    if type(fields["logprobs"]) is not bool:
        raise RequestRefusedError(f"logprobs must be true or false, not {fields['logprobs']!r:.80}")
    _check_names(fields)
    return GenerateRequest(**fields)


def _check_token_ids(name: str, fields: dict[str, Any]) -> None:
    ids = fields[name]
    # vLLM checks the largest id only: a negative one would reach the embedding of the whole engine.
    if type(ids) is not list or not all(type(token) is int and 0 <= token <= MAX_TOKEN_ID for token in ids):
        raise RequestRefusedError(f"{name} must be a list of token ids from 0 to {MAX_TOKEN_ID}")


def _check_names(fields: dict[str, Any]) -> None:
    request_id, salt = fields["request_id"], fields["cache_salt"]
    if type(request_id) is not str or not _REQUEST_ID.fullmatch(request_id):
        raise RequestRefusedError("request_id must be 1 to 64 letters, digits, dashes and underscores")
    # isprintable: half a surrogate pair is a string in JSON, and nothing that can be hashed or logged.
    fits = salt is None or (type(salt) is str and 0 < len(salt) <= 1024 and salt.isprintable())
    if type(fields["model"]) is not str or not fits:
        raise RequestRefusedError(
            "model must be a string, and cache_salt null or a string of 1 to 1024 printable characters"
        )


def encode_reply(completions: Iterable[Generated], request: GenerateRequest) -> bytes:
    """The reply to `request`; the completions are in the order of their members."""
    group = [
        {
            "token_ids": _pack("i", completion.token_ids),
            "logprobs": None if completion.logprobs is None else _pack("f", completion.logprobs),
            "finish_reason": completion.finish_reason,
        }
        for completion in completions
    ]
    return json.dumps(_echo(request) | {"completions": group}, separators=(",", ":")).encode()


def decode_reply(body: bytes, request: GenerateRequest, *, vocab_size: int | None = None) -> list[Generated]:
    """The completions of the reply to `request`, in the order of their members.

    Args:
        vocab_size: rows of the model's embedding; no token id may reach it. None: any id that int32 holds may come.

    Raises:
        BadReplyError: it is not the reply to this request, or not a whole one.
    """
    reply = _object(body, max_reply_bytes(request))
    _check_fields("the reply", reply, {*_echo(request), "completions"})
    for name, sent in _echo(request).items():
        _check_echo(name, reply[name], sent)
    group = []
    for fields in _members(reply["completions"], request):
        _check_fields("a completion", fields, {"token_ids", "logprobs", "finish_reason"})
        packed = fields["logprobs"]
        token_ids: list[int] = _unpack("i", fields["token_ids"], request.max_tokens)
        logprobs: list[float] | None = None if packed is None else _unpack("f", packed, request.max_tokens)
        group.append(_checked(token_ids, logprobs, fields["finish_reason"], request, vocab_size))
    return group


def max_reply_bytes(request: GenerateRequest) -> int:
    """More than a reply to `request` can have: two arrays of 4 bytes a token in base64, and some names."""
    array_bytes = 4 * math.ceil(4 * request.max_tokens / 3)
    return 1024 + request.n * (2 * array_bytes + 256)


def encode_completions_request(request: GenerateRequest) -> bytes:
    """The same request for `/v1/completions`, with a value for everything that a file on the server could set."""
    body = dataclasses.asdict(request) | NEUTRAL_SAMPLING | {"return_token_ids": True, "add_special_tokens": False}
    body["prompt"] = body.pop("prompt_token_ids")
    body["logprobs"] = 0 if request.logprobs else None  # 0: of the sampled token alone
    return json.dumps({name: value for name, value in body.items() if value is not None}).encode()


def decode_completions_reply(
    body: bytes, request: GenerateRequest, *, vocab_size: int | None = None
) -> list[Generated]:
    """The same as `decode_reply` for `/v1/completions`: vLLM repeats the request's id, and each choice the whole prompt."""
    reply = _object(body, max_completions_reply_bytes(request))
    _check_echo("id", reply.get("id"), f"cmpl-{request.request_id}")
    choices = _members(reply.get("choices"), request)
    by_index = {choice["index"]: choice for choice in choices if type(choice.get("index")) is int}
    if sorted(by_index) != list(range(request.n)):
        raise BadReplyError(f"the indices of {request.n} choices are not 0 to {request.n - 1}, each once")
    group = []
    for _, choice in sorted(by_index.items()):
        if choice.get("prompt_token_ids") != request.prompt_token_ids:
            raise BadReplyError("the reply is to another prompt")
        token_ids = choice.get("token_ids")
        if type(token_ids) is not list or not all(type(token) is int for token in token_ids):
            raise BadReplyError("token_ids is not a list of whole numbers")
        logprobs = _token_logprobs(choice.get("logprobs"))
        group.append(_checked(token_ids, logprobs, choice.get("finish_reason"), request, vocab_size))
    return group


def max_completions_reply_bytes(request: GenerateRequest) -> int:
    """Of `/v1/completions`: each token is there as an id, as a log-prob with all digits, and three times as text; each choice
    repeats the prompt."""
    return 4096 + request.n * (1024 * request.max_tokens + 16 * len(request.prompt_token_ids) + 1024)


def _token_logprobs(logprobs: object) -> list[float] | None:
    if logprobs is None:
        return None
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    if type(values) is not list or not all(map(_is_finite, values)):
        raise BadReplyError("token_logprobs is not a list of finite numbers")
    return [float(value) for value in values]


# --- what both replies are checked for --------------------------------------------------------------------------------


def _echo(request: GenerateRequest) -> dict[str, str | int]:
    """What a reply repeats, so that it can be no other request's."""
    return {"request_id": request.request_id, "n": request.n, "prompt_tokens": len(request.prompt_token_ids)}


def _object(body: bytes, limit: int) -> dict[str, Any]:
    if len(body) > limit:
        raise BadReplyError(f"a reply of {len(body)} bytes, where {limit} would be the most")
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadReplyError(f"the reply is not JSON: {error}") from error
    if not isinstance(reply, dict):
        raise BadReplyError(f"the reply is not an object but a {type(reply).__name__}")
    return reply


def _check_fields(what: str, fields: dict[str, Any], names: Collection[str]) -> None:
    if fields.keys() != names:
        raise BadReplyError(f"{what} must have the fields {', '.join(sorted(names))}, not {sorted(fields)!r:.200}")


def _check_echo(name: str, given: object, sent: str | int) -> None:
    if type(given) is not type(sent) or given != sent:
        raise BadReplyError(f"the reply is to another request: its {name} is {given!r:.80}, not {sent!r}")


def _members(members: object, request: GenerateRequest) -> list[dict[str, Any]]:
    if type(members) is not list or not all(isinstance(member, dict) for member in members):
        raise BadReplyError("the completions are not a list of objects")
    if len(members) != request.n:
        raise BadReplyError(f"asked for {request.n} completions, the server returned {len(members)}")
    return members


def _checked(
    token_ids: list[int],
    logprobs: list[float] | None,
    finish_reason: object,
    request: GenerateRequest,
    vocab_size: int | None,
) -> Generated:
    if type(finish_reason) is not str or finish_reason not in ("stop", "length"):
        raise BadReplyError(f"a completion ended with {finish_reason!r:.80}, which is neither stop nor length")
    count, most = len(token_ids), request.max_tokens
    # vLLM says length at max_tokens and nowhere else: requests that the context would cut short are refused.
    if not 1 <= count <= most or (finish_reason == "length" and count != most):
        hint = " (a max_new_tokens in the server's --override-generation-config cuts all completions short)"
        raise BadReplyError(
            f"a completion of {count} tokens ended with {finish_reason}, where max_tokens is {most}"
            + (hint if finish_reason == "length" and count < most else "")
        )
    top = MAX_TOKEN_ID if vocab_size is None else vocab_size - 1
    if min(token_ids) < 0 or max(token_ids) > top:
        raise BadReplyError(
            f"token ids from {min(token_ids)} to {max(token_ids)}, where 0 to {top} would be the model's"
        )
    if logprobs is not None:  # None: not asked for, or not known for sure
        if not request.logprobs:
            raise BadReplyError("the reply has log-probs, and none were asked for")
        if len(logprobs) != count:
            raise BadReplyError(f"the server returned {count} tokens but {len(logprobs)} log-probs")
        if not all(map(math.isfinite, logprobs)) or max(logprobs) > MAX_LOGPROB:
            raise BadReplyError("a log-prob is no finite number, or above 0")
    return Generated(token_ids=token_ids, logprobs=logprobs, finish_reason=finish_reason)


def _is_finite(value: object) -> bool:
    if type(value) is int:  # isfinite refuses those that no float holds
        return abs(value) < 2**1023
    return type(value) is float and math.isfinite(value)


def _pack(kind: str, values: Iterable[float]) -> str:
    numbers = array.array(kind, values)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode("ascii")


def _unpack(kind: str, text: object, most: int) -> list[Any]:
    """[at most `most`] numbers of 4 bytes."""
    if type(text) is not str or len(text) > 4 * math.ceil(4 * most / 3):
        raise BadReplyError(f"an array is not base64 of at most {most} numbers")
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise BadReplyError(f"an array is not base64: {error}") from error
    if len(raw) % 4:
        raise BadReplyError(f"an array of {len(raw)} bytes, which is no multiple of 4")
    numbers = array.array(kind, raw)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


# --- the two as one thing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where a request goes, and how it and its reply are written there."""

    path: str
    encode: Callable[[GenerateRequest], bytes]
    decode: Callable[..., list[Generated]]
    """`decode_reply`, or the same of the other format."""
    max_reply_bytes: Callable[[GenerateRequest], int]
    """No valid reply is longer; reading stops there."""


OWN_ROUTE = Route(path=PATH, encode=encode_request, decode=decode_reply, max_reply_bytes=max_reply_bytes)
COMPLETIONS_ROUTE = Route(
    path=COMPLETIONS_PATH,
    encode=encode_completions_request,
    decode=decode_completions_reply,
    max_reply_bytes=max_completions_reply_bytes,
)
