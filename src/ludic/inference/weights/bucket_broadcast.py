"""Sends a set of tensors as a few broadcasts of flat buffers, with packing, transfer and unpacking at the same time.

What is sent is agreed once (`WireLayout`); a round carries nothing but bytes. Two buffers on each side take turns: while one
is broadcast on a stream of its own, the other is packed, or copied into the model. It needs torch and nothing of vLLM.

Left out: several senders. Rank 0 holds everything.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ludic.inference.weights.bucket_layout import BLOCK_BYTES, Bucket, pack, plan_buckets, unpack
from ludic.inference.weights.digest import FlatDigest

BUCKET_BYTES = 128 << 20
"""Two such buffers on each side. Smaller ones overlap more, larger ones launch less: at 1 GB, 8 broadcasts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WireLayout:
    """What goes over the wire, in which order and in which buckets. Equal on both sides."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    buckets: tuple[Bucket, ...]

    @classmethod
    def of(
        cls, names: Sequence[str], shapes: Sequence[Sequence[int]], dtype: torch.dtype, bucket_bytes: int
    ) -> "WireLayout":
        tupled = tuple(tuple(shape) for shape in shapes)
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape in tupled]
        return cls(names=tuple(names), shapes=tupled, dtype=dtype, buckets=plan_buckets(sizes, bucket_bytes))

    @property
    def buffer_bytes(self) -> int:
        """Size of the largest bucket."""
        return max((bucket.num_bytes for bucket in self.buckets), default=BLOCK_BYTES)


class Communicator(Protocol):
    """Broadcasts in place from rank `src`; on a GPU on `stream`, without waiting."""

    def broadcast(self, tensor: torch.Tensor, src: int, stream: "torch.cuda.Stream | None" = None) -> None: ...


class _Side:
    """One side: two buffers, and on a GPU the stream on which they are broadcast beside the work of the current one."""

    def __init__(self, layout: WireLayout, communicator: Communicator, device: torch.device) -> None:
        self.layout = layout
        self._communicator = communicator
        self._device = device
        self._buffers = [torch.empty(layout.buffer_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._done = [torch.cuda.Event(), torch.cuda.Event()] if on_gpu else []

    def _buffer(self, index: int) -> torch.Tensor:
        """[buffer_bytes] uint8: where bucket number `index` is."""
        return self._buffers[index % 2]

    def _broadcast(self, index: int) -> None:
        """Start the broadcast of bucket `index`, after everything that the current stream was given so far."""
        data = self._buffer(index)[: self.layout.buckets[index].num_bytes]
        if self._stream is None:
            self._communicator.broadcast(data, src=0)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._communicator.broadcast(data, src=0, stream=self._stream)
        self._done[index % 2].record(self._stream)

    def _wait(self, index: int) -> None:
        """Let the current stream wait until the last broadcast of bucket `index`'s buffer is over."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done[index % 2])


class BucketSender(_Side):
    """The trainer's side (rank 0)."""

    def send(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        """Cast, pack and broadcast `tensors` (of the layout's shapes, contiguous); their digests as they went out.

        Returns when all is sent. The digests are computed over the buffers while those are broadcast.
        """
        layout = self.layout
        digest = FlatDigest(len(layout.names), self._device)
        for index, bucket in enumerate(layout.buckets):
            self._wait(index)
            pack(bucket, tensors, self._buffer(index), layout.dtype)
            self._broadcast(index)
            digest.add(bucket, self._buffer(index))
        self._wait(0)
        self._wait(1)
        # Waits for the current stream, and so for the broadcasts.
        return digest.values([(layout.dtype, shape) for shape in layout.shapes])


class BucketReceiver(_Side):
    """A worker's side."""

    def receive_into(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copy one round into `tensors`, in place and in the layout's order; on a GPU it is launched, not waited for."""
        buckets = self.layout.buckets
        for index in range(-1, len(buckets)):
            # The next bucket is on its way while this one is unpacked. It takes the buffer of the one before.
            if index + 1 < len(buckets):
                self._broadcast(index + 1)
            if index >= 0:
                self._wait(index)
                unpack(buckets[index], self._buffer(index), tensors)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """One round as whole tensors, each in memory of its own, which the caller may keep."""
        layout = self.layout
        whole: dict[int, torch.Tensor] = {}
        for bucket in layout.buckets:
            buffer = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=self._device)
            stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
            self._communicator.broadcast(buffer, src=0, stream=stream)
            for piece in bucket.pieces:
                number, data = piece.tensor, buffer[piece.offset : piece.offset + piece.num_bytes]
                shape = layout.shapes[number]
                total = torch.Size(shape).numel() * layout.dtype.itemsize
                if piece.num_bytes < total:
                    if number not in whole:
                        whole[number] = torch.empty(total, dtype=torch.uint8, device=self._device)
                    whole[number][piece.start : piece.start + piece.num_bytes] = data
                    if piece.start + piece.num_bytes < total:
                        continue
                    data = whole.pop(number)
                yield layout.names[number], data.view(layout.dtype).view(shape)
        for number, shape in enumerate(layout.shapes):
            if torch.Size(shape).numel() == 0:
                yield layout.names[number], torch.empty(shape, dtype=layout.dtype, device=self._device)
