"""The wire of a generation under faults: its two formats on drawn and on hostile bytes, and every broken reply in a stream.

`benchmarks/faults/wire.py` has the faults; a person runs it with a large count.
"""

import asyncio
import dataclasses
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from benchmarks import wire_server
from benchmarks.faults import wire, wire_kinds
from benchmarks.faults.proxy import fault_proxy
from benchmarks.load import ByteTokenizer
from ludic.inference.client.vllm_client import VLLMEngine
from ludic.inference.wire import (
    COMPLETIONS_ROUTE,
    MAX_COMPLETIONS,
    MAX_SEED,
    OWN_ROUTE,
    BadReplyError,
    Generated,
    GenerateRequest,
    RequestRefusedError,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)
from ludic.types import SamplingParams
from tests.fuzz import fuzz_wire

if TYPE_CHECKING:
    from ludic.inference.client.server_process import ServerProcess

quick = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])

REQUEST = GenerateRequest(
    model="m", prompt_token_ids=[3, 40], n=2, max_tokens=4, temperature=1.0, top_p=1.0, stop_token_ids=[1],
    logprobs=True, seed=None, cache_salt="a-0", request_id="5f0c",
)  # fmt: skip
GROUP = [
    Generated(token_ids=[40, 1], logprobs=[-0.25, -0.5], finish_reason="stop"),
    Generated(token_ids=[40, 41, 42, 43], logprobs=None, finish_reason="length"),
]


# --- the formats ------------------------------------------------------------------------------------------------------

ids = st.integers(0, 2**31 - 1)
requests = st.builds(
    GenerateRequest,
    model=st.text(),
    prompt_token_ids=st.lists(ids, min_size=1, max_size=9),
    n=st.integers(1, MAX_COMPLETIONS),
    max_tokens=st.integers(1, 2**31 - 1),
    temperature=st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 9),
    top_p=st.floats(0, 1),
    stop_token_ids=st.lists(ids, max_size=3),
    logprobs=st.booleans(),
    seed=st.none() | st.integers(0, MAX_SEED),
    cache_salt=st.none() | st.text(st.characters(codec="utf-8"), min_size=1, max_size=9).filter(str.isprintable),
    request_id=st.from_regex(r"[0-9A-Za-z_-]{1,64}", fullmatch=True),
)


@st.composite
def replies(draw: st.DrawFn) -> tuple[GenerateRequest, list[Generated]]:
    """A request, and completions that answer it."""
    max_tokens = draw(st.integers(1, 6))
    group = []
    for _ in range(draw(st.integers(1, 3))):
        stops = draw(st.booleans())
        count = draw(st.integers(1, max_tokens)) if stops else max_tokens
        values = st.lists(st.floats(max_value=0, allow_infinity=False, width=32), min_size=count, max_size=count)
        group.append(
            Generated(
                token_ids=draw(st.lists(ids, min_size=count, max_size=count)),
                logprobs=draw(st.none() | values),
                finish_reason="stop" if stops else "length",
            )
        )
    prompt = draw(st.lists(ids, min_size=1, max_size=4))
    request = dataclasses.replace(REQUEST, n=len(group), max_tokens=max_tokens, prompt_token_ids=prompt)
    return request, group


@quick
@given(requests)
def test_a_request_comes_out_as_it_went_in(request: GenerateRequest) -> None:
    assert decode_request(encode_request(request)) == request


@quick
@given(replies())
def test_the_completions_of_a_reply_come_out_as_they_went_in_on_either_route(
    reply: tuple[GenerateRequest, list[Generated]],
) -> None:
    request, group = reply
    body = encode_reply(group, request)
    assert decode_reply(body, request) == group
    assert len(body) <= OWN_ROUTE.max_reply_bytes(request)
    assert COMPLETIONS_ROUTE.decode(completions_body(group, request), request) == group


def completions_body(group: list[Generated], request: GenerateRequest) -> bytes:
    choices = [
        {
            "index": member,
            "token_ids": one.token_ids,
            "logprobs": None if one.logprobs is None else {"token_logprobs": one.logprobs},
            "finish_reason": one.finish_reason,
            "prompt_token_ids": request.prompt_token_ids,
        }
        for member, one in enumerate(group)
    ]
    return json.dumps({"id": f"cmpl-{request.request_id}", "choices": choices[::-1]}).encode()


@quick
@given(st.binary(max_size=400))
@example(b"\x80\x00\x00\x00")
@example(b'\x00{"a": 1e999}')
@example(b'\x01["\xed\xa0\x80"]')
@example(b"\x01" + b"[" * 100_000)
@example(b"\x02" + b"9" * 5_000)
@example(b'\x02{"\\ud800": 1}')
def test_whatever_bytes_come_they_are_read_or_refused_and_nothing_else(data: bytes) -> None:
    fuzz_wire.check(data)


