"""Weights as flat buckets: what arrives is what was sent, however it was cut; and the server's engine applies it or says why not.

NCCL is replaced by a queue; everything else is real. The tests marked `vllm` run within vLLM's own engine class.
"""

import importlib
import queue
import threading
import warnings
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ludic.inference.weights.bucket_broadcast import BucketReceiver, BucketSender, WireLayout
from ludic.inference.weights.digest import tensor_digests

CPU = torch.device("cpu")
SHAPES = [(4, 900), (3,), (70, 33), (), (0, 4), (2050,)]
NAMES = [f"t{number}" for number in range(len(SHAPES))]
BUCKETS = [4096, 8192, 1 << 20]


def within_vllm(name: str) -> Any:
    """A module that imports vLLM, whose own imports warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


class Wire:
    """Both ends of a broadcast in one process: rank 0 puts copies, rank 1 takes them in order."""

    def __init__(self) -> None:
        self.messages: queue.Queue[torch.Tensor] = queue.Queue()
        self.count = 0

    def end(self, rank: int) -> "End":
        return End(self, rank)


class End:
    """In the place of an `NcclLink`."""

    left = False

    def __init__(self, wire: Wire, rank: int) -> None:
        self._wire, self._rank = wire, rank

    def join(self, *_: object, **options: object) -> None: ...

    def check(self) -> None: ...

    def leave(self) -> None:
        self.left = True

    def peer_is_gone(self) -> bool:
        return False

    def broadcast(self, tensor: torch.Tensor, src: int, stream: "torch.cuda.Stream | None" = None) -> None:
        assert src == 0 and tensor.is_contiguous() and tensor.dtype == torch.uint8
        if self._rank == src:
            self._wire.count += 1
            self._wire.messages.put(tensor.clone())
        else:
            tensor.copy_(self._wire.messages.get(timeout=20))


def masters(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def transfer(layout: WireLayout, sources: list[torch.Tensor], receive: Callable[[BucketReceiver], Any]) -> list[int]:
    """Send and receive at the same time; the sender's digests."""
    wire = Wire()
    sent: list[list[int]] = []
    sender = BucketSender(layout, wire.end(0), CPU)
    thread = threading.Thread(target=lambda: sent.append(sender.send(sources)))
    thread.start()
    receive(BucketReceiver(layout, wire.end(1), CPU))
    thread.join(20)
    assert wire.count == len(layout.buckets) and wire.messages.empty()
    return sent[0]


@pytest.mark.parametrize("bucket_bytes", BUCKETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_sent_lies_in_the_receivers_tensors_cast_and_digested(dtype: torch.dtype, bucket_bytes: int) -> None:
    layout = WireLayout.of(NAMES, SHAPES, dtype, bucket_bytes)
    targets = [torch.full(shape, 7, dtype=dtype) for shape in SHAPES]
    addresses = [target.data_ptr() for target in targets]
    for seed in (0, 1):
        sent = transfer(layout, masters(seed), lambda receiver: receiver.receive_into(targets))
        for target, master in zip(targets, masters(seed), strict=True):
            assert torch.equal(target, master.to(dtype))
        assert sent == tensor_digests(targets)
    assert [target.data_ptr() for target in targets] == addresses


@pytest.mark.parametrize("bucket_bytes", BUCKETS)
def test_tensors_taken_one_by_one_are_whole_and_keep_their_values(bucket_bytes: int) -> None:
    layout = WireLayout.of(NAMES, SHAPES, torch.bfloat16, bucket_bytes)
    received: dict[str, torch.Tensor] = {}
    transfer(layout, masters(), lambda receiver: received.update(receiver.tensors()))
    assert set(received) == set(NAMES)
    for name, master in zip(NAMES, masters(), strict=True):
        assert torch.equal(received[name], master.bfloat16())


def test_both_sides_cut_the_same_tensors_alike_and_no_bucket_is_larger_than_asked() -> None:
    layout = WireLayout.of(NAMES, SHAPES, torch.bfloat16, 4096)
    assert layout == WireLayout.of(list(NAMES), [list(shape) for shape in SHAPES], torch.bfloat16, 4096)
    assert layout.buffer_bytes == 4096 and len(layout.buckets) > 4


# --- the engine in vLLM's worker ----------------------------------------------------------------------------------------


class Served(torch.nn.Module):
    """A model as vLLM holds it: gate and up fused along dimension 0, the vocabulary padded."""

    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}  # noqa: RUF012

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(64, 8, dtype=dtype)
        self.mlp: Any = torch.nn.Module()
        self.mlp.gate_up_proj = torch.nn.Linear(8, 12, bias=False, dtype=dtype)
        self.norm = torch.nn.RMSNorm(8, dtype=dtype)
        self.requires_grad_(False)
        self.loaded: list[str] = []

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        for name, tensor in weights:
            if tensor.isnan().any():
                raise ValueError(f"{name} has a NaN")
            self.loaded.append(name)
        return {name for name, _ in self.named_parameters()}


