"""The worker's end of a weight sync on one GPU: it copies the trainer's buckets into the memory that the model computes with.

The trainer's half is `ipc_transport`. Each call is whole in itself: it maps the trainer's buffer, takes one round and lets go,
so that a trainer which dies leaves nothing mapped, and the next one finds nothing of it.
"""

import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from ludic.inference.weights.bucket_broadcast import WireLayout
from ludic.inference.weights.ipc_link import TOKEN_BYTES, LinkBrokenError, receive_buckets
from ludic.inference.weights.ipc_memory import NoIpcError, mapped_buffer
from ludic.inference.worker.vllm_model import in_place_targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the trainer says of its buffer."""

    handle: str
    """Of the driver, in hex"""
    num_bytes: int
    bucket_bytes: int
    """Into which the weights are cut"""
    socket: str
    """Path of the trainer's socket"""
    deadline_s: float
    """Of each turn"""
    token: str = ""
    """What the buffer begins with, in hex"""

    @classmethod
    def of(cls, text: str) -> Self:
        return cls(**json.loads(text))


def ipc_problem(request: Request, device: torch.device) -> str:
    """Why this process does not see the trainer's buffer on its GPU, or the trainer's socket; "" where it does."""
    try:
        if not stat.S_ISSOCK(os.stat(request.socket).st_mode):
            return f"{request.socket} is no socket"
        with mapped_buffer(request.handle, request.num_bytes, device) as buffer:
            found = bytes(buffer[:TOKEN_BYTES].tolist()).hex()
    except OSError:
        return "the server does not see the trainer's folder in shared memory (another container?)"
    except NoIpcError as error:
        return f"{error} (do server and trainer run in containers with process ids of their own?)"
    return "" if found == request.token else "the server's GPU shows other memory than the trainer's"


def receive(
    model: torch.nn.Module,
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    device: torch.device,
    request: Request,
) -> tuple[str, bool]:
    """Take one round into `model`'s own memory: (why not, "" if it did; whether weights may have been replaced)."""
    touched = False
    try:
        layout = WireLayout.of(list(shapes), list(shapes.values()), dtype, request.bucket_bytes)
        targets = in_place_targets(model, shapes, dtype)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a step may still run on another stream: nothing may change under it
        with mapped_buffer(request.handle, request.num_bytes, device) as buffer:
            touched = True
            receive_buckets(layout, buffer, request.socket, targets, deadline_s=request.deadline_s)
    except (LinkBrokenError, NoIpcError, ValueError) as error:
        return " ".join(str(error).split()), touched
    return "", True
