"""Weight syncs: what did not arrive is caught, whatever breaks says so in the server's words, and nothing is left over."""

import asyncio
import errno
import json
import re
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest
import requests
import torch
from aiohttp import web
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, MistralConfig, PreTrainedModel

from ludic.inference.client.server_control import HeldDigests, ServerControl, error_text
from ludic.inference.client.vllm_client import VLLMEngine
from ludic.inference.weights import weight_sync
from ludic.inference.weights.bucket_broadcast import BucketReceiver, WireLayout
from ludic.inference.weights.digest import canonical, digest_hex, tensor_digest
from ludic.inference.weights.sync_probe import gap_error
from ludic.inference.weights.weight_sync import TRANSPORTS, WeightSync
from ludic.inference.weights.weight_transport import WireWeights
from ludic.inference.wire import UNTOUCHED
from ludic.rollout.engine import PolicyWeights
from ludic.rollout.errors import (
    EngineError,
    ServerInUseError,
    ServerLostError,
    ServerMismatchError,
    ServerUnauthorizedError,
    ServerUnreachableError,
    WeightSyncError,
)
from ludic.train.attention import checkpoint_layers, prepare_packed_attention
from tests.test_bucket_broadcast import Wire
from tests.vllm_helpers import make_tiny_model, prompt_logprobs, randomize_weights

PROBE = [3, 70, 71, 72, 80, 90, 4]
NORM = "model.layers.0.input_layernorm.weight"
MATRIX = "model.layers.0.mlp.up_proj.weight"


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
        self.salts: list[str] = []
        self.wanted: dict[str, dict[str, Any]] = {}
        self.paused: list[bool] = [False]

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

    def is_paused(self) -> bool:
        return self.paused[-1]

    def end_open_update(self) -> None:
        self._note("end")

    def expect_weights(self, wanted: dict[str, dict[str, Any]]) -> list[str]:
        self._note("expect")
        self.wanted.update(wanted)
        return [""]

    def pause(self, *, drain: bool = False, timeout_s: float | None = None) -> None:
        self._note("drain" if drain else "pause")
        self.paused.append(True)

    def resume(self, *, timeout_s: float | None = None) -> None:
        self._note("resume")
        self.paused.append(False)

    def held_digests(self) -> list[HeldDigests]:
        self._note("digests")
        parameters = dict(self.model.named_parameters())
        held = [
            digest_hex(tensor_digest(parameters[name].to(getattr(torch, spec["dtype"]))))
            for name, spec in self.wanted.items()
        ]
        return [HeldDigests(in_memory=held, packed=[""] * len(held))]

    def prompt_logprobs(self, model: str, token_ids: list[int], *, cache_salt: str) -> list[float]:
        self._note("probe")
        self.salts.append(cache_salt)
        return prompt_logprobs(self.model, token_ids)


def sync_with(
    control: ServerControl,
    *,
    dtype: torch.dtype = torch.float32,
    deadline_s: float = 60.0,
    transport: str = "ludic_shm",
    probe_every: int = 1,
) -> WeightSync:
    return WeightSync(
        control,
        transport=transport,
        served_model="tiny",
        dtype=dtype,
        probe_token_ids=PROBE,
        deadline_s=deadline_s,
        probe_every=probe_every,
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
    assert control.calls == ["expect", "init", *once, *once]
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


_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 16}
RENAMED: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "qwen3_moe": _EXPERTS,
    "olmoe": {"num_experts": 4},
    "deepseek_v3": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "gpt_neox": {},
    "granitemoe": {"num_local_experts": 4},
    "glm4": {},
    "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": 2},
    "llama": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("model_type", RENAMED)
