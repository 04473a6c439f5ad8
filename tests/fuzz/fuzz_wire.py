"""Coverage-guided fuzzing of both ends of a generation: the client's reading of replies, the server's reading of requests.

    pip install atheris requests; python tests/fuzz/fuzz_wire.py -max_total_time=600 -max_len=4096 [libFuzzer's arguments]

The first byte says who reads, and whether the rest is a whole body or is spliced into a right one. A finding is any exception
but `BadReplyError` and `RequestRefusedError`, or something that was let through and breaks a promise of `check`.
`tests/test_faults_wire.py` tries `check` on drawn inputs, and keeps what was found. Left out: HTTP, which is aiohttp's.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

REQUEST_BODY = (
    b'{"model":"m","prompt_token_ids":[3,40],"n":2,"max_tokens":4,"temperature":1.0,"top_p":1.0,"stop_token_ids":[1],'
    b'"logprobs":true,"seed":null,"cache_salt":"a-0","request_id":"5f0c"}'
)
REPLY_BODY = (
    b'{"request_id":"5f0c","n":2,"prompt_tokens":2,"completions":['
    b'{"token_ids":"KAAAAAEAAAA=","logprobs":"AACAvgAAAL8=","finish_reason":"stop"},'
    b'{"token_ids":"KAAAAAEAAAA=","logprobs":null,"finish_reason":"stop"}]}'
)
COMPLETIONS_BODY = (
    b'{"id":"cmpl-5f0c","choices":['
    b'{"index":0,"text":"","logprobs":{"token_logprobs":[-0.25,-1e3]},"finish_reason":"stop","token_ids":[40,1],'
    b'"prompt_token_ids":[3,40]},'
    b'{"index":1,"text":"","logprobs":null,"finish_reason":"length","token_ids":[40,1,2,3],"prompt_token_ids":[3,40]}]}'
)
ERROR_BODY = b'{"error":{"message":"max_tokens is too large","type":"BadRequestError","param":null,"code":400}}'
VOCAB_SIZE = 512


def check(data: bytes) -> None:
    """Raises where a promise about reading `data` is broken."""
    if not data:
        return
    reader, base = _READERS[data[0] % len(_READERS)]
    body = data[1:]
    if data[0] >= 128 and len(data) >= 4:  # cut out some bytes of a right body, and put the rest there
        start = int.from_bytes(data[1:3], "little") % len(base)
        body = base[:start] + data[4:] + base[start + data[3] :]
    reader(body)


def _read_request(body: bytes) -> None:
    from ludic.inference.wire import RequestRefusedError, decode_request, encode_request

    try:
        request = decode_request(body)
    except RequestRefusedError as error:
        assert len(str(error)) < 1000
        return
    assert decode_request(encode_request(request)) == request
    assert request.n >= 1 and request.max_tokens >= 1 and min(request.prompt_token_ids) >= 0
    str(request).encode()  # it may be logged


def _read_reply(body: bytes) -> None:
    from ludic.inference.wire import BadReplyError, decode_reply, decode_request, encode_reply, max_reply_bytes

    request = decode_request(REQUEST_BODY)
    try:
        group = decode_reply(body, request, vocab_size=VOCAB_SIZE)
    except BadReplyError as error:
        str(error).encode()
        assert len(str(error)) < 1000
        return
    assert len(body) <= max_reply_bytes(request)
    assert len(group) == request.n
    for one in group:
        assert 1 <= len(one.token_ids) <= request.max_tokens
        assert all(type(token) is int and 0 <= token < VOCAB_SIZE for token in one.token_ids)
        assert one.logprobs is None or len(one.logprobs) == len(one.token_ids)
        assert all(math.isfinite(value) and value < 0.01 for value in one.logprobs or [])
    assert decode_reply(encode_reply(group, request), request) == group


def _read_completions(body: bytes) -> None:
    from ludic.inference.wire import BadReplyError, decode_completions_reply, decode_request

    request = decode_request(REQUEST_BODY)
    try:
        group = decode_completions_reply(body, request, vocab_size=VOCAB_SIZE)
    except BadReplyError as error:
        str(error).encode()
        assert len(str(error)) < 1000
        return
    assert len(group) == request.n
    for one in group:
        assert 1 <= len(one.token_ids) <= request.max_tokens
        assert all(type(token) is int and 0 <= token < VOCAB_SIZE for token in one.token_ids)
        assert one.logprobs is None or len(one.logprobs) == len(one.token_ids)
        assert all(type(value) is float and math.isfinite(value) and value < 0.01 for value in one.logprobs or [])


def _read_error(body: bytes) -> None:
    from ludic.inference.client.server_control import error_text

    text = error_text(body.decode("utf-8", "replace"))
    assert len(text) < 700 and "\n" not in text


_READERS: tuple[tuple[Callable[[bytes], None], bytes], ...] = (
    (_read_request, REQUEST_BODY),
    (_read_reply, REPLY_BODY),
    (_read_completions, COMPLETIONS_BODY),
    (_read_error, ERROR_BODY),
)


def seeds() -> list[bytes]:
    """A right body for each reader."""
    return [bytes([number]) + base for number, (_, base) in enumerate(_READERS)]


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["ludic", "json", "base64"]):
        pass

    from tests.fuzz import start

    start(seeds(), check)


if __name__ == "__main__":
    main()
