"""Ways to damage tensors: what goes wrong on a wire or in a memory, by chance, with a seed."""

import itertools
import random
from collections.abc import Mapping

import torch

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@torch.no_grad()
def flip_bit(tensor: torch.Tensor, rng: random.Random) -> None:
    """Flip one bit of one element that is not zero, in place: a flip that changes what is computed.

    (Of a zero, the sign and, in bfloat16 kernels, all but the exponent's bits are lost to a multiplication.)
    """
    flat = tensor.view(-1)
    places = flat.nonzero().view(-1)
    place = int(places[rng.randrange(len(places))])
    bits = flat.view(_BITS[tensor.dtype])
    width = tensor.element_size() * 8
    bit = rng.randrange(width)
    bits[place] ^= -(1 << bit) if bit == width - 1 else 1 << bit


def other_values(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Random values of the same size in its place."""
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    return (torch.randn(tensor.shape, generator=generator) * 0.1).to(tensor.dtype)


def same_shape_pairs(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, str]]:
    """Names of two tensors that can be taken for each other: the same shape, not the same values."""
    return [
        (first, second)
        for first, second in itertools.combinations(tensors, 2)
        if tensors[first].shape == tensors[second].shape and not torch.equal(tensors[first], tensors[second])
    ]