@pytest.mark.parametrize("loaded", [False, True], ids=["made here", "from a folder"])
def test_names_and_values_on_the_wire_are_those_of_a_checkpoint(model_type: str, loaded: bool, tmp_path: Path) -> None:
    settings = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = CONFIG_MAPPING[model_type](**settings | RENAMED[model_type])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    if loaded:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    saved = load_file(tmp_path / "model.safetensors")
    buffers = {name for name, _ in model.named_buffers()}  # they do not train
    weights = WireWeights(model=model, dtype=torch.float32)
    sent = dict(weights)
    assert sent.keys() == saved.keys() - buffers
    assert all(torch.equal(tensor, saved[name]) for name, tensor in sent.items())
    assert weights.shapes() == {name: list(tensor.shape) for name, tensor in sent.items()}
    assert list(sent) == list(weights.shapes()) and weights.num_bytes() == sum(one.nbytes for one in sent.values())
    narrow = WireWeights(model=model, dtype=torch.bfloat16)
    assert narrow.digests() == [tensor_digest(saved[name].bfloat16()) for name in sent]
    assert all(torch.equal(one, two.to(one.dtype)) for one, two in zip(narrow.masters(), sent.values(), strict=True))


def test_the_probe_leaves_the_mode_of_every_module_alone(control: FakeControl, policy: PreTrainedModel) -> None:
    checkpoint_layers(policy)  # its layers are recomputed only while their own flag is up
    modes = [module.training for module in policy.modules()]
    assert set(modes) == {True, False}
    assert sync_with(control).sync(policy, 0).logprob_gap is not None
    assert [module.training for module in policy.modules()] == modes


def test_digests_that_the_server_cannot_give_are_counted_and_not_called_equal(
    control: FakeControl, policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = control.held_digests

    def split() -> list[HeldDigests]:
        (worker,) = honest()
        held = [digest if "norm" in name else "" for name, digest in zip(control.wanted, worker.in_memory, strict=True)]
        return [HeldDigests(in_memory=held, packed=worker.packed)]

    monkeypatch.setattr(control, "held_digests", split)
    sync = sync_with(control, probe_every=100)
    for version in range(3):
        report = sync.sync(policy, version)
        assert f"5 of {report.num_tensors} held tensors compared" in report.proof
        assert report.logprob_gap is not None, "what digests cannot see, the log-probs must, at every sync"


def test_generation_is_held_and_the_cache_kept(control: FakeControl, policy: PreTrainedModel) -> None:
    sync_with(control).sync(policy, 0)
    assert "pause" in control.calls and "drain" not in control.calls


def test_no_two_probes_can_read_the_same_cached_blocks(control: FakeControl, policy: PreTrainedModel) -> None:
    sync = sync_with(control)
    for version in (0, 0, 1):
        sync.sync(policy, version)
    assert len(set(control.salts)) == 3


def test_where_digests_of_all_tensors_agree_the_log_probs_are_compared_first_and_then_now_and_then(
    control: FakeControl, policy: PreTrainedModel
) -> None:
    sync = sync_with(control, probe_every=4)
    reports = [sync.sync(policy, version) for version in range(9)]
    assert [report.logprob_gap is not None for report in reports] == [True, *[False, False, False, True] * 2]
    assert "probe" not in reports[1].phases_s and "not due" in reports[1].proof
    assert all(sum(report.phases_s.values()) == pytest.approx(report.seconds) for report in reports)


def test_digests_of_the_wire_are_those_of_the_cast_tensors(policy: PreTrainedModel) -> None:
    weights = WireWeights(model=policy, dtype=torch.bfloat16)
    assert weights.digests() == [tensor_digest(tensor) for _, tensor in weights]


# --- buckets between GPUs, with the broadcast in this process -------------------------------------------------------------


class InPlaceControl(FakeControl):
    """A server that takes buckets: by its own loading (`load`), or in place (`copy`)."""

    def __init__(self, model: PreTrainedModel, problem: str = "") -> None:
        super().__init__(model)
        self.base_url = "http://127.0.0.1:1"
        self.wire = Wire()
        self.problem = problem
        self.applied: list[str] = []
        self.receiver: BucketReceiver | None = None

    def request(self, method: str, path: str, **_: Any) -> Any:
        assert (method, path) == ("GET", "/get_world_size")
        return {"world_size": 1}

    def expect_weights(self, wanted: dict[str, dict[str, Any]]) -> list[str]:
        super().expect_weights(wanted)
        return [self.problem]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._note("init")
        dtype = getattr(torch, init_info["dtype"])
        layout = WireLayout.of(init_info["names"], init_info["shapes"], dtype, init_info["bucket_bytes"])
        self.receiver = BucketReceiver(layout, self.wire.end(1), torch.device("cpu"))

    @torch.no_grad()
    def update_weights(self, update_info: dict[str, Any]) -> None:
        assert self.receiver is not None
        self.applied.append(update_info["apply"])
        parameters = dict(self.model.named_parameters())
        if update_info["apply"] == "copy":
            self.receiver.receive_into([parameters[name] for name in self.receiver.layout.names])
        else:
            for name, tensor in self.receiver.tensors():
                parameters[name].copy_(tensor)
        self._note("update")


@pytest.fixture
def in_place(
    models: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], InPlaceControl]:
    def make(problem: str = "") -> InPlaceControl:
        randomize_weights(models[1], seed=2)
        control = InPlaceControl(models[1], problem)
        monkeypatch.setattr("ludic.inference.weights.nccl_transport.NcclLink", lambda: control.wire.end(0))
        return control

    monkeypatch.setattr("ludic.inference.weights.nccl_transport.BUCKET_BYTES", 16 * 4096)
    return make


