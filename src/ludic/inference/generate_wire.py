"""The two wire formats of a generation, ludic's own and that of `/v1/completions`, behind one request and one reply.

Ludic's own is what `generate_route` serves. An array travels as base64 of little-endian int32 or float32: lossless, since
the engine's log-probs are float32, and several times cheaper to write and to read than a JSON list.

    request   {"model": "m", "prompt_token_ids": [3, 40], "n": 2, "max_tokens": 8, "temperature": 1.0, "top_p": 1.0,
               "stop_token_ids": [1], "logprobs": true, "seed": null, "cache_salt": "a-0"}
    reply     {"completions": [{"token_ids": "KAAAAAEAAAA=", "logprobs": "AACAvgAAAL8=", "finish_reason": "stop"}, ...]}

Left out: streaming, text, stop strings, penalties. This module imports neither vLLM nor torch.
"""

import array
import base64
import dataclasses
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

PATH = "/ludic/v1/generate"
PROTOCOL = 1
"""What `GET` of the path answers: a client of another protocol takes `/v1/completions`."""
COMPLETIONS_PATH = "/v1/completions"
RECORDED_PREFIX = "ludic-lp-"
"""Begins the engine's ids of the requests whose log-probs the worker records (`vllm_logprobs`)."""
MAX_TOKEN_ID = 2**31 - 1
MAX_SEED = 2**63 - 2**20
"""vLLM adds a member's number to the seed, and the sum must stay a signed 64-bit number."""


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
    for name, top in (("n", MAX_TOKEN_ID), ("max_tokens", MAX_TOKEN_ID), ("seed", MAX_SEED)):
        value, low = fields[name], 0 if name == "seed" else 1
        if not (name == "seed" and value is None) and not (type(value) is int and low <= value <= top):
            raise RequestRefusedError(f"{name} must be a whole number from {low} to {top}, not {value!r:.80}")
    for name in ("temperature", "top_p"):
        value = fields[name]
        if type(value) not in (int, float) or not math.isfinite(value):
            raise RequestRefusedError(f"{name} must be a finite number, not {value!r:.80}")
    if type(fields["logprobs"]) is not bool:
        raise RequestRefusedError(f"logprobs must be true or false, not {fields['logprobs']!r:.80}")
    salt = fields["cache_salt"]
    if type(fields["model"]) is not str or not (salt is None or (type(salt) is str and 0 < len(salt) <= 1024)):
        raise RequestRefusedError("model must be a string, and cache_salt null or a string of 1 to 1024 characters")
    return GenerateRequest(**fields)


def _check_token_ids(name: str, fields: dict[str, Any]) -> None:
    ids = fields[name]
    # vLLM checks the largest id only: a negative one would reach the embedding of the whole engine.
    if type(ids) is not list or not all(type(token) is int and 0 <= token <= MAX_TOKEN_ID for token in ids):
        raise RequestRefusedError(f"{name} must be a list of token ids from 0 to {MAX_TOKEN_ID}")


def encode_reply(completions: Iterable[Generated]) -> bytes:
    fields = [
        {
            "token_ids": _pack("i", completion.token_ids),
            "logprobs": None if completion.logprobs is None else _pack("f", completion.logprobs),
            "finish_reason": completion.finish_reason,
        }
        for completion in completions
    ]
    return json.dumps({"completions": fields}, separators=(",", ":")).encode()


def decode_reply(body: bytes) -> list[Generated]:
    """The completions of a reply, in the order of their members."""
    return [
        Generated(
            token_ids=_unpack("i", fields["token_ids"]),
            logprobs=None if fields["logprobs"] is None else _unpack("f", fields["logprobs"]),
            finish_reason=fields["finish_reason"],
        )
        for fields in json.loads(body)["completions"]
    ]


def encode_completions_request(request: GenerateRequest) -> bytes:
    """The same request for `/v1/completions`, where optional fields are left out."""
    body: dict[str, Any] = {
        "model": request.model,
        "prompt": request.prompt_token_ids,
        "n": request.n,
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "stop_token_ids": request.stop_token_ids,
        "return_token_ids": True,
        "add_special_tokens": False,
        "cache_salt": request.cache_salt,
    }
    if request.seed is not None:
        body["seed"] = request.seed
    if request.logprobs:
        body["logprobs"] = 0
    return json.dumps(body, separators=(",", ":")).encode()


def decode_completions_reply(body: bytes) -> list[Generated]:
    choices = sorted(json.loads(body)["choices"], key=lambda choice: int(choice["index"]))
    return [
        Generated(
            token_ids=choice["token_ids"],
            logprobs=None if choice["logprobs"] is None else choice["logprobs"]["token_logprobs"],
            finish_reason=choice["finish_reason"],
        )
        for choice in choices
    ]


def _pack(kind: str, values: Iterable[float]) -> str:
    numbers = array.array(kind, values)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode("ascii")


def _unpack(kind: str, text: str) -> list[Any]:
    numbers = array.array(kind)
    numbers.frombytes(base64.b64decode(text))
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()
