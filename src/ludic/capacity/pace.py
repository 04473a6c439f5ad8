"""Seconds of an update: generation, training, weight sync. Every assumption is a constant here, or a flag.

The constants were taken once from measurements on NVIDIA H200s, one for all sizes; `measured` shows what they miss.
"""

import math
from dataclasses import dataclass

from ludic.capacity.memory import Trainer, kv_bytes_per_gpu, trained_parameters
from ludic.capacity.shapes import Shape
from ludic.forecast.generation_cost import GenerationCost
from ludic.train.footprint import COMPUTE_BYTES, GRADIENT_BYTES, MASTER_BYTES

PEAK_FLOPS = 989e12
"""Dense bf16 of an H100 or H200 SXM."""
MFU = 0.48
"""Of the trainer's kernels: 0.322 s of the 0.387 s of the 0.5B row in benchmarks/RESULTS.md, which is 40.0% with the waiting."""
HOST_LAYER_S = 3.75e-3
"""The least time of a layer in a micro-batch, forward and backward, however few its tokens: Python launches its kernels. By the
budgets of 4,096 and 8,192 tokens (`measured`), which leave the GPU idle for most of the time."""
RECOMPUTED = 4 / 3
"""Gradient checkpointing makes the forward pass twice: 8 in place of 6 operations for each parameter and token."""
STEP_TRAFFIC = 48
"""Bytes for each parameter in AdamW's step and in rounding the masters (`ludic.train.master_weights`)."""
ADDING_TRAFFIC = 12
"""Bytes for each gradient that a host adds up: two are read and one is written."""
MERGE_TRAFFIC = 20
"""Bytes for each weight that an adapter is merged into: to fp32 (2 + 4), the sum (4 + 4), to bf16 (4 + 2)."""
HOST_LINK = 50e9
"""Bytes a second between a GPU and its host: PCIe 5.0 x16. Assumed."""
HOST_MEMORY = 50e9
"""Bytes a second of a host's memory for each of its GPUs. Assumed."""
DECODE_STEP_S = 2.3e-3
"""The least time of a decoding step: vLLM's Python. 2026-11-28, one H200, vLLM 0.26.0, 0.5B shape, 256 tokens each, no log-probs:
2.27 ms with 1 completion in flight, 8.57 ms with 256."""
DECODE_TOKEN_S = 24e-6
"""And for each completion in flight, by the same two."""
MEMORY_SHARE = 0.7
"""Of the GPU's memory bandwidth: what decoding reaches. Assumed."""
ALL_REDUCE_S = 15e-6
"""Latency of one of the two all-reduces of a layer under tensor parallelism. Assumed."""
SYNC_S = 0.038
"""Of a sync, whatever its size; with NVLINK and DIGESTS by the two proven syncs without load in benchmarks/RESULTS.md."""
NVLINK = 236e9
"""Bytes a second to the server on one host."""
BETWEEN_HOSTS = 50e9
"""Bytes a second into each GPU from another host: an adapter of 400 Gb/s for each. Assumed."""
GPUS_OF_A_HOST = 8
DIGESTS = 136e9
"""Bytes a second whose digests are made on a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The rollouts of an update. Lengths in tokens."""

    rollouts: int = 256
    group_size: int = 8
    prompt: float = 100.0
    completion: float = 500.0
    """Mean."""
    longest: int = 1024
    share_prompts: bool = True

    @property
    def longest_sequence(self) -> int:
        """Which a micro-batch must hold."""
        return math.ceil(self.prompt) + self.longest

    @property
    def forwarded(self) -> float:
        """Tokens that an update trains on."""
        return self.rollouts * (self.prompt / (self.group_size if self.share_prompts else 1) + self.completion)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A GPU and its links. Rates in bytes a second."""

    gpu_memory: float = 141.0
    """The number in its name."""
    memory_rate: float = 4.8e12
    """Of an H200; 3.35e12 of an H100 with 80 GB."""
    link: float = NVLINK
    """Into each GPU, from the others and from the trainer."""
    disk: float = 2e9
    mfu: float = MFU


def decoding_costs(
    shape: Shape, machine: Machine, *, tensor_parallel: int, context: float
) -> dict[str, GenerationCost]:
    """What limits decoding, by name: vLLM's Python; the GPU's memory, from which weights are read once a step and keys and values
    for each token; its arithmetic. They work at the same time."""
    rate = machine.memory_rate * MEMORY_SHARE
    reduces = 2 * shape.layers * ALL_REDUCE_S if tensor_parallel > 1 else 0.0
    weights = COMPUTE_BYTES * shape.parameters / tensor_parallel
    operations = 2 * shape.parameters / (machine.mfu * PEAK_FLOPS * tensor_parallel)
    return {
        "python": GenerationCost(step_s=DECODE_STEP_S, token_s=DECODE_TOKEN_S),
        "memory": GenerationCost(
            step_s=weights / rate + reduces, token_s=context * kv_bytes_per_gpu(shape, tensor_parallel) / rate
        ),
        "arithmetic": GenerationCost(step_s=reduces, token_s=operations),
    }


def generation_seconds(
    shape: Shape, machine: Machine, work: Work, *, servers: int, tensor_parallel: int, in_flight: int
) -> float:
    """Of an update's rollouts on `servers`, `in_flight` at a time on each: the slowest of `decoding_costs`, after a prefill at
    the trainer's MFU."""
    rollouts = -(-work.rollouts // servers)
    context = work.prompt + work.completion / 2
    costs = decoding_costs(shape, machine, tensor_parallel=tensor_parallel, context=context)
    decode = max(
        cost.seconds(rollouts, mean=work.completion, longest=work.longest, in_flight=in_flight, refills=True)
        for cost in costs.values()
    )
    prompts = rollouts / work.group_size * work.prompt
    return decode + 2 * shape.parameters * prompts / (machine.mfu * PEAK_FLOPS * tensor_parallel)


def rows_of(work: Work, trainer: Trainer) -> tuple[int, float]:
    """(micro-batches on each training GPU, tokens of each): as few as the budget allows, evenly filled."""
    tokens = work.forwarded / trainer.gpus
    rows = max(1, -(-int(tokens) // trainer.row))
    return rows, tokens / rows


def training_seconds(shape: Shape, machine: Machine, work: Work, trainer: Trainer) -> float:
    """Of an update's passes and its step: for each micro-batch the slowest of kernels, Python and the links. Several GPUs forward
    one empty row more, whose backward pass adds up their gradients."""
    rows, tokens = rows_of(work, trainer)
    again = RECOMPUTED if trainer.checkpointing else 1.0
    operations = 6 * again
    if trainer.lora_rank:  # a frozen weight has no gradient of its own: 2 of 6
        operations -= 2
    kernels = operations * shape.parameters * tokens / (machine.mfu * PEAK_FLOPS)
    python = HOST_LAYER_S * shape.layers * again
    part = trained_parameters(shape, trainer) / trainer.gpus
    step = STEP_TRAFFIC * part / (HOST_MEMORY if trainer.cpu_offload else machine.memory_rate)
    if trainer.cpu_offload:
        python += ADDING_TRAFFIC * part / HOST_MEMORY
    row_s = max(kernels, python, shard_seconds(shape, machine, trainer, reduced=trainer.cpu_offload))
    last_s = max(python, shard_seconds(shape, machine, trainer, reduced=True)) if trainer.gpus > 1 else 0.0
    return rows * row_s + last_s + step


def shard_seconds(shape: Shape, machine: Machine, trainer: Trainer, *, reduced: bool) -> float:
    """Of what FSDP sends into each GPU in a micro-batch: all weights in bf16 for both passes, and where they are `reduced` all
    gradients in fp32. With `cpu_offload` a GPU's part comes from its host for both passes, in fp32; its gradients go there."""
    if trainer.gpus == 1:
        return 0.0
    others = (trainer.gpus - 1) / trainer.gpus
    links = others * (2 * COMPUTE_BYTES + GRADIENT_BYTES * reduced) * shape.parameters / machine.link
    to_host = (2 * MASTER_BYTES + GRADIENT_BYTES) * shape.parameters / trainer.gpus / HOST_LINK
    return max(links, to_host * trainer.cpu_offload)


def sync_bytes(shape: Shape) -> int:
    """What a sync sends: all weights in bf16, an adapter merged into them."""
    return COMPUTE_BYTES * shape.parameters


def sync_seconds(shape: Shape, machine: Machine, trainer: Trainer) -> float:
    """Of a weight sync with its proof. Before it an adapter is merged, or several GPUs' weights are gathered on GPU 0."""
    size = sync_bytes(shape)
    gather = size * (trainer.gpus - 1) / trainer.gpus / machine.link
    merge = 0.0
    if trainer.lora_rank:
        adapted = shape.layers * sum(inputs * outputs for inputs, outputs in shape.linears)
        merge = MERGE_TRAFFIC * adapted / machine.memory_rate
    return SYNC_S + merge + gather + size / machine.link + size / DIGESTS