def test_weights_are_written_in_place_once_a_reload_has_shown_where_they_belong(
    in_place: Callable[[str], InPlaceControl], policy: PreTrainedModel
) -> None:
    control = in_place("")
    sync = sync_with(control, transport="ludic_nccl", probe_every=10)
    reports = [sync.sync(policy, version) for version in range(4)]
    assert control.applied == ["load", "copy", "copy", "copy"]
    assert "reloaded by vLLM (the first time" in reports[0].proof and "written in place" in reports[1].proof
    assert [report.logprob_gap is not None for report in reports] == [True, True, False, False]
    assert all("all" in report.proof and "digests of those sent" in report.proof for report in reports)
    assert set(reports[2].phases_s) == {"pause", "send", "digests", "resume"}
    wanted = dict(policy.named_parameters())
    assert all(torch.equal(held, wanted[name]) for name, held in control.model.named_parameters())


def test_the_server_is_not_waited_for_to_pause_while_weights_are_written_in_place(
    in_place: Callable[[str], InPlaceControl], policy: PreTrainedModel
) -> None:
    control = in_place("")
    sync = sync_with(control, transport="ludic_nccl", probe_every=10)
    sync.sync(policy, 0)
    assert control.calls[:4] == ["expect", "init", "pause", "start"], "a reload needs a server that stands still"
    digested = threading.Event()
    control.on |= {
        "pause": lambda: None if digested.wait(20) else refuse("the update waits for the pause")(),
        "digests": digested.set,
    }
    control.calls.clear()
    sync.sync(policy, 1)
    assert control.calls[-2:] == ["resume", "probe"] and control.calls[:-2].count("digests") == 1


def test_a_server_that_cannot_be_written_in_place_reloads_each_time_and_the_report_says_why(
    in_place: Callable[[str], InPlaceControl], policy: PreTrainedModel
) -> None:
    control = in_place("mlp is loaded by Fp8LinearMethod")
    sync = sync_with(control, transport="ludic_nccl")
    reports = [sync.sync(policy, version) for version in range(3)]
    assert control.applied == ["load"] * 3
    assert all("reloaded by vLLM (mlp is loaded by Fp8LinearMethod)" in report.proof for report in reports)


