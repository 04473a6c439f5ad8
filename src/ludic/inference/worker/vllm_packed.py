"""Reads weights out of layers that hold them packed, so that they can be compared with those that were sent.

On the CPU, vLLM multiplies with a copy of a layer's weight that is laid out for the processor, and drops the weight itself.
A layer that multiplies the identity gives its weight back: every product but one is with a zero, and 1 * w + 0 is exact
wherever sums are kept in float32 or wider. That is not taken on trust: `PackedWeights` first lets the same kernel hold a
tensor of random bits of each shape that occurs, and reads that back. A kernel that rounds is not read at all.

What a multiplication cannot tell apart is not compared: 0.0 and -0.0, and, where the processor's instructions take subnormal
numbers (below 1.2e-38 in bfloat16) for zeros, those. `digest.canonical` makes both sides blind to exactly that. An infinity
or a NaN makes its whole row NaN, and so differs from whatever was sent.

Left out: weights that are quantised, or of more than two dimensions.
"""

from collections.abc import Callable, Container, Mapping, Sequence

import torch
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from ludic.inference.weights.digest import canonical, digest_hex, tensor_digests
from ludic.inference.worker.vllm_model import checkpoint_name, checkpoint_views

BLOCK_ROWS = 256
DISAGREE = "readings-differ-"
"""In the place of a digest: two layers hold the tensor, and not the same."""
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class PackedWeights:
    """The packed layers of a worker's model, whose weights are loaded.

    Each kind of layer first holds random bits and gives them back: a few seconds for a large model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self.inexact = ""
        """A layer whose kernel rounds, so that its weight cannot be read back; "" while none was found."""
        self.flushes = False
        """Whether any of the kernels takes subnormal numbers for zeros."""
        self._exact: dict[tuple[int, int, torch.dtype], bool] = {}
        for names, layer in packed_layers(model):
            self._is_exact(names[0], layer)

    def _is_exact(self, name: str, layer: torch.nn.Module) -> bool:
        kind = _kind(layer)
        if kind not in self._exact:
            self._exact[kind], flushes = _trial(*kind)
            self.flushes |= flushes
        if not self._exact[kind]:
            self.inexact = self.inexact or name
        return self._exact[kind]

    def digests(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
        """By checkpoint name, the digest of what the layers that hold it multiply with; "" where a kernel rounds.

        Names of which no packed layer holds anything are left out.
        """
        found: dict[str, str] = {}
        if not self._exact:  # on a GPU: not a millisecond of each sync goes into looking for packed layers
            return found
        for names, layer in packed_layers(self._model, shapes):
            exact = self._is_exact(names[0], layer)
            views = checkpoint_views(self._model, shapes, dict.fromkeys(names, read_weight(layer)))
            digests = tensor_digests([canonical(view, flush=self.flushes) for view in views.values()])
            for name, digest in zip(views, map(digest_hex, digests), strict=True):
                other = found.get(name, digest)
                found[name] = "" if not (exact and other) else digest if digest == other else DISAGREE
        return found


def packed_layers(model: torch.nn.Module, sent: Container[str] = ()) -> list[tuple[list[str], torch.nn.Module]]:
    """The layers that multiply with a packed copy, each with all names under which its weight can be asked for.

    The output head of a tied model has no tensor of its own in a checkpoint: it goes by the embedding's, also where the two
    are tied no longer but nothing under the head's own name is among the tensors `sent`. An embedding is packed too, but
    multiplies only where it is the output head itself.
    """
    layers: dict[torch.nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if hasattr(module, "cpu_linear") and not module.get_parameter("weight").is_meta:
            layers.setdefault(module, []).append(checkpoint_name(f"{name}.weight"))
    embeddings = [layer for layer in layers if isinstance(layer, VocabParallelEmbedding)]
    heads = [layer for layer in embeddings if isinstance(layer, ParallelLMHead)]
    for embedding in embeddings if heads else []:
        if embedding not in heads:
            names = layers.pop(embedding)
            for head in heads:
                if head.weight is embedding.weight or not any(name in sent for name in layers[head]):
                    layers[head] += names
    return [(names, layer) for layer, names in layers.items()]


@torch.no_grad()
def read_weight(layer: torch.nn.Module) -> torch.Tensor:
    """[N, K] what a layer with K inputs and N outputs multiplies with, at the cost of K tokens' products."""
    height, width, dtype = _kind(layer)
    picks = torch.zeros(min(BLOCK_ROWS, width), width, dtype=dtype)
    whole = torch.empty(height, width, dtype=dtype)
    for first in range(0, width, BLOCK_ROWS):
        rows = picks[: width - first].zero_()
        rows.diagonal(first).fill_(1)
        whole[:, first : first + len(rows)] = _multiply(layer, rows).t()  # of [rows, N]
    return whole


def _kind(layer: torch.nn.Module) -> tuple[int, int, torch.dtype]:
    """Outputs, inputs and dtype: what decides on the kernel."""
    dtype = layer.get_parameter("weight").dtype
    if isinstance(layer, VocabParallelEmbedding):
        width = layer.embedding_dim
    else:  # linear layers that can be split along their inputs have the former
        width = getattr(layer, "input_size_per_partition", None) or layer.input_size
    return _multiply(layer, torch.zeros(1, width, dtype=dtype)).shape[1], width, dtype


def _multiply(layer: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """What the layer makes of `rows`, without its bias."""
    kernel: Callable[[torch.Tensor, torch.Tensor, None], torch.Tensor] = layer.cpu_linear  # type: ignore[assignment]
    return kernel(rows, layer.get_parameter("weight"), None)  # empty, where vLLM has dropped it for the packed copy


@torch.no_grad()
def _trial(rows: int, width: int, dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether a packed layer of this kind gives back random bits, and whether it does so but for subnormal numbers."""
    if dtype not in _BITS:
        return False, False
    whole = torch.iinfo(_BITS[dtype])
    generator = torch.Generator().manual_seed(rows * width)
    bits = torch.randint(whole.min, whole.max, (rows, width), dtype=_BITS[dtype], generator=generator)
    wanted = bits.view(dtype)
    wanted.masked_fill_(~wanted.isfinite(), 1.0)
    scratch = torch.nn.Module()
    scratch.input_size = width  # type: ignore[assignment, unused-ignore]
    scratch.weight = torch.nn.Parameter(wanted.clone(), requires_grad=False)
    dispatch_cpu_unquantized_gemm(scratch, remove_weight=True)
    read = read_weight(scratch)
    if torch.equal(read, wanted):
        return True, False
    # A server in float16 has weights that are subnormal: to be blind to those would be to miss changes.
    flushes = dtype != torch.float16 and torch.equal(canonical(read, flush=True), canonical(wanted, flush=True))
    return flushes, flushes