CHECKPOINT = {
    "embed.weight": (61, 8),
    "mlp.gate_proj.weight": (6, 8),
    "mlp.up_proj.weight": (6, 8),
    "norm.weight": (8,),
}


class Engine:
    """vLLM's engine class with a queue in the place of NCCL, and a trainer at the other end."""

    def __init__(self, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, *, tensor_parallel: int = 1) -> None:
        vllm_nccl = within_vllm("ludic.inference.worker.vllm_nccl")
        self.wire = Wire()
        monkeypatch.setattr(vllm_nccl.BucketWeightTransferEngine, "_connect", lambda *_: self.wire.end(1))
        config = SimpleNamespace(
            parallel_config=SimpleNamespace(tensor_parallel_size=tensor_parallel, pipeline_parallel_size=1),
            model_config=None,
        )
        self.engine = vllm_nccl.BucketWeightTransferEngine(None, config, CPU, model)
        layout = WireLayout.of(list(CHECKPOINT), list(CHECKPOINT.values()), torch.bfloat16, 4096)
        agreed = {
            "master_address": "127.0.0.1",
            "master_port": 1,
            "rank_offset": 1,
            "world_size": 2,
            "names": list(layout.names),
            "shapes": [list(shape) for shape in layout.shapes],
            "dtype": "bfloat16",
            "bucket_bytes": 4096,
            "deadline_s": 30.0,
        }
        self.engine.init_transfer_engine(self.engine.parse_init_info(agreed))
        self.sender = BucketSender(layout, self.wire.end(0), CPU)

    def update(self, tensors: dict[str, torch.Tensor], apply: str) -> list[int]:
        """One round; the queue is longer than a round, so the trainer may send before the server receives."""
        sent = self.sender.send(list(tensors.values()))
        self.engine.start_weight_update()
        self.engine.receive_weights(self.engine.parse_update_info({"apply": apply, "deadline_s": 30.0}))
        self.engine.finish_weight_update()
        return sent


def policy(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in CHECKPOINT.items()}


@pytest.mark.vllm
def test_the_engine_writes_into_the_memory_that_the_model_computes_with(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served()
    padding = served.embed.weight[61:].clone()
    places = [parameter.data_ptr() for parameter in served.parameters()]
    engine = Engine(served, monkeypatch)
    for seed in (1, 2):
        wanted = {name: tensor.bfloat16() for name, tensor in policy(seed).items()}
        sent = engine.update(policy(seed), "copy")
        assert torch.equal(served.embed.weight[:61], wanted["embed.weight"])
        assert torch.equal(served.mlp.gate_up_proj.weight[:6], wanted["mlp.gate_proj.weight"])
        assert torch.equal(served.mlp.gate_up_proj.weight[6:], wanted["mlp.up_proj.weight"])
        assert torch.equal(served.norm.weight, wanted["norm.weight"])
        assert sent == tensor_digests(list(wanted.values()))
    assert torch.equal(served.embed.weight[61:], padding)
    assert [parameter.data_ptr() for parameter in served.parameters()] == places


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda model: setattr(model.mlp, "cpu_linear", True), "mlp multiplies with a packed copy"),
        (lambda model: setattr(model.norm, "process_weights_after_loading", print), "norm .* after loading"),
        (lambda model: model.norm.float(), r"holds norm\.weight as torch\.float32"),
        (
            lambda model: setattr(model.mlp.gate_up_proj, "weight", torch.nn.Parameter(torch.zeros(14, 8))),
            r"holds mlp\.gate_proj\.weight in another layout",
        ),
        (lambda model: model.register_parameter("extra", torch.nn.Parameter(torch.ones(3))), "fills extra"),
    ],
    ids=["packed", "derived", "dtype", "layout", "unfilled"],
)
def test_a_model_that_cannot_be_written_in_place_is_refused_with_the_reason_and_nothing_stays_on_the_wire(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Any], object], said: str
) -> None:
    served = Served()
    spoil(served)
    engine = Engine(served, monkeypatch)
    before = served.embed.weight.clone()
    with pytest.raises(ValueError, match=f"cannot be written in place: .*{said}"):
        engine.update(policy(1), "copy")
    assert torch.equal(served.embed.weight, before) and engine.wire.messages.empty()