def test_a_tensor_that_another_place_would_hold_is_never_written_in_place(
    in_place: Callable[[str], InPlaceControl], policy: PreTrainedModel
) -> None:
    """A loader that changes values on the way: the reload's digests differ, which ends the sync before any copy."""
    control = in_place("")

    @torch.no_grad()
    def transform() -> None:
        dict(control.model.named_parameters())[NORM].add_(1)

    control.on["update"] = transform
    sync = sync_with(control, transport="ludic_nccl")
    for version in range(2):
        with pytest.raises(WeightSyncError, match=f"the first is {NORM}"):
            sync.sync(policy, version)
    assert control.applied == ["load", "load"]


def test_one_changed_element_after_a_copy_is_caught_and_the_next_sync_starts_anew(
    in_place: Callable[[str], InPlaceControl], policy: PreTrainedModel
) -> None:
    control = in_place("")

    @torch.no_grad()
    def flip() -> None:
        dict(control.model.named_parameters())[NORM][5] += 1e-6

    sync = sync_with(control, transport="ludic_nccl")
    sync.sync(policy, 0)
    control.on["finish"] = flip
    with pytest.raises(WeightSyncError, match=rf"1 of \d+ tensors on the server differ .* the first is {NORM}"):
        sync.sync(policy, 1)
    assert control.is_paused() and control.calls[-1] == "pause"
    control.on.clear()
    sync.sync(policy, 2)
    assert not control.is_paused()
    assert control.applied == ["load", "copy", "load"] and control.calls.count("init") == 2


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
    assert control.is_paused()


