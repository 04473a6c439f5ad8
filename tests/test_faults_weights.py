"""Weights that are corrupted on the way: the proof of the sync finds each kind, and nothing else; and what it rests on.

The many thousands are `python -m benchmarks.faults.weights --count 1000`; here is a small count of the same, and a real server.
"""

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import TCPStore
from transformers import AutoModelForCausalLM

from benchmarks.faults import weights
from benchmarks.faults.model_server import ModelServer
from benchmarks.faults.outcome import Injection
from ludic.inference.client.server_control import HeldDigests, ServerControl
from ludic.inference.client.server_process import ServerProcess
from ludic.inference.weights.nccl_link import LinkLeftError, NcclLink, Watch
from ludic.inference.weights.weight_sync import WeightSync
from ludic.rollout.errors import WeightSyncError
from ludic.train.attention import prepare_packed_attention
from tests.vllm_helpers import cpu_server, make_tiny_model


def missed(injections: list[Injection]) -> list[Injection]:
    return [one for one in injections if not one.ok]


@pytest.mark.parametrize("transport", ["ludic_shm", "ludic_nccl"])
def test_every_kind_of_corruption_is_found_over_both_transports_and_no_clean_sync_is_refused(transport: str) -> None:
    kinds = len(weights.HELD_KINDS) + len(weights.FILE_KINDS if transport == "ludic_shm" else weights.BYTE_KINDS)
    injections, reports = weights.inject_in_process(2 * kinds, seed=7, transport=transport)
    assert missed(injections) == []
    assert len({one.fault for one in injections}) == kinds + 1 and len(reports) == 2 * kinds + 1
    assert f"0 of {2 * kinds + 1} clean syncs" in weights.kinds_table(injections)
    assert "digests" in weights.cost_words(reports)


def test_a_corruption_that_nothing_looks_for_is_counted_as_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial itself is tried: without the digests, one flipped bit goes through."""
    honest = ModelServer.held_digests

    def blind(self: ModelServer) -> list[HeldDigests]:
        (held,) = honest(self)
        return [HeldDigests(in_memory=[""] * len(held.in_memory), packed=held.packed)]

    monkeypatch.setattr(ModelServer, "held_digests", blind)
    monkeypatch.setattr(weights, "BYTE_KINDS", ())
    injections, _ = weights.inject_in_process(1, seed=1, transport="ludic_nccl")
    assert [one.fault for one in missed(injections)] == ["held: one bit"]


# --- a link that is torn down ------------------------------------------------------------------------------------------


class StuckLink(NcclLink):
    """A link whose work ends only when it is left."""

    def __init__(self, *, peer_gone: bool = False) -> None:
        super().__init__()
        self.freed = threading.Event()
        self._peer_gone = peer_gone

    def leave(self) -> None:
        self.freed.set()

    def peer_is_gone(self) -> bool:
        return self._peer_gone


@pytest.mark.parametrize(
    ("link", "deadline_s", "said"),
    [(StuckLink(), 0.1, r"not over after 0\.1 s"), (StuckLink(peer_gone=True), 60.0, "the trainer is gone")],
    ids=["deadline", "gone"],
)
def test_work_that_is_stuck_is_freed_at_the_deadline_or_when_the_trainer_is_gone(
    link: StuckLink, deadline_s: float, said: str
) -> None:
    with Watch(link, deadline_s=deadline_s) as watch:
        assert link.freed.wait(20)
    with pytest.raises(ValueError, match=f"the transfer was broken off: .*{said}"):
        watch.check()


def test_work_that_ends_by_itself_is_left_alone() -> None:
    link = StuckLink()
    with Watch(link, deadline_s=60) as watch:
        pass
    watch.check()
    assert not link.freed.is_set()


def test_the_end_of_the_trainers_half_is_seen_over_the_connection_that_formed_the_group() -> None:
    """With torch's own store on both sides, as vLLM forms the group."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]

    def store(is_master: bool) -> TCPStore:
        return TCPStore("127.0.0.1", port, 2, is_master, timedelta(seconds=20), wait_for_workers=False, use_libuv=False)

    trainer, worker = NcclLink(), NcclLink()
    trainer._store = store(is_master=True)
    worker._store = store(is_master=False)
    assert not worker.peer_is_gone()
    trainer.leave()
    deadline = time.monotonic() + 20
    while not worker.peer_is_gone():
        assert time.monotonic() < deadline, "it was not noticed"
        time.sleep(0.05)


class Communicator:
    """What vLLM's `PyNcclCommunicator` shows of itself."""

    def __init__(self) -> None:
        self.comm, self.disabled, self.sent, self.group = object(), False, 0, object()

    def broadcast(self, tensor: torch.Tensor, src: int, stream: object = None) -> None:
        self.sent += 1

    def destroy(self) -> None:
        self.disabled = True


