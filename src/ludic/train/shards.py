"""The weights of one model, cut over the ranks that train it: PyTorch's FSDP2, and whole tensors back from the pieces.

Each decoder layer is a group of its own, and everything else (embeddings, head, last norm) one more, which is why a head that
is tied to the embeddings needs no care. A parameter is cut along its first dimension as `torch.chunk` cuts: rank r holds its
rows r * ceil(n / N) and on, which may be none.

The optimizer gets plain tensors, the pieces themselves, and not FSDP's distributed ones: what steps, clips and compares on
one GPU then does so here.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from ludic.train.attention import decoder_layers
from ludic.train.logprobs import TokenStats, token_logprobs
from ludic.train.master_weights import MasterWeights, Published, bucketed, round_masters
from ludic.train.ranks import Ranks
from ludic.types import MicroBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUCKET = 2**25
"""Weights of whole tensors that are gathered at a time: 64 MiB in bf16. The next ones are on their way while these are
copied to their places."""


class ShardedForward(torch.nn.Module):
    """`token_logprobs` of a model whose weights are sharded: FSDP gathers what lies outside of the layers around its forward.

    Args:
        offload: keep the pieces, their gradients and so the optimizer's state in the memory of the hosts.
    """

    def __init__(
        self, model: "PreTrainedModel", ranks: Ranks, *, compute_dtype: torch.dtype, offload: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        layers = decoder_layers(model, "shard: train with one process")
        policy: dict[str, Any] = {
            "mesh": ranks.mesh,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            "offload_policy": CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda") if offload else OffloadPolicy(),
        }
        for module in (*layers, self):
            fully_shard(module, **policy)
            assert isinstance(module, FSDPModule)
            # A sum: the loss is divided by the whole update's tokens, not by each rank's own. gloo can but add.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def forward(self, row: MicroBatch, **settings: Any) -> TokenStats:
        return token_logprobs(self.model, row, **settings)


class ShardMasters(MasterWeights):
    """This rank's pieces of the float32 masters of a model in `ShardedForward`; `names` and `num_trained` are of the whole.
    A state dict takes the pieces of all ranks: see `ShardedLearner.full_state`.

    Args:
        names, shapes: of the whole parameters.
    """

    def __init__(
        self, model: torch.nn.Module, names: Sequence[str], shapes: Sequence[torch.Size], compute_dtype: torch.dtype
    ) -> None:
        self.names = list(names)
        self._sharded = list(model.parameters())
        assert [name for name, _ in model.named_parameters()] == self.names
        self.parameters = [
            torch.nn.Parameter(_local(parameter.data), requires_grad=parameter.requires_grad)
            for parameter in self._sharded
        ]
        copies = [master.data.to(torch.bfloat16) for master in self.parameters]
        pairs = [
            (copy, master)
            for copy, master in zip(copies, self.parameters, strict=True)
            if master.requires_grad and master.numel()
        ]
        self._buckets = bucketed(pairs)
        self.num_trained = sum(
            shape.numel() for shape, master in zip(shapes, self.parameters, strict=True) if master.requires_grad
        )
        """How many weights are trained, of all ranks."""
        self.computing = copies if compute_dtype == torch.bfloat16 else [master.data for master in self.parameters]
        """The pieces as the model computes with them and the server is sent them."""

    @torch.no_grad()
    def publish(self) -> Published:
        """Round this rank's pieces, and count what that changes of them."""
        return round_masters(self._buckets, self.parameters[0].device)

    def take_gradients(self) -> list[torch.Tensor]:
        """Hand the gradients that FSDP has reduced to the masters."""
        for parameter, master in zip(self._sharded, self.parameters, strict=True):
            master.grad = None if parameter.grad is None else _local(parameter.grad)
            parameter.grad = None
        return [master.grad for master in self.parameters if master.grad is not None]


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local()
    return local


def rows_of(shape: torch.Size, rank: int, num_ranks: int) -> slice:
    """Which rows of a parameter of this shape the rank holds."""
    count = -(-shape[0] // num_ranks)
    return slice(min(rank * count, shape[0]), min((rank + 1) * count, shape[0]))


def gather(
    ranks: Ranks,
    pieces: Sequence[torch.Tensor],
    shapes: Sequence[torch.Size],
    take: Callable[[int, torch.Tensor], None],
    *,
    bucket: int = BUCKET,
) -> None:
    """Bring the pieces of all ranks together on rank 0, whose `take` gets each tensor's number and the whole, on its device.

    All ranks call it, with pieces of one dtype. What `take` is given is overwritten later: it copies.
    """
    waiting: tuple[dist.Work, list[int], list[torch.Tensor] | None] | None = None
    for numbers in _numbers_of_buckets(shapes, bucket):
        started = _start(ranks, [pieces[number] for number in numbers], [shapes[number] for number in numbers])
        if waiting is not None:
            _finish(waiting, shapes, ranks.size, take)
        waiting = (started[0], numbers, started[1])
    if waiting is not None:
        _finish(waiting, shapes, ranks.size, take)


def _numbers_of_buckets(shapes: Sequence[torch.Size], bucket: int) -> list[list[int]]:
    buckets: list[list[int]] = []
    room = 0
    for number, shape in enumerate(shapes):
        room -= shape.numel()
        if room < 0:
            buckets.append([])
            room = bucket - shape.numel()
        buckets[-1].append(number)
    return buckets


def _start(
    ranks: Ranks, pieces: Sequence[torch.Tensor], shapes: Sequence[torch.Size]
) -> tuple[dist.Work, list[torch.Tensor] | None]:
    """Start one gather of the pieces end to end, each padded to the size of the largest rank's."""
    sizes = [_padded(shape, ranks.size) for shape in shapes]
    flat = torch.zeros(sum(sizes), dtype=pieces[0].dtype, device=ranks.device)
    for place, piece in zip(flat.split(sizes), pieces, strict=True):
        place[: piece.numel()].copy_(piece.reshape(-1))
    received = [torch.empty_like(flat) for _ in range(ranks.size)] if ranks.rank == 0 else None
    work = dist.gather(flat, received, dst=0, async_op=True)
    assert work is not None
    return work, received


def _padded(shape: torch.Size, num_ranks: int) -> int:
    return -(-shape[0] // num_ranks) * shape[1:].numel()


def _finish(
    started: tuple[dist.Work, list[int], list[torch.Tensor] | None],
    shapes: Sequence[torch.Size],
    num_ranks: int,
    take: Callable[[int, torch.Tensor], None],
) -> None:
    work, numbers, received = started
    work.wait()
    if received is None:
        return
    sizes = [_padded(shapes[number], num_ranks) for number in numbers]
    parts = [flat.split(sizes) for flat in received]
    for place, number in enumerate(numbers):
        # The padding of the last ranks stands behind all rows.
        whole = torch.cat([part[place] for part in parts])[: shapes[number].numel()]
        take(number, whole.view(shapes[number]))