def test_one_worker_of_several_that_differs_is_caught(
    control: FakeControl, policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = control.held_digests

    def second_worker_is_stale() -> list[HeldDigests]:
        (worker,) = honest()
        held = zip(control.wanted, worker.in_memory, strict=True)
        stale = ["0123456789abcdef" if name == NORM else digest for name, digest in held]
        return [worker, HeldDigests(in_memory=stale, packed=worker.packed)]

    monkeypatch.setattr(control, "held_digests", second_worker_is_stale)
    with pytest.raises(WeightSyncError, match=f"{NORM} .*0123456789abcdef"):
        sync_with(control).sync(policy, 1)


def test_an_output_head_that_the_digests_cannot_see_is_caught_by_the_log_probs(
    control: FakeControl, policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale, asked = prompt_logprobs(control.model, PROBE), list[str]()

    def answer(model: str, token_ids: list[int], *, cache_salt: str) -> list[float]:
        asked.append(cache_salt)
        return stale if len(asked) > 1 else prompt_logprobs(control.model, token_ids)

    monkeypatch.setattr(control, "prompt_logprobs", answer)
    sync = sync_with(control)
    sync.sync(policy, 0)  # both sides compute the same
    with pytest.raises(WeightSyncError, match=r"log-probs of the probe .* differ .* \(limit 0\.15\)"):
        sync.sync(policy, 1)
    assert control.paused[-1]


def test_where_all_digests_agree_and_no_probe_ever_did_the_two_implementations_differ_and_nothing_is_tried_again(
    control: FakeControl, policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = prompt_logprobs(control.model, PROBE)
    monkeypatch.setattr(control, "prompt_logprobs", lambda model, token_ids, *, cache_salt: other)
    with pytest.raises(ServerMismatchError, match="Qwen2ForCausalLM differently; train one of another family") as said:
        sync_with(control).sync(policy, 0)
    assert not isinstance(said.value, ServerLostError), "it would be taken for a lost server, and tried again"
    assert "holds exactly the weights" in str(said.value) and "\n" not in str(said.value)
    assert not control.paused[-1], "its weights are whole"


@pytest.mark.parametrize(
    ("settings", "differ_from", "said"),
    [
        (
            {"sliding_window": 6},
            6,
            r"beyond its window of 6 tokens; keep .* --max-model-len at most 6, or train one of",
        ),
        ({"sliding_window": 6}, 0, r"differently; train one of another family"),
        ({"sliding_window": 512}, 9, r"differently; train one of another family"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
            0,
            r"it has RoPE of the type dynamic\); restart the server with a --max-model-len equal to --max-seq-len",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}},
            0,
            r"RoPE of the type yarn\); train one of another family",
        ),
        ({"final_logit_softcapping": 30.0}, 0, r"\(it has final_logit_softcapping\); train one of another family"),
    ],
    ids=["window", "not the window", "window not reached", "dynamic", "yarn", "cap"],
)
def test_what_differs_is_named_with_what_to_do_about_it(settings: dict[str, Any], differ_from: int, said: str) -> None:
    model = torch.nn.Module()
    model.config = MistralConfig(**{"sliding_window": None} | settings)  # type: ignore[assignment]
    gaps = torch.full([20], 1e-6)
    gaps[differ_from:] = 0.7
    error = gap_error(gaps, cast(PreTrainedModel, model), same_weights=True)
    assert isinstance(error, ServerMismatchError) and re.search(said, str(error)), error
    assert isinstance(gap_error(gaps, cast(PreTrainedModel, model), same_weights=False), WeightSyncError)
    assert gap_error(gaps / 100, cast(PreTrainedModel, model), same_weights=True) is None


def test_log_probs_that_are_not_numbers_are_caught(
    control: FakeControl, policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "prompt_logprobs", lambda model, ids, *, cache_salt: [float("nan")] * (len(ids) - 1))
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
        sync._talk.control.refusal = EngineError("/update_weights answered 500: shape mismatch")
        released.wait(30)

    control.on["update"] = refused_beside_a_broadcast
    sync = sync_with(control, deadline_s=20)
    with pytest.raises(WeightSyncError, match="refused by the server: /update_weights answered 500: shape mismatch"):
        sync.sync(policy, 3)
    released.set()


@pytest.mark.parametrize("route", ["pause", "start", "update", "finish", "digests", "probe"])
def test_the_servers_words_surface_and_it_goes_on_only_if_nothing_of_its_weights_was_replaced(
    control: FakeControl, policy: PreTrainedModel, route: str
) -> None:
    control.on[route] = refuse(f"/{route} answered 500: tensor 'lm_head.weight' has no place here")
    with pytest.raises(WeightSyncError) as failure:
        sync_with(control).sync(policy, 2)
    message = str(failure.value)
    assert message.startswith("weight sync 2 over ludic_shm failed: ") and "no place here" in message
    untouched = route in ("pause", "start")
    assert control.is_paused() is not untouched and control.calls[-1] == ("resume" if untouched else "pause")
    assert message.endswith("or a restart") is not untouched
    assert not any(file.exists() for file in control.files)


def test_a_file_that_the_server_refused_before_it_touched_the_model_leaves_it_serving(
    control: FakeControl, policy: PreTrainedModel
) -> None:
    control.on["update"] = refuse(f"tensor 'w' arrived corrupted; {UNTOUCHED}")
    with pytest.raises(WeightSyncError, match="arrived corrupted"):
        sync_with(control).sync(policy, 2)
    assert not control.is_paused()


def test_a_server_that_was_found_paused_is_resumed_by_a_sync_that_succeeds_and_by_no_other(
    control: FakeControl, policy: PreTrainedModel
) -> None:
    control.paused.append(True)
    sync = sync_with(control)
    for route in ("expect", "start"):
        control.on.clear()
        control.on[route] = refuse("not now")
        with pytest.raises(WeightSyncError, match="not now"):
            sync.sync(policy, 1)
        assert control.is_paused() and "resume" not in control.calls
    control.on.clear()
    sync.sync(policy, 1)
    assert not control.is_paused()


def test_a_server_that_belongs_to_another_trainer_is_not_asked_again(
    control: FakeControl, policy: PreTrainedModel
) -> None:
    def held() -> None:
        raise ServerInUseError("it belongs to pid 7")

    control.on["start"] = held
    with pytest.raises(ServerInUseError, match="pid 7"):
        sync_with(control).sync(policy, 1)


def test_a_sync_is_given_up_at_once_when_another_thread_learns_that_the_server_is_gone(
    control: FakeControl, policy: PreTrainedModel
) -> None:
    sync, released = sync_with(control, deadline_s=60), threading.Event()

    def lost() -> None:
        sync.abort("the server's process ended with code -9")
        released.wait(30)

    control.on["update"] = lost
    with pytest.raises(
        WeightSyncError, match="sync 3 over ludic_shm was given up: the server's process ended with code"
    ):
        sync.sync(policy, 3)
    assert not released.is_set() and not any(file.parent.exists() for file in control.files)
    released.set()
    control.on.clear()
    assert sync.sync(policy, 4).policy_version == 4, "an abort is of one sync, not of those that follow"


async def test_a_thread_that_a_sync_left_behind_never_speaks_to_the_server_again(
    routes: tuple[ServerControl, list[tuple[str, str, Any]]],
) -> None:
    control, seen = routes
    talk = control.branch()
    await call(talk.resume)
    talk.give_up()
    with pytest.raises(ServerLostError, match="given up"):
        await call(talk.resume)
    await call(control.branch().resume)
    assert len(seen) == 2


def test_what_packed_layers_multiply_with_is_compared_and_the_signs_of_zeros_are_not(
    control: FakeControl, policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = dict(policy.named_parameters())
    with torch.no_grad():
        parameters[MATRIX][0, :2] = torch.tensor([-0.0, 0.0])
    flips = [0.0]

    def packed() -> list[HeldDigests]:
        rows: dict[str, list[str]] = {"in_memory": [], "packed": []}
        for name in control.wanted:
            tensor = dict(control.model.named_parameters())[name].detach().clone()
            if name == MATRIX:
                tensor[0, 0] = flips[0]
            readable = {"in_memory": "norm" in name or "bias" in name, "packed": "norm" not in name}
            values = {"in_memory": tensor, "packed": canonical(tensor, flush=False)}
            for kind, row in rows.items():
                row.append(digest_hex(tensor_digest(values[kind])) if readable[kind] else "")
        return [HeldDigests(in_memory=rows["in_memory"], packed=rows["packed"])]

    monkeypatch.setattr(control, "held_digests", packed)
    sync = sync_with(control, probe_every=100)
    report = sync.sync(policy, 1)
    assert (
        f"all {report.num_tensors} tensors held" in report.proof and "as the layers multiply with them" in report.proof
    )
    flips[0] = 1e-30
    with pytest.raises(WeightSyncError, match=f"1 of .* the first is {MATRIX}"):
        sync.sync(policy, 2)
    randomize_weights(policy, seed=1)


def test_a_policy_that_is_not_finite_is_named_where_a_tensor_differs(
    control: FakeControl, policy: PreTrainedModel
) -> None:
    def spoil() -> None:
        with torch.no_grad():
            dict(control.model.named_parameters())[NORM][0] = 3.0

    with torch.no_grad():
        dict(policy.named_parameters())[NORM][1] = float("nan")
    control.on["finish"] = spoil
    try:
        with pytest.raises(
            WeightSyncError, match=f"the first is {NORM} .* the trainer's own holds numbers that are not"
        ):
            sync_with(control).sync(policy, 1)
    finally:
        with torch.no_grad():
            dict(policy.named_parameters())[NORM][1] = 1.0


def test_a_server_that_cannot_be_resumed_does_not_hide_why_the_sync_failed(
    control: FakeControl, policy: PreTrainedModel
) -> None:
    control.on |= {"update": refuse("the file is corrupt"), "resume": refuse("I am gone")}
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
    await client.update_weights(PolicyWeights(policy, 1))
    control.on["update"] = refuse("no")
    with pytest.raises(WeightSyncError):
        await client.update_weights(PolicyWeights(policy, 2))
    assert client.policy_version == 1
    await client.aclose()


# --- the control routes over a socket ---------------------------------------------------------------------------------


RPC: dict[str, dict[str, Any]] = {
    "ludic_server_info": {"rank": 0},
    "ludic_expect_weights": {"in_place_problem": "it is quantised"},
    "ludic_held_digests": {
        "digests": "0123456789abcdef" + "-" * 16,
        "packed": "-" * 16 + "fedcba9876543210",
        "flushes": True,
        "inexact": "",
    },
}


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
            case "/is_paused":
                return web.json_response({"is_paused": False})
            case "/collective_rpc":
                assert body is not None
                return web.json_response({"results": [RPC[body["method"]], RPC[body["method"]]]})
            case "/hangs_up_once":
                if len(seen) == 2:
                    assert request.transport is not None
                    request.transport.abort()
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
    await call(control.pause, drain=True)
    await call(control.start_weight_update)
    await call(control.update_weights, {"path": "/d/f"})
    await call(control.finish_weight_update)
    await call(control.finish_weight_update, "7")
    await call(control.resume)
    assert await call(control.server_info) == {"rank": 0}
    wanted = {"w": {"dtype": "float32", "shape": [1]}}
    assert await call(control.expect_weights, wanted) == ["it is quantised"] * 2
    held = HeldDigests(in_memory=["0123456789abcdef", ""], packed=["", "fedcba9876543210"], flushes=True)
    assert await call(control.held_digests) == [held] * 2
    assert await call(control.is_paused) is False
    assert await call(control.prompt_logprobs, "m", [3, 70, 71], cache_salt="new") == [-1.5, -0.5]
    assert seen == [
        ("POST", "/init_weight_transfer_engine", {"init_info": {"directory": "/d"}}),
        ("POST", "/pause?mode=keep&clear_cache=false", None),
        ("POST", "/pause?mode=wait&clear_cache=true", None),
        ("POST", "/start_weight_update", None),
        ("POST", "/update_weights", {"update_info": {"path": "/d/f"}}),
        ("POST", "/finish_weight_update", None),
        ("POST", "/finish_weight_update", {"weight_version": "7"}),
        ("POST", "/resume", None),
        ("POST", "/collective_rpc", {"method": "ludic_server_info", "args": []}),
        ("POST", "/collective_rpc", {"method": "ludic_expect_weights", "args": [json.dumps(wanted)]}),
        ("POST", "/collective_rpc", {"method": "ludic_held_digests", "args": []}),
        ("GET", "/is_paused", None),
        (
            "POST",
            "/v1/completions",
            {
                "model": "m",
                "prompt": [3, 70, 71],
                "max_tokens": 1,
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": 0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "prompt_logprobs": 0,
                "cache_salt": "new",
                "add_special_tokens": False,
            },
        ),
    ]


async def test_a_refusal_names_the_route_the_status_and_the_servers_text(
    routes: tuple[ServerControl, list[tuple[str, str, Any]]],
) -> None:
    with pytest.raises(EngineError, match=r"/refused on http://.* answered 500: the engine is busy"):
        await call(routes[0].request, "POST", "/refused")


async def test_calls_share_a_connection_and_one_that_the_server_closed_meanwhile_is_opened_again(
    routes: tuple[ServerControl, list[tuple[str, str, Any]]],
) -> None:
    control, seen = routes
    for _ in range(3):
        await call(control.request, "POST", "/hangs_up_once")
    assert [path for _, path, _ in seen] == ["/hangs_up_once"] * 4
    control.close()
    await call(control.resume)


async def test_a_restarted_server_is_reached_again_at_the_first_call() -> None:
    async def start(port: int) -> tuple[web.AppRunner, int]:
        async def handle(request: web.Request) -> web.Response:
            return web.Response()

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
        return runner, runner.addresses[0][1]

    runner, port = await start(0)
    control = ServerControl(f"http://127.0.0.1:{port}")
    await call(control.resume)
    await runner.cleanup()
    with pytest.raises(ServerUnreachableError):
        await call(control.resume)
    runner, _ = await start(port)
    await call(control.resume)
    await runner.cleanup()
    runner, _ = await start(port)
    await call(control.resume)
    control.close()
    await runner.cleanup()


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
    assert set(TRANSPORTS) == {"ludic_nccl", "ludic_shm"}
