"""A LoRA run that sends its adapter alone: what is sent and proven, and which servers are refused before anything trains."""

import argparse
import asyncio
import dataclasses
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ludic.config import GRPOConfig
from ludic.inference.client import handshake
from ludic.inference.client.server_control import HeldDigests, ServerControl
from ludic.inference.client.vllm_client import VLLMEngine
from ludic.inference.server import adapter_route
from ludic.inference.weights.adapter_weights import AdapterWeights, BaseWeights
from ludic.inference.weights.digest import digest_hex, tensor_digest
from ludic.inference.weights.weight_sync import WeightSync
from ludic.inference.weights.weight_transport import WireWeights
from ludic.inference.wire import ADAPTER_ID, ADAPTER_NAME, ADAPTER_PATH
from ludic.inference.worker import vllm_lora
from ludic.rollout.errors import ServerMismatchError, WeightSyncError
from ludic.run.engine import _server_flags, check_adapter_arguments
from ludic.train.learner import Learner
from ludic.types import SamplingParams
from tests.fake_vllm import FakeServer, serving
from tests.test_lora import CONFIG, train
from tests.test_trainer import load
from tests.test_weight_sync import FakeControl
from tests.vllm_helpers import make_tiny_model, make_tiny_tokenizer, prompt_logprobs

SENT = dataclasses.replace(CONFIG, lora_sync="adapter")
PROBE = [5, 17, 101, 33, 64, 250, 7]
NUM_TENSORS = 2 * 2 * 7
"""A and B of the seven linear layers in each of two decoder layers."""
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    make_tiny_model(folder, tie_word_embeddings=True)
    return folder


