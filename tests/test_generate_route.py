"""The generation route without vLLM: the wire, and the middleware over a stand-in for the engine.

What the real engine makes of its requests is in test_vllm_integration.py.
"""

import array
import asyncio
import dataclasses
import json
import re
import sys
from collections.abc import AsyncIterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ludic.inference import wire
from ludic.inference.server import generate_route
from ludic.inference.server.generate_route import GenerateRoute
from ludic.inference.wire import PATH, RECORDED_PREFIX, Generated, GenerateRequest, RequestRefusedError

REQUEST = GenerateRequest(
    model="tiny",
    prompt_token_ids=[3, 40, 41],
    n=2,
    max_tokens=8,
    temperature=0.7,
    top_p=0.9,
    stop_token_ids=[1, 77],
    logprobs=True,
    seed=5,
    cache_salt="run-0",
    request_id="attempt-1",
)
BODY = dataclasses.asdict(REQUEST)


# --- the wire ---------------------------------------------------------------------------------------------------------


def test_a_request_and_a_reply_come_out_as_they_went_in() -> None:
    assert wire.decode_request(wire.encode_request(REQUEST)) == REQUEST
    group = [
        Generated(token_ids=[40, 2**31 - 1, 1], logprobs=[-0.25, 0.0, -1e30], finish_reason="stop"),
        Generated(token_ids=[9] * 8, logprobs=None, finish_reason="length"),
    ]
    reply = wire.decode_reply(wire.encode_reply(group, REQUEST), REQUEST)
    assert reply[1] == group[1] and reply[0].token_ids == group[0].token_ids
    assert reply[0].logprobs == [-0.25, 0.0, pytest.approx(-1e30, rel=1e-6)]


def test_arrays_travel_in_little_endian_order(monkeypatch: pytest.MonkeyPatch) -> None:
    request = dataclasses.replace(REQUEST, n=1)
    one = Generated(token_ids=[40, 1], logprobs=[-0.25, -0.5], finish_reason="stop")
    (fields,) = json.loads(wire.encode_reply([one], request))["completions"]
    assert fields == {"token_ids": "KAAAAAEAAAA=", "logprobs": "AACAvgAAAL8=", "finish_reason": "stop"}
    monkeypatch.setattr(sys, "byteorder", "big" if sys.byteorder == "little" else "little")
    swapped = wire.encode_reply([one], request)
    assert json.loads(swapped)["completions"][0]["token_ids"] == "AAAAKAAAAAE="
    assert wire.decode_reply(swapped, request) == [one]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt_token_ids": []}, "prompt_token_ids must hold at least one token"),
        ({"prompt_token_ids": [3, -1]}, "prompt_token_ids must be a list of token ids from 0"),
        ({"prompt_token_ids": [3, True]}, "prompt_token_ids must be a list"),
        ({"prompt_token_ids": "3"}, "prompt_token_ids must be a list"),
        ({"stop_token_ids": [2**31]}, "stop_token_ids must be a list"),
        ({"n": 0}, "n must be a whole number from 1 to .*, not 0"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number from 1 to .*, not 1.5"),
        ({"max_tokens": None}, "max_tokens must be a whole number from 1 to .*, not None"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": 2**63}, "seed must be a whole number from 0"),
        ({"temperature": float("nan")}, "temperature must be a finite number, not nan"),
        ({"temperature": False}, "temperature must be a finite number, not False"),
        ({"top_p": "1"}, "top_p must be a finite number, not '1'"),
        ({"logprobs": 0}, "logprobs must be true or false, not 0"),
        ({"cache_salt": ""}, "cache_salt null or a string of 1 to 1024"),
        ({"cache_salt": "x" * 1025}, "cache_salt null or a string of 1 to 1024"),
        ({"model": None}, "model must be a string"),
        ({"ignore_eos": True}, "exactly the fields model, .*, not .*ignore_eos"),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_its_limit(change: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestRefusedError, match=said) as refusal:
        wire.decode_request(json.dumps(BODY | change).encode())
    assert refusal.value.status == 400 and len(str(refusal.value)) < 600


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b"9" * 5000])
def test_what_is_not_json_is_refused_as_such(body: bytes) -> None:
    with pytest.raises(RequestRefusedError, match="not JSON"):
        wire.decode_request(body)


