"""64-bit digests of tensors' bits, the same on the CPU and on a GPU, to prove that weights arrived.

They are made for finding mistakes, not for defending against an adversary: a transfer that stopped halfway, a stale copy,
two tensors swapped, a wrong dtype. Cryptographic hashes would need the bytes on the host; this one is a sum that runs
at memory speed where the tensors lie. It needs torch and nothing of vLLM, so both sides of a transfer share it.

Many tensors are digested at once: their bytes are laid into flat buffers (`bucket_layout`), a few kernels run over each buffer,
and the host waits once, at the end. For each gigabyte, 4 kernels a pass move about 7 GB (product: 1 read, 1 written; fold: 1 and
1; product: 1 and 1; sum: 1 read), and gathering the tensors 3 GB: some 3 ms at an H200's 4 TB/s, in about 20 passes.
"""

import functools
import hashlib
from collections.abc import Sequence

import torch

from ludic.inference.weights.bucket_layout import BLOCK_BYTES, Bucket, pack, plan_buckets

_WORD_BYTES = 8
_BLOCK_WORDS = BLOCK_BYTES // _WORD_BYTES
_PASS_BLOCKS = {"cpu": 1 << 9, "cuda": 1 << 13}
"""Blocks a pass: 2 MiB stay in a CPU's cache, 32 MiB in an H200's. The digests do not depend on it."""
_GATHER_BYTES = 64 << 20
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


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


def tensor_digests(tensors: Sequence[torch.Tensor]) -> list[int]:
    """`tensor_digest` of each of `tensors`, which lie on one device, with one wait for the device at the end.

    About 96 MiB of extra memory beside the copies of those that are not contiguous.
    """
    if not tensors:
        return []
    contiguous = [tensor.detach().contiguous() for tensor in tensors]
    sizes = [tensor.numel() * tensor.itemsize for tensor in contiguous]
    buckets = plan_buckets(sizes, _GATHER_BYTES)
    digest = FlatDigest(len(tensors), contiguous[0].device)
    buffer = torch.empty(max((b.num_bytes for b in buckets), default=0), dtype=torch.uint8, device=digest.device)
    for bucket in buckets:
        pack(bucket, contiguous, buffer)
        digest.add(bucket, buffer)
    return digest.values([(tensor.dtype, tuple(tensor.shape)) for tensor in contiguous])


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
        self.device = device
        self._sums = torch.zeros(num_tensors, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, bucket: Bucket, buffer: torch.Tensor) -> None:
        """Count in the pieces of `bucket`, which lie in `buffer` ([bytes] uint8), the gaps between them zero."""
        weights = _word_weights(self.device)
        tensor_of_block, weight_of_block = _block_tables(bucket, self.device)
        words = buffer[: bucket.num_bytes].view(torch.int64).view(-1, _BLOCK_WORDS)
        step = _PASS_BLOCKS.get(self.device.type, _PASS_BLOCKS["cpu"])
        sums = torch.empty(len(words), dtype=torch.int64, device=self.device)
        scratch = torch.empty(min(step, len(words)), _BLOCK_WORDS, dtype=torch.int64, device=self.device)
        for first in range(0, len(words), step):
            part = words[first : first + step]
            products = scratch[: len(part)]
            # int64 products and sums wrap around, which is the arithmetic mod 2^64 that is wanted.
            torch.mul(part, weights, out=products)
            halves = products.view(torch.int32)  # little-endian: the lower half of a word comes first
            halves[:, 0::2].bitwise_xor_(halves[:, 1::2])
            products.mul_(weights)
            torch.sum(products, 1, out=sums[first : first + step])
        self._sums.index_add_(0, tensor_of_block, sums.mul_(weight_of_block))

    def values(self, kinds: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[int]:
        """The digests, given each tensor's dtype and shape."""
        sums: list[int] = self._sums.tolist()
        return [_mix((total + _salt(*kind)) & _MASK) for total, kind in zip(sums, kinds, strict=True)]


def digest_hex(digest: int) -> str:
    """A digest as it is sent: 16 lower-case hex digits."""
    return f"{digest:016x}"


@functools.lru_cache(maxsize=4096)
def _salt(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return int.from_bytes(hashlib.blake2b(f"{dtype}{shape}".encode(), digest_size=_WORD_BYTES).digest(), "little")


@functools.lru_cache(maxsize=8)
def _word_weights(device: torch.device) -> torch.Tensor:
    """[_BLOCK_WORDS] odd int64 weights, made on the CPU so that every device has the same."""
    return (_mixed(torch.arange(1, _BLOCK_WORDS + 1, dtype=torch.int64)) | 1).to(device)


@functools.lru_cache(maxsize=512)
def _block_tables(bucket: Bucket, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each block of the bucket ([blocks] int64 both): which tensor it belongs to, and its weight there."""
    tensors, places = [], []
    for piece in bucket.pieces:
        blocks = -(-piece.num_bytes // BLOCK_BYTES)
        tensors.append(torch.full((blocks,), piece.tensor, dtype=torch.int64))
        places.append(torch.arange(blocks, dtype=torch.int64) + piece.start // BLOCK_BYTES)
    weights = _mixed(torch.cat(places) + (1 << 32)) | 1  # other places than the words', so other weights
    return torch.cat(tensors).to(device), weights.to(device)


def _mixed(values: torch.Tensor) -> torch.Tensor:
    """`_mix` of each of the int64 `values`."""
    values = values * _signed(_GOLDEN)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ _unsigned_shift(values, shift)) * _signed(factor)
    return values ^ _unsigned_shift(values, 31)


def _unsigned_shift(values: torch.Tensor, bits: int) -> torch.Tensor:
    """int64 `values` shifted right with zeros from the left, where torch's >> would repeat the sign."""
    return (values >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(value: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014), a bijection of 64-bit integers."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer."""
    return value - (1 << 64) if value >> 63 else value
