"""The digest that proves a weight transfer: what changes it, and what must not."""

import hashlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ludic.inference import digest
from ludic.inference.digest import digest_hex, tensor_digest

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int16,
    torch.uint8,
    torch.bool,
]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks of 4 words, so that small tensors have many."""
    monkeypatch.setattr(digest, "_CHUNK_WORDS", 4)
    digest._weights.cache_clear()
    yield
    digest._weights.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_digest_depends_on_values_alone_and_not_on_how_they_lie_in_memory(dtype: torch.dtype) -> None:
    values = torch.arange(7 * 9).reshape(7, 9).remainder(2).to(dtype)
    expected = tensor_digest(values)
    assert tensor_digest(values.clone()) == expected
    assert tensor_digest(values.t().contiguous().t()) == expected
    shifted = torch.cat([values.new_zeros(1), values.flatten()])[1:].view(7, 9)  # not aligned to a word
    assert tensor_digest(shifted) == expected
    assert tensor_digest(torch.nn.Parameter(values, requires_grad=False)) == expected


@given(st.integers(1, 60), st.data())
def test_a_change_of_any_single_element_changes_the_digest(size: int, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
    values = torch.randint(-100, 100, (size,), generator=torch.Generator().manual_seed(size)).to(dtype)
    changed = values.clone()
    changed[data.draw(st.integers(0, size - 1))] += data.draw(st.sampled_from([1, -1, 64]))
    assert tensor_digest(changed) != tensor_digest(values)


@pytest.mark.usefixtures("small_chunks")
def test_a_swap_of_any_two_elements_changes_the_digest_within_and_across_chunks() -> None:
    values = torch.arange(1, 41, dtype=torch.bfloat16)
    seen = {tensor_digest(values)}
    for first in range(40):
        for second in range(first):
            swapped = values.clone()
            swapped[[first, second]] = values[[second, first]]
            seen.add(tensor_digest(swapped))
    assert len(seen) == 1 + 40 * 39 // 2


@pytest.mark.usefixtures("small_chunks")
def test_every_flipped_bit_gives_another_digest() -> None:
    values = torch.zeros(13, dtype=torch.float32)
    seen = {tensor_digest(values)}
    for element in range(13):
        for bit in range(32):
            bits = torch.zeros(13, dtype=torch.int32)
            bits[element] = -(1 << 31) if bit == 31 else 1 << bit
            seen.add(tensor_digest(bits.view(torch.float32)))
    assert len(seen) == 1 + 13 * 32


def test_dtype_and_shape_are_part_of_the_digest() -> None:
    zeros = [
        torch.zeros(shape, dtype=dtype) for shape in [(6,), (2, 3), (3, 2), (7,), (0,), (0, 2), ()] for dtype in DTYPES
    ]
    assert len({tensor_digest(tensor) for tensor in zeros}) == len(zeros)


def test_two_flipped_signs_do_not_cancel() -> None:
    values = torch.ones(64, dtype=torch.bfloat16)
    seen = {tensor_digest(values)}
    for first in range(64):
        for second in range(first):
            flipped = values.clone()
            flipped[[first, second]] = -1
            seen.add(tensor_digest(flipped))
    assert len(seen) == 1 + 64 * 63 // 2


def test_negative_zero_and_the_bits_of_nan_count() -> None:
    assert tensor_digest(torch.tensor([0.0])) != tensor_digest(torch.tensor([-0.0]))
    nan = torch.tensor([float("nan")])
    assert tensor_digest(nan) == tensor_digest(nan.clone())


def test_the_digest_is_the_documented_sum() -> None:
    """Held against the formula in plain integers, so that no device or version of torch can drift from it."""
    values = torch.tensor([1.5, -2.0, 3.25, 4.0, 5.0], dtype=torch.float32)
    raw = values.numpy().tobytes() + bytes(4)
    words = [int.from_bytes(raw[i : i + 8], "little") for i in range(0, 24, 8)]
    weights = [int(weight) % 2**64 for weight in digest._weights(torch.device("cpu"))[:3]]
    assert all(weight % 2 for weight in weights)
    products = [w * b % 2**64 for w, b in zip(weights, words, strict=True)]
    total = sum((x ^ x >> 32) * w for w, x in zip(weights, products, strict=True)) * (digest._mix(0) | 1)
    salt = int.from_bytes(hashlib.blake2b(b"torch.float32(5,)", digest_size=8).digest(), "little")
    assert tensor_digest(values) == digest._mix((total + salt) % 2**64)
    assert digest_hex(255) == "00000000000000ff"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gpu_computes_the_same_digest_as_the_cpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 100, (3, 1_000_003), generator=generator).to(dtype)
    assert tensor_digest(values.cuda()) == tensor_digest(values)
    assert tensor_digest(values.cuda()[1:]) == tensor_digest(values[1:])