@quick
@given(st.data())
def test_a_reply_with_any_few_bytes_changed_is_refused_or_keeps_every_promise(data: st.DataObject) -> None:
    reader = data.draw(st.integers(128, 255))
    place, cut = data.draw(st.integers(0, 2**16 - 1)), data.draw(st.integers(0, 8))
    fuzz_wire.check(bytes([reader, *place.to_bytes(2, "little"), cut]) + data.draw(st.binary(max_size=8)))


def test_a_number_that_no_float_holds_is_refused_and_does_not_break_the_server() -> None:
    for name in ("temperature", "top_p", "n", "seed"):
        fields = dataclasses.asdict(REQUEST) | {name: 10**400}
        with pytest.raises(RequestRefusedError, match=f"{name} must be a"):
            decode_request(json.dumps(fields).encode())


@pytest.mark.parametrize("salt", ["\ud800", "a\x1b[2J", "", "x" * 1025, 1])
def test_a_salt_that_could_not_be_hashed_or_logged_is_refused(salt: object) -> None:
    with pytest.raises(RequestRefusedError, match="cache_salt null or a string of 1 to 1024 printable"):
        decode_request(json.dumps(dataclasses.asdict(REQUEST) | {"cache_salt": salt}).encode())


@pytest.mark.parametrize("name", ["", "a b", "a" * 65, "ä", "../x", None, 7])
def test_an_id_that_could_be_mistaken_for_something_else_is_refused(name: object) -> None:
    with pytest.raises(RequestRefusedError, match="request_id must be 1 to 64"):
        decode_request(json.dumps(dataclasses.asdict(REQUEST) | {"request_id": name}).encode())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"request_id": "5f0d"}, "another request: its request_id is '5f0d', not '5f0c'"),
        ({"n": 3}, "another request: its n is 3, not 2"),
        ({"n": True}, "its n is True"),
        ({"prompt_tokens": 3}, "its prompt_tokens is 3, not 2"),
        ({"more": 1}, "the reply must have the fields"),
        ({"completions": {}}, "not a list of objects"),
        ({"completions": []}, "asked for 2 completions, the server returned 0"),
        ({"completions": [None, None]}, "not a list of objects"),
    ],
    ids=str,
)
def test_a_reply_to_another_request_is_told_by_what_it_repeats(change: dict[str, Any], said: str) -> None:
    fields = json.loads(encode_reply(GROUP, REQUEST)) | change
    with pytest.raises(BadReplyError, match=said):
        decode_reply(json.dumps(fields).encode(), REQUEST)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"token_ids": []}, "0 tokens ended with stop, where max_tokens is 4"),
        ({"token_ids": [7] * 5}, "at most 4 numbers|5 tokens"),
        ({"token_ids": [7, -1]}, "token ids from -1 to 7"),
        ({"token_ids": [7, 512]}, "token ids from 7 to 512, where 0 to 511 would be the model's"),
        ({"finish_reason": "length"}, "2 tokens ended with length, where max_tokens is 4"),
        ({"finish_reason": "abort"}, "ended with 'abort', which is neither stop nor length"),
        ({"logprobs": [-0.5]}, "returned 2 tokens but 1 log-probs"),
        ({"logprobs": [-0.5, 0.5]}, "a log-prob is no finite number, or above 0"),
        ({"logprobs": [-0.5, float("-inf")]}, "finite number"),
        ({"logprobs": [float("nan"), -0.5]}, "finite number"),
    ],
    ids=str,
)
def test_a_completion_that_cannot_be_one_is_refused_on_either_route(change: dict[str, Any], said: str) -> None:
    group = [dataclasses.replace(GROUP[0], **change), GROUP[1]]
    with pytest.raises(BadReplyError, match=said):
        decode_reply(encode_reply(group, REQUEST), REQUEST, vocab_size=512)
    with pytest.raises(BadReplyError, match=said):
        COMPLETIONS_ROUTE.decode(completions_body(group, REQUEST), REQUEST, vocab_size=512)


def test_log_probs_that_were_not_asked_for_are_refused() -> None:
    request = dataclasses.replace(REQUEST, logprobs=False)
    with pytest.raises(BadReplyError, match="none were asked for"):
        decode_reply(encode_reply(GROUP, request), request)


def test_a_rounding_error_above_0_is_let_through() -> None:
    group = [dataclasses.replace(GROUP[0], logprobs=[2.0**-20, 0.0]), GROUP[1]]
    assert decode_reply(encode_reply(group, REQUEST), REQUEST) == group


