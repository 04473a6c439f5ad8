"""How the bytes of many tensors lie in a few flat buffers of bounded size.

Both sides of a weight transfer cut the same list of tensors in the same way, so the plan itself is never sent; a digest is
computed over the same buffers. Every piece begins at a multiple of `BLOCK_BYTES` in its buffer and in its tensor, and what
lies behind a piece's last byte is zero. The gaps cost at most 4 KiB a tensor. It needs torch and nothing of vLLM.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

BLOCK_BYTES = 4096
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
"""Copied as integers: a copy of bfloat16 goes through float32 in torch's fused kernel, which rewrites the bits of a NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """`num_bytes` of tensor `tensor` from its byte `start`, which lie at `offset` of the buffer."""

    tensor: int
    start: int
    num_bytes: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """What one buffer holds: `pieces` in order, `num_bytes` (a multiple of `BLOCK_BYTES`) with the gaps."""

    pieces: tuple[Piece, ...]
    num_bytes: int


def plan_buckets(sizes: Sequence[int], bucket_bytes: int) -> tuple[Bucket, ...]:
    """Lay tensors of `sizes` bytes out in buckets of at most `bucket_bytes`, in order; a longer tensor is cut.

    Example: sizes [5000, 100] and buckets of 8192 bytes give
        Bucket(pieces=(Piece(tensor=0, start=0, num_bytes=5000, offset=0),), num_bytes=8192)
        Bucket(pieces=(Piece(tensor=1, start=0, num_bytes=100, offset=0),), num_bytes=4096)

    Raises ValueError unless `bucket_bytes` is a positive multiple of `BLOCK_BYTES`.
    """
    if bucket_bytes <= 0 or bucket_bytes % BLOCK_BYTES:
        raise ValueError(f"bucket_bytes is {bucket_bytes}; it must be a positive multiple of {BLOCK_BYTES}")
    buckets: list[Bucket] = []
    pieces: list[Piece] = []
    filled = 0
    for tensor, size in enumerate(sizes):
        start = 0
        while start < size:
            if filled == bucket_bytes:
                buckets.append(Bucket(pieces=tuple(pieces), num_bytes=filled))
                pieces, filled = [], 0
            num_bytes = min(size - start, bucket_bytes - filled)
            pieces.append(Piece(tensor=tensor, start=start, num_bytes=num_bytes, offset=filled))
            filled += -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES
            start += num_bytes
    if pieces:
        buckets.append(Bucket(pieces=tuple(pieces), num_bytes=filled))
    return tuple(buckets)


@torch.no_grad()
def pack(
    bucket: Bucket, tensors: Sequence[torch.Tensor], buffer: torch.Tensor, dtype: torch.dtype | None = None
) -> None:
    """Fill `buffer` ([bytes] uint8, at least `bucket.num_bytes`) with the bucket's pieces of the contiguous `tensors`.

    With `dtype`, the tensors are cast to it on the way (sizes and starts count bytes of `dtype`): one pass that reads the
    masters and writes the wire. The gaps are zeroed first.
    """
    buffer[: bucket.num_bytes].zero_()
    _copy(*_pieces(bucket, tensors, buffer, dtype))


@torch.no_grad()
def unpack(bucket: Bucket, buffer: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Copy the bucket's pieces from `buffer` into the contiguous `tensors`, in place."""
    inside, outside = _pieces(bucket, tensors, buffer, None)
    _copy(outside, inside)


def _pieces(
    bucket: Bucket, tensors: Sequence[torch.Tensor], buffer: torch.Tensor, dtype: torch.dtype | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """For each piece its part of the buffer and its part of the tensor, both 1-D views of the same length."""
    as_dtype: dict[torch.dtype, torch.Tensor] = {}
    inside, outside = [], []
    for piece in bucket.pieces:
        flat = tensors[piece.tensor].detach().view(-1)
        if dtype is None or dtype == flat.dtype:
            flat = flat.view(_BITS[flat.itemsize])
            wire = flat.dtype
        else:
            wire = dtype
        if wire not in as_dtype:
            as_dtype[wire] = buffer[: bucket.num_bytes].view(wire)
        size = wire.itemsize
        first, count = piece.start // size, piece.num_bytes // size
        inside.append(as_dtype[wire].narrow(0, piece.offset // size, count))
        outside.append(flat.narrow(0, first, count))
    return inside, outside


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """One fused copy for each pair of dtypes (torch's fused kernel takes one pair)."""
    groups = defaultdict[tuple[torch.dtype, torch.dtype], list[tuple[torch.Tensor, torch.Tensor]]](list)
    for target, source in zip(targets, sources, strict=True):
        groups[target.dtype, source.dtype].append((target, source))
    for group in groups.values():
        into, from_ = map(list, zip(*group, strict=True))
        torch._foreach_copy_(into, from_, non_blocking=True)