@pytest.mark.vllm
def test_a_quantised_layer_and_a_split_model_are_not_written_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model_module = within_vllm("ludic.inference.worker.vllm_model")

    class Fp8Method(model_module.QuantizeMethodBase):  # type: ignore[misc, name-defined, unused-ignore]
        def create_weights(self, *_: Any) -> None: ...

        def apply(self, *_: Any) -> None: ...

    served = Served()
    served.mlp.gate_up_proj.quant_method = Fp8Method()
    with pytest.raises(ValueError, match=r"mlp\.gate_up_proj is loaded by Fp8Method"):
        Engine(served, monkeypatch).update(policy(1), "copy")
    with pytest.raises(ValueError, match=r"splits the model \(tensor parallel 2"):
        Engine(Served(), monkeypatch, tensor_parallel=2).update(policy(1), "copy")


@pytest.mark.vllm
def test_two_tensors_in_one_place_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    model_module = within_vllm("ludic.inference.worker.vllm_model")
    served = Served()
    served.head = torch.nn.Linear(8, 64, bias=False)
    served.head.weight = served.embed.weight
    one = SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1)
    problem = model_module.in_place_problem(served, one, CHECKPOINT | {"head.weight": (61, 8)}, torch.bfloat16)
    assert problem == "the served model holds embed.weight and head.weight in one place"
    assert model_module.in_place_problem(served, one, CHECKPOINT, torch.bfloat16) == ""


@pytest.mark.vllm
def test_vllms_own_loader_gets_whole_tensors_by_name_and_its_refusal_leaves_nothing_on_the_wire(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model_module = within_vllm("ludic.inference.worker.vllm_model")
    steps: list[str] = []
    monkeypatch.setattr(model_module, "initialize_layerwise_reload", lambda model: steps.append("begin"))
    monkeypatch.setattr(model_module, "finalize_layerwise_reload", lambda model, config: steps.append("end"))
    served = Served()
    engine = Engine(served, monkeypatch)
    engine.update(policy(1), "load")
    assert served.loaded == list(CHECKPOINT) and steps == ["begin", "end"]
    broken = policy(2) | {"mlp.gate_proj.weight": torch.full((6, 8), float("nan"))}
    with pytest.raises(ValueError, match=r"refused tensor 'mlp\.gate_proj\.weight' of shape \[6, 8\]: .* has a NaN"):
        engine.update(broken, "load")
    assert engine.wire.messages.empty() and steps == ["begin", "end", "begin", "end"]
    engine.update(policy(3), "load")
    assert steps == ["begin", "end"] * 3


@pytest.mark.vllm
def test_an_engine_that_was_not_opened_or_is_told_nonsense_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(Served(), monkeypatch).engine
    with pytest.raises(ValueError, match="'fly'; it must be copy, load or adapter"):
        engine.receive_weights(engine.parse_update_info({"apply": "fly", "deadline_s": 1.0}))
    engine.shutdown()
    with pytest.raises(ValueError, match="ludic_nccl is not open"):
        engine.receive_weights(engine.parse_update_info({"apply": "copy", "deadline_s": 1.0}))
