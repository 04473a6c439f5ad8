"""64-bit digests of tensors' bits, the same on the CPU and on a GPU, to prove that weights arrived.

They are made for finding mistakes, not for defending against an adversary: a transfer that stopped halfway, a stale copy,
two tensors swapped, a wrong dtype. Cryptographic hashes would need the bytes on the host; this one is a sum that runs
at memory speed where the tensors lie. It needs torch and nothing of vLLM, so both sides of a transfer share it.

Many tensors are digested at once: their bytes are laid into flat buffers (`bucket_layout`), 4 kernels run over each part of a
buffer, and the host waits once, at the end.
"""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from ludic.inference.weights.bucket_layout import BLOCK_BYTES, Bucket, pack, plan_buckets

_WORD_BYTES = 8
_BLOCK_WORDS = BLOCK_BYTES // _WORD_BYTES
_PASS_BLOCKS = {"cpu": 1 << 9, "cuda": 1 << 13}
"""Blocks a pass: 2 MiB stay in a CPU's cache, 32 MiB in an H200's. The digests do not depend on it."""
_GATHER_BYTES = 64 << 20
_GOLDEN = 0x9E3779B97F4A7C15

Words = npt.NDArray[np.uint64]


def tensor_digest(tensor: torch.Tensor) -> int:
    """The digest of `tensor`'s dtype, shape and raw bits, as an unsigned 64-bit integer.

    With words b_i, the tensor's bytes in row-major order read as little-endian 64-bit integers (zeros after the last
    byte), in blocks j of 512 words, it is

        mix(sum_j v_j * sum_(i in j) fold(b_i * w_i) * w_i + h(dtype, shape))  mod 2^64,  fold(x) = x xor (x >> 32)

    with fixed odd pseudo-random weights w_i of a word by its place in the block, and v_j of a block by its number. Each
    step but the sums is a bijection of one word, so a change within one word, and so of any one element, always changes the
    digest; of several changes, such as swaps and moved blocks, about one in 2^33 at worst is missed. (Without the fold, a
    word's top bit would count the same wherever the word stands.)

    Any dtype but the sub-byte ones; a tensor that is not contiguous is copied first.
    """
    return tensor_digests([tensor])[0]


def tensor_digests(tensors: Sequence[torch.Tensor], dtype: torch.dtype | None = None) -> list[int]:
    """`tensor_digest` of each of `tensors`, cast to `dtype` if there is one, with one wait for the device at the end.

    They lie on one device. About 96 MiB of extra memory beside the copies of those that are not contiguous.
    """
    if not tensors:
        return []
    contiguous = [tensor.detach().contiguous() for tensor in tensors]
    kinds = [(dtype or tensor.dtype, tuple(tensor.shape)) for tensor in contiguous]
    sizes = [tensor.numel() * kind.itemsize for tensor, (kind, _) in zip(contiguous, kinds, strict=True)]
    buckets = plan_buckets(sizes, _GATHER_BYTES)
    device = contiguous[0].device
    digest = FlatDigest(len(tensors), device)
    buffer = torch.empty(max((b.num_bytes for b in buckets), default=0), dtype=torch.uint8, device=device)
    for bucket in buckets:
        pack(bucket, contiguous, buffer, dtype)
        digest.add(bucket, buffer)
    return digest.values(kinds)


def canonical(tensor: torch.Tensor, *, flush: bool) -> torch.Tensor:
    """`tensor` with 0.0 in the place of each -0.0, and of each subnormal number too if `flush`: what remains of a weight
    that was read through a multiplication (see `vllm_packed`)."""
    is_zero = tensor.abs() < torch.finfo(tensor.dtype).tiny if flush else tensor == 0
    return tensor.masked_fill(is_zero, 0.0)


class FlatDigest:
    """Sums the digests of `num_tensors` tensors from buffers that hold pieces of them, in any order and any cut.

    `add` only launches work; `values` waits for it.
    """

    def __init__(self, num_tensors: int, device: torch.device) -> None:
        self._device = device
        self._sums = torch.zeros(num_tensors, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, bucket: Bucket, buffer: torch.Tensor) -> None:
        """Count in the pieces of `bucket`, which lie in `buffer` ([bytes] uint8), the gaps between them zero."""
        weights = _word_weights(self._device)
        tensor_of_block, weight_of_block = _block_tables(bucket, self._device)
        words = buffer[: bucket.num_bytes].view(torch.int64).view(-1, _BLOCK_WORDS)
        step = _PASS_BLOCKS.get(self._device.type, _PASS_BLOCKS["cpu"])
        sums = torch.empty(len(words), dtype=torch.int64, device=self._device)
        scratch = torch.empty(min(step, len(words)), _BLOCK_WORDS, dtype=torch.int64, device=self._device)
        for first in range(0, len(words), step):
            part = words[first : first + step]
            products = scratch[: len(part)]
            # int64 products and sums wrap around, as numpy's uint64 below: the arithmetic mod 2^64 that is wanted.
            torch.mul(part, weights, out=products)
            halves = products.view(torch.int32)  # little-endian: the lower half of a word comes first
            halves[:, 0::2].bitwise_xor_(halves[:, 1::2])
            products.mul_(weights)
            torch.sum(products, 1, out=sums[first : first + step])
        self._sums.index_add_(0, tensor_of_block, sums.mul_(weight_of_block))

    def values(self, kinds: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[int]:
        """The digests, given each tensor's dtype and shape."""
        salts = np.array([_salt(*kind) for kind in kinds], dtype=np.uint64)
        digests: list[int] = _mix(self._sums.cpu().numpy().view(np.uint64) + salts + _GOLDEN).tolist()
        return digests


def digest_hex(digest: int) -> str:
    """A digest as it is sent: 16 lower-case hex digits."""
    return f"{digest:016x}"


@functools.lru_cache(maxsize=4096)
def _salt(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return int.from_bytes(hashlib.blake2b(f"{dtype}{shape}".encode(), digest_size=_WORD_BYTES).digest(), "little")


@functools.lru_cache(maxsize=8)
def _word_weights(device: torch.device) -> torch.Tensor:
    """[_BLOCK_WORDS] odd int64 weights."""
    return _weights(np.arange(1, _BLOCK_WORDS + 1, dtype=np.uint64)).to(device)


@functools.lru_cache(maxsize=512)
def _block_tables(bucket: Bucket, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each block of the bucket ([blocks] int64 both): which tensor it belongs to, and its weight there."""
    counts = [-(-piece.num_bytes // BLOCK_BYTES) for piece in bucket.pieces]
    tensors = torch.from_numpy(np.repeat([piece.tensor for piece in bucket.pieces], counts))
    firsts = [piece.start // BLOCK_BYTES for piece in bucket.pieces]
    places = np.concatenate([np.arange(first, first + count) for first, count in zip(firsts, counts, strict=True)])
    weights = _weights(places.astype(np.uint64) + (1 << 32))  # other places than the words', so other weights
    return tensors.to(device), weights.to(device)


def _weights(places: Words) -> torch.Tensor:
    """The odd pseudo-random weights of these places, made on the CPU so that every device has the same."""
    return torch.from_numpy((_mix(places * _GOLDEN) | 1).view(np.int64))


def _mix(words: Words) -> Words:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014), a bijection of 64-bit integers, of each of `words`."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
    return words ^ (words >> np.uint64(31))