class AdapterControl(FakeControl):
    """A server with a base in this process, which adds to it what it was sent for requests that name the adapter."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.adapter: dict[str, torch.Tensor] = {}
        self.problem = ""
        self.ranks: list[int] = []

    def expect_weights(self, wanted: dict[str, dict[str, Any]]) -> list[str]:
        self.wanted.clear()
        return super().expect_weights(wanted)

    def open_adapter(self, rank: int, dtype: str, shapes: dict[str, list[int]]) -> str:
        self._note("room")
        self.ranks.append(rank)
        self.adapter.clear()
        self.adapter.update({name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, shape in shapes.items()})
        return self.problem

    def update_adapter(self, update_info: dict[str, Any]) -> None:
        self.files.append(Path(update_info["path"]))
        self.adapter.update(load_file(update_info["path"]))
        self._note("adapter")

    def held_digests(self) -> list[HeldDigests]:
        if not any(".lora_" in name for name in self.wanted):
            return super().held_digests()
        self._note("digests")
        held = [digest_hex(tensor_digest(self.adapter[name])) for name in self.wanted]
        return [HeldDigests(in_memory=held, packed=[""] * len(held))]

    def prompt_logprobs(self, model: str, token_ids: list[int], *, cache_salt: str) -> list[float]:
        assert model == ADAPTER_NAME
        self._note("probe")
        kept = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        for name, a in self.adapter.items():
            if ".lora_A." in name:
                layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                added = self.adapter[name.replace(".lora_A.", ".lora_B.")].float() @ a.float()
                self.model.get_parameter(f"{layer}.weight").data += added
        logprobs = prompt_logprobs(self.model, token_ids)
        self.model.load_state_dict(kept)
        return logprobs


def sync_with(control: ServerControl) -> WeightSync:
    return WeightSync(
        control,
        transport="ludic_shm",
        served_model="tiny",
        dtype=torch.float32,
        probe_token_ids=PROBE,
        probe_every=1,
        adapter_rank=SENT.lora_rank,
    )


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_a_sync_sends_the_adapter_alone_and_the_base_stays_as_it_was(base_dir: Path) -> None:
    learner, control = Learner(SENT, load(base_dir)), AdapterControl(load(base_dir))
    base = prompt_logprobs(control.model, PROBE)
    sync = sync_with(control)
    first = sync.sync(learner.model, 0)
    assert first.proof.startswith("adapter written in place, which adds nothing yet, over a base of which 26 of 26")
    train(learner)
    second = sync.sync(learner.model, 1)
    assert f"all {NUM_TENSORS} tensors held by the server have the digests of those sent" in second.proof
    assert second.logprob_gap is not None and second.logprob_gap < 1e-4
    assert second.num_bytes == 4 * learner.masters.num_trained == sum(t.nbytes for t in control.adapter.values())
    once = ["pause", "adapter", "digests", "resume", "probe"]
    opened = ["expect", "digests", "room", "expect", "init"]  # the base, then the adapter; no update of vLLM's
    assert control.calls == [*opened, *once, *once] and control.ranks == [SENT.lora_rank]
    assert prompt_logprobs(control.model, PROBE) == base
    sync.close()


def test_what_is_sent_is_b_times_a_with_the_scale_in_b(base_dir: Path) -> None:
    learner = Learner(SENT, load(base_dir))
    train(learner)
    sent = dict(AdapterWeights(model=learner.model, dtype=torch.float32))
    with learner.adapter.merged() as merged:  # type: ignore[union-attr]
        added = merged.state_dict()["model.layers.0.self_attn.q_proj.weight"].clone()
    added -= load(base_dir).state_dict()["model.layers.0.self_attn.q_proj.weight"]
    assert torch.allclose(sent[f"{LAYER}.lora_B.weight"] @ sent[f"{LAYER}.lora_A.weight"], added, atol=1e-6)
    assert added.abs().max() > 1e-3


def test_the_base_below_an_adapter_has_the_names_and_digests_of_the_model_without_one(base_dir: Path) -> None:
    learner = Learner(SENT, load(base_dir))
    train(learner)
    below, plain = (
        kind(model=model, dtype=torch.bfloat16)
        for kind, model in ((BaseWeights, learner.model), (WireWeights, load(base_dir)))
    )
    assert below.shapes() == plain.shapes() and below.digests() == plain.digests()


def test_engines_read_the_model_with_its_adapter_where_that_is_sent(base_dir: Path) -> None:
    learner = Learner(SENT, load(base_dir))
    with learner.whole_model() as whole:
        assert whole is learner.model


# --- what is proven ---------------------------------------------------------------------------------------------------


def test_an_adapter_that_did_not_arrive_fails_the_sync_and_the_next_one_begins_with_the_base_again(
    base_dir: Path,
) -> None:
    learner, control = Learner(SENT, load(base_dir)), AdapterControl(load(base_dir))
    train(learner)
    sync = sync_with(control)

    def lose_one() -> None:
        control.adapter[f"{LAYER}.lora_B.weight"].zero_()

    control.on["adapter"] = lose_one
    with pytest.raises(WeightSyncError, match=rf"1 of {NUM_TENSORS} tensors on the server differ.*q_proj\.lora_B"):
        sync.sync(learner.model, 1)
    control.on.clear()
    control.calls.clear()
    sync.sync(learner.model, 1)
    assert control.calls[:5] == ["end", "expect", "digests", "room", "expect"]
    sync.close()


def test_another_base_is_refused_in_one_line_before_the_server_makes_room(base_dir: Path, tmp_path: Path) -> None:
    learner = Learner(SENT, load(base_dir))
    control = AdapterControl(make_tiny_model(tmp_path, tie_word_embeddings=True, seed=3))
    with pytest.raises(ServerMismatchError, match="holds another base than the one below the adapter") as raised:
        sync_with(control).sync(learner.model, 0)
    assert "\n" not in str(raised.value) and "room" not in control.calls


def test_what_the_server_has_against_the_adapter_is_the_one_line_of_the_error(base_dir: Path) -> None:
    learner, control = Learner(SENT, load(base_dir)), AdapterControl(load(base_dir))
    control.problem = "vLLM has no place for x"
    with pytest.raises(ServerMismatchError, match="cannot serve the adapter: vLLM has no place for x"):
        sync_with(control).sync(learner.model, 0)
    assert "pause" not in control.calls


# --- which servers are refused, and how they are started ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "largest", "said"),
    [
        (8, 0, "takes no adapters: start it with --enable-lora --max-lora-rank 8, or train with --lora-sync merged"),
        (17, 16, "of rank 16 at most, and --lora-rank is 17: start it with --max-lora-rank 32"),
        (0, 16, "was started with --enable-lora, and then vLLM takes no whole models"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_with_the_way_out(rank: int, largest: int, said: str) -> None:
    with pytest.raises(ServerMismatchError) as raised:
        handshake.check_adapters(ServerControl("http://fake"), {"max_lora_rank": largest}, rank)
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(("rank", "largest"), [(0, 0), (16, 16), (3, 8)])
def test_a_server_that_fits_is_taken(rank: int, largest: int) -> None:
    handshake.check_adapters(ServerControl("http://fake"), {"max_lora_rank": largest}, rank)


@pytest.mark.parametrize(
    ("given", "rank", "added"),
    [
        ("", 0, []),
        ("", 12, ["--enable-lora", "--max-lora-rank", "16"]),
        ("--max-lora-rank 64", 12, ["--enable-lora"]),
    ],
)
def test_a_started_server_gets_the_flags_that_the_adapter_needs(given: str, rank: int, added: list[str]) -> None:
    args = argparse.Namespace(server_args=given, chat_template=None, trust_remote_code=False, server_memory_share=None)
    flags, without = (_server_flags(args, 64, None, one) for one in (rank, 0))
    assert [flag for flag in flags if flag not in without] == added


def test_an_adapter_is_sent_to_a_server_only_and_only_where_one_is_trained() -> None:
    with pytest.raises(ValueError, match="--lora-sync adapter sends the adapter of --lora-rank N"):
        GRPOConfig(lora_sync="adapter")
    with pytest.raises(ValueError, match="--lora-sync adapter sends to a server, and --engine local"):
        check_adapter_arguments(argparse.Namespace(engine="local"), SENT)
    check_adapter_arguments(argparse.Namespace(engine="vllm"), SENT)
    assert (SENT.sent_rank, CONFIG.sent_rank) == (SENT.lora_rank, 0)


# --- the server's side ------------------------------------------------------------------------------------------------


async def answer(problem: str, monkeypatch: pytest.MonkeyPatch, lora_requests: dict[str, Any]) -> dict[str, Any]:
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=dict))
    asked: list[tuple[str, Any]] = []

    async def collective_rpc(method: str, args: Any) -> list[str]:
        asked.append((method, args))
        return ["", problem]

    models = SimpleNamespace(lora_requests=lora_requests)
    state = SimpleNamespace(openai_serving_models=models, engine_client=SimpleNamespace(collective_rpc=collective_rpc))
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b'{"rank": 4}'}

    async def send(message: Any) -> None:
        sent.append(message)

    async def unreachable(*_: Any) -> None:
        raise AssertionError

    scope = {"type": "http", "method": "POST", "path": ADAPTER_PATH, "app": SimpleNamespace(state=state)}
    await adapter_route.AdapterRoute(unreachable)(scope, receive, send)
    assert asked == [("ludic_open_adapter", ('{"rank": 4}',))] and sent[0]["status"] == 200
    decoded: dict[str, Any] = json.loads(sent[1]["body"])
    return decoded


async def test_requests_may_name_the_adapter_once_all_workers_have_room_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    served: dict[str, Any] = {}
    assert await answer("", monkeypatch, served) == {"problem": ""}
    assert served[ADAPTER_NAME]["lora_int_id"] == ADAPTER_ID
    assert await answer("no room", monkeypatch, served) == {"problem": "no room"}
    assert not served


@pytest.fixture
async def fake() -> AsyncIterator[FakeServer]:
    async with serving(FakeServer(tokenizer=make_tiny_tokenizer())) as server:
        yield server


async def test_whoever_asks_the_server_later_gets_the_adapter_that_its_trainer_has_proven(fake: FakeServer) -> None:
    trainer = ServerControl(fake.base_url)
    await asyncio.to_thread(handshake.server_state, trainer)
    await asyncio.to_thread(handshake.claim, trainer, {"pid": 1})
    for adapter, name in ((False, "tiny"), (True, ADAPTER_NAME)):
        await asyncio.to_thread(trainer.note_weights, 7, adapter=adapter)
        engine = VLLMEngine(fake.base_url, model="tiny")
        await engine.connect(fake.tokenizer)
        await engine.generate([3, 4], num_completions=1, sampling=SamplingParams(temperature=1.0, max_tokens=4))
        assert fake.requests[-1]["model"] == name and engine.policy_version == 7
        await engine.aclose()


# --- inside the worker ------------------------------------------------------------------------------------------------


class Layer:
    """As vLLM's with an adapter: two slots, room for rank 8, and a buffer for each of the layers that are fused into it."""

    def __init__(self, inputs: int, *outputs: int) -> None:
        self.lora_a_stacked = tuple(torch.ones(2, 1, 8, inputs) for _ in outputs)
        self.lora_b_stacked = tuple(torch.ones(2, 1, rows, 8) for rows in outputs)

    def reset_lora(self, slot: int) -> None:
        for held in (*self.lora_a_stacked, *self.lora_b_stacked):
            held[slot] = 0


