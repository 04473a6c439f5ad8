"""Weight syncs on one GPU: two processes take turns on one buffer, whoever dies is noticed, and what cannot share says so.

On the CPU the buffer is a tensor of this process; sockets, rounds, digests and the sync around them are real. The test marked
`gpu` maps memory of another process; those marked `vllm` run the worker's own functions.
"""

import contextlib
import json
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from ludic.inference.client.server_control import IpcAnswer
from ludic.inference.weights import bucket_layout, ipc_link, ipc_memory, ipc_transport
from ludic.inference.weights.bucket_broadcast import WireLayout
from ludic.inference.weights.digest import tensor_digests
from ludic.inference.weights.ipc_link import IpcLink, LinkBrokenError, receive_buckets
from ludic.inference.weights.ipc_memory import NoIpcError, exported_buffer, mapped_buffer
from ludic.inference.weights.weight_sync import WeightSync
from ludic.rollout.errors import EngineError, WeightSyncError
from ludic.train.attention import prepare_packed_attention
from tests.test_bucket_broadcast import BUCKETS, CHECKPOINT, CPU, NAMES, SHAPES, Served, masters, within_vllm
from tests.test_bucket_broadcast import policy as checkpoint
from tests.test_weight_sync import NORM, PROBE, FakeControl, refuse
from tests.vllm_helpers import make_tiny_model, randomize_weights

GPU = "GPU-a"
LARGE_BYTES = 512 << 20
exported: dict[str, torch.Tensor] = {}
"""By handle: what stands for the GPU's memory."""


def export(num_bytes: int, device: torch.device) -> tuple[torch.Tensor, str]:
    handle = f"{len(exported):0128x}"
    exported[handle] = torch.full([num_bytes], 7, dtype=torch.uint8)
    return exported[handle], handle


@contextlib.contextmanager
def map_again(handle: str, num_bytes: int, device: torch.device) -> Iterator[torch.Tensor]:
    if handle not in exported:
        raise NoIpcError("cuIpcOpenMemHandle_v2 gave CUDA_ERROR_INVALID_VALUE (1)")
    assert exported[handle].nbytes == num_bytes
    yield exported[handle]


@pytest.fixture(autouse=True)
def without_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("gpu") is None:
        exported.clear()
        monkeypatch.setattr(ipc_link, "exported_buffer", export)


# --- rounds ---------------------------------------------------------------------------------------------------------------


def make_link(layout: WireLayout, folder: Path, *, deadline_s: float = 30.0) -> IpcLink:
    return IpcLink(layout, CPU, folder / "turns", deadline_s=deadline_s)


class Worker(threading.Thread):
    """The worker's end of a round, and how it was broken off."""

    def __init__(self, link: IpcLink, targets: list[torch.Tensor]) -> None:
        super().__init__(daemon=True)
        self._link, self._targets = link, targets
        self.error: LinkBrokenError | None = None
        self.start()

    def run(self) -> None:
        buffer = exported[self._link.handle]
        try:
            receive_buckets(self._link.layout, buffer, str(self._link.path), self._targets, deadline_s=30.0)
        except LinkBrokenError as error:
            self.error = error

    def ended(self) -> bool:
        return not self.is_alive()


