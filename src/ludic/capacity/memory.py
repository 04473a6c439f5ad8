"""Bytes on a training GPU at the peak of an update, by part, and on a GPU of the server."""

from dataclasses import dataclass

from ludic.capacity.shapes import Shape
from ludic.train.footprint import CHECKPOINT_BYTES, COMPUTE_BYTES, GRADIENT_BYTES, MASTER_BYTES, MOMENTS_BYTES

GIB = 2**30
NAMED_SHARE = 0.99
"""GiB that torch reports of a GPU, by the number in its name: 79 of 80, 139.8 of 141."""
SERVER_SHARE = 0.9
"""Of its GPU's memory: what vLLM takes (its default of --gpu-memory-utilization)."""
SERVER_BYTES = 2 * GIB
"""On each of the server's GPUs beside weights and KV cache: activations and CUDA graphs. Assumed."""
WHOLE_COPY = "GPU 0's whole copy, bf16"
MERGED = "merged layers, at a sync"
ACTIVATIONS = "activations"
WORK = "logits chunk, or a layer"
"""Whose backward pass is the worst moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """How a model is trained. Lengths in tokens."""

    gpus: int = 1
    row: int = 16384
    """Tokens of a micro-batch, which fill it."""
    trained_share: float = 0.875
    """Of the row's tokens, those that meet the vocabulary; seven eighths is the worst case of `ludic.train.memory`."""
    chunk: int = 4096
    """Positions that meet the vocabulary at once: --logprob-chunk."""
    lora_rank: int = 0
    """0: all parameters are trained."""
    checkpointing: bool = False
    fp32_head: bool = False
    cpu_offload: bool = False
    """Of several GPUs: masters, moments, copies and reduced gradients in the hosts' memory."""


def training_parts(shape: Shape, trainer: Trainer) -> dict[str, float]:
    """Bytes on a training GPU by part, at the worst moment of an update; their sum is the peak, as
    `torch.cuda.max_memory_allocated` counts it. CUDA's own memory and NCCL's are not in it. Of several GPUs it is GPU 0, which
    has the most: its rank keeps a whole copy of the model for the servers."""
    moments = [pass_parts(shape, trainer)]
    if trainer.lora_rank:
        moments.append(sync_parts(shape, trainer))
    return max(moments, key=lambda parts: sum(parts.values()))


def pass_parts(shape: Shape, trainer: Trainer) -> dict[str, float]:
    """The worst of three moments of the passes: the output layer's backward pass; that of a layer; FSDP's last gradients, when
    no activations are left."""
    state = _state(shape, trainer)
    kept = _kept(shape, trainer) * trainer.row
    of_layer, of_last = _gradients_on_their_way(shape, trainer)
    idle = {"gradients, bf16, on their way": 0.0, ACTIVATIONS: 0.0, WORK: 0.0}
    moments = [
        state | idle | {ACTIVATIONS: kept, WORK: head_work(shape, trainer)},
        state
        | idle
        | {"gradients, bf16, on their way": of_layer, ACTIVATIONS: kept, WORK: _layer_work(shape, trainer)},
        state | idle | {"gradients, bf16, on their way": of_last},
    ]
    return max(moments, key=lambda parts: sum(parts.values()))


def sync_parts(shape: Shape, trainer: Trainer) -> dict[str, float]:
    """A sync or a checkpoint with an adapter, after the step, which drops gradients: `ludic.train.lora.Adapter.merged` needs
    the adapted layers once more in bf16, and of the largest matrix the weight and its sum with the adapter in fp32."""
    sizes = [inputs * outputs for inputs, outputs in shape.linears]
    merged = float(COMPUTE_BYTES * shape.layers * sum(sizes) + 2 * MASTER_BYTES * max(sizes))
    return _state(shape, trainer) | {"gradients, fp32": 0.0, MERGED: merged}


def _state(shape: Shape, trainer: Trainer) -> dict[str, float]:
    """What stays on GPU 0 through all micro-batches of an update. Gradients are whole on every GPU, because ranks add them up
    once an update; with `cpu_offload` after every micro-batch, into the host's memory."""
    trained = trained_parameters(shape, trainer)
    on_gpu = 0 if trainer.cpu_offload else trained
    several = trainer.gpus > 1
    gathered = shape.root_parameters + 2 * shape.layer_parameters if several else 0
    return {
        "frozen base, bf16": float(COMPUTE_BYTES * shape.parameters if trainer.lora_rank else 0),
        "masters, fp32": MASTER_BYTES * on_gpu / trainer.gpus,
        "AdamW's moments, fp32": MOMENTS_BYTES * on_gpu / trainer.gpus,
        "gradients, fp32": float(GRADIENT_BYTES * on_gpu),
        "copies, bf16": COMPUTE_BYTES * on_gpu / trainer.gpus,
        WHOLE_COPY: float(COMPUTE_BYTES * shape.parameters if several else 0),
        "gathered layers, bf16": float(COMPUTE_BYTES * gathered),
    }


