"""Weight syncs: what did not arrive is caught, whatever breaks says so in the server's words, and nothing is left over."""

import asyncio
import errno
import json
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from aiohttp import web
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ludic.inference import weight_sync
from ludic.inference.digest import digest_hex, tensor_digest
from ludic.inference.errors import EngineError, ServerUnauthorizedError, ServerUnreachableError, WeightSyncError
from ludic.inference.server_control import ServerControl, error_text
from ludic.inference.vllm_client import VLLMEngine
from ludic.inference.weight_sync import WeightSync
from ludic.inference.weight_transport import TRANSPORTS, WireWeights
from ludic.training.attention import prepare_packed_attention
from tests.vllm_helpers import make_tiny_model, prompt_logprobs, randomize_weights

PROBE = [3, 70, 71, 72, 80, 90, 4]
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The policy as it is trained, and what the server holds at first: other weights of the same shape."""
    folder = tmp_path_factory.mktemp("models")
    policy = make_tiny_model(folder / "policy", tie_word_embeddings=True, seed=1)
    prepare_packed_attention(policy)
    return policy, make_tiny_model(folder / "served", tie_word_embeddings=True, seed=2)


@pytest.fixture
def policy(models: tuple[PreTrainedModel, PreTrainedModel]) -> PreTrainedModel:
    return models[0]


@pytest.fixture
def control(models: tuple[PreTrainedModel, PreTrainedModel]) -> "FakeControl":
    randomize_weights(models[1], seed=2)
    return FakeControl(models[1])


class FakeControl(ServerControl):
    """A server's control routes over a model in this process; it really loads the file that it is told of.

    `on` maps a route to what happens in its place (and may raise).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__("http://fake")
        self.model = model
        self.calls: list[str] = []
        self.files: list[Path] = []
        self.on: dict[str, Callable[[], None]] = {}

    def _note(self, call: str) -> None:
        self.calls.append(call)
        self.on.get(call, lambda: None)()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        assert Path(init_info["directory"]).is_dir()
        self._note("init")

    def start_weight_update(self) -> None:
        self._note("start")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.files.append(Path(update_info["path"]))
        self._note("update")
        tensors = load_file(update_info["path"])
        assert set(tensors) == set(update_info["names"])
        assert {name: digest_hex(tensor_digest(tensor)) for name, tensor in tensors.items()} == update_info["digests"]
        self.model.load_state_dict(tensors, strict=False)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._note("finish")

    def pause(self) -> None:
        self._note("pause")

    def resume(self) -> None:
        self._note("resume")

    def held_digests(self, wanted: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
        self._note("digests")
        parameters = dict(self.model.named_parameters())
        return [
            {
                name: digest_hex(tensor_digest(parameters[name].to(getattr(torch, spec["dtype"]))))
                for name, spec in wanted.items()
            }
        ]

    def prompt_logprobs(self, model: str, token_ids: list[int]) -> list[float]:
        self._note("probe")
        return prompt_logprobs(self.model, token_ids)


def sync_with(control: ServerControl, *, dtype: torch.dtype = torch.float32, deadline_s: float = 60.0) -> WeightSync:
    return WeightSync(
        control,
        transport="ludic_shm",
        served_model="tiny",
        dtype=dtype,
        probe_token_ids=PROBE,
        deadline_s=deadline_s,
    )


def refuse(message: str) -> Callable[[], None]:
    def call() -> None:
        raise EngineError(message)

    return call


# --- a sync that takes ------------------------------------------------------------------------------------------------


def test_after_a_sync_the_server_holds_the_policy_and_the_report_says_what_was_compared(
    control: FakeControl, policy: PreTrainedModel, tmp_path: Path
) -> None:
    wanted = prompt_logprobs(make_tiny_model(tmp_path, tie_word_embeddings=True, seed=1), PROBE)
    before = prompt_logprobs(control.model, PROBE)
    assert max(abs(a - b) for a, b in zip(before, wanted, strict=True)) > 0.3
    sync = sync_with(control)
    report = sync.sync(policy, 4)
    assert prompt_logprobs(control.model, PROBE) == pytest.approx(wanted, abs=1e-5)
    parameters = list(policy.parameters())
    assert report.policy_version == 4
    assert report.num_tensors == len(parameters)
    assert report.num_bytes == sum(parameter.numel() * 4 for parameter in parameters)
    assert report.logprob_gap is not None and report.logprob_gap < 1e-5
    assert f"all {len(parameters)} tensors" in report.proof and "nats" in report.proof
    assert set(report.phases_s) == {"open", "pause", "send", "digests", "resume", "probe"}
    assert sum(report.phases_s.values()) == pytest.approx(report.seconds)
    sync.close()


def test_the_server_is_paused_for_the_update_and_asked_for_log_probs_when_it_runs_again(
    control: FakeControl, policy: PreTrainedModel
) -> None:
    sync = sync_with(control)
    sync.sync(policy, 0)
    sync.sync(policy, 1)
    once = ["pause", "start", "update", "finish", "digests", "resume", "probe"]
    assert control.calls == ["init", *once, *once]
    sync.close()


def test_no_file_and_no_folder_is_left(control: FakeControl, policy: PreTrainedModel) -> None:
    sync = sync_with(control)
    sync.sync(policy, 0)
    (file,) = control.files
    assert not file.exists() and file.parent.is_dir()
    sync.close()
    sync.close()
    assert not file.parent.exists()


def test_weights_go_over_the_wire_in_the_servers_dtype(control: FakeControl, policy: PreTrainedModel) -> None:
    control.model.bfloat16()
    try:
        report = sync_with(control, dtype=torch.bfloat16).sync(policy, 0)
    finally:
        control.model.float()
    assert report.num_bytes == sum(parameter.numel() * 2 for parameter in policy.parameters())
    assert report.logprob_gap is not None and 0 < report.logprob_gap < 0.1
    assert policy.dtype == torch.float32


def test_a_tied_weight_is_sent_once_under_its_name_in_the_checkpoint(policy: PreTrainedModel) -> None:
    names = [name for name, _ in WireWeights(model=policy, dtype=torch.float32)]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def test_a_policy_in_training_mode_stays_in_it(control: FakeControl, policy: PreTrainedModel) -> None:
    policy.train()
    sync_with(control).sync(policy, 0)
    assert policy.training


def test_digests_that_the_server_cannot_give_are_counted_and_not_called_equal(
    control: FakeControl, policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = control.held_digests

    def packed(wanted: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
        return [
            {name: digest if "norm" in name else "" for name, digest in worker.items()} for worker in honest(wanted)
        ]

    monkeypatch.setattr(control, "held_digests", packed)
    report = sync_with(control).sync(policy, 0)
    assert f"5 of {report.num_tensors} held tensors compared" in report.proof


# --- a sync that does not ---------------------------------------------------------------------------------------------


def test_one_flipped_element_on_the_server_is_caught_and_the_tensor_named(
    control: FakeControl, policy: PreTrainedModel
) -> None:
    @torch.no_grad()
    def flip() -> None:
        dict(control.model.named_parameters())[NORM][5] += 1e-6

    control.on["finish"] = flip
    sync = sync_with(control)
    with pytest.raises(WeightSyncError, match=rf"1 of \d+ tensors on the server differ .* the first is {NORM}"):
        sync.sync(policy, 1)
    assert control.calls[-1] == "resume"


def test_one_worker_of_several_that_differs_is_caught(
    control: FakeControl, policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = control.held_digests

    def second_worker_is_stale(wanted: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
        (worker,) = honest(wanted)
        return [worker, worker | {NORM: "0123456789abcdef"}]

    monkeypatch.setattr(control, "held_digests", second_worker_is_stale)
    with pytest.raises(WeightSyncError, match=f"{NORM} .*0123456789abcdef"):
        sync_with(control).sync(policy, 1)


def test_an_output_head_that_the_digests_cannot_see_is_caught_by_the_log_probs(
    control: FakeControl, policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = prompt_logprobs(control.model, PROBE)
    monkeypatch.setattr(control, "prompt_logprobs", lambda model, token_ids: stale)
    with pytest.raises(WeightSyncError, match=r"log-probs of the probe .* differ .* \(limit 0\.15\)"):
        sync_with(control).sync(policy, 1)


def test_log_probs_that_are_not_numbers_are_caught(
    control: FakeControl, policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "prompt_logprobs", lambda model, ids: [float("nan")] * (len(ids) - 1))
    with pytest.raises(WeightSyncError, match="nan"):
        sync_with(control).sync(policy, 1)


def test_a_server_that_hangs_is_an_error_at_the_deadline(control: FakeControl, policy: PreTrainedModel) -> None:
    released = threading.Event()

    def hang() -> None:
        released.wait(30)
        raise EngineError("too late")

    control.on["update"] = hang
    with pytest.raises(WeightSyncError, match=r"weight sync 3 over ludic_shm did not end within 0\.2 s"):
        sync_with(control, deadline_s=0.2).sync(policy, 3)
    released.set()


def test_a_refusal_ends_a_transfer_that_waits_for_the_server_in_vain(
    control: FakeControl, policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_sync, "REFUSAL_GRACE_S", 0.1)
    released = threading.Event()

    def refused_beside_a_broadcast() -> None:
        control.refusal = EngineError("/update_weights answered 500: shape mismatch")
        released.wait(30)

    control.on["update"] = refused_beside_a_broadcast
    with pytest.raises(WeightSyncError, match="refused by the server: /update_weights answered 500: shape mismatch"):
        sync_with(control, deadline_s=20).sync(policy, 3)
    released.set()


@pytest.mark.parametrize("route", ["start", "update", "finish", "digests"])
def test_the_servers_words_surface_and_it_is_resumed(control: FakeControl, policy: PreTrainedModel, route: str) -> None:
    control.on[route] = refuse(f"/{route} answered 500: tensor 'lm_head.weight' has no place here")
    with pytest.raises(WeightSyncError) as failure:
        sync_with(control).sync(policy, 2)
    message = str(failure.value)
    assert message.startswith("weight sync 2 over ludic_shm failed: ") and "no place here" in message
    assert control.calls[-1] == "resume"
    assert not any(file.exists() for file in control.files)


def test_a_server_that_cannot_be_resumed_does_not_hide_why_the_sync_failed(
    control: FakeControl, policy: PreTrainedModel
) -> None:
    control.on = {"update": refuse("the file is corrupt"), "resume": refuse("I am gone")}
    with pytest.raises(WeightSyncError, match="the file is corrupt"):
        sync_with(control).sync(policy, 2)


def test_a_server_that_stays_paused_after_a_good_update_is_an_error(
    control: FakeControl, policy: PreTrainedModel
) -> None:
    control.on["resume"] = refuse("cannot resume")
    with pytest.raises(WeightSyncError, match="cannot resume"):
        sync_with(control).sync(policy, 2)


def test_a_full_disk_leaves_no_half_file(
    control: FakeControl, policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def half(tensors: dict[str, torch.Tensor], path: Path) -> None:
        path.write_bytes(b"half of it")
        written.append(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(WeightSyncError, match="No space left on device"):
        sync_with(control).sync(policy, 2)
    assert not written[0].exists() and control.calls[-1] == "resume"


def test_a_sync_that_failed_can_be_tried_again(control: FakeControl, policy: PreTrainedModel) -> None:
    control.on["update"] = refuse("not now")
    sync = sync_with(control)
    with pytest.raises(WeightSyncError):
        sync.sync(policy, 1)
    control.on.clear()
    assert sync.sync(policy, 1).policy_version == 1


async def test_the_client_keeps_its_old_version_when_a_sync_fails(
    control: FakeControl, policy: PreTrainedModel
) -> None:
    client = VLLMEngine("http://127.0.0.1:1", model="tiny")
    client._sync = sync_with(control)
    await client.update_weights(policy, policy_version=1)
    control.on["update"] = refuse("no")
    with pytest.raises(WeightSyncError):
        await client.update_weights(policy, policy_version=2)
    assert client.policy_version == 1
    await client.aclose()


# --- the control routes over a socket ---------------------------------------------------------------------------------


@pytest.fixture
async def routes() -> AsyncIterator[tuple[ServerControl, list[tuple[str, str, Any]]]]:
    """A control, and what its server saw: method, path with query, body. The server refuses some paths."""
    seen: list[tuple[str, str, Any]] = []
    entry = {"70": {"logprob": -1.5, "rank": 1}}

    async def handle(request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else None
        seen.append((request.method, request.path_qs, body))
        match request.path:
            case "/refused":
                return web.json_response({"error": {"message": "the engine is busy", "code": 500}}, status=500)
            case "/forbidden":
                return web.json_response({"error": "Unauthorized"}, status=401)
            case "/v1/completions":
                return web.json_response({"choices": [{"prompt_logprobs": [None, entry, {"71": {"logprob": -0.5}}]}]})
            case "/collective_rpc":
                return web.json_response({"results": [{"rank": 0}, {"rank": 1}]})
            case "/slow":
                await request.content.read()
                await slow.wait()
        return web.Response()

    slow = asyncio.Event()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield ServerControl(f"http://127.0.0.1:{runner.addresses[0][1]}/", api_key="secret", timeout_s=30), seen
    slow.set()
    await runner.cleanup()


async def call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:

    return await asyncio.to_thread(function, *args, **options)


async def test_every_control_call_is_the_route_that_vllm_has(
    routes: tuple[ServerControl, list[tuple[str, str, Any]]],
) -> None:
    control, seen = routes
    await call(control.init_weight_transfer_engine, {"directory": "/d"})
    await call(control.pause)
    await call(control.start_weight_update)
    await call(control.update_weights, {"path": "/d/f"})
    await call(control.finish_weight_update)
    await call(control.finish_weight_update, "7")
    await call(control.resume)
    assert await call(control.server_info) == {"rank": 0}
    assert await call(control.held_digests, {"w": {"dtype": "float32", "shape": [1]}}) == [{"rank": 0}, {"rank": 1}]
    assert await call(control.prompt_logprobs, "m", [3, 70, 71]) == [-1.5, -0.5]
    assert seen == [
        ("POST", "/init_weight_transfer_engine", {"init_info": {"directory": "/d"}}),
        ("POST", "/pause?mode=wait&clear_cache=true", None),
        ("POST", "/start_weight_update", None),
        ("POST", "/update_weights", {"update_info": {"path": "/d/f"}}),
        ("POST", "/finish_weight_update", None),
        ("POST", "/finish_weight_update", {"weight_version": "7"}),
        ("POST", "/resume", None),
        ("POST", "/collective_rpc", {"method": "ludic_server_info", "args": []}),
        (
            "POST",
            "/collective_rpc",
            {"method": "ludic_weight_digests", "args": [json.dumps({"w": {"dtype": "float32", "shape": [1]}})]},
        ),
        (
            "POST",
            "/v1/completions",
            {
                "model": "m",
                "prompt": [3, 70, 71],
                "max_tokens": 1,
                "temperature": 1.0,
                "prompt_logprobs": 0,
                "add_special_tokens": False,
            },
        ),
    ]


async def test_a_refusal_names_the_route_the_status_and_the_servers_text(
    routes: tuple[ServerControl, list[tuple[str, str, Any]]],
) -> None:
    with pytest.raises(EngineError, match=r"/refused on http://.* answered 500: the engine is busy"):
        await call(routes[0].request, "POST", "/refused")


async def test_a_missing_key_is_told_apart(routes: tuple[ServerControl, list[tuple[str, str, Any]]]) -> None:
    with pytest.raises(ServerUnauthorizedError, match="/forbidden: it wants an API key"):
        await call(routes[0].request, "POST", "/forbidden")


async def test_a_route_that_does_not_answer_is_an_error_at_its_deadline(
    routes: tuple[ServerControl, list[tuple[str, str, Any]]],
) -> None:
    with pytest.raises(EngineError, match=r"/slow on .* did not answer within 0\.05 s"):
        await call(routes[0].request, "GET", "/slow", timeout_s=0.05)


@pytest.mark.parametrize(
    ("refusal", "calls"),
    [
        ("a weight update is already in progress", ["/start", "/finish", "/start"]),
        ("the engine is dead", ["/start"]),
    ],
)
def test_an_update_that_a_killed_trainer_left_open_is_closed_and_no_other_refusal_is_swallowed(
    monkeypatch: pytest.MonkeyPatch, refusal: str, calls: list[str]
) -> None:
    seen: list[str] = []

    def request(method: str, path: str, **_: Any) -> None:
        seen.append(path.replace("_weight_update", ""))
        if len(seen) == 1:
            raise EngineError(f"{path} answered 500: {refusal}")

    control = ServerControl("http://fake")
    monkeypatch.setattr(control, "request", request)
    if "already" in refusal:
        control.start_weight_update()
    else:
        with pytest.raises(EngineError, match=refusal):
            control.start_weight_update()
    assert seen == calls


def test_nobody_at_the_address_is_told_apart() -> None:
    with pytest.raises(ServerUnreachableError, match=r"nothing answers at http://127\.0\.0\.1:9"):
        ServerControl("http://127.0.0.1:9").resume()


def test_proxies_from_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[dict[str, str]] = []

    def send(self: requests.Session, request: requests.PreparedRequest, **options: Any) -> Any:
        used.append(dict(options["proxies"]))
        raise requests.ConnectionError("stop here")

    monkeypatch.setenv("http_proxy", "http://10.0.0.1:3128")
    monkeypatch.setattr(requests.Session, "send", send)
    with pytest.raises(ServerUnreachableError):
        ServerControl("http://127.0.0.1:8000").resume()
    assert used == [{}]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ('{"error": {"message": "max_tokens is too large", "type": "BadRequestError"}}', "max_tokens is too large"),
        ('{"error": "Unauthorized"}', "Unauthorized"),
        ('{"detail": "Not Found"}', "Not Found"),
        ('{"object": "error", "message": "no such model", "code": 404}', "no such model"),
        ('{"detail": [{"loc": ["body", "n"], "msg": "too small"}]}', "[{'loc': ['body', 'n'], 'msg': 'too small'}]"),
        ("Internal Server Error", "Internal Server Error"),
        ('{"error": {"message": "one\\n  two\\tthree"}}', "one two three"),
        ("[1, 2]", "[1, 2]"),
        ("", ""),
    ],
)
def test_the_message_in_an_error_answer_is_found_and_put_on_one_line(body: str, text: str) -> None:
    assert error_text(body) == text


def test_a_long_error_answer_is_cut() -> None:
    assert error_text("x" * 700) == "x" * 600 + " ..."


def test_the_transports_are_those_that_the_server_knows() -> None:
    assert set(TRANSPORTS) == {"nccl", "ludic_shm"}