def test_no_field_has_a_default() -> None:
    for name in BODY:
        with pytest.raises(RequestRefusedError, match="must have exactly the fields"):
            wire.decode_request(json.dumps({key: BODY[key] for key in BODY if key != name}).encode())


# --- the middleware ---------------------------------------------------------------------------------------------------


class Engine:
    """An engine client that answers with `outputs`, raises `error`, or never ends."""

    def __init__(self) -> None:
        self.model_config = SimpleNamespace(max_model_len=64)
        self.outputs: list[Any] | None = [self.output(2)]
        self.error: Exception | None = None
        self.asked: list[tuple[Any, Any]] = []
        self.adapters: list[Any] = []
        self.started = asyncio.Event()
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self.problem = "no recorder here"
        self.taken: list[Any] = []
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    @staticmethod
    def output(count: int, finish_reason: str = "stop") -> SimpleNamespace:
        # Two entries at the first position, as where another request of the batch wants more of them.
        logprobs = SimpleNamespace(logprobs=[-0.25, -9.0, -0.5], start_indices=[0, 2])
        one = SimpleNamespace(token_ids=[40, 1], logprobs=logprobs, finish_reason=finish_reason)
        return SimpleNamespace(outputs=[one] * count)

    async def generate(self, prompt: Any, params: Any, request_id: str, *, lora_request: Any) -> AsyncIterator[Any]:
        self.asked.append((prompt, params))
        self.adapters.append(lora_request)
        self.running.add(request_id)
        self.started.set()
        if self.error is not None:
            raise self.error
        if self.outputs is None:
            await asyncio.Event().wait()
        for output in self.outputs or ():
            yield output

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        """The worker's recorder: `problem` is why it has none, `taken` what it holds of every request."""
        self.calls.append((method, args))
        return [self.problem if method == "ludic_record_logprobs" else self.taken]

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.running.discard(request_id)


class VLLMError(Exception):
    """The family of errors that later versions have, and 0.26 does not."""


class ClientError(VLLMError): ...


class DeadError(Exception): ...


class FullQueueError(VLLMError):
    http_status = 503


