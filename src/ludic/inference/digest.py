"""A 64-bit digest of a tensor's bits, the same on the CPU and on a GPU, to prove that weights arrived.

It is made for finding mistakes, not for defending against an adversary: a transfer that stopped halfway, a stale copy,
two tensors swapped, a wrong dtype. Cryptographic hashes would need the bytes on the host; this one is a sum that runs
at memory speed where the tensor lives. It needs torch and nothing of vLLM, so both sides of a transfer share it.
"""

import functools
import hashlib
import math

import torch

_CHUNK_WORDS = 1 << 19
"""64-bit words a pass: 4 MiB of data, of weights, of products and of their folds, whatever the tensor's size."""
_WORD_BYTES = 8
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def tensor_digest(tensor: torch.Tensor) -> int:
    """The digest of `tensor`'s dtype, shape and raw bits, as an unsigned 64-bit integer.

    With words b_i, the tensor's bytes in row-major order read as 64-bit integers (zeros after the last byte), it is

        mix(sum_i fold(b_i * w_i) * w_i + h(dtype, shape))  mod 2^64,  fold(x) = x xor (x >> 32)

    with fixed odd pseudo-random weights w_i. Each step but the sum is a bijection of one word, so a change within one
    word, and so of any one element, always changes the digest; of several changes, such as swaps and permutations, about
    one in 2^33 at worst is missed. (Without the fold, a word's top bit would count the same wherever the word stands.)

    Any dtype but the sub-byte ones; a tensor that is not contiguous is copied first. About 16 MiB of extra memory.
    """
    contiguous = tensor.detach().contiguous()
    total = 0
    if contiguous.numel():
        total = _weighted_sum(contiguous.view(-1).view(torch.uint8))
    label = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    salt = int.from_bytes(hashlib.blake2b(label, digest_size=_WORD_BYTES).digest(), "little")
    return _mix(total + salt)


def digest_hex(digest: int) -> str:
    """A digest as it is sent: 16 lower-case hex digits."""
    return f"{digest:016x}"


def _weighted_sum(data: torch.Tensor) -> int:
    """Sum of the words of `data` ([bytes] uint8) times their weights, mod 2^64."""
    weights = _weights(data.device)
    # The weight of word i of chunk c is table[i] * f(c): odd times odd, and no table as long as the tensor.
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    chunk_bytes = _CHUNK_WORDS * _WORD_BYTES
    for chunk in range(math.ceil(data.numel() / chunk_bytes)):
        words = _as_words(data[chunk * chunk_bytes : (chunk + 1) * chunk_bytes])
        # int64 products and sums wrap around, which is the arithmetic mod 2^64 that is wanted.
        products = words * weights[: words.numel()]
        products ^= _unsigned_shift(products, 32)
        products *= weights[: words.numel()]
        total += products.sum() * _signed(_mix(chunk) | 1)
    return int(total.item()) & _MASK


def _as_words(data: torch.Tensor) -> torch.Tensor:
    """[bytes] uint8 as [words] int64, with zeros after the last byte; a view where the alignment allows it."""
    missing = -data.numel() % _WORD_BYTES
    if missing:
        data = torch.cat([data, data.new_zeros(missing)])
    elif data.storage_offset() % _WORD_BYTES or data.data_ptr() % _WORD_BYTES:
        data = data.clone()
    return data.view(torch.int64)


@functools.lru_cache(maxsize=8)
def _weights(device: torch.device) -> torch.Tensor:
    """[_CHUNK_WORDS] odd int64 weights, made on the CPU so that every device has the same."""
    weights = torch.arange(1, _CHUNK_WORDS + 1, dtype=torch.int64) * _signed(_GOLDEN)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        weights = (weights ^ _unsigned_shift(weights, shift)) * _signed(factor)
    return ((weights ^ _unsigned_shift(weights, 31)) | 1).to(device)


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