class Workers:
    """vLLM's manager of a worker and that of its model in one, with an adapter in the second slot."""

    def __init__(self) -> None:
        self.modules = {"l.qkv_proj": Layer(6, 10, 4), "l.o_proj": Layer(10, 6)}
        self.packed_modules = {"l.qkv_proj": ["l.q_proj", "l.k_proj"]}
        self.lora_index_to_id: list[int | None] = [None, None]
        self.adapters: set[int] = set()
        self.lora_manager = self
        self.pinned: list[int] = []

    def list_adapters(self) -> set[int]:
        return set(self.adapters)

    def add_dummy_lora(self, request: Any, rank: int) -> None:
        self.adapters.add(request["lora_int_id"])

    def pin_adapter(self, number: int) -> None:
        self.pinned.append(number)
        self.lora_index_to_id[1] = number

    def get_model(self) -> "Workers":
        return self


def names(layer: str, rank: int, inputs: int, outputs: int) -> dict[str, list[int]]:
    begin = f"base_model.model.l.{layer}.lora_"
    return {f"{begin}A.weight": [rank, inputs], f"{begin}B.weight": [outputs, rank]}


ADAPTED = {**names("q_proj", 4, 6, 10), **names("k_proj", 4, 6, 4), **names("o_proj", 4, 10, 6)}