@pytest.mark.parametrize("bucket_bytes", BUCKETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_round_puts_the_weights_into_the_workers_memory_and_digests_what_went_out(
    dtype: torch.dtype, bucket_bytes: int, tmp_path: Path
) -> None:
    layout = WireLayout.of(NAMES, SHAPES, dtype, bucket_bytes)
    link = make_link(layout, tmp_path)
    targets = [torch.full(shape, 7, dtype=dtype) for shape in SHAPES]
    places = [target.data_ptr() for target in targets]
    for seed in (0, 1):
        worker = Worker(link, targets)
        sent = link.send(masters(seed), ended=worker.ended)
        worker.join(20)
        assert worker.error is None and sent == tensor_digests(targets)
        assert all(torch.equal(one, two.to(dtype)) for one, two in zip(targets, masters(seed), strict=True))
    assert [target.data_ptr() for target in targets] == places
    assert link.num_bytes == min(2, len(layout.buckets)) * layout.buffer_bytes, "never the whole policy"
    link.leave()


def test_the_trainer_never_writes_into_a_half_that_the_worker_has_not_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = WireLayout.of(NAMES, SHAPES, torch.bfloat16, 4096)
    link = make_link(layout, tmp_path)
    packed, taken = list[int](), list[int]()
    real_pack, real_unpack = bucket_layout.pack, bucket_layout.unpack

    def pack(*arguments: Any) -> None:
        packed.append(len(taken))
        real_pack(*arguments)

    def unpack(*arguments: Any) -> None:
        time.sleep(0.02)  # a slow worker
        real_unpack(*arguments)
        taken.append(len(packed))

    monkeypatch.setattr(ipc_link, "pack", pack)
    monkeypatch.setattr(ipc_link, "unpack", unpack)
    targets = [torch.zeros(shape, dtype=torch.bfloat16) for shape in SHAPES]
    worker = Worker(link, targets)
    link.send(masters(), ended=worker.ended)
    worker.join(20)
    assert len(packed) == len(layout.buckets) > 4
    assert all(emptied >= index - 1 for index, emptied in enumerate(packed)), packed
    link.leave()


def test_a_worker_that_dies_in_the_middle_is_noticed_at_once(tmp_path: Path) -> None:
    layout = WireLayout.of(NAMES, SHAPES, torch.bfloat16, 4096)
    link = make_link(layout, tmp_path)
    worker = Worker(link, [torch.zeros(shape, dtype=torch.bfloat16) for shape in SHAPES[:1]])  # the second is not there
    threading.excepthook, before = (lambda arguments: None), threading.excepthook
    try:
        with pytest.raises(LinkBrokenError, match=r"has gone|broken off"):
            link.send(masters(), ended=worker.ended)
        worker.join(20)
    finally:
        threading.excepthook = before
    link.leave()


def test_a_worker_that_never_comes_is_not_waited_for_once_its_call_has_ended(tmp_path: Path) -> None:
    link = make_link(WireLayout.of(NAMES, SHAPES, torch.bfloat16, 4096), tmp_path)
    with pytest.raises(LinkBrokenError, match="the server did not come for the weights"):
        link.send(masters(), ended=lambda: True)
    link.leave()


def test_leaving_ends_both_sides_of_a_round_from_another_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = WireLayout.of(NAMES, SHAPES, torch.bfloat16, 4096)
    link = make_link(layout, tmp_path, deadline_s=60.0)
    inside, errors = threading.Event(), list[Exception]()
    real = bucket_layout.pack

    def pack(*arguments: Any) -> None:
        inside.set()
        threading.Event().wait(0.2)  # the round is left meanwhile
        real(*arguments)

    monkeypatch.setattr(ipc_link, "pack", pack)
    worker = Worker(link, [torch.zeros(shape, dtype=torch.bfloat16) for shape in SHAPES])

    def send() -> None:
        try:
            link.send(masters(), ended=worker.ended)
        except LinkBrokenError as error:
            errors.append(error)

    sender = threading.Thread(target=send)
    sender.start()
    assert inside.wait(20)
    link.leave()
    sender.join(20)
    worker.join(20)
    assert not sender.is_alive() and not worker.is_alive()
    assert len(errors) == 1 and worker.error is not None
    with pytest.raises(LinkBrokenError, match="given up"):
        link.send(masters(), ended=lambda: False)


def test_a_machine_without_a_driver_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", missing)
    ipc_memory._driver.cache_clear()
    with pytest.raises(NoIpcError, match=r"^there is no CUDA driver here \(libcuda\.so\.1\)$"):
        ipc_memory._call("cuMemAlloc_v2")


# --- the sync around them -------------------------------------------------------------------------------------------------


class OneGPU(FakeControl):
    """A server on the trainer's GPU, which copies buckets into its model; `wrong` has its answer in place of that."""

    def __init__(self, model: PreTrainedModel, problem: str = "") -> None:
        super().__init__(model)
        self.problem = problem
        self.in_place_problem = ""
        self.requests: list[dict[str, Any]] = []
        self.wrong: list[IpcAnswer] = []  # a list, which the sync's copy of this control shares

    def expect_weights(self, wanted: dict[str, dict[str, Any]]) -> list[str]:
        super().expect_weights(wanted)
        return [self.in_place_problem]

    def ipc_problem(self, request: str) -> str:
        self._note("try")
        asked = json.loads(request)
        found = bytes(exported[asked["handle"]][:16].tolist()).hex()
        assert found == asked["token"] and Path(asked["socket"]).is_socket()
        return self.problem

    def receive_over_ipc(self, request: str) -> IpcAnswer:
        self._note("copy")
        if self.wrong:
            return self.wrong[-1]
        asked = json.loads(request)
        self.requests.append(asked)
        parameters = dict(self.model.named_parameters())
        kinds = [(name, spec["shape"]) for name, spec in self.wanted.items()]
        dtype = parameters[kinds[0][0]].dtype
        names, shapes = zip(*kinds, strict=True)
        layout = WireLayout.of(names, shapes, dtype, asked["bucket_bytes"])
        targets = [parameters[name].detach() for name in layout.names]
        receive_buckets(layout, exported[asked["handle"]], asked["socket"], targets, deadline_s=asked["deadline_s"])
        self._note("copied")
        self.calls.pop()
        held = self.held_digests()
        self.calls.pop()
        return IpcAnswer(problem="", touched=True, workers=held)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("models")
    policy = make_tiny_model(folder / "policy", tie_word_embeddings=True, seed=1)
    prepare_packed_attention(policy)
    return policy, make_tiny_model(folder / "served", tie_word_embeddings=True, seed=2)


@pytest.fixture
def policy(models: tuple[PreTrainedModel, PreTrainedModel]) -> PreTrainedModel:
    return models[0]


@pytest.fixture
def control(models: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> OneGPU:
    randomize_weights(models[1], seed=2)
    monkeypatch.setattr(ipc_transport, "gpu_of", lambda device: GPU)
    monkeypatch.setattr(ipc_transport, "BUCKET_BYTES", 16 * 4096)
    return OneGPU(models[1])


def sync_with(control: FakeControl, *, transport: str = "ludic_shm", server_gpu: str = GPU) -> WeightSync:
    return WeightSync(
        control,
        transport=transport,
        served_model="tiny",
        dtype=torch.float32,
        probe_token_ids=PROBE,
        deadline_s=60.0,
        server_gpu=server_gpu,
    )


def test_after_a_first_sync_over_shared_memory_a_sync_is_a_pause_one_call_and_a_resume(
    control: OneGPU, policy: PreTrainedModel
) -> None:
    sync = sync_with(control)
    reports = []
    for version in range(4):
        reports.append(sync.sync(policy, version))
        with torch.no_grad():
            dict(policy.named_parameters())[NORM].add_(0.01)
    first = ["expect", "init", "try", "pause", "start", "update", "finish", "digests", "resume", "probe"]
    assert control.calls[: len(first)] == first
    rest = control.calls[len(first) :]
    assert sorted(rest[:4]) == ["copy", "pause", "probe", "resume"] and rest[2:4] == ["resume", "probe"]
    assert [sorted(rest[at : at + 3]) for at in (4, 7)] == [["copy", "pause", "resume"]] * 2 and len(rest) == 10
    assert "shared memory" in reports[0].proof and "written in place over CUDA IPC" in reports[1].proof
    assert all(f"all {report.num_tensors} tensors held" in report.proof for report in reports)
    assert set(reports[3].phases_s) == {"pause", "send", "digests", "resume"}
    with torch.no_grad():
        dict(policy.named_parameters())[NORM].sub_(0.01)  # back to what the last sync sent
    wanted = dict(policy.named_parameters())
    assert all(torch.allclose(held, wanted[name]) for name, held in control.model.named_parameters())
    socket = Path(control.requests[0]["socket"])
    assert len(control.files) == 1 and socket.parent == control.files[0].parent
    sync.close()
    sync.close()
    assert not socket.parent.exists()


def test_the_server_is_not_waited_for_to_pause_while_it_copies(control: OneGPU, policy: PreTrainedModel) -> None:
    sync = sync_with(control)
    sync.sync(policy, 0)
    copied = threading.Event()
    control.on |= {
        "pause": lambda: None if copied.wait(20) else refuse("the copy waits for the pause")(),
        "copied": copied.set,
    }
    sync.sync(policy, 1)
    sync.close()


@pytest.mark.parametrize("server_gpu", ["GPU-b", ""], ids=["another GPU", "a CPU, or several GPUs"])
def test_a_server_elsewhere_gets_every_sync_over_shared_memory_and_nothing_is_tried_or_said(
    control: OneGPU, policy: PreTrainedModel, server_gpu: str, caplog: pytest.LogCaptureFixture
) -> None:
    sync = sync_with(control, server_gpu=server_gpu)
    reports = [sync.sync(policy, version) for version in range(3)]
    assert len(control.files) == 3 and not {"try", "copy"} & set(control.calls) and not exported
    assert all("shared memory" in report.proof for report in reports) and not caplog.records
    sync.close()


def driver_gone(num_bytes: int, device: torch.device) -> tuple[torch.Tensor, str]:
    raise NoIpcError("cuIpcGetMemHandle gave CUDA_ERROR_NOT_SUPPORTED (801)")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda control, patch: setattr(control, "problem", "cuIpcOpenMemHandle_v2 gave X (1)"),
            "OpenMemHandle_v2 gave X",
        ),
        (lambda control, patch: patch.setattr(ipc_link, "exported_buffer", driver_gone), "CUDA_ERROR_NOT_SUPPORTED"),
        (lambda control, patch: setattr(control, "in_place_problem", "mlp is loaded by Fp8"), "mlp is loaded by Fp8"),
    ],
    ids=["the worker cannot map", "the driver cannot export", "the model cannot be written in place"],
)
def test_one_gpu_without_ipc_falls_back_to_shared_memory_with_one_line_that_says_why(
    control: OneGPU,
    policy: PreTrainedModel,
    spoil: Callable[[OneGPU, pytest.MonkeyPatch], None],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spoil(control, monkeypatch)
    sync = sync_with(control)
    with caplog.at_level(logging.WARNING):
        for version in range(3):
            assert "shared memory" in sync.sync(policy, version).proof
    (record,) = caplog.records
    assert said in record.getMessage() and "\n" not in record.getMessage() and "copy" not in control.calls
    assert len(control.files) == 3
    sync.close()


def test_a_socket_that_cannot_be_made_is_a_reason_too(
    control: OneGPU, policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse_path(*_: object, **options: object) -> IpcLink:
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr(ipc_transport, "IpcLink", refuse_path)
    sync = sync_with(control)
    assert "shared memory" in sync.sync(policy, 0).proof and "AF_UNIX path too long" in caplog.text
    sync.close()


def test_one_element_that_changed_after_the_copy_is_caught_and_the_next_sync_starts_anew(
    control: OneGPU, policy: PreTrainedModel
) -> None:
    @torch.no_grad()
    def flip() -> None:
        dict(control.model.named_parameters())[NORM][5] += 1e-6

    sync = sync_with(control)
    sync.sync(policy, 0)
    control.on["copied"] = flip
    with pytest.raises(WeightSyncError, match=rf"1 of \d+ tensors on the server differ .* the first is {NORM}"):
        sync.sync(policy, 1)
    assert control.is_paused()
    control.on.clear()
    assert "shared memory" in sync.sync(policy, 2).proof and not control.is_paused()
    assert "CUDA IPC" in sync.sync(policy, 3).proof
    sync.close()


@pytest.mark.parametrize("touched", [False, True])
def test_what_the_server_says_against_a_copy_is_in_the_error_and_decides_whether_it_stays_paused(
    control: OneGPU, policy: PreTrainedModel, touched: bool
) -> None:
    sync = sync_with(control)
    sync.sync(policy, 0)
    control.wrong.append(IpcAnswer(problem="norm has no place", touched=touched, workers=[]))
    with pytest.raises(WeightSyncError, match="norm has no place"):
        sync.sync(policy, 1)
    assert control.is_paused() is touched
    control.wrong.clear()
    sync.sync(policy, 2)
    assert not control.is_paused()
    sync.close()


def test_a_server_that_dies_in_the_middle_is_an_error_with_its_own_words(
    control: OneGPU, policy: PreTrainedModel
) -> None:
    sync = sync_with(control)
    sync.sync(policy, 0)

    def die() -> None:
        raise EngineError("the engine core died")

    control.on["copy"] = die
    with pytest.raises(WeightSyncError, match="the engine core died"):
        sync.sync(policy, 1)
    assert control.is_paused(), "what it holds is not known"
    sync.close()


def test_an_aborted_sync_ends_at_once_and_lets_go_of_the_buffer(control: OneGPU, policy: PreTrainedModel) -> None:
    sync = sync_with(control)
    sync.sync(policy, 0)
    released = threading.Event()

    def hang() -> None:
        released.wait(60)

    control.on["copy"] = hang
    timer = threading.Timer(0.3, lambda: sync.abort("the run was interrupted"))
    timer.start()
    started = time.monotonic()
    with pytest.raises(WeightSyncError, match="given up: the run was interrupted"):
        sync.sync(policy, 1)
    assert time.monotonic() - started < 30, "not the deadline of 60 s"
    released.set()
    sync.close()


def test_over_nccl_one_gpu_is_nothing_special(policy: PreTrainedModel, control: OneGPU) -> None:
    sync = sync_with(control, transport="ludic_nccl")
    assert type(sync._talk.transport).__name__ == "BucketTransport"


# --- the worker -----------------------------------------------------------------------------------------------------------


def request_of(link: IpcLink, **changes: Any) -> Any:
    worker = within_vllm("ludic.inference.worker.vllm_ipc")
    said = {
        "handle": link.handle,
        "num_bytes": link.num_bytes,
        "bucket_bytes": 4096,
        "socket": str(link.path),
        "deadline_s": 30.0,
    }
    return worker.Request.of(json.dumps(said | changes))


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = within_vllm("ludic.inference.worker.vllm_ipc")
    monkeypatch.setattr(module, "mapped_buffer", map_again)
    return module


@pytest.mark.vllm
def test_the_worker_copies_into_the_models_own_memory_and_refuses_what_has_no_place_untouched(
    worker: Any, tmp_path: Path
) -> None:
    layout = WireLayout.of(list(CHECKPOINT), list(CHECKPOINT.values()), torch.bfloat16, 4096)
    link, served = make_link(layout, tmp_path), Served()
    answers: list[tuple[str, bool]] = []

    def receive() -> None:
        answers.append(worker.receive(served, CHECKPOINT, torch.bfloat16, CPU, request_of(link)))

    places = [parameter.data_ptr() for parameter in served.parameters()]
    for seed in (1, 2):
        thread = threading.Thread(target=receive)
        thread.start()
        link.send(list(checkpoint(seed).values()), ended=lambda: False)
        thread.join(20)
        wanted = {name: tensor.bfloat16() for name, tensor in checkpoint(seed).items()}
        assert torch.equal(served.embed.weight[:61], wanted["embed.weight"])
        assert torch.equal(served.mlp.gate_up_proj.weight[6:], wanted["mlp.up_proj.weight"])
    assert answers == [("", True)] * 2
    assert [parameter.data_ptr() for parameter in served.parameters()] == places
    before = served.embed.weight.clone()
    served.norm.float()
    receive()
    assert answers[-1] == ("the weights cannot be written in place: norm.weight", False)
    served.norm.bfloat16()
    link.leave()
    receive()
    assert "broken off" in answers[-1][0] and torch.equal(served.embed.weight, before)


@pytest.mark.vllm
def test_the_worker_says_why_it_does_not_see_the_trainers_memory(worker: Any, tmp_path: Path) -> None:
    link = make_link(WireLayout.of(NAMES, SHAPES, torch.bfloat16, 4096), tmp_path)
    token = link.mark()
    assert worker.ipc_problem(request_of(link, token=token), CPU) == ""
    problems = {
        "containers with process ids": {"handle": "00"},
        "other memory than the trainer's": {"token": "00" * 16},
        "does not see the trainer's folder": {"socket": str(tmp_path / "elsewhere")},
        "is no socket": {"socket": str(tmp_path)},
    }
    for said, changes in problems.items():
        problem = worker.ipc_problem(request_of(link, **{"token": token} | changes), CPU)
        assert said in problem and "\n" not in problem
    link.leave()


# --- memory of a GPU ------------------------------------------------------------------------------------------------------


def other_process(path: str, handle: str, num_bytes: int, large: str, said: Any) -> None:
    """As a vLLM worker: take two rounds and say the digests; then wait to be killed, with the large buffer mapped."""
    device = torch.device("cuda", 0)
    layout = WireLayout.of(NAMES, SHAPES, torch.bfloat16, 8192)
    targets = [torch.full(shape, 7, dtype=torch.bfloat16, device=device) for shape in SHAPES]
    for _ in range(2):
        with mapped_buffer(handle, num_bytes, device) as buffer:
            receive_buckets(layout, buffer, path, targets, deadline_s=60.0)
        said.send(tensor_digests(targets))
    with mapped_buffer(large, LARGE_BYTES, device) as buffer:
        said.send((int(buffer[0]), int(buffer[-1])))
        said.recv()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_of_the_gpu_is_seen_by_another_process_and_is_free_again_when_that_was_killed(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    torch.zeros(1, device=device)
    free_before = torch.cuda.mem_get_info(device)[0]
    large, handle = exported_buffer(LARGE_BYTES, device)
    large.fill_(5)[-1] = 6
    assert large.is_cuda and free_before - torch.cuda.mem_get_info(device)[0] >= LARGE_BYTES
    link = IpcLink(WireLayout.of(NAMES, SHAPES, torch.bfloat16, 8192), device, tmp_path / "turns", deadline_s=60.0)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (str(link.path), link.handle, link.num_bytes, handle, theirs)
    process = context.Process(target=other_process, args=arguments, daemon=True)
    process.start()
    theirs.close()
    try:
        for seed in (0, 1):
            sent = link.send([master.cuda() for master in masters(seed)], ended=lambda: not process.is_alive())
            assert ours.poll(60) and ours.recv() == sent
            assert sent == tensor_digests([master.bfloat16() for master in masters(seed)])
        assert ours.poll(60) and ours.recv() == (5, 6)
    finally:
        process.kill()
        process.join(30)
        link.leave()
    del large, link
    deadline = time.monotonic() + 10  # the driver takes a moment to clear away a process
    while (
        taken := free_before - torch.cuda.mem_get_info(device)[0]
    ) > LARGE_BYTES // 4 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert taken <= LARGE_BYTES // 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_handle_of_nothing_and_more_memory_than_there_is_are_refused_with_the_drivers_words() -> None:
    device = torch.device("cuda", 0)
    with (
        pytest.raises(NoIpcError, match="cuIpcOpenMemHandle_v2 gave CUDA_ERROR"),
        mapped_buffer("00" * 64, 4096, device),
    ):
        pass
    with pytest.raises(NoIpcError, match="cuMemAlloc_v2 gave CUDA_ERROR_OUT_OF_MEMORY"):
        exported_buffer(1 << 44, device)
    assert torch.ones(3, device=device).sum().item() == 3, "the context still works"