def test_a_choice_of_another_prompt_or_twice_the_same_is_refused() -> None:
    for change, said in (({"prompt_token_ids": [3, 41]}, "another prompt"), ({"index": 0}, "not 0 to 1, each once")):
        reply = json.loads(completions_body(GROUP, REQUEST))
        reply["choices"][0].update(change)
        with pytest.raises(BadReplyError, match=said):
            COMPLETIONS_ROUTE.decode(json.dumps(reply).encode(), REQUEST)


# --- in a stream of rollouts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_route", [True, False], ids=["ludic", "plain"])
async def test_each_fault_of_the_wire_is_got_over_without_a_rollout_lost_doubled_or_mixed_up(own_route: bool) -> None:
    kinds = [kind for kind in wire_kinds.KINDS if kind.name != "connection refused"]
    run = await wire.break_fake(len(kinds), seed=1, own_route=own_route, kinds=kinds)
    assert [(one.fault, one.outcome) for one in run.injections if not one.ok] == []
    assert run.ok, wire.table(run)
    assert {one.fault for one in run.injections} >= {
        kind.name for kind in kinds if own_route or kind.name not in wire_kinds.NEED_TOKENS
    }
    assert run.num_unsent_retries == 0, "the client counts each request that it sends again, and no other"
    assert run.num_bad_replies <= run.num_retries


async def test_a_connection_that_is_refused_is_tried_again() -> None:
    kinds = [kind for kind in wire_kinds.KINDS if kind.name == "connection refused"]
    run = await wire.break_fake(4, seed=2, kinds=kinds)
    assert run.ok and len(run.injections) == 4, wire.table(run)


async def test_nothing_of_a_server_that_was_started_again_is_used() -> None:
    restart = await wire.restart_once(3)
    assert restart.ok, restart


def test_the_rows_of_the_table_are_made_with_any_count(tmp_path: Path) -> None:
    rows = wire.inject(3, seed=4, folder=tmp_path)
    assert {row.row for row in rows} == {wire.ROW, wire.RESTART_ROW}
    assert all(row.ok for row in rows) and len(rows) == 3 + 1 + 1


async def test_a_fault_that_does_not_end_is_an_error_and_nothing_is_handed_out() -> None:
    server, url = await wire_server.start()
    struck = next(kind for kind in wire_kinds.KINDS if kind.name == "one completion missing")
    async with fault_proxy(url, rng=random.Random(0)) as proxy, wire.fake_client(proxy.base_url, True) as engine:
        proxy.plan = {(5, 4): [struck] * 9}
        with (
            wire.quick_client(30.0),
            pytest.raises(RuntimeError, match=r"6 attempts failed, the last with .*asked for 2 completions"),
        ):
            await engine.generate([5, 4], num_completions=2, sampling=SamplingParams(max_tokens=4))
        assert engine.num_retries == 5 and engine.num_bad_replies == 6
    server.close()


def test_a_harness_that_mixes_prompts_up_is_caught() -> None:
    """The judge itself: a group with another request's completions is not the one that was drawn."""
    prompt = (5, 4)
    proxy: Any = type("Proxy", (), {"delivered": {prompt: [("a", b"")]}})
    drawn = [wire_server.drawn(prompt, "b", member, wire.MAX_TOKENS) for member in range(wire.GROUP_SIZE)]
    group: Any = type("Group", (), {"rollouts": [type("Rollout", (), {"completion": one}) for one in drawn]})
    assert not wire._is_the_one(group, proxy, prompt, drawn=True)
    proxy.delivered[prompt] = [("b", b"")]
    assert wire._is_the_one(group, proxy, prompt, drawn=True)
    assert any(ByteTokenizer().decode(one.token_ids) for one in drawn), "its completions are text"


# --- the real server --------------------------------------------------------------------------------------------------


@pytest.mark.vllm
async def test_the_faults_of_the_wire_do_no_harm_with_the_real_server(
    digit_server: "tuple[ServerProcess, Path]",
) -> None:
    server, model = digit_server
    kinds = [kind for kind in wire_kinds.KINDS if not kind.times_out]
    run = await wire.break_real(server.base_url, str(model), 40, seed=5, kinds=random.Random(6).sample(kinds, 40))
    assert run.ok, wire.table(run)


@pytest.mark.vllm
async def test_the_real_server_repeats_the_requests_id_on_both_routes(
    digit_server: "tuple[ServerProcess, Path]",
) -> None:
    server, model = digit_server
    for own_route in (True, False):
        engine = VLLMEngine(server.base_url, model=str(model))
        engine._has_generate_route = own_route
        sampling = SamplingParams(max_tokens=12)
        groups = await asyncio.gather(
            *(engine.generate([5 + number, 4], num_completions=3, sampling=sampling) for number in range(8))
        )
        await engine.aclose()
        assert [len(group) for group in groups] == [3] * 8 and engine.num_bad_replies == 0
        assert all(cast("list[float]", one.logprobs) for group in groups for one in group)