def trained_parameters(shape: Shape, trainer: Trainer) -> int:
    """Of the adapter, or all."""
    return shape.adapter_parameters(trainer.lora_rank) if trainer.lora_rank else shape.parameters


def host_bytes(shape: Shape, trainer: Trainer) -> tuple[int, int, int]:
    """Of the hosts' memory with several GPUs: (for each rank while it starts, for each rank with `cpu_offload` afterwards, on
    the first host during a checkpoint): the float32 model before it is cut; masters, moments, gradients and copies; whole
    masters and moments."""
    kept = MASTER_BYTES + MOMENTS_BYTES + GRADIENT_BYTES + COMPUTE_BYTES
    return (
        MASTER_BYTES * shape.parameters,
        kept * shape.parameters // trainer.gpus if trainer.cpu_offload else 0,
        CHECKPOINT_BYTES * shape.parameters,
    )


def _gradients_on_their_way(shape: Shape, trainer: Trainer) -> tuple[float, float]:
    """(in a layer's backward pass, at the end): gradients in bf16 that are not yet added to the masters'. The output layer's
    waits for the embedding's where they are one matrix, or one unit of FSDP. FSDP reduces a unit in fp32, a copy and this
    rank's part beside it: with `cpu_offload` in each backward pass, else at the end, while all other whole gradients wait."""
    if trainer.lora_rank:
        return 0.0, 0.0
    output_layer = COMPUTE_BYTES * shape.vocabulary_parameters
    if trainer.gpus == 1:
        matrix = COMPUTE_BYTES * shape.intermediate * shape.hidden
        return float(shape.tied * output_layer + matrix), 0.0
    reduced = COMPUTE_BYTES + GRADIENT_BYTES * (1 + 1 / trainer.gpus)
    reducing = output_layer + reduced * shape.layer_parameters
    if trainer.cpu_offload:
        return reducing, reduced * shape.root_parameters
    return float(output_layer + COMPUTE_BYTES * shape.layer_parameters), reducing


def _kept(shape: Shape, trainer: Trainer) -> int:
    """Bytes of a token that all layers keep; with checkpointing their inputs alone."""
    of_layer = 2 * shape.hidden if trainer.checkpointing else shape.activation_bytes
    adapters = 0 if trainer.checkpointing else 2 * trainer.lora_rank * len(shape.linears)
    return shape.layers * (of_layer + adapters)


def head_work(shape: Shape, trainer: Trainer) -> float:
    """At the peak of `ludic.train.lm_head`: a chunk's logits with their gradient, and that of the chunk before; the weight's
    gradient, in fp32 where chunks add up, which a frozen head has not; hidden states and their gradient."""
    positions = trainer.row * trainer.trained_share
    chunk = min(float(trainer.chunk), positions)
    logits_bytes = 4 if trainer.fp32_head else 2
    several = positions > trainer.chunk
    numbers = logits_bytes + 2 + (2 if several else 0)
    weight = 0 if trainer.lora_rank else (4 if several else 2) * shape.vocabulary_parameters
    return chunk * shape.vocabulary * numbers + weight + 4 * 2 * shape.hidden * trainer.row


def _layer_work(shape: Shape, trainer: Trainer) -> float:
    """In a layer's backward pass: gradients of gate, up and their product beside the product itself, of two hidden states;
    with checkpointing also what the layer has made again."""
    gradients = 2 * (4 * shape.intermediate + 2 * shape.hidden)
    return float((gradients + shape.activation_bytes * trainer.checkpointing) * trainer.row)


def kv_bytes_per_gpu(shape: Shape, tensor_parallel: int) -> float:
    """Of a token on each GPU of a server; KV heads that are fewer than GPUs stand on several."""
    return shape.kv_cache_bytes / min(tensor_parallel, shape.kv_heads)


def kv_room(shape: Shape, tensor_parallel: int, gpu_memory: float) -> float:
    """Bytes for the KV cache on each GPU of a server; negative where the weights alone do not fit.

    `gpu_memory` is the number in the GPU's name.
    """
    have = gpu_memory * NAMED_SHARE * GIB * SERVER_SHARE
    return have - COMPUTE_BYTES * shape.parameters / tensor_parallel - SERVER_BYTES