@pytest.fixture(params=["0.26", "0.32"])
def vllm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A stand-in for the modules of vLLM that the route imports, with the errors of the oldest and the newest version."""
    modules: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.inputs": {"tokens_input": lambda ids, *, cache_salt: {"ids": ids, "salt": cache_salt}},
        "vllm.sampling_params": {"SamplingParams": SimpleNamespace, "RequestOutputKind": SimpleNamespace(FINAL_ONLY=2)},
        "vllm.exceptions": {},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.exceptions": {"EngineDeadError": DeadError, "EngineGenerateError": type("E", (Exception,), {})},
    }
    if request.param == "0.32":
        modules["vllm.exceptions"] = {"VLLMError": VLLMError, "VLLMClientError": ClientError}
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    return str(request.param)


class Call:
    """One request through the middleware, by hand."""

    def __init__(self, engine: Engine, body: bytes = b"", *, method: str = "POST", path: str = PATH) -> None:
        args = SimpleNamespace(served_model_name=["tiny"], worker_extension_cls=generate_route.WORKER_EXTENSION)
        models = SimpleNamespace(lora_requests={"tuned": "vLLM's adapter"})
        state = SimpleNamespace(engine_client=engine, args=args, openai_serving_models=models)
        self.scope: dict[str, Any] = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [(b"content-type", b"application/json; charset=utf-8")],
            "app": SimpleNamespace(state=state),
        }
        self.body = body
        self.leave = asyncio.Event()
        self.status = 0
        self.answer: Any = None
        self._messages: list[dict[str, Any]] = [
            {"type": "http.request", "body": body[:5], "more_body": True},
            {"type": "http.request", "body": body[5:]},
        ]

    async def receive(self) -> dict[str, Any]:
        if self._messages:
            return self._messages.pop(0)
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.answer = json.loads(message["body"])

    async def run(self, route: GenerateRoute | None = None) -> "Call":
        await (route or GenerateRoute(behind))(self.scope, self.receive, self.send)
        return self


async def behind(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 299})


def encoded(**change: Any) -> bytes:
    return json.dumps(BODY | change).encode()


@pytest.mark.usefixtures("vllm")
async def test_the_engine_is_asked_for_exactly_the_request_and_its_tokens_come_back() -> None:
    engine = Engine()
    call = await Call(engine, encoded()).run()
    assert call.status == 200
    expected = Generated(token_ids=[40, 1], logprobs=[-0.25, -0.5], finish_reason="stop")
    assert wire.decode_reply(json.dumps(call.answer).encode(), REQUEST) == [expected, expected]
    ((prompt, params),) = engine.asked
    assert prompt == {"ids": [3, 40, 41], "salt": "run-0"}
    assert vars(params) == {
        "n": 2, "temperature": 0.7, "top_p": 0.9, "max_tokens": 8, "stop_token_ids": [1, 77], "seed": 5, "logprobs": 0,
        "flat_logprobs": True, "detokenize": False, "output_kind": 2, "skip_clone": True,
    }  # fmt: skip


@pytest.mark.usefixtures("vllm")
async def test_without_logprobs_the_engine_computes_none() -> None:
    engine = Engine()
    call = await Call(engine, encoded(logprobs=False)).run()
    assert engine.asked[0][1].logprobs is None
    assert [fields["logprobs"] for fields in call.answer["completions"]] == [None, None]


@pytest.mark.usefixtures("vllm")
async def test_a_caller_that_leaves_takes_its_generation_with_it() -> None:
    engine = Engine()
    engine.outputs = None
    call = Call(engine, encoded())
    running = asyncio.create_task(call.run())
    await engine.started.wait()
    assert len(engine.running) == 1
    call.leave.set()
    await running
    assert call.status == 0 and not engine.running and len(engine.aborted) == 1


@pytest.mark.usefixtures("vllm")
async def test_a_server_that_ends_takes_the_generation_with_it() -> None:
    engine = Engine()
    engine.outputs = None
    running = asyncio.create_task(Call(engine, encoded()).run())
    await engine.started.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not engine.running


async def test_a_caller_that_leaves_before_its_request_is_there_costs_nothing() -> None:
    engine = Engine()
    call = Call(engine)
    call._messages = [{"type": "http.disconnect"}]
    assert (await call.run()).status == 0 and not engine.asked


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"n": 0}, 400, "n must be"),
        ({"model": "other"}, 404, "'other' is not served"),
        ({"max_tokens": 62}, 400, "prompt of 3 tokens and max_tokens 62 are more than the model's context of 64"),
    ],
)
async def test_a_wrong_request_never_reaches_the_engine(change: dict[str, Any], status: int, said: str) -> None:
    engine = Engine()
    call = await Call(engine, encoded(**change)).run()
    assert (call.status, call.answer["error"]["code"]) == (status, status)
    assert said in call.answer["error"]["message"] and not engine.asked


@pytest.mark.usefixtures("vllm")
async def test_a_request_that_fills_the_context_is_served() -> None:
    assert (await Call(Engine(), encoded(max_tokens=61)).run()).status == 200


async def test_a_body_that_is_too_large_is_refused_before_it_is_read_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generate_route, "MAX_BODY_BYTES", 4)
    call = await Call(Engine(), encoded()).run()
    assert call.status == 413 and len(call._messages) == 1


async def test_another_content_type_is_refused_since_a_web_page_could_send_it() -> None:
    call = Call(Engine(), encoded())
    call.scope["headers"] = [(b"content-type", b"text/plain")]
    assert (await call.run()).status == 415


async def test_everything_else_goes_to_vllm() -> None:
    assert (await Call(Engine(), path="/v1/completions").run()).status == 299
    assert (await Call(Engine(), path=PATH + "/x").run()).status == 299
    call = Call(Engine())
    call.scope["type"] = "websocket"
    assert (await call.run()).status == 299


async def test_the_route_says_which_protocol_it_speaks_also_below_a_prefix() -> None:
    call = Call(Engine(), method="GET", path="/prefix" + PATH)
    call.scope["root_path"] = "/prefix"
    await call.run()
    assert (call.status, call.answer) == (200, {"protocol": wire.PROTOCOL})
    assert (await Call(Engine(), method="PUT").run()).status == 405


async def test_what_the_caller_did_is_400_and_what_the_engine_did_is_500(vllm: str) -> None:
    cases: list[tuple[Exception, int]] = [(ValueError("too hot"), 400), (DeadError("gone"), 500)]
    if vllm == "0.32":
        cases += [(ClientError("too hot"), 400), (VLLMError("broken"), 500), (FullQueueError("full"), 503)]
    for error, status in cases:
        engine = Engine()
        engine.error = error
        call = await Call(engine, encoded()).run()
        assert (call.status, call.answer["error"]["message"]) == (status, str(error))


@pytest.mark.usefixtures("vllm")
async def test_an_error_without_a_text_is_told_by_its_cause() -> None:
    engine = Engine()
    engine.error = DeadError()
    engine.error.__cause__ = RuntimeError("CUDA error")
    call = await Call(engine, encoded()).run()
    assert call.answer["error"]["message"] == "DeadError: CUDA error"


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("outputs", [[], [Engine.output(1)], [Engine.output(2, "error")]], ids=["none", "one", "error"])
async def test_a_group_that_the_engine_did_not_finish_is_500(outputs: list[Any]) -> None:
    engine = Engine()
    engine.outputs = outputs
    call = await Call(engine, encoded()).run()
    assert call.status == 500 and call.answer["error"]["type"] == "InternalServerError"


@pytest.mark.usefixtures("vllm")
async def test_a_bug_is_not_dressed_up_as_an_answer() -> None:
    engine = Engine()
    engine.error = KeyError("a bug")
    with pytest.raises(KeyError):
        await Call(engine, encoded()).run()


# --- log-probs that the worker records --------------------------------------------------------------------------------


def bytes_of(ids: list[int], logprobs: list[float]) -> tuple[bytes, bytes]:
    return array.array("i", ids).tobytes(), array.array("f", logprobs).tobytes()


@pytest.fixture
def recording() -> Engine:
    """An engine whose worker records, and whose records fit its completions."""
    engine = Engine()
    engine.problem = ""
    engine.taken = [bytes_of([40, 1], [-0.75, -1.5])] * 2
    return engine


@pytest.mark.usefixtures("vllm")
async def test_log_probs_come_from_the_workers_recorder_where_it_has_one(recording: Engine) -> None:
    route = GenerateRoute(behind)
    for _ in range(2):
        call = await Call(recording, encoded()).run(route)
        reply = wire.decode_reply(json.dumps(call.answer).encode(), REQUEST)
        assert [one.logprobs for one in reply] == [[-0.75, -1.5]] * 2
        assert [one.token_ids for one in reply] == [[40, 1]] * 2
    assert [params.logprobs for _, params in recording.asked] == [None, None], "vLLM need not send any"
    start, (_, first), (_, second) = recording.calls
    assert start == ("ludic_record_logprobs", ()), "it is started once"
    assert first[1:] == (3, [2, 2], []) and first[0] != second[0]
    assert {first[0], second[0]} == recording.running
    assert all(re.fullmatch(RECORDED_PREFIX + "[0-9a-f]{32}", key) for key in recording.running)


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("change", [{"temperature": 0.0}, {"logprobs": False}], ids=str)
async def test_greedy_requests_and_those_without_log_probs_are_not_recorded(
    recording: Engine, change: dict[str, Any]
) -> None:
    call = await Call(recording, encoded(**change)).run()
    assert call.status == 200 and not recording.calls
    assert recording.asked[0][1].logprobs == (0 if change.get("logprobs", True) else None)
    assert not any(key.startswith(RECORDED_PREFIX) for key in recording.running)


@pytest.mark.usefixtures("vllm")
async def test_another_worker_extension_is_not_asked_to_record(recording: Engine) -> None:
    call = Call(recording, encoded())
    call.scope["app"].state.args.worker_extension_cls = "somebody.Else"
    assert (await call.run()).status == 200
    assert not recording.calls and recording.asked[0][1].logprobs == 0


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("entry", [None, bytes_of([40, 2], [-0.75, -1.5]), bytes_of([40], [-0.75])], ids=str)
async def test_log_probs_of_other_tokens_than_the_completions_are_not_believed(
    recording: Engine, entry: Any, caplog: pytest.LogCaptureFixture
) -> None:
    recording.taken[1] = entry
    call = await Call(recording, encoded()).run()
    reply = wire.decode_reply(json.dumps(call.answer).encode(), REQUEST)
    assert [one.logprobs for one in reply] == [[-0.75, -1.5], None]
    assert "log-probs of 1 completions of 2 are not known" in caplog.text


@pytest.mark.usefixtures("vllm")
async def test_a_recorder_whose_records_do_not_fit_is_given_up(recording: Engine) -> None:
    route = GenerateRoute(behind)
    recording.taken = [None, None]
    for _ in range(6):
        await Call(recording, encoded()).run(route)
    assert [params.logprobs for _, params in recording.asked] == [None] * 5 + [0]


@pytest.mark.usefixtures("vllm")
async def test_what_was_recorded_for_a_caller_that_left_is_forgotten_with_the_next_request(recording: Engine) -> None:
    route, outputs = GenerateRoute(behind), recording.outputs
    recording.outputs = None
    leaving = Call(recording, encoded())
    running = asyncio.create_task(leaving.run(route))
    await recording.started.wait()
    (left,) = recording.running
    leaving.leave.set()
    await running
    recording.outputs = outputs
    for abandoned in ([left], []):
        await Call(recording, encoded()).run(route)
        assert recording.calls[-1][1][3] == abandoned


SHORT_REQUEST = GenerateRequest(
    model="tiny", prompt_token_ids=[1], n=2, max_tokens=4, temperature=1.0, top_p=1.0, stop_token_ids=[], logprobs=True,
    seed=None, cache_salt=None, request_id="attempt-2",
)  # fmt: skip


class BrokenWorker:
    """vLLM hands what fails in a worker to the front end as a bare Exception."""

    def __init__(self) -> None:
        self.asked = 0

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        self.asked += 1
        raise Exception(f"{method}: no C compiler")


async def test_a_recorder_that_does_not_start_leaves_vllms_own_log_probs_and_is_not_asked_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorder, worker = generate_route._Recorder(), BrokenWorker()
    args = SimpleNamespace(worker_extension_cls=generate_route.WORKER_EXTENSION)
    state = SimpleNamespace(engine_client=worker, args=args)
    assert [await recorder.records(state, SHORT_REQUEST) for _ in range(9)] == [False] * 9
    assert worker.asked == 1
    assert "log-probs are vLLM's own" in caplog.text and "ludic_record_logprobs: no C compiler" in caplog.text


async def test_records_that_cannot_be_read_cost_the_log_probs_and_not_the_completions() -> None:
    group = [SimpleNamespace(token_ids=[4, 5]), SimpleNamespace(token_ids=[6])]
    assert await generate_route._Recorder().take(BrokenWorker(), "key", SHORT_REQUEST, group) == [None, None]
