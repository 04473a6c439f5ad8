"""What training needs of a device's memory, and how one GPU is split between a started server and the trainer.

An estimate by the shape of the model: what really fits is tried before the first update (`ludic.train.memory`).
"""

import argparse
import math
import shlex
from typing import NamedTuple

from ludic.capacity.memory import SERVER_BYTES
from ludic.cli import started_settings
from ludic.config import GRPOConfig
from ludic.train.footprint import COMPUTE_BYTES

STATIC_BYTES_GPU = 18
"""Of a parameter while training on a GPU: float32 master, gradient and two moments of AdamW, and the bf16 copy."""
STATIC_BYTES_CPU = 20
"""On the CPU: float32 weights, gradient and moments, and the copy of the local engine."""
FROZEN_BYTES_GPU, FROZEN_BYTES_CPU = 4, 12
"""Below an adapter, whose own weights are few: the base, and the merged copy while it is sent; float32 on the CPU, where the
local engine has one more."""
ACTIVATION_BYTES = 36
"""Of a token of the micro-batch, a layer and a unit of the hidden size: measured with compiled layers at the 0.5B shape,
11.5 GiB at 16,384 tokens. Without compiling it is about twice that."""
GIB = 2**30
AUTO_BUDGET = 16_384
"""Tokens of a micro-batch for which `--micro-token-budget auto` is left room on one GPU; it takes more where there is more."""
SLACK = 1.1
"""What allocating in pieces needs beside the bytes that are counted."""
PROCESS_BYTES = 2 * GIB
"""Of the trainer's process on a GPU beside that: CUDA's context, workspaces, and the buffer that weights go through."""
SYNC_BYTES = GIB // 2
"""That buffer, of each engine after the first (`ludic.inference.weights.ipc_link`)."""
KV_CACHE_BYTES = GIB
"""What a server has for its KV cache at least."""
MOST = 0.5
"""Of a GPU that both share, for the server: a KV cache is seldom short of it, and longer micro-batches train faster."""


class Need(NamedTuple):
    """Bytes that training needs at its peak."""

    static: float
    """Weights, gradients and optimizer"""
    activations: float
    """Of one micro-batch of `budget` tokens"""
    parameters: int
    budget: int

    @property
    def total(self) -> float:
        return self.static + self.activations


def training_need(args: argparse.Namespace, config: GRPOConfig, *, on_gpu: bool, budget: int | None = None) -> Need:
    """By the shape of `args.model`. `budget` is None for the one that was asked for, or with `auto` the smallest."""
    from ludic.doctor.dry_run import model_shape

    shape, empty = model_shape(args.model, args.trust_remote_code)
    parameters = empty.num_parameters()
    text = shape.get_text_config()
    budget = budget or config.micro_token_budget or config.max_seq_len
    each = (STATIC_BYTES_GPU, STATIC_BYTES_CPU) if not config.lora_rank else (FROZEN_BYTES_GPU, FROZEN_BYTES_CPU)
    static = parameters * each[0 if on_gpu else 1]
    factor = 0.3 if config.gradient_checkpointing else 1.0
    activations = factor * ACTIVATION_BYTES * budget * text.num_hidden_layers * text.hidden_size
    if config.kl_coef > 0 and not config.lora_rank:  # an adapter's reference is its base
        static += parameters * (2 if on_gpu else 4)
    return Need(static, activations, parameters, budget)


def shares_gpu(args: argparse.Namespace) -> bool:
    """Whether a server that is started gets the GPU that trains, since there is no other."""
    import torch

    return bool(args.start_server) and torch.cuda.is_available() and torch.cuda.device_count() == 1


def given_share(args: argparse.Namespace) -> float | None:
    """The share of its GPU that the flags give the server; None where they leave it open.

    Raises:
        ValueError: two flags say it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gpu-memory-utilization", "--gpu_memory_utilization", action="append", default=[])
    values = parser.parse_known_args(shlex.split(args.server_args))[0].gpu_memory_utilization
    if values and args.server_memory_share is not None:
        raise ValueError(
            f"--server-memory-share {args.server_memory_share:g} contradicts --gpu-memory-utilization in --server-args: "
            "leave out one of them"
        )
    try:
        return float(values[-1]) if values else args.server_memory_share
    except ValueError:  # the server says what is wrong with it
        return None


def choose_share(args: argparse.Namespace, config: GRPOConfig, *, free: int, total: int) -> float:
    """The server's share of a GPU of `total` bytes that both sides use, of which `free` are free now.

    Raises:
        ValueError: both do not fit; one line.
    """
    need = training_need(args, config, on_gpu=True)
    wanted = [need]
    if config.micro_token_budget is None and need.budget < AUTO_BUDGET:
        wanted.insert(0, training_need(args, config, on_gpu=True, budget=AUTO_BUDGET))
    engines = started_settings(args).server_engines
    least = engines * (COMPUTE_BYTES * need.parameters + SERVER_BYTES + KV_CACHE_BYTES)
    free -= (engines - 1) * SYNC_BYTES
    for one in wanted:
        share = split(free=free, total=total, trainer=one.total)
        if share * total >= least:
            return share
    raise ValueError(
        f"one GPU with {free / GIB:.0f} of {total / GIB:.0f} GiB free does not hold both sides: training needs about "
        f"{need.total / GIB:.0f} GiB at {need.budget} tokens, the server at least {least / GIB:.0f}: make two GPUs visible, "
        "lower --micro-token-budget, or take --gradient-checkpointing, --lora-rank or a smaller model "
        "(--server-memory-share sets the server's part by hand)"
    )


def split(*, free: int, total: int, trainer: float) -> float:
    """What the server may take of the GPU, in hundredths: what `trainer` bytes of training leave, at most half.

    Example:
        >>> split(free=79 * GIB, total=80 * GIB, trainer=20 * GIB), split(free=79 * GIB, total=80 * GIB, trainer=50 * GIB)
        (0.5, 0.27)
    """
    left = free - trainer * SLACK - PROCESS_BYTES
    return max(0.0, min(MOST, math.floor(100 * left / total) / 100))