def test_nothing_is_launched_on_a_link_that_was_left_and_its_communicator_is_aborted_once() -> None:
    link, communicator = NcclLink(), Communicator()
    link._communicator = communicator
    link.broadcast(torch.zeros(1), src=0)
    link.check()
    link.leave()
    link.leave()
    assert communicator.disabled and communicator.sent == 1
    for use in (link.check, lambda: link.broadcast(torch.zeros(1), src=0)):
        with pytest.raises(LinkLeftError, match="torn down"):
            use()


def test_a_link_is_left_while_nccl_still_waits_for_the_others() -> None:
    link = NcclLink()
    link._communicator = object.__new__(Communicator)  # its constructor has not come back
    link.leave()
    assert link.left


def layer(weight: torch.Tensor) -> Any:
    """A linear layer as vLLM has one before it is packed."""
    module: Any = torch.nn.Module()
    module.input_size = weight.shape[1]
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module


# --- real kernels -------------------------------------------------------------------------------------------------------


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 64), (61, 37), (300, 640)])
def test_a_packed_weight_is_read_back_bit_for_bit_but_for_what_no_product_can_tell_apart(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    from ludic.inference.weights.digest import canonical
    from ludic.inference.worker.vllm_packed import PackedWeights, read_weight

    generator = torch.Generator().manual_seed(sum(shape))
    wanted = torch.randn(shape, generator=generator).to(dtype)
    wanted[0, :3] = torch.tensor([-0.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny])
    model: Any = torch.nn.Module()
    model.layer = layer(wanted.clone())
    dispatch_cpu_unquantized_gemm(model.layer, remove_weight=True)
    packed = PackedWeights(model)
    assert packed.inexact == ""
    read = canonical(read_weight(model.layer), flush=packed.flushes)
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(read.view(bits), canonical(wanted, flush=packed.flushes).view(bits))


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_a_kernel_that_rounds_is_found_out_and_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from ludic.inference.worker import vllm_packed

    def rounding(layer: Any, remove_weight: bool) -> None:
        weight = layer.weight.detach().bfloat16().float()
        layer.cpu_linear = lambda x, _, bias: torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(vllm_packed, "dispatch_cpu_unquantized_gemm", rounding)
    model: Any = torch.nn.Module()
    model.layer = layer(torch.randn(4, 8))
    rounding(model.layer, False)
    packed = vllm_packed.PackedWeights(model)
    assert packed.inexact == "layer.weight"
    assert packed.digests({"layer.weight": [4, 8]}) == {"layer.weight": ""}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[tuple[ServerProcess, Path]]":
    """A real server in bfloat16 of a model whose output head has a tensor of its own, which lets itself be damaged."""
    folder = tmp_path_factory.mktemp("damaged")
    make_tiny_model(folder / "model", tie_word_embeddings=False)
    args = ["--dtype", "bfloat16", "--worker-extension-cls", weights.SERVER_EXTENSION]
    with cpu_server(folder / "model", folder / "server.log", extra_args=args) as server:
        yield server, folder / "model"


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(420)
def test_a_real_servers_packed_weights_are_all_compared_and_each_corruption_of_them_is_found(
    untied: tuple[ServerProcess, Path],
) -> None:
    base_url, model = untied[0].base_url, untied[1]
    injections, reports = weights.inject_into_server(26, seed=3, base_url=base_url, model=model, dtype=torch.bfloat16)
    assert missed(injections) == []
    assert all(f"all {report.num_tensors} tensors held" in report.proof for report in reports)
    assert not ServerControl(base_url).is_paused()


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(420)
def test_a_server_that_is_stopped_in_a_sync_is_given_up_in_time_and_the_next_trainers_sync_sets_it_right(
    untied: tuple[ServerProcess, Path],
) -> None:
    server, model = untied
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prepare_packed_attention(policy)
    stopping = StoppingControl(server.base_url, server.pid)

    def trainer(control: ServerControl, deadline_s: float) -> WeightSync:
        return WeightSync(
            control,
            transport="ludic_shm",
            served_model=str(model),
            dtype=torch.bfloat16,
            probe_token_ids=weights.PROBE,
            deadline_s=deadline_s,
        )

    for route in ("/update_weights", "/finish_weight_update"):
        stopping.route = route
        weights.train_a_little(policy, random.Random(route))
        try:
            with pytest.raises(WeightSyncError, match=r"did not end within 4 s"):
                trainer(stopping, 4.0).sync(policy, 1)
        finally:
            os.killpg(server.pid, signal.SIGCONT)
        another = trainer(ServerControl(server.base_url), 100.0)
        assert f"all {len(list(policy.parameters()))} tensors" in another.sync(policy, 2).proof
        assert not ServerControl(server.base_url).is_paused()
        another.close()


class StoppingControl(ServerControl):
    """Stops the server, all of its processes, as one of its routes is called."""

    route = ""

    def __init__(self, base_url: str, group: int) -> None:
        super().__init__(base_url)
        self._group = group

    def request(self, method: str, path: str, **options: Any) -> Any:
        if path == self.route:  # before it is sent: a quick server would be done with it a moment later
            os.killpg(self._group, signal.SIGSTOP)
        return super().request(method, path, **options)
