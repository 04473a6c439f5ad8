"""The weights of one model, whole on each rank, and their fp32 masters, of which each rank has its part (ZeRO's stage 1,
arXiv 1910.02054).

Parameters lie end to end in a few flat buckets, and so do their gradients. A bucket is cut into as many chunks as there are
ranks: the gradients of a chunk are added up on the rank that has its masters, and the stepped weights of all chunks go back
to all ranks, each by one collective a bucket that copies nothing. A chunk ends anywhere, also inside of a parameter; what a
rank has of a parameter is its segment, often the whole and often nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from ludic.train.master_weights import MasterWeights, Published, bucketed, check_float32, decays, round_masters
from ludic.train.ranks import Ranks

BUCKET = 2**26
"""Weights of a bucket, or one larger tensor: 256 MiB of gradients."""
_ALIGNED = 128
"""Each parameter and each chunk begins at a multiple of so many weights: compiled kernels load 16 bytes at a time."""


# torch 2.14 has renamed them, and warns of the old names.
_reduce_scatter: Callable[..., dist.Work | None] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_all_gather: Callable[..., dist.Work | None] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Bucket(NamedTuple):
    """Some parameters end to end."""

    places: list[tuple[int, slice]]
    """The number of each parameter, and where it lies."""
    length: int
    """In weights, with the gaps; a multiple of the number of ranks."""

    def chunk(self, rank: int, num_ranks: int) -> slice:
        """The part of one rank."""
        size = self.length // num_ranks
        return slice(rank * size, (rank + 1) * size)


def buckets_of(sizes: Sequence[int], num_ranks: int, *, limit: int = BUCKET) -> list[Bucket]:
    """Parameters of these sizes, in their order, in buckets of at most `limit` weights, or of one larger parameter."""
    lists: list[list[tuple[int, slice]]] = []
    end = limit
    for number, size in enumerate(sizes):
        if end + size > limit or not lists:
            lists.append([])
            end = 0
        lists[-1].append((number, slice(end, end + size)))
        end = _rounded(end + size, _ALIGNED)
    return [Bucket(places, _rounded(places[-1][1].stop, num_ranks * _ALIGNED)) for places in lists]


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class FlatMasters(MasterWeights):
    """Moves `model` to this rank's device and into buckets, in place, where it computes in `compute_dtype`; the masters are
    this rank's segments, [n] each, n of 0 or more, in the order of the model's parameters. `names` and `num_trained` are of
    the whole.

    Args:
        model: float32 parameters, all of them trained, the same on all ranks.

    Raises:
        ValueError: a parameter is not float32.
    """

    holds_gradients = True

    def __init__(self, model: torch.nn.Module, ranks: Ranks, *, compute_dtype: torch.dtype) -> None:
        check_float32(model)
        self._ranks = ranks
        self.names = [name for name, _ in model.named_parameters()]
        whole = list(model.parameters())
        self._decays = [decays(name, parameter) for name, parameter in model.named_parameters()]
        self.num_trained = sum(parameter.numel() for parameter in whole)
        self.buckets = buckets_of([parameter.numel() for parameter in whole], ranks.size)
        self.segments: list[slice] = [slice(0)] * len(whole)
        """Of each parameter's weights, end to end, those that this rank has the masters of."""
        self.parameters: list[torch.nn.Parameter] = [torch.nn.Parameter(torch.empty(0))] * len(whole)
        self._weights, self._gradients = list[torch.Tensor](), list[torch.Tensor]()
        self._own_gradients = [torch.empty(0)] * len(whole)
        rounded = [torch.empty(0)] * len(whole)
        for bucket in self.buckets:
            weights = torch.zeros(bucket.length, dtype=compute_dtype, device=ranks.device)
            gradients = torch.zeros(bucket.length, dtype=torch.float32, device=ranks.device)
            chunk = bucket.chunk(ranks.rank, ranks.size)
            # In fp32 the model's own weights are the masters.
            separate = compute_dtype != torch.float32
            masters = torch.zeros_like(gradients[chunk]) if separate else weights[chunk]
            for number, place in bucket.places:
                parameter = whole[number]
                values = parameter.data.to(ranks.device).flatten()
                weights[place].copy_(values)
                first, last = (min(max(end, place.start), place.stop) for end in (chunk.start, chunk.stop))
                here = slice(first - chunk.start, last - chunk.start) if last > first else slice(0)
                self.segments[number] = slice(first - place.start, last - place.start)
                masters[here].copy_(values[self.segments[number]])
                self.parameters[number] = torch.nn.Parameter(masters[here])
                self._own_gradients[number] = gradients[chunk][here]
                rounded[number] = weights[chunk][here] if separate else masters[here].to(torch.bfloat16)
                parameter.data = weights[place].view(parameter.shape)
                parameter.register_post_accumulate_grad_hook(_Add(gradients[place].view(parameter.shape)))
            self._weights.append(weights)
            self._gradients.append(gradients)
        torch.nn.Module.to(model, ranks.device)  # the buffers
        pairs = zip(rounded, self.parameters, strict=True)
        self._rounded = bucketed([(copy, master) for copy, master in pairs if master.numel()])

    def reduce(self) -> list[torch.Tensor]:
        """Add up the gradients of all ranks; returns those of this rank's segments. Does not wait for the device."""
        self._for_each_bucket(_reduce_scatter, self._gradients, into_chunk=True)
        for master, gradient in zip(self.parameters, self._own_gradients, strict=True):
            master.grad = gradient
        return [gradient for gradient in self._own_gradients if gradient.numel()]

    def clear(self) -> None:
        """Forget what has been accumulated."""
        torch._foreach_zero_(self._gradients)

    @torch.no_grad()
    def decay(self, amount: float) -> None:
        """As of whole tensors, whose shape a segment does not have."""
        pieces = zip(self.parameters, self._decays, strict=True)
        matrices: list[torch.Tensor] = [master for master, decayed in pieces if decayed and master.numel()]
        if amount and matrices:
            torch._foreach_mul_(matrices, 1 - amount)

    @torch.no_grad()
    def publish(self) -> Published:
        """Round this rank's masters and give them to all ranks; what that changes of this rank's."""
        published = round_masters(self._rounded, self._ranks.device)
        self._for_each_bucket(_all_gather, self._weights, into_chunk=False)
        return published

    def _for_each_bucket(
        self, collective: Callable[..., dist.Work | None], flats: Sequence[torch.Tensor], *, into_chunk: bool
    ) -> None:
        """All at once, in place: between a bucket and this rank's chunk of it."""
        started = []
        for bucket, flat in zip(self.buckets, flats, strict=True):
            chunk = flat[bucket.chunk(self._ranks.rank, self._ranks.size)]
            started.append(collective(*((chunk, flat) if into_chunk else (flat, chunk)), async_op=True))
        for work in started:
            assert work is not None
            work.wait()

    def gather(self, pieces: Sequence[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
        """On rank 0, of each parameter its number and the whole, [n], of which each rank has its segment in `pieces`; on the
        others nothing, but they must ask too. A whole one is overwritten by the next bucket's: copy it."""
        for bucket in self.buckets:
            chunk = bucket.chunk(self._ranks.rank, self._ranks.size)
            flat = torch.zeros(bucket.length, dtype=torch.float32, device=self._ranks.device)
            for number, place in bucket.places:
                segment = self.segments[number]
                flat[place][segment].copy_(pieces[number])
            own, rank_0 = flat[chunk].clone(), self._ranks.rank == 0
            dist.gather(own, list(flat.chunk(self._ranks.size)) if rank_0 else None, dst=0)
            if rank_0:
                yield from ((number, flat[place]) for number, place in bucket.places)


class _Add:
    """Adds a parameter's gradient to its place in a bucket, and frees it."""

    def __init__(self, place: torch.Tensor) -> None:
        self._place = place

    def __call__(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self._place.add_(parameter.grad)
        parameter.grad = None