def opened(
    workers: Workers,
    monkeypatch: pytest.MonkeyPatch,
    *,
    shapes: dict[str, list[int]] = ADAPTED,
    rank: int = 4,
    largest: int = 8,
    dtype: str = "float32",
    enabled: bool = True,
    tensor_parallel: int = 1,
) -> str:
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=dict))
    parallel = SimpleNamespace(tensor_parallel_size=tensor_parallel, pipeline_parallel_size=1)
    lora = SimpleNamespace(max_lora_rank=largest) if enabled else None
    specs = json.dumps({"rank": rank, "dtype": dtype, "shapes": shapes})
    config: Any = SimpleNamespace(lora_config=lora, parallel_config=parallel)
    return vllm_lora.open_adapter(workers, config, specs)


def test_a_version_lies_where_vllm_multiplies_with_it_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers()
    assert opened(workers, monkeypatch) == "" and workers.pinned == [ADAPTER_ID]
    sent = {name: torch.randn(shape) for name, shape in ADAPTED.items()}
    model: Any = workers
    vllm_lora.write_adapter(model, ADAPTED, sent.items())
    views = vllm_lora.adapter_views(workers, ADAPTED)
    assert all(torch.equal(views[name], tensor) for name, tensor in sent.items()) and views.keys() == sent.keys()
    fused = workers.modules["l.qkv_proj"]
    assert torch.equal(fused.lora_b_stacked[1][1, 0, :, :4], sent["base_model.model.l.k_proj.lora_B.weight"])
    assert not fused.lora_b_stacked[1][1, 0, :, 4:].any()  # the rest of the slot stays 0
    assert all((held[0] == 1).all() for held in (*fused.lora_a_stacked, *fused.lora_b_stacked))  # and the other slot is
    before = dict(vllm_lora.slot_tensors(workers))
    assert len(before) == 6
    assert opened(workers, monkeypatch) == ""  # a trainer after this one begins with zeros
    assert not any(tensor.any() for tensor in vllm_lora.adapter_views(workers, ADAPTED).values())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"enabled": False}, "started without --enable-lora"),
        ({"rank": 16}, "the adapter's rank is 16, and the server was started with --max-lora-rank 8"),
        ({"tensor_parallel": 2}, "splits the model over 2 GPUs"),
        ({"dtype": "bfloat16"}, "holds adapters in float32 and the model in bfloat16"),
        ({"shapes": names("gate", 4, 6, 10)}, "vLLM has no place for base_model.model.l.gate.lora_A.weight"),
        ({"shapes": names("o_proj", 4, 10, 7)}, "vLLM has no place for base_model.model.l.o_proj.lora_B.weight"),
        ({"shapes": names("qkv_proj", 4, 6, 14)}, "vLLM has no place for base_model.model.l.qkv_proj.lora_A.weight"),
    ],
)
def test_a_worker_says_in_one_line_why_it_cannot_serve_an_adapter(
    settings: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = opened(Workers(), monkeypatch, **settings)
    assert said in problem and "\n" not in problem


def test_other_adapters_on_the_server_are_refused_since_one_slot_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers()
    workers.adapters.add(1)
    assert "1 other adapters (--lora-modules)" in opened(workers, monkeypatch)


def test_without_the_adapter_nothing_is_written_or_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="the adapter is not in the server"):
        vllm_lora.adapter_views(Workers(), ADAPTED)
    assert vllm_lora.slot_tensors(Workers()) == []
